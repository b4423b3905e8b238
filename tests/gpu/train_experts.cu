/* train_experts.cu: experts and router of CUDA training against the CPU's functions and double references, and their speeds.
 *
 *     train_experts            checks, then times
 *     train_experts check      checks alone
 *
 * Here: the rows between the products, SwiGLU, and a whole layer. train_grouped.cu: the products. train_router.cu: router and plan.
 * train_experts_speed.cu: times. Mistakes that must be seen are made in the reference.
 */
#include "train_experts.h"
#include "train_experts_cpu.h"
#include "kernels/experts/experts_train.h"
#include "kernels/experts/grouped_gemm.h"

struct layer_sizes {
  uint32_t R, D, F, E, K;
};

/* A layer's plan, made by the CPU. */
struct layer_plan {
  std::vector<uint32_t> id, start, row, slot, pair;
  explicit layer_plan(const struct layer_sizes &z)
      : id(random_ids(z.R, z.E, z.K, 1, z.R + 1)), start(z.E + 1), row(id.size()), slot(id.size()),
        pair(id.size()) {
    struct us_experts_rows ex = {z.R, z.D, z.F, z.E, z.K, NULL, NULL};
    struct us_experts_plan plan = {start.data(), row.data(), slot.data()};
    us_experts_sort(&ex, id.data(), &plan);
    for (uint32_t i = 0; i < id.size(); i++) pair[slot[i]] = i;
  }
};

static std::string size_name(const struct layer_sizes &z) {
  return "D " + std::to_string(z.D) + " F " + std::to_string(z.F) + " K " + std::to_string(z.K);
}

/* --- rows to slots and back: the CPU's bits --- */

static void test_rows(const struct layer_sizes &z) {
  layer_plan plan(z);
  const size_t S = plan.id.size(), D = z.D;
  std::vector<uint16_t> x = random_halves(z.R * D, 11), y = random_halves(S * D, 12);
  std::vector<float> wide = random_floats(z.R * D, 13), weight = random_floats(S, 14),
                     in = random_floats(z.R * D, 15);
  device_array<uint32_t> slot(plan.slot);
  device_array<uint16_t> d_x(x), d_y(y), out(S * D);
  device_array<float> d_wide(wide), d_weight(weight), residual(in), dnorm(z.R * D);
  struct us_experts_train_rows rows = {z.R, z.D, z.K, slot.at};
  std::string name = size_name(z);
  std::vector<uint16_t> expected(S * D);
  for (size_t s = 0; s < S; s++) std::copy_n(&x[plan.row[s] * D], D, &expected[s * D]);
  US_CUDA((cudaError_t)us_experts_train_scatter(&rows, d_x.at, out.at, 0));
  report_same("scatter " + name, expected, out.get());
  for (size_t i = 0; i < S * D; i++) expected[i] = us_bf16_from_f32(wide[plan.row[i / D] * D + i % D]);
  US_CUDA((cudaError_t)us_experts_train_scatter_grad(&rows, d_wide.at, out.at, 0));
  report_same("scatter_grad " + name, expected, out.get());
  std::vector<float> combined = in, gathered(z.R * D);
  for (size_t i = 0; i < z.R * D; i++) {
    float sum = 0, plain = 0;
    for (uint32_t k = 0; k < z.K; k++) {
      size_t pair = i / D * z.K + k;
      float part = us_bf16_to_f32(y[plan.slot[pair] * D + i % D]), product = weight[pair] * part;
      sum = k ? sum + product : product, plain = k ? plain + part : part;
    }
    combined[i] += sum, gathered[i] = plain;
  }
  US_CUDA((cudaError_t)us_experts_train_combine(&rows, d_weight.at, d_y.at, residual.at, residual.at, 0));
  report_same("combine in place " + name, combined, residual.get());
  US_CUDA((cudaError_t)us_experts_train_gather_grad(&rows, d_y.at, NULL, dnorm.at, 0));
  report_same("gather_grad " + name, gathered, dnorm.get());
}

/* --- SwiGLU --- */

static double silu(double gate) {
  return gate / (1 + std::exp(-gate));
}

/* The sigmoid's 2^-21 relative, three products, one rounding to bf16. */
#define SWIGLU_ERROR (ROUND_BF16 + 0x1p-19)

