/* weights_layout.c: page shapes, and the geometry of a rank's weights from a shape alone. */
#include "device/weights_layout.h"
#include "device/weights_plan.h"

#include <stdlib.h>

/* Groups of 32 columns that 16 rows of a page hold at most: 2048 bytes of codes. */
static uint32_t most_groups(enum us_format format) {
  return format == US_FORMAT_F32 ? 1 : format == US_FORMAT_BF16 ? 2 : 4;
}

enum us_status us_weights_pages(enum us_format format, uint32_t rows, uint32_t cols, enum us_weights_use use,
                                struct us_pages *ret_pages, struct us_err *err) {
  if (!cols || cols % 32)
    return us_err_set(err, US_ERR_USAGE, "a rank's %u columns are not a multiple of 32", cols);
  bool two =
      use == US_WEIGHTS_GATED || (use == US_WEIGHTS_PLAIN && format == US_FORMAT_MXFP4 && rows % 32 == 0);
  if (use != US_WEIGHTS_PLAIN && format == US_FORMAT_F32)
    return us_err_set(err, US_ERR_USAGE,
                      "experts and MLPs in f32 are not supported on the GPU; convert them");
  uint32_t most = most_groups(format), groups = cols / 32, g;
  if (two && format != US_FORMAT_MXFP4) most /= 2;
  for (g = most; groups % g || (format == US_FORMAT_FP8 && g == 3); g--) {
  } /* three groups cut FP8's blocks of 128 */
  *ret_pages = (struct us_pages){format, rows, cols, two ? 32 : 16, g * 32};
  return us_pages_check(ret_pages, err);
}

/* ---- skeletons --------------------------------------------------------------------------------------------------- */

static void set_formats(const struct us_shape *shape, const struct us_tensor_ref *refs, size_t count,
                        bool chunks) {
  for (size_t i = 0; i < count; i++) {
    if (!refs[i].matrix) continue;
    refs[i].matrix->format = us_tensor_format(&shape->precision, &refs[i]);
    if (chunks && refs[i].matrix->format == US_FORMAT_FP8)
      refs[i].matrix->scale_chunk_rows = us_tensor_scale_chunk_rows(shape, &refs[i]);
  }
}

enum us_status us_weights_skeleton(const struct us_shape *shape, const struct us_draft_shape *opt_draft,
                                   struct us_model **ret_model, struct us_draft **ret_opt_draft,
                                   struct us_err *err) {
  struct us_tensor_ref *refs = NULL, *draft_refs = NULL;
  size_t count = 0, draft_count = 0;
  *ret_model = NULL, *ret_opt_draft = NULL;
  enum us_status status = us_model_create(shape, ret_model, err);
  if (status == US_OK) status = us_model_tensors(*ret_model, &refs, &count, err);
  if (status == US_OK && opt_draft) status = us_draft_create(opt_draft, ret_opt_draft, err);
  if (status == US_OK && opt_draft) status = us_draft_tensors(*ret_opt_draft, &draft_refs, &draft_count, err);
  if (status == US_OK) {
    set_formats(shape, refs, count, true);
    set_formats(shape, draft_refs, draft_count, false);
    if (*ret_opt_draft) (*ret_opt_draft)->head.format = opt_draft->head;
  } else {
    us_model_free(*ret_model), us_draft_free(*ret_opt_draft);
    *ret_model = NULL, *ret_opt_draft = NULL;
  }
  free(refs), free(draft_refs);
  return status;
}

/* ---- geometry ---------------------------------------------------------------------------------------------------- */

enum us_status us_device_weights_layout(const struct us_shape *shape, const struct us_draft_shape *opt_draft,
                                        uint32_t rank, uint32_t ranks, struct us_device_weights **ret_weights,
                                        struct us_err *err) {
  struct us_model *model = NULL;
  struct us_draft *draft = NULL;
  struct us_weights_plan *plan = NULL;
  *ret_weights = NULL;
  enum us_status status = us_weights_skeleton(shape, opt_draft, &model, &draft, err);
  if (status == US_OK) status = us_weights_plan_create(model, draft, rank, ranks, &plan, err);
  if (status == US_OK) {
    *ret_weights = plan->weights;
    plan->weights = NULL;
  }
  us_weights_plan_free(plan);
  us_model_free(model), us_draft_free(draft);
  return status;
}

enum us_status us_device_weights_bytes(const struct us_shape *shape, const struct us_draft_shape *opt_draft,
                                       const struct us_device_weights_options *options,
                                       struct us_device_bytes *ret_bytes, struct us_err *err) {
  struct us_device_weights *weights = NULL;
  enum us_status status =
      us_device_weights_layout(shape, opt_draft, options->rank, options->ranks, &weights, err);
  if (status == US_OK) *ret_bytes = weights->bytes;
  us_device_layout_free(weights);
  return status;
}

void us_device_layout_free(struct us_device_weights *weights) {
  if (!weights) return;
  free(weights->layers), free(weights->draft_layers);
  free(weights);
}
