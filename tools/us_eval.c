/* us_eval.c: measure recorded runs, models, and models with drafters. */
#include "base/plot.h"
#include "base/progress.h"
#include "base/table.h"
#include "decode/pair.h"
#include "decode/serve.h"
#include "decode/summary.h"
#include "plan/tiles.h"
#include "tools/train_learner.h"
#include "tools/us_eval_top.h"
#include "training/draft_replay.h"
#include "training/quant_report.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct us_opt opts[] = {
    US_OPT_ARG("runs", "RUN", "recorded runs of us-serve; - is stdin", .repeat = true),
    US_OPT_GROUP("What is measured"),
    US_OPT_FILE("model", 'm', "FILE", "checkpoint: a folder or an .h5 file; - reads its record from stdin"),
    US_OPT_FILE("against", 0, "BASE", "compare with this model, on the same tokens"),
    US_OPT_FILE("data", 0, "FILE", "token shards whose held-out part is measured on"),
    US_OPT_FILE("top", 0, "FILE", "compare with a recorded model (--write-top), on the tokens recorded"),
    US_OPT_FILE("draft", 'd', "FILE", "drafter of the model; - reads its record from stdin"),
    US_OPT_FILE("prompts", 0, "PATH", "prompts to answer: JSON lines, or a folder of them", .repeat = true),
    US_OPT_FLAG("task", 0, "demand reference answers and score exact matches"),
    US_OPT_GROUP("Held-out text"),
    US_OPT_INT("windows", 0, "N", "sequences; 0: all", .def = "0"),
    US_OPT_INT("length", 'l', "N", "tokens of each", .def = "512", .min = 2, .max = 131072),
    US_OPT_FLAG("base-experts", 0,
                "let tokens visit the experts that BASE chose: what then is left is no choice's"),
    US_OPT_FILE("write-top", 0, "FILE", "record the model's 64 likeliest tokens instead, for --top",
                .writes = US_OPT_WRITES_FILE),
    US_OPT_GROUP("Generation"),
    US_OPT_INT("max-tokens", 0, "N", "generated tokens a prompt", .def = "256", .min = 1, .max = 1 << 20),
    US_OPT_NUM("temperature", 't', "T", "0 is greedy", .def = "0", .max = 100),
    US_OPT_INT("block", 0, "B", "anchor and drafts a round; 0 is the drafter's, 1 is plain", .def = "0",
               .max = US_MAX_BLOCK),
    US_OPT_ENUM("verify", 0, "match|reject|block", "which drafts survive; match equals plain decoding",
                .def = "match"),
    US_OPT_INT("batch", 0, "N", "sequences that step together", .def = "1", .min = 1, .max = US_MAX_BATCH),
    US_OPT_FLAG("chat", 0, "text prompts are user turns of the chat template"),
    US_OPT_FLAG("ignore-end", 0, "go on after end-of-turn tokens"),
    US_OPT_FLAG("keep-loops", 0, "do not end a request once a 24-gram occurs three times"),
    US_OPT_GROUP("Common options"),
    US_OPT_INT("seed", 0, "N", "seed of everything random", .def = "1"),
    US_OPT_DEVICE("device", 0, "where --data is measured or runs are replayed: cpu, cuda or cuda:N",
                  .def = "cpu"),
    US_OPT_INT("threads", 0, "N", "CPU threads; 0 uses every core", .def = "0", .max = 256),
    US_OPT_GROUP("Output"),
    US_OPT_FLAG("json", 0, "records as JSON lines instead of TSV"),
    US_OPT_FILE("plot", 0, "FILE.png", "draw acceptance by position, or the KL's distribution",
                .writes = US_OPT_WRITES_FILE),
    US_OPT_COMMON_TALK,
    US_OPT_END,
};

struct session {
  struct us_tool_run *run;
  struct us_pair pair; /* of held-out text only the model */
  struct us_record data_record;
  struct us_model *base;
  struct us_shards *shards;
  struct us_pool *pool;
  struct us_learner *learner;
  struct us_executor *ex;
  struct us_summary summary;
  struct us_metrics metrics;
  struct us_progress progress;
  char *provenance; /* of the plot */
};

