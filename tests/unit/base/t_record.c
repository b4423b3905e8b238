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

/* A scratch folder, and paths in it. */
static char folder[32], inside[64];

static const char *in_folder(const char *name) {
  snprintf(inside, sizeof inside, "%s/%s", folder, name);
  return inside;
}

static void make_folder(void) {
  strcpy(folder, "us_t_record_dir_XXXXXX");
  ck_assert_ptr_nonnull(mkdtemp(folder));
  ck_assert_int_eq(mkdir(in_folder("dflash"), 0777), 0);
}

static void drop_folder(void) {
  static const char *const files[] = {"a",           "b",   ".hidden", "dflash/c", "dflash/.hidden",
                                      "dflash/link", "pipe"};
  for (size_t i = 0; i < sizeof files / sizeof *files; i++) unlink(in_folder(files[i]));
  rmdir(in_folder("dflash"));
  rmdir(folder);
}

static void write_abc(const char *name) {
  FILE *file = fopen(in_folder(name), "w");
  ck_assert_ptr_nonnull(file);
  fputs("abc", file);
  fclose(file);
}

/* The truth is the definition: SHA-256 of "digest  name\n" lines. */
static void expect_listing(const char *path_of_folder, const char *const *names, size_t n) {
  char listing[1024] = "", expected[US_SHA256_HEX], got[US_SHA256_HEX];
  struct us_err err = {0};
  for (size_t i = 0; i < n; i++)
    snprintf(listing + strlen(listing), sizeof listing - strlen(listing), "%s  %s\n", abc, names[i]);
  uint8_t digest[US_SHA256_BYTES];
  ck_assert_int_eq(us_sha256_bytes(listing, strlen(listing), digest, NULL), US_OK);
  us_sha256_hex(digest, expected);
  ck_assert_msg(us_record_hash(path_of_folder, got, &err) == US_OK, "%s", err.message);
  ck_assert_str_eq(got, expected);
}

START_TEST(a_folder_hashes_as_its_listing) {
  static const char *const written[] = {"b", "a", ".hidden"}, *const listed[] = {"a", "b"};
  make_folder();
  for (size_t i = 0; i < 3; i++) write_abc(written[i]);
  expect_listing(folder, listed, 2);
  char with_slash[40];
  snprintf(with_slash, sizeof with_slash, "%s/", folder);
  expect_listing(with_slash, listed, 2);
  drop_folder();
}
END_TEST

/* As a model is published: with its drafter's folder inside. */
START_TEST(a_folder_in_a_folder_is_listed_where_its_name_stands) {
  static const char *const written[] = {"b", "a", "dflash/c", "dflash/.hidden"}, *const listed[] = {
                                                                                     "a", "b", "dflash/c"};
  make_folder();
  for (size_t i = 0; i < 4; i++) write_abc(written[i]);
  expect_listing(folder, listed, 3);
  drop_folder();
}
END_TEST

static void refuse_hash(const char *hashed, enum us_status status, const char *message) {
  char hex[US_SHA256_HEX];
  struct us_err err = {0};
  ck_assert_int_eq(us_record_hash(hashed, hex, &err), status);
  ck_assert_msg(strstr(err.message, message) != NULL, "%s", err.message);
}

START_TEST(what_has_no_end_is_not_hashed) {
  make_folder();
  ck_assert_int_eq(symlink("..", in_folder("dflash/link")), 0);
  refuse_hash(folder, US_ERR_INPUT, "' lies more than 8 folders deep");
  unlink(in_folder("dflash/link"));
  ck_assert_int_eq(symlink("gone", in_folder("dflash/link")), 0);
  refuse_hash(folder, US_ERR_IO, "cannot open '");
  unlink(in_folder("dflash/link"));
  ck_assert_int_eq(mkfifo(in_folder("pipe"), 0666), 0);
  refuse_hash(folder, US_ERR_INPUT, "/pipe' is neither a file nor a folder");
  refuse_hash(in_folder("pipe"), US_ERR_INPUT, "/pipe' is neither a file nor a folder");
  drop_folder();
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
  tcase_add_test(c, a_folder_in_a_folder_is_listed_where_its_name_stands);
  tcase_add_test(c, what_has_no_end_is_not_hashed);
  return us_suite("record", c);
}
US_TEST_MAIN(make_suite)
