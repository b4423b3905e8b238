/* bind.h: from named tensors in some file to the matrices and vectors of a model: what both file formats share.
 *
 *     struct us_store store = {.arg = file, .path = path, .find = find, .count = count, .name_at = name_at};
 *     us_bind(&store, refs, count, &model->shape, model->owner, &err);     // checks every dtype and shape
 *     us_bind_leftovers(&store, &notes, &err);                            // what was in the file besides
 *     us_store_release(&store);
 *
 * A matrix points into the file, unless it is not aligned for its element type there (then it is copied) or has FP8
 * scales in E8M0 (then those are expanded). Private to libcore/model.
 */
#ifndef US_MODEL_BIND_H
#define US_MODEL_BIND_H

#include "base/buffer.h"
#include "formats/safetensors.h"
#include "model/model.h"

/* A tensor as a file has it. `id` identifies it among all tensors of the file. */
struct us_stored {
  const void *id;
  const char *file; /* that holds it, for messages */
  enum us_dtype dtype;
  uint32_t ndim;
  uint64_t dims[US_SAFETENSORS_MAX_DIMS];
  const void *data;
};

struct us_store {
  void *arg;
  const char *path;
  bool (*find)(void *arg, const char *name, struct us_stored *ret_stored);
  size_t (*count)(void *arg);
  const char *(*name_at)(void *arg, size_t i, const void **ret_id);

  const void **used; /* ids that were bound */
  size_t used_count, used_size;
};

/* Bind all tensors. US_ERR_INPUT names file and tensor: missing, of a dtype or shape that the config does not say, or a
 * vector with NaN or Inf. opt_shape: of a model, NULL for a drafter. */
US_CHECKED enum us_status us_bind(struct us_store *store, const struct us_tensor_ref *refs, size_t count,
                                  const struct us_shape *opt_shape, void *owner, struct us_err *err);

/* Mark a tensor as known, so that it is no leftover. */
US_CHECKED enum us_status us_bind_mark(struct us_store *store, const void *id, struct us_err *err);

/* Look at what was not bound: MTP tensors and other modalities become a line in notes; a tensor that belongs to the layers,
 * the embedding or the head (a bias, a sink that the config denies, a second scale) is US_ERR_INPUT. */
US_CHECKED enum us_status us_bind_leftovers(struct us_store *store, struct us_buffer *notes,
                                            struct us_err *err);

void us_store_release(struct us_store *store);

/* Name of the scales that go with a matrix: NAME_scale_inv or NAME_scale; false for formats without. */
bool us_scale_name(const struct us_tensor_ref *ref, enum us_format format, char *ret_name, size_t size);

#endif
