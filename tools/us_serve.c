/* us_serve.c: generate text with a model, plainly or with a drafter. */
#include "base/io.h"
#include "base/opt_value.h"
#include "base/philox.h"
#include "base/progress.h"
#include "decode/pair.h"
#include "decode/serve.h"
#include "device/executor.h"
#include "model/random.h"
#include "plan/tiles.h"
#include "tools/synthetic_shape.h"
#include "tools/us_serve_bench.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct us_opt opts[] = {
    US_OPT_GROUP("What runs"),
    US_OPT_FILE("model", 'm', "FILE", "checkpoint: a folder or an .h5 file; - reads its record from stdin",
                .required = true),
    US_OPT_FILE("draft", 'd', "FILE", "drafter of this model; - reads its record from stdin"),
    US_OPT_SYNTHETIC_SHAPE,
    US_OPT_ARG("prompts", "PROMPTS", "prompts as JSON lines, or a folder of them; - is stdin",
               .repeat = true),
    US_OPT_STR("prompt", 'p', "TEXT", "prompt", .repeat = true),
    US_OPT_FILE("file", 'f', "FILE", "text file that is one prompt", .repeat = true),
    US_OPT_INT("prompt-tokens", 0, "N", "prompt of N random tokens", .min = 1, .max = 1 << 20,
               .repeat = true),
    US_OPT_FLAG("chat", 0, "text prompts are user turns of the chat template"),
    US_OPT_FLAG("raw", 0, "refuse prompts that need the chat template"),
    US_OPT_FLAG("thinking", 0, "let a chat answer think first"),
    US_OPT_FLAG("plain-turns", 0, "chat without a default system turn and empty think tags"),
    US_OPT_GROUP("Sampling"),
    US_OPT_INT("max-tokens", 0, "N", "generated tokens a sample", .def = "256", .min = 1, .max = 1 << 20),
    US_OPT_NUM("temperature", 't', "T", "0 is greedy", .def = "0", .max = 100),
    US_OPT_INT("top-k", 0, "K", "keep the K likeliest tokens; 0 is off", .def = "0", .max = 1 << 24),
    US_OPT_NUM("top-p", 0, "P", "then the likeliest with mass P; 1 is off", .def = "1", .max = 1),
    US_OPT_NUM("min-p", 0, "P", "then those at least P times as likely as the first; 0 is off", .def = "0",
               .max = 1),
    US_OPT_INT("samples", 'n', "N", "samples a prompt, which share its cache", .def = "1", .min = 1,
               .max = US_MAX_SAMPLES),
    US_OPT_FLAG("best", 0, "print only the sample with the largest mean log-probability"),
    US_OPT_FLAG("logprobs", 0, "log-probabilities in the JSON lines"),
    US_OPT_STR("stop", 0, "TEXT", "end before this text", .repeat = true),
    US_OPT_FLAG("ignore-end", 0, "go on after end-of-turn tokens"),
    US_OPT_FLAG("cut-loops", 0, "end a sample once a 24-gram occurs three times"),
    US_OPT_GROUP("Speculation"),
    US_OPT_INT("block", 0, "B", "anchor and drafts a round; 0 is the drafter's, 1 is plain", .def = "0",
               .max = US_MAX_BLOCK),
    US_OPT_ENUM("verify", 0, "match|reject|block", "which drafts survive; match equals plain decoding",
                .def = "match"),
    US_OPT_FLAG("adaptive", 0, "verify only as many drafts as pay for their bytes"),
    US_OPT_FILE("draft-from", 0, "RUN",
                "propose the tokens of a recorded plain run instead of the drafter's"),
    US_OPT_STR("accept", 0, "P,P,...", "rates at which the recorded tokens are kept, by slot", .def = "1"),
    US_OPT_INT("batch", 0, "N", "sequences that step together", .def = "1", .min = 1, .max = US_MAX_BATCH),
    US_OPT_GROUP("GPUs"),
    US_OPT_DEVICE("device", 0, "where to compute: cpu, cuda or cuda:N", .def = "cpu"),
    US_OPT_INT("gpus", 0, "N", "number of GPUs, from --device on", .def = "1", .min = 1, .max = 8),
    US_OPT_ENUM("engine", 0, "engine|graph",
                "one persistent kernel, or a CUDA graph of one kernel an operation", .def = "engine"),
    US_OPT_INT("positions", 0, "N", "positions of a sequence that the caches hold; 0: as many as fit",
               .def = "0", .max = 1 << 20),
    US_OPT_FLAG("uniform", 0, "synthetic weights: draw experts uniformly instead of by the router"),
    US_SERVE_BENCH_OPTIONS,
    US_OPT_GROUP("Output"),
    US_OPT_FLAG("json", 0, "JSON lines also to a terminal"),
    US_OPT_FLAG("text", 0, "plain text also to a pipe"),
    US_OPT_FLAG("stats", 0, "detailed statistics at the end"),
    US_OPT_GROUP("Common options"),
    US_OPT_INT("seed", 0, "N", "seed of everything random", .def = "1"),
    US_OPT_INT("threads", 0, "N", "CPU threads; 0 uses every core", .def = "0", .max = 256),
    US_OPT_COMMON_TALK,
    US_OPT_END};

