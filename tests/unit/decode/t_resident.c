/* t_resident.c: rounds that the executor runs by itself (executor.h) give what generate.c's own rounds give. */
#include "decode/generate.h"
#include "resident.h"
#include "suite.h"

enum { VOCAB = 40, REQUESTS = 7 };

static int32_t prompt[64];

static void setup(void) {
  for (uint32_t i = 0; i < 64; i++) prompt[i] = (int32_t)(fake_mix((uint32_t)us_test_seed(), i) % 5);
}

/* Requests of all kinds; `t` numbers the trial. */
static void make_requests(uint32_t t, struct us_request *requests) {
  static const int32_t stop_ids[] = {3, 17, 31};
  static const struct us_sampling samplings[] = {{0.0f, 0, 0.0f, 0.0f},
                                                 {1.0f, 0, 0.0f, 0.0f},
                                                 {0.6f, 12, 0.95f, 0.0f},
                                                 {1.4f, 0, 0.0f, 0.1f},
                                                 {0.3f, 0, 0.9f, 0.0f}};
  for (uint32_t i = 0; i < REQUESTS; i++) {
    uint32_t w = fake_mix(t * 100 + i, (uint32_t)us_test_seed());
    requests[i] = (struct us_request){.prompt = prompt,
                                      .prompt_count = 3 + w % 40,
                                      .sampling = samplings[w / 40 % 5],
                                      .seed = w,
                                      .samples = 1 + w % 3,
                                      .max_tokens = 1 + w / 7 % 60,
                                      .stop_ids = stop_ids,
                                      .stop_id_count = w / 11 % 4};
  }
}

static void run(bool resident, uint32_t block, const struct us_request *requests,
                const struct us_generate_options *options, struct us_result *results,
                struct us_generate_stats *stats) {
  struct us_err err = {0};
  struct fake f;
  if (resident)
    resident_init(&f, VOCAB, block);
  else
    fake_init(&f, VOCAB, block);
  enum us_status status = us_generate(&f.ex, requests, REQUESTS, options, results, stats, &err);
  ck_assert_msg(status == US_OK, "%s", err.message);
  ck_assert_uint_eq(f.violations, 0);
  ck_assert_int_eq(f.resident_calls > 0, resident);
}

static void assert_same_stats(const struct us_decode_stats *a, const struct us_decode_stats *b) {
  ck_assert_uint_eq(a->rounds, b->rounds);
  ck_assert_uint_eq(a->committed, b->committed);
  ck_assert_mem_eq(a->offered, b->offered, sizeof a->offered);
  ck_assert_mem_eq(a->accepted, b->accepted, sizeof a->accepted);
  ck_assert_mem_eq(a->histogram, b->histogram, sizeof a->histogram);
}

static void assert_same(const struct us_result *a, const struct us_result *b) {
  for (uint32_t i = 0; i < REQUESTS; i++) {
    ck_assert_uint_eq(a[i].samples, b[i].samples);
    for (uint32_t s = 0; s < a[i].samples; s++) {
      const struct us_output *x = &a[i].outputs[s], *y = &b[i].outputs[s];
      ck_assert_uint_eq(x->ids.count, y->ids.count);
      ck_assert_mem_eq(x->ids.ids, y->ids.ids, x->ids.count * sizeof *x->ids.ids);
      ck_assert_int_eq(x->finish, y->finish);
      assert_same_stats(&x->stats, &y->stats);
    }
  }
}

static void release(struct us_result *results) {
  for (uint32_t i = 0; i < REQUESTS; i++) us_result_release(&results[i]);
}

START_TEST(resident_rounds_give_the_same_outputs_and_statistics) {
  struct us_request requests[REQUESTS];
  struct us_result own[REQUESTS], resident[REQUESTS];
  struct us_generate_stats a, b;
  for (uint32_t t = 0; t < 24; t++) {
    make_requests(t, requests);
    struct us_generate_options options = {.block = 1 + t % 16, .batch = 1 + t % 8};
    run(false, 16, requests, &options, own, &a);
    run(true, 16, requests, &options, resident, &b);
    assert_same(own, resident);
    assert_same_stats(&a.decode, &b.decode);
    ck_assert_uint_eq(a.generated_tokens, b.generated_tokens);
    ck_assert_uint_eq(a.passes, b.passes);
    ck_assert_uint_eq(a.rows, b.rows);
    ck_assert_uint_eq(a.distinct_experts, b.distinct_experts);
    ck_assert_uint_eq(a.expert_layers, b.expert_layers);
    release(own);
    release(resident);
  }
}
END_TEST

START_TEST(replays_run_resident) {
  static const float rates[] = {0.9f, 0.7f, 0.8f};
  struct us_request requests[REQUESTS];
  struct us_result plain[REQUESTS], own[REQUESTS], resident[REQUESTS];
  for (uint32_t t = 0; t < 6; t++) {
    struct us_replay replays[REQUESTS][3];
    make_requests(t, requests);
    struct us_generate_options options = {.block = 1, .batch = 3};
    run(false, 8, requests, &options, plain, NULL);
    for (uint32_t i = 0; i < REQUESTS; i += 2) { /* the others are drafted */
      for (uint32_t s = 0; s < requests[i].samples; s++)
        replays[i][s] = (struct us_replay){plain[i].outputs[s].ids.ids, plain[i].outputs[s].ids.count};
      requests[i].replay = replays[i];
    }
    options = (struct us_generate_options){.block = 8, .batch = 3, .accept = rates, .accept_count = 3};
    run(false, 8, requests, &options, own, NULL);
    run(true, 8, requests, &options, resident, NULL);
    assert_same(own, resident);
    release(plain), release(own), release(resident);
  }
}
END_TEST

