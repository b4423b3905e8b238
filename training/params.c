/* params.c: the tensors that are trained, in arenas, and their passage from and to a us_model.
 *
 * Contents: arenas; listing; initial values; refresh; gradients; export.
 */
#include "training/params.h"

#include "base/philox.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

/* --- arenas --- */

static size_t padded(size_t n) {
  return (n + 15) / 16 * 16;
}

static size_t arena_bytes(size_t floats) {
  return padded(floats ? floats : 1) * sizeof(float);
}

/* Pages that are zero until somebody writes them: where a GPU trains, most arenas of the host are never touched. */
static enum us_status new_arena(size_t floats, const char *what, float **ret_arena, struct us_err *err) {
  void *memory = mmap(NULL, arena_bytes(floats), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return us_err_memory(err, what, arena_bytes(floats));
  *ret_arena = memory;
  return US_OK;
}

static void free_arena(const struct us_params *params, float *arena) {
  if (arena) munmap(arena, arena_bytes(params->floats));
}

void us_params_release(struct us_params *params) {
  free(params->items);
  free_arena(params, params->grad);
  if (params->compute != params->value) free_arena(params, params->compute);
  free_arena(params, params->value);
  free_arena(params, params->moment1);
  free_arena(params, params->moment2);
  free_arena(params, params->watch.share);
  free_arena(params, params->watch.mean);
  free_arena(params, params->watch.turn);
  *params = (struct us_params){0};
}

/* Place every tensor; a frozen set has masters alone. */
static enum us_status lay_out(struct us_params *params, bool frozen, struct us_err *err) {
  for (size_t i = 0; i < params->count; i++) {
    struct us_param *p = &params->items[i];
    p->offset = params->floats;
    params->floats += padded(p->rows * p->cols);
  }
  enum us_status status = new_arena(params->floats, "weights", &params->value, err);
  params->compute = params->value;
  if (status == US_OK && !frozen) status = new_arena(params->floats, "gradients", &params->grad, err);
  if (status == US_OK && !frozen)
    status = new_arena(params->floats, "rounded weights", &params->compute, err);
  if (status == US_OK && !frozen) status = new_arena(params->floats, "first moments", &params->moment1, err);
  /* Every tensor has a second moment, so that AdamW can be chosen for all of them. */
  if (status == US_OK && !frozen) status = new_arena(params->floats, "second moments", &params->moment2, err);
  if (status != US_OK) return status;
  for (size_t i = 0; i < params->count; i++) {
    struct us_param *p = &params->items[i];
    p->value = params->value + p->offset;
    p->compute = params->compute + p->offset;
    if (frozen) continue;
    p->grad = params->grad + p->offset;
    p->moment1 = params->moment1 + p->offset;
    p->moment2 = params->moment2 + p->offset;
  }
  return US_OK;
}

enum us_status us_params_watch(struct us_params *params, struct us_err *err) {
  enum us_status status = new_arena(params->floats, "shares of steps", &params->watch.share, err);
  if (status == US_OK) status = new_arena(params->floats, "means of codes", &params->watch.mean, err);
  if (status == US_OK) status = new_arena(params->floats, "moves of codes", &params->watch.turn, err);
  return status;
}

/* --- listing --- */

static enum us_format family_format(const struct us_precision *precision, const char *family) {
  const struct {
    const char *family;
    enum us_format format;
  } rows[] = {{"embed", precision->embed},   {"head", precision->head},   {"qkv", precision->qkv},
              {"o_proj", precision->o_proj}, {"dense", precision->dense}, {"experts", precision->experts},
              {"router", precision->router}, {"draft", precision->draft}};
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
    if (strcmp(rows[i].family, family) == 0 && rows[i].format != US_FORMAT_NONE) return rows[i].format;
  return US_FORMAT_BF16;
}

static bool is(const struct us_param *p, const char *family) {
  return strcmp(p->family, family) == 0;
}

/* Router rows are one logit direction an expert, not a map to be orthogonalised: AdamW, like embedding and head. */
static enum us_param_group group_of(const struct us_param *p) {
  if (is(p, "router") && p->vector) return US_PARAM_BIAS;
  if (p->vector || is(p, "embed") || is(p, "head") || is(p, "draft.head") || is(p, "router"))
    return US_PARAM_ADAMW;
  return US_PARAM_MUON;
}

static void fill_param(struct us_param *p, const struct us_tensor_ref *ref) {
  *p = (struct us_param){.family = ref->family,
                         .layer = ref->layer,
                         .rows = ref->rows,
                         .cols = ref->cols,
                         .vector = ref->matrix == NULL,
                         .rate_scale = 1.0f};
  snprintf(p->name, sizeof p->name, "%s", ref->name);
  p->group = group_of(p);
  p->decay = !p->vector;
  p->encoding = (struct us_matrix_encoding){.format = US_FORMAT_BF16, .scale_rule = US_SCALE_MSE};
  if (p->group == US_PARAM_BIAS) p->encoding.format = US_FORMAT_F32;
}

static enum us_status list_params(struct us_params *params, const struct us_tensor_ref *refs, size_t count,
                                  struct us_err *err) {
  *params = (struct us_params){.count = count, .items = calloc(count, sizeof *params->items)};
  if (!params->items) return us_err_memory(err, "parameter list", count * sizeof *params->items);
  for (size_t i = 0; i < count; i++) fill_param(&params->items[i], &refs[i]);
  return US_OK;
}

/* Fused qkv: the rows of q, k and v, and the FP8 scale grid that restarts every chunk. */
static void describe_qkv(struct us_params *params, const struct us_shape *shape) {
  for (size_t i = 0; i < params->count; i++) {
    struct us_param *p = &params->items[i];
    if (!is(p, "qkv") || !shape->qkv_chunks) continue;
    const struct us_attention_shape *a = us_shape_attention(shape, p->layer);
    uint32_t c = shape->qkv_chunks;
    p->split = (struct us_param_split){.chunks = c,
                                       .q_rows = a->q_heads * a->qk_dim / c,
                                       .k_rows = a->kv_heads * a->qk_dim / c,
                                       .v_rows = a->kv_heads * a->v_dim / c};
    p->encoding.scale_chunk_rows = p->rows / c;
  }
}

struct us_param *us_params_find(const struct us_params *params, const char *name) {
  for (size_t i = 0; i < params->count; i++)
    if (strcmp(params->items[i].name, name) == 0) return &params->items[i];
  return NULL;
}

/* --- initial values --- */

static double normal(struct us_philox_key key, uint32_t tensor, size_t pair, double *ret_second) {
  uint32_t word[4];
  us_philox_quad(key, (uint32_t)(pair >> 32), tensor, (uint32_t)pair, US_STREAM_INIT, word);
  double u = ((double)word[0] + 0.5) * 0x1p-32, angle = 6.283185307179586 * ((double)word[1] * 0x1p-32);
  double radius = sqrt(-2.0 * log(u));
  *ret_second = radius * sin(angle);
  return radius * cos(angle);
}

static void fill_normal(struct us_param *p, uint32_t tensor, uint64_t seed, double deviation) {
  struct us_philox_key key = us_philox_key(seed);
  size_t n = p->rows * p->cols;
  for (size_t i = 0; i < n; i += 2) {
    double second = 0.0;
    p->value[i] = (float)(deviation * normal(key, tensor, i / 2, &second));
    if (i + 1 < n) p->value[i + 1] = (float)(deviation * second);
  }
}

struct fill_task {
  struct us_params *params;
  uint64_t seed;
  float deviation;
};

static void fill_tensors(void *arg, size_t begin, size_t end, int worker) {
  const struct fill_task *t = arg;
  for (size_t i = begin; i < end; i++) {
    struct us_param *p = &t->params->items[i];
    double own =
        t->deviation > 0.0f ? (double)t->deviation : 1.0 / sqrt((double)(is(p, "embed") ? 1 : p->cols));
    if (is(p, "embed") && t->deviation <= 0.0f) own = 0.02;
    if (!p->vector || is(p, "embed"))
      fill_normal(p, (uint32_t)i, t->seed, own);
    else
      for (size_t k = 0; k < p->rows; k++) p->value[k] = is(p, "norm") ? 1.0f : 0.0f;
  }
}

static void fill_fresh(struct us_params *params, struct us_pool *pool, uint64_t seed, float deviation) {
  struct fill_task t = {.params = params, .seed = seed, .deviation = deviation};
  us_pool_for(pool, params->count, 1, fill_tensors, &t);
}

enum us_status us_params_init_fresh(struct us_params *params, const struct us_shape *shape, uint64_t seed,
                                    float deviation, struct us_err *err) {
  return us_params_init_fresh_on(params, shape, NULL, seed, deviation, err);
}

enum us_status us_params_init_fresh_on(struct us_params *params, const struct us_shape *shape,
                                       struct us_pool *pool, uint64_t seed, float deviation,
                                       struct us_err *err) {
  struct us_model *model = NULL;
  *params = (struct us_params){0};
  enum us_status status = us_model_create(shape, &model, err);
  if (status != US_OK) return status;
  status = us_params_init_model(params, model, pool, false, err);
  us_model_free(model);
  if (status != US_OK) return status;
  for (size_t i = 0; i < params->count; i++) {
    struct us_param *p = &params->items[i];
    if (!p->vector) p->encoding.format = family_format(&shape->precision, p->family);
  }
  fill_fresh(params, pool, seed, deviation);
  return US_OK;
}

enum us_status us_params_init_fresh_draft(struct us_params *params, const struct us_draft_shape *shape,
                                          uint64_t seed, float deviation, struct us_err *err) {
  struct us_draft *draft = NULL;
  *params = (struct us_params){0};
  enum us_status status = us_draft_create(shape, &draft, err);
  if (status != US_OK) return status;
  status = us_params_init_draft(params, draft, false, err);
  us_draft_free(draft);
  if (status == US_OK) fill_fresh(params, NULL, seed, deviation);
  return status;
}

struct load_task {
  struct us_params *params;
  const struct us_tensor_ref *refs;
};

/* Values and encodings of the tensors that have data. */
static void load_tensors(void *arg, size_t begin, size_t end, int worker) {
  struct load_task *t = arg;
  for (size_t i = begin; i < end; i++) {
    struct us_param *p = &t->params->items[i];
    const struct us_tensor_ref *ref = &t->refs[i];
    if (p->vector) {
      if (*ref->vector) memcpy(p->value, *ref->vector, p->rows * sizeof(float));
    } else if (ref->matrix->format != US_FORMAT_NONE && ref->matrix->data) {
      us_matrix_decode(ref->matrix, p->value);
      p->encoding.format = ref->matrix->format;
      p->encoding.scale_chunk_rows = ref->matrix->scale_chunk_rows;
    }
    p->frozen = t->params->grad == NULL;
  }
}

/* On one thread most of the time goes to the kernel, which clears the pages that are touched first. */
static void load_refs(struct us_params *params, const struct us_tensor_ref *refs, struct us_pool *pool) {
  us_pool_for(pool, params->count, 1, load_tensors, &(struct load_task){.params = params, .refs = refs});
}

enum us_status us_params_init_model(struct us_params *params, struct us_model *model, struct us_pool *pool,
                                    bool frozen, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  *params = (struct us_params){0};
  enum us_status status = us_model_tensors(model, &refs, &count, err);
  if (status == US_OK) status = list_params(params, refs, count, err);
  if (status == US_OK) status = lay_out(params, frozen, err);
  if (status == US_OK) {
    describe_qkv(params, &model->shape);
    load_refs(params, refs, pool);
  }
  free(refs);
  if (status != US_OK) us_params_release(params);
  return status;
}

enum us_status us_params_init_draft(struct us_params *params, struct us_draft *draft, bool frozen,
                                    struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  *params = (struct us_params){0};
  enum us_status status = us_draft_tensors(draft, &refs, &count, err);
  if (status == US_OK) status = list_params(params, refs, count, err);
  if (status == US_OK) status = lay_out(params, frozen, err);
  if (status == US_OK) load_refs(params, refs, NULL);
  free(refs);
  if (status != US_OK) us_params_release(params);
  return status;
}

/* --- refresh --- */

#define REFRESH_FLOATS 65536 /* a task; whole rows, cut at the format's grain */

struct refresh_task {
  const struct us_params *params;
  enum us_seq_rounding rounding;
  bool failed;
};

static struct us_matrix_encoding effective(const struct us_param *p, enum us_seq_rounding rounding) {
  struct us_matrix_encoding e = p->encoding;
  if (e.format == US_FORMAT_NONE || (rounding == US_SEQ_ROUND_NONE && e.format == US_FORMAT_BF16))
    e.format = US_FORMAT_F32;
  return e;
}

/* Vectors are one row; matrices are cut by whole grains of rows so that the cut cannot show. */
enum us_status us_param_refresh(const struct us_param *p, enum us_seq_rounding rounding, struct us_err *err) {
  struct us_matrix_encoding encoding = effective(p, rounding);
  size_t rows = p->vector ? 1 : p->rows, cols = p->vector ? p->rows : p->cols;
  if (us_matrix_fake_quant(p->value, rows, cols, &encoding, p->compute, err) == US_OK) return US_OK;
  us_err_prefix(err, "%s", p->name);
  if (err) err->status = US_ERR_CHECK;
  return US_ERR_CHECK;
}

static void refresh_params(void *arg, size_t begin, size_t end, int worker) {
  struct refresh_task *t = arg;
  for (size_t i = begin; i < end; i++)
    if (us_param_refresh(&t->params->items[i], t->rounding, NULL) != US_OK)
      __atomic_store_n(&t->failed, true, __ATOMIC_RELAXED);
}

enum us_status us_params_refresh(struct us_params *params, struct us_pool *pool,
                                 enum us_seq_rounding rounding, struct us_err *err) {
  if (params->compute == params->value) return US_OK;
  struct refresh_task t = {.params = params, .rounding = rounding};
  us_pool_for(pool, params->count, 1, refresh_params, &t);
  if (!t.failed) return US_OK;
  for (size_t i = 0; i < params->count; i++) { /* again, one after another, for the first one's message */
    enum us_status status = us_param_refresh(&params->items[i], rounding, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

/* --- gradients --- */

#define NORM_BLOCK 65536
#define NORM_PARTS 256 /* partial sums of the norm: blocks grow with the model, not with the threads */

struct grad_task {
  float *grad;
  size_t floats, block;
  float factor;
  double partial[NORM_PARTS];
};

static void zero_block(void *arg, size_t begin, size_t end, int worker) {
  const struct grad_task *t = arg;
  memset(t->grad + begin, 0, (end - begin) * sizeof *t->grad);
}

void us_params_zero_grad(struct us_params *params, struct us_pool *pool) {
  struct grad_task t = {.grad = params->grad};
  if (params->grad) us_pool_for(pool, params->floats, NORM_BLOCK, zero_block, &t);
}

US_SEQ_CLONES static double sum_squares(const float *x, size_t n) {
  double lane[8] = {0};
  for (size_t i = 0; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; l++) lane[l] += (double)x[i + l] * (double)x[i + l];
  for (size_t i = n / 8 * 8; i < n; i++) lane[0] += (double)x[i] * (double)x[i];
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

static void norm_blocks(void *arg, size_t begin, size_t end, int worker) {
  struct grad_task *t = arg;
  for (size_t b = begin; b < end; b++) {
    size_t first = b * t->block, n = t->floats - first < t->block ? t->floats - first : t->block;
    t->partial[b] = sum_squares(t->grad + first, n);
  }
}

double us_params_grad_norm(const struct us_params *params, struct us_pool *pool) {
  struct grad_task t = {.grad = params->grad, .floats = params->floats};
  t.block = padded((params->floats + NORM_PARTS - 1) / NORM_PARTS);
  if (t.block < 4096) t.block = 4096;
  size_t blocks = us_seq_blocks(params->floats, t.block);
  us_pool_for(pool, blocks, 1, norm_blocks, &t);
  double sum = 0.0;
  for (size_t b = 0; b < blocks; b++) sum += t.partial[b];
  return sqrt(sum);
}

US_SEQ_CLONES static void scale_block(void *arg, size_t begin, size_t end, int worker) {
  const struct grad_task *t = arg;
  for (size_t i = begin; i < end; i++) t->grad[i] *= t->factor;
}

void us_params_scale_grad(struct us_params *params, struct us_pool *pool, float factor) {
  struct grad_task t = {.grad = params->grad, .factor = factor};
  us_pool_for(pool, params->floats, NORM_BLOCK, scale_block, &t);
}

const struct us_param *us_params_find_nonfinite(const struct us_params *params, bool gradients) {
  for (size_t i = 0; i < params->count; i++) {
    const struct us_param *p = &params->items[i];
    const float *x = gradients ? p->grad : p->value;
    for (size_t k = 0; x && k < p->rows * p->cols; k++)
      if (!isfinite(x[k])) return p;
  }
  return NULL;
}

/* --- export --- */

typedef enum us_status (*alloc_in)(void *owner, size_t bytes, void **ret_memory, struct us_err *err);

static enum us_status alloc_in_model(void *owner, size_t bytes, void **ret_memory, struct us_err *err) {
  return us_model_alloc(owner, bytes, ret_memory, err);
}

static enum us_status alloc_in_draft(void *owner, size_t bytes, void **ret_memory, struct us_err *err) {
  return us_draft_alloc(owner, bytes, ret_memory, err);
}

static enum us_status export_matrix(const struct us_param *p, struct us_matrix *w, alloc_in alloc,
                                    void *owner, struct us_err *err) {
  struct us_matrix_encoding e = effective(p, US_SEQ_ROUND_BF16);
  size_t scale_bytes = us_matrix_scale_bytes(e.format, p->rows, p->cols, e.scale_chunk_rows);
  void *data = NULL, *scales = NULL;
  enum us_status status = alloc(owner, us_matrix_data_bytes(e.format, p->rows, p->cols), &data, err);
  if (status == US_OK && scale_bytes) status = alloc(owner, scale_bytes, &scales, err);
  if (status == US_OK) status = us_matrix_encode(p->value, p->rows, p->cols, &e, data, scales, err);
  if (status != US_OK) return status;
  *w = (struct us_matrix){
      .format = e.format, .rows = p->rows, .cols = p->cols, .data = data, .scales = scales};
  w->scale_chunk_rows = e.format == US_FORMAT_FP8 ? e.scale_chunk_rows : 0;
  return US_OK;
}

static enum us_status export_refs(const struct us_params *params, const struct us_tensor_ref *refs,
                                  size_t count, alloc_in alloc, void *owner, struct us_err *err) {
  if (count != params->count)
    return us_err_set(err, US_ERR_USAGE, "%zu tensors cannot fill a model of %zu", params->count, count);
  for (size_t i = 0; i < count; i++) {
    const struct us_param *p = &params->items[i];
    enum us_status status;
    if (strcmp(p->name, refs[i].name) != 0 || p->rows != refs[i].rows || p->cols != refs[i].cols)
      return us_err_set(err, US_ERR_USAGE, "tensor %s does not fit %s", p->name, refs[i].name);
    if (p->vector) {
      struct us_matrix_encoding e = effective(p, US_SEQ_ROUND_BF16);
      status = us_matrix_fake_quant(p->value, 1, p->rows, &e, *refs[i].vector, err);
    } else {
      status = export_matrix(p, refs[i].matrix, alloc, owner, err);
    }
    if (status != US_OK) return us_err_prefix(err, "%s", p->name);
  }
  return US_OK;
}

enum us_status us_params_export(const struct us_params *params, struct us_model *model, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  enum us_status status = us_model_tensors(model, &refs, &count, err);
  if (status == US_OK) status = export_refs(params, refs, count, alloc_in_model, model, err);
  free(refs);
  return status;
}

enum us_status us_params_export_draft(const struct us_params *params, struct us_draft *draft,
                                      struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  enum us_status status = us_draft_tensors(draft, &refs, &count, err);
  if (status == US_OK) status = export_refs(params, refs, count, alloc_in_draft, draft, err);
  free(refs);
  return status;
}
