/* lab_prompt_attention.cu: keys and values into pages to the bit, attention over them against double, rows alone against a chunk,
 * and speed: full and windowed layers of MiMo-V2.5-Pro, one of four ranks, and small shapes.
 *
 * Contents: running; pages; attention.
 */
#include "formats/bf16.h"
#include "prefill_lab.h"

#include <cstring>
extern "C" {
#include "kernels/rope/rope.h"
}

static const uint32_t SAMPLES = 192, MUTANTS = 24;

struct shape {
  const char *name;
  uint32_t H, G, Q, V, rotary, window, page_count;
  bool sink;
  uint32_t position, rows; /* of the chunk; all before it stands in the pages */
  bool timed;
};

static const struct shape shapes[] = {
    {"full", 32, 2, 192, 128, 64, 0, 64, false, 3584, 512, true},
    {"windowed", 32, 2, 192, 128, 64, 128, 3, true, 1536, 512, true},
    {"windowed, unaligned", 32, 2, 192, 128, 64, 128, 3, true, 197, 315, false},
    {"pico windowed", 4, 2, 48, 32, 16, 64, 2, true, 130, 382, false},
    {"pico full", 4, 2, 48, 32, 16, 0, 8, false, 0, 512, false},
    {"tiny windowed", 8, 4, 24, 16, 8, 16, 1, true, 75, 100, false},
    {"tiny full", 8, 4, 24, 16, 8, 0, 4, false, 75, 100, false},
    {"three heads a KV head", 6, 2, 64, 64, 32, 0, 8, true, 256, 200, false},
};

struct problem {
  const struct shape *of;
  uint32_t stride, positions;         /* of a row of qkv; of the sequence so far */
  std::vector<float> qkv, rope, sink; /* (positions, stride), (positions, rotary), (H) */
  float *device_qkv, *device_rope, *device_sink;
  uint8_t *pool, *staging;
  uint64_t **tables; /* (1): the layer's */
  uint16_t *out;     /* (rows, H * V) */
  float value_scale, scale;
};

/* ---- running ----------------------------------------------------------------------------------------------------- */

static struct us_prefill_cache cache_of(const struct problem *p) {
  const struct shape *s = p->of;
  struct us_prefill_cache c = {};
  c.pool = p->pool, c.tables = p->tables, c.page_count = s->page_count;
  c.G = (uint16_t)s->G, c.Q = (uint16_t)s->Q, c.V = (uint16_t)s->V;
  return c;
}

static cudaError_t append(const struct problem *p, const struct us_prefill_cache *cache, uint32_t position,
                          uint32_t rows) {
  const struct shape *s = p->of;
  struct us_prefill_append a = {};
  a.cache = *cache, a.kv = p->device_qkv + (size_t)position * p->stride + s->H * s->Q, a.stride = p->stride;
  a.v_first = s->G * s->Q, a.rows = rows, a.position = position, a.rope = p->device_rope,
  a.rotary = s->rotary;
  a.value_scale = p->value_scale, a.eps = 1e-5f;
  return (cudaError_t)us_prefill_append(&a, 0);
}

static cudaError_t attend(const struct problem *p, const struct us_prefill_cache *cache, uint32_t position,
                          uint32_t rows) {
  const struct shape *s = p->of;
  struct us_prefill_attention a = {};
  a.cache = *cache, a.q = p->device_qkv + (size_t)position * p->stride, a.stride = p->stride, a.rows = rows;
  a.position = position, a.H = s->H, a.rope = p->device_rope, a.rotary = s->rotary,
  a.opt_sink = p->device_sink;
  a.window = s->window, a.scale = p->scale, a.out = p->out + (size_t)(position - s->position) * s->H * s->V;
  return (cudaError_t)us_prefill_attention(&a, 0);
}

/* A chunk as a pass does it: a windowed layer attends over staged pages and keeps them afterwards. */
static void run_chunk(const struct problem *p, uint32_t position, uint32_t rows) {
  struct us_prefill_cache cache = cache_of(p), staged = cache;
  if (p->of->window) staged.opt_staging = p->staging, staged.first_tile = position / 64;
  US_CUDA(append(p, &staged, position, rows));
  if (position >= p->of->position) US_CUDA(attend(p, &staged, position, rows));
  if (p->of->window) US_CUDA(append(p, &cache, position, rows));
}

/* Forget everything; chunks of 512 up to the chunk that is looked at. */
static void run_prefix(const struct problem *p) {
  const struct shape *s = p->of;
  US_CUDA(cudaMemset(p->pool, 0, (size_t)s->page_count * us_engine_page_bytes(s->G, s->Q, s->V)));
  for (uint32_t position = 0; position < s->position; position += 512)
    run_chunk(p, position, std::min(512u, s->position - position));
}

