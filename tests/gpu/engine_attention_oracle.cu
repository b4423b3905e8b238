/* engine_attention_oracle.cu: the attention test's worlds, and attention in double precision on the host.
 *
 * Contents: worlds; the definition.
 */
#include "engine_attention.h"
#include "formats/bf16.h"

#include <random>
#include <thread>

#define THETA       10000.0
#define THETA_OTHER 1e7

/* ---- worlds -------------------------------------------------------------------------------------------------------------- */

static uint64_t page_of(const struct world *w, uint32_t sequence, uint32_t layer, uint32_t position) {
  return w->table[((uint64_t)sequence * ATTENTION_LAYERS + layer) * w->page_count +
                  position / 64 % w->page_count] /
         2;
}

/* Index in the pool of a key's first value, and of value d. */
static uint64_t key_at(const struct world *w, uint32_t layer, uint32_t sequence, uint32_t position,
                       uint32_t g) {
  return page_of(w, sequence, layer, position) + (g * 64 + position % 64) * us_engine_k_stride(w->s.Q);
}
static uint64_t value_at(const struct world *w, uint32_t layer, uint32_t sequence, uint32_t position,
                         uint32_t g, uint32_t d) {
  return page_of(w, sequence, layer, position) + us_engine_v_offset(w->s.G, w->s.Q) / 2 +
         (g * w->s.V + d) * 64 + position % 64;
}

static void rope_row(double theta, uint32_t rotary, uint32_t position, float *row) {
  for (uint32_t i = 0; i < rotary / 2; i++) {
    double angle = position * pow(theta, -2.0 * i / rotary);
    row[i] = (float)cos(angle), row[rotary / 2 + i] = (float)sin(angle);
  }
}

/* First row of the pass that belongs to the row's sequence, and one past the last. */
static void run_of(const struct world *w, size_t r, size_t *first, size_t *end) {
  *first = r, *end = r + 1;
  while (*first > 0 && w->rows[*first - 1].sequence == w->rows[r].sequence) --*first;
  while (*end < w->rows.size() && w->rows[*end].sequence == w->rows[r].sequence) ++*end;
}

static uint32_t first_key(const struct world *w, uint32_t position, int more) {
  uint32_t window = w->s.window ? (uint32_t)((int)w->s.window + more) : 0;
  return window && position + 1 > window ? position + 1 - window : 0;
}

/* Cached keys that some row sees, and the one before: random; the rest stays NaN. Dims beyond Q are 0 in every key. */
static void fill_pool(struct world *w, std::mt19937_64 *random) {
  std::normal_distribution<float> normal;
  uint32_t stride = us_engine_k_stride(w->s.Q);
  for (size_t page = 0; page < w->table.size(); page++)
    for (uint32_t slot = 0; slot < 64 * w->s.G; slot++)
      for (uint32_t d = w->s.Q; d < stride; d++) w->pool[w->table[page] / 2 + slot * stride + d] = 0;
  for (size_t r = 0; r < w->rows.size(); r++) {
    size_t first, end;
    uint32_t sequence = w->rows[r].sequence;
    run_of(w, r, &first, &end);
    if (sequence == ATTENTION_ABSENT || first != r) continue;
    for (uint32_t p = first_key(w, w->rows[r].position, 1); p < w->rows[r].position; p++)
      for (uint32_t g = 0; g < w->s.G; g++) {
        for (uint32_t d = 0; d < w->s.Q; d++)
          w->pool[key_at(w, ATTENTION_LAYERS - 1, sequence, p, g) + d] = us_bf16_from_f32(normal(*random));
        for (uint32_t d = 0; d < w->s.V; d++)
          w->pool[value_at(w, ATTENTION_LAYERS - 1, sequence, p, g, d)] = us_bf16_from_f32(normal(*random));
      }
  }
}

static void fill_floats(std::vector<float> *x, size_t n, float mean, float deviation,
                        std::mt19937_64 *random) {
  std::normal_distribution<float> normal(mean, deviation);
  x->resize(n);
  for (float &v : *x) v = normal(*random);
}

