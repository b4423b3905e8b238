/* roofline.c: bytes and floor of a decode round. */
#include "plan/roofline.h"

#include "model/markov.h"
#include "plan/lower.h"
#include "plan/price.h"

static enum us_status price_target(const struct us_shape *shape, uint32_t rows, struct us_roofline *r,
                                   struct us_err *err) {
  struct us_program *program;
  enum us_status status = us_lower_target(shape, &(struct us_lower_options){.rows = rows}, &program, err);
  if (status != US_OK) return status;
  struct us_price price;
  r->distinct = us_expected_active(shape->experts, shape->top_k, rows);
  us_program_price(program, r->distinct, &price);
  us_program_free(program);
  r->experts = price.by_op[US_TASK_EXPERT_UP] + price.by_op[US_TASK_EXPERT_DOWN];
  r->dense = price.by_op[US_TASK_DENSE_UP] + price.by_op[US_TASK_DENSE_DOWN];
  r->qkv = price.by_op[US_TASK_QKV];
  r->o_proj = price.by_op[US_TASK_O_PROJ];
  r->router = price.by_op[US_TASK_ROUTER];
  r->head = price.by_op[US_TASK_HEAD];
  r->embed = price.by_op[US_TASK_EMBED_NORM];
  r->total = price.total;
  return US_OK;
}

/* The block pass and the projection of the round's committed rows into context: k and v are read by both. What a Markov head's slots
 * read is read from memory once. */
static enum us_status price_draft(const struct us_draft_shape *draft, const struct us_shape *target,
                                  uint32_t rows, struct us_roofline *r, struct us_err *err) {
  struct us_price price;
  struct us_program *program;
  struct us_lower_options options = {.rows = rows};
  enum us_status status = us_lower_draft(draft, target, &options, &program, err);
  if (status != US_OK) return status;
  us_program_price(program, 0, &price);
  us_program_free(program);
  r->draft_head = price.by_op[US_TASK_HEAD];
  r->draft = price.total - r->draft_head;
  status = us_lower_context(draft, target, &options, &program, err);
  if (status != US_OK) return status;
  us_program_price(program, 0, &price);
  us_program_free(program);
  r->draft += price.total + (double)us_markov_bytes(draft, target->vocab);
  r->total += r->draft + r->draft_head;
  return US_OK;
}

enum us_status us_roofline_of_shape(const struct us_shape *shape, const struct us_draft_shape *opt_draft,
                                    uint32_t rows, struct us_roofline *ret_roofline, struct us_err *err) {
  *ret_roofline = (struct us_roofline){.rows = rows};
  enum us_status status = price_target(shape, rows, ret_roofline, err);
  if (status != US_OK || !opt_draft) return status;
  return price_draft(opt_draft, shape, rows, ret_roofline, err);
}

double us_roofline_seconds(const struct us_roofline *roofline, uint32_t gpus, double bytes_per_second) {
  return roofline->total / (gpus * bytes_per_second);
}
