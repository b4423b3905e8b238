/* t_opt.c: the option table: what it accepts, refuses and records. */
#include "base/opt.h"
#include "suite.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct us_opt table[] = {
    US_OPT_FILE("model", 'm', "FILE", "checkpoint"),
    US_OPT_INT("steps", 'n', "N", "steps", .def = "200", .max = 1 << 20),
    US_OPT_INT("offset", 0, "N", "may be negative", .min = -10, .max = 10),
    US_OPT_NUM("rate", 0, "RATE", "learning rate", .def = "0.5", .above_min = true, .max = 1),
    US_OPT_ENUM("loss", 0, "kl|ce", "loss", .def = "kl"),
    US_OPT_STR("prompt", 'p', "TEXT", "prompt", .repeat = true),
    US_OPT_RULES("precision", 0, "RULES", "rules"),
    US_OPT_ARG("first", "FIRST", "one"),
    US_OPT_ARG("rest", "REST", "many", .repeat = true),
    US_OPT_COMMON,
    US_OPT_END,
};

#define WORDS_MAX 16

/* Parse a line of words, separated by single blanks; on success the caller frees. */
static enum us_status parse(const struct us_opt *rows, const char *line, struct us_opts **ret_opts,
                            struct us_err *err) {
  static char copy[512];
  char *argv[WORDS_MAX] = {(char *)"tool"};
  int argc = 1;
  snprintf(copy, sizeof copy, "%s", line);
  for (char *rest = *line ? copy : NULL; rest && argc < WORDS_MAX;) argv[argc++] = strsep(&rest, " ");
  *ret_opts = NULL;
  return us_opts_parse(rows, argc, argv, ret_opts, err);
}

static struct us_opts *accept(const char *line) {
  struct us_opts *opts;
  struct us_err err = {0};
  ck_assert_msg(parse(table, line, &opts, &err) == US_OK, "'%s': %s", line, err.message);
  return opts;
}

static void refuse(const char *line, const char *message) {
  struct us_opts *opts;
  struct us_err err = {0};
  ck_assert_msg(parse(table, line, &opts, &err) == US_ERR_USAGE, "'%s' was accepted", line);
  ck_assert_ptr_null(opts);
  ck_assert_str_eq(err.message, message);
}

START_TEST(defaults_stand_where_nothing_was_given) {
  struct us_opts *opts = accept("");
  ck_assert_int_eq(us_opt_int(opts, "steps"), 200);
  ck_assert_double_eq(us_opt_num(opts, "rate"), 0.5);
  ck_assert_str_eq(us_opt_str(opts, "loss"), "kl");
  ck_assert_int_eq(us_opt_choice(opts, "loss"), 0);
  ck_assert_int_eq(us_opt_device(opts, "device"), -1);
  ck_assert_ptr_null(us_opt_str(opts, "model"));
  ck_assert(!us_opt_given(opts, "steps"));
  ck_assert_ptr_null(us_opts_misuse(opts));
  us_opts_free(opts);
}
END_TEST

START_TEST(every_way_to_write_a_value_is_the_same) {
  static const char *const lines[] = {"--steps 7", "--steps=7", "-n 7",          "-n7",
                                      "-qn7",      "-qn 7",     "-n 3 --steps 7"};
  for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
    struct us_opts *opts = accept(lines[i]);
    ck_assert_int_eq(us_opt_int(opts, "steps"), 7);
    ck_assert(us_opt_given(opts, "steps"));
    us_opts_free(opts);
  }
}
END_TEST

START_TEST(integers_take_powers_of_1024_and_hexadecimal) {
  static const struct {
    const char *text;
    int64_t value;
  } cases[] = {{"--seed 3K", 3072},
               {"--seed 2M", 2 << 20},
               {"--seed 8G", (int64_t)8 << 30},
               {"--seed 0x10", 16},
               {"--seed 010", 10},
               {"--seed 9223372036854775807", INT64_MAX},
               {"--seed 8589934591G", (int64_t)8589934591 << 30}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct us_opts *opts = accept(cases[i].text);
    ck_assert_int_eq(us_opt_int(opts, "seed"), cases[i].value);
    us_opts_free(opts);
  }
}
END_TEST

