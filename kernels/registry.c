/* registry.c: the table of operations. */
#include "kernels/registry.h"

#include <string.h>

static double matrix_bytes(const struct us_op_dims *d, size_t N, size_t K) {
  return (double)us_matrix_data_bytes(d->format, N, K) + (double)us_matrix_scale_bytes(d->format, N, K, 0);
}

static double no_bytes(const struct us_op_dims *d) {
  return 0;
}

/* ---- Bytes ---- */

static double embed_bytes(const struct us_op_dims *d) {
  return (double)d->R * matrix_bytes(d, 1, d->D);
}
static double norm_bytes(const struct us_op_dims *d) {
  return 4.0 * (double)d->D;
}
static double linear_bytes(const struct us_op_dims *d) {
  return matrix_bytes(d, d->N, d->K);
}
/* bf16 keys and values. */
static double attention_bytes(const struct us_op_dims *d) {
  return 2.0 * (double)(d->R * d->T * d->G * (d->Q + d->V));
}
static double experts_bytes(const struct us_op_dims *d) {
  return (double)d->active * (2 * matrix_bytes(d, d->F, d->D) + matrix_bytes(d, d->D, d->F));
}

/* ---- Operations ---- */

static double embed_flops(const struct us_op_dims *d) {
  return 0;
}
static double norm_flops(const struct us_op_dims *d) {
  return 4.0 * (double)(d->R * d->D);
}
static double rope_flops(const struct us_op_dims *d) {
  return 3.0 * (double)(d->R * d->H * d->Q);
}
static double linear_flops(const struct us_op_dims *d) {
  return 2.0 * (double)(d->R * d->N * d->K);
}
static double attention_flops(const struct us_op_dims *d) {
  return 2.0 * (double)(d->R * d->T * d->H * (d->Q + d->V));
}
static double swiglu_flops(const struct us_op_dims *d) {
  return 20.0 * (double)(d->R * d->F);
}
static double router_flops(const struct us_op_dims *d) {
  return 20.0 * (double)(d->R * d->E);
}
static double experts_flops(const struct us_op_dims *d) {
  return 6.0 * (double)(d->R * d->top_k * d->F * d->D);
}
static double residual_flops(const struct us_op_dims *d) {
  return (double)(d->R * d->D);
}

/* ---- Tolerances: roundings on the longest path, each 2^-24 of a magnitude ---- */

static double exact(const struct us_op_dims *d) {
  return 0;
}
static double one_rounding(const struct us_op_dims *d) {
  return 1;
}
static double norm_tolerance(const struct us_op_dims *d) {
  return (double)d->D / 16 + 12;
}
static double rope_tolerance(const struct us_op_dims *d) {
  return 4;
}
/* A lane adds K/16 products, the tree four times; the last weight may have been rounded (FP8). */
static double dot_tolerance(double K) {
  return K / 16 + 6;
}
static double linear_tolerance(const struct us_op_dims *d) {
  return dot_tolerance((double)d->K);
}
/* A score's error, in units of 2^-24 of its magnitudes, moves a weight and the denominator by as much (scores up to
 * magnitude 2); then 64 values a tile, tiles, exponentials. */
static double attention_tolerance(const struct us_op_dims *d) {
  return 4 * dot_tolerance((double)d->Q) + 64 + 3 * (double)d->T / 64 + 24;
}
static double swiglu_tolerance(const struct us_op_dims *d) {
  return 8;
}
static double router_tolerance(const struct us_op_dims *d) {
  return 16 + (double)d->top_k;
}
static double experts_tolerance(const struct us_op_dims *d) {
  return 3 * dot_tolerance((double)d->D) + dot_tolerance((double)d->F) + 16 + (double)d->top_k;
}

static const struct us_op ops[] = {
    {"attention",
     "q (R, H, Q), K (T, G, Q), V (T, G, V), sink (H) -> (R, H, V)",
     attention_bytes,
     attention_flops,
     attention_tolerance,
     {"sink dropped", "window + 1", "window - 1", "K off by one", "V off by one"}},
    {"embed", "table (N, D), token (R) -> h (R, D)", embed_bytes, embed_flops, exact, {"row off by one"}},
    {"experts",
     "x (R, D), gate, up (E, F, D), down (E, D, F), ids, weights (R, K) -> y (R, D)",
     experts_bytes,
     experts_flops,
     experts_tolerance,
     {"an expert skipped", "a scale byte + 1", "nibbles swapped"}},
    {"linear",
     "x (R, K), W (N, K) -> y (R, N)",
     linear_bytes,
     linear_flops,
     linear_tolerance,
     {"nibbles swapped", "a scale byte + 1", "a group skipped"}},
    {"residual", "h, y (R, D) -> h (R, D)", no_bytes, residual_flops, one_rounding, {"a value skipped"}},
    {"rmsnorm",
     "x (R, D), w (D) -> y (R, D)",
     norm_bytes,
     norm_flops,
     norm_tolerance,
     {"eps dropped", "weight + 1"}},
    {"rope",
     "x (R, H, Q) -> x (R, H, Q)",
     no_bytes,
     rope_flops,
     rope_tolerance,
     {"theta swapped", "position + 1"}},
    {"router",
     "logits (R, E), bias (E) -> ids, weights (R, K)",
     no_bytes,
     router_flops,
     router_tolerance,
     {"bias in the weights", "not normalised"}},
    {"swiglu", "gate, up (R, F) -> y (R, F)", no_bytes, swiglu_flops, swiglu_tolerance, {"clamped at 7"}},
};

size_t us_op_count(void) {
  return sizeof ops / sizeof *ops;
}

const struct us_op *us_op_at(size_t index) {
  return index < us_op_count() ? &ops[index] : NULL;
}

const struct us_op *us_op_find(const char *name) {
  for (size_t i = 0; i < us_op_count(); i++)
    if (strcmp(ops[i].name, name) == 0) return &ops[i];
  return NULL;
}
