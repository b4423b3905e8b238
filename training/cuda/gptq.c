/* gptq.c: masters that begin where GPTQ rounds them, on a GPU: training/gptq.h says what is computed.
 *
 * The original and the model rounded so far run beside each other, a chunk of sequences at a time; of each chunk the two residual streams
 * before the layer at hand are kept, and a layer is run again for each of its parts: forward passes cost little here.
 *
 * Contents: chunks; a part's matrices; running up to a part; sums; aims; layers; session.
 */
#include "kernels/optim/gptq_train.h"
#include "training/cuda/gemm.h"
#include "training/cuda/gptq_embed.h"
#include "training/cuda/learner_state.h"
#include "training/cuda/model_state.h"
#include "training/cuda/params_state.h"
#include "training/gptq_state.h"

#include <stdlib.h>

#define CHUNK_ROWS 32768 /* of both models at once; as many as fill the GPU */

/* The matrices that multiply the same inputs: `tensors` that lie behind each other, in each of `groups`. */
struct work {
  struct us_param *first;
  uint32_t tensors, groups, N, K;
  uint64_t step;      /* items from one group's first tensor to the next one's */
  bool experts, adds; /* rows are those of the plan of experts; the product is added to the stream */
};

/* One of the two models. */
struct side {
  struct us_cuda_params *set;
  struct us_cuda_model *model;
  float *stream; /* device (tokens, D) before the layer at hand, of all chunks */
  float *spare;  /* device (chunk, D) behind it */
};

struct session {
  const struct us_gptq *gptq;
  struct us_cuda *cuda;
  struct us_params *masters;
  struct side original, student;
  struct us_rows *chunk; /* (chunks) */
  size_t chunks, chunk_rows;
  uint32_t layer;
  enum us_layer_part part;
  size_t *tile; /* (tensors + 1) where a tensor's tiles begin in those of the student's set */

  struct us_gptq_train sums; /* moments, crossed, made up, order, scales, scratch: device */
  float *crossed, *made_up, *scale;
  uint8_t *format, *format_host;
  uint16_t *lost_stream; /* device (chunk * K, D) */
};

/* --- chunks --- */

static size_t sequences_of_chunk(const struct us_gptq *gptq) {
  return gptq->length < CHUNK_ROWS ? CHUNK_ROWS / gptq->length : 1;
}

static enum us_status draw_chunks(struct session *s, struct us_err *err) {
  size_t each = sequences_of_chunk(s->gptq), windows = s->gptq->windows;
  enum us_status status = US_OK;
  s->chunk_rows = (windows < each ? windows : each) * s->gptq->length;
  s->chunk = calloc((windows + each - 1) / each, sizeof *s->chunk);
  if (!s->chunk) return us_err_memory(err, "GPTQ", windows);
  for (size_t first = 0; first < windows && status == US_OK; first += each)
    status = us_gptq_draw(s->gptq, first, windows - first < each ? windows - first : each,
                          &s->chunk[s->chunks++], err);
  return status;
}

/* The chunk's rows and streams go before the layer at hand. */
static enum us_status take_chunk(struct session *s, struct side *side, size_t chunk, struct us_err *err) {
  struct us_cuda_model_state *state = side->model->state;
  struct us_batch batch = us_rows_batch(&s->chunk[chunk]);
  enum us_status status = us_cuda_model_accept(side->model, &batch, err);
  if (status != US_OK) return status;
  us_cuda_model_plan(side->model);
  state->residual[s->layer] = side->stream + chunk * s->chunk_rows * side->model->shape.hidden;
  if (s->layer < side->model->shape.layers) state->residual[s->layer + 1] = side->spare;
  return US_OK;
}

/* --- a part's matrices --- */

static struct work work_of(const struct session *s) {
  const struct us_shape *shape = &s->student.model->shape;
  const struct us_layer_roles *roles = &s->student.model->state->roles[s->layer];
  const struct us_attention_shape *a = us_shape_attention(shape, s->layer);
  bool moe = shape->moe_layer[s->layer];
  uint32_t D = shape->hidden, F = moe ? shape->expert_inner : shape->dense_inner;
  struct work w = {.tensors = 1, .groups = moe ? shape->experts : 1, .step = moe ? 3 : 0, .experts = moe};
  switch (s->part) {
  case US_PART_ATTENTION_INPUTS:
    return (struct work){
        .first = roles->qkv, .tensors = 1, .groups = 1, .N = us_attention_qkv_rows(a), .K = D};
  case US_PART_ATTENTION:
    return (struct work){
        .first = roles->o_proj, .tensors = 1, .groups = 1, .N = D, .K = a->q_heads * a->v_dim, .adds = true};
  case US_PART_MLP_INPUTS:
    w.first = moe ? roles->experts : roles->gate_up;
    w.tensors = 2, w.N = 2 * F, w.K = D;
    return w;
  case US_PART_MLP:
    w.first = moe ? roles->experts + 2 : roles->down;
    w.N = D, w.K = F, w.adds = true;
    return w;
  }
  return w;
}

