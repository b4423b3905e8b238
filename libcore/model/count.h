/* count.h: parameters and bytes by module family.
 *
 *     struct us_count count;
 *     us_shape_count(&shape, &count, &err);                // from a config alone: works for 1.02 T parameters
 *     count.total.parameters, count.family[US_FAMILY_EXPERTS].bytes, count.active.bytes
 */
#ifndef US_MODEL_COUNT_H
#define US_MODEL_COUNT_H

#include "model/model.h"

enum us_family {
  US_FAMILY_EMBED,
  US_FAMILY_QKV,
  US_FAMILY_O_PROJ,
  US_FAMILY_DENSE,
  US_FAMILY_EXPERTS,
  US_FAMILY_ROUTER, /* with the selection bias */
  US_FAMILY_NORM,   /* norms and sinks */
  US_FAMILY_HEAD,
  US_FAMILY_DRAFT,
  US_FAMILY_DRAFT_HEAD, /* a drafter's own copy of the output head */
  US_FAMILY_COUNT
};

struct us_count_row {
  uint64_t tensors, parameters; /* scales are not parameters */
  uint64_t bytes, scale_bytes;  /* bytes include scale_bytes; vectors count as FP32 */
};

struct us_count {
  struct us_count_row family[US_FAMILY_COUNT];
  struct us_count_row total;
  struct us_count_row active; /* what one token uses: top_k experts a layer, one row of the embedding */
};

/* "embed", "qkv", "o_proj", "dense", "experts", "router", "norm", "head", "draft", "draft.head". */
const char *us_family_name(enum us_family family);

/* Count a model as it is stored, or a shape as its config's precision would store it. */
US_CHECKED enum us_status us_model_count(const struct us_model *model, struct us_count *ret_count,
                                         struct us_err *err);
US_CHECKED enum us_status us_shape_count(const struct us_shape *shape, struct us_count *ret_count,
                                         struct us_err *err);
US_CHECKED enum us_status us_draft_count(const struct us_draft *draft, struct us_count *ret_count,
                                         struct us_err *err);

#endif
