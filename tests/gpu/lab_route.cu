/* lab_route.cu: what ROUTE chooses, bit for bit against kernels/router. The table lies in shared memory; a down projection whose
 * expert e has a single 1, at output e, carries it out: y[row][e] is the routing weight, exactly. */
#include "formats/bf16.h"
#include "lab_engine.h"

#include <cstring>
extern "C" {
#include "kernels/router/router.h"
}

static const uint32_t LAYERS = 64;

struct route_case {
  const char *name;
  uint32_t E, top_k, parts, rows; /* rows: bit mask */
  bool bias, normalise, uniform;
  float scaling;
};

static const struct route_case cases[] = {
    {"384 experts, 8 a row, 4 parts", 384, 8, 4, 0xff, true, true, false, 1.0f},
    {"384 experts, 8 a row, without bias", 384, 8, 1, 0xff, false, true, false, 2.5f},
    {"384 experts, 8 a row, some rows", 384, 8, 4, 0x5a, true, true, false, 1.0f},
    {"8 experts, 2 a row, not normalised", 8, 2, 1, 0xff, true, false, false, 1.0f},
    {"100 experts, 3 a row", 100, 3, 2, 0xff, true, true, false, 1.0f},
    {"512 experts, 8 a row", 512, 8, 1, 0xff, true, true, false, 1.0f},
    {"384 experts, 8 a row, uniform", 384, 8, 4, 0xff, false, true, true, 1.0f},
    {"8 experts, 2 a row, uniform", 8, 2, 1, 0xff, false, true, true, 1.0f},
};

static uint32_t width_of(const struct route_case *c) {
  return c->E <= 384 ? 384 : 512;
}

/* Expert e's (D, 32): 1 at (e, 0). */
static struct lab_weights make_probe(const struct route_case *c) {
  struct lab_weights w = lab_weights(US_FORMAT_BF16, width_of(c), 32);
  w.count = c->E;
  w.pages = {US_FORMAT_BF16, w.rows, 32, 16, 32};
  size_t each = us_pages_bytes(&w.pages);
  std::vector<uint16_t> data(w.rows * 32);
  std::vector<uint8_t> pages(each * c->E);
  struct us_err err;
  for (uint32_t e = 0; e < c->E; e++) {
    struct us_pages_source source = {};
    source.matrices = 1, source.w[0] = {US_FORMAT_BF16, w.rows, 32, data.data(), NULL, 0};
    memset(data.data(), 0, data.size() * 2);
    data[e * 32] = us_bf16_from_f32(1.0f);
    if (us_pages_pack(&w.pages, &source, &pages[e * each], &err) != US_OK)
      fprintf(stderr, "%s\n", err.message), exit(3);
  }
  w.matrix = {lab_upload(pages), each, us_pages_tiles(&w.pages), 1, us_pages_page_bytes(&w.pages), 1,
              US_FORMAT_BF16,    1};
  return w;
}

/* Scores of a row: ordinary, one with many ties, one all equal, one with NaN among them (not where they might
 * be drawn). */
static std::vector<float> make_logits(const struct route_case *c, uint64_t *state) {
  std::vector<float> logits((size_t)c->parts * 8 * c->E);
  for (size_t i = 0; i < logits.size(); i++) {
    uint32_t row = i / c->E % 8;
    float value = (float)(lab_random(state) >> 40) * 0x1p-21f - 4.0f;
    if (row == 2) value = roundf(value);
    if (row == 4) value = 0.25f;
    if (row == 6 && !c->uniform && i % c->E % 5 == 1) value = NAN;
    logits[i] = value;
  }
  return logits;
}

/* Keys of uniform routing: a word an expert of Philox at (position, layer). */
static std::vector<float> uniform_bias(const struct route_case *c, uint64_t seed, uint32_t row,
                                       uint32_t layer) {
  std::vector<uint32_t> key(c->E);
  std::vector<float> bias(c->E, 0.0f);
  for (uint32_t e = 0; e < c->E; e++) {
    uint32_t out[4];
    us_philox_quad(us_philox_key(seed), 100 + row, 0, e / 4, US_STREAM_ROUTE | layer << 8, out);
    key[e] = out[e % 4] >> 1;
  }
  for (uint32_t k = 0; k < c->top_k; k++) {
    uint32_t best = US_ENGINE_NONE;
    for (uint32_t e = 0; e < c->E; e++)
      if (bias[e] == 0 && (best == US_ENGINE_NONE || key[e] > key[best])) best = e;
    bias[best] = 1e6f;
  }
  return bias;
}

