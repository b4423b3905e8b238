/* hop.cuh: blocks of a rank that share a row of logits, and what they tell each other.
 *
 *     us_engine_hop_put(f, hop, word, value, count);               // one thread a word, in this block's part
 *     us_engine_await_pairs(f->b, us_engine_hop_at(f, hop, part, word), stride, n, us_engine_hop_flag(f, hop), US_ENGINE_HOP_FLAG,
 *                           pairs);
 *     hop++;                                                       // all threads
 *
 * Up to 16 blocks share a row, each with a piece of the vocabulary. In a hop every block stores words that carry their own flag
 * and reads the others': no counter, no fence. The sums of what they tell are integers, so the number of blocks does not matter.
 *
 * Consecutive hops lie in different slots. A block that is two hops ahead has read the others' hop between, which they wrote after
 * they had read the one before; so the slot is free. The last hop of a row has a slot of its own: the next row begins with 0.
 */
#ifndef US_KERNELS_ENGINE_HOP_CUH
#define US_KERNELS_ENGINE_HOP_CUH

#include "kernels/engine/candidate.cuh"

#define US_ENGINE_HOP_FLAG (~0ull << 24) /* of a pair's upper half; below it a count */
#define US_ENGINE_MEMBERS  255           /* tokens that are sorted outright: a hop's words but the first */

/* ---- shared memory of SELECT -------------------------------------------------------------------------------------- */

/* A row that several blocks share. */
struct us_engine_filter {
  const struct us_engine_block *b;
  struct us_engine_piece piece; /* of this block */
  uint32_t vocab, part, parts;
  uint8_t *area; /* (slots, parts, words) pairs */
  uint64_t flag; /* of hop 0, 40 bits */
  float max, inv_float;
  double inv_temperature;
};

struct us_engine_select_shared {
  struct us_engine_best best[US_ENGINE_COMPUTE_WARPS];
  struct us_engine_best gathered[US_ENGINE_COMPUTE_WARPS][US_ENGINE_ROWS];
  struct us_engine_filter filter;
  uint32_t count[256], mass[3][256]; /* of this block: tokens by digit; their weights, 14 bits a word */
  uint64_t total_mass[2][256];       /* of the row's blocks, by halves of them */
  uint32_t total_count[2][256];
  uint64_t member[256], weight[256]; /* key << 32 | ~id, and what it weighs */
  uint32_t members;                  /* of this block */
  uint64_t target;                   /* of the next digit */
  uint32_t digit, inside;            /* US_ENGINE_NONE: nothing reaches the target; tokens with that digit */
  uint32_t key, last;                /* a cut */
  uint32_t counts[US_ENGINE_COMPUTE_WARPS];
  uint64_t sums[US_ENGINE_ROWS]; /* of this block: the drafter's masses */
  uint64_t best_key[US_ENGINE_COMPUTE_WARPS][US_ENGINE_ROWS],
      half[US_ENGINE_COMPUTE_WARPS]; /* of a Markov head's slot (slots.cuh) */
  struct us_engine_select slot;      /* the slot itself, where rows need more than their best score */
  int32_t token[US_ENGINE_ROWS];     /* before it */
  uint32_t before[US_ENGINE_ROWS][US_ENGINE_MARKOV / 2]; /* and the head's rows of those, bf16 */
};
static_assert(sizeof(struct us_engine_select_shared) <= US_ENGINE_VECTOR_BYTES, "scratch of SELECT");

static __device__ __forceinline__ struct us_engine_select_shared *us_engine_select_shared(void) {
  return (struct us_engine_select_shared *)us_engine_scratch(NULL);
}

/* ---- hops --------------------------------------------------------------------------------------------------------- */

#define US_ENGINE_HOP_LAST 31 /* the hop that ends a row; at most 18 come before it */

