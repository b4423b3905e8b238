/* t_gptq.c: GPTQ: what it minimises, against sums over the inputs themselves; and masters that begin there. */
#include "kernels/head_loss/head_loss.h"
#include "training/gptq_state.h"
#include "training/qat.h"

#include "tiny_shards.h"

#include <math.h>

enum { N = 48, K = 64, ROWS = 400 };

static float inputs[ROWS * K], weights[N * K];

static float draw(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (float)(*state >> 40) / 16777216.0f - 0.5f;
}

/* Weights, and inputs that share six directions. */
static void fill(void) {
  uint64_t state = us_test_seed();
  float direction[6 * K];
  for (size_t i = 0; i < 6 * K; i++) direction[i] = draw(&state);
  for (size_t i = 0; i < N * K; i++) weights[i] = draw(&state);
  for (size_t r = 0; r < ROWS; r++) {
    for (size_t k = 0; k < K; k++) inputs[r * K + k] = 0.1f * draw(&state);
    for (int d = 0; d < 6; d++) {
      float part = draw(&state);
      for (size_t k = 0; k < K; k++) inputs[r * K + k] += part * direction[(size_t)d * K + k];
    }
  }
}

static void moments(float *h) {
  for (size_t i = 0; i < K; i++)
    for (size_t j = 0; j < K; j++) {
      double sum = 0.0;
      for (size_t r = 0; r < ROWS; r++) sum += (double)inputs[r * K + i] * (double)inputs[r * K + j];
      h[i * K + j] = (float)sum;
    }
}

/* Sum of squares of (weights - stored) x over all inputs. */
static double products_error(const float *stored) {
  double total = 0.0;
  for (size_t r = 0; r < ROWS; r++)
    for (size_t n = 0; n < N; n++) {
      double d = 0.0;
      for (size_t k = 0; k < K; k++)
        d += ((double)weights[n * K + k] - (double)stored[n * K + k]) * (double)inputs[r * K + k];
      total += d * d;
    }
  return total;
}

/* The aims of `weights`, in pieces of `rows` rows. */
static void round_weights(const struct us_matrix_encoding *encoding, const float *h, size_t rows,
                          float *aims) {
  static float L[K * K], scratch[K * K], lost[N * K];
  uint8_t codes[N * K], scales[N * K];
  uint32_t at[K];
  struct us_err err = {0};
  memcpy(L, h, sizeof L);
  us_gptq_factor(L, K, at, scratch);
  US_OK_OR_FAIL(us_matrix_encode(weights, N, K, encoding, codes, scales, &err));
  memcpy(aims, weights, sizeof weights);
  for (size_t r = 0; r < N; r += rows) {
    memset(lost, 0, sizeof lost);
    us_gptq_round(aims, N, K, encoding, scales, L, at, r, r + rows < N ? r + rows : N, lost);
  }
}

START_TEST(the_factor_gives_back_the_moments_in_its_order) {
  static float h[K * K], L[K * K], scratch[K * K];
  uint32_t at[K];
  double mean = 0.0;
  fill();
  moments(h);
  memcpy(L, h, sizeof L);
  us_gptq_factor(L, K, at, scratch);
  for (size_t i = 0; i < K; i++) mean += (double)h[i * K + i] / K;
  for (size_t i = 0; i < K; i++) {
    ck_assert(i == 0 || h[at[i] * K + at[i]] >= h[at[i - 1] * K + at[i - 1]]);
    for (size_t j = 0; j < K; j++) {
      double sum = i == j ? -0.01 * mean : 0.0;
      for (size_t k = 0; k < K; k++) sum += (double)L[i * K + k] * (double)L[j * K + k];
      ck_assert_double_eq_tol(sum, (double)h[at[i] * K + at[j]], 1e-4 * mean);
    }
  }
}
END_TEST

