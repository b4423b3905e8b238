/* grouped_kernel.cuh: the grouped product: one warp keeps a ring of operands ahead, two warpgroups multiply 64 rows each.
 *
 * Blocks are persistent. The second warpgroup starts LEAD stages after the first and stays behind: while one stores its sums the
 * other has the tensor cores for itself, and neither waits for the other but through the ring.
 *
 * Bound: a stage of 128 x 256 is 128 KFMA x 16 at 2048 a cycle: 1024 cycles, for 48 KB from L2 (47 bytes a cycle and processor, more
 * than L2 gives to all at once); two blocks that share the column operand want 32 KB.
 */
#ifndef US_KERNELS_GROUPED_KERNEL_CUH
#define US_KERNELS_GROUPED_KERNEL_CUH

#include "kernels/experts/grouped_tile.cuh"

#define CONSUMERS 2 /* warpgroups */
#define THREADS   ((CONSUMERS + 1) * 128)
#define LEAD      2 /* stages */

struct grouped_place {
  uint32_t stage, phase;
};

template <class Shape> static __device__ __forceinline__ void step(struct grouped_place *p) {
  if (++p->stage == Shape::STAGES) p->stage = 0, p->phase ^= 1;
}

/* ---- loading ----------------------------------------------------------------------------------------------------- */

template <class Shape>
static __device__ __forceinline__ void load_stage(const CUtensorMap *map_a, const CUtensorMap *map_b,
                                                  const struct grouped_tile *tile, uint32_t depth,
                                                  uint32_t rank, uint32_t to, uint32_t full) {
  us_barrier_expect(full, Shape::STAGE_BYTES);
  if (Shape::ACROSS_A) {
    us_load_box(to, map_a, tile->row, tile->begin + depth, 0, full);
    us_load_box(to + DEPTH * 128, map_a, tile->row + 64, tile->begin + depth, 0, full);
  } else {
    us_load_box(to, map_a, depth, tile->row, 0, full);
  }
  to += Shape::A_BYTES;
#pragma unroll
  for (int b = 0; b < Shape::BOXES; b++, to += Shape::BOX_BYTES) {
    if (b % Shape::BLOCKS != rank) continue;
    uint32_t column = Shape::ACROSS_B ? tile->column + b * 64 : depth,
             row = Shape::KIND == GROUPED_FORWARD  ? tile->column + b * (Shape::COLUMNS / Shape::BLOCKS)
                   : Shape::KIND == GROUPED_GRAD_X ? depth
                                                   : tile->begin + depth,
             matrix = Shape::KIND == GROUPED_GRAD_W ? 0 : tile->group;
    if (Shape::BLOCKS == 1)
      us_load_box(to, map_b, column, row, matrix, full);
    else
      us_load_box_shared(to, map_b, column, row, matrix, full, (1 << Shape::BLOCKS) - 1);
  }
}

/* One thread. */
template <class Shape>
static __device__ void produce(const struct grouped_args *a, const CUtensorMap *map_a,
                               const CUtensorMap *map_b, struct grouped_shared *s, uint32_t ring,
                               uint32_t rank) {
  struct grouped_place p = {0, 1};
  struct grouped_walk walk = {0, 0, 0};
  struct grouped_tile tile;
  for (uint32_t item = blockIdx.x / Shape::BLOCKS; find_tile<Shape>(a, s->start, &walk, item, rank, &tile);
       item += gridDim.x / Shape::BLOCKS)
    for (uint32_t i = 0; i < tile.stages; i++) {
      us_barrier_wait(us_shared_address(&s->empty[p.stage]), p.phase);
      load_stage<Shape>(map_a, map_b, &tile, i * DEPTH, rank, ring + p.stage * Shape::STAGE_BYTES,
                        us_shared_address(&s->full[p.stage]));
      step<Shape>(&p);
    }
}

/* ---- multiplying ------------------------------------------------------------------------------------------------- */

/* Rows past the group's last are another group's: zeros instead, in both operands, or its NaN would come through. Both warpgroups
 * write the same zeros before they read. All threads of a warpgroup. */
