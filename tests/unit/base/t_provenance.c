/* t_provenance.c: the origin of an artefact. */
#include "base/provenance.h"
#include "base/version.h"
#include "suite.h"

#include <string.h>

static const char sha[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
static const char other_sha[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

static struct us_provenance *make(uint64_t seed, const char *steps, const char *parent_sha,
                                  const char *rule) {
  char *argv[] = {(char *)"qat-quant", (char *)"a\xff\xc3\xa9z"};
  char options[128];
  snprintf(options, sizeof options, "{\"steps\": {\"value\": %s, \"by\": \"%s\"}}", steps,
           strcmp(steps, "200") == 0 ? "default" : "command line");
  struct us_provenance *p;
  struct us_err err = {0};
  ck_assert_msg(us_provenance_create("qat-quant", 2, argv, options, seed, &p, &err) == US_OK, "%s",
                err.message);
  ck_assert_int_eq(us_provenance_add_parent(p, "pico.h5", parent_sha, "model", &err), US_OK);
  ck_assert_int_eq(us_provenance_set_text(p, "scale_rule", rule, &err), US_OK);
  ck_assert_int_eq(us_provenance_set_json(p, "taps", "[1, 3]", &err), US_OK);
  return p;
}

START_TEST(text_reads_back_the_same) {
  struct us_provenance *p = make(7, "200", sha, "mse"), *back;
  struct us_err err = {0};
  char *text = us_provenance_text(p, &err);
  ck_assert_ptr_nonnull(text);
  ck_assert_ptr_null(strchr(text, '\n'));
  ck_assert_msg(us_provenance_parse(text, strlen(text), "q.h5", &back, &err) == US_OK, "%s", err.message);
  ck_assert_str_eq(us_provenance_tool(back), "qat-quant");
  ck_assert_str_eq(us_provenance_version(back), us_version());
  ck_assert_str_eq(us_provenance_revision(back), us_revision());
  ck_assert_uint_eq(us_provenance_seed(back), 7);
  ck_assert_uint_eq(us_provenance_parents(back), 1);
  ck_assert_str_eq(us_provenance_parent_path(back, 0), "pico.h5");
  ck_assert_str_eq(us_provenance_parent_sha256(back, 0), sha);
  ck_assert_str_eq(us_provenance_parent_kind(back, 0), "model");
  ck_assert_str_eq(us_provenance_field(back, "scale_rule"), "mse");
  ck_assert_ptr_null(us_provenance_field(back, "taps"));
  ck_assert_ptr_nonnull(strstr(text, "\"a\xef\xbf\xbd\xc3\xa9z\""));
  char *again = us_provenance_text(back, &err);
  ck_assert_str_eq(again, text);
  free(text);
  free(again);
  us_provenance_free(p);
  us_provenance_free(back);
}
END_TEST

START_TEST(comparing_says_what_differs) {
  struct us_provenance *a = make(1, "200", sha, "mse"), *b = make(2, "0", other_sha, "floor");
  struct us_buffer lines = {0};
  size_t count;
  ck_assert_int_eq(us_provenance_set_text(b, "extra", "x", NULL), US_OK);
  ck_assert_int_eq(us_provenance_compare(a, b, &lines, &count, NULL), US_OK);
  ck_assert_uint_eq(count, 5);
  ck_assert_ptr_nonnull(strstr(lines.data, "seed: 1, 2\n"));
  ck_assert_ptr_nonnull(strstr(lines.data, "options.steps: 200 (default), 0 (command line)\n"));
  ck_assert_ptr_nonnull(strstr(lines.data, "parents[0]: "));
  ck_assert_ptr_nonnull(strstr(lines.data, "scale_rule: mse, floor\n"));
  ck_assert_ptr_nonnull(strstr(lines.data, "extra: not given, x\n"));
  us_buffer_release(&lines);
  us_provenance_free(a);
  us_provenance_free(b);
}
END_TEST

START_TEST(equal_runs_do_not_differ_whoever_set_the_options) {
  struct us_provenance *a = make(1, "200", sha, "mse"), *b;
  char *argv[] = {(char *)"qat-quant"};
  struct us_buffer lines = {0};
  size_t count;
  const char *options = "{\"steps\": {\"value\": 200, \"by\": \"command line\"}}";
  ck_assert_int_eq(us_provenance_create("qat-quant", 1, argv, options, 1, &b, NULL), US_OK);
  ck_assert_int_eq(us_provenance_add_parent(b, "elsewhere.h5", sha, "model", NULL), US_OK);
  ck_assert_int_eq(us_provenance_set_text(b, "scale_rule", "mse", NULL), US_OK);
  ck_assert_int_eq(us_provenance_set_json(b, "taps", "[1, 3]", NULL), US_OK);
  ck_assert_int_eq(us_provenance_compare(a, b, &lines, &count, NULL), US_OK);
  ck_assert_uint_eq(count, 0);
  us_provenance_free(a);
  us_provenance_free(b);
}
END_TEST

START_TEST(an_option_that_nobody_set_is_shown_as_it_stands) {
  struct us_provenance *a = make(1, "200", sha, "mse"), *b = make(1, "200", sha, "mse");
  struct us_buffer lines = {0};
  size_t count;
  ck_assert_int_eq(us_provenance_set_json(b, "extra", "{\"value\": 2, \"by\": 7}", NULL), US_OK);
  ck_assert_int_eq(us_provenance_compare(a, b, &lines, &count, NULL), US_OK);
  ck_assert_str_eq(lines.data, "extra: not given, {\"value\":2,\"by\":7}\n");
  us_buffer_release(&lines);
  us_provenance_free(a);
  us_provenance_free(b);
}
END_TEST

START_TEST(a_field_that_is_not_as_expected_is_named) {
  struct us_provenance *p = make(1, "200", sha, "floor");
  struct us_err err = {0};
  ck_assert_int_eq(us_provenance_expect(p, "q.h5", "scale_rule", "floor", &err), US_OK);
  ck_assert_int_eq(us_provenance_expect(p, "q.h5", "scale_rule", "mse", &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "q.h5: scale_rule is floor, expected mse");
  ck_assert_int_eq(us_provenance_expect(p, "q.h5", "mask_id", "7", &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "q.h5: mask_id is not given, expected 7");
  us_provenance_free(p);
}
END_TEST

START_TEST(hostile_text_is_refused_by_field) {
#define HEAD                                                                                                 \
  "{\"tool\":\"t\",\"version\":\"1\",\"revision\":\"r\",\"argv\":[\"t\"],\"options\":{},\"seed\":1,"
  static const struct {
    const char *text, *message;
  } cases[] = {
      {"[]", "q.h5: provenance is not an object"},
      {"{\"tool\":1}", "q.h5: tool: expected a string, found an integer"},
      {HEAD "\"parents\":[]}", "q.h5: fields: missing"},
      {HEAD "\"fields\":{},\"parents\":[1]}", "q.h5: parents[0]: path: missing"},
      {HEAD "\"fields\":{},\"parents\":[{\"path\":\"p\",\"kind\":\"k\",\"sha256\":\"zz\"}]}",
       "q.h5: parents[0]: sha256: not 64 hexadecimal digits"},
      {"{\"tool\":\"t\",\"version\":\"1\",\"revision\":\"r\",\"argv\":[1]}",
       "q.h5: argv[0]: expected a string"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct us_provenance *p = NULL;
    struct us_err err = {0};
    ck_assert_int_eq(us_provenance_parse(cases[i].text, strlen(cases[i].text), "q.h5", &p, &err),
                     US_ERR_INPUT);
    ck_assert_ptr_null(p);
    ck_assert_str_eq(err.message, cases[i].message);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("provenance");
  tcase_add_test(c, text_reads_back_the_same);
  tcase_add_test(c, comparing_says_what_differs);
  tcase_add_test(c, equal_runs_do_not_differ_whoever_set_the_options);
  tcase_add_test(c, an_option_that_nobody_set_is_shown_as_it_stands);
  tcase_add_test(c, a_field_that_is_not_as_expected_is_named);
  tcase_add_test(c, hostile_text_is_refused_by_field);
  return us_suite("provenance", c);
}
US_TEST_MAIN(make_suite)
