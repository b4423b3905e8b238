/* round.h: the decisions of one speculative round, on logits: what to propose, what to commit. No executor here.
 *
 *     us_round_propose(&rules, &sequence, draft_logits, &round);          // proposals from the drafter's rows or a replay
 *     ... one target pass over anchor and proposals ...
 *     us_round_verify(&rules, &sequence, logits, scratch, &round, &err);  // round.committed tokens, round.accepted of them drafts
 */
#ifndef US_DECODE_ROUND_H
#define US_DECODE_ROUND_H

#include "decode/adaptive.h"
#include "decode/sequence.h"

/* What is the same in all rounds of a call. */
struct us_round_rules {
  enum us_verify_rule rule;
  size_t N;
  const struct us_verify_cost *adaptive; /* NULL: verify every proposal */
  const float *accept;                   /* replay rates */
  size_t accept_count;
};

struct us_round {
  uint32_t drafts; /* in: most that may be proposed; out: proposals to verify */
  int32_t proposals[US_MAX_BLOCK];
  bool sampled;                    /* the proposals were drawn from the drafter's law, not its argmax */
  const float *draft_logits;       /* (drafts, N) */
  uint32_t accepted;               /* leading proposals that survived */
  int32_t committed[US_MAX_BLOCK]; /* accepted + 1 tokens */
};

/* Scratch of reject and block, (block, N) each; unused by match. */
struct us_round_scratch {
  double *p, *q, *weights;
};

/* The rule that a request's rounds follow: every rule is match when greedy. */
enum us_verify_rule us_round_rule(const struct us_round_rules *rules, const struct us_request *request);

/* Whether its proposals are drawn from the drafter's law; else they are its likeliest, or a replay's. */
bool us_round_draws(const struct us_round_rules *rules, const struct us_request *request);

/* Choose round->drafts proposals: the replay's if the request has one, else argmax (match) or draws (reject, block) of
 * draft_logits (drafts, N), which may be NULL with a replay. */
void us_round_propose(const struct us_round_rules *rules, const struct us_sequence *sequence,
                      const float *draft_logits, struct us_round *round);

/* Verify against the target's logits (drafts + 1, N). US_ERR_CHECK if a row that counts is not finite. */
US_CHECKED enum us_status us_round_verify(const struct us_round_rules *rules,
                                          const struct us_sequence *sequence, const float *logits,
                                          const struct us_round_scratch *scratch, struct us_round *round,
                                          struct us_err *err);

/* US_ERR_CHECK: the logits for `position` are not finite. */
US_CHECKED enum us_status us_round_broken(uint32_t position, struct us_err *err);

/* Draw the target's token of `position` as plain decoding does. US_ERR_CHECK if the row is not finite. */
US_CHECKED enum us_status us_round_draw(const struct us_request *request, uint32_t sample, uint32_t position,
                                        const float *logits, size_t N, int32_t *ret_token,
                                        struct us_err *err);

#endif