/* rows (H + damping)^-1 times (H + damping) are the rows. */
START_TEST(solved_rows_multiply_back) {
  static float h[K * K], L[K * K], scratch[K * K], rows[N * K], z[N * K];
  uint32_t at[K];
  double mean = 0.0, largest = 0.0;
  fill();
  moments(h);
  memcpy(L, h, sizeof L);
  us_gptq_factor(L, K, at, scratch);
  memcpy(rows, weights, sizeof rows);
  us_gptq_solve(rows, N, K, L, at, z);
  for (size_t i = 0; i < K; i++) mean += (double)h[i * K + i] / K;
  for (size_t n = 0; n < N; n++)
    for (size_t j = 0; j < K; j++) {
      double sum = 0.01 * mean * (double)rows[n * K + j];
      for (size_t k = 0; k < K; k++) sum += (double)rows[n * K + k] * (double)h[k * K + j];
      largest = fmax(largest, fabs(sum - (double)weights[n * K + j]));
    }
  ck_assert_double_lt(largest, 2e-4);
}
END_TEST

START_TEST(products_change_less_than_after_rounding_to_nearest) {
  static float h[K * K], aims[N * K], stored[N * K], nearest[N * K];
  const struct us_matrix_encoding encodings[] = {{.format = US_FORMAT_MXFP4},
                                                 {.format = US_FORMAT_FP8, .fp8_scale = US_FP8_SCALE_UE8M0}};
  struct us_err err = {0};
  fill();
  moments(h);
  for (int i = 0; i < 2; i++) {
    round_weights(&encodings[i], h, N, aims);
    US_OK_OR_FAIL(us_matrix_fake_quant(aims, N, K, &encodings[i], stored, &err));
    US_OK_OR_FAIL(us_matrix_fake_quant(weights, N, K, &encodings[i], nearest, &err));
    double gptq = products_error(stored), plain = products_error(nearest);
    ck_assert_msg(gptq < 0.4 * plain, "%s: %g, to nearest %g", us_format_name(encodings[i].format), gptq,
                  plain);
  }
}
END_TEST

START_TEST(inputs_that_share_nothing_or_were_never_seen_mean_nearest) {
  static float h[K * K], aims[N * K], stored[N * K], nearest[N * K];
  const struct us_matrix_encoding encoding = {.format = US_FORMAT_MXFP4};
  struct us_err err = {0};
  fill();
  US_OK_OR_FAIL(us_matrix_fake_quant(weights, N, K, &encoding, nearest, &err));
  for (int seen = 0; seen < 2; seen++) {
    memset(h, 0, sizeof h);
    for (size_t i = 0; seen && i < K; i++) h[i * K + i] = (float)(i + 1);
    round_weights(&encoding, h, N, aims);
    US_OK_OR_FAIL(us_matrix_fake_quant(aims, N, K, &encoding, stored, &err));
    ck_assert(memcmp(stored, nearest, sizeof stored) == 0);
  }
}
END_TEST

START_TEST(rows_do_not_depend_on_how_they_are_cut) {
  static float h[K * K], whole[N * K], parts[N * K];
  const struct us_matrix_encoding encoding = {.format = US_FORMAT_MXFP4};
  fill();
  moments(h);
  round_weights(&encoding, h, N, whole);
  round_weights(&encoding, h, 7, parts);
  ck_assert(memcmp(whole, parts, sizeof whole) == 0);
}
END_TEST

/* --- a model --- */

static struct tiny_world world;
static struct us_precision_rules rules;
static struct us_convert convert;
static const char served[] = "all=fp8,experts=mxfp4";

static void open_all(void) {
  open_world(&world);
}

static void close_all(void) {
  close_world(&world);
}

static struct us_qat new_run(const char *text, size_t windows) {
  struct us_err err = {0};
  US_OK_OR_FAIL(us_precision_parse(text, &rules, &err));
  convert = (struct us_convert){.rules = &rules, .fp8_scale = US_FP8_SCALE_UE8M0};
  return (struct us_qat){
      .original = world.model,
      .convert = &convert,
      .shards = world.shards,
      .scope = US_QAT_ALL,
      .batch = 4,
      .length = 32,
      .seed = 3,
      .eval_windows = 8,
      .gptq_windows = windows,
      .trainer = {.optim = us_optim_default(US_OPTIM_ADAMW), .schedule = {.peak = 1e-12}, .steps = 1}};
}

