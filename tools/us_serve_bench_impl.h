/* us_serve_bench_impl.h: what the sources of us-serve --bench share. */
#ifndef US_TOOLS_US_SERVE_BENCH_IMPL_H
#define US_TOOLS_US_SERVE_BENCH_IMPL_H

#include "base/table.h"
#include "tools/us_serve_bench.h"

/* One combination of batch and context. */
struct us_bench_row {
  struct us_bench_options options;
  struct us_bench_result result;
  double first_token; /* NaN: not asked for */
};

struct us_serve_bench {
  struct us_tool_run *run;
  const struct us_serve_bench_plan *plan;
  struct us_executor *ex;
  struct us_bench_device device;
  struct us_bench_row *rows;
  size_t n;
  uint32_t share; /* ranks that the model would be cut for, 0: those there are */
  bool synthetic, uniform, for_people;
};

/* "experts=mxfp4,..." */
void us_serve_bench_precision(const struct us_executor *ex, char *text, size_t size);

/* For JSON: the cells of these columns. */
#define US_SERVE_BENCH_WHERE                                                                                 \
  "gpu", "gpus", "ranks", "share_of_ranks", "engine", "model", "weights", "routing", "precision"
void us_serve_bench_write_where(struct us_table *table, const struct us_serve_bench *b);

/* What all rows have in common, for people; then a row, as soon as its run is over, for them or as JSON. */
void us_serve_bench_head(const struct us_serve_bench *b);
US_CHECKED enum us_status us_serve_bench_row(const struct us_serve_bench *b, const struct us_bench_row *row,
                                             struct us_err *err);
US_CHECKED enum us_status us_serve_bench_plot(const struct us_serve_bench *b, const char *path,
                                              struct us_err *err);

/* Serve the plan's arrivals in blocks of so many rows, and print what it comes to. */
US_CHECKED enum us_status us_serve_bench_load(const struct us_serve_bench *b, uint32_t block,
                                              struct us_err *err);

#endif
