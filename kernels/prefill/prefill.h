/* prefill.h: many rows of one sequence at once: the operations of a prompt pass, each a kernel on a stream.
 *
 *     struct us_prefill_gemm g = {.w = layer->qkv.pages, .x = normed, .x_stride = D, .rows = R, .parts = 1,
 *                                 .valid = qkv_rows, .out = us_prefill_local(qkv, stride)};
 *     us_prefill_gemm(&g, stream);                       // qkv (R, stride) = x W^T
 *
 * They read the engine's weight pages (kernels/pages/pages.h) and fill its KV pages (kernels/engine/engine.h). Activations
 * that weights multiply are "operand rows": bf16(x) * 2^64 (US_ENGINE_OPERAND_UNIT), row-major.
 *
 * A row's result depends on nothing but the row: every output element is summed over K in an order that its shape fixes, each
 * row in a tensor-core column (or row) of its own, and attention takes key tiles at absolute positions. Chunks of any size,
 * padded tiles and other rows do not matter. Pointers are device memory; every call returns a cudaError_t.
 */
#ifndef US_KERNELS_PREFILL_PREFILL_H
#define US_KERNELS_PREFILL_PREFILL_H

#include "kernels/engine/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

#define US_PREFILL_EXPERT_ROWS 32 /* rows of an expert's tile */
#define US_PREFILL_MAX_EXPERTS 1024
#define US_PREFILL_MAX_ROWS    2048 /* of a chunk */

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* Where output rows go: row r to base[r / per_rank] + (r % per_rank) * stride; part p lies `part` floats further, output
 * column c at first + c. stride, first and part are multiples of 4, bases 16-byte aligned. */
struct us_prefill_rows {
  float *base[US_ENGINE_MAX_RANKS];
  uint32_t per_rank, stride, first;
  uint64_t part;
};

static inline struct us_prefill_rows us_prefill_local(float *rows, uint32_t stride) {
  struct us_prefill_rows out = {{rows}, UINT32_MAX, stride, 0, 0};
  return out;
}

/* Rows by expert: pairs (row, k) in ascending expert, then row: a pair's place is its slot. */
struct us_prefill_tile {
  uint32_t expert, first, rows; /* slots [first, first + rows), at most US_PREFILL_EXPERT_ROWS */
};
struct us_prefill_groups {
  uint32_t *tile_count;          /* (1) */
  struct us_prefill_tile *tiles; /* (us_prefill_most_tiles) */
  uint32_t *row, *pair;          /* (R * top_k) by slot: the row, and row * top_k + k */
};

static inline uint32_t us_prefill_most_tiles(uint32_t experts, uint32_t pairs) {
  uint32_t full = pairs / US_PREFILL_EXPERT_ROWS;
  return full + (experts < pairs ? experts : pairs);
}

struct us_prefill_gemm {
  struct us_engine_matrix
      w; /* pages of at most 2 KB of codes: 4 groups (MXFP4), 4 / halves (FP8), 2 / halves (BF16), 1 (F32) */
  const uint16_t *x;          /* operand rows, 16-byte aligned */
  uint32_t x_stride;          /* values, a multiple of 8 */
  uint32_t rows;              /* R; not used with experts */
  uint32_t parts;             /* K is cut into so many parts, each a sum of its own; divides the slices */
  uint32_t valid;             /* output columns that exist */
  struct us_prefill_rows out; /* used unless opt_swiglu */
  uint16_t *opt_swiglu;       /* halves 2, one part: operand rows of silu(gate) * up */
  uint32_t swiglu_stride;     /* values, a multiple of 4 */
  const struct us_prefill_groups
      *opt_experts;            /* w is a layer's experts; on the host, its pointers on the device */
  const uint32_t *opt_gather;  /* slot to row of x; NULL: the slot itself */
  const uint32_t *opt_scatter; /* slot to row of out; NULL: the slot itself */
};

/* out = x w^T. cudaErrorInvalidValue: sizes that the pages or the rules above do not allow. */
int us_prefill_gemm(const struct us_prefill_gemm *gemm, cudaStream_t stream);

/* Parts for a matrix, from its shape alone: narrow matrices are cut along K so that they occupy the GPU. */
uint32_t us_prefill_parts(const struct us_engine_matrix *w);