static void see_first(void *arg, const struct us_qat_log *log) {
  if (!log->step) *(double *)arg = log->heldout;
}

/* Each family by itself, so that one with another's inputs is found. */
START_TEST(a_model_begins_closer_to_the_original_than_rounded_to_nearest) {
  static const char *const texts[] = {
      "all=fp8,experts=mxfp4", "attn.qkv=mxfp4",     "attn.o=mxfp4", "dense=mxfp4",
      "experts.gate_up=mxfp4", "experts.down=mxfp4", "head=mxfp4"};
  struct us_err err = {0};
  for (size_t t = 0; t < sizeof texts / sizeof texts[0]; t++) {
    double nearest = 0.0, gptq = 0.0;
    struct us_qat plain = new_run(texts[t], 0), run = new_run(texts[t], 64);
    plain.on_log = run.on_log = see_first;
    plain.log_arg = &nearest, run.log_arg = &gptq;
    US_OK_OR_FAIL(us_qat(&plain, world.pool, &err));
    US_OK_OR_FAIL(us_qat(&run, world.pool, &err));
    ck_assert_msg(gptq > 0.0 && gptq < 0.8 * nearest, "%s: %g, to nearest %g", texts[t], gptq, nearest);
    us_qat_release(&plain);
    us_qat_release(&run);
  }
}
END_TEST

static double loss_after_gptq(const char *text) {
  struct us_err err = {0};
  double loss = 0.0;
  struct us_qat run = new_run(text, 64);
  run.on_log = see_first;
  run.log_arg = &loss;
  US_OK_OR_FAIL(us_qat(&run, world.pool, &err));
  us_qat_release(&run);
  return loss;
}

/* The more is rounded behind the embedding, finely, the less is lost: each sees what its inputs, and the
 * stream that its output is added to, have lost. */
START_TEST(later_matrices_make_up_for_earlier_ones) {
  double embed = loss_after_gptq("embed=mxfp4"), head = loss_after_gptq("embed=mxfp4,head=fp8"),
         dense = loss_after_gptq("embed=mxfp4,dense=fp8,head=fp8"),
         rest = loss_after_gptq("embed=mxfp4,attn=fp8,dense=fp8,experts=fp8,head=fp8");
  ck_assert_msg(head < 0.8 * embed, "embedding %g, and head %g", embed, head);
  ck_assert_msg(dense < 0.8 * head, "embedding and head %g, and dense %g", head, dense);
  ck_assert_msg(rest < 0.3 * embed, "embedding %g, and the rest %g", embed, rest);
}
END_TEST

/* A window in which no token occurs twice, so that a row of the embedding has the gradient of one place. */
static void draw_distinct(struct us_gptq *gptq, struct us_rows *rows) {
  struct us_err err = {0};
  for (bool again = true; again; gptq->seed += again) {
    us_rows_release(rows);
    US_OK_OR_FAIL(us_gptq_draw(gptq, 0, 1, rows, &err));
    again = false;
    for (size_t i = 0; i < rows->R; i++)
      for (size_t j = 0; j < i; j++) again |= rows->token[i] == rows->token[j];
  }
}

static void take_gradients(struct us_params *params, struct us_seq *seq, const struct us_rows *rows) {
  struct us_model_train *train = NULL;
  struct us_err err = {0};
  struct us_batch batch = us_rows_batch(rows);
  US_OK_OR_FAIL(
      us_model_train_create(&world.model->shape, params, seq, rows->R, US_TRAIN_SAVE, &train, &err));
  US_OK_OR_FAIL(us_model_train_forward(train, &batch, NULL, &err));
  us_head_loss(seq, &(struct us_head_loss){.R = rows->R,
                                           .D = train->shape.hidden,
                                           .N = train->shape.vocab,
                                           .x = train->hidden,
                                           .head = train->head->compute,
                                           .label = rows->label,
                                           .scale = 1.0f,
                                           .dx = train->dhidden});
  US_OK_OR_FAIL(us_model_train_backward(train, &err));
  us_model_train_free(train);
}

