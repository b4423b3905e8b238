/* train_experts_speed.cu: the products of mini and nano against cuBLAS a group at a time, in the same run, values and speed. */
#include "train_experts.h"
#include "kernels/experts/experts_train.h"
#include "kernels/experts/grouped_gemm.h"
#include "kernels/router/router_train.h"

#include <cublas_v2.h>

#define RUNS 5

static void blas(cublasStatus_t status) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  fprintf(stderr, "cublas: status %d\n", (int)status);
  exit(5);
}

static __global__ void fill_halves(uint16_t *v, uint64_t n, uint32_t seed) {
  uint64_t i = (uint64_t)blockIdx.x * 256 + threadIdx.x;
  if (i >= n) return;
  uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u + seed * 0xd1342543de82ef95u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u, z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  v[i] = us_bf16_from_f32((float)((z ^ z >> 31) >> 40) * 0x1p-23f - 1.0f);
}

static void fill(device_array<uint16_t> &v, uint32_t seed) {
  fill_halves<<<(uint32_t)((v.count + 255) / 256), 256>>>(v.at, v.count, seed);
}

static __global__ void fill_floats(float *v, uint64_t n) {
  uint64_t i = (uint64_t)blockIdx.x * 256 + threadIdx.x;
  if (i < n) v[i] = (float)(i * 2654435761u % 1000) * 0.01f;
}

static void fill(device_array<float> &v) {
  fill_floats<<<(uint32_t)((v.count + 255) / 256), 256>>>(v.at, v.count);
}

/* Values further apart than two roundings and the sums' own errors. */
template <class T>
static __global__ void count_apart(const T *a, const T *b, uint64_t n, double relative, double absolute,
                                   unsigned long long *count) {
  uint64_t i = (uint64_t)blockIdx.x * 256 + threadIdx.x;
  if (i >= n) return;
  double x, y;
  if (sizeof(T) == 2)
    x = us_bf16_to_f32((uint16_t)a[i]), y = us_bf16_to_f32((uint16_t)b[i]);
  else
    x = a[i], y = b[i];
  if (!(fabs(x - y) <= relative * fmax(fabs(x), fabs(y)) + absolute)) atomicAdd(count, 1ull);
}

template <class T>
static uint64_t apart(const device_array<T> &a, const device_array<T> &b, double relative, double absolute) {
  device_array<unsigned long long> count(1);
  US_CUDA(cudaMemset(count.at, 0, 8));
  count_apart<<<(uint32_t)((a.count + 255) / 256), 256>>>(a.at, b.at, a.count, relative, absolute, count.at);
  return count.get()[0];
}

/* Median of RUNS, microseconds; the first run is not counted. */
template <class Run> static double time_us(Run work) {
  cudaEvent_t begin, end;
  std::vector<float> times;
  US_CUDA(cudaEventCreate(&begin));
  US_CUDA(cudaEventCreate(&end));
  for (int i = 0; i <= RUNS; i++) {
    float ms;
    US_CUDA(cudaEventRecord(begin));
    work();
    US_CUDA(cudaEventRecord(end));
    US_CUDA(cudaEventSynchronize(end));
    US_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i) times.push_back(ms);
  }
  US_CUDA(cudaGetLastError());
  cudaEventDestroy(begin), cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[RUNS / 2] * 1e3;
}

struct speed_case {
  const char *name;
  uint32_t E, S, N, K;
};

struct speed_data {
  struct speed_case c;
  std::vector<uint32_t> start;
  device_array<uint32_t> d_start;
  device_array<uint16_t> x, dy, w, y, y_blas, dx, dx_blas, gated;
  device_array<float> dw, dw_blas;
  speed_data(const struct speed_case &c, const std::vector<uint32_t> &start)
      : c(c), start(start), d_start(start), x((size_t)c.S * c.K), dy((size_t)c.S * c.N),
        w((size_t)c.E * c.N * c.K), y(dy.count), y_blas(dy.count), dx(x.count), dx_blas(x.count),
        gated(dy.count / 2), dw(w.count), dw_blas(w.count) {
    fill(x, 1), fill(dy, 2), fill(w, 3);
    fill(dw), fill(dw_blas);
  }
};

enum kind { FORWARD, GRAD_X, GRAD_W, SWIGLU };
static const char *const kind_names[] = {"forward", "grad_x", "grad_w", "forward_swiglu"};

