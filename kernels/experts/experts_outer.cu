/* experts_outer.cu: the down projection of the active experts, added in registers. Bound: bytes of MXFP4 weights from HBM;
 * figures in docs/perf.md.
 *
 * A block owns 48 output columns (rows of down): 6144 / 48 = 128 blocks, 97 % of the SMs, no imbalance. Its 12 consumer warps
 * are 3 tiles of 16 rows x 4 slices of 128 columns; each keeps its sums over all experts in registers. A producer warp streams
 * the block's 12 pages of each expert, 13 KB contiguous, two experts a stage. The activations of all routed pairs (64 KB as
 * f16) lie in shared memory: a row that is not routed to an expert reads zeros instead, so 8 rows cost what their 64 pairs
 * cost, not 60 x 8. The four slices are added at the end in a fixed order.
 */
#include "formats/bf16.h"
#include "kernels/experts/experts_gpu.h"
#include "kernels/gpu/async.cuh"
#include "kernels/gpu/mma.cuh"
#include "kernels/gpu/rows.cuh"

#define TILES     3
#define SLICES    4
#define GROUPS    4 /* of 32 columns a slice */
#define CONSUMERS (TILES * SLICES)
#define PER_STAGE 2 /* experts */
#define STAGES    6
#define MAX_PAIRS 64

#define F_COLS       (SLICES * GROUPS * 32)
#define CODE_BYTES   (GROUPS * 256)
#define PAGE_BYTES   (CODE_BYTES + 64)
#define EXPERT_BYTES (CONSUMERS * PAGE_BYTES)
#define STAGE_BYTES  (PER_STAGE * EXPERT_BYTES)
/* A pair's activations, and 64 bytes so that neighbouring pairs start in different halves of the banks. */
#define PAIR_BYTES (F_COLS * 2 + 64)

struct shared_layout {
  uint8_t ring[STAGES * STAGE_BYTES];
  uint8_t pair[MAX_PAIRS + 1][PAIR_BYTES];         /* the last is zero */
  uint32_t offset[US_EXPERTS_MAX_ACTIVE][US_ROWS]; /* of a row's activations in `pair` */
  float weight[US_EXPERTS_MAX_ACTIVE]
              [US_ROWS]; /* routing weight times the undone powers of two; 0: not routed */
  float unscale[MAX_PAIRS];
  uint64_t full[STAGES], empty[STAGES];
};
static_assert(sizeof(struct shared_layout) <= 232448, "shared memory of a block");
static_assert(CONSUMERS * 128 * 4 <= MAX_PAIRS * PAIR_BYTES, "partial sums lie over the activations");

struct outer_args {
  const uint8_t *weights;
  uint64_t matrix_bytes;
  const uint32_t *begin, *matrix;
  const int32_t *pair;
  const float *pair_weight;
  const uint16_t *inner;
  float *y;
  uint32_t passes, pairs, D;
};

static __device__ __forceinline__ void consumers_meet(void) {
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS * 32) : "memory");
}

/* A lane's share of a pair's bf16 activations: half of one group's columns. */
struct half_group {
  uint2 raw[4];
};

static __device__ __forceinline__ void load_half_group(const uint16_t *inner, int lane,
                                                       struct half_group *h) {
  const uint16_t *from = inner + lane / 2 * 32 + lane % 2 * 4;
#pragma unroll
  for (int q = 0; q < 4; q++) h->raw[q] = *(const uint2 *)(from + 8 * q);
}

