/* shape_share.h: the shape of what one of several ranks holds, as a model of its own.
 *
 *     us_shape_share(&shape, 4, &err);                    // a quarter of the heads, of every inner size, of the vocabulary
 *     us_draft_shape_share(&draft, &shape, 4, &err);      // the same of its drafter, after the target's
 *
 * Time one rank of a model that needs more GPUs than there are: a share streams what a rank streams (docs/engine.md,
 * "The way of a tile": columns of every expert, heads, rows of the head), and cut over R GPUs again it exchanges as R ranks
 * do. The residual stream keeps its width, router and experts their number. It computes something else than the
 * whole model, so it is for random weights only.
 */
#ifndef US_MODEL_SHAPE_SHARE_H
#define US_MODEL_SHAPE_SHARE_H

#include "model/shape.h"

/* *shape becomes one of `parts` equal shares; the vocabulary is rounded up, and ends of text beyond it are dropped.
 * US_ERR_INPUT names a field that cannot be cut; US_ERR_USAGE: no parts. *shape stays as it was then. */
US_CHECKED enum us_status us_shape_share(struct us_shape *shape, uint32_t parts, struct us_err *err);

/* The same of a drafter of the model that *target_share is the share of; a mask beyond the vocabulary becomes its last
 * id, since random weights have no mask of their own. Errors as above. */
US_CHECKED enum us_status us_draft_shape_share(struct us_draft_shape *draft,
                                               const struct us_shape *target_share, uint32_t parts,
                                               struct us_err *err);

#endif
