/* parity.h: what the parity tests in C share: a JSON record a check, the end of a test that cannot go on, and its watchdog.
 *
 *     signal(SIGALRM, hung), alarm(60);
 *     need(us_shape_load("tiny", &shape, &err), &err, "tiny");     // exits 77 without a GPU, 5 otherwise
 *     record("tiny", "logits", compared, beyond_the_bound, "");
 *     return any_failed ? 1 : 0;
 */
#ifndef US_TESTS_GPU_PARITY_H
#define US_TESTS_GPU_PARITY_H

#include "base/err.h"
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SKIPPED 77

static bool any_failed;

static inline void record(const char *name, const char *check, uint64_t checked, uint64_t bad,
                          const char *note) {
  bool ok = checked > 0 && bad == 0;
  if (!ok) any_failed = true;
  printf("{\"check\": \"%s: %s\", \"ok\": %s, \"checked\": %llu, \"bad\": %llu, \"note\": \"%s\"}\n", name,
         check, ok ? "true" : "false", (unsigned long long)checked, (unsigned long long)bad, note);
  fflush(stdout);
}

static inline void need(enum us_status status, const struct us_err *err, const char *what) {
  if (status == US_OK) return;
  fprintf(stderr, "%s: %s\n", what, err->message);
  exit(strstr(err->message, "no GPU") ? SKIPPED : 5);
}

static inline void hung(int number) {
  static const char message[] = "the test hangs: its watchdog ends it\n";
  if (write(2, message, sizeof message - 1) < 0) _exit(4);
  _exit(5);
}

static inline void *take(size_t n, size_t size) {
  void *p = calloc(n + 1, size);
  if (!p) need(US_ERR_MEMORY, &(struct us_err){.message = "out of memory"}, "test");
  return p;
}

#endif
