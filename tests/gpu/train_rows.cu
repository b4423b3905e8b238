/* train_rows.cu: the row operations of training on the GPU against the CPU: norms, rotation, SwiGLU, embedding; other parts
 * in train_rows_*.cu.
 *
 * Bounds. u = 2^-24, b = 2^-8 (rounding to the 8 bits of bf16). A sum of D products in FP32 errs by at most (D + 2) u of the sum of
 * magnitudes. 1 / rms inherits half of that relative error and four roundings; y three more and b. Rotation, SwiGLU, embedding and
 * pieces of its gradient promise the CPU's bits.
 *
 * Contents: norms; rotation; SwiGLU; embedding.
 */
#include "train_rows.h"
#include "train_values.h"

#include "kernels/embed/embed_train.h"
#include "kernels/rmsnorm/rmsnorm_train.h"
#include "kernels/rope/rope_train.h"
#include "kernels/swiglu/swiglu_train.h"

#define U 0x1p-24
#define B 0x1p-8

/* --- norms --- */

struct norm_case {
  const char *name;
  size_t R, D, heads, stride;
  bool bf16; /* rows of x, and dx */
};

/* Formula in double; `shift` reads the gain one column further: the mutation. */
struct norm_truth {
  std::vector<double> y, y_bound, inverse, inverse_bound, dx, dx_bound, dgain, dgain_bound;
};

static size_t item_at(const struct norm_case &c, size_t i) {
  return i / c.heads * c.stride + i % c.heads * c.D;
}

static struct norm_truth norm_oracle(const struct norm_case &c, const std::vector<float> &x,
                                     const std::vector<float> &gain, const std::vector<float> &dy,
                                     const std::vector<float> &old, double eps, bool add, size_t shift) {
  size_t items = c.R * c.heads, n = c.R * c.stride;
  struct norm_truth t;
  for (std::vector<double> *v : {&t.y, &t.y_bound, &t.dx, &t.dx_bound}) v->assign(n, 0.0);
  for (std::vector<double> *v : {&t.dgain, &t.dgain_bound}) v->assign(c.D, 0.0);
  for (size_t i = 0; i < items; i++) {
    size_t at = item_at(c, i);
    double squares = 0, dot = 0, magnitude = 0, relative = (0.5 * (double)c.D + 6) * U;
    for (size_t k = 0; k < c.D; k++) {
      double g = gain[(k + shift) % c.D], xk = x[at + k];
      squares += xk * xk;
      dot += dy[at + k] * g * xk;
      magnitude += fabs(dy[at + k] * g * xk);
    }
    double inverse = 1.0 / sqrt(squares / (double)c.D + eps), pull = dot * inverse * inverse / (double)c.D;
    double pull_bound =
        magnitude * inverse * inverse / (double)c.D * ((double)c.D + 8) * U + fabs(pull) * 4 * relative;
    t.inverse.push_back(inverse);
    t.inverse_bound.push_back(inverse * relative);
    for (size_t k = 0; k < c.D; k++) {
      double g = gain[(k + shift) % c.D], xk = x[at + k], d = dy[at + k];
      t.y[at + k] = xk * inverse * g;
      t.y_bound[at + k] = fabs(t.y[at + k]) * (relative + 3 * U + B);
      double part = inverse * (d * g - xk * pull);
      double bound =
          inverse * (fabs(d * g) + fabs(xk * pull)) * (relative + 4 * U) + inverse * fabs(xk) * pull_bound;
      t.dx[at + k] = part + (add ? old[at + k] : 0.0);
      t.dx_bound[at + k] = bound + fabs(t.dx[at + k]) * (U + (c.bf16 ? B : 0.0));
      t.dgain[k] += d * xk * inverse;
      t.dgain_bound[k] += fabs(d * xk * inverse) * (relative + ((double)items + 4) * U);
    }
  }
  for (double &b : t.dgain_bound) b += U; /* added to a gain's gradient of up to 1 */
  return t;
}

