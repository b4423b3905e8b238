/* t_h5.c: HDF5 artefacts. The independent truth is libhdf5, which reads what we wrote and writes what we must refuse.
 *
 * Contents: helpers, round trips, atomicity, damage, hostile files.
 */
#include "base/h5.h"
#include "base/h5_block.h"
#include "suite.h"

#include <dirent.h>
#include <fcntl.h>
#include <hdf5.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* -- Helpers -- */

static char folder[64], path[128];
static struct us_err err;

static void make_folder(void) {
  strcpy(folder, "/tmp/us_t_h5_XXXXXX");
  ck_assert_ptr_nonnull(mkdtemp(folder));
  snprintf(path, sizeof path, "%s/a.h5", folder);
  err = (struct us_err){0};
}

static int count_files(void) {
  DIR *dir = opendir(folder);
  int count = 0;
  for (struct dirent *entry; (entry = readdir(dir));) count += entry->d_name[0] != '.';
  closedir(dir);
  return count;
}

static void remove_folder(void) {
  DIR *dir = opendir(folder);
  for (struct dirent *entry; (entry = readdir(dir));) unlinkat(dirfd(dir), entry->d_name, 0);
  closedir(dir);
  rmdir(folder);
}

#define OK(call) ck_assert_msg((call) == US_OK, "%s", err.message)

static struct us_h5_writer *create(void) {
  struct us_h5_writer *writer;
  OK(us_h5_create(path, "test", &writer, &err));
  return writer;
}

static const float floats[6] = {1, -2, 3.5f, 4, 5, 6};
static const uint16_t halves[3] = {0x3f80, 0x4000, 0xff80};

static void write_sample(void) {
  struct us_h5_writer *writer = create();
  OK(us_h5_put_text(writer, "provenance", "{\"tool\": \"t_h5\"}", &err));
  OK(us_h5_put(writer, "layers.0/attn/f", US_H5_F32, 2, (size_t[]){2, 3}, floats, &err));
  OK(us_h5_put(writer, "layers.0/b", US_H5_BF16, 1, (size_t[]){3}, halves, &err));
  OK(us_h5_put(writer, "top", US_H5_I64, 1, (size_t[]){1}, (int64_t[]){-5}, &err));
  OK(us_h5_finish(writer, &err));
}

static uint8_t *read_file(size_t *ret_size) {
  int fd = open(path, O_RDONLY);
  struct stat info;
  ck_assert(fd >= 0 && fstat(fd, &info) == 0);
  uint8_t *bytes = malloc((size_t)info.st_size + 1);
  ck_assert_int_eq(read(fd, bytes, (size_t)info.st_size), info.st_size);
  close(fd);
  *ret_size = (size_t)info.st_size;
  return bytes;
}

static void write_file(const uint8_t *bytes, size_t size) {
  int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  ck_assert_int_eq(write(fd, bytes, size), (ssize_t)size);
  close(fd);
}

/* Open, expecting a refusal with `text` in its message. */
static void expect_refusal(const char *text) {
  struct us_h5 *file = NULL;
  err = (struct us_err){0};
  ck_assert_msg(us_h5_open(path, NULL, &file, &err) == US_ERR_INPUT, "status %d, %s", err.status,
                err.message);
  ck_assert_ptr_null(file);
  ck_assert_msg(strstr(err.message, text) != NULL, "'%s' does not say '%s'", err.message, text);
  ck_assert_msg(strstr(err.message, path) == err.message, "'%s' does not name the file", err.message);
}

/* Put the hash right again after a change. */
static void reseal(uint8_t *bytes) {
  struct us_h5_block block = {.file_bytes = us_h5_load(bytes + 48, 8),
                              .table_offset = us_h5_load(bytes + 56, 8),
                              .extents = us_h5_load(bytes + 64, 8)};
  OK(us_h5_block_hash(bytes, bytes, &block, bytes + US_H5_SHA_AT, &err));
}

static uint8_t *find_bytes(uint8_t *bytes, size_t size, const void *what, size_t length, int skip) {
  for (uint8_t *at = bytes; (at = memmem(at, size - (size_t)(at - bytes), what, length)); at++)
    if (skip-- == 0) return at;
  ck_abort_msg("pattern not found");
  return NULL;
}

/* -- Round trips -- */

