/* tile_profile.c: run a model and show where the time of its tile program goes. */
#include "tile_profile_gpu.h"

#include "base/atomic.h"
#include "base/bandwidth.h"
#include "base/provenance.h"
#include "base/table.h"
#include "decode/generate.h"
#include "decode/pair.h"
#include "plan/profile.h"
#include "plan/profile_files.h"
#include "plan/tiles.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEFAULT_PROMPT "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n"

static const struct us_opt opts[] = {
    US_OPT_FILE("model", 'm', "MODEL",
                "checkpoint: an .h5 file, a Hugging Face folder, or - for a record on stdin",
                .required = true),
    US_OPT_FILE("draft", 'd', "DRAFT", "drafter of the model: speculative rounds are profiled"),
    US_OPT_STR("prompt", 'p', "TEXT", "prompt", .def = DEFAULT_PROMPT),
    US_OPT_INT("max-tokens", 'n', "N", "tokens to generate", .def = "32", .min = 1, .max = 65536),
    US_OPT_INT("block", 'b', "B", "rows of a round, anchor included; 0: the drafter's block", .def = "0",
               .max = US_MAX_BLOCK),
    US_TILE_PROFILE_GPU_OPTIONS,
    US_OPT_GROUP("Files"),
    US_OPT_FILE("output", 'o', "FILE.h5", "trace as an HDF5 artefact", .writes = US_OPT_WRITES_FILE),
    US_OPT_FILE("tsv", 0, "FILE", "trace as TSV, one task a line", .writes = US_OPT_WRITES_FILE),
    US_OPT_FILE("perfetto", 0, "FILE.json", "trace for ui.perfetto.dev", .writes = US_OPT_WRITES_FILE),
    US_OPT_FILE("plot", 0, "FILE.png", "timeline of the last --window milliseconds, of GPUs of the middle",
                .writes = US_OPT_WRITES_FILE),
    US_OPT_NUM("window", 0, "MS", "milliseconds that the picture shows, 0: all; default: 10, of GPUs 0.3",
               .max = 1e9),
    US_OPT_GROUP("Common options"),
    US_OPT_INT("seed", 0, "N", "seed of everything random", .def = "1"),
    US_OPT_INT("threads", 0, "N", "CPU threads; 0 uses every core", .def = "0", .max = 256),
    US_OPT_INT("spans", 0, "N", "most tasks to keep", .def = "1M", .min = 1),
    US_OPT_INT("bandwidth-bytes", 0, "N", "bytes to read when measuring the machine's bandwidth",
               .def = "512M", .min = 1048576),
    US_OPT_FLAG("json", 0, "records as JSON lines instead of TSV"),
    US_OPT_COMMON_TALK,
    US_OPT_END};

/* What a run owns. */
struct session {
  struct us_tool_run *run;
  struct us_pool *pool;
  struct us_pair pair;
  struct us_executor *executor;
  struct us_trace *trace;
  char *provenance;
  bool gpu; /* the engine runs, not the CPU's threads */
};

static void close_session(struct session *s) {
  free(s->provenance);
  us_trace_free(s->trace);
  if (s->executor) s->executor->ops->free(s->executor);
  us_pair_release(&s->pair);
  us_pool_free(s->pool);
}

static enum us_status make_provenance(struct session *s, struct us_err *err) {
  struct us_provenance *provenance = NULL;
  enum us_status status =
      us_tool_provenance(s->run, (uint64_t)us_opt_int(s->run->opts, "seed"), &provenance, err);
  if (status == US_OK && s->pair.model)
    status = us_tool_add_parent(provenance, s->pair.model_record.path, "model", err);
  if (status == US_OK && s->pair.draft)
    status = us_tool_add_parent(provenance, s->pair.draft_record.path, "draft", err);
  if (status == US_OK && !(s->provenance = us_provenance_text(provenance, err))) status = err->status;
  us_provenance_free(provenance);
  return status;
}