/* One pair's activations to f16 in operand order, by one warp. */
static __device__ __forceinline__ void convert_pair(struct shared_layout *s, const struct half_group *h,
                                                    uint32_t pair, int lane) {
  float v[4][4];
  uint32_t bits = 0;
#pragma unroll
  for (int q = 0; q < 4; q++) {
    uint2 raw = h->raw[q];
    v[q][0] = __uint_as_float(raw.x << 16), v[q][1] = __uint_as_float(raw.x & 0xffff0000u);
    v[q][2] = __uint_as_float(raw.y << 16), v[q][3] = __uint_as_float(raw.y & 0xffff0000u);
#pragma unroll
    for (int i = 0; i < 4; i++) bits = max(bits, __float_as_uint(v[q][i]) & 0x7fffffffu);
  }
  int p = us_row_exponent(__reduce_max_sync(0xffffffffu, bits));
  float scale = us_power_of_two(p);
  uint4 *to = (uint4 *)(s->pair[pair] + lane / 2 * 64 + lane % 2 * 32);
#pragma unroll
  for (int t = 0; t < 2; t++) {
    uint32_t word[4];
#pragma unroll
    for (int q = 0; q < 4; q++) word[q] = us_pack_f16(v[q][2 * t] * scale, v[q][2 * t + 1] * scale);
    to[t] = make_uint4(word[0], word[1], word[2], word[3]);
  }
  if (lane == 0) s->unscale[pair] = us_power_of_two(-p);
}

#define PAIRS_A_WARP     ((MAX_PAIRS + CONSUMERS - 1) / CONSUMERS)
#define ENTRIES_A_THREAD ((US_EXPERTS_MAX_ACTIVE * US_ROWS + CONSUMERS * 32 - 1) / (CONSUMERS * 32))

/* What the consumers need of a pass before they multiply: activations, and where each (expert, row) finds its own. All
 * loads are under way before the first is used: a bubble of one latency, which the ring bridges, not of six. */
static __device__ __forceinline__ void load_pass(struct shared_layout *s, const struct outer_args &a,
                                                 uint32_t pass, uint32_t first, uint32_t active) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  struct half_group half[PAIRS_A_WARP];
  int pair[ENTRIES_A_THREAD];
  float weight[ENTRIES_A_THREAD];
#pragma unroll
  for (int j = 0; j < ENTRIES_A_THREAD; j++) {
    uint32_t i = threadIdx.x + j * CONSUMERS * 32;
    pair[j] = i < active * US_ROWS ? __ldg(a.pair + first * US_ROWS + i) : -1;
  }
#pragma unroll
  for (int j = 0; j < PAIRS_A_WARP; j++)
    if (warp + j * CONSUMERS < a.pairs)
      load_half_group(a.inner + ((size_t)pass * a.pairs + warp + j * CONSUMERS) * F_COLS, lane, &half[j]);
#pragma unroll
  for (int j = 0; j < ENTRIES_A_THREAD; j++)
    weight[j] = pair[j] < 0 ? 0.0f : __ldg(a.pair_weight + (size_t)pass * a.pairs + pair[j]);
#pragma unroll
  for (int j = 0; j < PAIRS_A_WARP; j++)
    if (warp + j * CONSUMERS < a.pairs) convert_pair(s, &half[j], warp + j * CONSUMERS, lane);
  consumers_meet();
#pragma unroll
  for (int j = 0; j < ENTRIES_A_THREAD; j++) {
    uint32_t i = threadIdx.x + j * CONSUMERS * 32;
    if (i >= active * US_ROWS) break;
    const float unit = 1.0f / (US_PAGES_MXFP4_UNIT * US_PAGES_SCALE_UNIT);
    s->offset[i / US_ROWS][i % US_ROWS] = (pair[j] < 0 ? MAX_PAIRS : pair[j]) * PAIR_BYTES;
    s->weight[i / US_ROWS][i % US_ROWS] = pair[j] < 0 ? 0.0f : weight[j] * (s->unscale[pair[j]] * unit);
  }
  consumers_meet();
}

/* What a lane needs of one expert's page and of the activations: all loads, before the first multiply. */
struct operands {
  uint4 codes[2], b[GROUPS];
  uint2 scales;
  float2 weight;
};

static __device__ __forceinline__ void load_operands(const struct shared_layout *s, const uint8_t *page,
                                                     uint32_t i, int slice, int lane, struct operands *o) {
  const uint4 *codes = (const uint4 *)page + lane;
  const uint4 *b =
      (const uint4 *)(&s->pair[0][0] + s->offset[i][lane / 4] + slice * (GROUPS * 64)) + lane % 4;
  o->codes[0] = codes[0], o->codes[1] = codes[32];
  o->scales = ((const uint2 *)(page + CODE_BYTES))[lane / 4];
  o->weight = *(const float2 *)&s->weight[i][lane % 4 * 2];
#pragma unroll
  for (int g = 0; g < GROUPS; g++) o->b[g] = b[4 * g];
}

