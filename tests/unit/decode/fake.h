/* fake.h: an executor whose model is a hash, so that decoding can be tested fast and adversarially.
 *
 *     struct fake fake;
 *     fake_init(&fake, vocab, block);             // fake.ex is the executor
 *     fake_logits(&fake, tokens, n, logits);      // the truth: the target's logits after n tokens, from the tokens alone
 *
 * The fake writes real caches: layer 0 (full) holds token and position, layer 1 (window FAKE_WINDOW) holds a hash of all
 * tokens so far as layer 0 gave them. Logits are a hash of the window of layer 1: a row that reads one stale, missing or
 * shifted key gives other logits. Every key read must carry its own position, else `violations` counts. Taps carry the
 * same hash; the drafter keeps them as context, must find all positions before the anchor there, and drafts by running the
 * target's own function ahead, wrongly at about `blunder` of 256 slots: so acceptance is high only if context is right.
 */
#ifndef US_TESTS_FAKE_H
#define US_TESTS_FAKE_H

#include "model/executor.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
  FAKE_WINDOW = 8,
  FAKE_DRAFT_WINDOW = 16,
  FAKE_DIM = 4,
  FAKE_TAPS = 2,
  FAKE_HIDDEN = 4,
  FAKE_EXPERTS = 8,
  FAKE_TOP_K = 2,
  FAKE_SHARP = 6 /* logits span about so many nats */
};

struct fake {
  struct us_executor ex;
  struct us_model model;
  struct us_layer layers[2];
  struct us_expert experts[FAKE_EXPERTS];
  struct us_draft draft;
  struct us_draft_layer draft_layer;
  uint32_t blunder;      /* of 256 */
  uint32_t period;       /* nonzero: the likeliest token after t is (t + 1) % period, by far */
  bool keep_first_write; /* mutation: a rejected draft's keys are never replaced */
  uint32_t nan_position; /* logits of this position are NaN; 0: none */
  uint32_t fail_after;   /* forward passes until US_ERR_DEVICE; 0: never */
  uint64_t violations, forwards, drafts, contexts, prefill_rows, decode_rows;
  uint64_t resident_calls; /* resident.h */
};

static inline uint32_t fake_mix(uint32_t a, uint32_t b) {
  uint64_t x = ((uint64_t)a << 32 | b) * 0x9E3779B97F4A7C15u;
  x ^= x >> 29;
  x *= 0xBF58476D1CE4E5B9u;
  return (uint32_t)(x >> 32) ^ (uint32_t)(x >> 11);
}

/* Logits of a window hash. `last` is the token before. */
static inline void fake_row(const struct fake *f, uint32_t hash, int32_t last, float *logits) {
  uint32_t N = f->model.shape.vocab;
  for (uint32_t i = 0; i < N; i++) logits[i] = (float)(fake_mix(hash, i) >> 8) * 0x1p-24f * FAKE_SHARP;
  if (f->period) logits[((uint32_t)last + 1) % f->period] = 100.0f;
}

/* Hash of all tokens up to a position, and of the window of those that layer 1 sees. */
static inline uint32_t fake_fold(uint32_t state, int32_t token, uint32_t position) {
  return fake_mix(fake_mix(state, (uint32_t)token + 1), position) & 0xffffffu; /* exact in a float */
}
static inline uint32_t fake_window_hash(const uint32_t *states, uint32_t position) {
  uint32_t hash = 17, from = position + 1 > FAKE_WINDOW ? position + 1 - FAKE_WINDOW : 0;
  for (uint32_t t = from; t <= position; t++) hash = fake_mix(hash, states[t]);
  return hash;
}

/* The truth, without caches: logits for the token after tokens (n). */
static inline void fake_logits(const struct fake *f, const int32_t *tokens, uint32_t n, float *logits) {
  uint32_t *states = malloc(n * sizeof *states);
  for (uint32_t t = 0; t < n; t++) states[t] = fake_fold(t ? states[t - 1] : 3, tokens[t], t);
  fake_row(f, fake_window_hash(states, n - 1), tokens[n - 1], logits);
  free(states);
}

