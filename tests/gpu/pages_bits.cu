/* pages_bits.cu: what the device makes when a model is loaded has the CPU's bytes: synthetic weights in every format equal
 * us_matrix_encode of the same random values, and packed pages equal us_pages_pack. */
#include "gpu_test.h"
#include "kernels/pages/pages_gpu.h"

#include <cstring>
#include <vector>

struct bits_case {
  enum us_format format;
  uint32_t rows, cols, chunk, tile_rows, slice_cols, matrices; /* matrices: 2 packs gate and up */
};

static const struct bits_case cases[] = {
    {US_FORMAT_MXFP4, 64, 6144, 0, 32, 384, 2}, {US_FORMAT_MXFP4, 144, 512, 0, 16, 128, 1},
    {US_FORMAT_FP8, 272, 768, 0, 16, 384, 1},   {US_FORMAT_FP8, 288, 512, 144, 16, 256, 1},
    {US_FORMAT_BF16, 96, 256, 0, 32, 64, 1},    {US_FORMAT_F32, 48, 192, 0, 16, 96, 1},
    {US_FORMAT_MXFP4, 24, 96, 0, 32, 96, 1},    {US_FORMAT_FP8, 40, 256, 0, 16, 64, 1}, /* padded rows */
};

struct host_matrix {
  std::vector<uint8_t> data, scales;
};

/* Row by row as us_random_row does, then encoded as a checkpoint would be. */
static struct host_matrix make_on_cpu(const struct bits_case *c, const struct us_init *init) {
  std::vector<float> values((size_t)c->rows * c->cols);
  for (uint32_t n = 0; n < c->rows; n++)
    for (uint32_t q = 0; q < c->cols / 4; q++) us_init_quad(init, n, q, &values[(size_t)n * c->cols + 4 * q]);
  struct us_matrix_encoding encoding = {c->format, US_SCALE_MSE, US_FP8_SCALE_F32, c->chunk};
  struct us_err err;
  struct host_matrix m;
  m.data.resize(us_matrix_data_bytes(c->format, c->rows, c->cols));
  m.scales.resize(us_matrix_scale_bytes(c->format, c->rows, c->cols, c->chunk));
  if (us_matrix_encode(values.data(), c->rows, c->cols, &encoding, m.data.data(), m.scales.data(), &err) !=
      US_OK) {
    fprintf(stderr, "%s\n", err.message);
    exit(3);
  }
  return m;
}

static void compare(const char *what, const struct bits_case *c, const std::vector<uint8_t> &expected,
                    const uint8_t *device) {
  std::vector<uint8_t> got(expected.size());
  uint64_t bad = 0, first = 0;
  char name[128];
  US_CUDA(cudaMemcpy(got.data(), device, got.size(), cudaMemcpyDeviceToHost));
  for (size_t i = 0; i < got.size(); i++)
    if (got[i] != expected[i] && bad++ == 0) first = i;
  snprintf(name, sizeof name, "%s %s (%u, %u): device = host", us_format_name(c->format), what, c->rows,
           c->cols);
  us_gpu_report(name, got.size(), bad, first);
}

/* What a window holds, cut out of the whole tensor. */
static struct host_matrix cut_window(const struct us_synthetic *s, const struct host_matrix *whole) {
  struct us_matrix w = {s->format, s->rows, s->cols, NULL, NULL, s->scale_chunk_rows};
  size_t row_bytes = us_matrix_data_bytes(s->format, 1, s->window_cols),
         blocks = (s->window_cols + 127) / 128;
  struct host_matrix m;
  auto append = [](std::vector<uint8_t> &to, const std::vector<uint8_t> &from, size_t at, size_t bytes) {
    to.insert(to.end(), from.begin() + at, from.begin() + at + bytes);
  };
  for (uint32_t n = 0; n < s->window_rows; n++) {
    size_t row = s->first_row + n, col = s->first_col;
    append(m.data, whole->data, us_matrix_data_bytes(s->format, 1, row * s->cols + col), row_bytes);
    if (s->format == US_FORMAT_MXFP4)
      append(m.scales, whole->scales, (row * s->cols + col) / 32, s->window_cols / 32);
    if (s->format == US_FORMAT_FP8 && n % s->scale_rows == 0)
      append(m.scales, whole->scales,
             (us_matrix_scale_row(&w, row) * ((s->cols + 127) / 128) + col / 128) * 4, blocks * 4);
  }
  return m;
}