static const char description[] = "Answers every prompt with the model, on a terminal as text while it is "
                                  "generated, else as JSON lines that record "
                                  "the run. With a drafter, decoding is speculative; with --verify match, or "
                                  "at temperature 0, the tokens are exactly "
                                  "those of plain decoding. Without prompts on the command line, stdin is "
                                  "one prompt. Statistics go to stderr.";

static const char examples[] =
    "# continue a text\n"
    "us-serve -m pico.h5 -p 'def fibonacci(n):'\n"
    "# answer a prompt set with a drafter, four at a time, and record the run\n"
    "us-serve -m q.h5 -d d.h5 --batch 4 data/prompts/math.jsonl > run.jsonl\n"
    "# every accept length on any weights: replay a plain run\n"
    "us-serve -m q.h5 -d d.h5 --draft-from run.jsonl --accept 0.9,0.8,0.7 "
    "data/prompts/math.jsonl\n"
    "# random weights of a shape on four GPUs, token ids in and out\n"
    "us-serve -m mimo-v2.5-pro -d mimo-v2.5-pro-dflash --synthetic 1 --device cuda "
    "--gpus 4 --prompt-tokens 512\n"
    "# how fast is the engine there, at which fraction of the memory's limit?\n"
    "us-serve --bench -m mimo-v2.5-pro -d mimo-v2.5-pro-dflash --synthetic 1 --uniform --device cuda "
    "--gpus 4 --precision attn.o=fp8,draft=fp8 --accept 0.9 --context 4K,32K --batches 1,2,4 --plot "
    "speed.png\n";

/* Everything that main opens. */
struct session {
  struct us_tool_run *run;
  struct us_pair
      pair; /* of synthetic weights: without a tokenizer, and without models if they are made on a GPU */
  struct us_pool *pool;
  struct us_executor *ex;
  struct us_progress progress;
  bool loading;
  struct us_run *replay;
  struct us_prompt *prompts;
  size_t n, capacity;
  struct us_prompts **sets; /* own the prompts of files */
  struct us_buffer *texts;  /* own the texts of files */
  int32_t **random;         /* own the tokens of random prompts */
  size_t n_sets, n_texts, n_random;
  const char **stops;
  float accept[US_MAX_BLOCK];
  size_t accept_count;
  struct us_serve_bench_plan bench;
  bool as_text, streaming;
  uint64_t answered;
};

/* ---- the model and what runs it ---- */

static void say(void *arg, const char *line) {
  us_log_notice(((struct session *)arg)->run->log, "%s", line);
}

static void loaded(void *arg, uint64_t done, uint64_t total) {
  struct session *s = arg;
  if (!s->loading)
    us_progress_start(&s->progress, s->run->quiet ? NULL : stderr, "weights to the GPU", "bytes", total);
  s->loading = true;
  us_progress_set(&s->progress, done);
}

