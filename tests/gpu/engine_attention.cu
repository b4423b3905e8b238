/* engine_attention.cu: the engine's attention and context against double precision on the host; the same bits however it is cut.
 *
 * Contents: one case; the same bits; rows that are not numbers; the drafter's context; all together.
 * Outputs are bf16, so an error counts from half a unit of bf16 on; tolerance in units of the sum of weight times |value|.
 */
#include "engine_attention.h"
#include "formats/bf16.h"

#define ATTENTION_LAUNCH attention_launch_engine
#include "engine_attention_kernel.cuh"

/* Two terms leave 2^-18 of a query and of a weight; scores here reach 30, and a sum of 12 multiplies loses some 2^-21 of it. */
#define TOLERANCE 0x1p-15

/* ---- one case -------------------------------------------------------------------------------------------------------------- */

static double half_unit(double x) {
  int e;
  frexp(x, &e);
  return ldexp(1, e - 9);
}

/* How far `got` is from what rounding `expected` to bf16 allows. */
static double excess(double got, double expected) {
  double error = fabs(got - expected) - half_unit(fmax(fabs(got), fabs(expected)));
  return error > 0 ? error : std::isnan(error) ? NAN : 0;
}

/* A mistake's largest error of each head, in tolerances. */
static std::vector<double> ratios(const struct world *w, struct mistake m) {
  std::vector<double> expected, magnitude, worst;
  oracle(w, m, &expected, &magnitude);
  for (size_t i = 0; i < expected.size(); i += w->s.V) {
    double most = 0;
    if (w->rows[i / (w->s.H * w->s.V)].sequence == ATTENTION_ABSENT) continue;
    for (size_t d = i; d < i + w->s.V; d++)
      most = fmax(most, excess(w->out[d], expected[d]) / (TOLERANCE * magnitude[d]));
    worst.push_back(most);
  }
  return worst;
}

static void check_mutations(struct lab_result *r, const struct world *w) {
  struct mistake m;
  bool windowed = w->s.window && w->rows[0].position >= w->s.window;
  m = {}, m.no_sink = true;
  if (w->s.sink) lab_mutation(r, "sink dropped", ratios(w, m));
  m = {}, m.theta = true;
  if (w->rows[0].position > 200) lab_mutation(r, "theta swapped", ratios(w, m));
  m = {}, m.values = 1;
  if (w->rows[0].position > 1) lab_mutation(r, "values off by one", ratios(w, m));
  m = {}, m.window = 1;
  if (windowed) lab_mutation(r, "window + 1", ratios(w, m));
  m = {}, m.window = -1;
  if (windowed) lab_mutation(r, "window - 1", ratios(w, m));
}

static void check_case(const struct attention_shape *s, std::vector<struct attention_row> rows,
                       const char *name, unsigned seeds, bool mutations) {
  struct lab_result r = {};
  r.op = "attention", r.shape = s->name, r.format = name;
  uint64_t pool_bad = 0, absent_bad = 0;
  for (unsigned seed = 1; seed <= seeds; seed++) {
    struct world w;
    std::vector<double> expected, magnitude;
    world_make(&w, s, rows, seed);
    world_run(&w, {});
    if (!world_outputs(&w)) us_gpu_report("attention: counters are 0 again", 1, 1, 0);
    if (!s->draft) oracle_append(&w, ATTENTION_LAYERS - 1, 1, 1);
    oracle(&w, {}, &expected, &magnitude);
    for (size_t i = 0; i < expected.size(); i++)
      if (w.rows[i / (s->H * s->V)].sequence == ATTENTION_ABSENT)
        absent_bad += w.out[i] != 0;
      else
        lab_sample(&r, excess(w.out[i], expected[i]), TOLERANCE * magnitude[i], magnitude[i]);
    for (size_t i = 0; i < w.pool.size(); i++) pool_bad += w.pool[i] != w.pool_out[i];
    if (mutations && seed == 1) check_mutations(&r, &w);
    world_free(&w);
  }
  lab_report(&r);
  if (pool_bad) us_gpu_report("attention: the cache holds what it should", 1, pool_bad, 0);
  if (absent_bad) us_gpu_report("attention: absent rows are 0", 1, absent_bad, 0);
}

