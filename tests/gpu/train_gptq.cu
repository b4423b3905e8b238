/* train_gptq.cu: GPTQ's pieces on the GPU against the CPU's, on matrices that share their inputs and some that are left alone.
 *
 * Inputs and streams promise bits. Factors, corrections and aims have the CPU's sums in another order: factors and corrections are
 * compared by their distance (Frobenius). An aim that is half way between two codes may fall either way, and moves those behind it;
 * so of aims the error of the products counts, and that nearly all codes are the CPU's.
 *
 * Contents: inputs; a problem; factor; correction; aims; a long row.
 */
#include "train_values.h"

#include "kernels/optim/gptq_train.h"
#include "kernels/quant/quant_train.h"

#include <cublas_v2.h>

extern "C" {
#include "training/gptq.h"
}

static cublasHandle_t cublas;

static void check_true(const char *name, bool good, double value, double bound) {
  us_gpu_report(name, 1, good ? 0 : 1, 0);
  if (!good) fprintf(stderr, "%s: %g, bound %g\n", name, value, bound);
}

static double distance(const std::vector<float> &a, const std::vector<float> &b) {
  double apart = 0.0, size = 0.0;
  for (size_t i = 0; i < a.size(); i++) {
    double d = (double)a[i] - (double)b[i];
    apart += d * d, size += (double)b[i] * (double)b[i];
  }
  return sqrt(apart / size);
}

/* --- inputs --- */

static void check_inputs(void) {
  const uint32_t R = 37, top_k = 3, D = 72, S = R * top_k;
  std::vector<uint16_t> from = train_halves(train_normal(R * D, 1)), to = train_halves(train_normal(R * D, 2));
  std::vector<float> weight = train_normal(S, 3), wide_from = train_normal(R * D, 4),
                     wide_to = train_normal(R * D, 5);
  std::vector<uint32_t> row(S), pair(S);
  for (uint32_t s = 0; s < S; s++) pair[s] = (s * 7) % S, row[s] = pair[s] / top_k;
  std::vector<uint16_t> x(S * D), lost(S * D), plain(R * D), stream(S * D);
  for (uint32_t s = 0; s < S; s++)
    for (uint32_t k = 0; k < D; k++) {
      size_t at = (size_t)row[s] * D + k;
      float w = weight[pair[s]];
      x[s * D + k] = us_bf16_from_f32(w * us_bf16_to_f32(to[at]));
      lost[s * D + k] = us_bf16_from_f32(w * us_bf16_to_f32(from[at]) - us_bf16_to_f32(x[s * D + k]));
      stream[s * D + k] = us_bf16_from_f32(0.25f * (wide_from[at] - wide_to[at]));
    }
  for (size_t i = 0; i < plain.size(); i++)
    plain[i] = us_bf16_from_f32(us_bf16_to_f32(from[i]) - us_bf16_to_f32(to[i]));
  train_device<uint16_t> d_from(from), d_to(to), d_x(x.size()), d_lost(x.size());
  train_device<float> d_weight(weight), d_wide_from(wide_from), d_wide_to(wide_to);
  train_device<uint32_t> d_row(row), d_pair(pair);
  struct us_gptq_train_inputs in = {S,         D,       d_row.at, d_pair.at, d_weight.at,
                                    d_from.at, d_to.at, d_x.at,   d_lost.at};
  US_CUDA((cudaError_t)us_gptq_train_inputs(&in, 0));
  train_same("inputs of experts have the CPU's bits", x, d_x.host());
  train_same("what they lost has the CPU's bits", lost, d_lost.host());
  struct us_gptq_train_stream s = {S, D, d_row.at, 0.25f, d_wide_from.at, d_wide_to.at, d_lost.at};
  US_CUDA((cudaError_t)us_gptq_train_stream(&s, 0));
  train_same("what the stream lost has the CPU's bits", stream, d_lost.host());
  in = {R, D, NULL, NULL, NULL, d_from.at, d_to.at, d_to.at, d_from.at};
  US_CUDA((cudaError_t)us_gptq_train_inputs(&in, 0));
  train_same("rows that stay rows keep their bits", to, d_to.host());
  train_same("what they lost, in place", plain, d_from.host());
  in.cols = 12;
  check_true("odd widths are refused", us_gptq_train_inputs(&in, 0) == cudaErrorInvalidValue, 0, 0);
}

/* --- a problem --- */

/* Three matrices: the first in MXFP4, the second in FP8, the third in MXFP4 but for its first half, which is left alone. */
struct problem {
  uint32_t N, K;
  uint64_t stride;
  std::vector<float> value, moments, crossed, made_up;
  std::vector<uint8_t> format;
  std::vector<struct us_quant_tile> tiles;
};

