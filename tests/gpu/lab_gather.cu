/* lab_gather.cu: experts of several row tiles streamed together against one row tile after the other, whose sums lab_experts.cu holds
 * against double: the same choices, the same bits, whole and operation by operation, under delays; and the speed of both. */
#include "lab_engine.h"

#include <cstring>

static const uint32_t SERIES = 8;

struct gather_case {
  uint32_t D, F, E, top_k, tiles;
  uint32_t missing; /* every so many-th row does not exist; 0: all do */
  bool uniform, timed;
};

static const struct gather_case cases[] = {
    {256, 512, 32, 8, 8, 0, false, false},   {256, 128, 8, 2, 5, 3, false, false},
    {384, 256, 512, 3, 2, 0, false, false},  {320, 128, 16, 2, 8, 0, true, true},
    {6144, 512, 384, 8, 8, 5, false, false}, {6144, 512, 384, 8, 8, 0, true, true},
    {6144, 2048, 384, 8, 8, 0, true, true},
};

struct problem {
  const struct gather_case *of;
  struct lab_weights up, down;
  uint8_t *operand; /* of all row tiles */
  float *logits, *bias;
  uint64_t seed;
};

/* What a list of operations leaves. */
struct outcome {
  std::vector<uint32_t> routed;
  std::vector<float> y;
  uint64_t slots, routes;
};

static struct us_engine_route route_of(struct lab_run *run, const struct problem *p, uint32_t tile,
                                       uint32_t *routed) {
  const struct gather_case *c = p->of;
  struct us_engine_route route = {};
  route.logits = p->logits + (size_t)tile * 8 * c->E, route.bias = p->bias, route.parts = 1;
  route.stride = route.E = c->E, route.top_k = c->top_k, route.scaling = 1.5f, route.normalise = true;
  route.uniform = c->uniform, route.uniform_seed = p->seed;
  route.opt_routed = routed ? routed + (size_t)tile * 8 * c->top_k : NULL;
  return route;
}

static void set_tiles(struct lab_run *run, uint32_t op, uint32_t tile, uint32_t tiles) {
  lab_op(run, 0, op)->row_tile = tile, lab_op(run, 0, op)->row_tiles = tiles;
}

/* ROUTE of `tiles` row tiles from `tile` on. */
static uint32_t add_route(struct lab_run *run, const struct problem *p, uint32_t tile, uint32_t tiles,
                          uint32_t *routed, uint64_t *choices) {
  struct us_engine_route route = route_of(run, p, tile, routed);
  if (tiles > 1) {
    route.logits_tile = (uint64_t)8 * p->of->E, route.choices = choices;
    route.exchange = run->exchanges[0];
  }
  uint32_t op = lab_add_route(run, 0, route, 3);
  set_tiles(run, op, tile, tiles);
  return op;
}

static void add_up(struct lab_run *run, const struct problem *p, uint32_t tile, uint32_t tiles, void *pairs,
                   uint32_t route) {
  uint64_t bytes = (uint64_t)p->of->D * 16;
  uint32_t op = lab_add_up(run, 0, &p->up, 0, p->operand + tile * bytes, pairs, route);
  lab_op(run, 0, op)->gemm.operand_tile = bytes;
  set_tiles(run, op, tile, tiles);
}

static void add_down(struct lab_run *run, const struct problem *p, uint32_t tile, uint32_t tiles,
                     const void *pairs, uint32_t route) {
  set_tiles(run, lab_add_down(run, 0, &p->down, 0, pairs, route), tile, tiles);
}

/* Route, gate and up, down, and a sum a row tile: `each` row tiles at once. */
static void add_layer(struct lab_run *run, const struct problem *p, uint32_t each, void *pairs,
                      uint32_t *routed, uint64_t *choices, float *y) {
  const struct gather_case *c = p->of;
  for (uint32_t t = 0; t < c->tiles; t += each) {
    uint32_t route = add_route(run, p, t, each, routed, choices);
    add_up(run, p, t, each, pairs, route);
    add_down(run, p, t, each, pairs, route);
    for (uint32_t i = t; i < t + each; i++) {
      struct us_engine_reduce reduce = {};
      reduce.residual = y + (size_t)i * 8 * c->D, reduce.addends = 1, reduce.replace = true;
      set_tiles(run, lab_add_reduce(run, 0, reduce), i, 1);
    }
  }
}

