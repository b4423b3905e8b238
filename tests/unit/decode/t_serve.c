/* t_serve.c: how many answers a set of prompts gets, and what is recorded of how they were drawn; the truth is what us_serve_run hands
 * over, or the turns counted by hand. */
#include "decode/serve.h"
#include "fake.h"
#include "suite.h"

static enum us_status count(void *arg, const struct us_run_entry *entry, struct us_err *err) {
  (void)entry, (void)err;
  ++*(size_t *)arg;
  return US_OK;
}

START_TEST(the_entries_that_are_announced_come) {
  static const int32_t ids[] = {1, 2, 3};
  struct us_prompt prompts[] = {us_serve_ids_prompt("a", ids, 3), us_serve_ids_prompt("b", ids, 2)};
  for (uint32_t samples = 1; samples <= 3; samples++)
    for (int best = 0; best < 2; best++) {
      size_t entries = 0;
      struct us_err err = {0};
      struct fake fake;
      fake_init(&fake, 40, 4);
      struct us_serve serve = {.sampling = {.temperature = 1, .top_p = 1},
                               .seed = us_test_seed(),
                               .samples = samples,
                               .best = best,
                               .max_tokens = 5,
                               .generate = {.batch = 2},
                               .on_entry = count,
                               .arg = &entries};
      ck_assert_int_eq(us_serve_run(&serve, &fake.ex, prompts, 2, NULL, &err), US_OK);
      ck_assert_uint_eq(entries, best ? 2 : 2 * samples);
      ck_assert_uint_eq(us_serve_entries(&serve, prompts, 2), entries);
    }
}
END_TEST

START_TEST(each_turn_of_a_chat_is_an_answer) {
  struct us_message turns[] = {
      {.role = "user", .content = "a"}, {.role = "user", .content = "b"}, {.role = "user", .content = "c"}};
  struct us_prompt prompts[] = {
      us_serve_text_prompt("p", "x"),
      {.kind = US_PROMPT_TURNS, .id = "q", .scenario = "", .messages = turns, .n_messages = 3},
      {.kind = US_PROMPT_MESSAGES, .id = "r", .scenario = "", .messages = turns, .n_messages = 3}};
  ck_assert_uint_eq(us_serve_entries(&(struct us_serve){.samples = 1}, prompts, 3), 1 + 3 + 1);
  ck_assert_uint_eq(us_serve_entries(&(struct us_serve){.samples = 4}, prompts, 3), 20);
}
END_TEST

struct recorded {
  char settings[1024];
  uint64_t slots; /* that proposals were offered in */
};

static enum us_status keep_settings(void *arg, const struct us_run_entry *entry, struct us_err *err) {
  struct recorded *r = arg;
  (void)err;
  ck_assert_ptr_nonnull(entry->settings_json);
  snprintf(r->settings, sizeof r->settings, "%s", entry->settings_json);
  while (r->slots < US_MAX_BLOCK && entry->stats.offered[r->slots]) r->slots++;
  return US_OK;
}

START_TEST(settings_are_recorded_whatever_the_models_path) {
  static const int32_t ids[] = {1, 2, 3};
  struct us_prompt prompt = us_serve_ids_prompt("a", ids, 3);
  struct recorded recorded = {.slots = 0};
  struct us_err err = {0};
  struct fake fake;
  fake_init(&fake, 40, 4);
  snprintf(fake.model.path, sizeof fake.model.path, "m\xff.h5");
  struct us_serve serve = {.samples = 1, .max_tokens = 5, .on_entry = keep_settings, .arg = &recorded};
  ck_assert_int_eq(us_serve_run(&serve, &fake.ex, &prompt, 1, NULL, &err), US_OK);
  ck_assert_ptr_nonnull(strstr(recorded.settings, "\"model\":\"m\xef\xbf\xbd.h5\""));
  ck_assert_ptr_nonnull(strstr(recorded.settings, "\"block\":4,"));
}
END_TEST

START_TEST(the_block_of_a_replay_without_a_drafter_is_recorded) {
  static const int32_t ids[] = {1, 2, 3};
  static const char line[] = "{\"id\":\"a\",\"prompt_ids\":[1,2,3],\"ids\":[4]}\n";
  struct us_prompt prompt = us_serve_ids_prompt("a", ids, 3);
  struct recorded recorded = {.slots = 0};
  struct us_run *run;
  struct us_err err = {0};
  struct fake fake;
  fake_init(&fake, 40, 4);
  fake.ex.draft = NULL;
  ck_assert_int_eq(us_run_parse(line, sizeof line - 1, "run", &run, &err), US_OK);
  struct us_serve serve = {
      .samples = 1, .max_tokens = 20, .replay = run, .on_entry = keep_settings, .arg = &recorded};
  ck_assert_int_eq(us_serve_run(&serve, &fake.ex, &prompt, 1, NULL, &err), US_OK);
  ck_assert_uint_eq(recorded.slots, US_MAX_BLOCK - 1);
  ck_assert_ptr_nonnull(strstr(recorded.settings, "\"block\":16,"));
  us_run_free(run);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("serve");
  tcase_add_test(c, the_entries_that_are_announced_come);
  tcase_add_test(c, each_turn_of_a_chat_is_an_answer);
  tcase_add_test(c, settings_are_recorded_whatever_the_models_path);
  tcase_add_test(c, the_block_of_a_replay_without_a_drafter_is_recorded);
  return us_suite("serve", c);
}
US_TEST_MAIN(make_suite)