static struct work work_alone(struct us_param *p) {
  return (struct work){.first = p, .tensors = 1, .groups = 1, .N = (uint32_t)p->rows, .K = (uint32_t)p->cols};
}

static struct work head_work(const struct session *s) {
  return work_alone(s->student.model->state->model.head);
}

static struct work embed_work(const struct session *s) {
  return work_alone(s->student.model->state->model.embed);
}

static struct us_param *tensor_of(const struct work *w, uint32_t group, uint32_t i) {
  return w->first + group * w->step + i;
}

/* Whether any of them is rounded; format_host then has that of each row. */
static bool list_formats(struct session *s, const struct work *w) {
  uint8_t *to = s->format_host;
  bool any = false;
  for (uint32_t g = 0; g < w->groups; g++)
    for (uint32_t i = 0; i < w->tensors; i++) {
      const struct us_param *p = tensor_of(w, g, i);
      bool rounds = us_gptq_rounds(p);
      memset(to, rounds ? (int)p->encoding.format : US_FORMAT_NONE, p->rows);
      to += p->rows;
      any |= rounds;
    }
  return any;
}

/* --- running up to a part --- */

static void run_to(struct session *s, struct side *side) {
  struct us_cuda_model *model = side->model;
  uint32_t l = s->layer;
  us_cuda_model_project(model, l, NULL);
  if (s->part == US_PART_ATTENTION_INPUTS) return;
  us_cuda_model_attend(model, l);
  if (s->part == US_PART_ATTENTION) return;
  us_cuda_model_merge(model, l);
  us_cuda_model_norm_middle(model, l);
  if (!model->shape.moe_layer[l]) {
    if (s->part == US_PART_MLP) us_cuda_model_dense(model, l, false);
    return;
  }
  /* The student's rows visit the original's experts, or inputs could not be compared. */
  if (side == &s->original) us_cuda_model_route(model, l, true);
  if (s->part == US_PART_MLP) us_cuda_model_experts(model, l, false);
}

static void share_routes(struct session *s) {
  const struct us_shape *shape = &s->student.model->shape;
  for (uint32_t l = 0; l < shape->layers; l++) {
    struct us_cuda_layer_saved *to = &s->student.model->state->saved[l];
    const struct us_cuda_layer_saved *from = &s->original.model->state->saved[l];
    if (!shape->moe_layer[l]) continue;
    to->weight = from->weight;
    to->start = from->start, to->row = from->row, to->pair = from->pair, to->slot = from->slot;
  }
}

/* --- sums --- */

/* Where a chunk's inputs of the part are and go to; the original's make room for what was lost where rows stay rows. */
static struct us_gptq_train_inputs inputs_of(const struct session *s, const struct work *w) {
  struct us_cuda_model *o = s->original.model, *q = s->student.model;
  const struct us_cuda_layer_saved *from = &o->state->saved[s->layer], *to = &q->state->saved[s->layer];
  uint32_t R = (uint32_t)q->R;
  struct us_gptq_train_inputs in = {.rows = w->experts ? R * q->shape.top_k : R, .cols = w->K};
  switch (s->part) {
  case US_PART_ATTENTION_INPUTS:
    in.lost = from->norm1, in.x = to->norm1;
    break;
  case US_PART_ATTENTION:
    in.lost = from->attention, in.x = to->attention;
    break;
  case US_PART_MLP_INPUTS:
    in.lost = from->norm2, in.x = to->norm2;
    break;
  case US_PART_MLP:
    in.lost = o->state->a, in.x = q->state->a;
    break;
  }
  in.from = in.lost, in.to = in.x;
  if (!w->experts) return in;
  in.opt_weight = from->weight,
  in.opt_pair = from->pair; /* an expert's output counts so much: so do its inputs */
  if (s->part == US_PART_MLP_INPUTS) in.opt_row = from->row, in.lost = from->x, in.x = to->x;
  return in;
}