START_TEST(every_type_comes_back_as_it_was) {
  make_folder();
  uint8_t data[64];
  for (int i = 0; i < 64; i++) data[i] = (uint8_t)(i * 37 + 1);
  struct us_h5_writer *writer = create();
  for (int t = 0; t < US_H5_TYPE_COUNT; t++)
    OK(us_h5_put(writer, us_h5_type_name(t), t, 3, (size_t[]){2, 1, 3}, data, &err));
  OK(us_h5_finish(writer, &err));
  struct us_h5 *file;
  OK(us_h5_open(path, "test", &file, &err));
  ck_assert_str_eq(us_h5_kind(file), "test");
  for (int t = 0; t < US_H5_TYPE_COUNT; t++) {
    const struct us_h5_dataset *d;
    OK(us_h5_get(file, us_h5_type_name(t), t, 3, (size_t[]){2, 0, 3}, &d, &err));
    ck_assert_uint_eq(d->count, 6);
    ck_assert_uint_eq(d->bytes, 6 * us_h5_type_size(t));
    ck_assert_mem_eq(d->data, data, d->bytes);
    ck_assert_uint_eq((uintptr_t)d->data % US_H5_ALIGNMENT, 0);
  }
  us_h5_close(file);
  remove_folder();
}
END_TEST

START_TEST(libhdf5_reads_the_same) {
  make_folder();
  write_sample();
  hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
  ck_assert(file >= 0);
  hid_t dataset = H5Dopen2(file, "layers.0/attn/f", H5P_DEFAULT);
  float back[6];
  ck_assert(H5Dread(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, back) >= 0);
  ck_assert_mem_eq(back, floats, sizeof back);
  ck_assert(H5Aexists_by_name(file, "layers.0/b", "format", H5P_DEFAULT) > 0);
  hid_t attribute = H5Aopen(file, "provenance", H5P_DEFAULT);
  char text[64] = {0};
  hid_t type = H5Aget_type(attribute);
  ck_assert(H5Aread(attribute, type, text) >= 0);
  ck_assert_str_eq(text, "{\"tool\": \"t_h5\"}");
  H5Tclose(type);
  H5Aclose(attribute);
  H5Dclose(dataset);
  H5Fclose(file);
  remove_folder();
}
END_TEST