static struct us_executor_cuda_options gpu_options(struct session *s) {
  struct us_opts *o = s->run->opts;
  return (struct us_executor_cuda_options){
      .device = us_opt_device(o, "device"),
      .gpus = (uint32_t)us_opt_int(o, "gpus"),
      .mode = us_opt_choice(o, "engine") == 1 ? US_DEVICE_GRAPH : US_DEVICE_ENGINE,
      .sequences = s->bench.sequences ? s->bench.sequences
                                      : (uint32_t)us_opt_int(o, "batch") +
                                            1, /* and a prompt whose samples have not all started */
      .positions = s->bench.positions ? s->bench.positions : (uint32_t)us_opt_int(o, "positions"),
      .uniform = us_opt_flag(o, "uniform"),
      .uniform_seed = (uint64_t)us_opt_int(o, "seed"),
      .say = say,
      .progress = loaded,
      .arg = s};
}

/* Random weights: on the GPUs, or the same ones here. */
static enum us_status open_synthetic(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  struct us_synthetic_shape of;
  uint64_t seed = (uint64_t)us_opt_int(o, "synthetic");
  enum us_status status = us_tool_synthetic_shape(o, &of, err);
  if (status != US_OK) return status;
  if (us_opt_device(o, "device") >= 0) {
    struct us_executor_cuda_options options = gpu_options(s);
    return us_executor_create_synthetic(&of.shape, of.drafting ? &of.draft : NULL, seed, &options, &s->ex,
                                        err);
  }
  status = us_tool_synthetic_fits(&of, err);
  if (status == US_OK) status = us_model_random(&of.shape, seed, s->pool, &s->pair.model, err);
  if (status == US_OK)
    snprintf(s->pair.model->path, sizeof s->pair.model->path, "%s, random weights of seed %llu",
             of.shape.name, (unsigned long long)seed);
  if (status == US_OK && of.drafting)
    status = us_draft_random(&of.draft, of.shape.precision.draft, seed, s->pool, &s->pair.draft, err);
  return status;
}

static enum us_status open_model(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  bool synthetic = us_opt_given(o, "synthetic"), gpu = us_opt_device(o, "device") >= 0;
  if (us_opt_flag(o, "uniform") && !(synthetic && gpu))
    return us_err_set(err, US_ERR_USAGE, "--uniform needs --synthetic and --device cuda");
  enum us_status status = us_tool_synthetic_check(o, err);
  if (status == US_OK) status = us_pool_create((int)us_opt_int(o, "threads"), &s->pool, err);
  if (status == US_OK)
    status = synthetic ? open_synthetic(s, err)
                       : us_pair_open(us_opt_str(o, "model"), us_opt_str(o, "draft"), stdin, &s->pair, err);
  if (status == US_OK && !s->ex && gpu) {
    struct us_executor_cuda_options options = gpu_options(s);
    status = us_executor_create_cuda(s->pair.model, s->pair.draft, &options, &s->ex, err);
  } else if (status == US_OK && !s->ex) {
    status = us_executor_create_tiles(s->pair.model, s->pair.draft, s->pool, US_ROUND_BF16, &s->ex, err);
  }
  if (s->loading) us_progress_end(&s->progress);
  return status;
}

/* ---- prompts ---- */

static enum us_status add_prompts(struct session *s, const struct us_prompt *prompts, size_t n,
                                  struct us_err *err) {
  if (s->n + n > s->capacity) {
    size_t capacity = 2 * (s->n + n);
    struct us_prompt *grown = realloc(s->prompts, capacity * sizeof *grown);
    if (!grown) return us_err_memory(err, "prompts", capacity * sizeof *grown);
    s->prompts = grown;
    s->capacity = capacity;
  }
  memcpy(s->prompts + s->n, prompts, n * sizeof *prompts);
  s->n += n;
  return US_OK;
}

