/* observe.c: the CUDA executor operation by operation: after each, its output as the reference executor names it.
 *
 * An operation has 8 rows, a product of several row tiles more, and a rank its share; the observer sees all rows and all ranks: outputs are kept until the last row
 * tile's is there. Partial sums that cross between ranks are read where they arrived, before the reduction takes them.
 */
#include "device/executor_impl.h"

#include "device/operand.h"
#include "plan/program.h"

#include <stdlib.h>
#include <string.h>

enum output { NORMED, QKV, ATTENDED, SUMS, ROUTER, RESIDUAL, LOGITS, OUTPUTS };

struct watch {
  struct us_cuda *cuda;
  const struct us_cuda_chunk *chunk;
  const struct us_device_schedule *schedule; /* rank 0's */
  float *kept[OUTPUTS];                      /* (the group's rows, width) */
  float *told;                               /* (the pass's rows, width) */
  uint8_t *raw;                              /* what was copied from the GPU */
  size_t raw_bytes;
  struct us_err *err;
};

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static size_t widest(const struct us_shape *s, enum output output) {
  size_t full = us_attention_qkv_rows(&s->full), swa = us_attention_qkv_rows(&s->swa);
  size_t full_v = (size_t)s->full.q_heads * s->full.v_dim, swa_v = (size_t)s->swa.q_heads * s->swa.v_dim;
  return output == QKV        ? (full > swa ? full : swa)
         : output == ATTENDED ? (full_v > swa_v ? full_v : swa_v)
         : output == ROUTER   ? s->experts
         : output == LOGITS   ? s->vocab
                              : s->hidden;
}

static enum us_status make_room(struct watch *w) {
  const struct us_shape *shape = &w->cuda->base.model->shape;
  size_t most = 0;
  for (enum output o = 0; o < OUTPUTS; o++) {
    size_t width = widest(shape, o);
    if (width > most) most = width;
    w->kept[o] = calloc(w->chunk->group->rows * width + 1, sizeof(float));
    if (!w->kept[o])
      return us_err_memory(w->err, "observed values", w->chunk->group->rows * width * sizeof(float));
  }
  w->told = malloc(w->chunk->rows * most * sizeof(float));
  return w->told ? US_OK : us_err_memory(w->err, "observed values", w->chunk->rows * most * sizeof(float));
}

/* Bytes of a rank's memory, on the host; valid until the next call. */
static enum us_status fetch(struct watch *w, uint32_t rank, const void *from, size_t bytes,
                            const void **ret_bytes) {
  if (bytes > w->raw_bytes) {
    uint8_t *grown = realloc(w->raw, bytes);
    if (!grown) return us_err_memory(w->err, "observed values", bytes);
    w->raw = grown, w->raw_bytes = bytes;
  }
  *ret_bytes = w->raw;
  enum us_status status = us_cuda_fetch(w->cuda, rank, w->raw, from, bytes, w->err);
  return status == US_OK ? us_device_group_sync(w->chunk->group, w->err) : status;
}

/* ---- outputs ----------------------------------------------------------------------------------------------------- */

/* Where a row tile of an operation's lies. */
static const void *tile_of(const void *first, uint64_t tile_bytes, uint32_t tile) {
  return (const uint8_t *)first + tile * tile_bytes;
}

static float *row_of(const struct watch *w, const struct us_engine_op *op, enum output output, size_t r,
                     size_t width) {
  return w->kept[output] + ((size_t)op->row_tile * US_ENGINE_ROWS + r) * width;
}

static enum us_status take_residual(struct watch *w, const struct us_engine_op *op, uint32_t tile) {
  size_t D = op->reduce.D, bytes = US_ENGINE_ROWS * D * sizeof(float), row = tile * US_ENGINE_ROWS;
  const void *from;
  enum us_status status = fetch(w, 0, tile_of(op->reduce.residual, bytes, tile), bytes, &from);
  if (status == US_OK) memcpy(row_of(w, op, RESIDUAL, row, D), from, bytes);
  if (status == US_OK)
    status =
        fetch(w, 0, tile_of(op->reduce.operand, op->reduce.operand_tile, tile), us_operand_bytes(D), &from);
  if (status == US_OK) us_operand_unpack(from, US_ENGINE_ROWS, D, row_of(w, op, NORMED, row, D));
  return status;
}