START_TEST(pieces_in_any_order_make_a_whole) {
  make_folder();
  struct us_h5_writer *writer = create();
  size_t slot;
  OK(us_h5_reserve(writer, "x", US_H5_F32, 2, (size_t[]){3, 3}, &slot, &err));
  OK(us_h5_write(writer, slot, 6, 3, floats + 3, &err));
  OK(us_h5_write(writer, slot, 0, 3, floats, &err));
  ck_assert_int_eq(us_h5_write(writer, slot, 7, 3, floats, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_h5_write(writer, slot, SIZE_MAX, 2, floats, &err), US_ERR_USAGE);
  OK(us_h5_finish(writer, &err));
  struct us_h5 *file;
  OK(us_h5_open(path, NULL, &file, &err));
  const float expected[9] = {1, -2, 3.5f, 0, 0, 0, 4, 5, 6};
  ck_assert_mem_eq(us_h5_find(file, "x")->data, expected, sizeof expected);
  us_h5_close(file);
  remove_folder();
}
END_TEST

START_TEST(a_stream_has_as_many_rows_as_were_appended) {
  make_folder();
  struct us_h5_writer *writer = create();
  size_t log, none;
  OK(us_h5_stream(writer, "log/loss", US_H5_F32, 2, (size_t[]){0, 2}, &log, &err));
  OK(us_h5_stream(writer, "log/none", US_H5_I32, 1, (size_t[]){0}, &none, &err));
  float expected[400000];
  for (int i = 0; i < 400000; i++) expected[i] = (float)i / 3;
  for (size_t row = 0, n = 1; row < 200000; row += n, n = 2 * n + 1) {
    if (n > 200000 - row) n = 200000 - row;
    OK(us_h5_append(writer, log, n, expected + 2 * row, &err));
  }
  OK(us_h5_finish(writer, &err));
  struct us_h5 *file;
  OK(us_h5_open(path, NULL, &file, &err));
  const struct us_h5_dataset *d = us_h5_find(file, "log/loss");
  ck_assert_uint_eq(d->dims[0], 200000);
  ck_assert_uint_eq(d->dims[1], 2);
  ck_assert_mem_eq(d->data, expected, sizeof expected);
  d = us_h5_find(file, "log/none");
  ck_assert_uint_eq(d->count, 0);
  ck_assert_ptr_null(d->data);
  us_h5_close(file);
  remove_folder();
}
END_TEST

START_TEST(texts_of_any_length_come_back) {
  make_folder();
  const size_t lengths[] = {0, 1, 7, 8, 32768, 32769, 300000};
  char *text = malloc(300001), name[16];
  struct us_h5_writer *writer = create();
  for (size_t i = 0; i < 7; i++) {
    memset(text, 'a' + (int)i, lengths[i]);
    text[lengths[i]] = 0;
    snprintf(name, sizeof name, "text%zu", i);
    OK(us_h5_put_text(writer, name, text, &err));
  }
  OK(us_h5_finish(writer, &err));
  struct us_h5 *file;
  OK(us_h5_open(path, NULL, &file, &err));
  for (size_t i = 0; i < 7; i++) {
    snprintf(name, sizeof name, "text%zu", i);
    ck_assert_uint_eq(strlen(us_h5_text(file, name)), lengths[i]);
    ck_assert_uint_eq(strspn(us_h5_text(file, name), (char[]){(char)('a' + i), 0}), lengths[i]);
  }
  ck_assert_ptr_null(us_h5_text(file, "text7"));
  size_t count;
  us_h5_datasets(file, &count);
  ck_assert_uint_eq(count, 0); /* a long text is not among the datasets */
  us_h5_close(file);
  free(text);
  remove_folder();
}
END_TEST

START_TEST(thousands_of_datasets_are_found_by_name) {
  make_folder();
  struct us_h5_writer *writer = create();
  char name[64];
  for (uint32_t i = 0; i < 5000; i++) {
    snprintf(name, sizeof name, "experts/%u/down", (i * 7919) % 5000);
    uint32_t value = (i * 7919) % 5000;
    OK(us_h5_put(writer, name, US_H5_U32, 1, (size_t[]){1}, &value, &err));
  }
  OK(us_h5_finish(writer, &err));
  struct us_h5 *file;
  OK(us_h5_open(path, NULL, &file, &err));
  size_t count;
  const struct us_h5_dataset *all = us_h5_datasets(file, &count);
  ck_assert_uint_eq(count, 5000);
  for (size_t i = 1; i < count; i++) ck_assert_int_lt(strcmp(all[i - 1].name, all[i].name), 0);
  for (uint32_t i = 0; i < 5000; i++) {
    snprintf(name, sizeof name, "experts/%u/down", i);
    ck_assert_uint_eq(*(const uint32_t *)us_h5_find(file, name)->data, i);
  }
  us_h5_close(file);
  remove_folder();
}
END_TEST

START_TEST(the_same_input_gives_the_same_bytes) {
  make_folder();
  write_sample();
  size_t size, again_size;
  uint8_t *once = read_file(&size);
  sleep(1); /* no time stamp may tell the two apart */
  write_sample();
  uint8_t *again = read_file(&again_size);
  ck_assert_uint_eq(size, again_size);
  ck_assert_mem_eq(once, again, size);
  free(once);
  free(again);
  remove_folder();
}
END_TEST

START_TEST(opening_touches_only_metadata) {
  make_folder();
  struct us_h5_writer *writer = create();
  size_t slot, bytes = (size_t)1 << 32; /* sparse: takes no room on the disk */
  OK(us_h5_reserve(writer, "big", US_H5_U8, 1, &bytes, &slot, &err));
  OK(us_h5_write(writer, slot, bytes - 1, 1, "x", &err));
  OK(us_h5_finish(writer, &err));
  struct rusage before, after;
  getrusage(RUSAGE_SELF, &before);
  struct us_h5 *file;
  OK(us_h5_open(path, NULL, &file, &err));
  getrusage(RUSAGE_SELF, &after);
  ck_assert_int_lt(after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt, 500);
  ck_assert_int_eq(((const char *)us_h5_find(file, "big")->data)[bytes - 1], 'x');
  us_h5_close(file);
  remove_folder();
}
END_TEST

START_TEST(get_says_what_differs) {
  make_folder();
  write_sample();
  struct us_h5 *file;
  const struct us_h5_dataset *d;
  OK(us_h5_open(path, NULL, &file, &err));
  ck_assert_int_eq(us_h5_get(file, "nope", US_H5_F32, 2, NULL, &d, &err), US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, "nope: no such dataset"));
  ck_assert_int_eq(us_h5_get(file, "top", US_H5_F32, 1, NULL, &d, &err), US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, "i64 of rank 1 where f32 of rank 1"));
  ck_assert_int_eq(us_h5_get(file, "layers.0/attn/f", US_H5_F32, 2, (size_t[]){2, 4}, &d, &err),
                   US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, "dimension 1 is 3 where 4"));
  us_h5_close(file);
  remove_folder();
}
END_TEST

