/* head_loss_train.cu: softmax, loss and gradient of a chunk's logits; a block has a row.
 *
 * Contents: row arithmetic; rows in registers; rows by streaming; sums; entry point.
 *
 * Bound: bytes, 4 + 2 a logit (8 + 2 with a teacher) as long as a row fits the block's registers: 32 K logits, 16 K with a
 * teacher. Longer rows are read twice. Instructions are as scarce: at 4.2 TB/s an H200 has 42 a logit. So the exponential is the
 * hardware's (kernels/cpu/exp.h, 22 instructions, made a row of 16 K last 12 us), and ties are looked for only where the
 * label's logit is the largest.
 */
#include "kernels/gpu/rows.cuh"
#include "kernels/head_loss/head_loss_train.h"

/* --- row arithmetic --- */

struct row {
  const float *student, *teacher;
  uint16_t *dlogits; /* NULL: none */
  int32_t label;
  bool counts;
  float weight, scale, label_logit; /* scale is 0 where the row does not count */
};

static __device__ __forceinline__ struct row find_row(const struct us_head_loss_train &l, uint32_t r) {
  struct row row = {};
  row.student = l.logits + r * l.stride;
  if (l.opt_teacher) row.teacher = l.opt_teacher + r * l.teacher_stride;
  if (l.opt_dlogits) row.dlogits = l.opt_dlogits + r * l.dlogits_stride;
  row.label = l.label ? l.label[r] : -1;
  row.weight = l.weight ? l.weight[r] : 1.0f;
  row.counts = row.weight != 0.0f && (l.opt_teacher || row.label >= 0);
  row.scale = row.counts ? row.weight * l.scale : 0.0f;
  if (row.label >= 0) row.label_logit = row.student[row.label];
  return row;
}

/* e^x of x <= 0: 2^(x log2(e)) errs by 2 ulp of its own and |x| units of its argument. */
static __device__ __forceinline__ float exponential(float x) {
  return __expf(x);
}

/* Largest value and sum of exp(x - max) of a distribution's row. */
struct softmax {
  float max;
  double sum;
};

/* Largest value of a block, in all its threads. */
template <int THREADS> static __device__ __forceinline__ float block_max(float x, float *warps) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float largest = warps[0];
#pragma unroll
  for (int w = 1; w < THREADS / 32; w++) largest = fmaxf(largest, warps[w]);
  return largest;
}

/* What the first thread writes about a row. `value` is its KL; cross-entropy needs none. */
static __device__ __forceinline__ void report_row(const struct us_head_loss_train &l, uint32_t r,
                                                  const struct row &row, const struct softmax &s,
                                                  double value, bool hit) {
  double log_sum = (double)s.max + log(s.sum);
  if (!row.counts)
    value = 0.0;
  else if (!row.teacher)
    value = log_sum - (double)row.label_logit;
  else if (value < 0.0)
    value = 0.0;
  if (l.opt_row_loss) l.opt_row_loss[r] = (float)value;
  if (l.opt_row_logprob)
    l.opt_row_logprob[r] = row.label >= 0 ? (float)((double)row.label_logit - log_sum) : 0.0f;
  if (l.opt_row_hit) l.opt_row_hit[r] = hit;
  if (l.scratch) ((double *)l.scratch)[r] = value * (double)row.weight * (double)l.scale;
}

/* Gradient of 4 logits from column k on; p and t are probabilities. */
static __device__ __forceinline__ struct us_four gradient(const struct row &row, uint32_t k,
                                                          const struct us_four &p, const struct us_four &t) {
  struct us_four d;
#pragma unroll
  for (int j = 0; j < 4; j++) d.v[j] = row.scale * (row.teacher ? p.v[j] - t.v[j] : p.v[j]);
  if (!row.teacher && row.counts && (uint32_t)row.label - k < 4)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (k + j == (uint32_t)row.label) d.v[j] -= row.scale;
  return d;
}

/* Whether a value before the label is as large as the largest: the label then loses the tie. */
static __device__ __forceinline__ bool beats_label(const struct us_four &x, uint32_t k, int32_t label,
                                                   float max) {
  bool beats = false;
#pragma unroll
  for (int j = 0; j < 4; j++) beats |= (int32_t)k + j < label && x.v[j] == max;
  return beats;
}

/* --- rows in registers --- */

template <int THREADS, int CHUNKS> struct held_row {
  struct us_four x[CHUNKS];

  __device__ __forceinline__ void load(const float *from, uint32_t N) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      uint32_t k = (c * THREADS + threadIdx.x) * 4;
      x[c] = k < N ? us_load_four(from + k) : us_four{{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
    }
  }

  __device__ __forceinline__ float largest() const {
    float m = -INFINITY;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int j = 0; j < 4; j++) m = fmaxf(m, x[c].v[j]);
    return m;
  }

  /* The values become exp(x - max); their sum, four at a time in FP32. */
  __device__ __forceinline__ double exponentiate(float max) {
    double sum = 0.0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
      for (int j = 0; j < 4; j++) x[c].v[j] = exponential(x[c].v[j] - max);
      sum += (double)((x[c].v[0] + x[c].v[1]) + (x[c].v[2] + x[c].v[3]));
    }
    return sum;
  }
};