static void make_host(struct world *w, uint64_t seed) {
  std::mt19937_64 random(seed);
  const struct attention_shape *s = &w->s;
  w->page_bytes = us_engine_page_bytes(s->G, s->Q, s->V);
  uint32_t all = (w->positions + 63) / 64, ring = s->window ? (s->window + 15 + 63) / 64 : all;
  w->page_count = ring < all ? ring : all;
  w->qkv_rows = s->H * s->Q + s->G * (s->Q + s->V);
  w->tiles = (uint32_t)w->rows.size() / 8;
  w->scale = (float)(1 / sqrt(s->Q)), w->value_scale = 0.612f, w->eps = 1e-5f;
  size_t pages = (size_t)w->sequences * ATTENTION_LAYERS * w->page_count;
  for (size_t i = 0; i < pages; i++) w->table.push_back(i * w->page_bytes);
  std::shuffle(w->table.begin(), w->table.end(), random);
  w->pool.assign(pages * w->page_bytes / 2, 0x7fff);
  fill_pool(w, &random);
  w->pool_first = w->pool;
  fill_floats(&w->qkv, w->rows.size() * w->qkv_rows, 0, 1.5f, &random);
  fill_floats(&w->sink, s->H, 1, 1, &random);
  fill_floats(&w->q_norm, s->Q, 1, 0.3f, &random);
  fill_floats(&w->k_norm, s->Q, 1, 0.3f, &random);
  w->rope.resize((size_t)w->positions * s->rotary);
  for (uint32_t p = 0; p < w->positions; p++)
    rope_row(THETA, s->rotary, p, w->rope.data() + (size_t)p * s->rotary);
}

template <class T> static T *own(struct world *w, const std::vector<T> &host) {
  T *device = lab_upload(host);
  w->owned.push_back(device);
  return device;
}
static void *own_bytes(struct world *w, size_t bytes, int fill) {
  void *device;
  US_CUDA(cudaMalloc(&device, bytes));
  US_CUDA(cudaMemset(device, fill, bytes));
  w->owned.push_back(device);
  return device;
}

/* A projection that copies `source`, then attention of every row tile; operation 0 is what `ready` names. */
static void make_ops(struct world *w) {
  const struct attention_shape *s = &w->s;
  std::vector<struct us_engine_op> ops(2 + w->tiles);
  uint64_t partial = us_engine_attention_partial_bytes(s->H, s->G, s->V, s->window, w->positions);
  uint32_t counters = us_engine_attention_counters(s->H, s->G);
  w->d_arrivals = (uint32_t *)own_bytes(w, w->tiles * counters * 4, 0);
  uint8_t *partials = (uint8_t *)own_bytes(w, w->tiles * partial, 0xff);
  w->d_operand = (uint8_t *)own_bytes(w, w->tiles * s->H * s->V * 16, 0xff);
  float *rope = own(w, w->rope), *sink = own(w, w->sink), *q_norm = own(w, w->q_norm),
        *k_norm = own(w, w->k_norm);
  for (uint32_t i = 0; i < 2; i++) {
    ops[i].kind = US_ENGINE_ROUTE, ops[i].wait = i ? 0 : US_ENGINE_NONE;
    ops[i].route.logits = w->d_source, ops[i].route.opt_routed = (uint32_t *)w->d_qkv,
    ops[i].route.E = i ? (uint32_t)w->qkv.size() : 0;
  }
  for (uint32_t t = 0; t < w->tiles; t++) {
    struct us_engine_op *op = &ops[2 + t];
    op->kind = US_ENGINE_ATTENTION, op->row_tile = t, op->wait = 1;
    op->program = s->draft ? US_ENGINE_PASS_DRAFT : US_ENGINE_PASS_TARGET;
    struct us_engine_attention *a = &op->attention;
    a->qkv = w->d_qkv + (size_t)t * 8 * w->qkv_rows, a->operand = w->d_operand + (size_t)t * s->H * s->V * 16;
    a->partial = (float *)(partials + t * partial), a->arrivals = w->d_arrivals + t * counters;
    a->sink = s->sink ? sink : NULL, a->q_norm = s->draft ? q_norm : NULL,
    a->k_norm = s->draft ? k_norm : NULL;
    a->rope = rope, a->ready = US_ENGINE_NONE, a->layer = ATTENTION_LAYERS - 1, a->qkv_rows = w->qkv_rows;
    a->H = (uint16_t)s->H, a->G = (uint16_t)s->G, a->Q = (uint16_t)s->Q, a->V = (uint16_t)s->V,
    a->rotary = (uint16_t)s->rotary;
    a->window = s->window, a->page_count = w->page_count, a->draft = s->draft;
    a->scale = w->scale, a->value_scale = w->value_scale, a->eps = w->eps;
  }
  w->ops = own(w, ops);
  w->rank.done = (uint32_t *)own_bytes(w, ops.size() * 4, 0);
}

