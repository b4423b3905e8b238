/* t_optim.c: Muon against published values, AdamW against its formula in double, and their properties.
 *
 * Vectors: five Newton-Schulz and Polar Express steps in float64, computed by the exact formulas (coefficients of Jordan's
 * Muon and of arXiv 2505.16932).
 */
#include "training/optim.h"
#include "suite.h"

#include <math.h>
#include <string.h>

static float scratch[65536];

static void near_all(const float *got, const double *expected, size_t n, double tolerance) {
  for (size_t i = 0; i < n; i++)
    ck_assert_msg(fabs((double)got[i] - expected[i]) < tolerance, "[%zu] %.9g, expected %.9g", i,
                  (double)got[i], expected[i]);
}

/* A diagonal matrix of norm 1 maps each singular value apart; Polar Express divides by 1.02 first, so that is put in. */
static double map_of(enum us_newton kind, double s) {
  if (kind == US_NEWTON_POLAR_EXPRESS) s *= 1.02;
  float g[4] = {(float)s, 0, 0, (float)sqrt(1.0 - s * s)};
  us_newton_orthogonalise(kind, g, 2, 2, scratch);
  return (double)g[0];
}

START_TEST(singular_values_map_as_tabulated) {
  static const double table[8][3] = {{0.001, 0.470543951, 0.858872644}, {0.005, 1.154366249, 1.001335914},
                                     {0.01, 0.698917063, 1.027110178},  {0.05, 0.758119654, 0.908558279},
                                     {0.1, 0.712120082, 1.059161138},   {0.3, 1.079592293, 0.983141953},
                                     {0.5, 0.765438530, 0.910610876},   {1.0, 0.696436409, 0.859128963}};
  for (int i = 0; i < 8; i++) {
    ck_assert_double_eq_tol(map_of(US_NEWTON_SCHULZ5, table[i][0]), table[i][1], 2e-5);
    if (i < 7) ck_assert_double_eq_tol(map_of(US_NEWTON_POLAR_EXPRESS, table[i][0]), table[i][2], 2e-5);
  }
}
END_TEST

START_TEST(singular_values_stay_in_their_bands) {
  for (double s = 0.003; s <= 0.98; s *= 1.01) {
    double schulz = map_of(US_NEWTON_SCHULZ5, s), polar = map_of(US_NEWTON_POLAR_EXPRESS, s);
    ck_assert_msg(schulz > 0.6817 && schulz < 1.2025, "%g -> %g", s, schulz);
    ck_assert_msg(polar > 0.8588 && polar < 1.1413, "%g -> %g", s, polar);
  }
}
END_TEST

START_TEST(two_by_three_matches_the_published_values) {
  float a[6] = {1, 2, 3, 4, 5, 6}, b[6] = {1, 2, 3, 4, 5, 6};
  us_newton_orthogonalise(US_NEWTON_SCHULZ5, a, 2, 3, scratch);
  near_all(a, (double[]){-0.56829011, 0.057741943, 0.683773996, 0.563354698, 0.405612831, 0.247870965}, 6,
           3e-5);
  us_newton_orthogonalise(US_NEWTON_POLAR_EXPRESS, b, 2, 3, scratch);
  near_all(b, (double[]){-0.55776178, 0.093055119, 0.743872018, 0.639327243, 0.497014384, 0.354701525}, 6,
           3e-5);
}
END_TEST

START_TEST(tall_and_three_by_four_match_the_published_values) {
  float tall[6] = {3, 0, 0, 4, 0, 0};
  us_newton_orthogonalise(US_NEWTON_SCHULZ5, tall, 3, 2, scratch);
  near_all(tall, (double[]){0.722876130, 0, 0, 1.119203904, 0, 0}, 6, 1e-5);
  float g[12] = {2, -1, 0, 1, 0, 1, 3, -2, 1, 1, -1, 0};
  us_newton_orthogonalise(US_NEWTON_SCHULZ5, g, 3, 4, scratch);
  near_all(g,
           (double[]){0.828969017, -0.449732146, 0.175978941, 0.356924396, 0.139464554, 0.328524785,
                      0.885157687, -0.586048438, 0.577026641, 0.786986469, -0.51059086, -0.163808882},
           12, 1e-5);
}
END_TEST

