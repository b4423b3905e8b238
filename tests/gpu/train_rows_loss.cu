/* train_rows_loss.cu: softmax, loss and gradient of the logits against the formula in double and against us_head_loss.
 *
 * Bounds. The exponential errs by 2 ulp of its value and |x - max| u, as x - max does, so a sum of exponentials by (2 spread + 6) u
 * of itself, with spread the mean of |x - max| (sums are FP64 over FP32 sums of four), and a probability by (2 |x - max| + 2
 * spread + 12) u. The gradient has two roundings and that of bf16, b = 2^-8, more. A KL term is rounded twice before it is added.
 */
#include "train_values.h"
#include "train_rows.h"

#include "kernels/head_loss/head_loss_train.h"

#define U 0x1p-24
#define B 0x1p-8

struct loss_case {
  size_t rows, N;
  bool kl, in_place;
};

struct loss_data {
  std::vector<float> logits, teacher, weight;
  std::vector<int32_t> label;
  float scale;
};

struct loss_truth {
  std::vector<double> loss, loss_bound, logprob, dlogits, dlogits_bound;
  std::vector<uint8_t> hit;
  double total, total_bound;
  uint64_t counted;
};

static struct loss_data make_data(const struct loss_case &c) {
  struct loss_data d = {
      train_normal(c.rows * c.N, 20, 3.0f), train_normal(c.rows * c.N, 21, 3.0f), {}, {}, 0.37f};
  uint64_t state = train_seed() + 22;
  for (size_t r = 0; r < c.rows; r++) {
    uint64_t word = lab_random(&state);
    d.label.push_back(word % 5 == 0 ? -1 : (int32_t)((word >> 32) % c.N));
    d.weight.push_back(word % 7 == 0 ? 0.0f : (float)(word >> 40) * 0x1p-24f + 0.5f);
    if (d.label[r] < 0) continue;
    float *x = &d.logits[r * c.N];
    if (word % 3 == 0) x[d.label[r]] = 30.0f;                     /* a hit */
    if (word % 9 == 0) x[(size_t)(d.label[r] + 5) % c.N] = 30.0f; /* a tie: lost or won by its side */
  }
  return d;
}

struct distribution {
  double max, log_sum, spread; /* spread: mean distance from the largest logit */
};

static struct distribution distribution_of(const float *x, size_t N) {
  struct distribution d = {x[0], 0, 0};
  double sum = 0, distance = 0;
  for (size_t k = 1; k < N; k++) d.max = fmax(d.max, x[k]);
  for (size_t k = 0; k < N; k++) {
    double e = exp((double)x[k] - d.max);
    sum += e;
    distance += e * (d.max - (double)x[k]);
  }
  d.log_sum = d.max + log(sum);
  d.spread = distance / sum;
  return d;
}

/* What a probability errs by. */
static double probability_bound(const struct distribution &d, double x, double p) {
  return p * (2 * (d.max - x) + 2 * d.spread + 12) * U;
}

static void row_truth(const struct loss_case &c, const struct loss_data &d, size_t r, int label_shift,
                      struct loss_truth *t) {
  const float *x = &d.logits[r * c.N], *y = &d.teacher[r * c.N];
  int32_t label = d.label[r] < 0 ? -1 : (int32_t)((size_t)(d.label[r] + label_shift) % c.N);
  struct distribution s = distribution_of(x, c.N), u = distribution_of(y, c.N);
  double loss = 0, bound = 0;
  bool counts = d.weight[r] != 0.0f && (c.kl || label >= 0);
  double scale = counts ? (double)d.weight[r] * (double)d.scale : 0.0;
  size_t best = 0;
  for (size_t k = 1; k < c.N; k++) best = x[k] > x[best] ? k : best;
  for (size_t k = 0; k < c.N; k++) {
    double p = exp(x[k] - s.log_sum), q = c.kl ? exp(y[k] - u.log_sum) : (double)((int32_t)k == label);
    double p_bound = probability_bound(s, x[k], p), q_bound = c.kl ? probability_bound(u, y[k], q) : 0.0;
    double gradient = scale * (p - q);
    t->dlogits.push_back(gradient);
    t->dlogits_bound.push_back(scale * (p_bound + q_bound + (p + q) * 2 * U) + fabs(gradient) * B);
    if (!c.kl) continue;
    double term = y[k] - x[k] + s.log_sum - u.log_sum;
    loss += q * term;
    bound += q_bound * fabs(term) + q * 4 * U * (u.max - y[k] + s.max - x[k]);
  }
  if (!c.kl) loss = s.log_sum - (label < 0 ? 0.0 : (double)x[label]);
  bound += (2 * s.spread + (c.kl ? 2 * u.spread + 12 : 0.0) + 12) * U; /* the log sums */
  t->loss.push_back(counts ? loss : 0.0);
  t->loss_bound.push_back(counts ? bound + fabs(loss) * U : 1e-300);
  t->logprob.push_back(label < 0 ? 0.0 : (double)x[label] - s.log_sum);
  t->hit.push_back(label >= 0 && best == (size_t)label);
  t->total += t->loss.back() * (double)d.weight[r] * (double)d.scale;
  t->total_bound += t->loss_bound.back() * (double)d.weight[r] * (double)d.scale;
  t->counted += counts;
}

