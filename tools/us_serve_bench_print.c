/* us_serve_bench_print.c: what a benchmark comes to: JSON lines, a table for people, a picture.
 *
 * Contents: figures; JSON lines; a table for people; the picture.
 */
#include "tools/us_serve_bench_impl.h"

#include "base/plot.h"

#include <math.h>
#include <stdlib.h>

/* ---- figures ------------------------------------------------------------------------------------------------------- */

static double per_second(const struct us_bench_row *r, double n) {
  return n / r->result.seconds;
}
static double acceptance(const struct us_bench_row *r) {
  return (double)r->result.tokens / (double)r->result.steps;
}
static double floor_seconds(const struct us_serve_bench *b, const struct us_bench_row *r) {
  return r->result.weight_bytes / b->device.ceiling;
}
static const char *acceptance_is(const struct us_bench_row *r) {
  return r->options.block == 1 ? "plain" : r->options.accept ? "replayed" : "measured";
}

void us_serve_bench_precision(const struct us_executor *ex, char *text, size_t size) {
  const struct us_precision *p = &ex->model->shape.precision;
  enum us_format own_head = ex->draft ? ex->draft->shape.head : US_FORMAT_NONE;
  const struct {
    const char *family;
    enum us_format format;
  } all[] = {{"experts", p->experts}, {"dense", p->dense},   {"attn.qkv", p->qkv}, {"attn.o", p->o_proj},
             {"head", p->head},       {"router", p->router}, {"embed", p->embed},  {"draft", p->draft}};
  size_t count = sizeof all / sizeof *all - !ex->draft, used = 0;
  for (size_t i = 0; i < count && used < size; i++)
    used += (size_t)snprintf(text + used, size - used, "%s%s=%s", i ? "," : "", all[i].family,
                             us_format_name(all[i].format));
  if (own_head != US_FORMAT_NONE && used < size)
    snprintf(text + used, size - used, ",draft.head=%s", us_format_name(own_head));
}

/* ---- JSON lines ---------------------------------------------------------------------------------------------------- */

static const char *const columns[] = {US_SERVE_BENCH_WHERE,
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
                                      "gpu_bytes_draft_head",
                                      "gpu_bytes_vectors",
                                      "gpu_bytes_caches",
                                      "gpu_bytes_workspace",
                                      "gpu_bytes_used",
                                      "gpu_bytes_total"};

void us_serve_bench_write_where(struct us_table *t, const struct us_serve_bench *b) {
  char precision[256];
  us_serve_bench_precision(b->ex, precision, sizeof precision);
  us_table_text(t, b->device.name);
  us_table_int(t, b->device.gpus);
  us_table_int(t, b->device.ranks);
  us_table_int(t, b->share ? b->share : b->device.ranks);
  us_table_text(t, b->device.engine);
  us_table_text(t, b->ex->model->shape.name);
  us_table_text(t, b->synthetic ? "synthetic" : "checkpoint");
  us_table_text(t, b->uniform ? "uniform" : "router");
  us_table_text(t, precision);
}

static void write_times(struct us_table *t, const struct us_bench_row *r) {
  const struct us_bench_spread *round = &r->result.round, *token = &r->result.token;
  const double ms[] = {round->mean, round->p50, round->p95, round->p99,
                       token->p50,  token->p95, token->p99, r->first_token};
  for (size_t i = 0; i < sizeof ms / sizeof *ms; i++) us_table_num(t, 1e3 * ms[i]);
}

static void write_memory(struct us_table *t, const struct us_serve_bench *b, const struct us_bench_row *r) {
  const struct us_device_bytes *w = &b->device.bytes;
  const uint64_t bytes[] = {w->experts,
                            w->attention,
                            w->dense,
                            w->router,
                            w->head,
                            w->embed,
                            w->draft,
                            w->draft_head,
                            w->vectors,
                            b->device.cache_bytes,
                            r->result.workspace_bytes,
                            b->device.used_bytes,
                            b->device.total_bytes};
  for (size_t i = 0; i < sizeof bytes / sizeof *bytes; i++) us_table_int(t, (int64_t)bytes[i]);
}

