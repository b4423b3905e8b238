/* convert.c: building matrices in a format, and models whose precision differs from another's. */
#include "model/owner.h"
#include "model/precision.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* --- one matrix --- */

struct build {
  size_t rows, cols, grain;
  const struct us_matrix_encoding *encoding;
  void (*values)(void *arg, size_t row, float *out);
  void *arg;
  unsigned char *data, *scales;
  float *scratch; /* (workers, grain, cols) */
  atomic_int failed;
  struct us_err *errs; /* (workers) */
};

/* Pieces are the chunks between which no scale is shared: us_matrix_row_grain rows, and where the FP8 grid restarts every
 * chunk, that many. */
static void build_piece(struct build *b, size_t piece, int worker) {
  size_t row = piece * b->grain, count = b->rows - row < b->grain ? b->rows - row : b->grain;
  float *values = b->scratch + (size_t)worker * b->grain * b->cols;
  for (size_t r = 0; r < count; r++) b->values(b->arg, row + r, values + r * b->cols);
  enum us_format format = b->encoding->format;
  size_t chunk = b->encoding->scale_chunk_rows;
  unsigned char *data = b->data + us_matrix_data_bytes(format, row, b->cols);
  unsigned char *scales = b->scales ? b->scales + us_matrix_scale_bytes(format, row, b->cols, chunk) : NULL;
  if (us_matrix_encode(values, count, b->cols, b->encoding, data, scales, &b->errs[worker]) != US_OK) {
    us_err_prefix(&b->errs[worker], "rows from %zu", row);
    atomic_store(&b->failed, worker + 1);
  }
}

static void build_pieces(void *arg, size_t begin, size_t end, int worker) {
  struct build *b = arg;
  for (size_t piece = begin; piece < end && !atomic_load(&b->failed); piece++) build_piece(b, piece, worker);
}

enum us_status us_matrix_build(void *owner, size_t rows, size_t cols,
                               const struct us_matrix_encoding *encoding,
                               void (*values)(void *arg, size_t row, float *out), void *arg,
                               struct us_pool *pool, struct us_matrix *ret_matrix, struct us_err *err) {
  struct build b = {.rows = rows, .cols = cols, .encoding = encoding, .values = values, .arg = arg};
  enum us_status status = us_matrix_encoding_check(encoding, cols, err);
  if (status != US_OK) return status;
  size_t data_bytes = us_matrix_data_bytes(encoding->format, rows, cols);
  size_t scale_bytes = us_matrix_scale_bytes(encoding->format, rows, cols, encoding->scale_chunk_rows);
  int workers = us_pool_threads(pool);
  b.grain = us_matrix_row_grain(encoding);
  void *data = NULL, *scales = NULL;
  status = us_owner_alloc(owner, data_bytes, &data, err);
  if (status == US_OK && scale_bytes) status = us_owner_alloc(owner, scale_bytes, &scales, err);
  if (status != US_OK) return status;
  b.data = data, b.scales = scales;
  b.scratch = malloc((size_t)workers * b.grain * cols * sizeof *b.scratch);
  b.errs = calloc((size_t)workers, sizeof *b.errs);
  if (!b.scratch || !b.errs) {
    status = us_err_memory(err, "conversion", (size_t)workers * b.grain * cols * sizeof *b.scratch);
  } else {
    us_pool_for(pool, (rows + b.grain - 1) / b.grain, 1, build_pieces, &b);
    int failed = atomic_load(&b.failed);
    if (failed) status = us_err_set(err, b.errs[failed - 1].status, "%s", b.errs[failed - 1].message);
  }
  free(b.scratch);
  free(b.errs);
  if (status != US_OK) return status;
  size_t chunk = encoding->format == US_FORMAT_FP8 ? encoding->scale_chunk_rows : 0;
  *ret_matrix = (struct us_matrix){encoding->format, rows, cols, data, scales, chunk};
  return US_OK;
}

