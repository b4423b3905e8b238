/* lab_gemm.cu: products of 8 rows with streamed weights at the widths of MiMo-V2.5-Pro, one of four ranks, and at small odd
 * sizes: samples against double, mistakes that must show, single weights exactly, and speed. */
#include "formats/bf16.h"
#include "lab_engine.h"

static const uint32_t SAMPLES = 512, MUTANTS = 32, HOT = 12, PAD = 5;
static const double ROUND_BYTES = 6e8; /* a round's: far more than the L2 cache keeps */

struct gemm_case {
  const char *name;
  enum us_format format;
  uint32_t rows, cols, parts;
  enum us_engine_epilogue epilogue;
  uint32_t tile_rows; /* 0: lab_weights_make's choice */
  bool timed;
};

static const struct gemm_case cases[] = {
    {"qkv", US_FORMAT_FP8, 6784, 6144, 1, US_ENGINE_STORE, 0, true},
    {"qkv", US_FORMAT_MXFP4, 6784, 6144, 1, US_ENGINE_STORE, 32, true},
    {"qkv, tiles of 16", US_FORMAT_MXFP4, 6784, 6144, 1, US_ENGINE_STORE, 16, true},
    {"o_proj", US_FORMAT_FP8, 6144, 4096, 1, US_ENGINE_PUSH, 0, true},
    {"o_proj", US_FORMAT_BF16, 6144, 4096, 1, US_ENGINE_PUSH, 0, true},
    {"head", US_FORMAT_BF16, 38144, 6144, 1, US_ENGINE_STORE, 0, true},
    {"router", US_FORMAT_F32, 384, 6144, 4, US_ENGINE_STORE, 0, true},
    {"router", US_FORMAT_BF16, 384, 6144, 4, US_ENGINE_STORE, 0, true},
    {"dense gate and up", US_FORMAT_MXFP4, 8192, 6144, 1, US_ENGINE_SWIGLU, 0, true},
    {"dense gate and up", US_FORMAT_FP8, 8192, 6144, 1, US_ENGINE_SWIGLU, 0, true},
    {"dense gate and up", US_FORMAT_BF16, 8192, 6144, 1, US_ENGINE_SWIGLU, 0, true},
    {"small", US_FORMAT_FP8, 40, 64, 1, US_ENGINE_STORE, 0, false},
    {"small", US_FORMAT_FP8, 208, 96, 1, US_ENGINE_STORE, 0, false},
    {"small", US_FORMAT_FP8, 192, 512, 2, US_ENGINE_PUSH, 0, false},
    {"small", US_FORMAT_FP8, 192, 128, 1, US_ENGINE_SWIGLU, 0, false},
    {"small", US_FORMAT_MXFP4, 70, 64, 1, US_ENGINE_STORE, 0, false},
    {"small", US_FORMAT_MXFP4, 70, 96, 1, US_ENGINE_STORE, 32, false},
    {"small", US_FORMAT_MXFP4, 96, 768, 3, US_ENGINE_PUSH, 0, false},
    {"small", US_FORMAT_MXFP4, 192, 96, 1, US_ENGINE_SWIGLU, 0, false},
    {"small", US_FORMAT_BF16, 24, 128, 1, US_ENGINE_STORE, 0, false},
    {"small", US_FORMAT_BF16, 100, 1152, 3, US_ENGINE_STORE, 0, false},
    {"small", US_FORMAT_BF16, 64, 96, 1, US_ENGINE_SWIGLU, 0, false},
    {"small", US_FORMAT_F32, 20, 96, 1, US_ENGINE_STORE, 0, false},
    {"small", US_FORMAT_F32, 33, 768, 2, US_ENGINE_STORE, 0, false},
};

/* ---- a list of products ------------------------------------------------------------------------------------------- */

struct problem {
  const struct gemm_case *of;
  struct lab_weights w;
  uint32_t outputs; /* columns of a result */
  char shape[96];
};

/* One product and, for PUSH, what adds it up; returns where the result will be. */
static void *add_product(struct lab_run *run, const struct problem *p, uint32_t index, const void *operand,
                         bool reduce) {
  const struct gemm_case *c = p->of;
  size_t bytes = c->epilogue == US_ENGINE_SWIGLU ? (size_t)p->outputs * 16
                                                 : sizeof(float) * 8 * (p->outputs + PAD) * c->parts;
  void *out = lab_buffer(run, bytes, 0xff);
  uint32_t op = lab_add_gemm(run, 0, &p->w, index, operand, out, c->epilogue);
  lab_op(run, 0, op)->gemm.out_stride = p->outputs + PAD;
  if (c->epilogue != US_ENGINE_PUSH || !reduce) return out;
  struct us_engine_reduce r = {};
  r.residual = (float *)out, r.addends = c->parts, r.replace = true;
  lab_add_reduce(run, 0, r);
  return out;
}

