/* intern.c: an open-addressing table over an arena of strings. */
#include "base/intern.h"
#include <stdlib.h>
#include <string.h>

static uint64_t mix(uint64_t hash) {
  hash *= 0xd6e8feb86659fd93u;
  hash ^= hash >> 32;
  hash *= 0xa0761d6478bd642fu;
  return hash ^ hash >> 29;
}

/* 8 bytes a round. Little-endian loads: the hash decides the order of nothing that is written to a file. */
uint64_t us_hash_bytes(const void *bytes, size_t n) {
  const unsigned char *p = bytes;
  uint64_t hash = 0x9e3779b97f4a7c15u ^ n;
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t word;
    memcpy(&word, p, 8);
    hash = mix(hash ^ word);
  }
  uint64_t tail = 0;
  for (size_t i = 0; i < n; i++) tail |= (uint64_t)p[i] << (8 * i);
  return mix(hash ^ tail);
}

/* The slot of the string, or the empty slot where it belongs. */
static uint32_t slot_of(const struct us_intern *intern, const void *bytes, size_t n, uint32_t hash) {
  uint32_t mask = intern->n_slots - 1;
  for (uint32_t slot = hash & mask;; slot = (slot + 1) & mask) {
    uint32_t index = intern->slots[slot];
    if (index == 0) return slot;
    const struct us_intern_entry *entry = &intern->entries[index - 1];
    if (entry->hash == hash && entry->bytes == n && memcmp(intern->arena.data + entry->begin, bytes, n) == 0)
      return slot;
  }
}

static enum us_status grow(struct us_intern *intern, struct us_err *err) {
  if (intern->n_slots == 1u << 31) return us_err_memory(err, "string table", 8ull * intern->n_slots);
  uint32_t n_slots = intern->n_slots ? intern->n_slots * 2 : 64;
  uint32_t capacity = n_slots / 2;
  struct us_intern_entry *entries = realloc(intern->entries, capacity * sizeof *entries);
  if (entries == NULL) return us_err_memory(err, "string table", capacity * sizeof *entries);
  intern->entries = entries;
  uint32_t *slots = calloc(n_slots, sizeof *slots);
  if (slots == NULL) return us_err_memory(err, "string table", n_slots * sizeof *slots);
  free(intern->slots);
  intern->slots = slots;
  intern->n_slots = n_slots;
  intern->capacity = capacity;
  for (uint32_t i = 0; i < intern->n; i++) {
    uint32_t slot = entries[i].hash & (n_slots - 1);
    while (slots[slot] != 0) slot = (slot + 1) & (n_slots - 1);
    slots[slot] = i + 1;
  }
  return US_OK;
}

enum us_status us_intern_add(struct us_intern *intern, const void *bytes, size_t n, uint32_t *ret_index,
                             bool *opt_added, struct us_err *err) {
  enum us_status status;
  if (n >= UINT32_MAX) return us_err_memory(err, "one string", n);
  if (intern->n == intern->capacity && (status = grow(intern, err)) != US_OK) return status;
  uint32_t hash = (uint32_t)us_hash_bytes(bytes, n);
  uint32_t slot = slot_of(intern, bytes, n, hash);
  bool is_new = intern->slots[slot] == 0;
  if (is_new) {
    size_t begin = intern->arena.size;
    if ((status = us_buffer_reserve(&intern->arena, n + 1, err)) != US_OK) return status;
    if ((status = us_buffer_append(&intern->arena, bytes, n, err)) != US_OK) return status;
    if ((status = us_buffer_append(&intern->arena, "", 1, err)) != US_OK) return status;
    intern->entries[intern->n] = (struct us_intern_entry){.begin = begin, .bytes = (uint32_t)n, .hash = hash};
    intern->slots[slot] = ++intern->n;
  }
  *ret_index = intern->slots[slot] - 1;
  if (opt_added) *opt_added = is_new;
  return US_OK;
}

int64_t us_intern_find(const struct us_intern *intern, const void *bytes, size_t n) {
  if (intern->n == 0 || n >= UINT32_MAX) return -1;
  uint32_t slot = slot_of(intern, bytes, n, (uint32_t)us_hash_bytes(bytes, n));
  return (int64_t)intern->slots[slot] - 1;
}

const char *us_intern_get(const struct us_intern *intern, uint32_t index, size_t *opt_bytes) {
  if (opt_bytes) *opt_bytes = intern->entries[index].bytes;
  return intern->arena.data + intern->entries[index].begin;
}

void us_intern_release(struct us_intern *intern) {
  us_buffer_release(&intern->arena);
  free(intern->entries);
  free(intern->slots);
  *intern = (struct us_intern){0};
}
