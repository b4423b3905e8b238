/* draft_replay.h: what verification would keep of a drafter's proposals, from answers that its target gave without it.
 *
 *     struct us_draft_replay replay = {.learner = learner, .target = model, .draft = draft, .block = 8};
 *     us_run_open("plain.jsonl", &run, &err);
 *     us_draft_replay(&replay, run->entries, run->n, &err);          // entries[i].stats as if they had been drafted
 *
 * Greedy answers do not depend on the drafter, so the rounds that decoding would have taken follow from the answer: every token
 * of it is an anchor of one training pass (training/draft_blocks.h), which tells how many slots are right before the first miss,
 * and the walk over the answer goes on behind those and the target's own token. It is what us_generate counts with --verify match at
 * temperature 0, up to roundings of sums in another order. Answers drawn at a temperature give what matching their very tokens
 * would have accepted.
 */
#ifndef US_TRAINING_DRAFT_REPLAY_H
#define US_TRAINING_DRAFT_REPLAY_H

#include "decode/run.h"
#include "training/learner.h"

struct us_draft_replay {
  struct us_learner *learner; /* of one rank */
  struct us_pool *pool;       /* decodes the target's weights; NULL: this thread */
  struct us_model *target;
  struct us_draft *draft;
  uint32_t block; /* anchor and drafts a round; 0: the drafter's */
};

/* Replace the stats of every entry; there are no seconds in them. US_ERR_USAGE for a block out of range or several ranks; US_ERR_INPUT for a
 * token that is not in the target's vocabulary, or a drafter of another target. */
US_CHECKED enum us_status us_draft_replay(const struct us_draft_replay *replay, struct us_run_entry *entries,
                                          size_t n, struct us_err *err);

#endif
