/* lab_reduce.cu: EMBED and REDUCE: residual sums bit for bit, norm against double, taps; sums of several ranks that share the GPU,
 * in rank order, pushed or gathered; thousands of rounds with random delays.
 *
 * Contents: one rank, sums from the host; several ranks; thousands of rounds. */
#include "formats/bf16.h"
#include "lab_engine.h"

#include <cstring>

/* ---- one rank, sums from the host --------------------------------------------------------------------------------- */

static const uint32_t STEPS = 5, ADDENDS = 4;

/* What operation i does; 0 is EMBED. */
static const struct step {
  uint32_t addends;
  bool replace, norm, tap;
} steps[STEPS] = {{0, false, true, true},
                  {4, false, true, true},
                  {1, true, false, true},
                  {3, false, true, false},
                  {1, false, true, false}};

struct fixture {
  struct lab_run run;
  uint32_t D;
  std::vector<uint16_t> table; /* 8 embeddings, in two parts of 4 as two ranks would hold them */
  std::vector<float> mask, weight, exchange; /* exchange: (STEPS, ADDENDS, 8, D) */
  float *residual;
  void *operand[STEPS], *tap[STEPS];
  float *plain[STEPS];
};

static float draw(uint64_t *state, float half) {
  return ((float)(lab_random(state) >> 40) * 0x1p-23f - 1.0f) * half;
}

/* Row 3 is tiny, so that eps counts; row 5 does not exist; row 6 is the drafter's mask. */
static float size_of_row(uint32_t row) {
  return row == 3 ? 1e-3f : row == 4 ? 1e4f : 1.0f;
}

static void make_inputs(struct fixture *f, uint64_t seed) {
  uint64_t state = seed + f->D;
  uint32_t D = f->D;
  f->table.resize(8 * (size_t)D), f->mask.resize(D), f->weight.resize(D);
  for (size_t i = 0; i < f->table.size(); i++)
    f->table[i] = us_bf16_from_f32(draw(&state, size_of_row((uint32_t)(i / D))));
  for (uint32_t d = 0; d < D; d++) f->mask[d] = draw(&state, 1), f->weight[d] = 1 + draw(&state, 0.5f);
  f->exchange.resize((size_t)STEPS * ADDENDS * 8 * D);
  for (size_t i = 0; i < f->exchange.size(); i++)
    f->exchange[i] = draw(&state, size_of_row((uint32_t)(i / D % 8)));
}

/* The partial sums that step i adds, as ranks would have pushed them; what it does not add has not arrived. */
static std::vector<float> fragments(const struct fixture *f) {
  size_t one = 8 * (size_t)f->D;
  std::vector<float> out(f->exchange.size());
  memset(out.data(), 0xff, out.size() * sizeof(float));
  for (uint32_t i = 0; i < STEPS; i++)
    for (uint32_t a = 0; a < steps[i].addends; a++)
      for (uint32_t row = 0; row < 8; row++)
        for (uint32_t d = 0; d < f->D; d++) {
          size_t part = (size_t)(i * ADDENDS + a) * one;
          out[part + us_engine_fragment_index(row, d)] = f->exchange[part + (size_t)row * f->D + d];
        }
  return out;
}

