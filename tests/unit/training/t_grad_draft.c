/* t_grad_draft.c: the drafter's training passes against the formulas, written out in double for one block at a time: hidden
 * rows directly, gradients by finite differences of its weighted cross-entropy. */
#include "kernels/gradcheck.h"
#include "training/draft_loss.h"
#include "training/draft_train.h"

enum {
  D = 32,
  F = 32,
  H = 2,
  G = 1,
  Q = 8,
  V = 16,
  ROT = 4,
  L = 2,
  TAPS = 2,
  B = 4,
  N = 40,
  R = 20,
  W = 9,
  SPLIT = 8,
  RANK = 32
};

static uint32_t markov; /* rank of the head */

static struct us_draft_shape shape_of(void) {
  return (struct us_draft_shape){.layers = L,
                                 .hidden = D,
                                 .vocab = N,
                                 .inner = F,
                                 .attention = {.q_heads = H,
                                               .kv_heads = G,
                                               .qk_dim = Q,
                                               .v_dim = V,
                                               .rotary_dim = ROT,
                                               .rope_theta = 100.0,
                                               .window = W,
                                               .sink = true},
                                 .norm_eps = 1e-5,
                                 .value_scale = 0.612,
                                 .block = B,
                                 .mask_id = 3,
                                 .taps = TAPS,
                                 .tap_layer = {0, 1},
                                 .target_layers = 2,
                                 .markov = markov};
}

/* --- the formulas, in double --- */

struct truth {
  struct us_params *params;
  double *value; /* the masters' arena in double */
  double *embed, *head, *taps;
  const struct us_draft_blocks *blocks;
  const uint32_t *position;
  const float *weight; /* of labelled rows, in order; constants */
  double hidden[64 * D];
};

static const double *tensor(const struct truth *t, int layer, const char *rest) {
  char name[128];
  if (layer < 0)
    snprintf(name, sizeof name, "%s", rest);
  else
    snprintf(name, sizeof name, "layers.%d.%s", layer, rest);
  struct us_param *p = us_params_find(t->params, name);
  ck_assert_msg(p != NULL, "%s", name);
  return t->value + p->offset;
}

static void norm(const double *x, const double *gain, int n, double *y) {
  double sum = 0.0;
  for (int i = 0; i < n; i++) sum += x[i] * x[i];
  double inverse = 1.0 / sqrt(sum / n + 1e-5);
  for (int i = 0; i < n; i++) y[i] = x[i] * inverse * gain[i];
}

static void product(const double *x, const double *w, int n, int k, double *y) {
  for (int i = 0; i < n; i++) {
    y[i] = 0.0;
    for (int j = 0; j < k; j++) y[i] += x[j] * w[i * k + j];
  }
}

static void rotate(double *x, uint32_t position) {
  for (int i = 0; i < ROT / 2; i++) {
    double angle = position * pow(100.0, -2.0 * i / ROT), a = x[i], b = x[i + ROT / 2];
    x[i] = a * cos(angle) - b * sin(angle);
    x[i + ROT / 2] = b * cos(angle) + a * sin(angle);
  }
}

static void key_value(const struct truth *t, int l, const double *x, uint32_t position, double *k,
                      double *v) {
  double raw[G * Q];
  product(x, tensor(t, l, "self_attn.k_proj.weight"), G * Q, D, raw);
  product(x, tensor(t, l, "self_attn.v_proj.weight"), G * V, D, v);
  for (int i = 0; i < G * V; i++) v[i] *= 0.612;
  norm(raw, tensor(t, l, "self_attn.k_norm.weight"), Q, k);
  rotate(k, position);
}

static void attend(const struct truth *t, int l, const double *q, double (*k)[Q], double (*v)[V],
                   const int *seen, int keys, double *out) {
  for (int h = 0; h < H; h++) {
    double sum = exp(tensor(t, l, "self_attn.attention_sink_bias")[h]), *o = out + h * V;
    memset(o, 0, V * sizeof *o);
    for (int i = 0; i < keys; i++) {
      double score = 0.0;
      if (!seen[i]) continue;
      for (int d = 0; d < Q; d++) score += q[h * Q + d] * k[i][d];
      double e = exp(score / sqrt((double)Q));
      sum += e;
      for (int d = 0; d < V; d++) o[d] += e * v[i][d];
    }
    for (int d = 0; d < V; d++) o[d] /= sum;
  }
}