static void test_swiglu(const struct layer_sizes &z) {
  layer_plan plan(z);
  const size_t S = plan.id.size(), F = z.F;
  std::vector<uint16_t> h = random_halves(S * 2 * F, 21, 6.0f), da = random_halves(S * F, 22);
  std::vector<float> weight = random_floats(S, 23);
  h[3] = us_bf16_from_f32(-100.0f), h[4] = us_bf16_from_f32(100.0f);
  device_array<uint16_t> d_h(h), d_da(da), a(S * F);
  device_array<float> d_weight(weight), dweight(S);
  device_array<uint32_t> pair(plan.pair);
  US_CUDA((cudaError_t)us_experts_train_swiglu((uint32_t)S, z.F, d_h.at, a.at, 0));
  std::vector<uint16_t> got_a = a.get();
  struct us_experts_train_swiglu_grad g = {(uint32_t)S, z.F,     d_h.at, d_da.at,   d_weight.at,
                                           pair.at,     d_da.at, d_h.at, dweight.at};
  US_CUDA((cudaError_t)us_experts_train_swiglu_grad(&g, 0));
  std::vector<uint16_t> a_w = d_da.get(), dh = d_h.get();
  std::vector<float> got_dweight = dweight.get();
  struct bound_check forward, weighted, gates, ups, dots, unweighted, shifted;
  for (size_t s = 0; s < S; s++) {
    double w = weight[plan.pair[s]], dot = 0, magnitude = 0;
    for (size_t i = 0; i < F; i++) {
      double gate = us_bf16_to_f32(h[s * 2 * F + i]), up = us_bf16_to_f32(h[s * 2 * F + F + i]),
             d = us_bf16_to_f32(da[s * F + i]), sg = 1 / (1 + std::exp(-gate)), exact = silu(gate) * up,
             rounded = us_bf16_to_f32(got_a[s * F + i]), dgate = w * d * up * sg * (1 + gate * (1 - sg)),
             most = std::fabs(w * d * up * sg) * (1 + std::fabs(gate * (1 - sg)));
      forward.value(rounded, exact, std::fabs(exact) * SWIGLU_ERROR + 1e-38);
      weighted.value(us_bf16_to_f32(a_w[s * F + i]), w * rounded,
                     std::fabs(w * rounded) * SWIGLU_ERROR + 1e-38);
      unweighted.value(us_bf16_to_f32(a_w[s * F + i]), rounded, std::fabs(rounded) * SWIGLU_ERROR + 1e-38);
      gates.value(us_bf16_to_f32(dh[s * 2 * F + i]), dgate,
                  std::fabs(dgate) * ROUND_BF16 + most * 0x1p-19 + 1e-38);
      ups.value(us_bf16_to_f32(dh[s * 2 * F + F + i]), w * d * silu(gate),
                std::fabs(w * d * silu(gate)) * SWIGLU_ERROR + 1e-38);
      dot += rounded * d, magnitude += std::fabs(rounded * d);
    }
    double allowed = (F / 32 + 6) * ROUND_F32 * magnitude + 1e-38;
    dots.value(got_dweight[plan.pair[s]], dot, allowed);
    shifted.value(got_dweight[plan.pair[s ? s - 1 : 1]], dot, allowed);
  }
  std::string name = size_name(z);
  forward.report("swiglu " + name);
  weighted.report("swiglu_grad a_w in place " + name);
  gates.report("swiglu_grad dgate in place " + name);
  ups.report("swiglu_grad dup in place " + name);
  dots.report("swiglu_grad dweight " + name);
  unweighted.report_mutation("a weight dropped " + name);
  shifted.report_mutation("dweight of the slot before " + name);
}

/* --- a whole layer --- */

struct layer_values {
  std::vector<float> y, dx, dweight, dgate_up, ddown;
};

