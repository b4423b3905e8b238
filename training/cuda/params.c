/* params.c: masters, gradients, moments and compute weights of one GPU.
 *
 * Contents: memory; copies; refresh; gradients; names; life.
 */
#include "training/cuda/params.h"

#include "kernels/quant/quant_train.h"
#include "training/cuda/cuda.h"
#include "training/cuda/params_state.h"

#include <stdlib.h>

/* --- memory --- */

static bool is_frozen(const struct us_params *host) {
  return host->grad == NULL;
}

/* `bytes` of 0 would be no allocation: a GPU that owns nothing still has pointers. */
static enum us_status take(struct us_cuda_params *set, size_t bytes, const char *what, void *ret_pointer,
                           struct us_err *err) {
  void *memory = NULL;
  enum us_status status = us_cuda_take(set->cuda, bytes ? bytes : 256, what, &memory, err);
  memcpy(ret_pointer, &memory, sizeof memory);
  return status;
}

static enum us_status take_arenas(struct us_cuda_params *set, struct us_err *err) {
  size_t all = set->floats * sizeof(float), own = (set->owned.end - set->owned.begin) * sizeof(float);
  enum us_status status = take(set, all, "rounded weights", &set->rounded, err);
  if (status == US_OK)
    status = take(set, set->floats * sizeof(uint16_t), "compute weights", &set->compute, err);
  if (status != US_OK || is_frozen(set->host)) return status;
  status = take(set, all, "weights", &set->value, err);
  if (status == US_OK) status = take(set, all, "gradients", &set->grad, err);
  if (status == US_OK) status = take(set, own, "first moments", &set->moment1, err);
  if (status == US_OK) status = take(set, own, "second moments", &set->moment2, err);
  if (status != US_OK || !set->host->watch.share) return status;
  status = take(set, own, "shares of steps", &set->watch.share, err);
  if (status == US_OK) status = take(set, own, "means of codes", &set->watch.mean, err);
  if (status == US_OK) status = take(set, own, "moves of codes", &set->watch.turn, err);
  return status;
}

static enum us_status take_state(struct us_cuda_params *set, struct us_err *err) {
  struct us_cuda_params_state *s = set->state;
  void *pinned = NULL;
  enum us_status status = us_cuda_take_pinned(sizeof *s->host, "figures of gradients", &pinned, err);
  s->host = pinned;
  if (status != US_OK) return status;
  *s->host = (struct us_cuda_params_figures){.bad = UINT64_MAX};
  status = take(set, sizeof *s->device, "figures of gradients", &s->device, err);
  if (status == US_OK)
    status = take(set, us_sum_squares_train_scratch(), "sums of gradients", &s->sum_scratch, err);
  return status;
}

/* --- copies --- */

static void copy(struct us_cuda_params *set, void *to, const void *from, size_t bytes,
                 enum cudaMemcpyKind kind) {
  us_cuda_did(set->cuda, cudaMemcpyAsync(to, from, bytes, kind, set->cuda->stream), "copying weights");
}

size_t us_cuda_params_owned_arenas(const struct us_cuda_params *set, float *device[US_CUDA_OWNED_ARENAS],
                                   float *host[US_CUDA_OWNED_ARENAS]) {
  float *const here[US_CUDA_OWNED_ARENAS] = {set->moment1, set->moment2, set->watch.share, set->watch.mean,
                                             set->watch.turn};
  const struct us_params *there = set->host;
  float *const whole[US_CUDA_OWNED_ARENAS] = {there->moment1, there->moment2, there->watch.share,
                                              there->watch.mean, there->watch.turn};
  memcpy(device, here, sizeof here);
  memcpy(host, whole, sizeof whole);
  return set->watch.share ? US_CUDA_OWNED_ARENAS : 2;
}

static void copy_owned(struct us_cuda_params *set, bool up) {
  float *device[US_CUDA_OWNED_ARENAS], *host[US_CUDA_OWNED_ARENAS];
  size_t count = us_cuda_params_owned_arenas(set, device, host),
         own = (set->owned.end - set->owned.begin) * sizeof(float);
  for (size_t i = 0; i < count; i++) {
    float *whole = host[i] + set->owned.begin;
    copy(set, up ? device[i] : whole, up ? whole : device[i], own,
         up ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost);
  }
}

