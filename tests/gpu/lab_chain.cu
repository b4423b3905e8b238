/* lab_chain.cu: a small model's list without attention, run in many ways that must give the same bits: one launch or one an
 * operation, few blocks or many, with delays, a row alone or among eight, an Inf in another row. */
#include "formats/bf16.h"
#include "lab_engine.h"

#include <cstring>

static const uint32_t D = 768, DENSE = 512, F = 128, E = 32, TOP_K = 4, N = 1000, LAYERS = 3;

struct model {
  struct lab_weights gate_up, down, router, expert_up, expert_down, head; /* count: layers, or layers * E */
  std::vector<uint16_t> table;
  std::vector<float> norm, bias;
};

/* What a run leaves, by rank: residual (8, D), then logits (8, N). */
struct result {
  std::vector<float> residual, logits;
};

struct how {
  uint32_t ranks = 1, rounds = 1, jitter = 0, rows = 0xff;
  bool each = false, inf = false; /* inf: in row 3 */
};

static struct lab_weights make(enum us_format format, uint32_t rows, uint32_t cols, uint32_t count,
                               bool gated, uint32_t parts, uint32_t tile_rows, uint64_t seed) {
  struct lab_weights w = lab_weights(format, rows, cols);
  w.count = count, w.gated = gated, w.parts = parts;
  lab_weights_make(&w, seed, tile_rows);
  return w;
}

static struct model make_model(uint64_t seed) {
  struct model m;
  uint64_t state = seed;
  m.gate_up = make(US_FORMAT_BF16, 2 * DENSE, D, LAYERS, true, 1, 0, seed);
  m.down = make(US_FORMAT_FP8, D, DENSE, LAYERS, false, 2, 0, seed);
  m.router = make(US_FORMAT_F32, E, D, LAYERS, false, 2, 0, seed);
  m.expert_up = make(US_FORMAT_MXFP4, 2 * F, D, LAYERS * E, true, 1, 0, seed);
  m.expert_down = make(US_FORMAT_MXFP4, D, F, LAYERS * E, false, 1, 16, seed);
  m.head = make(US_FORMAT_FP8, N, D, 1, false, 1, 0, seed);
  m.table.resize(8 * D), m.norm.resize(D), m.bias.resize(E);
  for (uint16_t &x : m.table) x = us_bf16_from_f32((float)(lab_random(&state) >> 40) * 0x1p-23f - 1.0f);
  for (float &x : m.norm) x = 0.75f + (float)(lab_random(&state) >> 40) * 0x1p-25f;
  for (float &x : m.bias) x = (float)(lab_random(&state) >> 40) * 0x1p-27f;
  return m;
}

static void free_model(struct model *m) {
  struct lab_weights *all[] = {&m->gate_up, &m->down, &m->router, &m->expert_up, &m->expert_down, &m->head};
  for (struct lab_weights *w : all) lab_weights_free(w);
}

/* Buffers of one rank. */
struct rank {
  float *residual, *logits, *scores;
  void *normed, *inner, *pairs;
  const float *norm, *bias;
};

static void add_reduce(struct lab_run *run, uint32_t i, const struct rank *r, uint32_t addends) {
  struct us_engine_reduce reduce = {};
  reduce.residual = r->residual, reduce.weight = r->norm, reduce.operand = r->normed, reduce.eps = 1e-5f;
  reduce.addends = addends;
  lab_add_reduce(run, i, reduce);
}

static void add_layer(struct lab_run *run, uint32_t i, const struct model *m, const struct rank *r,
                      uint32_t layer) {
  lab_add_gemm(run, i, &m->gate_up, layer, r->normed, r->inner, US_ENGINE_SWIGLU);
  lab_add_gemm(run, i, &m->down, layer, r->inner, NULL, US_ENGINE_PUSH);
  add_reduce(run, i, r, 2);
  lab_add_gemm(run, i, &m->router, layer, r->normed, r->scores, US_ENGINE_STORE);
  struct us_engine_route route = {r->scores, r->bias, 2, E, E, TOP_K, 1.5f, true, false, 0, NULL, 0, NULL, 0, false};
  uint32_t op = lab_add_route(run, i, route, layer);
  lab_add_up(run, i, &m->expert_up, layer * E, r->normed, r->pairs, op);
  lab_add_down(run, i, &m->expert_down, layer * E, r->pairs, op);
  add_reduce(run, i, r, 1);
}

