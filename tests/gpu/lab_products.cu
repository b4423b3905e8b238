/* lab_products.cu: products of many rows with pages, at the widths of MiMo-V2.5-Pro, one of four ranks, and small odd sizes; the
 * same for a layer's experts. Samples against double, mistakes that must show, a row alone against all, and speed.
 *
 * Contents: truth; one matrix; experts.
 */
#include "formats/bf16.h"
#include "prefill_lab.h"

#include <cstring>

static const uint32_t SAMPLES = 512, MUTANTS = 32, PAD = 4;

struct product {
  const char *name;
  enum us_format format;
  uint32_t rows, N, K, parts;
  bool swiglu;
  uint32_t tile_rows; /* 0: lab_weights_make's choice */
  bool timed;
};

static const struct product products[] = {
    {"qkv", US_FORMAT_FP8, 512, 6784, 6144, 1, false, 0, true},
    {"qkv", US_FORMAT_MXFP4, 512, 6784, 6144, 1, false, 0, true},
    {"o_proj", US_FORMAT_BF16, 512, 6144, 4096, 1, false, 0, true},
    {"o_proj", US_FORMAT_FP8, 512, 6144, 4096, 1, false, 0, true},
    {"router", US_FORMAT_F32, 512, 384, 6144, 16, false, 0, true},
    {"head", US_FORMAT_BF16, 1, 38144, 6144, 1, false, 0, true},
    {"dense gate and up", US_FORMAT_FP8, 512, 8192, 6144, 1, true, 0, true},
    {"small", US_FORMAT_MXFP4, 77, 70, 64, 1, false, 16, false},
    {"small", US_FORMAT_MXFP4, 5, 96, 96, 1, false, 32, false},
    {"small", US_FORMAT_MXFP4, 200, 192, 384, 1, true, 0, false},
    {"small", US_FORMAT_FP8, 130, 40, 64, 1, false, 0, false},
    {"small", US_FORMAT_FP8, 33, 192, 512, 2, false, 0, false},
    {"small", US_FORMAT_FP8, 300, 192, 128, 1, true, 0, false},
    {"small", US_FORMAT_BF16, 129, 100, 1152, 3, false, 0, false},
    {"small", US_FORMAT_BF16, 31, 64, 96, 1, true, 0, false},
    {"small", US_FORMAT_F32, 260, 33, 768, 2, false, 0, false},
    {"small", US_FORMAT_F32, 9, 20, 96, 1, false, 0, false},
};

/* ---- truth ------------------------------------------------------------------------------------------------------- */

/* Columns that the tensor cores add up before FP32 does. */
static uint32_t chain_of(const struct lab_weights *w) {
  return w->format == US_FORMAT_FP8 || w->format == US_FORMAT_BF16 ? w->pages.slice_cols : 32;
}

/* Chains one after the other in FP32; parts likewise. */
static struct lab_sum dot(const struct lab_weights *w, uint32_t parts, const double *row, const float *x) {
  struct lab_sum s = {0, 0, 0};
  uint32_t K = w->cols, chain = chain_of(w);
  for (uint32_t part = 0; part < parts; part++) {
    double acc = 0;
    for (uint32_t k = part * (K / parts); k < (part + 1) * (K / parts); k += chain) {
      double sum = 0, lost = 0;
      for (uint32_t i = k; i < k + chain; i += 16) lost += lab_multiply(&sum, row + i, x + i, &s.magnitude);
      acc += sum;
      s.allowed += (w->format == US_FORMAT_F32 ? 3 : 1) * lost + LAB_UNIT * (fabs(acc) + fabs(sum));
    }
    s.value += acc, s.allowed += LAB_UNIT * fabs(s.value);
  }
  return s;
}

