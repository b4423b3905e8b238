/* t_grad_head_loss.c: cross-entropy and KL through the output head against the formulas in double. */
#include "kernels/head_loss/head_loss.h"
#include "gradcheck.h"

enum { R = 6, D = 4, N = 19, DT = 3 };
static const int32_t label[R] = {3, -1, 18, 0, 7, 7};
static const uint32_t teacher_row[R] = {2, 0, 1, 1, 3, 0};

struct head_case {
  double *x, *head, *weight, *teacher_x, *teacher_head;
  bool kl, gathered;
};

static void log_softmax(const double *x, const double *head, int width, double *out) {
  double sum = 0.0;
  for (int n = 0; n < N; n++) {
    out[n] = 0.0;
    for (int d = 0; d < width; d++) out[n] += x[d] * head[n * width + d];
    sum += exp(out[n]);
  }
  for (int n = 0; n < N; n++) out[n] -= log(sum);
}

static double row_loss(const struct head_case *c, int r) {
  double student[N], teacher[N], kl = 0.0;
  log_softmax(c->x + r * D, c->head, D, student);
  if (!c->kl) return label[r] < 0 ? 0.0 : -student[label[r]];
  log_softmax(c->teacher_x + (c->gathered ? teacher_row[r] : (uint32_t)r) * DT, c->teacher_head, DT, teacher);
  for (int n = 0; n < N; n++) kl += exp(teacher[n]) * (teacher[n] - student[n]);
  return kl;
}

static double loss(void *arg) {
  const struct head_case *c = arg;
  double sum = 0.0;
  for (int r = 0; r < R; r++) sum += c->weight[r] * row_loss(c, r) * 0.25;
  return sum;
}

static void check_case(bool kl, bool gathered) {
  struct head_case c = {gc_random(R * D, 1),
                        gc_random(N * D, 1),
                        gc_random(R, 1),
                        gc_random(R * DT, 1),
                        gc_random(N * DT, 1),
                        kl,
                        gathered};
  c.weight[3] = 0.0;
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  float *x = gc_float(c.x, R * D), *head = gc_float(c.head, N * D), *weight = gc_float(c.weight, R);
  float *dx = gc_zeros(R * D), *dhead = gc_zeros(N * D), each[R], logprob[R];
  uint8_t hit[R];
  struct us_head_teacher teacher = {.x = gc_float(c.teacher_x, R * DT),
                                    .D = DT,
                                    .head = gc_float(c.teacher_head, N * DT),
                                    .row = gathered ? teacher_row : NULL};
  struct us_head_loss h = {.R = R,
                           .D = D,
                           .N = N,
                           .x = x,
                           .head = head,
                           .label = label,
                           .weight = weight,
                           .teacher = kl ? &teacher : NULL,
                           .scale = 0.25f,
                           .dx = dx,
                           .dhead = dhead,
                           .row_loss = each,
                           .row_logprob = logprob,
                           .row_hit = hit};
  us_head_loss(&seq, &h);
  ck_assert_double_eq_tol(h.total, loss(&c), 1e-6);
  ck_assert_uint_eq(h.counted, kl ? R - 1 : R - 2);
  for (int r = 0; r < R; r++) {
    double student[N];
    int best = 0;
    log_softmax(c.x + r * D, c.head, D, student);
    for (int n = 1; n < N; n++) best = student[n] > student[best] ? n : best;
    if (r != 3) ck_assert_double_eq_tol((double)each[r], row_loss(&c, r), 2e-6);
    ck_assert_double_eq_tol((double)logprob[r], label[r] < 0 ? 0.0 : student[label[r]], 2e-6);
    ck_assert_int_eq(hit[r], best == label[r]);
  }
  gc_check("dx", loss, &c, c.x, R * D, dx, 3e-6);
  gc_check("dhead", loss, &c, c.head, N * D, dhead, 3e-6);
  us_seq_release(&seq);
}

START_TEST(cross_entropy) {
  check_case(false, false);
}
END_TEST

START_TEST(divergence_from_a_teacher) {
  check_case(true, false);
}
END_TEST

START_TEST(divergence_from_gathered_teacher_rows) {
  check_case(true, true);
}
END_TEST

START_TEST(equal_logits_have_no_divergence_and_no_gradient) {
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  float *x = gc_float(gc_random(R * D, 1), R * D), *head = gc_float(gc_random(N * D, 1), N * D),
        *dx = gc_zeros(R * D);
  struct us_head_teacher teacher = {.x = x, .D = D, .head = head};
  struct us_head_loss h = {
      .R = R, .D = D, .N = N, .x = x, .head = head, .teacher = &teacher, .scale = 1, .dx = dx};
  us_head_loss(&seq, &h);
  ck_assert_double_lt(h.total, 1e-12);
  for (int i = 0; i < R * D; i++) ck_assert(dx[i] == 0.0f);
  us_seq_release(&seq);
}
END_TEST

struct long_case {
  float *x, *head;
  int32_t *label;
};

enum { LONG_R = 2100, LONG_N = 4096, LONG_D = 8 };

static void run_long(struct us_seq *seq, void *arg, float *out) {
  const struct long_case *c = arg;
  struct us_head_loss h = {.R = LONG_R,
                           .D = LONG_D,
                           .N = LONG_N,
                           .x = c->x,
                           .head = c->head,
                           .label = c->label,
                           .scale = 1,
                           .dx = out,
                           .dhead = out + LONG_R * LONG_D,
                           .row_loss = out + (LONG_R + LONG_N) * LONG_D};
  us_head_loss(seq, &h);
}

START_TEST(chunks_and_threads_do_not_matter) {
  struct long_case c = {gc_float(gc_random(LONG_R * LONG_D, 2), LONG_R * LONG_D),
                        gc_float(gc_random(LONG_N * LONG_D, 2), LONG_N * LONG_D),
                        gc_keep(calloc(LONG_R, sizeof(int32_t)))};
  for (int r = 0; r < LONG_R; r++) c.label[r] = (r * 7919) % LONG_N;
  gc_threads(run_long, &c, (LONG_R + LONG_N) * LONG_D + LONG_R, US_SEQ_ROUND_BF16);
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  float *out = gc_zeros((LONG_R + LONG_N) * LONG_D + LONG_R), one;
  run_long(&seq, &c, out);
  for (size_t r = 0; r < LONG_R; r += 523) { /* a row alone has the loss it had in its chunk */
    struct us_head_loss h = {.R = 1,
                             .D = LONG_D,
                             .N = LONG_N,
                             .x = c.x + r * LONG_D,
                             .head = c.head,
                             .label = c.label + r,
                             .scale = 1,
                             .row_loss = &one};
    us_head_loss(&seq, &h);
    ck_assert_double_eq_tol((double)one, (double)out[(LONG_R + LONG_N) * LONG_D + r], 1e-5);
  }
  us_seq_release(&seq);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("head_loss");
  tcase_add_test(c, cross_entropy);
  tcase_add_test(c, divergence_from_a_teacher);
  tcase_add_test(c, divergence_from_gathered_teacher_rows);
  tcase_add_test(c, equal_logits_have_no_divergence_and_no_gradient);
  tcase_add_test(c, chunks_and_threads_do_not_matter);
  return us_suite("grad_head_loss", c);
}

US_TEST_MAIN(make_suite)