static enum us_status add_text_file(struct session *s, const char *path, struct us_err *err) {
  struct us_buffer *text = &s->texts[s->n_texts++];
  enum us_status status = us_buffer_read_file(text, path, (size_t)64 << 20, err);
  if (status != US_OK) return status;
  if (strlen(text->data ? text->data : "") != text->size)
    return us_err_set(err, US_ERR_INPUT, "%s: byte %zu is NUL; a prompt is text", path, strlen(text->data));
  struct us_prompt prompt = us_serve_text_prompt(path, text->data ? text->data : "");
  return add_prompts(s, &prompt, 1, err);
}

/* Tokens that any build draws alike, below the vocabulary's size. */
static enum us_status add_random(struct session *s, size_t index, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  int64_t count = 0;
  bool counted =
      us_opt_value_int(us_opt_nth(o, "prompt-tokens", index), &count); /* checked by the option's table */
  size_t n = counted ? (size_t)count : 0;
  struct us_philox_key key = us_philox_key((uint64_t)us_opt_int(o, "seed"));
  int32_t *ids = malloc(n * sizeof *ids);
  if (!ids) return us_err_memory(err, "a prompt", n * sizeof *ids);
  s->random[s->n_random++] = ids;
  for (size_t i = 0; i < n; i++) {
    uint32_t words[4];
    us_philox_quad(key, (uint32_t)i, (uint32_t)index, 0, US_STREAM_INIT, words);
    ids[i] = (int32_t)us_uniform_index(words[0], s->ex->model->shape.vocab);
  }
  struct us_prompt prompt = us_serve_ids_prompt("random", ids, n);
  return add_prompts(s, &prompt, 1, err);
}

static enum us_status add_random_prompts(struct session *s, struct us_err *err) {
  size_t n = us_opt_count(s->run->opts, "prompt-tokens");
  s->random = calloc(n + 1, sizeof *s->random);
  if (!s->random) return us_err_memory(err, "prompts", n * sizeof *s->random);
  enum us_status status = US_OK;
  for (size_t i = 0; status == US_OK && i < n; i++) status = add_random(s, i, err);
  return status;
}

static enum us_status open_prompts(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  size_t texts = us_opt_count(o, "prompt"), files = us_opt_count(o, "file"),
         sets = us_opt_count(o, "prompts"), random = us_opt_count(o, "prompt-tokens");
  bool stdin_is_prompt = !texts && !files && !sets && !random, record = !strcmp(us_opt_str(o, "model"), "-");
  record |= us_opt_given(o, "draft") && !strcmp(us_opt_str(o, "draft"), "-");
  for (size_t i = 0; i < files; i++) stdin_is_prompt |= !strcmp(us_opt_nth(o, "file", i), "-");
  for (size_t i = 0; i < sets; i++) stdin_is_prompt |= !strcmp(us_opt_nth(o, "prompts", i), "-");
  if (stdin_is_prompt && record)
    return us_err_set(err, US_ERR_USAGE, "stdin brings a record, so prompts must come from -p, -f or a file");
  s->texts = calloc(files + 1, sizeof *s->texts);
  s->sets = calloc(sets + 1, sizeof *s->sets);
  if (!s->texts || !s->sets) return us_err_memory(err, "prompts", (files + sets) * sizeof *s->texts);
  enum us_status status = US_OK;
  for (size_t i = 0; status == US_OK && i < texts; i++) {
    struct us_prompt prompt = us_serve_text_prompt("prompt", us_opt_nth(o, "prompt", i));
    status = add_prompts(s, &prompt, 1, err);
  }
  for (size_t i = 0; status == US_OK && i < files; i++)
    status = add_text_file(s, us_opt_nth(o, "file", i), err);
  for (size_t i = 0; status == US_OK && i < sets; i++) {
    const char *path = us_opt_nth(o, "prompts", i);
    struct us_prompts **set = &s->sets[s->n_sets];
    status = strcmp(path, "-") ? us_prompts_open_dir(path, set, err) : us_prompts_open(path, set, err);
    if (status != US_OK) return status;
    s->n_sets++;
    status = add_prompts(s, (*set)->items, (*set)->n, err);
  }
  if (status == US_OK && !texts && !files && !sets && !random) status = add_text_file(s, "-", err);
  return status;
}