/* Output n of matrix `index` for row x, with a mistake in gate or the only matrix. */
static struct lab_sum expect(const struct lab_weights *w, uint32_t parts, uint32_t index, uint32_t n,
                             const float *x, enum lab_mutation mutation) {
  std::vector<double> row = lab_row(w, index, 0, n, mutation);
  struct lab_sum g = dot(w, parts, row.data(), x);
  if (!w->gated) return g;
  std::vector<double> up = lab_row(w, index, 1, n, LAB_NONE);
  struct lab_sum u = dot(w, parts, up.data(), x);
  struct lab_sum h = {lab_silu(g.value) * u.value, 0, lab_gated_allowed(&g, &u)};
  return h;
}

/* Samples of y (rows, columns); the matrix of a row is matrix[row], its input x row source[row]. */
struct samples {
  const struct lab_weights *w;
  const struct lab_many *x;
  uint32_t parts, columns, rows;
  const std::vector<double> *y;
  const uint32_t *opt_matrix, *opt_source;
};

static void check_samples(struct lab_result *r, const struct samples *s, uint64_t *state) {
  std::vector<double> ratios[LAB_MUTATIONS];
  uint64_t bad = 0;
  for (double v : *s->y) bad += v != v;
  r->bad += bad > 0;
  for (uint32_t i = 0; i < SAMPLES; i++) {
    uint32_t row = (uint32_t)(lab_random(state) % s->rows), n = (uint32_t)(lab_random(state) % s->columns);
    uint32_t index = s->opt_matrix ? s->opt_matrix[row] : 0,
             source = s->opt_source ? s->opt_source[row] : row;
    const float *x = &s->x->x[(size_t)source * s->w->cols];
    struct lab_sum e = expect(s->w, s->parts, index, n, x, LAB_NONE);
    double got = (*s->y)[(size_t)row * s->columns + n];
    lab_sample(r, got - e.value, e.allowed, e.magnitude);
    for (int m = LAB_SCALE; i < MUTANTS && m < LAB_MUTATIONS; m++)
      if (lab_mutation_applies((enum lab_mutation)m, s->w->format))
        ratios[m].push_back(fabs(got - expect(s->w, s->parts, index, n, x, (enum lab_mutation)m).value) /
                            e.allowed);
  }
  for (int m = LAB_SCALE; m < LAB_MUTATIONS; m++)
    if (!ratios[m].empty()) lab_mutation(r, lab_mutation_names[m], ratios[m]);
}

/* Operand rows as values. */
static std::vector<double> operand_values(const uint16_t *device, size_t n) {
  std::vector<uint16_t> bits = lab_download(device, n);
  std::vector<double> values(n);
  for (size_t i = 0; i < n; i++) values[i] = us_bf16_to_f32(bits[i]) * 0x1p-64;
  return values;
}

/* ---- one matrix -------------------------------------------------------------------------------------------------- */

struct output {
  float *stored;    /* (parts, rows, columns + PAD) */
  uint16_t *swiglu; /* (rows, columns + PAD) */
  size_t words;
};

static struct output make_output(const struct product *p, uint32_t columns) {
  struct output out = {NULL, NULL, 0};
  size_t stride = (columns + PAD + 3) / 4 * 4;
  size_t bytes = p->swiglu ? p->rows * stride * 2 : p->parts * p->rows * stride * 4;
  void *memory;
  US_CUDA(cudaMalloc(&memory, bytes));
  US_CUDA(cudaMemset(memory, 0xff, bytes));
  out.words = bytes / 4;
  if (p->swiglu)
    out.swiglu = (uint16_t *)memory;
  else
    out.stored = (float *)memory;
  return out;
}

/* Rows [begin, end) of the product into the same rows of `out`. */
static cudaError_t run_rows(const struct product *p, const struct lab_weights *w, const struct lab_many *x,
                            uint32_t columns, const struct output *out, uint32_t begin, uint32_t end) {
  uint32_t stride = (columns + PAD + 3) / 4 * 4;
  struct us_prefill_gemm g = {};
  g.w = w->matrix, g.x = x->operand + (size_t)begin * p->K, g.x_stride = p->K, g.rows = end - begin,
  g.parts = p->parts;
  g.valid = p->N;
  if (p->swiglu)
    g.opt_swiglu = out->swiglu + (size_t)begin * stride, g.swiglu_stride = stride;
  else
    g.out = us_prefill_local(out->stored + (size_t)begin * stride, stride),
    g.out.part = (uint64_t)p->rows * stride;
  return (cudaError_t)us_prefill_gemm(&g, 0);
}

