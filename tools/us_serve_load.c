/* us_serve_load.c: us-serve --bench --trace: what serving a recorded load comes to. */
#include "tools/us_serve_bench_impl.h"

static const char *const load_columns[] = {US_SERVE_BENCH_WHERE,
                                           "batch",
                                           "block",
                                           "requests",
                                           "prompt_tokens",
                                           "output_tokens",
                                           "seconds",
                                           "most_together",
                                           "acceptance",
                                           "acceptance_is",
                                           "requests_per_s",
                                           "tokens_per_s",
                                           "first_token_ms_p50",
                                           "first_token_ms_p95",
                                           "first_token_ms_p99",
                                           "token_ms_p50",
                                           "token_ms_p95",
                                           "token_ms_p99",
                                           "request_ms_p50",
                                           "request_ms_p95",
                                           "request_ms_p99"};

static void write_spread(struct us_table *t, const struct us_bench_spread *spread) {
  us_table_num(t, 1e3 * spread->p50);
  us_table_num(t, 1e3 * spread->p95);
  us_table_num(t, 1e3 * spread->p99);
}

static double load_acceptance(const struct us_arrivals_result *r) {
  return r->steps ? (double)(r->output_tokens - r->requests) / (double)r->steps
                  : 0; /* prompts give the first tokens */
}

static enum us_status write_load(const struct us_serve_bench *b, const struct us_arrivals_options *o,
                                 const struct us_arrivals_result *r, struct us_err *err) {
  struct us_table *table;
  enum us_status status =
      us_table_open(b->run->out, load_columns, sizeof load_columns / sizeof *load_columns, true, &table, err);
  if (status != US_OK) return status;
  us_serve_bench_write_where(table, b);
  const uint64_t counts[] = {o->batch, o->block, r->requests, r->prompt_tokens, r->output_tokens};
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) us_table_int(table, (int64_t)counts[i]);
  us_table_num(table, r->seconds);
  us_table_int(table, r->most_together);
  us_table_num(table, load_acceptance(r));
  us_table_text(table, o->block == 1 ? "plain" : "measured");
  us_table_num(table, (double)r->requests / r->seconds);
  us_table_num(table, (double)r->output_tokens / r->seconds);
  write_spread(table, &r->first_token);
  write_spread(table, &r->token);
  write_spread(table, &r->request);
  return us_table_close(table, err);
}

static void print_spread(FILE *out, const char *what, const struct us_bench_spread *s) {
  fprintf(out, "%-13s ms: p50 %.3f, p95 %.3f, p99 %.3f\n", what, 1e3 * s->p50, 1e3 * s->p95, 1e3 * s->p99);
}

static void print_load(const struct us_serve_bench *b, const struct us_arrivals_options *o,
                       const struct us_arrivals_result *r) {
  FILE *out = b->run->out;
  fprintf(out, "%llu requests, %llu prompt tokens, %llu tokens in %.3f s: %.1f tokens/s, %.2f requests/s%s\n",
          (unsigned long long)r->requests, (unsigned long long)r->prompt_tokens,
          (unsigned long long)r->output_tokens, r->seconds, (double)r->output_tokens / r->seconds,
          (double)r->requests / r->seconds, b->synthetic ? "; weights are synthetic" : "");
  fprintf(out, "at most %u together; %.3f tokens a round of a request (%s)\n", r->most_together,
          load_acceptance(r), o->block == 1 ? "plain" : "measured");
  print_spread(out, "first token", &r->first_token);
  print_spread(out, "token", &r->token);
  print_spread(out, "whole request", &r->request);
}

enum us_status us_serve_bench_load(const struct us_serve_bench *b, uint32_t block, struct us_err *err) {
  struct us_arrivals_options o = {.batch = (uint32_t)us_opt_int(b->run->opts, "batch"),
                                  .block = block,
                                  .seed = (uint64_t)us_opt_int(b->run->opts, "seed"),
                                  .interrupted = us_tool_interrupted};
  struct us_arrivals_result r;
  enum us_status status = us_arrivals_serve(b->ex, b->plan->arrivals, b->plan->arrival_count, &o, &r, err);
  if (status != US_OK) return status;
  if (!b->for_people) return write_load(b, &o, &r, err);
  print_load(b, &o, &r);
  return US_OK;
}
