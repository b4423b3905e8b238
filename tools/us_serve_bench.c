/* us_serve_bench.c: time rounds over batches and contexts, and print what they come to.
 *
 * Contents: the plan; first tokens; figures; JSON lines; a table for people; the picture; the whole.
 */
#include "tools/us_serve_bench.h"

#include "base/opt_value.h"
#include "base/philox.h"
#include "base/plot.h"
#include "base/table.h"
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
  static const char *const needs[] = {"batches", "context", "rounds", "warmup", "first-token", "plot"};
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
  return status;
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
  struct us_generate_options options = {.block = 1, .interrupted = us_tool_interrupted};
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

/* ---- figures ------------------------------------------------------------------------------------------------------- */

/* One combination of batch and context. */
struct row {
  struct us_bench_options options;
  struct us_bench_result result;
  double first_token; /* NaN: not asked for */
};

struct bench {
  struct us_tool_run *run;
  const struct us_serve_bench_plan *plan;
  struct us_executor *ex;
  struct us_bench_device device;
  struct row *rows;
  size_t n;
  bool synthetic, uniform, for_people;
};

static double per_second(const struct row *r, double n) {
  return n / r->result.seconds;
}
static double acceptance(const struct row *r) {
  return (double)r->result.tokens / (double)r->result.steps;
}
static double floor_seconds(const struct bench *b, const struct row *r) {
  return r->result.weight_bytes / b->device.ceiling;
}
static const char *acceptance_is(const struct row *r) {
  return r->options.block == 1 ? "plain" : r->options.accept ? "replayed" : "measured";
}

static void precision_text(const struct us_executor *ex, char *text, size_t size) {
  const struct us_precision *p = &ex->model->shape.precision;
  const struct {
    const char *family;
    enum us_format format;
  } all[] = {{"experts", p->experts}, {"dense", p->dense},   {"attn.qkv", p->qkv}, {"attn.o", p->o_proj},
             {"head", p->head},       {"router", p->router}, {"embed", p->embed},  {"draft", p->draft}};
  size_t count = sizeof all / sizeof *all - !ex->draft, used = 0;
  for (size_t i = 0; i < count && used < size; i++)
    used += (size_t)snprintf(text + used, size - used, "%s%s=%s", i ? "," : "", all[i].family,
                             us_format_name(all[i].format));
}

/* ---- JSON lines ---------------------------------------------------------------------------------------------------- */

static const char *const columns[] = {"gpu",
                                      "gpus",
                                      "ranks",
                                      "engine",
                                      "model",
                                      "weights",
                                      "routing",
                                      "precision",
                                      "batch",
                                      "context",
                                      "block",
                                      "rounds",
                                      "rounds_per_s",
                                      "acceptance",
                                      "acceptance_is",
                                      "tokens_per_s",
                                      "tokens_per_s_of_a_sequence",
                                      "round_ms",
                                      "round_ms_p50",
                                      "round_ms_p95",
                                      "round_ms_p99",
                                      "token_ms_p50",
                                      "token_ms_p95",
                                      "token_ms_p99",
                                      "first_token_ms",
                                      "experts_of_a_layer",
                                      "weight_bytes_of_a_round",
                                      "kv_bytes_of_a_round",
                                      "ceiling_bytes_per_s",
                                      "floor_ms",
                                      "of_floor",
                                      "gpu_bytes_experts",
                                      "gpu_bytes_attention",
                                      "gpu_bytes_dense",
                                      "gpu_bytes_router",
                                      "gpu_bytes_head",
                                      "gpu_bytes_embed",
                                      "gpu_bytes_draft",
                                      "gpu_bytes_vectors",
                                      "gpu_bytes_caches",
                                      "gpu_bytes_workspace",
                                      "gpu_bytes_used",
                                      "gpu_bytes_total"};

static void write_where(struct us_table *t, const struct bench *b) {
  char precision[256];
  precision_text(b->ex, precision, sizeof precision);
  us_table_text(t, b->device.name);
  us_table_int(t, b->device.gpus);
  us_table_int(t, b->device.ranks);
  us_table_text(t, b->device.engine);
  us_table_text(t, b->ex->model->shape.name);
  us_table_text(t, b->synthetic ? "synthetic" : "checkpoint");
  us_table_text(t, b->uniform ? "uniform" : "router");
  us_table_text(t, precision);
}

static void write_times(struct us_table *t, const struct row *r) {
  const struct us_bench_spread *round = &r->result.round, *token = &r->result.token;
  const double ms[] = {round->mean, round->p50, round->p95, round->p99,
                       token->p50,  token->p95, token->p99, r->first_token};
  for (size_t i = 0; i < sizeof ms / sizeof *ms; i++) us_table_num(t, 1e3 * ms[i]);
}