START_TEST(bad_values_name_option_and_problem) {
  refuse("--steps x", "option '--steps': 'x' is not an integer");
  refuse("--steps 1.5", "option '--steps': '1.5' is not an integer");
  refuse("--steps 1KK", "option '--steps': '1KK' is not an integer");
  refuse("--steps=", "option '--steps': '' is not an integer");
  refuse("--seed 9223372036854775808", "option '--seed': '9223372036854775808' is not an integer");
  refuse("--seed 8589934592G", "option '--seed': '8589934592G' is not an integer");
  refuse("--steps=-1", "option '--steps': -1 is out of range: at least 0, at most 1048576");
  refuse("--steps 2M", "option '--steps': 2M is out of range: at least 0, at most 1048576");
  refuse("--offset -11", "option '--offset': -11 is out of range: at least -10, at most 10");
  refuse("--rate 0", "option '--rate': 0 is out of range: above 0, at most 1");
  refuse("--rate nan", "option '--rate': 'nan' is not a number");
  refuse("--rate 1e999", "option '--rate': '1e999' is not a number");
  refuse("--loss cee", "option '--loss': 'cee' is none of kl|ce; did you mean 'ce'?");
  refuse("--device gpu", "option '--device': 'gpu' is no device: cpu, cuda or cuda:N");
  refuse("--device cuda:-1", "option '--device': 'cuda:-1' is no device: cpu, cuda or cuda:N");
  refuse("--precision experts", "option '--precision': 'experts' is not of the form key=value,key=value");
  refuse("--precision a=b,", "option '--precision': 'a=b,' is not of the form key=value,key=value");
  refuse("--model=", "option '--model': the value is empty");
  refuse("--quiet=perhaps", "option '--quiet': 'perhaps' is neither true nor false");
}
END_TEST

START_TEST(an_unknown_option_gets_a_suggestion) {
  refuse("--stpes 1", "unknown option '--stpes'; did you mean '--steps'?");
  refuse("--step", "unknown option '--step'; did you mean '--steps'?");
  refuse("--prec", "unknown option '--prec'; did you mean '--precision'?");
  refuse("--zzz", "unknown option '--zzz'");
  refuse("-z", "unknown option '-z'");
  refuse("-qz", "unknown option '-z'");
}
END_TEST

START_TEST(a_forgotten_value_is_not_the_next_option) {
  refuse("--model --quiet", "option '--model' needs a value, FILE");
  refuse("--model", "option '--model' needs a value, FILE");
  struct us_opts *opts = accept("--model=--quiet");
  ck_assert_str_eq(us_opt_str(opts, "model"), "--quiet");
  us_opts_free(opts);
}
END_TEST

START_TEST(negative_numbers_are_values) {
  struct us_opts *opts = accept("--offset -3");
  ck_assert_int_eq(us_opt_int(opts, "offset"), -3);
  us_opts_free(opts);
}
END_TEST

START_TEST(positionals_fill_in_order_and_may_look_like_options_after_two_dashes) {
  struct us_opts *opts = accept("a -q - -- --b -c");
  ck_assert_str_eq(us_opt_str(opts, "first"), "a");
  ck_assert_uint_eq(us_opt_count(opts, "rest"), 3);
  ck_assert_str_eq(us_opt_nth(opts, "rest", 0), "-");
  ck_assert_str_eq(us_opt_nth(opts, "rest", 1), "--b");
  ck_assert_str_eq(us_opt_nth(opts, "rest", 2), "-c");
  ck_assert_ptr_null(us_opt_nth(opts, "rest", 3));
  us_opts_free(opts);
}
END_TEST

