/* lab_prompt_rows.cu: choosing experts against the CPU's rule, and norms with residual, taps and embedding against double. */
#include "formats/bf16.h"
#include "prefill_lab.h"
extern "C" {
#include "kernels/router/router.h"
}

/* ---- routing ----------------------------------------------------------------------------------------------------- */

struct routing {
  uint32_t rows, E, top_k, parts;
  bool bias, normalise;
  float scaling;
};

/* Logits from a small set, so that many choices are equal; a NaN and infinities among them. */
static std::vector<float> make_logits(const struct routing *c, uint64_t *state) {
  std::vector<float> logits((size_t)c->parts * c->rows * c->E);
  for (float &v : logits) v = (float)(lab_random(state) % 64) * 0.125f - 4.0f;
  logits[3] = NAN, logits[c->E] = INFINITY, logits[c->E + 2] = -INFINITY;
  return logits;
}

static void check_routing(const struct routing *c, uint64_t seed) {
  uint64_t state = seed + c->E;
  size_t pairs = (size_t)c->rows * c->top_k, part = (size_t)c->rows * c->E;
  std::vector<float> logits = make_logits(c, &state), bias(c->E), weights(pairs);
  std::vector<uint32_t> ids(pairs);
  for (float &v : bias) v = (float)(lab_random(&state) % 8) * 0.01f;
  for (uint32_t r = 0; r < c->rows; r++) {
    std::vector<float> row(logits.begin() + r * c->E, logits.begin() + (r + 1) * c->E);
    for (uint32_t p = 1; p < c->parts; p++)
      for (uint32_t e = 0; e < c->E; e++) row[e] += logits[p * part + r * c->E + e];
    struct us_router_args args = {};
    args.logits = row.data(), args.bias = c->bias ? bias.data() : NULL, args.E = c->E, args.K = c->top_k;
    args.normalise = c->normalise, args.scaling = c->scaling;
    us_router_select(&args, &ids[r * c->top_k], &weights[r * c->top_k]);
  }
  struct us_prefill_route r = {};
  r.logits = lab_upload(logits), r.opt_bias = c->bias ? lab_upload(bias) : NULL;
  r.rows = c->rows, r.parts = c->parts, r.stride = r.E = c->E, r.part = part, r.top_k = c->top_k;
  r.normalise = c->normalise, r.scaling = c->scaling;
  r.ids = lab_upload(ids), r.weights = lab_upload(weights);
  US_CUDA(cudaMemset(r.ids, 0xff, pairs * 4));
  US_CUDA(cudaMemset(r.weights, 0xff, pairs * 4));
  r.groups.tile_count = lab_upload(std::vector<uint32_t>(1));
  r.groups.tiles =
      lab_upload(std::vector<struct us_prefill_tile>(us_prefill_most_tiles(c->E, (uint32_t)pairs)));
  r.groups.row = lab_upload(std::vector<uint32_t>(pairs)),
  r.groups.pair = lab_upload(std::vector<uint32_t>(pairs));
  US_CUDA((cudaError_t)us_prefill_route(&r, 0));
  std::vector<uint32_t> got_ids = lab_download(r.ids, pairs);
  std::vector<float> got = lab_download(r.weights, pairs);
  lab_same_bits("route: experts as the CPU chooses", ids.data(), got_ids.data(), pairs);
  uint64_t bad = 0;
  for (size_t i = 0; i < pairs; i++)
    bad += !(got[i] == weights[i] || (got[i] != got[i] && weights[i] != weights[i]));
  us_gpu_report("route: weights as the CPU's", pairs, bad, 0);
  void *owned[] = {(void *)r.logits,    (void *)r.opt_bias, r.ids,        r.weights,
                   r.groups.tile_count, r.groups.tiles,     r.groups.row, r.groups.pair};
  for (void *p : owned) US_CUDA(cudaFree(p));
}

/* ---- norms ------------------------------------------------------------------------------------------------------- */

struct norm_case {
  const char *name;
  uint32_t rows, D, addends;
  bool embed, replace, tap;
};

/* The residual that a row gets, in the kernel's order, which is FP32's. */
static float new_residual(const struct norm_case *c, const std::vector<float> &residual,
                          const std::vector<float> &sums, const std::vector<uint16_t> &embed,
                          const std::vector<int32_t> &tokens, size_t at) {
  if (c->embed) return us_bf16_to_f32(embed[(size_t)tokens[at / c->D] * c->D + at % c->D]);
  float sum = sums[at];
  for (uint32_t a = 1; a < c->addends; a++) sum += sums[a * c->rows * c->D + at];
  return c->replace ? sum : residual[at] + sum;
}