/* A window of both tensors that cuts blocks and begins inside the matrix. */
static void check_window(const struct bits_case *c, const struct us_init *device_inits,
                         const struct host_matrix host[2]) {
  struct us_synthetic s = {};
  s.format = c->format, s.rows = c->rows, s.cols = c->cols, s.scale_chunk_rows = c->chunk, s.scale_rows = 16;
  s.first_row = 16, s.window_rows = c->rows - 20;
  s.first_col = c->cols > 128 ? 128 : 32, s.window_cols = (c->cols - s.first_col) / 64 * 32;
  struct host_matrix expected[2] = {cut_window(&s, &host[0]), cut_window(&s, &host[1])};
  uint8_t *data, *scales = NULL;
  s.data_stride = (expected[0].data.size() + 255) / 256 * 256;
  s.scale_stride = (expected[0].scales.size() + 255) / 256 * 256;
  US_CUDA(cudaMalloc(&data, 2 * s.data_stride));
  if (s.scale_stride) US_CUDA(cudaMalloc(&scales, 2 * s.scale_stride));
  US_CUDA(us_synthetic_window_gpu(&s, device_inits, 2, data, scales, 0));
  for (int i = 0; i < 2; i++) {
    compare("codes of a window", c, expected[i].data, data + i * s.data_stride);
    if (scales) compare("scales of a window", c, expected[i].scales, scales + i * s.scale_stride);
  }
  US_CUDA(cudaFree(data));
  US_CUDA(cudaFree(scales));
}

static void run_case(const struct bits_case *c) {
  struct us_init inits[2], *device_inits;
  struct host_matrix host[2];
  for (int i = 0; i < 2; i++) {
    inits[i] = {us_philox_key(7), us_init_name(i ? "up" : "gate"), 0.01f, 0.125f};
    host[i] = make_on_cpu(c, &inits[i]);
  }
  size_t data_bytes = host[0].data.size(), scale_bytes = host[0].scales.size();
  uint8_t *data, *scales = NULL, *pages;
  US_CUDA(cudaMalloc(&device_inits, sizeof inits));
  US_CUDA(cudaMemcpy(device_inits, inits, sizeof inits, cudaMemcpyHostToDevice));
  US_CUDA(cudaMalloc(&data, 2 * data_bytes));
  if (scale_bytes) US_CUDA(cudaMalloc(&scales, 2 * scale_bytes));
  US_CUDA(us_synthetic_gpu(c->format, device_inits, 2, c->rows, c->cols, c->chunk, data, scales, 0));
  for (int i = 0; i < 2; i++) {
    compare("codes", c, host[i].data, data + i * data_bytes);
    if (scale_bytes) compare("scales", c, host[i].scales, scales + i * scale_bytes);
  }

  check_window(c, device_inits, host);

  struct us_pages p = {c->format, c->rows * c->matrices, c->cols, c->tile_rows, c->slice_cols};
  struct us_pages_source on_host = {}, on_device = {}, *sources;
  on_host.matrices = on_device.matrices = c->matrices;
  for (int i = 0; i < 2; i++) {
    on_host.w[i] = {c->format, c->rows, c->cols, host[i].data.data(), host[i].scales.data(), c->chunk};
    on_device.w[i] = on_host.w[i];
    on_device.w[i].data = data + i * data_bytes, on_device.w[i].scales = scales + i * scale_bytes;
  }
  std::vector<uint8_t> expected(us_pages_bytes(&p));
  struct us_err err;
  if (us_pages_pack(&p, &on_host, expected.data(), &err) != US_OK) {
    fprintf(stderr, "%s\n", err.message);
    exit(3);
  }
  US_CUDA(cudaMalloc(&pages, expected.size()));
  US_CUDA(cudaMalloc(&sources, sizeof on_device));
  US_CUDA(cudaMemcpy(sources, &on_device, sizeof on_device, cudaMemcpyHostToDevice));
  US_CUDA(us_pages_pack_gpu(&p, sources, 1, pages, 0));
  compare("pages", c, expected, pages);
  void *owned[] = {device_inits, data, scales, pages, sources};
  for (void *device : owned) US_CUDA(cudaFree(device));
}

int main() {
  us_gpu_begin();
  us_gpu_watchdog(60);
  for (const struct bits_case &c : cases) run_case(&c);
  return us_gpu_status();
}
