/* grouped_kernel.cuh: the grouped product: one warp keeps a ring of operands ahead, two warpgroups multiply.
 *
 * Blocks are persistent, and the ring runs on from tile to tile. The warpgroups take half a tile each, or a tile each by turns: then one
 * stores while the other multiplies (forward 645 to 692 TFLOP/s at 640 x 1024). Rounded outputs go to memory from registers: by the
 * copy engine, a row at a time, they cost 5 to 30 % more, for it has to bring the operands.
 *
 * Bound: a stage of 128 x 256 x 64 is 1024 cycles of multiplies, for 48 KB from L2 (47 bytes a cycle and processor; L2 gives about 40
 * to all at once); two blocks that share the column operand want 32 KB.
 */
#ifndef US_KERNELS_GROUPED_KERNEL_CUH
#define US_KERNELS_GROUPED_KERNEL_CUH

#include "kernels/experts/grouped_tile.cuh"

#define CONSUMERS 2 /* warpgroups */
#define THREADS   ((CONSUMERS + 1) * 128)

/* Operands, and what GRAD_W adds to. */
struct grouped_maps {
  CUtensorMap left, right, sums, stores;
};

struct grouped_place {
  uint32_t stage, phase;
};

template <class Shape> static __device__ __forceinline__ void step(struct grouped_place *p) {
  if (++p->stage == Shape::STAGES) p->stage = 0, p->phase ^= 1;
}

/* Past n stages that the other warpgroup reads. */
template <class Shape> static __device__ __forceinline__ void skip(struct grouped_place *p, uint32_t n) {
  n += p->stage;
  p->phase ^= n / Shape::STAGES & 1, p->stage = n % Shape::STAGES;
}

/* ---- loading ----------------------------------------------------------------------------------------------------- */

template <class Shape>
static __device__ __forceinline__ void load_stage(const struct grouped_args *a,
                                                  const struct grouped_maps *maps,
                                                  const struct grouped_tile *tile, uint32_t depth,
                                                  uint32_t rank, uint32_t to, uint32_t full) {
  us_barrier_expect(full, Shape::STAGE_BYTES);
  if (Shape::ACROSS_A) {
    us_load_box(to, &maps->left, tile->row, tile->begin + depth, 0, full);
    us_load_box(to + DEPTH * 128, &maps->left, tile->row + 64, tile->begin + depth, 0, full);
  } else {
    us_load_box(to, &maps->left, depth, tile->row, 0, full);
  }
  to += Shape::A_BYTES;
#pragma unroll
  for (int b = 0; b < Shape::BOXES; b++, to += Shape::BOX_BYTES) {
    if (b % Shape::BLOCKS != rank) continue;
    uint32_t column = Shape::ACROSS_B ? tile->column + b * 64 : depth,
             row = Shape::KIND == GROUPED_FORWARD  ? tile->column + b * (Shape::COLUMNS / Shape::BLOCKS)
                   : Shape::KIND == GROUPED_SWIGLU ? tile->column / 2 + b * (a->columns / 2)
                   : Shape::KIND == GROUPED_GRAD_X ? depth
                                                   : tile->begin + depth,
             matrix = Shape::KIND == GROUPED_GRAD_W ? 0 : tile->group;
    if (Shape::BLOCKS == 1)
      us_load_box(to, &maps->right, column, row, matrix, full);
    else
      us_load_box_shared(to, &maps->right, column, row, matrix, full, (1 << Shape::BLOCKS) - 1);
  }
}

/* Columns [64 i, 64 i + 64) of what a tile of GRAD_W is added to. */
template <class Shape>
static __device__ __forceinline__ void load_sums(const CUtensorMap *map, const struct grouped_tile *tile,
                                                 int i, uint32_t to, uint32_t full) {
  const int boxes = Shape::COLUMNS - i * 64 < 64 ? 1 : 2;
  us_barrier_expect(full, boxes * Shape::SUM_BOX_BYTES);
  for (int b = 0; b < boxes; b++)
    us_load_box(to + b * Shape::SUM_BOX_BYTES, map, tile->column + i * 64 + b * 32, tile->row, tile->group,
                full);
}