enum { GROUPS = 3 };

static struct us_matrix_encoding encoding_of(uint32_t group) {
  return {group == 1 ? US_FORMAT_FP8 : US_FORMAT_MXFP4, US_SCALE_MSE, US_FP8_SCALE_UE8M0, 0};
}

static bool is_kept(const struct problem &p, uint32_t group, uint32_t row) {
  return group == 2 && row < p.N / 2;
}

/* Inputs that share six directions, so that there is something to make up with. */
static std::vector<float> some_moments(uint32_t K, uint64_t seed) {
  const uint32_t rows = K + K / 2;
  std::vector<float> x = train_normal((size_t)rows * K, seed, 0.2f), direction = train_normal(6 * K, seed + 1),
                     part = train_normal(6 * rows, seed + 2), h((size_t)K * K);
  for (uint32_t r = 0; r < rows; r++)
    for (uint32_t k = 0; k < K; k++)
      for (int d = 0; d < 6; d++) x[(size_t)r * K + k] += part[r * 6 + d] * direction[(size_t)d * K + k];
  for (uint32_t i = 0; i < K; i++)
    for (uint32_t r = 0; r < rows; r++)
      for (uint32_t j = 0; j < K; j++)
        h[(size_t)i * K + j] += x[(size_t)r * K + i] * x[(size_t)r * K + j];
  for (uint32_t i = 0; i < K; i++)
    for (uint32_t j = 0; j < i; j++) h[(size_t)i * K + j] = h[(size_t)j * K + i];
  return h;
}

static struct problem new_problem(uint32_t N, uint32_t K) {
  struct problem p = {N, K, (uint64_t)N * K + 32, {}, {}, {}, {}, {}, {}};
  p.value = train_normal(GROUPS * p.stride, 20);
  p.crossed = train_normal((size_t)GROUPS * K * K, 21, 0.1f);
  p.made_up = train_normal((size_t)GROUPS * N * K, 22);
  for (uint32_t g = 0; g < GROUPS; g++) {
    std::vector<float> h = some_moments(K, 30 + 3 * g);
    p.moments.insert(p.moments.end(), h.begin(), h.end());
    struct us_matrix_encoding e = encoding_of(g);
    size_t count = us_quant_train_tiles(&e, g * p.stride, N, K, NULL), first = p.tiles.size();
    p.tiles.resize(first + count);
    us_quant_train_tiles(&e, g * p.stride, N, K, &p.tiles[first]);
    for (uint32_t r = 0; r < N; r++) p.format.push_back(is_kept(p, g, r) ? US_FORMAT_BF16 : e.format);
  }
  return p;
}

/* The device's copy of a problem. */
struct device {
  train_device<float> value, moments, crossed, made_up, scale, scratch;
  train_device<uint8_t> format;
  train_device<uint32_t> at;
  train_device<struct us_quant_tile> tiles;
  struct us_gptq_train gptq;
  explicit device(const struct problem &p)
      : value(p.value), moments(p.moments), crossed(p.crossed), made_up(p.made_up),
        scale(GROUPS * p.stride / 8), scratch(us_gptq_train_scratch(GROUPS, p.N, p.K)), format(p.format),
        at((size_t)GROUPS * p.K), tiles(p.tiles) {
    gptq = {GROUPS,     p.N,        p.K,        value.at, p.stride,   format.at, scale.at,
            moments.at, crossed.at, made_up.at, at.at,    scratch.at, cublas};
  }
  void find_scales() {
    struct us_quant_train quant = {tiles.at, tiles.n, value.at, NULL, NULL, NULL, scale.at, 0};
    US_CUDA((cudaError_t)us_quant_train(&quant, 0));
  }
};

/* The CPU's factor of a group. */
struct factor {
  std::vector<float> L;
  std::vector<uint32_t> at;
};

static struct factor cpu_factor(const struct problem &p, uint32_t g) {
  size_t square = (size_t)p.K * p.K;
  struct factor f = {{p.moments.begin() + (long)(g * square), p.moments.begin() + (long)((g + 1) * square)},
                     std::vector<uint32_t>(p.K)};
  std::vector<float> scratch(square);
  us_gptq_factor(f.L.data(), p.K, f.at.data(), scratch.data());
  return f;
}

/* --- factor --- */

