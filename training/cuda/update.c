/* update.c: one optimizer step over the tensors that a GPU owns.
 *
 * AdamW's tensors are cut into spans and updated by one launch. Muon's matrices are grouped by shape, all experts of all layers
 * say, so that a few batched products orthogonalise them.
 */
#include "training/cuda/cuda.h"
#include "training/cuda/params_state.h"

#include <stdlib.h>

/* Scratch that batches of matrices may take: 4 copies in bf16 of 64 matrices of 1024 x 1024 fit, more gain nothing. */
#define MOST_SCRATCH ((size_t)768 << 20)

/* A matrix of the list, before grouping. */
struct matrix {
  size_t rows, cols;
  double decay;
  struct us_muon_matrix at;
};

struct lists {
  struct us_adamw_span *spans; /* NULL while counting */
  struct matrix *matrices;
  size_t span_count, matrix_count;
};

/* --- listing --- */

static void add_spans(struct lists *lists, const struct us_optim *optim, const struct us_param *p) {
  size_t n = p->rows * p->cols;
  for (size_t first = 0; first < n; first += US_ADAMW_SPAN, lists->span_count++) {
    if (!lists->spans) continue;
    lists->spans[lists->span_count] =
        (struct us_adamw_span){.offset = p->offset + first,
                               .n = (uint32_t)(n - first < US_ADAMW_SPAN ? n - first : US_ADAMW_SPAN),
                               .rate_scale = p->rate_scale,
                               .decay = p->decay ? optim->adamw_decay : 0.0};
  }
}

static void add_matrix(struct lists *lists, const struct us_optim *optim, const struct us_param *p,
                       size_t rows, struct us_muon_matrix at) {
  at.rate_scale = p->rate_scale;
  if (lists->matrices)
    lists->matrices[lists->matrix_count] =
        (struct matrix){.rows = rows, .cols = p->cols, .decay = p->decay ? optim->muon_decay : 0.0, .at = at};
  lists->matrix_count++;
}

static enum us_status add_matrices(struct lists *lists, const struct us_optim *optim,
                                   const struct us_param *p, struct us_err *err) {
  const struct us_param_split *split = &p->split;
  uint32_t part[3] = {split->q_rows, split->k_rows, split->v_rows}, first = 0, step = 0;
  for (int i = 0; i < 3; i++) step += part[i];
  for (int i = 0; i < (split->chunks ? 3 : 1); i++) {
    size_t rows = split->chunks ? (size_t)part[i] * split->chunks : p->rows;
    if (p->cols % 8 != 0 || (rows < p->cols && rows % 8 != 0))
      return us_err_set(err, US_ERR_USAGE, "%s: a matrix of %zu by %zu; Muon on a GPU wants multiples of 8",
                        p->name, rows, p->cols);
    add_matrix(lists, optim, p, rows,
               split->chunks ? us_muon_part(p->offset, first, part[i], step)
                             : us_muon_whole(p->offset, rows));
    first += part[i];
  }
  return US_OK;
}

