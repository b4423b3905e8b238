/* t_intern.c: byte strings to numbers. */
#include "base/intern.h"
#include "suite.h"

#include <stdio.h>
#include <string.h>

START_TEST(strings_are_numbered_as_they_come) {
  struct us_intern words = {0};
  struct us_err err = {0};
  for (uint32_t i = 0; i < 3000; i++) { /* every string twice: the second time it is found */
    char word[16];
    uint32_t index;
    bool added;
    snprintf(word, sizeof word, "%u", i / 2);
    ck_assert_int_eq(us_intern_add(&words, word, strlen(word), &index, &added, &err), US_OK);
    ck_assert_uint_eq(index, i / 2);
    ck_assert_int_eq(added, i % 2 == 0);
    ck_assert_int_eq(us_intern_find(&words, word, strlen(word)), i / 2);
  }
  ck_assert_int_eq(us_intern_find(&words, "x", 1), -1);
  us_intern_release(&words);
}
END_TEST

START_TEST(bytes_of_any_value_are_kept) {
  struct us_intern words = {0};
  struct us_err err = {0};
  uint32_t index;
  size_t bytes;
  ck_assert_int_eq(us_intern_add(&words, "", 0, &index, NULL, &err), US_OK);
  ck_assert_int_eq(us_intern_add(&words, "a\0b", 3, &index, NULL, &err), US_OK);
  ck_assert_uint_eq(index, 1);
  ck_assert_int_eq(us_intern_find(&words, "a\0c", 3), -1);
  ck_assert_mem_eq(us_intern_get(&words, 1, &bytes), "a\0b", 4);
  ck_assert_uint_eq(bytes, 3);
  us_intern_release(&words);
}
END_TEST

/* A table of 2^30 strings takes 24 GB, so one that says it is so large stands for it: growing must not touch it. */
START_TEST(a_full_table_says_so_and_stays) {
  struct us_intern words = {.n = 1u << 30, .n_slots = 1u << 31, .capacity = 1u << 30};
  struct us_err err = {0};
  uint32_t index;
  words.entries = malloc(sizeof *words.entries);
  words.entries[0].bytes = 7;
  ck_assert_int_eq(us_intern_add(&words, "a", 1, &index, NULL, &err), US_ERR_MEMORY);
  ck_assert_uint_eq(words.n_slots, 1u << 31);
  ck_assert_uint_eq(words.entries[0].bytes, 7);
  us_intern_release(&words);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("intern");
  tcase_add_test(c, strings_are_numbered_as_they_come);
  tcase_add_test(c, bytes_of_any_value_are_kept);
  tcase_add_test(c, a_full_table_says_so_and_stays);
  return us_suite("intern", c);
}
US_TEST_MAIN(make_suite)