static enum us_status open_session(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  s->gpu = us_opt_device(o, "device") >= 0;
  enum us_status status = us_tile_profile_check(o, err);
  if (status == US_OK) status = us_tool_check_outputs(s->run, err);
  if (status == US_OK) status = us_pool_create((int)us_opt_int(o, "threads"), &s->pool, err);
  if (status == US_OK && !us_opt_given(o, "synthetic"))
    status = us_pair_open(us_opt_str(o, "model"), us_opt_str(o, "draft"), stdin, &s->pair, err);
  if (status == US_OK)
    status = s->gpu ? us_tile_profile_open(s->run, &s->pair, &s->executor, err)
                    : us_executor_create_tiles(s->pair.model, s->pair.draft, s->pool, US_ROUND_BF16,
                                               &s->executor, err);
  if (status == US_OK) status = us_trace_create((size_t)us_opt_int(o, "spans"), &s->trace, err);
  if (status == US_OK) status = make_provenance(s, err);
  return status;
}

static enum us_status generate(struct session *s, struct us_generate_stats *stats, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  const char *prompt = us_opt_str(o, "prompt");
  struct us_ids ids = {0};
  enum us_status status = us_tokenizer_encode(s->pair.tokenizer, prompt, strlen(prompt), true, &ids, err);
  if (status != US_OK) return status;
  struct us_request request = {.prompt = ids.ids,
                               .prompt_count = ids.count,
                               .seed = (uint64_t)us_opt_int(o, "seed"),
                               .max_tokens = (uint32_t)us_opt_int(o, "max-tokens")};
  struct us_generate_options options = {.tokenizer = s->pair.tokenizer,
                                        .interrupted = us_tool_interrupted,
                                        .block = s->pair.draft ? (uint32_t)us_opt_int(o, "block") : 1};
  struct us_result result;
  us_executor_tiles_trace(s->executor, s->trace);
  status = us_generate(s->executor, &request, 1, &options, &result, stats, err);
  us_executor_tiles_trace(s->executor, NULL);
  if (status == US_OK) us_result_release(&result);
  us_ids_release(&ids);
  return status;
}

/* Clocks tell nanoseconds, and so sums of them; shares and rates have six digits. */
static double nanoseconds(double milliseconds) {
  return round(milliseconds * 1e6) / 1e6;
}
static double six_digits(double value) {
  char text[32];
  snprintf(text, sizeof text, "%.6g", value);
  return strtod(text, NULL);
}

/* One line an operation, then the sums. */
static enum us_status print_profile(struct session *s, const struct us_profile *p, double bandwidth,
                                    struct us_err *err) {
  static const char *const columns[] = {"program", "op",    "tasks",    "busy_ms",     "busy_share",
                                        "wait_ms", "bytes", "gb_per_s", "of_bandwidth"};
  struct us_table *table;
  enum us_status status =
      us_table_open(s->run->out, columns, 9, us_opt_flag(s->run->opts, "json"), &table, err);
  if (status != US_OK) return status;
  for (int kind = 0; kind < US_PROGRAM_KINDS; kind++)
    for (int op = 0; op < US_TASK_OP_COUNT; op++) {
      const struct us_profile_op *row = &p->ops[kind][op];
      if (!row->tasks) continue;
      /* While an op runs alone on all workers it streams bytes in busy / workers seconds. */
      double rate = row->busy > 0 ? row->bytes * p->workers / row->busy : 0;
      us_table_text(table, us_program_kind_name(kind));
      us_table_text(table, us_task_op_name(op));
      us_table_int(table, (int64_t)row->tasks);
      us_table_num(table, nanoseconds(1e3 * row->busy));
      us_table_num(table, six_digits(p->busy > 0 ? row->busy / p->busy : 0));
      us_table_num(table, nanoseconds(1e3 * row->wait));
      us_table_num(table, row->bytes);
      us_table_num(table, six_digits(rate / 1e9));
      us_table_num(table, six_digits(rate / bandwidth));
    }
  return us_table_close(table, err);
}

/* Write one text form of the trace through an atomic file. */
static enum us_status write_text(const struct us_trace *trace, const char *path,
                                 enum us_status (*write)(const struct us_trace *, FILE *, struct us_err *),
                                 struct us_err *err) {
  struct us_atomic out;
  enum us_status status = us_atomic_open(path, &out, err);
  if (status != US_OK) return status;
  FILE *file = fdopen(dup(out.fd), "w");
  status = file ? write(trace, file, err) : us_err_errno(err, US_ERR_IO, "cannot write '%s'", path);
  if (file && status != US_OK) us_err_prefix(err, "%s", path);
  if (file && fclose(file) != 0 && status == US_OK)
    status = us_err_errno(err, US_ERR_IO, "cannot write '%s'", path);
  if (status == US_OK) return us_atomic_commit(&out, err);
  us_atomic_abandon(&out);
  return status;
}

