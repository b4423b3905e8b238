/* lab_experts.cu: the expert stream at the widths of MiMo-V2.5-Pro, one of four ranks: correctness against double on samples
 * of every pass, mutations, Inf and width invariance, and speed with layers back to back. */
#include "formats/bf16.h"
#include "kernels/experts/experts_gpu.h"
#include "kernels/pages/pages_gpu.h"
#include "lab.h"
extern "C" {
#include "kernels/linear/linear_impl.h"
}

static const uint32_t D = 6144, F = 512, E = 384, TOP_K = 8, LAYERS = 4, PASSES = 32, R = 8;
static const double UNIT = 0x1p-24;
/* Two multiplies a group truncate at 2^-22 (4 units each); 12 groups and 16 warps add in FP32; two factors. */
static const double INNER_UNITS = 2 * 4 + 12 + 16 + 2;
/* Two multiplies, 4 groups, weight, 8 experts, 2 levels of slices. */
static const double OUTER_UNITS = 2 * 4 + 4 + 1 + 8 + 2;

enum part { GATE, UP, DOWN };

/* Routing of all passes, and what the kernels read of it. */
struct routing {
  std::vector<uint32_t> begin, matrix, expert; /* (passes + 1), (total), (total) */
  std::vector<int32_t> pair, global;           /* (total, 8) */
  std::vector<uint32_t> pair_row, pair_entry;  /* (passes * pairs): token row; entry of `matrix` */
  std::vector<float> weight;                   /* (passes * pairs) */
  uint32_t pairs;
};

static struct us_init init_of(uint64_t seed, uint32_t layer, uint32_t expert, enum part part) {
  static const char *const names[] = {"gate", "up", "down"};
  char name[96];
  snprintf(name, sizeof name, "model.layers.%u.mlp.experts.%u.%s_proj.weight", layer, expert, names[part]);
  struct us_init init = {us_philox_key(seed), us_init_name(name), 0,
                         sqrtf(3.0f / (float)(part == DOWN ? F : D))};
  return init;
}

/* Rows 0..rows-1 routed to 8 different experts each, uniformly. */
static struct routing route(uint64_t seed, uint32_t rows) {
  struct routing r;
  r.pairs = rows * TOP_K;
  r.begin.push_back(0);
  for (uint32_t pass = 0; pass < PASSES; pass++) {
    std::vector<std::vector<uint32_t>> rows_of(E);
    for (uint32_t row = 0; row < rows; row++) {
      uint64_t state = seed + pass * 1000 + row; /* a row's choice does not depend on how many there are */
      for (uint32_t chosen = 0; chosen < TOP_K;) {
        std::vector<uint32_t> &at = rows_of[lab_random(&state) % E];
        if (!at.empty() && at.back() == row) continue;
        at.push_back(row);
        chosen++;
      }
    }
    uint32_t next = 0;
    for (uint32_t e = 0; e < E; e++) {
      if (rows_of[e].empty()) continue;
      size_t entry = r.matrix.size();
      r.matrix.push_back(pass % LAYERS * E + e);
      r.expert.push_back(e);
      r.pair.resize(8 * (entry + 1), -1);
      r.global.resize(8 * (entry + 1), -1);
      for (uint32_t row : rows_of[e]) {
        r.pair[entry * 8 + row] = (int32_t)next;
        r.global[entry * 8 + row] = (int32_t)(pass * r.pairs + next++);
        r.pair_row.push_back(row);
        r.pair_entry.push_back((uint32_t)entry);
        r.weight.push_back(0.05f + (float)((e * 7 + row * 3 + pass) % 31) / 100.0f);
      }
    }
    r.begin.push_back((uint32_t)r.matrix.size());
  }
  return r;
}

/* ---- Weights on the device ---- */

