/* grouped_launch.cuh: the operands as the copy engine wants them described, the choice of a tile, the launch.
 */
#ifndef US_KERNELS_GROUPED_LAUNCH_CUH
#define US_KERNELS_GROUPED_LAUNCH_CUH

#include "kernels/experts/grouped_kernel.cuh"
#include "kernels/gpu/launch.cuh"

/* Matrices (rows, columns) of bf16 (or FP32, if wide), `stride` values apart; what lies outside reads as zeros. */
struct grouped_operand {
  const void *at;
  uint32_t rows, columns, matrices;
  uint64_t stride;
  uint32_t box_rows; /* of a copy, 128 bytes wide */
  bool wide;
};

static inline cudaError_t describe(const struct grouped_operand *o, CUtensorMap *map) {
  cuuint64_t bytes = o->wide ? 4 : 2, row = o->columns * bytes,
             matrix = o->matrices > 1 ? (cuuint64_t)o->stride * bytes : o->rows * row;
  struct us_tensor t = {o->at,
                        o->wide ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                        3,
                        {o->columns, o->rows, o->matrices},
                        {row, matrix},
                        {(cuuint32_t)(128 / bytes), o->box_rows, 1},
                        CU_TENSOR_MAP_SWIZZLE_128B};
  return us_tensor_describe(&t, map);
}

template <class Shape>
static cudaError_t launch(const struct grouped_args *a, struct grouped_operand *left,
                          struct grouped_operand *right, cudaStream_t stream) {
  auto kernel = grouped_product<Shape>;
  constexpr uint32_t bytes = Shape::STAGES * Shape::STAGE_BYTES;
  struct grouped_maps maps = {};
  uint32_t processors;
  left->box_rows = Shape::ACROSS_A ? DEPTH : TILE_ROWS;
  right->box_rows = Shape::ACROSS_B ? DEPTH : Shape::COLUMNS / Shape::PARTS;
  cudaError_t status = us_processors(&processors);
  if (status == cudaSuccess) status = describe(left, &maps.left);
  if (status == cudaSuccess) status = describe(right, &maps.right);
  if (Shape::SUM_STAGES) {
    struct grouped_operand sums = {a->out,        a->output_rows, a->columns, a->groups,
                                   a->out_stride, TILE_ROWS,      true};
    if (status == cudaSuccess) status = describe(&sums, &maps.sums);
    sums.box_rows = 16; /* a warp's */
    if (status == cudaSuccess) status = describe(&sums, &maps.stores);
  }
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status != cudaSuccess) return status;
  kernel<<<processors / Shape::BLOCKS * Shape::BLOCKS, THREADS, bytes, stream>>>(*a, maps);
  return cudaGetLastError();
}

/* Together. Cycles of a stage: multiplies, or bytes at the 40 a cycle that L2 was measured to give each processor; with them the
 * columns that do not exist. */
template <int KIND> static inline uint32_t choose_together(uint32_t columns) {
  uint32_t best = 0, least = UINT32_MAX;
  for (uint32_t size : {128u, 160u, 192u, 256u}) {
    uint32_t loaded = KIND == GROUPED_GRAD_X || KIND == GROUPED_GRAD_W ? (size + 63) / 64 * 64 : size,
             bytes = (TILE_ROWS + loaded) * DEPTH * 2, cycles = 4 * size > bytes / 40 ? 4 * size : bytes / 40,
             cost = (columns + size - 1) / size * cycles;
    if (cost < least) least = cost, best = size;
  }
  return best;
}

/* By turns: the largest of those that waste the fewest columns. */
static inline uint32_t choose_turns(uint32_t columns) {
  uint32_t best = 0, least = UINT32_MAX;
  for (uint32_t size : {192u, 160u, 128u}) {
    uint32_t cost = (columns + size - 1) / size * size;
    if (cost < least) least = cost, best = size;
  }
  return best;
}

/* A long sum wants a large tile, fewer bytes a multiply; in a shorter one it matters more that stores are hidden. */
#define LONG_SUM 1024

template <int KIND>
static inline struct us_grouped settle(const struct us_grouped *g, const struct grouped_args *a) {
  struct us_grouped chosen = *g;
  bool turns = KIND != GROUPED_GRAD_W && (a->depth <= LONG_SUM || a->columns % 256);
  if (!g->tile) {
    chosen.schedule = turns ? US_GROUPED_TURNS : US_GROUPED_TOGETHER;
    chosen.tile = turns ? choose_turns(a->columns) : choose_together<KIND>(a->columns);
  }
  /* Two blocks gain where columns are loaded in vain (160 are three boxes of 64), nowhere else: rows are then cut in 256. */
  if (!g->blocks) chosen.blocks = KIND == GROUPED_GRAD_X && chosen.tile == 160 ? 2 : 1;
  return chosen;
}

template <int KIND, int BLOCKS, bool TURNS>
static cudaError_t choose_tile(uint32_t tile, const struct grouped_args *a, struct grouped_operand *left,
                               struct grouped_operand *right, cudaStream_t stream) {
  switch (tile) {
  case 128:
    return launch<grouped_shape<KIND, 128, BLOCKS, TURNS>>(a, left, right, stream);
  case 160:
    return launch<grouped_shape<KIND, 160, BLOCKS, TURNS>>(a, left, right, stream);
  case 192:
    return launch<grouped_shape<KIND, 192, BLOCKS, TURNS>>(a, left, right, stream);
  case 256:
    if constexpr (!TURNS) return launch<grouped_shape<KIND, 256, BLOCKS, TURNS>>(a, left, right, stream);
  }
  return cudaErrorInvalidValue;
}

template <int KIND>
static cudaError_t choose(const struct us_grouped *g, const struct grouped_args *a,
                          struct grouped_operand *left, struct grouped_operand *right, cudaStream_t stream) {
  struct us_grouped c = settle<KIND>(g, a);
  if (c.blocks > 2) return cudaErrorInvalidValue;
  if constexpr (KIND != GROUPED_GRAD_W)
    if (c.schedule == US_GROUPED_TURNS)
      return c.blocks == 1 ? choose_tile<KIND, 1, true>(c.tile, a, left, right, stream)
                           : choose_tile<KIND, 2, true>(c.tile, a, left, right, stream);
  if (c.schedule == US_GROUPED_TURNS) return cudaErrorInvalidValue;
  return c.blocks == 1 ? choose_tile<KIND, 1, false>(c.tile, a, left, right, stream)
                       : choose_tile<KIND, 2, false>(c.tile, a, left, right, stream);
}

static inline bool valid(const struct us_grouped *g, uint64_t stride) {
  bool one = !g->start;
  return g->N && g->K && g->N % 16 == 0 && g->K % 16 == 0 && g->groups &&
         g->groups <= US_GROUPED_MOST_GROUPS && (!one || g->groups == 1) &&
         (g->groups == 1 || (stride % 8 == 0 && stride >= (uint64_t)g->N * g->K));
}

static inline struct grouped_args arguments(const struct us_grouped *g, uint32_t columns, uint32_t depth,
                                            void *out) {
  struct grouped_args a = {};
  a.start = g->start, a.groups = g->groups, a.rows = g->rows;
  a.columns = columns, a.depth = depth, a.out = out;
  return a;
}

#endif
