/* t_decontaminate.c: 13 words in a row shared with a prompt, and nothing less. */
#include "training/decontaminate.h"
#include "suite.h"
#include <string.h>

static const char prompt[] =
    "One two three, FOUR five six seven \"eight\" nine ten eleven twelve thirteen fourteen?";

static bool overlaps(const char *document) {
  struct us_err err = {0};
  struct us_decontaminator *filter;
  bool found;
  ck_assert_int_eq(us_decontaminator_create(&filter, &err), US_OK);
  ck_assert_int_eq(us_decontaminator_add(filter, prompt, strlen(prompt), &err), US_OK);
  ck_assert_uint_eq(us_decontaminator_windows(filter), 2);
  ck_assert_int_eq(us_decontaminator_check(filter, document, strlen(document), &found, NULL, &err), US_OK);
  us_decontaminator_free(filter);
  return found;
}

START_TEST(thirteen_words_in_a_row_overlap) {
  ck_assert(overlaps(prompt));
  ck_assert(overlaps("zero one two three four five six seven eight nine ten eleven twelve thirteen zero"));
  ck_assert(overlaps("two three four five six seven eight nine ten eleven twelve thirteen fourteen"));
}
END_TEST

START_TEST(twelve_words_or_one_changed_do_not) {
  ck_assert(!overlaps("one two three four five six seven eight nine ten eleven twelve"));
  ck_assert(!overlaps("one two three four five six seven 8 nine ten eleven twelve thirteen fourteen"));
  ck_assert(!overlaps("one two three four five six seven nine eight ten eleven twelve thirteen fourteen"));
  ck_assert(!overlaps(""));
}
END_TEST

START_TEST(case_punctuation_lines_and_normal_form_do_not_matter) {
  ck_assert(overlaps(
      "ONE...two\n\nthree -- four five\tsix_seven(eight) nine; ten eleven\xc2\xa0twelve 'thirteen'"));
  struct us_err err = {0};
  struct us_decontaminator *filter;
  bool found;
  const char *composed = "\xc3\x89t\xc3\xa9 2 3 4 5 6 7 8 9 10 11 12 13";
  const char *decomposed = "e\xcc\x81te\xcc\x81 2 3 4 5 6 7 8 9 10 11 12 13 \xff";
  ck_assert_int_eq(us_decontaminator_create(&filter, &err), US_OK);
  ck_assert_int_eq(us_decontaminator_add(filter, composed, strlen(composed), &err), US_OK);
  ck_assert_int_eq(us_decontaminator_check(filter, decomposed, strlen(decomposed), &found, NULL, &err),
                   US_OK);
  ck_assert(found);
  us_decontaminator_free(filter);
}
END_TEST

START_TEST(word_edges_count) {
  ck_assert(!overlaps("onetwo three four five six seven eight nine ten eleven twelve thirteen"));
  ck_assert(!overlaps("xone two three four five six seven eight nine ten eleven twelve thirteen"));
}
END_TEST

START_TEST(windows_do_not_span_two_prompts) {
  struct us_err err = {0};
  struct us_decontaminator *filter;
  bool found;
  ck_assert_int_eq(us_decontaminator_create(&filter, &err), US_OK);
  ck_assert_int_eq(us_decontaminator_add(filter, "a b c d e f g", 13, &err), US_OK);
  ck_assert_int_eq(us_decontaminator_add(filter, "h i j k l m n", 13, &err), US_OK);
  ck_assert_uint_eq(us_decontaminator_windows(filter), 0);
  ck_assert_int_eq(us_decontaminator_check(filter, "a b c d e f g h i j k l m n", 27, &found, NULL, &err),
                   US_OK);
  ck_assert(!found);
  us_decontaminator_free(filter);
}
END_TEST

START_TEST(the_shared_words_are_told) {
  struct us_err err = {0};
  struct us_decontaminator *filter;
  struct us_buffer words = {0};
  bool found;
  ck_assert_int_eq(us_decontaminator_create(&filter, &err), US_OK);
  ck_assert_int_eq(us_decontaminator_add(filter, prompt, strlen(prompt), &err), US_OK);
  ck_assert_int_eq(us_decontaminator_check(filter, prompt, strlen(prompt), &found, &words, &err), US_OK);
  ck_assert_str_eq(words.data, "one two three four five six seven eight nine ten eleven twelve thirteen");
  us_decontaminator_free(filter);
  us_buffer_release(&words);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("decontaminate");
  tcase_add_test(c, thirteen_words_in_a_row_overlap);
  tcase_add_test(c, twelve_words_or_one_changed_do_not);
  tcase_add_test(c, case_punctuation_lines_and_normal_form_do_not_matter);
  tcase_add_test(c, word_edges_count);
  tcase_add_test(c, windows_do_not_span_two_prompts);
  tcase_add_test(c, the_shared_words_are_told);
  return us_suite("decontaminate", c);
}

US_TEST_MAIN(make_suite)
