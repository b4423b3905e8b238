/* train_rows_time.cu: the row operations' speed as a fraction of what copying reaches in the same run.
 *
 * Shapes are those of mini (data/shapes): 32 K rows a step, D 1024, 16 heads of 128, dense F 4096, vocabulary 16 K. Every operation's
 * bytes exceed the 50 MB of L2 several times but the head loss of a chunk, which is timed in L2 and out of it.
 */
#include "train_values.h"
#include "train_rows.h"

#include "kernels/embed/embed_train.h"
#include "kernels/head_loss/head_loss_train.h"
#include "kernels/optim/adamw_train.h"
#include "kernels/quant/quant_train.h"
#include "kernels/rmsnorm/rmsnorm_train.h"
#include "kernels/rope/rope_train.h"
#include "kernels/swiglu/swiglu_train.h"

static const size_t ROWS = 32768, HIDDEN = 1024, INNER = 4096, VOCABULARY = 16384;

static __global__ void fill_noise(size_t n, float *x, float deviation) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint64_t z = i * 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  int sum = __popcll(z) - 32; /* binomial: deviation 4 */
  x[i] = ((float)sum + (float)(uint32_t)z * 0x1p-32f) * 0.25f * deviation;
}

/* Device memory of noise in FP32, read as bf16 pairs where an operation wants those. */
struct noise : train_device<float> {
  explicit noise(size_t count, float deviation = 1.0f) : train_device<float>(count) {
    fill_noise<<<(unsigned)((count + 255) / 256), 256>>>(count, at, deviation);
    US_CUDA(cudaGetLastError());
  }
};

struct halves : train_device<uint16_t> {
  explicit halves(size_t count, float deviation = 1.0f) : train_device<uint16_t>(count) {
    noise from(count, deviation);
    US_CUDA((cudaError_t)us_bf16_train(count, from.at, at, 0));
    US_CUDA(cudaDeviceSynchronize());
  }
};

static void report(const char *op, const char *format, double bytes, double us) {
  printf("{\"time\": \"%s\", \"format\": \"%s\", \"us\": %.1f, \"gbs\": %.0f, \"of_copy\": %.3f}\n", op,
         format, us, bytes / us * 1e-3, bytes / us * 1e6 / lab_ceiling);
  fflush(stdout);
}

template <class Run> static void time_run(const char *op, const char *format, double bytes, Run run) {
  report(op, format, bytes, lab_median_us([&] { return (cudaError_t)run(); }));
}

static void time_copy(void) {
  size_t n = (size_t)1 << 28;
  train_device<float> from(n), to(n);
  double us =
      lab_median_us([&] { return cudaMemcpyAsync(to.at, from.at, n * 4, cudaMemcpyDeviceToDevice, 0); });
  lab_ceiling = 8.0 * (double)n / us * 1e6;
  report("copy (the yardstick)", "f32", 8.0 * (double)n, us);
}

static void time_norm(void) {
  noise x(ROWS * HIDDEN), dx(ROWS * HIDDEN), gain(HIDDEN), dgain(HIDDEN), dy(ROWS * HIDDEN);
  halves dy_half(ROWS * HIDDEN);
  train_device<uint16_t> y(ROWS * HIDDEN), copy(ROWS * HIDDEN);
  train_device<float> inverse(ROWS);
  train_device<char> scratch(us_rmsnorm_train_scratch(ROWS, 1, HIDDEN));
  struct us_rmsnorm_train norm = {};
  norm.R = ROWS, norm.D = HIDDEN, norm.eps = 1e-5f, norm.x = x.at, norm.gain = gain.at, norm.y = y.at,
  norm.inverse = inverse.at;
  time_run("rmsnorm", "f32 to bf16", 6.0 * ROWS * HIDDEN, [&] { return us_rmsnorm_train(&norm, 0); });
  struct us_rmsnorm_train_grad grad = {};
  grad.norm = norm, grad.dy = dy.at, grad.dx = dx.at, grad.add = true, grad.opt_dx_copy = copy.at;
  grad.opt_dgain = dgain.at, grad.scratch = scratch.at;
  time_run("rmsnorm gradient, added, copied", "f32", 18.0 * ROWS * HIDDEN,
           [&] { return us_rmsnorm_train_grad(&grad, 0); });
  grad.opt_dgain = NULL;
  time_run("the same without dgain", "f32", 18.0 * ROWS * HIDDEN,
           [&] { return us_rmsnorm_train_grad(&grad, 0); });
  grad.opt_dgain = dgain.at, grad.dy = NULL, grad.dy_bf16 = dy_half.at, grad.add = false,
  grad.opt_dx_copy = NULL;
  time_run("rmsnorm gradient, written", "bf16 dy", 10.0 * ROWS * HIDDEN,
           [&] { return us_rmsnorm_train_grad(&grad, 0); });
}

