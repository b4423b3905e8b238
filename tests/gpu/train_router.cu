/* train_router.cu: the router on the GPU against kernels/router/router_grad.c: the same bits where logits are exact, derived bounds
 * elsewhere; the plan against kernels/experts/experts_grad.c.
 */
#include "train_experts.h"
#include "train_experts_cpu.h"
#include "kernels/experts/experts_train.h"
#include "kernels/router/router_train.h"

struct router_sizes {
  uint32_t R, D, E, K;
  bool normalise;
  const std::vector<uint32_t> *opt_chosen = NULL; /* (R, K) */
};

struct routed {
  std::vector<float> scores, weight;
  std::vector<uint32_t> id;
};

static struct routed run_gpu(const struct router_sizes &z, const std::vector<uint16_t> &x,
                             const std::vector<float> &w, const std::vector<float> &bias) {
  device_array<uint16_t> d_x(x);
  device_array<float> d_w(w), d_bias(bias), scores((size_t)z.R * z.E), weight((size_t)z.R * z.K);
  device_array<uint32_t> id((size_t)z.R * z.K);
  device_array<uint8_t> scratch(us_router_train_scratch(z.R, z.D, z.E));
  device_array<uint32_t> chosen(z.opt_chosen ? *z.opt_chosen : std::vector<uint32_t>(1));
  struct us_router_train r = {
      z.R,    z.D,       z.E,       z.K,   z.normalise, 1.5f,       d_x.at,
      d_w.at, d_bias.at, scores.at, id.at, weight.at,   scratch.at, z.opt_chosen ? chosen.at : NULL};
  US_CUDA((cudaError_t)us_router_train(&r, 0));
  return {scores.get(), weight.get(), id.get()};
}

static struct routed run_cpu(const struct router_sizes &z, const std::vector<uint16_t> &x,
                             const std::vector<float> &w, const std::vector<float> &bias) {
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct us_router_rows rows = {
      z.R, z.D, z.E, z.K, z.normalise, 1.5f, z.opt_chosen ? z.opt_chosen->data() : NULL};
  struct routed out = {std::vector<float>((size_t)z.R * z.E), std::vector<float>((size_t)z.R * z.K),
                       std::vector<uint32_t>((size_t)z.R * z.K)};
  std::vector<float> wide = widen(x);
  us_router_seq(&seq, &rows, wide.data(), w.data(), bias.data(), out.scores.data(), out.id.data(),
                out.weight.data());
  us_seq_release(&seq);
  return out;
}

/* --- choice --- */

/* w = identity and few distinct logits: products are exact, ties are many, so everything must be the CPU's bits. */
static void test_choice(uint32_t E, uint32_t K, bool normalise) {
  struct router_sizes z = {777, (E + 15) / 16 * 16, E, K, normalise};
  random_stream random = {E};
  std::vector<uint16_t> x((size_t)z.R * z.D);
  for (uint16_t &v : x) v = us_bf16_from_f32((float)(int)random.below(9) * 0.25f - 1);
  std::vector<float> w((size_t)E * z.D), bias(E);
  for (uint32_t e = 0; e < E; e++) w[(size_t)e * z.D + e] = 1, bias[e] = 0.125f * (float)random.below(2);
  x[5 * (size_t)z.D + 1] = 0x7fc0; /* a NaN score */
  struct routed gpu = run_gpu(z, x, w, bias), cpu = run_cpu(z, x, w, bias);
  /* a row with NaN: all its logits are NaN, K lowest ids */
  std::string name = "E " + std::to_string(E) + " K " + std::to_string(K);
  uint64_t apart = 0;
  for (size_t i = 0; i < cpu.scores.size(); i++)
    apart += i / E != 5 && memcmp(&gpu.scores[i], &cpu.scores[i], 4) != 0;
  us_gpu_report(("router scores, exact logits " + name).c_str(), cpu.scores.size(), apart, 0);
  report_same("router ids with ties " + name, cpu.id, gpu.id);
  apart = 0;
  for (size_t i = 0; i < cpu.weight.size(); i++)
    apart += i / K != 5 && memcmp(&gpu.weight[i], &cpu.weight[i], 4) != 0;
  us_gpu_report(("router weights " + name).c_str(), cpu.weight.size(), apart, 0);
  uint64_t upwards = 0; /* ties broken towards higher ids */
  for (uint32_t r = 0; r < z.R; r++) {
    std::vector<uint32_t> order(E);
    for (uint32_t e = 0; e < E; e++) order[e] = E - 1 - e;
    const float *score = &cpu.scores[(size_t)r * E];
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return score[a] + bias[a] > score[b] + bias[b]; });
    std::sort(order.begin(), order.begin() + K);
    upwards += !std::equal(order.begin(), order.begin() + K, &gpu.id[(size_t)r * K]);
  }
  us_gpu_report(("seen: ties broken upwards " + name).c_str(), z.R, upwards < z.R / 10, 0);
}

