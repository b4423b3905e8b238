/* train_lab.c: random text and weights, and how far gradients are apart. */
#include "train_lab.h"

#include "training/model_train_state.h"

#include <math.h>

uint32_t lab_word(struct lab_random *random) {
  random->state = random->state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(random->state >> 33);
}

float lab_normal(struct lab_random *random) {
  double sum = 0.0;
  for (int i = 0; i < 6; i++) sum += (double)lab_word(random) * 0x1p-31 - 0.5;
  return (float)(sum * 1.4142135623730951); /* six uniform numbers have a variance of 1/2 */
}

void lab_fill_rows(struct us_rows *rows, size_t R, size_t longest, uint32_t vocab, uint64_t seed) {
  struct lab_random random = {seed};
  rows->R = R;
  for (size_t i = 0; i < R; i++) rows->token[i] = (int32_t)(lab_word(&random) % vocab);
  for (size_t first = 0, n; first < R; first += n) {
    n = longest > 8 ? 8 + lab_word(&random) % (longest - 7) : longest;
    if (n > R - first) n = R - first;
    for (size_t i = first; i < first + n; i++) {
      bool last = i + 1 == first + n;
      rows->position[i] = (uint32_t)(i - first);
      rows->document[i] = (uint32_t)first;
      rows->label[i] = last ? 0 : rows->token[i + 1];
      rows->weight[i] = last ? 0.0f : 1.0f;
    }
  }
}

void lab_stir_vectors(struct us_params *params, uint64_t seed) {
  struct lab_random random = {seed};
  for (size_t i = 0; i < params->count; i++) {
    struct us_param *p = &params->items[i];
    if (!p->vector || strcmp(p->name, "mask_embedding") == 0) continue;
    bool sink = strstr(p->name, "sink") != NULL, bias = p->group == US_PARAM_BIAS;
    for (size_t k = 0; k < p->rows * p->cols; k++)
      p->value[k] += lab_normal(&random) * (sink ? 0.5f : bias ? 0x1p-4f : 0x1p-3f);
  }
}

static void *fetch(struct us_cuda *cuda, const void *device, size_t bytes) {
  struct us_err err = {0};
  void *host = take(bytes, 1);
  us_cuda_download(cuda, host, device, bytes);
  need(us_cuda_sync(cuda, &err), &err, "download");
  return host;
}

float *lab_fetch(struct us_cuda *cuda, const float *device, size_t n) {
  return fetch(cuda, device, n * sizeof *device);
}

float *lab_fetch_bf16(struct us_cuda *cuda, const uint16_t *device, size_t n) {
  uint16_t *codes = fetch(cuda, device, n * sizeof *codes);
  float *values = take(n, sizeof *values);
  us_bf16_decode(codes, n, values);
  free(codes);
  return values;
}

double lab_distance(const float *a, const float *b, size_t n) {
  double difference = 0.0, size = 0.0;
  for (size_t i = 0; i < n; i++) {
    double d = (double)a[i] - (double)b[i];
    difference += d * d;
    size += (double)b[i] * (double)b[i];
  }
  if (difference == 0.0) return 0.0;
  return isfinite(difference) && size > 0.0 ? sqrt(difference / size) : (double)INFINITY;
}

static bool has_gradient(const struct us_param *p) {
  return us_param_grad(p) && p->group != US_PARAM_BIAS;
}

struct lab_noise lab_noise_of(const struct us_params *params, const float *other) {
  struct lab_noise noise = {.tensor = take(params->count, sizeof *noise.tensor)};
  double sum = 0.0, n = 0.0;
  for (size_t i = 0; i < params->count; i++) {
    const struct us_param *p = &params->items[i];
    if (!has_gradient(p)) continue;
    noise.tensor[i] = lab_distance(other + p->offset, p->grad, p->rows * p->cols);
    sum += noise.tensor[i] * noise.tensor[i];
    n += 1.0;
  }
  noise.mean = sqrt(sum / n);
  return noise;
}

struct lab_difference lab_compare(const struct us_params *params, const float *got,
                                  const struct lab_noise *noise, double factor) {
  struct lab_difference d = {.name = ""};
  for (size_t i = 0; i < params->count; i++) {
    const struct us_param *p = &params->items[i];
    if (!has_gradient(p)) continue;
    size_t n = p->rows * p->cols;
    double distance = lab_distance(got + p->offset, p->grad, n);
    double bound = factor * (1.5 + 3.0 / sqrt((double)n)) * fmax(noise->tensor[i], noise->mean);
    d.tensors++;
    d.beyond += !(distance <= bound);
    d.mean += distance * distance;
    if (distance <= bound * d.worst) continue;
    d.worst = distance / bound;
    d.name = p->name;
  }
  d.mean = sqrt(d.mean / (double)d.tensors) / noise->mean;
  return d;
}

float lab_margin(const struct us_model_train *train, size_t row) {
  float smallest = INFINITY;
  uint32_t E = train->shape.experts, K = train->shape.top_k;
  for (uint32_t l = 0; l < train->shape.layers; l++) {
    if (!train->shape.moe_layer[l]) continue;
    const float *scores = train->state->saved[l].scores + row * E;
    const float *bias = train->state->roles[l].router_bias->compute;
    const uint32_t *id = us_model_train_routed(train, l) + row * K;
    float lowest = INFINITY, best = -INFINITY;
    for (uint32_t e = 0, k = 0; e < E; e++) {
      float s = scores[e] + bias[e];
      bool chosen = k < K && id[k] == e;
      k += chosen;
      if (chosen && s < lowest) lowest = s;
      if (!chosen && s > best) best = s;
    }
    if (lowest - best < smallest) smallest = lowest - best;
  }
  return smallest;
}
