/* bpe.c: the merge table and the merging of one word: by scanning when it is short, with a heap when it is long. */
#include "formats/bpe.h"
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define NO_RANK UINT32_MAX
/* Below this many bytes a scan over the ranks beats the heap: the median word of code and prose has 4 to 6 bytes. */
#define SHORT_WORD 48

static uint64_t key_of(int32_t left, int32_t right) {
  return ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) + 1;
}

static size_t slot_of(const struct us_bpe *bpe, uint64_t key) {
  size_t slot = (size_t)((key * 0x9e3779b97f4a7c15u) >> 20) & (bpe->n_slots - 1);
  while (bpe->pairs[slot].key != 0 && bpe->pairs[slot].key != key) slot = (slot + 1) & (bpe->n_slots - 1);
  return slot;
}

enum us_status us_bpe_reserve(struct us_bpe *bpe, size_t n_merges, struct us_err *err) {
  if (n_merges > 1u << 28) return us_err_memory(err, "merges", n_merges * sizeof *bpe->pairs);
  size_t n_slots = 16;
  while (n_slots < 2 * n_merges) n_slots *= 2;
  bpe->pairs = calloc(n_slots, sizeof *bpe->pairs);
  if (bpe->pairs == NULL) return us_err_memory(err, "merges", n_slots * sizeof *bpe->pairs);
  bpe->n_slots = n_slots;
  return US_OK;
}

void us_bpe_add(struct us_bpe *bpe, int32_t left, int32_t right, uint32_t rank, int32_t joined) {
  uint64_t key = key_of(left, right);
  bpe->pairs[slot_of(bpe, key)] = (struct us_bpe_pair){.key = key, .rank = rank, .joined = joined};
}

const struct us_bpe_pair *us_bpe_find(const struct us_bpe *bpe, int32_t left, int32_t right) {
  const struct us_bpe_pair *pair = &bpe->pairs[slot_of(bpe, key_of(left, right))];
  return pair->key ? pair : NULL;
}

static uint32_t rank_of(const struct us_bpe *bpe, int32_t left, int32_t right) {
  const struct us_bpe_pair *pair = us_bpe_find(bpe, left, right);
  return pair ? pair->rank : NO_RANK;
}

static enum us_status merge_short(const struct us_bpe *bpe, const char *word, size_t n, struct us_ids *ids,
                                  struct us_err *err) {
  int32_t symbols[SHORT_WORD];
  uint32_t ranks[SHORT_WORD]; /* ranks[i]: of (symbols[i], symbols[i + 1]) */
  for (size_t i = 0; i < n; i++) symbols[i] = bpe->byte_id[(unsigned char)word[i]];
  for (size_t i = 0; i + 1 < n; i++) ranks[i] = rank_of(bpe, symbols[i], symbols[i + 1]);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; i++)
      if (ranks[i] < ranks[best]) best = i;
    if (ranks[best] == NO_RANK) break;
    symbols[best] = us_bpe_find(bpe, symbols[best], symbols[best + 1])->joined;
    n--;
    memmove(symbols + best + 1, symbols + best + 2, (n - best - 1) * sizeof *symbols);
    if (best + 1 < n) memmove(ranks + best, ranks + best + 1, (n - best - 1) * sizeof *ranks);
    if (best + 1 < n) ranks[best] = rank_of(bpe, symbols[best], symbols[best + 1]);
    if (best > 0) ranks[best - 1] = rank_of(bpe, symbols[best - 1], symbols[best]);
  }
  return us_ids_append(ids, symbols, n, err);
}

/* A long word: a doubly linked list of symbols and a binary heap of rank << 32 | position. A heap entry is stale when the
 * node has died or its pair has another rank by now; stale ones are dropped as they come up. */
struct node {
  int32_t symbol; /* -1: joined into its left neighbour */
  int32_t previous, next;
  uint32_t rank;
};

struct heap {
  uint64_t *keys;
  size_t n;
};