/* The result of one product, (8, outputs): parts added. */
static std::vector<double> result_of(const struct problem *p, const void *out) {
  uint32_t n = p->outputs, stored = p->of->epilogue == US_ENGINE_STORE, stride = stored ? n + PAD : n;
  std::vector<double> y(8 * (size_t)n, 0);
  if (p->of->epilogue == US_ENGINE_SWIGLU) {
    std::vector<float> rows = lab_operand_rows(out, n);
    for (size_t i = 0; i < y.size(); i++) y[i] = rows[i];
    return y;
  }
  uint32_t parts = stored ? p->of->parts : 1;
  std::vector<float> got = lab_download((const float *)out, (size_t)parts * 8 * stride);
  for (uint32_t i = 0; i < parts * 8; i++)
    for (uint32_t k = 0; k < n; k++) y[(size_t)(i % 8) * n + k] += got[(size_t)i * stride + k];
  return y;
}

static uint64_t count_written_past(const struct problem *p, const void *out) {
  uint32_t n = p->outputs;
  uint64_t bad = 0;
  if (p->of->epilogue != US_ENGINE_STORE) return 0;
  std::vector<uint32_t> got = lab_download((const uint32_t *)out, (size_t)p->of->parts * 8 * (n + PAD));
  for (size_t i = 0; i < got.size(); i++) bad += i % (n + PAD) >= n && got[i] != UINT32_MAX;
  return bad;
}

/* ---- checks ------------------------------------------------------------------------------------------------------- */

/* What one output should be, with a mistake in gate or the only matrix. */
static struct lab_sum expect(const struct problem *p, uint32_t index, uint32_t n, const float *x,
                             enum lab_mutation mutation) {
  std::vector<double> row = lab_row(&p->w, index, 0, n, mutation);
  struct lab_sum g = lab_dot(&p->w.cut, row.data(), x);
  if (p->of->epilogue != US_ENGINE_SWIGLU) return g;
  std::vector<double> up = lab_row(&p->w, index, 1, n, LAB_NONE);
  struct lab_sum u = lab_dot(&p->w.cut, up.data(), x),
                 h = {lab_silu(g.value) * u.value, 0, lab_gated_allowed(&g, &u)};
  return h;
}

static void check_samples(struct lab_result *r, const struct problem *p,
                          const std::vector<std::vector<double>> &y, const std::vector<float> &x,
                          uint64_t *state) {
  std::vector<double> ratios[LAB_MUTATIONS];
  uint64_t bad = 0;
  for (const std::vector<double> &result : y)
    for (double v : result) bad += v != v;
  r->bad += bad > 0;
  for (uint32_t i = 0; i < SAMPLES; i++) {
    uint32_t index = i % p->w.count, token = i / p->w.count % 8,
             n = (uint32_t)(lab_random(state) % p->outputs);
    const float *row = &x[(size_t)token * p->w.cols];
    struct lab_sum s = expect(p, index, n, row, LAB_NONE);
    double got = y[index][(size_t)token * p->outputs + n];
    lab_sample(r, got - s.value, s.allowed, s.magnitude);
    for (int m = LAB_SCALE; i < MUTANTS && m < LAB_MUTATIONS; m++)
      if (lab_mutation_applies((enum lab_mutation)m, p->w.format))
        ratios[m].push_back(fabs(got - expect(p, index, n, row, (enum lab_mutation)m).value) / s.allowed);
  }
  for (int m = LAB_SCALE; m < LAB_MUTATIONS; m++)
    if (!ratios[m].empty()) lab_mutation(r, lab_mutation_names[m], ratios[m]);
}

