/* parity.h: what the parity tests in C share: a JSON record a check, the end of a test that cannot go on, and its watchdog, a drafter.
 *
 *     signal(SIGALRM, hung), alarm(60);
 *     need(us_shape_load("tiny", &shape, &err), &err, "tiny");     // exits 77 without a GPU, 5 otherwise
 *     record("tiny", "logits", compared, beyond_the_bound, "");
 *     return any_failed ? 1 : 0;
 */
#ifndef US_TESTS_GPU_PARITY_H
#define US_TESTS_GPU_PARITY_H

#include "base/err.h"
#include "model/shape.h"
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SKIPPED 77

__attribute__((weak)) bool any_failed; /* one for all parts of a program */

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

/* $US_TEST_WATCHDOG: under a checker everything takes longer. */
static inline unsigned watchdog_seconds(unsigned usual) {
  const char *text = getenv("US_TEST_WATCHDOG");
  return text && atoi(text) > 0 ? (unsigned)atoi(text) : usual;
}

static inline void *take(size_t n, size_t size) {
  void *p = calloc(n + 1, size);
  if (!p) need(US_ERR_MEMORY, &(struct us_err){.message = "out of memory"}, "test");
  return p;
}

/* A small drafter of `heads` KV heads; of one layer for a target of less than four. */
static inline struct us_draft_shape draft_shape(const struct us_shape *target, uint32_t heads,
                                                uint32_t block) {
  bool shallow = target->layers < 4;
  return (struct us_draft_shape){.layers = shallow ? 1 : 2,
                                 .hidden = target->hidden,
                                 .vocab = target->vocab,
                                 .inner = 256,
                                 .norm_eps = 1e-5,
                                 .value_scale = 0.612,
                                 .block = block,
                                 .mask_id = 3,
                                 .taps = shallow ? 2 : 3,
                                 .tap_layer = {0, shallow ? 1 : 2, shallow ? 0 : 3},
                                 .target_layers = target->layers,
                                 .attention = {.q_heads = 2 * heads,
                                               .kv_heads = heads,
                                               .qk_dim = 32,
                                               .v_dim = 32,
                                               .rotary_dim = 16,
                                               .rope_theta = 1e4,
                                               .window = 24,
                                               .sink = true}};
}

#endif
