/* t_grad_attention.c: attention over key ranges against the formula in double: causal, packed, windowed, block drafting. */
#include "kernels/attention_seq/attention_seq.h"
#include "gradcheck.h"

enum { H = 4, G = 2, Q = 6, V = 3, QS = H * Q + 2, KS = G * Q + 1, VS = G * V + 3 };
static const uint32_t q_offset[H] = {0, 6, 12, 19}, k_offset[G] = {0, 7}, v_offset[G] = {1, 5};

struct attention_case {
  size_t queries, keys;
  double *q, *k, *v, *sink, *weight;
  uint32_t *begin, *end, *block_begin, *block_end;
};

static bool sees(const struct attention_case *c, size_t i, uint32_t j) {
  return (j >= c->begin[i] && j < c->end[i]) ||
         (c->block_begin && j >= c->block_begin[i] && j < c->block_end[i]);
}

static double loss(void *arg) {
  const struct attention_case *c = arg;
  double total = 0.0;
  for (size_t i = 0; i < c->queries; i++)
    for (uint32_t h = 0; h < H; h++) {
      double sum = c->sink ? exp(c->sink[h]) : 0.0, out[V] = {0};
      for (uint32_t j = 0; j < c->keys; j++) {
        if (!sees(c, i, j)) continue;
        double s = 0.0;
        for (int d = 0; d < Q; d++)
          s += c->q[i * QS + q_offset[h] + (uint32_t)d] * c->k[j * KS + k_offset[h / 2] + (uint32_t)d];
        double p = exp(0.4 * s);
        sum += p;
        for (int d = 0; d < V; d++) out[d] += p * c->v[j * VS + v_offset[h / 2] + (uint32_t)d];
      }
      for (int d = 0; d < V && sum > 0.0; d++)
        total += c->weight[(i * H + h) * V + (uint32_t)d] * out[d] / sum;
    }
  return total;
}

static struct attention_case make_case(size_t queries, size_t keys, bool sink, bool blocks) {
  struct attention_case c = {.queries = queries, .keys = keys};
  c.q = gc_random(queries * QS, 1), c.k = gc_random(keys * KS, 1), c.v = gc_random(keys * VS, 1);
  c.sink = sink ? gc_random(H, 1) : NULL, c.weight = gc_random(queries * H * V, 1);
  c.begin = gc_keep(calloc(queries, sizeof *c.begin)), c.end = gc_keep(calloc(queries, sizeof *c.end));
  if (blocks)
    c.block_begin = gc_keep(calloc(queries, sizeof *c.begin)),
    c.block_end = gc_keep(calloc(queries, sizeof *c.end));
  return c;
}

struct buffers {
  float *out, *dq, *dk, *dv, *dsink;
};

static void run_case(struct us_seq *seq, const struct attention_case *c, struct buffers *b) {
  size_t n = c->queries;
  float *q = gc_float(c->q, n * QS), *k = gc_float(c->k, c->keys * KS), *v = gc_float(c->v, c->keys * VS);
  float *sink = c->sink ? gc_float(c->sink, H) : NULL, *dout = gc_float(c->weight, n * H * V);
  float *max = gc_zeros(n * H), *sum = gc_zeros(n * H);
  struct us_attention_seq a = {.queries = n,
                               .keys = c->keys,
                               .q_heads = H,
                               .kv_heads = G,
                               .qk_dim = Q,
                               .v_dim = V,
                               .q = q,
                               .k = k,
                               .v = v,
                               .q_stride = QS,
                               .k_stride = KS,
                               .v_stride = VS,
                               .q_offset = q_offset,
                               .k_offset = k_offset,
                               .v_offset = v_offset,
                               .context_begin = c->begin,
                               .context_end = c->end,
                               .block_begin = c->block_begin,
                               .block_end = c->block_end,
                               .scale = 0.4f,
                               .sink = sink,
                               .out = b->out,
                               .max = max,
                               .sum = sum};
  us_attention_seq(seq, &a);
  us_attention_seq_grad(seq, &a,
                        &(struct us_attention_seq_grads){
                            .dout = dout, .dq = b->dq, .dk = b->dk, .dv = b->dv, .dsink = b->dsink});
  free(q), free(k), free(v), free(sink), free(dout), free(max), free(sum);
}

static struct buffers make_buffers(const struct attention_case *c) {
  return (struct buffers){gc_zeros(c->queries * H * V), gc_zeros(c->queries * QS), gc_zeros(c->keys * KS),
                          gc_zeros(c->keys * VS), gc_zeros(H)};
}

