/* train_decode.c: attention over kept keys against double, and draws against the host's.
 *
 * Bound of attention. With u = 2^-24 and A the largest scale * sum |q k| of a query's keys: a score is a sum of Q products in
 * at most 8 + 5 steps, of factors rounded twice, and the largest score is subtracted: it errs by 18 u A at most. The
 * exponential errs by 2^-22, one of the two groups of lanes or more shrinks what it has once for four of its keys, and five times at
 * the end: a weight errs relatively by e = 18 u A + (n / 8 + 6) (2^-22 + u), and sums over n / 2 + 6 terms of it by as many u. The
 * same errors are in the denominator, so that out errs by 2 (e + (n / 2 + 6) u) sum p |v|, and by 2^-8 of itself when it is rounded.
 */
#include "train_decode.h"

#include "kernels/attention_seq/attention_decode.h"
#include "kernels/sample/sample_train.h"

#include <math.h>

#define SLOTS 8

struct shape {
  const char *name;
  uint32_t H, G, Q, V, T;
  bool sink;
};

struct problem {
  struct shape s;
  uint32_t width;
  size_t qkv, k, v, out; /* values */
  uint16_t *host_qkv, *host_k, *host_v;
  uint32_t offset[512]; /* q, k, v */
  int32_t token[SLOTS];
  uint32_t position[SLOTS];
  float sink[256];
};

static void *send(struct us_cuda *cuda, const void *host, size_t bytes) {
  struct us_err err = {0};
  void *device;
  need(us_cuda_take(cuda, bytes, "test", &device, &err), &err, "device memory");
  us_cuda_upload(cuda, device, host, bytes);
  need(us_cuda_sync(cuda, &err), &err, "upload");
  return device;
}

static void fetch(struct us_cuda *cuda, void *host, const void *device, size_t bytes) {
  struct us_err err = {0};
  us_cuda_download(cuda, host, device, bytes);
  need(us_cuda_sync(cuda, &err), &err, "download");
}

