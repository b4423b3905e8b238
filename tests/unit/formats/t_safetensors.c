/* t_safetensors: a file of the reference library, our own files in every cut, and everything that must be
 * refused. */
#include "formats/safetensors.h"

#include "fixture.h"
#include "gauss.h"
#include "suite.h"

#include <signal.h>
#include <string.h>
#include <sys/resource.h>

/* ---- a file in memory, for bad input ---- */

static uint8_t memory[1 << 20];

/* header (JSON) and data_bytes zero bytes as a file; returns its size. */
static size_t make_file(const char *header, size_t data_bytes) {
  size_t n = strlen(header);
  ck_assert(8 + n + data_bytes <= sizeof memory);
  for (int i = 0; i < 8; i++) memory[i] = (uint8_t)(n >> (8 * i));
  memcpy(memory + 8, header, n);
  memset(memory + 8 + n, 0, data_bytes);
  return 8 + n + data_bytes;
}

static void refuse_bytes(const uint8_t *bytes, size_t n, const char *message) {
  struct us_safetensors *st = NULL;
  struct us_err err = {0};
  ck_assert_int_eq(us_safetensors_open_memory(bytes, n, "bad.safetensors", &st, &err), US_ERR_INPUT);
  ck_assert_ptr_null(st);
  ck_assert_msg(strncmp(err.message, "bad.safetensors: ", 17) == 0 && strstr(err.message, message) != NULL,
                "'%s', expected '%s'", err.message, message);
  ck_assert_ptr_null(strchr(err.message, '\n'));
}

static void refuse(const char *header, size_t data_bytes, const char *message) {
  refuse_bytes(memory, make_file(header, data_bytes), message);
}

static void accept(const char *header, size_t data_bytes, size_t tensors) {
  struct us_safetensors *st = NULL;
  struct us_err err = {0};
  enum us_status status = us_safetensors_open_memory(memory, make_file(header, data_bytes), "x", &st, &err);
  ck_assert_msg(status == US_OK, "%s", err.message);
  ck_assert_uint_eq(us_safetensors_count(st), tensors);
  us_safetensors_close(st);
}

#define F32_4(name, begin, end)                                                                              \
  "\"" name "\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[" begin "," end "]}"

START_TEST(tensors_must_cover_the_data_without_overlap_or_hole) {
  accept("{" F32_4("a", "0", "16") "," F32_4("b", "16", "32") "}", 32, 2);
  accept("{" F32_4("b", "16", "32") "," F32_4("a", "0", "16") "}", 32, 2); /* any order in the header */
  refuse("{" F32_4("a", "0", "16") "," F32_4("b", "12", "28") "}", 28, "b: begins at byte 12, overlapping");
  refuse("{" F32_4("a", "0", "16") "," F32_4("b", "0", "16") "}", 16, "b: begins at byte 0, overlapping");
  refuse("{" F32_4("a", "0", "16") "," F32_4("b", "20", "36") "}", 36,
         "b: begins at byte 20, leaving a hole");
  refuse("{" F32_4("a", "4", "20") "}", 20, "a: begins at byte 4, leaving a hole");
  refuse("{" F32_4("a", "0", "16") "}", 17, "tensors end at byte 16 of 17");
  refuse("{}", 1, "tensors end at byte 0 of 1");
  accept("{}", 0, 0);
}
END_TEST

START_TEST(offsets_must_lie_inside_and_match_dtype_times_shape) {
  refuse("{" F32_4("a", "0", "16") "}", 15, "a: data_offsets lie outside the file");
  refuse("{" F32_4("a", "-16", "0") "}", 16, "a: data_offsets lie outside the file");
  refuse("{" F32_4("a", "16", "0") "}", 16, "a: data_offsets lie outside the file");
  refuse("{" F32_4("a", "0", "12") "}", 12, "a: data_offsets differ from dtype times shape");
  refuse("{" F32_4("a", "0", "9223372036854775807") "}", 16, "outside the file");
  refuse("{" F32_4("a", "0", "9223372036854775808") "}", 16, "header: ");
  refuse("{" F32_4("a", "0", "16.0") "}", 16, "not a pair of integers");
  refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,1]}}", 1, "not a pair of integers");
  refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":0}}", 1, "not a pair of integers");
}
END_TEST