static void report_norm(const struct norm_case &c, const char *op, struct lab_result *r) {
  char shape[64];
  snprintf(shape, sizeof shape, "%zu x %zu of %zu", c.R, c.heads, c.D);
  r->op = op;
  r->shape = shape;
  r->format = c.bf16 ? "bf16" : "f32";
  lab_report(r);
}

static void check_norm(const struct norm_case &c, bool add) {
  size_t n = c.R * c.stride, items = c.R * c.heads;
  std::vector<float> x = train_normal(n, 1), gain = train_normal(c.D, 2, 0.3f), dy = train_normal(n, 3),
                     old = train_normal(n, 4);
  for (float &g : gain) g += 1.0f;
  std::vector<uint16_t> x_half = train_halves(x), dy_half = train_halves(dy);
  if (c.bf16) x = train_floats(x_half), dy = train_floats(dy_half);
  struct norm_truth truth = norm_oracle(c, x, gain, dy, old, 1e-5, add, 0),
                    wrong = norm_oracle(c, x, gain, dy, old, 1e-5, add, 1);
  train_device<float> d_x(x), d_gain(gain), d_dy(dy), d_dx(old), d_inverse(items), d_dgain(c.D);
  train_device<uint16_t> d_half(x_half), d_dy_half(dy_half), d_y(n), d_dx_half(n), d_copy(n), d_tap(n);
  train_device<char> scratch(us_rmsnorm_train_scratch(c.R, c.heads, c.D));
  struct us_rmsnorm_train norm = {};
  norm.R = c.R, norm.D = c.D, norm.heads = c.heads, norm.stride = c.stride, norm.eps = 1e-5f;
  if (c.bf16)
    norm.x_bf16 = d_half.at;
  else
    norm.x = d_x.at;
  norm.gain = d_gain.at, norm.y = d_y.at, norm.inverse = d_inverse.at;
  if (!c.bf16) norm.opt_tap = d_tap.at, norm.tap_stride = c.stride;
  US_CUDA((cudaError_t)us_rmsnorm_train(&norm, 0));
  struct us_rmsnorm_train_grad grad = {};
  grad.norm = norm;
  grad.dy = c.bf16 ? NULL : d_dy.at;
  grad.dy_bf16 = c.bf16 ? d_dy_half.at : NULL;
  grad.dx = c.bf16 ? NULL : d_dx.at;
  grad.dx_bf16 = c.bf16 ? d_dx_half.at : NULL;
  grad.add = add;
  grad.opt_dx_copy = c.bf16 ? NULL : d_copy.at;
  grad.opt_dgain = d_dgain.at, grad.scratch = scratch.at;
  US_CUDA((cudaError_t)us_rmsnorm_train_grad(&grad, 0));
  struct lab_result forward = {}, backward = {}, gains = {};
  train_compare(&forward, d_inverse.host(), truth.inverse, truth.inverse_bound);
  std::vector<uint16_t> y = d_y.host();
  std::vector<float> dx = c.bf16 ? train_floats(d_dx_half.host()) : d_dx.host(), dgain = d_dgain.host();
  for (size_t i = 0; i < items; i++) /* gaps between rows are not written */
    for (size_t k = item_at(c, i); k < item_at(c, i) + c.D; k++) {
      lab_sample(&forward, train_value(y[k]) - truth.y[k], truth.y_bound[k] + 1e-300, 0);
      lab_sample(&backward, train_value(dx[k]) - truth.dx[k], truth.dx_bound[k] + 1e-300, 0);
    }
  train_compare(&gains, dgain, truth.dgain, truth.dgain_bound);
  train_mutation(&forward, "gain one column further", y, wrong.y, truth.y_bound);
  train_mutation(&backward, "gain one column further", dx, wrong.dx, truth.dx_bound);
  std::vector<double> missing = truth.dgain; /* the last item left out */
  for (size_t k = 0; k < c.D; k++) {
    size_t at = item_at(c, items - 1) + k;
    missing[k] -= (double)dy[at] * (double)x[at] * truth.inverse[items - 1];
  }
  train_mutation(&gains, "last item left out", dgain, missing, truth.dgain_bound);
  report_norm(c, "rmsnorm", &forward);
  report_norm(c, add ? "rmsnorm dx added" : "rmsnorm dx", &backward);
  report_norm(c, "rmsnorm dgain", &gains);
  if (!c.bf16) {
    train_same("rmsnorm: tap = bf16(x)", train_halves(x), d_tap.host());
    train_same("rmsnorm: copy = bf16(dx)", train_halves(d_dx.host()), d_copy.host());
  }
  d_dgain.set(std::vector<float>(c.D, 0.0f));
  if (!c.bf16) d_dx.set(old);
  US_CUDA((cudaError_t)us_rmsnorm_train_grad(&grad, 0));
  train_same("rmsnorm dgain: the same bits again", dgain, d_dgain.host());
}

