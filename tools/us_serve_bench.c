/* us_serve_bench.c: time rounds over batches and contexts.
 *
 * Contents: the plan; first tokens; the whole.
 */
#include "tools/us_serve_bench_impl.h"

#include "base/opt_value.h"
#include "base/philox.h"
#include "decode/generate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- the plan ------------------------------------------------------------------------------------------------------ */

static enum us_status parse_list(struct us_opts *o, const char *option, int64_t least, int64_t most,
                                 uint32_t *list, uint32_t *ret_count, struct us_err *err) {
  const char *text = us_opt_str(o, option);
  *ret_count = 0;
  for (const char *at = text;; at++) {
    char word[32];
    size_t length = strcspn(at, ",");
    int64_t value = -1;
    snprintf(word, sizeof word, "%.*s", (int)length, at);
    if (length >= sizeof word || !us_opt_value_int(word, &value) || value < least || value > most ||
        *ret_count == US_SERVE_BENCH_LIST)
      return us_err_set(err, US_ERR_USAGE, "--%s: '%s' is not a list of at most %d numbers from %lld to %lld",
                        option, text, US_SERVE_BENCH_LIST, (long long)least, (long long)most);
    list[(*ret_count)++] = (uint32_t)value;
    at += length;
    if (!*at) return US_OK;
  }
}

/* Options that mean nothing without --bench, and with it. */
static enum us_status check_options(struct us_opts *o, struct us_err *err) {
  static const char *const needs[] = {"batches",     "context", "rounds", "warmup",
                                      "first-token", "plot",    "trace"};
  static const char *const excludes[] = {"prompts", "prompt",     "file",    "prompt-tokens",
                                         "samples", "draft-from", "adaptive"};
  bool bench = us_opt_flag(o, "bench");
  for (size_t i = 0; !bench && i < sizeof needs / sizeof *needs; i++)
    if (us_opt_given(o, needs[i])) return us_err_set(err, US_ERR_USAGE, "--%s needs --bench", needs[i]);
  for (size_t i = 0; bench && i < sizeof excludes / sizeof *excludes; i++)
    if (us_opt_given(o, excludes[i]))
      return us_err_set(err, US_ERR_USAGE, "--bench answers no prompts: it excludes '%s'", excludes[i]);
  if (bench && us_opt_device(o, "device") < 0)
    return us_err_set(err, US_ERR_USAGE, "--bench needs --device cuda");
  static const char *const untraced[] = {"batches",     "context", "rounds", "warmup",
                                         "first-token", "plot",    "accept"};
  for (size_t i = 0; us_opt_given(o, "trace") && i < sizeof untraced / sizeof *untraced; i++)
    if (us_opt_given(o, untraced[i]))
      return us_err_set(err, US_ERR_USAGE, "--trace excludes --%s", untraced[i]);
  return US_OK;
}

/* Rows of a round: the option, else the drafter's, else as many as there are rates. */
static uint32_t block_of(struct us_opts *o, const struct us_executor *ex,
                         const struct us_serve_bench_plan *plan) {
  uint32_t given = (uint32_t)us_opt_int(o, "block");
  if (given) return given;
  if (ex && ex->draft) return ex->draft->shape.block;
  return plan->accept_count ? 8 : 1;
}

static struct us_bench_options options_of(struct us_opts *o, const struct us_executor *ex,
                                          const struct us_serve_bench_plan *plan, uint32_t batch,
                                          uint32_t context) {
  return (struct us_bench_options){.batch = batch,
                                   .block = block_of(o, ex, plan),
                                   .context = context,
                                   .rounds = (uint32_t)us_opt_int(o, "rounds"),
                                   .warmup = (uint32_t)us_opt_int(o, "warmup"),
                                   .accept = plan->accept_count ? plan->accept : NULL,
                                   .accept_count = plan->accept_count,
                                   .seed = (uint64_t)us_opt_int(o, "seed"),
                                   .interrupted = us_tool_interrupted};
}