static __device__ __forceinline__ uint32_t us_engine_filter_parts(uint32_t blocks) {
  uint32_t parts = blocks / US_ENGINE_ROWS;
  return parts > US_ENGINE_HOP_PARTS ? US_ENGINE_HOP_PARTS : parts ? parts : 1;
}
/* Groups of blocks: group g takes rows g, g + groups, ... */
static __device__ __forceinline__ uint32_t us_engine_filter_groups(uint32_t blocks) {
  uint32_t groups = blocks / us_engine_filter_parts(blocks);
  return groups < US_ENGINE_ROWS ? groups : US_ENGINE_ROWS;
}
static __device__ __forceinline__ bool us_engine_filters_here(const struct us_engine_block *b,
                                                              uint32_t rows) {
  return rows && b->index / us_engine_filter_parts(b->blocks) < us_engine_filter_groups(b->blocks);
}

static __device__ __forceinline__ uint64_t us_engine_hop_flag(const struct us_engine_filter *f,
                                                              uint32_t hop) {
  return (f->flag + hop) << 24;
}
static __device__ __forceinline__ uint8_t *us_engine_hop_at(const struct us_engine_filter *f, uint32_t hop,
                                                            uint32_t part, uint32_t word) {
  uint32_t slot = hop == US_ENGINE_HOP_LAST ? 2 : hop % 2;
  return f->area + ((size_t)(slot * US_ENGINE_HOP_PARTS + part) * US_ENGINE_HOP_WORDS + word) * 16;
}
/* count: below 2^24. */
static __device__ __forceinline__ void us_engine_hop_put(const struct us_engine_filter *f, uint32_t hop,
                                                         uint32_t word, uint64_t value, uint32_t count) {
  us_store_pair(us_engine_hop_at(f, hop, f->part, word), {value, us_engine_hop_flag(f, hop) | count});
}
/* One thread: one word of a part. */
static __device__ __forceinline__ uint64_t us_engine_hop_get(const struct us_engine_filter *f, uint32_t hop,
                                                             uint32_t part, uint32_t word) {
  struct us_engine_pair pair[US_ENGINE_BATCH];
  us_engine_await_pairs(f->b, us_engine_hop_at(f, hop, part, word), 0, 1, us_engine_hop_flag(f, hop),
                        US_ENGINE_HOP_FLAG, pair);
  return pair[0].low;
}
/* Threads p < parts get word 0 of part p, the others 0. */
static __device__ __forceinline__ uint64_t us_engine_hop_words(const struct us_engine_filter *f,
                                                               uint32_t hop) {
  return threadIdx.x < f->parts ? us_engine_hop_get(f, hop, threadIdx.x, 0) : 0;
}

/* ---- going through the piece -------------------------------------------------------------------------------------- */

#define US_ENGINE_QUADS 5 /* loads in flight a thread: a sixteenth of 152,576 tokens is 4.7 quads a thread */

/* The thread's quads from `base` on, 512 apart: first id of each, and its logits; NaN for what is not there. */
struct us_engine_quads {
  float x[US_ENGINE_QUADS][4];
};
static __device__ __forceinline__ uint32_t us_engine_quad_id(uint32_t base, uint32_t i) {
  return 4 * (base + i * US_ENGINE_COMPUTE + threadIdx.x);
}
static __device__ __forceinline__ void us_engine_quads_load(const struct us_engine_filter *f, uint32_t base,
                                                            struct us_engine_quads *quads) {
#pragma unroll
  for (uint32_t i = 0; i < US_ENGINE_QUADS; i++) {
    uint32_t q = base + i * US_ENGINE_COMPUTE + threadIdx.x;
    if (q < f->piece.end)
      us_engine_quad(&f->piece, q, quads->x[i]);
    else
      quads->x[i][0] = quads->x[i][1] = quads->x[i][2] = quads->x[i][3] = us_float_from_bits(0x7fc00000u);
  }
}
#define US_ENGINE_QUADS_STEP (US_ENGINE_QUADS * US_ENGINE_COMPUTE)

/* us_sample_weight, which is 0 from 28.5 below the maximum on. NaN weighs nothing. */
static __device__ __forceinline__ uint64_t us_engine_weight(const struct us_engine_filter *f, float x) {
  if ((x - f->max) * f->inv_float < -30.0f) return 0;
  return us_sample_weight(x, f->max, f->inv_temperature);
}

#endif