static void ours(struct speed_data &d, enum kind kind, uint32_t tile, uint32_t blocks, bool turns) {
  struct us_grouped a = {d.d_start.at, d.c.E, d.c.S, d.c.N, d.c.K, tile, blocks, schedule_of(turns)};
  uint64_t stride = (uint64_t)d.c.N * d.c.K;
  int status = kind == FORWARD  ? us_grouped_forward(&a, d.x.at, d.w.at, stride, d.y.at, 0)
               : kind == SWIGLU ? us_grouped_forward_swiglu(&a, d.x.at, d.w.at, stride, d.y.at, d.gated.at, 0)
               : kind == GRAD_X ? us_grouped_grad_x(&a, d.dy.at, d.w.at, stride, d.dx.at, 0)
                                : us_grouped_grad_w(&a, d.dy.at, d.x.at, d.dw.at, stride, 0);
  US_CUDA((cudaError_t)status);
}

/* Column-major as cuBLAS sees it: a row-major matrix is its transpose. */
static void theirs(struct speed_data &d, enum kind kind, cublasHandle_t handle) {
  const int N = d.c.N, K = d.c.K;
  const float one = 1, zero = 0;
  for (uint32_t e = 0; e < d.c.E; e++) {
    size_t first = d.start[e];
    int rows = d.start[e + 1] - first;
    const uint16_t *x = d.x.at + first * K, *dy = d.dy.at + first * N, *w = d.w.at + (size_t)e * N * K;
    if (!rows) continue;
    if (kind == FORWARD || kind == SWIGLU)
      blas(cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, N, rows, K, &one, w, CUDA_R_16BF, K, x, CUDA_R_16BF,
                        K, &zero, d.y_blas.at + first * N, CUDA_R_16BF, N, CUBLAS_COMPUTE_32F,
                        CUBLAS_GEMM_DEFAULT));
    else if (kind == GRAD_X)
      blas(cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, K, rows, N, &one, w, CUDA_R_16BF, K, dy,
                        CUDA_R_16BF, N, &zero, d.dx_blas.at + first * K, CUDA_R_16BF, K, CUBLAS_COMPUTE_32F,
                        CUBLAS_GEMM_DEFAULT));
    else
      blas(cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_T, K, N, rows, &one, x, CUDA_R_16BF, K, dy,
                        CUDA_R_16BF, N, &one, d.dw_blas.at + (size_t)e * N * K, CUDA_R_32F, K,
                        CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }
}

struct variant {
  uint32_t tile, blocks;
  bool turns;
};

static std::vector<struct variant> variants(enum kind kind) {
  std::vector<struct variant> all;
  for (uint32_t blocks = 1; blocks <= 2; blocks++) {
    for (uint32_t tile : {128u, 160u, 192u, 256u}) all.push_back({tile, blocks, false});
    for (uint32_t tile : {128u, 160u, 192u})
      if (kind != GRAD_W) all.push_back({tile, blocks, true});
  }
  return all;
}

/* Of all values of the kind's output: those unlike the other array's. */
static uint64_t outputs_apart(const struct speed_data &d, enum kind kind, double bf16, double f32,
                              double absolute) {
  return kind == GRAD_X   ? apart(d.dx, d.dx_blas, bf16, absolute)
         : kind == GRAD_W ? apart(d.dw, d.dw_blas, f32, absolute)
                          : apart(d.y, d.y_blas, bf16, absolute);
}

static uint64_t output_count(const struct speed_data &d, enum kind kind) {
  return kind == GRAD_X ? d.dx.count : kind == GRAD_W ? d.dw.count : d.y.count;
}

static void keep_output(struct speed_data &d, enum kind kind) {
  if (kind == GRAD_X)
    US_CUDA(cudaMemcpy(d.dx_blas.at, d.dx.at, d.dx.count * 2, cudaMemcpyDeviceToDevice));
  else if (kind == GRAD_W)
    US_CUDA(cudaMemcpy(d.dw_blas.at, d.dw.at, d.dw.count * 4, cudaMemcpyDeviceToDevice));
  else
    US_CUDA(cudaMemcpy(d.y_blas.at, d.y.at, d.y.count * 2, cudaMemcpyDeviceToDevice));
}