/* Each of a row's experts makes up for an equal part of what the stream lost. */
static struct us_gptq_train_stream stream_of(const struct session *s, const struct work *w) {
  const struct us_cuda_model_state *o = s->original.model->state, *q = s->student.model->state;
  const struct us_cuda_layer_saved *from = &o->saved[s->layer], *to = &q->saved[s->layer];
  uint32_t R = (uint32_t)s->student.model->R, top_k = s->student.model->shape.top_k;
  bool middle = s->part == US_PART_MLP;
  return (struct us_gptq_train_stream){.rows = w->experts ? R * top_k : R,
                                       .cols = w->N,
                                       .opt_row = w->experts ? from->row : NULL,
                                       .share = w->experts ? 1.0f / (float)top_k : 1.0f,
                                       .from = middle ? from->middle : o->residual[s->layer],
                                       .to = middle ? to->middle : q->residual[s->layer],
                                       .lost = s->lost_stream};
}

/* sum += left^T x over the rows, of every group by itself. */
static void add_sum(struct session *s, const struct work *w, uint32_t rows, uint32_t N, const uint16_t *left,
                    const uint16_t *x, float *sum) {
  if (!w->experts) {
    us_cuda_linear_grad_w(s->cuda, &(struct us_cuda_linear){.R = rows, .N = N, .K = w->K}, left, x, sum);
    return;
  }
  struct us_grouped grouped = us_cuda_model_grouped(s->student.model, s->layer, N, w->K);
  us_cuda_did(s->cuda, us_grouped_grad_w(&grouped, left, x, sum, (uint64_t)N * w->K, s->cuda->stream),
              "moments of inputs");
}

static void add_inputs(struct session *s, const struct work *w, const struct us_gptq_train_inputs *in) {
  us_cuda_did(s->cuda, us_gptq_train_inputs(in, s->cuda->stream), "inputs");
  add_sum(s, w, in->rows, w->K, in->x, in->x, s->sums.moments);
  add_sum(s, w, in->rows, w->K, in->lost, in->x, s->crossed);
  if (!w->adds) return;
  struct us_gptq_train_stream stream = stream_of(s, w);
  us_cuda_did(s->cuda, us_gptq_train_stream(&stream, s->cuda->stream), "what the stream lost");
  add_sum(s, w, in->rows, w->N, stream.lost, in->x, s->made_up);
}

static void clear_sums(struct session *s, const struct work *w) {
  size_t square = (size_t)w->groups * w->K * w->K * sizeof(float),
         made_up = (size_t)w->groups * w->N * w->K * sizeof(float);
  us_cuda_did(s->cuda, cudaMemsetAsync(s->sums.moments, 0, square, s->cuda->stream), "clearing sums");
  us_cuda_did(s->cuda, cudaMemsetAsync(s->crossed, 0, square, s->cuda->stream), "clearing sums");
  if (w->adds)
    us_cuda_did(s->cuda, cudaMemsetAsync(s->made_up, 0, made_up, s->cuda->stream), "clearing sums");
}

static enum us_status sum_part(struct session *s, const struct work *w, struct us_err *err) {
  enum us_status status = US_OK;
  clear_sums(s, w);
  for (size_t c = 0; c < s->chunks && status == US_OK; c++) {
    status = take_chunk(s, &s->original, c, err);
    if (status == US_OK) status = take_chunk(s, &s->student, c, err);
    if (status != US_OK) return status;
    run_to(s, &s->original);
    run_to(s, &s->student);
    struct us_gptq_train_inputs in = inputs_of(s, w);
    add_inputs(s, w, &in);
    status = us_cuda_failed(s->cuda, err);
  }
  return status;
}

/* --- aims --- */

/* The scales of a tensor's master, or with `use` what it is multiplied as from now on. */
static void quantize(struct session *s, const struct us_param *p, uint64_t base, bool use) {
  struct us_cuda_params *set = s->student.set;
  size_t index = (size_t)(p - s->masters->items);
  struct us_quant_train quant = {.tiles = set->state->tiles + s->tile[index],
                                 .count = s->tile[index + 1] - s->tile[index],
                                 .value = set->value,
                                 .opt_rounded = use ? set->rounded : NULL,
                                 .opt_compute = use ? set->compute : NULL,
                                 .opt_scale = use ? NULL : s->scale,
                                 .scale_base = base};
  us_cuda_did(s->cuda, us_quant_train(&quant, s->cuda->stream), "rounding weights");
}

