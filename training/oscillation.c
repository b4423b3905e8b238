/* oscillation.c: weights whose codes go to and fro while a quantized model is finetuned are fixed. */
#include "training/oscillation.h"

struct us_oscillation_rule us_freeze_rule(const struct us_freeze *freeze, double progress) {
  struct us_oscillation_rule rule = {.memory = (float)freeze->memory};
  if (!(freeze->first > 0.0)) return rule;
  rule.threshold = INFINITY;
  if (progress < US_FREEZE_BEGINS) return rule;
  double past =
      (progress < 1.0 ? progress - US_FREEZE_BEGINS : 1.0 - US_FREEZE_BEGINS) / (1.0 - US_FREEZE_BEGINS);
  double left = 0.5 + 0.5 * cos(past * 3.14159265358979323846);
  rule.threshold = (float)(freeze->last + (freeze->first - freeze->last) * left);
  return rule;
}

bool us_param_is_watched(const struct us_params *params, const struct us_param *p) {
  bool coarse = p->encoding.format == US_FORMAT_MXFP4 || p->encoding.format == US_FORMAT_FP8;
  return params->watch.share && !p->frozen && !p->vector && coarse;
}

struct hold_task {
  struct us_params *params;
  const struct us_oscillation_rule *rule;
};

static void hold_tensor(const struct us_params *params, struct us_param *p,
                        const struct us_oscillation_rule *rule) {
  const struct us_watch *watch = &params->watch;
  size_t n = p->rows * p->cols;
  if (us_matrix_fake_quant(p->value, p->rows, p->cols, &p->encoding, p->grad, NULL) != US_OK) return;
  for (size_t i = 0, at = p->offset; i < n; i++, at++) {
    struct us_oscillation o = {watch->share[at], watch->mean[at], watch->turn[at]};
    p->value[i] = us_oscillation_watch(rule, p->compute[i], p->grad[i], p->value[i], &o);
    watch->share[at] = o.share, watch->mean[at] = o.mean, watch->turn[at] = o.turn;
  }
}

static void hold_tensors(void *arg, size_t begin, size_t end, int worker) {
  const struct hold_task *t = arg;
  for (size_t i = begin; i < end; i++)
    if (us_param_is_watched(t->params, &t->params->items[i]))
      hold_tensor(t->params, &t->params->items[i], t->rule);
}

void us_params_hold(struct us_params *params, struct us_pool *pool, const struct us_oscillation_rule *rule) {
  if (!params->watch.share || !(rule->threshold > 0.0f)) return;
  us_pool_for(pool, params->count, 1, hold_tensors, &(struct hold_task){.params = params, .rule = rule});
}

double us_params_held(const struct us_params *params) {
  uint64_t watched = 0, held = 0;
  for (size_t i = 0; i < params->count; i++) {
    const struct us_param *p = &params->items[i];
    if (!us_param_is_watched(params, p)) continue;
    const float *turn = params->watch.turn + p->offset;
    watched += p->rows * p->cols;
    for (size_t k = 0; k < p->rows * p->cols; k++) held += turn[k] == US_OSCILLATION_HELD;
  }
  return watched ? (double)held / (double)watched : 0.0;
}
