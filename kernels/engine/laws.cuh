/* laws.cuh: what rules REJECT and BLOCK and log-probabilities need to know of a round's rows: decode/round.c's sums over the
 * vocabulary, by all blocks of all ranks, before ACCEPT decides.
 *
 *     if (asked) us_engine_weigh(b, &op->accept, asked);               // all compute threads of all blocks, in ACCEPT
 *     laws = us_engine_laws();                                         // block 0: masses, thresholds, what each slot would emit
 *
 * Two times through the rows. First the masses of p (the target's law after temperature and filters) and q (the drafter's), and what
 * a proposal weighs in each; then every block knows p and q as numbers, how far the block rule keeps (pi), and so the residual of every
 * slot: its mass, and the token that would be drawn from it. All sums are of integers, all draws maxima: the CPU's bits, whatever the
 * number of blocks. p lies in the target's logits, q in the drafter's, a slot higher.
 *
 * Bound: latency, some 40 us a row tile; runs only where a request asks for it.
 *
 * Contents: who asks; masses; emissions; both.
 */
#ifndef US_KERNELS_ENGINE_LAWS_CUH
#define US_KERNELS_ENGINE_LAWS_CUH

#include "kernels/engine/select.cuh"

/* Columns of the first exchange. */
enum us_engine_mass {
  US_ENGINE_MASS_ONE, /* of all tokens at temperature 1 */
  US_ENGINE_MASS_P,   /* of what the target's filters keep */
  US_ENGINE_MASS_Q,   /* of what the drafter's keep */
  US_ENGINE_WEIGHT_P, /* of the row's token in each */
  US_ENGINE_WEIGHT_Q,
  US_ENGINE_LOGIT_BITS, /* of the row's token */
};
static_assert(US_ENGINE_LOGIT_BITS + 1 == US_ENGINE_MASSES, "columns of sums.cuh");

/* What a slot would emit: from its residual, and from p where that is empty; the residual's mass in units of 2^-62. */
struct us_engine_emission {
  float score[2], logit[2];
  uint32_t id[2];
  uint64_t mass;
};

struct us_engine_laws {
  uint64_t mass[US_ENGINE_MAX_ROWS][US_ENGINE_MASSES];    /* totals */
  double pi[US_ENGINE_MAX_ROWS];                          /* before the row's slot; 1 for REJECT */
  double after[US_ENGINE_MAX_ROWS];                       /* with the row's proposal */
  struct us_engine_emission emission[US_ENGINE_MAX_ROWS]; /* block 0 */
  /* this block's, of one row tile */
  uint64_t value[US_ENGINE_ROWS * US_ENGINE_MASSES];
  uint32_t extra[US_ENGINE_ROWS * US_ENGINE_EMISSION];
  struct us_engine_emission part[US_ENGINE_COMPUTE_WARPS];
};
static_assert(sizeof(struct us_engine_laws) <= US_ENGINE_VECTOR_BYTES, "scratch of ACCEPT");

static __device__ __forceinline__ struct us_engine_laws *us_engine_laws(void) {
  return (struct us_engine_laws *)us_engine_scratch(NULL);
}

/* ---- who asks ------------------------------------------------------------------------------------------------------------ */

/* A sequence whose proposals survive by law: also in rounds without any, so that all blocks agree while one of them decides. */
static __device__ __forceinline__ bool us_engine_by_law(const struct us_engine_sequence *s) {
  return s->active && s->rule != US_VERIFY_MATCH && s->sampling.temperature > 0.0f;
}

/* 1: somebody wants log-probabilities; 2: somebody verifies by law. The same in all blocks of all ranks. */
static __device__ __forceinline__ uint32_t us_engine_has_laws(const struct us_engine_block *b) {
  const uint32_t lane = threadIdx.x % 32, all = 0xffffffffu;
  const struct us_engine_sequence *s = &b->rank->state->sequence[lane % US_ENGINE_SEQUENCES];
  return (__ballot_sync(all, s->active && s->logprobs) ? 1 : 0) |
         (__ballot_sync(all, us_engine_by_law(s)) ? 2 : 0);
}

/* One row of the target's pass as its law wants to be seen. */
struct us_engine_asked {
  bool there, law, proposes, sampled,
      logprobs; /* proposes: has a proposal; sampled: drawn from the drafter's law */
  uint32_t slot;
  int32_t token; /* the proposal, or the target's own draw */
  struct us_engine_law p, q;
  double inv; /* 1 / temperature */
};