START_TEST(bad_names_and_dims_are_usage_errors) {
  make_folder();
  struct us_h5_writer *writer = create();
  const char *bad[] = {"",        "/a", "a/", "a//b", "a b", "../a", "a/./b", "@a", "a/b/c/d/e/f/g/h/i/j",
                       "\xc3\xa9"};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    ck_assert_int_eq(us_h5_put(writer, bad[i], US_H5_U8, 1, (size_t[]){1}, "x", &err), US_ERR_USAGE);
  ck_assert_int_eq(us_h5_put(writer, "a", US_H5_U8, 0, (size_t[]){1}, "x", &err), US_ERR_USAGE);
  ck_assert_int_eq(us_h5_put(writer, "a", US_H5_U8, 5, (size_t[]){1, 1, 1, 1, 1}, "x", &err), US_ERR_USAGE);
  size_t huge[2] = {SIZE_MAX / 2, 4};
  ck_assert_int_eq(us_h5_put(writer, "a", US_H5_U64, 2, huge, "x", &err), US_ERR_USAGE);
  OK(us_h5_put(writer, "a", US_H5_U8, 1, (size_t[]){1}, "x", &err));
  ck_assert_int_eq(us_h5_put(writer, "a", US_H5_U8, 1, (size_t[]){1}, "x", &err), US_ERR_USAGE);
  ck_assert_int_eq(us_h5_put(writer, "a/b", US_H5_U8, 1, (size_t[]){1}, "x", &err), US_ERR_USAGE);
  OK(us_h5_put_text(writer, "t", "1", &err));
  ck_assert_int_eq(us_h5_put_text(writer, "t", "2", &err), US_ERR_USAGE);
  OK(us_h5_finish(writer, &err)); /* the failed calls left no trace */
  struct us_h5 *file;
  OK(us_h5_open(path, NULL, &file, &err));
  size_t count;
  us_h5_datasets(file, &count);
  ck_assert_uint_eq(count, 1);
  us_h5_close(file);
  ck_assert_int_eq(us_h5_create(path, "Bad Kind", &writer, &err), US_ERR_USAGE);
  remove_folder();
}
END_TEST

/* -- Atomicity -- */

START_TEST(an_abandoned_file_leaves_the_old_one) {
  make_folder();
  write_sample();
  struct us_h5_writer *writer = create();
  OK(us_h5_put(writer, "other", US_H5_U8, 1, (size_t[]){1}, "x", &err));
  us_h5_abandon(writer);
  us_h5_abandon(NULL);
  ck_assert_int_eq(count_files(), 1);
  struct us_h5 *file;
  OK(us_h5_open(path, NULL, &file, &err));
  ck_assert_ptr_null(us_h5_find(file, "other"));
  us_h5_close(file);
  remove_folder();
}
END_TEST

START_TEST(a_killed_writer_leaves_nothing) {
  make_folder();
  for (int delay = 0; delay < 12; delay++) {
    pid_t child = fork();
    if (child == 0) {
      for (;;) {
        struct us_h5_writer *writer;
        if (us_h5_create(path, "test", &writer, &err) != US_OK) _exit(1);
        size_t slot;
        if (us_h5_stream(writer, "log", US_H5_F32, 1, (size_t[]){0}, &slot, &err) != US_OK) _exit(1);
        for (int i = 0; i < 1000000; i++)
          if (us_h5_append(writer, slot, 6, floats, &err) != US_OK) _exit(1);
        us_h5_abandon(writer);
      }
    }
    usleep(1000u << (delay % 6));
    kill(child, SIGKILL);
    int status;
    waitpid(child, &status, 0);
    ck_assert(WIFSIGNALED(status));
    ck_assert_int_eq(count_files(), 0);
  }
  remove_folder();
}
END_TEST