/* Rows of several sequences, first positions given; {ABSENT, n}: n rows that do not exist. */
static std::vector<struct attention_row> layout(std::vector<std::vector<uint32_t>> runs) {
  std::vector<struct attention_row> rows;
  uint32_t sequence = 0;
  for (const std::vector<uint32_t> &run : runs) {
    for (uint32_t i = 0; i < run[1]; i++)
      rows.push_back(run[0] == ATTENTION_ABSENT ? attention_row{ATTENTION_ABSENT, 0}
                                                : attention_row{sequence, run[0] + i});
    sequence += run[0] != ATTENTION_ABSENT;
  }
  return rows;
}

static const struct attention_shape shapes[] = {
    {"pro windowed (192, 128) 32/2", 192, 128, 32, 2, 64, 128, true, false},
    {"pro full (192, 128) 32/2", 192, 128, 32, 2, 64, 0, false, false},
    {"drafter (128, 128) 32/2", 128, 128, 32, 2, 64, 1024, true, true},
    {"flash windowed (192, 128) 16/2", 192, 128, 16, 2, 64, 128, true, false},
    {"pico windowed (48, 32) 4/2", 48, 32, 4, 2, 16, 64, true, false},
    {"pico drafter (48, 32) 4/2", 48, 32, 4, 2, 16, 64, true, true},
    {"tiny windowed (24, 16) 8/4", 24, 16, 8, 4, 8, 16, true, false},
    {"tiny full (24, 16) 8/2", 24, 16, 8, 2, 8, 0, false, false},
    {"wide (128, 64) 64/2, rotary 128", 128, 64, 64, 2, 128, 0, true, false},
    {"pro full, one GPU (192, 128) 128/8", 192, 128, 128, 8, 64, 0, false, false},
};
enum {
  PRO_WINDOWED,
  PRO_FULL,
  DRAFTER,
  FLASH,
  PICO,
  PICO_DRAFTER,
  TINY,
  TINY_FULL,
  WIDE,
  PRO_WHOLE,
  SHAPES = PRO_WHOLE
};

static void check_cases(void) {
  for (int s = 0; s < SHAPES; s++) {
    check_case(&shapes[s], layout({{700, 8}}), "8 rows at 700", s >= PICO ? 10 : 3, true);
    check_case(&shapes[s], layout({{0, 3}, {61, 1}, {ATTENTION_ABSENT, 1}, {1021, 3}}),
               "3 at 0, 1 at 61, none, 3 at 1021", 2, false);
    check_case(&shapes[s], layout({{250, 12}, {ATTENTION_ABSENT, 2}, {1, 10}}), "12 at 250, none, 10 at 1", 2,
               false);
  }
  check_case(&shapes[PRO_WINDOWED], layout({{185, 7}, {5000, 1}}), "7 at 185, 1 at 5000", 2, true);
  check_case(&shapes[PRO_FULL], layout({{4090, 5}, {8189, 3}}), "5 at 4090, 3 at 8189", 1, true);
  check_case(&shapes[PRO_FULL], layout({{5113, 16}}), "16 at 5113", 1, true);
  check_case(&shapes[DRAFTER], layout({{0, 16}, {4000, 16}}), "16 at 0, 16 at 4000", 1, false);
  check_case(&shapes[TINY_FULL], layout({{8180, 8}}), "8 at 8180", 3, false);
}

/* ---- the same bits ------------------------------------------------------------------------------------------------------ */

static void compare_run(struct world *w, const std::vector<float> &first, struct run_options o,
                        const char *name) {
  char check[160];
  world_run(w, o);
  snprintf(check, sizeof check, "attention bits, %s: %s", w->s.name, name);
  if (!world_outputs(w)) us_gpu_report("attention: counters are 0 again", 1, 1, 0);
  lab_same_bits(check, first.data(), w->out.data(), first.size());
}

/* Each row alone, the cache as those before have left it: plain decoding. A drafter's block comes whole. */
static void compare_alone(struct world *w, const std::vector<float> &first) {
  char check[160];
  std::vector<float> alone(first.size());
  size_t width = w->s.H * w->s.V;
  for (size_t r = 0; r < w->rows.size(); r++) {
    struct run_options o;
    o.only = (int)r, o.reset = r == 0;
    world_run(w, o);
    world_outputs(w);
    std::copy_n(w->out.begin() + (ptrdiff_t)(r * width), width, alone.begin() + (ptrdiff_t)(r * width));
  }
  snprintf(check, sizeof check, "attention bits, %s: each row alone", w->s.name);
  lab_same_bits(check, first.data(), alone.data(), first.size());
}

