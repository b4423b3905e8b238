/* rope_grad.h: rotary positions over many rows, in place, and the gradient, which is the rotation back.
 *
 *     for (p = 0; p < positions; p++) us_rope_table(theta, 64, p, table + p * 64);   // rope.h
 *     us_rope_seq(&seq, &(struct us_rope_rows){...}, table, positions, x);     // forward
 *     us_rope_grad(&seq, &rows, table, positions, dx);                         // dx of the unrotated rows, in place
 *
 * NeoX pairs (i, i + rotary/2) of the leading `rotary` dims of each head; angle = position * theta^(-2i/rotary).
 */
#ifndef US_KERNELS_ROPE_GRAD_H
#define US_KERNELS_ROPE_GRAD_H

#include "kernels/seq/seq.h"

struct us_rope_rows {
  size_t R;
  size_t stride;          /* floats between rows */
  const uint32_t *offset; /* (heads) where each head starts in a row */
  size_t heads;
  uint32_t rotary;
};

/* Rotate; position (R) indexes the table (positions, rotary), rows as us_rope_table makes them. */
void us_rope_seq(struct us_seq *seq, const struct us_rope_rows *rows, const float *table,
                 const uint32_t *position, float *x);
void us_rope_grad(struct us_seq *seq, const struct us_rope_rows *rows, const float *table,
                  const uint32_t *position, float *dx);

/* Multiply the heads' leading `width` dims by `scale` and, if seq rounds and `round` is set, round them to bf16: what
 * happens to K (scale 1) and V (value scale) before they are cached. */
void us_scale_heads_seq(struct us_seq *seq, const struct us_rope_rows *rows, uint32_t width, float scale,
                        bool round, float *x);

#endif