START_TEST(two_whole_steps_match_the_published_values) {
  struct us_optim optim = us_optim_default(US_OPTIM_MUON);
  float w[6] = {0.5f, -0.25f, 0.1f, 0.3f, 0.7f, -0.2f}, m[6] = {0};
  us_muon_update(&optim, 0.01, 0.1, w, (float[]){1, 2, 3, 4, 5, 6}, m, 2, 3, scratch);
  near_all(w, (double[]){0.501468615, -0.249950024, 0.097531337, 0.297748482, 0.697894916, -0.20065865}, 6,
           1e-6);
  us_muon_update(&optim, 0.01, 0.1, w, (float[]){1, 0, -1, 0.5f, -2, 1}, m, 2, 3, scratch);
  near_all(w, (double[]){0.499165757, -0.251255648, 0.098071943, 0.296417675, 0.697317636, -0.20281204}, 6,
           1e-6);
}
END_TEST

static float next(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (float)((double)(*state >> 11) * 0x1p-52 - 1.0);
}

START_TEST(scale_transpose_and_rotation_commute_with_it) {
  uint64_t state = us_test_seed();
  enum { A = 5, B = 8 };
  float g[A * B], scaled[A * B], turned[A * B], rotated[A * B];
  for (int i = 0; i < A * B; i++) g[i] = next(&state);
  float c = 0.8f, s = 0.6f;
  for (int i = 0; i < A; i++)
    for (int j = 0; j < B; j++) {
      scaled[i * B + j] = g[i * B + j] * 1024.0f;
      turned[j * A + i] = g[i * B + j];
      float x = g[i * B], y = g[i * B + 3]; /* rotate columns 0 and 3 */
      rotated[i * B + j] = j == 0 ? c * x - s * y : j == 3 ? s * x + c * y : g[i * B + j];
    }
  us_newton_orthogonalise(US_NEWTON_SCHULZ5, g, A, B, scratch);
  us_newton_orthogonalise(US_NEWTON_SCHULZ5, scaled, A, B, scratch);
  us_newton_orthogonalise(US_NEWTON_SCHULZ5, turned, B, A, scratch);
  us_newton_orthogonalise(US_NEWTON_SCHULZ5, rotated, A, B, scratch);
  for (int i = 0; i < A; i++)
    for (int j = 0; j < B; j++) {
      float x = g[i * B], y = g[i * B + 3], own = g[i * B + j];
      float expected = j == 0 ? c * x - s * y : j == 3 ? s * x + c * y : own;
      ck_assert_float_eq_tol(scaled[i * B + j], own, 1e-4f);
      ck_assert_float_eq_tol(turned[j * A + i], own, 1e-4f);
      ck_assert_float_eq_tol(rotated[i * B + j], expected, 1e-4f);
    }
}
END_TEST