static float uniform(uint64_t *state) {
  return (float)(lab_random(state) >> 40) * 0x1p-23f - 1.0f;
}

static void make(struct problem *p, const struct shape *s, uint64_t seed) {
  uint64_t state = seed + s->Q + s->window;
  p->of = s, p->stride = s->H * s->Q + s->G * (s->Q + s->V), p->positions = s->position + s->rows;
  p->value_scale = 0.612f, p->scale = 1.0f / sqrtf((float)s->Q);
  p->qkv.resize((size_t)p->positions * p->stride), p->sink.resize(s->H),
      p->rope.resize((size_t)p->positions * s->rotary);
  for (float &v : p->qkv) v = 2 * uniform(&state);
  for (float &v : p->sink) v = 5 + uniform(&state); /* as much as a hundred keys or so */
  for (uint32_t i = 0; i < p->positions; i++)
    us_rope_table(1e4, s->rotary, i, &p->rope[(size_t)i * s->rotary]);
  p->device_qkv = lab_upload(p->qkv), p->device_rope = lab_upload(p->rope);
  p->device_sink = s->sink ? lab_upload(p->sink) : NULL;
  size_t page = us_engine_page_bytes(s->G, s->Q, s->V);
  std::vector<uint64_t> places(s->page_count);
  for (uint32_t i = 0; i < s->page_count; i++) places[i] = (s->page_count - 1 - i) * page; /* not in order */
  p->tables = lab_upload(std::vector<uint64_t *>(1, lab_upload(places)));
  US_CUDA(cudaMalloc(&p->pool, s->page_count * page));
  US_CUDA(cudaMalloc(&p->staging, 16 * page));
  US_CUDA(cudaMemset(p->staging, 0xff, 16 * page));
  US_CUDA(cudaMalloc(&p->out, (size_t)s->rows * s->H * s->V * 2));
}

static void release(struct problem *p) {
  uint64_t *table = lab_download(p->tables, 1)[0];
  void *owned[] = {p->device_qkv, p->device_rope, p->device_sink, p->pool,
                   p->staging,    p->tables,      table,          p->out};
  for (void *m : owned) US_CUDA(cudaFree(m));
}

/* ---- pages ------------------------------------------------------------------------------------------------------- */

/* Bits of key (or value) of KV head g at a position. */
static std::vector<uint16_t> key_of(const struct problem *p, uint32_t position, uint32_t g) {
  const struct shape *s = p->of;
  const float *k = &p->qkv[(size_t)position * p->stride + s->H * s->Q + g * s->Q];
  std::vector<float> x(k, k + s->Q);
  std::vector<uint16_t> bits(s->Q);
  us_rope_apply(&p->rope[(size_t)position * s->rotary], s->rotary, x.data());
  for (uint32_t d = 0; d < s->Q; d++) bits[d] = us_bf16_from_f32(x[d]);
  return bits;
}

static std::vector<uint16_t> value_of(const struct problem *p, uint32_t position, uint32_t g) {
  const struct shape *s = p->of;
  const float *v = &p->qkv[(size_t)position * p->stride + s->H * s->Q + s->G * s->Q + g * s->V];
  std::vector<uint16_t> bits(s->V);
  for (uint32_t d = 0; d < s->V; d++) bits[d] = us_bf16_from_f32(v[d] * p->value_scale);
  return bits;
}