/* Make `count` matrices of a layer row-major, as a checkpoint has them, and pack them. */
static void make_pages(uint64_t seed, uint32_t layer, struct us_pages pages, bool inner, uint8_t *out) {
  uint32_t rows = inner ? F : D, cols = inner ? D : F, kinds = inner ? 2 : 1;
  size_t codes_each = us_matrix_data_bytes(US_FORMAT_MXFP4, rows, cols);
  size_t scales_each = us_matrix_scale_bytes(US_FORMAT_MXFP4, rows, cols, 0);
  uint8_t *codes[2], *scales[2];
  std::vector<struct us_pages_source> sources(E);
  for (uint32_t kind = 0; kind < kinds; kind++) {
    std::vector<struct us_init> inits(E);
    for (uint32_t e = 0; e < E; e++) inits[e] = init_of(seed, layer, e, inner ? (enum part)kind : DOWN);
    struct us_init *device_inits = lab_upload(inits);
    US_CUDA(cudaMalloc(&codes[kind], codes_each * E));
    US_CUDA(cudaMalloc(&scales[kind], scales_each * E));
    US_CUDA(us_synthetic_gpu(US_FORMAT_MXFP4, device_inits, E, rows, cols, 0, codes[kind], scales[kind], 0));
    for (uint32_t e = 0; e < E; e++) {
      struct us_matrix *w = &sources[e].w[kind];
      memset(w, 0, sizeof *w);
      w->format = US_FORMAT_MXFP4, w->rows = rows, w->cols = cols;
      w->data = codes[kind] + e * codes_each, w->scales = scales[kind] + e * scales_each;
      sources[e].matrices = kinds, sources[e].first_row = sources[e].first_col = 0;
    }
    US_CUDA(cudaDeviceSynchronize());
    US_CUDA(cudaFree(device_inits));
  }
  struct us_pages_source *device_sources = lab_upload(sources);
  US_CUDA(us_pages_pack_gpu(&pages, device_sources, E, out, 0));
  US_CUDA(cudaDeviceSynchronize());
  US_CUDA(cudaFree(device_sources));
  for (uint32_t kind = 0; kind < kinds; kind++) {
    US_CUDA(cudaFree(codes[kind]));
    US_CUDA(cudaFree(scales[kind]));
  }
}

/* ---- Truth ---- */

enum mutation { NONE, SCALE, NIBBLES };

/* One row of a synthetic weight as stored, made on the CPU, with a mistake if asked for. */
static void make_row(uint64_t seed, uint32_t matrix, enum part part, uint32_t row, enum mutation mutation,
                     uint8_t *codes, uint8_t *scales) {
  uint32_t K = part == DOWN ? F : D;
  struct us_init init = init_of(seed, matrix / E, matrix % E, part);
  std::vector<float> values(K);
  struct us_err err;
  for (uint32_t q = 0; q < K / 4; q++) us_init_quad(&init, row, q, &values[4 * q]);
  if (us_mxfp4_encode(values.data(), K, US_SCALE_MSE, codes, scales, &err) != US_OK) exit(3);
  if (mutation == SCALE) scales[7]++;
  for (uint32_t i = 0; mutation == NIBBLES && i < K / 2; i++)
    codes[i] = (uint8_t)(codes[i] >> 4 | codes[i] << 4);
}

struct sum {
  double value, magnitude, reference; /* exact, sum of |w x|, and what the CPU's definition gives */
};

static struct sum dot(uint64_t seed, uint32_t matrix, enum part part, uint32_t row, enum mutation mutation,
                      const float *x) {
  uint32_t K = part == DOWN ? F : D;
  std::vector<uint8_t> codes(K / 2), scales(K / 32);
  std::vector<float> w(K), packed(K);
  make_row(seed, matrix, part, row, mutation, codes.data(), scales.data());
  struct us_matrix m = {US_FORMAT_MXFP4, 1, K, codes.data(), scales.data(), 0};
  us_matrix_decode_row(&m, 0, w.data());
  struct sum s = {0, 0, 0};
  for (uint32_t k = 0; k < K; k++) {
    s.value += (double)w[k] * x[k];
    s.magnitude += fabs((double)w[k] * x[k]);
    packed[us_linear_packed_index(k)] = x[k];
  }
  float reference;
  struct us_linear_args args = {};
  args.w = &m, args.x = packed.data(), args.x_stride = K, args.y = &reference, args.y_stride = 1, args.R = 1,
  args.end = 1;
  us_linear_plain(&args);
  s.reference = reference;
  return s;
}