static void check_factor(const struct problem &p, struct device *d) {
  US_CUDA((cudaError_t)us_gptq_train_factor(&d->gptq, 0));
  std::vector<float> L = d->moments.host(), all;
  std::vector<uint32_t> at = d->at.host(), order;
  for (uint32_t g = 0; g < GROUPS; g++) {
    struct factor f = cpu_factor(p, g);
    all.insert(all.end(), f.L.begin(), f.L.end());
    order.insert(order.end(), f.at.begin(), f.at.end());
  }
  train_same("the factors' order is the CPU's", order, at);
  double apart = distance(L, all);
  check_true("factors are the CPU's up to the order of sums", apart < 2e-5, apart, 2e-5);
  for (size_t i = 0; i < L.size(); i++) all[i] = i / p.K % p.K < i % p.K ? L[i] : 0.0f;
  train_same("nothing stands beyond their diagonals", std::vector<float>(L.size()), all);
}

/* --- correction --- */

static std::vector<float> cpu_corrected(const struct problem &p, float of_inputs, float of_stream) {
  std::vector<float> value = p.value;
  for (uint32_t g = 0; g < GROUPS; g++) {
    struct factor f = cpu_factor(p, g);
    std::vector<float> change((size_t)p.N * p.K), scratch(change.size());
    const float *crossed = &p.crossed[(size_t)g * p.K * p.K];
    for (uint32_t r = 0; r < p.N; r++)
      for (uint32_t k = 0; k < p.K; k++) {
        double sum = 0.0;
        for (uint32_t j = 0; j < p.K; j++)
          sum += (double)p.value[g * p.stride + (size_t)r * p.K + j] * (double)crossed[(size_t)j * p.K + k];
        change[(size_t)r * p.K + k] =
            of_inputs * (float)sum + of_stream * p.made_up[((size_t)g * p.N + r) * p.K + k];
      }
    us_gptq_solve(change.data(), p.N, p.K, f.L.data(), f.at.data(), scratch.data());
    for (uint32_t r = 0; r < p.N; r++)
      for (uint32_t k = 0; k < p.K && !is_kept(p, g, r); k++)
        value[g * p.stride + (size_t)r * p.K + k] += change[(size_t)r * p.K + k];
  }
  return value;
}

static void check_correction(const struct problem &p, struct device *d) {
  std::vector<float> expected = cpu_corrected(p, 0.8f, 0.7f);
  US_CUDA((cudaError_t)us_gptq_train_correct(&d->gptq, 0.8f, 0.7f, 0));
  std::vector<float> got = d->value.host();
  double moved = distance(expected, p.value);
  for (size_t i = 0; i < got.size(); i++) got[i] -= p.value[i], expected[i] -= p.value[i];
  double apart = distance(got, expected);
  check_true("corrections are the CPU's up to the order of sums", apart < 1e-3 && moved > 0.01, apart, 1e-3);
  for (uint32_t g = 0; g < GROUPS; g++)
    for (uint32_t r = 0; r < p.N; r++)
      for (uint32_t k = 0; k < p.K && is_kept(p, g, r); k++)
        expected[g * p.stride + (size_t)r * p.K + k] = got[g * p.stride + (size_t)r * p.K + k];
  train_differs("and something is corrected", std::vector<float>(got.size()), got);
  bool kept = true;
  for (uint32_t r = 0; r < p.N / 2; r++)
    for (uint32_t k = 0; k < p.K; k++)
      kept &= us_f32_bits(got[2 * p.stride + (size_t)r * p.K + k]) << 1 == 0;
  check_true("rows of other formats are not corrected", kept, 0, 0);
}

/* --- aims --- */

static std::vector<float> rounded_matrix(const struct problem &p, const float *value, uint32_t g) {
  struct us_matrix_encoding e = encoding_of(g);
  struct us_err err = {};
  std::vector<float> out((size_t)p.N * p.K);
  if (us_matrix_fake_quant(value, p.N, p.K, &e, out.data(), &err) != US_OK)
    us_gpu_report(err.message, 1, 1, 0);
  return out;
}

/* Sum over rows of e H e^T, e what a row lost against `from`. */
static double products_error(const struct problem &p, uint32_t g, const float *from,
                             const std::vector<float> &to) {
  const float *h = &p.moments[(size_t)g * p.K * p.K];
  double total = 0.0;
  std::vector<double> e(p.K);
  for (uint32_t r = 0; r < p.N; r++) {
    if (is_kept(p, g, r)) continue;
    for (uint32_t k = 0; k < p.K; k++)
      e[k] = (double)to[(size_t)r * p.K + k] - (double)from[(size_t)r * p.K + k];
    for (uint32_t i = 0; i < p.K; i++) {
      double sum = 0.0;
      for (uint32_t j = 0; j < p.K; j++) sum += (double)h[(size_t)i * p.K + j] * e[j];
      total += e[i] * sum;
    }
  }
  return total;
}

