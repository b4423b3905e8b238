/* lab_experts.cu: the expert stream at the widths of MiMo-V2.5-Pro and at small odd ones: gate and up, down, and their sum over
 * experts against double, layers in one launch; mistakes that must show; speed of each part and of layers back to back.
 *
 * Contents: gate and up; down; speed; a case.
 */
#include "formats/bf16.h"
#include "lab_engine.h"
extern "C" {
#include "kernels/router/router.h"
}

static const uint32_t PASSES = 8, SAMPLES = 512, MUTANTS = 32, SERIES = 16;

struct expert_case {
  enum us_format format;
  uint32_t D, F, E, top_k, layers; /* layers: of weights; each pass takes the next */
  bool timed;
};

static const struct expert_case cases[] = {
    {US_FORMAT_MXFP4, 6144, 512, 384, 8, 4, true}, {US_FORMAT_MXFP4, 6144, 2048, 128, 8, 2, true},
    {US_FORMAT_MXFP4, 6144, 256, 384, 8, 4, true}, {US_FORMAT_FP8, 6144, 512, 128, 8, 2, true},
    {US_FORMAT_BF16, 6144, 512, 128, 8, 2, true},  {US_FORMAT_MXFP4, 128, 96, 8, 2, 2, false},
    {US_FORMAT_FP8, 128, 96, 8, 2, 2, false},      {US_FORMAT_BF16, 128, 96, 8, 2, 2, false},
};

struct problem {
  const struct expert_case *of;
  struct lab_weights up, down;
  std::vector<float> x, logits; /* (8, D), (8, E) */
  void *operand;
  float *device_logits;
  uint64_t seed;
  char shape[96];
};

/* What a launch left of one pass. */
struct pass {
  void *pairs;
  uint32_t *routed;
  float *y;
  std::vector<uint32_t> ids;         /* (8, top_k) */
  std::vector<float> weight;         /* (8, top_k) */
  std::vector<std::vector<float>> h; /* (8 top_k) of F */
  std::vector<float> sum;            /* (8, D) */
};

static uint32_t matrix_of(const struct problem *p, uint32_t pass, uint32_t expert) {
  return pass % p->of->layers * p->of->E + expert;
}

static uint32_t add_route(struct lab_run *run, const struct problem *p, uint32_t layer, uint32_t *routed) {
  const struct expert_case *c = p->of;
  struct us_engine_route route = {p->device_logits, NULL,   1, c->E, c->E, c->top_k, 1.0f, true, true,
                                  p->seed,          routed, 0, NULL, 0,    false};
  return lab_add_route(run, 0, route, layer);
}

static void add_reduce(struct lab_run *run, float *y) {
  struct us_engine_reduce reduce = {};
  reduce.residual = y, reduce.addends = 1, reduce.replace = true;
  lab_add_reduce(run, 0, reduce);
}

/* Route, gate and up, down, sum: one pass. */
static struct pass add_pass(struct lab_run *run, const struct problem *p, uint32_t index) {
  const struct expert_case *c = p->of;
  struct pass pass = {};
  pass.pairs = lab_buffer(run, (size_t)8 * c->top_k * us_engine_pair_bytes(c->F), 0xff);
  pass.routed = (uint32_t *)lab_buffer(run, sizeof(uint32_t) * 8 * c->top_k, 0xff);
  pass.y = (float *)lab_buffer(run, sizeof(float) * 8 * c->D, 0xff);
  uint32_t route = add_route(run, p, index, pass.routed);
  lab_add_up(run, 0, &p->up, matrix_of(p, index, 0), p->operand, pass.pairs, route);
  lab_add_down(run, 0, &p->down, matrix_of(p, index, 0), pass.pairs, route);
  add_reduce(run, pass.y);
  return pass;
}

/* Routing weights of a row's experts: the router's, its choice forced by the bias. */
static void weigh(const struct problem *p, uint32_t row, const uint32_t *ids, float *weight) {
  std::vector<float> bias(p->of->E, 0.0f);
  uint32_t sorted[US_ENGINE_MAX_TOPK];
  for (uint32_t k = 0; k < p->of->top_k; k++) bias[ids[k]] = 1e6f;
  struct us_router_args args = {
      &p->logits[(size_t)row * p->of->E], bias.data(), p->of->E, p->of->top_k, true, 1.0f};
  us_router_select(&args, sorted, weight);
}