static __device__ struct us_engine_asked us_engine_asked_of(const struct us_engine_state *state,
                                                            uint32_t at) {
  const struct us_engine_row row = state->target[at];
  struct us_engine_asked a = {};
  a.there = row.sequence != US_ENGINE_NONE;
  if (!a.there) return a;
  const struct us_engine_sequence *s = &state->sequence[row.sequence];
  a.slot = row.slot, a.logprobs = s->logprobs;
  a.law = us_engine_by_law(s) && s->drafts > 0;
  a.proposes = a.law && row.slot < s->drafts;
  a.sampled = a.proposes && !s->replay;
  a.token = a.proposes ? state->target[at + 1].token : a.law ? -1 : state->drawn[at];
  a.p = state->law[at];
  if (a.sampled) a.q = state->draft_law[at + 1];
  a.inv = 1.0 / (double)s->sampling.temperature;
  if (!us_engine_finite(a.p.max)) a.there = false; /* nothing is drawn from it */
  return a;
}

/* Logits of a row in this block's piece; of the drafter's row with the same proposal. */
static __device__ __forceinline__ struct us_engine_piece us_engine_law_piece(
    const struct us_engine_block *b, const struct us_engine_accept *op, bool draft, uint32_t at) {
  struct us_engine_select select = {};
  select.stride = op->stride, select.count = op->count, select.first = op->first;
  const float *logits =
      draft ? op->opt_draft_logits + (size_t)(at + 1) * op->stride : op->logits + (size_t)at * op->stride;
  return us_engine_piece_of(b, &select, logits);
}

static __device__ __forceinline__ uint64_t us_engine_law_weight(const struct us_engine_law *law, float x,
                                                                uint32_t id, double inv) {
  const struct us_cut cut = {law->key, law->last};
  return us_cut_keeps(cut, x, id) ? us_sample_weight(x, law->max, inv) : 0;
}

/* ---- masses -------------------------------------------------------------------------------------------------------------- */

/* Two warps a row: this block's part of its masses into laws->value. */
namespace us_rare {
static __device__ __noinline__ void us_engine_mass_row(const struct us_engine_block *b,
                                                       const struct us_engine_accept *op, uint32_t at) {
  const struct us_engine_asked a = us_engine_asked_of(b->rank->state, at);
  const struct us_engine_piece piece = us_engine_law_piece(b, op, false, at);
  struct us_engine_piece draft = piece;
  if (a.sampled) draft = us_engine_law_piece(b, op, true, at);
  uint64_t sum[US_ENGINE_MASSES] = {};
  for (uint32_t q = piece.begin + threadIdx.x % 64; a.there && q < piece.end; q += 64) {
    float x[4], y[4];
    us_engine_quad(&piece, q, x);
    if (a.sampled) us_engine_quad(&draft, q, y);
    for (uint32_t j = 0; j < 4; j++) {
      const uint32_t id = 4 * q + j;
      const bool token = (int32_t)id == a.token && id >= piece.first && id < piece.past;
      const uint64_t p = a.law ? us_engine_law_weight(&a.p, x[j], id, a.inv) : 0,
                     d = a.sampled ? us_engine_law_weight(&a.q, y[j], id, a.inv) : 0;
      if (a.logprobs) sum[US_ENGINE_MASS_ONE] += us_sample_weight(x[j], a.p.max, 1.0);
      sum[US_ENGINE_MASS_P] += p, sum[US_ENGINE_MASS_Q] += d;
      if (token) sum[US_ENGINE_WEIGHT_P] = p, sum[US_ENGINE_WEIGHT_Q] = d;
      if (token) sum[US_ENGINE_LOGIT_BITS] = us_float_bits(x[j]);
    }
  }
#pragma unroll
  for (uint32_t i = 0; i < US_ENGINE_MASSES; i++) {
    for (int lanes = 16; lanes; lanes /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], lanes);
    if (threadIdx.x % 32 == 0)
      atomicAdd((unsigned long long *)&us_engine_laws()->value[at % US_ENGINE_ROWS * US_ENGINE_MASSES + i],
                (unsigned long long)sum[i]);
  }
}
} // namespace us_rare
using us_rare::us_engine_mass_row;

static __device__ __forceinline__ struct us_engine_sums us_engine_mass_place(uint32_t tile) {
  return {tile, 0, US_ENGINE_MASSES};
}

/* All blocks send; those that go on, and block 0, add up. */
static __device__ void us_engine_masses(const struct us_engine_block *b, const struct us_engine_accept *op,
                                        bool everywhere) {
  struct us_engine_laws *laws = us_engine_laws();
  const uint32_t items = US_ENGINE_ROWS * US_ENGINE_MASSES;
  for (uint32_t t = 0; t < op->tiles; t++) {
    const struct us_engine_sums place = us_engine_mass_place(t);
    us_engine_meet();
    if (threadIdx.x < items) laws->value[threadIdx.x] = 0;
    us_engine_meet();
    us_engine_mass_row(b, op, t * US_ENGINE_ROWS + threadIdx.x / 64);
    us_engine_meet();
    us_engine_sums_put(b, &place, laws->value, NULL);
  }
  if (b->index && !everywhere) return;
  for (uint32_t t = 0; t < op->tiles; t++) {
    const struct us_engine_sums place = us_engine_mass_place(t);
    for (uint32_t item = threadIdx.x / 32; item < items; item += US_ENGINE_COMPUTE_WARPS) {
      uint64_t sum = us_engine_sums_total(b, &place, item);
      if (threadIdx.x % 32 == 0)
        laws->mass[t * US_ENGINE_ROWS + item / US_ENGINE_MASSES][item % US_ENGINE_MASSES] = sum;
    }
  }
  us_engine_meet();
}

