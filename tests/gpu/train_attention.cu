/* train_attention.cu: attention for training, forward and gradients, against double precision; the same bits twice; speeds.
 *
 * Usage: train_attention [time]: with an argument only the speeds.
 */
#include "train_attention.h"

static const uint32_t MUTANTS = 24;

static const struct shape shapes[] = {
    {"pico, window 64", WINDOW, 500, 64, 4, 2, 48, 32, true, 0},
    {"pico, full", FULL, 500, 0, 4, 2, 48, 32, false, 0},
    {"pico, draft", DRAFT, 300, 64, 4, 2, 48, 32, false, 40},
    {"nano, window 128", WINDOW, 600, 128, 8, 4, 64, 64, true, 0},
    {"nano, full", FULL, 400, 0, 8, 1, 64, 64, true, 0},
    {"nano, draft", DRAFT, 400, 128, 8, 1, 64, 64, true, 50},
    {"mini, window 128", WINDOW, 700, 128, 8, 2, 128, 128, true, 0},
    {"mini, full", FULL, 520, 0, 8, 2, 128, 128, false, 0},
    {"mini, draft", DRAFT, 500, 128, 8, 2, 128, 128, false, 50},
    {"mini, one head a KV head", WINDOW, 400, 64, 4, 4, 128, 128, false, 0},
    {"mini, any ranges", RANDOM, 333, 0, 8, 4, 128, 128, true, 0},
    {"Pro, window 128", WINDOW, 400, 128, 8, 1, 192, 128, true, 0},
    {"Pro, full", FULL, 300, 0, 4, 2, 192, 128, true, 0},
    {"Pro, draft", DRAFT, 300, 128, 4, 4, 192, 128, false, 30},
    {"Pro, any ranges", RANDOM, 200, 0, 8, 2, 192, 128, false, 0},
    {"three heads a KV head", FULL, 300, 0, 6, 2, 80, 64, true, 0},
    {"mini, chains of units", WINDOW, 4000, 64, 16, 8, 128, 128, true, 0},
    {"32 heads on one", WINDOW, 150, 64, 32, 1, 64, 64, true, 0},
};

static const char *const mistake_names[MISTAKES] = {"", "sink dropped", "context one key longer",
                                                    "scale changed", "wrong KV head"};

/* ---- results against double -------------------------------------------------------------------------------------- */

/* Largest error / allowed of bf16 values. */
static double worst_of(const struct expected &e, const uint16_t *got) {
  double worst = 0;
  for (size_t d = 0; d < e.value.size(); d++) {
    double ratio = fabs(us_bf16_to_f32(got[d]) - e.value[d]) / e.allowed[d];
    if (!(ratio <= worst)) worst = std::isnan(ratio) ? INFINITY : ratio;
  }
  return worst;
}

static const uint16_t *dq_of(const struct problem *p, uint32_t i, uint32_t head) {
  return &p->dqkv[(size_t)(p->first + i) * p->stride + head * p->of->Q];
}
static const uint16_t *dk_of(const struct problem *p, uint32_t j, uint32_t g) {
  return &p->dqkv[(size_t)j * p->stride + (p->of->H + g) * p->of->Q];
}
static const uint16_t *dv_of(const struct problem *p, uint32_t j, uint32_t g) {
  return &p->dqkv[(size_t)j * p->stride + (p->of->H + p->of->G) * p->of->Q + g * p->of->V];
}

enum output { OUT, LSE, DQ, DK, DV, DSINK, OUTPUTS };
static const char *const output_names[OUTPUTS] = {"out", "lse", "dq", "dk", "dv", "dsink"};

struct ratios {
  std::vector<double> of[OUTPUTS];
};