START_TEST(metadata_on_a_full_disk_is_an_io_error_and_leaves_nothing) {
  make_folder();
  pid_t child = fork();
  if (child == 0) { /* ends by exit: libhdf5's handler must find nothing left to write */
    signal(SIGXFSZ, SIG_IGN);
    struct us_h5_writer *writer;
    if (us_h5_create(path, "test", &writer, &err) != US_OK) _exit(10);
    char name[16];
    for (int i = 0; i < 200; i++) {
      snprintf(name, sizeof name, "g%d/x", i);
      if (us_h5_put(writer, name, US_H5_U8, 1, (size_t[]){1}, "x", &err) != US_OK) _exit(11);
    }
    setrlimit(RLIMIT_FSIZE, &(struct rlimit){20000, 20000});
    if (us_h5_finish(writer, &err) != US_ERR_IO) _exit(12);
    if (!strstr(err.message, path) || !strstr(err.message, "File too large")) _exit(13);
    exit(0);
  }
  int status;
  waitpid(child, &status, 0);
  ck_assert(WIFEXITED(status));
  ck_assert_int_eq(WEXITSTATUS(status), 0);
  ck_assert_int_eq(count_files(), 0);
  remove_folder();
}
END_TEST

START_TEST(a_full_disk_is_an_io_error_and_leaves_nothing) {
  make_folder();
  pid_t child = fork();
  if (child == 0) { /* a limit on file sizes stands in for a full disk: write fails with EFBIG */
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &(struct rlimit){20000, 20000});
    struct us_h5_writer *writer;
    if (us_h5_create(path, "test", &writer, &err) != US_OK) _exit(10);
    static char data[40000];
    size_t size = sizeof data;
    if (us_h5_put(writer, "big", US_H5_U8, 1, &size, data, &err) != US_ERR_IO) _exit(11);
    if (!strstr(err.message, "big") || !strstr(err.message, path)) _exit(12);
    if (us_h5_finish(writer, &err) != US_ERR_IO) _exit(13);
    _exit(0);
  }
  int status;
  waitpid(child, &status, 0);
  ck_assert(WIFEXITED(status));
  ck_assert_int_eq(WEXITSTATUS(status), 0);
  ck_assert_int_eq(count_files(), 0);
  remove_folder();
}
END_TEST

START_TEST(a_folder_that_is_not_there_is_an_io_error) {
  struct us_h5_writer *writer;
  struct us_h5 *file;
  ck_assert_int_eq(us_h5_create("/nonexistent/a.h5", "test", &writer, &err), US_ERR_IO);
  ck_assert_ptr_nonnull(strstr(err.message, "/nonexistent/a.h5"));
  ck_assert_int_eq(us_h5_open("/nonexistent/a.h5", NULL, &file, &err), US_ERR_IO);
}
END_TEST

/* -- Damage -- */

START_TEST(another_kind_is_refused) {
  make_folder();
  write_sample();
  struct us_h5 *file;
  ck_assert_int_eq(us_h5_open(path, "model", &file, &err), US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, "kind test where model is expected"));
  remove_folder();
}
END_TEST

START_TEST(a_file_cut_anywhere_is_refused) {
  make_folder();
  write_sample();
  size_t size;
  uint8_t *bytes = read_file(&size);
  for (size_t cut = 0; cut < size; cut += cut < 200 || cut + 200 > size ? 1 : 61) {
    ck_assert_int_eq(truncate(path, (off_t)cut), 0);
    expect_refusal("user block");
    write_file(bytes, size);
  }
  ck_assert_int_eq(truncate(path, (off_t)size + 1), 0);
  expect_refusal("user block");
  free(bytes);
  remove_folder();
}
END_TEST

START_TEST(every_changed_byte_of_metadata_is_refused) {
  make_folder();
  write_sample();
  size_t size, in_data = 0;
  uint8_t *bytes = read_file(&size);
  struct us_h5_block block;
  OK(us_h5_block_check(bytes, size, "test", &block, &err));
  ck_assert_uint_eq(block.extents, 3);
  int fd = open(path, O_RDWR);
  for (size_t at = 0; at < size; at++) {
    bool data = false;
    for (uint64_t i = 0; i < block.extents; i++) {
      struct us_h5_extent extent = us_h5_block_extent(bytes, &block, i);
      data = data || (at >= extent.offset && at < extent.offset + extent.bytes);
    }
    in_data += data;
    if (data) continue;
    uint8_t changed = bytes[at] ^ (uint8_t)(1 << (at % 8));
    ck_assert_int_eq(pwrite(fd, &changed, 1, (off_t)at), 1);
    expect_refusal("");
    ck_assert_int_eq(pwrite(fd, &bytes[at], 1, (off_t)at), 1);
  }
  close(fd);
  ck_assert_uint_eq(in_data, sizeof floats + sizeof halves + 8);
  free(bytes);
  remove_folder();
}
END_TEST

