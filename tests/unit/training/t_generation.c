/* t_generation.c: prompts continued through a learner: the CPU's, which is the definition of the others. */
#include "training/responses.h"

#include "tiny_shards.h"

enum { N = 21, MOST = 90 };

static struct tiny_world world;
static struct us_learner *learner;

static int32_t prompts[N][8], ids[N][MOST];

/* Prompts of 1 to 8 tokens, answers of up to 90. */
static struct us_generation generation(struct us_continuation items[N], float temperature) {
  for (int i = 0; i < N; i++) {
    for (int k = 0; k < 8; k++) prompts[i][k] = (i * 37 + k * 11) % 288;
    items[i] = (struct us_continuation){.prompt = prompts[i],
                                        .prompt_count = 1 + (uint32_t)i % 8,
                                        .max_tokens = MOST - 3 * (uint32_t)i,
                                        .seed = 100 + (uint64_t)i,
                                        .ids = ids[i]};
  }
  return (struct us_generation){.model = world.model,
                                .items = items,
                                .n = N,
                                .sampling = {.temperature = temperature},
                                .cut_loops = true};
}

START_TEST(an_answer_is_that_of_a_request_of_its_own) {
  struct us_err err = {0};
  struct us_continuation items[N];
  struct us_generation g = generation(items, 1.0f);
  int32_t stop = 17;
  g.stop_ids = &stop, g.stop_id_count = 1;
  US_OK_OR_FAIL(us_learner_generate(learner, &g, &err));
  struct us_executor *ex;
  US_OK_OR_FAIL(us_executor_create_reference(world.model, NULL, NULL, US_ROUND_BF16, &ex, &err));
  for (int i = 0; i < N; i++) {
    struct us_request request = {.prompt = items[i].prompt,
                                 .prompt_count = items[i].prompt_count,
                                 .sampling = g.sampling,
                                 .seed = items[i].seed,
                                 .max_tokens = items[i].max_tokens,
                                 .stop_ids = &stop,
                                 .stop_id_count = 1,
                                 .cut_loops = true};
    struct us_generate_options options = {.block = 1};
    struct us_result result;
    US_OK_OR_FAIL(us_generate(ex, &request, 1, &options, &result, NULL, &err));
    ck_assert_uint_eq(items[i].count, result.outputs[0].ids.count);
    ck_assert_int_eq(items[i].finish, result.outputs[0].finish);
    ck_assert_mem_eq(items[i].ids, result.outputs[0].ids.ids, items[i].count * sizeof(int32_t));
    us_result_release(&result);
  }
  ex->ops->free(ex);
}
END_TEST

/* Without a final norm all logits are 0 and every token is 0: a 24-gram has occurred three times after 26 of them. */
START_TEST(answers_end_at_a_stop_id_a_loop_or_their_length) {
  struct us_err err = {0};
  struct us_continuation items[N];
  struct us_generation g = generation(items, 0.0f);
  float gain[32];
  size_t D = world.shape.hidden;
  ck_assert_uint_eq(D, 32);
  memcpy(gain, world.model->final_norm, sizeof gain);
  memset(world.model->final_norm, 0, sizeof gain);
  items[1].max_tokens = 25;
  US_OK_OR_FAIL(us_learner_generate(learner, &g, &err));
  for (int i = 0; i < N; i++) {
    ck_assert_int_eq(items[i].finish, i == 1 ? US_FINISH_LENGTH : US_FINISH_LOOP);
    ck_assert_uint_eq(items[i].count, i == 1 ? 25 : 26);
  }
  g.cut_loops = false;
  US_OK_OR_FAIL(us_learner_generate(learner, &g, &err));
  ck_assert_int_eq(items[0].finish, US_FINISH_LENGTH);
  ck_assert_uint_eq(items[0].count, MOST);
  int32_t first = items[0].ids[0]; /* a copy: answers are written over it by several threads */
  g.stop_ids = &first, g.stop_id_count = 1;
  US_OK_OR_FAIL(us_learner_generate(learner, &g, &err));
  for (int i = 0; i < N; i++) ck_assert(items[i].finish == US_FINISH_STOP && items[i].count == 1);
  memcpy(world.model->final_norm, gain, sizeof gain);
}
END_TEST

