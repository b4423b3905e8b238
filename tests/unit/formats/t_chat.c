/* t_chat.c: the chat template. Independent truth: the turns as research on MiMo's template describes them, by hand. */
#include "formats/chat.h"
#include "suite.h"
#include <string.h>

#define SYSTEM "<|im_start|>system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi.<|im_end|>"

static void check(const struct us_message *messages, size_t n, struct us_chat_options options,
                  const char *expected) {
  struct us_err err = {0};
  struct us_buffer text = {0};
  ck_assert_msg(us_chat_format(messages, n, &options, &text, &err) == US_OK, "%s", err.message);
  ck_assert_str_eq(text.data, expected);
  us_buffer_release(&text);
}

START_TEST(one_question_gets_the_default_system_turn_and_the_cue) {
  struct us_message messages[] = {{.role = "user", .content = "hello"}};
  check(messages, 1, (struct us_chat_options){.generate = true, .thinking = true},
        SYSTEM "<|im_start|>user\nhello<|im_end|><|im_start|>assistant\n");
}
END_TEST

START_TEST(without_thinking_the_cue_closes_an_empty_thought) {
  struct us_message messages[] = {{.role = "system", .content = "Be brief."},
                                  {.role = "user", .content = "hello"}};
  check(messages, 2, (struct us_chat_options){.generate = true},
        "<|im_start|>system\nBe "
        "brief.<|im_end|><|im_start|>user\nhello<|im_end|><|im_start|>assistant\n<think></think>");
}
END_TEST

START_TEST(reasoning_is_kept_only_after_the_last_user_turn) {
  struct us_message messages[] = {{.role = "user", .content = "a"},
                                  {.role = "assistant", .content = "b", .reasoning = "old"},
                                  {.role = "user", .content = "c"},
                                  {.role = "assistant", .content = "d", .reasoning = "new"}};
  check(messages, 4, (struct us_chat_options){0},
        SYSTEM "<|im_start|>user\na<|im_end|><|im_start|>assistant\n<think></think>b<|im_end|>"
               "<|im_start|>user\nc<|im_end|><|im_start|>assistant\n<think>new</think>d<|im_end|>");
  check(messages, 4, (struct us_chat_options){.keep_reasoning = true},
        SYSTEM "<|im_start|>user\na<|im_end|><|im_start|>assistant\n<think>old</think>b<|im_end|>"
               "<|im_start|>user\nc<|im_end|><|im_start|>assistant\n<think>new</think>d<|im_end|>");
}
END_TEST

START_TEST(results_of_tools_share_one_turn) {
  struct us_message messages[] = {{.role = "user", .content = "a"},
                                  {.role = "assistant", .content = "calls"},
                                  {.role = "tool", .content = "1"},
                                  {.role = "tool", .content = "2"},
                                  {.role = "assistant", .content = NULL}};
  check(messages, 5, (struct us_chat_options){.plain_turns = true},
        "<|im_start|>user\na<|im_end|><|im_start|>assistant\ncalls<|im_end|>"
        "<|im_start|>tool\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</"
        "tool_response>\n<|im_end|>"
        "<|im_start|>assistant\n<|im_end|>");
}
END_TEST

START_TEST(spans_cover_what_the_assistant_wrote_and_its_end_of_turn) {
  struct us_err err = {0};
  struct us_buffer text = {0};
  struct us_chat_span spans[4];
  size_t n;
  struct us_message messages[] = {{.role = "user", .content = "a"},
                                  {.role = "assistant", .content = "bb"},
                                  {.role = "user", .content = "c"},
                                  {.role = "assistant", .content = "dd"}};
  struct us_chat_options options = {.plain_turns = true};
  ck_assert_int_eq(us_chat_format_spans(messages, 4, &options, &text, spans, &n, &err), US_OK);
  ck_assert_uint_eq(n, 2);
  for (size_t i = 0; i < 2; i++) {
    const char *expected = i ? "dd<|im_end|>" : "bb<|im_end|>";
    ck_assert_uint_eq(spans[i].end - spans[i].begin, strlen(expected));
    ck_assert_int_eq(memcmp(text.data + spans[i].begin, expected, strlen(expected)), 0);
  }
  us_buffer_release(&text);
}
END_TEST

START_TEST(a_tool_call_is_written_as_xml) {
  struct us_err err = {0};
  struct us_buffer text = {0};
  const char *keys[] = {"city", "days"}, *values[] = {"Oslo", "3"};
  ck_assert_int_eq(us_chat_tool_call("weather", keys, values, 2, &text, &err), US_OK);
  ck_assert_str_eq(text.data, "<tool_call>\n<function=weather>\n<parameter=city>Oslo</parameter>\n"
                              "<parameter=days>3</parameter>\n</function>\n</tool_call>");
  us_buffer_release(&text);
}
END_TEST

START_TEST(bad_messages_are_named) {
  static const struct {
    struct us_message messages[2];
    size_t n;
    const char *message;
  } cases[] = {
      {{{0}}, 0, "without messages"},
      {{{.role = "robot"}}, 1, "messages[0].role: \"robot\""},
      {{{.role = NULL}}, 1, "messages[0].role: missing"},
      {{{.role = "user"}, {.role = "system"}}, 2, "messages[1].role: a system message must come first"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct us_err err = {0};
    struct us_buffer text = {0};
    struct us_chat_options options = {0};
    ck_assert_int_eq(us_chat_format(cases[i].messages, cases[i].n, &options, &text, &err), US_ERR_USAGE);
    ck_assert_ptr_nonnull(strstr(err.message, cases[i].message));
    us_buffer_release(&text);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("chat");
  tcase_add_test(c, one_question_gets_the_default_system_turn_and_the_cue);
  tcase_add_test(c, without_thinking_the_cue_closes_an_empty_thought);
  tcase_add_test(c, reasoning_is_kept_only_after_the_last_user_turn);
  tcase_add_test(c, results_of_tools_share_one_turn);
  tcase_add_test(c, spans_cover_what_the_assistant_wrote_and_its_end_of_turn);
  tcase_add_test(c, a_tool_call_is_written_as_xml);
  tcase_add_test(c, bad_messages_are_named);
  return us_suite("chat", c);
}

US_TEST_MAIN(make_suite)
