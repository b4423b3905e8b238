/* t_registry.c: every operation of the registry, run from its row: instruction sets against each other bit for bit, plain C
 * against the formula in double within the row's tolerance, each named mutation outside it. */
#include "kernels/attention/attention.h"
#include "kernels/embed/embed.h"
#include "kernels/experts/experts.h"
#include "kernels/registry.h"
#include "kernels/residual/residual.h"
#include "kernels/rmsnorm/rmsnorm.h"
#include "kernels/rope/rope.h"
#include "kernels/router/router.h"
#include "kernels/swiglu/swiglu.h"
#include "values.h"

#include <math.h>

enum {
  R = 3,
  D = 64,
  F = 96,
  N = 40,
  H = 4,
  G = 2,
  Q = 32,
  V = 32,
  T = 150,
  WINDOW = 70,
  E = 8,
  TOP = 2,
  OUT_MAX = 1024
};

/* Inputs of all operations. */
struct problem {
  struct us_op_dims dims;
  struct us_matrix w;             /* (N, D) MXFP4 */
  struct us_matrix experts[E][3]; /* MXFP4 */
  float *x, *norm, *gate, *up, *logits, *bias, *q, *k, *v, *sink;
};

static struct problem *new_problem(uint64_t *state) {
  struct problem *p = calloc(1, sizeof *p);
  p->dims = (struct us_op_dims){.format = US_FORMAT_MXFP4,
                                .R = R,
                                .D = D,
                                .F = F,
                                .N = N,
                                .K = D,
                                .H = H,
                                .G = G,
                                .Q = Q,
                                .V = V,
                                .T = WINDOW,
                                .E = E,
                                .top_k = TOP,
                                .active = 5};
  p->w = new_matrix(US_FORMAT_MXFP4, N, D, state);
  for (int e = 0; e < E; e++)
    for (int i = 0; i < 3; i++)
      p->experts[e][i] =
          i < 2 ? new_matrix(US_FORMAT_MXFP4, F, D, state) : new_matrix(US_FORMAT_MXFP4, D, F, state);
  p->x = new_values(R * D, 0.2f, state);
  p->norm = new_values(D, 1, state);
  p->gate = new_values(R * F, 12, state);
  p->up = new_values(R * F, 12, state);
  p->logits = new_values(R * E, 2, state);
  p->bias = new_values(E, 0.5f, state);
  p->q = new_values(H * Q, 1, state);
  p->k = new_values(192 * G * Q, 1, state);
  p->v = new_values(192 * G * V, 1, state);
  p->sink = new_values(H, 1, state);
  return p;
}

static void free_problem(struct problem *p) {
  release_matrix(&p->w);
  for (int e = 0; e < E; e++)
    for (int i = 0; i < 3; i++) release_matrix(&p->experts[e][i]);
  float *owned[] = {p->x, p->norm, p->gate, p->up, p->logits, p->bias, p->q, p->k, p->v, p->sink};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
  free(p);
}

static bool is(const char *mutation, const char *name) {
  return mutation && strcmp(mutation, name) == 0;
}

/* A copy of an MXFP4 matrix with one of the code mutations. */
static struct us_matrix mutate(const struct us_matrix *w, const char *mutation) {
  size_t bytes = w->rows * w->cols / 2, scale_bytes = w->rows * w->cols / 32;
  uint8_t *data = malloc(bytes), *scales = malloc(scale_bytes);
  memcpy(data, w->data, bytes);
  memcpy(scales, w->scales, scale_bytes);
  for (size_t i = 0; i < bytes && is(mutation, "nibbles swapped"); i++)
    data[i] = (uint8_t)(data[i] >> 4 | data[i] << 4);
  if (is(mutation, "a scale byte + 1")) scales[1]++;
  if (is(mutation, "a group skipped")) memset(data + 16, 0, 16);
  return (struct us_matrix){
      .format = w->format, .rows = w->rows, .cols = w->cols, .data = data, .scales = scales};
}

/* y[n] += w x in double; size gets the magnitudes. */
static double dot(const struct us_matrix *w, size_t n, const double *x, double *size) {
  float row[D > F ? D : F];
  double sum = 0;
  *size = 0;
  us_matrix_decode_row(w, n, row);
  for (size_t k = 0; k < w->cols; k++) {
    sum += (double)row[k] * x[k];
    *size += fabs((double)row[k] * x[k]);
  }
  return sum;
}

