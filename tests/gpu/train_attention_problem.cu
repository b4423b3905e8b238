/* train_attention_problem.cu: ranges, random values, and running them; speeds. */
#include "train_attention.h"

#define BLOCK 8

/* ---- ranges ------------------------------------------------------------------------------------------------------ */

/* First row of each row's document. */
static std::vector<uint32_t> document_starts(uint32_t rows, const std::vector<uint32_t> &lengths) {
  std::vector<uint32_t> start;
  for (uint32_t at = 0, d = 0; at < rows; at += lengths[d++ % lengths.size()])
    while (start.size() < rows && start.size() < at + lengths[d % lengths.size()]) start.push_back(at);
  return start;
}

static void add_range(struct ranges *r, uint32_t begin, uint32_t end, uint32_t block, uint32_t block_end) {
  r->begin[0].push_back(begin), r->end[0].push_back(end), r->begin[1].push_back(block),
      r->end[1].push_back(block_end);
}

struct ranges make_ranges(enum mask mask, uint32_t rows, uint32_t window,
                          const std::vector<uint32_t> &documents, uint32_t blocks) {
  struct ranges r;
  std::vector<uint32_t> start = document_starts(rows, documents);
  uint64_t state = rows;
  for (uint32_t i = 0; i < rows && mask != DRAFT; i++) {
    uint32_t begin = start[i];
    if (mask == WINDOW && i + 1 > window) begin = std::max(begin, i + 1 - window);
    if (mask != RANDOM) {
      add_range(&r, begin, i + 1, 0, 0);
      continue;
    }
    uint32_t half = rows / 2, x[4];
    for (uint32_t &v : x) v = (uint32_t)(lab_random(&state) % half);
    add_range(&r, std::min(x[0], x[1]), std::max(x[0], x[1]), half + std::min(x[2], x[3]),
              half + std::max(x[2], x[3]));
  }
  for (uint32_t b = 0; b < blocks; b++) {
    uint32_t anchor = (uint32_t)((uint64_t)rows * b / blocks), begin = start[anchor];
    if (window && anchor + 1 > window) begin = std::max(begin, anchor + 1 - window);
    for (uint32_t j = 0; j < BLOCK; j++)
      add_range(&r, begin, anchor, rows + b * BLOCK, rows + (b + 1) * BLOCK);
  }
  return r;
}

/* ---- problems ---------------------------------------------------------------------------------------------------- */

static std::vector<uint16_t> bits_of(const std::vector<float> &values) {
  std::vector<uint16_t> bits;
  for (float v : values) bits.push_back(us_bf16_from_f32(v));
  return bits;
}

static void fill(std::vector<float> *values, size_t n, float most, uint64_t *state) {
  values->resize(n);
  for (float &v : *values) v = us_bf16_round(most * ((float)(lab_random(state) >> 40) * 0x1p-23f - 1.0f));
}

template <class T> static T *owned_copy(struct problem *p, const std::vector<T> &host) {
  T *device = lab_upload(host);
  p->owned.push_back(device);
  return device;
}
template <class T> static T *owned_space(struct problem *p, size_t n) {
  void *device;
  US_CUDA(cudaMalloc(&device, n * sizeof(T)));
  p->owned.push_back(device);
  return (T *)device;
}

static std::vector<uint32_t> offsets(uint32_t heads, uint32_t first, uint32_t dim) {
  std::vector<uint32_t> at;
  for (uint32_t h = 0; h < heads; h++) at.push_back(first + h * dim);
  return at;
}

