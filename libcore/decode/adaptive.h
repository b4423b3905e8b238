/* adaptive.h: how many drafts are worth verifying: expected tokens against the bytes that verifying them streams.
 *
 *     struct us_verify_cost cost = us_verify_cost_of(model, draft);
 *     uint32_t n = us_adaptive_length(&cost, confidence, drafts);
 *
 * A round that verifies n drafts commits 1 + c_1 + c_1 c_2 + ... tokens if slot i survives with probability c_i, and
 * streams fixed + expert (1 - (1 - K/E)^(n+1)) bytes, experts being chosen uniformly. The n with the most expected tokens
 * a byte wins. Lossless under every rule because it is non-anticipating: c_i is the drafter's largest probability at a
 * slot, which is fixed before any proposal or acceptance is drawn (research: DSpark, CaDDTree; see docs/decoding.md).
 */
#ifndef US_DECODE_ADAPTIVE_H
#define US_DECODE_ADAPTIVE_H

#include "base/speculate.h"
#include "model/model.h"

/* Sum the bytes of a model's and a drafter's matrices; opt_draft may be NULL. */
struct us_verify_cost us_verify_cost_of(const struct us_model *model, const struct us_draft *opt_draft);

#endif