/* After the chunk the pages hold the last positions, and zeros between a key's end and its stride. */
static void check_pages(const struct problem *p) {
  const struct shape *s = p->of;
  uint32_t page = us_engine_page_bytes(s->G, s->Q, s->V), stride = us_engine_k_stride(s->Q),
           held = s->page_count * 64;
  std::vector<uint8_t> pool = lab_download(p->pool, (size_t)s->page_count * page);
  uint64_t bad = 0, checked = 0;
  for (uint32_t position = p->positions > held ? p->positions - held : 0; position < p->positions; position++)
    for (uint32_t g = 0; g < s->G; g++) {
      const uint8_t *at = &pool[(size_t)(s->page_count - 1 - position / 64 % s->page_count) * page];
      const uint16_t *keys = (const uint16_t *)at + (g * 64 + position % 64) * stride;
      const uint16_t *values =
          (const uint16_t *)(at + us_engine_v_offset(s->G, s->Q)) + g * s->V * 64 + position % 64;
      std::vector<uint16_t> k = key_of(p, position, g), v = value_of(p, position, g);
      for (uint32_t d = 0; d < stride; d++) bad += keys[d] != (d < s->Q ? k[d] : 0), checked++;
      for (uint32_t d = 0; d < s->V; d++) bad += values[d * 64] != v[d], checked++;
    }
  us_gpu_report("append: keys and values to the bit", checked, bad, 0);
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

enum mistake { RIGHT, NO_SINK, WIDER, KEY_SHIFTED, VALUE_SHIFTED, NOT_ROTATED, MISTAKES };
static const char *const mistake_names[MISTAKES] = {"",
                                                    "sink dropped",
                                                    "window one wider",
                                                    "keys one position off",
                                                    "values one position off",
                                                    "query not rotated"};

static bool applies(const struct shape *s, enum mistake m) {
  return (m != NO_SINK || s->sink) && (m != WIDER || s->window);
}

struct attended {
  std::vector<double> out, allowed; /* (V) */
};

/* One row and head in double. What may be off: a score by its two-term query and 2 Q / 16 multiplies; weights by their two terms
 * and e^x; sums by what each tile's multiplies truncate. */
static struct attended expect(const struct problem *p, uint32_t position, uint32_t head,
                              enum mistake mistake) {
  const struct shape *s = p->of;
  const float *row = &p->qkv[(size_t)position * p->stride + head * s->Q];
  uint32_t g = head / (s->H / s->G), window = s->window + (mistake == WIDER);
  uint32_t begin = s->window && position + 1 > window ? position + 1 - window : 0,
           tiles = position / 64 - begin / 64 + 1;
  std::vector<float> q(row, row + s->Q);
  if (mistake != NOT_ROTATED) us_rope_apply(&p->rope[(size_t)position * s->rotary], s->rotary, q.data());
  std::vector<double> score(position + 1 - begin);
  double most = s->sink && mistake != NO_SINK ? p->sink[head] : -INFINITY, error = 0;
  for (uint32_t j = begin; j <= position; j++) {
    std::vector<uint16_t> k = key_of(p, mistake == KEY_SHIFTED && j ? j - 1 : j, g);
    double sum = 0, magnitude = 0;
    for (uint32_t d = 0; d < s->Q; d++) {
      double term = (double)q[d] * us_bf16_to_f32(k[d]);
      sum += term, magnitude += fabs(term);
    }
    score[j - begin] = sum * p->scale;
    error = fmax(error, magnitude * p->scale * (0x1p-16 + (s->Q / 8 + 2) * LAB_TRUNC));
    most = fmax(most, sum * p->scale);
  }
  double denominator = s->sink && mistake != NO_SINK ? exp(p->sink[head] - most) : 0;
  struct attended a = {std::vector<double>(s->V, 0), std::vector<double>(s->V, 0)};
  for (double v : score) denominator += exp(v - most);
  for (uint32_t j = begin; j <= position; j++) {
    double weight = exp(score[j - begin] - most) / denominator;
    std::vector<uint16_t> v = value_of(p, mistake == VALUE_SHIFTED && j ? j - 1 : j, g);
    for (uint32_t d = 0; d < s->V; d++) {
      double term = weight * us_bf16_to_f32(v[d]);
      a.out[d] += term, a.allowed[d] += fabs(term) * (2 * error + 0x1p-16 + (8 + tiles) * LAB_TRUNC);
    }
  }
  for (uint32_t d = 0; d < s->V; d++) {
    int exponent;
    frexp(fabs(a.out[d]) + a.allowed[d], &exponent);
    a.allowed[d] += ldexp(1, exponent - 9);
  }
  return a;
}

static void check_attention(const struct problem *p, uint64_t seed) {
  const struct shape *s = p->of;
  uint64_t state = seed;
  uint32_t samples = s->position > 2000 ? SAMPLES / 4 : SAMPLES;
  std::vector<uint16_t> out = lab_download(p->out, (size_t)s->rows * s->H * s->V);
  std::vector<double> ratios[MISTAKES];
  char text[96];
  snprintf(text, sizeof text, "%u heads, %u KV, %u+%u, rows %u at %u", s->H, s->G, s->Q, s->V, s->rows,
           s->position);
  struct lab_result r = {s->name, text, "bf16"};
  for (uint32_t i = 0; i < samples; i++) {
    uint32_t row = i == 0   ? 0
                   : i == 1 ? s->rows - 1
                            : (uint32_t)(lab_random(&state) % s->rows),
             head = (uint32_t)(lab_random(&state) % s->H);
    const uint16_t *got = &out[((size_t)row * s->H + head) * s->V];
    struct attended a = expect(p, s->position + row, head, RIGHT);
    for (uint32_t d = 0; d < s->V; d++)
      lab_sample(&r, us_bf16_to_f32(got[d]) * 0x1p-64 - a.out[d], a.allowed[d], 0);
    for (int m = RIGHT + 1; i < MUTANTS && m < MISTAKES; m++) {
      if (!applies(s, (enum mistake)m)) continue;
      struct attended wrong = expect(p, s->position + row, head, (enum mistake)m);
      double worst = 0;
      for (uint32_t d = 0; d < s->V; d++)
        worst = fmax(worst, fabs(us_bf16_to_f32(got[d]) * 0x1p-64 - wrong.out[d]) / a.allowed[d]);
      ratios[m].push_back(worst);
    }
  }
  for (int m = RIGHT + 1; m < MISTAKES; m++)
    if (!ratios[m].empty()) lab_mutation(&r, mistake_names[m], ratios[m]);
  lab_report(&r);
}

/* The chunk in pieces of many lengths: the same bits. */
static void check_pieces(const struct problem *p) {
  static const uint32_t lengths[] = {1, 64, 3, 17, 130, 1, 40, 200};
  const struct shape *s = p->of;
  size_t words = (size_t)s->rows * s->H * s->V / 2;
  std::vector<uint32_t> whole = lab_download((const uint32_t *)p->out, words);
  run_prefix(p);
  US_CUDA(cudaMemset(p->out, 0xff, words * 4));
  for (uint32_t begin = 0, i = 0; begin < s->rows; i++) {
    uint32_t rows = std::min(s->rows - begin, lengths[i % 8]);
    run_chunk(p, s->position + begin, rows);
    begin += rows;
  }
  std::vector<uint32_t> pieces = lab_download((const uint32_t *)p->out, words);
  char check[96];
  snprintf(check, sizeof check, "attention, %s: rows in other chunks give the same bits", s->name);
  lab_same_bits(check, whole.data(), pieces.data(), words);
}

/* A row whose value is not a number: rows before it, and those whose window has left it behind, keep their bits. */
static void check_spoilt(struct problem *p) {
  const struct shape *s = p->of;
  size_t width = (size_t)s->H * s->V;
  uint32_t at = s->rows / 2 + 5, bad = 0, first_bad = 0;
  std::vector<uint16_t> right = lab_download(p->out, s->rows * width);
  float odd[3] = {INFINITY, NAN, -INFINITY};
  float *value = p->device_qkv + (size_t)(s->position + at) * p->stride + s->H * s->Q + s->G * s->Q;
  for (uint32_t d = 0; d < s->G * s->V; d++)
    US_CUDA(cudaMemcpy(value + d, &odd[d % 3], sizeof(float), cudaMemcpyHostToDevice));
  run_prefix(p);
  run_chunk(p, s->position, s->rows);
  std::vector<uint16_t> spoilt = lab_download(p->out, s->rows * width);
  for (uint32_t row = 0; row < s->rows; row++) {
    bool same = !memcmp(&right[row * width], &spoilt[row * width], width * 2);
    bool sees = row >= at && (!s->window || row - at < s->window);
    if (same == sees && bad++ == 0) first_bad = row;
  }
  US_CUDA(cudaMemcpy(p->device_qkv, p->qkv.data(), p->qkv.size() * sizeof(float), cudaMemcpyHostToDevice));
  char check[112];
  snprintf(check, sizeof check, "attention, %s: values that are not finite reach only rows that see them",
           s->name);
  us_gpu_report(check, s->rows, bad, first_bad);
}

static void time_attention(const struct problem *p) {
  const struct shape *s = p->of;
  struct us_prefill_cache cache = cache_of(p);
  if (s->window) cache.opt_staging = p->staging, cache.first_tile = s->position / 64;
  double keys = 0;
  for (uint32_t r = 0; r < s->rows; r++) keys += s->window ? s->window : s->position + r + 1;
  char text[96];
  snprintf(text, sizeof text, "%u heads, %u KV, %u+%u, rows %u at %u", s->H, s->G, s->Q, s->V, s->rows,
           s->position);
  struct lab_time t = {s->name, text, "bf16", 0, 0, keys * s->H * 2.0 * (s->Q + s->V), 0}, a = t;
  t.us = lab_median_us([&]() { return attend(p, &cache, s->position, s->rows); });
  lab_time_report(&t);
  a.op = "append", a.flops = 0, a.bytes = (double)s->rows * s->G * (s->Q + s->V) * 6;
  a.us = lab_median_us([&]() { return append(p, &cache, s->position, s->rows); });
  lab_time_report(&a);
}

void lab_prefill_attention(uint64_t seed) {
  for (const struct shape &s : shapes) {
    struct problem p = {};
    make(&p, &s, seed);
    run_prefix(&p);
    run_chunk(&p, s.position, s.rows);
    US_CUDA(cudaDeviceSynchronize());
    check_pages(&p);
    check_attention(&p, seed);
    check_pieces(&p);
    check_spoilt(&p);
    if (s.timed) time_attention(&p);
    release(&p);
  }
}