/* One thread. */
template <class Shape>
static __device__ void produce(const struct grouped_args *a, const struct grouped_maps *maps,
                               struct grouped_shared *s, uint32_t ring, uint32_t rank) {
  struct grouped_place p = {0, 1};
  struct grouped_walk walk = {0, 0, 0};
  struct grouped_tile tile;
  for (uint32_t item = blockIdx.x / Shape::BLOCKS; find_tile<Shape>(a, s->start, &walk, item, rank, &tile);
       item += gridDim.x / Shape::BLOCKS)
    for (uint32_t i = 0; i < tile.stages + Shape::SUM_STAGES; i++) {
      uint32_t to = ring + p.stage * Shape::STAGE_BYTES, full = us_shared_address(&s->full[p.stage]);
      us_barrier_wait(us_shared_address(&s->empty[p.stage]), p.phase);
      if (i < tile.stages)
        load_stage<Shape>(a, maps, &tile, i * DEPTH, rank, to, full);
      else
        load_sums<Shape>(&maps->sums, &tile, i - tile.stages, to, full);
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
  us_async_fence();
  asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
}

template <class Shape>
static __device__ __forceinline__ void multiply_stage(uint32_t stage, int group, bool add,
                                                      float d[Shape::HALVES * Shape::TILES][4]) {
  constexpr uint32_t STEP_A = Shape::ACROSS_A ? 2048 : 32, STEP_B = Shape::ACROSS_B ? 2048 : 32;
  constexpr uint32_t HALF = 64 * 128; /* bytes of the left operand's 64 rows */
  uint32_t at_a = stage + (Shape::TURNS ? 0 : group * HALF), at_b = stage + Shape::A_BYTES;
  uint64_t a = Shape::ACROSS_A ? us_wgmma_across(at_a, DEPTH * 128) : us_wgmma_along(at_a);
  uint64_t b = Shape::ACROSS_B ? us_wgmma_across(at_b, DEPTH * 128) : us_wgmma_along(at_b);
  us_wgmma_fence();
#pragma unroll
  for (int i = 0; i < DEPTH / 16; i++)
#pragma unroll
    for (int half = 0; half < Shape::HALVES; half++)
      us_wgmma_shared<Shape::TILES, Shape::ACROSS_A, Shape::ACROSS_B>(d + half * Shape::TILES,
                                                                      a + ((i * STEP_A + half * HALF) >> 4),
                                                                      b + (i * STEP_B >> 4), add || i > 0);
  us_wgmma_commit();
}

/* A warp no longer reads a stage: every block that writes into it may. */
template <class Shape>
static __device__ __forceinline__ void release_stage(struct grouped_shared *s, uint32_t stage, int lane) {
  uint32_t empty = us_shared_address(&s->empty[stage]);
  __syncwarp();
  if (Shape::BLOCKS == 1) {
    if (lane == 0) us_barrier_arrive(empty);
  } else {
    if (lane < Shape::BLOCKS) us_barrier_arrive_at(empty, lane);
  }
}

/* GRAD_W: add to what was there, 64 columns at a time, in the ring, and copy it back from there. `row`: the warp's first. */
template <class Shape>
static __device__ __forceinline__ void add_to_matrix(const struct grouped_maps *maps,
                                                     const struct grouped_tile *tile,
                                                     struct grouped_shared *s, uint8_t *ring,
                                                     struct grouped_place *p, uint32_t row, int lane,
                                                     const float d[Shape::TILES][4]) {
  uint32_t before = 0;
#pragma unroll
  for (int i = 0; i < Shape::SUM_STAGES; i++) {
    uint8_t *stage = ring + p->stage * Shape::STAGE_BYTES;
    us_barrier_wait(us_shared_address(&s->full[p->stage]), p->phase);
    add_sums<Shape>(stage, row, i * 8, lane, d);
    us_async_fence();
    __syncwarp();
    if (lane == 0) {
      for (int b = 0; b < 2 && i * 64 + b * 32 < Shape::COLUMNS; b++)
        us_store_box(&maps->stores, tile->column + i * 64 + b * 32, tile->row + row, tile->group,
                     us_shared_address(stage) + b * Shape::SUM_BOX_BYTES + row * 128);
      us_bulk_commit();
      us_bulk_wait_read<1>();
    }
    if (i > 0) release_stage<Shape>(s, before, lane);
    before = p->stage;
    step<Shape>(p);
  }
  if (lane == 0) us_bulk_wait_read<0>();
  release_stage<Shape>(s, before, lane);
}

/* Sums of a tile to where they belong; the warp's 16 rows of each half. */
template <class Shape>
static __device__ __forceinline__ void store(const struct grouped_args *a, const struct grouped_maps *maps,
                                             const struct grouped_tile *tile, struct grouped_shared *s,
                                             uint8_t *ring, struct grouped_place *p, int lane,
                                             const float d[Shape::HALVES * Shape::TILES][4]) {
  const uint32_t row = threadIdx.x / 32 % (Shape::TURNS ? 4 : 8) * 16;
#pragma unroll
  for (int half = 0; half < Shape::HALVES; half++) {
    const uint32_t first = tile->row + row + half * 64;
    const float(*sums)[4] = d + half * Shape::TILES;
    if constexpr (Shape::KIND == GROUPED_GRAD_W)
      add_to_matrix<Shape>(maps, tile, s, ring, p, row, lane, sums);
    else if constexpr (Shape::WIDE)
      store_wide<Shape>(a, tile, first, lane, sums);
    else if constexpr (Shape::KIND == GROUPED_SWIGLU)
      store_gated<Shape>(a, tile, first, lane, sums);
    else
      store_rounded<Shape>(a, tile, first, lane, sums);
  }
}

/* By turns: wait until the other warpgroup has seen all stages of its tile. A parity tells a stage's filling from the one before, not
 * from the one before that, so nobody may wait further ahead. */
static __device__ __forceinline__ void await_turn(int group) {
  asm volatile("bar.sync %0, 256;" ::"r"(4 + group) : "memory");
}
static __device__ __forceinline__ void give_turn(int group) {
  asm volatile("bar.arrive %0, 256;" ::"r"(4 + (group ^ 1)) : "memory");
}

template <class Shape>
static __device__ __forceinline__ void consume(const struct grouped_args *a, const struct grouped_maps *maps,
                                               struct grouped_shared *s, uint8_t *ring, uint32_t rank,
                                               int group, int lane) {
  struct grouped_place p = {0, 0};
  struct grouped_walk walk = {0, 0, 0};
  struct grouped_tile tile;
  int turn = 0;
  if (Shape::TURNS && group == 1) give_turn(group);
  for (uint32_t item = blockIdx.x / Shape::BLOCKS; find_tile<Shape>(a, s->start, &walk, item, rank, &tile);
       item += gridDim.x / Shape::BLOCKS, turn ^= 1) {
    if (Shape::TURNS && turn != group) {
      skip<Shape>(&p, tile.stages);
      continue;
    }
    float d[Shape::HALVES * Shape::TILES][4];
    uint32_t before = 0;
    us_wgmma_hold<Shape::HALVES * Shape::TILES>(d);
    if (Shape::TURNS) await_turn(group);
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
    }
    if (Shape::TURNS) give_turn(group);
    us_wgmma_wait_for<0>();
    us_wgmma_hold<Shape::HALVES * Shape::TILES>(d);
    release_stage<Shape>(s, before, lane);
    store<Shape>(a, maps, &tile, s, ring, &p, lane, d);
  }
  if (Shape::KIND == GROUPED_GRAD_W) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

/* Registers: 2 x 232 + 40. Swizzled boxes want 1024-byte alignment. */
template <class Shape>
static __global__ void __cluster_dims__(Shape::BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
    grouped_product(const __grid_constant__ struct grouped_args a,
                    const __grid_constant__ struct grouped_maps maps) {
  extern __shared__ __align__(1024) uint8_t ring[];
  __shared__ struct grouped_shared s;
  int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  uint32_t rank = Shape::BLOCKS == 1 ? 0 : us_cluster_rank();
  for (uint32_t i = threadIdx.x; i <= a.groups; i += THREADS) s.start[i] = a.start ? a.start[i] : i * a.rows;
  if (threadIdx.x == 0)
    for (int i = 0; i < Shape::STAGES; i++) {
      us_barrier_init(us_shared_address(&s.full[i]), 1);
      us_barrier_init(us_shared_address(&s.empty[i]), (Shape::TURNS ? 4 : 8) * Shape::BLOCKS);
    }
  us_barrier_init_fence();
  __syncthreads();
  if (Shape::BLOCKS > 1) us_cluster_sync();
  if (group == CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == CONSUMERS * 128) produce<Shape>(&a, &maps, &s, us_shared_address(ring), rank);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<Shape>(&a, &maps, &s, ring, rank, group, lane);
  }
  if (Shape::BLOCKS > 1) us_cluster_sync(); /* a block's barriers outlive the others' arrivals */
}

#endif