static void quantize_all(struct session *s, const struct work *w, bool use) {
  for (uint32_t g = 0; g < w->groups; g++)
    for (uint32_t i = 0; i < w->tensors; i++)
      if (us_gptq_rounds(tensor_of(w, g, i))) quantize(s, tensor_of(w, g, i), w->first->offset, use);
}

/* From the sums; with `lost` what was lost is made up for first. */
static void aim(struct session *s, const struct work *w, bool lost) {
  struct us_gptq_train g = s->sums;
  cudaStream_t stream = s->cuda->stream;
  g.groups = w->groups, g.N = w->N, g.K = w->K;
  g.value = s->student.set->value + w->first->offset;
  g.stride = w->groups > 1 ? tensor_of(w, 1, 0)->offset - w->first->offset : 0;
  g.opt_made_up = w->adds ? s->made_up : NULL;
  us_cuda_did(
      s->cuda,
      cudaMemcpyAsync(s->format, s->format_host, (size_t)w->groups * w->N, cudaMemcpyHostToDevice, stream),
      "formats of rows");
  us_cuda_did(s->cuda, us_gptq_train_factor(&g, stream), "factors of moments");
  if (lost)
    us_cuda_did(s->cuda, us_gptq_train_correct(&g, US_GPTQ_OF_INPUTS, US_GPTQ_OF_STREAM, stream),
                "corrections of weights");
  quantize_all(s, w, false);
  us_cuda_did(s->cuda, us_gptq_train_round(&g, stream), "aims of weights");
  quantize_all(s, w, true);
}

/* --- layers --- */

static enum us_status round_part(struct session *s, struct us_err *err) {
  struct work w = work_of(s);
  if (!list_formats(s, &w)) return US_OK;
  enum us_status status = sum_part(s, &w, err);
  if (status == US_OK) aim(s, &w, true);
  return status == US_OK ? us_cuda_sync(s->cuda, err) : status;
}

/* Streams of all chunks go behind the layer. */
static enum us_status pass_layer(struct session *s, struct us_err *err) {
  struct side *sides[2] = {&s->original, &s->student};
  enum us_status status = US_OK;
  s->part = US_PART_MLP;
  for (size_t c = 0; c < s->chunks && status == US_OK; c++)
    for (int i = 0; i < 2 && status == US_OK; i++) {
      struct us_cuda_model_state *state = sides[i]->model->state;
      status = take_chunk(s, sides[i], c, err);
      if (status != US_OK) break;
      run_to(s, sides[i]);
      us_cuda_did(s->cuda,
                  cudaMemcpyAsync(state->residual[s->layer], state->residual[s->layer + 1],
                                  sides[i]->model->R * sides[i]->model->shape.hidden * sizeof(float),
                                  cudaMemcpyDeviceToDevice, s->cuda->stream),
                  "streams");
      status = us_cuda_failed(s->cuda, err);
    }
  return status;
}

static enum us_status begin_streams(struct session *s, struct us_err *err) {
  struct side *sides[2] = {&s->original, &s->student};
  enum us_status status = US_OK;
  s->layer = 0;
  for (size_t c = 0; c < s->chunks && status == US_OK; c++)
    for (int i = 0; i < 2 && status == US_OK; i++) {
      status = take_chunk(s, sides[i], c, err);
      if (status == US_OK) us_cuda_model_begin(sides[i]->model);
    }
  return status == US_OK ? us_cuda_failed(s->cuda, err) : status;
}

static enum us_status round_head(struct session *s, struct us_err *err) {
  struct work w = head_work(s);
  struct us_cuda_model *o = s->original.model, *q = s->student.model;
  enum us_status status = US_OK;
  if (!list_formats(s, &w)) return US_OK;
  clear_sums(s, &w);
  for (size_t c = 0; c < s->chunks && status == US_OK; c++) {
    status = take_chunk(s, &s->original, c, err);
    if (status == US_OK) status = take_chunk(s, &s->student, c, err);
    if (status != US_OK) return status;
    us_cuda_model_end(o, NULL);
    us_cuda_model_end(q, NULL);
    struct us_gptq_train_inputs in = {.rows = (uint32_t)q->R,
                                      .cols = w.K,
                                      .from = o->hidden,
                                      .to = q->hidden,
                                      .lost = o->hidden,
                                      .x = q->hidden};
    add_inputs(s, &w, &in);
    status = us_cuda_failed(s->cuda, err);
  }
  if (status == US_OK) aim(s, &w, true);
  return status;
}