static enum us_status parse_accept(struct session *s, struct us_err *err) {
  const char *at = us_opt_str(s->run->opts, "accept");
  for (;; at++) {
    char *end;
    float rate = strtof(at, &end);
    if (end == at || !(rate >= 0.0f && rate <= 1.0f) || (*end && *end != ',') ||
        s->accept_count == US_MAX_BLOCK)
      return us_err_set(err, US_ERR_USAGE, "--accept: '%s' is not a list of at most %d rates between 0 and 1",
                        us_opt_str(s->run->opts, "accept"), US_MAX_BLOCK);
    s->accept[s->accept_count++] = rate;
    at = end;
    if (!*at) return US_OK;
  }
}

static enum us_status print_entry(void *arg, const struct us_run_entry *entry, struct us_err *err) {
  struct session *s = arg;
  us_progress_set(&s->progress, ++s->answered);
  if (!s->as_text) return us_run_write(s->run->out, entry, err);
  if (!s->streaming) fwrite(entry->text, 1, entry->text_bytes, s->run->out);
  fputc('\n', s->run->out);
  return us_io_flush(s->run->out, "standard output", err);
}

/* Where nothing can be written, the sample ends; print_entry says why. */
static bool stream_text(void *arg, const struct us_text_event *event) {
  struct session *s = arg;
  fwrite(event->text, 1, event->bytes, s->run->out);
  return fflush(s->run->out) == 0;
}

static enum us_status fill(struct session *s, struct us_serve *serve, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  size_t stops = us_opt_count(o, "stop");
  s->stops = calloc(stops + 1, sizeof *s->stops);
  if (!s->stops) return us_err_memory(err, "stop strings", stops * sizeof *s->stops);
  for (size_t i = 0; i < stops; i++) s->stops[i] = us_opt_nth(o, "stop", i);
  s->as_text = us_opt_flag(o, "text") || (isatty(fileno(s->run->out)) && !us_opt_flag(o, "json"));
  s->streaming = s->as_text && us_opt_int(o, "samples") == 1 && us_opt_int(o, "batch") == 1;
  *serve = (struct us_serve){
      .tokenizer = s->pair.tokenizer,
      .mode = us_opt_flag(o, "chat")  ? US_SERVE_CHAT
              : us_opt_flag(o, "raw") ? US_SERVE_RAW
                                      : US_SERVE_AUTO,
      .chat = {.thinking = us_opt_flag(o, "thinking"), .plain_turns = us_opt_flag(o, "plain-turns")},
      .sampling = {.temperature = (float)us_opt_num(o, "temperature"),
                   .top_k = (uint32_t)us_opt_int(o, "top-k"),
                   .top_p = (float)us_opt_num(o, "top-p"),
                   .min_p = (float)us_opt_num(o, "min-p")},
      .seed = (uint64_t)us_opt_int(o, "seed"),
      .samples = (uint32_t)us_opt_int(o, "samples"),
      .max_tokens = (uint32_t)us_opt_int(o, "max-tokens"),
      .best = us_opt_flag(o, "best"),
      .logprobs = us_opt_flag(o, "logprobs"),
      .ignore_end = us_opt_flag(o, "ignore-end"),
      .cut_loops = us_opt_flag(o, "cut-loops"),
      .stop_strings = s->stops,
      .stop_string_count = stops,
      .replay = s->replay,
      .generate = {.rule = (enum us_verify_rule)us_opt_choice(o, "verify"),
                   .block = (uint32_t)us_opt_int(o, "block"),
                   .adaptive = us_opt_flag(o, "adaptive"),
                   .batch = (uint32_t)us_opt_int(o, "batch"),
                   .accept = s->accept,
                   .accept_count = s->accept_count,
                   .on_text = s->streaming ? stream_text : NULL,
                   .interrupted = us_tool_interrupted},
      .on_entry = print_entry,
      .arg = s};
  return US_OK;
}