/* A rank's heads to where the model's projection has them. */
static enum us_status take_qkv(struct watch *w, uint32_t index, uint32_t tile) {
  const struct us_shape *s = &w->cuda->base.model->shape;
  const struct us_engine_op *op = &w->schedule->ops[index];
  const struct us_attention_shape *a = us_shape_attention(s, op->layer);
  uint32_t ranks = w->cuda->devices->ranks, H = a->q_heads / ranks, G = a->kv_heads / ranks;
  size_t width = us_attention_qkv_rows(a), stride = op->gemm.out_stride;
  for (uint32_t rank = 0; rank < ranks; rank++) {
    const void *raw;
    const struct us_engine_gemm *gemm = &w->chunk->group->schedule[rank]->ops[index].gemm;
    const void *out = tile_of(gemm->out, gemm->out_tile, tile);
    enum us_status status = fetch(w, rank, out, US_ENGINE_ROWS * stride * sizeof(float), &raw);
    if (status != US_OK) return status;
    for (size_t r = 0; r < US_ENGINE_ROWS; r++) {
      const float *from = (const float *)raw + r * stride;
      float *to = row_of(w, op, QKV, tile * US_ENGINE_ROWS + r, width);
      for (uint32_t h = 0; h < H; h++, from += a->qk_dim)
        memcpy(to + us_attention_q_row(a, s->qkv_chunks, rank * H + h), from, a->qk_dim * sizeof *to);
      for (uint32_t g = 0; g < G; g++, from += a->qk_dim)
        memcpy(to + us_attention_k_row(a, s->qkv_chunks, rank * G + g), from, a->qk_dim * sizeof *to);
      for (uint32_t g = 0; g < G; g++, from += a->v_dim)
        memcpy(to + us_attention_v_row(a, s->qkv_chunks, rank * G + g), from, a->v_dim * sizeof *to);
    }
  }
  return US_OK;
}

static enum us_status take_attended(struct watch *w, uint32_t index) {
  const struct us_engine_op *op = &w->schedule->ops[index];
  size_t width = (size_t)op->attention.H * op->attention.V, ranks = w->cuda->devices->ranks;
  float *part = malloc(US_ENGINE_ROWS * width * sizeof *part);
  enum us_status status =
      part ? US_OK : us_err_memory(w->err, "observed values", US_ENGINE_ROWS * width * sizeof *part);
  for (uint32_t rank = 0; status == US_OK && rank < ranks; rank++) {
    const void *raw, *from = w->chunk->group->schedule[rank]->ops[index].attention.operand;
    status = fetch(w, rank, from, us_operand_bytes(width), &raw);
    if (status != US_OK) break;
    us_operand_unpack(raw, US_ENGINE_ROWS, width, part);
    for (size_t r = 0; r < US_ENGINE_ROWS; r++)
      memcpy(row_of(w, op, ATTENDED, r, ranks * width) + rank * width, part + r * width,
             width * sizeof *part);
  }
  free(part);
  return status;
}

/* What rank 0 will add to its residual: the partial sums of an exchange, in rank order. tile: of the operation's row tiles. */
static enum us_status take_sums(struct watch *w, const struct us_engine_op *op, uint32_t tile) {
  const struct us_engine_rank *rank = &w->schedule->rank;
  uint32_t exchange = (op->kind == US_ENGINE_DOWN ? op->down.exchange : op->gemm.exchange) + tile,
           addends = 0;
  for (uint32_t i = 0; i < w->schedule->op_count; i++)
    if (w->schedule->ops[i].kind == US_ENGINE_REDUCE &&
        exchange - w->schedule->ops[i].reduce.exchange < w->schedule->ops[i].row_tiles)
      addends = w->schedule->ops[i].reduce.addends;
  struct us_engine_launch launch;
  us_device_group_fill(w->chunk->group, 0, (uint32_t)(op - w->schedule->ops),
                       (uint32_t)(op - w->schedule->ops) + 1, &launch);
  size_t D = rank->D, one = US_ENGINE_ROWS * D, slot = (launch.exchanges + exchange) % rank->slots;
  const void *raw;
  enum us_status status =
      fetch(w, 0, rank->exchange[0] + slot * rank->addends * one, addends * one * sizeof(float), &raw);
  if (status != US_OK) return status;
  for (uint32_t r = 0; r < US_ENGINE_ROWS; r++)
    for (uint32_t c = 0; c < D; c++) {
      const float *from = (const float *)raw + us_engine_fragment_index(r, c);
      float sum = from[0];
      for (uint32_t i = 1; i < addends; i++) sum += from[i * one];
      row_of(w, op, SUMS, tile * US_ENGINE_ROWS + r, D)[c] = sum;
    }
  return US_OK;
}