/* --- what all share --- */

static enum us_status make_provenance(struct session *s, const char *const *paths, const char *const *kinds,
                                      size_t n, struct us_err *err) {
  struct us_provenance *p = NULL;
  uint64_t seed = (uint64_t)us_opt_int(s->run->opts, "seed");
  enum us_status status = us_tool_provenance(s->run, seed, &p, err);
  for (size_t i = 0; i < n && status == US_OK; i++)
    if (paths[i] && strcmp(paths[i], "-") != 0) status = us_tool_add_parent(p, paths[i], kinds[i], err);
  if (status == US_OK && !(s->provenance = us_provenance_text(p, err))) status = err->status;
  us_provenance_free(p);
  return status;
}

static enum us_status open_model(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  enum us_status status =
      us_record_resolve(us_opt_str(o, "model"), stdin, "model", &s->pair.model_record, err);
  if (status == US_OK) status = us_model_open(s->pair.model_record.path, &s->pair.model, err);
  if (status == US_OK) status = us_model_check(s->pair.model, err);
  return status == US_OK ? us_pool_create((int)us_opt_int(o, "threads"), &s->pool, err) : status;
}

/* --- runs --- */

static void put_group(struct us_table *table, const struct us_summary_group *g, uint32_t slots) {
  us_table_text(table, g->scenario);
  us_table_int(table, (int64_t)g->entries);
  us_table_int(table, (int64_t)g->tokens);
  us_table_int(table, (int64_t)g->stats.rounds);
  us_table_int(table, (int64_t)g->stats.committed);
  us_table_num(table, g->length);
  us_table_num(table, g->length_error);
  us_table_num(table, g->tokens_per_second);
  us_table_num(table, g->first_token_seconds);
  us_table_num(table, g->loop_share);
  us_table_int(table, (int64_t)g->answered);
  us_table_num(table, g->exact_share);
  us_table_num(table, g->exact_error);
  for (uint32_t i = 0; i < slots; i++) us_table_num(table, g->rate[i]);
}

static enum us_status draw_rates(struct session *s, const char *path, struct us_err *err) {
  struct us_plot_series series[US_PLOT_MAX_SERIES];
  char names[US_MAX_BLOCK][24];
  const char *labels[US_MAX_BLOCK];
  uint32_t slots = s->summary.all.slots;
  size_t n = s->summary.n < US_PLOT_MAX_SERIES ? s->summary.n : US_PLOT_MAX_SERIES;
  if (!slots) {
    us_log_warning(s->run->log, "nothing was drafted: '%s' is not drawn", path);
    return US_OK;
  }
  for (uint32_t i = 0; i < slots; i++) {
    snprintf(names[i], sizeof names[i], "%u", (unsigned)i + 1);
    labels[i] = names[i];
  }
  for (size_t g = 0; g < n; g++)
    series[g] = (struct us_plot_series){
        .name = s->summary.groups[g].scenario[0] ? s->summary.groups[g].scenario : "prompts",
        .y = s->summary.groups[g].rate,
        .n = slots};
  struct us_plot_axes axes = {.title = "Drafts that survived verification",
                              .x_title = "position in the block",
                              .y_title = "share accepted"};
  return us_plot_bars(path, &axes, labels, slots, series, n, s->provenance, err);
}