/* What is added to y: the bits of y + addition in FP32, rounded once. */
static void check_norm_addition(size_t R, size_t D) {
  std::vector<float> x = train_normal(R * D, 21), gain = train_normal(D, 22), added = train_normal(R * D, 23);
  train_device<float> d_x(x), d_gain(gain), d_added(added), d_inverse(R);
  train_device<uint16_t> d_y(R * D);
  struct us_rmsnorm_train norm = {};
  norm.R = R, norm.D = D, norm.eps = 1e-5f, norm.x = d_x.at, norm.gain = d_gain.at;
  norm.opt_add = d_added.at, norm.y = d_y.at, norm.inverse = d_inverse.at;
  US_CUDA((cudaError_t)us_rmsnorm_train(&norm, 0));
  std::vector<float> inverse = d_inverse.host(), once(R * D), twice(R * D);
  for (size_t i = 0; i < R * D; i++) {
    float y = x[i] * inverse[i / D] * gain[i % D];
    once[i] = y + added[i];
    twice[i] = us_bf16_to_f32(us_bf16_from_f32(y)) + added[i];
  }
  train_same("rmsnorm: bf16(y + addition)", train_halves(once), d_y.host());
  train_differs("rmsnorm: rounded once", train_halves(twice), d_y.host());
}

/* --- rotation --- */

static void check_rope(uint32_t rotary, uint32_t dim, uint32_t v_dim, uint32_t skew) {
  uint32_t H = 6, G = 2, R = 157, stride = (H + G) * dim + G * v_dim + 3 * skew;
  std::vector<uint32_t> qk, v, position;
  for (uint32_t h = 0; h < H + G; h++) qk.push_back(h * dim + skew);
  for (uint32_t g = 0; g < G; g++) v.push_back((H + G) * dim + g * v_dim + 2 * skew);
  for (uint32_t r = 0; r < R; r++) position.push_back(r * 37 % 211);
  std::vector<float> table(211 * rotary), rows = train_normal((size_t)R * stride, 5);
  for (uint32_t p = 0; p < 211; p++) us_rope_table(10000.0, rotary, p, &table[p * rotary]);
  std::vector<uint16_t> halves = train_halves(rows);
  train_device<uint32_t> d_qk(qk), d_v(v), d_position(position);
  train_device<float> d_table(table);
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  struct us_rope_rows heads = {R, stride, qk.data(), H + G, rotary}, values = {R, stride, v.data(), G, 0};
  for (int backward = 0; backward < 2; backward++) {
    train_device<uint16_t> d_x(halves);
    struct us_rope_train rope = {R,       stride, d_x.at, d_table.at, d_position.at, rotary,
                                 d_qk.at, H + G,  d_v.at, G,          v_dim,         0.707f};
    US_CUDA((cudaError_t)(backward ? us_rope_train_grad(&rope, 0) : us_rope_train(&rope, 0)));
    rows = train_floats(halves);
    (backward ? us_rope_grad : us_rope_seq)(&seq, &heads, table.data(), position.data(), rows.data());
    us_scale_heads_seq(&seq, &values, v_dim, 0.707f, true, rows.data());
    char check[96];
    snprintf(check, sizeof check, "rope %s: rotary %u of %u, skew %u", backward ? "gradient" : "forward",
             rotary, dim, skew);
    train_same(check, train_halves(rows), d_x.host());
    position[3]++;
    rows = train_floats(halves);
    (backward ? us_rope_grad : us_rope_seq)(&seq, &heads, table.data(), position.data(), rows.data());
    us_scale_heads_seq(&seq, &values, v_dim, 0.707f, true, rows.data());
    position[3]--;
    train_differs("rope: another position shows", train_halves(rows), d_x.host());
  }
  us_seq_release(&seq);
}