static inline void fake_key(struct fake *f, const struct us_kv *kv, uint32_t layer, uint32_t position,
                            float *k) {
  us_kv_read_k(kv, layer, position, 0, k);
  if (k[1] != (float)position) f->violations++;
}

static inline void fake_store(struct fake *f, struct us_kv *kv, uint32_t layer, uint32_t position,
                              uint32_t value, uint32_t extra) {
  float k[FAKE_DIM] = {(float)value, (float)position, (float)extra, 1.0f};
  if (f->keep_first_write) {
    float old[FAKE_DIM];
    us_kv_read_k(kv, layer, position, 0, old);
    if (old[1] == (float)position && old[3] == 1.0f) return;
  }
  us_kv_write(kv, layer, position, 0, k, k);
}

/* Hash of the tokens at positions 0..position as layer 0 of the cache has them. */
static inline uint32_t fake_state(struct fake *f, const struct us_kv *kv, uint32_t position) {
  uint32_t state = 3;
  for (uint32_t t = 0; t <= position; t++) {
    float k[FAKE_DIM];
    fake_key(f, kv, 0, t, k);
    state = fake_fold(state, (int32_t)k[0], t);
  }
  return state;
}

static inline enum us_status fake_forward(struct us_executor *ex, const struct us_pass *pass,
                                          struct us_err *err) {
  struct fake *f = (struct fake *)(void *)ex;
  uint32_t N = f->model.shape.vocab;
  if (f->fail_after && f->forwards + 1 >= f->fail_after)
    return us_err_set(err, US_ERR_DEVICE, "the device is gone");
  f->forwards++;
  if (pass->prefill) {
    uint32_t from = pass->rows[0].position, to = pass->rows[pass->R - 1].position;
    if (from % 512 != 0 || from / 512 != to / 512) f->violations++;
    f->prefill_rows += pass->R;
  } else {
    f->decode_rows += pass->R;
  }
  for (size_t r = 0; r < pass->R; r++)
    fake_store(f, pass->rows[r].kv, 0, pass->rows[r].position, (uint32_t)pass->rows[r].token, 0);
  for (size_t r = 0; r < pass->R; r++) { /* layer 1, row by row: a prefill chunk is longer than its ring */
    const struct us_row *row = &pass->rows[r];
    uint32_t state = fake_state(f, row->kv, row->position), hash = 17;
    fake_store(f, row->kv, 1, row->position, state, 0);
    uint32_t from = row->position + 1 > FAKE_WINDOW ? row->position + 1 - FAKE_WINDOW : 0;
    for (uint32_t t = from; t <= row->position; t++) {
      float k[FAKE_DIM];
      fake_key(f, row->kv, 1, t, k);
      hash = fake_mix(hash, (uint32_t)k[0]);
    }
    if (pass->logits && (!pass->want_logits || pass->want_logits[r])) {
      fake_row(f, hash, row->token, pass->logits + r * N);
      if (f->nan_position && row->position + 1 == f->nan_position)
        for (uint32_t i = 0; i < N; i++) pass->logits[r * N + i] = NAN;
    }
    if (pass->taps) {
      float *taps = pass->taps + r * FAKE_TAPS * FAKE_HIDDEN;
      for (int i = 0; i < FAKE_TAPS * FAKE_HIDDEN; i++) taps[i] = -1.0f;
      taps[0] = (float)state, taps[1] = (float)row->position, taps[5] = (float)row->token;
    }
    for (uint32_t j = 0; pass->routed && j < FAKE_TOP_K; j++) {
      pass->routed[r * FAKE_TOP_K + j] = UINT32_MAX;
      pass->routed[(pass->R + r) * FAKE_TOP_K + j] = 2 * ((uint32_t)row->token % 3) + j;
    }
  }
  return US_OK;
}

