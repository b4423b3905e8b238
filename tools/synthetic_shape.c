/* synthetic_shape.c: the shapes that random weights are made for, from a tool's options. */
#include "tools/synthetic_shape.h"

#include "device/weights_layout.h"
#include "model/precision.h"
#include "model/shape_share.h"
#include "training/quant_report.h"

#include <unistd.h>

enum us_status us_tool_synthetic_check(struct us_opts *opts, struct us_err *err) {
  static const char *const needs[] = {"precision", "share"};
  for (size_t i = 0; i < sizeof needs / sizeof *needs; i++)
    if (us_opt_given(opts, needs[i]) && !us_opt_given(opts, "synthetic"))
      return us_err_set(err, US_ERR_USAGE, "--%s needs --synthetic", needs[i]);
  if (us_opt_given(opts, "share") && us_opt_int(opts, "share") % us_opt_int(opts, "gpus"))
    return us_err_set(err, US_ERR_USAGE, "--share %lld is no multiple of --gpus %lld",
                      (long long)us_opt_int(opts, "share"), (long long)us_opt_int(opts, "gpus"));
  return US_OK;
}

static enum us_status set_precision(struct us_opts *opts, struct us_synthetic_shape *s, struct us_err *err) {
  struct us_precision_rules rules;
  enum us_status status = us_precision_parse(us_opt_str(opts, "precision"), &rules, err);
  return status == US_OK ? us_precision_shape(&rules, &s->shape, s->drafting ? &s->draft : NULL, err)
                         : status;
}

static enum us_status cut(struct us_opts *opts, struct us_synthetic_shape *s, struct us_err *err) {
  uint32_t parts = (uint32_t)(us_opt_int(opts, "share") / us_opt_int(opts, "gpus"));
  enum us_status status = us_shape_share(&s->shape, parts, err);
  if (status != US_OK) return us_err_prefix(err, "--share: %s", us_opt_str(opts, "model"));
  if (s->drafting) status = us_draft_shape_share(&s->draft, &s->shape, parts, err);
  return status == US_OK ? US_OK : us_err_prefix(err, "--share: %s", us_opt_str(opts, "draft"));
}

enum us_status us_tool_synthetic_shape(struct us_opts *opts, struct us_synthetic_shape *ret_shape,
                                       struct us_err *err) {
  struct us_synthetic_shape *s = ret_shape;
  *s = (struct us_synthetic_shape){.drafting = us_opt_given(opts, "draft")};
  enum us_status status = us_shape_load(us_opt_str(opts, "model"), &s->shape, err);
  if (status == US_OK && s->drafting) status = us_draft_shape_load(us_opt_str(opts, "draft"), &s->draft, err);
  if (status == US_OK && us_opt_given(opts, "precision")) status = set_precision(opts, s, err);
  if (status == US_OK && s->drafting) status = us_draft_shape_check(&s->draft, &s->shape, err);
  if (status == US_OK && us_opt_given(opts, "share")) status = cut(opts, s, err);
  return status;
}

enum us_status us_tool_synthetic_fits(const struct us_synthetic_shape *shape, struct us_err *err) {
  struct us_model *model = NULL;
  struct us_draft *draft = NULL;
  uint64_t bytes = 0;
  double memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
  enum us_status status = us_weights_skeleton(&shape->shape, NULL, &model, &draft, err);
  if (status == US_OK) status = us_model_bytes(model, &bytes, err);
  us_model_free(model);
  if (status != US_OK || (double)bytes <= memory) return status;
  return us_err_set(err, US_ERR_MEMORY, "random weights of %s take %.4g GB; this machine has %.4g GB",
                    shape->shape.name, (double)bytes / 1e9, memory / 1e9);
}