/* One thread a sequence: how far the prefix is kept before and with each proposal. */
static __device__ void us_engine_chain(const struct us_engine_state *state, uint32_t i) {
  struct us_engine_laws *laws = us_engine_laws();
  const struct us_engine_sequence *s = &state->sequence[i];
  double pi = 1.0;
  for (uint32_t slot = 0; us_engine_by_law(s) && slot <= s->drafts; slot++) {
    const uint32_t at = i * state->block + slot;
    const uint64_t *mass = laws->mass[at];
    const double p = (double)mass[US_ENGINE_WEIGHT_P] / (double)mass[US_ENGINE_MASS_P],
                 q = s->replay ? 1.0 : (double)mass[US_ENGINE_WEIGHT_Q] / (double)mass[US_ENGINE_MASS_Q];
    laws->pi[at] = s->rule == US_VERIFY_BLOCK ? pi : 1.0;
    laws->after[at] = pi = us_verify_pi(laws->pi[at], p, q);
  }
}

/* ---- emissions ----------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void us_engine_emission_add(struct us_engine_emission *e, int k,
                                                              float score, uint32_t id, float logit) {
  if (score > e->score[k] || (score == e->score[k] && id < e->id[k]))
    e->score[k] = score, e->id[k] = id, e->logit[k] = logit;
}
static __device__ __forceinline__ struct us_engine_emission us_engine_emission_none(void) {
  return {{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {US_ENGINE_NONE, US_ENGINE_NONE}, 0};
}
static __device__ __forceinline__ void us_engine_emission_join(struct us_engine_emission *e, int lanes) {
  const uint32_t all = 0xffffffffu;
  for (int k = 0; k < 2; k++) {
    float score = __shfl_xor_sync(all, e->score[k], lanes), logit = __shfl_xor_sync(all, e->logit[k], lanes);
    us_engine_emission_add(e, k, score, __shfl_xor_sync(all, e->id[k], lanes), logit);
  }
  e->mass += __shfl_xor_sync(all, e->mass, lanes);
}

/* Two warps a row: what this block's piece would emit into laws->value and extra. */
namespace us_rare {
static __device__ __noinline__ void us_engine_emission_row(const struct us_engine_block *b,
                                                           const struct us_engine_accept *op, uint32_t at) {
  struct us_engine_laws *laws = us_engine_laws();
  const struct us_engine_state *state = b->rank->state;
  const struct us_engine_asked a = us_engine_asked_of(state, at);
  const struct us_engine_piece piece = us_engine_law_piece(b, op, false, at);
  struct us_engine_piece draft = piece;
  if (a.sampled) draft = us_engine_law_piece(b, op, true, at);
  struct us_engine_emission e = us_engine_emission_none();
  if (a.there && a.law) {
    const struct us_engine_row row = state->target[at];
    const struct us_engine_sequence *s = &state->sequence[row.sequence];
    const struct us_noise noise =
        us_noise_round(s->seed, s->position, row.slot, s->sample, US_STREAM_RESIDUAL);
    const double P = (double)laws->mass[at][US_ENGINE_MASS_P], Q = (double)laws->mass[at][US_ENGINE_MASS_Q],
                 pi = laws->pi[at];
    for (uint32_t q = piece.begin + threadIdx.x % 64; q < piece.end; q += 64) {
      float x[4], y[4];
      uint32_t bits[4];
      us_engine_quad(&piece, q, x);
      if (a.sampled) us_engine_quad(&draft, q, y);
      us_philox_quad(noise.key, noise.position, noise.sample, q, noise.stream, bits);
      for (uint32_t j = 0; j < 4; j++) {
        const uint32_t id = 4 * q + j;
        const double p = (double)us_engine_law_weight(&a.p, x[j], id, a.inv) / P;
        double own = !a.proposes  ? 0.0
                     : !a.sampled ? ((int32_t)id == a.token ? 1.0 : 0.0)
                                  : (double)us_engine_law_weight(&a.q, y[j], id, a.inv) / Q,
               share = a.proposes ? pi * p - own : p;
        const float noisy = us_gumbel_bits(bits[j]);
        e.mass += us_verify_residual_units(share);
        if (share > 0.0) us_engine_emission_add(&e, 0, us_logf((float)share) + noisy, id, x[j]);
        if (p > 0.0) us_engine_emission_add(&e, 1, us_logf((float)p) + noisy, id, x[j]);
      }
    }
  }
  for (int lanes = 16; lanes; lanes /= 2) us_engine_emission_join(&e, lanes);
  if (threadIdx.x % 32 == 0) laws->part[threadIdx.x / 32] = e;
}
} // namespace us_rare
using us_rare::us_engine_emission_row;

