/* muon.c: orthogonalised momentum (Jordan 2024; Polar Express: arXiv 2505.16932). */
#include "training/optim.h"

static const double newton_schulz[5][3] = {{3.4445, -4.7750, 2.0315},
                                           {3.4445, -4.7750, 2.0315},
                                           {3.4445, -4.7750, 2.0315},
                                           {3.4445, -4.7750, 2.0315},
                                           {3.4445, -4.7750, 2.0315}};

static const double polar_express[5][3] = {
    {8.156554524902461, -22.48329292557795, 15.878769915207462},
    {4.042929935166739, -2.808917465908714, 0.5000178451051316},
    {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
    {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
    {2.3465413258596377, -1.7097828382687081, 0.42323551169305323},
};

size_t us_newton_scratch(size_t rows, size_t cols) {
  size_t narrow = rows < cols ? rows : cols;
  return 2 * rows * cols + 2 * narrow * narrow;
}

static double norm_of(const float *x, size_t n) {
  double sum = 0.0;
  for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
  return sqrt(sum);
}

/* x (m, n), m <= n: x <- a x + (b s + c s s) x with s = x x^T; s, t (m, m), y (m, n) are scratch. */
static void newton_step(const double abc[3], float *x, size_t m, size_t n, float *s, float *t, float *y) {
  us_seq_gemm(false, true, m, m, n, 1.0f, x, n, x, n, 0.0f, s, m);
  memcpy(t, s, m * m * sizeof *t);
  us_seq_gemm(false, false, m, m, m, (float)abc[2], s, m, s, m, (float)abc[1], t, m);
  memcpy(y, x, m * n * sizeof *y);
  us_seq_gemm(false, false, m, n, m, 1.0f, t, m, y, n, (float)abc[0], x, n);
}

void us_newton_orthogonalise(enum us_newton kind, float *g, size_t rows, size_t cols, float *scratch) {
  bool tall = rows > cols;
  size_t m = tall ? cols : rows, n = tall ? rows : cols;
  float *x = scratch, *y = x + m * n, *s = y + m * n, *t = s + m * m;
  double norm = norm_of(g, rows * cols);
  double divisor = kind == US_NEWTON_POLAR_EXPRESS ? 1.02 * norm + 1e-6 : norm + 1e-7;
  for (size_t i = 0; i < m; i++)
    for (size_t j = 0; j < n; j++) x[i * n + j] = (float)((double)g[tall ? j * m + i : i * n + j] / divisor);
  const double(*table)[3] = kind == US_NEWTON_POLAR_EXPRESS ? polar_express : newton_schulz;
  for (int step = 0; step < 5; step++) newton_step(table[step], x, m, n, s, t, y);
  for (size_t i = 0; i < m; i++)
    for (size_t j = 0; j < n; j++) g[tall ? j * m + i : i * n + j] = x[i * n + j];
}

void us_muon_update(const struct us_optim *optim, double rate, double decay, float *value, const float *grad,
                    float *moment, size_t rows, size_t cols, float *scratch) {
  size_t n = rows * cols, wide = rows > cols ? rows : cols;
  float mu = (float)optim->momentum, *update = scratch;
  for (size_t i = 0; i < n; i++) {
    moment[i] = mu * moment[i] + grad[i];
    update[i] = optim->nesterov ? grad[i] + mu * moment[i] : moment[i];
  }
  us_newton_orthogonalise(optim->newton, update, rows, cols, scratch + n);
  float keep = (float)(1.0 - rate * decay), scale = (float)(rate * 0.2 * sqrt((double)wide));
  for (size_t i = 0; i < n; i++) value[i] = value[i] * keep - scale * update[i];
}