/* Experts that somebody else chose: exact logits again, so the CPU's bits. */
static void test_chosen(uint32_t E, uint32_t K) {
  std::vector<uint32_t> chosen(300 * (size_t)K);
  random_stream random = {E};
  for (size_t r = 0; r < 300; r++) { /* ascending, distinct */
    uint32_t first = random.below(E - K + 1);
    for (uint32_t k = 0; k < K; k++) chosen[r * K + k] = first + k;
  }
  struct router_sizes z = {300, (E + 15) / 16 * 16, E, K, true, &chosen};
  std::vector<uint16_t> x((size_t)z.R * z.D);
  for (uint16_t &v : x) v = us_bf16_from_f32((float)(int)random.below(9) * 0.25f - 1);
  std::vector<float> w((size_t)E * z.D), bias(E, 0.0f);
  for (uint32_t e = 0; e < E; e++) w[(size_t)e * z.D + e] = 1;
  struct routed gpu = run_gpu(z, x, w, bias), cpu = run_cpu(z, x, w, bias);
  report_same("router ids chosen elsewhere", chosen, gpu.id);
  report_same("router ids chosen elsewhere, CPU", chosen, cpu.id);
  report_same("their weights", cpu.weight, gpu.weight);
}

/* --- logits --- */

/* |sigmoid'| <= 1/4. The tensor cores take three passes of D / 16 steps; sigmoid itself is good to a few units. */
static void test_scores(const struct router_sizes &z) {
  std::vector<uint16_t> x = random_halves((size_t)z.R * z.D, 5);
  std::vector<float> w = random_floats((size_t)z.E * z.D, 6, 4 / std::sqrt((float)z.D)), bias(z.E);
  struct routed gpu = run_gpu(z, x, w, bias), again = run_gpu(z, x, w, bias);
  struct bound_check check, dropped;
  uint64_t wrong = 0, clear = 0;
  for (uint32_t r = 0; r < z.R; r++) {
    std::vector<double> score(z.E), allowed(z.E);
    for (uint32_t e = 0; e < z.E; e++) {
      double logit = 0, magnitude = 0, high = 0;
      for (uint32_t k = 0; k < z.D; k++) {
        double product = (double)us_bf16_to_f32(x[(size_t)r * z.D + k]) * w[(size_t)e * z.D + k];
        logit += product, magnitude += std::fabs(product);
        high += (double)us_bf16_to_f32(x[(size_t)r * z.D + k]) * us_bf16_round(w[(size_t)e * z.D + k]);
      }
      score[e] = 1 / (1 + std::exp(-logit));
      allowed[e] = (z.D / 16 + 3) * ROUND_TENSOR * magnitude / 4 + 8 * ROUND_F32;
      check.value(gpu.scores[(size_t)r * z.E + e], score[e], allowed[e]);
      dropped.value(gpu.scores[(size_t)r * z.E + e], 1 / (1 + std::exp(-high)), allowed[e]);
    }
    std::vector<uint32_t> order(z.E);
    for (uint32_t e = 0; e < z.E; e++) order[e] = e;
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return score[a] > score[b]; });
    if (z.K < z.E &&
        score[order[z.K - 1]] - score[order[z.K]] < 2 * (allowed[order[z.K - 1]] + allowed[order[z.K]]))
      continue; /* either may be chosen */
    std::sort(order.begin(), order.begin() + z.K);
    wrong += !std::equal(order.begin(), order.begin() + z.K, &gpu.id[(size_t)r * z.K]), clear++;
  }
  std::string name = "E " + std::to_string(z.E) + " D " + std::to_string(z.D);
  check.report("router scores " + name);
  dropped.report_mutation("router weights rounded to bf16 " + name);
  us_gpu_report(("router ids where the choice is clear, " + name).c_str(), clear, wrong, 0);
  report_same("router scores again " + name, gpu.scores, again.scores);
}

/* --- plan --- */

struct gpu_plan {
  device_array<uint32_t> id, start, row, pair, slot;
  device_array<uint64_t> load;
  device_array<uint8_t> scratch;
  gpu_plan(const std::vector<uint32_t> &ids, uint32_t R, uint32_t E, uint32_t K)
      : id(ids), start(E + 1), row(ids.size()), pair(ids.size()), slot(ids.size()),
        load(std::vector<uint64_t>(E, 7)), scratch(us_experts_train_plan_scratch(R, E)) {
    struct us_experts_train_plan p = {R,      E,       K,       id.at,   start.at,
                                      row.at, pair.at, slot.at, load.at, scratch.at};
    US_CUDA((cudaError_t)us_experts_train_plan(&p, 0));
  }
};