static void make_list(struct fixture *f) {
  struct us_engine_rank *rank = &f->run.launch.rank[0];
  uint16_t *table = lab_keep(&f->run, lab_upload(f->table));
  float *weight = lab_keep(&f->run, lab_upload(f->weight));
  rank->embed[0] = table, rank->embed[1] = table + 4 * f->D, rank->embed_rows = 4;
  rank->mask_embedding = lab_keep(&f->run, lab_upload(f->mask));
  f->residual = (float *)lab_buffer(&f->run, sizeof(float) * 8 * f->D, 0xff);
  for (uint32_t i = 0; i < STEPS; i++) {
    struct us_engine_reduce r = {};
    f->operand[i] = lab_buffer(&f->run, (size_t)f->D * 16, 0xff),
    f->tap[i] = lab_buffer(&f->run, (size_t)f->D * 16, 0xff);
    f->plain[i] = (float *)lab_buffer(&f->run, sizeof(float) * 8 * f->D, 0xff);
    r.residual = f->residual, r.weight = steps[i].norm ? weight : NULL, r.operand = f->operand[i],
    r.opt_plain = f->plain[i];
    r.opt_tap = steps[i].tap ? f->tap[i] : NULL, r.eps = 1e-5f, r.addends = steps[i].addends,
    r.replace = steps[i].replace;
    lab_add_reduce(&f->run, 0, r);
  }
  lab_upload_ops(&f->run);
  std::vector<float> sums = fragments(f);
  US_CUDA(cudaMemcpy(rank->exchange[0], sums.data(), sums.size() * sizeof(float), cudaMemcpyHostToDevice));
  lab_set_rows(&f->run, 0xdf);
  int32_t token = US_ENGINE_MASK;
  US_CUDA(cudaMemcpy(&f->run.state[0]->target[6].token, &token, sizeof token, cudaMemcpyHostToDevice));
}

/* The residual after step i, from the one before: FP32 sums in the order of the addends. */
static void step_residual(const struct fixture *f, uint32_t i, std::vector<float> *residual) {
  size_t one = 8 * (size_t)f->D;
  for (size_t at = 0; at < one; at++) {
    uint32_t row = (uint32_t)(at / f->D), d = (uint32_t)(at % f->D);
    const float *from = &f->exchange[(size_t)i * ADDENDS * one + at];
    float sum = from[0];
    for (uint32_t a = 1; a < steps[i].addends; a++) sum = sum + from[a * one];
    if (i == 0) sum = row == 5 ? 0 : row == 6 ? f->mask[d] : us_bf16_to_f32(f->table[at]);
    (*residual)[at] = steps[i].replace || i == 0 ? sum : (*residual)[at] + sum;
  }
}

struct norm_rows {
  double scale[8], without_eps[8];
};

static struct norm_rows norm_of(const struct fixture *f, const std::vector<float> &residual) {
  struct norm_rows n;
  for (uint32_t row = 0; row < 8; row++) {
    double sum = 0;
    for (uint32_t d = 0; d < f->D; d++)
      sum += (double)residual[(size_t)row * f->D + d] * residual[(size_t)row * f->D + d];
    n.scale[row] = 1 / sqrt(sum / f->D + (double)1e-5f), n.without_eps[row] = 1 / sqrt(sum / f->D);
  }
  return n;
}

/* Squares and their tree: 18 roundings of positive numbers, halved by the root; division, root, reciprocal, two products. */
static double norm_allowed(double y) {
  int exponent;
  frexp(fabs(y), &exponent);
  return 16 * LAB_UNIT * fabs(y) + ldexp(1, exponent - 9);
}

static void check_norm(struct lab_result *r, const struct fixture *f, uint32_t i,
                       const std::vector<float> &residual) {
  struct norm_rows n = norm_of(f, residual);
  std::vector<float> got = lab_operand_rows(f->operand[i], f->D),
                     plain = lab_download(f->plain[i], 8 * (size_t)f->D);
  std::vector<double> shifted, without_eps;
  for (size_t at = 0; at < got.size(); at++) {
    uint32_t row = (uint32_t)(at / f->D), d = (uint32_t)(at % f->D);
    double x = residual[at] * n.scale[row], y = x * f->weight[d], allowed = norm_allowed(y);
    if (allowed == 0) allowed = 0x1p-200;
    lab_sample(r, got[at] - y, allowed, 0);
    r->bad += plain[at] != got[at];
    if (row == 5) continue;
    shifted.push_back(fabs(got[at] - x * f->weight[d ^ 1]) / allowed);
    if (row == 3)
      without_eps.push_back(fabs(got[at] - residual[at] * n.without_eps[row] * f->weight[d]) / allowed);
  }
  if (i) return;
  lab_mutation(r, "the neighbour's weight", shifted);
  lab_mutation(r, "eps left out", without_eps);
}

