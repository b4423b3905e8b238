/* quant_train.cu: masters to the weights that are multiplied, all tensors in one launch; a block has a tile.
 *
 * Bound: bytes, 10 a value (FP32 in, FP32 and bf16 out), with 40 to 70 instructions for MXFP4 beside them. A group of 32 is in four
 * lanes, lane l with the values l mod 4: those that one FP64 sum of formats/mxfp4_group.h runs over, so its order costs two
 * shuffles. Shared memory turns loads of 16 bytes into that layout and back.
 */
#include "kernels/gpu/rows.cuh"
#include "kernels/quant/quant_train.h"

#define THREADS    256
#define RUN        16384 /* values of a tile that is a run */
#define WARP_PIECE 256   /* values a warp turns at a time: 8 groups */
#define GROUP_PAD  36    /* floats between groups in shared memory: lanes of all groups hit different banks */

/* --- tiles, on the host --- */

static size_t put(struct us_quant_tile *opt_tiles, size_t count, const struct us_quant_tile &tile) {
  if (opt_tiles) opt_tiles[count] = tile;
  return count + 1;
}

static size_t fp8_tiles(struct us_quant_tile tile, size_t rows, size_t cols, size_t chunk_rows,
                        struct us_quant_tile *opt_tiles) {
  size_t count = 0, chunk = chunk_rows ? chunk_rows : rows, height;
  uint64_t offset = tile.offset;
  for (size_t row = 0; row < rows; row += height) {
    size_t left = chunk - row % chunk;
    height = left < US_FP8_BLOCK ? left : US_FP8_BLOCK;
    if (height > rows - row) height = rows - row;
    for (size_t col = 0; col < cols; col += US_FP8_BLOCK) {
      tile.offset = offset + row * cols + col;
      tile.rows = (uint32_t)height;
      tile.cols = (uint32_t)(cols - col < US_FP8_BLOCK ? cols - col : US_FP8_BLOCK);
      count = put(opt_tiles, count, tile);
    }
  }
  return count;
}

size_t us_quant_train_tiles(const struct us_matrix_encoding *encoding, uint64_t offset, size_t rows,
                            size_t cols, struct us_quant_tile *opt_tiles) {
  struct us_quant_tile tile = {offset,
                               1,
                               0,
                               (uint32_t)cols,
                               (uint8_t)encoding->format,
                               (uint8_t)encoding->scale_rule,
                               (uint8_t)encoding->fp8_scale,
                               0};
  if (encoding->format == US_FORMAT_FP8)
    return fp8_tiles(tile, rows, cols, encoding->scale_chunk_rows, opt_tiles);
  size_t count = 0, n = rows * cols;
  for (size_t first = 0; first < n; first += RUN) {
    tile.offset = offset + first;
    tile.cols = (uint32_t)(n - first < RUN ? n - first : RUN);
    count = put(opt_tiles, count, tile);
  }
  return count;
}

/* --- results --- */

static __device__ __forceinline__ bool finite(float x) {
  return (us_f32_bits(x) & 0x7fffffffu) < 0x7f800000u;
}

static __device__ __forceinline__ void note_bad(const struct us_quant_train &q, uint64_t at) {
  if (q.opt_bad) atomicMin((unsigned long long *)q.opt_bad, (unsigned long long)at);
}

static __device__ __forceinline__ void write_four(const struct us_quant_train &q, uint64_t at,
                                                  const struct us_four &x) {
  if (q.opt_rounded) us_store_four(q.opt_rounded + at, x);
  if (q.opt_compute) us_store_four(q.opt_compute + at, x);
}

static __device__ __forceinline__ void write_one(const struct us_quant_train &q, uint64_t at, float x) {
  if (q.opt_rounded) q.opt_rounded[at] = x;
  if (q.opt_compute) q.opt_compute[at] = us_bf16_from_f32(x);
}

/* `at` is the first of the 8 values that an entry is for. */
static __device__ __forceinline__ void write_scale(const struct us_quant_train &q, uint64_t at, float scale) {
  if (q.opt_scale) q.opt_scale[(at - q.scale_base) / 8] = scale;
}

/* --- F32 and BF16 --- */

