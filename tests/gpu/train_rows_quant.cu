/* train_rows_quant.cu: rounding of masters against us_matrix_fake_quant, bit for bit, and the passes over arenas. */
#include "train_values.h"
#include "train_rows.h"

#include "kernels/quant/quant_train.h"

/* Values of all kinds: Gaussian, tiny, huge, zero groups, ties of E2M1 and E4M3, both zeros. */
static std::vector<float> some_masters(size_t n) {
  std::vector<float> x = train_normal(n, 30, 0.02f);
  uint64_t state = train_seed() + 31;
  for (size_t i = 0; i < n; i++) {
    uint64_t word = lab_random(&state), group = i / 32 % 16;
    if (group == 3) x[i] *= 0x1p-120f;
    if (group == 4) x[i] *= 0x1p+120f;
    if (group == 5) x[i] = word & 1 ? 0.0f : -0.0f;
    if (group == 6) x[i] = (float)((int)(word % 49) - 24) * 0.25f;
    if (group == 7) x[i] = us_f32_from_bits((uint32_t)(word >> 32) & 0x807fffffu); /* subnormal */
    if (group == 8) x[i] = (float)((int)(word % 897) - 448);
  }
  return x;
}

struct quant_case {
  const char *name;
  struct us_matrix_encoding encoding;
  size_t rows, cols;
};

static std::vector<struct quant_case> quant_cases(void) {
  std::vector<struct quant_case> cases;
  const char *rules[US_SCALE_RULE_COUNT] = {"mxfp4 mse", "mxfp4 floor", "mxfp4 even", "mxfp4 rceil",
                                            "mxfp4 r7.25"};
  for (int rule = 0; rule < US_SCALE_RULE_COUNT; rule++)
    cases.push_back(
        {rules[rule], {US_FORMAT_MXFP4, (enum us_scale_rule)rule, US_FP8_SCALE_F32, 0}, 130, 1056});
  cases.push_back({"fp8 f32", {US_FORMAT_FP8, US_SCALE_MSE, US_FP8_SCALE_F32, 0}, 300, 520});
  cases.push_back({"fp8 ue8m0", {US_FORMAT_FP8, US_SCALE_MSE, US_FP8_SCALE_UE8M0, 0}, 256, 384});
  cases.push_back({"fp8 chunks", {US_FORMAT_FP8, US_SCALE_MSE, US_FP8_SCALE_F32, 144}, 432, 320});
  cases.push_back({"fp8 odd", {US_FORMAT_FP8, US_SCALE_MSE, US_FP8_SCALE_F32, 0}, 131, 251});
  cases.push_back({"bf16", {US_FORMAT_BF16, US_SCALE_MSE, US_FP8_SCALE_F32, 0}, 77, 1000});
  cases.push_back({"f32 vector", {US_FORMAT_F32, US_SCALE_MSE, US_FP8_SCALE_F32, 0}, 1, 6});
  return cases;
}