/* h (B, D) of block b before the final norm, keys: the context rows, then the block. */
static void block_layer(const struct truth *t, int l, size_t b, double (*c)[D], double (*h)[D]) {
  static double k[R + B][Q], v[R + B][V];
  const struct us_draft_blocks *blocks = t->blocks;
  uint32_t anchor = blocks->anchor[b], begin = blocks->earliest[b];
  double n[B][D], q[H * Q], raw[H * Q], out[H * V], y[D], gate[F], up[F];
  for (uint32_t r = begin; r < anchor; r++) key_value(t, l, c[r], t->position[r], k[r], v[r]);
  for (int j = 0; j < B; j++) {
    norm(h[j], tensor(t, l, "input_layernorm.weight"), D, n[j]);
    key_value(t, l, n[j], t->position[anchor] + (uint32_t)j, k[R + j], v[R + j]);
  }
  for (int j = 0; j < B; j++) {
    int seen[R + B] = {0};
    uint32_t at = t->position[anchor] + (uint32_t)j;
    for (uint32_t r = begin; r < anchor; r++) seen[r] = at - t->position[r] < W;
    for (int i = 0; i < B; i++) seen[R + i] = 1;
    product(n[j], tensor(t, l, "self_attn.q_proj.weight"), H * Q, D, raw);
    for (int i = 0; i < H; i++) {
      norm(raw + i * Q, tensor(t, l, "self_attn.q_norm.weight"), Q, q + i * Q);
      rotate(q + i * Q, at);
    }
    attend(t, l, q, k, v, seen, R + B, out);
    product(out, tensor(t, l, "self_attn.o_proj.weight"), D, H * V, y);
    for (int i = 0; i < D; i++) h[j][i] += y[i];
    norm(h[j], tensor(t, l, "post_attention_layernorm.weight"), D, y);
    product(y, tensor(t, l, "mlp.gate_proj.weight"), F, D, gate);
    product(y, tensor(t, l, "mlp.up_proj.weight"), F, D, up);
    for (int i = 0; i < F; i++) gate[i] = gate[i] / (1.0 + exp(-gate[i])) * up[i];
    product(gate, tensor(t, l, "mlp.down_proj.weight"), D, F, y);
    for (int i = 0; i < D; i++) h[j][i] += y[i];
  }
}

/* What slot j's normed row gets of the token before it: the anchor or the label before; the anchor where there is none. */
static void add_before(const struct truth *t, size_t b, int j, double *row) {
  const struct us_draft_blocks *blocks = t->blocks;
  size_t first = b * B;
  int32_t before = j > 1 ? blocks->label[first + (size_t)j - 1] : -1;
  double inner[RANK], part[D];
  product(t->embed + (before < 0 ? blocks->token[first] : before) * D, tensor(t, -1, "markov_in.weight"),
          RANK, D, inner);
  product(inner, tensor(t, -1, "markov_out.weight"), D, RANK, part);
  for (int i = 0; i < D; i++) row[i] += part[i];
}

static void run_truth(struct truth *t) {
  static double c[R][D];
  double fused[D];
  for (int r = 0; r < R; r++) {
    product(t->taps + r * TAPS * D, tensor(t, -1, "fc.weight"), D, TAPS * D, fused);
    norm(fused, tensor(t, -1, "hidden_norm.weight"), D, c[r]);
  }
  for (size_t b = 0; b < t->blocks->n; b++) {
    double h[B][D];
    for (int j = 0; j < B; j++)
      memcpy(h[j], j ? tensor(t, -1, "mask_embedding") : t->embed + t->blocks->token[b * B] * D, sizeof h[j]);
    for (int l = 0; l < L; l++) block_layer(t, l, b, c, h);
    for (int j = 0; j < B; j++) {
      double *y = t->hidden + (b * B + (size_t)j) * D;
      norm(h[j], tensor(t, -1, "norm.weight"), D, y);
      if (markov && j) add_before(t, b, j, y);
    }
  }
}

static double true_loss(void *arg) {
  struct truth *t = arg;
  double total = 0.0, logits[N];
  size_t i = 0;
  run_truth(t);
  for (size_t b = 0; b < t->blocks->n; b++)
    for (uint32_t j = 1; j <= t->blocks->labels[b]; j++, i++) {
      double sum = 0.0;
      product(t->hidden + (b * B + j) * D, t->head, N, D, logits);
      for (int n = 0; n < N; n++) sum += exp(logits[n]);
      total += (double)t->weight[i] * (log(sum) - logits[t->blocks->label[b * B + j]]);
    }
  return total;
}