/* More stop ids than the device keeps, repetition, a caller who has heard enough: the caller ends the sequence. */
static bool hear(void *arg, const struct us_text_event *event) {
  uint32_t *heard = arg;
  return (*heard)++ % 9 != 8 || event->request % 2;
}

START_TEST(what_the_caller_ends_has_ended) {
  int32_t stop_ids[20];
  struct us_request requests[REQUESTS];
  struct us_result own[REQUESTS], resident[REQUESTS];
  for (int32_t i = 0; i < 20; i++) stop_ids[i] = 39 - i;
  for (int listening = 0; listening < 2; listening++) {
    uint32_t heard[2] = {0, 0};
    make_requests(77, requests);
    for (uint32_t i = 0; i < REQUESTS; i++) {
      requests[i].stop_ids = stop_ids, requests[i].stop_id_count = i % 2 ? 20 : 0;
      requests[i].cut_loops = i % 3 == 0, requests[i].max_tokens = 200;
    }
    struct us_generate_options options = {.block = 4, .batch = 1};
    if (listening) options.on_text = hear;
    options.arg = &heard[0];
    run(false, 4, requests, &options, own, NULL);
    options.arg = &heard[1];
    run(true, 4, requests, &options, resident, NULL);
    assert_same(own, resident);
    release(own), release(resident);
  }
}
END_TEST

START_TEST(logits_that_are_not_finite_are_an_error) {
  struct us_err errors[2] = {{0}, {0}};
  struct us_result result;
  for (int resident = 0; resident < 2; resident++) {
    struct fake f;
    if (resident)
      resident_init(&f, VOCAB, 8);
    else
      fake_init(&f, VOCAB, 8);
    f.nan_position = 30;
    struct us_request request = {.prompt = prompt, .prompt_count = 5, .max_tokens = 100};
    struct us_generate_options options = {.block = 8};
    enum us_status status = us_generate(&f.ex, &request, 1, &options, &result, NULL, &errors[resident]);
    ck_assert_int_eq(status, US_ERR_CHECK);
  }
  ck_assert_str_eq(errors[0].message, errors[1].message);
}
END_TEST

static int asked;
static bool interrupt(void) {
  return asked++ == 12;
}

START_TEST(an_interrupt_ends_resident_rounds) {
  struct us_err err = {0};
  struct us_result result;
  struct fake f;
  resident_init(&f, VOCAB, 8);
  asked = 0;
  struct us_request request = {.prompt = prompt, .prompt_count = 5, .max_tokens = 3000};
  struct us_generate_options options = {.block = 8, .interrupted = interrupt};
  ck_assert_int_eq(us_generate(&f.ex, &request, 1, &options, &result, NULL, &err), US_INTERRUPTED);
  ck_assert_int_eq(asked, 13);
}
END_TEST

START_TEST(every_rule_and_adaptive_lengths_and_logprobs_run_resident) {
  static const float rates[] = {0.9f, 0.5f};
  struct us_request requests[REQUESTS];
  struct us_result plain[REQUESTS], own[REQUESTS], resident[REQUESTS];
  struct us_generate_stats a, b;
  uint64_t logprobs = 0, accepted = 0;
  for (uint32_t t = 0; t < 24; t++) {
    struct us_replay replays[REQUESTS][3];
    make_requests(t, requests);
    for (uint32_t i = 0; i < REQUESTS; i++) requests[i].logprobs = i % 2;
    struct us_generate_options options = {.block = 1, .batch = 3};
    run(false, 8, requests, &options, plain, NULL);
    for (uint32_t i = 0; t % 4 == 3 && i < REQUESTS; i += 2) {
      for (uint32_t s = 0; s < requests[i].samples; s++)
        replays[i][s] = (struct us_replay){plain[i].outputs[s].ids.ids, plain[i].outputs[s].ids.count};
      requests[i].replay = replays[i];
    }
    options = (struct us_generate_options){.block = 2 + t % 7,
                                           .batch = 1 + t % 8,
                                           .rule = (enum us_verify_rule)(t % 3),
                                           .adaptive = t / 3 % 2,
                                           .accept = rates,
                                           .accept_count = 2};
    run(false, 8, requests, &options, own, &a);
    run(true, 8, requests, &options, resident, &b);
    assert_same(own, resident);
    ck_assert_uint_eq(a.rows, b.rows);
    for (uint32_t i = 1; i < REQUESTS; i += 2)
      for (uint32_t s = 0; s < own[i].samples; s++, logprobs++)
        ck_assert_mem_eq(own[i].outputs[s].logprobs, resident[i].outputs[s].logprobs,
                         own[i].outputs[s].ids.count * sizeof(float));
    accepted += a.decode.accepted[0];
    release(plain), release(own), release(resident);
  }
  ck_assert_uint_gt(logprobs, 0);
  ck_assert_uint_gt(accepted, 0);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("resident");
  tcase_add_checked_fixture(c, setup, NULL);
  tcase_add_test(c, resident_rounds_give_the_same_outputs_and_statistics);
  tcase_add_test(c, replays_run_resident);
  tcase_add_test(c, what_the_caller_ends_has_ended);
  tcase_add_test(c, logits_that_are_not_finite_are_an_error);
  tcase_add_test(c, an_interrupt_ends_resident_rounds);
  tcase_add_test(c, every_rule_and_adaptive_lengths_and_logprobs_run_resident);
  return us_suite("resident", c);
}

US_TEST_MAIN(make_suite)