static double silu(double g) {
  return g / (1 + exp(-g));
}

/* What an inner activation may differ by: both sums' errors through silu(g) u, FP32 steps, and half a unit of bf16. */
static double inner_allowed(const struct sum &g, const struct sum &u, double units) {
  double dg = units * UNIT * g.magnitude, du = units * UNIT * u.magnitude, h = silu(g.value) * u.value;
  double before =
      1.1 * dg * (fabs(u.value) + du) + (fabs(silu(g.value)) + 1.1 * dg) * du + 8 * UNIT * fabs(h);
  int exponent;
  frexp(fabs(h) + before, &exponent);
  return before + ldexp(1, exponent - 9); /* half a unit of 8 significant bits */
}

static const unsigned SAMPLES = 1024, MUTANTS = 48;

static void check_inner(struct lab_result *r, uint64_t seed, const struct routing &routes,
                        const std::vector<float> &x, const std::vector<uint16_t> &inner) {
  std::vector<double> ratios[2];
  uint64_t state = seed;
  for (unsigned i = 0; i < SAMPLES; i++) {
    size_t pair = (size_t)i * routes.pair_row.size() / SAMPLES;
    uint32_t f = (uint32_t)(lab_random(&state) % F), matrix = routes.matrix[routes.pair_entry[pair]];
    const float *row = &x[routes.pair_row[pair] * D];
    struct sum g = dot(seed, matrix, GATE, f, NONE, row), u = dot(seed, matrix, UP, f, NONE, row);
    double got = us_bf16_to_f32(inner[pair * F + f]), allowed = inner_allowed(g, u, INNER_UNITS);
    lab_sample(r, got - silu(g.value) * u.value, allowed);
    double both = inner_allowed(g, u, INNER_UNITS + D / 16 + 6);
    r->reference_worst = fmax(r->reference_worst, fabs(got - silu(g.reference) * u.reference) / both);
    for (int m = 0; i < MUTANTS && m < 2; m++) {
      struct sum wrong = dot(seed, matrix, GATE, f, m ? NIBBLES : SCALE, row);
      ratios[m].push_back(fabs(got - silu(wrong.value) * u.value) / inner_allowed(wrong, u, INNER_UNITS));
    }
  }
  lab_mutation(r, "a scale byte + 1", ratios[0]);
  lab_mutation(r, "nibbles swapped", ratios[1]);
}

static void check_outer(struct lab_result *r, uint64_t seed, const struct routing &routes,
                        const std::vector<uint16_t> &inner, const std::vector<float> &y) {
  static const char *const names[] = {"a scale byte + 1", "nibbles swapped", "an expert skipped",
                                      "a row not routed left in"};
  std::vector<double> ratios[4];
  uint64_t state = seed + 1;
  for (unsigned i = 0; i < SAMPLES; i++) {
    uint32_t pass = i % PASSES, row = i / PASSES % R, d = (uint32_t)(lab_random(&state) % D);
    double value = 0, magnitude = 0, reference = 0, wrong[4] = {0, 0, 0, 0};
    bool first = true;
    int stranger = -1;
    for (size_t pair = (size_t)pass * routes.pairs; pair < (size_t)(pass + 1) * routes.pairs; pair++) {
      if (routes.pair_row[pair] != row) {
        stranger = (int)pair;
        continue;
      }
      std::vector<float> h(F);
      for (uint32_t f = 0; f < F; f++) h[f] = us_bf16_to_f32(inner[pair * F + f]);
      uint32_t matrix = routes.matrix[routes.pair_entry[pair]];
      double weight = routes.weight[pair];
      struct sum s = dot(seed, matrix, DOWN, d, NONE, h.data());
      value += weight * s.value, magnitude += fabs(weight) * s.magnitude;
      reference = fmaf((float)weight, (float)s.reference, (float)reference);
      for (int m = 0; m < 4; m++) wrong[m] += weight * (m == 2 && first ? 0 : s.value);
      for (int m = 0; i < MUTANTS && first && m < 2; m++)
        wrong[m] += weight * (dot(seed, matrix, DOWN, d, m ? NIBBLES : SCALE, h.data()).value - s.value);
      first = false;
    }
    double got = y[((size_t)pass * R + row) * D + d], allowed = OUTER_UNITS * UNIT * magnitude;
    lab_sample(r, got - value, allowed);
    r->worst_units = fmax(r->worst_units, fabs(got - value) / (UNIT * magnitude));
    double both = (OUTER_UNITS + F / 16 + 6 + TOP_K) * UNIT * magnitude;
    r->reference_worst = fmax(r->reference_worst, fabs(got - reference) / both);
    if (i >= MUTANTS) continue;
    std::vector<float> h(F);
    for (uint32_t f = 0; f < F; f++) h[f] = us_bf16_to_f32(inner[(size_t)stranger * F + f]);
    wrong[3] += routes.weight[stranger] *
                dot(seed, routes.matrix[routes.pair_entry[stranger]], DOWN, d, NONE, h.data()).value;
    for (int m = 0; m < 4; m++) ratios[m].push_back(fabs(got - wrong[m]) / allowed);
  }
  for (int m = 0; m < 4; m++) lab_mutation(r, names[m], ratios[m]);
}