START_TEST(moments_of_the_embedding_are_those_of_its_rows_gradients) {
  struct us_err err = {0};
  struct us_gptq gptq = {.shards = world.shards, .windows = 1, .length = 5, .seed = us_test_seed()};
  struct us_rows rows = {0};
  struct us_params frozen = {0}, params = {0};
  struct us_seq seq;
  size_t D = world.model->shape.hidden;
  float *moments = calloc(D * D, sizeof *moments);
  ck_assert_ptr_nonnull(moments);
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  draw_distinct(&gptq, &rows);
  US_OK_OR_FAIL(us_params_init_model(&frozen, world.model, NULL, true, &err));
  US_OK_OR_FAIL(us_params_init_model(&params, world.model, NULL, false, &err));
  US_OK_OR_FAIL(us_gptq_embed_moments(&gptq, &world.model->shape, &frozen, &seq, moments, &err));
  memcpy(params.compute, frozen.compute, frozen.floats * sizeof *frozen.compute);
  take_gradients(&params, &seq, &rows);
  const float *g = us_param_grad(us_params_find(&params, "model.embed_tokens.weight"));
  double largest = 0.0;
  for (size_t i = 0; i < D; i++)
    for (size_t j = 0; j < D; j++) {
      double sum = 0.0;
      for (size_t r = 0; r < rows.R; r++)
        sum += (double)g[(size_t)rows.token[r] * D + i] * (double)g[(size_t)rows.token[r] * D + j];
      largest = fmax(largest, fabs(sum));
      ck_assert_double_eq_tol((double)moments[i * D + j], sum, 1e-5 * (1.0 + fabs(sum)));
    }
  ck_assert_double_gt(largest, 1e-3);
  us_params_release(&frozen);
  us_params_release(&params);
  us_rows_release(&rows);
  us_seq_release(&seq);
  free(moments);
}
END_TEST

/* tr(E H E^T), E what the embedding loses by being stored as p's masters round. */
static double embed_loss(const struct us_param *p, const float *original, const float *moments) {
  struct us_err err = {0};
  size_t n = p->rows * p->cols, D = p->cols;
  double total = 0.0;
  float *stored = calloc(n, sizeof *stored);
  ck_assert_ptr_nonnull(stored);
  US_OK_OR_FAIL(us_matrix_fake_quant(p->value, p->rows, D, &p->encoding, stored, &err));
  for (size_t k = 0; k < n; k++) stored[k] -= original[k];
  for (size_t r = 0; r < p->rows; r++)
    for (size_t i = 0; i < D; i++)
      for (size_t j = 0; j < D; j++)
        total += (double)stored[r * D + i] * (double)moments[i * D + j] * (double)stored[r * D + j];
  free(stored);
  return total;
}

START_TEST(the_embedding_loses_less_where_the_loss_minds) {
  struct us_err err = {0};
  struct us_qat plain = new_run("embed=mxfp4", 0), run = new_run("embed=mxfp4", 64);
  struct us_gptq gptq = {.shards = world.shards, .windows = 64, .length = run.length, .seed = run.seed};
  struct us_params frozen = {0};
  struct us_seq seq;
  size_t D = world.model->shape.hidden;
  float *moments = calloc(D * D, sizeof *moments);
  ck_assert_ptr_nonnull(moments);
  us_seq_init(&seq, world.pool, US_SEQ_ROUND_BF16);
  US_OK_OR_FAIL(us_params_init_model(&frozen, world.model, NULL, true, &err));
  US_OK_OR_FAIL(us_gptq_embed_moments(&gptq, &world.model->shape, &frozen, &seq, moments, &err));
  US_OK_OR_FAIL(us_qat_start(&plain, world.pool, &err));
  US_OK_OR_FAIL(us_qat_start(&run, world.pool, &err));
  const struct us_param *original = us_params_find(&plain.params, "model.embed_tokens.weight");
  double nearest = embed_loss(original, original->value, moments),
         aimed = embed_loss(us_params_find(&run.params, original->name), original->value, moments);
  ck_assert_msg(aimed < 0.8 * nearest, "%g, to nearest %g", aimed, nearest);
  us_qat_release(&plain);
  us_qat_release(&run);
  us_params_release(&frozen);
  us_seq_release(&seq);
  free(moments);
}
END_TEST