static uint16_t *random_bf16(struct lab_random *random, size_t n, float size) {
  uint16_t *x = take(n, sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = us_bf16_from_f32(lab_normal(random) * size);
  return x;
}

static struct problem open_problem(const struct shape *s, struct lab_random *random) {
  static const uint32_t ends[SLOTS] = {0,  1,   5,   17,
                                       40, 100, 300, 1000}; /* positions, cut to what is kept twice */
  struct problem p = {.s = *s, .width = s->H * s->Q + s->G * (s->Q + s->V)};
  p.qkv = (size_t)SLOTS * p.width, p.out = (size_t)SLOTS * s->H * s->V;
  p.k = (size_t)SLOTS * s->G * s->T * s->Q, p.v = (size_t)SLOTS * s->G * s->T * s->V;
  p.host_qkv = random_bf16(random, p.qkv, 1.5f);
  p.host_k = random_bf16(random, p.k, 1.5f);
  p.host_v = random_bf16(random, p.v, 1.0f);
  for (uint32_t h = 0; h < s->H; h++) p.offset[h] = h * s->Q;
  for (uint32_t g = 0; g < s->G; g++) {
    p.offset[s->H + g] = s->H * s->Q + g * (s->Q + s->V);
    p.offset[s->H + s->G + g] = p.offset[s->H + g] + s->Q;
  }
  for (uint32_t i = 0; i < SLOTS; i++) {
    p.position[i] = ends[i] < 3 * s->T ? ends[i] : 3 * s->T - i;
    p.token[i] = i == 3 ? -1 : 7;
  }
  for (uint32_t h = 0; h < s->H; h++) p.sink[h] = lab_normal(random);
  return p;
}

/* Key (or value) j as slot sees it: its own from the row, the others as kept. */
static double kept(const struct problem *p, uint32_t slot, uint32_t g, uint32_t j, bool value, uint32_t d) {
  uint32_t dim = value ? p->s.V : p->s.Q, own = p->position[slot] % p->s.T;
  const uint16_t *row = p->host_qkv + (size_t)slot * p->width + p->offset[p->s.H + (value ? p->s.G : 0) + g];
  const uint16_t *cache = value ? p->host_v : p->host_k;
  return (double)us_bf16_to_f32(j == own ? row[d]
                                         : cache[(((size_t)slot * p->s.G + g) * p->s.T + j) * dim + d]);
}

/* out of a query head, and how far a right answer may be from it. */
static void reference(const struct problem *p, uint32_t slot, uint32_t head, double *out, double *bound) {
  uint32_t g = head / (p->s.H / p->s.G), n = p->position[slot] + 1 < p->s.T ? p->position[slot] + 1 : p->s.T;
  double scale = 1.0 / sqrt((double)p->s.Q), A = 0.0, sum = 0.0, u = 0x1p-24, *score = take(n, sizeof *score);
  double max = p->s.sink ? (double)p->sink[head] : (double)-INFINITY;
  for (uint32_t j = 0; j < n; j++) {
    double size = 0.0;
    for (uint32_t d = 0; d < p->s.Q; d++) {
      double term = (double)us_bf16_to_f32(p->host_qkv[(size_t)slot * p->width + p->offset[head] + d]) *
                    kept(p, slot, g, j, false, d);
      score[j] += scale * term, size += scale * fabs(term);
    }
    A = fmax(A, size), max = fmax(max, score[j]);
  }
  if (p->s.sink) sum = exp((double)p->sink[head] - max);
  for (uint32_t j = 0; j < n; j++) sum += score[j] = exp(score[j] - max);
  double e = 18.0 * u * A + (n / 8.0 + 6.0) * (0x1p-22 + u) + (n / 2.0 + 6.0) * u;
  for (uint32_t d = 0; d < p->s.V; d++) {
    double size = 0.0;
    out[d] = 0.0;
    for (uint32_t j = 0; j < n; j++) {
      double term = score[j] / sum * kept(p, slot, g, j, true, d);
      out[d] += term, size += fabs(term);
    }
    bound[d] = 2.0 * e * size + 0x1p-8 * fabs(out[d]) + 0x1p-134;
  }
  free(score);
}

/* Exactly the row's key or value is new in a cache, and only where there is a sequence. */
static size_t count_wrong(const struct problem *p, const uint16_t *got, bool value) {
  uint32_t dim = value ? p->s.V : p->s.Q;
  const uint16_t *before = value ? p->host_v : p->host_k;
  size_t wrong = 0;
  for (uint32_t slot = 0; slot < SLOTS; slot++)
    for (uint32_t g = 0; g < p->s.G; g++)
      for (uint32_t j = 0; j < p->s.T; j++)
        for (uint32_t d = 0; d < dim; d++) {
          size_t at = (((size_t)slot * p->s.G + g) * p->s.T + j) * dim + d;
          bool own = p->token[slot] >= 0 && j == p->position[slot] % p->s.T;
          uint16_t expected = own ? us_bf16_from_f32((float)kept(p, slot, g, j, value, d)) : before[at];
          wrong += got[at] != expected;
        }
  return wrong;
}

static void compare(const struct problem *p, const uint16_t *out, const uint16_t *k, const uint16_t *v) {
  double expected[256], bound[256], worst = 0.0;
  char note[64];
  size_t bad = 0;
  for (uint32_t slot = 0; slot < SLOTS; slot++)
    for (uint32_t h = 0; h < p->s.H; h++) {
      const uint16_t *row = out + ((size_t)slot * p->s.H + h) * p->s.V;
      reference(p, slot, h, expected, bound);
      for (uint32_t d = 0; d < p->s.V; d++) {
        double distance = fabs((double)us_bf16_to_f32(row[d]) - expected[d]);
        if (p->token[slot] < 0) {
          bad += row[d] != 0;
          continue;
        }
        bad += !(distance <= bound[d]);
        worst = fmax(worst, distance / bound[d]);
      }
    }
  snprintf(note, sizeof note, "worst %.3f of the bound", worst);
  record(p->s.name, "attention over kept keys", p->out, bad, note);
  record(p->s.name, "the row's key and value are kept, nothing else", p->k + p->v,
         count_wrong(p, k, false) + count_wrong(p, v, true), "");
}

static void run_problem(struct us_cuda *cuda, const struct problem *p) {
  const struct shape *s = &p->s;
  uint16_t *qkv = send(cuda, p->host_qkv, p->qkv * 2), *k = send(cuda, p->host_k, p->k * 2),
           *v = send(cuda, p->host_v, p->v * 2), *got = take(p->out + p->k + p->v, 2);
  uint16_t *out = send(cuda, got, p->out * 2), *got_k = got + p->out, *got_v = got_k + p->k;
  uint32_t *offset = send(cuda, p->offset, sizeof p->offset);
  uint32_t *position = send(cuda, p->position, sizeof p->position);
  int32_t *token = send(cuda, p->token, sizeof p->token);
  float *sink = send(cuda, p->sink, sizeof p->sink);
  struct us_attention_decode a = {.slots = SLOTS,
                                  .q_heads = s->H,
                                  .kv_heads = s->G,
                                  .qk_dim = s->Q,
                                  .v_dim = s->V,
                                  .q = qkv,
                                  .k = qkv,
                                  .v = qkv,
                                  .stride = p->width,
                                  .q_offset = offset,
                                  .k_offset = offset + s->H,
                                  .v_offset = offset + s->H + s->G,
                                  .token = token,
                                  .position = position,
                                  .k_cache = k,
                                  .v_cache = v,
                                  .capacity = s->T,
                                  .scale = (float)(1.0 / sqrt((double)s->Q)),
                                  .opt_sink = s->sink ? sink : NULL,
                                  .out = out};
  us_cuda_did(cuda, us_attention_decode(&a, cuda->stream), "attention over kept keys");
  fetch(cuda, got, out, p->out * 2);
  fetch(cuda, got_k, k, p->k * 2);
  fetch(cuda, got_v, v, p->v * 2);
  compare(p, got, got_k, got_v);
  void *device[] = {qkv, k, v, out, offset, position, token, sink};
  for (size_t i = 0; i < sizeof device / sizeof device[0]; i++) us_cuda_give(device[i]);
  free(got);
}

void check_attention_decode(struct us_cuda *cuda) {
  static const struct shape shapes[] = {
      {"nano, window", 8, 4, 64, 64, 128, true}, {"nano, all", 8, 4, 64, 64, 400, false},
      {"pico", 4, 2, 48, 32, 64, true},          {"tiny", 8, 2, 32, 16, 200, false},
      {"one head", 3, 3, 16, 16, 16, true},      {"mimo", 64, 4, 192, 128, 130, true},
      {"wide values", 6, 2, 64, 128, 100, false}};
  struct lab_random random = {99};
  for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
    struct problem p = open_problem(&shapes[i], &random);
    run_problem(cuda, &p);
    free(p.host_qkv);
    free(p.host_k);
    free(p.host_v);
  }
}

