/* markov.cuh: what a drafter's Markov head adds to the logits of a slot (model/markov.h).
 *
 *     shared->token[r] = us_engine_anchor(b, s, r);                // threads r < 8: what stands before the first slot
 *     us_engine_add_markov(b, s, piece, wanted);                   // a slot of all sequences: this block's piece of the logits
 *
 * Bound: latency. A row of `before`, 128 bytes, is what a slot waits for; `after` is read once a slot, 37 KB a block of a share of four
 * of MiMo-V2.5-Pro's vocabulary at rank 64, from L2 after the first.
 */
#ifndef US_KERNELS_ENGINE_MARKOV_CUH
#define US_KERNELS_ENGINE_MARKOV_CUH

#include "kernels/engine/hop.cuh"

/* The token before slot 1 of the r-th sequence; 0 where there is none. */
static __device__ int32_t us_engine_anchor(const struct us_engine_block *b, const struct us_engine_select *s,
                                           uint32_t r) {
  const uint32_t at = us_engine_select_row(s, r);
  return at == US_ENGINE_NONE ? 0 : max(b->rank->state->draft[at - 1].token, 0);
}

/* shared->before: the rows of the tokens before, of wanted rows. */
static __device__ void us_engine_fetch_before(const struct us_engine_select *s, uint32_t wanted) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  const uint32_t words = s->markov / 2;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < US_ENGINE_ROWS * words; i += US_ENGINE_COMPUTE)
    if (wanted >> i / words & 1)
      shared->before[i / words][i % words] =
          __ldg((const uint32_t *)s->before + (size_t)shared->token[i / words] * words + i % words);
}

/* us_linear's dot product (kernels/linear/linear.h) of an id's row of `after` with a row of `before`: 16 lanes, 32 columns a group. */
static __device__ float us_engine_markov_dot(const uint4 *after, const uint32_t *before, uint32_t groups) {
  float lane[16] = {0.0f};
#pragma unroll 1
  for (uint32_t g = 0; g < groups; g++)
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
      const uint4 v = __ldg(after + 4 * g + i);
      const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (uint32_t j = 0; j < 4; j++) {
        const uint32_t u = before[16 * g + 4 * i + j];
        float *sum = &lane[4 * i + j];
        *sum = fmaf(us_float_from_bits(w[j] << 16), us_float_from_bits(u << 16), *sum);
        *sum = fmaf(us_float_from_bits(w[j] & 0xffff0000u), us_float_from_bits(u & 0xffff0000u), *sum);
      }
    }
#pragma unroll
  for (uint32_t half = 8; half; half /= 2)
#pragma unroll
    for (uint32_t i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}

/* A thread an id of the piece, which is given for the first of the eight rows. */
static __device__ void us_engine_add_markov(const struct us_engine_block *b, const struct us_engine_select *s,
                                            struct us_engine_piece piece, uint32_t wanted) {
  const uint32_t past = min(4 * piece.end, piece.past);
  us_engine_fetch_before(s, wanted);
  us_engine_meet();
  for (uint32_t id = max(4 * piece.begin, piece.first) + threadIdx.x; id < past; id += US_ENGINE_COMPUTE) {
    const uint4 *after = (const uint4 *)(s->after + (size_t)(id - s->first) * s->markov);
#pragma unroll 1
    for (uint32_t r = 0; r < US_ENGINE_ROWS; r++) {
      if (!(wanted >> r & 1)) continue;
      float *logit = s->logits + (size_t)r * s->stride + (id - s->first);
      const float more = us_engine_markov_dot(after, us_engine_select_shared()->before[r], s->markov / 32);
      __stcg(logit, __ldcg(logit) + more);
    }
  }
  us_engine_meet();
}

#endif