START_TEST(zero_stays_zero_and_the_norm_is_bounded) {
  float zero[12] = {0};
  us_newton_orthogonalise(US_NEWTON_SCHULZ5, zero, 3, 4, scratch);
  for (int i = 0; i < 12; i++) ck_assert(zero[i] == 0.0f);
  uint64_t state = us_test_seed() + 1;
  float g[16 * 24], v[24], u[16];
  for (int i = 0; i < 16 * 24; i++) g[i] = next(&state);
  us_newton_orthogonalise(US_NEWTON_SCHULZ5, g, 16, 24, scratch);
  for (int i = 0; i < 24; i++) v[i] = next(&state);
  double norm = 0.0;
  for (int round = 0; round < 200; round++) { /* power iteration on g^T g */
    double length = 0.0;
    for (int i = 0; i < 24; i++) length += (double)v[i] * (double)v[i];
    for (int i = 0; i < 24; i++) v[i] = (float)((double)v[i] / sqrt(length));
    norm = 0.0;
    for (int i = 0; i < 16; i++) {
      u[i] = 0.0f;
      for (int j = 0; j < 24; j++) u[i] += g[i * 24 + j] * v[j];
      norm += (double)u[i] * (double)u[i];
    }
    for (int j = 0; j < 24; j++) {
      v[j] = 0.0f;
      for (int i = 0; i < 16; i++) v[j] += g[i * 24 + j] * u[i];
    }
  }
  ck_assert_double_lt(sqrt(norm), 1.21);
  ck_assert_double_gt(sqrt(norm), 0.68);
}
END_TEST

START_TEST(adamw_follows_its_formula_for_many_steps) {
  struct us_optim optim = us_optim_default(US_OPTIM_ADAMW);
  uint64_t state = us_test_seed() + 2;
  enum { n = 37 };
  float w[n], m[n] = {0}, v[n] = {0}, g[n];
  double ew[n], em[n] = {0}, ev[n] = {0};
  for (int i = 0; i < n; i++) ew[i] = (double)(w[i] = next(&state));
  for (int step = 1; step <= 50; step++) {
    optim.step = (uint64_t)step;
    for (int i = 0; i < n; i++) {
      g[i] = next(&state);
      em[i] = 0.9 * em[i] + 0.1 * (double)g[i];
      ev[i] = 0.95 * ev[i] + 0.05 * (double)g[i] * (double)g[i];
      double mhat = em[i] / (1.0 - pow(0.9, step)), vhat = ev[i] / (1.0 - pow(0.95, step));
      ew[i] = ew[i] * (1.0 - 3e-3 * 0.1) - 3e-3 * mhat / (sqrt(vhat) + 1e-8);
    }
    us_adamw_update(&optim, 3e-3, 0.1, w, g, m, v, n);
  }
  near_all(w, ew, n, 1e-5);
}
END_TEST

static struct us_param make_param(const char *name, enum us_param_group group, size_t rows, size_t cols,
                                  float *arena, size_t floats, size_t offset) {
  struct us_param p = {.family = "qkv",
                       .rows = rows,
                       .cols = cols,
                       .offset = offset,
                       .group = group,
                       .decay = true,
                       .rate_scale = 1.0f};
  memcpy(p.name, name, strlen(name) + 1);
  p.value = arena + offset, p.grad = arena + floats + offset;
  p.moment1 = arena + 2 * floats + offset, p.moment2 = arena + 3 * floats + offset;
  return p;
}

START_TEST(fused_projections_are_orthogonalised_apart) {
  /* two chunks of q (2 rows), k (1), v (1): the same update as three matrices of 4, 2 and 2 rows by hand */
  enum { COLS = 6, ROWS = 8, FLOATS = 48 };
  float arena[4 * FLOATS] = {0}, parts[3][4 * COLS], grads[3][4 * COLS], moment[3][4 * COLS] = {{0}};
  static const int part_of[4] = {0, 0, 1, 2};
  int count[3] = {0};
  uint64_t state = us_test_seed() + 3;
  for (int i = 0; i < 2 * FLOATS; i++) arena[i] = next(&state);
  for (int r = 0; r < ROWS; r++) {
    int part = part_of[r % 4];
    memcpy(parts[part] + count[part] * COLS, arena + r * COLS, COLS * sizeof(float));
    memcpy(grads[part] + count[part]++ * COLS, arena + FLOATS + r * COLS, COLS * sizeof(float));
  }
  struct us_param p = make_param("qkv", US_PARAM_MUON, ROWS, COLS, arena, FLOATS, 0);
  p.split = (struct us_param_split){.chunks = 2, .q_rows = 2, .k_rows = 1, .v_rows = 1};
  struct us_params params = {
      .items = &p, .count = 1, .floats = FLOATS, .value = arena, .grad = arena + FLOATS};
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct us_optim optim = us_optim_default(US_OPTIM_MUON);
  optim.step = 1;
  us_optim_step(&optim, &params, 0.02, &seq);
  for (int part = 0; part < 3; part++)
    us_muon_update(&optim, 0.02, 0.1, parts[part], grads[part], moment[part], (size_t)count[part], COLS,
                   scratch);
  int at[3] = {0};
  for (int r = 0; r < ROWS; r++) {
    int part = part_of[r % 4];
    for (int k = 0; k < COLS; k++) ck_assert(arena[r * COLS + k] == parts[part][at[part] * COLS + k]);
    at[part]++;
  }
  us_seq_release(&seq);
}
END_TEST