/* -- Hostile files: the hash is right, so the parser has to notice -- */

/* The layout message of dataset number `which` in file order; its address is at + 10, its size at + 18. */
static uint8_t *find_layout(uint8_t *bytes, size_t size, int which) {
  static const uint8_t layout[10] = {8, 0, 24, 0, 1, 0, 0, 0, 3, 1};
  return find_bytes(bytes, size, layout, sizeof layout, which);
}

START_TEST(overlapping_datasets_are_refused) {
  make_folder();
  write_sample();
  size_t size;
  uint8_t *bytes = read_file(&size);
  uint8_t *first = find_layout(bytes, size, 0), *second = find_layout(bytes, size, 1);
  memcpy(second + 10, first + 10, 8);
  reseal(bytes);
  write_file(bytes, size);
  expect_refusal("is not the extent that the user block lists");
  /* And with an extent table that agrees; it is looked at before the hash. */
  uint8_t *table = bytes + us_h5_load(bytes + 56, 8);
  us_h5_store(table + 16, us_h5_load(table, 8), 8);
  write_file(bytes, size);
  expect_refusal("extent table: entry 1");
  free(bytes);
  remove_folder();
}
END_TEST

START_TEST(data_outside_the_file_is_refused) {
  make_folder();
  write_sample();
  size_t size;
  uint8_t *bytes = read_file(&size);
  const uint64_t addresses[] = {size - 4096, 1ull << 40, 1ull << 63, UINT64_MAX, UINT64_MAX - 4096};
  for (int i = 0; i < 5; i++) {
    us_h5_store(find_layout(bytes, size, 0) + 10, addresses[i], 8);
    reseal(bytes);
    write_file(bytes, size);
    expect_refusal("data outside the file");
  }
  free(bytes);
  remove_folder();
}
END_TEST

START_TEST(oversize_dims_are_refused) {
  make_folder();
  write_sample();
  size_t size;
  uint8_t *bytes = read_file(&size);
  static const uint8_t space[12] = {1, 2, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0}; /* rank 2, dims 2 x 3 */
  uint8_t *at = find_bytes(bytes, size, space, sizeof space, 0);
  us_h5_store(at + 8, 4, 8);
  us_h5_store(at + 24, 4, 8);
  reseal(bytes);
  write_file(bytes, size);
  expect_refusal("layers.0/attn/f: dims and the bytes of data differ");
  us_h5_store(at + 8, 1ull << 63, 8);
  us_h5_store(at + 24, 1ull << 63, 8);
  reseal(bytes);
  write_file(bytes, size);
  expect_refusal("layers.0/attn/f: dims overflow");
  us_h5_store(at + 24, 7, 8);
  reseal(bytes);
  write_file(bytes, size);
  expect_refusal("extendible");
  free(bytes);
  remove_folder();
}
END_TEST

/* Seal a file that libhdf5 wrote after a user block of 4096 bytes, with the one extent given (or none). */
static void seal(uint64_t offset, uint64_t data_bytes) {
  size_t size;
  uint8_t *bytes = read_file(&size);
  uint64_t table = (size + 7) / 8 * 8, extents = data_bytes ? 1 : 0;
  bytes = realloc(bytes, table + 16);
  memset(bytes + size, 0, table - size);
  us_h5_store(bytes + table, offset, 8);
  us_h5_store(bytes + table + 8, data_bytes, 8);
  struct us_h5_block block = {
      .kind = "test", .file_bytes = table + 16 * extents, .table_offset = table, .extents = extents};
  us_h5_block_fill(bytes, &block);
  reseal(bytes);
  write_file(bytes, block.file_bytes);
  free(bytes);
}

static hid_t foreign_file(void) {
  hid_t create_list = H5Pcreate(H5P_FILE_CREATE), access = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_userblock(create_list, 4096);
  H5Pset_alignment(access, 1, 64);
  hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, create_list, access);
  ck_assert(file >= 0);
  H5Pclose(create_list);
  H5Pclose(access);
  return file;
}

