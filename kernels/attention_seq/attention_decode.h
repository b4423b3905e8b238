/* attention_decode.h: attention of one query row a sequence over the keys and values that the sequence keeps, on a GPU, for generation.
 *
 *     struct us_attention_decode a = {.slots = S, .q_heads = H, ..., .q = qkv, .k = qkv, .v = qkv, .stride = width,
 *                                     .token = token, .position = position, .k_cache = k, .v_cache = v, .capacity = T};
 *     us_attention_decode(&a, stream);                    // out; the row's key and value are kept
 *
 * Row s stands at position p = position[s]. Its key and value are kept at place p % T of the slot's caches, and it sees the last
 * min(p + 1, T) positions: T is the window, or all positions that a sequence may reach. The function of attention_seq.h:
 *   out_h = sum_j p_j v_j,  p_j = exp(scale q_h.k_j) / (sum_j exp(scale q_h.k_j) + exp(sink_h))
 * Operands are bf16, everything between is FP32, out is rounded once. A row with a negative token has no sequence: its out is 0 and
 * nothing is kept. Sums have an order that the position and the shape fix: neither the slot nor its neighbours matter.
 *
 * Bound: the bytes of keys and values: 4096 (sequence, KV head) pairs of 200 keys of 64 and 64 are 210 MB. Query heads beyond four
 * a KV head read them again, from L2.
 *
 * Pointers are device memory, 16-byte aligned; strides and offsets multiples of 8 elements. Nothing is allocated or waited for.
 * Returns a cudaError_t: cudaErrorInvalidValue for what the comments below do not allow.
 */
#ifndef US_KERNELS_ATTENTION_DECODE_H
#define US_KERNELS_ATTENTION_DECODE_H

#include "kernels/gpu/stream.h"
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct us_attention_decode {
  uint32_t slots;             /* at most 65535 */
  uint32_t q_heads, kv_heads; /* H, G, H a multiple of G: query head h reads KV head h / (H / G) */
  uint32_t qk_dim, v_dim;     /* Q, V: multiples of 16, at most 256 */
  const uint16_t *q, *k, *v;  /* bf16 rows of the slots, rotated and scaled */
  size_t stride;              /* elements between rows */
  const uint32_t *q_offset, *k_offset, *v_offset; /* (H), (G), (G): where a head starts in a row */
  const int32_t *token;                           /* (slots) negative: no sequence */
  const uint32_t *position;                       /* (slots) */
  uint16_t *k_cache, *v_cache;                    /* bf16 (slots, G, T, Q) and (slots, G, T, V) */
  uint32_t capacity;                              /* T, at least 1 */
  float scale;                                    /* > 0 */
  const float *opt_sink;                          /* (H) */
  uint16_t *out;                                  /* bf16 (slots, H * V) written */
};
int us_attention_decode(const struct us_attention_decode *attention, cudaStream_t stream);

/* Keys and values of packed rows to where us_attention_decode looks for them: row r is position[r] of the prompt of slot[r], of which
 * end[r] positions are packed; the last T of them are kept. */
struct us_attention_keep {
  uint32_t rows, kv_heads, qk_dim, v_dim; /* as above */
  const uint16_t *k, *v;                  /* bf16 rows, rotated and scaled */
  size_t stride;
  const uint32_t *k_offset, *v_offset;
  const int32_t *slot; /* (rows) negative: the row is not kept */
  const uint32_t *position, *end;
  uint16_t *k_cache, *v_cache;
  uint32_t capacity;
};
int us_attention_keep(const struct us_attention_keep *keep, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
