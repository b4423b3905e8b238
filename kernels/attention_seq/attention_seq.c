/* attention_seq.c: attention over key ranges, by tiles of queries against the union of what they see.
 *
 * Contents: tiles; scores; forward; gradient.
 *
 * A tile is US_ATTENTION_TILE consecutive queries; its columns are the union of their context ranges, then the union of
 * their block ranges. One sgemm gives the scores of a head, a masked pass the probabilities, one sgemm the output. Causal
 * rows waste on average half a tile of columns. Whole rows of scores are held, so no running rescale is needed.
 */
#include "kernels/attention_seq/attention_seq.h"

/* --- tiles --- */

struct span {
  uint32_t begin, end; /* key rows; context first, then block */
  uint32_t column;     /* of begin */
};

struct tile {
  size_t first, rows;
  struct span span[2];
  uint32_t columns;
};

struct attention_task {
  const struct us_attention_seq *a;
  const struct us_attention_seq_grads *grads;
  bool round;
  float *scratch;
  size_t scratch_floats; /* a worker */
  uint32_t *segment;     /* (segments + 1) first query of each; gradient only */
  size_t segments;
  double *dsink; /* (segments, H) */
};

static void widen(struct span *span, uint32_t begin, uint32_t end) {
  if (begin >= end) return;
  if (span->begin >= span->end) {
    span->begin = begin, span->end = end;
    return;
  }
  if (begin < span->begin) span->begin = begin;
  if (end > span->end) span->end = end;
}

static struct tile make_tile(const struct us_attention_seq *a, size_t first, size_t end) {
  struct tile t = {.first = first, .rows = end - first < US_ATTENTION_TILE ? end - first : US_ATTENTION_TILE};
  for (size_t i = first; i < first + t.rows; i++) {
    widen(&t.span[0], a->context_begin[i], a->context_end[i]);
    if (a->block_begin) widen(&t.span[1], a->block_begin[i], a->block_end[i]);
  }
  t.span[1].column = t.span[0].end - t.span[0].begin;
  t.columns = t.span[1].column + t.span[1].end - t.span[1].begin;
  return t;
}

/* Columns that query i sees: context in range[0], block in range[1]. */
static inline void visible(const struct us_attention_seq *a, const struct tile *t, size_t i,
                           uint32_t range[2][2]) {
  const uint32_t *begin[2] = {a->context_begin, a->block_begin}, *end[2] = {a->context_end, a->block_end};
  for (int s = 0; s < 2; s++) {
    range[s][0] = range[s][1] = t->span[s].column;
    if (!begin[s] || begin[s][i] >= end[s][i]) continue;
    range[s][0] += begin[s][i] - t->span[s].begin;
    range[s][1] += end[s][i] - t->span[s].begin;
  }
}

static uint32_t widest_tile(const struct us_attention_seq *a, size_t first, size_t end) {
  uint32_t columns = 0;
  for (size_t i = first; i < end; i += US_ATTENTION_TILE) {
    struct tile t = make_tile(a, i, end);
    if (t.columns > columns) columns = t.columns;
  }
  return columns;
}

/* --- scores --- */

/* out (rows, columns) = rows of `left` (tile) against the head's `keys` over the tile's spans. */
static void tile_times_keys(const struct tile *t, const float *left, size_t left_stride, const float *keys,
                            size_t key_stride, size_t width, float alpha, float *out) {
  for (int s = 0; s < 2; s++) {
    uint32_t n = t->span[s].end - t->span[s].begin;
    if (n)
      us_seq_gemm(false, true, t->rows, n, width, alpha, left, left_stride,
                  keys + t->span[s].begin * key_stride, key_stride, 0.0f, out + t->span[s].column,
                  t->columns);
  }
}

/* out (rows, width) = p (rows, columns) times the head's rows over the tile's spans. */
static void tile_times_rows(const struct tile *t, const float *p, const float *rows, size_t row_stride,
                            size_t width, float *out, size_t out_stride) {
  float beta = 0.0f;
  for (int s = 0; s < 2; s++) {
    uint32_t n = t->span[s].end - t->span[s].begin;
    if (!n) continue;
    us_seq_gemm(false, false, t->rows, width, n, 1.0f, p + t->span[s].column, t->columns,
                rows + t->span[s].begin * row_stride, row_stride, beta, out, out_stride);
    beta = 1.0f;
  }
  if (beta == 0.0f)
    for (size_t i = 0; i < t->rows; i++) memset(out + i * out_stride, 0, width * sizeof *out);
}