static void check_step(struct lab_result *r, const struct fixture *f, uint32_t i,
                       const std::vector<float> &residual) {
  char name[96];
  std::vector<float> got = lab_download(f->residual, 8 * (size_t)f->D), want = residual;
  snprintf(name, sizeof name, "reduce: D %u, step %u: the residual is the FP32 sum in order", f->D, i);
  lab_same_bits(name, want.data(), got.data(), got.size());
  if (steps[i].norm) check_norm(r, f, i, residual);
  if (!steps[i].tap) return;
  for (float &x : want) x = us_bf16_round(x);
  got = lab_operand_rows(f->tap[i], f->D);
  snprintf(name, sizeof name, "reduce: D %u, step %u: the tap is the residual in bf16", f->D, i);
  lab_same_bits(name, want.data(), got.data(), got.size());
}

static void lab_one_rank(uint32_t D, uint64_t seed) {
  struct fixture f = {};
  char shape[64];
  f.D = D;
  lab_run_begin(&f.run, lab_ranks{1, false, D, ADDENDS, STEPS});
  make_inputs(&f, seed);
  make_list(&f);
  snprintf(shape, sizeof shape, "8 x %u", D);
  struct lab_result r = {"reduce", shape, "f32"};
  std::vector<float> residual(8 * (size_t)D);
  for (uint32_t i = 0; i < STEPS; i++) {
    lab_launch_one(&f.run, i);
    step_residual(&f, i, &residual);
    check_step(&r, &f, i, residual);
  }
  std::vector<uint32_t> left = lab_download((uint32_t *)f.run.launch.rank[0].exchange[0], f.exchange.size());
  uint64_t present = 0;
  for (uint32_t word : left) present += word != US_ENGINE_ABSENT;
  us_gpu_report("reduce: every sum that was read is marked absent again", left.size(), present, 0);
  lab_report(&r);
  lab_run_end(&f.run);
}

/* ---- several ranks ------------------------------------------------------------------------------------------------ */

static const uint32_t RANK_D = 768, RANK_K = 512, PARTS = 2;

/* One rank's share: its own product, stored and pushed; and its own rows, gathered. */
struct share {
  struct lab_weights sums, columns;
  float *stored, *stored_columns, *residual, *gathered;
  void *normed;
};

static void add_share(struct lab_run *run, uint32_t rank, struct share *s, const void *operand,
                      const float *weight) {
  uint32_t D = RANK_D, ranks = run->shape.count;
  s->stored = (float *)lab_buffer(run, sizeof(float) * PARTS * 8 * D, 0xff);
  s->stored_columns = (float *)lab_buffer(run, sizeof(float) * 8 * D, 0xff);
  s->residual = (float *)lab_buffer(run, sizeof(float) * 8 * D, 0);
  s->gathered = (float *)lab_buffer(run, sizeof(float) * 8 * D, 0xff),
  s->normed = lab_buffer(run, (size_t)D * 16, 0xff);
  lab_add_gemm(run, rank, &s->sums, 0, operand, s->stored, US_ENGINE_STORE);
  lab_add_gemm(run, rank, &s->sums, 0, operand, NULL, US_ENGINE_PUSH);
  struct us_engine_reduce r = {};
  r.residual = s->residual, r.weight = weight, r.operand = s->normed, r.eps = 1e-5f,
  r.addends = ranks * PARTS;
  lab_add_reduce(run, rank, r);
  lab_add_gemm(run, rank, &s->columns, 0, s->normed, s->stored_columns, US_ENGINE_STORE);
  uint32_t op = lab_add_gemm(run, rank, &s->columns, 0, s->normed, NULL, US_ENGINE_PUSH);
  lab_op(run, rank, op)->gemm.gather = true, lab_op(run, rank, op)->gemm.first = rank * D / ranks;
  struct us_engine_reduce g = {};
  g.residual = s->gathered, g.addends = 1, g.replace = true;
  lab_add_reduce(run, rank, g);
}

