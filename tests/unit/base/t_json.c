/* t_json.c: JSON that others wrote. */
#include "base/json.h"
#include "suite.h"

#include <string.h>
#include <unistd.h>

static json_t *root;

static void parse_sample(void) {
  static const char text[] =
      "{\"hidden\": 64, \"rate\": 0.5, \"name\": \"pico\", \"on\": true, \"none\": null, "
      "\"list\": [1, 2, 3], \"inner\": {}}";
  struct us_err err = {0};
  ck_assert_int_eq(us_json_parse(text, strlen(text), "config.json", &root, &err), US_OK);
}

static void drop_sample(void) {
  json_decref(root);
}

START_TEST(fields_are_read_by_type) {
  struct us_err err = {0};
  int64_t hidden;
  double rate;
  const char *name;
  bool on;
  json_t *node;
  ck_assert_int_eq(us_json_int(root, "c", "hidden", 1, 64, &hidden, &err), US_OK);
  ck_assert_int_eq(hidden, 64);
  ck_assert_int_eq(us_json_num(root, "c", "rate", 0, 1, &rate, &err), US_OK);
  ck_assert_double_eq(rate, 0.5);
  ck_assert_int_eq(us_json_num(root, "c", "hidden", 0, 64, &rate, &err), US_OK);
  ck_assert_double_eq(rate, 64);
  ck_assert_int_eq(us_json_str(root, "c", "name", &name, &err), US_OK);
  ck_assert_str_eq(name, "pico");
  ck_assert_int_eq(us_json_bool(root, "c", "on", &on, &err), US_OK);
  ck_assert(on);
  ck_assert_int_eq(us_json_array(root, "c", "list", 3, &node, &err), US_OK);
  ck_assert_int_eq(us_json_object(root, "c", "inner", &node, &err), US_OK);
  ck_assert(us_json_has(root, "hidden") && !us_json_has(root, "none") && !us_json_has(root, "other"));
}
END_TEST

START_TEST(a_wrong_field_is_named_with_what_was_expected_and_found) {
  struct us_err err = {0};
  int64_t integer;
  double number;
  const char *text;
  bool flag;
  json_t *node;
  ck_assert_int_eq(us_json_int(root, "config.json", "name", 0, 9, &integer, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "config.json: name: expected an integer, found a string");
  ck_assert_int_eq(us_json_int(root, "config.json", "rate", 0, 9, &integer, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "config.json: rate: expected an integer, found a real number");
  ck_assert_int_eq(us_json_int(root, "config.json", "hiden", 0, 9, &integer, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "config.json: hiden: missing");
  ck_assert_int_eq(us_json_int(root, "config.json", "hidden", 65, 99, &integer, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "config.json: hidden: 64 is not in 65 to 99");
  ck_assert_int_eq(us_json_num(root, "config.json", "rate", 1, 2, &number, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "config.json: rate: 0.5 is not in 1 to 2");
  ck_assert_int_eq(us_json_str(root, "config.json", "none", &text, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "config.json: none: expected a string, found null");
  ck_assert_int_eq(us_json_bool(root, "config.json", "hidden", &flag, &err), US_ERR_INPUT);
  ck_assert_int_eq(us_json_object(root, "config.json", "list", &node, &err), US_ERR_INPUT);
  ck_assert_int_eq(us_json_array(root, "config.json", "list", 2, &node, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "config.json: list: 3 items, at most 2 are allowed");
}
END_TEST

static void refuse(const char *text, size_t size, const char *needle) {
  struct us_err err = {0};
  json_t *node = NULL;
  ck_assert_int_eq(us_json_parse(text, size, "x.json", &node, &err), US_ERR_INPUT);
  ck_assert_ptr_null(node);
  ck_assert_msg(strncmp(err.message, "x.json: ", 8) == 0 && strstr(err.message, needle), "%s", err.message);
}

START_TEST(broken_text_is_refused_with_its_line) {
  refuse("{\n\"a\": }", 8, "line 2");
  refuse("", 0, "line 1");
  refuse("{\"a\": 1, \"a\": 2}", 16, "duplicate");
  refuse("{} {}", 5, "end of file");
  refuse("\xef\xbb\xbf{}", 5, "x.json: column 1: a byte order mark");
  refuse("{\"a\": \"\\u0000\"}", 15, ": \\u0000 is not allowed");
  refuse("{\"a\": \"\xff\"}", 10, "unable to decode byte 0xff");
  refuse("{\"a\0\": 1}", 9, "x.json: column ");
}
END_TEST

START_TEST(depth_is_capped_and_brackets_in_texts_do_not_count) {
  char text[300];
  memset(text, '[', 64);
  memset(text + 64, ']', 64);
  struct us_err err = {0};
  json_t *node;
  ck_assert_int_eq(us_json_parse(text, 128, "x", &node, &err), US_OK);
  json_decref(node);
  memset(text, '[', 65);
  memset(text + 65, ']', 65);
  refuse(text, 130, "nested deeper than 64");
  text[0] = '"';
  text[1] = '\\';
  text[2] = '"';
  memset(text + 3, '[', 100);
  text[103] = '"';
  ck_assert_int_eq(us_json_parse(text, 104, "x", &node, &err), US_OK);
  json_decref(node);
}
END_TEST

START_TEST(a_file_over_the_cap_is_refused) {
  char path[] = "us_t_json_XXXXXX";
  int fd = mkstemp(path);
  ck_assert_int_eq((int)write(fd, "[1, 2]", 6), 6);
  close(fd);
  struct us_err err = {0};
  json_t *node;
  ck_assert_int_eq(us_json_load(path, 6, &node, &err), US_OK);
  json_decref(node);
  ck_assert_int_eq(us_json_load(path, 5, &node, &err), US_ERR_INPUT);
  unlink(path);
  ck_assert_int_eq(us_json_load(path, 5, &node, &err), US_ERR_IO);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("json");
  tcase_add_checked_fixture(c, parse_sample, drop_sample);
  tcase_add_test(c, fields_are_read_by_type);
  tcase_add_test(c, a_wrong_field_is_named_with_what_was_expected_and_found);
  tcase_add_test(c, broken_text_is_refused_with_its_line);
  tcase_add_test(c, depth_is_capped_and_brackets_in_texts_do_not_count);
  tcase_add_test(c, a_file_over_the_cap_is_refused);
  return us_suite("json", c);
}
US_TEST_MAIN(make_suite)
