/* t_markov.c: a Markov head's tables and what decoding does with them: formulas in double, slot after slot, draws, random models. */
#include "model/markov.h"
#include "model/precision.h"
#include "small.h"

#include <math.h>

enum { N = 97, D = 64, R = 32, B = 8 };

static struct us_err err;

static void decode(const struct us_matrix *w, float *values) {
  ck_assert_uint_eq(w->rows, N);
  ck_assert_uint_eq(w->cols, R);
  us_matrix_decode(w, values);
}

/* Entry (n, r) of a table against the sum in double; rounded: by half a step of bf16 more. */
static void check_entry(float got, double sum, double size, bool rounded) {
  double bound = D * 0x1p-24 * size + (rounded ? fabs(sum) * 0x1p-8 : 0.0);
  ck_assert_msg(fabs(sum - (double)got) <= bound, "%g instead of %g", (double)got, sum);
}

/* In FP32, in bf16, and with a head of the drafter's own. */
START_TEST(tables_are_the_products_with_embedding_and_head) {
  enum us_rounding rounding = _i ? US_ROUND_BF16 : US_ROUND_NONE;
  struct us_matrix_encoding coarse = {.format = US_FORMAT_MXFP4};
  struct us_draft *own = NULL;
  static float before[N * R], after[N * R], embed[N * D], head[N * D], in[R * D], out[D * R];
  small_markov = R;
  struct small m = open_small(16, 1 + _i, rounding);
  struct us_markov *markov;
  if (_i == 2)
    ck_assert_int_eq(us_draft_with_head(m.draft, &m.model->head, &coarse, m.pool, &own, &err), US_OK);
  ck_assert_int_eq(us_markov_create(m.model, own ? own : m.draft, rounding, m.pool, &markov, &err), US_OK);
  decode(&markov->before, before), decode(&markov->after, after);
  us_matrix_decode(&m.model->embed, embed);
  us_matrix_decode(own ? &own->head : &m.model->head, head);
  us_matrix_decode(&m.draft->markov_in, in), us_matrix_decode(&m.draft->markov_out, out);
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++) {
      double sum[2] = {0, 0}, size[2] = {0, 0};
      for (int d = 0; d < D; d++) {
        double terms[] = {(double)embed[n * D + d] * (double)in[r * D + d],
                          (double)head[n * D + d] * (double)out[d * R + r]};
        for (int t = 0; t < 2; t++) sum[t] += terms[t], size[t] += fabs(terms[t]);
      }
      check_entry(before[n * R + r], sum[0], size[0], _i);
      check_entry(after[n * R + r], sum[1], size[1], _i);
    }
  us_markov_free(markov);
  us_draft_free(own);
  close_small(&m);
  small_markov = 0;
}
END_TEST

/* What a pass without the head gives, and with it, slot by slot: the row of the token before, drawn or the likeliest. */
START_TEST(a_slot_gets_what_the_token_before_it_gives) {
  static float plain[(B - 1) * N], logits[(B - 1) * N], before[N * R], after[N * R], hidden[2][B * D];
  struct us_sampling sampling = {.temperature = 1.5f, .top_k = 20};
  struct us_draft_draw draw = {&sampling, 77, 3};
  small_markov = R;
  struct small m = open_small(16, 2, US_ROUND_BF16);
  struct us_forward f = {.pool = m.pool, .isa = us_isa_resolve(US_ISA_BEST), .round_bf16 = true};
  struct us_draft_pass pass = {.kv = new_draft_kv(&m), .anchor = 5, .block = B};
  struct us_markov *markov;
  int32_t token = pass.anchor, likeliest = 0;
  pass.logits = plain, pass.hidden = hidden[0];
  ck_assert_int_eq(us_draft_forward_block(&f, m.model, m.draft, &pass, &err), US_OK);
  pass.logits = logits, pass.hidden = hidden[1], pass.opt_draw = _i ? &draw : NULL;
  ck_assert_int_eq(m.ex->ops->draft(m.ex, &pass, &err), US_OK);
  ck_assert_mem_eq(hidden[0], hidden[1], sizeof hidden[0]);
  ck_assert_int_eq(us_markov_create(m.model, m.draft, US_ROUND_BF16, NULL, &markov, &err), US_OK);
  decode(&markov->before, before), decode(&markov->after, after);
  for (uint32_t j = 0; j + 1 < B; j++) {
    const float *row = logits + j * N;
    for (int n = 0; n < N; n++) {
      double sum = (double)plain[j * N + (uint32_t)n], size = fabs(sum);
      for (int r = 0; r < R; r++) {
        double term = (double)before[token * R + r] * (double)after[n * R + r];
        sum += term, size += fabs(term);
      }
      ck_assert_double_le(fabs(sum - (double)row[n]), 2 * R * 0x1p-24 * size);
    }
    struct us_noise noise = us_noise_round(draw.seed, pass.position, j, draw.sample, US_STREAM_DRAFT);
    token = _i ? us_sample_token(row, N, &sampling, noise) : us_sample_argmax(row, N);
    likeliest += token == us_sample_argmax(row, N);
  }
  ck_assert_int_eq(likeliest == B - 1, !_i); /* some draw was another token */
  us_markov_free(markov);
  us_forward_release(&f);
  us_kv_free(pass.kv);
  close_small(&m);
  small_markov = 0;
}
END_TEST

/* Made from the tensors of the vocabulary alone, in every format that they come in. */
START_TEST(a_random_models_tables_are_those_of_its_tensors) {
  static const enum us_format formats[] = {US_FORMAT_BF16, US_FORMAT_FP8, US_FORMAT_MXFP4};
  small_markov = R;
  struct us_shape shape = small_shape(16);
  struct us_draft_shape draft_shape = small_draft_shape(16);
  shape.precision.draft = formats[_i];
  draft_shape.head = _i == 2 ? US_FORMAT_MXFP4 : US_FORMAT_NONE;
  struct us_model *model;
  struct us_draft *draft;
  struct us_markov *own, *made;
  size_t bytes = N * R * sizeof(uint16_t);
  ck_assert_int_eq(us_model_random(&shape, 3, NULL, &model, &err), US_OK);
  ck_assert_int_eq(us_draft_random(&draft_shape, formats[_i], 3, NULL, &draft, &err), US_OK);
  ck_assert_int_eq(us_markov_create(model, draft, US_ROUND_BF16, NULL, &own, &err), US_OK);
  ck_assert_int_eq(us_markov_random(&shape, &draft_shape, 3, NULL, &made, &err), US_OK);
  ck_assert_mem_eq(own->before.data, made->before.data, bytes);
  ck_assert_mem_eq(own->after.data, made->after.data, bytes);
  us_markov_free(made);
  ck_assert_int_eq(us_markov_random(&shape, &draft_shape, 4, NULL, &made, &err), US_OK);
  ck_assert(memcmp(own->before.data, made->before.data, bytes) != 0);
  us_markov_free(own), us_markov_free(made);
  us_draft_free(draft), us_model_free(model);
  small_markov = 0;
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("markov");
  tcase_add_loop_test(c, tables_are_the_products_with_embedding_and_head, 0, 3);
  tcase_add_loop_test(c, a_slot_gets_what_the_token_before_it_gives, 0, 2);
  tcase_add_loop_test(c, a_random_models_tables_are_those_of_its_tensors, 0, 3);
  return us_suite("markov", c);
}

US_TEST_MAIN(make_suite)