static inline enum us_status fake_draft_context(struct us_executor *ex, const struct us_draft_context *c,
                                                struct us_err *err) {
  (void)err;
  struct fake *f = (struct fake *)(void *)ex;
  f->contexts++;
  for (size_t r = 0; r < c->R; r++) {
    const float *taps = c->taps + r * FAKE_TAPS * FAKE_HIDDEN;
    if (taps[1] != (float)(c->position + r)) f->violations++;
    fake_store(f, c->kv, 0, c->position + (uint32_t)r, (uint32_t)taps[0], (uint32_t)taps[5]);
  }
  return US_OK;
}

static inline enum us_status fake_draft(struct us_executor *ex, const struct us_draft_pass *pass,
                                        struct us_err *err) {
  (void)err;
  struct fake *f = (struct fake *)(void *)ex;
  uint32_t N = f->model.shape.vocab, states[FAKE_DRAFT_WINDOW + US_MAX_BLOCK], seen = 0;
  f->drafts++;
  for (uint32_t t = pass->position > FAKE_DRAFT_WINDOW ? pass->position - FAKE_DRAFT_WINDOW : 0;
       t < pass->position; t++) {
    float k[FAKE_DIM];
    fake_key(f, pass->kv, 0, t, k);
    states[seen++] = (uint32_t)k[0];
  }
  int32_t token = pass->anchor;
  for (uint32_t j = 0; j + 1 < pass->block; j++) {
    float *row = pass->logits + j * N;
    states[seen] = fake_fold(seen ? states[seen - 1] : 3, token, pass->position + j);
    uint32_t hash = 17, window = seen + 1 < FAKE_WINDOW ? seen + 1 : FAKE_WINDOW;
    for (uint32_t t = seen + 1 - window; t <= seen; t++) hash = fake_mix(hash, states[t]);
    seen++;
    bool wrong = (fake_mix(hash, 0xb10c) & 255) < f->blunder;
    fake_row(f, wrong ? ~hash : hash, token, row);
    uint32_t best = 0;
    for (uint32_t i = 1; i < N; i++)
      if (row[i] > row[best]) best = i;
    token = (int32_t)best;
  }
  return US_OK;
}

static inline void fake_free(struct us_executor *ex) {
  (void)ex;
}

static inline void fake_init(struct fake *f, uint32_t vocab, uint32_t block) {
  static const struct us_executor_ops ops = {
      .forward = fake_forward, .draft_context = fake_draft_context, .draft = fake_draft, .free = fake_free};
  struct us_attention_shape attention = {.q_heads = 1, .kv_heads = 1, .qk_dim = FAKE_DIM, .v_dim = FAKE_DIM};
  memset(f, 0, sizeof *f);
  struct us_shape *shape = &f->model.shape;
  *shape = (struct us_shape){.layers = 2,
                             .hidden = FAKE_HIDDEN,
                             .vocab = vocab,
                             .full = attention,
                             .swa = attention,
                             .swa_layer = {0, 1},
                             .moe_layer = {0, 1},
                             .experts = FAKE_EXPERTS,
                             .top_k = FAKE_TOP_K,
                             .max_positions = 4096};
  shape->swa.window = FAKE_WINDOW;
  f->model.layers = f->layers;
  f->layers[1].experts = f->experts;
  struct us_matrix matrix = {.format = US_FORMAT_BF16, .rows = 64, .cols = 64};
  f->model.head = matrix;
  for (int e = 0; e < FAKE_EXPERTS; e++) f->experts[e] = (struct us_expert){matrix, matrix, matrix};
  f->draft.layers = &f->draft_layer;
  f->draft.shape = (struct us_draft_shape){.layers = 1,
                                           .hidden = FAKE_HIDDEN,
                                           .vocab = vocab,
                                           .attention = attention,
                                           .block = block,
                                           .taps = FAKE_TAPS,
                                           .target_layers = 2};
  f->draft.shape.attention.window = FAKE_DRAFT_WINDOW;
  f->blunder = 60;
  f->ex = (struct us_executor){
      .ops = &ops, .name = "fake", .model = &f->model, .draft = &f->draft, .rounding = US_ROUND_NONE};
}

#endif
