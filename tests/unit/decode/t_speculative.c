/* t_speculative.c: speculative decoding equals plain decoding on random models with the reference executor, and after
 * every round caches and taps equal those of a fresh prefill, bit for bit.
 */
#include "decode/generate.h"
#include "../model/small.h"

#include <stdio.h>

enum { TOKENS = 48, PROMPT = 21, LONG = 530, WINDOW = 16, DRAFTER_BLOCK = 16 };

static int32_t prompt[LONG];
static enum us_format own_head; /* of the drafter */

static void setup(void) {
  for (uint32_t i = 0; i < LONG; i++) prompt[i] = small_token(i);
}

static struct small open_models(int threads, enum us_rounding rounding) {
  struct small m = {.rounding = rounding};
  struct us_err err = {0};
  struct us_shape shape = small_shape(WINDOW);
  struct us_draft_shape draft = small_draft_shape(WINDOW);
  shape.max_positions = 1024;
  draft.block = DRAFTER_BLOCK;
  draft.head = own_head;
  ck_assert_msg(us_pool_create(threads, &m.pool, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_model_random(&shape, us_test_seed(), m.pool, &m.model, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_draft_random(&draft, US_FORMAT_BF16, 5, m.pool, &m.draft, &err) == US_OK, "%s",
                err.message);
  ck_assert_msg(us_executor_create_reference(m.model, m.draft, m.pool, rounding, &m.ex, &err) == US_OK, "%s",
                err.message);
  return m;
}

static struct us_request request_of(uint32_t prompt_count, float temperature) {
  return (struct us_request){.prompt = prompt,
                             .prompt_count = prompt_count,
                             .sampling = {.temperature = temperature, .top_p = 0.9f},
                             .seed = 40 + prompt_count,
                             .max_tokens = TOKENS,
                             .logprobs = true};
}

static void generate(struct us_executor *ex, const struct us_request *r, size_t n,
                     struct us_generate_options o, struct us_result *results) {
  struct us_err err = {0};
  enum us_status status = us_generate(ex, r, n, &o, results, NULL, &err);
  ck_assert_msg(status == US_OK, "%s", err.message);
}

/* Tokens and log-probabilities, bit for bit: the same logits, not only the same choices. */
static void assert_same(const struct us_result *a, const struct us_result *b) {
  for (uint32_t s = 0; s < a->samples; s++) {
    const struct us_output *x = &a->outputs[s], *y = &b->outputs[s];
    ck_assert_uint_eq(x->ids.count, y->ids.count);
    ck_assert_mem_eq(x->ids.ids, y->ids.ids, x->ids.count * sizeof *x->ids.ids);
    ck_assert_mem_eq(x->logprobs, y->logprobs, x->ids.count * sizeof *x->logprobs);
  }
}

START_TEST(match_equals_plain_for_every_block_and_thread_count) {
  static const float temperatures[] = {0.0f, 0.9f};
  struct small m = open_models(1, US_ROUND_BF16);
  struct us_result plain[2], result;
  for (int t = 0; t < 2; t++) {
    struct us_request r = request_of(PROMPT, temperatures[t]);
    generate(m.ex, &r, 1, (struct us_generate_options){.block = 1}, &plain[t]);
  }
  close_small(&m);
  for (int threads = 1; threads <= 4; threads++) {
    m = open_models(threads, US_ROUND_BF16);
    for (uint32_t block = (uint32_t)threads; block <= DRAFTER_BLOCK; block += threads == 1 ? 1 : 4)
      for (int t = 0; t < 2; t++) {
        struct us_request r = request_of(PROMPT, temperatures[t]);
        generate(m.ex, &r, 1, (struct us_generate_options){.block = block, .adaptive = block % 3 == 0},
                 &result);
        assert_same(&plain[t], &result);
        us_result_release(&result);
      }
    close_small(&m);
  }
  us_result_release(&plain[0]);
  us_result_release(&plain[1]);
}
END_TEST

START_TEST(a_head_of_the_drafters_own_changes_no_token) {
  struct small m = open_models(1, US_ROUND_BF16);
  struct us_request r[] = {request_of(PROMPT, 0.0f), request_of(PROMPT, 0.9f)};
  struct us_result plain[2], result;
  for (int t = 0; t < 2; t++) generate(m.ex, &r[t], 1, (struct us_generate_options){.block = 1}, &plain[t]);
  close_small(&m);
  own_head = US_FORMAT_MXFP4;
  m = open_models(1, US_ROUND_BF16);
  for (uint32_t block = 2; block <= DRAFTER_BLOCK; block += 7)
    for (int t = 0; t < 2; t++) {
      generate(m.ex, &r[t], 1, (struct us_generate_options){.block = block}, &result);
      assert_same(&plain[t], &result);
      us_result_release(&result);
    }
  close_small(&m);
  own_head = US_FORMAT_NONE;
  us_result_release(&plain[0]);
  us_result_release(&plain[1]);
}
END_TEST

START_TEST(a_batch_equals_single_runs_at_every_size) {
  enum { N = 9 };
  struct small m = open_models(2, US_ROUND_BF16);
  struct us_request r[N];
  struct us_result alone[N], together[N];
  for (uint32_t i = 0; i < N; i++) {
    r[i] = request_of(3 + 5 * i, i % 2 ? 1.0f : 0.0f);
    r[i].max_tokens = 10 + i;
    r[i].samples = i % 4 == 1 ? 2 : 1;
  }
  for (enum us_verify_rule rule = US_VERIFY_MATCH; rule <= US_VERIFY_BLOCK; rule++)
    for (uint32_t batch = 2; batch <= US_MAX_BATCH; batch += 3) {
      struct us_generate_options o = {.rule = rule, .block = 5, .batch = 1};
      for (int i = 0; i < N; i++) generate(m.ex, &r[i], 1, o, &alone[i]);
      o.batch = batch;
      generate(m.ex, r, N, o, together);
      for (int i = 0; i < N; i++) {
        assert_same(&alone[i], &together[i]);
        us_result_release(&alone[i]);
        us_result_release(&together[i]);
      }
    }
  close_small(&m);
}
END_TEST

/* An executor that checks state before it passes work on: caches against a fresh prefill of the committed text, taps
 * against the fresh ones, and that the drafter's context ends right before the anchor. */
struct audit {
  struct us_executor ex;
  struct small *m;
  const int32_t *truth; /* prompt and plain output */
  uint32_t context;     /* positions in the drafter's context */
  size_t width;         /* of taps */
  uint32_t audits;
};

/* Prefill [0, end) of the truth in one pass into a new cache; taps (end, width) may be NULL. */
static struct us_kv *fresh(const struct audit *a, uint32_t end, float *taps) {
  static struct us_row rows[1024];
  struct us_err err = {0};
  struct us_kv_spec spec = us_kv_spec_of(&a->m->model->shape);
  struct us_kv *kv;
  enum us_kv_type type = a->m->rounding == US_ROUND_NONE ? US_KV_F32 : US_KV_BF16;
  ck_assert_int_eq(us_kv_create(&spec, 1024, type, &kv, &err), US_OK);
  ck_assert_int_eq(us_kv_reserve(kv, 0, end, &err), US_OK);
  for (uint32_t p = 0; p < end; p++) rows[p] = (struct us_row){.token = a->truth[p], .position = p, .kv = kv};
  struct us_pass pass = {.rows = rows, .R = end, .taps = taps};
  ck_assert_msg(a->m->ex->ops->forward(a->m->ex, &pass, &err) == US_OK, "%s", err.message);
  return kv;
}

static void compare_caches(const struct us_kv *kv, const struct us_kv *truth, uint32_t end) {
  const struct us_kv_spec *spec = us_kv_spec_used(kv);
  for (uint32_t l = 0; l < spec->layers; l++) {
    const struct us_attention_shape *a = &spec->attention[spec->kind[l]];
    for (uint32_t p = a->window && end > a->window ? end - a->window : 0; p < end; p++)
      for (uint32_t g = 0; g < a->kv_heads; g++) {
        float x[64], y[64];
        us_kv_read_k(kv, l, p, g, x);
        us_kv_read_k(truth, l, p, g, y);
        ck_assert_msg(!memcmp(x, y, a->qk_dim * sizeof *x), "key: layer %u position %u of %u", l, p, end);
        us_kv_read_v(kv, l, p, g, x);
        us_kv_read_v(truth, l, p, g, y);
        ck_assert_msg(!memcmp(x, y, a->v_dim * sizeof *x), "value: layer %u position %u of %u", l, p, end);
      }
  }
}

static enum us_status audit_forward(struct us_executor *ex, const struct us_pass *pass, struct us_err *err) {
  struct audit *a = (struct audit *)(void *)ex;
  if (!pass->prefill) {
    uint32_t s = pass->rows[0].position;
    ck_assert_int_eq(pass->rows[0].token, a->truth[s]);
    struct us_kv *truth = fresh(a, s, NULL);
    compare_caches(pass->rows[0].kv, truth, s);
    us_kv_free(truth);
    ck_assert_uint_eq(a->context, s);
    a->audits++;
  }
  return a->m->ex->ops->forward(a->m->ex, pass, err);
}

static enum us_status audit_context(struct us_executor *ex, const struct us_draft_context *c,
                                    struct us_err *err) {
  struct audit *a = (struct audit *)(void *)ex;
  uint32_t end = c->position + (uint32_t)c->R;
  ck_assert_uint_eq(c->position, a->context);
  float *taps = malloc(end * a->width * sizeof *taps);
  us_kv_free(fresh(a, end, taps));
  ck_assert_mem_eq(c->taps, taps + c->position * a->width, c->R * a->width * sizeof *taps);
  free(taps);
  a->context = end;
  return a->m->ex->ops->draft_context(a->m->ex, c, err);
}

static enum us_status audit_draft(struct us_executor *ex, const struct us_draft_pass *pass,
                                  struct us_err *err) {
  struct audit *a = (struct audit *)(void *)ex;
  ck_assert_uint_eq(pass->position, a->context); /* strictly before the anchor, which has no feature yet */
  ck_assert_int_eq(pass->anchor, a->truth[pass->position]);
  return a->m->ex->ops->draft(a->m->ex, pass, err);
}

static void audit_free(struct us_executor *ex) {
  (void)ex;
}

static void audit_run(enum us_rounding rounding, uint32_t prompt_count, float temperature, uint32_t block,
                      const float *rates, size_t rate_count, uint64_t *histogram) {
  static const struct us_executor_ops ops = {
      .forward = audit_forward, .draft_context = audit_context, .draft = audit_draft, .free = audit_free};
  struct small m = open_models(1, rounding);
  struct us_request r = request_of(prompt_count, temperature);
  struct us_result plain, result;
  int32_t truth[LONG + TOKENS];
  generate(m.ex, &r, 1, (struct us_generate_options){.block = 1}, &plain);
  memcpy(truth, prompt, prompt_count * sizeof *truth);
  memcpy(truth + prompt_count, plain.outputs[0].ids.ids, TOKENS * sizeof *truth);
  struct audit a = {
      .ex = *m.ex, .m = &m, .truth = truth, .width = m.draft->shape.taps * m.model->shape.hidden};
  a.ex.ops = &ops;
  struct us_replay replay = {plain.outputs[0].ids.ids, TOKENS};
  if (rate_count) r.replay = &replay;
  generate(&a.ex, &r, 1,
           (struct us_generate_options){.block = block, .accept = rates, .accept_count = rate_count},
           &result);
  assert_same(&plain, &result);
  ck_assert_uint_eq(a.audits, result.outputs[0].stats.rounds);
  for (int i = 0; histogram && i < US_MAX_BLOCK; i++) histogram[i] += result.outputs[0].stats.histogram[i];
  us_result_release(&plain);
  us_result_release(&result);
  close_small(&m);
}

START_TEST(state_after_every_round_is_that_of_a_fresh_prefill) {
  static const float rates[] = {0.8f, 0.9f}, none[] = {0.0f}, all[] = {1.0f};
  uint64_t histogram[US_MAX_BLOCK] = {0};
  for (uint32_t block = 2; block <= 8; block += 2)
    for (int warm = 0; warm < 2; warm++)
      audit_run(US_ROUND_BF16, PROMPT, warm ? 0.8f : 0.0f, block, rates, 2, histogram);
  audit_run(US_ROUND_BF16, PROMPT, 0.0f, 8, none, 1, histogram);
  audit_run(US_ROUND_BF16, PROMPT, 1.0f, 8, all, 1, histogram);
  for (int i = 0; i < 8; i++) ck_assert_msg(histogram[i] > 0, "no round accepted %d", i);
}
END_TEST

START_TEST(state_is_right_without_rounding_and_with_the_drafters_own_proposals) {
  audit_run(US_ROUND_NONE, PROMPT, 0.7f, 16, NULL, 0, NULL);
  audit_run(US_ROUND_BF16, 1, 0.0f, 8, NULL, 0, NULL);
}
END_TEST

START_TEST(a_prompt_of_two_chunks_leaves_the_state_of_one_pass) {
  static const float rates[] = {0.9f};
  audit_run(US_ROUND_BF16, LONG, 0.5f, 16, rates, 1, NULL);
}
END_TEST

START_TEST(a_windowed_ring_survives_16_rejected_drafts_at_every_position) {
  /* Rates of 0 write 15 wrong rows every round; the prompt lengths move the ring's edge through all of them. */
  static const float none[] = {0.0f};
  for (uint32_t n = 30; n < 70; n += 13) audit_run(US_ROUND_BF16, n, 0.0f, 16, none, 1, NULL);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("speculative");
  tcase_add_checked_fixture(c, setup, NULL);
  tcase_add_test(c, match_equals_plain_for_every_block_and_thread_count);
  tcase_add_test(c, a_head_of_the_drafters_own_changes_no_token);
  tcase_add_test(c, a_batch_equals_single_runs_at_every_size);
  tcase_add_test(c, state_after_every_round_is_that_of_a_fresh_prefill);
  tcase_add_test(c, state_is_right_without_rounding_and_with_the_drafters_own_proposals);
  tcase_add_test(c, a_prompt_of_two_chunks_leaves_the_state_of_one_pass);
  tcase_add_test(c, a_windowed_ring_survives_16_rejected_drafts_at_every_position);
  return us_suite("speculative", c);
}
US_TEST_MAIN(make_suite)