static struct layer_values run_cpu(const struct layer_sizes &z, const layer_plan &plan,
                                   const std::vector<uint16_t> &x, const std::vector<uint16_t> &w,
                                   const std::vector<float> &weight, const std::vector<float> &dy) {
  const size_t S = plan.id.size(), N = 2 * z.F * (size_t)z.D, each = N + z.F * (size_t)z.D;
  std::vector<float> wide_x = widen(x), wide_w = widen(w), saved_x(S * z.D), saved_h(S * 2 * z.F),
                     saved_a(S * z.F);
  struct layer_values v = {std::vector<float>(z.R * (size_t)z.D), std::vector<float>(z.R * (size_t)z.D),
                           std::vector<float>(S), std::vector<float>(z.E * N),
                           std::vector<float>(z.E * (each - N))};
  std::vector<const float *> gate_up(z.E), down(z.E);
  std::vector<float *> dgate_up(z.E), ddown(z.E);
  for (uint32_t e = 0; e < z.E; e++) {
    gate_up[e] = &wide_w[e * each], down[e] = &wide_w[e * each + N];
    dgate_up[e] = &v.dgate_up[e * N], ddown[e] = &v.ddown[e * (each - N)];
  }
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  struct us_experts_rows ex = {z.R, z.D, z.F, z.E, z.K, gate_up.data(), down.data()};
  struct us_experts_plan p = {(uint32_t *)plan.start.data(), (uint32_t *)plan.row.data(),
                              (uint32_t *)plan.slot.data()};
  struct us_experts_saved saved = {saved_x.data(), saved_h.data(), saved_a.data()};
  struct us_experts_grads grads = {dgate_up.data(), ddown.data()};
  us_experts_seq(&seq, &ex, &p, wide_x.data(), weight.data(), &saved, v.y.data());
  us_experts_grad(&seq, &ex, &p, weight.data(), &saved, dy.data(), v.dx.data(), v.dweight.data(), &grads);
  us_seq_release(&seq);
  return v;
}

static struct layer_values run_gpu(const struct layer_sizes &z, const layer_plan &p,
                                   const std::vector<uint16_t> &x, const std::vector<uint16_t> &w,
                                   const std::vector<float> &weight, const std::vector<float> &dy) {
  const uint32_t S = (uint32_t)p.id.size(), N = 2 * z.F;
  const uint64_t each = 3 * (uint64_t)z.F * z.D, first_down = 2 * (uint64_t)z.F * z.D;
  device_array<uint32_t> start(p.start), slot(p.slot), pair(p.pair);
  device_array<uint16_t> d_x(x), d_w(w), x_slot(S * (size_t)z.D), h(S * (size_t)N), a(S * (size_t)z.F),
      y_slot(S * (size_t)z.D), da(S * (size_t)z.F);
  device_array<float> d_weight(weight), d_dy(dy), y(std::vector<float>(z.R * (size_t)z.D)), dweight(S),
      dnorm(z.R * (size_t)z.D), dw(std::vector<float>(w.size()));
  struct us_experts_train_rows rows = {z.R, z.D, z.K, slot.at};
  struct us_grouped gate_up = {start.at, z.E, S, N, z.D, 0, 0, US_GROUPED_CHOSEN},
                    down = {start.at, z.E, S, z.D, z.F, 0, 0, US_GROUPED_CHOSEN};
  struct us_experts_train_swiglu_grad g = {S,       z.F,   h.at, da.at,     d_weight.at,
                                           pair.at, da.at, h.at, dweight.at};
  int status = us_experts_train_scatter(&rows, d_x.at, x_slot.at, 0);
  status |= us_grouped_forward(&gate_up, x_slot.at, d_w.at, each, h.at, 0);
  status |= us_experts_train_swiglu(S, z.F, h.at, a.at, 0);
  status |= us_grouped_forward(&down, a.at, d_w.at + first_down, each, y_slot.at, 0);
  status |= us_experts_train_combine(&rows, d_weight.at, y_slot.at, y.at, y.at, 0);
  status |= us_experts_train_scatter_grad(&rows, d_dy.at, y_slot.at, 0);
  status |= us_grouped_grad_x(&down, y_slot.at, d_w.at + first_down, each, da.at, 0);
  status |= us_experts_train_swiglu_grad(&g, 0);
  status |= us_grouped_grad_w(&down, y_slot.at, da.at, dw.at + first_down, each, 0);
  status |= us_grouped_grad_w(&gate_up, h.at, x_slot.at, dw.at, each, 0);
  status |= us_grouped_grad_x(&gate_up, h.at, d_w.at, each, y_slot.at, 0);
  status |= us_experts_train_gather_grad(&rows, y_slot.at, NULL, dnorm.at, 0);
  US_CUDA((cudaError_t)status);
  struct layer_values v = {y.get(), dnorm.get(), dweight.get(), {}, {}};
  std::vector<float> grad = dw.get();
  for (uint32_t e = 0; e < z.E; e++) {
    v.dgate_up.insert(v.dgate_up.end(), &grad[e * each], &grad[e * each] + first_down);
    v.ddown.insert(v.ddown.end(), &grad[e * each] + first_down, &grad[e * each] + each);
  }
  return v;
}

