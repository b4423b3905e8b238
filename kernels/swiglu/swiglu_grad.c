/* swiglu_grad.c: silu(gate) * up over rows and its gradient. */
#include "kernels/swiglu/swiglu_grad.h"

struct swiglu_task {
  const struct us_seq *seq;
  size_t F;
  const float *gate_up, *da;
  float *out;
};

US_SEQ_CLONES static void swiglu_rows(size_t R, size_t F, const float *gate_up, float *a, bool round) {
  for (size_t r = 0; r < R; r++) {
    const float *g = gate_up + r * 2 * F, *u = g + F;
    float *y = a + r * F;
    for (size_t i = 0; i < F; i++) y[i] = g[i] / (1.0f + us_expf(-g[i])) * u[i];
    if (round)
      for (size_t i = 0; i < F; i++) y[i] = us_bf16_round(y[i]);
  }
}

void us_swiglu_rows(const struct us_seq *seq, size_t R, size_t F, const float *gate_up, float *a) {
  swiglu_rows(R, F, gate_up, a, seq->rounding == US_SEQ_ROUND_BF16);
}

US_SEQ_CLONES void us_swiglu_grad_rows(size_t R, size_t F, const float *gate_up, const float *da,
                                       float *d_gate_up) {
  for (size_t r = 0; r < R; r++) {
    const float *g = gate_up + r * 2 * F, *u = g + F, *d = da + r * F;
    float *dg = d_gate_up + r * 2 * F, *du = dg + F;
    for (size_t i = 0; i < F; i++) {
      float s = 1.0f / (1.0f + us_expf(-g[i])), gate = g[i], up = u[i];
      dg[i] = d[i] * up * s * (1.0f + gate * (1.0f - s));
      du[i] = d[i] * gate * s;
    }
  }
}

static void forward_block(void *arg, size_t begin, size_t end, int worker) {
  const struct swiglu_task *t = arg;
  us_swiglu_rows(t->seq, end - begin, t->F, t->gate_up + begin * 2 * t->F, t->out + begin * t->F);
}

void us_swiglu_seq(struct us_seq *seq, size_t R, size_t F, const float *gate_up, float *a) {
  struct swiglu_task t = {.seq = seq, .F = F, .gate_up = gate_up, .out = a};
  us_pool_for(seq->pool, R, 64, forward_block, &t);
}

static void grad_block(void *arg, size_t begin, size_t end, int worker) {
  const struct swiglu_task *t = arg;
  us_swiglu_grad_rows(end - begin, t->F, t->gate_up + begin * 2 * t->F, t->da + begin * t->F,
                      t->out + begin * 2 * t->F);
}

void us_swiglu_grad(struct us_seq *seq, size_t R, size_t F, const float *gate_up, const float *da,
                    float *d_gate_up) {
  struct swiglu_task t = {.F = F, .gate_up = gate_up, .da = da, .out = d_gate_up};
  us_pool_for(seq->pool, R, 64, grad_block, &t);
}