static void set_rows(struct lab_run *run, const struct gather_case *c, uint64_t seed) {
  std::vector<struct us_engine_state> state = lab_download(run->state[0], 1);
  for (uint32_t i = 0; i < US_ENGINE_MAX_ROWS; i++) {
    bool exists = i < c->tiles * 8 && !(c->missing && i % c->missing == 1);
    state[0].target[i] = {(int32_t)i, 100 + i, exists ? i / 16 : US_ENGINE_NONE, i};
  }
  for (uint32_t i = 0; i < US_ENGINE_SEQUENCES; i++) state[0].sequence[i].seed = seed + i;
  US_CUDA(cudaMemcpy(run->state[0], state.data(), sizeof state[0], cudaMemcpyHostToDevice));
}

struct memory {
  void *pairs;
  uint32_t *routed;
  uint64_t *choices;
  float *y;
};

static struct memory begin(struct lab_run *run, const struct problem *p) {
  const struct gather_case *c = p->of;
  size_t rows = (size_t)c->tiles * 8;
  lab_run_begin(run, lab_ranks{1, false, c->D, 1, 3 * c->tiles});
  set_rows(run, c, p->seed);
  return {lab_buffer(run, rows * c->top_k * us_engine_pair_bytes(c->F), 0xff),
          (uint32_t *)lab_buffer(run, rows * c->top_k * sizeof(uint32_t), 0xff),
          (uint64_t *)lab_buffer(run, US_ENGINE_SLOTS * sizeof(uint64_t), 0),
          (float *)lab_buffer(run, rows * c->D * sizeof(float), 0xff)};
}

static struct outcome collect(const struct lab_run *run, const struct problem *p, const struct memory *m) {
  size_t rows = (size_t)p->of->tiles * 8;
  std::vector<struct us_engine_state> state = lab_download(run->state[0], 1);
  return {lab_download(m->routed, rows * p->of->top_k), lab_download(m->y, rows * p->of->D), state[0].experts,
          state[0].expert_layers};
}

/* Two rounds of a list; `singly`: operation by operation. */
static struct outcome run_list(const struct problem *p, uint32_t each, bool singly, uint32_t jitter) {
  struct lab_run run;
  struct memory m = begin(&run, p);
  add_layer(&run, p, each, m.pairs, m.routed, m.choices, m.y);
  if (!singly) add_layer(&run, p, each, m.pairs, m.routed, m.choices, m.y);
  lab_upload_ops(&run);
  run.launch.jitter = jitter;
  if (singly)
    lab_launch_each(&run), lab_launch_each(&run);
  else
    lab_launch(&run, 2);
  struct outcome out = collect(&run, p, &m);
  lab_run_end(&run);
  return out;
}

static uint64_t differing(const struct outcome *a, const struct outcome *b) {
  uint64_t bad = 0;
  for (size_t i = 0; i < a->routed.size(); i++) bad += a->routed[i] != b->routed[i];
  for (size_t i = 0; i < a->y.size(); i++) bad += memcmp(&a->y[i], &b->y[i], 4) != 0 || a->y[i] != a->y[i];
  return bad;
}

/* ---- speed -------------------------------------------------------------------------------------------------------- */

/* Microseconds of one of a series of layers, or of one part of them with one list. */
static double time_part(const struct problem *p, uint32_t each, int part, double *ret_slots) {
  struct lab_run run;
  struct memory m = begin(&run, p);
  uint32_t route = part ? add_route(&run, p, 0, each, NULL, m.choices) : 0;
  for (uint32_t i = 0; i < SERIES; i++) {
    if (part == 0) add_layer(&run, p, each, m.pairs, NULL, m.choices, m.y);
    if (part == 1) add_up(&run, p, 0, each, m.pairs, route);
    if (part == 2) add_down(&run, p, 0, each, m.pairs, route);
    if (part == 3) add_route(&run, p, 0, each, NULL, m.choices);
    if (part == 3) lab_op(&run, 0, i + 1)->route.exchange = i + 1;
  }
  if (part == 3) run.launch.exchanges_a_round = SERIES + 1;
  uint32_t exchanges = run.launch.exchanges_a_round;
  lab_upload_ops(&run, part == 0 || part == 3);
  if (part == 3) run.launch.exchanges_a_round = exchanges;
  double us = lab_round_us(&run, 3) / SERIES;
  struct outcome out = collect(&run, p, &m);
  *ret_slots = (double)out.slots / (double)out.routes;
  lab_run_end(&run);
  return us;
}

