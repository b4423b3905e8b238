/* gptq.h: rounding the rows of a matrix so that its products change little, and masters that begin there.
 *
 *     struct us_gptq gptq = {.shards = shards, .windows = 64, .length = 512, .seed = 1};
 *     us_gptq_start(&gptq, &shape, &original, &params, pool, &err);     // original: frozen; params: us_qat_open's
 *
 * Rounding to nearest makes the error of each weight small; what counts is the error of W x over the inputs x that the
 * matrix has on text. GPTQ (Frantar et al. 2022) rounds the weights of a row one after another and moves those still to
 * come, so that they make up for what was lost: Babai's nearest plane in the lattice of the inputs' second moments
 * H = sum x x^T (Chen et al. 2025). With H = L L^T and e_k the error of weight k, from the last to the first
 *
 *     aim_i = w_i + sum over k > i of L_ki e_k / L_ii,   e_i = w_i - round(aim_i)
 *
 * Matrices are rounded in the order of the forward pass, and two models run beside each other on the same text: the original, and the
 * model rounded so far, whose inputs x these are. What it has lost until then, the original's inputs x' less x, and the original's
 * residual stream h' less h where the product is added to it (o_proj, down), a matrix makes up for as far as that is linear in x,
 * before it is rounded (QEP, Arai & Ichikawa 2025, propagates errors so; GPTAQ, Li et al. 2025; the stream's part is ours):
 *
 *     W <- W + 0.8 (W sum (x' - x) x^T + sum (h' - h) x^T) (H + d)^-1
 *
 * The embedding's rows multiply nothing. What counts is how much the loss minds an error of the stream that begins with a row: for it
 * H = sum g g^T, g the gradients of the original's cross-entropy there on the first 131,072 tokens of the text: an estimate of Fisher's
 * matrix, one for all rows. What the embedding loses is made up for like any other loss.
 *
 * Inputs of an expert are its own rows, each times its routing weight; the rows visit the original's experts in both models, and each of a
 * row's experts makes up for an equal part of the stream's loss. Runs on the CPU, all sequences at once: two layers' activations,
 * about 2 (5 D + qkv + H V + K (D + 3 F)) floats a token. The same bits for any pool.
 */
#ifndef US_TRAINING_GPTQ_H
#define US_TRAINING_GPTQ_H

#include "training/params.h"
#include "training/shards.h"

struct us_gptq {
  const struct us_shards *shards;
  size_t windows, length; /* sequences of the training part whose inputs are taken, and their tokens */
  uint64_t seed;
  double across; /* as us_shards_sample_across */
};

/* Masters that round to what GPTQ chooses, for all matrices of `params` that train and are multiplied in FP8 or MXFP4, and for the
 * embedding. They become the aims, not the rounded values, so that what nearly was rounded the other way is near it in training too; a block whose scale is chosen otherwise
 * for the aims may differ. Scales are those of the corrected masters. `original` is a frozen set of the same tensors, which `params`
 * begins at: a model's weights, or any others that are to be rounded. US_ERR_INPUT when the text is shorter than a sequence,
 * US_ERR_USAGE for more than 2^25 tokens. */
US_CHECKED enum us_status us_gptq_start(const struct us_gptq *gptq, const struct us_shape *shape,
                                        struct us_params *original, struct us_params *params,
                                        struct us_pool *pool, struct us_err *err);

/* -- One matrix -- */

/* h (K, K), second moments, becomes L of h with rows and columns in the order of `at` (K, written): the columns with the largest
 * moments are last, so that they are rounded first. A hundredth of the mean is added to the diagonal, which also serves
 * inputs that were never seen. Row i of h then holds L_ik, k <= i. scratch: (K, K). */
void us_gptq_factor(float *h, size_t K, uint32_t *at, float *scratch);

/* rows (count, K) <- rows (H + its damping)^-1, H and `at` from us_gptq_factor. scratch: (count, K). */
void us_gptq_solve(float *rows, size_t count, size_t K, const float *L, const uint32_t *at, float *scratch);

/* Replace rows [begin, end) of w (N, K) by their aims. `scales` are those that us_matrix_encode made for the whole of w;
 * lost: (end - begin, K) of zeros. */
void us_gptq_round(float *w, size_t N, size_t K, const struct us_matrix_encoding *encoding,
                   const void *scales, const float *L, const uint32_t *at, size_t begin, size_t end,
                   float *lost);

#endif