/* error / allowed of the outputs of every query_step-th query's heads and every key_step-th key's. */
static struct ratios compare(const struct problem *p, enum mistake m, const struct row_table &rows,
                             uint32_t query_step, uint32_t key_step) {
  const struct shape *s = p->of;
  uint32_t queries = (p->queries + query_step - 1) / query_step * s->H,
           keys = (p->keys + key_step - 1) / key_step * s->G;
  struct ratios r;
  for (int o : {OUT, LSE, DQ}) r.of[o].resize(queries);
  for (int o : {DK, DV}) r.of[o].resize(keys);
  in_parallel(queries, [&, p](size_t n) {
    uint32_t i = (uint32_t)n / s->H * query_step, head = (uint32_t)n % s->H;
    struct query_expected e = expect_query(p, i, head, m, rows);
    r.of[OUT][n] = worst_of(e.out, &p->out[((size_t)i * s->H + head) * s->V]);
    r.of[LSE][n] = fabs(p->lse[(size_t)i * s->H + head] - e.lse.value[0]) / e.lse.allowed[0];
    r.of[DQ][n] = worst_of(e.dq, dq_of(p, i, head));
  });
  in_parallel(keys, [&, p](size_t n) {
    uint32_t j = (uint32_t)n / s->G * key_step, g = (uint32_t)n % s->G;
    struct key_expected e = expect_key(p, j, g, m, rows);
    r.of[DK][n] = worst_of(e.dk, dk_of(p, j, g)), r.of[DV][n] = worst_of(e.dv, dv_of(p, j, g));
  });
  if (s->sink) {
    struct expected e = expect_sinks(p, rows);
    for (uint32_t h = 0; h < s->H; h++) r.of[DSINK].push_back(fabs(p->dsink[h] - e.value[h]) / e.allowed[h]);
  }
  return r;
}

static void check_shape(const struct problem *p) {
  struct row_table right = device_rows(p), mutated[MISTAKES];
  struct ratios r = compare(p, RIGHT, right, 1, 1), wrong[MISTAKES];
  for (int m = NO_SINK; m < MISTAKES; m++) {
    if (!mistake_applies(p, (enum mistake)m)) continue;
    mutated[m] = double_rows(p, (enum mistake)m);
    wrong[m] = compare(p, (enum mistake)m, mutated[m], p->queries / MUTANTS, p->keys / MUTANTS);
  }
  for (int o = 0; o < OUTPUTS; o++) {
    if (r.of[o].empty()) continue;
    struct lab_result result = {output_names[o], p->of->name, "bf16"};
    for (double ratio : r.of[o]) lab_sample(&result, ratio, 1, 0);
    for (int m = NO_SINK; m < MISTAKES && o != DSINK;
         m++) /* lse and delta are of the mutant: dsink says nothing more */
      if (!wrong[m].of[o].empty()) lab_mutation(&result, mistake_names[m], wrong[m].of[o]);
    lab_report(&result);
  }
}

/* ---- the same bits ----------------------------------------------------------------------------------------------- */

static void check_twice(struct problem *p) {
  std::vector<uint16_t> out = p->out, dqkv = p->dqkv;
  std::vector<float> lse = p->lse, dsink = p->dsink;
  run_problem(p);
  uint64_t bad = (out != p->out) + (lse != p->lse) + (dqkv != p->dqkv) + (dsink != p->dsink);
  us_gpu_report("the same bits twice", out.size() + lse.size() + dqkv.size() + dsink.size(), bad, 0);
}

static void check_arguments(const struct problem *p) {
  struct us_attention_train a = p->a;
  uint64_t accepted = 0;
  a.qk_dim = 200, accepted += us_attention_train(&a, 0) != cudaErrorInvalidValue, a = p->a;
  a.v_dim = 24, accepted += us_attention_train(&a, 0) != cudaErrorInvalidValue, a = p->a;
  a.q_heads = 3, accepted += us_attention_train(&a, 0) != cudaErrorInvalidValue, a = p->a;
  a.k_stride = 4, accepted += us_attention_train_grad(&a, &p->grads, 0) != cudaErrorInvalidValue, a = p->a;
  a.scale = 0, accepted += us_attention_train_grad(&a, &p->grads, 0) != cudaErrorInvalidValue, a = p->a;
  us_gpu_report("arguments that are not allowed are refused", 5, accepted, 0);
}

int main(int argc, char **) {
  us_gpu_begin();
  us_gpu_watchdog(110);
  for (const struct shape &s : shapes) {
    if (argc > 1) break;
    struct problem p;
    make_problem(&p, &s, 1);
    run_problem(&p);
    check_shape(&p);
    check_twice(&p);
    if (&s == shapes) check_arguments(&p);
    release_problem(&p);
  }
  time_attention();
  return us_gpu_status();
}
