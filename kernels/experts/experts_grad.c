/* experts_grad.c: grouped expert products over the slots of a plan; one task is one expert's block of slots.
 *
 * Contents: plan; forward; gradient of the inputs; gradient of the weights.
 */
#include "kernels/experts/experts_grad.h"
#include "kernels/swiglu/swiglu_grad.h"

struct experts_task {
  struct us_seq *seq;
  const struct us_experts_rows *ex;
  const struct us_experts_plan *plan;
  const struct us_experts_saved *saved;
  const struct us_experts_grads *grads;
  const float *x, *weight, *dy;
  float *out;                        /* forward: y (R, D); gradient: dx */
  float *slot_rows;                  /* (R * K, D) scratch: expert outputs, or dy and then dx by slot */
  float *da, *dweight, *slot_weight; /* (R * K, F), (R, K), (R * K) */
};

/* --- plan --- */

void us_experts_sort(const struct us_experts_rows *ex, const uint32_t *id, struct us_experts_plan *plan) {
  size_t slots = ex->R * ex->K;
  memset(plan->start, 0, (ex->E + 1) * sizeof *plan->start);
  for (size_t i = 0; i < slots; i++) plan->start[id[i] + 1]++;
  for (uint32_t e = 0; e < ex->E; e++) plan->start[e + 1] += plan->start[e];
  for (size_t i = 0; i < slots; i++) { /* start[e] runs to the end of e, and is moved back below */
    uint32_t slot = plan->start[id[i]]++;
    plan->row[slot] = (uint32_t)(i / ex->K);
    plan->slot[i] = slot;
  }
  for (uint32_t e = ex->E; e > 0; e--) plan->start[e] = plan->start[e - 1];
  plan->start[0] = 0;
}

/* Run body on each (expert, block of at most US_SEQ_BLOCK slots): the cut depends on the plan alone. */
struct slot_block {
  uint32_t expert, begin, rows;
};

static bool find_block(const struct us_experts_plan *plan, uint32_t E, size_t index,
                       struct slot_block *ret_block) {
  for (uint32_t e = 0; e < E; e++) {
    size_t rows = plan->start[e + 1] - plan->start[e], blocks = us_seq_blocks(rows, US_SEQ_BLOCK);
    if (index < blocks) {
      size_t first = index * US_SEQ_BLOCK, left = rows - first;
      *ret_block = (struct slot_block){.expert = e,
                                       .begin = plan->start[e] + (uint32_t)first,
                                       .rows = (uint32_t)(left < US_SEQ_BLOCK ? left : US_SEQ_BLOCK)};
      return true;
    }
    index -= blocks;
  }
  return false;
}

static size_t count_blocks(const struct us_experts_plan *plan, uint32_t E) {
  size_t blocks = 0;
  for (uint32_t e = 0; e < E; e++) blocks += us_seq_blocks(plan->start[e + 1] - plan->start[e], US_SEQ_BLOCK);
  return blocks;
}

/* --- forward --- */

static void forward_blocks(void *arg, size_t begin, size_t end, int worker) {
  const struct experts_task *t = arg;
  size_t D = t->ex->D, F = t->ex->F;
  for (size_t b = begin; b < end; b++) {
    struct slot_block s;
    if (!find_block(t->plan, t->ex->E, b, &s)) return;
    float *x = t->saved->x + s.begin * D, *h = t->saved->gate_up + s.begin * 2 * F,
          *a = t->saved->a + s.begin * F;
    for (uint32_t i = 0; i < s.rows; i++)
      memcpy(x + i * D, t->x + t->plan->row[s.begin + i] * D, D * sizeof *x);
    us_seq_gemm(false, true, s.rows, 2 * F, D, 1.0f, x, D, t->ex->gate_up[s.expert], D, 0.0f, h, 2 * F);
    us_swiglu_rows(t->seq, s.rows, F, h, a);
    us_seq_gemm(false, true, s.rows, D, F, 1.0f, a, F, t->ex->down[s.expert], F, 0.0f,
                t->slot_rows + s.begin * D, D);
  }
}

US_SEQ_CLONES static void combine_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct experts_task *t = arg;
  size_t D = t->ex->D, K = t->ex->K;
  for (size_t r = begin; r < end; r++) {
    float *y = t->out + r * D;
    for (size_t k = 0; k < K; k++) {
      const float *part = t->slot_rows + t->plan->slot[r * K + k] * D;
      float w = t->weight ? t->weight[r * K + k] : 1.0f;
      if (k == 0)
        for (size_t i = 0; i < D; i++) y[i] = w * part[i];
      else
        for (size_t i = 0; i < D; i++) y[i] += w * part[i];
    }
  }
}

void us_experts_seq(struct us_seq *seq, const struct us_experts_rows *ex, const struct us_experts_plan *plan,
                    const float *x, const float *weight, struct us_experts_saved *saved, float *y) {
  struct experts_task t = {
      .seq = seq, .ex = ex, .plan = plan, .saved = saved, .x = x, .weight = weight, .out = y};
  t.slot_rows = us_seq_scratch(seq, ex->R * ex->K * ex->D);
  if (!t.slot_rows) return;
  us_pool_for(seq->pool, count_blocks(plan, ex->E), 1, forward_blocks, &t);
  us_pool_for(seq->pool, ex->R, 64, combine_rows, &t);
}