static std::vector<struct us_engine_row> rows_of(const struct world *w, int only) {
  std::vector<struct us_engine_row> rows(US_ENGINE_MAX_ROWS, {0, 0, US_ENGINE_NONE, 0});
  for (size_t r = 0; r < w->rows.size(); r++)
    if (only < 0 || only == (int)r)
      rows[r].sequence = w->rows[r].sequence, rows[r].position = w->rows[r].position;
  return rows;
}

void world_make(struct world *w, const struct attention_shape *s, std::vector<struct attention_row> rows,
                uint64_t seed) {
  *w = {};
  w->s = *s, w->rows = rows;
  while (w->rows.size() % 8) w->rows.push_back({ATTENTION_ABSENT, 0});
  for (const struct attention_row &r : w->rows) {
    if (r.sequence == ATTENTION_ABSENT) continue;
    if (r.sequence >= w->sequences) w->sequences = r.sequence + 1;
    if (r.position >= w->positions) w->positions = r.position + 1;
  }
  make_host(w, seed);
  w->d_pool = (uint8_t *)own(w, w->pool), w->d_source = own(w, w->qkv);
  w->d_qkv = (float *)own_bytes(w, w->qkv.size() * 4, 0xff);
  std::vector<struct us_engine_state> state(1);
  uint64_t *table = own(w, w->table);
  for (uint32_t q = 0; q < w->sequences; q++) {
    std::vector<const uint64_t *> layers;
    for (int l = 0; l < ATTENTION_LAYERS; l++)
      layers.push_back(table + ((size_t)q * ATTENTION_LAYERS + l) * w->page_count);
    (s->draft ? state[0].sequence[q].draft_kv : state[0].sequence[q].kv).tables = own(w, layers);
  }
  w->rank.state = own(w, state);
  make_ops(w);
  w->rank.ranks = 1, w->rank.ops = w->ops;
  (s->draft ? w->rank.draft_pool : w->rank.kv_pool) = w->d_pool;
  w->rank.stuck =
      (struct us_engine_stuck *)own_bytes(w, 256 * US_ENGINE_ROLES * sizeof(struct us_engine_stuck), 0);
}

void world_free(struct world *w) {
  for (void *p : w->owned) US_CUDA(cudaFree(p));
  w->owned.clear();
}

void world_upload_qkv(struct world *w) {
  US_CUDA(cudaMemcpy(w->d_source, w->qkv.data(), w->qkv.size() * 4, cudaMemcpyHostToDevice));
}

void world_run(struct world *w, struct run_options o) {
  std::vector<struct us_engine_row> rows = rows_of(w, o.only);
  struct us_engine_state *state = w->rank.state;
  US_CUDA(cudaMemcpy(w->s.draft ? state->draft : state->target, rows.data(), sizeof state->draft,
                     cudaMemcpyHostToDevice));
  if (o.reset)
    US_CUDA(cudaMemcpy(w->d_pool, w->pool_first.data(), w->pool.size() * 2, cudaMemcpyHostToDevice));
  US_CUDA(cudaMemset(w->d_qkv, 0xff, w->qkv.size() * 4));
  US_CUDA(cudaMemset(w->d_operand, 0xff, (size_t)w->tiles * w->s.H * w->s.V * 16));
  US_CUDA(cudaMemset(w->rank.done, 0, (2 + w->tiles) * 4));
  for (uint32_t t = 0; t < w->tiles; t++) {
    uint32_t ready = o.early ? 0 : US_ENGINE_NONE;
    US_CUDA(cudaMemcpy(&w->ops[2 + t].attention.ready, &ready, 4, cudaMemcpyHostToDevice));
    US_CUDA(cudaMemcpy(&w->ops[2 + t].shift, &o.shift, 4, cudaMemcpyHostToDevice));
  }
  struct us_engine_launch launch = {};
  launch.ranks = 1, launch.last = 2 + w->tiles, launch.rounds = 1, launch.jitter = o.jitter,
  launch.timeout_ns = us_gpu_timeout(5000000000u);
  launch.rank[0] = w->rank, launch.rank[0].blocks = o.blocks;
  o.launch(&launch, o.blocks, o.delay_ns);
}

