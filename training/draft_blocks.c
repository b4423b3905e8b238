/* draft_blocks.c: anchors, labels and visibility of a drafter's blocks. */
#include "training/draft_blocks.h"

#include "base/philox.h"

#include <stdlib.h>

enum us_status us_draft_blocks_init(struct us_draft_blocks *blocks, const struct us_draft_shape *shape,
                                    size_t capacity, struct us_err *err) {
  *blocks =
      (struct us_draft_blocks){.capacity = capacity, .B = shape->block, .window = shape->attention.window};
  size_t rows = capacity * shape->block, words = 3 * capacity + 7 * rows;
  if (!capacity || capacity > UINT32_MAX / 1024)
    return us_err_set(err, US_ERR_USAGE, "%zu blocks a pass", capacity);
  uint32_t *memory = calloc(words, sizeof *memory);
  if (!memory) return us_err_memory(err, "blocks", words * sizeof *memory);
  blocks->anchor = memory;
  blocks->labels = memory + capacity;
  blocks->earliest = memory + 2 * capacity;
  memory += 3 * capacity;
  blocks->token = (int32_t *)memory;
  blocks->label = (int32_t *)memory + rows;
  blocks->position = memory + 2 * rows;
  for (int i = 0; i < 4; i++) blocks->range[i] = memory + (3 + (size_t)i) * rows;
  return US_OK;
}

void us_draft_blocks_release(struct us_draft_blocks *blocks) {
  free(blocks->anchor);
  *blocks = (struct us_draft_blocks){0};
}

void us_draft_cut_labels(struct us_rows *rows, size_t first, const struct us_window *window) {
  for (size_t i = 0; i + 1 < window->n; i++)
    if (window->document[i + 1] != window->document[i]) rows->weight[first + i] = 0.0f;
}

bool us_draft_can_anchor(const struct us_rows *rows, size_t row, size_t end) {
  return row < end && rows->position[row] > 0 && rows->weight[row - 1] != 0.0f && rows->weight[row] != 0.0f;
}

void us_draft_blocks_put(struct us_draft_blocks *blocks, const struct us_rows *rows, size_t anchor,
                         size_t end) {
  size_t b = blocks->n++, first = b * blocks->B;
  blocks->anchor[b] = (uint32_t)anchor;
  blocks->earliest[b] = rows->document[anchor];
  blocks->labels[b] = 0;
  for (uint32_t j = 0; j < blocks->B; j++) {
    size_t from = anchor + j - 1; /* the row whose next token is at the slot's position */
    blocks->token[first + j] = j ? -1 : rows->token[anchor];
    blocks->position[first + j] = rows->position[anchor] + j;
    blocks->label[first + j] = -1;
    if (!j || blocks->labels[b] + 1 < j || from >= end || rows->weight[from] == 0.0f ||
        rows->document[from] != rows->document[anchor])
      continue;
    blocks->label[first + j] = rows->label[from];
    blocks->labels[b] = j;
  }
}

/* Selection sampling (Knuth, TAOCP 2, algorithm S): every subset is as likely, and the result is in order. */
size_t us_draft_blocks_add(struct us_draft_blocks *blocks, const struct us_rows *rows, size_t first, size_t n,
                           size_t count, uint64_t seed, uint64_t step, uint64_t index) {
  size_t left = 0, before = blocks->n, room = blocks->capacity - blocks->n;
  for (size_t r = first; r < first + n; r++) left += us_draft_can_anchor(rows, r, first + n);
  if (count > room) count = room;
  if (count > left) count = left;
  struct us_philox_key key = us_philox_key(seed);
  for (size_t r = first; r < first + n && count; r++) {
    uint32_t word[4];
    if (!us_draft_can_anchor(rows, r, first + n)) continue;
    us_philox_quad(key, (uint32_t)(r - first), (uint32_t)index, (uint32_t)step, US_STREAM_ANCHOR, word);
    double u = (double)(((uint64_t)word[0] << 32 | word[1]) >> 11) * 0x1p-53;
    if (u * (double)left-- >= (double)count) continue;
    us_draft_blocks_put(blocks, rows, r, first + n);
    count--;
  }
  return blocks->n - before;
}

void us_draft_blocks_aim(struct us_draft_blocks *blocks, size_t R) {
  for (size_t b = 0; b < blocks->n; b++)
    for (uint32_t j = 0; j < blocks->B; j++) {
      size_t row = b * blocks->B + j, own = R + b * blocks->B;
      uint32_t anchor = blocks->anchor[b], begin = blocks->earliest[b], window = blocks->window, hidden = 0;
      if (window && anchor + j + 1 > begin + window) begin = anchor + j + 1 - window;
      if (window && j + 1 > window) hidden = j + 1 - window;
      blocks->range[0][row] = begin < anchor ? begin : anchor;
      blocks->range[1][row] = anchor;
      blocks->range[2][row] = (uint32_t)own + hidden;
      blocks->range[3][row] = (uint32_t)own + blocks->B;
    }
}