static void check_cases(void) {
  std::vector<struct quant_case> cases = quant_cases();
  std::vector<struct us_quant_tile> tiles;
  size_t floats = 0;
  for (const struct quant_case &c : cases) {
    size_t count = us_quant_train_tiles(&c.encoding, floats, c.rows, c.cols, NULL), first = tiles.size();
    tiles.resize(first + count);
    us_quant_train_tiles(&c.encoding, floats, c.rows, c.cols, &tiles[first]);
    floats += (c.rows * c.cols + 15) / 16 * 16;
  }
  std::vector<float> value = some_masters(floats), untouched(floats, 7.0f);
  train_device<struct us_quant_tile> d_tiles(tiles);
  train_device<float> d_value(value), d_rounded(untouched);
  train_device<uint16_t> d_compute(floats);
  train_device<uint64_t> d_bad(std::vector<uint64_t>{UINT64_MAX});
  struct us_quant_train quant = {d_tiles.at, tiles.size(), d_value.at, d_rounded.at, d_compute.at, d_bad.at, NULL, 0};
  US_CUDA((cudaError_t)us_quant_train(&quant, 0));
  std::vector<float> rounded = d_rounded.host();
  std::vector<uint16_t> compute = d_compute.host();
  size_t at = 0;
  for (const struct quant_case &c : cases) {
    size_t n = c.rows * c.cols;
    std::vector<float> expected(n), got(rounded.begin() + (long)at, rounded.begin() + (long)(at + n));
    std::vector<uint16_t> half(compute.begin() + (long)at, compute.begin() + (long)(at + n));
    struct us_err err = {};
    if (us_matrix_fake_quant(&value[at], c.rows, c.cols, &c.encoding, expected.data(), &err) != US_OK)
      us_gpu_report(err.message, 1, 1, 0);
    char check[64];
    snprintf(check, sizeof check, "fake quantisation: %s", c.name);
    train_same(check, expected, got);
    train_same("fake quantisation: compute = bf16(rounded)", train_halves(expected), half);
    if (c.encoding.format == US_FORMAT_MXFP4 || c.encoding.format == US_FORMAT_FP8) {
      struct us_matrix_encoding other = c.encoding;
      other.scale_rule = (enum us_scale_rule)((c.encoding.scale_rule + 1) % US_SCALE_RULE_COUNT);
      other.fp8_scale = (enum us_fp8_scale) !c.encoding.fp8_scale;
      if (us_matrix_fake_quant(&value[at], c.rows, c.cols, &other, expected.data(), &err) != US_OK)
        us_gpu_report(err.message, 1, 1, 0);
      train_differs("fake quantisation: another scale rule shows", expected, got);
    }
    at += (n + 15) / 16 * 16;
  }
  train_same("fake quantisation: nothing bad", std::vector<uint64_t>{UINT64_MAX}, d_bad.host());
  for (size_t bad : {(size_t)130 * 1056 + 77, (size_t)17, floats - 16}) { /* the last: in the vector */
    std::vector<float> broken = value;
    broken[bad] = bad == 17 ? NAN : INFINITY;
    broken[floats - 11] = -INFINITY; /* a later one; the vector's last value */
    d_value.set(broken);
    d_bad.set({UINT64_MAX});
    US_CUDA((cudaError_t)us_quant_train(&quant, 0));
    train_same("fake quantisation: first bad value", std::vector<uint64_t>{bad}, d_bad.host());
  }
  d_value.set(value);
  quant.opt_rounded = d_value.at;
  quant.opt_compute = NULL;
  US_CUDA((cudaError_t)us_quant_train(&quant, 0));
  std::vector<float> in_place = d_value.host();
  for (size_t i = 0; i < floats; i++)
    if (rounded[i] == 7.0f) in_place[i] = 7.0f; /* padding between tensors is not written */
  train_same("fake quantisation: in place", rounded, in_place);
}

