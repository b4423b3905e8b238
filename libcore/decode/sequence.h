/* sequence.h: one sample of a request while it runs: what is committed, where it stands, when it ends.
 *
 *     us_sequence_commit(&sequence, tokenizer, token, logprob, &err);     // appends; sequence.output->finish may be set
 *     us_sequence_send(&sequence, options);                               // streams the text that is safe to show
 *
 * Ends are checked token by token in the order of commitment, so a stop inside an accepted prefix cuts what follows it.
 */
#ifndef US_DECODE_SEQUENCE_H
#define US_DECODE_SEQUENCE_H

#include "decode/generate.h"

struct us_sequence {
  const struct us_request *request;
  struct us_output *output;
  size_t request_index;
  uint32_t sample;
  uint32_t limit; /* generated tokens at most */

  struct us_kv *kv;       /* target cache: positions < `position` are committed */
  struct us_kv *draft_kv; /* drafter context: exactly the positions < `position`; NULL without a drafter */
  uint32_t position;      /* of the anchor, the last committed token, whose K/V and taps do not exist yet */
  int32_t anchor;

  struct us_token_stream stream;
  size_t logprob_capacity;
  double logprob_sum;
  size_t sent_ids, sent_bytes;
  double first_token; /* clock at the first token */
};

/* Append a committed token: ids, text, log-probability, and finish if the sequence ends with it. */
US_CHECKED enum us_status us_sequence_commit(struct us_sequence *sequence,
                                             const struct us_tokenizer *tokenizer, int32_t token,
                                             float logprob, struct us_err *err);

/* Send what was committed since the last event; sets finish to CANCELLED if the callback says so. */
void us_sequence_send(struct us_sequence *sequence, const struct us_generate_options *options);

/* How often the last `gram` ids occur in ids (overlaps count). */
uint32_t us_sequence_loops(const int32_t *ids, size_t count, size_t gram);

#endif