static void check_shares(uint32_t ranks, std::vector<struct share> &shares) {
  size_t one = 8 * (size_t)RANK_D;
  std::vector<float> sum(one, 0.0f), columns(one);
  for (uint32_t i = 0; i < ranks; i++) {
    std::vector<float> parts = lab_download(shares[i].stored, PARTS * one);
    for (uint32_t p = 0; p < PARTS; p++)
      for (size_t at = 0; at < one; at++) sum[at] = i + p ? sum[at] + parts[p * one + at] : parts[at];
    uint32_t own = RANK_D / ranks;
    std::vector<float> rows = lab_download(shares[i].stored_columns, 8 * (size_t)own);
    for (uint32_t at = 0; at < 8 * own; at++) columns[at / own * RANK_D + i * own + at % own] = rows[at];
  }
  for (float &x : sum) x = 0.0f + x;
  char name[96];
  for (uint32_t i = 0; i < ranks; i++) {
    std::vector<float> residual = lab_download(shares[i].residual, one),
                       gathered = lab_download(shares[i].gathered, one);
    snprintf(name, sizeof name, "reduce: %u ranks, rank %u: partial sums add in rank order", ranks, i);
    lab_same_bits(name, sum.data(), residual.data(), one);
    snprintf(name, sizeof name, "reduce: %u ranks, rank %u: gathered columns", ranks, i);
    lab_same_bits(name, columns.data(), gathered.data(), one);
  }
}

static void lab_ranks_together(uint32_t ranks, uint64_t seed) {
  struct lab_run run;
  uint64_t state = seed;
  std::vector<struct share> shares(ranks);
  lab_run_begin(&run, lab_ranks{ranks, false, RANK_D, ranks * PARTS});
  void *operand = lab_keep(&run, lab_operand(lab_rows(RANK_K, &state), RANK_K));
  float *weight = lab_keep(&run, lab_upload(std::vector<float>(RANK_D, 1.25f)));
  for (uint32_t i = 0; i < ranks; i++) {
    shares[i].sums = lab_weights(US_FORMAT_FP8, RANK_D, RANK_K), shares[i].sums.parts = PARTS;
    shares[i].columns = lab_weights(US_FORMAT_BF16, RANK_D / ranks, RANK_D);
    lab_weights_make(&shares[i].sums, seed + i), lab_weights_make(&shares[i].columns, seed + 100 + i);
    add_share(&run, i, &shares[i], operand, weight);
  }
  lab_upload_ops(&run);
  lab_launch(&run, 1);
  check_shares(ranks, shares);
  for (struct share &s : shares) lab_weights_free(&s.sums), lab_weights_free(&s.columns);
  lab_run_end(&run);
}

/* ---- thousands of rounds ------------------------------------------------------------------------------------------ */

static uint32_t many(void) {
  return us_gpu_patience() ? 8 : 10000;
}

/* Two products and sums a round, each fed by the other; what is left of the residual on every rank. */
static std::vector<float> run_rounds(uint32_t ranks, std::vector<struct lab_weights> &w, uint64_t seed,
                                     uint32_t jitter) {
  struct lab_run run;
  size_t one = 8 * (size_t)RANK_D;
  std::vector<float *> residual;
  lab_run_begin(&run, lab_ranks{ranks, false, RANK_D, ranks});
  run.launch.jitter = jitter;
  for (uint32_t i = 0; i < ranks; i++) {
    uint64_t state = seed;
    float *weight = lab_keep(&run, lab_upload(std::vector<float>(RANK_D, 1.0f)));
    void *a = lab_keep(&run, lab_operand(lab_rows(RANK_D, &state), RANK_D)),
         *b = lab_buffer(&run, RANK_D * 16, 0);
    residual.push_back((float *)lab_buffer(&run, one * sizeof(float), 0));
    for (uint32_t half = 0; half < 2; half++) {
      lab_add_gemm(&run, i, &w[i], half, half ? b : a, NULL, US_ENGINE_PUSH);
      struct us_engine_reduce r = {};
      r.residual = residual.back(), r.weight = weight, r.operand = half ? a : b, r.eps = 1e-5f,
      r.addends = ranks;
      lab_add_reduce(&run, i, r);
    }
  }
  lab_upload_ops(&run);
  lab_launch(&run, many());
  std::vector<float> all;
  for (float *x : residual) {
    std::vector<float> rows = lab_download(x, one);
    all.insert(all.end(), rows.begin(), rows.end());
  }
  lab_run_end(&run);
  return all;
}

