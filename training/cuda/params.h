/* params.h: the tensors of a us_params on one GPU: masters, gradients, moments, and the weights as multiplied.
 *
 *     us_cuda_params_create(cuda, &params, owned, &set, &err);            // uploads the masters
 *     us_cuda_params_refresh(set);                                        // rounded and compute from value
 *     us_cuda_params_zero_grad(set);
 *     ... forward and backward read us_cuda_param_compute(set, p), add to us_cuda_param_grad(set, p) ...
 *     us_cuda_params_square(set, &sum, &err);                             // of the owned gradients; waits
 *     us_cuda_params_update(set, &optim, rate, factor, &err);             // the owned tensors, gradients times factor
 *     us_cuda_params_download(set, &err);                                 // host values; waits
 *     us_cuda_params_free(set);
 *
 * A tensor lies at the offset of its us_param in every arena, as on the host. A frozen set (us_params_init_model with
 * `frozen`) has `rounded` and `compute` alone. `rounded` is the FP32 value that a tensor is multiplied as, bit for bit what the
 * CPU computes and the checkpoint will hold: vectors, router and embedding are read from there. `compute` is the same in
 * bf16, exact but for FP8 (e4m3 times an FP32 scale has more than 8 bits) and F32 tensors: matrices are read from there.
 *
 * With several GPUs each owns a range of tensors, on whose boundaries the range begins and ends: moments exist and updates
 * happen there alone, and updated values are sent to the others.
 */
#ifndef US_TRAINING_CUDA_PARAMS_H
#define US_TRAINING_CUDA_PARAMS_H

#include "training/ownership.h"
#include "training/params.h"

struct us_cuda;

struct us_cuda_params {
  struct us_cuda *cuda;     /* borrowed */
  struct us_params *host;   /* borrowed; its items say names, shapes, offsets, encodings and what is frozen */
  size_t floats;            /* of each arena */
  float *value, *grad;      /* device (floats); NULL in a frozen set */
  struct us_owned owned;    /* what this GPU updates; all of it on one GPU */
  float *moment1, *moment2; /* device (owned.end - owned.begin), from owned.begin on; NULL in a frozen set */
  struct us_watch watch;    /* the same; NULL unless the host's are watched */
  float *rounded;           /* device (floats) */
  uint16_t *compute;        /* device (floats) */
  struct us_cuda_params_state *state; /* scratch of updates and norms */
};

/* Device pointers of a tensor of set->host. */
static inline const uint16_t *us_cuda_param_compute(const struct us_cuda_params *set,
                                                    const struct us_param *p) {
  return set->compute + p->offset;
}
static inline const float *us_cuda_param_rounded(const struct us_cuda_params *set, const struct us_param *p) {
  return set->rounded + p->offset;
}
/* Gradient to add to, or NULL if the tensor takes none. */
static inline float *us_cuda_param_grad(const struct us_cuda_params *set, const struct us_param *p) {
  return p->frozen || !set->grad ? NULL : set->grad + p->offset;
}

/* Arenas with the host's masters, moments 0; a frozen set is ready to be multiplied. US_ERR_MEMORY when the GPU is full. */
US_CHECKED enum us_status us_cuda_params_create(struct us_cuda *cuda, struct us_params *host,
                                                struct us_owned owned, struct us_cuda_params **ret_set,
                                                struct us_err *err);
void us_cuda_params_free(struct us_cuda_params *set); /* NULL is allowed */

/* The arenas that exist in the owned range alone, moments and what is watched, and those of the host, which are whole. Returns how many. */
#define US_CUDA_OWNED_ARENAS 5
size_t us_cuda_params_owned_arenas(const struct us_cuda_params *set, float *device[US_CUDA_OWNED_ARENAS],
                                   float *host[US_CUDA_OWNED_ARENAS]);

/* Masters and the owned arenas to the host's or from them: download takes masters alone. All wait. */
US_CHECKED enum us_status us_cuda_params_upload(struct us_cuda_params *set, struct us_err *err);
US_CHECKED enum us_status us_cuda_params_download(struct us_cuda_params *set, struct us_err *err);
US_CHECKED enum us_status us_cuda_params_download_owned(struct us_cuda_params *set, struct us_err *err);

/* One tensor's master from the host. Its rounded value follows at the next refresh. */
void us_cuda_params_upload_one(struct us_cuda_params *set, const struct us_param *p);

/* Bring rounded and compute up to date with value: us_params_refresh with US_SEQ_ROUND_BF16. Queued; nothing happens to a frozen
 * set. Once somebody has waited, check gives US_ERR_CHECK and the tensor's name if a master was NaN or Inf. */
void us_cuda_params_refresh(struct us_cuda_params *set);
US_CHECKED enum us_status us_cuda_params_check(const struct us_cuda_params *set, struct us_err *err);

void us_cuda_params_zero_grad(struct us_cuda_params *set);

/* Sum of the squares of the owned gradients in double, in an order fixed by the range. Waits. */
US_CHECKED enum us_status us_cuda_params_square(struct us_cuda_params *set, double *ret_sum,
                                                struct us_err *err);

/* First tensor of the owned range whose gradient is not finite; *ret_param is NULL if all are. Waits. */
US_CHECKED enum us_status us_cuda_params_nonfinite(struct us_cuda_params *set,
                                                   const struct us_param **ret_param, struct us_err *err);

/* Update the owned tensors as us_optim_step does, with their gradients times `factor`: AdamW to the CPU's bits; Muon's
 * Newton-Schulz in bf16 products with FP32 sums; then fix weights that oscillate, for which gradients are overwritten. Queued. US_ERR_USAGE for a matrix that Muon cannot take here. */
US_CHECKED enum us_status us_cuda_params_update(struct us_cuda_params *set, const struct us_optim *optim,
                                                double rate, float factor, struct us_err *err);

#endif