static enum us_status fill_lists(const struct us_cuda_params *set, const struct us_optim *optim,
                                 struct lists *lists, struct us_err *err) {
  lists->span_count = lists->matrix_count = 0;
  for (size_t i = 0; i < set->host->count; i++) {
    const struct us_param *p = &set->host->items[i];
    if (p->frozen || p->group == US_PARAM_BIAS) continue;
    if (p->offset < set->owned.begin || p->offset >= set->owned.end) continue;
    if (optim->kind != US_OPTIM_MUON || p->group != US_PARAM_MUON) {
      add_spans(lists, optim, p);
      continue;
    }
    enum us_status status = add_matrices(lists, optim, p, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

/* --- grouping --- */

/* By shape and decay; within a group in the order of the arena, so that the batches are the same every run. */
static int by_shape(const void *a, const void *b) {
  const struct matrix *x = a, *y = b;
  if (x->rows != y->rows) return x->rows < y->rows ? -1 : 1;
  if (x->cols != y->cols) return x->cols < y->cols ? -1 : 1;
  if (x->decay < y->decay || x->decay > y->decay) return x->decay < y->decay ? -1 : 1;
  if (x->at.offset != y->at.offset) return x->at.offset < y->at.offset ? -1 : 1;
  return (x->at.first > y->at.first) - (x->at.first < y->at.first);
}

static bool same_group(const struct matrix *a, const struct matrix *b) {
  return a->rows == b->rows && a->cols == b->cols && !(a->decay < b->decay) && !(a->decay > b->decay);
}

/* At least one matrix at once, whatever it takes. */
static size_t batch_of(const struct us_cuda_muon_group *g) {
  size_t batch = g->count;
  while (batch > 1 && us_muon_train_scratch(g->rows, g->cols, batch) > MOST_SCRATCH) batch = (batch + 1) / 2;
  return batch;
}

static enum us_status make_groups(struct us_cuda_params_state *s, const struct lists *lists,
                                  struct us_err *err) {
  s->groups = calloc(lists->matrix_count + 1, sizeof *s->groups);
  if (!s->groups) return us_err_memory(err, "groups of matrices", lists->matrix_count * sizeof *s->groups);
  for (size_t i = 0; i < lists->matrix_count; i++) {
    const struct matrix *m = &lists->matrices[i];
    if (i && same_group(m - 1, m)) {
      s->groups[s->group_count - 1].count++;
      continue;
    }
    s->groups[s->group_count++] = (struct us_cuda_muon_group){
        .rows = m->rows, .cols = m->cols, .decay = m->decay, .first = i, .count = 1};
  }
  for (size_t g = 0; g < s->group_count; g++) {
    struct us_cuda_muon_group *group = &s->groups[g];
    group->batch = batch_of(group);
    size_t bytes = us_muon_train_scratch(group->rows, group->cols, group->batch);
    if (bytes > s->scratch_bytes) s->scratch_bytes = bytes;
  }
  return US_OK;
}

/* --- to the device --- */

enum us_status us_cuda_params_send(struct us_cuda *cuda, const void *list, size_t bytes, const char *what,
                                   void **ret_memory, struct us_err *err) {
  enum us_status status = us_cuda_take(cuda, bytes ? bytes : 256, what, ret_memory, err);
  if (status != US_OK) return status;
  us_cuda_did(cuda, cudaMemcpyAsync(*ret_memory, list, bytes, cudaMemcpyHostToDevice, cuda->stream), what);
  return us_cuda_sync(cuda, err);
}

static enum us_status send_lists(struct us_cuda_params *set, const struct lists *lists, struct us_err *err) {
  struct us_cuda_params_state *s = set->state;
  void *spans = NULL, *matrices = NULL;
  struct us_muon_matrix *packed = calloc(lists->matrix_count + 1, sizeof *packed);
  if (!packed) return us_err_memory(err, "matrices", lists->matrix_count * sizeof *packed);
  for (size_t i = 0; i < lists->matrix_count; i++) packed[i] = lists->matrices[i].at;
  enum us_status status = us_cuda_params_send(set->cuda, lists->spans,
                                              lists->span_count * sizeof *lists->spans, "spans", &spans, err);
  s->spans = spans, s->span_count = lists->span_count;
  if (status == US_OK)
    status = us_cuda_params_send(set->cuda, packed, lists->matrix_count * sizeof *packed, "matrices",
                                 &matrices, err);
  s->matrices = matrices;
  free(packed);
  if (status == US_OK) status = make_groups(s, lists, err);
  if (status == US_OK && s->scratch_bytes)
    status = us_cuda_take(set->cuda, s->scratch_bytes, "scratch of Muon", &s->scratch, err);
  return status;
}

void us_cuda_update_release(struct us_cuda_params_state *s) {
  us_cuda_give(s->spans);
  us_cuda_give(s->matrices);
  us_cuda_give(s->scratch);
  free(s->groups);
  s->spans = NULL, s->matrices = NULL, s->scratch = NULL, s->groups = NULL;
  s->span_count = s->group_count = s->scratch_bytes = 0;
  s->listed = false;
}

static enum us_status list_work(struct us_cuda_params *set, const struct us_optim *optim,
                                struct us_err *err) {
  struct lists lists = {0};
  us_cuda_update_release(set->state);
  enum us_status status = fill_lists(set, optim, &lists, err);
  if (status != US_OK) return status;
  lists.spans = calloc(lists.span_count + 1, sizeof *lists.spans);
  lists.matrices = calloc(lists.matrix_count + 1, sizeof *lists.matrices);
  if (!lists.spans || !lists.matrices)
    status = us_err_memory(err, "lists of tensors", lists.matrix_count * sizeof *lists.matrices);
  if (status == US_OK) status = fill_lists(set, optim, &lists, err);
  if (status == US_OK) {
    qsort(lists.matrices, lists.matrix_count, sizeof *lists.matrices, by_shape);
    status = send_lists(set, &lists, err);
  }
  free(lists.spans);
  free(lists.matrices);
  set->state->listed = status == US_OK;
  set->state->listed_kind = optim->kind;
  return status;
}

/* --- the step --- */

static void update_adamw(struct us_cuda_params *set, const struct us_optim *optim, double rate) {
  struct us_cuda_params_state *s = set->state;
  struct us_adamw_train adamw = {.spans = s->spans,
                                 .count = s->span_count,
                                 .value = set->value,
                                 .grad = set->grad,
                                 .moment1 = us_cuda_from_begin(set, set->moment1),
                                 .moment2 = us_cuda_from_begin(set, set->moment2),
                                 .step = optim->step,
                                 .rate = rate,
                                 .beta1 = optim->beta1,
                                 .beta2 = optim->beta2,
                                 .epsilon = optim->epsilon,
                                 .opt_factor = &s->device->factor};
  if (s->span_count) us_cuda_did(set->cuda, us_adamw_train(&adamw, set->cuda->stream), "AdamW");
}

static void update_muon(struct us_cuda_params *set, const struct us_optim *optim, double rate,
                        const struct us_cuda_muon_group *group) {
  struct us_cuda_params_state *s = set->state;
  bool polar = optim->newton == US_NEWTON_POLAR_EXPRESS;
  struct us_muon_train muon = {.rows = group->rows,
                               .cols = group->cols,
                               .matrices = s->matrices + group->first,
                               .count = group->count,
                               .batch = group->batch,
                               .value = set->value,
                               .grad = set->grad,
                               .moment = us_cuda_from_begin(set, set->moment1),
                               .rate = rate * optim->muon_rate,
                               .momentum = optim->momentum,
                               .decay = group->decay,
                               .nesterov = optim->nesterov,
                               .newton = polar ? US_MUON_POLAR_EXPRESS : US_MUON_NEWTON_SCHULZ5,
                               .opt_factor = &s->device->factor,
                               .scratch = s->scratch,
                               .scratch_bytes = s->scratch_bytes,
                               .cublas = set->cuda->blas};
  us_cuda_did(set->cuda, us_muon_train(&muon, set->cuda->stream), "Muon");
}

enum us_status us_cuda_params_update(struct us_cuda_params *set, const struct us_optim *optim, double rate,
                                     float factor, struct us_err *err) {
  struct us_cuda_params_state *s = set->state;
  us_cuda_use(set->cuda);
  enum us_status status = s->listed && s->listed_kind == optim->kind ? US_OK : list_work(set, optim, err);
  if (status != US_OK) return status;
  s->host->factor = factor;
  us_cuda_upload(set->cuda, &s->device->factor, &s->host->factor, sizeof factor);
  update_adamw(set, optim, rate);
  for (size_t g = 0; g < s->group_count; g++) update_muon(set, optim, rate, &s->groups[g]);
  us_cuda_watch_hold(set, &optim->oscillation);
  return us_cuda_failed(set->cuda, err);
}