/* ---- One adapter an operation: run it, and say the truth and the magnitudes it is made of ---- */

static size_t run_linear(const struct problem *p, enum us_isa isa, const char *mutation, float *out) {
  struct us_matrix w = mutate(&p->w, mutation);
  float packed[R * D];
  us_linear_pack(p->x, R, D, D, packed, D);
  us_linear(&(struct us_linear_args){.w = &w,
                                     .x = packed,
                                     .x_stride = D,
                                     .y = out,
                                     .y_stride = N,
                                     .R = R,
                                     .begin = 0,
                                     .end = N,
                                     .isa = isa});
  release_matrix(&w);
  return R * N;
}

static void truth_linear(const struct problem *p, double *truth, double *size) {
  for (int r = 0; r < R; r++) {
    double x[D];
    for (int k = 0; k < D; k++) x[k] = (double)p->x[r * D + k];
    for (size_t n = 0; n < N; n++) truth[(size_t)r * N + n] = dot(&p->w, n, x, &size[(size_t)r * N + n]);
  }
}

static size_t run_embed(const struct problem *p, enum us_isa isa, const char *mutation, float *out) {
  us_embed(&p->w, mutation ? 8 : 7, out);
  return D;
}

static void truth_embed(const struct problem *p, double *truth, double *size) {
  for (int k = 0; k < D; k++) {
    double x[D] = {0};
    x[k] = 1;
    truth[k] = dot(&p->w, 7, x, &size[k]);
  }
}

static size_t run_residual(const struct problem *p, enum us_isa isa, const char *mutation, float *out) {
  memcpy(out, p->gate, R * D * sizeof *out);
  us_residual_add(out, p->x, mutation ? R * D - 1 : R * D);
  return R * D;
}

static void truth_residual(const struct problem *p, double *truth, double *size) {
  for (int i = 0; i < R * D; i++) {
    truth[i] = (double)p->gate[i] + (double)p->x[i];
    size[i] = fabs((double)p->gate[i]) + fabs((double)p->x[i]);
  }
}

static size_t run_rmsnorm(const struct problem *p, enum us_isa isa, const char *mutation, float *out) {
  float weight[D];
  for (int k = 0; k < D; k++) weight[k] = p->norm[k] + (is(mutation, "weight + 1") ? 1 : 0);
  us_rmsnorm(&(struct us_rmsnorm_args){.x = p->x,
                                       .x_stride = D,
                                       .weight = weight,
                                       .y = out,
                                       .y_stride = D,
                                       .R = R,
                                       .D = D,
                                       .eps = is(mutation, "eps dropped") ? 0 : 1e-3f,
                                       .isa = isa});
  return R * D;
}

static void truth_rmsnorm(const struct problem *p, double *truth, double *size) {
  for (int r = 0; r < R; r++) {
    double sum = 0;
    for (int k = 0; k < D; k++) sum += (double)p->x[r * D + k] * (double)p->x[r * D + k];
    for (int k = 0; k < D; k++) {
      truth[r * D + k] = (double)p->x[r * D + k] / sqrt(sum / D + (double)1e-3f) * (double)p->norm[k];
      size[r * D + k] = fabs(truth[r * D + k]);
    }
  }
}

static size_t run_rope(const struct problem *p, enum us_isa isa, const char *mutation, float *out) {
  float table[16];
  us_rope_table(is(mutation, "theta swapped") ? 1e6 : 1e4, 16, is(mutation, "position + 1") ? 778 : 777,
                table);
  memcpy(out, p->q, Q * sizeof *out);
  us_rope_apply(table, 16, out);
  return Q;
}

static void truth_rope(const struct problem *p, double *truth, double *size) {
  for (int i = 0; i < Q; i++) {
    int pair = i % 8;
    double angle = 777 * pow(1e4, -pair / 8.0), a = (double)p->q[pair], b = (double)p->q[pair + 8];
    truth[i] = i < 8    ? a * cos(angle) - b * sin(angle)
               : i < 16 ? b * cos(angle) + a * sin(angle)
                        : (double)p->q[i];
    size[i] = i < 16 ? fabs(a) + fabs(b) : 0;
  }
}

