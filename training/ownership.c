/* ownership.c: which rank updates which tensors. */
#include "training/ownership.h"

/* Nanoseconds an H200 takes: 28 bytes a value at 4 TB/s, Muon's products at 300 TFLOP/s. */
static double cost_of(const struct us_param *p, enum us_optim_kind kind) {
  double n = (double)p->rows * (double)p->cols, narrow = (double)(p->rows < p->cols ? p->rows : p->cols);
  if (p->frozen || p->group == US_PARAM_BIAS) return 0.0;
  double memory = 7e-3 * n;
  return kind == US_OPTIM_MUON && p->group == US_PARAM_MUON ? memory + 1e-4 * n * narrow : memory;
}

void us_ownership_plan(const struct us_params *params, enum us_optim_kind kind, uint32_t ranks,
                       struct us_owned *owned) {
  double total = 0.0, before = 0.0;
  uint32_t rank = 0;
  for (size_t i = 0; i < params->count; i++) total += cost_of(&params->items[i], kind);
  owned[0].begin = 0;
  for (size_t i = 0; i < params->count; i++) {
    const struct us_param *p = &params->items[i];
    double own = cost_of(p, kind);
    /* A tensor belongs where its middle falls. */
    while (rank + 1 < ranks && before + 0.5 * own > total * (rank + 1.0) / ranks) {
      owned[rank].end = owned[rank + 1].begin = p->offset;
      rank++;
    }
    before += own;
  }
  for (; rank + 1 < ranks; rank++) owned[rank].end = owned[rank + 1].begin = params->floats;
  owned[ranks - 1].end = params->floats;
}