static struct loss_truth loss_oracle(const struct loss_case &c, const struct loss_data &d, int label_shift) {
  struct loss_truth t = {};
  for (size_t r = 0; r < c.rows; r++) row_truth(c, d, r, label_shift, &t);
  return t;
}

static void check_loss(const struct loss_case &c) {
  struct loss_data d = make_data(c);
  struct loss_truth truth = loss_oracle(c, d, 0), wrong = loss_oracle(c, d, 1);
  size_t n = c.rows * c.N;
  train_device<float> logits(d.logits), teacher(d.teacher), weight(d.weight), loss(c.rows), logprob(c.rows);
  train_device<int32_t> label(d.label);
  train_device<uint16_t> apart(n);
  train_device<uint8_t> hit(c.rows);
  train_device<double> total(1);
  train_device<uint64_t> counted(1);
  train_device<char> scratch(us_head_loss_train_scratch(c.rows));
  struct us_head_loss_train args = {};
  args.rows = c.rows, args.N = c.N, args.logits = logits.at, args.stride = c.N, args.label = label.at;
  args.weight = weight.at, args.scale = d.scale;
  if (c.kl) args.opt_teacher = teacher.at, args.teacher_stride = c.N;
  args.opt_dlogits = c.in_place ? (uint16_t *)logits.at : apart.at;
  args.dlogits_stride = c.in_place ? 2 * c.N : c.N;
  args.opt_row_loss = loss.at, args.opt_row_logprob = logprob.at, args.opt_row_hit = hit.at;
  args.opt_total = total.at, args.opt_counted = counted.at, args.scratch = scratch.at;
  US_CUDA((cudaError_t)us_head_loss_train(&args, 0));
  std::vector<float> memory = logits.host();
  std::vector<uint16_t> gradient = apart.host();
  if (c.in_place)
    for (size_t r = 0; r < c.rows; r++) memcpy(&gradient[r * c.N], &memory[r * c.N], c.N * 2);
  char shape[64];
  snprintf(shape, sizeof shape, "%zu x %zu%s", c.rows, c.N, c.in_place ? ", in place" : "");
  struct lab_result slopes = {"head loss: dlogits", shape, c.kl ? "KL" : "CE"},
                    values = {"head loss: rows", shape, c.kl ? "KL" : "CE"};
  for (double &b : truth.dlogits_bound) b += 1e-300;
  train_compare(&slopes, gradient, truth.dlogits, truth.dlogits_bound);
  train_compare(&values, loss.host(), truth.loss, truth.loss_bound);
  std::vector<double> logprob_bound;
  for (double v : truth.logprob) logprob_bound.push_back((fabs(v) + 90) * U);
  train_compare(&values, logprob.host(), truth.logprob, logprob_bound);
  train_compare(&values, total.host(), {truth.total}, {truth.total_bound});
  train_mutation(&values, "the next label", logprob.host(), wrong.logprob, logprob_bound);
  if (!c.kl) { /* the columns of the labels, which the mutation moves */
    std::vector<double> ratios;
    for (size_t i = 0; i < n; i++)
      if (truth.dlogits[i] < 0)
        ratios.push_back(fabs(train_value(gradient[i]) - wrong.dlogits[i]) / truth.dlogits_bound[i]);
    lab_mutation(&slopes, "the next label", ratios);
  } else {
    std::vector<double> swapped;
    for (double v : truth.dlogits) swapped.push_back(-v);
    train_mutation(&slopes, "teacher and student swapped", gradient, swapped, truth.dlogits_bound);
  }
  lab_report(&slopes);
  lab_report(&values);
  train_same("head loss: hits, ties to the lowest id", truth.hit, hit.host());
  train_same("head loss: counted rows", std::vector<uint64_t>{truth.counted}, counted.host());
  std::vector<double> once = total.host();
  total.set({0.0});
  logits.set(d.logits);
  US_CUDA((cudaError_t)us_head_loss_train(&args, 0));
  train_same("head loss: the same bits again", once, total.host());
}

/* The CPU's operation on logits that a product with the identity makes: rows and totals agree within the bounds above. */
static void check_against_cpu(void) {
  struct loss_case c = {64, 256, false, false};
  struct loss_data d = make_data(c);
  struct loss_truth truth = loss_oracle(c, d, 0);
  std::vector<float> identity(c.N * c.N), dx(c.rows * c.N), row_loss(c.rows);
  for (size_t k = 0; k < c.N; k++) identity[k * c.N + k] = 1.0f;
  struct us_head_loss loss = {};
  loss.R = c.rows, loss.D = loss.N = c.N, loss.x = d.logits.data(), loss.head = identity.data();
  loss.label = d.label.data(), loss.weight = d.weight.data(), loss.scale = d.scale;
  loss.dx = dx.data(), loss.row_loss = row_loss.data();
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  us_head_loss(&seq, &loss);
  us_seq_release(&seq);
  struct lab_result r = {"head loss: us_head_loss against the same oracle", "64 x 256", "CE"};
  for (double &b : truth.dlogits_bound) b += 1e-300;
  train_compare(&r, dx, truth.dlogits, truth.dlogits_bound);
  train_compare(&r, row_loss, truth.loss, truth.loss_bound);
  lab_report(&r);
}

void train_rows_loss(void) {
  check_against_cpu();
  for (bool kl : {false, true})
    for (size_t N : {(size_t)512, (size_t)8192, (size_t)16384, (size_t)32000, (size_t)40000})
      check_loss({37, N, kl, N != 8192});
}