/* grad rows += p^T (columns, rows) times tile rows. */
static void add_to_rows(const struct tile *t, const float *p, const float *left, size_t left_stride,
                        size_t width, float *grad, size_t grad_stride) {
  for (int s = 0; s < 2; s++) {
    uint32_t n = t->span[s].end - t->span[s].begin;
    if (n)
      us_seq_gemm(true, false, n, width, t->rows, 1.0f, p + t->span[s].column, t->columns, left, left_stride,
                  1.0f, grad + t->span[s].begin * grad_stride, grad_stride);
  }
}

static inline float lane_max(const float *x, size_t n, float start) {
  float lane[US_SEQ_LANES];
  for (int l = 0; l < US_SEQ_LANES; l++) lane[l] = start;
  size_t i = 0;
  for (; i + US_SEQ_LANES <= n; i += US_SEQ_LANES)
    for (int l = 0; l < US_SEQ_LANES; l++) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  for (int l = 0; i < n; i++, l++) lane[l] = x[i] > lane[l] ? x[i] : lane[l];
  for (int l = 1; l < US_SEQ_LANES; l++) lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
  return lane[0];
}

static inline float lane_sum(const float *x, size_t n) {
  float lane[US_SEQ_LANES] = {0};
  size_t i = 0;
  for (; i + US_SEQ_LANES <= n; i += US_SEQ_LANES)
    for (int l = 0; l < US_SEQ_LANES; l++) lane[l] += x[i + l];
  for (int l = 0; i < n; i++, l++) lane[l] += x[i];
  return us_seq_sum_lanes(lane);
}

/* Scores become exp(score - m) inside [begin, end) of a row. */
static inline void exp_range(float *score, size_t n, float m) {
  for (size_t j = 0; j < n; j++) score[j] = us_expf(score[j] - m);
}

/* Zero the columns of a row outside its two visible ranges. */
static inline void mask_row(float *row, uint32_t columns, uint32_t range[2][2]) {
  memset(row, 0, range[0][0] * sizeof *row);
  memset(row + range[0][1], 0, (range[1][0] - range[0][1]) * sizeof *row);
  memset(row + range[1][1], 0, (columns - range[1][1]) * sizeof *row);
}

/* --- forward --- */

/* Scores of one head's tile become unnormalised weights; max and sum are written. */
US_SEQ_CLONES static void weigh_tile(const struct attention_task *task, const struct tile *t, uint32_t h,
                                     float *p) {
  const struct us_attention_seq *a = task->a;
  for (size_t i = 0; i < t->rows; i++) {
    uint32_t range[2][2];
    visible(a, t, t->first + i, range);
    float *row = p + i * t->columns, m = a->sink ? a->sink[h] : -INFINITY, sum = 0.0f;
    for (int s = 0; s < 2; s++) m = lane_max(row + range[s][0], range[s][1] - range[s][0], m);
    if (m == -INFINITY) m = 0.0f; /* sees nothing */
    mask_row(row, t->columns, range);
    for (int s = 0; s < 2; s++) {
      exp_range(row + range[s][0], range[s][1] - range[s][0], m);
      sum += lane_sum(row + range[s][0], range[s][1] - range[s][0]);
    }
    if (a->sink) sum += us_expf(a->sink[h] - m);
    a->max[(t->first + i) * a->q_heads + h] = m;
    a->sum[(t->first + i) * a->q_heads + h] = sum;
  }
}

US_SEQ_CLONES static void finish_tile(const struct attention_task *task, const struct tile *t, uint32_t h) {
  const struct us_attention_seq *a = task->a;
  for (size_t i = t->first; i < t->first + t->rows; i++) {
    float *out = a->out + (i * a->q_heads + h) * a->v_dim, sum = a->sum[i * a->q_heads + h];
    float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    if (task->round)
      for (uint32_t d = 0; d < a->v_dim; d++) out[d] = us_bf16_round(out[d] * inverse);
    else
      for (uint32_t d = 0; d < a->v_dim; d++) out[d] *= inverse;
  }
}