/* --- a list of tensors --- */

static void decode_row(void *arg, size_t row, float *out) {
  us_matrix_decode_row(arg, row, out);
}

/* Fill the tensors of a new model or drafter from those of another of the same shape. */
static enum us_status convert(const struct us_tensor_ref *from, const struct us_tensor_ref *to, size_t count,
                              const enum us_format *formats, const struct us_shape *opt_shape,
                              const struct us_convert *how, void *owner, struct us_pool *pool,
                              struct us_err *err) {
  for (size_t i = 0; i < count; i++) {
    if (!from[i].matrix) {
      memcpy(*to[i].vector, *from[i].vector, from[i].rows * sizeof(float));
    } else if (formats[i] == from[i].matrix->format) {
      *to[i].matrix = *from[i].matrix;
    } else {
      struct us_matrix_encoding encoding = {
          .format = formats[i],
          .scale_rule = how->scale_rule,
          .fp8_scale = how->fp8_scale,
          .scale_chunk_rows =
              opt_shape && formats[i] == US_FORMAT_FP8 ? us_tensor_scale_chunk_rows(opt_shape, &from[i]) : 0};
      enum us_status status = us_matrix_build(owner, from[i].rows, from[i].cols, &encoding, decode_row,
                                              from[i].matrix, pool, to[i].matrix, err);
      if (status != US_OK) {
        us_err_prefix(err, "%s", from[i].name);
        return status;
      }
    }
  }
  return US_OK;
}

static enum us_status choose_formats(const struct us_convert *how, const struct us_tensor_ref *refs,
                                     size_t count, enum us_format **ret_formats, struct us_err *err) {
  for (size_t i = 0; i < count; i++) {
    if (refs[i].matrix && refs[i].matrix->format == US_FORMAT_NONE) {
      return us_err_set(err, US_ERR_USAGE, "%s: has no data", refs[i].name);
    }
  }
  *ret_formats = calloc(count, sizeof **ret_formats);
  if (!*ret_formats) return us_err_memory(err, "formats", count * sizeof **ret_formats);
  return us_precision_apply(how->rules, refs, count, *ret_formats, err);
}

static bool makes_mxfp4(const struct us_tensor_ref *refs, const enum us_format *formats, size_t count) {
  for (size_t i = 0; i < count; i++) {
    if (refs[i].matrix && formats[i] == US_FORMAT_MXFP4 && refs[i].matrix->format != US_FORMAT_MXFP4)
      return true;
  }
  return false;
}

static enum us_status copy_text(const char *text, size_t bytes, char **ret_copy, struct us_err *err) {
  if (!text) return US_OK;
  *ret_copy = malloc(bytes + 1);
  if (!*ret_copy) return us_err_memory(err, "tokenizer", bytes);
  memcpy(*ret_copy, text, bytes);
  (*ret_copy)[bytes] = 0;
  return US_OK;
}

enum us_status us_model_convert(const struct us_model *src, const struct us_convert *how,
                                struct us_pool *pool, struct us_model **ret_model, struct us_err *err) {
  struct us_tensor_ref *from = NULL, *to = NULL;
  enum us_format *formats = NULL;
  struct us_model *model = NULL;
  size_t count = 0;
  *ret_model = NULL;
  enum us_status status = us_model_tensors((struct us_model *)src, &from, &count, err);
  if (status == US_OK) status = choose_formats(how, from, count, &formats, err);
  if (status == US_OK) status = us_model_create(&src->shape, &model, err);
  if (status == US_OK) status = us_model_tensors(model, &to, &count, err);
  if (status == US_OK) status = convert(from, to, count, formats, &src->shape, how, model->owner, pool, err);
  if (status == US_OK)
    status = copy_text(src->tokenizer_json, src->tokenizer_bytes, &model->tokenizer_json, err);
  if (status == US_OK) {
    model->tokenizer_bytes = src->tokenizer_bytes;
    memcpy(model->scale_rule, src->scale_rule, sizeof model->scale_rule);
    if (makes_mxfp4(from, formats, count)) {
      strncpy(model->scale_rule, us_scale_rule_name(how->scale_rule), sizeof model->scale_rule - 1);
    }
    us_model_update_precision(model);
    *ret_model = model;
    model = NULL;
  }
  us_model_free(model);
  free(formats);
  free(from);
  free(to);
  return status;
}