START_TEST(frozen_tensors_stay_and_groups_choose_the_rule) {
  float arena[4 * 64] = {0};
  uint64_t state = us_test_seed() + 4;
  for (int i = 0; i < 128; i++) arena[i] = next(&state);
  float before[64];
  memcpy(before, arena, sizeof before);
  struct us_param items[3] = {make_param("frozen", US_PARAM_MUON, 4, 4, arena, 64, 0),
                              make_param("muon", US_PARAM_MUON, 4, 4, arena, 64, 16),
                              make_param("bias", US_PARAM_BIAS, 4, 4, arena, 64, 32)};
  items[0].frozen = true;
  struct us_params params = {.items = items, .count = 3, .floats = 64, .value = arena, .grad = arena + 64};
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct us_optim optim = us_optim_default(US_OPTIM_MUON);
  optim.step = 1;
  us_optim_step(&optim, &params, 0.02, &seq);
  ck_assert(memcmp(before, arena, 16 * sizeof(float)) == 0);
  ck_assert(memcmp(before + 16, arena + 16, 16 * sizeof(float)) != 0);
  ck_assert(memcmp(before + 32, arena + 32, 32 * sizeof(float)) == 0);
  ck_assert(arena[3 * 64 + 16] == 0.0f); /* Muon keeps no second moment */
  optim.kind = US_OPTIM_ADAMW;
  us_optim_step(&optim, &params, 0.02, &seq);
  ck_assert(arena[3 * 64 + 16] > 0.0f);
  us_seq_release(&seq);
}
END_TEST

START_TEST(clipping_scales_to_the_limit) {
  float arena[64] = {0};
  arena[3] = 3.0f, arena[40] = -4.0f;
  struct us_params params = {.floats = 64, .grad = arena};
  ck_assert_double_eq_tol(us_params_clip(&params, NULL, 10.0), 5.0, 1e-12);
  ck_assert(arena[3] == 3.0f);
  ck_assert_double_eq_tol(us_params_clip(&params, NULL, 1.0), 5.0, 1e-12);
  ck_assert_double_eq_tol(us_params_grad_norm(&params, NULL), 1.0, 1e-6);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("optim");
  tcase_add_test(c, singular_values_map_as_tabulated);
  tcase_add_test(c, singular_values_stay_in_their_bands);
  tcase_add_test(c, two_by_three_matches_the_published_values);
  tcase_add_test(c, tall_and_three_by_four_match_the_published_values);
  tcase_add_test(c, two_whole_steps_match_the_published_values);
  tcase_add_test(c, scale_transpose_and_rotation_commute_with_it);
  tcase_add_test(c, zero_stays_zero_and_the_norm_is_bounded);
  tcase_add_test(c, adamw_follows_its_formula_for_many_steps);
  tcase_add_test(c, fused_projections_are_orthogonalised_apart);
  tcase_add_test(c, frozen_tensors_stay_and_groups_choose_the_rule);
  tcase_add_test(c, clipping_scales_to_the_limit);
  return us_suite("optim", c);
}

US_TEST_MAIN(make_suite)