static enum us_status take_router(struct watch *w, const struct us_engine_op *op, uint32_t tile) {
  size_t E = w->cuda->base.model->shape.experts, stride = op->gemm.out_stride;
  const void *raw;
  enum us_status status = fetch(w, 0, tile_of(op->gemm.out, op->gemm.out_tile, tile),
                                op->gemm.parts * US_ENGINE_ROWS * stride * sizeof(float), &raw);
  if (status != US_OK) return status;
  for (size_t r = 0; r < US_ENGINE_ROWS; r++)
    for (size_t e = 0; e < E; e++) {
      const float *from = (const float *)raw + r * stride + e;
      float sum = from[0];
      for (uint32_t i = 1; i < op->gemm.parts; i++) sum += from[i * US_ENGINE_ROWS * stride];
      row_of(w, op, ROUTER, tile * US_ENGINE_ROWS + r, E)[e] = sum;
    }
  return US_OK;
}

static enum us_status take_logits(struct watch *w, const struct us_engine_op *op, uint32_t tile) {
  size_t N = w->cuda->base.model->shape.vocab;
  for (uint32_t rank = 0; rank < w->cuda->devices->ranks; rank++) {
    const struct us_device_schedule *s = w->chunk->group->schedule[rank];
    size_t first = ((size_t)op->row_tile + tile) * US_ENGINE_ROWS;
    const void *raw;
    enum us_status status = fetch(w, rank, s->logits + first * s->logits_stride,
                                  US_ENGINE_ROWS * s->logits_stride * sizeof(float), &raw);
    if (status != US_OK) return status;
    for (size_t r = 0; r < US_ENGINE_ROWS; r++)
      memcpy(row_of(w, op, LOGITS, tile * US_ENGINE_ROWS + r, N) + s->logits_first,
             (const float *)raw + r * s->logits_stride, s->logits_count * sizeof(float));
  }
  return US_OK;
}

/* ---- names ------------------------------------------------------------------------------------------------------- */

/* The rows of the pass, without those between them that do not exist. */
static bool tell(struct watch *w, const char *name, uint32_t layer, enum output output, size_t width) {
  const struct us_observer *observer = w->chunk->pass->observer;
  for (size_t r = 0; r < w->chunk->rows; r++)
    memcpy(w->told + r * width, w->kept[output] + w->chunk->place[r] * width, width * sizeof(float));
  return observer->after_op(observer->arg, name, layer, w->told, w->chunk->rows, width);
}

/* Whether a reduction adds the attention's sums, not the MLP's. */
static bool after_attention(const struct watch *w, const struct us_engine_op *op) {
  for (const struct us_engine_op *from = op; from-- > w->schedule->ops;)
    if (from->layer == op->layer && from->task_op == US_TASK_O_PROJ &&
        from->gemm.exchange == op->reduce.exchange)
      return true;
  return false;
}

static bool tell_reduction(struct watch *w, const struct us_engine_op *op) {
  const struct us_shape *s = &w->cuda->base.model->shape;
  size_t D = s->hidden;
  if (op->kind == US_ENGINE_EMBED) return tell(w, "attn_norm", 0, NORMED, D);
  if (!tell(w, "residual", op->layer, RESIDUAL, D)) return false;
  if (after_attention(w, op)) return tell(w, "mlp_norm", op->layer, NORMED, D);
  bool last = op->layer + 1 == s->layers;
  return tell(w, last ? "final_norm" : "attn_norm", last ? US_LAYER_NONE : op->layer + 1, NORMED, D);
}