static enum us_status round_layers(struct session *s, struct us_err *err) {
  enum us_status status = begin_streams(s, err);
  for (; s->layer < s->student.model->shape.layers && status == US_OK; s->layer++) {
    for (s->part = US_PART_ATTENTION_INPUTS; s->part <= US_PART_MLP && status == US_OK; s->part++)
      status = round_part(s, err);
    if (status == US_OK) status = pass_layer(s, err);
  }
  return status == US_OK ? round_head(s, err) : status;
}

/* --- session --- */

static enum us_status round_embed(struct session *s, struct us_err *err) {
  struct work w = embed_work(s);
  if (!list_formats(s, &w)) return US_OK;
  us_cuda_did(s->cuda,
              cudaMemsetAsync(s->sums.moments, 0, (size_t)w.K * w.K * sizeof(float), s->cuda->stream),
              "clearing sums");
  enum us_status status = us_cuda_gptq_embed_moments(s->cuda, s->gptq, &s->original.model->shape,
                                                     s->original.set, s->sums.moments, err);
  if (status == US_OK) aim(s, &w, false);
  return status == US_OK ? us_cuda_sync(s->cuda, err) : status;
}

/* What is rounded in its turn is the original's until then. */
static enum us_status begin_student(struct session *s, struct us_err *err) {
  struct us_cuda_params *set = s->student.set;
  struct us_cuda *cuda = s->cuda;
  s->tile = calloc(s->masters->count + 1, sizeof *s->tile);
  if (!s->tile) return us_err_memory(err, "GPTQ", s->masters->count * sizeof *s->tile);
  for (size_t i = 0; i < s->masters->count; i++)
    s->tile[i + 1] = s->tile[i] + us_cuda_param_tiles(&s->masters->items[i], NULL);
  us_cuda_did(cuda,
              cudaMemcpyAsync(set->rounded, set->value, set->floats * sizeof(float), cudaMemcpyDeviceToDevice,
                              cuda->stream),
              "copying weights");
  us_cuda_did(cuda, us_bf16_train(set->floats, set->value, set->compute, cuda->stream), "rounding weights");
  for (size_t i = 0; i < s->masters->count; i++) {
    const struct us_param *p = &s->masters->items[i];
    if (!us_gptq_rounds(p)) quantize(s, p, 0, true);
  }
  return round_embed(s, err);
}

static enum us_status open_side(struct session *s, struct side *side, const struct us_shape *shape,
                                struct us_params *params, struct us_err *err) {
  size_t tokens = s->gptq->windows * s->gptq->length;
  void *stream = NULL;
  /* Nothing is owned, so there are no moments of gradients. */
  enum us_status status = us_cuda_params_create(s->cuda, params, (struct us_owned){0}, &side->set, err);
  if (status == US_OK)
    status =
        us_cuda_model_create(s->cuda, shape, side->set, s->chunk_rows, US_TRAIN_FORWARD, &side->model, err);
  if (status == US_OK)
    status = us_cuda_take(s->cuda, tokens * shape->hidden * sizeof(float), "residual streams", &stream, err);
  side->stream = stream;
  if (status == US_OK) side->spare = side->model->state->residual[0];
  return status;
}

/* The most that any part wants of each. */
struct sizes {
  size_t square, rows, formats, values, order, scratch, stream;
};

static size_t larger(size_t a, size_t b) {
  return a > b ? a : b;
}

static void count_work(struct sizes *most, const struct work *w) {
  most->square = larger(most->square, (size_t)w->groups * w->K * w->K);
  most->order = larger(most->order, (size_t)w->groups * w->K);
  most->rows = larger(most->rows, w->adds ? (size_t)w->groups * w->N * w->K : 0);
  most->formats = larger(most->formats, (size_t)w->groups * w->N);
  const struct us_param *end = tensor_of(w, w->groups - 1, w->tensors - 1);
  most->values = larger(most->values, end->offset + end->rows * end->cols - w->first->offset);
  most->scratch = larger(most->scratch, us_gptq_train_scratch(w->groups, w->N, w->K));
}

