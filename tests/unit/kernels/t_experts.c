/* t_experts.c: grouped experts, against a loop over rows in double. */
#include "kernels/experts/experts.h"
#include "values.h"

#include <math.h>

enum { E = 6, K = 3, R = 5, D = 64, F = 96 };

struct problem {
  struct us_matrix experts[E][3];
  float *x, *packed, inner[R * K * F], scratch[2 * R * F];
  uint32_t ids[R * K], expert[E], begin[E + 1], row[R * K];
  float weights[R * K], group_weight[R * K];
  struct us_expert_groups groups;
};

static void fill_problem(struct problem *p, enum us_format format, uint64_t *state) {
  for (int e = 0; e < E; e++) {
    p->experts[e][0] = new_matrix(format, F, D, state);
    p->experts[e][1] = new_matrix(format, F, D, state);
    p->experts[e][2] = new_matrix(format, D, F, state);
  }
  p->x = new_values(R * D, 0.3f, state);
  p->packed = calloc(R * D, sizeof *p->packed);
  us_linear_pack(p->x, R, D, D, p->packed, D);
  /* Expert 4 is never chosen. */
  static const uint32_t ids[R * K] = {0, 1, 5, 1, 2, 3, 0, 2, 5, 1, 3, 5, 0, 1, 2};
  memcpy(p->ids, ids, sizeof ids);
  for (int i = 0; i < R * K; i++) p->weights[i] = 0.2f + 0.1f * (float)(i % 4);
  p->groups = (struct us_expert_groups){
      .expert = p->expert, .begin = p->begin, .row = p->row, .weight = p->group_weight};
  us_experts_group(p->ids, p->weights, R, K, E, &p->groups);
}

static void free_problem(struct problem *p) {
  for (int e = 0; e < E; e++)
    for (int i = 0; i < 3; i++) release_matrix(&p->experts[e][i]);
  free(p->x);
  free(p->packed);
}

static void run(struct problem *p, size_t tile, enum us_isa isa, float *y) {
  struct us_experts_args args = {.experts = &p->experts[0][0],
                                 .groups = &p->groups,
                                 .x = p->packed,
                                 .x_stride = D,
                                 .R = R,
                                 .D = D,
                                 .F = F,
                                 .inner = p->inner,
                                 .y = y,
                                 .y_stride = D,
                                 .isa = isa};
  for (uint32_t i = 0; i < p->groups.active; i++)
    for (size_t f = 0; f < F; f += tile)
      us_experts_inner(&args, i, f, f + tile < F ? f + tile : F, p->scratch);
  for (size_t d = 0; d < D; d += tile) us_experts_outer(&args, d, d + tile < D ? d + tile : D, p->scratch);
}

START_TEST(groups_list_active_experts_and_their_rows_in_order) {
  struct problem p = {0};
  uint64_t state = us_test_seed();
  fill_problem(&p, US_FORMAT_BF16, &state);
  ck_assert_uint_eq(p.groups.active, 5);
  static const uint32_t expert[] = {0, 1, 2, 3, 5}, begin[] = {0, 3, 7, 10, 12, 15};
  static const uint32_t row[] = {0, 2, 4, 0, 1, 3, 4, 1, 2, 4, 1, 3, 0, 2, 3};
  ck_assert_int_eq(memcmp(p.expert, expert, sizeof expert), 0);
  ck_assert_int_eq(memcmp(p.begin, begin, sizeof begin), 0);
  ck_assert_int_eq(memcmp(p.row, row, sizeof row), 0);
  ck_assert(p.group_weight[3] == p.weights[1]);
  free_problem(&p);
}
END_TEST

static double dot(const struct us_matrix *w, size_t n, const double *x) {
  float row[F > D ? F : D];
  double sum = 0;
  us_matrix_decode_row(w, n, row);
  for (size_t k = 0; k < w->cols; k++) sum += (double)row[k] * x[k];
  return sum;
}

START_TEST(each_row_is_the_weighted_sum_of_its_experts) {
  for (int format = US_FORMAT_BF16; format <= US_FORMAT_MXFP4; format++) {
    struct problem p = {0};
    uint64_t state = us_test_seed() + 1;
    float y[R * D];
    fill_problem(&p, (enum us_format)format, &state);
    run(&p, 32, US_ISA_BEST, y);
    for (int r = 0; r < R; r++) {
      double x[D], truth[D] = {0}, size = 0;
      for (int k = 0; k < D; k++) x[k] = (double)p.x[r * D + k];
      for (int i = 0; i < K; i++) {
        const struct us_matrix *expert = p.experts[p.ids[r * K + i]];
        double inner[F];
        for (int f = 0; f < F; f++) {
          double gate = dot(&expert[0], (size_t)f, x);
          inner[f] = gate / (1 + exp(-gate)) * dot(&expert[1], (size_t)f, x);
        }
        for (int d = 0; d < D; d++)
          truth[d] += (double)p.weights[r * K + i] * dot(&expert[2], (size_t)d, inner);
      }
      for (int d = 0; d < D; d++) size = fmax(size, fabs(truth[d]));
      for (int d = 0; d < D; d++)
        ck_assert_msg(fabs((double)y[r * D + d] - truth[d]) < 2e-5 * size, "%s row %d dim %d: %g, not %g",
                      us_format_name((enum us_format)format), r, d, (double)y[r * D + d], truth[d]);
    }
    free_problem(&p);
  }
}
END_TEST

START_TEST(tiles_and_instruction_sets_do_not_change_a_bit) {
  struct problem p = {0};
  uint64_t state = us_test_seed() + 2;
  float whole[R * D], part[R * D];
  fill_problem(&p, US_FORMAT_MXFP4, &state);
  run(&p, 96, US_ISA_PLAIN, whole);
  for (int isa = US_ISA_BEST; isa < US_ISA_COUNT; isa++) {
    run(&p, 32, (enum us_isa)isa, part);
    assert_same_bits(part, whole, R * D, us_isa_name((enum us_isa)isa));
  }
  free_problem(&p);
}
END_TEST

START_TEST(infinite_weights_of_an_expert_reach_only_its_own_rows) {
  struct problem p = {0};
  uint64_t state = us_test_seed() + 3;
  float clean[R * D], y[R * D];
  fill_problem(&p, US_FORMAT_BF16, &state);
  run(&p, 32, US_ISA_BEST, clean);
  for (int i = 0; i < 3; i++) {
    uint16_t *halves = (uint16_t *)(uintptr_t)p.experts[3][i].data;
    for (int j = 0; j < F * D; j++) halves[j] = 0x7f80;
  }
  run(&p, 32, US_ISA_BEST, y);
  for (int r = 0; r < R; r++) {
    bool routed = r == 1 || r == 3;
    if (routed)
      ck_assert(!isfinite(y[r * D]));
    else
      assert_same_bits(y + r * D, clean + r * D, D, "a row that does not use the expert");
  }
  free_problem(&p);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("experts");
  tcase_add_test(c, groups_list_active_experts_and_their_rows_in_order);
  tcase_add_test(c, each_row_is_the_weighted_sum_of_its_experts);
  tcase_add_test(c, tiles_and_instruction_sets_do_not_change_a_bit);
  tcase_add_test(c, infinite_weights_of_an_expert_reach_only_its_own_rows);
  return us_suite("experts", c);
}
US_TEST_MAIN(make_suite)
