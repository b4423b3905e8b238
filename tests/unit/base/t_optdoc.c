/* t_optdoc.c: the pages made from an option table. tests/cli runs mandoc and bash over those of every tool. */
#include "base/optdoc.h"
#include "suite.h"

#include <stdlib.h>
#include <string.h>

static const struct us_opt table[] = {
    US_OPT_FILE("model", 'm', "FILE", "checkpoint", .required = true),
    US_OPT_ENUM("loss", 0, "kl|ce", "what finetuning minimizes", .def = "kl"),
    US_OPT_ARG("input", "SHARD", "token shards with 'quotes' and a \\ inside", .repeat = true),
    US_OPT_COMMON,
    US_OPT_END,
};

static const struct us_optdoc doc = {
    .tool = "us-thing",
    .summary = "do one thing",
    .description = ".starts with a dot\n\nA second paragraph that is long enough to be broken into at least "
                   "two lines of "
                   "the help page, because pages are read on terminals.",
    .examples = "# one\nus-thing -m x\n.odd",
    .version = "1.2",
    .table = table,
};

static char *page(void (*make)(const struct us_optdoc *, FILE *)) {
  char *text = NULL;
  size_t size;
  FILE *out = open_memstream(&text, &size);
  make(&doc, out);
  fclose(out);
  return text;
}

START_TEST(help_names_every_option_with_default_and_range) {
  char *text = page(us_optdoc_help);
  for (const struct us_opt *opt = table; opt->kind; opt++) {
    char name[64];
    snprintf(name, sizeof name, opt->kind == US_OPT_KIND_GROUP ? "%s:" : "--%s", opt->name);
    if (opt->kind != US_OPT_KIND_ARG) ck_assert_msg(strstr(text, name) != NULL, "%s is missing", name);
  }
  ck_assert_ptr_nonnull(strstr(text, "usage: us-thing --model FILE [options] [SHARD...]\n"));
  ck_assert_ptr_nonnull(strstr(text, "(default kl)"));
  ck_assert_ptr_nonnull(strstr(text, "(required)"));
  ck_assert_ptr_nonnull(strstr(text, "from 1 to 1024"));
  free(text);
}
END_TEST

START_TEST(help_fits_a_terminal) {
  char *text = page(us_optdoc_help);
  for (char *rest = text, *line; (line = strsep(&rest, "\n"));)
    ck_assert_msg(strlen(line) < 80, "%zu columns: %s", strlen(line), line);
  free(text);
}
END_TEST

START_TEST(man_page_escapes_what_roff_would_obey) {
  char *text = page(us_optdoc_man);
  ck_assert_ptr_nonnull(strstr(text, "\n\\&.starts with a dot\n"));
  ck_assert_ptr_nonnull(strstr(text, "a \\e inside"));
  ck_assert_ptr_nonnull(strstr(text, "\n.Dl \\&.odd\n"));
  ck_assert_ptr_nonnull(strstr(text, ".Dt US-THING 1\n"));
  free(text);
}
END_TEST

START_TEST(completion_offers_options_and_the_words_of_an_enum) {
  char *text = page(us_optdoc_completion);
  ck_assert_ptr_nonnull(strstr(text, "--loss) COMPREPLY=($(compgen -W 'kl ce' -- \"$cur\"))"));
  ck_assert_ptr_nonnull(strstr(text, "'--model -m --loss --seed"));
  ck_assert_ptr_nonnull(strstr(text, "complete -F _us_thing us-thing\n"));
  free(text);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("optdoc");
  tcase_add_test(c, help_names_every_option_with_default_and_range);
  tcase_add_test(c, help_fits_a_terminal);
  tcase_add_test(c, man_page_escapes_what_roff_would_obey);
  tcase_add_test(c, completion_offers_options_and_the_words_of_an_enum);
  return us_suite("optdoc", c);
}
US_TEST_MAIN(make_suite)
