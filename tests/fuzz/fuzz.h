/* fuzz.h: what every fuzz target shares. A target f_<module>.c defines libFuzzer's functions:
 *
 *     int LLVMFuzzerInitialize(int *argc, char ***argv) { ... }     // optional
 *     int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) { ...; return 0; }
 *
 * A finding is a crash, a sanitizer's report, a failed US_FUZZ_REQUIRE, a leak, a time-out or too much memory.
 */
#ifndef US_TESTS_FUZZ_H
#define US_TESTS_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What must hold for every input. */
#define US_FUZZ_REQUIRE(condition)                                                                           \
  do {                                                                                                       \
    if (!(condition)) {                                                                                      \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                                \
      abort();                                                                                               \
    }                                                                                                        \
  } while (0)

/* A file in memory with these bytes; its path is written to `path`. Close the descriptor to drop it. */
static inline int us_fuzz_file(const uint8_t *data, size_t size, char path[32]) {
  int fd = memfd_create("fuzz", MFD_CLOEXEC);
  US_FUZZ_REQUIRE(fd >= 0);
  for (size_t done = 0; done < size;) {
    ssize_t n = write(fd, data + done, size - done);
    US_FUZZ_REQUIRE(n > 0);
    done += (size_t)n;
  }
  snprintf(path, 32, "/proc/self/fd/%d", fd);
  return fd;
}

#endif