static void collect(const struct problem *p, struct pass *pass) {
  uint32_t pairs = 8 * p->of->top_k;
  pass->ids = lab_download(pass->routed, pairs), pass->sum = lab_download(pass->y, 8 * (size_t)p->of->D);
  pass->weight.resize(pairs);
  for (uint32_t row = 0; row < 8; row++)
    weigh(p, row, &pass->ids[row * p->of->top_k], &pass->weight[row * p->of->top_k]);
  for (uint32_t i = 0; i < pairs; i++) { /* pairs lie expert by expert, rows ascending */
    uint32_t number = 0;
    for (uint32_t j = 0; j < pairs; j++)
      number += pass->ids[j] < pass->ids[i] || (pass->ids[j] == pass->ids[i] && j < i);
    pass->h.push_back(lab_pair_row(pass->pairs, number, p->of->F));
  }
}

/* ---- gate and up -------------------------------------------------------------------------------------------------- */

static void check_up(struct lab_result *r, const struct problem *p, const std::vector<struct pass> &passes,
                     uint64_t *state) {
  uint32_t top_k = p->of->top_k;
  std::vector<double> ratios[LAB_MUTATIONS];
  for (uint32_t i = 0; i < SAMPLES; i++) {
    uint32_t at = i % PASSES, row = i / PASSES % 8,
             pair = row * top_k + (uint32_t)(lab_random(state) % top_k);
    uint32_t f = (uint32_t)(lab_random(state) % p->of->F), matrix = matrix_of(p, at, passes[at].ids[pair]);
    const float *x = &p->x[(size_t)row * p->of->D];
    struct lab_sum g = lab_dot(&p->up.cut, lab_row(&p->up, matrix, 0, f, LAB_NONE).data(), x);
    struct lab_sum u = lab_dot(&p->up.cut, lab_row(&p->up, matrix, 1, f, LAB_NONE).data(), x);
    double got = passes[at].h[pair][f], allowed = lab_gated_allowed(&g, &u);
    lab_sample(r, got - lab_silu(g.value) * u.value, allowed, 0);
    for (int m = LAB_SCALE; i < MUTANTS && m < LAB_MUTATIONS; m++) {
      if (!lab_mutation_applies((enum lab_mutation)m, p->of->format)) continue;
      struct lab_sum wrong =
          lab_dot(&p->up.cut, lab_row(&p->up, matrix, 0, f, (enum lab_mutation)m).data(), x);
      ratios[m].push_back(fabs(got - lab_silu(wrong.value) * u.value) / allowed);
    }
  }
  for (int m = LAB_SCALE; m < LAB_MUTATIONS; m++)
    if (!ratios[m].empty()) lab_mutation(r, lab_mutation_names[m], ratios[m]);
}

/* ---- down --------------------------------------------------------------------------------------------------------- */

enum { EXPERT_SKIPPED = LAB_MUTATIONS, STRANGER_LEFT_IN, DOWN_MUTATIONS };

/* y[row][d] of a pass in the engine's order: each warp adds its columns of all experts, then the warps. A warp has a page of a step if
 * pages are MXFP4 of four groups, else a group. The row's pairs are given, so that a wrong list can be. */
struct term {
  uint32_t matrix;
  double weight;
  const float *h;
};

