/* train_grouped.cu: grouped products against a double reference: every kind, tile and cluster, odd sizes, empty groups; what
 * NaN reaches; the same bits twice. */
#include "train_experts.h"
#include "kernels/experts/experts_train.h"
#include "kernels/experts/grouped_gemm.h"

struct grouped_case {
  std::vector<uint32_t> sizes; /* rows of each group */
  uint32_t N, K, padding;      /* values between matrices */
};

struct grouped_data {
  uint32_t N, K, E, S;
  uint64_t stride;
  std::vector<uint32_t> start, group; /* group of a row */
  std::vector<uint16_t> x, dy, w;
  std::vector<float> dw;
};

static struct grouped_data make_data(const struct grouped_case &c) {
  struct grouped_data d;
  d.N = c.N, d.K = c.K, d.E = (uint32_t)c.sizes.size(), d.stride = (uint64_t)c.N * c.K + c.padding;
  d.start.push_back(0);
  for (uint32_t e = 0; e < d.E; e++) {
    d.start.push_back(d.start[e] + c.sizes[e]);
    d.group.insert(d.group.end(), c.sizes[e], e);
  }
  d.S = d.start[d.E];
  d.x = random_halves((size_t)d.S * d.K, 1), d.dy = random_halves((size_t)d.S * d.N, 2);
  d.w = random_halves(d.E * d.stride, 3), d.dw = random_floats(d.E * d.stride, 4);
  return d;
}

static double half(const std::vector<uint16_t> &v, size_t i) {
  return us_bf16_to_f32(v[i]);
}

/* Sum of products and of their magnitudes, the terms `stride` apart. */
struct sum_of {
  double value = 0, magnitude = 0;
  void add(double product) { value += product, magnitude += std::fabs(product); }
};

enum mutation { NONE, WRONG_GROUP, ROWS_SWAPPED, EXPERT_SKIPPED };
static const char *const mutation_names[] = {"", "a row multiplied by its neighbour's matrix",
                                             "two rows swapped", "an expert skipped"};

/* Of a row of the reference: the row that it reads and the matrix that it takes. */
static size_t mutate_row(size_t s, enum mutation m) {
  return m == ROWS_SWAPPED ? s ^ 1 : s;
}

static void check_rows(const struct grouped_data &d, const std::vector<uint16_t> &got, bool forward,
                       enum mutation m, const std::string &name) {
  uint32_t columns = forward ? d.N : d.K, depth = forward ? d.K : d.N;
  const std::vector<uint16_t> &rows = forward ? d.x : d.dy;
  struct bound_check check;
  for (size_t s = 0; s < d.S; s += m ? 7 : 1) {
    size_t from = mutate_row(s, m) < d.S ? mutate_row(s, m) : s, e = d.group[s];
    if (m == WRONG_GROUP) e = (e + 1) % d.E;
    for (uint32_t c = 0; c < columns; c++) {
      struct sum_of sum;
      for (uint32_t k = 0; k < depth; k++)
        sum.add(half(rows, from * depth + k) *
                half(d.w, e * d.stride + (forward ? (size_t)c * d.K + k : (size_t)k * d.K + c)));
      if (m == EXPERT_SKIPPED && e == 2) sum.value = 0;
      check.value(us_bf16_to_f32(got[s * columns + c]), sum.value,
                  std::fabs(sum.value) * ROUND_BF16 + (depth / 16 + 1) * ROUND_TENSOR * sum.magnitude +
                      1e-30);
    }
  }
  if (m)
    check.report_mutation(name + ": " + mutation_names[m]);
  else
    check.report(name);
}

static void check_weights(const struct grouped_data &d, const std::vector<float> &got, enum mutation m,
                          const std::string &name) {
  struct bound_check check;
  std::vector<struct sum_of> sum(d.stride);
  for (uint32_t e = 0; e < d.E; e++) {
    std::fill(sum.begin(), sum.end(), sum_of());
    uint32_t first = d.start[e], end = m == EXPERT_SKIPPED && e == 2 ? first : d.start[e + 1];
    for (uint32_t s = first; s < end; s++)
      for (uint32_t n = 0; n < d.N; n++)
        for (uint32_t k = 0; k < d.K; k++)
          sum[(size_t)n * d.K + k].add(half(d.dy, (size_t)mutate_row(s, m) % d.S * d.N + n) *
                                       half(d.x, (size_t)s * d.K + k));
    for (size_t i = 0; i < d.stride; i++) { /* the padding too: it must be left alone */
      double before = d.dw[e * d.stride + i], rows = d.start[e + 1] - first;
      check.value(got[e * d.stride + i], before + sum[i].value,
                  std::fabs(before + sum[i].value) * ROUND_F32 +
                      (rows / 16 + 1) * ROUND_TENSOR * sum[i].magnitude + 1e-30);
    }
  }
  if (m)
    check.report_mutation(name + ": " + mutation_names[m]);
  else
    check.report(name);
}

