/* roofline.h: bytes that one decode round streams, by module, and the time below which no engine can get.
 *
 *     struct us_roofline roofline;
 *     us_roofline_of_shape(&shape, NULL, 8, &roofline, &err);              // 8 rows, no drafter
 *     double floor = us_roofline_seconds(&roofline, 4, 4.62e12);           // four GPUs of 4.62 TB/s
 *
 * Bytes are those of the tile program at one rank: weights read once a round, experts routed uniformly. Keys and values,
 * activations and exchange between GPUs are not in it.
 */
#ifndef US_PLAN_ROOFLINE_H
#define US_PLAN_ROOFLINE_H

#include "model/shape.h"

struct us_roofline {
  uint32_t rows;
  double distinct; /* expected distinct experts of a MoE layer; 0 without experts */
  double experts, qkv, o_proj, dense, router, head, embed; /* bytes of the target pass */
  double draft, draft_head; /* bytes of one draft block and of its context rows; 0 without a drafter */
  double total;
};

/* A verify (or plain decode) pass over `rows` rows; with a drafter, the draft pass too. */
US_CHECKED enum us_status us_roofline_of_shape(const struct us_shape *shape,
                                               const struct us_draft_shape *opt_draft, uint32_t rows,
                                               struct us_roofline *ret_roofline, struct us_err *err);

/* total / (gpus * bytes_per_second). */
double us_roofline_seconds(const struct us_roofline *roofline, uint32_t gpus, double bytes_per_second);

#endif