bool world_outputs(struct world *w) {
  size_t width = w->s.H * w->s.V;
  std::vector<uint16_t> raw(w->rows.size() * width);
  std::vector<uint32_t> counters(w->tiles * us_engine_attention_counters(w->s.H, w->s.G));
  US_CUDA(cudaDeviceSynchronize());
  US_CUDA(cudaMemcpy(raw.data(), w->d_operand, raw.size() * 2, cudaMemcpyDeviceToHost));
  US_CUDA(cudaMemcpy(counters.data(), w->d_arrivals, counters.size() * 4, cudaMemcpyDeviceToHost));
  w->pool_out.resize(w->pool.size());
  US_CUDA(cudaMemcpy(w->pool_out.data(), w->d_pool, w->pool.size() * 2, cudaMemcpyDeviceToHost));
  w->out.resize(raw.size());
  for (size_t r = 0; r < w->rows.size(); r++)
    for (size_t c = 0; c < width; c++) {
      size_t at = (r / 8 * width * 16 + us_engine_operand_offset(r % 8, (uint32_t)c)) / 2;
      w->out[r * width + c] = us_bf16_to_f32(raw[at]) / US_ENGINE_OPERAND_UNIT;
    }
  return std::count(counters.begin(), counters.end(), 0u) == (ptrdiff_t)counters.size();
}

/* ---- the definition -------------------------------------------------------------------------------------------------------- */

/* A head of a row in FP32: norm in the order of attention_head.cuh, rotation as kernels/rope. */
static std::vector<float> head_of(const struct world *w, size_t r, size_t column,
                                  const std::vector<float> *norm, double theta) {
  const struct attention_shape *s = &w->s;
  const float *from = w->qkv.data() + r * w->qkv_rows + column;
  std::vector<float> x(from, from + s->Q), table(s->rotary);
  if (norm) {
    float lane[16] = {};
    for (uint32_t d = 0; d < s->Q; d++) lane[d / 2 % 16] = fmaf(x[d], x[d], lane[d / 2 % 16]);
    for (int step = 8; step; step /= 2)
      for (int l = 0; l < step; l++) lane[l] = lane[l] + lane[l + step];
    float scale = 1.0f / sqrtf(lane[0] / (float)s->Q + w->eps);
    for (uint32_t d = 0; d < s->Q; d++) x[d] = x[d] * scale * (*norm)[d];
  }
  rope_row(theta, s->rotary, w->rows[r].position, table.data());
  for (uint32_t i = 0, half = s->rotary / 2; i < half; i++) {
    float a = x[i], b = x[half + i];
    x[i] = a * table[i] - b * table[half + i], x[half + i] = b * table[i] + a * table[half + i];
  }
  return x;
}

static std::vector<uint16_t> new_key(const struct world *w, size_t r, uint32_t g, double theta) {
  std::vector<uint16_t> bits;
  for (float x : head_of(w, r, (w->s.H + g) * w->s.Q, w->s.draft ? &w->k_norm : NULL, theta))
    bits.push_back(us_bf16_from_f32(x));
  return bits;
}
static uint16_t new_value(const struct world *w, size_t r, uint32_t g, uint32_t d) {
  return us_bf16_from_f32(w->qkv[r * w->qkv_rows + (w->s.H + w->s.G) * w->s.Q + g * w->s.V + d] *
                          w->value_scale);
}

void oracle_append(struct world *w, uint32_t layer, float keys, float values) {
  for (size_t r = 0; r < w->rows.size(); r++)
    for (uint32_t g = 0; g < w->s.G && w->rows[r].sequence != ATTENTION_ABSENT; g++) {
      uint32_t sequence = w->rows[r].sequence, position = w->rows[r].position;
      std::vector<uint16_t> key = new_key(w, r, g, THETA);
      for (uint32_t d = 0; d < w->s.Q; d++)
        w->pool[key_at(w, layer, sequence, position, g) + d] =
            us_bf16_from_f32(us_bf16_to_f32(key[d]) * keys);
      for (uint32_t d = 0; d < w->s.V; d++)
        w->pool[value_at(w, layer, sequence, position, g, d)] =
            us_bf16_from_f32(us_bf16_to_f32(new_value(w, r, g, d)) * values);
    }
}