static void check_case(struct attention_case *c) {
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct buffers b = make_buffers(c);
  run_case(&seq, c, &b);
  double sum = 0.0;
  for (size_t i = 0; i < c->queries * H * V; i++) sum += c->weight[i] * (double)b.out[i];
  ck_assert_double_eq_tol(sum, loss(c), 1e-5);
  gc_check("dq", loss, c, c->q, c->queries * QS, b.dq, 1e-5);
  gc_check("dk", loss, c, c->k, c->keys * KS, b.dk, 1e-5);
  gc_check("dv", loss, c, c->v, c->keys * VS, b.dv, 1e-5);
  if (c->sink) gc_check("dsink", loss, c, c->sink, H, b.dsink, 1e-5);
  us_seq_release(&seq);
}

START_TEST(causal) {
  struct attention_case c = make_case(9, 9, false, false);
  for (uint32_t i = 0; i < 9; i++) c.end[i] = i + 1;
  check_case(&c);
}
END_TEST

START_TEST(packed_documents_with_a_window_and_sinks) {
  struct attention_case c = make_case(12, 12, true, false);
  for (uint32_t i = 0; i < 12; i++) {
    uint32_t document = i < 5 ? 0 : 5, window = i + 1 > 3 ? i - 2 : 0;
    c.begin[i] = window > document ? window : document;
    c.end[i] = i + 1;
  }
  check_case(&c);
}
END_TEST

START_TEST(blocks_see_the_context_before_their_anchor_and_themselves) {
  /* context rows 0..5, then two blocks of three rows: anchors 4 and 2 */
  struct attention_case c = make_case(6, 12, true, true);
  for (uint32_t i = 0; i < 6; i++) {
    c.end[i] = i < 3 ? 4 : 2;
    c.begin[i] = i < 3 ? 1 : 0;
    c.block_begin[i] = i < 3 ? 6 : 9;
    c.block_end[i] = c.block_begin[i] + 3;
  }
  check_case(&c);
}
END_TEST

START_TEST(a_query_that_sees_nothing_gives_zero) {
  struct attention_case c = make_case(3, 3, false, false);
  c.end[1] = 2;
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct buffers b = make_buffers(&c);
  for (size_t i = 0; i < 3 * H * V; i++) b.out[i] = NAN;
  run_case(&seq, &c, &b);
  for (size_t i = 0; i < 3 * H * V; i++) ck_assert(i / (H * V) == 1 ? b.out[i] != 0.0f : b.out[i] == 0.0f);
  for (size_t i = 0; i < QS; i++) ck_assert(b.dq[i] == 0.0f);
  us_seq_release(&seq);
}
END_TEST

/* 200 queries: several tiles, three documents that do not start on a tile. */
static struct attention_case long_case(void) {
  struct attention_case c = make_case(200, 200, true, false);
  for (uint32_t i = 0; i < 200; i++) {
    uint32_t document = i < 70 ? 0 : i < 75 ? 70 : 75, window = i + 1 > 90 ? i - 89 : 0;
    c.begin[i] = window > document ? window : document;
    c.end[i] = i + 1;
  }
  return c;
}

START_TEST(tiles_and_segments_do_not_show) {
  struct attention_case c = long_case();
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct buffers b = make_buffers(&c);
  run_case(&seq, &c, &b);
  for (size_t i = 0; i < 20; i++) { /* slopes along random directions of dk and dq cover every element */
    double *direction = gc_random(200 * KS, 1), expected = 0.0, f[2], *x = c.k;
    for (size_t j = 0; j < 200 * KS; j++) expected += direction[j] * (double)b.dk[j];
    for (int side = 0; side < 2; side++) {
      for (size_t j = 0; j < 200 * KS; j++) x[j] += (side ? -2e-5 : 1e-5) * direction[j];
      f[side] = loss(&c);
    }
    for (size_t j = 0; j < 200 * KS; j++) x[j] += 1e-5 * direction[j];
    ck_assert_double_eq_tol((f[0] - f[1]) / 2e-5, expected, 2e-5 * (1.0 + fabs(expected)));
    free(direction);
  }
  us_seq_release(&seq);
}
END_TEST

static void run_long(struct us_seq *seq, void *arg, float *out) {
  const struct attention_case *c = arg;
  size_t n = c->queries;
  struct buffers b = {out, out + n * H * V, out + n * (H * V + QS), out + n * (H * V + QS + KS),
                      out + n * (H * V + QS + KS + VS)};
  run_case(seq, c, &b);
}

START_TEST(threads_do_not_matter) {
  struct attention_case c = long_case();
  gc_threads(run_long, &c, c.queries * (H * V + QS + KS + VS) + H, US_SEQ_ROUND_BF16);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("attention");
  tcase_add_test(c, causal);
  tcase_add_test(c, packed_documents_with_a_window_and_sinks);
  tcase_add_test(c, blocks_see_the_context_before_their_anchor_and_themselves);
  tcase_add_test(c, a_query_that_sees_nothing_gives_zero);
  tcase_add_test(c, tiles_and_segments_do_not_show);
  tcase_add_test(c, threads_do_not_matter);
  return us_suite("grad_attention", c);
}

US_TEST_MAIN(make_suite)