START_TEST(what_cannot_be_generated_is_refused_by_its_number) {
  struct us_err err = {0};
  struct us_continuation items[N];
  struct us_generation g = generation(items, 0.0f);
  items[4].max_tokens = 256;
  ck_assert_int_eq(us_learner_generate(learner, &g, &err), US_ERR_USAGE);
  ck_assert_str_eq(
      err.message,
      "prompt 4: a prompt of 5 tokens and an answer of 256 do not fit the model's 256 positions");
  g = generation(items, 0.0f);
  items[20].prompt_count = 0;
  ck_assert_int_eq(us_learner_generate(learner, &g, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "prompt 20: a prompt of 0 tokens and an answer of 30");
  g = generation(items, 0.0f);
  prompts[7][2] = 288;
  ck_assert_int_eq(us_learner_generate(learner, &g, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "prompt 7: token 288 is outside the vocabulary of 288");
  g = generation(items, 1e-4f);
  ck_assert_int_eq(us_learner_generate(learner, &g, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, "temperature 0.0001 is neither"), "%s", err.message);
  g = generation(items, 1.0f);
  g.sampling.top_p = 1.5f;
  ck_assert_int_eq(us_learner_generate(learner, &g, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, "top-p 1.5"), "%s", err.message);
  g = generation(items, 1.0f);
  g.stop_id_count = US_GENERATION_STOPS + 1;
  ck_assert_int_eq(us_learner_generate(learner, &g, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, "17 stop ids"), "%s", err.message);
}
END_TEST

START_TEST(a_time_that_is_over_leaves_answers_unbegun_and_is_no_matter_of_processes) {
  struct us_err err = {0};
  struct us_continuation items[N];
  struct us_generation g = generation(items, 0.0f);
  g.seconds = 1e-9;
  US_OK_OR_FAIL(us_learner_generate(learner, &g, &err));
  for (int i = 0; i < N; i++) ck_assert(items[i].finish == US_FINISH_NONE && items[i].count == 0);
  learner->processes = 2;
  enum us_status status = us_learner_generate(learner, &g, &err);
  learner->processes = 1;
  ck_assert_int_eq(status, US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, "2 processes"), "%s", err.message);
}
END_TEST

static bool stop_now(void) {
  return true;
}

START_TEST(an_interrupt_ends_it) {
  struct us_err err = {0};
  struct us_continuation items[N];
  struct us_generation g = generation(items, 0.0f);
  g.interrupted = stop_now;
  ck_assert_int_eq(us_learner_generate(learner, &g, &err), US_INTERRUPTED);
}
END_TEST

/* --- answers to given prompts --- */

START_TEST(given_prompts_take_turns_and_keep_their_end) {
  struct us_err err = {0};
  struct us_responses r;
  static const int32_t text[] = {1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20};
  static const size_t start[] = {0, 3, 14};
  struct us_responses_prompts given = {.ids = text, .start = start, .n = 2};
  struct us_responses_options o = {.count = 5,
                                   .length = 12,
                                   .prompts = &given,
                                   .max_tokens = 8,
                                   .sampling = {.temperature = 1.0f},
                                   .seed = 3};
  US_OK_OR_FAIL(us_responses_generate(learner, world.model, NULL, US_PART_TRAIN, &o, &r, &err));
  ck_assert_uint_eq(r.n, 5);
  ck_assert_uint_eq(r.tokens, 5 * 8);
  for (size_t i = 0; i < r.n; i++) {
    ck_assert_uint_eq(r.prompt[i], i % 2 ? 4 : 3);
    ck_assert_uint_eq(r.total[i], r.prompt[i] + 8);
    ck_assert_mem_eq(r.ids + i * r.length, i % 2 ? text + 10 : text, r.prompt[i] * sizeof *text);
    ck_assert_int_eq(r.finish[i], US_FINISH_LENGTH);
  }
  ck_assert(memcmp(r.ids + 3, r.ids + 2 * r.length + 3, 8 * sizeof *text) != 0); /* a seed of its own */
  us_responses_release(&r);
  o.seconds = 1e-9;
  ck_assert_int_eq(us_responses_generate(learner, world.model, NULL, US_PART_TRAIN, &o, &r, &err),
                   US_ERR_INPUT);
  ck_assert_str_eq(err.message, "no answer was finished in 1e-09 s");
}
END_TEST

START_TEST(answers_to_given_prompts_are_as_long_as_half_a_sequence) {
  struct us_err err = {0};
  struct us_responses r;
  static const int32_t text[] = {1, 2};
  static const size_t start[] = {0, 2};
  struct us_responses_prompts given = {.ids = text, .start = start, .n = 1};
  struct us_responses_options o = {.count = 2, .length = 12, .prompts = &given, .seed = 3};
  US_OK_OR_FAIL(us_responses_generate(learner, world.model, NULL, US_PART_TRAIN, &o, &r, &err));
  ck_assert_uint_eq(r.total[0], 2 + 6);
  int32_t stop = r.ids[2];
  us_responses_release(&r);
  o.stop_ids = &stop, o.stop_id_count = 1;
  US_OK_OR_FAIL(us_responses_generate(learner, world.model, NULL, US_PART_TRAIN, &o, &r, &err));
  ck_assert_uint_eq(r.total[0], 2 + 1);
  ck_assert_int_eq(r.finish[0], US_FINISH_STOP);
  us_responses_release(&r);
}
END_TEST

static void open_all(void) {
  struct us_err err = {0};
  open_world(&world);
  US_OK_OR_FAIL(us_learner_create_cpu(world.pool, &learner, &err));
}

static void close_all(void) {
  us_learner_free(learner);
  close_world(&world);
}

static Suite *make_suite(void) {
  TCase *c = tcase_create("generation");
  tcase_add_unchecked_fixture(c, open_all, close_all);
  tcase_add_test(c, an_answer_is_that_of_a_request_of_its_own);
  tcase_add_test(c, answers_end_at_a_stop_id_a_loop_or_their_length);
  tcase_add_test(c, what_cannot_be_generated_is_refused_by_its_number);
  tcase_add_test(c, a_time_that_is_over_leaves_answers_unbegun_and_is_no_matter_of_processes);
  tcase_add_test(c, an_interrupt_ends_it);
  tcase_add_test(c, given_prompts_take_turns_and_keep_their_end);
  tcase_add_test(c, answers_to_given_prompts_are_as_long_as_half_a_sequence);
  return us_suite("generation", c);
}

US_TEST_MAIN(make_suite)