static __device__ void round_run(const struct us_quant_train &q, const struct us_quant_tile &tile) {
  bool round = tile.format == US_FORMAT_BF16;
  uint32_t fours = tile.cols / 4 * 4;
  for (uint32_t i = threadIdx.x * 4; i < fours; i += THREADS * 4) {
    struct us_four x = us_load_four(q.value + tile.offset + i);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (!finite(x.v[j])) note_bad(q, tile.offset + i + j);
      if (round) x.v[j] = us_bf16_round(x.v[j]);
    }
    write_four(q, tile.offset + i, x);
  }
  uint32_t i = fours + threadIdx.x;
  if (i >= tile.cols) return;
  float x = q.value[tile.offset + i];
  if (!finite(x)) note_bad(q, tile.offset + i);
  write_one(q, tile.offset + i, round ? us_bf16_round(x) : x);
}

/* --- MXFP4 --- */

/* A lane's values of a group: j is value 4 j + lane % 4. */
#define LANE_VALUES (US_MXFP4_GROUP / 4)

static __device__ __forceinline__ uint32_t group_max_bits(const float *w) {
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < LANE_VALUES; j++) largest = max(largest, us_f32_bits(w[j]) & 0x7fffffffu);
  largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  return max(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
}

/* us_mxfp4_group_error: this lane's sum, then (0 + 1) + (2 + 3). A square of an FP32 value is exact in FP64. */
static __device__ __forceinline__ double group_error(const float *w, float inverse, float unit,
                                                     const float *rounded) {
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < LANE_VALUES; j++) {
    double error = (double)(rounded[j] * unit - w[j] * inverse);
    sum = fma(error, error, sum);
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

static __device__ __forceinline__ void group_codes(const float *w, uint8_t byte, float *rounded) {
  float inverse = us_e8m0_inverse(byte);
#pragma unroll
  for (int j = 0; j < LANE_VALUES; j++) rounded[j] = us_e2m1_to_f32(us_e2m1_from_f32(w[j] * inverse));
}

/* us_mxfp4_group_encode and decode: w becomes code * scale; returns the scale. Warps call it whole. */
static __device__ __forceinline__ float fake_quant_group(float *w, uint32_t max_bits,
                                                        enum us_scale_rule rule) {
  uint8_t byte = us_mxfp4_scale_byte(us_f32_from_bits(max_bits), rule);
  float lower[LANE_VALUES], upper[LANE_VALUES];
  group_codes(w, byte, lower);
  bool clips = rule == US_SCALE_MSE && us_f32_from_bits(max_bits) * us_e8m0_inverse(byte) > 6.0f;
  if (__any_sync(0xffffffffu, clips)) {
    float inverse = us_e8m0_inverse(byte);
    group_codes(w, (uint8_t)(byte + 1), upper);
    bool keep = group_error(w, inverse, 1.0f, lower) <= group_error(w, inverse, 2.0f, upper);
    if (clips && !keep) {
      byte++;
#pragma unroll
      for (int j = 0; j < LANE_VALUES; j++) lower[j] = upper[j];
    }
  }
  float scale = us_e8m0_to_f32(byte);
#pragma unroll
  for (int j = 0; j < LANE_VALUES; j++) w[j] = lower[j] * scale;
  return scale;
}

/* A warp's piece of at most WARP_PIECE values from `at` on; turned is the warp's shared memory. */
static __device__ __forceinline__ void fake_quant_piece(const struct us_quant_train &q, uint64_t at,
                                                        uint32_t n, enum us_scale_rule rule, float *turned) {
  uint32_t lane = threadIdx.x % 32, group = lane / 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t i = half * 128 + lane * 4;
    struct us_four x = i < n ? us_load_four(q.value + at + i) : us_four{};
    us_store_four(turned + i / US_MXFP4_GROUP * GROUP_PAD + i % US_MXFP4_GROUP, x);
  }
  __syncwarp();
  float w[LANE_VALUES], *mine = turned + group * GROUP_PAD + lane % 4;
#pragma unroll
  for (int j = 0; j < LANE_VALUES; j++) w[j] = mine[4 * j];
  uint32_t max_bits = group_max_bits(w);
  if (max_bits >= 0x7f800000u)
    for (int j = 0; j < LANE_VALUES; j++)
      if (!finite(w[j])) note_bad(q, at + group * US_MXFP4_GROUP + 4 * j + lane % 4);
  float scale = fake_quant_group(w, max_bits, rule);
  if (group * US_MXFP4_GROUP < n) write_scale(q, at + group * US_MXFP4_GROUP + lane % 4 * 8, scale);
#pragma unroll
  for (int j = 0; j < LANE_VALUES; j++) mine[4 * j] = w[j];
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t i = half * 128 + lane * 4;
    if (i < n)
      write_four(q, at + i, us_load_four(turned + i / US_MXFP4_GROUP * GROUP_PAD + i % US_MXFP4_GROUP));
  }
  __syncwarp();
}