static struct sizes sizes_of(struct session *s) {
  const struct us_shape *shape = &s->student.model->shape;
  struct sizes most = {.stream = s->chunk_rows * larger(shape->top_k, 1) * shape->hidden};
  struct work head = head_work(s), embed = embed_work(s);
  for (s->layer = 0; s->layer < shape->layers; s->layer++)
    for (s->part = US_PART_ATTENTION_INPUTS; s->part <= US_PART_MLP; s->part++) {
      struct work w = work_of(s);
      count_work(&most, &w);
    }
  count_work(&most, &head);
  count_work(&most, &embed);
  return most;
}

static enum us_status take(struct session *s, size_t bytes, const char *what, void *ret_pointer,
                           struct us_err *err) {
  void *memory = NULL;
  enum us_status status = us_cuda_take(s->cuda, bytes ? bytes : 256, what, &memory, err);
  memcpy(ret_pointer, &memory, sizeof memory);
  return status;
}

static enum us_status take_sums(struct session *s, struct us_err *err) {
  struct sizes most = sizes_of(s);
  s->format_host = malloc(most.formats);
  enum us_status status = s->format_host ? US_OK : us_err_memory(err, "GPTQ", most.formats);
  if (status == US_OK) status = take(s, most.square * sizeof(float), "moments", &s->sums.moments, err);
  if (status == US_OK) status = take(s, most.square * sizeof(float), "moments", &s->crossed, err);
  if (status == US_OK) status = take(s, most.rows * sizeof(float), "moments", &s->made_up, err);
  if (status == US_OK) status = take(s, most.order * sizeof(uint32_t), "orders", &s->sums.at, err);
  if (status == US_OK) status = take(s, most.formats, "formats of rows", &s->format, err);
  if (status == US_OK) status = take(s, (most.values / 8 + 1) * sizeof(float), "scales", &s->scale, err);
  if (status == US_OK) status = take(s, most.scratch * sizeof(float), "scratch", &s->sums.scratch, err);
  if (status == US_OK)
    status = take(s, most.stream * sizeof(uint16_t), "residual streams", &s->lost_stream, err);
  s->sums.crossed = s->crossed, s->sums.scale = s->scale, s->sums.format = s->format;
  s->sums.cublas = s->cuda->blas;
  return status;
}

/* The masters, all rounded once more: for the name of one that is not finite. */
static enum us_status fetch_masters(struct session *s, struct us_err *err) {
  us_cuda_params_refresh(s->student.set);
  enum us_status status = us_cuda_sync(s->cuda, err);
  if (status == US_OK) status = us_cuda_params_check(s->student.set, err);
  return status == US_OK ? us_cuda_params_download(s->student.set, err) : status;
}

static void close_side(struct side *side) {
  us_cuda_model_free(side->model);
  us_cuda_params_free(side->set);
  us_cuda_give(side->stream);
}

static void close_session(struct session *s) {
  close_side(&s->student);
  close_side(&s->original);
  us_cuda_give(s->sums.moments);
  us_cuda_give(s->crossed);
  us_cuda_give(s->made_up);
  us_cuda_give(s->sums.at);
  us_cuda_give(s->format);
  us_cuda_give(s->scale);
  us_cuda_give(s->sums.scratch);
  us_cuda_give(s->lost_stream);
  for (size_t i = 0; i < s->chunks; i++) us_rows_release(&s->chunk[i]);
  free(s->chunk);
  free(s->tile);
  free(s->format_host);
}

enum us_status us_cuda_learner_gptq(struct us_learner *base, const struct us_gptq *gptq,
                                    const struct us_shape *shape, struct us_params *original,
                                    struct us_params *params, struct us_err *err) {
  struct session s = {.gptq = gptq, .cuda = ((struct cuda_learner *)base)->cuda[0], .masters = params};
  us_cuda_use(s.cuda);
  enum us_status status = us_gptq_check(gptq, err);
  if (status == US_OK) status = draw_chunks(&s, err);
  if (status == US_OK) status = open_side(&s, &s.original, shape, original, err);
  if (status == US_OK) status = open_side(&s, &s.student, shape, params, err);
  if (status == US_OK) share_routes(&s);
  if (status == US_OK) status = take_sums(&s, err);
  if (status == US_OK) status = begin_student(&s, err);
  if (status == US_OK) status = round_layers(&s, err);
  if (status == US_OK) status = fetch_masters(&s, err);
  if (status != US_OK) (void)cudaStreamSynchronize(s.cuda->stream); /* what is queued reads what is freed */
  close_session(&s);
  return status;
}