/* ---- Runs ---- */

struct bench {
  struct us_experts_gpu args;
  std::vector<void *> owned;
};

template <class T> static T *keep(struct bench *b, T *device) {
  b->owned.push_back((void *)device);
  return device;
}

static void bind_routes(struct bench *b, const struct routing &routes) {
  struct us_experts_gpu *a = &b->args;
  a->passes = PASSES, a->total = routes.begin.back(), a->pairs = routes.pairs;
  a->begin = keep(b, lab_upload(routes.begin)), a->matrix = keep(b, lab_upload(routes.matrix));
  a->pair = keep(b, lab_upload(routes.pair)), a->global_pair = keep(b, lab_upload(routes.global));
  a->pair_weight = keep(b, lab_upload(routes.weight));
}

static void bind_rows(struct bench *b, const std::vector<float> &x, uint32_t rows) {
  float *device = keep(b, lab_upload(x)), *unscale;
  void *operand;
  US_CUDA(cudaMalloc(&operand, us_rows_bytes(D)));
  US_CUDA(cudaMalloc(&unscale, 8 * sizeof *unscale));
  US_CUDA(us_rows_pack_gpu(device, rows, D, D, operand, unscale, 0));
  b->args.operand = keep(b, operand), b->args.unscale = keep(b, unscale);
}

/* Poisoned outputs, then both stages. */
static void run(struct bench *b, std::vector<uint16_t> *ret_inner, std::vector<float> *ret_y) {
  size_t inner = (size_t)PASSES * b->args.pairs * F, y = (size_t)PASSES * R * D;
  US_CUDA(cudaMemset(b->args.inner, 0xff, inner * 2));
  US_CUDA(cudaMemset(b->args.y, 0xff, y * 4));
  US_CUDA(us_experts_inner_gpu(&b->args, 0));
  US_CUDA(us_experts_outer_gpu(&b->args, 0));
  US_CUDA(cudaDeviceSynchronize());
  *ret_inner = lab_download(b->args.inner, inner);
  *ret_y = lab_download(b->args.y, y);
}

static void check_written(const std::vector<uint16_t> &inner, const std::vector<float> &y) {
  uint64_t bad = 0;
  for (uint16_t h : inner) bad += (h & 0x7fffu) > 0x7f80u;
  for (float v : y) bad += v != v;
  us_gpu_report("experts: every output is written and a number", inner.size() + y.size(), bad, 0);
}

/* Row by row, what another run gave: rows of `mask` may differ. */
static void check_rows_same(const char *check, const std::vector<float> &a, const std::vector<float> &b,
                            uint32_t mask) {
  std::vector<float> left, right;
  for (size_t i = 0; i < a.size(); i++)
    if (!(mask >> (i / D % R) & 1u)) left.push_back(a[i]), right.push_back(b[i]);
  lab_same_bits(check, left.data(), right.data(), left.size());
}