static void write_memory(struct us_table *t, const struct bench *b, const struct row *r) {
  const struct us_device_bytes *w = &b->device.bytes;
  const uint64_t bytes[] = {w->experts,
                            w->attention,
                            w->dense,
                            w->router,
                            w->head,
                            w->embed,
                            w->draft,
                            w->vectors,
                            b->device.cache_bytes,
                            r->result.workspace_bytes,
                            b->device.used_bytes,
                            b->device.total_bytes};
  for (size_t i = 0; i < sizeof bytes / sizeof *bytes; i++) us_table_int(t, (int64_t)bytes[i]);
}

static void write_row(struct us_table *t, const struct bench *b, const struct row *r) {
  write_where(t, b);
  us_table_int(t, r->options.batch);
  us_table_int(t, r->options.context);
  us_table_int(t, r->options.block);
  us_table_int(t, r->result.rounds);
  us_table_num(t, per_second(r, r->result.rounds));
  us_table_num(t, acceptance(r));
  us_table_text(t, acceptance_is(r));
  us_table_num(t, per_second(r, (double)r->result.tokens));
  us_table_num(t, per_second(r, (double)r->result.tokens) / r->options.batch);
  write_times(t, r);
  us_table_num(t, r->result.experts);
  us_table_num(t, r->result.weight_bytes);
  us_table_num(t, r->result.kv_bytes);
  us_table_num(t, b->device.ceiling);
  us_table_num(t, 1e3 * floor_seconds(b, r));
  us_table_num(t, floor_seconds(b, r) / r->result.round.mean);
  write_memory(t, b, r);
}

/* A line as soon as its run is over. */
static enum us_status write_json(const struct bench *b, const struct row *r, struct us_err *err) {
  struct us_table *table;
  enum us_status status =
      us_table_open(b->run->out, columns, sizeof columns / sizeof *columns, true, &table, err);
  if (status != US_OK) return status;
  write_row(table, b, r);
  return us_table_close(table, err);
}

/* ---- a table for people -------------------------------------------------------------------------------------------- */

static void print_kind(FILE *out, const char *kind, uint64_t bytes) {
  if (bytes) fprintf(out, ", %s %.2f", kind, (double)bytes / (1 << 30));
}

static void print_head(const struct bench *b) {
  FILE *out = b->run->out;
  const struct us_bench_device *d = &b->device;
  char precision[256];
  precision_text(b->ex, precision, sizeof precision);
  fprintf(out, "%u x %s, %s, %s%s%s\n", d->gpus, d->name, d->engine, b->ex->model->shape.name,
          b->synthetic ? "; weights are synthetic" : "", b->uniform ? ", routed uniformly" : "");
  fprintf(out, "precision: %s\n", precision);
  fprintf(out, "memory of a GPU, GiB: %.2f of %.2f used", (double)d->used_bytes / (1 << 30),
          (double)d->total_bytes / (1 << 30));
  print_kind(out, "experts", d->bytes.experts);
  print_kind(out, "attention", d->bytes.attention);
  print_kind(out, "dense", d->bytes.dense);
  print_kind(out, "router", d->bytes.router);
  print_kind(out, "head", d->bytes.head);
  print_kind(out, "embed", d->bytes.embed);
  print_kind(out, "draft", d->bytes.draft);
  print_kind(out, "vectors", d->bytes.vectors);
  print_kind(out, "caches", d->cache_bytes);
  fprintf(out,
          "\nreading memory at most %.0f GB/s, measured in this run: the floor is a round's weights at that "
          "rate\n\n",
          d->ceiling / 1e9);
  fprintf(out, "%5s %7s %5s %8s %8s %8s %8s  %-20s  %-20s %8s %7s %8s %8s %8s\n", "batch", "context", "block",
          "rounds/s", "accepted", "tokens/s", "each/s", "round ms p50/95/99", "token ms p50/95/99",
          "first ms", "experts", "GB/round", "floor ms", "of floor");
}

static void print_row(const struct bench *b, const struct row *r) {
  FILE *out = b->run->out;
  char round[32], token[32], first[16] = "-";
  const struct us_bench_result *m = &r->result;
  double tokens = per_second(r, (double)m->tokens);
  snprintf(round, sizeof round, "%.3f/%.3f/%.3f", 1e3 * m->round.p50, 1e3 * m->round.p95, 1e3 * m->round.p99);
  snprintf(token, sizeof token, "%.3f/%.3f/%.3f", 1e3 * m->token.p50, 1e3 * m->token.p95, 1e3 * m->token.p99);
  if (isfinite(r->first_token)) snprintf(first, sizeof first, "%.1f", 1e3 * r->first_token);
  fprintf(out, "%5u %7u %5u %8.2f %8.3f %8.1f %8.1f  %-20s  %-20s %8s %7.2f %8.3f %8.3f %7.1f%%",
          r->options.batch, r->options.context, r->options.block, per_second(r, m->rounds), acceptance(r),
          tokens, tokens / r->options.batch, round, token, first, m->experts, m->weight_bytes / 1e9,
          1e3 * floor_seconds(b, r), 100 * floor_seconds(b, r) / m->round.mean);
  fprintf(out, "  acceptance %s%s\n", acceptance_is(r), b->synthetic ? ", weights are synthetic" : "");
  fflush(out);
}