static void forward_tiles(void *arg, size_t begin, size_t end, int worker) {
  const struct attention_task *task = arg;
  const struct us_attention_seq *a = task->a;
  float *p = task->scratch + (size_t)worker * task->scratch_floats;
  for (size_t index = begin; index < end; index++) {
    uint32_t h = (uint32_t)(index % a->q_heads), g = h / (a->q_heads / a->kv_heads);
    struct tile t = make_tile(a, index / a->q_heads * US_ATTENTION_TILE, a->queries);
    tile_times_keys(&t, a->q + t.first * a->q_stride + a->q_offset[h], a->q_stride, a->k + a->k_offset[g],
                    a->k_stride, a->qk_dim, a->scale, p);
    weigh_tile(task, &t, h, p);
    tile_times_rows(&t, p, a->v + a->v_offset[g], a->v_stride, a->v_dim,
                    a->out + (t.first * a->q_heads + h) * a->v_dim, (size_t)a->q_heads * a->v_dim);
    finish_tile(task, &t, h);
  }
}

void us_attention_seq(struct us_seq *seq, const struct us_attention_seq *a) {
  struct attention_task task = {.a = a, .round = seq->rounding == US_SEQ_ROUND_BF16};
  task.scratch_floats = (size_t)US_ATTENTION_TILE * (widest_tile(a, 0, a->queries) + 16);
  task.scratch = us_seq_scratch(seq, task.scratch_floats * (size_t)us_pool_threads(seq->pool));
  if (!task.scratch) return;
  us_pool_for(seq->pool, us_seq_blocks(a->queries, US_ATTENTION_TILE) * a->q_heads, 1, forward_tiles, &task);
}

/* --- gradient --- */

/* Cut the queries where no later query sees a key that an earlier one saw (documents, sequences): segments own their
 * keys, so they run side by side without sharing a sum. Returns the number of segments. */
static size_t cut_segments(const struct us_attention_seq *a, uint32_t *lowest, uint32_t *segment) {
  uint32_t low = UINT32_MAX, high = 0;
  for (size_t i = a->queries; i-- > 0;) {
    if (a->context_begin[i] < a->context_end[i] && a->context_begin[i] < low) low = a->context_begin[i];
    if (a->block_begin && a->block_begin[i] < a->block_end[i] && a->block_begin[i] < low)
      low = a->block_begin[i];
    lowest[i] = low;
  }
  size_t count = 0;
  for (size_t i = 0; i < a->queries; i++) {
    if (i == 0 || high <= lowest[i]) segment[count++] = (uint32_t)i;
    if (a->context_begin[i] < a->context_end[i] && a->context_end[i] > high) high = a->context_end[i];
    if (a->block_begin && a->block_begin[i] < a->block_end[i] && a->block_end[i] > high)
      high = a->block_end[i];
  }
  segment[count] = (uint32_t)a->queries;
  return count;
}

/* p (scores) becomes probabilities, dp (d probabilities) becomes d scores times scale; returns the sink's gradient. */
US_SEQ_CLONES static double grad_scores(const struct attention_task *task, const struct tile *t, uint32_t h,
                                        float *p, float *dp) {
  const struct us_attention_seq *a = task->a;
  double dsink = 0.0;
  for (size_t i = 0; i < t->rows; i++) {
    uint32_t range[2][2];
    visible(a, t, t->first + i, range);
    float *row = p + i * t->columns, *drow = dp + i * t->columns, pull = 0.0f;
    float m = a->max[(t->first + i) * a->q_heads + h], sum = a->sum[(t->first + i) * a->q_heads + h];
    float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    mask_row(row, t->columns, range);
    mask_row(drow, t->columns, range);
    for (int s = 0; s < 2; s++) {
      float *w = row + range[s][0], *dw = drow + range[s][0];
      size_t n = range[s][1] - range[s][0];
      for (size_t j = 0; j < n; j++) w[j] = us_expf(w[j] - m) * inverse;
      pull += us_seq_dot(w, dw, n);
    }
    for (int s = 0; s < 2; s++) {
      float *w = row + range[s][0], *dw = drow + range[s][0];
      for (size_t j = 0; j < range[s][1] - range[s][0]; j++) dw[j] = w[j] * (dw[j] - pull) * a->scale;
    }
    if (a->sink) dsink -= (double)(us_expf(a->sink[h] - m) * inverse * pull);
  }
  return dsink;
}