/* --- draws --- */

enum { DRAWS = 96, VOCAB = 1000, STRIDE = 1004 };

/* Logits as models give them; every third row on a coarse grid, so that many are equal; some rows broken. */
static float *random_logits(struct lab_random *random) {
  float *x = take((size_t)DRAWS * STRIDE, sizeof *x);
  for (size_t r = 0; r < DRAWS; r++)
    for (size_t i = 0; i < STRIDE; i++) {
      float value = lab_normal(random) * 3.0f;
      x[r * STRIDE + i] = r % 3 == 0 ? roundf(value) : value;
    }
  for (size_t i = 0; i < STRIDE; i++) x[7 * STRIDE + i] = NAN;
  x[11 * STRIDE + 5] = INFINITY;
  x[13 * STRIDE + 5] = NAN;
  x[14 * STRIDE + 6] = -INFINITY;
  return x;
}

static int32_t expected_draw(const float *row, const struct us_sampling *s,
                             const struct us_sample_row *draw) {
  float max = row[us_sample_argmax(row, VOCAB)];
  if (!draw->wanted) return 4711;
  if (!(max > -INFINITY && max < INFINITY)) return -1;
  return us_sample_token(row, VOCAB, s, us_noise_target(draw->seed, draw->position, 0));
}

void check_draws(struct us_cuda *cuda) {
  static const struct us_sampling samplings[] = {
      {.temperature = 0.0f},
      {.temperature = 0.2f},
      {.temperature = 1.0f},
      {.temperature = 1.0f, .top_p = 0.9f},
      {.temperature = 0.7f, .top_k = 40},
      {.temperature = 1.5f, .min_p = 0.05f},
      {.temperature = 2.0f, .top_k = 300, .top_p = 0.5f, .min_p = 0.01f}};
  struct lab_random random = {5};
  float *host = random_logits(&random);
  float *logits = send(cuda, host, sizeof *host * DRAWS * STRIDE);
  struct us_sample_row draw[DRAWS];
  int32_t got[DRAWS];
  size_t bad = 0, checked = 0;
  for (uint32_t r = 0; r < DRAWS; r++)
    draw[r] = (struct us_sample_row){0x123456789abcu * r, 17 * r, r % 10 != 9};
  struct us_sample_row *row = send(cuda, draw, sizeof draw);
  for (size_t i = 0; i < sizeof samplings / sizeof samplings[0]; i++) {
    for (size_t r = 0; r < DRAWS; r++) got[r] = 4711;
    int32_t *token = send(cuda, got, sizeof got);
    struct us_sample_train s = {.R = DRAWS,
                                .N = VOCAB,
                                .logits = logits,
                                .stride = STRIDE,
                                .row = row,
                                .sampling = samplings[i],
                                .token = token};
    us_cuda_did(cuda, us_sample_train(&s, cuda->stream), "draws");
    fetch(cuda, got, token, sizeof got);
    for (size_t r = 0; r < DRAWS; r++, checked++)
      bad += got[r] != expected_draw(host + r * STRIDE, &samplings[i], &draw[r]);
    us_cuda_give(token);
  }
  record("draws", "the host's tokens, with and without filters", checked, bad, "");
  us_cuda_give(logits);
  us_cuda_give(row);
  free(host);
}
