/* down_gather.cuh: the experts' down projection of several row tiles: one way through the experts for up to 64 rows.
 *
 *     us_engine_down_gathered(b, op);       // compute warps, for us_engine_down_compute
 *
 * As down.cuh, whose streaming it shares: a block owns 48 columns and goes through all slots of the list in order. Sums of 64 rows do
 * not fit registers, whose places are known when compiled: every warp keeps those of its page's 16 columns in shared memory, 4 KB,
 * and adds to those of the slot's rows, 1.8 of 8 columns in the mean. The same additions in the same order as of one row tile. Pages are
 * MXFP4 of four groups.
 */
#ifndef US_KERNELS_ENGINE_DOWN_GATHER_CUH
#define US_KERNELS_ENGINE_DOWN_GATHER_CUH

#include "kernels/engine/down.cuh"

#define US_GATHER_ROWS      (US_ENGINE_GATHERED * US_ENGINE_ROWS)
#define US_GATHER_ROW_BYTES 64 /* a row's 16 columns of a warp */
#define US_GATHER_WARP      (US_GATHER_ROWS * US_GATHER_ROW_BYTES)
#define US_GATHER_WARPS     (4 * US_DOWN_TILES) /* a step has four pages of a tile at most */
static_assert(US_GATHER_WARPS * US_GATHER_WARP <= US_ENGINE_VECTOR_BYTES, "sums in shared memory");

/* Where column r of a row lies among a warp's sums; column r + 8 at the address ^ 32. Neighbouring rows are in different banks. */
static __device__ __forceinline__ uint32_t us_gather_sum_offset(uint32_t row, uint32_t r) {
  return row * US_GATHER_ROW_BYTES + (row & 2) * 16 + r * 4;
}
static __device__ __forceinline__ float us_gather_load(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
static __device__ __forceinline__ void us_gather_store(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

static __device__ __forceinline__ void us_gather_zero(const struct us_engine_block *b) {
  uint4 *sums = (uint4 *)us_engine_scratch(b);
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < US_GATHER_WARPS * US_GATHER_WARP / 16; i += US_ENGINE_COMPUTE)
    sums[i] = make_uint4(0, 0, 0, 0);
}

/* sums[row] += routing weight * acc of a slot's rows. What another lane stored is visible: the warp has met since. */
static __device__ __forceinline__ void us_gather_add(const struct us_engine_shared *s, uint32_t sums,
                                                     uint32_t brief, int lane, const float *acc) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t token = lane % 4 * 2 + i;
    if (token >= us_engine_brief_pairs(brief)) continue;
    uint32_t pair = us_engine_brief_first(brief) + token;
    float weight = s->active.pair_weight[pair];
    uint32_t low = sums + us_gather_sum_offset(s->active.row[pair], lane / 4), high = low ^ 32;
    float y = us_gather_load(low), z = us_gather_load(high);
    us_gather_store(low, __fmaf_rn(weight, acc[i], y));
    us_gather_store(high, __fmaf_rn(weight, acc[i + 2], z));
  }
}

/* Where this lane's activations of a step lie; a column without a pair multiplies the slot's first, for nothing. */
static __device__ __forceinline__ uint32_t us_gather_rows(uint32_t brief, uint32_t rows, uint32_t stride,
                                                          int lane) {
  uint32_t column = lane / 4;
  if (column >= us_engine_brief_pairs(brief)) column = 0;
  return rows + (us_engine_brief_first(brief) + column) * stride;
}