/* Add dataset "d" of 64 elements with these properties. */
static uint64_t foreign_dataset(hid_t file, hid_t type, hid_t list, bool extendible) {
  hsize_t dims[1] = {64}, most[1] = {H5S_UNLIMITED};
  hid_t space = H5Screate_simple(1, dims, extendible ? most : NULL);
  H5Pset_alloc_time(list, H5D_ALLOC_TIME_EARLY);
  hid_t dataset = H5Dcreate2(file, "d", type, space, H5P_DEFAULT, list, H5P_DEFAULT);
  ck_assert(dataset >= 0);
  uint64_t offset = H5Dget_offset(dataset);
  H5Dclose(dataset);
  H5Sclose(space);
  H5Pclose(list);
  return offset;
}

START_TEST(
    a_plain_file_of_libhdf5_is_accepted_once_sealed) { /* so that the refusals below are for their reason */
  make_folder();
  hid_t file = foreign_file(), list = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_obj_track_times(list, false);
  uint64_t offset = foreign_dataset(file, H5T_STD_U32LE, list, false);
  H5Fclose(file);
  seal(offset, 256);
  struct us_h5 *ours;
  OK(us_h5_open(path, "test", &ours, &err));
  ck_assert_uint_eq(us_h5_find(ours, "d")->count, 64);
  us_h5_close(ours);
  remove_folder();
}
END_TEST

START_TEST(an_external_link_is_refused) {
  make_folder();
  hid_t file = foreign_file();
  ck_assert(H5Lcreate_external("/etc/passwd", "/", file, "link", H5P_DEFAULT, H5P_DEFAULT) >= 0);
  H5Fclose(file);
  seal(0, 0);
  expect_refusal("links");
  remove_folder();
}
END_TEST

START_TEST(a_soft_link_is_refused) {
  make_folder();
  hid_t file = foreign_file();
  ck_assert(H5Lcreate_soft("/d", file, "link", H5P_DEFAULT, H5P_DEFAULT) >= 0);
  H5Fclose(file);
  seal(0, 0);
  expect_refusal("soft link");
  remove_folder();
}
END_TEST

START_TEST(a_second_hard_link_is_refused) {
  make_folder();
  hid_t file = foreign_file(), list = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_obj_track_times(list, false);
  uint64_t offset = foreign_dataset(file, H5T_STD_U32LE, list, false);
  ck_assert(H5Lcreate_hard(file, "d", file, "e", H5P_DEFAULT, H5P_DEFAULT) >= 0);
  H5Fclose(file);
  seal(offset, 256);
  expect_refusal("hard link");
  remove_folder();
}
END_TEST

START_TEST(external_storage_is_refused) {
  make_folder();
  hid_t file = foreign_file(), list = H5Pcreate(H5P_DATASET_CREATE);
  ck_assert(H5Pset_external(list, "/etc/passwd", 0, 256) >= 0);
  foreign_dataset(file, H5T_STD_U32LE, list, false);
  H5Fclose(file);
  seal(0, 0);
  expect_refusal("d: data in an external file");
  remove_folder();
}
END_TEST

START_TEST(chunks_filters_and_extendible_dims_are_refused) {
  for (int variant = 0; variant < 3; variant++) {
    make_folder();
    hid_t file = foreign_file(), list = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_chunk(list, 1, (hsize_t[]){16});
    if (variant == 1) H5Pset_deflate(list, 1);
    foreign_dataset(file, H5T_STD_U32LE, list, variant == 2);
    H5Fclose(file);
    seal(0, 0);
    expect_refusal("d: ");
    remove_folder();
  }
}
END_TEST

START_TEST(types_that_the_writer_does_not_know_are_refused) {
  hid_t types[] = {H5T_STD_U32BE, H5T_IEEE_F32BE, H5T_STD_I8LE, H5T_STD_U16LE, H5T_STD_REF_OBJ, H5T_C_S1};
  for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
    make_folder();
    hid_t file = foreign_file(), list = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_obj_track_times(list, false);
    uint64_t offset = foreign_dataset(file, types[i], list, false);
    H5Fclose(file);
    seal(offset, 64 * H5Tget_size(types[i]));
    expect_refusal("d: ");
    remove_folder();
  }
}
END_TEST

