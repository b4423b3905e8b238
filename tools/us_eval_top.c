/* us_eval_top.c: us-eval's records of what a model thinks of held-out tokens: writing one, measuring against one. */
#include "tools/us_eval_top.h"
#include "base/record.h"
#include "base/table.h"

enum us_status us_eval_write_top(struct us_tool_run *run, const struct us_likeliest_job *job,
                                 struct us_pool *pool, const char *provenance, struct us_err *err) {
  const char *path = us_opt_str(run->opts, "write-top");
  struct us_likeliest likeliest;
  enum us_status status = us_likeliest_measure(job, pool, &likeliest, err);
  if (status != US_OK) return status;
  us_log_notice(run->log, "%u likeliest of %zu held-out tokens", likeliest.k, likeliest.rows);
  status = us_likeliest_write(&likeliest, path, provenance, err);
  us_likeliest_release(&likeliest);
  return status == US_OK ? us_record_emit(run->out, us_opt_flag(run->opts, "json"), path, "likeliest", err)
                         : status;
}

static enum us_status print(struct us_tool_run *run, const char *path, const struct us_likeliest_figures *f,
                            struct us_err *err) {
  static const char *const columns[] = {
      "model",      "tokens",          "kl",         "kl_error", "top1",
      "top1_error", "base_perplexity", "perplexity", "ln_ratio", "ln_ratio_error"};
  struct us_table *table;
  enum us_status status = us_table_open(run->out, columns, sizeof columns / sizeof *columns,
                                        us_opt_flag(run->opts, "json"), &table, err);
  if (status != US_OK) return status;
  us_table_text(table, path);
  us_table_int(table, (int64_t)f->tokens);
  us_table_num(table, f->kl), us_table_num(table, f->kl_error);
  us_table_num(table, f->top1), us_table_num(table, f->top1_error);
  us_table_num(table, f->base), us_table_num(table, f->perplexity);
  us_table_num(table, f->ln_ratio), us_table_num(table, f->ln_ratio_error);
  return us_table_close(table, err);
}

enum us_status us_eval_against_top(struct us_tool_run *run, struct us_model *model,
                                   struct us_learner *learner, struct us_pool *pool, struct us_err *err) {
  struct us_likeliest base;
  struct us_likeliest_figures figures;
  enum us_status status = us_likeliest_open(us_opt_str(run->opts, "top"), &base, err);
  if (status != US_OK) return status;
  status = us_likeliest_compare(&base, model, learner, pool, &figures, err);
  us_likeliest_release(&base);
  return status == US_OK ? print(run, model->path, &figures, err) : status;
}
