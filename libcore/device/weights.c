/* weights.c: a rank's weights on its GPU: one arena, filled piece by piece.
 *
 * Contents: memory; pieces; the rest; synthetic models.
 *
 * One stream: while the GPU copies and packs a piece, the host gathers the next one into the other half of the pinned memory.
 * Loading is bound by the host's copy out of the mapped file, making weights by the generator.
 */
#include "device/weights.h"

#include "base/init.h"
#include "device/device.h"
#include "device/weights_fill.h"
#include "device/weights_layout.h"
#include "formats/bf16.h"
#include "kernels/pages/pages_gpu.h"
#include "model/random.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

struct loader {
  struct us_weights_plan *plan;
  const struct us_device_weights_options *options;
  bool synthetic;
  cudaStream_t stream;
  uint8_t *arena, *scratch; /* device: plan->arena_bytes, plan->piece_bytes */
  struct {
    uint8_t *host;
    cudaEvent_t copied;
  } half[2]; /* pinned: plan->piece_bytes each */
  uint32_t turn;
  uint64_t done;
  struct us_err *err;
};

static enum us_status cuda(struct loader *l, cudaError_t code, const char *what) {
  return us_cuda_status(code, what, l->err);
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static enum us_status check_free(struct loader *l) {
  const struct us_device_bytes *b = &l->plan->weights->bytes;
  size_t available = 0, total = 0;
  enum us_status status = cuda(l, cudaMemGetInfo(&available, &total), "memory of the GPU");
  uint64_t need = l->plan->arena_bytes + l->plan->piece_bytes;
  if (status != US_OK || need <= available) return status;
  const double gib = 0x1p-30;
  return us_err_set(
      l->err, US_ERR_MEMORY,
      "rank %u of %u needs %.2f GiB of GPU %d, %.2f are free: experts %.2f, attention %.2f, dense %.2f, "
      "router %.2f, head %.2f, embedding %.2f, drafter %.2f, its head %.2f, vectors %.2f, loading %.2f",
      l->options->rank, l->options->ranks, (double)need * gib, l->options->device, (double)available * gib,
      (double)b->experts * gib, (double)b->attention * gib, (double)b->dense * gib, (double)b->router * gib,
      (double)b->head * gib, (double)b->embed * gib, (double)b->draft * gib, (double)b->draft_head * gib,
      (double)b->vectors * gib, (double)b->scratch * gib);
}

static enum us_status acquire(struct loader *l) {
  size_t piece = l->plan->piece_bytes;
  enum us_status status = cuda(l, cudaSetDevice(l->options->device), "GPU");
  if (status == US_OK) status = check_free(l);
  if (status == US_OK) status = cuda(l, cudaMalloc((void **)&l->arena, l->plan->arena_bytes), "weights");
  if (status == US_OK) status = cuda(l, cudaMalloc((void **)&l->scratch, piece), "loading buffer");
  if (status == US_OK)
    status = cuda(l, cudaStreamCreateWithFlags(&l->stream, cudaStreamNonBlocking), "stream");
  for (int i = 0; status == US_OK && i < 2; i++) {
    status = cuda(l, cudaHostAlloc((void **)&l->half[i].host, piece, cudaHostAllocDefault),
                  "pinned loading buffer");
    if (status == US_OK)
      status = cuda(l, cudaEventCreateWithFlags(&l->half[i].copied, cudaEventDisableTiming), "event");
  }
  return status;
}

/* Errors here have been seen by the calls before. */
static void release(struct loader *l) {
  if (l->stream) (void)cudaStreamSynchronize(l->stream);
  for (int i = 0; i < 2; i++) {
    (void)cudaFreeHost(l->half[i].host);
    if (l->half[i].copied) (void)cudaEventDestroy(l->half[i].copied);
  }
  if (l->stream) (void)cudaStreamDestroy(l->stream);
  (void)cudaFree(l->scratch);
  (void)cudaFree(l->arena);
}

void us_device_weights_free(struct us_device_weights *weights) {
  if (!weights) return;
  (void)cudaSetDevice(weights->device);
  (void)cudaFree(weights->owner);
  us_device_layout_free(weights);
}

/* ---- pieces ------------------------------------------------------------------------------------------------------ */

static void report(struct loader *l, uint64_t bytes) {
  l->done += bytes;
  if (l->options->progress) l->options->progress(l->options->arg, l->done, l->plan->arena_bytes);
}

/* The other half of the pinned memory, once the GPU has read it. */
static enum us_status next_half(struct loader *l, uint8_t **ret_host) {
  l->turn ^= 1;
  *ret_host = l->half[l->turn].host;
  return cuda(l, cudaEventSynchronize(l->half[l->turn].copied), "loading");
}

/* Send the first `bytes` of this half. */
static enum us_status send(struct loader *l, void *device, size_t bytes) {
  enum us_status status = cuda(
      l, cudaMemcpyAsync(device, l->half[l->turn].host, bytes, cudaMemcpyHostToDevice, l->stream), "loading");
  if (status == US_OK) status = cuda(l, cudaEventRecord(l->half[l->turn].copied, l->stream), "loading");
  return status;
}

static enum us_status fill(struct loader *l, const struct us_weights_item *item,
                           const struct us_weights_piece *piece, const struct us_weights_stage *stage) {
  uint8_t *host;
  enum us_status status = next_half(l, &host);
  if (status != US_OK) return status;
  struct us_pages_source *sources = (struct us_pages_source *)(void *)host;
  for (uint32_t i = 0; i < piece->count; i++) sources[i] = us_weights_staged(item, stage, l->scratch, i);
  if (!l->synthetic) {
    status = us_weights_copy(item, piece, stage, host, l->err);
    return status == US_OK ? send(l, l->scratch, stage->bytes) : status;
  }
  us_weights_inits(item, piece, stage, host);
  status = send(l, l->scratch, stage->sources_at);
  return status == US_OK ? us_weights_make(item, piece, stage, l->scratch, l->stream, l->err) : status;
}

static enum us_status pack(struct loader *l, const struct us_weights_item *item,
                           const struct us_weights_piece *piece) {
  struct us_weights_stage stage = us_weights_stage(item, piece);
  struct us_pages pages = item->pages;
  pages.rows = stage.rows * item->matrices;
  uint64_t tile_bytes = (uint64_t)us_pages_slices(&pages) * us_pages_page_bytes(&pages);
  uint8_t *to =
      l->arena + item->offset + piece->first * us_pages_bytes(&item->pages) + piece->tile * tile_bytes;
  enum us_status status = fill(l, item, piece, &stage);
  if (status == US_OK)
    status = cuda(l,
                  us_pages_pack_gpu(&pages, (const struct us_pages_source *)(const void *)l->scratch,
                                    piece->count, to, l->stream),
                  item->name);
  report(l, piece->count * us_pages_bytes(&pages));
  return status;
}

/* ---- the rest ---------------------------------------------------------------------------------------------------- */

/* Through the pinned memory, as much at a time as it holds. */
static enum us_status copy_rows(struct loader *l, uint8_t *to, const uint8_t *from, uint64_t bytes) {
  enum us_status status = US_OK;
  for (uint64_t at = 0; status == US_OK && at < bytes; at += l->plan->piece_bytes) {
    uint64_t part = bytes - at < l->plan->piece_bytes ? bytes - at : l->plan->piece_bytes;
    uint8_t *host;
    status = next_half(l, &host);
    if (status != US_OK) break;
    memcpy(host, from + at, part);
    status = send(l, to + at, part);
  }
  return status;
}

/* Rows of an FP8 embedding as bf16, which holds every one of them when the scales are powers of two. */
static enum us_status widen(const struct us_matrix *w, size_t first, size_t rows, float *values, uint16_t *to,
                            struct us_err *err) {
  for (size_t r = 0; r < rows; r++, to += w->cols) {
    us_matrix_decode_row(w, first + r, values);
    for (size_t c = 0; c < w->cols; c++) {
      to[c] = us_bf16_from_f32(values[c]);
      if (us_bf16_to_f32(to[c]) != values[c])
        return us_err_set(
            err, US_ERR_USAGE,
            "the embedding is fp8 with scales that are no powers of two: on the GPU it is bf16, which "
            "does not hold it; convert it (qat-quant --fp8-scale ue8m0, or embed=bf16)");
    }
  }
  return US_OK;
}

static enum us_status copy_fp8_rows(struct loader *l, uint8_t *to) {
  const struct us_weights_plan *p = l->plan;
  size_t row = p->embed->cols * sizeof(uint16_t), most = p->piece_bytes / row;
  float *values = malloc(p->embed->cols * sizeof *values);
  enum us_status status =
      values ? US_OK : us_err_memory(l->err, "a row of the embedding", p->embed->cols * sizeof *values);
  for (size_t at = 0; status == US_OK && at < p->embed_rows; at += most) {
    size_t rows = p->embed_rows - at < most ? p->embed_rows - at : most;
    uint8_t *host;
    status = next_half(l, &host);
    if (status == US_OK)
      status = widen(p->embed, p->embed_first + at, rows, values, (uint16_t *)(void *)host, l->err);
    if (status == US_OK) status = send(l, to + at * row, rows * row);
  }
  free(values);
  return status;
}

static enum us_status make_embedding(struct loader *l, uint8_t *to) {
  const struct us_weights_plan *p = l->plan;
  uint8_t *host;
  enum us_status status = next_half(l, &host);
  if (status != US_OK) return status;
  memcpy(host, p->embed->data, sizeof(struct us_init));
  status = send(l, l->scratch, sizeof(struct us_init));
  struct us_synthetic s = {.format = US_FORMAT_BF16,
                           .rows = (uint32_t)p->embed->rows,
                           .cols = (uint32_t)p->embed->cols,
                           .first_row = p->embed_first,
                           .window_rows = p->embed_rows,
                           .window_cols = (uint32_t)p->embed->cols};
  if (status == US_OK)
    status = cuda(
        l,
        us_synthetic_window_gpu(&s, (const struct us_init *)(const void *)l->scratch, 1, to, NULL, l->stream),
        "embedding");
  return status;
}

static enum us_status load_embedding(struct loader *l) {
  struct us_weights_plan *p = l->plan;
  uint64_t row = p->embed->cols * sizeof(uint16_t), bytes = p->embed_rows * row,
           all = p->weights->embed_rows * row;
  uint8_t *to = l->arena + p->embed_offset;
  bool fp8 = p->embed->format == US_FORMAT_FP8;
  if (fp8 && l->synthetic)
    return us_err_set(l->err, US_ERR_USAGE,
                      "a random embedding is made in bf16 on the GPU, not in fp8 (embed=bf16)");
  p->weights->embed = (uint16_t *)(void *)to;
  enum us_status status = cuda(l, cudaMemsetAsync(to + bytes, 0, all - bytes, l->stream), "embedding");
  if (status == US_OK)
    status = l->synthetic ? make_embedding(l, to)
             : fp8        ? copy_fp8_rows(l, to)
                          : copy_rows(l, to, (const uint8_t *)p->embed->data + p->embed_first * row, bytes);
  report(l, us_weights_align(all));
  return status;
}

static enum us_status load_vectors(struct loader *l) {
  enum us_status status = US_OK;
  for (uint32_t i = 0; status == US_OK && i < l->plan->vector_count; i++) {
    const struct us_weights_vector *v = &l->plan->vectors[i];
    *v->to = (float *)(void *)(l->arena + v->offset);
    status = copy_rows(l, l->arena + v->offset, (const uint8_t *)v->from, v->n * sizeof(float));
  }
  return status;
}

/* Row i of `after` is that of id rank * embed_rows + i, as the head's. */
static enum us_status load_markov(struct loader *l) {
  struct us_weights_plan *p = l->plan;
  const struct us_markov *markov = l->options->opt_markov;
  uint64_t row = p->weights->draft_shape.markov * sizeof(uint16_t);
  if (!row) return US_OK;
  if (!markov || markov->after.cols * sizeof(uint16_t) != row ||
      markov->after.rows != p->weights->shape.vocab || markov->after.format != US_FORMAT_BF16)
    return us_err_set(l->err, US_ERR_USAGE, "a drafter with a Markov head needs its tables in bf16");
  p->weights->markov_before = (uint16_t *)(void *)(l->arena + p->markov_before);
  p->weights->markov_after = (uint16_t *)(void *)(l->arena + p->markov_after);
  enum us_status status =
      copy_rows(l, l->arena + p->markov_before, markov->before.data, markov->before.rows * row);
  if (status == US_OK)
    status = copy_rows(l, l->arena + p->markov_after,
                       (const uint8_t *)markov->after.data + p->embed_first * row, p->embed_rows * row);
  return status;
}

static enum us_status load_all(struct loader *l) {
  enum us_status status = acquire(l);
  if (status == US_OK) status = load_vectors(l);
  if (status == US_OK) status = load_embedding(l);
  if (status == US_OK) status = load_markov(l);
  for (uint32_t i = 0; status == US_OK && i < l->plan->item_count; i++) {
    const struct us_weights_item *item = &l->plan->items[i];
    item->to->pages.pages = l->arena + item->offset;
    struct us_weights_piece piece = {0};
    while (status == US_OK && us_weights_next(item, &piece)) status = pack(l, item, &piece);
  }
  if (status == US_OK) status = cuda(l, cudaStreamSynchronize(l->stream), "loading weights");
  if (status == US_OK) report(l, l->plan->arena_bytes - l->done); /* vectors and what alignment adds */
  return status;
}

static enum us_status load(const struct us_model *model, const struct us_draft *opt_draft, bool synthetic,
                           const struct us_device_weights_options *options,
                           struct us_device_weights **ret_weights, struct us_err *err) {
  struct loader l = {.options = options, .synthetic = synthetic, .err = err};
  *ret_weights = NULL;
  enum us_status status =
      us_weights_plan_create(model, opt_draft, options->rank, options->ranks, &l.plan, err);
  if (status != US_OK) return status;
  status = load_all(&l);
  if (status == US_OK) {
    *ret_weights = l.plan->weights;
    (*ret_weights)->device = options->device, (*ret_weights)->owner = l.arena;
    l.plan->weights = NULL, l.arena = NULL;
  }
  release(&l);
  us_weights_plan_free(l.plan);
  return status;
}

enum us_status us_device_weights_load(const struct us_model *model, const struct us_draft *opt_draft,
                                      const struct us_device_weights_options *options,
                                      struct us_device_weights **ret_weights, struct us_err *err) {
  return load(model, opt_draft, false, options, ret_weights, err);
}

/* ---- synthetic models -------------------------------------------------------------------------------------------- */

/* Every matrix of a skeleton gets its generator as data, every vector its values. */
static void seed_tensors(const struct us_tensor_ref *refs, size_t count, uint64_t seed,
                         struct us_init *inits) {
  for (size_t i = 0; i < count; i++) {
    inits[i] = us_random_init(seed, &refs[i]);
    if (refs[i].matrix) refs[i].matrix->data = &inits[i];
    for (size_t row = 0; !refs[i].matrix && row < refs[i].rows; row++)
      us_random_row(seed, &refs[i], row, *refs[i].vector + row);
  }
}

static enum us_status seed_model(struct us_model *model, uint64_t seed, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  void *inits = NULL;
  enum us_status status = us_model_tensors(model, &refs, &count, err);
  if (status == US_OK) status = us_model_alloc(model, count * sizeof(struct us_init), &inits, err);
  if (status == US_OK) seed_tensors(refs, count, seed, inits);
  free(refs);
  return status;
}

static enum us_status seed_draft(struct us_draft *draft, uint64_t seed, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  void *inits = NULL;
  enum us_status status = us_draft_tensors(draft, &refs, &count, err);
  if (status == US_OK) status = us_draft_alloc(draft, count * sizeof(struct us_init), &inits, err);
  if (status == US_OK) seed_tensors(refs, count, seed, inits);
  if (status == US_OK) us_bf16_round_all(draft->mask_embedding, draft->shape.hidden, draft->mask_embedding);
  free(refs);
  return status;
}

enum us_status us_device_weights_synthetic(const struct us_shape *shape,
                                           const struct us_draft_shape *opt_draft, uint64_t seed,
                                           const struct us_device_weights_options *options,
                                           struct us_device_weights **ret_weights, struct us_err *err) {
  struct us_model *model = NULL;
  struct us_draft *draft = NULL;
  *ret_weights = NULL;
  enum us_status status = us_weights_skeleton(shape, opt_draft, &model, &draft, err);
  if (status == US_OK) status = seed_model(model, seed, err);
  if (status == US_OK && draft) status = seed_draft(draft, seed, err);
  if (status == US_OK) status = load(model, draft, true, options, ret_weights, err);
  us_model_free(model), us_draft_free(draft);
  return status;
}
