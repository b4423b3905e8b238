/* markov.h: a drafter's Markov head as two tables of the vocabulary: what a slot's logits get for the token before it.
 *
 *     struct us_markov *markov;
 *     us_markov_create(model, draft, rounding, pool, &markov, &err);       // once a drafter with shape.markov
 *     us_markov_add(markov, &forward, &pass, &err);                        // pass.logits: the head's, of all slots
 *     us_markov_free(markov);
 *
 * A drafter predicts all slots of a block at once, so slot j does not know which token slot j - 1 became. The head's low-rank term
 * tells it:
 *     logits_j = head norm(h_j) + after before[token of slot j - 1],   before = embedding in^T (N, R),   after = head out (N, R)
 * with in (R, D) and out (D, R) trained, embedding and head the frozen ones that drafts go through: a factored bigram, as DSpark's
 * Markov head and Domino's are, whose two tables have 2 R D parameters. Decoding adds it slot by slot, which reads `after` once a slot
 * and the head once a block.
 */
#ifndef US_MODEL_MARKOV_H
#define US_MODEL_MARKOV_H

#include "model/forward.h"

struct us_markov {
  struct us_matrix before, after; /* (N, R) each: bf16, or f32 where nothing is rounded (US_ROUND_NONE) */
};

/* Bytes of the table that slots read, `after` in bf16; 0 without a Markov head. Of `before` they read a row each. */
static inline uint64_t us_markov_bytes(const struct us_draft_shape *draft, uint32_t vocab) {
  return (uint64_t)draft->markov * vocab * sizeof(uint16_t);
}

/* The tables of a drafter whose shape.markov is not 0. US_ERR_MEMORY. Free with us_markov_free. */
US_CHECKED enum us_status us_markov_create(const struct us_model *model, const struct us_draft *draft,
                                           enum us_rounding rounding, struct us_pool *pool,
                                           struct us_markov **ret_markov, struct us_err *err);

/* Those of us_model_random and us_draft_random (model/random.h) of this seed, from their tensors of the vocabulary alone. */
US_CHECKED enum us_status us_markov_random(const struct us_shape *shape,
                                           const struct us_draft_shape *draft_shape, uint64_t seed,
                                           struct us_pool *pool, struct us_markov **ret_markov,
                                           struct us_err *err);

/* Slot after slot: add to pass->logits (block - 1, N) what the token before gives, and choose the slot's token as pass->opt_draw
 * says. The anchor stands before the first slot. */
US_CHECKED enum us_status us_markov_add(const struct us_markov *markov, struct us_forward *f,
                                        const struct us_draft_pass *pass, struct us_err *err);

void us_markov_free(struct us_markov *markov); /* NULL is allowed */

#endif
