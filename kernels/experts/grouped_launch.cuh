/* grouped_launch.cuh: the operands as the copy engine wants them described, the choice of a tile, the launch.
 */
#ifndef US_KERNELS_GROUPED_LAUNCH_CUH
#define US_KERNELS_GROUPED_LAUNCH_CUH

#include "kernels/experts/grouped_kernel.cuh"

/* Matrices (rows, columns) bf16, `stride` values apart; what lies outside reads as zeros. */
struct grouped_operand {
  const uint16_t *at;
  uint32_t rows, columns, matrices;
  uint64_t stride;
  uint32_t box_rows; /* of a copy, 64 columns wide */
};

typedef CUresult (*encode_function)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                    const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                    const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static inline cudaError_t describe(const struct grouped_operand *o, CUtensorMap *map) {
  void *entry = NULL;
  cudaDriverEntryPointQueryResult found;
  cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (status != cudaSuccess) return status;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  cuuint64_t matrix = (cuuint64_t)o->rows * o->columns * 2;
  cuuint64_t size[3] = {o->columns, o->rows, o->matrices},
             stride[2] = {(cuuint64_t)o->columns * 2, o->matrices > 1 ? (cuuint64_t)o->stride * 2 : matrix};
  cuuint32_t box[3] = {DEPTH, o->box_rows, 1}, step[3] = {1, 1, 1};
  CUresult result =
      ((encode_function)entry)(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)o->at, size, stride, box,
                               step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

static inline cudaError_t count_processors(uint32_t *ret_count) {
  int device, count = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  *ret_count = (uint32_t)count;
  return status;
}

template <class Shape, bool WIDE>
static cudaError_t launch(const struct grouped_args *a, struct grouped_operand *left,
                          struct grouped_operand *right, cudaStream_t stream) {
  auto kernel = grouped_product<Shape, WIDE>;
  constexpr uint32_t bytes = Shape::STAGES * Shape::STAGE_BYTES;
  CUtensorMap map_a, map_b;
  uint32_t processors;
  left->box_rows = Shape::ACROSS_A ? DEPTH : TILE_ROWS;
  right->box_rows = Shape::ACROSS_B ? DEPTH : Shape::COLUMNS / Shape::BLOCKS;
  cudaError_t status = count_processors(&processors);
  if (status == cudaSuccess) status = describe(left, &map_a);
  if (status == cudaSuccess) status = describe(right, &map_b);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status != cudaSuccess) return status;
  kernel<<<processors / Shape::BLOCKS * Shape::BLOCKS, THREADS, bytes, stream>>>(*a, map_a, map_b);
  return cudaGetLastError();
}

/* Cycles of a stage: multiplies, or bytes from L2 at 30 a cycle; with them the columns that do not exist. */
static inline uint32_t choose_columns(uint32_t columns, uint32_t blocks) {
  static const uint32_t sizes[] = {256, 192, 160, 128};
  uint32_t best = 0, least = UINT32_MAX;
  for (uint32_t size : sizes) {
    uint32_t bytes = (TILE_ROWS + size / blocks) * DEPTH * 2,
             cycles = 4 * size > bytes / 30 ? 4 * size : bytes / 30;
    uint32_t cost = (columns + size - 1) / size * cycles;
    if (cost < least) least = cost, best = size;
  }
  return best;
}

template <int KIND, int BLOCKS>
static cudaError_t choose_tile(uint32_t tile, const struct grouped_args *a, struct grouped_operand *left,
                               struct grouped_operand *right, cudaStream_t stream) {
  switch (tile ? tile : choose_columns(a->columns, BLOCKS)) {
  case 128:
    return launch<grouped_shape<KIND, 128, BLOCKS>, false>(a, left, right, stream);
  case 160:
    return launch<grouped_shape<KIND, 160, BLOCKS>, false>(a, left, right, stream);
  case 192:
    return launch<grouped_shape<KIND, 192, BLOCKS>, false>(a, left, right, stream);
  case 256:
    return launch<grouped_shape<KIND, 256, BLOCKS>, false>(a, left, right, stream);
  }
  return cudaErrorInvalidValue;
}

template <int KIND>
static cudaError_t choose(const struct us_grouped *g, const struct grouped_args *a,
                          struct grouped_operand *left, struct grouped_operand *right, cudaStream_t stream) {
  if (g->blocks > 2) return cudaErrorInvalidValue;
  return g->blocks == 1 ? choose_tile<KIND, 1>(g->tile, a, left, right, stream)
                        : choose_tile<KIND, 2>(g->tile, a, left, right, stream);
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