template <int J>
static __device__ __forceinline__ void add_group(const float d[4], uint2 scales, float acc[4]) {
  float s0 = us_scale_float<J>(scales.x), s1 = us_scale_float<J>(scales.y);
  acc[0] = __fmaf_rn(s0, d[0], acc[0]), acc[1] = __fmaf_rn(s0, d[1], acc[1]);
  acc[2] = __fmaf_rn(s1, d[2], acc[2]), acc[3] = __fmaf_rn(s1, d[3], acc[3]);
}

/* One expert's page: a slice of 16 outputs for 8 rows, added to y with the routing weights. The first multiplies of all
 * groups go before the second ones, which depend on them. */
static __device__ __forceinline__ void multiply_expert(const struct operands *o, float y[4]) {
  const float zero[4] = {0, 0, 0, 0};
  const uint32_t word[2 * GROUPS] = {o->codes[0].x, o->codes[0].y, o->codes[0].z, o->codes[0].w,
                                     o->codes[1].x, o->codes[1].y, o->codes[1].z, o->codes[1].w};
  float d[GROUPS][4], acc[4] = {0, 0, 0, 0};
  uint32_t a[4];
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    us_mxfp4_fragment(word[2 * g], a);
    us_mma_f16(d[g], a, o->b[g].x, o->b[g].y, zero);
  }
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    us_mxfp4_fragment(word[2 * g + 1], a);
    us_mma_f16(d[g], a, o->b[g].z, o->b[g].w, d[g]);
  }
  add_group<0>(d[0], o->scales, acc);
  add_group<1>(d[1], o->scales, acc);
  add_group<2>(d[2], o->scales, acc);
  add_group<3>(d[3], o->scales, acc);
  y[0] = __fmaf_rn(o->weight.x, acc[0], y[0]), y[1] = __fmaf_rn(o->weight.y, acc[1], y[1]);
  y[2] = __fmaf_rn(o->weight.x, acc[2], y[2]), y[3] = __fmaf_rn(o->weight.y, acc[3], y[3]);
}

/* Add the slices, ((0 + 1) + (2 + 3)), and write the block's outputs of all rows. */
static __device__ void store_pass(struct shared_layout *s, const struct outer_args &a, uint32_t pass,
                                  const float y[4]) {
  float *partial = (float *)s->pair;
  consumers_meet(); /* every warp has read its activations */
  ((float4 *)partial)[threadIdx.x] = make_float4(y[0], y[1], y[2], y[3]);
  consumers_meet();
  int tile = threadIdx.x / 128, index = threadIdx.x % 128, owner = index / 4, element = index % 4;
  const float *p = partial + tile * SLICES * 128 + index;
  float sum = (p[0] + p[128]) + (p[256] + p[384]);
  uint32_t row = owner / 4 + element / 2 * 8, token = owner % 4 * 2 + element % 2;
  a.y[((size_t)pass * US_ROWS + token) * a.D + blockIdx.x * TILES * 16 + tile * 16 + row] = sum;
  consumers_meet(); /* the activations of the next pass come here */
}

static __device__ void consume(struct shared_layout *s, const struct outer_args &a) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stage = 0;
  uint32_t phase = 0;
  for (uint32_t pass = 0; pass < a.passes; pass++) {
    uint32_t first = __ldg(a.begin + pass), active = __ldg(a.begin + pass + 1) - first;
    load_pass(s, a, pass, first, active);
    float y[4] = {0, 0, 0, 0};
    for (uint32_t i = 0; i < active; i += PER_STAGE) {
      us_barrier_wait(us_shared_address(&s->full[stage]), phase);
      const uint8_t *page = s->ring + stage * STAGE_BYTES + warp * PAGE_BYTES;
      struct operands o;
#pragma unroll
      for (int j = 0; j < PER_STAGE; j++)
        if (i + j < active) {
          load_operands(s, page + j * EXPERT_BYTES, i + j, warp % SLICES, lane, &o);
          multiply_expert(&o, y);
        }
      __syncwarp();
      if (lane == 0) us_barrier_arrive(us_shared_address(&s->empty[stage]));
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    store_pass(s, a, pass, y);
  }
}

