/* bpe.h: the merge table of a byte-level BPE and the merging of one word.
 *
 *     struct us_bpe bpe = {0};
 *     for (b...) bpe.byte_id[b] = ...;
 *     us_bpe_reserve(&bpe, n_merges, &err);
 *     us_bpe_add(&bpe, left, right, rank, joined);
 *     struct us_bpe_scratch scratch = {0};
 *     us_bpe_merge(&bpe, word, bytes, &scratch, &ids, &err);
 *     us_bpe_scratch_release(&scratch); us_bpe_release(&bpe);
 *
 * Merging (Sennrich et al. 2016, as in the `tokenizers` library): while two neighbours form a known pair, join the pair of
 * lowest rank, the leftmost of equals.
 */
#ifndef US_FORMATS_BPE_H
#define US_FORMATS_BPE_H

#include "base/buffer.h"

struct us_bpe {
  int32_t byte_id[256];
  struct us_bpe_pair {
    uint64_t key; /* left << 32 | right, plus 1; 0 is empty */
    uint32_t rank;
    int32_t joined;
  } * pairs;
  size_t n_slots; /* a power of two, at least twice the merges */
};

/* Working memory of us_bpe_merge, reused between words; one a thread. */
struct us_bpe_scratch {
  void *memory;
  size_t bytes;
};

/* Room for n merges (at most 2^28). Call once, before the first add. */
US_CHECKED enum us_status us_bpe_reserve(struct us_bpe *bpe, size_t n_merges, struct us_err *err);

/* A pair added twice keeps the later rank. Ids are not negative. */
void us_bpe_add(struct us_bpe *bpe, int32_t left, int32_t right, uint32_t rank, int32_t joined);

/* The entry of a pair, NULL if it does not merge. */
const struct us_bpe_pair *us_bpe_find(const struct us_bpe *bpe, int32_t left, int32_t right);

/* Append the ids of a word of 1 to 2^31 - 1 bytes. O(n log n): a word of one megabyte is no trap. */
US_CHECKED enum us_status us_bpe_merge(const struct us_bpe *bpe, const char *word, size_t n,
                                       struct us_bpe_scratch *scratch, struct us_ids *ids,
                                       struct us_err *err);

void us_bpe_scratch_release(struct us_bpe_scratch *scratch);
void us_bpe_release(struct us_bpe *bpe);

#endif