static void grad_tile(const struct attention_task *task, const struct tile *t, uint32_t h, float *p,
                      double *dsink) {
  const struct us_attention_seq *a = task->a;
  const struct us_attention_seq_grads *grads = task->grads;
  uint32_t g = h / (a->q_heads / a->kv_heads);
  size_t out_stride = (size_t)a->q_heads * a->v_dim;
  const float *q = a->q + t->first * a->q_stride + a->q_offset[h];
  const float *dout = grads->dout + t->first * out_stride + h * a->v_dim;
  float *dp = p + US_ATTENTION_TILE * t->columns;
  tile_times_keys(t, q, a->q_stride, a->k + a->k_offset[g], a->k_stride, a->qk_dim, a->scale, p);
  tile_times_keys(t, dout, out_stride, a->v + a->v_offset[g], a->v_stride, a->v_dim, 1.0f, dp);
  *dsink += grad_scores(task, t, h, p, dp);
  add_to_rows(t, p, dout, out_stride, a->v_dim, grads->dv + a->v_offset[g], a->v_stride);
  add_to_rows(t, dp, q, a->q_stride, a->qk_dim, grads->dk + a->k_offset[g], a->k_stride);
  tile_times_rows(t, dp, a->k + a->k_offset[g], a->k_stride, a->qk_dim,
                  grads->dq + t->first * a->q_stride + a->q_offset[h], a->q_stride);
}

static void grad_segments(void *arg, size_t begin, size_t end, int worker) {
  const struct attention_task *task = arg;
  const struct us_attention_seq *a = task->a;
  float *p = task->scratch + (size_t)worker * task->scratch_floats;
  uint32_t group = a->q_heads / a->kv_heads;
  for (size_t index = begin; index < end; index++) {
    size_t segment = index / a->kv_heads, g = index % a->kv_heads, last = task->segment[segment + 1];
    for (uint32_t h = (uint32_t)g * group; h < (g + 1) * group; h++) {
      double dsink = 0.0;
      for (size_t i = task->segment[segment]; i < last; i += US_ATTENTION_TILE) {
        struct tile t = make_tile(a, i, last);
        grad_tile(task, &t, h, p, &dsink);
      }
      task->dsink[segment * a->q_heads + h] = dsink;
    }
  }
}

static void zero_heads(float *rows, size_t n, size_t stride, const uint32_t *offset, uint32_t heads,
                       uint32_t width) {
  for (size_t r = 0; r < n; r++)
    for (uint32_t g = 0; g < heads; g++) memset(rows + r * stride + offset[g], 0, width * sizeof *rows);
}

/* Lay the sink sums and the segments out in scratch: at most as many segments as queries. */
static bool place_segments(struct attention_task *task, float *memory) {
  if (!memory) return false;
  size_t n = task->a->queries;
  task->dsink = (double *)memory;
  task->segment = (uint32_t *)(memory + 2 * n * task->a->q_heads);
  task->segments = cut_segments(task->a, task->segment + n + 1, task->segment);
  return true;
}

void us_attention_seq_grad(struct us_seq *seq, const struct us_attention_seq *a,
                           const struct us_attention_seq_grads *grads) {
  struct attention_task task = {.a = a, .grads = grads};
  size_t n = a->queries, fixed = (2 * n * a->q_heads + 2 * n + 31) / 16 * 16,
         workers = (size_t)us_pool_threads(seq->pool);
  if (!n || !place_segments(&task, us_seq_scratch(seq, fixed))) return;
  uint32_t columns = 0;
  for (size_t s = 0; s < task.segments; s++) {
    uint32_t widest = widest_tile(a, task.segment[s], task.segment[s + 1]);
    if (widest > columns) columns = widest;
  }
  task.scratch_floats = 2 * (size_t)US_ATTENTION_TILE * (columns + 16);
  float *memory = us_seq_scratch(seq, fixed + task.scratch_floats * workers);
  if (!place_segments(&task, memory)) return;
  task.scratch = memory + fixed;
  zero_heads(grads->dk, a->keys, a->k_stride, a->k_offset, a->kv_heads, a->qk_dim);
  zero_heads(grads->dv, a->keys, a->v_stride, a->v_offset, a->kv_heads, a->v_dim);
  us_pool_for(seq->pool, task.segments * a->kv_heads, 1, grad_segments, &task);
  if (!a->sink || !grads->dsink) return;
  for (uint32_t h = 0; h < a->q_heads; h++) {
    double sum = 0.0;
    for (size_t s = 0; s < task.segments; s++) sum += task.dsink[s * a->q_heads + h];
    grads->dsink[h] += (float)sum;
  }
}
