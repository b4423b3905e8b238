/* t_table.c: TSV and JSON lines; jansson is the independent reader of the latter. */
#include "base/table.h"
#include "suite.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

static const char *const columns[] = {"name", "count", "share", "on"};

static void row(struct us_table *table, const char *name, int64_t count, double share, bool on) {
  us_table_text(table, name);
  us_table_int(table, count);
  us_table_num(table, share);
  us_table_bool(table, on);
}

static char *two_rows(bool json) {
  char *text = NULL;
  size_t size;
  FILE *out = open_memstream(&text, &size);
  struct us_table *table;
  ck_assert_int_eq(us_table_open(out, columns, 4, json, &table, NULL), US_OK);
  row(table, "a\tb\nc\\d\"e\r", INT64_MIN, 0.1, true);
  row(table, NULL, INT64_MAX, NAN, false);
  ck_assert_int_eq(us_table_close(table, NULL), US_OK);
  fclose(out);
  return text;
}

START_TEST(tsv_has_a_header_and_one_line_a_record) {
  char *text = two_rows(false);
  ck_assert_str_eq(text, "name\tcount\tshare\ton\n"
                         "a\\tb\\nc\\\\d\"e\\r\t-9223372036854775808\t0.1\ttrue\n"
                         "\t9223372036854775807\t\tfalse\n");
  free(text);
}
END_TEST

START_TEST(json_lines_read_back_equal) {
  char *text = two_rows(true);
  char *second = strchr(text, '\n') + 1;
  json_t *first = json_loadb(text, (size_t)(second - text), 0, NULL), *next = json_loads(second, 0, NULL);
  ck_assert_str_eq(json_string_value(json_object_get(first, "name")), "a\tb\nc\\d\"e\r");
  ck_assert_int_eq(json_integer_value(json_object_get(first, "count")), INT64_MIN);
  ck_assert_double_eq(json_real_value(json_object_get(first, "share")), 0.1);
  ck_assert(json_is_true(json_object_get(first, "on")));
  ck_assert(json_is_null(json_object_get(next, "name")) && json_is_null(json_object_get(next, "share")));
  json_decref(first);
  json_decref(next);
  free(text);
}
END_TEST

START_TEST(bytes_that_are_not_utf8_become_replacement_characters) {
  static const struct {
    const char *bytes, *json;
  } cases[] = {{"\xff", "\"\\ufffd\""},
               {"a\xc3", "\"a\\ufffd\""},
               {"\xc0\x80", "\"\\ufffd\\ufffd\""},
               {"\xed\xa0\x80", "\"\\ufffd\\ufffd\\ufffd\""},
               {"\xc3\xa9", "\"\xc3\xa9\""},
               {"\xf0\x9f\x98\x80", "\"\xf0\x9f\x98\x80\""},
               {"\x01\x7f", "\"\\u0001\\u007f\""},
               {"\xf4\x90\x80\x80", "\"\\ufffd\\ufffd\\ufffd\\ufffd\""}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    us_table_write_json_text(out, cases[i].bytes);
    fclose(out);
    ck_assert_str_eq(text, cases[i].json);
    json_t *parsed = json_loads(text, JSON_DECODE_ANY, NULL);
    ck_assert_ptr_nonnull(parsed);
    json_decref(parsed);
    free(text);
  }
}
END_TEST

START_TEST(numbers_are_short_and_read_back_equal) {
  char text[32];
  us_table_number(0.1, text);
  ck_assert_str_eq(text, "0.1");
  us_table_number(1e300, text);
  ck_assert_str_eq(text, "1e+300");
  uint64_t state = us_test_seed();
  for (int i = 0; i < 100000; i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    double value;
    memcpy(&value, &state, sizeof value);
    if (!isfinite(value)) continue;
    us_table_number(value, text);
    ck_assert_double_eq(strtod(text, NULL), value);
  }
}
END_TEST

START_TEST(a_full_disk_shows_at_close) {
  FILE *out = fopen("/dev/full", "w");
  struct us_table *table;
  struct us_err err = {0};
  ck_assert_int_eq(us_table_open(out, columns, 4, false, &table, &err), US_OK);
  ck_assert_int_eq(us_table_close(table, &err), US_ERR_IO);
  fclose(out);
}
END_TEST

START_TEST(an_incomplete_row_is_a_bug) {
  char *text = NULL;
  size_t size;
  FILE *out = open_memstream(&text, &size);
  struct us_table *table;
  struct us_err err = {0};
  ck_assert_int_eq(us_table_open(out, columns, 4, false, &table, &err), US_OK);
  us_table_int(table, 1);
  ck_assert_int_eq(us_table_close(table, &err), US_ERR_CHECK);
  ck_assert_str_eq(err.message, "bug: a row ended at column 1 of 4");
  fclose(out);
  free(text);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("table");
  tcase_add_test(c, tsv_has_a_header_and_one_line_a_record);
  tcase_add_test(c, json_lines_read_back_equal);
  tcase_add_test(c, bytes_that_are_not_utf8_become_replacement_characters);
  tcase_add_test(c, numbers_are_short_and_read_back_equal);
  tcase_add_test(c, a_full_disk_shows_at_close);
  tcase_add_test(c, an_incomplete_row_is_a_bug);
  return us_suite("table", c);
}
US_TEST_MAIN(make_suite)
