/* t_prompts.c: prompt sets: every form of a line, and every way a line can be wrong. */
#include "formats/prompts.h"
#include "suite.h"
#include <string.h>

static struct us_prompts *parse(const char *text, const char *name) {
  struct us_err err = {0};
  struct us_prompts *prompts = NULL;
  ck_assert_msg(us_prompts_parse(text, strlen(text), name, &prompts, &err) == US_OK, "%s", err.message);
  return prompts;
}

START_TEST(the_four_forms_are_read) {
  struct us_prompts *prompts =
      parse("{\"id\": \"x1\", \"scenario\": \"coding\", \"prompt\": \"def f():\"}\n\n"
            "{\"turns\": [\"one\", \"two\"]}\n"
            "{\"id\": 7, \"messages\": [{\"role\": \"system\", \"content\": \"s\"}, "
            "{\"role\": \"assistant\", \"content\": null, \"reasoning\": \"r\"}]}\r\n"
            "{\"question\": \"1 + 1?\", \"answer\": \"2\", \"other\": []}",
            "sets/math.jsonl");
  ck_assert_uint_eq(prompts->n, 4);
  const struct us_prompt *p = prompts->items;
  ck_assert_int_eq(p[0].kind, US_PROMPT_TEXT);
  ck_assert_str_eq(p[0].id, "x1");
  ck_assert_str_eq(p[0].scenario, "coding");
  ck_assert_str_eq(p[0].text, "def f():");
  ck_assert_int_eq(p[1].kind, US_PROMPT_TURNS);
  ck_assert_str_eq(p[1].id, "3");
  ck_assert_str_eq(p[1].scenario, "math");
  ck_assert_uint_eq(p[1].n_messages, 2);
  ck_assert_str_eq(p[1].messages[1].content, "two");
  ck_assert_str_eq(p[1].messages[1].role, "user");
  ck_assert_int_eq(p[2].kind, US_PROMPT_MESSAGES);
  ck_assert_str_eq(p[2].id, "7");
  ck_assert_ptr_null(p[2].messages[1].content);
  ck_assert_str_eq(p[2].messages[1].reasoning, "r");
  ck_assert_int_eq(p[3].kind, US_PROMPT_QUESTION);
  ck_assert_str_eq(p[3].text, "1 + 1?");
  ck_assert_str_eq(p[3].answer, "2");
  us_prompts_free(prompts);
}
END_TEST

START_TEST(a_bad_line_is_named_with_file_line_and_field) {
  static const struct {
    const char *text, *message;
  } cases[] = {
      {"", "no prompt in it"},
      {"\n \n", "no prompt in it"},
      {"{\"prompt\": \"a\"}\n{\"prompt\": 1}", "line 2: prompt: not a string"},
      {"[1]", "line 1: not a JSON object"},
      {"{", "line 1: "},
      {"{\"prompt\": \"a\", \"prompt\": \"b\"}", "line 1: "},
      {"{\"prompt\": \"\\ud800\"}", "line 1: "},
      {"{\"prompt\": \"a\", \"turns\": []}", "both \"prompt\" and \"turns\""},
      {"{\"id\": \"a\"}", "none of \"prompt\""},
      {"{\"id\": [], \"prompt\": \"a\"}", "id: neither"},
      {"{\"scenario\": 1, \"prompt\": \"a\"}", "scenario: not a string"},
      {"{\"turns\": []}", "turns: not an array of at least one"},
      {"{\"turns\": [1]}", "turns[0]: not a string"},
      {"{\"question\": \"a\"}", "answer: not a string"},
      {"{\"messages\": [{\"role\": \"user\"}, 5]}", "messages[1].role: not a string"},
      {"{\"messages\": [{\"role\": \"robot\"}]}", "messages[0].role: \"robot\""},
      {"{\"messages\": [{\"role\": \"user\"}, {\"role\": \"system\"}]}", "messages[1].role: \"system\""},
      {"{\"messages\": [{\"role\": \"user\", \"content\": []}]}", "messages[0].content: not a string"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct us_err err = {0};
    struct us_prompts *prompts = NULL;
    ck_assert_int_eq(us_prompts_parse(cases[i].text, strlen(cases[i].text), "p.jsonl", &prompts, &err),
                     US_ERR_INPUT);
    ck_assert_msg(strncmp(err.message, "p.jsonl: ", 9) == 0 && strstr(err.message, cases[i].message),
                  "%zu: %s", i, err.message);
  }
}
END_TEST

START_TEST(the_projects_own_sets_hold_sixteen_prompts_a_scenario) {
  static const char *const scenarios[] = {"agent", "chat", "coding", "math"};
  char path[1024];
  struct us_err err = {0};
  struct us_prompts *prompts;
  snprintf(path, sizeof path, "%s/../../data/prompts", getenv("US_TEST_FIXTURES"));
  ck_assert_msg(us_prompts_open_dir(path, &prompts, &err) == US_OK, "%s", err.message);
  ck_assert_uint_eq(prompts->n, 64);
  for (size_t i = 0; i < 64; i++) {
    ck_assert_str_eq(prompts->items[i].scenario, scenarios[i / 16]);
    for (size_t j = 0; j < i; j++) ck_assert_str_ne(prompts->items[i].id, prompts->items[j].id);
  }
  us_prompts_free(prompts);
}
END_TEST

START_TEST(a_missing_file_is_an_io_error) {
  struct us_err err = {0};
  struct us_prompts *prompts;
  ck_assert_int_eq(us_prompts_open("/nonexistent/p.jsonl", &prompts, &err), US_ERR_IO);
  ck_assert_int_eq(us_prompts_open_dir("/nonexistent", &prompts, &err), US_ERR_IO);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("prompts");
  tcase_add_test(c, the_four_forms_are_read);
  tcase_add_test(c, a_bad_line_is_named_with_file_line_and_field);
  tcase_add_test(c, the_projects_own_sets_hold_sixteen_prompts_a_scenario);
  tcase_add_test(c, a_missing_file_is_an_io_error);
  return us_suite("prompts", c);
}

US_TEST_MAIN(make_suite)
