/* embed_grad.h: rows of the embedding table, and their gradient.
 *
 *     us_embed_seq(&seq, tokens, R, D, table, x);
 *     us_embed_grad(&seq, tokens, R, N, D, dx, dtable);   // deterministic: a token's rows add in ascending order
 */
#ifndef US_KERNELS_EMBED_GRAD_H
#define US_KERNELS_EMBED_GRAD_H

#include "kernels/seq/seq.h"

/* x (R, D) = table (N, D)[token]; a negative token gives a zero row. */
void us_embed_seq(struct us_seq *seq, const int32_t *token, size_t R, size_t D, const float *table, float *x);

/* dtable (N, D) is added to. */
void us_embed_grad(struct us_seq *seq, const int32_t *token, size_t R, size_t N, size_t D, const float *dx,
                   float *dtable);

#endif
