/* constants.c: offsets of heads and tables of rotation, by way of host memory. */
#include "training/cuda/constants.h"

#include "kernels/rope/rope.h"

#include <stdlib.h>

enum us_status us_cuda_copy_in(struct us_cuda *cuda, void *device, const void *host, size_t bytes,
                               struct us_err *err) {
  us_cuda_use(cuda);
  us_cuda_upload(cuda, device, host, bytes);
  return us_cuda_sync(cuda, err);
}

static enum us_status fill_offsets(struct us_cuda *cuda, const struct us_cuda_heads *heads, uint32_t *offset,
                                   struct us_err *err) {
  const struct us_attention_shape *a = heads->shape;
  uint32_t H = a->q_heads, G = a->kv_heads, *k = offset + H, *v = k + G;
  for (uint32_t h = 0; h < H; h++) offset[h] = us_attention_q_row(a, heads->chunks, h);
  for (uint32_t g = 0; g < G; g++) {
    k[g] = us_attention_k_row(a, heads->chunks, g);
    v[g] = us_attention_v_row(a, heads->chunks, g);
  }
  enum us_status status = us_cuda_copy_in(cuda, heads->q_offset, offset, H * sizeof *offset, err);
  if (status == US_OK)
    status = us_cuda_copy_in(cuda, heads->qk_offset, offset, (H + G) * sizeof *offset, err);
  if (status == US_OK) status = us_cuda_copy_in(cuda, heads->k_offset, k, G * sizeof *k, err);
  if (status == US_OK) status = us_cuda_copy_in(cuda, heads->v_offset, v, G * sizeof *v, err);
  return status;
}

enum us_status us_cuda_heads_fill(struct us_cuda *cuda, const struct us_cuda_heads *heads,
                                  struct us_err *err) {
  const struct us_attention_shape *a = heads->shape;
  size_t values = heads->positions * a->rotary_dim, offsets = a->q_heads + 2 * (size_t)a->kv_heads;
  uint32_t *offset = calloc(offsets, sizeof *offset);
  float *table = calloc(values ? values : 1, sizeof *table);
  enum us_status status =
      offset && table ? US_OK : us_err_memory(err, "rotation table", values * sizeof *table);
  if (status == US_OK) status = fill_offsets(cuda, heads, offset, err);
  for (size_t p = 0; p < heads->positions && status == US_OK; p++)
    us_rope_table(a->rope_theta, a->rotary_dim, (uint32_t)p, table + p * a->rotary_dim);
  if (status == US_OK) status = us_cuda_copy_in(cuda, heads->table, table, values * sizeof *table, err);
  free(offset);
  free(table);
  return status;
}
