/* limits.h: sizes that the kernels of training take, beyond what us_shape_check asks; no GPU is needed to ask.
 *
 *     status = us_cuda_limits_widths(shape->hidden, shape->vocab, &err);
 *     if (status == US_OK) status = us_cuda_limits_heads(&shape->full, &err);
 *     if (status == US_OK) status = us_cuda_limits_rows(rows, us_cuda_limits_widest(shape), &err);
 *
 * Each returns US_OK, or US_ERR_USAGE and says which size it is and what is trained. A kernel that meets such a size refuses it too, but only
 * in the midst of a step and as an invalid argument.
 */
#ifndef US_TRAINING_CUDA_LIMITS_H
#define US_TRAINING_CUDA_LIMITS_H

#include "base/err.h"
#include "model/shape.h"
#include <stddef.h>

/* Norms hold a row in registers (kernels/rmsnorm/rmsnorm_train.h); logits are read 16 bytes at a time, in bf16 too. */
enum us_status us_cuda_limits_widths(uint32_t hidden, uint32_t vocab, struct us_err *err);

/* Sizes of query, key and value heads. */
enum us_status us_cuda_limits_heads(const struct us_attention_shape *attention, struct us_err *err);

/* Experts, and experts a token. */
enum us_status us_cuda_limits_experts(uint32_t experts, uint32_t top_k, struct us_err *err);

/* Values a row of the widest array that a kernel over rows goes through: it counts pieces of 8 values in 32 bits. */
size_t us_cuda_limits_widest(const struct us_shape *shape);
size_t us_cuda_limits_draft_widest(const struct us_draft_shape *shape);

/* Rows of a batch, of arrays at most so wide. */
enum us_status us_cuda_limits_rows(size_t rows, size_t widest, struct us_err *err);

#endif