static void check_bits(const struct attention_shape *s, std::vector<struct attention_row> rows) {
  struct world w;
  struct run_options o;
  world_make(&w, s, rows, 7);
  world_run(&w, o);
  world_outputs(&w);
  std::vector<float> first = w.out;
  o = {}, o.blocks = 16;
  compare_run(&w, first, o, "16 blocks");
  o = {}, o.blocks = 1, o.early = false;
  compare_run(&w, first, o, "1 block");
  o = {}, o.launch = attention_launch_segments;
  compare_run(&w, first, o, "cut in segments");
  o = {}, o.early = false, o.shift = 77;
  compare_run(&w, first, o, "nothing fetched early, shifted");
  o = {}, o.jitter = 20000;
  for (int i = 0; i < 10; i++) compare_run(&w, first, o, "random delays");
  o = {}, o.delay_ns = 10000000;
  compare_run(&w, first, o, "a projection that takes 10 ms");
  if (!s->draft) compare_alone(&w, first);
  world_free(&w);
}

/* ---- rows that are not numbers -------------------------------------------------------------------------------------------- */

/* The last rows of two sequences are spoilt: nobody else sees them. */
static void check_spoilt(const struct attention_shape *s, float with, const char *name) {
  char check[160];
  struct world w;
  world_make(&w, s, layout({{500, 4}, {90, 4}}), 11);
  world_run(&w, {});
  world_outputs(&w);
  std::vector<float> first = w.out;
  for (size_t r = 3; r < 8; r += 4)
    for (size_t i = 0; i < w.qkv_rows; i++) w.qkv[r * w.qkv_rows + i] = with;
  world_upload_qkv(&w);
  world_run(&w, {});
  world_outputs(&w);
  size_t width = s->H * s->V;
  for (size_t r = 3; r < 8; r += 4)
    std::copy_n(first.begin() + (ptrdiff_t)(r * width), width, w.out.begin() + (ptrdiff_t)(r * width));
  snprintf(check, sizeof check, "attention bits, %s: beside rows of %s", s->name, name);
  lab_same_bits(check, first.data(), w.out.data(), first.size());
  world_free(&w);
}

/* ---- the drafter's context -------------------------------------------------------------------------------------------------- */

/* Rows and tables of a context pass: rows past `committed` of their sequence leave the world. */
static struct us_engine_state *context_state(struct world *w, uint32_t committed) {
  std::vector<struct us_engine_state> state(1);
  US_CUDA(cudaMemcpy(state.data(), w->rank.state, sizeof state[0], cudaMemcpyDeviceToHost));
  uint32_t slot = 0, before = ATTENTION_ABSENT;
  for (struct us_engine_sequence &sequence : state[0].sequence) sequence.committed = committed;
  for (struct us_engine_row &row : state[0].context) row.sequence = US_ENGINE_NONE;
  for (size_t r = 0; r < w->rows.size(); r++) {
    struct attention_row *row = &w->rows[r];
    slot = row->sequence == before ? slot + 1 : 0, before = row->sequence;
    state[0].context[r] = {0, row->position, row->sequence, slot};
    if (slot >= committed) row->sequence = ATTENTION_ABSENT;
  }
  return lab_upload(state);
}

/* Two layers: the first one's norm is twice the second's, its values half of it. */
static void check_context(const struct attention_shape *s, std::vector<struct attention_row> rows,
                          uint32_t committed) {
  char check[160];
  struct world w;
  world_make(&w, s, rows, 5);
  uint32_t width = s->G * (s->Q + s->V), keys = s->G * s->Q;
  std::vector<float> kv, norms;
  for (size_t i = 0; i < 8 * 2 * width; i++) {
    float x = w.qkv[i / (2 * width) * w.qkv_rows + s->H * s->Q + i % width];
    kv.push_back(i / width % 2 == 0 && i % width >= keys ? x / 2 : x);
  }
  for (uint32_t i = 0; i < 2 * s->Q; i++) norms.push_back(w.k_norm[i % s->Q] * (i < s->Q ? 2 : 1));
  struct us_engine_op op = {};
  op.kind = US_ENGINE_CONTEXT, op.program = US_ENGINE_PASS_CONTEXT, op.wait = US_ENGINE_NONE;
  op.context = {lab_upload(kv),
                lab_upload(norms),
                lab_upload(w.rope),
                2,
                (uint16_t)s->G,
                (uint16_t)s->Q,
                (uint16_t)s->V,
                (uint16_t)s->rotary,
                w.page_count,
                w.value_scale,
                w.eps};
  struct us_engine_launch launch = {};
  launch.ranks = 1, launch.last = 1, launch.rounds = 1, launch.timeout_ns = us_gpu_timeout(1000000000),
  launch.rank[0] = w.rank;
  launch.rank[0].state = context_state(&w, committed),
  launch.rank[0].ops = lab_upload(std::vector<struct us_engine_op>{op});
  attention_launch_engine(&launch, 132, 0);
  world_outputs(&w);
  oracle_append(&w, 0, 2, 0.5f);
  oracle_append(&w, 1, 1, 1);
  uint64_t bad = 0, first_bad = 0;
  for (size_t i = 0; i < w.pool.size(); i++)
    if (w.pool[i] != w.pool_out[i] && bad++ == 0) first_bad = i;
  snprintf(check, sizeof check, "context bits, %s: %u committed", s->name, committed);
  us_gpu_report(check, w.pool.size(), bad, first_bad);
  world_free(&w);
}