START_TEST(a_group_inside_itself_is_refused) {
  make_folder();
  struct us_h5_writer *writer = create();
  OK(us_h5_put(writer, "g/h/x", US_H5_U8, 1, (size_t[]){1}, "x", &err));
  OK(us_h5_finish(writer, &err));
  size_t size;
  uint8_t *bytes = read_file(&size);
  /* Point every symbol of every node at the root's object header. */
  for (int i = 0; i < 3; i++) {
    uint8_t *node = find_bytes(bytes, size, "SNOD\1", 5, i);
    us_h5_store(node + 16, us_h5_load(bytes + 4096 + 64, 8), 8);
  }
  reseal(bytes);
  write_file(bytes, size);
  expect_refusal("");
  free(bytes);
  remove_folder();
}
END_TEST

START_TEST(random_changes_behind_a_right_hash_never_give_data_outside_the_file) {
  make_folder();
  write_sample();
  size_t size;
  uint8_t *bytes = read_file(&size), *changed = malloc(size);
  uint64_t state = us_test_seed();
  int opened = 0;
  for (int trial = 0; trial < 8000; trial++) {
    memcpy(changed, bytes, size);
    for (int k = 0; k <= trial % 3; k++) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      changed[4096 + (state >> 20) % (size - 4096)] = (uint8_t)(state >> 55);
    }
    struct us_h5_block block;
    struct us_err ignored;
    if (us_h5_block_check(changed, size, NULL, &block, &ignored) != US_OK &&
        strstr(ignored.message, "extent"))
      continue;
    reseal(changed);
    write_file(changed, size);
    struct us_h5 *file;
    if (us_h5_open(path, NULL, &file, &ignored) != US_OK) continue;
    opened++;
    size_t count;
    const struct us_h5_dataset *d = us_h5_datasets(file, &count);
    volatile uint8_t sum = 0;
    for (size_t i = 0; i < count; i++)
      for (size_t b = 0; b < d[i].bytes; b++) sum = (uint8_t)(sum + ((const uint8_t *)d[i].data)[b]);
    us_h5_close(file);
  }
  ck_assert_int_gt(opened, 100); /* changes of gaps and of data leave the file readable */
  free(bytes);
  free(changed);
  remove_folder();
}
END_TEST

static Suite *make_suite(void) {
  H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
  TCase *c = tcase_create("h5");
  tcase_add_test(c, every_type_comes_back_as_it_was);
  tcase_add_test(c, libhdf5_reads_the_same);
  tcase_add_test(c, pieces_in_any_order_make_a_whole);
  tcase_add_test(c, a_stream_has_as_many_rows_as_were_appended);
  tcase_add_test(c, texts_of_any_length_come_back);
  tcase_add_test(c, thousands_of_datasets_are_found_by_name);
  tcase_add_test(c, the_same_input_gives_the_same_bytes);
  tcase_add_test(c, opening_touches_only_metadata);
  tcase_add_test(c, get_says_what_differs);
  tcase_add_test(c, bad_names_and_dims_are_usage_errors);
  tcase_add_test(c, an_abandoned_file_leaves_the_old_one);
  tcase_add_test(c, a_killed_writer_leaves_nothing);
  tcase_add_test(c, metadata_on_a_full_disk_is_an_io_error_and_leaves_nothing);
  tcase_add_test(c, a_full_disk_is_an_io_error_and_leaves_nothing);
  tcase_add_test(c, a_folder_that_is_not_there_is_an_io_error);
  tcase_add_test(c, another_kind_is_refused);
  tcase_add_test(c, a_file_cut_anywhere_is_refused);
  tcase_add_test(c, every_changed_byte_of_metadata_is_refused);
  tcase_add_test(c, overlapping_datasets_are_refused);
  tcase_add_test(c, data_outside_the_file_is_refused);
  tcase_add_test(c, oversize_dims_are_refused);
  tcase_add_test(c, a_plain_file_of_libhdf5_is_accepted_once_sealed);
  tcase_add_test(c, an_external_link_is_refused);
  tcase_add_test(c, a_soft_link_is_refused);
  tcase_add_test(c, a_second_hard_link_is_refused);
  tcase_add_test(c, external_storage_is_refused);
  tcase_add_test(c, chunks_filters_and_extendible_dims_are_refused);
  tcase_add_test(c, types_that_the_writer_does_not_know_are_refused);
  tcase_add_test(c, a_group_inside_itself_is_refused);
  tcase_add_test(c, random_changes_behind_a_right_hash_never_give_data_outside_the_file);
  return us_suite("h5", c);
}
US_TEST_MAIN(make_suite)
