/* train_optim.cu: AdamW, Muon and what fixes oscillating weights on the GPU against the CPU, and their speed.
 *
 * AdamW, weights that are fixed and Muon's momentum promise the CPU's bits. Muon's products have bf16 operands, so its step differs from the CPU's FP32 one;
 * how much is derived by making the same roundings (x, s, t, x after each step) around sums in double: call the distance of that to
 * the CPU's step e (Frobenius, of a whole matrix). The GPU's step has the same roundings with other sums; its distance may be 2 e.
 *
 * Contents: AdamW; oscillation; Muon: the same roundings on the CPU; Muon; speed.
 */
#include "train_values.h"

#include "kernels/optim/adamw_train.h"
#include "kernels/optim/muon_train.h"
#include "kernels/optim/oscillation_train.h"

#include <cublas_v2.h>

extern "C" {
#include "training/optim.h"
}

#define MU   0.95
#define RATE 0.02

static cublasHandle_t cublas;

/* --- AdamW --- */

static void check_adamw(void) {
  const uint32_t sizes[] = {65536, 6, 1000, 16384 + 3, 1};
  const double decays[] = {0.1, 0.0, 0.1, 0.1, 0.0};
  const float rates[] = {1.0f, 1.0f, 0.3f, 2.0f, 1.0f};
  struct us_optim optim = us_optim_default(US_OPTIM_ADAMW);
  std::vector<struct us_adamw_span> spans;
  uint64_t n = 0;
  for (int i = 0; i < 5; i++) {
    spans.push_back({n, sizes[i], rates[i], decays[i]});
    n += (sizes[i] + 15) / 16 * 16;
  }
  std::vector<float> value = train_normal(n, 40), grad = train_normal(n, 41, 0.1f),
                     m = train_normal(n, 42, 0.1f), v(n);
  for (float &x : v) x = 0.01f + 1e-4f * (float)(&x - v.data());
  const float factor = 0.3713f;
  train_device<float> d_value(value), d_grad(grad), d_m(m), d_v(v), d_factor(std::vector<float>{factor});
  train_device<struct us_adamw_span> d_spans(spans);
  std::vector<float> before = value;
  for (optim.step = 1; optim.step < 4; optim.step++) {
    struct us_adamw_train args = {d_spans.at,  spans.size(),  d_value.at,
                                  d_grad.at,   d_m.at,        d_v.at,
                                  optim.step,  1e-3,          optim.beta1,
                                  optim.beta2, optim.epsilon, optim.step == 2 ? d_factor.at : NULL};
    US_CUDA((cudaError_t)us_adamw_train(&args, 0));
    std::vector<float> g = grad;
    for (float &x : g) x *= optim.step == 2 ? factor : 1.0f;
    for (const struct us_adamw_span &s : spans)
      us_adamw_update(&optim, 1e-3 * (double)s.rate_scale, s.decay, &value[s.offset], &g[s.offset],
                      &m[s.offset], &v[s.offset], s.n);
  }
  train_same("adamw: masters have the CPU's bits", value, d_value.host());
  train_same("adamw: first moments have the CPU's bits", m, d_m.host());
  train_same("adamw: second moments have the CPU's bits", v, d_v.host());
  train_differs("adamw: something changed", before, d_value.host());
  optim.step = 3;
  us_adamw_update(&optim, 1e-3, 0.1, value.data(), grad.data(), m.data(), v.data(), 65536);
  train_differs("adamw: one more step shows", value, d_value.host());
}

/* --- oscillation --- */

/* Codes of step i: most rest, some go on, some turn back every step. */
static std::vector<float> codes_of(size_t n, int step, const std::vector<float> &last) {
  std::vector<float> x = train_normal(n, 60 + step), next = last;
  for (size_t i = 0; i < n; i++)
    if (fabsf(x[i]) > 1.0f || i % 7 == 0) next[i] += (i % 7 == 0 ? step % 2 : x[i] > 0) ? 0.5f : -0.5f;
  return next;
}