/* --- SwiGLU --- */

static void check_swiglu(size_t R, size_t F) {
  std::vector<float> h = train_normal(R * 2 * F, 6, 3.0f), da = train_normal(R * F, 7), a(R * F),
                     dh(R * 2 * F);
  for (size_t i = 0; i < 64; i++) h[i] *= 40.0f; /* where the exponential over- and underflows */
  std::vector<uint16_t> h_half = train_halves(h), da_half = train_halves(da);
  h = train_floats(h_half), da = train_floats(da_half);
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  us_swiglu_seq(&seq, R, F, h.data(), a.data());
  us_swiglu_grad(&seq, R, F, h.data(), da.data(), dh.data());
  us_seq_release(&seq);
  train_device<uint16_t> d_h(h_half), d_da(da_half), d_a(R * F), d_again(R * F);
  US_CUDA((cudaError_t)us_swiglu_train(R, F, d_h.at, d_a.at, 0));
  train_same("swiglu: the CPU's bits", train_halves(a), d_a.host());
  US_CUDA((cudaError_t)us_swiglu_train_grad(R, F, d_h.at, d_da.at, d_h.at, d_again.at, 0));
  train_same("swiglu gradient: the CPU's bits, in place", train_halves(dh), d_h.host());
  train_same("swiglu gradient: a again", train_halves(a), d_again.host());
  std::swap_ranges(da_half.begin(), da_half.begin() + 8, da_half.begin() + 8);
  d_h.set(h_half), d_da.set(da_half);
  US_CUDA((cudaError_t)us_swiglu_train_grad(R, F, d_h.at, d_da.at, d_h.at, NULL, 0));
  train_differs("swiglu gradient: swapped columns show", train_halves(dh), d_h.host());
}

/* --- embedding --- */

static std::vector<int32_t> some_tokens(size_t R, size_t N) {
  std::vector<int32_t> token(R);
  uint64_t state = train_seed() + 8;
  for (int32_t &t : token) {
    uint64_t word = lab_random(&state);
    t = word % 4 == 0   ? 7
        : word % 4 == 1 ? -1
                        : (int32_t)(word >> 32) % (int32_t)N; /* one frequent, many masked */
    if (t < -1) t = -t % (int32_t)N;
  }
  return token;
}

