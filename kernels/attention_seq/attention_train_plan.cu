/* attention_train_plan.cu: which key tiles a unit of queries sees, and which units see a key tile.
 *
 * A warp a unit, then a warp a key tile over all units: a few microseconds for 32,768 rows, once for all layers of a batch.
 */
#include "kernels/attention_seq/attention_train_tile.cuh"

#define WARPS 4

/* Lowest begin and highest end of those ranges that are not empty; highest begin and lowest end of all (an empty one: 0 as end). */
struct bounds {
  uint32_t begin, end, all_begin, all_end;
};

static __device__ __forceinline__ struct bounds bounds_of(const uint32_t *begin, const uint32_t *end,
                                                          uint32_t first, uint32_t past, uint32_t lane) {
  struct bounds b = {UINT32_MAX, 0, 0, UINT32_MAX};
  if (!begin) return (struct bounds){0, 0, 0, 0};
  for (uint32_t i = first + lane; i < past; i += 32) {
    uint32_t from = begin[i], to = end[i];
    bool empty = from >= to;
    if (!empty) b.begin = min(b.begin, from), b.end = max(b.end, to);
    b.all_begin = max(b.all_begin, from), b.all_end = min(b.all_end, empty ? 0 : to);
  }
  b.begin = __reduce_min_sync(0xffffffffu, b.begin), b.end = __reduce_max_sync(0xffffffffu, b.end);
  b.all_begin = __reduce_max_sync(0xffffffffu, b.all_begin);
  b.all_end = __reduce_min_sync(0xffffffffu, b.all_end);
  if (b.begin >= b.end) b.begin = b.end = 0;
  return b;
}

static __global__ void __launch_bounds__(WARPS * 32)
    plan_units(const __grid_constant__ struct us_attention_job job) {
  uint32_t unit = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (unit >= job.cut.units) return;
  const struct us_attention_train &a = job.a;
  uint32_t first = unit * job.cut.span, past = min(first + job.cut.span, a.queries);
  struct bounds context = bounds_of(a.context_begin, a.context_end, first, past, lane);
  struct bounds block = bounds_of(a.block_begin, a.block_end, first, past, lane);
  struct us_attention_unit u = {context.begin,     context.end,     block.begin,     block.end,
                                context.all_begin, context.all_end, block.all_begin, block.all_end};
  if (lane == 0) job.plan.unit[unit] = u;
}

static __global__ void __launch_bounds__(WARPS * 32)
    plan_keys(const __grid_constant__ struct us_attention_job job) {
  uint32_t tile = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (tile >= job.cut.key_tiles) return;
  uint32_t from = tile * US_KEY_TILE, to = from + US_KEY_TILE, first = UINT32_MAX, past = 0;
  for (uint32_t unit = lane; unit < job.cut.units; unit += 32) {
    uint4 u = *(const uint4 *)&job.plan.unit[unit];
    bool sees = (u.x < to && u.y > from) || (u.z < to && u.w > from);
    if (sees) first = min(first, unit), past = max(past, unit + 1);
  }
  first = __reduce_min_sync(0xffffffffu, first), past = __reduce_max_sync(0xffffffffu, past);
  if (lane == 0) job.plan.seen_by[tile] = first < past ? make_uint2(first, past) : make_uint2(0, 0);
}

size_t us_attention_train_plan_bytes(uint32_t queries, uint32_t keys, uint32_t q_heads, uint32_t kv_heads) {
  if (!kv_heads || !q_heads || q_heads % kv_heads) return 0;
  struct us_attention_cut cut = us_attention_cut_of(queries, keys, q_heads, kv_heads);
  return cut.units * sizeof(struct us_attention_unit) + (size_t)cut.key_tiles * sizeof(uint2);
}

int us_attention_train_plan(const struct us_attention_train *a, cudaStream_t stream) {
  if (!a->kv_heads || !a->q_heads || a->q_heads % a->kv_heads || !a->block_begin != !a->block_end)
    return cudaErrorInvalidValue;
  struct us_attention_job job = {};
  job.a = *a, job.cut = us_attention_cut_of(a->queries, a->keys, a->q_heads, a->kv_heads);
  job.plan = us_attention_plan_of(a->plan, &job.cut);
  if (job.cut.units) plan_units<<<(job.cut.units + WARPS - 1) / WARPS, WARPS * 32, 0, stream>>>(job);
  if (job.cut.key_tiles) plan_keys<<<(job.cut.key_tiles + WARPS - 1) / WARPS, WARPS * 32, 0, stream>>>(job);
  return cudaGetLastError();
}