static void test_plan(uint32_t R, uint32_t E, uint32_t K) {
  std::vector<uint32_t> id = random_ids(R, E, K, E > 3 ? 3 : E, R);
  gpu_plan plan(id, R, E, K);
  std::vector<uint32_t> start(E + 1), row(id.size()), slot(id.size()), pair(id.size());
  struct us_experts_rows ex = {R, 0, 0, E, K, NULL, NULL};
  struct us_experts_plan cpu = {start.data(), row.data(), slot.data()};
  us_experts_sort(&ex, id.data(), &cpu);
  std::vector<uint64_t> load(E, 7);
  us_router_load(id.data(), id.size(), E, load.data());
  for (uint32_t i = 0; i < id.size(); i++) pair[slot[i]] = i;
  std::string name = std::to_string(R) + " rows of " + std::to_string(E);
  report_same("plan start, " + name, start, plan.start.get());
  report_same("plan row, " + name, row, plan.row.get());
  report_same("plan slot, " + name, slot, plan.slot.get());
  report_same("plan pair, " + name, pair, plan.pair.get());
  report_same("plan load, " + name, load, plan.load.get());
}

/* --- gradient --- */

static void test_grad(const struct router_sizes &z) {
  std::vector<uint16_t> x = random_halves((size_t)z.R * z.D, 5);
  std::vector<float> w = random_floats((size_t)z.E * z.D, 6, 4 / std::sqrt((float)z.D)), bias(z.E),
                     wide = widen(x), dweight = random_floats((size_t)z.R * z.K, 7),
                     dw = random_floats(w.size(), 8);
  struct routed cpu = run_cpu(z, x, w, bias);
  gpu_plan plan(cpu.id, z.R, z.E, z.K);
  device_array<uint16_t> d_x(x), none(std::vector<uint16_t>((size_t)z.R * z.K * z.D));
  device_array<float> scores(cpu.scores), d_w(w), d_dweight(dweight), d_dw(dw), dlogit((size_t)z.R * z.K),
      dnorm((size_t)z.R * z.D);
  device_array<uint8_t> scratch(us_router_train_grad_scratch(z.D, z.E));
  struct us_router_train_grad g = {z.R,           z.D,          z.E,        z.K,          z.normalise,
                                   1.5f,          scores.at,    plan.id.at, d_dweight.at, d_x.at,
                                   plan.start.at, plan.pair.at, dlogit.at,  d_dw.at,      scratch.at};
  US_CUDA((cudaError_t)us_router_train_grad(&g, 0));
  struct us_experts_train_rows rows = {z.R, z.D, z.K, plan.slot.at};
  struct us_experts_train_router router = {dlogit.at, plan.id.at, d_w.at};
  US_CUDA((cudaError_t)us_experts_train_gather_grad(&rows, none.at, &router, dnorm.at, 0));
  std::vector<float> got_dlogit = dlogit.get(), got_dw = d_dw.get(), got_dx = dnorm.get(),
                     dlogits = cpu.scores, dx((size_t)z.R * z.D), own_dw = dw;
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct us_router_rows cpu_rows = {z.R, z.D, z.E, z.K, z.normalise, 1.5f, NULL};
  us_router_grad(&seq, &cpu_rows, wide.data(), w.data(), dlogits.data(), cpu.id.data(), dweight.data(),
                 nullptr, dx.data(), own_dw.data());
  us_seq_release(&seq);
  std::vector<float> chosen(got_dlogit.size());
  for (size_t i = 0; i < chosen.size(); i++) chosen[i] = dlogits[i / z.K * z.E + cpu.id[i]];
  std::string name = "E " + std::to_string(z.E) + " D " + std::to_string(z.D);
  report_same("router dlogit " + name, chosen, got_dlogit);
  std::vector<double> magnitude(w.size()), rows_of(z.E);
  struct bound_check check_x, check_w, dropped;
  for (uint32_t r = 0; r < z.R; r++)
    for (uint32_t c = 0; c < z.D; c++) {
      double sum = 0;
      for (uint32_t k = 0; k < z.K; k++) {
        uint32_t e = cpu.id[(size_t)r * z.K + k];
        double d = chosen[(size_t)r * z.K + k];
        sum += std::fabs(d * w[(size_t)e * z.D + c]);
        magnitude[(size_t)e * z.D + c] += std::fabs(d * wide[(size_t)r * z.D + c]);
        rows_of[e] += c == 0;
      }
      check_x.value(got_dx[(size_t)r * z.D + c], dx[(size_t)r * z.D + c],
                    (2 * z.K + 2) * ROUND_F32 * sum + 1e-30);
    }
  for (size_t i = 0; i < w.size(); i++) { /* both sum in FP32, each in its own order */
    double allowed =
        2 * (rows_of[i / z.D] + 2) * ROUND_F32 * magnitude[i] + 4 * ROUND_F32 * std::fabs(own_dw[i]) + 1e-30;
    check_w.value(got_dw[i], own_dw[i], allowed);
    dropped.value(got_dw[i], dw[i], allowed);
  }
  check_x.report("router dx " + name);
  check_w.report("router dw " + name);
  dropped.report_mutation("router dw without its sum " + name);
}