/* ---- the picture --------------------------------------------------------------------------------------------------- */

static enum us_status make_provenance(const struct bench *b, char **ret_text, struct us_err *err) {
  struct us_provenance *provenance = NULL;
  enum us_status status =
      us_tool_provenance(b->run, (uint64_t)us_opt_int(b->run->opts, "seed"), &provenance, err);
  if (status == US_OK && !(*ret_text = us_provenance_text(provenance, err))) status = err->status;
  us_provenance_free(provenance);
  return status;
}

static enum us_status plot(const struct bench *b, const char *path, struct us_err *err) {
  const struct us_serve_bench_plan *p = b->plan;
  struct us_plot_series series[US_SERVE_BENCH_LIST];
  double x[US_SERVE_BENCH_LIST], y[US_SERVE_BENCH_LIST][US_SERVE_BENCH_LIST];
  char names[US_SERVE_BENCH_LIST][32], title[192], *provenance = NULL;
  enum us_status status = make_provenance(b, &provenance, err);
  if (status != US_OK) return status;
  for (uint32_t c = 0; c < p->context_count; c++) { /* rows stand context by context */
    for (uint32_t i = 0; i < p->batch_count; i++) {
      const struct row *r = &b->rows[c * p->batch_count + i];
      x[i] = p->batches[i], y[c][i] = per_second(r, (double)r->result.tokens);
    }
    snprintf(names[c], sizeof names[c], "context %u", p->contexts[c]);
    series[c] = (struct us_plot_series){
        .name = names[c], .style = US_PLOT_LINE_POINTS, .x = x, .y = y[c], .n = p->batch_count};
  }
  snprintf(title, sizeof title, "%s on %u x %s, acceptance %s%s", b->ex->model->shape.name, b->device.gpus,
           b->device.name, acceptance_is(&b->rows[0]), b->synthetic ? ", weights are synthetic" : "");
  struct us_plot_axes axes = {
      .title = title, .x_title = "sequences", .y_title = "tokens a second", .y_from_zero = true};
  status = us_plot_xy(path, &axes, series, p->context_count, provenance, err);
  free(provenance);
  return status;
}

/* ---- the whole ----------------------------------------------------------------------------------------------------- */

static enum us_status measure(struct bench *b, uint32_t batch, uint32_t context, struct us_err *err) {
  struct us_opts *o = b->run->opts;
  struct row *r = &b->rows[b->n];
  *r = (struct row){.options = options_of(o, b->ex, b->plan, batch, context), .first_token = NAN};
  enum us_status status = US_OK;
  if (us_opt_flag(o, "first-token") && context)
    status = first_token(b->ex, context, r->options.seed, &r->first_token, err);
  if (status == US_OK) status = us_bench_run(b->ex, &r->options, &r->result, err);
  if (status != US_OK) return us_err_prefix(err, "batch %u, context %u", batch, context);
  b->n++;
  if (!b->for_people) return write_json(b, r, err);
  print_row(b, r);
  return US_OK;
}

enum us_status us_serve_bench(struct us_tool_run *run, const struct us_serve_bench_plan *plan,
                              struct us_executor *ex, struct us_err *err) {
  struct bench b = {.run = run,
                    .plan = plan,
                    .ex = ex,
                    .rows = calloc((size_t)plan->batch_count * plan->context_count, sizeof *b.rows),
                    .synthetic = us_opt_given(run->opts, "synthetic"),
                    .uniform = us_opt_flag(run->opts, "uniform"),
                    .for_people = us_opt_flag(run->opts, "text") ||
                                  (isatty(fileno(run->out)) && !us_opt_flag(run->opts, "json"))};
  if (!b.rows) return us_err_memory(err, "results", plan->batch_count * sizeof *b.rows);
  enum us_status status = us_bench_device(ex, &b.device, err);
  if (status == US_OK && b.for_people) print_head(&b);
  for (uint32_t c = 0; c < plan->context_count; c++)
    for (uint32_t i = 0; status == US_OK && i < plan->batch_count; i++)
      status = measure(&b, plan->batches[i], plan->contexts[c], err);
  const char *path = us_opt_str(run->opts, "plot");
  if (status == US_OK && path) status = plot(&b, path, err);
  free(b.rows);
  return status;
}