struct grouped_device {
  device_array<uint32_t> start;
  device_array<uint16_t> x, dy, w, y, dx;
  device_array<float> dw, wide;
  explicit grouped_device(const struct grouped_data &d)
      : start(d.start), x(d.x), dy(d.dy), w(d.w), y((size_t)d.S * d.N), dx((size_t)d.S * d.K), dw(d.dw),
        wide((size_t)d.S * d.N) {}
};

struct grouped_results {
  std::vector<uint16_t> y, dx;
  std::vector<float> dw;
};

static struct grouped_results run(const struct grouped_data &d, struct grouped_device &g, uint32_t tile,
                                  uint32_t blocks, bool turns) {
  struct us_grouped a = {g.start.at, d.E, d.S, d.N, d.K, tile, blocks, schedule_of(turns)}, whole = a;
  whole.schedule = US_GROUPED_TOGETHER;
  US_CUDA(cudaMemset(g.y.at, 0xff, g.y.count * 2));
  US_CUDA(cudaMemset(g.dx.at, 0xff, g.dx.count * 2));
  g.dw.put(d.dw);
  US_CUDA((cudaError_t)us_grouped_forward(&a, g.x.at, g.w.at, d.stride, g.y.at, 0));
  US_CUDA((cudaError_t)us_grouped_grad_x(&a, g.dy.at, g.w.at, d.stride, g.dx.at, 0));
  US_CUDA((cudaError_t)us_grouped_grad_w(&whole, g.dy.at, g.x.at, g.dw.at, d.stride, 0));
  US_CUDA(cudaDeviceSynchronize());
  return {g.y.get(), g.dx.get(), g.dw.get()};
}

/* The fused product against the product and SwiGLU one after the other. */
static void test_fused(const struct grouped_data &d, struct grouped_device &g, uint32_t tile, uint32_t blocks,
                       bool turns, const std::vector<uint16_t> &y, const std::string &name) {
  struct us_grouped grouped = {g.start.at, d.E, d.S, d.N, d.K, tile, blocks, schedule_of(turns)};
  device_array<uint16_t> a((size_t)d.S * d.N / 2), fused((size_t)d.S * d.N / 2);
  US_CUDA((cudaError_t)us_experts_train_swiglu(d.S, d.N / 2, device_array<uint16_t>(y).at, a.at, 0));
  US_CUDA(cudaMemset(g.y.at, 0xff, g.y.count * 2));
  US_CUDA((cudaError_t)us_grouped_forward_swiglu(&grouped, g.x.at, g.w.at, d.stride, g.y.at, fused.at, 0));
  report_same("grouped forward_swiglu, gates and ups " + name, y, g.y.get());
  report_same("grouped forward_swiglu, a " + name, a.get(), fused.get());
  US_CUDA(cudaMemset(fused.at, 0xff, fused.count * 2));
  US_CUDA((cudaError_t)us_grouped_forward_swiglu(&grouped, g.x.at, g.w.at, d.stride, NULL, fused.at, 0));
  report_same("grouped forward_swiglu, a alone " + name, a.get(), fused.get());
}

