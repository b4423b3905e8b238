/* arena.h: cut one block of memory into 64-byte aligned pieces; the same code first counts, then cuts.
 *
 *     struct us_arena a = {0};
 *     lay_out(&a, s);                        // pieces are NULL, a.used counts
 *     a = (struct us_arena){.base = aligned_alloc(64, a.used)};
 *     lay_out(&a, s);                        // US_ARENA_TAKE(a, s->x, rows * D) sets s->x
 */
#ifndef US_TRAINING_ARENA_H
#define US_TRAINING_ARENA_H

#include <stddef.h>

struct us_arena {
  char *base; /* NULL: only count */
  size_t used;
};

static inline void *us_arena_take(struct us_arena *arena, size_t count, size_t size) {
  void *piece = arena->base ? arena->base + arena->used : NULL;
  arena->used += (count * size + 63) / 64 * 64;
  return piece;
}

#define US_ARENA_TAKE(arena, field, count) ((field) = us_arena_take((arena), (count), sizeof *(field)))

#endif
