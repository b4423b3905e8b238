/* router_grad.c: expert choice over rows, and the gradient through the chosen scores. */
#include "kernels/router/router_grad.h"
#include "kernels/linear/linear_grad.h"

struct router_task {
  const struct us_router_rows *router;
  const float *bias, *dweight;
  const struct us_router_teacher *teacher;
  float *scores, *weight;
  uint32_t *id;
};

/* The K largest of scores + bias, ties to the lowest id: an expert is beaten by those strictly better and by equal ones
 * with a lower id, and is chosen if fewer than K beat it. Ids come out ascending. */
static void choose(const struct us_router_rows *router, const float *score, const float *bias, uint32_t *id) {
  uint32_t chosen = 0;
  for (uint32_t e = 0; e < router->E && chosen < router->K; e++) {
    float own = score[e] + (bias ? bias[e] : 0.0f);
    uint32_t better = 0;
    for (uint32_t j = 0; j < router->E; j++) {
      float other = score[j] + (bias ? bias[j] : 0.0f);
      better += other > own || (other == own && j < e);
    }
    if (better < router->K) id[chosen++] = e;
  }
  for (; chosen < router->K; chosen++) id[chosen] = chosen; /* only with NaN scores, which the step reports */
}

static void select_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct router_task *t = arg;
  uint32_t E = t->router->E, K = t->router->K;
  for (size_t r = begin; r < end; r++) {
    float *score = t->scores + r * E, *weight = t->weight + r * K;
    uint32_t *id = t->id + r * K;
    for (uint32_t e = 0; e < E; e++) score[e] = 1.0f / (1.0f + us_expf(-score[e]));
    if (t->router->opt_chosen)
      memcpy(id, t->router->opt_chosen + r * K, K * sizeof *id);
    else
      choose(t->router, score, t->bias, id);
    float sum = 0.0f;
    for (uint32_t k = 0; k < K; k++) sum += score[id[k]];
    for (uint32_t k = 0; k < K; k++) {
      float share = t->router->normalise ? score[id[k]] / (sum + 1e-20f) : score[id[k]];
      weight[k] = share * t->router->scaling;
    }
  }
}

void us_router_seq(struct us_seq *seq, const struct us_router_rows *router, const float *x, const float *w,
                   const float *bias, float *scores, uint32_t *id, float *weight) {
  us_linear_seq(seq, &(struct us_linear){.R = router->R, .N = router->E, .K = router->D}, x, w, scores);
  struct router_task t = {.router = router, .bias = bias, .scores = scores, .weight = weight, .id = id};
  us_pool_for(seq->pool, router->R, 64, select_rows, &t);
}

/* d cross-entropy(theirs, sigmoid(logit)) / d logit = sigmoid(logit) - theirs. */
static float taught(const struct us_router_teacher *opt_teacher, uint32_t E, size_t r, uint32_t e,
                    float score) {
  if (!opt_teacher) return 0.0f;
  float factor = opt_teacher->scale * (opt_teacher->opt_weight ? opt_teacher->opt_weight[r] : 1.0f);
  return factor *
         (score - (opt_teacher->opt_scores ? opt_teacher->opt_scores[r * E + e] : opt_teacher->target));
}

static void grad_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct router_task *t = arg;
  const struct us_router_rows *router = t->router;
  uint32_t E = router->E, K = router->K;
  for (size_t r = begin; r < end; r++) {
    float *row = t->scores + r * E, sum = 1e-20f, pull = 0.0f;
    const float *dweight = t->dweight + r * K;
    const uint32_t *id = t->id + r * K;
    for (uint32_t k = 0; k < K; k++) sum += row[id[k]];
    for (uint32_t k = 0; k < K; k++) pull += dweight[k] * row[id[k]] / sum;
    uint32_t k = 0;
    for (uint32_t e = 0; e < E; e++) {
      float s = row[e];
      row[e] = taught(t->teacher, E, r, e, s);
      if (k == K || id[k] != e) continue;
      float ds = router->normalise ? (dweight[k] - pull) / sum : dweight[k];
      row[e] += ds * router->scaling * s * (1.0f - s);
      k++;
    }
  }
}

/* Turns scores into the gradient of the logits: the scores are not needed afterwards. */
void us_router_grad(struct us_seq *seq, const struct us_router_rows *router, const float *x, const float *w,
                    float *scores, const uint32_t *id, const float *dweight,
                    const struct us_router_teacher *opt_teacher, float *dx, float *dw) {
  struct router_task t = {.router = router, .dweight = dweight, .teacher = opt_teacher, .scores = scores};
  t.id = (uint32_t *)id;
  us_pool_for(seq->pool, router->R, 64, grad_rows, &t);
  struct us_linear dims = {.R = router->R, .N = router->E, .K = router->D};
  us_linear_grad_x(seq, &dims, scores, w, 1.0f, dx);
  if (dw) us_linear_grad_w(seq, &dims, scores, x, dw);
}

void us_router_load(const uint32_t *id, size_t n, uint32_t E, uint64_t *load) {
  for (size_t i = 0; i < n; i++)
    if (id[i] < E) load[id[i]]++;
}

void us_router_balance(float *bias, const uint64_t *load, uint32_t E, float rate) {
  uint64_t total = 0;
  for (uint32_t e = 0; e < E; e++) total += load[e];
  for (uint32_t e = 0; e < E; e++) {
    uint64_t scaled = load[e] * E; /* compare load with total / E in integers */
    bias[e] += scaled < total ? rate : scaled > total ? -rate : 0.0f;
  }
}