/* One shape: all variants give the bits of the first, whose values are compared with the reference. */
static void test_case(const struct grouped_case &c, bool mutations) {
  struct grouped_data d = make_data(c);
  struct grouped_device g(d);
  std::string shape = "(" + std::to_string(d.N) + ", " + std::to_string(d.K) + ") x " + std::to_string(d.E);
  struct grouped_results first = run(d, g, 128, 1, false), again = run(d, g, 128, 1, false);
  check_rows(d, first.y, true, NONE, "grouped forward " + shape);
  check_rows(d, first.dx, false, NONE, "grouped grad_x " + shape);
  check_weights(d, first.dw, NONE, "grouped grad_w " + shape);
  report_same("grouped forward again " + shape, first.y, again.y);
  report_same("grouped grad_x again " + shape, first.dx, again.dx);
  report_same("grouped grad_w again " + shape, first.dw, again.dw);
  for (int variant = 0; variant < 4; variant++) {
    uint32_t blocks = variant / 2 + 1;
    bool turns = variant % 2;
    for (uint32_t tile : {128u, 160u, 192u, 256u}) {
      if (turns && tile > 192) continue;
      struct grouped_results other = run(d, g, tile, blocks, turns);
      std::string name = shape + " tile " + std::to_string(tile) + " blocks " + std::to_string(blocks) +
                         (turns ? " by turns" : "");
      report_same("grouped forward, same bits " + name, first.y, other.y);
      report_same("grouped grad_x, same bits " + name, first.dx, other.dx);
      report_same("grouped grad_w, same bits " + name, first.dw, other.dw);
      if (d.N % 32 == 0) test_fused(d, g, tile, blocks, turns, first.y, name);
    }
  }
  struct us_grouped a = {g.start.at, d.E, d.S, d.N, d.K, 0, 0, US_GROUPED_CHOSEN};
  US_CUDA(cudaMemset(g.y.at, 0xff, g.y.count * 2));
  US_CUDA((cudaError_t)us_grouped_forward(&a, g.x.at, g.w.at, d.stride, g.y.at, 0));
  report_same("grouped forward, chosen tile " + shape, first.y, g.y.get());
  US_CUDA(cudaMemset(g.dx.at, 0xff, g.dx.count * 2));
  US_CUDA((cudaError_t)us_grouped_grad_x(&a, g.dy.at, g.w.at, d.stride, g.dx.at, 0));
  report_same("grouped grad_x, chosen tile " + shape, first.dx, g.dx.get());
  US_CUDA((cudaError_t)us_grouped_forward_f32(&a, g.x.at, g.w.at, d.stride, g.wide.at, 0));
  std::vector<float> wide = g.wide.get();
  std::vector<uint16_t> rounded(wide.size());
  for (size_t i = 0; i < wide.size(); i++) rounded[i] = us_bf16_from_f32(wide[i]);
  report_same("grouped forward_f32 rounds to forward " + shape, first.y, rounded);
  if (!mutations) return;
  for (enum mutation m : {WRONG_GROUP, ROWS_SWAPPED, EXPERT_SKIPPED}) {
    check_rows(d, first.y, true, m, "grouped forward");
    check_rows(d, first.dx, false, m, "grouped grad_x");
    if (m != WRONG_GROUP) check_weights(d, first.dw, m, "grouped grad_w");
  }
}

/* A row of NaN and Inf changes its own outputs and its own group's dW, nothing else. */
static void test_containment(uint32_t tile, uint32_t blocks, bool turns) {
  struct grouped_data d = make_data({{70, 3, 0, 130, 61}, 160, 208, 0});
  struct grouped_device g(d);
  struct grouped_results clean = run(d, g, tile, blocks, turns);
  const uint32_t bad = d.start[3]; /* in the same stage as the last rows of group 1 */
  for (uint32_t k = 0; k < d.K; k++) d.x[(size_t)bad * d.K + k] = k % 2 ? 0x7fc0 : 0x7f80;
  for (uint32_t n = 0; n < d.N; n++) d.dy[(size_t)bad * d.N + n] = n % 2 ? 0xff80 : 0x7fc0;
  g.x.put(d.x), g.dy.put(d.dy);
  struct grouped_results got = run(d, g, tile, blocks, turns);
  uint64_t reached = 0, checked = 0, own = 0;
  for (size_t i = 0; i < got.y.size(); i++)
    if (i / d.N != bad)
      reached += got.y[i] != clean.y[i], checked++;
    else
      own += std::isfinite(us_bf16_to_f32(got.y[i]));
  for (size_t i = 0; i < got.dx.size(); i++)
    if (i / d.K != bad)
      reached += got.dx[i] != clean.dx[i], checked++;
    else
      own += std::isfinite(us_bf16_to_f32(got.dx[i]));
  for (size_t i = 0; i < got.dw.size(); i++)
    if (i / d.stride != 3)
      reached += memcmp(&got.dw[i], &clean.dw[i], 4) != 0, checked++;
    else
      own += std::isfinite(got.dw[i]);
  std::string name = " tile " + std::to_string(tile) + " blocks " + std::to_string(blocks);
  us_gpu_report(("NaN stays in its row and group" + name).c_str(), checked, reached, 0);
  us_gpu_report(("NaN fills its row and group" + name).c_str(), d.N + d.K, own, 0);
}

static void test_refusals(void) {
  struct us_grouped a = {NULL, 1, 16, 24, 16, 0, 0, US_GROUPED_CHOSEN};
  uint64_t accepted = us_grouped_forward(&a, NULL, NULL, 0, NULL, 0) != cudaErrorInvalidValue;
  a.N = 32, a.groups = 2; /* two groups without `start` */
  accepted += us_grouped_grad_x(&a, NULL, NULL, 512, NULL, 0) != cudaErrorInvalidValue;
  a.groups = 1, a.tile = 100;
  accepted += us_grouped_grad_w(&a, NULL, NULL, NULL, 512, 0) != cudaErrorInvalidValue;
  us_gpu_report("grouped products refuse bad sizes", 3, accepted, 0);
}

void test_grouped(void) {
  test_case({{37, 0, 200, 64, 0, 129, 1}, 288, 208, 64}, true);
  test_case({{5, 255}, 16, 16, 0}, false);
  test_case({{300}, 640, 320, 0}, false);
  test_containment(128, 1, false);
  test_containment(256, 2, false);
  test_containment(160, 1, true);
  test_refusals();
}