/* The scale of every 8 values, from a base on: what a value is divided by, and a value over its scale is its code. */
static void check_scales(const struct us_matrix_encoding &encoding, size_t rows, size_t cols) {
  const uint64_t base = 64, offset = 96;
  std::vector<struct us_quant_tile> tiles(us_quant_train_tiles(&encoding, offset, rows, cols, NULL));
  us_quant_train_tiles(&encoding, offset, rows, cols, tiles.data());
  std::vector<float> value = some_masters(offset + rows * cols), expected((offset - base + rows * cols) / 8, 7.0f);
  std::vector<uint8_t> codes(us_matrix_data_bytes(encoding.format, rows, cols)),
      scales(us_matrix_scale_bytes(encoding.format, rows, cols, encoding.scale_chunk_rows));
  struct us_matrix w = {};
  w.format = encoding.format, w.rows = rows, w.cols = cols, w.scale_chunk_rows = encoding.scale_chunk_rows;
  struct us_err err = {};
  if (us_matrix_encode(&value[offset], rows, cols, &encoding, codes.data(), scales.data(), &err) != US_OK)
    us_gpu_report(err.message, 1, 1, 0);
  for (size_t r = 0; r < rows; r++)
    for (size_t k = 0; k < cols; k += 8) {
      size_t row = us_matrix_scale_row(&w, r), blocks = (cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
      expected[(offset - base + r * cols + k) / 8] =
          encoding.format == US_FORMAT_MXFP4
              ? us_e8m0_to_f32(scales[(r * cols + k) / US_MXFP4_GROUP])
              : ((const float *)scales.data())[row * blocks + k / US_FP8_BLOCK];
    }
  train_device<struct us_quant_tile> d_tiles(tiles);
  train_device<float> d_value(value), d_scale(std::vector<float>(expected.size(), 7.0f));
  struct us_quant_train quant = {d_tiles.at, tiles.size(), d_value.at, NULL, NULL, NULL, d_scale.at, base};
  US_CUDA((cudaError_t)us_quant_train(&quant, 0));
  train_same(encoding.format == US_FORMAT_MXFP4 ? "scales of groups" : "scales of blocks", expected,
             d_scale.host());
}

static void check_arena(size_t n) {
  std::vector<float> x = train_normal(n, 33);
  train_device<float> d_x(x), d_factor(1);
  train_device<uint16_t> d_half(n);
  train_device<double> d_sum(1);
  train_device<uint64_t> d_index(std::vector<uint64_t>{UINT64_MAX});
  train_device<char> scratch(us_sum_squares_train_scratch());
  US_CUDA((cudaError_t)us_bf16_train(n, d_x.at, d_half.at, 0));
  train_same("arena: bf16", train_halves(x), d_half.host());
  US_CUDA((cudaError_t)us_sum_squares_train(n, d_x.at, d_sum.at, scratch.at, 0));
  double sum = 0;
  for (float v : x) sum += (double)v * (double)v;
  std::vector<double> once = d_sum.host();
  char shape[32];
  snprintf(shape, sizeof shape, "%zu", n);
  struct lab_result r = {"arena: sum of squares", shape, "f64"};
  train_compare(&r, once, {sum}, {sum * (double)n * 0x1p-53}); /* each sum errs by at most n units */
  train_mutation(&r, "the last value left out", once, {sum - (double)x[n - 1] * (double)x[n - 1]},
                 {sum * (double)n * 0x1p-53});
  lab_report(&r);
  US_CUDA((cudaError_t)us_sum_squares_train(n, d_x.at, d_sum.at, scratch.at, 0));
  train_same("arena: the same sum again", once, d_sum.host());
  double limit = 0.5 * sqrt(once[0]);
  US_CUDA((cudaError_t)us_clip_factor_train(d_sum.at, limit, d_factor.at, 0));
  float factor = (float)(limit / sqrt(once[0]));
  train_same("arena: clip factor", std::vector<float>{factor}, d_factor.host());
  US_CUDA((cudaError_t)us_scale_train(n, d_factor.at, d_x.at, 0));
  for (float &v : x) v *= factor;
  train_same("arena: scaled", x, d_x.host());
  US_CUDA((cudaError_t)us_clip_factor_train(d_sum.at, 4 * limit, d_factor.at, 0));
  train_same("arena: no clipping under the limit", std::vector<float>{1.0f}, d_factor.host());
  US_CUDA((cudaError_t)us_nonfinite_train(n, d_x.at, d_index.at, 0));
  train_same("arena: all finite", std::vector<uint64_t>{UINT64_MAX}, d_index.host());
  x[n - 1] = NAN, x[n / 3] = INFINITY;
  d_x.set(x);
  US_CUDA((cudaError_t)us_nonfinite_train(n, d_x.at, d_index.at, 0));
  train_same("arena: first value that is not finite", std::vector<uint64_t>{n / 3}, d_index.host());
}

void train_rows_quant(void) {
  check_cases();
  check_scales({US_FORMAT_MXFP4, US_SCALE_MSE, US_FP8_SCALE_F32, 0}, 130, 1056);
  check_scales({US_FORMAT_FP8, US_SCALE_MSE, US_FP8_SCALE_F32, 0}, 300, 520);
  check_scales({US_FORMAT_FP8, US_SCALE_MSE, US_FP8_SCALE_UE8M0, 144}, 432, 320);
  check_arena(100003);
  check_arena(5);
}