/* Everything but values: ranges, plan, space for outputs. a.q, k, v, grads.dout must be set. */
static void place_problem(struct problem *p) {
  const struct shape *s = p->of;
  struct us_attention_train *a = &p->a;
  bool blocks = s->mask == DRAFT || s->mask == RANDOM;
  a->queries = p->queries, a->keys = p->keys, a->q_heads = s->H, a->kv_heads = s->G, a->qk_dim = s->Q,
  a->v_dim = s->V;
  a->q_stride = a->k_stride = a->v_stride = p->stride, a->scale = p->scale, a->opt_window = s->window;
  a->q_offset = owned_copy(p, offsets(s->H, 0, s->Q));
  a->k_offset = owned_copy(p, offsets(s->G, s->H * s->Q, s->Q));
  a->v_offset = owned_copy(p, offsets(s->G, (s->H + s->G) * s->Q, s->V));
  a->context_begin = owned_copy(p, p->ranges.begin[0]), a->context_end = owned_copy(p, p->ranges.end[0]);
  a->block_begin = blocks ? owned_copy(p, p->ranges.begin[1]) : NULL;
  a->block_end = blocks ? owned_copy(p, p->ranges.end[1]) : NULL;
  a->plan = owned_space<uint8_t>(p, us_attention_train_plan_bytes(p->queries, p->keys, s->H, s->G));
  a->out = owned_space<uint16_t>(p, (size_t)p->queries * s->H * s->V);
  a->lse = owned_space<float>(p, (size_t)p->queries * s->H);
  uint16_t *dqkv = owned_space<uint16_t>(p, (size_t)p->keys * p->stride);
  p->grads.dk = p->grads.dv = dqkv, p->grads.dq = dqkv + (size_t)p->first * p->stride;
  p->grads.dsink = s->sink ? owned_space<float>(p, s->H) : NULL;
  p->grads.scratch = owned_space<uint8_t>(p, us_attention_train_scratch(p->queries, s->H));
}

void make_problem(struct problem *p, const struct shape *s, uint64_t seed) {
  uint64_t state = seed + s->rows;
  *p = {};
  p->of = s, p->stride = s->H * s->Q + s->G * (s->Q + s->V) + 16; /* 16: not all of a row is heads */
  p->first = s->mask == DRAFT ? s->rows : 0, p->queries = s->mask == DRAFT ? s->blocks * BLOCK : s->rows;
  p->keys = p->first + p->queries, p->scale = 1.0f / sqrtf((float)s->Q);
  p->ranges = make_ranges(s->mask, s->rows, s->window, {170, 1, 90, 300}, s->blocks);
  if (s->mask == WINDOW)
    for (uint32_t i = 11; i < p->queries; i += 97)
      p->ranges.end[0][i] = p->ranges.begin[0][i]; /* sees nothing */
  fill(&p->qkv, (size_t)p->keys * p->stride, 2, &state),
      fill(&p->dout, (size_t)p->queries * s->H * s->V, 1, &state);
  fill(&p->sink, s->H, 1, &state);
  for (float &v : p->sink) v += 4; /* as much as a hundred keys or so */
  uint16_t *qkv = owned_copy(p, bits_of(p->qkv));
  p->a.k = p->a.v = qkv, p->a.q = qkv + (size_t)p->first * p->stride;
  p->a.sink = s->sink ? owned_copy(p, p->sink) : NULL;
  p->grads.dout = owned_copy(p, bits_of(p->dout));
  place_problem(p);
}

void run_problem(struct problem *p) {
  const struct shape *s = p->of;
  size_t rows = (size_t)p->queries * s->H, row_values = (size_t)p->keys * p->stride;
  std::vector<float> half(s->H, 0.5f);
  if (s->sink) US_CUDA(cudaMemcpy(p->grads.dsink, half.data(), s->H * 4, cudaMemcpyHostToDevice));
  US_CUDA(cudaMemset(p->grads.dk, 0xff, row_values * 2));
  US_CUDA(cudaMemset(p->a.out, 0xff, rows * s->V * 2));
  US_CUDA(cudaMemset(p->a.plan, 0xff, us_attention_train_plan_bytes(p->queries, p->keys, s->H, s->G)));
  US_CUDA((cudaError_t)us_attention_train_plan(&p->a, 0));
  US_CUDA((cudaError_t)us_attention_train(&p->a, 0));
  US_CUDA((cudaError_t)us_attention_train_grad(&p->a, &p->grads, 0));
  US_CUDA(cudaDeviceSynchronize());
  p->out = lab_download(p->a.out, rows * s->V), p->lse = lab_download(p->a.lse, rows);
  p->dqkv = lab_download(p->grads.dk, row_values);
  if (s->sink) p->dsink = lab_download(p->grads.dsink, s->H);
}