/* --- what is compared --- */

struct bench {
  struct us_params params;
  struct us_draft_blocks blocks;
  struct us_rows rows;
  struct us_draft_train *train;
  struct us_draft_loss loss;
  struct us_seq seq;
  struct truth truth;
  float *embed, *head, *taps;
};

/* Two documents of 8 and 12 rows; anchors in both, one whose block runs past the end of its document. */
static void open_bench(struct bench *x, enum us_draft_weights weights) {
  static const size_t anchors[] = {3, 6, 13, 18};
  struct us_draft_shape shape = shape_of();
  struct us_err err = {0};
  *x = (struct bench){.loss = {.kind = US_DRAFT_CE, .weights = weights, .gamma = 2.0f, .alpha = 0.3f}};
  ck_assert_msg(us_params_init_fresh_draft(&x->params, &shape, 5, 0.0f, &err) == US_OK, "%s", err.message);
  for (size_t i = 0; i < x->params.count; i++) { /* nothing at 0 or 1, so that every gradient shows */
    struct us_param *p = &x->params.items[i];
    for (size_t k = 0; p->vector && k < p->rows; k++) p->value[k] += (float)(0.3 * gc_uniform());
  }
  us_seq_init(&x->seq, NULL, US_SEQ_ROUND_NONE);
  ck_assert_int_eq(us_params_refresh(&x->params, NULL, US_SEQ_ROUND_NONE, &err), US_OK);
  ck_assert_int_eq(us_rows_init(&x->rows, R, &err), US_OK);
  x->rows.R = R;
  for (uint32_t r = 0; r < R; r++) {
    x->rows.document[r] = r < SPLIT ? 0 : SPLIT;
    x->rows.position[r] = r - x->rows.document[r];
    x->rows.token[r] = (int32_t)(7 * r % N);
    x->rows.label[r] = (int32_t)(7 * (r + 1) % N);
    x->rows.weight[r] = r + 1 == SPLIT ? 0.0f : 1.0f;
  }
  ck_assert_int_eq(us_draft_blocks_init(&x->blocks, &shape, 4, &err), US_OK);
  for (size_t i = 0; i < 4; i++) us_draft_blocks_put(&x->blocks, &x->rows, anchors[i], R);
  us_draft_blocks_aim(&x->blocks, R);
  ck_assert_int_eq(us_draft_loss_init(&x->loss, 4, B, D, &err), US_OK);
  struct truth *t = &x->truth;
  *t = (struct truth){.params = &x->params,
                      .blocks = &x->blocks,
                      .position = x->rows.position,
                      .weight = x->loss.weight,
                      .embed = gc_random(N * D, 1.0),
                      .head = gc_random(N * D, 0.5),
                      .taps = gc_random(R * TAPS * D, 1.0),
                      .value = calloc(x->params.floats, sizeof(double))};
  for (size_t i = 0; i < x->params.floats; i++) t->value[i] = (double)x->params.value[i];
  x->embed = gc_float(t->embed, N * D);
  x->head = gc_float(t->head, N * D);
  x->taps = gc_float(t->taps, R * TAPS * D);
  ck_assert_msg(us_draft_train_create(&shape, &x->params, x->embed, &x->seq, R, 4, &x->train, &err) == US_OK,
                "%s", err.message);
}

static void run_bench(struct bench *x) {
  struct us_err err = {0};
  us_params_zero_grad(&x->params, NULL);
  x->loss.sum = (struct us_draft_tally){0};
  ck_assert_msg(us_draft_train_forward(x->train, x->taps, R, x->rows.position, &x->blocks, &err) == US_OK,
                "%s", err.message);
  us_draft_loss(&x->seq, &x->loss, &x->blocks, x->train->hidden, x->head, D, N, NULL, NULL,
                x->train->dhidden);
  ck_assert_int_eq(us_draft_train_backward(x->train, &err), US_OK);
}

static void close_bench(struct bench *x) {
  us_draft_train_free(x->train);
  us_draft_loss_release(&x->loss);
  us_draft_blocks_release(&x->blocks);
  us_rows_release(&x->rows);
  us_params_release(&x->params);
  us_seq_release(&x->seq);
  free(x->truth.embed);
  free(x->truth.head);
  free(x->truth.taps);
  free(x->truth.value);
  free(x->embed);
  free(x->head);
  free(x->taps);
}

