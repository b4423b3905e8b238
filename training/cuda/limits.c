/* limits.c: sizes that the kernels of training take. */
#include "training/cuda/limits.h"

#define MOST_HIDDEN  8192
#define MOST_EXPERTS 1024
#define MOST_CHOSEN  32
#define PIECE        8                       /* values */
#define MOST_PIECES  ((size_t)INT32_MAX + 1) /* of an array, fewer than so many */

enum us_status us_cuda_limits_widths(uint32_t hidden, uint32_t vocab, struct us_err *err) {
  if (hidden > MOST_HIDDEN)
    return us_err_set(err, US_ERR_USAGE, "a hidden size of %u; on a GPU up to %d is trained", hidden,
                      MOST_HIDDEN);
  if (vocab % PIECE)
    return us_err_set(err, US_ERR_USAGE, "a vocabulary of %u; on a GPU a multiple of %d is trained", vocab,
                      PIECE);
  return US_OK;
}

enum us_status us_cuda_limits_heads(const struct us_attention_shape *a, struct us_err *err) {
  if (a->qk_dim % 16 == 0 && a->v_dim % 16 == 0 && a->qk_dim <= 192 && a->v_dim <= 128) return US_OK;
  return us_err_set(err, US_ERR_USAGE,
                    "heads of %u and %u; on a GPU multiples of 16 up to 192 and 128 are trained", a->qk_dim,
                    a->v_dim);
}

enum us_status us_cuda_limits_experts(uint32_t experts, uint32_t top_k, struct us_err *err) {
  if (experts <= MOST_EXPERTS && top_k <= MOST_CHOSEN) return US_OK;
  return us_err_set(err, US_ERR_USAGE, "%u experts, %u a token; on a GPU up to %d and %d are trained",
                    experts, top_k, MOST_EXPERTS, MOST_CHOSEN);
}

static size_t larger(size_t a, size_t b) {
  return a > b ? a : b;
}

/* Pairs that are rotated, values that are scaled. */
static size_t rope_width(const struct us_attention_shape *a) {
  return (size_t)a->rotary_dim / 2 * (a->q_heads + a->kv_heads) + (size_t)a->v_dim * a->kv_heads;
}

/* Threads of an embedding have 4 values each, those of its gradient are whole warps. */
static size_t embedding_width(uint32_t hidden) {
  return ((size_t)hidden + 127) / 128 * 32 * PIECE;
}

size_t us_cuda_limits_widest(const struct us_shape *shape) {
  size_t widest = embedding_width(shape->hidden);
  for (uint32_t l = 0; l < shape->layers; l++) {
    bool moe = shape->moe_layer[l];
    widest = larger(widest, rope_width(us_shape_attention(shape, l)));
    widest = larger(widest, moe ? (size_t)shape->top_k * shape->expert_inner : shape->dense_inner);
  }
  return widest;
}

size_t us_cuda_limits_draft_widest(const struct us_draft_shape *shape) {
  return larger(larger(embedding_width(shape->hidden), shape->inner), rope_width(&shape->attention));
}

enum us_status us_cuda_limits_rows(size_t rows, size_t widest, struct us_err *err) {
  size_t most = (MOST_PIECES - 1) / ((widest + PIECE - 1) / PIECE);
  if (rows && rows <= most) return US_OK;
  return us_err_set(err, US_ERR_USAGE, "%zu rows a batch; on a GPU 1 to %zu of this model are trained", rows,
                    most);
}