static enum us_status write_files(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  const char *tsv = us_opt_str(o, "tsv"), *perfetto = us_opt_str(o, "perfetto"),
             *plot = us_opt_str(o, "plot");
  const char *output = us_opt_str(o, "output");
  enum us_status status = US_OK;
  if (tsv) status = write_text(s->trace, tsv, us_profile_write_tsv, err);
  if (status == US_OK && perfetto) status = write_text(s->trace, perfetto, us_profile_write_perfetto, err);
  double window = us_opt_given(o, "window") ? us_opt_num(o, "window") : s->gpu ? 0.3 : 10;
  if (status == US_OK && plot)
    status = s->gpu ? us_profile_plot_engine(s->trace, window, plot, s->provenance, err)
                    : us_profile_plot(s->trace, us_pool_threads(s->pool), window, plot, s->provenance, err);
  if (status == US_OK && output) status = us_profile_write_h5(s->trace, output, s->provenance, err);
  return status;
}

static enum us_status profile(struct session *s, struct us_err *err) {
  struct us_generate_stats stats;
  struct us_profile p;
  double bandwidth;
  enum us_status status =
      us_bandwidth_measure(s->pool, (size_t)us_opt_int(s->run->opts, "bandwidth-bytes"), &bandwidth, err);
  if (status == US_OK) status = generate(s, &stats, err);
  if (status != US_OK) return status;
  us_profile_summarise(s->trace, us_pool_threads(s->pool), &p);
  status = print_profile(s, &p, bandwidth, err);
  if (status == US_OK) status = write_files(s, err);
  if (status != US_OK) return status;
  us_log_notice(s->run->log, "%llu tokens in %.1f ms, %u passes, %zu tasks (%zu more not kept)",
                (unsigned long long)stats.generated_tokens, 1e3 * stats.seconds, p.passes,
                us_trace_count(s->trace), us_trace_dropped(s->trace));
  us_log_notice(s->run->log,
                "passes take %.1f %% of the time; in them workers idle %.1f %%, %.1f %% waiting for events",
                100 * p.in_passes / p.span, 100 * p.idle_share, 100 * p.wait / (p.workers * p.in_passes));
  us_log_notice(s->run->log, "weights stream at %.2f GB/s in passes, %.1f %% of the %.2f GB/s measured",
                p.bytes / p.in_passes / 1e9, 100 * p.bytes / p.in_passes / bandwidth, bandwidth / 1e9);
  return US_OK;
}

static enum us_status profile_gpu(struct session *s, struct us_err *err) {
  enum us_status status = us_tile_profile_gpu(s->run, s->executor, s->trace, err);
  return status == US_OK ? write_files(s, err) : status;
}

static enum us_status run_tool(struct us_tool_run *run, struct us_err *err) {
  struct session session = {.run = run};
  enum us_status status = open_session(&session, err);
  if (status == US_OK) status = session.gpu ? profile_gpu(&session, err) : profile(&session, err);
  close_session(&session);
  return status;
}

static const struct us_tool tool = {
    .name = "tile-profile",
    .summary = "show where the time of a model's tile program goes",
    .description =
        "Generates tokens and records every task of the tile program: when a worker claimed it, "
        "when its inputs were "
        "ready, when it ended, and the weight bytes it streamed. Prints a line an operation: "
        "worker time, waiting, bytes, "
        "and bytes a second against the read bandwidth of this machine, measured in the same run. "
        "A small model's weights "
        "lie in the caches, so it may exceed that.\n\n"
        "On GPUs it runs rounds of sequences that stand at --context, without and with recording, and "
        "splits a round's time, "
        "a mean over SMs, into work and waiting by cause. Waiting for an empty ring is waiting for "
        "the memory; a rate above "
        "the ceiling means that the ring was filled during the operation before.",
    .examples = "# a picture of ten milliseconds of speculative decoding\n"
                "tile-profile -m q.h5 -d d.h5 --plot timeline.png --perfetto timeline.json\n"
                "# where a round of the engine goes, on random weights\n"
                "tile-profile -m mimo-v2.5-pro -d mimo-v2.5-pro-dflash --synthetic 1 --uniform --device cuda "
                "--gpus 4 "
                "--plot round.png\n",
    .opts = opts,
    .run = run_tool};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
