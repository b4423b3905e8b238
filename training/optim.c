/* optim.c: AdamW and Muon over all parameters.
 *
 * One task is one tensor block (AdamW) or one whole matrix (Muon): an element's update depends on nothing but its own
 * tensor, so threads cannot change a bit.
 */
#include "training/optim.h"

#include <stdlib.h>

/* --- defaults, clipping --- */

struct us_optim us_optim_default(enum us_optim_kind kind) {
  return (struct us_optim){.kind = kind,
                           .beta1 = 0.9,
                           .beta2 = 0.95,
                           .epsilon = 1e-8,
                           .adamw_decay = 0.1,
                           .momentum = 0.95,
                           .muon_decay = 0.1,
                           .muon_rate = 1.0,
                           .nesterov = true,
                           .newton = US_NEWTON_SCHULZ5};
}

double us_params_clip(struct us_params *params, struct us_pool *pool, double limit) {
  double norm = us_params_grad_norm(params, pool);
  if (limit > 0.0 && norm > limit) us_params_scale_grad(params, pool, (float)(limit / norm));
  return norm;
}

/* --- AdamW --- */

US_SEQ_CLONES static void adamw(float *value, const float *grad, float *m, float *v, size_t n,
                                const float c[7]) {
  float beta1 = c[0], beta2 = c[1], step = c[2], second = c[3], epsilon = c[4], keep = c[5];
  float rest1 = 1.0f - beta1, rest2 = c[6];
  for (size_t i = 0; i < n; i++) {
    float g = grad[i];
    m[i] = beta1 * m[i] + rest1 * g;
    v[i] = beta2 * v[i] + rest2 * g * g;
    value[i] = value[i] * keep - step * m[i] / (sqrtf(v[i] * second) + epsilon);
  }
}

void us_adamw_update(const struct us_optim *optim, double rate, double decay, float *value, const float *grad,
                     float *moment1, float *moment2, size_t n) {
  double step = (double)optim->step;
  float c[7] = {(float)optim->beta1,
                (float)optim->beta2,
                (float)(rate / (1.0 - pow(optim->beta1, step))),
                (float)(1.0 / (1.0 - pow(optim->beta2, step))),
                (float)optim->epsilon,
                (float)(1.0 - rate * decay),
                (float)(1.0 - optim->beta2)};
  adamw(value, grad, moment1, moment2, n, c);
}

/* --- the step --- */

#define ADAMW_BLOCK 65536

struct optim_task {
  const struct us_optim *optim;
  struct us_param *param;
  size_t begin, n; /* AdamW: values of the block */
  double cost;     /* Muon: the largest first, so that the last one to finish is small */
};

struct optim_run {
  const struct us_optim *optim;
  struct optim_task *tasks;
  double rate;
  float *scratch;
  size_t scratch_floats;
};

static bool uses_muon(const struct us_optim *optim, const struct us_param *p) {
  return optim->kind == US_OPTIM_MUON && p->group == US_PARAM_MUON;
}

static bool skipped(const struct us_param *p) {
  return p->frozen || p->group == US_PARAM_BIAS || !p->grad;
}

/* Rows of part `part` (q, k, v) of every chunk between the tensor and a contiguous copy. */
static void copy_part(const struct us_param *p, int part, float *tensor, float *packed, bool out) {
  const struct us_param_split *s = &p->split;
  size_t rows[3] = {s->q_rows, s->k_rows, s->v_rows}, before[3] = {0, s->q_rows, s->q_rows + s->k_rows};
  size_t chunk = (rows[0] + rows[1] + rows[2]) * p->cols, n = rows[part] * p->cols;
  for (uint32_t c = 0; c < s->chunks; c++) {
    float *at = tensor + c * chunk + before[part] * p->cols;
    if (out)
      memcpy(at, packed + c * n, n * sizeof *at);
    else
      memcpy(packed + c * n, at, n * sizeof *at);
  }
}