static void lab_many_rounds(uint32_t ranks, uint64_t seed) {
  std::vector<struct lab_weights> w(ranks);
  for (uint32_t i = 0; i < ranks; i++) {
    w[i] = lab_weights(US_FORMAT_MXFP4, RANK_D, RANK_D), w[i].count = 2;
    lab_weights_make(&w[i], seed + i);
  }
  std::vector<float> plain = run_rounds(ranks, w, seed, 0), delayed = run_rounds(ranks, w, seed, 2000), first;
  size_t one = plain.size() / ranks;
  char name[96];
  snprintf(name, sizeof name, "reduce: %u ranks, %u rounds: random delays change no bit", ranks, many());
  lab_same_bits(name, plain.data(), delayed.data(), plain.size());
  for (uint32_t i = 0; i < ranks; i++) first.insert(first.end(), plain.begin(), plain.begin() + (long)one);
  snprintf(name, sizeof name, "reduce: %u ranks, %u rounds: all ranks have the same bits", ranks, many());
  if (ranks > 1) lab_same_bits(name, first.data(), plain.data(), plain.size());
  uint64_t bad = 0;
  for (float v : plain) bad += !(fabsf(v) < 1e6f);
  us_gpu_report("reduce: many rounds leave numbers", plain.size(), bad, 0);
  for (struct lab_weights &weights : w) lab_weights_free(&weights);
}

/* A list that gives the other roles nothing to do, so that rounds end without them: what the rows become. */
static std::vector<float> run_idle(uint32_t jitter) {
  struct lab_run run;
  lab_run_begin(&run, lab_ranks{1, false, RANK_D});
  run.launch.jitter = jitter;
  std::vector<uint16_t> table(8 * (size_t)RANK_D);
  for (size_t i = 0; i < table.size(); i++) table[i] = (uint16_t)(0x3f80 + i % 61);
  struct us_engine_rank *rank = &run.launch.rank[0];
  rank->embed[0] = lab_keep(&run, lab_upload(table)), rank->embed_rows = 8;
  struct us_engine_reduce r = {};
  r.residual = (float *)lab_buffer(&run, sizeof(float) * 8 * RANK_D, 0);
  r.weight = lab_keep(&run, lab_upload(std::vector<float>(RANK_D, 1.0f)));
  r.operand = lab_buffer(&run, RANK_D * 16, 0), r.eps = 1e-5f;
  lab_add_reduce(&run, 0, r);
  lab_upload_ops(&run);
  lab_launch(&run, many());
  std::vector<float> rows = lab_operand_rows(r.operand, RANK_D);
  lab_run_end(&run);
  return rows;
}

/* A role that is late by more rounds than a barrier tells apart would wait for ever. */
static void lab_idle_roles(void) {
  std::vector<float> plain = run_idle(0), delayed = run_idle(20000);
  lab_same_bits("reduce: rounds without work for the other roles: random delays change no bit", plain.data(),
                delayed.data(), plain.size());
}

void lab_reduce(uint64_t seed) {
  if (!us_gpu_patience()) lab_one_rank(6144, seed);
  lab_one_rank(128, seed);
  for (uint32_t ranks = 1; ranks <= 4; ranks *= 2) lab_ranks_together(ranks, seed);
  for (uint32_t ranks = 1; ranks <= 4; ranks *= 2) lab_many_rounds(ranks, seed);
  lab_idle_roles();
}