static size_t run_swiglu(const struct problem *p, enum us_isa isa, const char *mutation, float *out) {
  float gate[R * F];
  for (int i = 0; i < R * F; i++) gate[i] = is(mutation, "clamped at 7") && p->gate[i] > 7 ? 7 : p->gate[i];
  us_swiglu(&(struct us_swiglu_args){.gate = gate, .up = p->up, .y = out, .n = R * F, .isa = isa});
  return R * F;
}

static void truth_swiglu(const struct problem *p, double *truth, double *size) {
  for (int i = 0; i < R * F; i++) {
    double gate = (double)p->gate[i];
    truth[i] = gate / (1 + exp(-gate)) * (double)p->up[i];
    size[i] = fabs(truth[i]);
  }
}

/* Weights of all E experts, 0 where not chosen. */
static size_t run_router(const struct problem *p, enum us_isa isa, const char *mutation, float *out) {
  memset(out, 0, R * E * sizeof *out);
  for (int r = 0; r < R; r++) {
    uint32_t ids[TOP];
    float weights[TOP];
    us_router_select(&(struct us_router_args){.logits = p->logits + r * E,
                                              .bias = p->bias,
                                              .E = E,
                                              .K = TOP,
                                              .normalise = !is(mutation, "not normalised"),
                                              .scaling = 1},
                     ids, weights);
    for (int i = 0; i < TOP; i++)
      out[r * E + (int)ids[i]] = weights[i] + (is(mutation, "bias in the weights") ? p->bias[ids[i]] : 0);
  }
  return R * E;
}

static void truth_router(const struct problem *p, double *truth, double *size) {
  for (int r = 0; r < R; r++) {
    double sum = 1e-20;
    for (int step = 0; step < 2; step++) {
      for (int e = 0; e < E; e++) {
        int better = 0;
        double score[E];
        for (int i = 0; i < E; i++) score[i] = 1 / (1 + exp(-(double)p->logits[r * E + i]));
        for (int i = 0; i < E; i++) better += score[i] + (double)p->bias[i] > score[e] + (double)p->bias[e];
        bool chosen = better < TOP;
        if (step == 0 && chosen) sum += score[e];
        truth[r * E + e] = size[r * E + e] = chosen ? score[e] / sum : 0;
      }
    }
  }
}

static const uint32_t routed[R * TOP] = {0, 3, 2, 3, 5, 7};
static const float route_weights[R * TOP] = {0.25f, 0.75f, 0.5f, 0.5f, 0.125f, 0.875f};

static size_t run_experts(const struct problem *p, enum us_isa isa, const char *mutation, float *out) {
  struct us_matrix experts[E][3], changed = mutate(&p->experts[3][2], mutation);
  float packed[R * D], inner[R * TOP * F], scratch[2 * R * F], weights[R * TOP], group_weights[R * TOP];
  uint32_t expert[E], begin[E + 1], rows[R * TOP];
  memcpy(experts, p->experts, sizeof experts);
  memcpy(weights, route_weights, sizeof weights);
  experts[3][2] = changed;
  if (is(mutation, "an expert skipped")) weights[3] = 0;
  struct us_expert_groups groups = {.expert = expert, .begin = begin, .row = rows, .weight = group_weights};
  us_experts_group(routed, weights, R, TOP, E, &groups);
  us_linear_pack(p->x, R, D, D, packed, D);
  struct us_experts_args args = {.experts = &experts[0][0],
                                 .groups = &groups,
                                 .x = packed,
                                 .x_stride = D,
                                 .R = R,
                                 .D = D,
                                 .F = F,
                                 .inner = inner,
                                 .y = out,
                                 .y_stride = D,
                                 .isa = isa};
  for (uint32_t i = 0; i < groups.active; i++) us_experts_inner(&args, i, 0, F, scratch);
  us_experts_outer(&args, 0, D, scratch);
  release_matrix(&changed);
  return R * D;
}

