/* lower.h: from a shape to a tile program.
 *
 *     struct us_lower_options options = {.ranks = 4, .rows = 8};
 *     struct us_program *program;
 *     if (us_lower_target(&shape, &options, &program, &err) != US_OK) ...
 *     us_program_free(program);
 */
#ifndef US_PLAN_LOWER_H
#define US_PLAN_LOWER_H

#include "model/model.h"
#include "plan/program.h"

/* Zero fields take the defaults. */
struct us_lower_options {
  uint32_t ranks;     /* shards of the weights; 1 */
  uint32_t rows;      /* R; 1 */
  uint32_t tile;      /* output rows of a linear tile; 64 */
  uint32_t head_tile; /* vocabulary rows of a head tile; 256 */
  uint32_t row_tile;  /* token rows of a norm tile; 4 */
  bool no_head;       /* leave the head out: prefill of rows whose logits nobody wants */
  const struct us_model
      *model; /* formats and bytes of this model's matrices instead of the shape's precision */
  const struct us_draft *draft;
};

/* Lower a target pass. US_ERR_USAGE when the shape cannot be cut into that many ranks (heads, inner columns). */
US_CHECKED enum us_status us_lower_target(const struct us_shape *shape,
                                          const struct us_lower_options *options,
                                          struct us_program **ret_program, struct us_err *err);

/* Lower a draft block (options->rows = B) or the projection of options->rows committed rows' features. `target` gives
 * the vocabulary and, for a drafter without a head of its own, the head's format. */
US_CHECKED enum us_status us_lower_draft(const struct us_draft_shape *draft, const struct us_shape *target,
                                         const struct us_lower_options *options,
                                         struct us_program **ret_program, struct us_err *err);
US_CHECKED enum us_status us_lower_context(const struct us_draft_shape *draft, const struct us_shape *target,
                                           const struct us_lower_options *options,
                                           struct us_program **ret_program, struct us_err *err);

void us_program_free(struct us_program *program);

#endif
