/* lab_linear.cu: FP8 projections at the widths of one of four ranks of MiMo-V2.5-Pro: qkv (6784, 6144) and o_proj
 * (6144, 4096), matrices back to back. */
#include "kernels/linear/linear_gpu.h"
#include "kernels/pages/pages_gpu.h"
#include "lab.h"
extern "C" {
#include "kernels/linear/linear_impl.h"
}

static const uint32_t MATRICES = 24, PASSES = 96, SAMPLES = 512, MUTANTS = 48;
static const double UNIT = 0x1p-24;

struct problem {
  const char *name;
  uint32_t N, K;
  struct us_linear_gpu args = {};
  uint8_t *codes = NULL;
  float *scales = NULL;
  std::vector<float> x = {};
};

/* 4 chained multiplies truncate at 2^-22 (4 units each); FP32: their sum, K / 2048 blocks a warp, 16 warps, 2 factors, and
 * the rounding of code * scale that the definition has. */
static double units_of(uint32_t K) {
  return 16 + 1 + K / 2048.0 + 16 + 2 + 1;
}

static void make(struct problem *p, uint64_t seed) {
  std::vector<struct us_init> inits(MATRICES);
  for (uint32_t m = 0; m < MATRICES; m++)
    inits[m] = {us_philox_key(seed), us_init_name(p->name) + m, 0, sqrtf(3.0f / p->K)};
  struct us_init *device_inits = lab_upload(inits);
  size_t codes = us_matrix_data_bytes(US_FORMAT_FP8, p->N, p->K),
         scales = us_matrix_scale_bytes(US_FORMAT_FP8, p->N, p->K, 0);
  US_CUDA(cudaMalloc(&p->codes, codes * MATRICES));
  US_CUDA(cudaMalloc(&p->scales, scales * MATRICES));
  US_CUDA(us_synthetic_gpu(US_FORMAT_FP8, device_inits, MATRICES, p->N, p->K, 0, p->codes, p->scales, 0));
  std::vector<struct us_pages_source> sources(MATRICES);
  for (uint32_t m = 0; m < MATRICES; m++) {
    struct us_matrix w = {
        US_FORMAT_FP8, p->N, p->K, p->codes + m * codes, (uint8_t *)p->scales + m * scales, 0};
    sources[m].w[0] = w, sources[m].matrices = 1, sources[m].first_row = sources[m].first_col = 0;
  }
  struct us_pages_source *device_sources = lab_upload(sources);
  uint8_t *weights;
  p->args.pages = us_linear_pages(US_FORMAT_FP8, p->N, p->K);
  US_CUDA(cudaMalloc(&weights, us_pages_bytes(&p->args.pages) * MATRICES));
  US_CUDA(us_pages_pack_gpu(&p->args.pages, device_sources, MATRICES, weights, 0));
  US_CUDA(cudaDeviceSynchronize());
  p->args.weights = weights;
  US_CUDA(cudaFree(device_inits));
  US_CUDA(cudaFree(device_sources));
}

struct sum {
  double value, magnitude, reference;
};

enum mutation { NONE, SCALE, SKIPPED };

/* Row n of matrix m with token row x, as stored on the device (pages_bits.cu shows that the CPU makes the same bytes). */
static struct sum dot(const struct problem *p, uint32_t m, uint32_t n, const float *x,
                      enum mutation mutation) {
  uint32_t K = p->K, blocks = K / 128;
  std::vector<uint8_t> codes = lab_download(p->codes + ((size_t)m * p->N + n) * K, K);
  std::vector<float> scales = lab_download(p->scales + ((size_t)m * (p->N / 128) + n / 128) * blocks, blocks);
  std::vector<float> w(K), packed(K);
  if (mutation == SCALE) scales[3] *= 1.0f + 0x1p-7f;
  for (uint32_t i = 0; mutation == SKIPPED && i < 32; i++) codes[64 + i] = 0;
  struct us_matrix matrix = {US_FORMAT_FP8, 1, K, codes.data(), scales.data(), 0};
  us_matrix_decode_row(&matrix, 0, w.data());
  struct sum s = {0, 0, 0};
  for (uint32_t k = 0; k < K; k++) {
    s.value += (double)w[k] * x[k];
    s.magnitude += fabs((double)w[k] * x[k]);
    packed[us_linear_packed_index(k)] = x[k];
  }
  float reference;
  struct us_linear_args args = {};
  args.w = &matrix, args.x = packed.data(), args.x_stride = K, args.y = &reference, args.y_stride = 1,
  args.R = 1, args.end = 1;
  us_linear_plain(&args);
  s.reference = reference;
  return s;
}