static struct lab_sum add_experts(const struct problem *p, const std::vector<struct term> &terms, uint32_t d,
                                  enum lab_mutation mutation) {
  struct lab_sum s = {0, 0, 0};
  bool whole = p->down.matrix.format == US_FORMAT_MXFP4 && p->down.matrix.groups == 4;
  uint32_t groups = p->of->F / 32, each = whole ? 4 : 1,
           warps = lab_down_slices(&p->down) * p->down.matrix.groups / each;
  std::vector<std::vector<double>> rows;
  for (const struct term &t : terms)
    rows.push_back(lab_row(&p->down, t.matrix, 0, d, rows.empty() ? mutation : LAB_NONE));
  for (uint32_t warp = 0; warp < warps; warp++) {
    double acc = 0;
    for (size_t k = 0; k < terms.size(); k++)
      for (uint32_t first = warp * each; first < groups; first += warps * each) {
        double sum = 0, magnitude = 0, weight = terms[k].weight, lost = 0;
        for (uint32_t g = first; g < first + each; g++) {
          double part = 0;
          lost += lab_multiply(&part, &rows[k][g * 32], terms[k].h + g * 32, &magnitude);
          lost += lab_multiply(&part, &rows[k][g * 32 + 16], terms[k].h + g * 32 + 16, &magnitude);
          sum += part;
          if (whole) lost += LAB_UNIT * fabs(sum);
        }
        acc += weight * sum, s.magnitude += fabs(weight) * magnitude;
        s.allowed += fabs(weight) * (lost + LAB_UNIT * fabs(sum)) + LAB_UNIT * fabs(acc);
      }
    s.value += acc, s.allowed += LAB_UNIT * fabs(s.value);
  }
  return s;
}

static std::vector<struct term> terms_of(const struct problem *p, const struct pass *pass, uint32_t at,
                                         uint32_t row) {
  std::vector<struct term> terms;
  for (uint32_t pair = row * p->of->top_k; pair < (row + 1) * p->of->top_k; pair++)
    terms.push_back({matrix_of(p, at, pass->ids[pair]), pass->weight[pair], pass->h[pair].data()});
  return terms;
}

static double wrong_down(const struct problem *p, const struct pass *pass, uint32_t at, uint32_t row,
                         uint32_t d, int mutation) {
  std::vector<struct term> terms = terms_of(p, pass, at, row);
  if (mutation == EXPERT_SKIPPED) terms.pop_back();
  if (mutation == STRANGER_LEFT_IN) terms.push_back(terms_of(p, pass, at, (row + 1) % 8)[0]);
  return add_experts(p, terms, d, mutation < LAB_MUTATIONS ? (enum lab_mutation)mutation : LAB_NONE).value;
}

static void check_down(struct lab_result *r, const struct problem *p, const std::vector<struct pass> &passes,
                       uint64_t *state) {
  std::vector<double> ratios[DOWN_MUTATIONS];
  for (uint32_t i = 0; i < SAMPLES; i++) {
    uint32_t at = i % PASSES, row = i / PASSES % 8, d = (uint32_t)(lab_random(state) % p->of->D);
    struct lab_sum s = add_experts(p, terms_of(p, &passes[at], at, row), d, LAB_NONE);
    double got = passes[at].sum[(size_t)row * p->of->D + d];
    lab_sample(r, got - s.value, s.allowed, s.magnitude);
    for (int m = LAB_SCALE; i < MUTANTS && m < DOWN_MUTATIONS; m++)
      if (m >= LAB_MUTATIONS || lab_mutation_applies((enum lab_mutation)m, p->of->format))
        ratios[m].push_back(fabs(got - wrong_down(p, &passes[at], at, row, d, m)) / s.allowed);
  }
  for (int m = LAB_SCALE; m < DOWN_MUTATIONS; m++)
    if (!ratios[m].empty())
      lab_mutation(r,
                   m == EXPERT_SKIPPED     ? "an expert skipped"
                   : m == STRANGER_LEFT_IN ? "another row's expert left in"
                                           : lab_mutation_names[m],
                   ratios[m]);
}

/* Every inner value and every output is a number. */
static void check_written(const std::vector<struct pass> &passes, struct lab_result *up,
                          struct lab_result *down) {
  for (const struct pass &pass : passes) {
    for (const std::vector<float> &h : pass.h)
      for (float v : h) up->bad += v != v;
    for (float v : pass.sum) down->bad += v != v;
  }
}

/* ---- speed -------------------------------------------------------------------------------------------------------- */

/* Active experts of an average ROUTE operation so far. */
static double active_experts(const struct lab_run *run) {
  std::vector<struct us_engine_state> state = lab_download(run->state[0], 1);
  return (double)state[0].experts / (double)state[0].expert_layers;
}