/* Of four columns: the sum of exp(b) (b - a), with a and b the logits of student and teacher less their largest. */
static __device__ __forceinline__ float cross_four(const struct us_four &a, const struct us_four &b) {
  float part[4];
#pragma unroll
  for (int j = 0; j < 4; j++) part[j] = exponential(b.v[j]) * (b.v[j] - a.v[j]);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

/* This over the sum of exp(b), plus the difference of the log sums of exp(a) and exp(b), is the KL divergence. */
template <int THREADS, int CHUNKS>
static __device__ __forceinline__ double cross_sum(const held_row<THREADS, CHUNKS> &s,
                                                   const held_row<THREADS, CHUNKS> &t, float s_max,
                                                   float t_max, uint32_t N) {
  double sum = 0.0;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    struct us_four a, b;
    if ((c * THREADS + threadIdx.x) * 4 >= N) continue;
#pragma unroll
    for (int j = 0; j < 4; j++) a.v[j] = s.x[c].v[j] - s_max, b.v[j] = t.x[c].v[j] - t_max;
    sum += (double)cross_four(a, b);
  }
  return sum;
}

template <int THREADS, int CHUNKS>
static __device__ __forceinline__ bool label_beaten(const held_row<THREADS, CHUNKS> &x, int32_t label,
                                                    float max) {
  bool beaten = false;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) beaten |= beats_label(x.x[c], (c * THREADS + threadIdx.x) * 4, label, max);
  return __syncthreads_or(beaten);
}

template <int THREADS, int CHUNKS>
static __device__ __forceinline__ void write_gradient(const struct row &row,
                                                      const held_row<THREADS, CHUNKS> &x,
                                                      const held_row<THREADS, CHUNKS> &t, float inverse,
                                                      float t_inverse, uint32_t N) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    uint32_t k = (c * THREADS + threadIdx.x) * 4;
    if (k >= N) continue;
    struct us_four p, q;
#pragma unroll
    for (int j = 0; j < 4; j++) p.v[j] = x.x[c].v[j] * inverse, q.v[j] = t.x[c].v[j] * t_inverse;
    us_store_four(row.dlogits + k, gradient(row, k, p, q));
  }
}

template <int THREADS, int CHUNKS, bool KL>
static __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    held_rows(const __grid_constant__ struct us_head_loss_train l) {
  __shared__ float maxima[THREADS / 32];
  __shared__ double sums[THREADS / 32];
  struct row row = find_row(l, blockIdx.x);
  uint32_t N = (uint32_t)l.N;
  held_row<THREADS, CHUNKS> x, t = {};
  struct softmax s, u = {};
  double kl = 0.0;
  x.load(row.student, N);
  if (KL) t.load(row.teacher, N);
  s.max =
      block_max<THREADS>(x.largest(), maxima); /* its barriers: all have read before anyone writes below */
  bool hit = row.label >= 0 && row.label_logit == s.max && !label_beaten(x, row.label, s.max);
  if (KL) {
    u.max = block_max<THREADS>(t.largest(), maxima);
    kl = us_block_sum<THREADS>(cross_sum(x, t, s.max, u.max, N), sums);
    u.sum = us_block_sum<THREADS>(t.exponentiate(u.max), sums);
  }
  s.sum = us_block_sum<THREADS>(x.exponentiate(s.max), sums);
  if (KL) kl = kl / u.sum + (log(s.sum) - log(u.sum));
  if (row.dlogits) write_gradient(row, x, t, (float)(1.0 / s.sum), KL ? (float)(1.0 / u.sum) : 0.0f, N);
  if (threadIdx.x == 0) report_row(l, blockIdx.x, row, s, kl, hit);
}

/* --- rows by streaming --- */

#define STREAM_THREADS 1024

static __device__ __forceinline__ struct us_four probabilities(const struct us_four &x, float max,
                                                               float inverse) {
  struct us_four p;
#pragma unroll
  for (int j = 0; j < 4; j++) p.v[j] = exponential(x.v[j] - max) * inverse;
  return p;
}

/* Largest value and sum of exponentials in one pass: a thread's sum is rescaled when its maximum grows. */
static __device__ __forceinline__ struct softmax stream_softmax(const float *x, uint32_t N, float *maxima,
                                                                double *sums) {
  float max = -INFINITY, sum = 0.0f;
  for (uint32_t k = threadIdx.x * 4; k < N; k += STREAM_THREADS * 4) {
    struct us_four v = us_load_four(x + k);
    float larger = fmaxf(fmaxf(fmaxf(v.v[0], v.v[1]), fmaxf(v.v[2], v.v[3])), max);
    if (larger > max) sum *= exponential(max - larger), max = larger;
#pragma unroll
    for (int j = 0; j < 4; j++) sum += exponential(v.v[j] - max);
  }
  struct softmax s;
  s.max = block_max<STREAM_THREADS>(max, maxima);
  s.sum =
      us_block_sum<STREAM_THREADS>((double)(max > -INFINITY ? sum * exponential(max - s.max) : 0.0f), sums);
  return s;
}

