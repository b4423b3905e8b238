/* precision.h: which tensor is stored in which format: rules, the table they give, and conversion.
 *
 *     struct us_precision_rules rules;
 *     us_precision_parse("experts=mxfp4,attn.qkv=fp8,attn.o=bf16,router=f32,layers.0-3.experts=bf16", &rules, &err);
 *     us_model_precision(model, &rules, &table, &rows, &err);         // --dry-run: tensor, family, format, bytes
 *     us_model_convert(model, &(struct us_convert){.rules = &rules}, pool, &quantized, &err);
 *
 * A rule is [layers.RANGE.]MODULE=FORMAT. RANGE: 3, 0-3, or * for all. FORMAT: f32, bf16, fp8, mxfp4. MODULE:
 *     all                             every matrix but the router
 *     embed, head, router
 *     attn                            attn.qkv and attn.o; attn.q, .k, .v mean attn.qkv: they are stored together
 *     mlp                             dense and experts
 *     dense, experts                  with .down, or .gate, .up, .gate_up (all three mean gate and up, stored together)
 *     draft                           every matrix of a drafter, its own output head included
 *     draft.head                      that head alone
 * Rules are tried in order and the last that matches wins; a rule that matches no tensor is an error, since it is a typo;
 * tensors that no rule matches keep their format. The router is f32 or bf16.
 */
#ifndef US_MODEL_PRECISION_H
#define US_MODEL_PRECISION_H

#include "base/pool.h"
#include "model/model.h"

#define US_MAX_RULES 64

struct us_precision_rule {
  char text[96];           /* as written, for messages */
  uint32_t first, last;    /* layers; 0 and UINT32_MAX without a range */
  bool ranged;             /* matches only tensors of layers */
  const char *families[4]; /* us_tensor_ref families, NULL after the last */
  const char *part;        /* "gate_up", "down", or NULL for both */
  enum us_format format;
};

struct us_precision_rules {
  size_t count;
  struct us_precision_rule rules[US_MAX_RULES];
};

/* Parse comma-separated rules. US_ERR_USAGE names the rule and what is wrong with it. An empty text gives none. */
US_CHECKED enum us_status us_precision_parse(const char *text, struct us_precision_rules *ret_rules,
                                             struct us_err *err);

/* The format of each of `count` tensors: NONE for vectors, its present one where no rule matches. US_ERR_USAGE for a rule
 * that matches nothing, or asks for a format that the tensor cannot have.
 *   ret_formats (count) written */
US_CHECKED enum us_status us_precision_apply(const struct us_precision_rules *rules,
                                             const struct us_tensor_ref *refs, size_t count,
                                             enum us_format *ret_formats, struct us_err *err);

/* The same for shapes whose weights are made at random, one format a family; a rule for draft.head gives the drafter a head of its own.
 * US_ERR_USAGE for a rule of some layers or of a part of a family, or for draft.head without a drafter. */
US_CHECKED enum us_status us_precision_shape(const struct us_precision_rules *rules, struct us_shape *shape,
                                             struct us_draft_shape *opt_draft, struct us_err *err);

/* One line of the dry-run table. */
struct us_precision_row {
  struct us_tensor_ref ref;
  enum us_format from, to;       /* vectors: F32 */
  uint64_t from_bytes, to_bytes; /* codes and scales */
};

/* What converting would do, tensor by tensor; *ret_rows is malloc'ed. opt_rules NULL: the table as it is. */
US_CHECKED enum us_status us_model_precision(const struct us_model *model,
                                             const struct us_precision_rules *opt_rules,
                                             struct us_precision_row **ret_rows, size_t *ret_count,
                                             struct us_err *err);
US_CHECKED enum us_status us_draft_precision(const struct us_draft *draft,
                                             const struct us_precision_rules *opt_rules,
                                             struct us_precision_row **ret_rows, size_t *ret_count,
                                             struct us_err *err);

struct us_convert {
  const struct us_precision_rules *rules;
  enum us_scale_rule scale_rule; /* MXFP4 */
  enum us_fp8_scale fp8_scale;
};

/* A new model with every matrix whose format changes decoded and encoded (post-training quantization). Matrices that keep
 * their format, and so their bits, are shared: free *ret_model before src. A NULL pool works in this thread; the result
 * does not depend on the pool. */
US_CHECKED enum us_status us_model_convert(const struct us_model *src, const struct us_convert *convert,
                                           struct us_pool *pool, struct us_model **ret_model,
                                           struct us_err *err);
US_CHECKED enum us_status us_draft_convert(const struct us_draft *src, const struct us_convert *convert,
                                           struct us_pool *pool, struct us_draft **ret_draft,
                                           struct us_err *err);

/* Encode (N, K) FP32 values into new memory of `owner` and describe it in *ret_matrix; `values(arg, row, out)` gives rows
 * and is called from several threads. What conversion, random models and training export share. */
US_CHECKED enum us_status us_matrix_build(void *owner, size_t rows, size_t cols,
                                          const struct us_matrix_encoding *encoding,
                                          void (*values)(void *arg, size_t row, float *out), void *arg,
                                          struct us_pool *pool, struct us_matrix *ret_matrix,
                                          struct us_err *err);

/* Set shape.precision to what the matrices are: of each family the format that most parameters have. */
void us_model_update_precision(struct us_model *model);

/* A drafter that shares the matrices of src but drafts with a head of its own: (N, D) values of `head` in this encoding, or with
 * `head` NULL with the target's. Free *ret_draft before src. */
US_CHECKED enum us_status us_draft_with_head(const struct us_draft *src, const struct us_matrix *head,
                                             const struct us_matrix_encoding *encoding, struct us_pool *pool,
                                             struct us_draft **ret_draft, struct us_err *err);

/* Set shape.head to what the drafter's own head is. */
void us_draft_update_head(struct us_draft *draft);

/* The format that most of a drafter's parameters have, its own head left out. */
enum us_format us_draft_format(const struct us_draft *draft);

#endif
