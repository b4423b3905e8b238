/* draft_blocks.h: blocks of a drafter over the rows of a forward pass: where they are anchored, what they see and predict.
 *
 *     struct us_draft_blocks blocks;
 *     us_draft_blocks_init(&blocks, &draft_shape, most, &err);
 *     us_rows_add(&rows, &window, true);                          // sequences of the target's forward pass
 *     us_draft_cut_labels(&rows, first, &window);                 // no label crosses a document
 *     us_draft_blocks_add(&blocks, &rows, first, n, 512, seed, step, index);
 *     us_draft_blocks_aim(&blocks, rows.R);                       // key ranges, once all sequences are in
 *     us_draft_blocks_release(&blocks);
 *
 * A block anchored at row a has B rows: the anchor's own token, then masks, at positions p .. p + B - 1. Row j predicts
 * the token at p + j (labels unshifted, row 0 predicts nothing). It sees the context rows strictly before the anchor, in
 * the anchor's document and with q_pos - k_pos < window, and its own block. The anchor's feature is not part of the
 * context: in decoding it does not exist yet (Chen et al., DFlash, 2026).
 *
 * An anchor is a token that counts itself and is followed by one that counts, both in a document that begins before it.
 * Labels of a block end where the sequence, the document, or the run of tokens that count ends.
 */
#ifndef US_TRAINING_DRAFT_BLOCKS_H
#define US_TRAINING_DRAFT_BLOCKS_H

#include "training/rows.h"

struct us_draft_blocks {
  size_t capacity, n; /* blocks */
  uint32_t B, window; /* rows a block; of the drafter's attention */
  uint32_t *anchor;   /* (n) row of the anchor */
  uint32_t *labels;   /* (n) labelled rows: slots 1 .. labels */
  uint32_t *earliest; /* (n) first row of the anchor's document */
  int32_t *token;     /* (n * B) anchor's token in slot 0, -1: mask */
  int32_t *label;     /* (n * B) -1: none */
  uint32_t *position; /* (n * B) */
  uint32_t
      *range[4]; /* (n * B) context begin and end, block begin and end; key rows, blocks behind the context */
};

US_CHECKED enum us_status us_draft_blocks_init(struct us_draft_blocks *blocks,
                                               const struct us_draft_shape *shape, size_t capacity,
                                               struct us_err *err);
void us_draft_blocks_release(struct us_draft_blocks *blocks);

/* Take the weight from rows [first, ...) that a window filled, where the next token belongs to another document. */
void us_draft_cut_labels(struct us_rows *rows, size_t first, const struct us_window *window);

/* Draw `count` anchors (or all there are, if fewer) among the sequence's rows [first, first + n), uniformly without
 * replacement, ascending, from Philox(seed; step, index), and append their blocks. Returns the blocks added. */
size_t us_draft_blocks_add(struct us_draft_blocks *blocks, const struct us_rows *rows, size_t first, size_t n,
                           size_t count, uint64_t seed, uint64_t step, uint64_t index);

/* Append one block anchored at a row of the sequence [first, end). */
void us_draft_blocks_put(struct us_draft_blocks *blocks, const struct us_rows *rows, size_t anchor,
                         size_t end);

/* Whether a row may be an anchor. */
bool us_draft_can_anchor(const struct us_rows *rows, size_t row, size_t end);

/* The token before slot j of block b, as far as it is known: the anchor's for slot 1, then the label of the slot before; the anchor's too where that
 * has none (nothing behind it is labelled). */
static inline int32_t us_draft_blocks_previous(const struct us_draft_blocks *blocks, size_t b, uint32_t j) {
  size_t first = b * blocks->B;
  return j > 1 && blocks->label[first + j - 1] >= 0 ? blocks->label[first + j - 1] : blocks->token[first];
}

/* Fill the key ranges for R context rows. */
void us_draft_blocks_aim(struct us_draft_blocks *blocks, size_t R);

#endif
