/* t_err.c: status and message. */
#include "base/err.h"
#include "suite.h"

#include <errno.h>
#include <string.h>

START_TEST(set_returns_the_status_and_keeps_the_message) {
  struct us_err err = {0};
  ck_assert_int_eq(us_err_set(&err, US_ERR_INPUT, "scale %d is NaN", 255), US_ERR_INPUT);
  ck_assert_int_eq(err.status, US_ERR_INPUT);
  ck_assert_str_eq(err.message, "scale 255 is NaN");
}
END_TEST

START_TEST(prefixes_read_from_file_to_field) {
  struct us_err err = {0};
  us_err_set(&err, US_ERR_INPUT, "scale 255 is NaN");
  us_err_prefix(&err, "layers.%d.down", 3);
  ck_assert_int_eq(us_err_prefix(&err, "pico.h5"), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "pico.h5: layers.3.down: scale 255 is NaN");
}
END_TEST

START_TEST(errno_text_is_appended_and_enomem_is_memory) {
  struct us_err err = {0};
  errno = ENOENT;
  ck_assert_int_eq(us_err_errno(&err, US_ERR_IO, "cannot open '%s'", "x"), US_ERR_IO);
  ck_assert_str_eq(err.message, "cannot open 'x': No such file or directory");
  errno = ENOMEM;
  ck_assert_int_eq(us_err_errno(&err, US_ERR_IO, "map"), US_ERR_MEMORY);
}
END_TEST

START_TEST(a_long_message_is_cut_not_overrun) {
  struct us_err err = {0};
  char text[2 * US_ERR_MESSAGE_MAX];
  memset(text, 'a', sizeof text - 1);
  text[sizeof text - 1] = 0;
  us_err_set(&err, US_ERR_IO, "%s", text);
  us_err_prefix(&err, "file");
  ck_assert_uint_eq(strlen(err.message), US_ERR_MESSAGE_MAX - 1);
  ck_assert_int_eq(strncmp(err.message, "file: aaa", 9), 0);
}
END_TEST

START_TEST(a_null_err_is_allowed) {
  ck_assert_int_eq(us_err_set(NULL, US_ERR_IO, "x"), US_ERR_IO);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("err");
  tcase_add_test(c, set_returns_the_status_and_keeps_the_message);
  tcase_add_test(c, prefixes_read_from_file_to_field);
  tcase_add_test(c, errno_text_is_appended_and_enomem_is_memory);
  tcase_add_test(c, a_long_message_is_cut_not_overrun);
  tcase_add_test(c, a_null_err_is_allowed);
  return us_suite("err", c);
}
US_TEST_MAIN(make_suite)