static void time_heads(void) {
  halves x(ROWS * 2048);
  train_device<float> inverse(ROWS * 12), gain(128), dgain(128);
  train_device<char> scratch(us_rmsnorm_train_scratch(ROWS, 12, 128));
  struct us_rmsnorm_train norm = {};
  norm.R = ROWS, norm.D = 128, norm.heads = 12, norm.stride = 2048, norm.eps = 1e-5f, norm.x_bf16 = x.at,
  norm.gain = gain.at;
  norm.y = x.at, norm.inverse = inverse.at;
  time_run("rmsnorm of 12 heads", "bf16", 4.0 * ROWS * 12 * 128, [&] { return us_rmsnorm_train(&norm, 0); });
  halves dy(ROWS * 2048);
  struct us_rmsnorm_train_grad grad = {};
  grad.norm = norm, grad.dy_bf16 = dy.at, grad.dx_bf16 = dy.at, grad.opt_dgain = dgain.at,
  grad.scratch = scratch.at;
  time_run("rmsnorm gradient of 12 heads", "bf16", 6.0 * ROWS * 12 * 128,
           [&] { return us_rmsnorm_train_grad(&grad, 0); });
}

static void time_rope(void) {
  halves x(ROWS * 2048);
  std::vector<uint32_t> qk, v, position;
  for (uint32_t h = 0; h < 12; h++) qk.push_back(h * 128);
  for (uint32_t g = 12; g < 16; g++) v.push_back(g * 128);
  for (uint32_t r = 0; r < ROWS; r++) position.push_back(r % 2048);
  train_device<uint32_t> d_qk(qk), d_v(v), d_position(position);
  noise table(2048 * 64);
  struct us_rope_train rope = {ROWS,    2048, x.at,   table.at, d_position.at, 64,
                               d_qk.at, 12,   d_v.at, 4,        128,           0.707f};
  time_run("rope and value scale", "bf16", 4.0 * ROWS * (12 * 64 + 4 * 128),
           [&] { return us_rope_train(&rope, 0); });
}

static void time_swiglu(void) {
  halves h(ROWS * 2 * INNER), da(ROWS * INNER);
  train_device<uint16_t> a(ROWS * INNER), dh(ROWS * 2 * INNER);
  time_run("swiglu", "bf16", 6.0 * ROWS * INNER, [&] { return us_swiglu_train(ROWS, INNER, h.at, a.at, 0); });
  time_run("swiglu gradient", "bf16", 10.0 * ROWS * INNER,
           [&] { return us_swiglu_train_grad(ROWS, INNER, h.at, da.at, dh.at, NULL, 0); });
}

/* Zipf: token t about as often as 1 / (t + 10). */
static void time_embed(void) {
  std::vector<int32_t> token(ROWS);
  uint64_t state = 5;
  for (int32_t &t : token)
    t = (int32_t)(10.0 *
                  exp(log((double)(VOCABULARY + 10) / 10.0) * (double)(lab_random(&state) >> 11) * 0x1p-53)) -
        10;
  std::vector<uint32_t> row(ROWS);
  std::vector<struct us_embed_train_piece> piece(ROWS);
  std::vector<uint64_t> work(2 * ROWS);
  size_t pieces = us_embed_train_plan(token.data(), ROWS, row.data(), piece.data(), work.data()), tokens = 0;
  for (size_t p = 0; p < pieces; p++) tokens += piece[p].pieces > 0;
  train_device<int32_t> d_token(token);
  train_device<uint32_t> d_row(row);
  train_device<struct us_embed_train_piece> d_piece(piece);
  halves table(VOCABULARY * HIDDEN);
  noise x(ROWS * HIDDEN), dtable(VOCABULARY * HIDDEN);
  train_device<char> scratch(us_embed_train_scratch(pieces, HIDDEN));
  struct us_embed_train embed = {ROWS, HIDDEN, d_token.at, table.at, NULL, x.at};
  time_run("embed", "bf16 to f32", 6.0 * ROWS * HIDDEN, [&] { return us_embed_train(&embed, 0); });
  struct us_embed_train_grad grad = {HIDDEN, d_row.at, d_piece.at, pieces, x.at, dtable.at, NULL, scratch.at};
  time_run("embed gradient, Zipf", "f32", 4.0 * ROWS * HIDDEN + 8.0 * (double)(tokens * HIDDEN),
           [&] { return us_embed_train_grad(&grad, 0); });
}