START_TEST(shapes_that_overflow_or_are_no_shapes_are_refused) {
  refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0,
         "overflows");
  refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}", 0,
         "overflows");
  refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[0,4611686018427387904,8],\"data_offsets\":[0,4]}}", 4,
         "differ from");
  refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4, "not a size");
  refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}", 4, "not a size");
  refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":4,\"data_offsets\":[0,16]}}", 16, "shape is not an array");
  refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1, "more than 8");
  accept("{\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}", 1, 1);
  accept("{\"a\":{\"dtype\":\"U8\",\"shape\":[0,5],\"data_offsets\":[0,0]}}", 0, 1);
}
END_TEST

START_TEST(entries_with_a_bad_dtype_or_other_fields_are_refused) {
  refuse("{\"a\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "a: dtype is unknown");
  refuse("{\"a\":{\"dtype\":4,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "a: dtype is unknown");
  refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "entry is not {dtype, shape, data_offsets}");
  refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":1}}", 1, "entry is not");
  refuse("{\"a\":[]}", 0, "entry is not");
}
END_TEST

START_TEST(names_are_unique_short_and_printable) {
  refuse("{" F32_4("a", "0", "16") "," F32_4("a", "16", "32") "}", 32, "duplicate object key");
  refuse("{\"\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "tensor name is empty");
  refuse("{\"a\\nb\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "control characters");
  refuse("{\"a\\u0000b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "header: ");
  refuse("{\"\xff\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "header: ");
  for (int length = 512; length <= 513; length++) {
    char header[700], name[514];
    memset(name, 'n', sizeof name);
    name[length] = 0;
    snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", name);
    if (length == 512)
      accept(header, 1, 1);
    else
      refuse(header, 1, "too long");
  }
}
END_TEST

START_TEST(a_header_that_is_no_json_object_or_too_long_is_refused) {
  refuse("[]", 0, "header does not begin with {");
  refuse("", 0, "header does not begin with {");
  refuse(" {}", 0, "header does not begin with {");
  refuse("{\"a\":", 0, "header: ");
  refuse("{\"a\":\n\n\001", 0, "header: ");
  refuse("{} x", 0, "header: ");
  refuse("{\"__metadata__\":{\"a\":1}}", 0, "__metadata__ holds a non-string");
  refuse("{\"__metadata__\":3}", 0, "__metadata__ is not an object");
  accept("{\"__metadata__\":{\"a\":\"b\"}}   ", 0, 0);
  size_t n = make_file("{}", 0);
  memory[0] = 3;
  refuse_bytes(memory, n, "header of 3 bytes in a file of 10");
  memory[7] = 0xff;
  refuse_bytes(memory, n, "in a file of 10");
  for (size_t cut = 0; cut < 8; cut++) refuse_bytes(memory, cut, "too few");
}
END_TEST

START_TEST(a_header_above_the_cap_is_refused_before_it_is_parsed) {
  size_t n = 8 + US_SAFETENSORS_MAX_HEADER + 1;
  uint8_t *bytes = calloc(n, 1);
  for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)((US_SAFETENSORS_MAX_HEADER + 1) >> (8 * i));
  refuse_bytes(bytes, n, "header of 100000001 bytes");
  free(bytes);
}
END_TEST

START_TEST(deep_json_is_refused) {
  static char header[400000];
  const char *start = "{\"a\":";
  memset(header, '[', sizeof header - 1);
  memcpy(header, start, strlen(start));
  refuse(header, 0, "header: ");
}
END_TEST

START_TEST(every_prefix_of_a_real_file_is_refused) {
  size_t n;
  uint8_t *bytes = test_read(test_fixture("reference.safetensors"), &n);
  for (size_t cut = 0; cut < n; cut++) {
    uint8_t *part = malloc(cut + 1);
    memcpy(part, bytes, cut);
    refuse_bytes(part, cut, "");
    free(part);
  }
  free(bytes);
}
END_TEST

START_TEST(mutated_files_never_lead_outside_their_bytes) {
  size_t n;
  uint8_t *bytes = test_read(test_fixture("reference.safetensors"), &n), *copy = malloc(n);
  uint64_t state = us_test_seed();
  for (int round = 0; round < 20000; round++) {
    memcpy(copy, bytes, n);
    for (int i = 0; i <= round % 3; i++) copy[test_next(&state) % n] = (uint8_t)test_next(&state);
    struct us_safetensors *st = NULL;
    struct us_err err = {0};
    if (us_safetensors_open_memory(copy, n, "x", &st, &err) != US_OK) continue;
    for (size_t i = 0; i < us_safetensors_count(st); i++) {
      const struct us_safetensor *t = us_safetensors_at(st, i);
      const uint8_t *data = t->data;
      ck_assert(data >= copy && t->bytes <= n && data + t->bytes <= copy + n);
      ck_assert_ptr_eq(us_safetensors_find(st, t->name), t);
    }
    us_safetensors_close(st);
  }
  free(bytes), free(copy);
}
END_TEST

/* ---- a file of the reference library ---- */

START_TEST(a_file_of_the_reference_library_is_read) {
  static const struct {
    const char *name;
    enum us_dtype dtype;
  } expected[] = {{"bool", US_DTYPE_BOOL}, {"u8", US_DTYPE_U8},           {"i8", US_DTYPE_I8},
                  {"i16", US_DTYPE_I16},   {"i32", US_DTYPE_I32},         {"i64", US_DTYPE_I64},
                  {"f16", US_DTYPE_F16},   {"bf16", US_DTYPE_BF16},       {"f32", US_DTYPE_F32},
                  {"f64", US_DTYPE_F64},   {"f8_e4m3", US_DTYPE_F8_E4M3}, {"f8_e5m2", US_DTYPE_F8_E5M2}};
  struct us_safetensors *st = NULL;
  struct us_err err = {0};
  const uint64_t dims[] = {3, 4}, none[] = {0, 7}, three[] = {3};
  ck_assert_msg(us_safetensors_open(test_fixture("reference.safetensors"), &st, &err) == US_OK, "%s",
                err.message);
  ck_assert_uint_eq(us_safetensors_count(st), 15);
  for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
    const struct us_safetensor *t = us_safetensors_find(st, expected[i].name);
    ck_assert_ptr_nonnull(t);
    ck_assert_int_eq(us_safetensor_expect(t, expected[i].dtype, 2, dims, &err), US_OK);
    ck_assert_uint_eq(t->bytes, 12 * us_dtype_bytes(expected[i].dtype));
  }
  ck_assert_int_eq(us_safetensor_expect(us_safetensors_find(st, "empty"), US_DTYPE_F32, 2, none, &err),
                   US_OK);
  ck_assert_int_eq(us_safetensor_expect(us_safetensors_find(st, "scalar"), US_DTYPE_F32, 0, NULL, &err),
                   US_OK);
  const struct us_safetensor *e8m0 = us_safetensors_find(st, "f8_e8m0");
  ck_assert_int_eq(us_safetensor_expect(e8m0, US_DTYPE_F8_E8M0, 1, three, &err), US_OK);
  ck_assert(memcmp(e8m0->data, "\x7f\x80\x81", 3) == 0);
  for (int i = 0; i < 12; i++) {
    float x;
    int64_t k;
    memcpy(&x, (const char *)us_safetensors_find(st, "f32")->data + 4 * i, 4);
    memcpy(&k, (const char *)us_safetensors_find(st, "i64")->data + 8 * i, 8);
    ck_assert_float_eq(x, (float)i / 8);
    ck_assert_int_eq(k, i - 6);
  }
  ck_assert_str_eq(us_safetensors_metadata(st, "format"), "pt");
  ck_assert_str_eq(us_safetensors_metadata(st, "note"), "caf\xc3\xa9");
  ck_assert_ptr_null(us_safetensors_metadata(st, "nothing"));
  ck_assert_ptr_null(us_safetensors_find(st, "nothing"));
  ck_assert_ptr_null(us_safetensors_at(st, 15));
  us_safetensors_close(st);
}
END_TEST

START_TEST(an_unexpected_shape_or_dtype_is_named_with_file_and_tensor) {
  struct us_safetensors *st = NULL;
  struct us_err err = {0};
  const uint64_t dims[] = {4, 3};
  ck_assert_int_eq(us_safetensors_open(test_fixture("reference.safetensors"), &st, &err), US_OK);
  ck_assert_int_eq(us_safetensor_expect(us_safetensors_find(st, "bf16"), US_DTYPE_F32, 2, dims, &err),
                   US_ERR_INPUT);
  ck_assert_ptr_nonnull(
      strstr(err.message, "reference.safetensors: bf16: is BF16 [3, 4], expected F32 [4, 3]"));
  us_safetensors_close(st);
}
END_TEST

/* ---- writing ---- */

enum { TENSORS = 9 };

/* Tensor i: U8 of i * 100 bytes (the first is empty), all bytes i. */
static void write_tensors(const char *path, uint64_t limit, int commit) {
  struct us_safetensors_writer *writer = NULL;
  struct us_err err = {0};
  ck_assert_msg(us_safetensors_writer_create(path, &writer, &err) == US_OK, "%s", err.message);
  ck_assert_int_eq(us_safetensors_writer_metadata(writer, "format", "pt \"quoted\"\n", &err), US_OK);
  for (int i = 0; i < TENSORS; i++) {
    char name[32];
    uint64_t dims[] = {(uint64_t)i, 100};
    snprintf(name, sizeof name, "t.%d.weight", i);
    ck_assert_int_eq(us_safetensors_writer_declare(writer, name, US_DTYPE_U8, 2, dims, &err), US_OK);
  }
  ck_assert_msg(us_safetensors_writer_begin(writer, limit, &err) == US_OK, "%s", err.message);
  uint8_t bytes[3600];
  size_t used = 0;
  for (int i = 0; i < TENSORS; i++)
    for (int k = 0; k < i * 100; k++) bytes[used++] = (uint8_t)i;
  for (size_t at = 0; at < used;) { /* pieces that span tensors and shards */
    size_t piece = used - at < 237 ? used - at : 237;
    ck_assert_msg(us_safetensors_writer_write(writer, bytes + at, piece, &err) == US_OK, "%s", err.message);
    at += piece;
  }
  if (commit) ck_assert_msg(us_safetensors_writer_commit(writer, &err) == US_OK, "%s", err.message);
  us_safetensors_writer_free(writer);
}

static void check_tensors(const char *path) {
  struct us_safetensors *st = NULL;
  struct us_err err = {0};
  ck_assert_msg(us_safetensors_open(path, &st, &err) == US_OK, "%s", err.message);
  ck_assert_uint_eq(us_safetensors_count(st), TENSORS);
  ck_assert_str_eq(us_safetensors_metadata(st, "format"), "pt \"quoted\"\n");
  for (int i = 0; i < TENSORS; i++) {
    char name[32];
    const uint64_t dims[] = {(uint64_t)i, 100};
    snprintf(name, sizeof name, "t.%d.weight", i);
    const struct us_safetensor *t = us_safetensors_find(st, name);
    ck_assert_ptr_nonnull(t);
    ck_assert_int_eq(us_safetensor_expect(t, US_DTYPE_U8, 2, dims, &err), US_OK);
    for (size_t k = 0; k < t->bytes; k++) ck_assert_uint_eq(((const uint8_t *)t->data)[k], i);
  }
  us_safetensors_close(st);
}

static int count_files(const char *folder) {
  char command[400];
  snprintf(command, sizeof command, "ls -A '%s' | wc -l", folder);
  FILE *pipe = popen(command, "r");
  int count = -1;
  ck_assert_int_eq(fscanf(pipe, "%d", &count), 1);
  pclose(pipe);
  return count;
}

START_TEST(any_shard_size_reads_back_the_same) {
  static const struct {
    uint64_t limit;
    int files; /* the index included */
  } cases[] = {{0, 1}, {3600, 1}, {3599, 3}, {1000, 6}, {1, 9}, {850, 7}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char folder[256], out[300];
    test_folder(folder);
    snprintf(out, sizeof out, "%s/model", folder);
    write_tensors(out, cases[i].limit, 1);
    check_tensors(out);
    ck_assert_int_eq(count_files(out), cases[i].files);
    test_remove(folder);
  }
}
END_TEST

START_TEST(a_single_file_is_aligned_and_its_data_too) {
  char folder[256], path[300];
  size_t n;
  test_folder(folder);
  snprintf(path, sizeof path, "%s/one.safetensors", folder);
  write_tensors(path, 1, 1); /* the limit does not cut a single file */
  check_tensors(path);
  ck_assert_int_eq(count_files(folder), 1);
  uint8_t *bytes = test_read(path, &n);
  ck_assert_uint_eq((n - 3600) % 64, 0);
  free(bytes);
  test_remove(folder);
}
END_TEST

START_TEST(the_index_has_the_total_size_and_lists_every_tensor) {
  char folder[256], path[320];
  size_t n;
  test_folder(folder);
  write_tensors(folder, 1000, 1);
  snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
  uint8_t *bytes = test_read(path, &n);
  bytes[n] = 0;
  ck_assert_ptr_nonnull(strstr((char *)bytes, "\"total_size\": 3600"));
  ck_assert_ptr_nonnull(strstr((char *)bytes, "\"t.8.weight\": \"model-00005-of-00005.safetensors\""));
  free(bytes);
  test_remove(folder);
}
END_TEST

START_TEST(without_a_commit_nothing_is_left) {
  char folder[256];
  test_folder(folder);
  write_tensors(folder, 1000, 0);
  ck_assert_int_eq(count_files(folder), 0);
  test_remove(folder);
}
END_TEST

START_TEST(an_existing_file_stays_whole_until_the_commit) {
  char folder[256], path[300];
  size_t n;
  test_folder(folder);
  snprintf(path, sizeof path, "%s/one.safetensors", folder);
  test_write(path, "old", 3);
  write_tensors(path, 0, 0);
  uint8_t *bytes = test_read(path, &n);
  ck_assert(n == 3 && memcmp(bytes, "old", 3) == 0);
  write_tensors(path, 0, 1);
  check_tensors(path);
  free(bytes);
  test_remove(folder);
}
END_TEST

START_TEST(the_writer_refuses_what_would_not_be_a_file) {
  char folder[256], path[300];
  struct us_safetensors_writer *writer = NULL;
  struct us_err err = {0};
  const uint64_t four[] = {4}, huge[] = {UINT64_MAX / 2, 4};
  char name[600];
  memset(name, 'n', sizeof name);
  name[513] = 0;
  test_folder(folder);
  snprintf(path, sizeof path, "%s/one.safetensors", folder);
  ck_assert_int_eq(us_safetensors_writer_create(path, &writer, &err), US_OK);
  ck_assert_int_eq(us_safetensors_writer_declare(writer, "", US_DTYPE_U8, 1, four, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_safetensors_writer_declare(writer, name, US_DTYPE_U8, 1, four, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_safetensors_writer_declare(writer, "__metadata__", US_DTYPE_U8, 1, four, &err),
                   US_ERR_USAGE);
  ck_assert_int_eq(us_safetensors_writer_declare(writer, "\xff", US_DTYPE_U8, 1, four, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_safetensors_writer_declare(writer, "a", US_DTYPE_COUNT, 1, four, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_safetensors_writer_declare(writer, "a", US_DTYPE_F32, 2, huge, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_safetensors_writer_declare(writer, "a", US_DTYPE_U8, 1, four, &err), US_OK);
  ck_assert_int_eq(us_safetensors_writer_write(writer, "abcd", 4, &err), US_ERR_USAGE); /* before begin */
  ck_assert_int_eq(us_safetensors_writer_begin(writer, 0, &err), US_OK);
  ck_assert_int_eq(us_safetensors_writer_declare(writer, "b", US_DTYPE_U8, 1, four, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_safetensors_writer_commit(writer, &err), US_ERR_USAGE); /* bytes are missing */
  ck_assert_int_eq(us_safetensors_writer_write(writer, "abcde", 5, &err), US_ERR_USAGE);
  us_safetensors_writer_free(writer);
  ck_assert_int_eq(us_safetensors_writer_create(path, &writer, &err), US_OK);
  ck_assert_int_eq(us_safetensors_writer_declare(writer, "a", US_DTYPE_U8, 1, four, &err), US_OK);
  ck_assert_int_eq(us_safetensors_writer_declare(writer, "a", US_DTYPE_U8, 1, four, &err), US_OK);
  ck_assert_int_eq(us_safetensors_writer_begin(writer, 0, &err), US_ERR_USAGE);
  ck_assert_ptr_nonnull(strstr(err.message, "a: declared twice"));
  us_safetensors_writer_free(writer);
  ck_assert_int_eq(count_files(folder), 0);
  test_remove(folder);
}
END_TEST

START_TEST(a_folder_that_cannot_be_created_is_an_io_error) {
  struct us_safetensors_writer *writer = NULL;
  struct us_err err = {0};
  ck_assert_int_eq(us_safetensors_writer_create("/proc/us-no-such-folder", &writer, &err), US_ERR_IO);
  ck_assert_ptr_null(writer);
  ck_assert_ptr_nonnull(strstr(err.message, "cannot create"));
}
END_TEST

START_TEST(a_disk_that_takes_no_more_is_an_io_error_and_leaves_nothing) {
  char folder[256];
  struct us_safetensors_writer *writer = NULL;
  struct us_err err = {0};
  struct rlimit before, small;
  const uint64_t dims[] = {5000};
  static const uint8_t bytes[5000];
  test_folder(folder);
  ck_assert_int_eq(us_safetensors_writer_create(folder, &writer, &err), US_OK);
  ck_assert_int_eq(us_safetensors_writer_declare(writer, "a", US_DTYPE_U8, 1, dims, &err), US_OK);
  ck_assert_int_eq(us_safetensors_writer_begin(writer, 0, &err), US_OK);
  getrlimit(RLIMIT_FSIZE, &before);
  small = before;
  small.rlim_cur = 2000;
  signal(SIGXFSZ, SIG_IGN);
  setrlimit(RLIMIT_FSIZE, &small);
  enum us_status status = us_safetensors_writer_write(writer, bytes, sizeof bytes, &err);
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, SIG_DFL);
  ck_assert_int_eq(status, US_ERR_IO);
  ck_assert_ptr_nonnull(strstr(err.message, "model.safetensors: cannot write: "));
  ck_assert_int_eq(us_safetensors_writer_commit(writer, &err), US_ERR_USAGE);
  us_safetensors_writer_free(writer);
  ck_assert_int_eq(count_files(folder), 0);
  test_remove(folder);
}
END_TEST

/* ---- indexes and folders ---- */

static void refuse_index(const char *folder, const char *json, const char *message) {
  char path[320];
  struct us_safetensors *st = NULL;
  struct us_err err = {0};
  snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
  test_write(path, json, strlen(json));
  ck_assert_int_ne(us_safetensors_open(folder, &st, &err), US_OK);
  ck_assert_ptr_null(st);
  ck_assert_msg(strstr(err.message, message) != NULL, "'%s', expected '%s'", err.message, message);
}

START_TEST(a_bad_index_is_refused) {
  char folder[256];
  test_folder(folder);
  write_tensors(folder, 1000, 1);
  refuse_index(folder, "{", "index.json: column 1: ");
  refuse_index(folder, "{}      ", "weight_map is missing");
  refuse_index(folder, "{\"weight_map\":{}}", "names 0 shards");
  refuse_index(folder, "{\"weight_map\":{\"a\":3}}", "not a .safetensors file name");
  refuse_index(folder, "{\"weight_map\":{\"a\":\"../x.safetensors\"}}", "not a .safetensors file name");
  refuse_index(folder, "{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "not a .safetensors file name");
  refuse_index(folder, "{\"weight_map\":{\"a\":\"missing.safetensors\"}}",
               "missing.safetensors': No such file");
  refuse_index(folder, "{\"weight_map\":{\"a\":\"model-00001-of-00005.safetensors\"}}",
               "a: not in model-00001");
  refuse_index(folder, "{\"weight_map\":{\"t.8.weight\":\"model-00001-of-00005.safetensors\"}}",
               "t.8.weight: not in");
  refuse_index(folder,
               "{\"weight_map\":{\"t.1.weight\":\"model-00001-of-00005.safetensors\"},\"weight_map\":{}}",
               "duplicate object key");
  test_remove(folder);
}
END_TEST

START_TEST(tensors_that_the_index_does_not_name_are_left_out) {
  char folder[256], path[320];
  struct us_safetensors *st = NULL;
  struct us_err err = {0};
  const char *json = "{\"weight_map\":{\"t.2.weight\":\"model-00001-of-00005.safetensors\"}}";
  test_folder(folder);
  write_tensors(folder, 1000, 1);
  snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
  test_write(path, json, strlen(json));
  ck_assert_msg(us_safetensors_open(path, &st, &err) == US_OK, "%s", err.message);
  ck_assert_uint_eq(us_safetensors_count(st), 1);
  ck_assert_ptr_nonnull(us_safetensors_find(st, "t.2.weight"));
  us_safetensors_close(st);
  test_remove(folder);
}
END_TEST

START_TEST(a_folder_is_read_only_if_it_is_clear_which_files_are_meant) {
  char folder[256], path[320];
  struct us_safetensors *st = NULL;
  struct us_err err = {0};
  test_folder(folder);
  ck_assert_int_eq(us_safetensors_open(folder, &st, &err), US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, "no model.safetensors"));
  snprintf(path, sizeof path, "%s/draft.safetensors", folder);
  write_tensors(path, 0, 1);
  check_tensors(folder); /* the only one */
  snprintf(path, sizeof path, "%s/other.safetensors", folder);
  write_tensors(path, 0, 1);
  ck_assert_int_eq(us_safetensors_open(folder, &st, &err), US_ERR_INPUT); /* which? */
  snprintf(path, sizeof path, "%s/model.safetensors", folder);
  write_tensors(path, 0, 1);
  check_tensors(folder);
  ck_assert_int_eq(us_safetensors_open("/no/such/folder", &st, &err), US_ERR_IO);
  ck_assert_int_eq(us_safetensors_open("/dev/null", &st, &err), US_ERR_INPUT);
  test_remove(folder);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("safetensors");
  tcase_add_test(c, tensors_must_cover_the_data_without_overlap_or_hole);
  tcase_add_test(c, offsets_must_lie_inside_and_match_dtype_times_shape);
  tcase_add_test(c, shapes_that_overflow_or_are_no_shapes_are_refused);
  tcase_add_test(c, entries_with_a_bad_dtype_or_other_fields_are_refused);
  tcase_add_test(c, names_are_unique_short_and_printable);
  tcase_add_test(c, a_header_that_is_no_json_object_or_too_long_is_refused);
  tcase_add_test(c, a_header_above_the_cap_is_refused_before_it_is_parsed);
  tcase_add_test(c, deep_json_is_refused);
  tcase_add_test(c, every_prefix_of_a_real_file_is_refused);
  tcase_add_test(c, mutated_files_never_lead_outside_their_bytes);
  tcase_add_test(c, a_file_of_the_reference_library_is_read);
  tcase_add_test(c, an_unexpected_shape_or_dtype_is_named_with_file_and_tensor);
  tcase_add_test(c, any_shard_size_reads_back_the_same);
  tcase_add_test(c, a_single_file_is_aligned_and_its_data_too);
  tcase_add_test(c, the_index_has_the_total_size_and_lists_every_tensor);
  tcase_add_test(c, without_a_commit_nothing_is_left);
  tcase_add_test(c, an_existing_file_stays_whole_until_the_commit);
  tcase_add_test(c, the_writer_refuses_what_would_not_be_a_file);
  tcase_add_test(c, a_folder_that_cannot_be_created_is_an_io_error);
  tcase_add_test(c, a_disk_that_takes_no_more_is_an_io_error_and_leaves_nothing);
  tcase_add_test(c, a_bad_index_is_refused);
  tcase_add_test(c, tensors_that_the_index_does_not_name_are_left_out);
  tcase_add_test(c, a_folder_is_read_only_if_it_is_clear_which_files_are_meant);
  return us_suite("safetensors", c);
}
US_TEST_MAIN(make_suite)
