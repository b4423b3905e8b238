/* adaptive.c: the bytes that a round streams. */
#include "decode/adaptive.h"

static double matrix_bytes(const struct us_matrix *w) {
  if (w->format == US_FORMAT_NONE) return 0.0;
  return (double)us_matrix_data_bytes(w->format, w->rows, w->cols) +
         (double)us_matrix_scale_bytes(w->format, w->rows, w->cols, w->scale_chunk_rows);
}

struct us_verify_cost us_verify_cost_of(const struct us_model *model, const struct us_draft *opt_draft) {
  const struct us_shape *shape = &model->shape;
  struct us_verify_cost cost = {.fixed = matrix_bytes(&model->head)};
  cost.idle = shape->experts ? 1.0 - (double)shape->top_k / shape->experts : 1.0;
  for (uint32_t l = 0; l < shape->layers; l++) {
    const struct us_layer *layer = &model->layers[l];
    const struct us_matrix *fixed[] = {&layer->qkv,  &layer->q,  &layer->k,    &layer->v,     &layer->o_proj,
                                       &layer->gate, &layer->up, &layer->down, &layer->router};
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) cost.fixed += matrix_bytes(fixed[i]);
    for (uint32_t e = 0; shape->moe_layer[l] && layer->experts && e < shape->experts; e++) {
      const struct us_expert *expert = &layer->experts[e];
      cost.experts += matrix_bytes(&expert->gate) + matrix_bytes(&expert->up) + matrix_bytes(&expert->down);
    }
  }
  if (!opt_draft) return cost;
  cost.fixed += matrix_bytes(&opt_draft->fc) + matrix_bytes(us_draft_head(opt_draft, model));
  for (uint32_t l = 0; l < opt_draft->shape.layers; l++) {
    const struct us_draft_layer *layer = &opt_draft->layers[l];
    const struct us_matrix *fixed[] = {&layer->q,    &layer->k,  &layer->v,   &layer->o_proj,
                                       &layer->gate, &layer->up, &layer->down};
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) cost.fixed += matrix_bytes(fixed[i]);
  }
  return cost;
}