START_TEST(hidden_rows_and_loss_are_those_of_the_formulas) {
  struct bench x;
  open_bench(&x, US_DRAFT_EXP);
  run_bench(&x);
  double loss = true_loss(&x.truth);
  gc_near("hidden", x.train->hidden, x.truth.hidden, 4 * B * D, 2e-5);
  ck_assert_double_eq_tol(x.loss.sum.loss, loss, 1e-5 * fabs(loss));
  close_bench(&x);
}
END_TEST

/* Up to 24 entries of a tensor, spread over it, against four-point differences. FP32 sums of up to 20 rows x 64 terms
 * over two layers owe some 2e-6 of the tensor's largest gradient; 1e-4 leaves room and a wrong term is far above. */
static void check_tensor(struct bench *x, const struct us_param *p) {
  size_t n = p->rows * p->cols, step = n > 24 ? n / 24 : 1;
  double largest = 0.0, seen = 0.0;
  for (size_t k = 0; k < n; k++) largest = fmax(largest, fabs((double)p->grad[k]));
  for (size_t k = 0; k < n; k += step) {
    double slope = gc_slope(true_loss, &x->truth, &x->truth.value[p->offset + k]);
    seen = fmax(seen, fabs(slope));
    ck_assert_msg(fabs((double)p->grad[k] - slope) <= 1e-4 * largest, "%s[%zu]: %.9g, differences say %.9g",
                  p->name, k, (double)p->grad[k], slope);
  }
  ck_assert_msg(seen > 0.0, "%s: the loss does not depend on it", p->name);
}

START_TEST(gradients_of_every_tensor_are_the_differences) {
  struct bench x;
  open_bench(&x, US_DRAFT_DPACE);
  run_bench(&x);
  for (size_t i = 0; i < x.params.count; i++) check_tensor(&x, &x.params.items[i]);
  close_bench(&x);
}
END_TEST

START_TEST(a_frozen_mask_vector_takes_no_gradient_and_changes_no_other) {
  struct bench x;
  open_bench(&x, US_DRAFT_UNIFORM);
  run_bench(&x);
  struct us_param *mask = us_params_find(&x.params, "mask_embedding");
  float *before = calloc(x.params.floats, sizeof *before);
  memcpy(before, x.params.grad, x.params.floats * sizeof *before);
  mask->frozen = true;
  run_bench(&x);
  for (size_t k = 0; k < D; k++) {
    ck_assert(mask->grad[k] == 0.0f && before[mask->offset + k] != 0.0f);
    before[mask->offset + k] = 0.0f;
  }
  ck_assert(memcmp(before, x.params.grad, x.params.floats * sizeof *before) == 0);
  free(before);
  close_bench(&x);
}
END_TEST

static void pass(struct us_seq *seq, void *arg, float *out) {
  struct bench *x = arg;
  struct us_seq own = x->seq;
  x->seq = *seq; /* the bench's seq is the training's too */
  run_bench(x);
  *seq = x->seq;
  x->seq = own;
  memcpy(out, x->params.grad, x->params.floats * sizeof *out);
}

START_TEST(threads_do_not_change_a_bit) {
  struct bench x;
  open_bench(&x, US_DRAFT_DPACE);
  gc_threads(pass, &x, x.params.floats, US_SEQ_ROUND_BF16);
  close_bench(&x);
}
END_TEST

START_TEST(a_markov_head_is_the_formulas_too) {
  struct bench x;
  markov = RANK;
  open_bench(&x, US_DRAFT_DPACE);
  run_bench(&x);
  double loss = true_loss(&x.truth);
  gc_near("hidden", x.train->hidden, x.truth.hidden, 4 * B * D, 2e-5);
  ck_assert_double_eq_tol(x.loss.sum.loss, loss, 1e-5 * fabs(loss));
  for (size_t i = 0; i < x.params.count; i++) check_tensor(&x, &x.params.items[i]);
  close_bench(&x);
  markov = 0;
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("grad_draft");
  tcase_add_test(c, hidden_rows_and_loss_are_those_of_the_formulas);
  tcase_add_test(c, gradients_of_every_tensor_are_the_differences);
  tcase_add_test(c, a_markov_head_is_the_formulas_too);
  tcase_add_test(c, a_frozen_mask_vector_takes_no_gradient_and_changes_no_other);
  tcase_add_test(c, threads_do_not_change_a_bit);
  return us_suite("grad_draft", c);
}

US_TEST_MAIN(make_suite)