/* dlogits may lie in the logits' memory: column k is written at half its place, which everybody has read by then. */
template <bool KL>
static __global__ void __launch_bounds__(STREAM_THREADS)
    streamed_rows(const __grid_constant__ struct us_head_loss_train l) {
  __shared__ float maxima[STREAM_THREADS / 32];
  __shared__ double sums[STREAM_THREADS / 32];
  struct row row = find_row(l, blockIdx.x);
  uint32_t N = (uint32_t)l.N;
  struct softmax s = stream_softmax(row.student, N, maxima, sums), u = {};
  if (KL) u = stream_softmax(row.teacher, N, maxima, sums);
  float inverse = (float)(1.0 / s.sum), u_inverse = KL ? (float)(1.0 / u.sum) : 0.0f;
  double kl = 0.0;
  bool beaten = false;
  for (uint32_t first = 0; first < N; first += STREAM_THREADS * 4) {
    uint32_t k = first + threadIdx.x * 4;
    struct us_four x = {}, target = {};
    if (k < N) x = us_load_four(row.student + k);
    if (KL && k < N) {
      struct us_four t = us_load_four(row.teacher + k);
      struct us_four a, b;
#pragma unroll
      for (int j = 0; j < 4; j++) a.v[j] = x.v[j] - s.max, b.v[j] = t.v[j] - u.max;
      target = probabilities(t, u.max, u_inverse);
      kl += (double)cross_four(a, b);
    }
    __syncthreads();
    if (k >= N) continue;
    beaten |= beats_label(x, k, row.label, s.max);
    if (row.dlogits)
      us_store_four(row.dlogits + k, gradient(row, k, probabilities(x, s.max, inverse), target));
  }
  if (KL) kl = us_block_sum<STREAM_THREADS>(kl, sums) / u.sum + (log(s.sum) - log(u.sum));
  bool hit = !__syncthreads_or(beaten) && row.label >= 0 && row.label_logit == s.max;
  if (threadIdx.x == 0) report_row(l, blockIdx.x, row, s, kl, hit);
}

/* --- sums --- */

#define SUM_THREADS 256

static __global__ void __launch_bounds__(SUM_THREADS)
    sum_rows(const __grid_constant__ struct us_head_loss_train l) {
  __shared__ double sums[SUM_THREADS / 32];
  __shared__ uint32_t counts[SUM_THREADS / 32];
  double total = 0.0;
  uint32_t counted = 0;
  for (size_t r = threadIdx.x; r < l.rows; r += SUM_THREADS) {
    total += ((const double *)l.scratch)[r];
    bool labelled = l.opt_teacher || (l.label && l.label[r] >= 0);
    counted += labelled && (!l.weight || l.weight[r] != 0.0f);
  }
  total = us_block_sum<SUM_THREADS>(total, sums);
  counted = us_block_sum<SUM_THREADS>(counted, counts);
  if (threadIdx.x) return;
  if (l.opt_total) *l.opt_total += total;
  if (l.opt_counted) *l.opt_counted += counted;
}

size_t us_head_loss_train_scratch(size_t rows) {
  return rows * sizeof(double);
}

/* --- entry point --- */

template <bool KL> static void launch_rows(const struct us_head_loss_train &l, cudaStream_t stream) {
  unsigned rows = (unsigned)l.rows;
  constexpr int chunks = KL ? 4 : 8; /* a thread's registers hold 32 values: of one row or of two */
  if (l.N <= 256 * 4 * chunks)
    held_rows<256, chunks, KL><<<rows, 256, 0, stream>>>(l);
  else if (l.N <= 512 * 4 * chunks)
    held_rows<512, chunks, KL><<<rows, 512, 0, stream>>>(l);
  else if (l.N <= 1024 * 4 * chunks)
    held_rows<1024, chunks, KL><<<rows, 1024, 0, stream>>>(l);
  else
    streamed_rows<KL><<<rows, STREAM_THREADS, 0, stream>>>(l);
}

int us_head_loss_train(const struct us_head_loss_train *loss, cudaStream_t stream) {
  bool totals = loss->opt_total || loss->opt_counted;
  bool wrong = loss->N % 4 || loss->stride % 4 || loss->teacher_stride % 4 || loss->dlogits_stride % 4 ||
               !loss->N || loss->N >= 1u << 31 || loss->rows >= 1u << 31 || (totals && !loss->scratch);
  if (wrong) return cudaErrorInvalidValue;
  if (!loss->rows) return cudaSuccess;
  if (loss->opt_teacher)
    launch_rows<true>(*loss, stream);
  else
    launch_rows<false>(*loss, stream);
  if (totals) sum_rows<<<1, SUM_THREADS, 0, stream>>>(*loss);
  return cudaGetLastError();
}
