/* verify.h: how many drafted tokens survive, and what the target emits after them.
 *
 *     struct us_verify v = {.N = N, .drafts = 7, .tokens = x, .p = p, .q = q};
 *     us_verify_thresholds(US_VERIFY_BLOCK, &v, h);
 *     uint32_t accepted = us_verify_accepted(US_VERIFY_BLOCK, h, u, 7);       // u: uniforms in [0, 1)
 *     us_verify_emission(US_VERIFY_BLOCK, &v, accepted, weights);             // draw one more token from these
 *
 * Slot i (from 0) proposes tokens[i], drawn from q_i; p_i is the target's distribution after the proposals before slot
 * i, p_drafts the one after all of them. Rules, all lossless:
 *
 *   match   the target's own token is drawn at each slot; a proposal survives while it equals that token. Speculative
 *           output equals plain output token for token, at any temperature, since both draw with the same noise.
 *   reject  accept with probability min(1, p_i(x_i) / q_i(x_i)); after the first rejection draw from (p_i - q_i)+
 *           (Leviathan et al., 2211.17192; Chen et al., 2302.01318).
 *   block   joint acceptance over the whole block, never fewer tokens on average (Sun et al., 2403.10444).
 *
 * p must be after all of the target's processing (temperature, filters), q the law the proposals were really drawn from;
 * q NULL says that every proposal is a point mass (argmax drafts, replayed tokens). Everything is a function of the
 * probabilities and of uniforms handed in, so a test can integrate over the uniforms exactly. Nothing allocates.
 */
#ifndef US_DECODE_VERIFY_H
#define US_DECODE_VERIFY_H

#include "base/err.h"
#include "base/speculate.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct us_verify {
  size_t N;              /* vocabulary */
  uint32_t drafts;       /* proposals */
  const int32_t *tokens; /* (drafts) */
  const double *p;       /* (drafts + 1, N), rows sum to 1 */
  const double *q;       /* (drafts, N), or NULL: point masses */
};

/* "match", "reject", "block". us_verify_parse returns false for another name. */
const char *us_verify_name(enum us_verify_rule rule);
bool us_verify_parse(const char *name, enum us_verify_rule *ret_rule);

/* match: length of the prefix of tokens (drafts) that equals the target's draws. */
static US_HD uint32_t us_verify_match(const int32_t *tokens, const int32_t *targets, uint32_t drafts) {
  uint32_t n = 0;
  while (n < drafts && tokens[n] == targets[n]) n++;
  return n;
}

/* h (drafts): slot i's uniform must be below h[i]. reject: min(1, p / q). block: h_i of 2403.10444. Not for match. */
void us_verify_thresholds(enum us_verify_rule rule, const struct us_verify *v, double *h);

/* weights (N), not normalised: the law of the token emitted after `accepted` proposals: p_drafts if all survived, else
 * the residual (p - q)+ for reject, (pi p - q)+ for block. */
void us_verify_emission(enum us_verify_rule rule, const struct us_verify *v, uint32_t accepted,
                        double *weights);

#endif