enum us_status us_serve_bench_plan(struct us_opts *opts, const float *accept, size_t accept_count,
                                   struct us_serve_bench_plan *ret_plan, struct us_err *err) {
  struct us_serve_bench_plan *p = ret_plan;
  *p = (struct us_serve_bench_plan){.batches = {(uint32_t)us_opt_int(opts, "batch")},
                                    .contexts = {4096},
                                    .batch_count = 1,
                                    .context_count = 1};
  enum us_status status = check_options(opts, err);
  if (status != US_OK || !us_opt_flag(opts, "bench")) return status;
  if (us_opt_given(opts, "batches"))
    status = parse_list(opts, "batches", 1, US_ENGINE_SEQUENCES, p->batches, &p->batch_count, err);
  if (status == US_OK && us_opt_given(opts, "context"))
    status = parse_list(opts, "context", 0, 1 << 20, p->contexts, &p->context_count, err);
  if (us_opt_given(opts, "accept")) {
    memcpy(p->accept, accept, accept_count * sizeof *accept);
    p->accept_count = accept_count;
  }
  for (uint32_t i = 0; i < p->batch_count; i++)
    if (p->batches[i] > p->sequences) p->sequences = p->batches[i];
  for (uint32_t i = 0; i < p->context_count; i++) {
    struct us_bench_options o = options_of(opts, NULL, p, 1, p->contexts[i]);
    if (!us_opt_int(opts, "block") && us_opt_given(opts, "draft")) o.block = US_MAX_BLOCK; /* not known yet */
    uint32_t positions = us_bench_positions(&o);
    if (positions > p->positions) p->positions = positions;
  }
  if (status != US_OK || !us_opt_given(opts, "trace")) return status;
  status = us_arrivals_read(us_opt_str(opts, "trace"), &p->arrivals, &p->arrival_count, err);
  if (status == US_OK) p->positions = us_arrivals_positions(p->arrivals, p->arrival_count);
  return status;
}

void us_serve_bench_release(struct us_serve_bench_plan *plan) {
  free(plan->arrivals);
  plan->arrivals = NULL;
}

/* ---- first tokens -------------------------------------------------------------------------------------------------- */

/* Seconds from a prompt of random tokens to its first token. */
static enum us_status first_token(struct us_executor *ex, uint32_t context, uint64_t seed,
                                  double *ret_seconds, struct us_err *err) {
  int32_t *ids = calloc(context + 1, sizeof *ids);
  if (!ids) return us_err_memory(err, "a prompt", context * sizeof *ids);
  for (uint32_t i = 0; i < context; i++) {
    uint32_t words[4];
    us_philox_quad(us_philox_key(seed), i, 1, 0, US_STREAM_INIT, words);
    ids[i] = (int32_t)us_uniform_index(words[0], ex->model->shape.vocab);
  }
  struct us_request request = {
      .prompt = ids, .prompt_count = context, .samples = 1, .max_tokens = 1, .seed = seed};
  struct us_generate_options options = {.interrupted =
                                            us_tool_interrupted}; /* the drafter's context is made too */
  struct us_generate_stats stats;
  struct us_result result;
  enum us_status status = us_generate(ex, &request, 1, &options, &result, &stats, err);
  if (status == US_OK) {
    *ret_seconds = stats.decode.first_token_seconds;
    us_result_release(&result);
  }
  free(ids);
  return status;
}

/* ---- the whole ----------------------------------------------------------------------------------------------------- */

static enum us_status measure(struct us_serve_bench *b, uint32_t batch, uint32_t context,
                              struct us_err *err) {
  struct us_opts *o = b->run->opts;
  struct us_bench_row *r = &b->rows[b->n];
  *r = (struct us_bench_row){.options = options_of(o, b->ex, b->plan, batch, context), .first_token = NAN};
  enum us_status status = US_OK;
  if (us_opt_flag(o, "first-token") && context)
    status = first_token(b->ex, context, r->options.seed, &r->first_token, err);
  if (status == US_OK) status = us_bench_run(b->ex, &r->options, &r->result, err);
  if (status != US_OK) return us_err_prefix(err, "batch %u, context %u", batch, context);
  b->n++;
  return us_serve_bench_row(b, r, err);
}

enum us_status us_serve_bench(struct us_tool_run *run, const struct us_serve_bench_plan *plan,
                              struct us_executor *ex, struct us_err *err) {
  struct us_serve_bench b = {
      .run = run,
      .plan = plan,
      .ex = ex,
      .rows = calloc((size_t)plan->batch_count * plan->context_count, sizeof *b.rows),
      .share = us_opt_given(run->opts, "share") ? (uint32_t)us_opt_int(run->opts, "share") : 0,
      .synthetic = us_opt_given(run->opts, "synthetic"),
      .uniform = us_opt_flag(run->opts, "uniform"),
      .for_people =
          us_opt_flag(run->opts, "text") || (isatty(fileno(run->out)) && !us_opt_flag(run->opts, "json"))};
  if (!b.rows) return us_err_memory(err, "results", plan->batch_count * sizeof *b.rows);
  enum us_status status = us_bench_device(ex, &b.device, err);
  if (status == US_OK && b.for_people) us_serve_bench_head(&b);
  if (status == US_OK && plan->arrivals) status = us_serve_bench_load(&b, block_of(run->opts, ex, plan), err);
  for (uint32_t c = 0; !plan->arrivals && c < plan->context_count; c++)
    for (uint32_t i = 0; status == US_OK && i < plan->batch_count; i++)
      status = measure(&b, plan->batches[i], plan->contexts[c], err);
  const char *path = us_opt_str(run->opts, "plot");
  if (status == US_OK && path) status = us_serve_bench_plot(&b, path, err);
  free(b.rows);
  return status;
}