/* Options that would do nothing beside the others: refused before a model is read. */
static enum us_status check_options(struct us_opts *o, struct us_err *err) {
  static const char *const gpu[] = {"gpus", "engine", "positions"};
  bool replays = us_opt_given(o, "draft-from");
  for (size_t i = 0; us_opt_device(o, "device") < 0 && i < sizeof gpu / sizeof *gpu; i++)
    if (us_opt_given(o, gpu[i])) return us_err_set(err, US_ERR_USAGE, "--%s needs --device cuda", gpu[i]);
  if (us_opt_flag(o, "chat") && us_opt_flag(o, "raw"))
    return us_err_set(err, US_ERR_USAGE, "--chat excludes --raw");
  if (us_opt_flag(o, "json") && us_opt_flag(o, "text"))
    return us_err_set(err, US_ERR_USAGE, "--json excludes --text");
  if (us_opt_flag(o, "adaptive") && !us_opt_given(o, "draft") && !replays)
    return us_err_set(err, US_ERR_USAGE, "--adaptive needs --draft or --draft-from");
  if (us_opt_given(o, "accept") && !replays && !us_opt_flag(o, "bench"))
    return us_err_set(err, US_ERR_USAGE, "--accept needs --draft-from or --bench");
  return US_OK;
}

static enum us_status serve(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  struct us_serve settings;
  struct us_generate_stats stats;
  enum us_status status = parse_accept(s, err);
  if (status == US_OK) status = us_serve_bench_plan(o, s->accept, s->accept_count, &s->bench, err);
  if (status == US_OK) status = check_options(o, err);
  if (status != US_OK) return status;
  if (us_opt_flag(o, "bench")) {
    status = us_tool_check_outputs(s->run, err);
    if (status == US_OK) status = open_model(s, err);
    return status == US_OK ? us_serve_bench(s->run, &s->bench, s->ex, err) : status;
  }
  if (us_opt_given(o, "draft-from")) status = us_run_open(us_opt_str(o, "draft-from"), &s->replay, err);
  if (status == US_OK) status = open_prompts(s, err);
  if (status == US_OK) status = open_model(s, err);
  if (status == US_OK) status = add_random_prompts(s, err);
  if (status == US_OK) status = fill(s, &settings, err);
  if (status != US_OK) return status;
  us_progress_start(&s->progress, s->run->quiet || s->as_text ? NULL : stderr, "answering", "answers",
                    us_serve_entries(&settings, s->prompts, s->n));
  status = us_serve_run(&settings, s->ex, s->prompts, s->n, &stats, err);
  us_progress_end(&s->progress);
  if (status != US_OK) return status;
  if (!s->run->quiet) us_serve_write_stats(stderr, &stats, us_opt_flag(o, "stats"));
  return US_OK;
}

static enum us_status run(struct us_tool_run *tool_run, struct us_err *err) {
  struct session s = {.run = tool_run};
  enum us_status status = serve(&s, err);
  if (s.ex) s.ex->ops->free(s.ex);
  us_pool_free(s.pool);
  us_pair_release(&s.pair);
  us_run_free(s.replay);
  for (size_t i = 0; i < s.n_sets; i++) us_prompts_free(s.sets[i]);
  for (size_t i = 0; i < s.n_texts; i++) us_buffer_release(&s.texts[i]);
  for (size_t i = 0; i < s.n_random; i++) free(s.random[i]);
  free(s.random);
  free(s.sets);
  free(s.texts);
  free(s.prompts);
  free(s.stops);
  us_serve_bench_release(&s.bench);
  return status;
}

static const struct us_tool tool = {.name = "us-serve",
                                    .summary = "generate text, plainly or with a drafter",
                                    .description = description,
                                    .examples = examples,
                                    .opts = opts,
                                    .run = run};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
