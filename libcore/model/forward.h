/* forward.h: the steps that forward passes are made of, each run over a thread pool, with the memory they need.
 *
 *     struct us_forward f = {.pool = pool, .isa = us_isa_resolve(US_ISA_BEST), .round_bf16 = true};
 *     float *h = us_forward_need(&f, US_WORK_H, R * D, &status, &err);
 *     us_forward_norm(&f, h, weight, R, D, eps, NULL, packed);  // norm, rounded, packed for us_forward_linear
 *     us_forward_linear(&f, &layer->o_proj, packed, R, y, D);
 *     us_forward_release(&f);
 *
 * Used by the reference executor and by the drafter; a step is one operation of kernels/ on all rows.
 */
#ifndef US_MODEL_FORWARD_H
#define US_MODEL_FORWARD_H

#include "kernels/cpu/isa.h"
#include "kernels/experts/experts.h"
#include "model/executor.h"

/* Buffers by purpose; each grows to the largest pass seen and is then reused. */
enum us_work {
  US_WORK_H,         /* (R, D) residual stream */
  US_WORK_NORM,      /* (R, D) */
  US_WORK_PACKED,    /* (R, packed width of the widest input of a projection) */
  US_WORK_QKV,       /* (R, H*Q + G*Q + G*V) */
  US_WORK_Q,         /* (R, H*Q) */
  US_WORK_ATTENTION, /* (R, H*V) */
  US_WORK_Y,         /* (R, D) output of a projection before the residual add */
  US_WORK_GATE,      /* (R, F) dense MLP */
  US_WORK_UP,        /* (R, F) */
  US_WORK_ROUTER,    /* (R, E) router logits */
  US_WORK_ROUTES,    /* ids, weights and groups */
  US_WORK_INNER,     /* (R*K, packed F) */
  US_WORK_ROPE,      /* (2, R, rotary_dim) */
  US_WORK_SCRATCH,   /* (threads, scratch) */
  US_WORK_BLOCK,     /* one page for a drafter's block */
  US_WORK_MARKOV,    /* a row of a Markov head, packed, and what it adds (N) */
  US_WORK_COUNT
};

struct us_forward {
  struct us_pool *pool;
  enum us_isa isa;
  bool round_bf16;
  void *work[US_WORK_COUNT];
  size_t work_bytes[US_WORK_COUNT];
};

/* The buffer, at least `floats` long and 64-byte aligned; its content is lost when it grows. Does nothing and returns
 * NULL unless *status is US_OK. */
float *us_forward_need(struct us_forward *f, enum us_work work, size_t floats, enum us_status *status,
                       struct us_err *err);
void us_forward_release(struct us_forward *f);

/* plain (R, D) = rmsnorm(x), and packed (R, packed D) the same packed. */
void us_forward_norm(struct us_forward *f, const float *x, const float *weight, size_t R, size_t D,
                     double eps, float *plain, float *packed);

/* y (R, y_stride), columns [0, N) = packed x W^T. */
void us_forward_linear(struct us_forward *f, const struct us_matrix *w, const float *packed, size_t R,
                       float *y, size_t y_stride);

/* packed (R, packed K) from x (R, K). */
void us_forward_pack(struct us_forward *f, const float *x, size_t R, size_t K, float *packed);

/* y (R, D) = down(swiglu(gate x, up x)) of a dense MLP. `packed` holds x and is overwritten by the inner rows. */
enum us_status us_forward_dense(struct us_forward *f, const struct us_matrix *gate,
                                const struct us_matrix *up, const struct us_matrix *down, float *packed,
                                size_t R, float *y, struct us_err *err);

/* Rope tables (R, rotary_dim) of positions. */
void us_forward_rope(double theta, uint32_t rotary_dim, const struct us_row *rows, size_t R, float *tables);

/* Attention of rows [begin, end) of a pass on one layer: q (R, H*Q) to out (R, H*V). */
struct us_forward_attention {
  const struct us_row *rows; /* their kv holds the keys */
  size_t begin, end;
  uint32_t layer;
  const struct us_attention_shape *shape;
  const float *sink;     /* NULL where the layer has none */
  const float *q;        /* (R, H*Q) */
  float *out;            /* (R, H*V) */
  const void *opt_block; /* a drafter's block, as us_attention_args */
  uint32_t block_position, block_rows;
};
enum us_status us_forward_attention(struct us_forward *f, const struct us_forward_attention *attention,
                                    struct us_err *err);

/* Widths a drafter and a target pass share: floats of one packed row for the widest projection input. */
size_t us_forward_packed_width(size_t a, size_t b, size_t c);

/* The drafter's two passes; `f` belongs to the executor. A block's logits are without what a Markov head adds (model/markov.h). */
enum us_status us_draft_forward_context(struct us_forward *f, const struct us_draft *draft,
                                        const struct us_draft_context *context, struct us_err *err);
enum us_status us_draft_forward_block(struct us_forward *f, const struct us_model *model,
                                      const struct us_draft *draft, const struct us_draft_pass *pass,
                                      struct us_err *err);

/* Whether a cache has the layers and heads of this spec. US_ERR_USAGE says what differs. */
enum us_status us_forward_check_kv(const struct us_kv *kv, const struct us_kv_spec *spec, struct us_err *err);

#endif