static __device__ void fake_quant_run(const struct us_quant_train &q, const struct us_quant_tile &tile) {
  __shared__ __align__(16) float turned[THREADS / 32][WARP_PIECE / US_MXFP4_GROUP * GROUP_PAD];
  uint32_t warp = threadIdx.x / 32;
  for (uint32_t i = warp * WARP_PIECE; i < tile.cols; i += THREADS / 32 * WARP_PIECE)
    fake_quant_piece(q, tile.offset + i, min(tile.cols - i, WARP_PIECE), (enum us_scale_rule)tile.scale_rule,
                     turned[warp]);
}

/* --- FP8 --- */

/* Columns of a row from `col` on: W values. */
template <int W>
static __device__ __forceinline__ struct us_four load_columns(const struct us_quant_train &q, uint64_t at) {
  struct us_four x = {};
  if (W == 4)
    x = us_load_four(q.value + at);
  else
    x.v[0] = q.value[at];
  return x;
}

/* Threads side by side have W columns each. The block is read twice, the second time from cache: 64 KB do not fit the
 * registers of as many warps as MXFP4 wants. */
template <int W>
static __device__ void fake_quant_block(const struct us_quant_train &q, const struct us_quant_tile &tile) {
  __shared__ uint32_t largest;
  constexpr uint32_t across = US_FP8_BLOCK / W, down = THREADS / across;
  uint32_t col = threadIdx.x % across * W, rows = col < tile.cols ? tile.rows : 0, max_bits = 0;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
#pragma unroll 4
  for (uint32_t row = threadIdx.x / across; row < rows; row += down) {
    uint64_t at = tile.offset + (uint64_t)row * tile.stride + col;
    struct us_four x = load_columns<W>(q, at);
#pragma unroll
    for (int j = 0; j < W; j++) {
      max_bits = max(max_bits, us_f32_bits(x.v[j]) & 0x7fffffffu);
      if (!finite(x.v[j])) note_bad(q, at + j);
    }
  }
  max_bits = __reduce_max_sync(0xffffffffu, max_bits);
  if (threadIdx.x % 32 == 0) atomicMax(&largest, max_bits);
  __syncthreads();
  float scale = us_fp8_block_scale(us_f32_from_bits(largest), (enum us_fp8_scale)tile.fp8_scale);
#pragma unroll 2
  for (uint32_t row = threadIdx.x / across; row < rows; row += down) {
    uint64_t at = tile.offset + (uint64_t)row * tile.stride + col;
    struct us_four x = load_columns<W>(q, at);
#pragma unroll
    for (int j = 0; j < W; j++) x.v[j] = us_fp8_to_f32(us_fp8_from_f32(x.v[j] / scale)) * scale;
    if (W == 4 && col % 8 == 0) write_scale(q, at, scale);
    if (W == 4)
      write_four(q, at, x);
    else
      write_one(q, at, x.v[0]);
  }
}

/* --- entry point --- */

static __global__ void __launch_bounds__(THREADS, 4)
    quant_tiles(const __grid_constant__ struct us_quant_train q) {
  struct us_quant_tile tile = q.tiles[blockIdx.x];
  if (tile.format == US_FORMAT_MXFP4)
    fake_quant_run(q, tile);
  else if (tile.format != US_FORMAT_FP8)
    round_run(q, tile);
  else if (tile.stride % 4 == 0)
    fake_quant_block<4>(q, tile);
  else
    fake_quant_block<1>(q, tile);
}

int us_quant_train(const struct us_quant_train *quant, cudaStream_t stream) {
  if (quant->count >= 1u << 31) return cudaErrorInvalidValue;
  if (quant->count) quant_tiles<<<(unsigned)quant->count, THREADS, 0, stream>>>(*quant);
  return cudaGetLastError();
}