static void check_norm(const struct norm_case *c, uint64_t seed) {
  uint64_t state = seed + c->D;
  size_t n = (size_t)c->rows * c->D;
  const uint32_t vocab = 24, first = 3, taps = 2;
  std::vector<float> residual(n), sums(n * (c->addends ? c->addends : 1)), weight(c->D);
  std::vector<uint16_t> embed((size_t)vocab * c->D);
  std::vector<int32_t> tokens(c->rows);
  for (float &v : residual) v = (float)(lab_random(&state) >> 40) * 0x1p-22f - 2.0f;
  for (float &v : sums) v = (float)(lab_random(&state) >> 40) * 0x1p-24f - 0.5f;
  for (float &v : weight) v = (float)(lab_random(&state) >> 40) * 0x1p-24f + 0.5f;
  for (uint16_t &v : embed) v = us_bf16_from_f32((float)(lab_random(&state) >> 40) * 0x1p-23f - 1.0f);
  for (int32_t &v : tokens) v = (int32_t)(lab_random(&state) % vocab);
  size_t out_words = (size_t)(first + c->rows) * c->D, tap_words = (size_t)(first + c->rows) * taps * c->D;
  struct us_prefill_norm g = {};
  g.rows = c->rows, g.first = first, g.D = c->D, g.ranks = 2, g.residual = lab_upload(residual);
  g.opt_tokens = c->embed ? lab_upload(tokens) : NULL, g.embed_rows = vocab / 2;
  uint16_t *table = lab_upload(embed);
  g.embed[0] = table, g.embed[1] = table + (size_t)vocab / 2 * c->D;
  float *device_sums = lab_upload(sums), *device_weight = lab_upload(weight);
  g.sums = device_sums, g.addends = c->addends, g.addend = n, g.replace = c->replace,
  g.weight = device_weight, g.eps = 1e-5f;
  for (int rank = 0; rank < 2; rank++) {
    g.out[rank] = lab_upload(std::vector<uint16_t>(out_words));
    if (c->tap) g.tap[rank] = lab_upload(std::vector<uint16_t>(tap_words)) + c->D;
  }
  g.out_stride = c->D, g.tap_stride = taps * c->D;
  US_CUDA((cudaError_t)us_prefill_norm(&g, 0));
  std::vector<float> got = lab_download(g.residual, n);
  std::vector<uint16_t> out[2] = {lab_download(g.out[0], out_words), lab_download(g.out[1], out_words)},
                        tap[2];
  for (int rank = 0; rank < 2 && c->tap; rank++) tap[rank] = lab_download(g.tap[rank] - c->D, tap_words);

  char shape[64];
  snprintf(shape, sizeof shape, "(%u, %u)", c->rows, c->D);
  struct lab_result r = {c->name, shape, "f32"};
  uint64_t different = 0, tapped = 0;
  for (uint32_t row = 0; row < c->rows; row++) {
    double squares = 0;
    for (uint32_t i = 0; i < c->D; i++) {
      size_t at = (size_t)row * c->D + i;
      float want = new_residual(c, residual, sums, embed, tokens, at);
      different += us_f32_bits(want) != us_f32_bits(got[at]);
      squares += (double)want * want;
      for (int rank = 0; rank < 2 && c->tap; rank++)
        tapped += us_bf16_from_f32(us_bf16_round(want) * US_ENGINE_OPERAND_UNIT) !=
                  tap[rank][(first + row) * taps * c->D + c->D + i];
    }
    double scale = 1 / sqrt(squares / c->D + 1e-5f);
    for (uint32_t i = 0; i < c->D; i++) {
      double want = got[(size_t)row * c->D + i] * scale * weight[i],
             before = fabs(want) * (c->D / 256 + 24) * LAB_UNIT;
      int exponent;
      frexp(fabs(want) + before, &exponent);
      for (int rank = 0; rank < 2; rank++)
        lab_sample(&r, us_bf16_to_f32(out[rank][(first + row) * c->D + i]) * 0x1p-64 - want,
                   before + ldexp(1, exponent - 9), 0);
    }
  }
  us_gpu_report("norm: residual to the bit", n, different, 0);
  if (c->tap) us_gpu_report("norm: taps to the bit", 2 * n, tapped, 0);
  lab_report(&r);
  void *owned[] = {g.residual,
                   (void *)g.opt_tokens,
                   table,
                   device_sums,
                   device_weight,
                   g.out[0],
                   g.out[1],
                   c->tap ? g.tap[0] - c->D : NULL,
                   c->tap ? g.tap[1] - c->D : NULL};
  for (void *p : owned) US_CUDA(cudaFree(p));
}

void lab_prefill_rows(uint64_t seed) {
  static const struct routing routings[] = {{200, 384, 8, 16, true, true, 1},
                                            {37, 16, 4, 1, true, false, 2.5f},
                                            {5, 8, 8, 2, false, true, 1},
                                            {64, 1000, 6, 1, true, true, 1}};
  static const struct norm_case norms[] = {{"norm after attention", 40, 6144, 4, false, false, true},
                                           {"norm of the embedding", 9, 64, 0, true, false, false},
                                           {"norm of the context", 17, 4096, 3, false, true, false}};
  for (const struct routing &c : routings) check_routing(&c, seed);
  for (const struct norm_case &c : norms) check_norm(&c, seed);
}
