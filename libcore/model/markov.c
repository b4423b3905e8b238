/* markov.c: the tables of a Markov head, and the slots they are added to.
 *
 * Contents: making tables; of random models; adding.
 */
#include "model/markov.h"

#include "base/sample.h"
#include "formats/bf16.h"
#include "kernels/embed/embed.h"
#include "kernels/linear/linear.h"
#include "kernels/residual/residual.h"
#include "model/random.h"

#include <stdlib.h>
#include <string.h>

#define CHUNK 32 /* tokens a piece of work */

/* ---- making tables ----------------------------------------------------------------------------------------------- */

/* A table is made in pieces of the vocabulary, each worker with rows of its own. */
struct making {
  const struct us_model *model;
  const struct us_draft *draft;
  bool rounded;
  float *out;     /* (R, packed D): the columns of `out` as rows */
  float *scratch; /* (threads, scratch_floats) */
  size_t scratch_floats;
  struct us_matrix *to;
  enum us_isa isa;
};

static void store(const struct making *m, size_t token, size_t column, float value) {
  size_t at = token * m->to->cols + column;
  if (m->rounded)
    ((uint16_t *)m->to->data)[at] = us_bf16_from_f32(value);
  else
    ((float *)m->to->data)[at] = value;
}

static void round_rows(const struct making *m, float *rows, size_t n) {
  if (m->rounded) us_bf16_round_all(rows, n, rows);
}

/* Rows [begin, end) of `before`: in, multiplied by the tokens' embeddings. */
static void make_before(void *arg, size_t begin, size_t end, int worker) {
  const struct making *m = arg;
  size_t D = m->draft->shape.hidden, R = m->draft->shape.markov, wide = us_linear_packed_width(D);
  float *x = m->scratch + (size_t)worker * m->scratch_floats, *packed = x + D, *y = packed + CHUNK * wide;
  for (size_t first = begin; first < end; first += CHUNK) {
    size_t n = end - first < CHUNK ? end - first : CHUNK;
    for (size_t i = 0; i < n; i++) {
      us_embed(&m->model->embed, (uint32_t)(first + i), x);
      round_rows(m, x, D);
      us_linear_pack(x, 1, D, D, packed + i * wide, wide);
    }
    us_linear(&(struct us_linear_args){.w = &m->draft->markov_in,
                                       .x = packed,
                                       .x_stride = wide,
                                       .y = y,
                                       .y_stride = R,
                                       .R = n,
                                       .end = R,
                                       .isa = m->isa});
    for (size_t i = 0; i < n; i++)
      for (size_t r = 0; r < R; r++) store(m, first + i, r, y[i * R + r]);
  }
}

/* Rows [begin, end) of `after`: the head, multiplied by the columns of out. */
static void make_after(void *arg, size_t begin, size_t end, int worker) {
  const struct making *m = arg;
  size_t D = m->draft->shape.hidden, R = m->draft->shape.markov;
  float *y = m->scratch + (size_t)worker * m->scratch_floats;
  for (size_t first = begin; first < end; first += CHUNK) {
    size_t n = end - first < CHUNK ? end - first : CHUNK;
    us_linear(&(struct us_linear_args){.w = us_draft_head(m->draft, m->model),
                                       .x = m->out,
                                       .x_stride = us_linear_packed_width(D),
                                       .y = y,
                                       .y_stride = n,
                                       .R = R,
                                       .begin = first,
                                       .end = first + n,
                                       .isa = m->isa});
    for (size_t i = 0; i < n; i++)
      for (size_t r = 0; r < R; r++) store(m, first + i, r, y[r * n + i]);
  }
}

/* The columns of `out` as packed rows. */
static void turn_out(const struct making *m) {
  const struct us_matrix *w = &m->draft->markov_out;
  size_t wide = us_linear_packed_width(w->rows);
  for (size_t d = 0; d < w->rows; d++) {
    us_matrix_decode_row(w, d, m->scratch);
    round_rows(m, m->scratch, w->cols);
    for (size_t r = 0; r < w->cols; r++) m->out[r * wide + us_linear_packed_index(d)] = m->scratch[r];
  }
}

static enum us_status allocate(struct making *m, struct us_markov *markov, int threads, struct us_err *err) {
  size_t N = m->model->shape.vocab, D = m->draft->shape.hidden, R = m->draft->shape.markov,
         wide = us_linear_packed_width(D);
  enum us_format format = m->rounded ? US_FORMAT_BF16 : US_FORMAT_F32;
  size_t bytes = us_matrix_data_bytes(format, N, R);
  m->scratch_floats = D + CHUNK * (wide + R);
  m->scratch = calloc((size_t)threads * m->scratch_floats, sizeof *m->scratch);
  m->out = calloc(R * wide, sizeof *m->out);
  markov->before = (struct us_matrix){.format = format, .rows = N, .cols = R, .data = malloc(bytes)};
  markov->after = (struct us_matrix){.format = format, .rows = N, .cols = R, .data = malloc(bytes)};
  if (m->scratch && m->out && markov->before.data && markov->after.data) return US_OK;
  return us_err_memory(err, "the tables of the drafter's Markov head", 2 * bytes);
}