template <class Shape>
static __device__ void clear_tail(uint8_t *stage, uint32_t first, int group, int thread) {
  uint32_t chunks = (DEPTH - first) * 8; /* of 16 bytes, in a box */
  for (uint32_t i = thread; i < (Shape::BOXES + 1) * chunks; i += 128) {
    uint32_t box = i / chunks,
             at = box == 0 ? group * DEPTH * 128 : Shape::A_BYTES + (box - 1) * Shape::BOX_BYTES;
    *(uint4 *)(stage + at + first * 128 + i % chunks * 16) = make_uint4(0, 0, 0, 0);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
}

template <class Shape>
static __device__ __forceinline__ void multiply_stage(uint32_t stage, int group, bool add,
                                                      float d[Shape::TILES][4]) {
  constexpr uint32_t STEP_A = Shape::ACROSS_A ? 2048 : 32, STEP_B = Shape::ACROSS_B ? 2048 : 32;
  uint32_t at_a = stage + group * 64 * 128, at_b = stage + Shape::A_BYTES;
  uint64_t a = Shape::ACROSS_A ? us_wgmma_across(at_a, DEPTH * 128) : us_wgmma_along(at_a);
  uint64_t b = Shape::ACROSS_B ? us_wgmma_across(at_b, DEPTH * 128) : us_wgmma_along(at_b);
  us_wgmma_fence();
#pragma unroll
  for (int i = 0; i < DEPTH / 16; i++)
    us_wgmma_shared<Shape::TILES, Shape::ACROSS_A, Shape::ACROSS_B>(d, a + (i * STEP_A >> 4),
                                                                    b + (i * STEP_B >> 4), add || i > 0);
  us_wgmma_commit();
}

/* A warp no longer reads a stage: every block that writes into it may. */
template <class Shape>
static __device__ __forceinline__ void release_stage(struct grouped_shared *s, uint32_t stage, int lane) {
  uint32_t empty = us_shared_address(&s->empty[stage]);
  if (Shape::BLOCKS == 1) {
    if (lane == 0) us_barrier_arrive(empty);
  } else {
    if (lane < Shape::BLOCKS) us_barrier_arrive_at(empty, lane);
  }
}

template <class Shape, bool WIDE>
static __device__ __forceinline__ void store(const struct grouped_args *a, const struct grouped_tile *tile,
                                             int group, int lane, const float d[Shape::TILES][4]) {
  uint32_t row = tile->row + group * 64 + threadIdx.x % 128 / 32 * 16;
  if constexpr (Shape::KIND == GROUPED_GRAD_W)
    store_sums<Shape, true>(a, tile, (float *)a->out + tile->group * a->out_stride, row, a->output_rows, lane,
                            d);
  else if constexpr (WIDE)
    store_sums<Shape, false>(a, tile, (float *)a->out, row, tile->end, lane, d);
  else
    store_rounded<Shape>(a, tile, row, lane, d);
}

template <class Shape, bool WIDE>
static __device__ __forceinline__ void consume(const struct grouped_args *a, struct grouped_shared *s,
                                               uint8_t *ring, uint32_t rank, int group, int lane) {
  struct grouped_place p = {0, 0};
  struct grouped_walk walk = {0, 0, 0};
  struct grouped_tile tile;
  bool ahead = group == 0;
  for (uint32_t item = blockIdx.x / Shape::BLOCKS; find_tile<Shape>(a, s->start, &walk, item, rank, &tile);
       item += gridDim.x / Shape::BLOCKS) {
    float d[Shape::TILES][4];
    uint32_t before = 0;
    us_wgmma_hold<Shape::TILES>(d);
    for (uint32_t i = 0; i < tile.stages; i++) {
      us_barrier_wait(us_shared_address(&s->full[p.stage]), p.phase);
      uint8_t *stage = ring + p.stage * Shape::STAGE_BYTES;
      if (Shape::KIND == GROUPED_GRAD_W && tile.end - tile.begin - i * DEPTH < DEPTH)
        clear_tail<Shape>(stage, tile.end - tile.begin - i * DEPTH, group, threadIdx.x % 128);
      multiply_stage<Shape>(us_shared_address(stage), group, i > 0, d);
      us_wgmma_wait_for<1>();
      if (i > 0) release_stage<Shape>(s, before, lane);
      before = p.stage;
      step<Shape>(&p);
      if (ahead && (i == LEAD || i + 1 == tile.stages)) {
        asm volatile("bar.arrive 1, 256;" ::: "memory");
        ahead = false;
      }
    }
    us_wgmma_wait_for<0>();
    us_wgmma_hold<Shape::TILES>(d);
    release_stage<Shape>(s, before, lane);
    store<Shape, WIDE>(a, &tile, group, lane, d);
  }
  if (ahead) asm volatile("bar.arrive 1, 256;" ::: "memory"); /* no tile came */
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

/* Registers: 2 x 232 + 40. Swizzled boxes want 1024-byte alignment. */
template <class Shape, bool WIDE>
static __global__ void __cluster_dims__(Shape::BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
    grouped_product(const __grid_constant__ struct grouped_args a, const __grid_constant__ CUtensorMap map_a,
                    const __grid_constant__ CUtensorMap map_b) {
  extern __shared__ __align__(1024) uint8_t ring[];
  __shared__ struct grouped_shared s;
  int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  uint32_t rank = Shape::BLOCKS == 1 ? 0 : us_cluster_rank();
  for (uint32_t i = threadIdx.x; i <= a.groups; i += THREADS) s.start[i] = a.start ? a.start[i] : i * a.rows;
  if (threadIdx.x == 0)
    for (int i = 0; i < Shape::STAGES; i++) {
      us_barrier_init(us_shared_address(&s.full[i]), 1);
      us_barrier_init(us_shared_address(&s.empty[i]), CONSUMERS * 4 * Shape::BLOCKS);
    }
  us_barrier_init_fence();
  __syncthreads();
  if (Shape::BLOCKS > 1) us_cluster_sync();
  if (group == CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == CONSUMERS * 128) produce<Shape>(&a, &map_a, &map_b, &s, us_shared_address(ring), rank);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    if (group == 1) asm volatile("bar.sync 1, 256;" ::: "memory");
    consume<Shape, WIDE>(&a, &s, ring, rank, group, lane);
  }
  if (Shape::BLOCKS > 1) us_cluster_sync(); /* a block's barriers outlive the others' arrivals */
}

#endif