/* ---- rows -------------------------------------------------------------------------------------------------------- */

/* Rows [0, rows) of this rank: x = embedding, or residual + addends in order, or the addends alone (replace); kept; then
 * x / sqrt(mean(x^2) + eps) * weight, rounded, as row first + r of every rank's `out`. D a multiple of 8. */
struct us_prefill_norm {
  uint32_t rows, first, D, ranks;
  float *residual;           /* (rows, D) */
  const int32_t *opt_tokens; /* (rows): embed instead of adding */
  const uint16_t *embed[US_ENGINE_MAX_RANKS];
  uint32_t embed_rows;
  const float *sums; /* (addends, .., D) */
  uint32_t addends;
  uint64_t addend; /* floats from one to the next */
  bool replace;
  const float *weight; /* (D) */
  float eps;
  uint16_t *out[US_ENGINE_MAX_RANKS];
  uint32_t out_stride;
  uint16_t *tap[US_ENGINE_MAX_RANKS]; /* column 0 of this layer in the features; tap[0] NULL: not tapped */
  uint32_t tap_stride;
};
int us_prefill_norm(const struct us_prefill_norm *norm, cudaStream_t stream);

/* out row = sum over k, ascending, of weight * pair row. */
struct us_prefill_combine {
  const float *pairs;   /* (R * top_k, D) */
  const float *weights; /* (R, top_k) */
  uint32_t rows, top_k, D;
  struct us_prefill_rows out;
};
int us_prefill_combine(const struct us_prefill_combine *combine, cudaStream_t stream);

/* ---- routing ----------------------------------------------------------------------------------------------------- */

/* As kernels/router/router_ref.c: the top_k experts of each row, ascending, and their weights. E <= 1024, top_k <= 8. */
struct us_prefill_route {
  const float *logits;   /* (parts, rows, stride) */
  const float *opt_bias; /* (E) */
  uint32_t rows, parts, stride, E, top_k;
  uint64_t part; /* floats from one part to the next */
  float scaling;
  bool normalise;
  bool
      uniform; /* choose by Philox instead (key: uniform_seed; counter: position, layer), as the engine does */
  uint64_t uniform_seed;
  uint32_t position, layer; /* of row 0; of the model */
  uint32_t *ids;            /* (rows, top_k) */
  float *weights;
  struct us_prefill_groups groups; /* filled */
};
int us_prefill_route(const struct us_prefill_route *route, cudaStream_t stream);

/* ---- keys, values, attention ------------------------------------------------------------------------------------- */

/* Pages of one layer: position p in page p / 64 % page_count of the table, but those from first_tile * 64 on in `staging`,
 * contiguous pages (a windowed layer's chunk while it attends). */
struct us_prefill_cache {
  uint8_t *pool;
  const uint64_t *const *tables;
  uint32_t layer, page_count;
  uint16_t G, Q, V;
  uint8_t *opt_staging;
  uint32_t first_tile;
};

/* Rotate keys, scale values, store both. Into staging if the cache has it (its first page's older slots are copied from the
 * table, slots after the last row become zeros), else into the table, the last page_count * 64 positions of the chunk. */
struct us_prefill_append {
  struct us_prefill_cache cache;
  const float *kv; /* row r: K heads at kv + r * stride, V heads at + v_first */
  uint32_t stride, v_first;
  uint32_t rows, position;
  const float *rope;       /* (positions, rotary) */
  uint32_t rotary;         /* <= 256 */
  const float *opt_k_norm; /* (Q) */
  float value_scale, eps;
};
int us_prefill_append(const struct us_prefill_append *append, cudaStream_t stream);

/* Causal attention of the chunk's rows over the cache. Q <= 256, V <= 128 and a multiple of 8. */
struct us_prefill_attention {
  struct us_prefill_cache cache;
  const float *q; /* row r: query heads, not rotated */
  uint32_t stride;
  uint32_t rows, position, H;
  const float *rope;
  uint32_t rotary;
  const float *opt_sink; /* (H) */
  uint32_t window;       /* 0: all */
  float scale;
  uint16_t *out; /* operand rows (rows, H * V) */
};
int us_prefill_attention(const struct us_prefill_attention *attention, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
