/* dflash_drafter.c: the drafter that dflash-train makes.
 *
 * Contents: shape; formats; what goes in; what comes out.
 */
#include "tools/dflash_drafter.h"

#include "model/precision.h"

#include <stdlib.h>
#include <string.h>

/* --- shape --- */

static enum us_status parse_taps(const char *text, struct us_draft_shape *s, struct us_err *err) {
  char *end;
  s->taps = 0;
  for (const char *at = text;; at = end + 1) {
    long layer = strtol(at, &end, 10);
    if (end == at || (*end && *end != ',') || layer < 0 || s->taps == US_MAX_TAPS)
      return us_err_set(err, US_ERR_USAGE, "--taps '%s': not a list of at most %d layers, like 0,2,5", text,
                        US_MAX_TAPS);
    if ((uint32_t)layer >= s->target_layers)
      return us_err_set(err, US_ERR_USAGE, "--taps '%s': layer %ld; the target has layers 0 to %u", text,
                        layer, s->target_layers - 1);
    s->tap_layer[s->taps++] = (uint32_t)layer;
    if (!*end) return US_OK;
  }
}

/* Four layers over the depth, the first and the last included. */
static void default_taps(struct us_draft_shape *s) {
  uint32_t last = s->target_layers - 1;
  s->taps = last < 3 ? last + 1 : 4;
  for (uint32_t i = 0; i < s->taps; i++) s->tap_layer[i] = s->taps == 1 ? last : i * last / (s->taps - 1);
}

static enum us_status read_shape(struct us_opts *o, const struct us_model *target, struct us_draft_shape *s,
                                 struct us_err *err) {
  const struct us_shape *t = &target->shape;
  uint32_t heads = (uint32_t)us_opt_int(o, "heads"), dim = (uint32_t)us_opt_int(o, "head-dim");
  if (!dim) dim = t->hidden / heads;
  int64_t mask = us_opt_int(o, "mask-id"), inner = us_opt_int(o, "inner");
  *s = (struct us_draft_shape){.layers = (uint32_t)us_opt_int(o, "layers"),
                               .hidden = t->hidden,
                               .vocab = t->vocab,
                               .inner = inner ? (uint32_t)inner : 2 * t->hidden,
                               .attention = {.q_heads = heads,
                                             .kv_heads = (uint32_t)us_opt_int(o, "kv-heads"),
                                             .qk_dim = dim,
                                             .v_dim = dim,
                                             .rotary_dim = dim,
                                             .rope_theta = 1e4,
                                             .window = (uint32_t)us_opt_int(o, "window"),
                                             .sink = true},
                               .norm_eps = t->norm_eps,
                               .value_scale = 1.0,
                               .block = (uint32_t)us_opt_int(o, "block"),
                               .mask_id = mask < 0 ? t->vocab - 1 : (uint32_t)mask,
                               .target_layers = t->layers,
                               .markov = (uint32_t)us_opt_int(o, "markov")};
  default_taps(s);
  enum us_status status = US_OK;
  if (us_opt_given(o, "taps")) status = parse_taps(us_opt_str(o, "taps"), s, err);
  return status == US_OK ? us_draft_shape_check(s, t, err) : status;
}

/* --- formats --- */

/* --head: what the drafter drafts with. */
static void take_head(struct us_dflash_drafter *d) {
  static const enum us_format formats[] = {US_FORMAT_NONE, US_FORMAT_NONE, US_FORMAT_BF16, US_FORMAT_FP8,
                                           US_FORMAT_MXFP4};
  int choice = us_opt_choice(d->opts, "head");
  struct us_draft_shape *s = &d->train->shape;
  if (!choice) return;
  s->head = formats[choice];
  if (s->head == US_FORMAT_NONE) return;
  s->vocab = d->target->shape.vocab;
  d->head = (struct us_matrix_encoding){
      .format = s->head, .scale_rule = US_SCALE_MSE, .fp8_scale = US_FP8_SCALE_UE8M0};
  d->train->head = &d->head;
}

/* --format: what its matrices are trained through. */
static void take_format(struct us_dflash_drafter *d) {
  int format = us_opt_choice(d->opts, "format");
  static const enum us_format formats[] = {US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_FP8, US_FORMAT_MXFP4};
  /* Powers of two as FP8's scales: a GPU multiplies bf16, which then holds the same values. */
  d->encoding = (struct us_matrix_encoding){
      .format = formats[format], .scale_rule = US_SCALE_MSE, .fp8_scale = US_FP8_SCALE_UE8M0};
  if (format) d->train->encoding = &d->encoding;
}

/* --- what goes in --- */