/* Sums of n products of values in [-1, 1): their magnitudes add up to n / 4 on average, never beyond n. */
static void check_kind(struct speed_data &d, enum kind kind, cublasHandle_t handle, const std::string &name) {
  double depth = kind == GRAD_X ? d.c.N : kind == GRAD_W ? 0 : d.c.K;
  for (uint32_t e = 0; e < d.c.E && kind == GRAD_W; e++) depth = fmax(depth, d.start[e + 1] - d.start[e]);
  double absolute = 2 * (depth / 16 + 1) * ROUND_TENSOR * depth;
  fill(d.dw), fill(d.dw_blas);
  ours(d, kind, 128, 1, false), theirs(d, kind, handle);
  us_gpu_report((name + " = cublas").c_str(), output_count(d, kind),
                outputs_apart(d, kind, 2 * ROUND_BF16, 2 * ROUND_F32, absolute), 0);
  keep_output(d, kind);
  uint64_t unlike = 0, checked = 0;
  for (const struct variant &v : variants(kind))
    for (int again = 0; again < 2; again++) {
      fill(d.dw);
      ours(d, kind, v.tile, v.blocks, v.turns);
      unlike += outputs_apart(d, kind, 0, 0, 0), checked += output_count(d, kind);
    }
  us_gpu_report((name + ", every tile twice the same bits").c_str(), checked, unlike, 0);
}

static void time_kind(struct speed_data &d, enum kind kind, cublasHandle_t handle) {
  double flops = 2.0 * d.c.S * d.c.N * d.c.K;
  std::string name = std::string(d.c.name) + " " + kind_names[kind];
  check_kind(d, kind, handle, name);
  double blas_us = time_us([&] { theirs(d, kind, handle); });
  printf("{\"time\": \"%s\", \"cublas\": %.0f, \"unit\": \"TFLOP/s\", \"tiles\": {", name.c_str(),
         flops / blas_us * 1e-6);
  const char *comma = "";
  for (const struct variant &v : variants(kind)) {
    double us = time_us([&] { ours(d, kind, v.tile, v.blocks, v.turns); });
    printf("%s\"%u/%u%s\": %.0f", comma, v.tile, v.blocks, v.turns ? "t" : "", flops / us * 1e-6);
    comma = ", ";
  }
  double us = time_us([&] { ours(d, kind, 0, 0, false); });
  printf("}, \"ours\": %.0f, \"us\": %.1f}\n", flops / us * 1e-6, us);
  fflush(stdout);
}

/* Rows of each group as a router leaves them: about equal, none a multiple of anything. */
static std::vector<uint32_t> uneven_start(uint32_t E, uint32_t S) {
  random_stream random = {99};
  std::vector<uint32_t> start = {0};
  for (uint32_t e = 1; e < E; e++)
    start.push_back((uint32_t)((uint64_t)S * e / E + random.below(S / E / 8 + 1)));
  start.push_back(S);
  return start;
}

/* --- what moves bytes --- */

static void report_bytes(const char *name, const char *shape, double us, double bytes) {
  printf("{\"time\": \"%s %s\", \"us\": %.1f, \"TB/s\": %.2f}\n", shape, name, us, bytes / us * 1e-6);
  fflush(stdout);
}

