/* summary.h: what recorded runs show, scenario by scenario: acceptance length, rates by position, speed, exact match.
 *
 *     struct us_summary summary = {0};
 *     for (size_t i = 0; i < run->n; i++)
 *       if (us_summary_add(&summary, &run->entries[i], &err) != US_OK) ...;
 *     us_summary_finish(&summary);
 *     summary.groups[g].scenario, summary.groups[g].length, ..., summary.all.length
 *     us_summary_release(&summary);
 *
 * Acceptance length is pooled: committed tokens / target rounds, the target's own token included; its standard error is
 * that of a ratio over requests. An entry is one sample of one turn of a prompt.
 */
#ifndef US_DECODE_SUMMARY_H
#define US_DECODE_SUMMARY_H

#include "decode/run.h"

struct us_summary_group {
  char scenario[128]; /* "" where the run names none */
  uint64_t entries, tokens;
  struct us_decode_stats stats;                    /* sums; first_token_seconds too */
  uint64_t loops;                                  /* entries cut for repeating themselves */
  uint64_t answered, exact;                        /* entries with a reference answer; those that match it */
  double squares_committed, squares_rounds, cross; /* sums over entries, for the error */

  /* filled by us_summary_finish; NAN where there was nothing to divide by */
  double length, length_error;
  double rate[US_MAX_BLOCK];  /* of the proposals verified in slot i, the share that survived */
  uint32_t slots;             /* rates that mean something */
  double tokens_per_second;   /* committed / time from first to last token: of one request, also in a batch */
  double first_token_seconds; /* mean */
  double loop_share;
  double exact_share, exact_error; /* binomial error */
};

struct us_summary {
  struct us_summary_group *groups; /* in the order of first appearance */
  size_t n;
  struct us_summary_group all;
};

US_CHECKED enum us_status us_summary_add(struct us_summary *summary, const struct us_run_entry *entry,
                                         struct us_err *err);
void us_summary_finish(struct us_summary *summary);
void us_summary_release(struct us_summary *summary);

#endif
