/* embed_grad.c: embedding rows and their gradient, summed token by token in the order of the rows. */
#include "kernels/embed/embed_grad.h"

struct embed_task {
  const int32_t *token;
  size_t R, N, D;
  const float *table, *dx;
  float *out;
  uint32_t *first, *next; /* per token the first row (1-based) and per row the next of the same token */
};

static void gather_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct embed_task *t = arg;
  for (size_t r = begin; r < end; r++) {
    if (t->token[r] < 0)
      memset(t->out + r * t->D, 0, t->D * sizeof(float));
    else
      memcpy(t->out + r * t->D, t->table + (size_t)t->token[r] * t->D, t->D * sizeof(float));
  }
}

void us_embed_seq(struct us_seq *seq, const int32_t *token, size_t R, size_t D, const float *table,
                  float *x) {
  struct embed_task t = {.token = token, .R = R, .D = D, .table = table, .out = x};
  us_pool_for(seq->pool, R, US_SEQ_BLOCK, gather_rows, &t);
}

US_SEQ_CLONES static void add_tokens(void *arg, size_t begin, size_t end, int worker) {
  const struct embed_task *t = arg;
  for (size_t n = begin; n < end; n++)
    for (uint32_t r = t->first[n]; r; r = t->next[r - 1]) {
      const float *dx = t->dx + (size_t)(r - 1) * t->D;
      float *out = t->out + n * t->D;
      for (size_t k = 0; k < t->D; k++) out[k] += dx[k];
    }
}

void us_embed_grad(struct us_seq *seq, const int32_t *token, size_t R, size_t N, size_t D, const float *dx,
                   float *dtable) {
  struct embed_task t = {.token = token, .R = R, .N = N, .D = D, .dx = dx, .out = dtable};
  t.first = (uint32_t *)us_seq_scratch(seq, N + R);
  if (!t.first) return;
  t.next = t.first + N;
  memset(t.first, 0, N * sizeof *t.first);
  for (size_t r = R; r-- > 0;) { /* backwards, so that each list ascends */
    if (token[r] < 0) continue;
    t.next[r] = t.first[token[r]];
    t.first[token[r]] = (uint32_t)r + 1;
  }
  us_pool_for(seq->pool, N, 64, add_tokens, &t);
}