static void truth_experts(const struct problem *p, double *truth, double *size) {
  memset(truth, 0, R * D * sizeof *truth);
  memset(size, 0, R * D * sizeof *size);
  for (int i = 0; i < R * TOP; i++) {
    const struct us_matrix *expert = p->experts[routed[i]];
    double x[D], inner[F], inner_size[F], gate_size, up_size, ignored;
    for (int k = 0; k < D; k++) x[k] = (double)p->x[i / TOP * D + k];
    for (size_t f = 0; f < F; f++) {
      double gate = dot(&expert[0], f, x, &gate_size), up = dot(&expert[1], f, x, &up_size);
      inner[f] = gate / (1 + exp(-gate)) * up;
      inner_size[f] = gate_size * up_size; /* the magnitudes that its roundings are relative to */
    }
    for (size_t d = 0; d < D; d++) {
      float row[F];
      us_matrix_decode_row(&expert[2], d, row);
      truth[i / TOP * D + (int)d] += (double)route_weights[i] * dot(&expert[2], d, inner, &ignored);
      for (int f = 0; f < F; f++)
        size[i / TOP * D + (int)d] += (double)route_weights[i] * fabs((double)row[f]) * inner_size[f];
    }
  }
}

/* K (T, G, Q) and V to pages; `shift` reads a neighbour's row. */
static void fill_pages(const struct problem *p, const struct us_attention_keys *keys, float *const *pages,
                       int k_shift, int v_shift) {
  for (uint32_t t = 0; t < 192; t++)
    for (uint32_t g = 0; g < G; g++) {
      char *page = (char *)pages[t / 64];
      memcpy(page + us_attention_k_offset(keys, g, t % 64),
             p->k + ((t + (uint32_t)k_shift) % 192 * G + g) * Q, Q * 4);
      memcpy(page + us_attention_v_offset(keys, g, t % 64),
             p->v + ((t + (uint32_t)v_shift) % 192 * G + g) * V, V * 4);
    }
}

static size_t run_attention(const struct problem *p, enum us_isa isa, const char *mutation, float *out) {
  struct us_attention_keys keys = {.page_count = 3, .type = US_KV_F32, .G = G, .Q = Q, .V = V};
  float *pages[3], *scratch = calloc(us_attention_scratch(&keys, H), sizeof *scratch);
  for (int i = 0; i < 3; i++) pages[i] = calloc(1, us_attention_page_bytes(&keys));
  fill_pages(p, &keys, pages, is(mutation, "K off by one"), is(mutation, "V off by one"));
  keys.pages = (void *const *)pages;
  us_attention(&(struct us_attention_args){.keys = &keys,
                                           .q = p->q,
                                           .H = H,
                                           .position = T - 1,
                                           .cached = T,
                                           .window = WINDOW + (is(mutation, "window + 1") ? 1 : 0) -
                                                     (is(mutation, "window - 1") ? 1 : 0),
                                           .sink = is(mutation, "sink dropped") ? NULL : p->sink,
                                           .scale = (float)(1 / sqrt(Q)),
                                           .head_end = H,
                                           .out = out,
                                           .isa = isa},
               scratch);
  for (int i = 0; i < 3; i++) free(pages[i]);
  free(scratch);
  return H * V;
}

static void truth_attention(const struct problem *p, double *truth, double *size) {
  for (int h = 0; h < H; h++) {
    double sum = exp((double)p->sink[h]);
    memset(truth + h * V, 0, V * sizeof *truth);
    memset(size + h * V, 0, V * sizeof *size);
    for (int t = T - WINDOW; t < T; t++) {
      double score = 0;
      for (int d = 0; d < Q; d++)
        score += (double)p->q[h * Q + d] * (double)p->k[(t * G + h / (H / G)) * Q + d];
      double weight = exp(score / sqrt(Q));
      sum += weight;
      for (int d = 0; d < V; d++) {
        double v = (double)p->v[(t * G + h / (H / G)) * V + d];
        truth[h * V + d] += weight * v;
        size[h * V + d] += weight * fabs(v);
      }
    }
    for (int d = 0; d < V; d++) {
      truth[h * V + d] /= sum;
      size[h * V + d] /= sum;
    }
  }
}

static const struct adapter {
  const char *name;
  size_t (*run)(const struct problem *p, enum us_isa isa, const char *mutation,
                float *out); /* returns the output count */
  void (*truth)(const struct problem *p, double *truth, double *size);
} adapters[] = {{"attention", run_attention, truth_attention},
                {"embed", run_embed, truth_embed},
                {"experts", run_experts, truth_experts},
                {"linear", run_linear, truth_linear},
                {"residual", run_residual, truth_residual},
                {"rmsnorm", run_rmsnorm, truth_rmsnorm},
                {"rope", run_rope, truth_rope},
                {"router", run_router, truth_router},
                {"swiglu", run_swiglu, truth_swiglu}};

