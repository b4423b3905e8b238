/* train_parity.h: the two sides of the parity test: a target on the CPU, and what the GPU makes of the same masters.
 *
 * Bound. Both sides compute the same graph with FP32 sums and differ in what they round to bf16 on the way. The CPU says what
 * that does to each tensor: it runs with its roundings (norms, attention, SwiGLU, keys and values: 5 a layer) and without any,
 * and the distance of the two gradients (Frobenius, relative) is the tensor's noise. The GPU has up to 17 roundings a layer more:
 * qkv before and after norm and rotation, attention's probabilities, gate_up and the experts' rows forward; dx twice, da, a w,
 * dgate_up, the experts' dx, dattention, the scores' gradients, dqkv before and after rotation and norm back. Those 5 that both
 * have part where their inputs fall on two sides of an edge, which adds no more than one rounding each. Errors of roundings are
 * independent and add in squares: the GPU's distance from the CPU is expected at sqrt(22 / 5) = 2.1 noises at most. Half as much
 * again is allowed, and since distance and noise of n values are each known to a part in sqrt(2 n), three standard errors of their
 * ratio, 3 / sqrt(n). Where a tensor's own noise is below the mean of all tensors, the mean counts.
 * pico's experts are MXFP4 and its other matrices FP8 with powers of two as scales: all of it exact in bf16. With FP32 scales the
 * GPU rounds what FP8 decodes to once more, which this bound has no room for (seen: gradients at 4.3 noises).
 * Forward alone there are 5 roundings on each side: taps and losses are expected within sqrt(10 / 5) noises, and half as much
 * again is allowed. A row's loss has no distance but its own: it may differ by the largest noise of any row, times the same.
 *
 * Where two experts nearly tie, the sides may choose differently. A score's slope is 1/4 at most, so an error of a logit of 2^-7,
 * five times what is seen, moves it by 2^-9: rows are drawn anew until every choice has a margin of 2^-7, after which ids
 * and loads must be equal.
 */
#ifndef US_TESTS_GPU_TRAIN_PARITY_H
#define US_TESTS_GPU_TRAIN_PARITY_H

#include "train_lab.h"

#define ROWS            384
#define MARGIN          0x1p-7f
#define GRADIENT_FACTOR 2.1 /* sqrt(22 / 5): lab_compare allows half as much again and what scatters */
#define FORWARD_FACTOR  2.2 /* 1.5 sqrt(10 / 5) */

struct target {
  const char *name;
  struct us_shape shape;
  struct us_params params, teacher_params;
  struct us_pool *pool;
  struct us_seq seq;
  struct us_rows rows;
  struct us_model_train *cpu, *teacher;
  float *taps; /* (R, taps * D) of the CPU */
  struct us_train_taps tap;
  double loss[2]; /* cross-entropy, KL */
  float *row_loss;
  struct lab_noise noise;
  double tap_noise[3], row_noise, row_most; /* of the loss of a row: root mean square, largest */
  struct us_cuda *cuda;
};

/* Random weights and rows for a built-in shape; the executors hold pointers into the struct, so they are made, and the rows
 * settled, once it stands where it stays. Returns the rows that are still doubtful. */
struct target open_target(const char *name, struct us_cuda *cuda);
size_t open_executors(struct target *t);
void close_target(struct target *t);

/* Masters on the GPU, rounded, gradients 0. */
struct us_cuda_params *place(struct us_cuda *cuda, struct us_params *params);
struct us_param *tensor(struct target *t, const char *name);
void check_gradients(const char *name, const struct us_params *params, const float *grad,
                     const struct lab_noise *noise, const char *what);

void check_target(struct target *t);
void check_mutations(struct target *t);
void check_drafter(struct target *t);
void check_refusals(struct target *t);

/* What a mutation of the GPU's side may change, and what the GPU gives for it. */
struct variant {
  struct us_shape shape;
  struct us_rows rows;
  enum us_train_memory memory;
  bool kl;
};
struct result {
  double loss;
  size_t counted;
  float *grad;     /* (floats) */
  float *row_loss; /* (R) */
};
struct result run_gpu(struct target *t, const struct variant *v, bool checks);
void release_result(struct result *r);

#endif