/* The table as kernels/router has it, (8, D). */
static std::vector<float> expect(const struct route_case *c, const std::vector<float> &logits,
                                 const std::vector<float> &bias, uint64_t seed, uint32_t layer) {
  std::vector<float> table(8 * (size_t)width_of(c), 0.0f);
  for (uint32_t row = 0; row < 8; row++) {
    std::vector<float> sum(c->E), forced;
    for (uint32_t e = 0; e < c->E; e++) {
      sum[e] = logits[(size_t)row * c->E + e];
      for (uint32_t p = 1; p < c->parts; p++) sum[e] += logits[((size_t)p * 8 + row) * c->E + e];
    }
    if (!(c->rows >> row & 1u)) continue;
    if (c->uniform) forced = uniform_bias(c, seed, row, layer);
    struct us_router_args args = {sum.data(),   c->uniform ? forced.data() : c->bias ? bias.data() : NULL,
                                  c->E,         c->top_k,
                                  c->normalise, c->scaling};
    uint32_t ids[US_ENGINE_MAX_TOPK];
    float weights[US_ENGINE_MAX_TOPK];
    us_router_select(&args, ids, weights);
    for (uint32_t k = 0; k < c->top_k; k++) table[(size_t)row * width_of(c) + ids[k]] = weights[k];
  }
  return table;
}

/* 8 rows of 8 different experts of 384, uniformly: 384 (1 - (1 - 8 / 384)^8) = 59.5 are expected, 1.9 is the deviation. */
static void check_mean(const struct lab_run *run) {
  std::vector<struct us_engine_state> state = lab_download(run->state[0], 1);
  double mean = (double)state[0].experts / (double)state[0].expert_layers;
  bool ok = state[0].expert_layers == LAYERS && fabs(mean - 59.53) < 4 * 1.9 / sqrt((double)LAYERS);
  printf("{\"uniform_experts\": %.2f, \"layers\": %llu}\n", mean, (unsigned long long)state[0].expert_layers);
  us_gpu_report("route: 59.5 of 384 experts are active in the mean", LAYERS, !ok, 0);
}

static void lab_one(const struct route_case *c, uint64_t seed) {
  struct lab_weights w = make_probe(c);
  uint64_t state = seed + c->E;
  uint32_t layers = c->uniform && c->E == 384 && !us_gpu_patience() ? LAYERS : 2, D = width_of(c);
  std::vector<float> logits = make_logits(c, &state), bias(c->E);
  for (float &b : bias) b = (float)(lab_random(&state) >> 40) * 0x1p-26f;
  uint32_t pair = us_engine_pair_bytes(32) / 2;
  std::vector<uint16_t> pairs(8 * c->top_k * pair, 0);
  for (uint32_t i = 0; i < 8 * c->top_k; i++) pairs[i * pair] = us_bf16_from_f32(US_ENGINE_OPERAND_UNIT);
  struct lab_run run;
  lab_run_begin(&run, lab_ranks{1, false, D});
  lab_set_rows(&run, c->rows);
  float *device_logits = lab_keep(&run, lab_upload(logits)), *device_bias = lab_keep(&run, lab_upload(bias));
  void *device_pairs = lab_keep(&run, lab_upload(pairs));
  std::vector<float *> out;
  for (uint32_t l = 0; l < layers; l++) {
    struct us_engine_route route = {device_logits, c->bias ? device_bias : NULL,
                                    c->parts,      c->E,
                                    c->E,          c->top_k,
                                    c->scaling,    c->normalise,
                                    c->uniform,    seed,
                                    NULL,          0,
                                    NULL,          0, false};
    uint32_t op = lab_add_route(&run, 0, route, l);
    lab_add_down(&run, 0, &w, 0, device_pairs, op);
    struct us_engine_reduce reduce = {};
    out.push_back((float *)lab_buffer(&run, sizeof(float) * 8 * D, 0xff));
    reduce.residual = out.back(), reduce.addends = 1, reduce.replace = true;
    lab_add_reduce(&run, 0, reduce);
  }
  lab_upload_ops(&run);
  lab_launch(&run, 1);
  char name[128];
  snprintf(name, sizeof name, "route: %s: choices and weights have the router's bits", c->name);
  std::vector<float> want, got;
  for (uint32_t l = 0; l < layers; l++) {
    std::vector<float> table = expect(c, logits, bias, seed, l), y = lab_download(out[l], 8 * (size_t)D);
    want.insert(want.end(), table.begin(), table.end()), got.insert(got.end(), y.begin(), y.end());
  }
  lab_same_bits(name, want.data(), got.data(), want.size());
  if (layers == LAYERS) check_mean(&run);
  lab_run_end(&run);
  lab_weights_free(&w);
}

void lab_route(uint64_t seed) {
  for (const struct route_case &c : cases) lab_one(&c, seed);
}
