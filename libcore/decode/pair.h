/* pair.h: what a command line names to generate with: a model, perhaps its drafter, and the model's tokenizer.
 *
 *     struct us_pair pair;
 *     if (us_pair_open("q.h5", "-", stdin, &pair, &err) != US_OK) ...      // the drafter's record comes on stdin
 *     us_executor_create_tiles(pair.model, pair.draft, pool, US_ROUND_BF16, &ex, &err);
 *     us_pair_release(&pair);
 *
 * Records are read before anything is opened: in `qat-quant ... | dflash-train --target - ... | us-serve --model q.h5
 * --draft -` all tools start at once, and q.h5 is there only when the record is.
 */
#ifndef US_DECODE_PAIR_H
#define US_DECODE_PAIR_H

#include "base/record.h"
#include "formats/tokenizer.h"
#include "model/checkpoint.h"

struct us_pair {
  struct us_record model_record, draft_record; /* draft_record.path is NULL without a drafter */
  struct us_model *model;
  struct us_draft *draft; /* NULL without */
  struct us_tokenizer *tokenizer;
};

/* Open the model `model_argument` names, and the drafter of `opt_draft_argument`; "-" is a record on `in`. Checks that
 * the drafter was made for such a model. US_ERR_INPUT also when the model has no tokenizer. On an error nothing is left. */
US_CHECKED enum us_status us_pair_open(const char *model_argument, const char *opt_draft_argument, FILE *in,
                                       struct us_pair *ret_pair, struct us_err *err);
void us_pair_release(struct us_pair *pair);

#endif