static enum us_status print_summary(struct session *s, struct us_err *err) {
  static const char *const fixed[] = {"scenario",      "requests",          "tokens",       "rounds",
                                      "committed",     "acceptance_length", "length_error", "tokens_per_s",
                                      "first_token_s", "loop_share",        "questions",    "exact",
                                      "exact_error"};
  enum { FIXED = sizeof fixed / sizeof fixed[0] };
  const char *columns[FIXED + US_MAX_BLOCK];
  char names[US_MAX_BLOCK][24];
  struct us_table *table = NULL;
  us_summary_finish(&s->summary);
  uint32_t slots = s->summary.all.slots;
  if (us_opt_flag(s->run->opts, "task") && !s->summary.all.answered)
    return us_err_set(err, US_ERR_INPUT, "--task: no entry has a reference answer");
  memcpy(columns, fixed, sizeof fixed);
  for (uint32_t i = 0; i < slots; i++) {
    snprintf(names[i], sizeof names[i], "accept_%u", (unsigned)i + 1);
    columns[FIXED + i] = names[i];
  }
  enum us_status status =
      us_table_open(s->run->out, columns, FIXED + slots, us_opt_flag(s->run->opts, "json"), &table, err);
  if (status != US_OK) return status;
  for (size_t g = 0; g < s->summary.n; g++) put_group(table, &s->summary.groups[g], slots);
  put_group(table, &s->summary.all, slots);
  status = us_table_close(table, err);
  const char *plot = us_opt_str(s->run->opts, "plot");
  return status == US_OK && plot ? draw_rates(s, plot, err) : status;
}

/* A model and its drafter beside recorded runs: what of their answers the drafter would have had accepted. */
static enum us_status open_replay(struct session *s, struct us_draft_replay *replay, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  enum us_status status = us_pair_open(us_opt_str(o, "model"), us_opt_str(o, "draft"), stdin, &s->pair, err);
  if (status == US_OK) status = us_model_check(s->pair.model, err);
  if (status == US_OK) status = us_pool_create((int)us_opt_int(o, "threads"), &s->pool, err);
  if (status == US_OK) status = us_tool_open_learner(s->run, s->pool, &s->learner, err);
  *replay = (struct us_draft_replay){.learner = s->learner,
                                     .pool = s->pool,
                                     .target = s->pair.model,
                                     .draft = s->pair.draft,
                                     .block = (uint32_t)us_opt_int(o, "block")};
  return status;
}

static enum us_status eval_runs(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  size_t n = us_opt_count(o, "runs");
  bool replays = us_opt_given(o, "draft");
  struct us_draft_replay replay;
  enum us_status status = replays ? open_replay(s, &replay, err) : US_OK;
  for (size_t i = 0; i < n && status == US_OK; i++) {
    struct us_run *run = NULL;
    status = us_run_open(us_opt_nth(o, "runs", i), &run, err);
    if (status == US_OK && replays) status = us_draft_replay(&replay, run->entries, run->n, err);
    for (size_t k = 0; status == US_OK && k < run->n; k++) {
      status = us_summary_add(&s->summary, &run->entries[k], err);
    }
    us_run_free(run);
  }
  if (status == US_OK && !s->summary.all.entries)
    return us_err_set(err, US_ERR_INPUT, "%s: holds no run", us_opt_nth(o, "runs", 0));
  for (size_t i = 0; i < n && status == US_OK && !s->provenance; i++) {
    const char *path = us_opt_nth(o, "runs", i), *kind = "run";
    status = make_provenance(s, &path, &kind, 1, err);
  }
  return status == US_OK ? print_summary(s, err) : status;
}

/* --- generation --- */

static enum us_status take_entry(void *arg, const struct us_run_entry *entry, struct us_err *err) {
  struct session *s = arg;
  us_progress_set(&s->progress, s->summary.all.entries + 1);
  return us_summary_add(&s->summary, entry, err);
}

/* The model, its drafter and its tokenizer, ready to generate. */
static enum us_status open_pair(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  enum us_status status = us_pair_open(us_opt_str(o, "model"), us_opt_str(o, "draft"), stdin, &s->pair, err);
  if (status == US_OK) status = us_model_check(s->pair.model, err);
  if (status == US_OK) status = us_pool_create((int)us_opt_int(o, "threads"), &s->pool, err);
  if (status != US_OK) return status;
  return us_executor_create_tiles(s->pair.model, s->pair.draft, s->pool, US_ROUND_BF16, &s->ex, err);
}