enum us_status us_cuda_params_upload(struct us_cuda_params *set, struct us_err *err) {
  size_t all = set->floats * sizeof(float);
  us_cuda_use(set->cuda);
  if (is_frozen(set->host)) {
    copy(set, set->rounded, set->host->value, all, cudaMemcpyHostToDevice);
    us_cuda_did(set->cuda, us_bf16_train(set->floats, set->rounded, set->compute, set->cuda->stream),
                "rounding weights");
    return us_cuda_sync(set->cuda, err);
  }
  copy(set, set->value, set->host->value, all, cudaMemcpyHostToDevice);
  copy_owned(set, true);
  return us_cuda_sync(set->cuda, err);
}

enum us_status us_cuda_params_download(struct us_cuda_params *set, struct us_err *err) {
  if (is_frozen(set->host)) return US_OK;
  us_cuda_use(set->cuda);
  copy(set, set->host->value, set->value, set->floats * sizeof(float), cudaMemcpyDeviceToHost);
  return us_cuda_sync(set->cuda, err);
}

enum us_status us_cuda_params_download_owned(struct us_cuda_params *set, struct us_err *err) {
  if (is_frozen(set->host)) return US_OK;
  us_cuda_use(set->cuda);
  copy_owned(set, false);
  return us_cuda_sync(set->cuda, err);
}

void us_cuda_params_upload_one(struct us_cuda_params *set, const struct us_param *p) {
  us_cuda_use(set->cuda);
  copy(set, set->value + p->offset, p->value, p->rows * p->cols * sizeof(float), cudaMemcpyHostToDevice);
}

/* --- refresh --- */

size_t us_cuda_param_tiles(const struct us_param *p, struct us_quant_tile *opt_tiles) {
  struct us_matrix_encoding encoding = p->encoding;
  if (encoding.format == US_FORMAT_NONE) encoding.format = US_FORMAT_F32;
  return us_quant_train_tiles(&encoding, p->offset, p->vector ? 1 : p->rows, p->vector ? p->rows : p->cols,
                              opt_tiles);
}

static size_t tiles_of(const struct us_params *host, struct us_quant_tile *opt_tiles) {
  size_t count = 0;
  for (size_t i = 0; i < host->count; i++)
    count += us_cuda_param_tiles(&host->items[i], opt_tiles ? opt_tiles + count : NULL);
  return count;
}

/* What must be rounded, listed once: encodings do not change while a set lives. */
static enum us_status list_tiles(struct us_cuda_params *set, struct us_err *err) {
  struct us_cuda_params_state *s = set->state;
  for (size_t i = 0; i < set->host->count; i++) {
    const struct us_param *p = &set->host->items[i];
    if (p->offset % 16 != 0) return us_err_set(err, US_ERR_CHECK, "%s: lies at %zu", p->name, p->offset);
  }
  s->tile_count = tiles_of(set->host, NULL);
  size_t bytes = s->tile_count * sizeof *s->tiles;
  void *sent = NULL;
  struct us_quant_tile *tiles = calloc(s->tile_count + 1, sizeof *tiles);
  if (!tiles) return us_err_memory(err, "tiles of weights", bytes);
  tiles_of(set->host, tiles);
  enum us_status status = us_cuda_params_send(set->cuda, tiles, bytes, "tiles of weights", &sent, err);
  s->tiles = sent;
  free(tiles);
  return status;
}

void us_cuda_params_refresh(struct us_cuda_params *set) {
  struct us_cuda_params_state *s = set->state;
  struct us_cuda *cuda = set->cuda;
  if (is_frozen(set->host)) return;
  us_cuda_use(cuda);
  us_cuda_did(cuda, cudaMemsetAsync(&s->device->bad, 0xff, sizeof s->device->bad, cuda->stream), "rounding");
  struct us_quant_train quant = {.tiles = s->tiles,
                                 .count = s->tile_count,
                                 .value = set->value,
                                 .opt_rounded = set->rounded,
                                 .opt_compute = set->compute,
                                 .opt_bad = &s->device->bad};
  us_cuda_did(cuda, us_quant_train(&quant, cuda->stream), "rounding weights");
  us_cuda_download(cuda, &s->host->bad, &s->device->bad, sizeof s->host->bad);
}

/* --- names --- */

static const struct us_param *param_at(const struct us_params *host, uint64_t index) {
  const struct us_param *found = NULL;
  for (size_t i = 0; i < host->count; i++)
    if (host->items[i].offset <= index) found = &host->items[i];
  return found;
}

enum us_status us_cuda_params_check(const struct us_cuda_params *set, struct us_err *err) {
  uint64_t bad = set->state->host->bad;
  const struct us_param *p = bad < set->floats ? param_at(set->host, bad) : NULL;
  if (!p) return US_OK;
  return us_err_set(err, US_ERR_CHECK, "%s: weight %zu is not finite", p->name, (size_t)bad - p->offset);
}