static std::vector<float> cpu_aims(const struct problem &p, const float *value, uint32_t g) {
  struct us_matrix_encoding e = encoding_of(g);
  struct factor f = cpu_factor(p, g);
  struct us_err err = {};
  size_t n = (size_t)p.N * p.K;
  std::vector<float> aims(value, value + n), lost(n);
  std::vector<uint8_t> codes(n), scales(n);
  if (us_matrix_encode(value, p.N, p.K, &e, codes.data(), scales.data(), &err) != US_OK)
    us_gpu_report(err.message, 1, 1, 0);
  us_gptq_round(aims.data(), p.N, p.K, &e, scales.data(), f.L.data(), f.at.data(), 0, p.N, lost.data());
  return aims;
}

static void check_aims(const struct problem &p, struct device *d) {
  std::vector<float> before = d->value.host();
  d->find_scales();
  US_CUDA((cudaError_t)us_gptq_train_round(&d->gptq, 0));
  std::vector<float> after = d->value.host();
  for (uint32_t g = 0; g < GROUPS; g++) {
    const float *value = &before[g * p.stride];
    std::vector<float> cpu = cpu_aims(p, value, g);
    std::vector<float> expected = rounded_matrix(p, cpu.data(), g),
                       got = rounded_matrix(p, &after[g * p.stride], g), nearest = rounded_matrix(p, value, g);
    size_t same = 0, all = 0;
    for (uint32_t r = 0; r < p.N; r++)
      for (uint32_t k = 0; k < p.K && !is_kept(p, g, r); k++, all++)
        same += us_f32_bits(expected[(size_t)r * p.K + k]) == us_f32_bits(got[(size_t)r * p.K + k]);
    double ours = products_error(p, g, value, got), theirs = products_error(p, g, value, expected),
           plain = products_error(p, g, value, nearest), share = (double)same / (double)all;
    check_true("aims lose what the CPU's lose", fabs(ours - theirs) < 0.01 * theirs, ours / theirs, 1.01);
    check_true("and half of what the nearest lose at most", ours < 0.5 * plain, ours / plain, 0.5);
    check_true("nearly all codes are the CPU's", share > 0.98, share, 0.98);
  }
  bool kept = memcmp(&before[2 * p.stride], &after[2 * p.stride], (size_t)p.N / 2 * p.K * sizeof(float)) == 0;
  for (uint32_t g = 0; g < GROUPS; g++)
    kept &= memcmp(&before[g * p.stride + (size_t)p.N * p.K], &after[g * p.stride + (size_t)p.N * p.K],
                   32 * sizeof(float)) == 0;
  check_true("rows of other formats, and what lies between matrices, keep their bits", kept, 0, 0);
}

/* --- a long row --- */

static void check_problem(uint32_t N, uint32_t K) {
  struct problem p = new_problem(N, K);
  struct device d(p), again(p);
  check_factor(p, &d);
  check_correction(p, &d);
  check_aims(p, &d);
  US_CUDA((cudaError_t)us_gptq_train_factor(&again.gptq, 0));
  US_CUDA((cudaError_t)us_gptq_train_correct(&again.gptq, 0.8f, 0.7f, 0));
  again.find_scales();
  US_CUDA((cudaError_t)us_gptq_train_round(&again.gptq, 0));
  train_same("the same bits again", d.value.host(), again.value.host());
}

/* Inputs that were never seen: nothing to make up with, so the nearest. */
static void check_nothing_seen(void) {
  struct problem p = new_problem(16, 64);
  std::fill(p.moments.begin(), p.moments.end(), 0.0f);
  std::fill(p.crossed.begin(), p.crossed.end(), 0.0f);
  std::fill(p.made_up.begin(), p.made_up.end(), 0.0f);
  struct device d(p);
  US_CUDA((cudaError_t)us_gptq_train_factor(&d.gptq, 0));
  US_CUDA((cudaError_t)us_gptq_train_correct(&d.gptq, 0.8f, 0.8f, 0));
  d.find_scales();
  US_CUDA((cudaError_t)us_gptq_train_round(&d.gptq, 0));
  std::vector<float> after = d.value.host();
  for (uint32_t g = 0; g < GROUPS; g++)
    train_same("inputs that were never seen mean nearest", rounded_matrix(p, &p.value[g * p.stride], g),
               rounded_matrix(p, &after[g * p.stride], g));
}

int main(void) {
  us_gpu_begin();
  us_gpu_watchdog(100);
  if (cublasCreate(&cublas) != CUBLAS_STATUS_SUCCESS) return 5;
  check_inputs();
  check_problem(48, 96);
  check_problem(40, 192);
  check_problem(136, 1024);
  check_nothing_seen();
  cublasDestroy(cublas);
  return us_gpu_status();
}