static std::vector<double> result_of(const struct product *p, uint32_t columns, const struct output *out) {
  uint32_t stride = (columns + PAD + 3) / 4 * 4, parts = p->swiglu ? 1 : p->parts;
  size_t n = (size_t)parts * p->rows * stride;
  std::vector<double> all, y((size_t)p->rows * columns, 0);
  if (p->swiglu) {
    all = operand_values(out->swiglu, n);
  } else {
    std::vector<float> stored = lab_download(out->stored, n);
    all.assign(stored.begin(), stored.end());
  }
  for (size_t i = 0; i < (size_t)parts * p->rows; i++)
    for (uint32_t c = 0; c < columns; c++) y[i % p->rows * columns + c] += all[i * stride + c];
  return y;
}

/* Every row by itself or in runs of other lengths, into a second output. */
static void check_alone(const struct product *p, const struct lab_weights *w, const struct lab_many *x,
                        uint32_t columns, const struct output *whole) {
  static const uint32_t lengths[] = {1, 3, 31, 64, 1, 100, 2, 130};
  struct output pieces = make_output(p, columns);
  for (uint32_t begin = 0, i = 0; begin < p->rows; i++) {
    uint32_t end = std::min(p->rows, begin + lengths[i % 8]);
    US_CUDA(run_rows(p, w, x, columns, &pieces, begin, end));
    begin = end;
  }
  char check[128];
  snprintf(check, sizeof check, "%s (%u, %u) %s: rows in other tiles give the same bits", p->name, p->N, p->K,
           us_format_name(p->format));
  const void *a = whole->stored ? (void *)whole->stored : whole->swiglu,
             *b = p->swiglu ? (void *)pieces.swiglu : pieces.stored;
  lab_same_rows(check, a, b, whole->words);
  US_CUDA(cudaFree((void *)b));
}

static void lab_product(const struct product *p, uint64_t seed) {
  uint64_t state = seed + p->N + p->K;
  struct lab_weights w = lab_weights(p->format, p->N, p->K);
  w.gated = p->swiglu, w.parts = p->parts;
  lab_weights_make(&w, seed, p->tile_rows);
  struct lab_many x = lab_many_rows(p->rows, p->K, &state);
  uint32_t columns = p->swiglu ? p->N / 2 : p->N;
  struct output out = make_output(p, columns);
  US_CUDA(run_rows(p, &w, &x, columns, &out, 0, p->rows));
  US_CUDA(cudaDeviceSynchronize());
  char shape[96];
  snprintf(shape, sizeof shape, "(%u, %u) x %u rows", p->N, p->K, p->rows);
  struct lab_result r = {p->name, shape, us_format_name(p->format)};
  std::vector<double> y = result_of(p, columns, &out);
  struct samples s = {&w, &x, p->parts, columns, p->rows, &y, NULL, NULL};
  check_samples(&r, &s, &state);
  lab_report(&r);
  check_alone(p, &w, &x, columns, &out);
  if (p->timed) {
    struct lab_time t = {p->name,
                         shape,
                         us_format_name(p->format),
                         0,
                         (double)us_pages_bytes(&w.pages),
                         2.0 * p->rows * p->N * p->K,
                         lab_peer_us(p->rows, p->N, p->K)};
    t.us = lab_median_us([&]() { return run_rows(p, &w, &x, columns, &out, 0, p->rows); });
    lab_time_report(&t);
  }
  US_CUDA(cudaFree(out.stored ? (void *)out.stored : out.swiglu));
  US_CUDA(cudaFree(x.operand));
  lab_weights_free(&w);
}

void lab_prefill_products(uint64_t seed) {
  for (const struct product &p : products) lab_product(&p, seed);
}

/* ---- experts ----------------------------------------------------------------------------------------------------- */

struct experts {
  uint32_t rows, E, top_k, D, F;
  bool timed;
};

