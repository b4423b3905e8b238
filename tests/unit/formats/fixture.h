/* fixture.h: files that other programs wrote (tests/fixtures), and scratch folders. */
#ifndef US_TESTS_FIXTURE_H
#define US_TESTS_FIXTURE_H

#include <check.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* Path of a fixture; the build sets US_TEST_FIXTURES. Static buffer. */
static inline const char *test_fixture(const char *name) {
  static char path[1024];
  const char *folder = getenv("US_TEST_FIXTURES");
  snprintf(path, sizeof path, "%s/%s", folder ? folder : "tests/fixtures", name);
  return path;
}

/* The bytes of a file, malloc'ed. */
static inline uint8_t *test_read(const char *path, size_t *ret_bytes) {
  FILE *file = fopen(path, "rb");
  ck_assert_msg(file != NULL, "cannot open %s", path);
  uint8_t *bytes = malloc(1 << 20);
  *ret_bytes = fread(bytes, 1, 1 << 20, file);
  fclose(file);
  return bytes;
}

static inline void test_write(const char *path, const void *bytes, size_t n) {
  FILE *file = fopen(path, "wb");
  ck_assert_msg(file != NULL, "cannot create %s", path);
  ck_assert_uint_eq(fwrite(bytes, 1, n, file), n);
  ck_assert_int_eq(fclose(file), 0);
}

/* A fresh folder under $TMPDIR; removed by test_remove. */
static inline void test_folder(char path[256]) {
  const char *tmp = getenv("TMPDIR");
  snprintf(path, 256, "%s/us-test-XXXXXX", tmp ? tmp : "/tmp");
  ck_assert(mkdtemp(path) != NULL);
}

static inline void test_remove(const char *folder) {
  char command[300];
  snprintf(command, sizeof command, "rm -rf '%s'", folder);
  ck_assert_int_eq(system(command), 0);
}

#endif
