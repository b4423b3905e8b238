/* t_answer.c: exact match with reference answers. */
#include "decode/answer.h"

#include "suite.h"

static const struct {
  const char *text, *reference;
  bool matches;
} rows[] = {
    {"so she pays 18 dollars", "9 * 2 = <<9*2=18>>18\n#### 18", true},
    {"first 17, then 18.", "18", true},
    {"first 18, then 17.", "18", false},
    {"it is 18.0", "18", true},
    {"it is 18.50", "18.5", true},
    {"it is 18.05", "18.5", false},
    {"total: $1,234.", "1234", true},
    {"total: 1234", "#### 1,234", true},
    {"1,2,3", "123", false}, /* a list */
    {"1,2,3", "3", true},
    {"0018", "18", true},
    {"0.5", ".5", true},
    {"0", "-0", true},
    {"-5", "-5", true},
    {"5", "-5", false},
    {"the change is -$5", "-5", true},
    {"5-3", "3", true}, /* a difference, not a negative number */
    {"#### 7\nbut 12 was named too", "7", true},
    {"#### 7\n#### 8", "8", true},
    {"#### 7\n#### 8", "7", false},
    {"about 42%", "42%", true},
    {"123456789012345678901", "123456789012345678902", false},
    {"no number at all", "3", false},
    {"", "3", false},
    {"####", "3", false},
    {"Thinking.\nParis", "paris", true},
    {"Paris\n\n", "Paris", true},
    {"Paris is it", "Paris", false},
    {"so\n#### Paris", "#### Paris", true},
    {"x = 3", "x = 3", true}, /* no number alone: the whole line */
    {"", "", true},
};

START_TEST(a_text_matches_its_reference_or_does_not) {
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
    ck_assert_msg(us_answer_matches(rows[i].text, rows[i].reference) == rows[i].matches,
                  "row %zu: '%s' and '%s' should%s match", i, rows[i].text, rows[i].reference,
                  rows[i].matches ? "" : " not");
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("answer");
  tcase_add_test(c, a_text_matches_its_reference_or_does_not);
  return us_suite("answer", c);
}

US_TEST_MAIN(make_suite)
