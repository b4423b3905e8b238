/* t_suggest.c: "did you mean". */
#include "base/suggest.h"
#include "suite.h"

#include <string.h>

static const char *const names[] = {"steps", NULL, "precision", "model", "seed"};

static const char *near(const char *word) {
  return us_suggest(word, names, 5);
}

START_TEST(one_slip_of_each_kind_is_found) {
  ck_assert_str_eq(near("stps"), "steps");   /* dropped */
  ck_assert_str_eq(near("stteps"), "steps"); /* doubled */
  ck_assert_str_eq(near("stebs"), "steps");  /* replaced */
  ck_assert_str_eq(near("stpes"), "steps");  /* swapped */
}
END_TEST

START_TEST(a_beginning_is_found) {
  ck_assert_str_eq(near("prec"), "precision");
}
END_TEST

START_TEST(a_far_word_has_no_suggestion) {
  ck_assert_ptr_null(near("help"));
  ck_assert_ptr_null(near(""));
  ck_assert_ptr_null(near("x"));
  char word[200];
  memset(word, 's', sizeof word - 1);
  word[sizeof word - 1] = 0;
  ck_assert_ptr_null(near(word));
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("suggest");
  tcase_add_test(c, one_slip_of_each_kind_is_found);
  tcase_add_test(c, a_beginning_is_found);
  tcase_add_test(c, a_far_word_has_no_suggestion);
  return us_suite("suggest", c);
}
US_TEST_MAIN(make_suite)