static void check(struct lab_result *r, const struct problem *p, const std::vector<float> &y,
                  const std::vector<uint32_t> &index, uint64_t *state) {
  std::vector<double> ratios[2];
  uint64_t unwritten = 0;
  for (float v : y) unwritten += v != v;
  us_gpu_report("linear: every output is written and a number", y.size(), unwritten, 0);
  for (uint32_t i = 0; i < SAMPLES; i++) {
    uint32_t pass = i % PASSES, n = (uint32_t)(lab_random(state) % p->N), token = i % 8;
    const float *x = &p->x[token * p->K];
    struct sum s = dot(p, index[pass], n, x, NONE);
    double got = y[((size_t)pass * 8 + token) * p->N + n], unit = UNIT * s.magnitude;
    lab_sample(r, got - s.value, r->tolerance * unit);
    r->worst_units = fmax(r->worst_units, fabs(got - s.value) / unit);
    double both = (r->tolerance + p->K / 16 + 6) * unit;
    r->reference_worst = fmax(r->reference_worst, fabs(got - s.reference) / both);
    for (int m = 0; i < MUTANTS && m < 2; m++)
      ratios[m].push_back(fabs(got - dot(p, index[pass], n, x, m ? SKIPPED : SCALE).value) /
                          (r->tolerance * unit));
  }
  lab_mutation(r, "a scale + 2^-7", ratios[0]);
  lab_mutation(r, "a group skipped", ratios[1]);
}

static void lab_one(const char *name, uint32_t N, uint32_t K, uint64_t seed) {
  struct problem p = {name, N, K};
  uint64_t state = seed + N;
  make(&p, seed);
  p.x = lab_rows(K, &state);
  float *x = lab_upload(p.x), *unscale;
  void *operand;
  std::vector<uint32_t> index(PASSES);
  for (uint32_t i = 0; i < PASSES; i++) index[i] = i * 7 % MATRICES;
  US_CUDA(cudaMalloc(&operand, us_rows_bytes(K)));
  US_CUDA(cudaMalloc(&unscale, 8 * sizeof *unscale));
  US_CUDA(us_rows_pack_gpu(x, 8, K, K, operand, unscale, 0));
  size_t outputs = (size_t)PASSES * 8 * N;
  US_CUDA(cudaMalloc(&p.args.y, outputs * sizeof(float)));
  US_CUDA(cudaMemset(p.args.y, 0xff, outputs * sizeof(float)));
  uint32_t *device_index = lab_upload(index);
  p.args.matrices = PASSES, p.args.opt_index = device_index, p.args.operand = operand,
  p.args.unscale = unscale;
  US_CUDA(us_linear_gpu(&p.args, 0));
  US_CUDA(cudaDeviceSynchronize());

  char shape[96];
  snprintf(shape, sizeof shape, "%s (%u, %u) x 8 rows, %u matrices", name, N, K, PASSES);
  struct lab_result r = {"linear", shape, "fp8", units_of(K)};
  check(&r, &p, lab_download(p.args.y, outputs), index, &state);
  r.bytes = (double)us_pages_bytes(&p.args.pages) * PASSES, r.flops = 2.0 * 8 * N * K * PASSES;
  r.us = lab_median_us([&]() { return us_linear_gpu(&p.args, 0); });
  p.args.resident = true;
  r.resident_us = lab_median_us([&]() { return us_linear_gpu(&p.args, 0); });
  lab_report(&r);
  void *owned[] = {p.codes, p.scales, (void *)p.args.weights, x, unscale, operand, p.args.y, device_index};
  for (void *device : owned) US_CUDA(cudaFree(device));
}

void lab_linear(uint64_t seed) {
  lab_one("qkv", 6784, 6144, seed);
  lab_one("o_proj", 6144, 4096, seed);
}