/* One thread. The next stage's experts are looked up before it waits for a free one. */
template <bool RESIDENT> static __device__ void produce(struct shared_layout *s, const struct outer_args &a) {
  const uint8_t *mine = a.weights + (size_t)blockIdx.x * EXPERT_BYTES;
  uint32_t stage = 0, phase = 1, filled = 0;
  for (uint32_t pass = 0; pass < a.passes; pass++) {
    uint32_t end = __ldg(a.begin + pass + 1);
    for (uint32_t i = __ldg(a.begin + pass); i < end; i += PER_STAGE) {
      uint32_t count = end - i < PER_STAGE ? end - i : PER_STAGE, which[PER_STAGE];
      for (uint32_t j = 0; j < PER_STAGE; j++) which[j] = j < count ? __ldg(a.matrix + i + j) : 0;
      uint32_t full = us_shared_address(&s->full[stage]);
      us_barrier_wait(us_shared_address(&s->empty[stage]), phase);
      if (!RESIDENT || filled < STAGES) {
        us_barrier_expect(full, count * EXPERT_BYTES);
        for (uint32_t j = 0; j < count; j++)
          us_bulk_load(us_shared_address(s->ring + stage * STAGE_BYTES + j * EXPERT_BYTES),
                       mine + which[j] * a.matrix_bytes, EXPERT_BYTES, full);
        filled++;
      } else {
        us_barrier_arrive(full);
      }
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
  }
}

template <bool RESIDENT>
static __global__ void __launch_bounds__((CONSUMERS + 1) * 32, 1) experts_outer(struct outer_args a) {
  extern __shared__ __align__(128) uint8_t raw[];
  struct shared_layout *s = (struct shared_layout *)raw;
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES; i++) {
      us_barrier_init(us_shared_address(&s->full[i]), 1);
      us_barrier_init(us_shared_address(&s->empty[i]), CONSUMERS);
    }
  for (uint32_t i = threadIdx.x; i < PAIR_BYTES / 4; i += blockDim.x) ((uint32_t *)s->pair[MAX_PAIRS])[i] = 0;
  us_barrier_init_fence();
  __syncthreads();
  if (threadIdx.x < CONSUMERS * 32)
    consume(s, a);
  else if (threadIdx.x == CONSUMERS * 32)
    produce<RESIDENT>(s, a);
}

struct us_pages us_experts_outer_pages(enum us_format format, uint32_t D, uint32_t F) {
  struct us_pages pages = {format, D, F, 16, GROUPS * 32};
  if (format != US_FORMAT_MXFP4 || F != F_COLS || !D || D % (TILES * 16)) pages.format = US_FORMAT_NONE;
  return pages;
}

cudaError_t us_experts_outer_gpu(const struct us_experts_gpu *args, cudaStream_t stream) {
  const struct us_pages *p = &args->outer_pages;
  struct us_pages want = us_experts_outer_pages(p->format, p->rows, p->cols);
  if (want.format != US_FORMAT_MXFP4 || want.slice_cols != p->slice_cols || want.tile_rows != p->tile_rows ||
      args->pairs > MAX_PAIRS)
    return cudaErrorInvalidValue;
  auto kernel = args->resident ? experts_outer<true> : experts_outer<false>;
  int bytes = (int)sizeof(struct shared_layout);
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  struct outer_args a = {(const uint8_t *)args->outer_weights,
                         us_pages_bytes(p),
                         args->begin,
                         args->matrix,
                         args->pair,
                         args->pair_weight,
                         args->inner,
                         args->y,
                         args->passes,
                         args->pairs,
                         p->rows};
  kernel<<<p->rows / (TILES * 16), (CONSUMERS + 1) * 32, bytes, stream>>>(a);
  return cudaGetLastError();
}