static const struct experts layers[] = {
    {512, 384, 8, 6144, 512, true}, {300, 16, 4, 64, 32, false}, {40, 8, 2, 128, 96, false}};

/* A layer, its routing (ascending ids, weights of 1 / top_k), and buffers for rows [0, rows). */
struct layer {
  const struct experts *of;
  struct lab_weights up, down;
  struct lab_many x;
  uint32_t *ids;
  float *logits, *weights;
  struct us_prefill_groups groups;
  uint16_t *inner; /* (slots, F) */
  float *pairs, *y;
};

/* Pages of 128 columns, as a model's down projections have them (libcore/device/weights_layout.c); lab_weights_make's are the
 * engine's for a product with K split over many warps. */
static void repack(struct lab_weights *w) {
  uint32_t groups = w->cols / 32 % 4 ? w->cols / 32 % 3 ? 1 : 3 : 4;
  struct us_pages *p = &w->pages;
  size_t codes = us_matrix_data_bytes(w->format, w->rows, w->cols),
         scales = us_matrix_scale_bytes(w->format, w->rows, w->cols, 0);
  std::vector<struct us_pages_source> sources(w->count);
  p->slice_cols = groups * 32;
  for (uint32_t i = 0; i < w->count; i++) {
    struct us_matrix *m = &sources[i].w[0];
    m->format = w->format, m->rows = w->rows, m->cols = w->cols;
    m->data = w->codes[0] + i * codes, m->scales = w->scales[0] + i * scales, sources[i].matrices = 1;
  }
  struct us_pages_source *device = lab_upload(sources);
  uint8_t *pages;
  US_CUDA(cudaFree((void *)w->matrix.pages));
  US_CUDA(cudaMalloc(&pages, us_pages_bytes(p) * w->count));
  US_CUDA(us_pages_pack_gpu(p, device, w->count, pages, 0));
  US_CUDA(cudaFree(device));
  w->matrix.pages = pages, w->matrix.matrix_bytes = us_pages_bytes(p), w->matrix.slices = us_pages_slices(p);
  w->matrix.page_bytes = us_pages_page_bytes(p), w->matrix.groups = (uint16_t)groups;
}

template <class T> static T *make(size_t n) {
  T *p;
  US_CUDA(cudaMalloc(&p, n * sizeof(T)));
  return p;
}

static void make_layer(struct layer *l, const struct experts *e, uint64_t seed) {
  uint64_t state = seed + e->E;
  uint32_t pairs = e->rows * e->top_k;
  l->of = e;
  l->up = lab_weights(US_FORMAT_MXFP4, 2 * e->F, e->D), l->down = lab_weights(US_FORMAT_MXFP4, e->D, e->F);
  l->up.count = l->down.count = e->E, l->up.gated = true;
  lab_weights_make(&l->up, seed, 0);
  lab_weights_make(&l->down, seed, 16);
  repack(&l->down);
  l->x = lab_many_rows(e->rows, e->D, &state);
  std::vector<float> logits((size_t)e->rows * e->E);
  for (float &v : logits) v = (float)(lab_random(&state) >> 40) * 0x1p-22f - 2.0f;
  l->logits = lab_upload(logits);
  l->ids = make<uint32_t>(pairs), l->weights = make<float>(pairs);
  l->groups.tile_count = make<uint32_t>(1);
  l->groups.tiles = make<struct us_prefill_tile>(us_prefill_most_tiles(e->E, pairs));
  l->groups.row = make<uint32_t>(pairs), l->groups.pair = make<uint32_t>(pairs);
  l->inner = make<uint16_t>((size_t)pairs * e->F);
  l->pairs = make<float>((size_t)pairs * e->D), l->y = make<float>((size_t)e->rows * e->D);
}

static void free_layer(struct layer *l) {
  void *owned[] = {
      l->x.operand,   l->logits, l->ids,   l->weights, l->groups.tile_count, l->groups.tiles, l->groups.row,
      l->groups.pair, l->inner,  l->pairs, l->y};
  for (void *p : owned) US_CUDA(cudaFree(p));
  lab_weights_free(&l->up), lab_weights_free(&l->down);
}

