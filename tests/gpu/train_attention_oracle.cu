/* train_attention_oracle.cu: attention and its gradients in double precision, one query or key at a time, and what may be off.
 *
 * Error terms: u = 2^-8, the rounding to bf16; the tensor cores truncate each multiply of 16 columns to t = 2^-22 of the sum of its
 * magnitudes. Roundings of p and ds are independent, so a sum of n of them is off by at most 8 standard deviations (u / sqrt 3
 * each), and never by more than u each. Scores are off by t Q / 16 of their magnitudes, exponentials by 4 t (1 + |score| + |lse|).
 */
#include "train_attention.h"

static const double U = 0x1p-8, T = 0x1p-22;

/* A sum of products whose first factor is rounded to bf16. */
struct rounded_sum {
  double sum = 0, magnitude = 0, square = 0,
         carried = 0; /* carried: errors of the first factors, unrounded */
  void add(double factor, double error, double other) {
    double term = factor * other;
    sum += term, magnitude += fabs(term), square += term * term, carried += error * fabs(other);
  }
  double allowed(double terms, double scale) const {
    double rounding = std::fmin(U * magnitude, 8 * U / sqrt(3.0) * sqrt(square));
    return scale * (rounding + carried + (terms / 16 + 4) * T * magnitude) + U * fabs(sum * scale) + 1e-30;
  }
};

struct score {
  double value, error; /* error: of exp(value - lse), relative */
};

static double scale_of(const struct problem *p, enum mistake m) {
  return m == SCALED ? p->scale * 1.125 : p->scale;
}

static uint32_t kv_head(const struct problem *p, uint32_t head, enum mistake m) {
  uint32_t g = head / (p->of->H / p->of->G);
  return m == WRONG_HEAD ? (g + 1) % p->of->G : g;
}

static const float *query_of(const struct problem *p, uint32_t i, uint32_t head) {
  return &p->qkv[(size_t)(p->first + i) * p->stride + head * p->of->Q];
}
static const float *key_of(const struct problem *p, uint32_t j, uint32_t g) {
  return &p->qkv[(size_t)j * p->stride + (p->of->H + g) * p->of->Q];
}
static const float *value_of(const struct problem *p, uint32_t j, uint32_t g) {
  return &p->qkv[(size_t)j * p->stride + (p->of->H + p->of->G) * p->of->Q + g * p->of->V];
}
static const float *dout_of(const struct problem *p, uint32_t i, uint32_t head) {
  return &p->dout[((size_t)i * p->of->H + head) * p->of->V];
}

static bool sees(const struct problem *p, uint32_t i, uint32_t j, enum mistake m) {
  const struct ranges *r = &p->ranges;
  return (r->begin[0][i] <= j && j < r->end[0][i] + (m == END_LATE)) ||
         (r->begin[1][i] <= j && j < r->end[1][i]);
}

static double dot(const float *x, const float *y, uint32_t n, double *magnitude) {
  double sum = 0;
  *magnitude = 0;
  for (uint32_t d = 0; d < n; d++) sum += (double)x[d] * y[d], *magnitude += fabs((double)x[d] * y[d]);
  return sum;
}

static struct score score_of(const struct problem *p, uint32_t i, uint32_t head, uint32_t j, double lse,
                             enum mistake m) {
  double magnitude,
      s = scale_of(p, m) * dot(query_of(p, i, head), key_of(p, j, kv_head(p, head, m)), p->of->Q, &magnitude);
  return {s, p->scale * T * (p->of->Q / 16) * magnitude + 4 * T * (1 + fabs(s) + fabs(lse))};
}

bool mistake_applies(const struct problem *p, enum mistake m) {
  return (m != NO_SINK || p->of->sink) && (m != WRONG_HEAD || p->of->G > 1);
}

struct row_table device_rows(const struct problem *p) {
  struct row_table rows;
  uint32_t V = p->of->V;
  for (size_t r = 0; r < (size_t)p->queries * p->of->H; r++) {
    double delta = 0;
    for (uint32_t d = 0; d < V; d++) delta += (double)p->dout[r * V + d] * us_bf16_to_f32(p->out[r * V + d]);
    rows.lse.push_back(p->lse[r]), rows.delta.push_back(delta);
  }
  return rows;
}

struct row_table double_rows(const struct problem *p, enum mistake m) {
  struct row_table rows;
  size_t n = (size_t)p->queries * p->of->H;
  rows.lse.resize(n), rows.delta.resize(n);
  in_parallel(n, [&](size_t r) {
    uint32_t i = (uint32_t)(r / p->of->H), head = (uint32_t)(r % p->of->H);
    double sum = p->of->sink && m != NO_SINK ? exp(p->sink[head]) : 0, pull = 0, unused;
    for (uint32_t j = 0; j < p->keys; j++) {
      if (!sees(p, i, j, m)) continue;
      double w = exp(score_of(p, i, head, j, 0, m).value);
      sum += w, pull += w * dot(dout_of(p, i, head), value_of(p, j, kv_head(p, head, m)), p->of->V, &unused);
    }
    rows.lse[r] = sum > 0 ? log(sum) : 0, rows.delta[r] = sum > 0 ? pull / sum : 0;
  });
  return rows;
}