enum us_status us_draft_convert(const struct us_draft *src, const struct us_convert *how,
                                struct us_pool *pool, struct us_draft **ret_draft, struct us_err *err) {
  struct us_tensor_ref *from = NULL, *to = NULL;
  enum us_format *formats = NULL;
  struct us_draft *draft = NULL;
  size_t count = 0;
  *ret_draft = NULL;
  enum us_status status = us_draft_tensors((struct us_draft *)src, &from, &count, err);
  if (status == US_OK) status = choose_formats(how, from, count, &formats, err);
  if (status == US_OK) status = us_draft_create(&src->shape, &draft, err);
  if (status == US_OK) status = us_draft_tensors(draft, &to, &count, err);
  if (status == US_OK) status = convert(from, to, count, formats, NULL, how, draft->owner, pool, err);
  if (status == US_OK) {
    us_draft_update_head(draft);
    *ret_draft = draft;
    draft = NULL;
  }
  us_draft_free(draft);
  free(formats);
  free(from);
  free(to);
  return status;
}

/* --- a drafter's head --- */

/* What src has goes to draft, but for its own head; both lists are in the same order, and a head is never the last. */
static enum us_status share_all(const struct us_draft *src, struct us_draft *draft, struct us_err *err) {
  struct us_tensor_ref *from = NULL, *to = NULL;
  size_t from_count = 0, to_count = 0;
  enum us_status status = us_draft_tensors((struct us_draft *)src, &from, &from_count, err);
  if (status == US_OK) status = us_draft_tensors(draft, &to, &to_count, err);
  for (size_t i = 0, j = 0; status == US_OK && i < from_count; i++, j++) {
    if (from[i].matrix == &src->head) i++;
    if (to[j].matrix == &draft->head) j++;
    if (from[i].matrix)
      *to[j].matrix = *from[i].matrix;
    else
      memcpy(*to[j].vector, *from[i].vector, from[i].rows * sizeof(float));
  }
  free(from);
  free(to);
  return status;
}

enum us_status us_draft_with_head(const struct us_draft *src, const struct us_matrix *head,
                                  const struct us_matrix_encoding *encoding, struct us_pool *pool,
                                  struct us_draft **ret_draft, struct us_err *err) {
  struct us_draft_shape shape = src->shape;
  struct us_draft *draft = NULL;
  *ret_draft = NULL;
  shape.head = head ? encoding->format : US_FORMAT_NONE;
  if (head && head->cols != shape.hidden)
    return us_err_set(err, US_ERR_USAGE, "a head of %zu columns for a drafter of %u", head->cols,
                      shape.hidden);
  if (head) shape.vocab = (uint32_t)head->rows;
  enum us_status status = us_draft_create(&shape, &draft, err);
  if (status == US_OK) status = share_all(src, draft, err);
  if (status == US_OK && head) {
    struct us_matrix values = *head;
    status = us_matrix_build(draft->owner, head->rows, head->cols, encoding, decode_row, &values, pool,
                             &draft->head, err);
    if (status != US_OK) us_err_prefix(err, "the drafter's head");
  }
  if (status != US_OK) {
    us_draft_free(draft);
    return status;
  }
  *ret_draft = draft;
  return US_OK;
}

void us_draft_update_head(struct us_draft *draft) {
  draft->shape.head = draft->head.rows ? draft->head.format : US_FORMAT_NONE;
}