static struct rank add_rank(struct lab_run *run, uint32_t i, const struct model *m, const uint16_t *table) {
  struct rank r;
  r.residual = (float *)lab_buffer(run, sizeof(float) * 8 * D, 0xff),
  r.logits = (float *)lab_buffer(run, sizeof(float) * 8 * N, 0xff);
  r.scores = (float *)lab_buffer(run, sizeof(float) * 2 * 8 * E, 0xff);
  r.normed = lab_buffer(run, D * 16, 0xff), r.inner = lab_buffer(run, DENSE * 16, 0xff);
  r.pairs = lab_buffer(run, 8 * TOP_K * us_engine_pair_bytes(F), 0xff);
  r.norm = lab_keep(run, lab_upload(m->norm)), r.bias = lab_keep(run, lab_upload(m->bias));
  run->launch.rank[i].embed[0] = table, run->launch.rank[i].embed_rows = 8;
  add_reduce(run, i, &r, 0);
  for (uint32_t layer = 0; layer < LAYERS; layer++) add_layer(run, i, m, &r, layer);
  lab_add_gemm(run, i, &m->head, 0, r.normed, r.logits, US_ENGINE_STORE);
  return r;
}

static struct result run_model(const struct model *m, const struct how how) {
  struct lab_run run;
  struct result result;
  std::vector<struct rank> ranks;
  lab_run_begin(&run, lab_ranks{how.ranks, true, D, 2});
  lab_set_rows(&run, how.rows);
  std::vector<uint16_t> table = m->table;
  if (how.inf) table[3 * D + 77] = 0x7f80;
  const uint16_t *device_table = lab_keep(&run, lab_upload(table));
  for (uint32_t i = 0; i < how.ranks; i++) ranks.push_back(add_rank(&run, i, m, device_table));
  run.launch.jitter = how.jitter;
  lab_upload_ops(&run);
  if (how.each)
    lab_launch_each(&run);
  else
    lab_launch(&run, how.rounds);
  for (const struct rank &r : ranks) {
    std::vector<float> residual = lab_download(r.residual, 8 * D), logits = lab_download(r.logits, 8 * N);
    result.residual.insert(result.residual.end(), residual.begin(), residual.end());
    result.logits.insert(result.logits.end(), logits.begin(), logits.end());
  }
  lab_run_end(&run);
  return result;
}

/* Rows of `mask` against those of the plain run, on every rank. */
static void compare(const char *what, const struct result &plain, const struct result &other, uint32_t mask) {
  std::vector<float> want, got;
  for (size_t i = 0; i < other.residual.size(); i++)
    if (mask >> (i / D % 8) & 1u)
      want.push_back(plain.residual[i % (8 * D)]), got.push_back(other.residual[i]);
  for (size_t i = 0; i < other.logits.size(); i++)
    if (mask >> (i / N % 8) & 1u) want.push_back(plain.logits[i % (8 * N)]), got.push_back(other.logits[i]);
  char name[96];
  snprintf(name, sizeof name, "chain: %s", what);
  lab_same_bits(name, want.data(), got.data(), want.size());
}

static struct how with_ranks(uint32_t ranks) {
  struct how how;
  how.ranks = ranks;
  return how;
}

void lab_chain(uint64_t seed) {
  struct model m = make_model(seed);
  struct result plain = run_model(&m, how());
  struct how each, again, delayed, inf;
  uint64_t bad = 0;
  for (float v : plain.logits) bad += !(fabsf(v) < 1e3f);
  us_gpu_report("chain: logits are numbers", plain.logits.size(), bad, 0);
  each.each = true, again.rounds = 3, inf.inf = true, delayed.jitter = 2000, delayed.ranks = 2;
  compare("one launch an operation", plain, run_model(&m, each), 0xff);
  compare("the third round", plain, run_model(&m, again), 0xff);
  compare("half of the blocks, twice, with delays", plain, run_model(&m, delayed), 0xff);
  compare("a quarter of the blocks, four times", plain, run_model(&m, with_ranks(4)), 0xff);
  compare("an Inf in one row leaves the others alone", plain, run_model(&m, inf), 0xf7);
  for (uint32_t row = 0; row < 8; row += 3) {
    struct how alone;
    char name[64];
    alone.rows = 1u << row;
    snprintf(name, sizeof name, "row %u alone", row);
    compare(name, plain, run_model(&m, alone), alone.rows);
  }
  free_model(&m);
}
