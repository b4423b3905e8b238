/* weights_layout.h: how a shape's matrices are cut into ranks and pages: geometry without data, on any machine.
 *
 *     struct us_device_weights *weights;
 *     us_device_weights_layout(&shape, opt_draft_shape, rank, ranks, &weights, &err);    // every pages.pages is NULL
 *     weights->layers[3].up.pages.slices ...
 *     us_device_layout_free(weights);
 *
 * One rule for whoever fills pages (weights.c) and whoever plans with them (schedule.c). No GPU.
 */
#ifndef US_DEVICE_WEIGHTS_LAYOUT_H
#define US_DEVICE_WEIGHTS_LAYOUT_H

#include "device/weights.h"
#include "kernels/pages/pages.h"

/* What loaded or synthetic weights of this shape and its precision look like: everything but device pointers is set. */
US_CHECKED enum us_status us_device_weights_layout(const struct us_shape *shape,
                                                   const struct us_draft_shape *opt_draft, uint32_t rank,
                                                   uint32_t ranks, struct us_device_weights **ret_weights,
                                                   struct us_err *err);

/* Host memory only; us_device_weights_free is for weights on a GPU. NULL is allowed. */
void us_device_layout_free(struct us_device_weights *weights);

/* What a packed matrix is used for: it decides the height of its tiles. */
enum us_weights_use {
  US_WEIGHTS_PLAIN, /* 32 rows for MXFP4 with rows % 32 == 0, else 16 */
  US_WEIGHTS_GATED, /* gate above up: 32 rows */
  US_WEIGHTS_DOWN,  /* of experts: 16 rows */
};

/* Bytes of a page, at most: 16 of them are a stage of the engine's ring. */
#define US_WEIGHTS_PAGE_BYTES (US_ENGINE_STAGE_BYTES / 16)

/* Pages of a rank's (rows, cols): as many groups of 32 columns as a page has room for and divide cols. US_ERR_USAGE: gate and
 * up in f32, for which a page has no room, or cols that are not a multiple of 32. */
US_CHECKED enum us_status us_weights_pages(enum us_format format, uint32_t rows, uint32_t cols,
                                           enum us_weights_use use, struct us_pages *ret_pages,
                                           struct us_err *err);

/* Empty model and drafter of a shape whose matrices have the formats of its precision but no data. */
US_CHECKED enum us_status us_weights_skeleton(const struct us_shape *shape,
                                              const struct us_draft_shape *opt_draft,
                                              struct us_model **ret_model, struct us_draft **ret_opt_draft,
                                              struct us_err *err);

#endif