static cudaError_t run_up(const struct layer *l, uint32_t begin) {
  const struct experts *e = l->of;
  struct us_prefill_gemm g = {};
  g.w = l->up.matrix, g.x = l->x.operand + (size_t)begin * e->D, g.x_stride = e->D, g.parts = 1,
  g.valid = 2 * e->F;
  g.opt_swiglu = l->inner, g.swiglu_stride = e->F, g.opt_experts = &l->groups, g.opt_gather = l->groups.row;
  return (cudaError_t)us_prefill_gemm(&g, 0);
}

static cudaError_t run_down(const struct layer *l) {
  const struct experts *e = l->of;
  struct us_prefill_gemm g = {};
  g.w = l->down.matrix, g.x = l->inner, g.x_stride = e->F, g.parts = 1, g.valid = e->D;
  g.out = us_prefill_local(l->pairs, e->D), g.opt_experts = &l->groups, g.opt_scatter = l->groups.pair;
  return (cudaError_t)us_prefill_gemm(&g, 0);
}

/* Rows [begin, begin + rows) through router's choice, up, down and combine; y gets rows from 0. */
static cudaError_t run_layer(const struct layer *l, uint32_t begin, uint32_t rows) {
  const struct experts *e = l->of;
  struct us_prefill_route r = {};
  r.logits = l->logits + (size_t)begin * e->E, r.rows = rows, r.parts = 1, r.stride = e->E, r.E = e->E,
  r.top_k = e->top_k;
  r.scaling = 1, r.normalise = true, r.ids = l->ids, r.weights = l->weights, r.groups = l->groups;
  cudaError_t status = (cudaError_t)us_prefill_route(&r, 0);
  if (status == cudaSuccess) status = run_up(l, begin);
  if (status == cudaSuccess) status = run_down(l);
  struct us_prefill_combine c = {l->pairs, l->weights, rows, e->top_k, e->D, us_prefill_local(l->y, e->D)};
  return status == cudaSuccess ? (cudaError_t)us_prefill_combine(&c, 0) : status;
}

/* The groups hold every pair once, in ascending expert, then row. Fills the expert of each slot. */
static std::vector<uint32_t> check_groups(const struct layer *l, const std::vector<uint32_t> &ids,
                                          const std::vector<uint32_t> &row,
                                          const std::vector<uint32_t> &pair) {
  uint32_t count = lab_download(l->groups.tile_count, 1)[0], next = 0, pairs = (uint32_t)ids.size();
  std::vector<struct us_prefill_tile> tiles = lab_download(l->groups.tiles, count);
  std::vector<uint32_t> expert(pairs);
  uint64_t bad = 0;
  for (const struct us_prefill_tile &tile : tiles) {
    bad += tile.first != next || !tile.rows || tile.rows > US_PREFILL_EXPERT_ROWS;
    for (uint32_t s = tile.first; s < tile.first + tile.rows && s < pairs; s++) {
      expert[s] = tile.expert;
      bad += ids[pair[s]] != tile.expert || pair[s] / l->of->top_k != row[s];
      bad += s > 0 && (expert[s] < expert[s - 1] || (expert[s] == expert[s - 1] && row[s] <= row[s - 1]));
    }
    next = tile.first + tile.rows;
  }
  us_gpu_report("experts: groups hold every pair once, in order", pairs, bad + (next != pairs), 0);
  return expert;
}

