/* draft_loss_train.h: labelled rows of a drafter's blocks on the GPU: gathered, weighted by slot, and their gradients put back.
 *
 *     us_rows_gather_train(n, D, row, hidden, x, stream);                      // x (n, D) = hidden[row]
 *     ... head loss of x: logprob (n), dx (n, D) ...
 *     us_draft_weights_train(&(struct us_draft_weights_train){.blocks = n_blocks, .start = start, .kind = .., .logprob = logprob,
 *                                                             .weight = weight}, stream);
 *     us_rows_scatter_train(rows, D, index, weight, dx, dhidden, stream);      // dhidden[r] = weight[i] dx[i], i = index[r]
 *
 * The formulas of training/draft_loss.h. A row's gradient is linear in its weight, so one head product serves weights that
 * depend on its result (D-PACE). Pointers are device memory, 16-byte aligned; D is a multiple of 8; calls return a cudaError_t.
 */
#ifndef US_KERNELS_DRAFT_LOSS_TRAIN_H
#define US_KERNELS_DRAFT_LOSS_TRAIN_H

#include "kernels/gpu/stream.h"
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define US_DRAFT_TRAIN_SLOTS 16 /* most labelled slots of a block, plus 1 */

/* out (n, D) bf16 = in[row]. */
int us_rows_gather_train(size_t n, size_t D, const uint32_t *row, const uint16_t *in, uint16_t *out,
                         cudaStream_t stream);

/* out (rows, D) = weight[i] * in[i] with i = index[r]; zeros where index[r] is negative. */
int us_rows_scatter_train(size_t rows, size_t D, const int32_t *index, const float *weight, const float *in,
                          float *out, cudaStream_t stream);

enum us_draft_weights_kind { US_DRAFT_TRAIN_FIXED, US_DRAFT_TRAIN_DPACE };

struct us_draft_weights_train {
  size_t blocks;
  const uint32_t
      *start; /* (blocks + 1) first labelled row of each block; fewer than US_DRAFT_TRAIN_SLOTS each */
  enum us_draft_weights_kind kind;
  float fixed[US_DRAFT_TRAIN_SLOTS]; /* host: weight of the i-th labelled slot */
  float alpha;          /* dpace: sum over m >= j of the product over i <= m of (1 - alpha) p_i + alpha */
  const float *logprob; /* of every labelled row's label */
  float *weight;        /* written */
};
int us_draft_weights_train(const struct us_draft_weights_train *weights, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