START_TEST(more_tokens_than_fit_are_refused) {
  struct us_err err = {0};
  struct us_qat run = new_run(served, (size_t)1 << 40);
  ck_assert_int_eq(us_qat_start(&run, world.pool, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, "GPTQ") != NULL, "%s", err.message);
  us_qat_release(&run);
}
END_TEST

START_TEST(masters_are_the_same_for_any_pool_and_what_is_not_rounded_keeps_its_bits) {
  struct us_err err = {0};
  struct us_qat plain = new_run(served, 0), one = new_run(served, 5), all = new_run(served, 5);
  size_t moved = 0;
  US_OK_OR_FAIL(us_qat_start(&plain, NULL, &err));
  US_OK_OR_FAIL(us_qat_start(&one, NULL, &err));
  US_OK_OR_FAIL(us_qat_start(&all, world.pool, &err));
  ck_assert(memcmp(one.params.value, all.params.value, one.params.floats * sizeof(float)) == 0);
  for (size_t i = 0; i < one.params.count; i++) {
    const struct us_param *p = &one.params.items[i];
    bool same = memcmp(p->value, plain.params.items[i].value, p->rows * p->cols * sizeof(float)) == 0;
    bool kept = p->vector || p->encoding.format == US_FORMAT_F32;
    ck_assert_msg(same == kept, "%s: %s", p->name, same ? "kept" : "moved");
    moved += !same;
  }
  ck_assert_uint_gt(moved, 0);
  us_qat_release(&plain);
  us_qat_release(&one);
  us_qat_release(&all);
}
END_TEST

START_TEST(without_a_step_the_file_holds_what_the_masters_round_to) {
  struct us_err err = {0};
  struct us_model *stored;
  struct us_qat run = new_run(served, 5);
  US_OK_OR_FAIL(us_qat_start(&run, world.pool, &err));
  US_OK_OR_FAIL(us_qat_export(&run, world.pool, &stored, &err));
  US_OK_OR_FAIL(us_qat_check(&run, stored, world.pool, &err));
  us_model_free(stored);
  us_qat_release(&run);
}
END_TEST

/* It would see no input at all, and round to nearest under GPTQ's name. */
START_TEST(sequences_longer_than_the_text_are_refused) {
  struct us_err err = {0};
  struct us_qat run = new_run(served, 5);
  run.length = us_shards_tokens(world.shards, US_PART_TRAIN);
  ck_assert_int_eq(us_qat_start(&run, world.pool, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "the shards hold fewer than") != NULL, "%s", err.message);
  us_qat_release(&run);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("gptq");
  tcase_add_unchecked_fixture(c, open_all, close_all);
  tcase_add_test(c, the_factor_gives_back_the_moments_in_its_order);
  tcase_add_test(c, solved_rows_multiply_back);
  tcase_add_test(c, products_change_less_than_after_rounding_to_nearest);
  tcase_add_test(c, inputs_that_share_nothing_or_were_never_seen_mean_nearest);
  tcase_add_test(c, rows_do_not_depend_on_how_they_are_cut);
  tcase_add_test(c, a_model_begins_closer_to_the_original_than_rounded_to_nearest);
  tcase_add_test(c, later_matrices_make_up_for_earlier_ones);
  tcase_add_test(c, moments_of_the_embedding_are_those_of_its_rows_gradients);
  tcase_add_test(c, the_embedding_loses_less_where_the_loss_minds);
  tcase_add_test(c, more_tokens_than_fit_are_refused);
  tcase_add_test(c, masters_are_the_same_for_any_pool_and_what_is_not_rounded_keeps_its_bits);
  tcase_add_test(c, without_a_step_the_file_holds_what_the_masters_round_to);
  tcase_add_test(c, sequences_longer_than_the_text_are_refused);
  return us_suite("gptq", c);
}

US_TEST_MAIN(make_suite)