/* Keys and values that row r sees of KV head g: (n, Q) and (n, V). */
static size_t seen_by(const struct world *w, size_t r, uint32_t g, struct mistake m, std::vector<double> *k,
                      std::vector<double> *v) {
  size_t first, end, n = 0;
  run_of(w, r, &first, &end);
  uint32_t fresh = w->rows[first].position, sequence = w->rows[r].sequence,
           begin = first_key(w, w->rows[r].position, m.window);
  uint32_t last = w->s.draft ? w->rows[end - 1].position : w->rows[r].position;
  for (uint32_t p = begin; p <= last; p++, n++) {
    size_t row = first + (p - fresh); /* if new */
    std::vector<uint16_t> key =
        p >= fresh ? new_key(w, row, g, m.theta ? THETA_OTHER : THETA) : std::vector<uint16_t>();
    const uint16_t *bits =
        p >= fresh ? key.data() : w->pool.data() + key_at(w, ATTENTION_LAYERS - 1, sequence, p, g);
    for (uint32_t d = 0; d < w->s.Q; d++) k->push_back(us_bf16_to_f32(bits[d]));
    for (uint32_t d = 0; d < w->s.V; d++)
      v->push_back(us_bf16_to_f32(p >= fresh
                                      ? new_value(w, row, g, d)
                                      : w->pool[value_at(w, ATTENTION_LAYERS - 1, sequence, p, g, d)]));
  }
  return n;
}

static void attend_head(const struct world *w, size_t r, uint32_t h, struct mistake m, size_t n,
                        const std::vector<double> &k, const std::vector<double> &v, double *out,
                        double *magnitude) {
  const struct attention_shape *s = &w->s;
  std::vector<float> q = head_of(w, r, h * s->Q, s->draft ? &w->q_norm : NULL, m.theta ? THETA_OTHER : THETA);
  std::vector<double> weight(n);
  double most = s->sink && !m.no_sink ? w->sink[h] : -INFINITY, sum = 0;
  for (size_t j = 0; j < n; j++) {
    for (uint32_t d = 0; d < s->Q; d++) weight[j] += q[d] * k[j * s->Q + d];
    weight[j] *= w->scale, most = fmax(most, weight[j]);
  }
  for (size_t j = 0; j < n; j++) weight[j] = exp(weight[j] - most), sum += weight[j];
  if (s->sink && !m.no_sink) sum += exp(w->sink[h] - most);
  for (size_t j = 0; j < n; j++)
    for (uint32_t d = 0; d < s->V; d++) {
      double x = weight[j] / sum * v[(j + m.values) % n * s->V + d];
      out[d] += x, magnitude[d] += fabs(x);
    }
}

void oracle(const struct world *w, struct mistake m, std::vector<double> *expected,
            std::vector<double> *magnitude) {
  size_t width = w->s.H * w->s.V, items = w->rows.size() * w->s.G;
  expected->assign(w->rows.size() * width, 0), magnitude->assign(w->rows.size() * width, 0);
  std::vector<std::thread> threads;
  unsigned count = std::thread::hardware_concurrency();
  for (unsigned t = 0; t < count; t++)
    threads.emplace_back([=]() {
      for (size_t i = t; i < items; i += count) {
        size_t r = i / w->s.G;
        uint32_t g = (uint32_t)(i % w->s.G), group = w->s.H / w->s.G;
        std::vector<double> k, v;
        if (w->rows[r].sequence == ATTENTION_ABSENT) continue;
        size_t n = seen_by(w, r, g, m, &k, &v);
        for (uint32_t h = g * group; h < (g + 1) * group; h++)
          attend_head(w, r, h, m, n, k, v, expected->data() + r * width + h * w->s.V,
                      magnitude->data() + r * width + h * w->s.V);
      }
    });
  for (std::thread &t : threads) t.join();
}