static void check_oscillation(void) {
  const uint32_t sizes[] = {65536, 6, 1000, 16384 + 3, 1};
  std::vector<struct us_watched_span> spans;
  uint64_t n = 0;
  for (int i = 0; i < 5; i++) {
    spans.push_back({n, sizes[i]});
    n += (sizes[i] + 15) / 16 * 16 + 16; /* a gap that nobody watches */
  }
  std::vector<float> value = train_normal(n, 50), share(n), mean(n), turn(n), before(n, 1.0f), first = value;
  train_device<float> d_value(value), d_share(share), d_mean(mean), d_turn(turn);
  train_device<struct us_watched_span> d_spans(spans);
  struct us_oscillation_rule rule = {0.9f, INFINITY};
  for (int step = 0; step < 12; step++) {
    std::vector<float> after = codes_of(n, step, before);
    if (step == 6) rule.threshold = 0.25f;
    train_device<float> d_before(before), d_after(after);
    struct us_oscillation_train args = {d_spans.at, spans.size(), rule,      d_before.at, d_after.at,
                                        d_value.at, d_share.at,   d_mean.at, d_turn.at};
    US_CUDA((cudaError_t)us_oscillation_train(&args, 0));
    US_CUDA(cudaDeviceSynchronize());
    for (const struct us_watched_span &s : spans)
      for (size_t i = s.offset; i < s.offset + s.n; i++) {
        struct us_oscillation o = {share[i], mean[i], turn[i]};
        value[i] = us_oscillation_watch(&rule, before[i], after[i], value[i], &o);
        share[i] = o.share, mean[i] = o.mean, turn[i] = o.turn;
      }
    before = after;
  }
  train_same("oscillation: masters have the CPU's bits", value, d_value.host());
  train_same("oscillation: shares have the CPU's bits", share, d_share.host());
  train_same("oscillation: means have the CPU's bits", mean, d_mean.host());
  train_same("oscillation: moves have the CPU's bits", turn, d_turn.host());
  train_differs("oscillation: some weights are fixed", first, d_value.host());
}

/* --- Muon: the same roundings on the CPU --- */

static void round_all(std::vector<double> *x) {
  for (double &v : *x) v = (double)us_bf16_round((float)v);
}

/* c (m, n) = alpha a b + beta c0; a (m, k) by rows, b (k, n) by strides. */
static std::vector<double> product(size_t m, size_t n, size_t k, double alpha, const double *a,
                                   const double *b, size_t b_row, size_t b_col, double beta,
                                   const double *c0) {
  std::vector<double> c(m * n);
  for (size_t i = 0; i < m; i++)
    for (size_t j = 0; j < n; j++) {
      double sum = 0;
      for (size_t l = 0; l < k; l++) sum += a[i * k + l] * b[l * b_row + j * b_col];
      c[i * n + j] = alpha * sum + (c0 ? beta * c0[i * n + j] : 0.0);
    }
  round_all(&c);
  return c;
}