/* --- gradient of the inputs --- */

/* With u = dy of the slot's row, unweighted: d(weight) = u . (down a) = a . (down^T u), so the expert's output need not
 * be kept; then da = weight * down^T u. The saved a is multiplied by the weight, for the gradient of down. */
US_SEQ_CLONES static void weigh_slots(const struct experts_task *t, const struct slot_block *s) {
  size_t F = t->ex->F;
  for (uint32_t i = s->begin; i < s->begin + s->rows; i++) {
    float *a = t->saved->a + i * F, *da = t->da + i * F, lane[US_SEQ_LANES] = {0}, w = t->slot_weight[i];
    size_t k = 0;
    for (; k + US_SEQ_LANES <= F; k += US_SEQ_LANES)
      for (int l = 0; l < US_SEQ_LANES; l++) lane[l] += a[k + l] * da[k + l];
    for (int l = 0; k < F; k++, l++) lane[l] += a[k] * da[k];
    for (k = 0; k < F; k++) da[k] *= w;
    for (k = 0; k < F; k++) a[k] *= w;
    t->slot_weight[i] = us_seq_sum_lanes(lane);
  }
}

static void grad_blocks(void *arg, size_t begin, size_t end, int worker) {
  const struct experts_task *t = arg;
  size_t D = t->ex->D, F = t->ex->F;
  for (size_t b = begin; b < end; b++) {
    struct slot_block s;
    if (!find_block(t->plan, t->ex->E, b, &s)) return;
    float *dy = t->slot_rows + s.begin * D, *da = t->da + s.begin * F,
          *h = t->saved->gate_up + s.begin * 2 * F;
    for (uint32_t i = 0; i < s.rows; i++)
      memcpy(dy + i * D, t->dy + t->plan->row[s.begin + i] * D, D * sizeof *dy);
    us_seq_gemm(false, false, s.rows, F, D, 1.0f, dy, D, t->ex->down[s.expert], F, 0.0f, da, F);
    weigh_slots(t, &s);
    us_swiglu_grad_rows(s.rows, F, h, da, h);
  }
}

static void grad_x_blocks(void *arg, size_t begin, size_t end, int worker) {
  const struct experts_task *t = arg;
  size_t D = t->ex->D, F = t->ex->F;
  for (size_t b = begin; b < end; b++) {
    struct slot_block s;
    if (!find_block(t->plan, t->ex->E, b, &s)) return;
    us_seq_gemm(false, false, s.rows, D, 2 * F, 1.0f, t->saved->gate_up + s.begin * 2 * F, 2 * F,
                t->ex->gate_up[s.expert], D, 0.0f, t->slot_rows + s.begin * D, D);
  }
}

/* --- gradient of the weights --- */

/* Two tasks an expert: gate_up and down, each summed over all its slots at once. */
static void grad_w_experts(void *arg, size_t begin, size_t end, int worker) {
  const struct experts_task *t = arg;
  size_t D = t->ex->D, F = t->ex->F;
  for (size_t i = begin; i < end; i++) {
    uint32_t e = (uint32_t)(i / 2), first = t->plan->start[e], rows = t->plan->start[e + 1] - first;
    if (!rows) continue;
    if (i % 2 == 0)
      us_seq_gemm(true, false, 2 * F, D, rows, 1.0f, t->saved->gate_up + first * 2 * F, 2 * F,
                  t->saved->x + first * D, D, 1.0f, t->grads->gate_up[e], D);
    else
      us_seq_gemm(true, false, D, F, rows, 1.0f, t->slot_rows + first * D, D, t->saved->a + first * F, F,
                  1.0f, t->grads->down[e], F);
  }
}

void us_experts_grad(struct us_seq *seq, const struct us_experts_rows *ex, const struct us_experts_plan *plan,
                     const float *weight, struct us_experts_saved *saved, const float *dy, float *dx,
                     float *dweight, const struct us_experts_grads *opt_grads) {
  size_t slots = ex->R * ex->K;
  struct experts_task t = {
      .seq = seq, .ex = ex, .plan = plan, .saved = saved, .grads = opt_grads, .dy = dy, .out = dx};
  t.slot_rows = us_seq_scratch(seq, slots * (ex->D + ex->F + 1));
  if (!t.slot_rows) return;
  t.da = t.slot_rows + slots * ex->D;
  t.slot_weight = t.da + slots * ex->F;
  for (size_t i = 0; i < slots; i++) t.slot_weight[plan->slot[i]] = weight[i];
  size_t blocks = count_blocks(plan, ex->E);
  us_pool_for(seq->pool, blocks, 1, grad_blocks, &t);
  for (size_t i = 0; i < slots; i++) dweight[i] = t.slot_weight[plan->slot[i]];
  if (opt_grads) us_pool_for(seq->pool, 2 * (size_t)ex->E, 1, grad_w_experts, &t);
  us_pool_for(seq->pool, blocks, 1, grad_x_blocks, &t);
  us_pool_for(seq->pool, ex->R, 64, combine_rows, &t);
}