static void write_row(struct us_table *t, const struct us_serve_bench *b, const struct us_bench_row *r) {
  us_serve_bench_write_where(t, b);
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
static enum us_status write_json(const struct us_serve_bench *b, const struct us_bench_row *r,
                                 struct us_err *err) {
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

void us_serve_bench_head(const struct us_serve_bench *b) {
  FILE *out = b->run->out;
  const struct us_bench_device *d = &b->device;
  char precision[256];
  us_serve_bench_precision(b->ex, precision, sizeof precision);
  fprintf(out, "%u x %s, %s, %s%s%s\n", d->gpus, d->name, d->engine, b->ex->model->shape.name,
          b->synthetic ? "; weights are synthetic" : "", b->uniform ? ", routed uniformly" : "");
  if (b->share > d->ranks)
    fprintf(out, "the share of %u of %u ranks: the whole model takes %u such GPUs\n", d->ranks, b->share,
            b->share);
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
  print_kind(out, "its head", d->bytes.draft_head);
  print_kind(out, "vectors", d->bytes.vectors);
  print_kind(out, "caches", d->cache_bytes);
  fprintf(out, "\nreading memory at most %.0f GB/s, measured in this run", d->ceiling / 1e9);
  if (b->plan->arrivals) {
    fputs("\n\n", out);
    return;
  }
  fputs(": the floor is a round's weights at that rate\n\n", out);
  fprintf(out, "%5s %7s %5s %8s %8s %8s %8s  %-20s  %-20s %8s %7s %8s %8s %8s\n", "batch", "context", "block",
          "rounds/s", "accepted", "tokens/s", "each/s", "round ms p50/95/99", "token ms p50/95/99",
          "first ms", "experts", "GB/round", "floor ms", "of floor");
}

static void print_row(const struct us_serve_bench *b, const struct us_bench_row *r) {
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

enum us_status us_serve_bench_row(const struct us_serve_bench *b, const struct us_bench_row *row,
                                  struct us_err *err) {
  if (!b->for_people) return write_json(b, row, err);
  print_row(b, row);
  return US_OK;
}

/* ---- the picture --------------------------------------------------------------------------------------------------- */

static enum us_status make_provenance(const struct us_serve_bench *b, char **ret_text, struct us_err *err) {
  struct us_provenance *provenance = NULL;
  enum us_status status =
      us_tool_provenance(b->run, (uint64_t)us_opt_int(b->run->opts, "seed"), &provenance, err);
  if (status == US_OK && !(*ret_text = us_provenance_text(provenance, err))) status = err->status;
  us_provenance_free(provenance);
  return status;
}

enum us_status us_serve_bench_plot(const struct us_serve_bench *b, const char *path, struct us_err *err) {
  const struct us_serve_bench_plan *p = b->plan;
  struct us_plot_series series[US_SERVE_BENCH_LIST];
  double x[US_SERVE_BENCH_LIST], y[US_SERVE_BENCH_LIST][US_SERVE_BENCH_LIST];
  char names[US_SERVE_BENCH_LIST][32], title[192], share[48] = "", *provenance = NULL;
  enum us_status status = make_provenance(b, &provenance, err);
  if (status != US_OK) return status;
  for (uint32_t c = 0; c < p->context_count; c++) { /* rows stand context by context */
    for (uint32_t i = 0; i < p->batch_count; i++) {
      const struct us_bench_row *r = &b->rows[c * p->batch_count + i];
      x[i] = p->batches[i], y[c][i] = per_second(r, (double)r->result.tokens);
    }
    snprintf(names[c], sizeof names[c], "context %u", p->contexts[c]);
    series[c] = (struct us_plot_series){
        .name = names[c], .style = US_PLOT_LINE_POINTS, .x = x, .y = y[c], .n = p->batch_count};
  }
  if (b->share > b->device.ranks)
    snprintf(share, sizeof share, ", the share of %u of %u ranks", b->device.ranks, b->share);
  snprintf(title, sizeof title, "%s on %u x %s%s, acceptance %s%s", b->ex->model->shape.name, b->device.gpus,
           b->device.name, share, acceptance_is(&b->rows[0]), b->synthetic ? ", weights are synthetic" : "");
  struct us_plot_axes axes = {
      .title = title, .x_title = "sequences", .y_title = "tokens a second", .y_from_zero = true};
  status = us_plot_xy(path, &axes, series, p->context_count, provenance, err);
  free(provenance);
  return status;
}