static void check_layer(const struct layer *l, uint64_t seed) {
  const struct experts *e = l->of;
  uint32_t pairs = e->rows * e->top_k;
  uint64_t state = seed;
  std::vector<uint32_t> ids = lab_download(l->ids, pairs), row = lab_download(l->groups.row, pairs),
                        pair = lab_download(l->groups.pair, pairs), expert = check_groups(l, ids, row, pair);
  char shape[96];
  snprintf(shape, sizeof shape, "%u experts (%u, %u), %u rows x %u", e->E, e->F, e->D, e->rows, e->top_k);
  struct lab_result up = {"experts up", shape, "mxfp4"}, down = {"experts down", shape, "mxfp4"};
  std::vector<double> inner = operand_values(l->inner, (size_t)pairs * e->F);
  struct samples s = {&l->up, &l->x, 1, e->F, pairs, &inner, expert.data(), row.data()};
  check_samples(&up, &s, &state);
  lab_report(&up);

  struct lab_many h = {pairs, e->F, std::vector<float>(inner.begin(), inner.end()), NULL};
  std::vector<uint32_t> slot(pairs);
  for (uint32_t i = 0; i < pairs; i++) slot[pair[i]] = i;
  std::vector<float> stored = lab_download(l->pairs, (size_t)pairs * e->D);
  std::vector<double> y(stored.begin(), stored.end());
  struct samples d = {&l->down, &h, 1, e->D, pairs, &y, ids.data(), slot.data()};
  check_samples(&down, &d, &state);
  lab_report(&down);

  std::vector<float> weights = lab_download(l->weights, pairs),
                     sum = lab_download(l->y, (size_t)e->rows * e->D), want(sum.size());
  for (uint32_t r = 0; r < e->rows; r++)
    for (uint32_t c = 0; c < e->D; c++) {
      float v = 0;
      for (uint32_t k = 0; k < e->top_k; k++)
        v = fmaf(weights[r * e->top_k + k], stored[((size_t)r * e->top_k + k) * e->D + c], v);
      want[(size_t)r * e->D + c] = v;
    }
  lab_same_bits("experts: outputs added in ascending expert", want.data(), sum.data(), want.size());
}

/* A row's output does not depend on the others, nor on what its neighbours chose. */
static void check_layer_alone(const struct layer *l) {
  const struct experts *e = l->of;
  static const uint32_t lengths[] = {1, 7, 100, 2};
  std::vector<float> whole = lab_download(l->y, (size_t)e->rows * e->D), pieces;
  for (uint32_t begin = 0, i = 0; begin < e->rows; i++) {
    uint32_t rows = std::min(e->rows - begin, lengths[i % 4]);
    US_CUDA(run_layer(l, begin, rows));
    std::vector<float> y = lab_download(l->y, (size_t)rows * e->D);
    pieces.insert(pieces.end(), y.begin(), y.end());
    begin += rows;
  }
  lab_same_bits("experts: rows in other chunks give the same bits", whole.data(), pieces.data(),
                whole.size());
}

static void time_layer(const struct layer *l) {
  const struct experts *e = l->of;
  char shape[96];
  snprintf(shape, sizeof shape, "%u experts (%u, %u), %u rows x %u", e->E, e->F, e->D, e->rows, e->top_k);
  double flops = 2.0 * e->rows * e->top_k * e->D * e->F;
  struct lab_time up = {"experts up", shape, "mxfp4", 0, (double)us_pages_bytes(&l->up.pages) * e->E,
                        2 * flops,    0};
  struct lab_time down = {"experts down", shape, "mxfp4", 0, (double)us_pages_bytes(&l->down.pages) * e->E,
                          flops,          0};
  struct lab_time all = {"route, up, down, combine", shape, "mxfp4", 0, up.bytes + down.bytes, 3 * flops, 0};
  US_CUDA(run_layer(l, 0, e->rows));
  up.us = lab_median_us([&]() { return run_up(l, 0); });
  down.us = lab_median_us([&]() { return run_down(l); });
  all.us = lab_median_us([&]() { return run_layer(l, 0, e->rows); });
  lab_time_report(&up), lab_time_report(&down), lab_time_report(&all);
}

void lab_prefill_experts(uint64_t seed) {
  for (const struct experts &e : layers) {
    struct layer l = {};
    make_layer(&l, &e, seed);
    US_CUDA(run_layer(&l, 0, e.rows));
    US_CUDA(cudaDeviceSynchronize());
    check_layer(&l, seed);
    check_layer_alone(&l);
    if (e.timed) time_layer(&l);
    free_layer(&l);
  }
}