/* What every logit is taught, its sum with nothing else: the CPU's gradient of logits without one of weights. */
static void test_lesson(const struct router_sizes &z, bool theirs, float margin) {
  std::vector<uint16_t> x = random_halves((size_t)z.R * z.D, 5);
  std::vector<float> w = random_floats((size_t)z.E * z.D, 6, 2 / std::sqrt((float)z.D)),
                     bias = random_floats(z.E, 7, 0.2f), row_weight = random_floats(z.R, 8), teacher,
                     dweight((size_t)z.R * z.K), wide = widen(x), dx((size_t)z.R * z.D);
  struct routed cpu = run_cpu(z, x, w, bias);
  for (float score : cpu.scores) teacher.push_back(0.9f * score + 0.05f);
  device_array<float> scores(cpu.scores), d_teacher(teacher), d_bias(bias), d_weight(row_weight);
  device_array<uint32_t> id(cpu.id);
  device_array<uint16_t> dlogit((size_t)z.R * z.E);
  device_array<uint8_t> scratch(us_router_train_lesson_scratch(z.E));
  struct us_router_train_lesson lesson = {
      z.R,   z.E,         z.K,       scores.at, theirs ? d_teacher.at : NULL,
      0.25f, d_weight.at, 0.5f,      margin,    margin > 0 ? 0.75f : 0.0f,
      id.at, d_bias.at,   dlogit.at, scratch.at};
  US_CUDA((cudaError_t)us_router_train_lesson(&lesson, 0));
  struct us_router_teacher own = {theirs ? teacher.data() : NULL, 0.25f,      row_weight.data(), 0.5f, margin,
                                  margin > 0 ? 0.75f : 0.0f,      bias.data()};
  std::vector<float> logits = cpu.scores;
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct us_router_rows rows = {z.R, z.D, z.E, z.K, z.normalise, 1.5f, NULL};
  us_router_grad(&seq, &rows, wide.data(), w.data(), logits.data(), cpu.id.data(), dweight.data(), &own,
                 dx.data(), NULL);
  us_seq_release(&seq);
  struct bound_check check, dropped;
  std::vector<uint16_t> got = dlogit.get();
  for (size_t i = 0; i < got.size(); i++) {
    double allowed =
        ROUND_BF16 * std::fabs(logits[i]) + 1e-5; /* a push ends with a quotient of two differences of FP32 */
    check.value(us_bf16_to_f32(got[i]), logits[i], allowed);
    float other = theirs ? teacher[i] : 0.25f;
    dropped.value(us_bf16_to_f32(got[i]), 0.5f * row_weight[i / z.E] * (cpu.scores[i] - other), allowed);
  }
  std::string name = "router lesson E " + std::to_string(z.E) + (theirs ? ", theirs" : ", a target");
  check.report(name + (margin > 0 ? ", margin" : ""));
  if (margin > 0 && z.K < z.E) dropped.report_mutation(name + " without its margin");
}

void test_router(void) {
  test_choice(16, 2, true);
  test_choice(64, 8, true);
  test_choice(7, 3, false);
  test_choice(384, 8, true);
  test_chosen(64, 8);
  test_chosen(7, 7);
  test_scores({501, 320, 16, 2, true});
  test_scores({300, 1024, 64, 8, true});
  test_scores({200, 64, 200, 4, true});
  test_plan(1, 8, 2);
  test_plan(1000, 16, 2);
  test_plan(16384, 64, 8);
  test_plan(777, 1024, 8);
  test_plan(300, 4, 4 - 1);
  test_grad({501, 320, 16, 2, true});
  test_grad({1030, 1024, 64, 8, true});
  test_grad({200, 64, 200, 4, false});
  test_lesson({501, 320, 16, 2, true}, true, 0);
  test_lesson({501, 320, 16, 2, true}, false, 0.5f);
  test_lesson({300, 128, 200, 4, true}, true, 1);
  test_lesson({77, 64, 8, 8, true}, false, 1);
}
