/* fail_alloc.h: every allocation of an operation fails once, and the operation must say so and leak nothing.
 *
 *     static enum us_status load(void *arg, struct us_err *err) { ...open, use, close...; return status; }
 *     us_fail_alloc(load, path, US_FAIL_ALLOC_BALANCED);
 *
 * Defines malloc, calloc, realloc and free for the whole program, the C library and shared libraries included, so one
 * source of a program includes it. The operation runs first undisturbed (what libraries keep for good is kept then), then
 * with its 1st, 2nd, ... allocation failing until none is left to fail. It must return US_ERR_MEMORY with a message each
 * time, never crash, and free what it took; the flags relax that. It must not use ck_assert, which allocates. Under a
 * sanitizer, which has a malloc of its own, it runs undisturbed only.
 */
#ifndef US_TESTS_FAIL_ALLOC_H
#define US_TESTS_FAIL_ALLOC_H

#include "base/err.h"
#include "suite.h"

#include <errno.h>
#include <stdbool.h>

#if defined(__has_feature) /* clang's way to say what gcc says by a macro */
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define US_FAIL_ALLOC_SKIPPED 1
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define US_FAIL_ALLOC_SKIPPED 1
#endif
#ifndef US_FAIL_ALLOC_SKIPPED
#define US_FAIL_ALLOC_SKIPPED 0
#endif

enum us_fail_alloc_flag {
  US_FAIL_ALLOC_BALANCED = 0,
  US_FAIL_ALLOC_KEEPS = 1, /* a library below keeps blocks when it fails (libcrypto's error queue) */
  US_FAIL_ALLOC_MAY_SUCCEED =
      2, /* something can do without: a stream without its buffer; the operation checks itself */
};

#if !US_FAIL_ALLOC_SKIPPED
void *__libc_malloc(size_t size);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *block, size_t size);
void __libc_free(void *block);
void *malloc(size_t size);
void *calloc(size_t n, size_t size);
void *realloc(void *block, size_t size);
void free(void *block);

static struct {
  bool armed, failed;
  long left; /* allocations that still succeed */
  long live; /* blocks taken and not freed while armed */
} us_fail_alloc_state;

static bool us_fail_alloc_now(void) {
  if (!us_fail_alloc_state.armed) return false;
  if (us_fail_alloc_state.failed || us_fail_alloc_state.left-- > 0) return false; /* one failure a run */
  us_fail_alloc_state.failed = true;
  errno = ENOMEM;
  return true;
}

static void *us_fail_alloc_count(void *block) {
  if (us_fail_alloc_state.armed && block) us_fail_alloc_state.live++;
  return block;
}

void *malloc(size_t size) {
  return us_fail_alloc_now() ? NULL : us_fail_alloc_count(__libc_malloc(size));
}

void *calloc(size_t n, size_t size) {
  return us_fail_alloc_now() ? NULL : us_fail_alloc_count(__libc_calloc(n, size));
}

void *realloc(void *block, size_t size) {
  if (us_fail_alloc_now()) return NULL;
  void *moved = __libc_realloc(block, size);
  return block ? moved : us_fail_alloc_count(moved);
}

void free(void *block) {
  if (us_fail_alloc_state.armed && block) us_fail_alloc_state.live--;
  __libc_free(block);
}

static inline void us_fail_alloc(enum us_status (*operation)(void *arg, struct us_err *err), void *arg,
                                 unsigned flags) {
  struct us_err err = {0};
  ck_assert_msg(operation(arg, &err) == US_OK, "undisturbed: %s", err.message);
  long n = 0;
  for (bool failed = true; failed; n++) {
    err = (struct us_err){0};
    us_fail_alloc_state.left = n;
    us_fail_alloc_state.live = 0;
    us_fail_alloc_state.failed = false;
    us_fail_alloc_state.armed = true;
    enum us_status status = operation(arg, &err);
    us_fail_alloc_state.armed = false;
    failed = us_fail_alloc_state.failed;
    long live = us_fail_alloc_state.live;
    bool fine = status == US_OK && (!failed || (flags & US_FAIL_ALLOC_MAY_SUCCEED));
    ck_assert_msg(fine || (failed && status == US_ERR_MEMORY), "allocation %ld failed: status %d, '%s'", n,
                  status, err.message);
    ck_assert_msg(status == US_OK || err.message[0] != 0, "allocation %ld failed without a message", n);
    ck_assert_msg((flags & US_FAIL_ALLOC_KEEPS) || live == 0, "allocation %ld failed: %ld blocks leaked", n,
                  live);
  }
  ck_assert_int_gt(n, 1); /* something was there to fail */
}
#else
static inline void us_fail_alloc(enum us_status (*operation)(void *arg, struct us_err *err), void *arg,
                                 unsigned flags) {
  (void)flags;
  struct us_err err = {0};
  ck_assert_msg(operation(arg, &err) == US_OK, "%s", err.message);
}
#endif

#endif