/* Bytes are those that have to move: arrays that fit in L2 (the router's x and w) once. */
static void time_layer_rows(const char *shape, uint32_t R, uint32_t D, uint32_t F, uint32_t E, uint32_t K) {
  const uint32_t S = R * K;
  const double rows = (double)R * D, slots = (double)S * D, inner = (double)S * F;
  device_array<uint32_t> id(random_ids(R, E, K, E, 1)), start(E + 1), row(S), pair(S), slot(S), chosen(S);
  device_array<uint16_t> x(R * (size_t)D), x_slot(S * (size_t)D), h(S * (size_t)F * 2), a(S * (size_t)F);
  device_array<float> wide(random_floats(R * (size_t)D, 1)), weight(random_floats(S, 2)), dweight(S),
      dlogit(S), w(random_floats(E * (size_t)D, 3)), dw(random_floats(E * (size_t)D, 3)),
      scores(R * (size_t)E);
  device_array<uint8_t> scratch(
      std::max({us_experts_train_plan_scratch(R, E), us_router_train_scratch(R, D, E),
                us_router_train_grad_scratch(D, E)}));
  struct us_experts_train_plan plan = {R, E, K, id.at, start.at, row.at, pair.at, slot.at, NULL, scratch.at};
  struct us_experts_train_rows p = {R, D, K, slot.at};
  struct us_experts_train_swiglu_grad g = {S, F, h.at, a.at, weight.at, pair.at, a.at, h.at, dweight.at};
  struct us_experts_train_router r = {dlogit.at, id.at, w.at};
  struct us_router_train router = {R,    D,    E,         K,         true,      1.0f,      x.at,
                                   w.at, NULL, scores.at, chosen.at, weight.at, scratch.at, NULL};
  struct us_router_train_grad rg = {R,          D,    E,        K,       true,      1.0f,  scores.at, id.at,
                                    dweight.at, x.at, start.at, pair.at, dlogit.at, dw.at, scratch.at};
  fill(x, 1), fill(x_slot, 2), fill(h, 3), fill(a, 4);
  report_bytes("plan", shape, time_us([&] { us_experts_train_plan(&plan, 0); }), S * 4.0 * 5);
  report_bytes("scatter", shape, time_us([&] { us_experts_train_scatter(&p, x.at, x_slot.at, 0); }),
               2 * (rows + slots));
  report_bytes("scatter_grad", shape,
               time_us([&] { us_experts_train_scatter_grad(&p, wide.at, x_slot.at, 0); }),
               4 * rows + 2 * slots);
  report_bytes("combine", shape,
               time_us([&] { us_experts_train_combine(&p, weight.at, x_slot.at, wide.at, wide.at, 0); }),
               8 * rows + 2 * slots);
  report_bytes("gather_grad", shape,
               time_us([&] { us_experts_train_gather_grad(&p, x_slot.at, NULL, wide.at, 0); }),
               4 * rows + 2 * slots);
  report_bytes("swiglu", shape, time_us([&] { us_experts_train_swiglu(S, F, h.at, a.at, 0); }), 6 * inner);
  report_bytes("swiglu_grad", shape, time_us([&] { us_experts_train_swiglu_grad(&g, 0); }), 12 * inner);
  device_array<float> wide_logits((size_t)R * 192);
  struct us_grouped product = {NULL, 1, R, 192, D, 0, 0, US_GROUPED_CHOSEN};
  report_bytes("router's product alone", shape,
               time_us([&] { us_grouped_forward_f32(&product, x.at, x_slot.at, 0, wide_logits.at, 0); }),
               2 * rows + 4.0 * R * 192);
  report_bytes("router", shape, time_us([&] { us_router_train(&router, 0); }), 2 * rows + 4.0 * R * E);
  report_bytes("router grad", shape, time_us([&] { us_router_train_grad(&rg, 0); }), 2 * rows + 4.0 * R * E);
  report_bytes("gather_grad with router", shape,
               time_us([&] { us_experts_train_gather_grad(&p, x_slot.at, &r, wide.at, 0); }),
               4 * rows + 2 * slots);
}

void time_rows(void) {
  time_layer_rows("mini", 16384, 1024, 320, 64, 8);
  time_layer_rows("nano", 65536, 320, 128, 16, 2);
}

void time_grouped(void) {
  static const struct speed_case cases[] = {
      {"mini gate_up 640", 64, 131072, 640, 1024}, {"mini down 320", 64, 131072, 1024, 320},
      {"mini gate_up 768", 64, 131072, 768, 1024}, {"mini down 384", 64, 131072, 1024, 384},
      {"nano gate_up", 16, 131072, 256, 320},      {"nano down", 16, 131072, 320, 128},
      {"dense 4096", 1, 16384, 4096, 4096},
  };
  cublasHandle_t handle;
  blas(cublasCreate(&handle));
  {
    struct speed_data warm(cases[0], uneven_start(cases[0].E, cases[0].S));
    for (int i = 0; i < 600; i++) ours(warm, FORWARD, 256, 1, false);
    US_CUDA(cudaDeviceSynchronize());
  }
  for (const struct speed_case &c : cases) {
    struct speed_data d(c, uneven_start(c.E, c.S));
    for (enum kind kind : {FORWARD, SWIGLU, GRAD_X, GRAD_W}) time_kind(d, kind, handle);
  }
  cublasDestroy(handle);
}