/* --- gradients --- */

void us_cuda_params_zero_grad(struct us_cuda_params *set) {
  us_cuda_use(set->cuda);
  us_cuda_did(set->cuda, cudaMemsetAsync(set->grad, 0, set->floats * sizeof(float), set->cuda->stream),
              "clearing gradients");
}

enum us_status us_cuda_params_square(struct us_cuda_params *set, double *ret_sum, struct us_err *err) {
  struct us_cuda_params_state *s = set->state;
  struct us_cuda *cuda = set->cuda;
  us_cuda_use(cuda);
  us_cuda_did(cuda,
              us_sum_squares_train(set->owned.end - set->owned.begin, set->grad + set->owned.begin,
                                   &s->device->square, s->sum_scratch, cuda->stream),
              "norm of gradients");
  us_cuda_download(cuda, &s->host->square, &s->device->square, sizeof s->host->square);
  enum us_status status = us_cuda_sync(cuda, err);
  *ret_sum = s->host->square;
  return status;
}

enum us_status us_cuda_params_nonfinite(struct us_cuda_params *set, const struct us_param **ret_param,
                                        struct us_err *err) {
  struct us_cuda_params_state *s = set->state;
  struct us_cuda *cuda = set->cuda;
  us_cuda_use(cuda);
  us_cuda_did(cuda, cudaMemsetAsync(&s->device->index, 0xff, sizeof s->device->index, cuda->stream),
              "looking for NaN");
  us_cuda_did(cuda,
              us_nonfinite_train(set->owned.end - set->owned.begin, set->grad + set->owned.begin,
                                 &s->device->index, cuda->stream),
              "looking for NaN");
  us_cuda_download(cuda, &s->host->index, &s->device->index, sizeof s->host->index);
  enum us_status status = us_cuda_sync(cuda, err);
  bool found = status == US_OK && s->host->index < set->owned.end - set->owned.begin;
  *ret_param = found ? param_at(set->host, set->owned.begin + s->host->index) : NULL;
  return status;
}

/* --- life --- */

enum us_status us_cuda_params_create(struct us_cuda *cuda, struct us_params *host, struct us_owned owned,
                                     struct us_cuda_params **ret_set, struct us_err *err) {
  struct us_cuda_params *set = calloc(1, sizeof *set);
  *ret_set = NULL;
  if (!set) return us_err_memory(err, "parameters", sizeof *set);
  *set = (struct us_cuda_params){.cuda = cuda, .host = host, .floats = host->floats, .owned = owned};
  set->state = calloc(1, sizeof *set->state);
  us_cuda_use(cuda);
  enum us_status status = set->state ? US_OK : us_err_memory(err, "parameters", sizeof *set->state);
  if (status == US_OK) status = take_arenas(set, err);
  if (status == US_OK) status = take_state(set, err);
  if (status == US_OK && !is_frozen(host)) status = list_tiles(set, err);
  if (status == US_OK && set->watch.share) status = us_cuda_watch_list(set, err);
  if (status == US_OK && is_frozen(host)) status = us_cuda_params_upload(set, err);
  if (status == US_OK && !is_frozen(host)) {
    copy(set, set->value, host->value, host->floats * sizeof(float), cudaMemcpyHostToDevice);
    us_cuda_params_refresh(set);
    status = us_cuda_sync(cuda, err);
  }
  if (status != US_OK) {
    us_cuda_params_free(set);
    return status;
  }
  *ret_set = set;
  return US_OK;
}

void us_cuda_params_free(struct us_cuda_params *set) {
  if (!set) return;
  us_cuda_use(set->cuda);
  struct us_cuda_params_state *s = set->state;
  if (s) {
    us_cuda_update_release(s);
    us_cuda_watch_release(s);
    us_cuda_give(s->tiles);
    us_cuda_give(s->sum_scratch);
    us_cuda_give(s->device);
    us_cuda_give_pinned(s->host);
  }
  free(s);
  us_cuda_give(set->value);
  us_cuda_give(set->grad);
  us_cuda_give(set->moment1);
  us_cuda_give(set->moment2);
  us_cuda_give(set->watch.share);
  us_cuda_give(set->watch.mean);
  us_cuda_give(set->watch.turn);
  us_cuda_give(set->rounded);
  us_cuda_give(set->compute);
  free(set);
}
