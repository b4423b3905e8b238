/* t_io.c: mapping and writing. */
#include "base/io.h"
#include "base/sha256.h"
#include "suite.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char path[32];

static void make_file(void) {
  strcpy(path, "us_t_io_XXXXXX");
  int fd = mkstemp(path);
  ck_assert_int_ge(fd, 0);
  ck_assert_int_eq((int)write(fd, "abc", 3), 3);
  close(fd);
}

static void drop_file(void) {
  unlink(path);
}

START_TEST(a_map_is_the_content) {
  struct us_io_map map;
  struct us_err err = {0};
  ck_assert_int_eq(us_io_map_open(path, &map, &err), US_OK);
  ck_assert_uint_eq(map.size, 3);
  ck_assert_mem_eq(map.data, "abc", 3);
  us_io_map_close(&map);
  ck_assert_ptr_null(map.data);
  us_io_map_close(&map);
}
END_TEST

START_TEST(an_empty_file_maps_to_nothing) {
  ck_assert_int_eq(truncate(path, 0), 0);
  struct us_io_map map;
  struct us_err err = {0};
  ck_assert_int_eq(us_io_map_open(path, &map, &err), US_OK);
  ck_assert_uint_eq(map.size, 0);
  us_io_map_close(&map);
}
END_TEST

START_TEST(what_is_no_regular_file_is_refused_without_hanging) {
  struct us_io_map map;
  struct us_err err = {0};
  ck_assert_int_eq(us_io_map_open("no such file", &map, &err), US_ERR_IO);
  ck_assert_str_eq(err.message, "cannot open 'no such file': No such file or directory");
  ck_assert_int_eq(us_io_map_open(".", &map, &err), US_ERR_INPUT);
  unlink(path);
  ck_assert_int_eq(mkfifo(path, 0600), 0);
  ck_assert_int_eq(us_io_map_open(path, &map, &err), US_ERR_INPUT);
}
END_TEST

START_TEST(a_full_disk_is_an_io_error_with_its_reason) {
  int fd = open("/dev/full", O_WRONLY);
  ck_assert_int_ge(fd, 0);
  struct us_err err = {0};
  ck_assert_int_eq(us_io_write_all(fd, "abc", 3, "q.h5", &err), US_ERR_IO);
  ck_assert_str_eq(err.message, "cannot write 'q.h5': No space left on device");
  close(fd);
  FILE *file = fopen("/dev/full", "w");
  fputs("abc", file);
  ck_assert_int_eq(us_io_flush(file, "out", &err), US_ERR_IO);
  ck_assert_str_eq(err.message, "cannot write 'out': No space left on device");
  fclose(file);
}
END_TEST

START_TEST(everything_is_written_through_short_writes) {
  int ends[2];
  ck_assert_int_eq(pipe(ends), 0);
  static char sent[1 << 20], got[1 << 20];
  for (size_t i = 0; i < sizeof sent; i++) sent[i] = (char)(i * 2654435761u >> 24);
  pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    _exit(us_io_write_all(ends[1], sent, sizeof sent, "pipe", NULL) == US_OK ? 0 : 1);
  }
  close(ends[1]);
  size_t n = 0;
  for (ssize_t r; n < sizeof got && (r = read(ends[0], got + n, 4093)) > 0;) n += (size_t)r;
  close(ends[0]);
  ck_assert_uint_eq(n, sizeof sent);
  ck_assert_mem_eq(got, sent, sizeof sent);
}
END_TEST

/* FIPS 180-4 examples (NIST "SHA_All.pdf"), and the empty message. */
START_TEST(sha256_gives_the_published_digests) {
  static const struct {
    const char *text, *hex;
  } cases[] = {{"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
               {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
               {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
                "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    uint8_t digest[US_SHA256_BYTES];
    char hex[US_SHA256_HEX];
    ck_assert_int_eq(us_sha256_bytes(cases[i].text, strlen(cases[i].text), digest, NULL), US_OK);
    us_sha256_hex(digest, hex);
    ck_assert_str_eq(hex, cases[i].hex);
  }
}
END_TEST

START_TEST(sha256_of_a_file_equals_that_of_its_bytes_in_pieces) {
  static char bytes[3 << 20]; /* more than one piece */
  memset(bytes, 'a', sizeof bytes);
  FILE *file = fopen(path, "w");
  fwrite(bytes, 1, sizeof bytes, file);
  fclose(file);
  char whole[US_SHA256_HEX], pieces[US_SHA256_HEX];
  uint8_t digest[US_SHA256_BYTES];
  ck_assert_int_eq(us_sha256_file(path, whole, NULL), US_OK);
  struct us_sha256 *hash;
  ck_assert_int_eq(us_sha256_create(&hash, NULL), US_OK);
  for (size_t at = 0; at < sizeof bytes; at += 1 << 18)
    ck_assert_int_eq(us_sha256_update(hash, bytes + at, 1 << 18, NULL), US_OK);
  ck_assert_int_eq(us_sha256_finish(hash, digest, NULL), US_OK);
  us_sha256_hex(digest, pieces);
  ck_assert_str_eq(whole, pieces);
  ck_assert(us_sha256_is_hex(whole));
  whole[0] = 'g';
  ck_assert(!us_sha256_is_hex(whole));
  ck_assert_int_eq(us_sha256_file("no such file", whole, NULL), US_ERR_IO);
  ck_assert_int_eq(us_sha256_file(".", whole, NULL), US_ERR_IO);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("io");
  tcase_add_checked_fixture(c, make_file, drop_file);
  tcase_add_test(c, a_map_is_the_content);
  tcase_add_test(c, an_empty_file_maps_to_nothing);
  tcase_add_test(c, what_is_no_regular_file_is_refused_without_hanging);
  tcase_add_test(c, a_full_disk_is_an_io_error_with_its_reason);
  tcase_add_test(c, everything_is_written_through_short_writes);
  tcase_add_test(c, sha256_gives_the_published_digests);
  tcase_add_test(c, sha256_of_a_file_equals_that_of_its_bytes_in_pieces);
  return us_suite("io", c);
}
US_TEST_MAIN(make_suite)