/* ds and its error before rounding. */
static double score_gradient(const struct problem *p, uint32_t i, uint32_t head, uint32_t j, double w,
                             double error, const struct row_table &rows, enum mistake m, double *ret_error) {
  double magnitude, dp = dot(dout_of(p, i, head), value_of(p, j, kv_head(p, head, m)), p->of->V, &magnitude);
  double delta = rows.delta[(size_t)i * p->of->H + head], ds = w * (dp - delta);
  *ret_error = fabs(ds) * error + w * (p->of->V / 16 + 4) * T * (magnitude + fabs(delta));
  return ds;
}

struct query_expected expect_query(const struct problem *p, uint32_t i, uint32_t head, enum mistake m,
                                   const struct row_table &rows) {
  uint32_t Q = p->of->Q, V = p->of->V, g = kv_head(p, head, m);
  double lse = rows.lse[(size_t)i * p->of->H + head], sum = 0, off = 0, keys = 0;
  std::vector<rounded_sum> out(V), dq(Q);
  for (uint32_t j = 0; j < p->keys; j++) {
    if (!sees(p, i, j, m)) continue;
    struct score s = score_of(p, i, head, j, lse, m);
    double w = exp(s.value - lse), ds_error,
           ds = score_gradient(p, i, head, j, w, s.error, rows, m, &ds_error);
    for (uint32_t d = 0; d < V; d++) out[d].add(w, w * s.error, value_of(p, j, g)[d]);
    for (uint32_t d = 0; d < Q; d++) dq[d].add(ds, ds_error, key_of(p, j, g)[d]);
    sum += w, off += w * s.error, keys++;
  }
  struct query_expected e;
  double sink = p->of->sink && m != NO_SINK ? exp(p->sink[head] - lse) : 0, all = sum + sink;
  double sum_error = off + 4 * T * (1 + fabs(lse)) + keys * 0x1p-24;
  e.lse.value.push_back(all > 0 ? lse + log(all) : 0), e.lse.allowed.push_back(sum_error + 1e-6);
  for (uint32_t d = 0; d < V; d++) {
    double value = all > 0 ? out[d].sum / all : 0;
    e.out.value.push_back(value);
    e.out.allowed.push_back(out[d].allowed(keys, 1) + sum_error * fabs(value));
  }
  for (uint32_t d = 0; d < Q; d++) {
    e.dq.value.push_back(dq[d].sum * scale_of(p, m));
    e.dq.allowed.push_back(dq[d].allowed(keys, p->scale));
  }
  return e;
}

struct key_expected expect_key(const struct problem *p, uint32_t j, uint32_t g, enum mistake m,
                               const struct row_table &rows) {
  uint32_t Q = p->of->Q, V = p->of->V;
  std::vector<rounded_sum> dk(Q), dv(V);
  double terms = 0;
  for (uint32_t head = 0; head < p->of->H; head++) {
    if (kv_head(p, head, m) != g) continue;
    for (uint32_t i = 0; i < p->queries; i++) {
      if (!sees(p, i, j, m)) continue;
      double lse = rows.lse[(size_t)i * p->of->H + head];
      struct score s = score_of(p, i, head, j, lse, m);
      double w = exp(s.value - lse), ds_error,
             ds = score_gradient(p, i, head, j, w, s.error, rows, m, &ds_error);
      for (uint32_t d = 0; d < V; d++) dv[d].add(w, w * s.error, dout_of(p, i, head)[d]);
      for (uint32_t d = 0; d < Q; d++) dk[d].add(ds, ds_error, query_of(p, i, head)[d]);
      terms++;
    }
  }
  struct key_expected e;
  for (uint32_t d = 0; d < Q; d++) {
    e.dk.value.push_back(dk[d].sum * scale_of(p, m));
    e.dk.allowed.push_back(dk[d].allowed(terms, p->scale));
  }
  for (uint32_t d = 0; d < V; d++)
    e.dv.value.push_back(dv[d].sum), e.dv.allowed.push_back(dv[d].allowed(terms, 1));
  return e;
}

struct expected expect_sinks(const struct problem *p, const struct row_table &rows) {
  struct expected e;
  for (uint32_t head = 0; head < p->of->H; head++) {
    double sum = 0, magnitude = 0;
    for (uint32_t i = 0; i < p->queries; i++) {
      size_t r = (size_t)i * p->of->H + head;
      double weight = exp(p->sink[head] - rows.lse[r]), inner = 0;
      for (uint32_t d = 0; d < p->of->V; d++)
        inner += fabs((double)p->dout[r * p->of->V + d] * us_bf16_to_f32(p->out[r * p->of->V + d]));
      sum += weight * rows.delta[r];
      magnitude += weight * (fabs(rows.delta[r]) * (1 + fabs(rows.lse[r])) * 16 + inner * 8);
    }
    e.value.push_back(0.5 - sum),
        e.allowed.push_back(0x1p-24 * (magnitude + 16) + 1e-30); /* 0.5 stood there */
  }
  return e;
}