static const double tables[2][5][3] = {{{3.4445, -4.7750, 2.0315},
                                        {3.4445, -4.7750, 2.0315},
                                        {3.4445, -4.7750, 2.0315},
                                        {3.4445, -4.7750, 2.0315},
                                        {3.4445, -4.7750, 2.0315}},
                                       {{8.156554524902461, -22.48329292557795, 15.878769915207462},
                                        {4.042929935166739, -2.808917465908714, 0.5000178451051316},
                                        {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
                                        {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
                                        {2.3465413258596377, -1.7097828382687081, 0.42323551169305323}}};

/* The orthogonalised matrix of `step` (rows, cols), with the GPU's roundings. */
static std::vector<double> rounded_newton(int kind, std::vector<float> step, size_t rows, size_t cols) {
  bool tall = rows > cols;
  size_t m = tall ? cols : rows, n = tall ? rows : cols;
  double norm = 0;
  for (float v : step) norm += (double)v * (double)v;
  double divisor = kind ? 1.02 * sqrt(norm) + 1e-6 : sqrt(norm) + 1e-7;
  std::vector<double> x(m * n);
  for (size_t i = 0; i < m; i++)
    for (size_t j = 0; j < n; j++) x[i * n + j] = step[tall ? j * m + i : i * n + j] / divisor;
  round_all(&x);
  for (const double *c : tables[kind]) {
    std::vector<double> s = product(m, m, n, 1, x.data(), x.data(), 1, n, 0, NULL);
    std::vector<double> t = product(m, m, m, c[2], s.data(), s.data(), m, 1, c[1], s.data());
    x = product(m, n, m, 1, t.data(), x.data(), n, 1, c[0], x.data());
  }
  std::vector<double> result(m * n);
  for (size_t i = 0; i < m; i++)
    for (size_t j = 0; j < n; j++) result[tall ? j * m + i : i * n + j] = x[i * n + j];
  return result;
}

/* --- Muon --- */

struct muon_case {
  const char *name;
  size_t rows, cols, count, batch;
  uint32_t chunks, first,
      step; /* rows are in `chunks` runs of a tensor of chunks * step rows; 0: whole tensors */
  int newton;
  bool nesterov;
};

static struct us_muon_matrix matrix_of(const struct muon_case &c, size_t index) {
  size_t tensor_rows = c.chunks ? c.chunks * c.step : c.rows;
  uint64_t offset = index * tensor_rows * c.cols;
  return c.chunks ? us_muon_part(offset, c.first, (uint32_t)c.rows / c.chunks, c.step)
                  : us_muon_whole(offset, c.rows);
}

static size_t place_of(const struct muon_case &c, const struct us_muon_matrix &m, size_t row) {
  return m.offset + (row / m.run * m.step + m.first + row % m.run) * c.cols;
}

static std::vector<float> take_matrix(const struct muon_case &c, const struct us_muon_matrix &m,
                                      const std::vector<float> &arena) {
  std::vector<float> x(c.rows * c.cols);
  for (size_t r = 0; r < c.rows; r++)
    memcpy(&x[r * c.cols], &arena[place_of(c, m, r)], c.cols * sizeof(float));
  return x;
}

static double distance(const std::vector<double> &a, const std::vector<double> &b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sqrt(sum);
}

/* The CPU's step (value falls from 0 by it, no decay), as FP32 moments and masters. */
static std::vector<double> cpu_step(const struct muon_case &c, int newton, bool nesterov,
                                    const std::vector<float> &grad, std::vector<float> *moment,
                                    std::vector<float> *ret_step) {
  struct us_optim optim = us_optim_default(US_OPTIM_MUON);
  optim.momentum = MU, optim.nesterov = nesterov,
  optim.newton = newton ? US_NEWTON_POLAR_EXPRESS : US_NEWTON_SCHULZ5;
  size_t n = c.rows * c.cols;
  std::vector<float> value(n), scratch(n + us_newton_scratch(c.rows, c.cols));
  us_muon_update(&optim, RATE, 0.0, value.data(), grad.data(), moment->data(), c.rows, c.cols,
                 scratch.data());
  if (ret_step) {
    ret_step->resize(n);
    for (size_t i = 0; i < n; i++)
      (*ret_step)[i] = nesterov ? grad[i] + (float)MU * (*moment)[i] : (*moment)[i];
  }
  return std::vector<double>(value.begin(), value.end());
}

struct muon_memory {
  train_device<float> value, grad, moment;
  train_device<struct us_muon_matrix> matrices;
  train_device<char> scratch;
  muon_memory(const struct muon_case &c, size_t floats)
      : value(floats), grad(floats), moment(floats), matrices(c.count),
        scratch(us_muon_train_scratch(c.rows, c.cols, c.batch)) {
    std::vector<struct us_muon_matrix> list;
    for (size_t i = 0; i < c.count; i++) list.push_back(matrix_of(c, i));
    matrices.set(list);
  }
  struct us_muon_train args(const struct muon_case &c) const {
    struct us_muon_train m = {};
    m.rows = c.rows, m.cols = c.cols, m.matrices = matrices.at, m.count = c.count, m.batch = c.batch;
    m.value = value.at, m.grad = grad.at, m.moment = moment.at, m.rate = RATE, m.momentum = MU,
    m.nesterov = c.nesterov;
    m.newton = c.newton ? US_MUON_POLAR_EXPRESS : US_MUON_NEWTON_SCHULZ5;
    m.scratch = scratch.at, m.scratch_bytes = scratch.n, m.cublas = cublas;
    return m;
  }
};

static void check_muon(const struct muon_case &c) {
  size_t floats = c.count * (c.chunks ? c.chunks * c.step : c.rows) * c.cols;
  std::vector<float> grad = train_normal(floats, 50), moment = train_normal(floats, 51), zeros(floats);
  struct muon_memory d(c, floats);
  d.grad.set(grad), d.moment.set(moment);
  struct us_muon_train args = d.args(c);
  US_CUDA((cudaError_t)us_muon_train(&args, 0));
  std::vector<float> value = d.value.host(), moved = d.moment.host(), expected = moment, touched(floats);
  char shape[96];
  snprintf(shape, sizeof shape, "%s: %zu of %zu x %zu, batches of %zu", c.name, c.count, c.rows, c.cols,
           c.batch);
  struct lab_result r = {"muon step", shape, c.newton ? "polar express" : "newton-schulz"};
  std::vector<double> other_table, other_momentum;
  for (size_t i = 0; i < c.count; i++) {
    struct us_muon_matrix m = matrix_of(c, i);
    std::vector<float> g = take_matrix(c, m, grad), mine = take_matrix(c, m, moment), again = mine,
                       third = mine, step;
    std::vector<double> cpu = cpu_step(c, c.newton, c.nesterov, g, &mine, &step),
                        rounded = rounded_newton(c.newton, step, c.rows, c.cols);
    std::vector<float> got_floats = take_matrix(c, m, value);
    std::vector<double> got(got_floats.begin(), got_floats.end());
    for (double &v : rounded) v *= -RATE * 0.2 * sqrt((double)(c.rows > c.cols ? c.rows : c.cols));
    double allowed = 2 * distance(rounded, cpu);
    lab_sample(&r, distance(got, cpu), allowed, 0);
    other_table.push_back(distance(got, cpu_step(c, !c.newton, c.nesterov, g, &again, NULL)) / allowed);
    other_momentum.push_back(distance(got, cpu_step(c, c.newton, !c.nesterov, g, &third, NULL)) / allowed);
    for (size_t row = 0; row < c.rows; row++) {
      memcpy(&expected[place_of(c, m, row)], &mine[row * c.cols], c.cols * sizeof(float));
      for (size_t k = 0; k < c.cols; k++) touched[place_of(c, m, row) + k] = 1.0f;
    }
  }
  lab_mutation(&r, "the other polynomial", other_table);
  lab_mutation(&r, "the other momentum", other_momentum);
  lab_report(&r);
  train_same("muon: momentum has the CPU's bits, other rows untouched", expected, moved);
  uint64_t outside = 0;
  for (size_t i = 0; i < floats; i++) outside += touched[i] == 0.0f && value[i] != 0.0f;
  us_gpu_report("muon: other rows' masters untouched", floats, outside, 0);
  d.value.set(zeros), d.moment.set(moment);
  US_CUDA((cudaError_t)us_muon_train(&args, 0));
  train_same("muon: the same bits again", value, d.value.host());
}

/* Decay, rate scale and clipping: against the step just made, elementwise. */
static void check_muon_rate(void) {
  struct muon_case c = {"rates", 64, 96, 2, 2, 0, 0, 0, 0, true};
  size_t floats = c.count * c.rows * c.cols;
  std::vector<float> grad = train_normal(floats, 52), start = train_normal(floats, 53), zeros(floats),
                     half = grad;
  for (float &g : half) g *= 2.0f;
  struct muon_memory d(c, floats);
  d.grad.set(grad);
  struct us_muon_train args = d.args(c);
  US_CUDA((cudaError_t)us_muon_train(&args, 0));
  std::vector<float> step = d.value.host(), expected(floats);
  std::vector<struct us_muon_matrix> list = d.matrices.host();
  for (struct us_muon_matrix &m : list) m.rate_scale = 0.5f;
  d.matrices.set(list), d.value.set(start), d.moment.set(zeros), d.grad.set(half);
  train_device<float> factor(std::vector<float>{0.5f});
  args.decay = 0.1, args.opt_factor = factor.at;
  US_CUDA((cudaError_t)us_muon_train(&args, 0));
  float keep = (float)(1.0 - RATE * 0.5 * 0.1);
  for (size_t i = 0; i < floats; i++) expected[i] = start[i] * keep + 0.5f * step[i]; /* halving is exact */
  train_same("muon: decay, rate scale and clip factor", expected, d.value.host());
}

/* --- speed --- */

static void time_muon(const struct muon_case &c) {
  size_t floats = c.count * c.rows * c.cols, m = c.rows < c.cols ? c.rows : c.cols,
         n = c.rows < c.cols ? c.cols : c.rows;
  struct muon_memory d(c, floats);
  std::vector<float> noise = train_normal((size_t)1 << 20, 54);
  for (size_t at = 0; at < floats; at += noise.size()) {
    size_t left = std::min(floats - at, noise.size());
    US_CUDA(cudaMemcpy(d.grad.at + at, noise.data(), left * sizeof(float), cudaMemcpyHostToDevice));
  }
  struct us_muon_train args = d.args(c);
  double us = lab_median_us([&] { return (cudaError_t)us_muon_train(&args, 0); });
  double flops = 10.0 * (double)(m * m) * (double)(2 * n + m) * (double)c.count;
  printf("{\"time\": \"muon\", \"what\": \"%s\", \"matrices\": %zu, \"rows\": %zu, \"cols\": %zu, \"batch\": "
         "%zu, \"ms\": %.2f, "
         "\"tflops\": %.0f, \"gigabytes of masters\": %.2f}\n",
         c.name, c.count, c.rows, c.cols, c.batch, us * 1e-3, flops / us * 1e-6, (double)floats * 4e-9);
  fflush(stdout);
}

static void time_all(void) {
  if (us_gpu_patience()) return;
  for (size_t batch : {(size_t)32, (size_t)128, (size_t)512}) {
    time_muon({"experts, gate or up", 320, 1024, 1024, batch, 0, 0, 0, 0, true});
    time_muon({"experts, down", 1024, 320, 1024, batch, 0, 0, 0, 0, true});
  }
  time_muon({"experts of mini, gate or up", 384, 1024, 960, 128, 0, 0, 0, 0, true});
  time_muon({"experts of mini, down", 1024, 384, 960, 128, 0, 0, 0, 0, true});
  time_muon({"q or o", 1024, 1024, 32, 32, 0, 0, 0, 0, true});
  time_muon({"k or v", 512, 1024, 32, 32, 0, 0, 0, 0, true});
  time_muon({"nano's experts", 128, 320, 288, 288, 0, 0, 0, 0, true});
}

int main() {
  us_gpu_begin();
  us_gpu_watchdog(110);
  fprintf(stderr, "seed %llu\n", (unsigned long long)train_seed());
  US_CUDA(cudaFree(0));
  if (cublasCreate(&cublas) != CUBLAS_STATUS_SUCCESS) return 5;
  check_adamw();
  check_oscillation();
  for (int newton = 0; newton < 2; newton++) {
    check_muon({"wide", 64, 96, 5, 2, 0, 0, 0, newton, true});
    check_muon({"tall", 160, 96, 4, 4, 0, 0, 0, newton, true});
    check_muon({"square", 64, 64, 3, 8, 0, 0, 0, newton, false});
    check_muon({"wider", 128, 512, 2, 2, 0, 0, 0, newton, true});
    check_muon({"k of a fused qkv in 2 chunks", 32, 64, 3, 3, 2, 32, 64, newton, true});
  }
  check_muon_rate();
  time_all();
  cublasDestroy(cublas);
  return us_gpu_status();
}