void release_problem(struct problem *p) {
  for (void *m : p->owned) US_CUDA(cudaFree(m));
  p->owned.clear();
}

/* ---- speeds ------------------------------------------------------------------------------------------------------ */

/* bf16 values in [-2, 2). */
static __global__ void fill_bits(uint16_t *to, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t x = ((uint32_t)i ^ seed) * 0x9e3779b9u;
    x = (x ^ x >> 15) * 0x85ebca6bu, x ^= x >> 13;
    to[i] = us_bf16_from_f32((float)(x & 0xffff) * 0x1p-14f - 2);
  }
}

/* Scores that count. */
static double pairs_of(const struct ranges &r) {
  double pairs = 0;
  for (int kind = 0; kind < 2; kind++)
    for (size_t i = 0; i < r.begin[kind].size(); i++) pairs += r.end[kind][i] - r.begin[kind][i];
  return pairs;
}

static void time_shape(const struct shape *s, uint32_t document) {
  struct problem p = {};
  p.of = s, p.stride = s->H * s->Q + s->G * (s->Q + s->V), p.first = s->mask == DRAFT ? s->rows : 0;
  p.queries = s->mask == DRAFT ? s->blocks * BLOCK : s->rows, p.keys = p.first + p.queries;
  p.scale = 1.0f / sqrtf((float)s->Q),
  p.ranges = make_ranges(s->mask, s->rows, s->window, {document}, s->blocks);
  size_t values = (size_t)p.keys * p.stride, outs = (size_t)p.queries * s->H * s->V;
  uint16_t *qkv = owned_space<uint16_t>(&p, values), *dout = owned_space<uint16_t>(&p, outs);
  fill_bits<<<1024, 256>>>(qkv, values, 1), fill_bits<<<1024, 256>>>(dout, outs, 2);
  p.a.k = p.a.v = qkv, p.a.q = qkv + (size_t)p.first * p.stride, p.grads.dout = dout;
  if (s->sink) p.a.sink = owned_copy(&p, std::vector<float>(s->H, 4.0f));
  place_problem(&p);
  double scores = 2.0 * s->H * pairs_of(p.ranges);
  double plan = lab_median_us([&] { return (cudaError_t)us_attention_train_plan(&p.a, 0); });
  double forward = lab_median_us([&] { return (cudaError_t)us_attention_train(&p.a, 0); });
  double backward = lab_median_us([&] { return (cudaError_t)us_attention_train_grad(&p.a, &p.grads, 0); });
  printf("{\"time\": \"%s\", \"document\": %u, \"plan_us\": %.1f, \"forward_ms\": %.4f, \"forward_tflops\": "
         "%.1f, "
         "\"backward_ms\": %.4f, \"backward_tflops\": %.1f}\n",
         s->name, document, plan, forward * 1e-3, scores * (s->Q + s->V) / forward * 1e-6, backward * 1e-3,
         scores * (3 * s->Q + 2 * s->V) / backward * 1e-6);
  fflush(stdout);
  release_problem(&p);
}

/* backward_tflops counts the five products that are needed, as everyone does, not the seven that are made. */
void time_attention(void) {
  static const struct shape timed[] = {
      {"window 128", WINDOW, 32768, 128, 16, 4, 128, 128, true, 0},
      {"full", FULL, 32768, 0, 16, 4, 128, 128, true, 0},
      {"draft, window 1024", DRAFT, 32768, 1024, 16, 4, 128, 128, false, 2048},
      {"Pro, window 128", WINDOW, 8192, 128, 32, 2, 192, 128, true, 0},
      {"Pro, full", FULL, 8192, 0, 32, 2, 192, 128, true, 0},
      {"nano, window 128", WINDOW, 32768, 128, 8, 4, 64, 64, true, 0},
      {"nano, full", FULL, 32768, 0, 8, 4, 64, 64, true, 0},
  };
  for (const struct shape &s : timed)
    for (uint32_t document : {2048u, 4096u}) time_shape(&s, document);
}
