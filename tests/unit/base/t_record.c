/* t_record.c: the artefact record between tools. */
#include "base/record.h"
#include "suite.h"

#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char abc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
static char path[32];

static void make_file(void) {
  strcpy(path, "us_t_record_XXXXXX");
  int fd = mkstemp(path);
  ck_assert_int_eq((int)write(fd, "abc", 3), 3);
  close(fd);
}

static void drop_file(void) {
  unlink(path);
}

static enum us_status resolve_line(const char *line, const char *kind, struct us_record *record,
                                   struct us_err *err) {
  FILE *in = tmpfile();
  fputs(line, in);
  rewind(in);
  enum us_status status = us_record_resolve("-", in, kind, record, err);
  fclose(in);
  return status;
}

START_TEST(what_is_printed_resolves_in_both_forms) {
  for (int json = 0; json < 2; json++) {
    char *line = NULL;
    size_t size;
    FILE *out = open_memstream(&line, &size);
    ck_assert_int_eq(us_record_emit(out, json, path, "model", NULL), US_OK);
    fclose(out);
    struct us_record record;
    struct us_err err = {0};
    ck_assert_msg(resolve_line(line, "model", &record, &err) == US_OK, "%s", err.message);
    ck_assert_str_eq(record.path, path);
    ck_assert_str_eq(record.sha256, abc);
    ck_assert_str_eq(record.kind, "model");
    us_record_release(&record);
    free(line);
  }
}
END_TEST

START_TEST(tsv_record_is_path_tab_sha256_tab_kind) {
  char *line = NULL, expected[256];
  size_t size;
  FILE *out = open_memstream(&line, &size);
  ck_assert_int_eq(us_record_emit(out, false, path, "model", NULL), US_OK);
  fclose(out);
  snprintf(expected, sizeof expected, "%s\t%s\tmodel\n", path, abc);
  ck_assert_str_eq(line, expected);
  free(line);
}
END_TEST

START_TEST(two_dashes_read_two_lines) {
  FILE *in = tmpfile();
  fprintf(in, "%s\t%s\tmodel\n%s\t%s\tdraft\n", path, abc, path, abc);
  rewind(in);
  struct us_record first, second;
  ck_assert_int_eq(us_record_resolve("-", in, "model", &first, NULL), US_OK);
  ck_assert_int_eq(us_record_resolve("-", in, "draft", &second, NULL), US_OK);
  us_record_release(&first);
  us_record_release(&second);
  fclose(in);
}
END_TEST

START_TEST(a_path_is_taken_as_it_is) {
  struct us_record record;
  ck_assert_int_eq(us_record_resolve("no such file", NULL, "model", &record, NULL), US_OK);
  ck_assert_str_eq(record.path, "no such file");
  ck_assert_str_eq(record.sha256, "");
  us_record_release(&record);
}
END_TEST

START_TEST(odd_names_survive) {
  struct us_record record;
  struct us_err err = {0};
  char line[128];
  snprintf(line, sizeof line, "a\\tb\\\\n\t%s\tmodel", abc);
  ck_assert_int_eq(us_record_parse(line, &record, &err), US_OK);
  ck_assert_str_eq(record.path, "a\tb\\n");
  us_record_release(&record);
}
END_TEST

static void refuse(const char *format, const char *message) {
  char line[512];
  struct us_record record;
  struct us_err err = {0};
  snprintf(line, sizeof line, format, path, abc);
  ck_assert_int_eq(resolve_line(line, "model", &record, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, message) != NULL, "%s", err.message);
  ck_assert_ptr_null(record.path);
}

START_TEST(bad_records_are_refused) {
  refuse("", "standard input has no artefact record; did the tool before the pipe fail?");
  refuse("\n", "no artefact record");
  refuse("hello\n", "expected path, sha256 and kind, separated by tabs");
  refuse("%s\t%s\tmodel\tmore\n", "expected path, sha256 and kind");
  refuse("%s\tabc\tmodel\n", "sha256 is not 64 hexadecimal digits");
  refuse("%s\t%s\tdraft\n", "kind is 'draft', expected 'model'");
  refuse("{\"path\": \"%s\", \"sha256\": \"%s\"}\n", "artefact record: kind: missing");
  refuse("\t%2$s\tmodel\n", "the path is empty");
}
END_TEST

START_TEST(a_changed_or_missing_file_is_refused) {
  FILE *file = fopen(path, "a");
  fputc('d', file);
  fclose(file);
  refuse("%s\t%s\tmodel\n", "its record says ba7816bf8f01...");
  unlink(path);
  char line[256];
  struct us_record record;
  struct us_err err = {0};
  snprintf(line, sizeof line, "%s\t%s\tmodel\n", path, abc);
  ck_assert_int_eq(resolve_line(line, NULL, &record, &err), US_ERR_IO);
}
END_TEST

START_TEST(an_endless_line_is_refused) {
  FILE *in = tmpfile();
  for (int i = 0; i < 100000; i++) fputc('x', in);
  rewind(in);
  struct us_record record;
  struct us_err err = {0};
  ck_assert_int_eq(us_record_resolve("-", in, NULL, &record, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "artefact record: the line is too long");
  fclose(in);
}
END_TEST

/* The truth is the definition: SHA-256 of "digest  name\n" lines, hidden files left out. */
START_TEST(a_folder_hashes_as_its_listing) {
  char folder[] = "us_t_record_dir_XXXXXX", name[64], listing[256], expected[US_SHA256_HEX],
       got[US_SHA256_HEX];
  ck_assert_ptr_nonnull(mkdtemp(folder));
  static const char *const names[] = {"b", "a", ".hidden"};
  for (int i = 0; i < 3; i++) {
    snprintf(name, sizeof name, "%s/%s", folder, names[i]);
    FILE *file = fopen(name, "w");
    fputs("abc", file);
    fclose(file);
  }
  snprintf(listing, sizeof listing, "%s  a\n%s  b\n", abc, abc);
  uint8_t digest[US_SHA256_BYTES];
  ck_assert_int_eq(us_sha256_bytes(listing, strlen(listing), digest, NULL), US_OK);
  us_sha256_hex(digest, expected);
  ck_assert_int_eq(us_record_hash(folder, got, NULL), US_OK);
  ck_assert_str_eq(got, expected);
  for (int i = 0; i < 3; i++) {
    snprintf(name, sizeof name, "%s/%s", folder, names[i]);
    unlink(name);
  }
  rmdir(folder);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("record");
  tcase_add_checked_fixture(c, make_file, drop_file);
  tcase_add_test(c, what_is_printed_resolves_in_both_forms);
  tcase_add_test(c, tsv_record_is_path_tab_sha256_tab_kind);
  tcase_add_test(c, two_dashes_read_two_lines);
  tcase_add_test(c, a_path_is_taken_as_it_is);
  tcase_add_test(c, odd_names_survive);
  tcase_add_test(c, bad_records_are_refused);
  tcase_add_test(c, a_changed_or_missing_file_is_refused);
  tcase_add_test(c, an_endless_line_is_refused);
  tcase_add_test(c, a_folder_hashes_as_its_listing);
  return us_suite("record", c);
}
US_TEST_MAIN(make_suite)