/* With --init the drafter says its shape, and options that would change it are refused. */
static enum us_status take_init(struct us_dflash_drafter *d, struct us_err *err) {
  static const char *const shape_options[] = {"layers", "block",    "window",   "taps",    "inner",
                                              "heads",  "kv-heads", "head-dim", "mask-id", "markov"};
  struct us_opts *o = d->opts;
  for (size_t i = 0; i < sizeof shape_options / sizeof shape_options[0]; i++)
    if (us_opt_given(o, shape_options[i]))
      return us_err_set(err, US_ERR_USAGE, "--%s: the shape is that of --init", shape_options[i]);
  enum us_status status = us_draft_open(us_opt_str(o, "init"), &d->init, err);
  if (status == US_OK) status = us_draft_check_target(d->init, d->target, err);
  if (status == US_OK) d->train->shape = d->init->shape;
  return status;
}

bool us_dflash_drafter_only_rounds(struct us_opts *o) {
  return us_opt_given(o, "init") && !us_opt_int(o, "steps") && !(us_opt_num(o, "minutes") > 0.0);
}

enum us_status us_dflash_drafter_check(struct us_opts *o, struct us_err *err) {
  static const char *const of_training[] = {"log", "run", "plot", "state"};
  for (size_t i = 0; i < sizeof of_training / sizeof *of_training && us_dflash_drafter_only_rounds(o); i++)
    if (us_opt_given(o, of_training[i]))
      return us_err_set(err, US_ERR_USAGE, "--%s: without steps and a time nothing is trained",
                        of_training[i]);
  return US_OK;
}

enum us_status us_dflash_drafter_init(struct us_dflash_drafter *d, struct us_err *err) {
  enum us_status status = us_opt_given(d->opts, "init")
                              ? take_init(d, err)
                              : read_shape(d->opts, d->target, &d->train->shape, err);
  if (status != US_OK) return status;
  d->train->init = d->init;
  take_head(d);
  take_format(d);
  return US_OK;
}

/* --- what comes out --- */

enum us_status us_dflash_drafter_conventions(const struct us_draft_shape *s, struct us_provenance *p,
                                             struct us_err *err) {
  char taps[16 * US_MAX_TAPS] = "[", mask[32];
  size_t used = 1;
  for (uint32_t i = 0; i < s->taps; i++)
    used += (size_t)snprintf(taps + used, sizeof taps - used, "%s%u", i ? ", " : "", s->tap_layer[i]);
  snprintf(taps + used, sizeof taps - used, "]");
  snprintf(mask, sizeof mask, "%u", s->mask_id);
  enum us_status status =
      us_provenance_set_text(p, "labels", "unshifted: slot j predicts position p + j", err);
  if (status == US_OK) status = us_provenance_set_text(p, "context", "strictly before the anchor", err);
  if (status == US_OK)
    status =
        us_provenance_set_text(p, "taps_are", "residual stream after the layer, before the final norm", err);
  if (status == US_OK) status = us_provenance_set_json(p, "tap_layers", taps, err);
  if (status == US_OK) status = us_provenance_set_json(p, "mask_id", mask, err);
  return status;
}

/* --init with --head and in --format, without training; what is not given stays as it is. */
static enum us_status round_init(struct us_dflash_drafter *d, struct us_pool *pool,
                                 struct us_draft **ret_draft, struct us_err *err) {
  const struct us_dflash *t = d->train;
  const struct us_draft *from = d->init;
  struct us_precision_rules rules;
  struct us_convert how = {.rules = &rules, .scale_rule = US_SCALE_MSE, .fp8_scale = US_FP8_SCALE_UE8M0};
  char text[64] = "";
  if (t->encoding) snprintf(text, sizeof text, "draft=%s", us_format_name(t->encoding->format));
  if (t->encoding && t->shape.head != US_FORMAT_NONE)
    snprintf(text + strlen(text), sizeof text - strlen(text), ",draft.head=%s",
             us_format_name(t->shape.head));
  enum us_status status = us_precision_parse(text, &rules, err);
  if (status == US_OK && (t->head || t->shape.head != from->shape.head)) {
    status = us_draft_with_head(from, t->head ? &d->target->head : NULL, t->head, pool, &d->rounded, err);
    from = d->rounded;
  }
  return status == US_OK ? us_draft_convert(from, &how, pool, ret_draft, err) : status;
}

enum us_status us_dflash_drafter_write(struct us_dflash_drafter *d, struct us_pool *pool, const char *path,
                                       const char *provenance, struct us_err *err) {
  struct us_draft *draft = NULL;
  enum us_status status;
  if (us_dflash_drafter_only_rounds(d->opts)) {
    status = round_init(d, pool, &draft, err);
  } else {
    status = us_draft_create(&d->train->shape, &draft, err);
    if (status == US_OK) status = us_params_export_draft(&d->train->params, draft, err);
  }
  if (status == US_OK) status = us_draft_write(path, draft, provenance, err);
  us_draft_free(draft);
  return status;
}

void us_dflash_drafter_release(struct us_dflash_drafter *d) {
  us_draft_free(d->rounded);
  us_draft_free(d->init);
}