static void invariance(struct bench *b, uint64_t seed, std::vector<float> x, const std::vector<float> &y,
                       const struct routing &routes) {
  std::vector<uint16_t> inner;
  std::vector<float> other;
  x[3 * D + 77] = INFINITY;
  bind_rows(b, x, R);
  run(b, &inner, &other);
  check_rows_same("experts: an Inf in one row leaves the others alone", y, other, 1u << 3);
  bind_rows(b, x, 1);
  bind_routes(b, route(seed, 1));
  run(b, &inner, &other);
  check_rows_same("experts: a row alone has the bits it has among eight", y, other, 0xfeu);
}

void lab_experts(uint64_t seed) {
  struct bench b = {};
  struct us_experts_gpu *a = &b.args;
  uint64_t state = seed;
  a->inner_pages = us_experts_inner_pages(US_FORMAT_MXFP4, D, F);
  a->outer_pages = us_experts_outer_pages(US_FORMAT_MXFP4, D, F);
  uint64_t inner_each = us_pages_bytes(&a->inner_pages), outer_each = us_pages_bytes(&a->outer_pages);
  uint8_t *inner_weights, *outer_weights;
  US_CUDA(cudaMalloc(&inner_weights, inner_each * LAYERS * E));
  US_CUDA(cudaMalloc(&outer_weights, outer_each * LAYERS * E));
  for (uint32_t layer = 0; layer < LAYERS; layer++) {
    make_pages(seed, layer, a->inner_pages, true, inner_weights + layer * E * inner_each);
    make_pages(seed, layer, a->outer_pages, false, outer_weights + layer * E * outer_each);
  }
  a->inner_weights = keep(&b, inner_weights), a->outer_weights = keep(&b, outer_weights);
  struct routing routes = route(seed, R);
  std::vector<float> x = lab_rows(D, &state), y;
  std::vector<uint16_t> inner;
  US_CUDA(cudaMalloc(&a->inner, (size_t)PASSES * 64 * F * 2));
  US_CUDA(cudaMalloc(&a->y, (size_t)PASSES * R * D * 4));
  bind_routes(&b, routes);
  bind_rows(&b, x, R);
  run(&b, &inner, &y);
  check_written(inner, y);

  char shape[96];
  snprintf(shape, sizeof shape, "%.1f of 384 experts (1024, 6144) x 8 rows, %u layers",
           (double)a->total / PASSES, PASSES);
  struct lab_result r = {"experts.inner", shape, "mxfp4", INNER_UNITS};
  check_inner(&r, seed, routes, x, inner);
  r.bytes = (double)inner_each * a->total, r.flops = 2.0 * 8 * 2 * F * D * a->total;
  r.us = lab_median_us([&]() { return us_experts_inner_gpu(a, 0); });
  a->resident = true;
  r.resident_us = lab_median_us([&]() { return us_experts_inner_gpu(a, 0); });
  a->resident = false;
  lab_report(&r);

  snprintf(shape, sizeof shape, "%.1f of 384 experts (6144, 512) x 8 rows, %u layers",
           (double)a->total / PASSES, PASSES);
  r = {"experts.outer", shape, "mxfp4", OUTER_UNITS};
  check_outer(&r, seed, routes, inner, y);
  run(&b, &inner, &y); /* the timed runs wrote meaningless activations */
  r.bytes = (double)outer_each * a->total, r.flops = 2.0 * 8 * F * D * a->total;
  r.us = lab_median_us([&]() { return us_experts_outer_gpu(a, 0); });
  a->resident = true;
  r.resident_us = lab_median_us([&]() { return us_experts_outer_gpu(a, 0); });
  a->resident = false;
  lab_report(&r);
  invariance(&b, seed, x, y, routes);
  US_CUDA(cudaFree(a->inner));
  US_CUDA(cudaFree(a->y));
  for (void *device : b.owned) US_CUDA(cudaFree(device));
}