/* One list of experts, and the same part of layer after layer. */
static void time_part(struct lab_result *r, const struct problem *p, bool down) {
  struct lab_run run;
  lab_run_begin(&run, lab_ranks{1, false, p->of->D});
  void *pairs = lab_buffer(&run, (size_t)8 * p->of->top_k * us_engine_pair_bytes(p->of->F), 0);
  uint32_t route = add_route(&run, p, 0, NULL);
  for (uint32_t i = 0; i < SERIES; i++)
    if (down)
      lab_add_down(&run, 0, &p->down, matrix_of(p, i, 0), pairs, route);
    else
      lab_add_up(&run, 0, &p->up, matrix_of(p, i, 0), p->operand, pairs, route);
  lab_upload_ops(&run, false);
  r->us = lab_round_us(&run, 4) / SERIES, r->resident_us = lab_resident_us(&run, 4) / SERIES;
  r->rested_us = lab_rested_us([&]() { return lab_fire(&run, 4); }) / 4 / SERIES;
  double active = active_experts(&run);
  const struct lab_weights *w = down ? &p->down : &p->up;
  r->bytes = active * (double)w->matrix.matrix_bytes, r->flops = 16.0 * active * w->rows * w->cols;
  lab_run_end(&run);
}

/* All four operations, layer after layer. */
static void time_layers(struct lab_result *r, const struct problem *p) {
  struct lab_run run;
  lab_run_begin(&run, lab_ranks{1, false, p->of->D});
  for (uint32_t i = 0; i < PASSES; i++) add_pass(&run, p, i);
  lab_upload_ops(&run);
  r->us = lab_round_us(&run, 4) / PASSES;
  double active = active_experts(&run);
  r->bytes = active * (double)(p->up.matrix.matrix_bytes + p->down.matrix.matrix_bytes);
  r->flops = 16.0 * active * 3 * p->of->F * p->of->D;
  lab_run_end(&run);
}

/* ---- a case ------------------------------------------------------------------------------------------------------- */

static struct problem make(const struct expert_case *c, uint64_t seed) {
  struct problem p = {};
  uint64_t state = seed + c->F;
  p.of = c, p.seed = seed;
  p.up = lab_weights(c->format, 2 * c->F, c->D), p.up.gated = true;
  p.down = lab_weights(c->format, c->D, c->F);
  p.up.count = p.down.count = c->E * c->layers;
  lab_weights_make(&p.up, seed);
  p.down.large_pages = true;
  lab_weights_make(&p.down, seed, 16);
  p.x = lab_rows(c->D, &state), p.logits.resize(8 * c->E);
  for (float &v : p.logits) v = (float)(lab_random(&state) >> 40) * 0x1p-22f - 2.0f;
  p.operand = lab_operand(p.x, c->D), p.device_logits = lab_upload(p.logits);
  snprintf(p.shape, sizeof p.shape, "%u of %u experts a row, F %u, D %u, 8 rows", c->top_k, c->E, c->F, c->D);
  return p;
}

static void lab_one(const struct expert_case *c, uint64_t seed) {
  struct problem p = make(c, seed);
  uint64_t state = seed;
  struct lab_run run;
  std::vector<struct pass> passes;
  lab_run_begin(&run, lab_ranks{1, false, c->D});
  for (uint32_t i = 0; i < PASSES; i++) passes.push_back(add_pass(&run, &p, i));
  lab_upload_ops(&run);
  lab_launch(&run, 1);
  for (struct pass &pass : passes) collect(&p, &pass);
  struct lab_result up = {"experts gate and up", p.shape, us_format_name(c->format)};
  struct lab_result down = {"experts down", p.shape, us_format_name(c->format)};
  struct lab_result layers = {"experts layer after layer", p.shape, us_format_name(c->format)};
  check_up(&up, &p, passes, &state);
  check_down(&down, &p, passes, &state);
  check_written(passes, &up, &down);
  if (c->timed) time_part(&up, &p, false), time_part(&down, &p, true), time_layers(&layers, &p);
  lab_report(&up);
  lab_report(&down);
  layers.samples = up.samples + down.samples, layers.bad = up.bad + down.bad;
  if (c->timed) lab_report(&layers);
  lab_run_end(&run);
  lab_weights_free(&p.up), lab_weights_free(&p.down);
  US_CUDA(cudaFree(p.operand));
  US_CUDA(cudaFree(p.device_logits));
}

void lab_experts(uint64_t seed) {
  for (const struct expert_case &c : cases)
    if (!c.timed || !us_gpu_patience()) lab_one(&c, seed);
}