static __device__ __forceinline__ struct us_engine_sums us_engine_emission_place(uint32_t tile) {
  return {tile, US_ENGINE_MASSES, US_ENGINE_EMISSION};
}

/* Thread r < 8: the two warps' parts of row r, as words. */
static __device__ __forceinline__ void us_engine_emission_words(uint32_t r) {
  struct us_engine_laws *laws = us_engine_laws();
  struct us_engine_emission e = laws->part[2 * r];
  const struct us_engine_emission o = laws->part[2 * r + 1];
  for (int k = 0; k < 2; k++) {
    us_engine_emission_add(&e, k, o.score[k], o.id[k], o.logit[k]);
    laws->value[r * US_ENGINE_EMISSION + k] = us_float_bits(e.score[k]) | (uint64_t)e.id[k] << 32;
    laws->extra[r * US_ENGINE_EMISSION + k] = us_float_bits(e.logit[k]);
  }
  laws->value[r * US_ENGINE_EMISSION + 2] = e.mass + o.mass;
  laws->extra[r * US_ENGINE_EMISSION + 2] = 0;
}

/* One warp of block 0: a row's emission over all blocks. */
static __device__ void us_engine_emission_gather(const struct us_engine_block *b,
                                                 const struct us_engine_sums *place, uint32_t r,
                                                 struct us_engine_emission *ret_emission) {
  struct us_engine_emission e = us_engine_emission_none();
  for (int k = 0; k < 2; k++)
    for (uint32_t at = threadIdx.x % 32; at < b->rank->ranks * b->blocks; at += 32 * US_ENGINE_BATCH) {
      struct us_engine_pair pair[US_ENGINE_BATCH];
      uint32_t n = us_engine_sums_take(b, place, r * US_ENGINE_EMISSION + (uint32_t)k, at, pair);
#pragma unroll
      for (uint32_t i = 0; i < US_ENGINE_BATCH; i++)
        if (i < n)
          us_engine_emission_add(&e, k, us_float_from_bits((uint32_t)pair[i].low),
                                 (uint32_t)(pair[i].low >> 32), us_float_from_bits((uint32_t)pair[i].high));
    }
  __syncwarp();
  for (int lanes = 16; lanes; lanes /= 2) us_engine_emission_join(&e, lanes);
  e.mass = us_engine_sums_total(b, place, r * US_ENGINE_EMISSION + 2);
  if (threadIdx.x % 32 == 0) *ret_emission = e;
}

static __device__ void us_engine_emissions(const struct us_engine_block *b,
                                           const struct us_engine_accept *op) {
  struct us_engine_laws *laws = us_engine_laws();
  for (uint32_t t = 0; t < op->tiles; t++) {
    const struct us_engine_sums place = us_engine_emission_place(t);
    us_engine_meet();
    us_engine_emission_row(b, op, t * US_ENGINE_ROWS + threadIdx.x / 64);
    us_engine_meet();
    if (threadIdx.x < US_ENGINE_ROWS) us_engine_emission_words(threadIdx.x);
    us_engine_meet();
    us_engine_sums_put(b, &place, laws->value, laws->extra);
  }
  if (b->index) return;
  for (uint32_t t = 0; t < op->tiles; t++) {
    const struct us_engine_sums place = us_engine_emission_place(t);
    if (threadIdx.x / 32 < US_ENGINE_ROWS)
      us_engine_emission_gather(b, &place, threadIdx.x / 32,
                                &laws->emission[t * US_ENGINE_ROWS + threadIdx.x / 32]);
  }
  us_engine_meet();
}

/* ---- both ---------------------------------------------------------------------------------------------------------------- */

/* All compute threads of all blocks of all ranks. `asked`: us_engine_has_laws. Block 0 has everything in us_engine_laws() then. */
namespace us_rare {
static __device__ __noinline__ void us_engine_weigh(const struct us_engine_block *b,
                                                    const struct us_engine_accept *op, uint32_t asked) {
  us_engine_drain(b);
  us_engine_masses(b, op, asked & 2);
  if (!(asked & 2)) return;
  if (threadIdx.x < US_ENGINE_SEQUENCES) us_engine_chain(b->rank->state, threadIdx.x);
  us_engine_emissions(b, op);
}
} // namespace us_rare
using us_rare::us_engine_weigh;

#endif