static void check_all(void) {
  if (us_gpu_patience()) { /* one of each kind */
    for (int s : {PRO_WINDOWED, PRO_FULL, DRAFTER, PICO})
      check_case(&shapes[s], layout({{0, 3}, {61, 1}, {ATTENTION_ABSENT, 1}, {1021, 3}}),
                 "3 at 0, 1 at 61, none, 3 at 1021", 1, false);
    check_context(&shapes[PICO_DRAFTER], layout({{700, 8}}), 8);
    return;
  }
  check_cases();
  check_bits(&shapes[PRO_WINDOWED], layout({{700, 8}, {127, 3}, {ATTENTION_ABSENT, 1}, {60, 4}}));
  check_bits(&shapes[PRO_FULL], layout({{1021, 5}, {2500, 2}, {5000, 1}}));
  check_bits(&shapes[PRO_FULL], layout({{250, 12}, {4090, 12}}));
  check_bits(&shapes[PRO_FULL], layout({{6140, 8}, {5113, 4}, {4200, 3}}));
  check_bits(&shapes[DRAFTER], layout({{1021, 8}, {130, 8}}));
  check_bits(&shapes[PICO], layout({{1021, 5}, {2500, 2}, {130, 9}}));
  check_bits(&shapes[TINY_FULL], layout({{1021, 5}, {2500, 2}, {5000, 1}}));
  check_bits(&shapes[TINY_FULL], layout({{4090, 16}}));
  check_bits(&shapes[WIDE], layout({{1021, 16}, {5000, 4}}));
  for (int s : {PRO_WINDOWED, PRO_FULL, TINY, TINY_FULL}) {
    check_spoilt(&shapes[s], INFINITY, "Inf");
    check_spoilt(&shapes[s], 1e30f, "1e30");
  }
  check_context(&shapes[DRAFTER], layout({{700, 5}, {62, 3}}), 2);
  check_context(&shapes[PICO_DRAFTER], layout({{700, 8}}), 8);
}

/* ---- all together ---------------------------------------------------------------------------------------------------- */

/* `only`: negative: all; else the one of that number. */
static void check_times(int only) {
  static const struct {
    int shape;
    struct attention_load load;
  } cases[] = {{PRO_WINDOWED, {700, 1, 1}}, {PRO_WINDOWED, {700, 1, 8}}, {PRO_WINDOWED, {700, 8, 1}},
               {PRO_FULL, {1000, 1, 1}},    {PRO_FULL, {1000, 1, 8}},    {PRO_FULL, {1000, 8, 1}},
               {PRO_FULL, {4000, 1, 1}},    {PRO_FULL, {4000, 1, 8}},    {PRO_FULL, {4000, 8, 1}},
               {PRO_FULL, {65000, 1, 1}},   {PRO_FULL, {65000, 1, 8}},   {PRO_FULL, {65000, 8, 1}},
               {PRO_WHOLE, {700, 1, 1}},    {PRO_WHOLE, {1000, 1, 8}},   {PRO_WHOLE, {65000, 1, 1}},
               {PRO_WHOLE, {65000, 1, 8}},  {PRO_WHOLE, {65000, 8, 1}},  {DRAFTER, {4000, 1, 8}}};
  for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++)
    if (only < 0 || only == i) attention_time(&shapes[cases[i].shape], cases[i].load);
}

/* Arguments: "check" or "time": only that; "time" and a number: one case. */
int main(int argc, char **argv) {
  us_gpu_begin();
  us_gpu_watchdog(100);
  if (argc < 2 || !strcmp(argv[1], "check")) check_all();
  if (argc < 2 || !strcmp(argv[1], "time")) check_times(argc > 2 ? atoi(argv[2]) : -1);
  return us_gpu_status();
}
