/* intern.h: byte strings to dense numbers: the n-th distinct string gets the number n.
 *
 *     struct us_intern words = {0};
 *     uint32_t index; bool added;
 *     us_intern_add(&words, "abc", 3, &index, &added, &err);     // index == 0, added
 *     us_intern_find(&words, "abc", 3);                          // 0; -1 if it is not there
 *     us_intern_release(&words);
 *
 * A zeroed struct is empty. Strings are kept in one arena, NUL-terminated; bytes of any value are allowed.
 */
#ifndef US_BASE_INTERN_H
#define US_BASE_INTERN_H

#include "base/buffer.h"
#include <stdbool.h>

struct us_intern {
  struct us_buffer arena;
  struct us_intern_entry {
    size_t begin;
    uint32_t bytes;
    uint32_t hash;
  } * entries;
  uint32_t *slots; /* entry + 1; 0 is empty; the number of slots is a power of two */
  uint32_t n, n_slots, capacity;
};

/* The number of a string, added if it is new. US_ERR_MEMORY; at most 2^30 strings of at most 4 GiB - 1 each. */
US_CHECKED enum us_status us_intern_add(struct us_intern *intern, const void *bytes, size_t n,
                                        uint32_t *ret_index, bool *opt_added, struct us_err *err);

int64_t us_intern_find(const struct us_intern *intern, const void *bytes, size_t n);

/* The string of a number, valid until the next add. */
const char *us_intern_get(const struct us_intern *intern, uint32_t index, size_t *opt_bytes);

void us_intern_release(struct us_intern *intern);

/* The hash used above, for other tables: the same on every machine. */
uint64_t us_hash_bytes(const void *bytes, size_t n);

#endif