static enum us_status answer(struct session *s, const char *path, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  struct us_serve serve = {.tokenizer = s->pair.tokenizer,
                           .mode = us_opt_flag(o, "chat") ? US_SERVE_CHAT : US_SERVE_AUTO,
                           .sampling = {.temperature = (float)us_opt_num(o, "temperature"), .top_p = 1.0f},
                           .seed = (uint64_t)us_opt_int(o, "seed"),
                           .samples = 1,
                           .max_tokens = (uint32_t)us_opt_int(o, "max-tokens"),
                           .ignore_end = us_opt_flag(o, "ignore-end"),
                           .cut_loops = !us_opt_flag(o, "keep-loops"),
                           .generate = {.rule = (enum us_verify_rule)us_opt_choice(o, "verify"),
                                        .block = (uint32_t)us_opt_int(o, "block"),
                                        .batch = (uint32_t)us_opt_int(o, "batch"),
                                        .interrupted = us_tool_interrupted},
                           .on_entry = take_entry,
                           .arg = s};
  struct us_prompts *prompts = NULL;
  enum us_status status = us_prompts_open_dir(path, &prompts, err);
  if (status != US_OK) return status;
  s->progress.total += us_serve_entries(&serve, prompts->items, prompts->n);
  status = us_serve_run(&serve, s->ex, prompts->items, prompts->n, NULL, err);
  us_prompts_free(prompts);
  return status;
}

static enum us_status eval_prompts(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  enum us_status status = open_pair(s, err);
  if (status == US_OK)
    us_progress_start(&s->progress, s->run->quiet ? NULL : stderr, "answering", "prompts", 0);
  for (size_t i = 0; status == US_OK && i < us_opt_count(o, "prompts"); i++)
    status = answer(s, us_opt_nth(o, "prompts", i), err);
  us_progress_end(&s->progress);
  if (status != US_OK) return status;
  const char *paths[] = {s->pair.model_record.path, s->pair.draft_record.path};
  static const char *const kinds[] = {"model", "draft"};
  status = make_provenance(s, paths, kinds, 2, err);
  return status == US_OK ? print_summary(s, err) : status;
}

/* --- held-out text --- */

static void on_progress(void *arg, size_t done, size_t windows) {
  struct session *s = arg;
  s->progress.total = windows;
  us_progress_set(&s->progress, done);
}

/* Share of tokens whose KL is below a value. */
static enum us_status draw_distribution(struct session *s, const char *path, struct us_err *err) {
  enum { POINTS = 512 };
  double x[POINTS], y[POINTS];
  const struct us_metrics_model *r = &s->metrics.models[s->metrics.n - 1];
  if (s->metrics.n < 2) {
    us_log_warning(s->run->log, "nothing to compare with: '%s' is not drawn", path);
    return US_OK;
  }
  for (size_t i = 0; i < POINTS; i++) {
    y[i] = (double)i / (POINTS - 1);
    x[i] = us_metrics_quantile(r->token_kl, s->metrics.tokens, y[i]);
  }
  struct us_plot_axes axes = {.title = "KL divergence by token",
                              .x_title = "KL to the base (nats)",
                              .y_title = "share of tokens below",
                              .x_log = true,
                              .y_from_zero = true};
  struct us_plot_series series = {.name = "held-out tokens", .x = x, .y = y, .n = POINTS};
  return us_plot_xy(path, &axes, &series, 1, s->provenance, err);
}