static double norm_apart(const std::vector<float> &a, const std::vector<float> &b) {
  double apart = 0, all = 0;
  for (size_t i = 0; i < a.size(); i++)
    apart += ((double)a[i] - b[i]) * ((double)a[i] - b[i]), all += (double)a[i] * a[i];
  return std::sqrt(apart / all);
}

/* A value went through at most `roundings` roundings to bf16 (2^-8 each at most, so in the norm too) that the CPU does not make. */
static void report_norm(const std::string &name, const std::vector<float> &cpu, const std::vector<float> &gpu,
                        int roundings) {
  double apart = norm_apart(cpu, gpu);
  us_gpu_report((name + ", apart " + std::to_string(apart)).c_str(), cpu.size(),
                !(apart <= roundings * ROUND_BF16), 0);
}

static void test_layer(const struct layer_sizes &z) {
  layer_plan plan(z);
  const size_t each = 3 * (size_t)z.F * z.D;
  std::vector<uint16_t> x = random_halves(z.R * (size_t)z.D, 31),
                        w = random_halves(z.E * each, 32, 2 / std::sqrt((float)z.D));
  std::vector<float> weight = random_floats(plan.id.size(), 33), dy = random_floats(z.R * (size_t)z.D, 34);
  struct layer_values cpu = run_cpu(z, plan, x, w, weight, dy), gpu = run_gpu(z, plan, x, w, weight, dy),
                      again = run_gpu(z, plan, x, w, weight, dy);
  std::string name = "layer " + size_name(z);
  report_norm(name + " y", cpu.y, gpu.y, 3);                   /* gate_up, a, y_slot */
  report_norm(name + " dweight", cpu.dweight, gpu.dweight, 4); /* gate_up, a, dy_slot, da */
  report_norm(name + " dx", cpu.dx, gpu.dx, 5);                /* dy_slot, da, gate_up, dgate_up, dx_slot */
  report_norm(name + " dgate_up", cpu.dgate_up, gpu.dgate_up, 4);
  report_norm(name + " ddown", cpu.ddown, gpu.ddown, 4);
  report_same(name + " y again", gpu.y, again.y);
  report_same(name + " dx again", gpu.dx, again.dx);
  report_same(name + " dweight again", gpu.dweight, again.dweight);
  report_same(name + " dgate_up again", gpu.dgate_up, again.dgate_up);
  report_same(name + " ddown again", gpu.ddown, again.ddown);
  std::vector<float> dropped = weight;
  for (size_t i = 0; i < dropped.size(); i += z.K) dropped[i] = 0;
  struct layer_values mistake = run_cpu(z, plan, x, w, dropped, dy);
  us_gpu_report(("seen: a row's first weight dropped, y, " + name).c_str(), 1,
                norm_apart(mistake.y, gpu.y) < 3 * ROUND_BF16, 0);
  us_gpu_report(("seen: a row's first weight dropped, dx, " + name).c_str(), 1,
                norm_apart(mistake.dx, gpu.dx) < 5 * ROUND_BF16, 0);
  std::vector<uint16_t> swapped = w;
  std::swap_ranges(swapped.begin(), swapped.begin() + each, swapped.begin() + 2 * each); /* experts 0 and 2 */
  mistake = run_cpu(z, plan, x, swapped, weight, dy);
  us_gpu_report(("seen: two experts swapped, " + name).c_str(), 1,
                norm_apart(mistake.y, gpu.y) < 3 * ROUND_BF16, 0);
}

void test_experts_rows(void) {
  for (struct layer_sizes z :
       {layer_sizes{301, 320, 128, 16, 2}, {150, 64, 48, 20, 9}, {64, 1024, 328, 64, 8}})
    test_rows(z), test_swiglu(z);
}

void test_experts_layer(void) {
  test_layer({301, 320, 128, 16, 2});
  test_layer({200, 256, 96, 12, 4});
}

int main(int argc, char **argv) {
  bool check = argc < 2 || !strcmp(argv[1], "check"), speed = argc < 2 || !strcmp(argv[1], "speed");
  us_gpu_begin();
  us_gpu_watchdog(100);
  if (check) {
    test_grouped();
    test_experts_rows();
    test_router();
    test_experts_layer();
  }
  if (speed) {
    time_rows();
    time_grouped();
  }
  return us_gpu_status();
}
