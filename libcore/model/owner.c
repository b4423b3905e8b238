/* owner.c: an arena of 64-byte aligned chunks, and a list of things to close. */
#include "model/owner.h"

#include <stdint.h>
#include <stdlib.h>

/* Small vectors share a chunk; anything larger than a quarter of one gets memory of its own, which the C library
 * maps lazily, so that a zeroed gigabyte costs nothing until it is written. */
#define CHUNK_BYTES ((size_t)1 << 18)

/* No tensor is larger; a size that a bad file made up is refused here. */
#define LARGEST ((size_t)1 << 39)

struct chunk {
  struct chunk *next;
  unsigned char *begin; /* aligned */
  size_t used, size;
};

struct attached {
  struct attached *next;
  void *thing;
  void (*release)(void *thing);
};

struct us_owner {
  struct chunk *chunks;
  struct attached *things;
};

enum us_status us_owner_create(struct us_owner **ret_owner, struct us_err *err) {
  *ret_owner = calloc(1, sizeof **ret_owner);
  return *ret_owner ? US_OK : us_err_memory(err, "model owner", sizeof **ret_owner);
}

static struct chunk *add_chunk(struct us_owner *owner, size_t size) {
  if (size > SIZE_MAX - sizeof(struct chunk) - US_OWNER_ALIGN) return NULL;
  struct chunk *c = calloc(1, sizeof *c + US_OWNER_ALIGN + size);
  if (!c) return NULL;
  uintptr_t after = (uintptr_t)(c + 1) + US_OWNER_ALIGN - 1;
  c->begin = (unsigned char *)(after & ~(uintptr_t)(US_OWNER_ALIGN - 1));
  c->size = size;
  c->next = owner->chunks;
  owner->chunks = c;
  return c;
}

enum us_status us_owner_alloc(struct us_owner *owner, size_t bytes, void **ret_memory, struct us_err *err) {
  if (bytes > LARGEST) return us_err_memory(err, "weights", bytes);
  size_t need = (bytes + US_OWNER_ALIGN - 1) & ~(size_t)(US_OWNER_ALIGN - 1);
  if (need == 0) need = US_OWNER_ALIGN;
  struct chunk *c = owner->chunks;
  if (need > CHUNK_BYTES / 4) {
    c = add_chunk(owner, need);
    if (c && c->next) { /* keep the part-filled chunk first */
      struct chunk *open = c->next;
      c->next = open->next;
      open->next = c;
      owner->chunks = open;
    }
  } else if (!c || c->size - c->used < need) {
    c = add_chunk(owner, CHUNK_BYTES);
  }
  if (!c) return us_err_memory(err, "weights", bytes);
  *ret_memory = c->begin + c->used;
  c->used += need;
  return US_OK;
}

enum us_status us_owner_attach(struct us_owner *owner, void *thing, void (*release)(void *thing),
                               struct us_err *err) {
  struct attached *a = malloc(sizeof *a);
  if (!a) {
    release(thing);
    return us_err_memory(err, "model owner", sizeof *a);
  }
  *a = (struct attached){owner->things, thing, release};
  owner->things = a;
  return US_OK;
}

void us_owner_free(struct us_owner *owner) {
  if (!owner) return;
  for (struct attached *a = owner->things, *next; a; a = next) {
    next = a->next;
    a->release(a->thing);
    free(a);
  }
  for (struct chunk *c = owner->chunks, *next; c; c = next) {
    next = c->next;
    free(c);
  }
  free(owner);
}
