/* state.c: the state of a training run on disk. */
#include "training/state.h"

#include "base/buffer.h"
#include "base/h5.h"
#include "base/sha256.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define KIND "train-state"

#define ARENAS 6

static const char *const arena_names[ARENAS] = {"masters",   "moment1",  "moment2",
                                                "osc_share", "osc_mean", "osc_turn"};

/* What a state holds of the parameters: the last three where they are watched. */
static size_t list_arenas(const struct us_params *params, float *arenas[ARENAS]) {
  float *const all[ARENAS] = {params->value,       params->moment1,    params->moment2,
                              params->watch.share, params->watch.mean, params->watch.turn};
  memcpy(arenas, all, sizeof all);
  return params->watch.share ? ARENAS : 3;
}

static void slot_path(const char *path, int slot, char name[4096]) {
  snprintf(name, 4096, "%s.%d", path, slot);
}

bool us_train_state_exists(const char *path) {
  char name[4096];
  for (int slot = 0; slot < 2; slot++) {
    slot_path(path, slot, name);
    if (access(name, F_OK) == 0) return true;
  }
  return false;
}

/* SHA-256 of every tensor's name and shape: states of other models do not fit. */
static enum us_status layout_of(const struct us_params *params, char hex[US_SHA256_HEX], struct us_err *err) {
  struct us_sha256 *hash = NULL;
  uint8_t digest[US_SHA256_BYTES];
  enum us_status status = us_sha256_create(&hash, err);
  if (status != US_OK) return status;
  for (size_t i = 0; i < params->count && status == US_OK; i++) {
    const struct us_param *p = &params->items[i];
    char line[256];
    int n = snprintf(line, sizeof line, "%s %zu %zu\n", p->name, p->rows, p->cols);
    status = us_sha256_update(hash, line, (size_t)n, err);
  }
  if (status != US_OK) {
    us_sha256_free(hash);
    return status;
  }
  status = us_sha256_finish(hash, digest, err);
  if (status == US_OK) us_sha256_hex(digest, hex);
  return status;
}

enum us_status us_train_state_write(const char *path, struct us_train_state *state, struct us_err *err) {
  const struct us_params *params = state->params;
  struct us_h5_writer *out = NULL;
  char name[4096], layout[US_SHA256_HEX];
  slot_path(path, state->slot, name);
  const struct us_param *bad = us_params_find_nonfinite(params, false);
  if (bad)
    return us_err_set(err, US_ERR_CHECK, "step %llu: a weight of %s is not finite; the state was not saved",
                      (unsigned long long)state->step, bad->name);
  enum us_status status = layout_of(params, layout, err);
  if (status == US_OK) status = us_h5_create(name, KIND, &out, err);
  if (status != US_OK) return status;
  const uint64_t counters[2] = {state->step, state->tokens};
  status = us_h5_put_text(out, "layout", layout, err);
  if (status == US_OK) status = us_h5_put_text(out, "options", state->options ? state->options : "", err);
  if (status == US_OK) status = us_h5_put(out, "counters", US_H5_U64, 1, (size_t[]){2}, counters, err);
  if (status == US_OK) status = us_h5_put(out, "seconds", US_H5_F64, 1, (size_t[]){1}, &state->seconds, err);
  float *arenas[ARENAS];
  size_t count = list_arenas(params, arenas);
  for (size_t i = 0; i < count && status == US_OK; i++)
    status = us_h5_put(out, arena_names[i], US_H5_F32, 1, (size_t[]){params->floats}, arenas[i], err);
  if (status != US_OK) {
    us_h5_abandon(out);
    return status;
  }
  status = us_h5_finish(out, err);
  if (status == US_OK) state->slot = 1 - state->slot;
  return status;
}

/* A missing file has step 0 and no handle; a broken one is remembered, and only matters if the other is no better. */
static struct us_h5 *open_slot(const char *path, int slot, uint64_t *ret_step, bool *broken,
                               struct us_err *err) {
  char name[4096];
  struct us_h5 *file = NULL;
  const struct us_h5_dataset *counters = NULL;
  slot_path(path, slot, name);
  if (access(name, F_OK) != 0) return NULL;
  enum us_status status = us_h5_open(name, KIND, &file, err);
  if (status == US_OK) status = us_h5_get(file, "counters", US_H5_U64, 1, (size_t[]){2}, &counters, err);
  if (status != US_OK) {
    *broken = true;
    us_h5_close(file);
    return NULL;
  }
  *ret_step = *(const uint64_t *)counters->data;
  return file;
}

/* Both texts are words behind spaces: name the pairs that differ. */
static enum us_status compare_text(const struct us_h5 *file, const char *key, const char *expected,
                                   struct us_err *err) {
  const char *text = us_h5_text(file, key), *own = expected;
  char differing[512] = "";
  if (!text) text = "";
  if (strcmp(text, expected) == 0) return US_OK;
  while (*text || *own) {
    size_t n = strcspn(text, " "), m = strcspn(own, " "), used = strlen(differing);
    if (n != m || strncmp(text, own, n) != 0)
      snprintf(differing + used, sizeof differing - used, "%s%.*s, now %.*s", used ? "; " : "", (int)n, text,
               (int)m, own);
    text += n + strspn(text + n, " ");
    own += m + strspn(own + m, " ");
  }
  return us_err_set(err, US_ERR_INPUT, "%s: %s differ: %s", us_h5_path(file), key, differing);
}

static enum us_status read_file(const struct us_h5 *file, struct us_train_state *state, struct us_err *err) {
  struct us_params *params = state->params;
  char layout[US_SHA256_HEX];
  const struct us_h5_dataset *found[ARENAS], *counters, *seconds;
  float *arenas[ARENAS];
  size_t count = list_arenas(params, arenas);
  enum us_status status = layout_of(params, layout, err);
  if (status == US_OK) status = compare_text(file, "options", state->options ? state->options : "", err);
  if (status == US_OK) status = compare_text(file, "layout", layout, err);
  for (size_t i = 0; i < count && status == US_OK; i++)
    status = us_h5_get(file, arena_names[i], US_H5_F32, 1, (size_t[]){params->floats}, &found[i], err);
  if (status == US_OK) status = us_h5_get(file, "counters", US_H5_U64, 1, (size_t[]){2}, &counters, err);
  if (status == US_OK) status = us_h5_get(file, "seconds", US_H5_F64, 1, (size_t[]){1}, &seconds, err);
  if (status != US_OK) return status;
  for (size_t i = 0; i < count; i++) memcpy(arenas[i], found[i]->data, params->floats * sizeof(float));
  state->step = ((const uint64_t *)counters->data)[0];
  state->tokens = ((const uint64_t *)counters->data)[1];
  state->seconds = *(const double *)seconds->data;
  return US_OK;
}

enum us_status us_train_state_read(const char *path, struct us_train_state *state, bool *ret_found,
                                   struct us_err *err) {
  uint64_t step[2] = {0, 0};
  bool broken = false;
  struct us_h5 *file[2];
  *ret_found = false;
  for (int slot = 0; slot < 2; slot++) file[slot] = open_slot(path, slot, &step[slot], &broken, err);
  int newer = file[1] && (!file[0] || step[1] > step[0]);
  enum us_status status = broken ? US_ERR_INPUT : US_OK;
  if (file[newer]) {
    status = read_file(file[newer], state, err);
    state->slot = 1 - newer;
    *ret_found = status == US_OK;
  }
  us_h5_close(file[0]);
  us_h5_close(file[1]);
  return status;
}