/* All slots' share of three tiles: warp tile * step_slices + slice, of `working` warps, has that page of every step. */
static __device__ __forceinline__ void us_gather_slots_down(struct us_engine_block *b,
                                                            const struct us_engine_op *op, uint32_t working) {
  const struct us_engine_down *d = &op->down;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, base = us_engine_shared_base(b),
           slices = d->step_slices;
  uint32_t page = base + warp * d->w.page_bytes, inner = base + warp % slices * 256 + lane % 4 * 16;
  uint32_t run = slices * d->w.page_bytes, apart = warp / slices * run;
  uint32_t arrivals = warp ? 1 : 1 + US_ENGINE_COMPUTE_WARPS - working, count;
  uint32_t sums = base + (uint32_t)offsetof(struct us_engine_shared, partial) + warp * US_GATHER_WARP;
#pragma unroll 1
  do {
    us_engine_barrier_wait(b, &s->full[c.stage], c.phase, US_ENGINE_WAIT_STAGE);
    uint4 tell = us_shared_load16(base + (uint32_t)offsetof(struct us_engine_shared, down) + c.stage * 16);
    uint32_t from = page + c.stage * US_ENGINE_STAGE_BYTES, brief = s->active.brief[tell.x & 0xffffu];
    count = tell.y;
    bool joined = count & US_DOWN_JOINED;
    uint32_t stride = slices * (joined ? 512 : 256) + US_DOWN_PAD;
    if (joined) from += apart;
    struct us_down_page first, second;
    float acc[4] = {}, more[4] = {};
    us_down_load_page(&first, from, inner + us_gather_rows(brief, tell.z, stride, lane), lane);
    if (count & 2) {
      uint32_t other = s->active.brief[tell.x >> 16];
      us_down_load_page(&second, from + (joined ? run : US_DOWN_TILES * run),
                        inner + us_gather_rows(other, tell.w, stride, lane), lane);
      us_down_page_sums(&first, acc), us_down_page_sums(&second, more);
      us_gather_add(s, sums, brief, lane, acc);
      __syncwarp();
      us_gather_add(s, sums, other, lane, more);
    } else {
      us_down_page_sums(&first, acc);
      us_gather_add(s, sums, brief, lane, acc);
    }
    __syncwarp();
    if (lane == 0) us_barrier_arrive_many(us_shared_address(&s->empty[c.stage]), arrivals);
    us_engine_advance(&c);
  } while (!(count & US_DOWN_LAST));
  b->stage = c.stage, b->phase = c.phase;
}

/* Add the warps' sums in order, and push the block's columns of all row tiles. */
static __device__ __forceinline__ void us_gather_out(struct us_engine_block *b, const struct us_engine_op *op,
                                                     uint32_t group, uint32_t tiles) {
  const struct us_engine_down *d = &op->down;
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, slices = d->step_slices;
  uint32_t base = us_engine_shared_base(b) + (uint32_t)offsetof(struct us_engine_shared, partial);
  us_engine_meet();
  const struct us_engine_block *worked = &us_engine_shared_of(b)->warp[0];
  b->stage = worked->stage, b->phase = worked->phase; /* warps that slept */
#pragma unroll 1
  for (uint32_t i = warp; i < tiles * op->row_tiles; i += US_ENGINE_COMPUTE_WARPS) {
    uint32_t tile = i % tiles, rows = i / tiles, token = rows * US_ENGINE_ROWS + lane % 4 * 2;
    uint32_t even = base + tile * slices * US_GATHER_WARP + us_gather_sum_offset(token, lane / 4),
             odd = base + tile * slices * US_GATHER_WARP + us_gather_sum_offset(token + 1, lane / 4);
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (uint32_t w = 0; w < slices; w++, even += US_GATHER_WARP, odd += US_GATHER_WARP) {
      sum.x = __fadd_rn(sum.x, us_gather_load(even)), sum.y = __fadd_rn(sum.y, us_gather_load(odd));
      sum.z = __fadd_rn(sum.z, us_gather_load(even ^ 32)), sum.w = __fadd_rn(sum.w, us_gather_load(odd ^ 32));
    }
    us_engine_push(b, d->exchange + rows, b->rank->rank, (group * US_DOWN_TILES + tile) * 16, lane, sum);
  }
}

static __device__ __noinline__ void us_engine_down_gathered(struct us_engine_block *b,
                                                            const struct us_engine_op *op) {
  const struct us_engine_down *d = &op->down;
  uint32_t groups = us_engine_down_groups(d), warp = threadIdx.x / 32;
  uint32_t first = us_engine_first_item(b, op->shift);
  us_engine_drain(b);
  us_gather_zero(b);
  us_engine_wait_done(b, op->wait);
  for (uint32_t group = first; group < groups; group += b->blocks) {
    uint32_t tiles = us_engine_down_tiles(d, group), working = tiles * d->step_slices;
    if (group != first) us_gather_zero(b), us_engine_meet();
    if (us_engine_shared_of(b)->active.count && warp < working) us_gather_slots_down(b, op, working);
    us_gather_out(b, op, group, tiles);
    us_engine_meet();
  }
  us_engine_finish(b);
}

#endif
