/* t_alloc.c: the base modules when memory ends. */
#include "fail_alloc.h"

#include "base/atomic.h"
#include "base/buffer.h"
#include "base/json.h"
#include "base/opt.h"
#include "base/provenance.h"
#include "base/record.h"
#include "base/table.h"

#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char path[32];

static void make_file(void) {
  strcpy(path, "us_t_alloc_XXXXXX");
  int fd = mkstemp(path);
  ck_assert_int_eq((int)write(fd, "rate = 0.25\n", 12), 12);
  close(fd);
}

static void drop_file(void) {
  unlink(path);
}

static enum us_status parse_options(void *arg, struct us_err *err) {
  static const struct us_opt table[] = {US_OPT_NUM("rate", 0, "R", "rate", .def = "0.5"),
                                        US_OPT_STR("prompt", 'p', "TEXT", "text", .repeat = true),
                                        US_OPT_COMMON, US_OPT_END};
  char *argv[] = {(char *)"t", (char *)"-p", (char *)"a", (char *)"-pb", (char *)"--config", arg};
  struct us_opts *opts;
  enum us_status status = us_opts_parse(table, 6, argv, &opts, err);
  if (status != US_OK) return status;
  bool right = us_opt_num(opts, "rate") == 0.25 && us_opt_count(opts, "prompt") == 2;
  char *record = us_opts_record(opts);
  us_opts_free(opts);
  if (!record) return us_err_memory(err, "the record", 0);
  free(record);
  return right ? US_OK : us_err_set(err, US_ERR_CHECK, "an option was lost");
}

START_TEST(options) {
  us_fail_alloc(parse_options, path, US_FAIL_ALLOC_MAY_SUCCEED);
}
END_TEST

static enum us_status parse_json(void *arg, struct us_err *err) {
  const char *text = arg;
  json_t *root;
  enum us_status status = us_json_parse(text, strlen(text), "config.json", &root, err);
  if (status == US_OK) json_decref(root);
  return status;
}

START_TEST(json) {
  char text[] =
      "{\"a\": [1, 2.5, \"text\"], \"b\": {\"c\": \"a longer text than the first buffer of the lexer\"}}";
  us_fail_alloc(parse_json, text, US_FAIL_ALLOC_BALANCED);
}
END_TEST

static enum us_status make_provenance(struct us_provenance **ret_p, const char *rule, struct us_err *err) {
  char *argv[] = {(char *)"qat-quant", (char *)"a\xffz"};
  enum us_status status = us_provenance_create("qat-quant", 2, argv,
                                               "{\"n\": {\"value\": 1, \"by\": \"default\"}}", 1, ret_p, err);
  if (status != US_OK) return status;
  status = us_provenance_add_parent(*ret_p, "pico.h5", "", "model", err);
  if (status == US_OK) status = us_provenance_set_text(*ret_p, "scale_rule", rule, err);
  if (status == US_OK) status = us_provenance_set_json(*ret_p, "taps", "[1, 3]", err);
  if (status != US_OK) us_provenance_free(*ret_p);
  return status;
}

static enum us_status round_trip(struct us_provenance *p, struct us_provenance **ret_back,
                                 struct us_err *err) {
  char *text = us_provenance_text(p, err);
  if (!text) return err->status;
  enum us_status status = us_provenance_parse(text, strlen(text), "q.h5", ret_back, err);
  free(text);
  return status;
}

static enum us_status use_provenance(void *arg, struct us_err *err) {
  struct us_provenance *a, *b, *back = NULL;
  enum us_status status = make_provenance(&a, "mse", err);
  if (status != US_OK) return status;
  status = make_provenance(&b, "floor", err);
  if (status == US_OK) {
    status = round_trip(b, &back, err);
    us_provenance_free(b);
  }
  struct us_buffer lines = {0};
  size_t count = 0;
  if (status == US_OK) status = us_provenance_compare(a, back, &lines, &count, err);
  if (status == US_OK && (count != 1 || strcmp(lines.data, "scale_rule: mse, floor\n") != 0))
    status = us_err_set(err, US_ERR_CHECK, "%zu differences: %s", count, lines.data);
  us_buffer_release(&lines);
  us_provenance_free(back);
  us_provenance_free(a);
  return status;
}