static enum us_status print_metrics(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  struct us_table *table = NULL;
  const struct us_model *models[] = {s->base ? s->base : s->pair.model, s->pair.model};
  const char *const paths[] = {s->base ? us_opt_str(o, "against") : s->pair.model_record.path,
                               s->pair.model_record.path};
  enum us_status status =
      us_table_open(s->run->out, us_metrics_columns, US_METRICS_COLUMNS, us_opt_flag(o, "json"), &table, err);
  if (status != US_OK) return status;
  for (size_t m = 0; m < s->metrics.n && status == US_OK; m++) {
    uint64_t bytes = 0;
    status = us_model_bytes(models[m], &bytes, err);
    us_metrics_put(table, &s->metrics, m, paths[m], bytes, (double)NAN, (double)NAN);
  }
  struct us_err closing = {0};
  if (us_table_close(table, &closing) != US_OK && status == US_OK)
    status = us_err_set(err, closing.status, "%s", closing.message);
  if (status != US_OK || !us_opt_given(o, "plot")) return status;
  const char *parents[] = {s->pair.model_record.path, us_opt_str(o, "against"), s->data_record.path};
  static const char *const kinds[] = {"model", "model", "tokens"};
  status = make_provenance(s, parents, kinds, 3, err);
  return status == US_OK ? draw_distribution(s, us_opt_str(o, "plot"), err) : status;
}

static enum us_status write_top(struct session *s, struct us_err *err);

static enum us_status eval_data(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  enum us_status status = open_model(s, err);
  if (status == US_OK)
    status = us_record_resolve(us_opt_str(o, "data"), stdin, "tokens", &s->data_record, err);
  if (status == US_OK) status = us_shards_open(s->data_record.path, &s->shards, err);
  if (status == US_OK && us_opt_given(o, "against")) {
    status = us_model_open(us_opt_str(o, "against"), &s->base, err);
    if (status == US_OK) status = us_model_check(s->base, err);
  }
  if (status == US_OK) status = us_tool_open_learner(s->run, s->pool, &s->learner, err);
  if (status != US_OK) return status;
  if (us_opt_given(o, "write-top")) return write_top(s, err);
  struct us_metrics_job job = {.learner = s->learner,
                               .models = {s->base ? s->base : s->pair.model, s->pair.model},
                               .n = s->base ? 2 : 1,
                               .shards = s->shards,
                               .base_experts = us_opt_flag(o, "base-experts"),
                               .length = (size_t)us_opt_int(o, "length"),
                               .windows = (size_t)us_opt_int(o, "windows"),
                               .interrupted = us_tool_interrupted,
                               .on_progress = on_progress,
                               .arg = s};
  us_progress_start(&s->progress, s->run->quiet ? NULL : stderr, "measuring", "sequences", 0);
  status = us_metrics_run(&job, s->pool, &s->metrics, err);
  us_progress_end(&s->progress);
  return status == US_OK ? print_metrics(s, err) : status;
}

/* --- recorded models --- */

static enum us_status write_top(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  struct us_likeliest_job job = {.learner = s->learner,
                                 .model = s->pair.model,
                                 .shards = s->shards,
                                 .windows = (size_t)us_opt_int(o, "windows"),
                                 .length = (size_t)us_opt_int(o, "length"),
                                 .k = 64};
  const char *parents[] = {s->pair.model_record.path, s->data_record.path};
  static const char *const kinds[] = {"model", "tokens"};
  enum us_status status = make_provenance(s, parents, kinds, 2, err);
  if (!job.windows) job.windows = 16;
  return status == US_OK ? us_eval_write_top(s->run, &job, s->pool, s->provenance, err) : status;
}

static enum us_status eval_top(struct session *s, struct us_err *err) {
  enum us_status status = open_model(s, err);
  if (status == US_OK) status = us_tool_open_learner(s->run, s->pool, &s->learner, err);
  return status == US_OK ? us_eval_against_top(s->run, s->pair.model, s->learner, s->pool, err) : status;
}

/* --- which --- */