static void time_loss(size_t rows, size_t width, bool kl, const char *name) {
  noise logits(rows * width, 3.0f), teacher(kl ? rows * width : 1, 3.0f);
  train_device<uint16_t> dlogits(rows * width);
  std::vector<int32_t> label(rows);
  for (size_t r = 0; r < rows; r++) label[r] = (int32_t)(r * 7919 % width);
  train_device<int32_t> d_label(label);
  train_device<double> total(1);
  train_device<char> scratch(us_head_loss_train_scratch(rows));
  train_device<float> loss(rows);
  struct us_head_loss_train args = {};
  args.rows = rows, args.N = width, args.logits = logits.at, args.stride = width, args.label = d_label.at,
  args.scale = 1.0f;
  args.opt_dlogits = dlogits.at, args.dlogits_stride = width, args.opt_row_loss = loss.at,
  args.opt_total = total.at;
  args.scratch = scratch.at;
  if (kl) args.opt_teacher = teacher.at, args.teacher_stride = width;
  time_run(name, kl ? "KL" : "CE", (kl ? 10.0 : 6.0) * (double)(rows * width),
           [&] { return us_head_loss_train(&args, 0); });
}

/* 256 M masters in matrices of 1024 columns. */
static void time_quant(void) {
  size_t rows = (size_t)1 << 18, n = rows * HIDDEN;
  noise value(n, 0.02f), grad(n, 0.01f);
  train_device<float> rounded(n), moment1(n), moment2(n), sum(8);
  train_device<uint16_t> compute(n);
  train_device<char> scratch(us_sum_squares_train_scratch());
  struct us_matrix_encoding encodings[] = {{US_FORMAT_BF16, US_SCALE_MSE, US_FP8_SCALE_F32, 0},
                                           {US_FORMAT_MXFP4, US_SCALE_MSE, US_FP8_SCALE_F32, 0},
                                           {US_FORMAT_MXFP4, US_SCALE_FLOOR, US_FP8_SCALE_F32, 0},
                                           {US_FORMAT_FP8, US_SCALE_MSE, US_FP8_SCALE_F32, 0}};
  const char *names[] = {"bf16", "mxfp4 mse", "mxfp4 floor", "fp8"};
  for (int i = 0; i < 4; i++) {
    std::vector<struct us_quant_tile> tiles(us_quant_train_tiles(&encodings[i], 0, rows, HIDDEN, NULL));
    us_quant_train_tiles(&encodings[i], 0, rows, HIDDEN, tiles.data());
    train_device<struct us_quant_tile> d_tiles(tiles);
    struct us_quant_train quant = {d_tiles.at, tiles.size(), value.at, rounded.at, compute.at, NULL, NULL, 0};
    time_run("masters to rounded and compute", names[i], 10.0 * (double)n,
             [&] { return us_quant_train(&quant, 0); });
  }
  time_run("sum of squares", "f32", 4.0 * (double)n,
           [&] { return us_sum_squares_train(n, value.at, (double *)sum.at, scratch.at, 0); });
  time_run("first value not finite", "f32", 4.0 * (double)n,
           [&] { return us_nonfinite_train(n, value.at, (uint64_t *)(sum.at + 2), 0); });
  std::vector<struct us_adamw_span> spans;
  for (size_t at = 0; at < n; at += US_ADAMW_SPAN) spans.push_back({at, US_ADAMW_SPAN, 1.0f, 0.1});
  train_device<struct us_adamw_span> d_spans(spans);
  struct us_adamw_train adamw = {d_spans.at, spans.size(), value.at, grad.at, moment1.at, moment2.at,
                                 3,          1e-5,         0.9,      0.95,    1e-8,       NULL};
  time_run("adamw", "f32", 28.0 * (double)n, [&] { return us_adamw_train(&adamw, 0); });
}

void train_rows_time(void) {
  if (us_gpu_patience()) return;
  time_copy();
  time_norm();
  time_heads();
  time_rope();
  time_swiglu();
  time_embed();
  time_loss(512, VOCABULARY, false, "head loss, 512 x 16 K in L2");
  time_loss(8192, VOCABULARY, false, "head loss, 8 K x 16 K");
  time_loss(4096, VOCABULARY, true, "head loss, 4 K x 16 K");
  time_loss(8192, 8192, true, "head loss, 8 K x 8 K");
  time_loss(2048, 152576, false, "head loss, 2 K x 152 K");
  time_quant();
}