/* Keep what an operation wrote; after its last row tile tell the observer. *ret_go: it wants more. */
static enum us_status observe(struct watch *w, uint32_t index, bool *ret_go) {
  const struct us_engine_op *op = &w->schedule->ops[index];
  const struct us_shape *s = &w->cuda->base.model->shape;
  uint32_t last_tile = w->chunk->place[w->chunk->rows - 1] / US_ENGINE_ROWS;
  uint32_t tiles = last_tile - op->row_tile < op->row_tiles ? last_tile - op->row_tile + 1 : op->row_tiles;
  bool last = op->row_tile + op->row_tiles > last_tile;
  const struct us_attention_shape *a = op->layer < s->layers ? us_shape_attention(s, op->layer) : &s->full;
  enum us_status status = US_OK;
  *ret_go = true;
  if (op->row_tile > last_tile) return US_OK; /* rows that do not exist */
  switch ((enum us_task_op)op->task_op) {
  case US_TASK_EMBED_NORM:
  case US_TASK_RESIDUAL_NORM:
    for (uint32_t t = 0; status == US_OK && t < tiles; t++) status = take_residual(w, op, t);
    if (status == US_OK && last) *ret_go = tell_reduction(w, op);
    return status;
  case US_TASK_QKV:
    for (uint32_t t = 0; status == US_OK && t < tiles; t++) status = take_qkv(w, index, t);
    if (status == US_OK && last) *ret_go = tell(w, "qkv", op->layer, QKV, us_attention_qkv_rows(a));
    return status;
  case US_TASK_ATTENTION:
    status = take_attended(w, index);
    if (status == US_OK && last)
      *ret_go = tell(w, "attention", op->layer, ATTENDED, (size_t)a->q_heads * a->v_dim);
    return status;
  case US_TASK_O_PROJ:
  case US_TASK_EXPERT_DOWN:
  case US_TASK_DENSE_DOWN:
    for (uint32_t t = 0; status == US_OK && t < tiles; t++) status = take_sums(w, op, t);
    if (status == US_OK && last)
      *ret_go = tell(w,
                     op->task_op == US_TASK_O_PROJ        ? "o_proj"
                     : op->task_op == US_TASK_EXPERT_DOWN ? "experts"
                                                          : "dense",
                     op->layer, SUMS, s->hidden);
    return status;
  case US_TASK_ROUTER:
    for (uint32_t t = 0; status == US_OK && t < tiles; t++) status = take_router(w, op, t);
    if (status == US_OK && last) *ret_go = tell(w, "router", op->layer, ROUTER, s->experts);
    return status;
  case US_TASK_HEAD:
    for (uint32_t t = 0; status == US_OK && t < tiles; t++) status = take_logits(w, op, t);
    if (status == US_OK && last) *ret_go = tell(w, "head", US_LAYER_NONE, LOGITS, s->vocab);
    return status;
  default:
    return US_OK;
  }
}

enum us_status us_cuda_observe(struct us_cuda *cuda, const struct us_cuda_chunk *chunk, uint32_t first,
                               uint32_t last, bool *ret_stopped, struct us_err *err) {
  struct watch w = {.cuda = cuda, .chunk = chunk, .schedule = chunk->group->schedule[0], .err = err};
  enum us_status status = make_room(&w);
  bool go = true;
  for (uint32_t i = first; status == US_OK && go && i < last; i++) {
    status = us_device_group_run(chunk->group, US_DEVICE_SINGLE, i, i + 1, err);
    if (status == US_OK) status = us_device_group_sync(chunk->group, err);
    if (status == US_OK) status = observe(&w, i, &go);
  }
  *ret_stopped = !go;
  if (status == US_OK && !go) status = us_device_group_reset(chunk->group, err);
  for (int o = 0; o < OUTPUTS; o++) free(w.kept[o]);
  free(w.told);
  free(w.raw);
  return status;
}