static void heap_push(struct heap *heap, uint64_t key) {
  size_t i = heap->n++;
  for (; i > 0 && heap->keys[(i - 1) / 2] > key; i = (i - 1) / 2) heap->keys[i] = heap->keys[(i - 1) / 2];
  heap->keys[i] = key;
}

static uint64_t heap_pop(struct heap *heap) {
  uint64_t top = heap->keys[0], last = heap->keys[--heap->n];
  size_t i = 0;
  for (size_t child; (child = 2 * i + 1) < heap->n; i = child) {
    if (child + 1 < heap->n && heap->keys[child + 1] < heap->keys[child]) child++;
    if (heap->keys[child] >= last) break;
    heap->keys[i] = heap->keys[child];
  }
  heap->keys[i] = last;
  return top;
}

static void rate(const struct us_bpe *bpe, struct node *nodes, int32_t at, struct heap *heap) {
  struct node *node = &nodes[at];
  node->rank = node->next < 0 ? NO_RANK : rank_of(bpe, node->symbol, nodes[node->next].symbol);
  if (node->rank != NO_RANK) heap_push(heap, (uint64_t)node->rank << 32 | (uint32_t)at);
}

static void merge_nodes(const struct us_bpe *bpe, struct node *nodes, struct heap *heap) {
  while (heap->n > 0) {
    uint64_t key = heap_pop(heap);
    int32_t at = (int32_t)(uint32_t)key;
    struct node *node = &nodes[at];
    if (node->symbol < 0 || node->rank != (uint32_t)(key >> 32)) continue;
    struct node *right = &nodes[node->next];
    node->symbol = us_bpe_find(bpe, node->symbol, right->symbol)->joined;
    right->symbol = -1;
    node->next = right->next;
    if (node->next >= 0) nodes[node->next].previous = at;
    rate(bpe, nodes, at, heap);
    if (node->previous >= 0) rate(bpe, nodes, node->previous, heap);
  }
}

static enum us_status merge_long(const struct us_bpe *bpe, const char *word, size_t n,
                                 struct us_bpe_scratch *scratch, struct us_ids *ids, struct us_err *err) {
  /* n - 1 pairs at first and at most two more for each of at most n - 1 merges. */
  size_t bytes = n * sizeof(struct node) + 3 * n * sizeof(uint64_t);
  if (bytes > scratch->bytes) {
    void *memory = realloc(scratch->memory, bytes);
    if (memory == NULL) return us_err_memory(err, "a word's merges", bytes);
    scratch->memory = memory;
    scratch->bytes = bytes;
  }
  struct node *nodes = scratch->memory;
  struct heap heap = {.keys = (uint64_t *)(nodes + n)};
  for (size_t i = 0; i < n; i++)
    nodes[i] = (struct node){.symbol = bpe->byte_id[(unsigned char)word[i]],
                             .previous = (int32_t)i - 1,
                             .next = i + 1 < n ? (int32_t)i + 1 : -1};
  for (size_t i = 0; i + 1 < n; i++) rate(bpe, nodes, (int32_t)i, &heap);
  merge_nodes(bpe, nodes, &heap);
  size_t count = 0;
  int32_t *symbols = (int32_t *)heap.keys; /* the heap is empty by now */
  for (int32_t at = 0; at >= 0; at = nodes[at].next) symbols[count++] = nodes[at].symbol;
  return us_ids_append(ids, symbols, count, err);
}

enum us_status us_bpe_merge(const struct us_bpe *bpe, const char *word, size_t n,
                            struct us_bpe_scratch *scratch, struct us_ids *ids, struct us_err *err) {
  if (n > INT32_MAX) return us_err_set(err, US_ERR_INPUT, "a word of %zu bytes is too long to tokenise", n);
  return n <= SHORT_WORD ? merge_short(bpe, word, n, ids, err) : merge_long(bpe, word, n, scratch, ids, err);
}

void us_bpe_scratch_release(struct us_bpe_scratch *scratch) {
  free(scratch->memory);
  *scratch = (struct us_bpe_scratch){0};
}

void us_bpe_release(struct us_bpe *bpe) {
  free(bpe->pairs);
  bpe->pairs = NULL;
  bpe->n_slots = 0;
}
