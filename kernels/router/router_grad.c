/* router_grad.c: expert choice over rows, and the gradient through the chosen scores. */
#include "kernels/router/router_grad.h"
#include "kernels/linear/linear_grad.h"

#include <math.h>

struct margin_task;

struct router_task {
  const struct us_router_rows *router;
  const float *bias, *dweight;
  const struct us_router_teacher *teacher;
  const struct margin_task *margin; /* NULL: none */
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

/* Half way from the least biased score that is chosen to the most that is not; ids ascend. */
static float middle_of(const struct us_router_rows *router, const float *score, const float *opt_bias,
                       const uint32_t *id) {
  float least = INFINITY, most = -INFINITY;
  uint32_t k = 0;
  for (uint32_t e = 0; e < router->E; e++) {
    float own = score[e] + (opt_bias ? opt_bias[e] : 0.0f);
    if (k < router->K && id[k] == e)
      least = fminf(least, own), k++;
    else
      most = fmaxf(most, own);
  }
  return 0.5f * (least + most);
}

/* The push of the hinge upwards along a logit: 1 - |tanh(d / 2)| / tanh(margin / 2), by the side it is on. */
static float pushed(float score, float t, float tanh_half, bool chosen) {
  if (!(t > 0.0f && t < 1.0f)) return 0.0f;
  float push = 1.0f - fabsf(score - t) / ((score + t - 2.0f * score * t) * tanh_half);
  return push > 0.0f ? (chosen ? push : -push) : 0.0f;
}

/* The margin around the choice of all rows. */
struct margin_task {
  const struct us_router_rows *router;
  const struct us_router_teacher *teacher;
  const float *scores;
  const uint32_t *id;
  float tanh_half;
  float *middle; /* (R) */
  float *mean;   /* (E) of an expert's pushes, each by the weight of its row */
};

static float row_weight(const struct us_router_teacher *teacher, size_t r) {
  return teacher->opt_weight ? teacher->opt_weight[r] : 1.0f;
}

static bool is_chosen(const uint32_t *id, uint32_t K, uint32_t e) {
  for (uint32_t k = 0; k < K; k++)
    if (id[k] == e) return true;
  return false;
}

static float push_of(const struct margin_task *m, size_t r, uint32_t e, bool chosen) {
  float t = m->middle[r] - (m->teacher->opt_bias ? m->teacher->opt_bias[e] : 0.0f);
  return pushed(m->scores[r * m->router->E + e], t, m->tanh_half, chosen);
}

static void middle_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct margin_task *m = arg;
  uint32_t E = m->router->E, K = m->router->K;
  for (size_t r = begin; r < end; r++)
    m->middle[r] = middle_of(m->router, m->scores + r * E, m->teacher->opt_bias, m->id + r * K);
}

static void mean_experts(void *arg, size_t begin, size_t end, int worker) {
  const struct margin_task *m = arg;
  uint32_t K = m->router->K;
  for (size_t e = begin; e < end; e++) {
    double sum = 0.0, weights = 0.0;
    for (size_t r = 0; r < m->router->R; r++) {
      double weight = (double)row_weight(m->teacher, r);
      sum += weight * (double)push_of(m, r, (uint32_t)e, is_chosen(m->id + r * K, K, (uint32_t)e));
      weights += weight;
    }
    m->mean[e] = weights > 0.0 ? (float)(sum / weights) : 0.0f;
  }
}

/* While all scores are there: those of a row are overwritten one by one, each after its push. */
static void prepare_margin(struct us_seq *seq, struct margin_task *m) {
  m->tanh_half = tanhf(0.5f * m->teacher->margin);
  m->middle = us_seq_scratch(seq, m->router->R + m->router->E);
  if (!m->middle) return;
  m->mean = m->middle + m->router->R;
  us_pool_for(seq->pool, m->router->R, 64, middle_rows, m);
  us_pool_for(seq->pool, m->router->E, 1, mean_experts, m);
}

/* d cross-entropy(theirs, sigmoid(logit)) / d logit = sigmoid(logit) - theirs, and the margin's push. */
static float taught(const struct router_task *t, size_t r, uint32_t e, float score, bool chosen) {
  const struct us_router_teacher *teacher = t->teacher;
  if (!teacher) return 0.0f;
  float theirs = teacher->opt_scores ? teacher->opt_scores[r * t->router->E + e] : teacher->target;
  float sum = teacher->scale * (score - theirs);
  if (t->margin) sum -= teacher->margin_scale * (push_of(t->margin, r, e, chosen) - t->margin->mean[e]);
  return row_weight(teacher, r) * sum;
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
    for (uint32_t e = 0, k = 0; e < E; e++) {
      float s = row[e];
      bool chosen = k < K && id[k] == e;
      row[e] = taught(t, r, e, s, chosen);
      if (!chosen) continue;
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
  struct margin_task margin = {.router = router, .teacher = opt_teacher, .scores = scores, .id = id};
  struct router_task t = {.router = router, .dweight = dweight, .teacher = opt_teacher, .scores = scores};
  t.id = (uint32_t *)id;
  if (opt_teacher && opt_teacher->margin_scale > 0.0f) {
    prepare_margin(seq, &margin);
    if (!margin.middle) return;
    t.margin = &margin;
  }
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