/* Rows with a single one: each output is one weight, exactly (FP32: to the last 2 bits, which three multiplies may lose). */
static void check_single_weights(const struct problem *p, uint64_t *state) {
  uint32_t K = p->w.cols, column[HOT][8];
  struct lab_run run;
  std::vector<void *> out;
  lab_run_begin(&run, lab_ranks{1, false, p->of->epilogue == US_ENGINE_PUSH ? p->outputs : 96, p->of->parts});
  for (uint32_t h = 0; h < HOT; h++) {
    std::vector<float> x(8 * (size_t)K, 0.0f);
    for (uint32_t t = 0; t < 8; t++) {
      column[h][t] = (uint32_t)(lab_random(state) % K);
      x[(size_t)t * K + column[h][t]] = ldexpf(1, (int)t - 4);
    }
    out.push_back(add_product(&run, p, h % p->w.count, lab_keep(&run, lab_operand(x, K)), true));
  }
  lab_upload_ops(&run);
  lab_launch(&run, 1);
  uint64_t checked = 0, bad = 0, first = 0;
  for (uint32_t h = 0; h < HOT; h++) {
    std::vector<double> y = result_of(p, out[h]);
    for (uint32_t i = 0; i < 64; i++) {
      uint32_t n = (uint32_t)(lab_random(state) % p->outputs);
      std::vector<double> row = lab_row(&p->w, h % p->w.count, 0, n, LAB_NONE);
      for (uint32_t t = 0; t < 8; t++, checked++) {
        float want = (float)ldexp(row[column[h][t]], (int)t - 4);
        double slack = p->w.format == US_FORMAT_F32 ? LAB_TRUNC * fabs(want) : 0;
        if (!(fabs(y[(size_t)t * p->outputs + n] - want) <= slack) && bad++ == 0) first = checked;
      }
    }
  }
  char name[160];
  snprintf(name, sizeof name, "%s %s %s: a single weight comes through", p->of->name, p->shape,
           us_format_name(p->w.format));
  us_gpu_report(name, checked, bad, first);
  lab_run_end(&run);
}

enum order { STEADY, CHAINED, RESIDENT };

static double time_list(const struct problem *p, const void *operand, enum order order) {
  struct lab_run run;
  lab_run_begin(&run, lab_ranks{1, false, p->of->epilogue == US_ENGINE_PUSH ? p->outputs : 96, p->of->parts});
  for (uint32_t i = 0; i < p->w.count; i++) add_product(&run, p, i, operand, order == CHAINED);
  lab_upload_ops(&run, order == CHAINED);
  double us = (order == RESIDENT ? lab_resident_us(&run, 10) : lab_round_us(&run, 10)) / p->w.count;
  lab_run_end(&run);
  return us;
}

static void lab_one(const struct gemm_case *c, uint64_t seed) {
  struct problem p = {c, lab_weights(c->format, c->rows, c->cols),
                      c->epilogue == US_ENGINE_SWIGLU ? c->rows / 2 : c->rows, ""};
  double bytes = (double)us_matrix_data_bytes(c->format, c->rows, c->cols);
  p.w.count = c->timed ? (uint32_t)fmin(fmax(ROUND_BYTES / bytes, 2), 24) : 2;
  p.w.gated = c->epilogue == US_ENGINE_SWIGLU, p.w.parts = c->parts;
  lab_weights_make(&p.w, seed, c->tile_rows);
  snprintf(p.shape, sizeof p.shape, "(%u, %u) x 8", c->rows, c->cols);

  uint64_t state = seed + c->rows;
  std::vector<float> x = lab_rows(c->cols, &state);
  struct lab_run run;
  lab_run_begin(&run, lab_ranks{1, false, c->epilogue == US_ENGINE_PUSH ? p.outputs : 96, c->parts});
  void *operand = lab_keep(&run, lab_operand(x, c->cols));
  std::vector<void *> out;
  for (uint32_t i = 0; i < p.w.count; i++) out.push_back(add_product(&run, &p, i, operand, true));
  lab_upload_ops(&run);
  lab_launch(&run, 1);

  struct lab_result r = {c->name, p.shape, us_format_name(c->format)};
  std::vector<std::vector<double>> y;
  for (void *o : out) y.push_back(result_of(&p, o)), r.bad += count_written_past(&p, o) > 0;
  check_samples(&r, &p, y, x, &state);
  r.bytes = (double)p.w.matrix.matrix_bytes, r.flops = 2.0 * 8 * c->rows * c->cols;
  if (c->timed) {
    r.us = time_list(&p, operand, STEADY), r.chained_us = time_list(&p, operand, CHAINED);
    r.resident_us = time_list(&p, operand, RESIDENT);
  }
  lab_report(&r);
  if (c->epilogue != US_ENGINE_SWIGLU) check_single_weights(&p, &state);
  lab_run_end(&run);
  lab_weights_free(&p.w);
}

void lab_gemm(uint64_t seed) {
  for (const struct gemm_case &c : cases)
    if (!c.timed || !us_gpu_patience()) lab_one(&c, seed);
}