static void print_time(const struct problem *p, const char *what, double us, double bytes) {
  printf("{\"gather\": \"%s\", \"experts\": \"%u of %u, F %u, D %u\", \"us\": %.1f, \"mbytes\": %.1f, "
         "\"gbs\": %.0f, "
         "\"of_ceiling\": %.3f}\n",
         what, p->of->top_k, p->of->E, p->of->F, p->of->D, us, bytes * 1e-6, bytes / us * 1e-3,
         lab_ceiling > 0 ? bytes / us * 1e6 / lab_ceiling : 0.0);
}

static void time_all(const struct problem *p) {
  static const char *const names[] = {"layer", "gate and up", "down", "route"};
  double up = (double)p->up.matrix.matrix_bytes, down = (double)p->down.matrix.matrix_bytes, slots;
  double us = time_part(p, 1, 0, &slots);
  print_time(p, "layer, a row tile after the other", us, slots * p->of->tiles * (up + down));
  for (int part = 0; part < 4; part++) {
    us = time_part(p, p->of->tiles, part, &slots);
    print_time(p, names[part], us, slots * (part == 0 ? up + down : part == 1 ? up : part == 2 ? down : 0));
  }
  printf("{\"gather\": \"slots a layer\", \"experts\": \"%u of %u\", \"mean\": %.1f}\n", p->of->top_k,
         p->of->E, slots);
}

/* ---- a case ------------------------------------------------------------------------------------------------------- */

static struct problem make(const struct gather_case *c, uint64_t seed) {
  struct problem p = {};
  uint64_t state = seed + c->F;
  p.of = c, p.seed = seed;
  p.up = lab_weights(US_FORMAT_MXFP4, 2 * c->F, c->D), p.up.gated = true;
  p.down = lab_weights(US_FORMAT_MXFP4, c->D, c->F);
  p.up.count = p.down.count = c->E;
  p.down.large_pages = true; /* of four groups, the only ones that down_gather.cuh multiplies */
  lab_weights_make(&p.up, seed);
  lab_weights_make(&p.down, seed, 16);
  if (p.down.matrix.groups != 4)
    fprintf(stderr, "F %u: pages of down must have four groups\n", c->F), exit(3);
  std::vector<float> logits((size_t)c->tiles * 8 * c->E), bias(c->E);
  for (float &v : logits) v = (float)(lab_random(&state) >> 40) * 0x1p-22f - 2.0f;
  for (float &v : bias) v = (float)(lab_random(&state) >> 40) * 0x1p-25f; /* some experts are popular */
  p.logits = lab_upload(logits), p.bias = lab_upload(bias);
  US_CUDA(cudaMalloc(&p.operand, (size_t)c->tiles * c->D * 16));
  for (uint32_t t = 0; t < c->tiles; t++) {
    void *one = lab_operand(lab_rows(c->D, &state), c->D);
    US_CUDA(cudaMemcpy(p.operand + (size_t)t * c->D * 16, one, (size_t)c->D * 16, cudaMemcpyDeviceToDevice));
    US_CUDA(cudaFree(one));
  }
  return p;
}

static void lab_one(const struct gather_case *c, uint64_t seed) {
  struct problem p = make(c, seed);
  char name[160];
  struct outcome alone = run_list(&p, 1, false, 0), together = run_list(&p, c->tiles, false, 0);
  struct outcome singly = run_list(&p, c->tiles, true, 0), late = run_list(&p, c->tiles, false, 2000);
  const char *ways[] = {"in one launch", "operation by operation", "under delays"};
  const struct outcome *others[] = {&together, &singly, &late};
  for (int i = 0; i < 3; i++) {
    snprintf(name, sizeof name,
             "gather: %u of %u experts, F %u, D %u, %u row tiles %s: bits of one after the other", c->top_k,
             c->E, c->F, c->D, c->tiles, ways[i]);
    us_gpu_report(name, alone.routed.size() + alone.y.size(), differing(&alone, others[i]), 0);
  }
  if (c->timed && !us_gpu_patience()) time_all(&p);
  lab_weights_free(&p.up), lab_weights_free(&p.down);
  US_CUDA(cudaFree(p.operand));
  US_CUDA(cudaFree(p.logits));
  US_CUDA(cudaFree(p.bias));
}

void lab_gather(uint64_t seed) {
  for (const struct gather_case &c : cases) lab_one(&c, seed);
}