START_TEST(a_positional_too_many_is_refused) {
  static const struct us_opt one[] = {US_OPT_ARG("in", "IN", "input", .required = true), US_OPT_END};
  struct us_opts *opts;
  struct us_err err = {0};
  ck_assert_int_eq(parse(one, "a b", &opts, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "unexpected argument 'b'");
  ck_assert_int_eq(parse(one, "", &opts, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "missing argument IN");
}
END_TEST

START_TEST(repeated_options_keep_every_value_and_flags_count) {
  struct us_opts *opts = accept("-p a --prompt=b -vv -pc");
  ck_assert_uint_eq(us_opt_count(opts, "prompt"), 3);
  ck_assert_str_eq(us_opt_nth(opts, "prompt", 1), "b");
  ck_assert_str_eq(us_opt_str(opts, "prompt"), "c");
  ck_assert_uint_eq(us_opt_count(opts, "verbose"), 2);
  us_opts_free(opts);
}
END_TEST

START_TEST(devices_have_ordinals) {
  static const struct {
    const char *line;
    int ordinal;
  } cases[] = {{"--device cpu", -1}, {"--device cuda", 0}, {"--device cuda:0", 0}, {"--device cuda:7", 7}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct us_opts *opts = accept(cases[i].line);
    ck_assert_int_eq(us_opt_device(opts, "device"), cases[i].ordinal);
    us_opts_free(opts);
  }
}
END_TEST

START_TEST(a_required_option_may_be_missing_only_with_help_or_version) {
  static const struct us_opt rows[] = {US_OPT_FILE("model", 'm', "FILE", "x", .required = true),
                                       US_OPT_COMMON, US_OPT_END};
  struct us_opts *opts;
  struct us_err err = {0};
  ck_assert_int_eq(parse(rows, "", &opts, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "missing option '--model FILE'");
  ck_assert_int_eq(parse(rows, "--help", &opts, &err), US_OK);
  ck_assert(us_opt_flag(opts, "help"));
  us_opts_free(opts);
  ck_assert_int_eq(parse(rows, "--version", &opts, &err), US_OK);
  us_opts_free(opts);
}
END_TEST

START_TEST(asking_for_what_the_table_lacks_is_noted) {
  struct us_opts *opts = accept("");
  ck_assert_int_eq(us_opt_int(opts, "steps"), 200);
  ck_assert_ptr_null(us_opts_misuse(opts));
  ck_assert_int_eq(us_opt_int(opts, "loss"), 0); /* there, but no integer */
  ck_assert_str_eq(us_opts_misuse(opts), "loss");
  ck_assert(!us_opt_flag(opts, "nothing"));
  ck_assert_str_eq(us_opts_misuse(opts), "loss");
  us_opts_free(opts);
}
END_TEST

static char config_path[] = "us_t_opt_XXXXXX";

static void write_config(const char *text) {
  FILE *file = fopen(config_path, "w");
  ck_assert_ptr_nonnull(file);
  fputs(text, file);
  fclose(file);
}

static enum us_status parse_with_config(const char *more, struct us_opts **ret_opts, struct us_err *err) {
  char line[256];
  snprintf(line, sizeof line, "--config %s%s", config_path, more);
  return parse(table, line, ret_opts, err);
}

static void make_config(void) {
  strcpy(config_path + strlen(config_path) - 6, "XXXXXX");
  int fd = mkstemp(config_path);
  ck_assert_int_ge(fd, 0);
  close(fd);
}

static void drop_config(void) {
  unlink(config_path);
}

START_TEST(the_command_line_beats_the_config_file_beats_the_default) {
  write_config("# a comment\n\n steps = 5 \nrate=0.25\nprompt = from config\nprompt = twice\nquiet = true\n");
  struct us_opts *opts;
  struct us_err err = {0};
  ck_assert_int_eq(parse_with_config(" -n 9 --quiet=false", &opts, &err), US_OK);
  ck_assert_int_eq(us_opt_int(opts, "steps"), 9);
  ck_assert_double_eq(us_opt_num(opts, "rate"), 0.25);
  ck_assert_uint_eq(us_opt_count(opts, "prompt"), 2);
  ck_assert_str_eq(us_opt_nth(opts, "prompt", 0), "from config");
  ck_assert_str_eq(us_opt_str(opts, "loss"), "kl");
  ck_assert(!us_opt_flag(opts, "quiet"));
  us_opts_free(opts);
  ck_assert_int_eq(parse_with_config(" -p mine", &opts, &err), US_OK);
  ck_assert_uint_eq(us_opt_count(opts, "prompt"), 1); /* a list is replaced, not extended */
  ck_assert(us_opt_flag(opts, "quiet"));
  us_opts_free(opts);
}
END_TEST

START_TEST(a_bad_config_line_is_named) {
  static const struct {
    const char *text, *message;
  } cases[] = {{"steps = 1\nstpes = 2\n", "line 2: unknown option 'stpes'; did you mean 'steps'?"},
               {"steps 1\n", "line 1: expected 'name = value'"},
               {"\n\nsteps = many\n", "line 3: steps: 'many' is not an integer"},
               {"config = x\n", "line 1: 'config' cannot be set in a config file"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    write_config(cases[i].text);
    struct us_opts *opts;
    struct us_err err = {0};
    char expected[256];
    snprintf(expected, sizeof expected, "%s: %s", config_path, cases[i].message);
    ck_assert_int_eq(parse_with_config("", &opts, &err), US_ERR_INPUT);
    ck_assert_str_eq(err.message, expected);
  }
}
END_TEST

START_TEST(a_missing_config_file_is_an_io_error) {
  unlink(config_path);
  struct us_opts *opts;
  struct us_err err = {0};
  ck_assert_int_eq(parse_with_config("", &opts, &err), US_ERR_IO);
}
END_TEST

START_TEST(the_recorded_run_says_who_set_what) {
  write_config("rate = 0.25\n");
  struct us_opts *opts;
  struct us_err err = {0};
  ck_assert_int_eq(parse_with_config(" -n 2K -p a -p \xff -v", &opts, &err), US_OK);
  char *text = us_opts_record(opts);
  json_t *root = json_loads(text, 0, NULL);
  ck_assert_ptr_nonnull(root);
  const char *by, *name;
  int steps, verbose, quiet;
  double rate;
  ck_assert_int_eq(json_unpack(root, "{s:{s:i,s:s}}", "steps", "value", &steps, "by", &by), 0);
  ck_assert_int_eq(steps, 2048);
  ck_assert_str_eq(by, "command line");
  ck_assert_int_eq(json_unpack(root, "{s:{s:f,s:s}}", "rate", "value", &rate, "by", &by), 0);
  ck_assert_double_eq(rate, 0.25);
  ck_assert_str_eq(by, "config");
  ck_assert_int_eq(json_unpack(root, "{s:{s:s,s:s}}", "loss", "value", &name, "by", &by), 0);
  ck_assert_str_eq(by, "default");
  ck_assert_int_eq(
      json_unpack(root, "{s:{s:i},s:{s:b}}", "verbose", "value", &verbose, "quiet", "value", &quiet), 0);
  ck_assert_int_eq(verbose, 1);
  ck_assert_int_eq(quiet, 0);
  ck_assert_uint_eq(json_array_size(json_object_get(json_object_get(root, "prompt"), "value")), 2);
  ck_assert_ptr_null(json_object_get(root, "help"));
  ck_assert_ptr_null(json_object_get(root, "config"));
  json_decref(root);
  free(text);
  us_opts_free(opts);
}
END_TEST

START_TEST(letters_and_names_of_the_common_options_are_unique) {
  for (const struct us_opt *a = table; a->kind; a++)
    for (const struct us_opt *b = a + 1; b->kind; b++) {
      ck_assert_msg(!a->letter || a->letter != b->letter, "-%c twice", a->letter);
      ck_assert_msg(a->kind == US_OPT_KIND_GROUP || strcmp(a->name, b->name) != 0, "%s twice", a->name);
    }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("opt");
  tcase_add_checked_fixture(c, make_config, drop_config);
  tcase_add_test(c, defaults_stand_where_nothing_was_given);
  tcase_add_test(c, every_way_to_write_a_value_is_the_same);
  tcase_add_test(c, integers_take_powers_of_1024_and_hexadecimal);
  tcase_add_test(c, bad_values_name_option_and_problem);
  tcase_add_test(c, an_unknown_option_gets_a_suggestion);
  tcase_add_test(c, a_forgotten_value_is_not_the_next_option);
  tcase_add_test(c, negative_numbers_are_values);
  tcase_add_test(c, positionals_fill_in_order_and_may_look_like_options_after_two_dashes);
  tcase_add_test(c, a_positional_too_many_is_refused);
  tcase_add_test(c, repeated_options_keep_every_value_and_flags_count);
  tcase_add_test(c, devices_have_ordinals);
  tcase_add_test(c, a_required_option_may_be_missing_only_with_help_or_version);
  tcase_add_test(c, asking_for_what_the_table_lacks_is_noted);
  tcase_add_test(c, the_command_line_beats_the_config_file_beats_the_default);
  tcase_add_test(c, a_bad_config_line_is_named);
  tcase_add_test(c, a_missing_config_file_is_an_io_error);
  tcase_add_test(c, the_recorded_run_says_who_set_what);
  tcase_add_test(c, letters_and_names_of_the_common_options_are_unique);
  return us_suite("opt", c);
}
US_TEST_MAIN(make_suite)
