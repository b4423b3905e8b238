/* t_ownership.c: ranks divide the tensors of a model. */
#include "training/ownership.h"
#include "tiny.h"

static void open_params(struct us_params *params) {
  struct us_err err = {0};
  struct us_shape shape = tiny_pro();
  ck_assert_int_eq(us_params_init_fresh(params, &shape, us_test_seed(), 0.0f, &err), US_OK);
}

START_TEST(ranks_cover_every_tensor_once_and_whole) {
  struct us_params params;
  open_params(&params);
  for (uint32_t ranks = 1; ranks <= 64; ranks++) {
    struct us_owned owned[64];
    us_ownership_plan(&params, US_OPTIM_MUON, ranks, owned);
    ck_assert_uint_eq(owned[0].begin, 0);
    ck_assert_uint_eq(owned[ranks - 1].end, params.floats);
    for (uint32_t r = 0; r < ranks; r++) {
      ck_assert_uint_le(owned[r].begin, owned[r].end);
      if (r) ck_assert_uint_eq(owned[r].begin, owned[r - 1].end);
    }
    for (size_t i = 0; i < params.count; i++) {
      const struct us_param *p = &params.items[i];
      uint32_t r = 0;
      while (p->offset >= owned[r].end) r++;
      ck_assert_uint_le(p->offset + p->rows * p->cols, owned[r].end);
    }
  }
  us_params_release(&params);
}
END_TEST

/* No rank's share exceeds an even one by more than the dearest tensor. */
START_TEST(shares_are_even_up_to_one_tensor) {
  struct us_params params;
  open_params(&params);
  double total = 0.0, dearest = 0.0;
  for (size_t i = 0; i < params.count; i++) {
    double n = (double)(params.items[i].rows * params.items[i].cols);
    if (params.items[i].group == US_PARAM_BIAS) continue;
    total += n;
    if (n > dearest) dearest = n;
  }
  for (uint32_t ranks = 2; ranks <= 8; ranks++) {
    struct us_owned owned[8];
    us_ownership_plan(&params, US_OPTIM_ADAMW, ranks, owned); /* cost is the number of values */
    for (uint32_t r = 0; r < ranks; r++) {
      double own = 0.0;
      for (size_t i = 0; i < params.count; i++) {
        const struct us_param *p = &params.items[i];
        if (p->offset < owned[r].begin || p->offset >= owned[r].end || p->group == US_PARAM_BIAS) continue;
        own += (double)(p->rows * p->cols);
      }
      ck_assert_double_le(own, total / ranks + dearest);
    }
  }
  us_params_release(&params);
}
END_TEST

START_TEST(frozen_tensors_cost_nothing) {
  struct us_params params;
  open_params(&params);
  struct us_owned owned[2];
  for (size_t i = 0; i < params.count; i++) params.items[i].frozen = i < params.count / 2;
  us_ownership_plan(&params, US_OPTIM_MUON, 2, owned);
  ck_assert_uint_ge(owned[0].end, params.items[params.count / 2].offset);
  us_params_release(&params);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("ownership");
  tcase_add_test(c, ranks_cover_every_tensor_once_and_whole);
  tcase_add_test(c, shares_are_even_up_to_one_tensor);
  tcase_add_test(c, frozen_tensors_cost_nothing);
  return us_suite("ownership", c);
}

US_TEST_MAIN(make_suite)
