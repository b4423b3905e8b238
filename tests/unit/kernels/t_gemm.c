/* t_gemm.c: matrix products against the triple loop, and equal bits for every instruction set and cut. */
#include "kernels/gemm/gemm.h"
#include "gradcheck.h"

struct product {
  size_t M, N, K;
  bool transpose_a, transpose_b;
  float alpha, beta;
};

static struct us_gemm bind(const struct product *p, const float *a, const float *b, float *c,
                           enum us_isa isa) {
  return (struct us_gemm){.M = p->M,
                          .N = p->N,
                          .K = p->K,
                          .a = a,
                          .b = b,
                          .c = c,
                          .c_row = p->N + 3,
                          .a_row = p->transpose_a ? 1 : p->K + 1,
                          .a_col = p->transpose_a ? p->M + 2 : 1,
                          .b_row = p->transpose_b ? 1 : p->N + 5,
                          .b_col = p->transpose_b ? p->K + 4 : 1,
                          .alpha = p->alpha,
                          .beta = p->beta,
                          .isa = isa};
}

static void check(const struct product *p) {
  size_t a_size = (p->M + 2) * (p->K + 2) + 8, b_size = (p->N + 5) * (p->K + 5) + 8,
         c_size = p->M * (p->N + 3) + 3;
  double *ad = gc_random(a_size, 1), *bd = gc_random(b_size, 1), *cd = gc_random(c_size, 1);
  float *a = gc_float(ad, a_size), *b = gc_float(bd, b_size), *first = NULL;
  for (enum us_isa isa = US_ISA_PLAIN; isa < US_ISA_COUNT; isa++) {
    if (!us_isa_supported(isa)) continue;
    float *c = gc_float(cd, c_size);
    struct us_gemm g = bind(p, a, b, c, isa);
    us_gemm(&g);
    for (size_t i = 0; i < p->M; i++)
      for (size_t j = 0; j < p->N && !first; j++) {
        double sum = 0.0, size = 0.0;
        for (size_t k = 0; k < p->K; k++) {
          double term = ad[i * g.a_row + k * g.a_col] * bd[k * g.b_row + j * g.b_col];
          sum += term, size += fabs(term);
        }
        double start = (double)p->beta * cd[i * g.c_row + j], expected = (double)p->alpha * sum + start;
        ck_assert_double_eq_tol((double)c[i * g.c_row + j], expected,
                                (size + fabs(start) + 1e-30) * 260 * 0x1p-24);
      }
    if (first) ck_assert_msg(memcmp(c, first, c_size * sizeof *c) == 0, "%s: other bits", us_isa_name(isa));
    if (!first)
      first = c;
    else
      free(c);
  }
  free(ad), free(bd), free(cd), free(a), free(b), free(first);
}

START_TEST(every_edge_of_a_tile_is_right_and_equal_everywhere) {
  static const size_t sizes[] = {1, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 97};
  uint32_t pick = 12345;
  for (int i = 0; i < 400; i++) {
    size_t size[3];
    for (int d = 0; d < 3; d++) {
      pick = pick * 1664525u + 1013904223u;
      size[d] = sizes[(pick >> 16) % 15];
    }
    struct product p = {
        size[0], size[1], size[2], i & 1, i & 2, i & 4 ? 1.0f : 0.3f, i & 8 ? 0.0f : i & 16 ? 1.0f : -0.7f};
    check(&p);
  }
}
END_TEST

START_TEST(long_sums_pass_through_c_every_256) {
  for (size_t K = 255; K <= 258; K++) check(&(struct product){9, 50, K, false, true, 1.0f, 0.0f});
  check(&(struct product){10, 20, 1000, true, false, 0.5f, 1.0f});
  check(&(struct product){1100, 20, 270, true, false, 0.5f, 1.0f}); /* A's columns far apart: copied */
}
END_TEST

START_TEST(an_empty_sum_scales_c) {
  float c[4] = {1, 2, 3, 4}, none = 0.0f;
  us_gemm(&(struct us_gemm){.M = 2,
                            .N = 2,
                            .K = 0,
                            .a = &none,
                            .b = &none,
                            .a_col = 1,
                            .b_col = 1,
                            .c = c,
                            .c_row = 2,
                            .alpha = 1.0f,
                            .beta = 0.5f});
  ck_assert(c[0] == 0.5f && c[3] == 2.0f);
  c[1] = NAN;
  us_gemm(&(struct us_gemm){.M = 2,
                            .N = 2,
                            .K = 0,
                            .a = &none,
                            .b = &none,
                            .a_col = 1,
                            .b_col = 1,
                            .c = c,
                            .c_row = 2,
                            .alpha = 1.0f});
  ck_assert(c[0] == 0.0f && c[1] == 0.0f);
}
END_TEST

START_TEST(a_row_does_not_depend_on_the_others) {
  enum { M = 37, N = 70, K = 300 };
  float *a = gc_float(gc_random(M * K, 1), M * K), *b = gc_float(gc_random(N * K, 1), N * K), c[M * N],
        one[N];
  struct us_gemm g = {.M = M,
                      .N = N,
                      .K = K,
                      .a = a,
                      .a_row = K,
                      .a_col = 1,
                      .b = b,
                      .b_row = 1,
                      .b_col = K,
                      .c = c,
                      .c_row = N,
                      .alpha = 1.0f};
  us_gemm(&g);
  for (size_t i = 0; i < M; i++) {
    struct us_gemm row = g;
    row.M = 1, row.a = a + i * K, row.c = one;
    us_gemm(&row);
    ck_assert(memcmp(one, c + i * N, sizeof one) == 0);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("gemm");
  tcase_add_test(c, every_edge_of_a_tile_is_right_and_equal_everywhere);
  tcase_add_test(c, long_sums_pass_through_c_every_256);
  tcase_add_test(c, an_empty_sum_scales_c);
  tcase_add_test(c, a_row_does_not_depend_on_the_others);
  return us_suite("gemm", c);
}

US_TEST_MAIN(make_suite)