START_TEST(provenance) {
  us_fail_alloc(use_provenance, NULL, US_FAIL_ALLOC_MAY_SUCCEED);
}
END_TEST

static enum us_status read_record(void *arg, struct us_err *err) {
  struct us_record record;
  enum us_status status = us_record_parse(arg, &record, err);
  us_record_release(&record);
  return status;
}

START_TEST(records) {
  char tsv[] = "q.h5\tba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad\tmodel\n";
  char object[] = "{\"path\": \"q.h5\", \"kind\": \"model\", "
                  "\"sha256\": \"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad\"}";
  us_fail_alloc(read_record, tsv, US_FAIL_ALLOC_BALANCED);
  us_fail_alloc(read_record, object, US_FAIL_ALLOC_BALANCED);
}
END_TEST

static char folder[32], nested[40], inside[64];

static void make_folder(void) {
  strcpy(folder, "us_t_alloc_dir_XXXXXX");
  ck_assert_ptr_nonnull(mkdtemp(folder));
  snprintf(nested, sizeof nested, "%s/d", folder);
  ck_assert_int_eq(mkdir(nested, 0777), 0);
  snprintf(inside, sizeof inside, "%s/a", nested);
  FILE *file = fopen(inside, "w");
  ck_assert_ptr_nonnull(file);
  fclose(file);
}

static void drop_folder(void) {
  unlink(inside);
  rmdir(nested);
  rmdir(folder);
}

static char expected[US_SHA256_HEX];

static enum us_status hash_file(void *arg, struct us_err *err) {
  char hex[US_SHA256_HEX];
  enum us_status status = us_record_hash(arg, hex, err);
  if (status != US_OK) return status;
  if (!expected[0]) memcpy(expected, hex, sizeof expected); /* the undisturbed run */
  return strcmp(hex, expected) == 0 ? US_OK : us_err_set(err, US_ERR_CHECK, "wrong digest %s", hex);
}

START_TEST(hashes) {
  expected[0] = 0;
  us_fail_alloc(hash_file, path, US_FAIL_ALLOC_KEEPS | US_FAIL_ALLOC_MAY_SUCCEED);
  make_folder();
  expected[0] = 0;
  us_fail_alloc(hash_file, folder, US_FAIL_ALLOC_KEEPS | US_FAIL_ALLOC_MAY_SUCCEED);
  drop_folder();
}
END_TEST

static enum us_status write_table(void *arg, struct us_err *err) {
  static const char *const columns[] = {"a"};
  struct us_table *table;
  enum us_status status = us_table_open(arg, columns, 1, false, &table, err);
  if (status != US_OK) return status;
  us_table_int(table, 1);
  return us_table_close(table, err);
}

START_TEST(tables) {
  FILE *out = tmpfile();
  us_fail_alloc(write_table, out, US_FAIL_ALLOC_BALANCED);
  fclose(out);
}
END_TEST

static enum us_status replace_file(void *arg, struct us_err *err) {
  struct us_atomic out;
  enum us_status status = us_atomic_open(arg, &out, err);
  if (status != US_OK) return status;
  if (!us_atomic_write(out.fd, "x", 1, 0)) status = us_err_errno(err, US_ERR_IO, "write");
  if (status == US_OK) return us_atomic_commit(&out, err);
  us_atomic_abandon(&out);
  return status;
}

START_TEST(atomic_files) {
  us_fail_alloc(replace_file, path, US_FAIL_ALLOC_MAY_SUCCEED);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("alloc");
  tcase_add_checked_fixture(c, make_file, drop_file);
  tcase_add_test(c, options);
  tcase_add_test(c, json);
  tcase_add_test(c, provenance);
  tcase_add_test(c, records);
  tcase_add_test(c, hashes);
  tcase_add_test(c, tables);
  tcase_add_test(c, atomic_files);
  return us_suite("alloc", c);
}
US_TEST_MAIN(make_suite)