enum us_status us_markov_create(const struct us_model *model, const struct us_draft *draft,
                                enum us_rounding rounding, struct us_pool *pool,
                                struct us_markov **ret_markov, struct us_err *err) {
  struct making m = {.model = model,
                     .draft = draft,
                     .rounded = rounding == US_ROUND_BF16,
                     .isa = us_isa_resolve(US_ISA_BEST)};
  struct us_markov *markov = calloc(1, sizeof *markov);
  *ret_markov = NULL;
  if (!markov) return us_err_memory(err, "a Markov head", sizeof *markov);
  enum us_status status = allocate(&m, markov, us_pool_threads(pool), err);
  if (status == US_OK) {
    turn_out(&m);
    m.to = &markov->before;
    us_pool_for(pool, model->shape.vocab, CHUNK, make_before, &m);
    m.to = &markov->after;
    us_pool_for(pool, model->shape.vocab, CHUNK, make_after, &m);
    *ret_markov = markov;
  } else {
    us_markov_free(markov);
  }
  free(m.scratch), free(m.out);
  return status;
}

void us_markov_free(struct us_markov *markov) {
  if (!markov) return;
  free((void *)markov->before.data), free((void *)markov->after.data);
  free(markov);
}

/* ---- of random models -------------------------------------------------------------------------------------------- */

static enum us_status fill_vocabulary(struct us_model *model, uint64_t seed, struct us_pool *pool,
                                      struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  enum us_status status = us_model_tensors(model, &refs, &count, err);
  for (size_t i = 0; status == US_OK && i < count; i++)
    if (refs[i].matrix == &model->embed || refs[i].matrix == &model->head)
      status = us_random_tensor(&refs[i], us_tensor_format(&model->shape.precision, &refs[i]), 0, seed,
                                model->owner, pool, err);
  free(refs);
  return status;
}

static enum us_status fill_draft(struct us_draft *draft, enum us_format format, uint64_t seed,
                                 struct us_pool *pool, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  enum us_status status = us_draft_tensors(draft, &refs, &count, err);
  for (size_t i = 0; status == US_OK && i < count; i++) {
    struct us_matrix *w = refs[i].matrix;
    if (w && (w == &draft->markov_in || w == &draft->markov_out || w == &draft->head))
      status = us_random_tensor(&refs[i], w == &draft->head ? draft->shape.head : format, 0, seed,
                                draft->owner, pool, err);
  }
  free(refs);
  return status;
}

enum us_status us_markov_random(const struct us_shape *shape, const struct us_draft_shape *draft_shape,
                                uint64_t seed, struct us_pool *pool, struct us_markov **ret_markov,
                                struct us_err *err) {
  struct us_model *model = NULL;
  struct us_draft *draft = NULL;
  *ret_markov = NULL;
  enum us_status status = us_model_create(shape, &model, err);
  if (status == US_OK) status = us_draft_create(draft_shape, &draft, err);
  if (status == US_OK) status = fill_vocabulary(model, seed, pool, err);
  if (status == US_OK) status = fill_draft(draft, shape->precision.draft, seed, pool, err);
  if (status == US_OK) status = us_markov_create(model, draft, US_ROUND_BF16, pool, ret_markov, err);
  us_model_free(model), us_draft_free(draft);
  return status;
}

/* ---- adding ------------------------------------------------------------------------------------------------------ */

static int32_t choose(const struct us_draft_pass *pass, uint32_t slot, const float *logits, size_t N) {
  const struct us_draft_draw *draw = pass->opt_draw;
  if (!draw) return us_sample_argmax(logits, N);
  return us_sample_token(logits, N, draw->sampling,
                         us_noise_round(draw->seed, pass->position, slot, draw->sample, US_STREAM_DRAFT));
}

enum us_status us_markov_add(const struct us_markov *markov, struct us_forward *f,
                             const struct us_draft_pass *pass, struct us_err *err) {
  size_t N = markov->after.rows, R = markov->after.cols, wide = us_linear_packed_width(R);
  enum us_status status = US_OK;
  float *row = us_forward_need(f, US_WORK_MARKOV, R + wide + N, &status, err);
  if (status != US_OK) return status;
  float *packed = row + R, *more = packed + wide;
  int32_t token = pass->anchor;
  for (uint32_t j = 1; j < pass->block; j++) {
    float *logits = pass->logits + (j - 1) * N;
    us_matrix_decode_row(&markov->before, (size_t)token, row);
    us_linear_pack(row, 1, R, R, packed, wide);
    us_forward_linear(f, &markov->after, packed, 1, more, N);
    us_residual_add(logits, more, N);
    if (j + 1 < pass->block) token = choose(pass, j - 1, logits, N);
  }
  return US_OK;
}