static enum us_status choose(struct session *s, struct us_err *err) {
  struct us_opts *o = s->run->opts;
  bool runs = us_opt_count(o, "runs"), data = us_opt_given(o, "data"), prompts = us_opt_given(o, "prompts");
  bool top = us_opt_given(o, "top");
  if (runs + data + prompts + top != 1)
    return us_err_set(err, US_ERR_USAGE, "give one of recorded runs, --data, --prompts, or --top");
  if (runs && us_opt_given(o, "model") != us_opt_given(o, "draft"))
    return us_err_set(err, US_ERR_USAGE,
                      "recorded runs need neither --model nor --draft, or both to replay them");
  if (!runs && !us_opt_given(o, "model")) return us_err_set(err, US_ERR_USAGE, "--model is missing");
  if (us_opt_given(o, "write-top") && (!data || us_opt_given(o, "against")))
    return us_err_set(err, US_ERR_USAGE, "--write-top needs --data and excludes --against");
  if (us_opt_given(o, "against") && !data) return us_err_set(err, US_ERR_USAGE, "--against needs --data");
  if (us_opt_flag(o, "base-experts") && !us_opt_given(o, "against"))
    return us_err_set(err, US_ERR_USAGE, "--base-experts needs --against");
  if (us_opt_given(o, "draft") && (data || top))
    return us_err_set(err, US_ERR_USAGE, "--draft needs --prompts");
  if (us_opt_device(o, "device") >= 0 && prompts)
    return us_err_set(err, US_ERR_USAGE, "--device cuda needs --data, --top, or runs to replay");
  if (us_opt_flag(o, "task") && data) return us_err_set(err, US_ERR_USAGE, "--task excludes --data");
  if (us_tool_check_outputs(s->run, err) != US_OK) return err->status;
  if (top) return eval_top(s, err);
  return runs ? eval_runs(s, err) : data ? eval_data(s, err) : eval_prompts(s, err);
}

static enum us_status run_tool(struct us_tool_run *tool_run, struct us_err *err) {
  struct session s = {.run = tool_run};
  enum us_status status = choose(&s, err);
  if (s.ex) s.ex->ops->free(s.ex);
  us_summary_release(&s.summary);
  us_metrics_release(&s.metrics);
  us_pair_release(&s.pair);
  us_model_free(s.base);
  us_shards_close(s.shards);
  us_learner_free(s.learner);
  us_pool_free(s.pool);
  us_record_release(&s.data_record);
  free(s.provenance);
  return status;
}

static const struct us_tool tool = {
    .name = "us-eval",
    .summary = "measure recorded runs, models, and models with drafters",
    .description =
        "Reads runs that us-serve recorded and prints, by scenario and over all: acceptance "
        "length (committed "
        "tokens / target rounds, pooled), the share of drafts accepted in each position of a "
        "block, tokens a second "
        "of a request, the share of requests cut for looping, and exact matches with reference "
        "answers. With --model "
        "and --prompts it runs the generation itself. With --model and --draft beside recorded plain runs "
        "it replays "
        "them: greedy answers do not depend on the drafter, so one training pass over them tells what it "
        "would have "
        "had accepted, without generating again.\n\n"
        "With --model and --data it measures perplexity and bits a byte on held-out text; with "
        "--against also the "
        "KL divergence from the base model with percentiles, agreement of tokens and of experts, "
        "and the ratio of "
        "perplexities. Both models see the same tokens; standard errors are over sequences, and "
        "paired. Sequences run "
        "through the training forward pass, whose rounding points are those of generation. With "
        "--base-experts "
        "tokens of both visit the experts that the base chose: what then differs is no choice's.\n\n"
        "An answer is a number after the last '####' or the last number of the text, compared by "
        "value; other "
        "references are compared with the last line.",
    .examples = "# how well does a drafter do?\n"
                "us-serve -m q.h5 -d d.h5 data/prompts/*.jsonl | us-eval - --plot accept.png\n"
                "# the same for a second drafter, from a plain run and without generating\n"
                "us-serve -m q.h5 data/prompts/*.jsonl > plain.jsonl; us-eval plain.jsonl -m q.h5 -d d2.h5\n"
                "# what did quantization cost?\n"
                "us-eval -m q.h5 --against pico.h5 --data text.h5\n"
                "# and without what swapped experts cost?\n"
                "us-eval -m q.h5 --against pico.h5 --data text.h5 --base-experts\n"
                "# exact match on questions with answers\n"
                "us-eval -m q.h5 --prompts questions.jsonl --task",
    .opts = opts,
    .run = run_tool,
};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