static void check_embed(size_t R, size_t N, size_t D) {
  std::vector<int32_t> token = some_tokens(R, N);
  std::vector<uint16_t> table = train_halves(train_normal(N * D, 9)),
                        mask = train_halves(train_normal(D, 10));
  std::vector<float> dx = train_normal(R * D, 11), x(R * D), start = train_normal(N * D, 12), grad = start;
  for (size_t r = 0; r < R; r++)
    for (size_t k = 0; k < D; k++)
      x[r * D + k] = us_bf16_to_f32(token[r] < 0 ? mask[k] : table[(size_t)token[r] * D + k]);
  train_device<int32_t> d_token(token);
  train_device<uint16_t> d_table(table), d_mask(mask);
  train_device<float> d_x(R * D), d_dx(dx), d_grad(start), d_dmask(D);
  struct us_embed_train embed = {R, D, d_token.at, d_table.at, d_mask.at, d_x.at};
  US_CUDA((cudaError_t)us_embed_train(&embed, 0));
  train_same("embed: rows and mask", x, d_x.host());

  std::vector<uint32_t> row(R);
  std::vector<struct us_embed_train_piece> piece(R);
  std::vector<uint64_t> work(2 * R);
  size_t pieces = us_embed_train_plan(token.data(), R, row.data(), piece.data(), work.data());
  train_device<uint32_t> d_row(row);
  train_device<struct us_embed_train_piece> d_piece(piece);
  train_device<char> scratch(us_embed_train_scratch(pieces, D));
  struct us_embed_train_grad args = {D,       d_row.at,  d_piece.at, pieces,
                                     d_dx.at, d_grad.at, d_dmask.at, scratch.at};
  US_CUDA((cudaError_t)us_embed_train_grad(&args, 0));
  std::vector<float> got = d_grad.host(), dmask = d_dmask.host();
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  us_embed_grad(&seq, token.data(), R, N, D, dx.data(), grad.data());
  us_seq_release(&seq);

  std::vector<double> sum(D, 0.0), mask_sum(D, 0.0), bound(D, 0.0), mask_bound(D, 0.0);
  size_t frequent = 0, masked = 0;
  for (size_t r = 0; r < R; r++) frequent += token[r] == 7, masked += token[r] < 0;
  for (size_t k = 0; k < D; k++)
    sum[k] = start[7 * D + k], bound[k] = fabs(sum[k]) * ((double)frequent + 1) * U;
  for (size_t r = 0; r < R; r++)
    for (size_t k = 0; k < D; k++) {
      if (token[r] == 7)
        sum[k] += dx[r * D + k], bound[k] += fabs(dx[r * D + k]) * ((double)frequent + 1) * U;
      if (token[r] < 0)
        mask_sum[k] += dx[r * D + k], mask_bound[k] += fabs(dx[r * D + k]) * ((double)masked + 1) * U;
    }
  struct lab_result r = {"embed gradient of a frequent token and the mask", "", "f32"};
  train_compare(&r, std::vector<float>(got.begin() + 7 * D, got.begin() + 8 * D), sum, bound);
  train_compare(&r, dmask, mask_sum, mask_bound);
  size_t last = R - 1;
  while (token[last] >= 0) last--;
  for (size_t k = 0; k < D; k++) mask_sum[k] -= dx[last * D + k];
  train_mutation(&r, "last masked row left out", dmask, mask_sum, mask_bound);
  lab_report(&r);
  memcpy(&grad[7 * D], &got[7 * D], D * sizeof(float));
  train_same("embed gradient: the CPU's bits up to 32 rows a token", grad, got);
  train_differs("embed gradient: something was added", start, got);
  d_grad.set(start), d_dmask.set(std::vector<float>(D, 0.0f));
  US_CUDA((cudaError_t)us_embed_train_grad(&args, 0));
  train_same("embed gradient: the same bits again", got, d_grad.host());
}

void train_rows_norm(void) {
  for (size_t D : {(size_t)48, (size_t)320, (size_t)1024, (size_t)1536, (size_t)6144})
    for (bool add : {false, true}) check_norm({"stream", 333, D, 1, D, false}, add);
  check_norm({"heads", 211, 128, 5, 5 * 128 + 64, true}, false);
  check_norm({"heads", 97, 48, 3, 3 * 48, true}, false);
  for (size_t D : {(size_t)48, (size_t)1024, (size_t)1536}) check_norm_addition(77, D);
  check_rope(64, 128, 128, 0);
  check_rope(64, 192, 128, 8);
  check_rope(16, 48, 32, 0);
  check_rope(12, 48, 32, 1);
  check_swiglu(77, 128);
  check_swiglu(33, 4096);
  check_embed(2000, 500, 320);
  check_embed(5000, 16384, 1024);
}

int main() {
  us_gpu_begin();
  us_gpu_watchdog(110);
  fprintf(stderr, "seed %llu\n", (unsigned long long)train_seed());
  train_rows_norm();
  train_rows_loss();
  train_rows_quant();
  train_rows_time();
  return us_gpu_status();
}