static void muon_tensor(const struct optim_run *run, struct us_param *p, float *scratch) {
  double rate = run->rate * run->optim->muon_rate * (double)p->rate_scale;
  double decay = p->decay ? run->optim->muon_decay : 0.0;
  if (!p->split.chunks) {
    us_muon_update(run->optim, rate, decay, p->value, p->grad, p->moment1, p->rows, p->cols, scratch);
    return;
  }
  const struct us_param_split *s = &p->split;
  size_t part_rows[3] = {s->q_rows, s->k_rows, s->v_rows};
  for (int part = 0; part < 3; part++) {
    size_t rows = part_rows[part] * s->chunks, n = rows * p->cols;
    float *value = scratch, *grad = value + n, *moment = grad + n;
    copy_part(p, part, p->value, value, false);
    copy_part(p, part, p->grad, grad, false);
    copy_part(p, part, p->moment1, moment, false);
    us_muon_update(run->optim, rate, decay, value, grad, moment, rows, p->cols, moment + n);
    copy_part(p, part, p->value, value, true);
    copy_part(p, part, p->moment1, moment, true);
  }
}

static size_t muon_scratch(const struct us_param *p) {
  size_t n = p->rows * p->cols;
  return (p->split.chunks ? 3 * n : 0) + n + us_newton_scratch(p->rows, p->cols) + 16;
}

static void step_tasks(void *arg, size_t begin, size_t end, int worker) {
  const struct optim_run *run = arg;
  for (size_t i = begin; i < end; i++) {
    const struct optim_task *t = &run->tasks[i];
    struct us_param *p = t->param;
    if (uses_muon(run->optim, p)) {
      muon_tensor(run, p, run->scratch + (size_t)worker * run->scratch_floats);
      continue;
    }
    us_adamw_update(run->optim, run->rate * (double)p->rate_scale, p->decay ? run->optim->adamw_decay : 0.0,
                    p->value + t->begin, p->grad + t->begin, p->moment1 + t->begin, p->moment2 + t->begin,
                    t->n);
  }
}

static int by_cost(const void *a, const void *b) {
  const struct optim_task *x = a, *y = b;
  if (x->cost != y->cost) return x->cost > y->cost ? -1 : 1;
  return 0;
}

static size_t list_tasks(const struct us_optim *optim, struct us_params *params, struct optim_task *tasks) {
  size_t count = 0;
  for (size_t i = 0; i < params->count; i++) {
    struct us_param *p = &params->items[i];
    size_t n = p->rows * p->cols, narrow = p->rows < p->cols ? p->rows : p->cols;
    if (skipped(p)) continue;
    if (uses_muon(optim, p)) {
      if (tasks) tasks[count] = (struct optim_task){.param = p, .cost = 20.0 * (double)n * (double)narrow};
      count++;
      continue;
    }
    for (size_t b = 0; b < n; b += ADAMW_BLOCK, count++) {
      size_t left = n - b < ADAMW_BLOCK ? n - b : ADAMW_BLOCK;
      if (tasks)
        tasks[count] = (struct optim_task){.param = p, .begin = b, .n = left, .cost = 10.0 * (double)left};
    }
  }
  return count;
}

void us_optim_step(const struct us_optim *optim, struct us_params *params, double rate, struct us_seq *seq) {
  struct optim_run run = {.optim = optim, .rate = rate};
  size_t count = list_tasks(optim, params, NULL);
  for (size_t i = 0; i < params->count; i++)
    if (uses_muon(optim, &params->items[i]) && !skipped(&params->items[i])) {
      size_t need = muon_scratch(&params->items[i]);
      if (need > run.scratch_floats) run.scratch_floats = need;
    }
  run.scratch_floats = (run.scratch_floats + 15) / 16 * 16;
  size_t task_floats = (count * sizeof *run.tasks / sizeof(float) + 16) / 16 * 16;
  float *memory = us_seq_scratch(seq, task_floats + run.scratch_floats * (size_t)us_pool_threads(seq->pool));
  if (!memory) return;
  run.tasks = (struct optim_task *)memory;
  run.scratch = memory + task_floats;
  list_tasks(optim, params, run.tasks);
  qsort(run.tasks, count, sizeof *run.tasks, by_cost);
  us_pool_for(seq->pool, count, 1, step_tasks, &run);
  us_params_hold(params, seq->pool, &optim->oscillation);
}
