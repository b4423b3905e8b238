/* gptq_state.h: what gptq_start.c and gptq_inputs.c share: two models side by side and the part of a layer at hand. Internal. */
#ifndef US_TRAINING_GPTQ_STATE_H
#define US_TRAINING_GPTQ_STATE_H

#include "training/gptq.h"
#include "training/model_train_state.h"
#include "training/rows.h"

/* Shares of what the model has lost so far that a matrix makes up for: in its inputs, and in the stream that its output is added
 * to. Less than all: both are estimated on a few sequences (docs/results.md, "Errors made up for by later matrices"). */
#define US_GPTQ_OF_INPUTS 0.8f
#define US_GPTQ_OF_STREAM 0.8f

/* Inputs x (rows, K) of one or two matrices, and what they are less than the original's. */
struct us_gptq_input {
  size_t K, rows;
  const float *x, *lost;   /* (rows, K) in the model rounded so far; the original's less x */
  const float *opt_stream; /* (rows, D) lost by the stream that the output is added to, if to any */
  float *moments;          /* (K, K) sum of x x^T, then its factor */
  float *crossed;          /* (K, K) sum of lost x^T */
  float *opt_made_up;      /* (D, K) sum of stream x^T */
  uint32_t *at;            /* (K) us_gptq_factor's */
};

struct us_gptq_matrix {
  struct us_param *master;
  size_t input;
  void *scales;
};

/* Rows from `row` on of matrix `index`, or of a sum over input `index`: those of left^T x. */
struct us_gptq_task {
  uint32_t index, row;
  float *sum;
  const float *left;
  size_t left_cols;
};

struct us_gptq_session {
  const struct us_gptq *gptq;
  struct us_params *masters;
  struct us_seq seq;
  struct us_rows rows;
  struct us_model_train *original; /* over all rows at once */
  struct us_model_train *student;  /* multiplies by masters->compute */
  uint32_t layer;
  enum us_layer_part part;
  struct us_gptq_input *inputs;    /* (E + 1) of the part at hand */
  struct us_gptq_matrix *matrices; /* (2 E + 2) */
  struct us_gptq_task *tasks;
  size_t input_count, matrix_count, task_count;
  bool failed; /* out of memory, or a value that is not finite */
};

/* Zeros; NULL, and s->failed, without memory. */
void *us_gptq_take(struct us_gptq_session *s, size_t count, size_t bytes);

/* Whether GPTQ rounds a tensor. */
bool us_gptq_rounds(const struct us_param *p);

/* Whether the text and the limits allow it; and sequences [first, first + count) of it, as rows. */
US_CHECKED enum us_status us_gptq_check(const struct us_gptq *gptq, struct us_err *err);
US_CHECKED enum us_status us_gptq_draw(const struct us_gptq *gptq, size_t first, size_t count,
                                       struct us_rows *rows, struct us_err *err);

/* Sequences whose gradients are taken: a part of the text, which is enough for one matrix of moments. */
#define US_GPTQ_EMBED_TOKENS ((size_t)1 << 17)
static inline size_t us_gptq_embed_windows(const struct us_gptq *gptq) {
  size_t most = US_GPTQ_EMBED_TOKENS / gptq->length;
  return gptq->windows < most || !most ? gptq->windows : most;
}

/* moments (D, D, zeros) = sum of g g^T, g the gradients of the original's cross-entropy at its embedded rows. */
US_CHECKED enum us_status us_gptq_embed_moments(const struct us_gptq *gptq, const struct us_shape *shape,
                                                struct us_params *original, struct us_seq *seq,
                                                float *moments, struct us_err *err);

/* List the matrices that multiply what s->part of s->layer has made in both models, with their inputs. The original's buffers
 * take what was lost, the student's experts their routing weights; the student's `branch` is overwritten. */
void us_gptq_inputs(struct us_gptq_session *s);
void us_gptq_head_inputs(struct us_gptq_session *s); /* after the last layer and the final norm */

/* Sums over the listed inputs, factors in place of their moments. */
void us_gptq_sum_inputs(struct us_gptq_session *s);
void us_gptq_forget_inputs(struct us_gptq_session *s);

#endif