static const struct adapter *adapter_of(const struct us_op *op) {
  for (size_t i = 0; i < sizeof adapters / sizeof *adapters; i++)
    if (strcmp(adapters[i].name, op->name) == 0) return &adapters[i];
  ck_abort_msg("operation '%s' has no test", op->name);
}

/* Largest error as a multiple of what the tolerance allows. */
static double excess(const struct us_op *op, const struct problem *p, const float *out, size_t n,
                     const double *truth, const double *size) {
  double worst = 0;
  for (size_t i = 0; i < n; i++) {
    double allowed = op->tolerance(&p->dims) * 0x1p-24 * size[i], error = fabs((double)out[i] - truth[i]);
    if (error > 0) worst = fmax(worst, error / (allowed > 0 ? allowed : 1e-300));
  }
  return worst;
}

/* ---- Tests ---- */

START_TEST(every_operation_is_within_its_tolerance_of_the_formula_and_no_mutation_is) {
  uint64_t state = us_test_seed() + (uint64_t)_i;
  struct problem *p = new_problem(&state);
  float out[OUT_MAX];
  double truth[OUT_MAX], size[OUT_MAX];
  for (size_t i = 0; i < us_op_count(); i++) {
    const struct us_op *op = us_op_at(i);
    const struct adapter *adapter = adapter_of(op);
    size_t n = adapter->run(p, US_ISA_BEST, NULL, out);
    adapter->truth(p, truth, size);
    double clean = excess(op, p, out, n, truth, size);
    ck_assert_msg(clean <= 1, "%s: %g times its tolerance", op->name, clean);
    for (size_t m = 0; m < US_OP_MAX_MUTATIONS && op->mutations[m]; m++) {
      adapter->run(p, US_ISA_BEST, op->mutations[m], out);
      double changed = excess(op, p, out, n, truth, size);
      ck_assert_msg(changed > 1, "%s: mutation '%s' stays within the tolerance (%g)", op->name,
                    op->mutations[m], changed);
    }
    ck_assert_msg(op->mutations[0], "%s has no mutation", op->name);
  }
  free_problem(p);
}
END_TEST

START_TEST(every_operation_has_the_same_bits_on_every_instruction_set) {
  uint64_t state = us_test_seed() + 50 + (uint64_t)_i;
  struct problem *p = new_problem(&state);
  float plain[OUT_MAX], fast[OUT_MAX];
  enum us_isa isas[2];
  size_t isa_count = fast_isas(isas);
  for (size_t i = 0; i < us_op_count(); i++) {
    const struct adapter *adapter = adapter_of(us_op_at(i));
    size_t n = adapter->run(p, US_ISA_PLAIN, NULL, plain);
    for (size_t j = 0; j < isa_count; j++) {
      adapter->run(p, isas[j], NULL, fast);
      assert_same_bits(fast, plain, n, us_op_at(i)->name);
    }
  }
  free_problem(p);
}
END_TEST

START_TEST(bytes_and_flops_are_those_of_pro) {
  struct us_op_dims dims = {.format = US_FORMAT_MXFP4,
                            .R = 8,
                            .D = 6144,
                            .F = 2048,
                            .N = 6144,
                            .K = 2048,
                            .top_k = 8,
                            .active = 60};
  ck_assert(us_op_find("experts")->bytes(&dims) == 60 * 20054016.0); /* one expert, as published */
  ck_assert(us_op_find("linear")->bytes(&dims) == 6144.0 * 2048 * 17 / 32);
  ck_assert(us_op_find("experts")->flops(&dims) == 6.0 * 64 * 6144 * 2048);
  dims = (struct us_op_dims){.R = 1, .T = 1, .H = 128, .G = 8, .Q = 192, .V = 128};
  ck_assert(us_op_find("attention")->bytes(&dims) == 5120); /* a position of a layer */
  ck_assert_ptr_null(us_op_find("none"));
  ck_assert_ptr_null(us_op_at(us_op_count()));
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("registry");
  tcase_add_loop_test(c, every_operation_is_within_its_tolerance_of_the_formula_and_no_mutation_is, 0, 10);
  tcase_add_loop_test(c, every_operation_has_the_same_bits_on_every_instruction_set, 0, 4);
  tcase_add_test(c, bytes_and_flops_are_those_of_pro);
  return us_suite("registry", c);
}
US_TEST_MAIN(make_suite)
