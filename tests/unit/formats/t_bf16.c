/* t_bf16: bf16 rounding against IEEE 754 written in FP64. */
#include "formats/bf16.h"

#include "gauss.h"
#include "suite.h"

#include <math.h>

START_TEST(every_bf16_value_survives_decode_and_encode) {
  for (uint32_t h = 0; h < 0x10000; h++) {
    uint32_t exponent = h >> 7 & 0xff, fraction = h & 0x7f;
    uint16_t back = us_bf16_from_f32(us_bf16_to_f32((uint16_t)h));
    uint32_t expected = exponent == 255 && fraction ? h | 0x40 : h; /* NaN is made quiet */
    ck_assert_uint_eq(back, expected);
    if (exponent == 255) continue;
    double value = exponent ? ldexp(1 + fraction / 128.0, (int)exponent - 127) : ldexp(fraction, -133);
    ck_assert_double_eq((double)us_bf16_to_f32((uint16_t)h), h >> 15 ? -value : value);
  }
}
END_TEST

START_TEST(rounding_is_to_nearest_and_ties_go_to_the_even_fraction) {
  /* Between neighbours a < b of every finite pair: just below the middle, the middle, just above. */
  for (uint32_t h = 0; h < 0x7f80; h++) {
    uint32_t middle = h << 16 | 0x8000;
    ck_assert_uint_eq(us_bf16_from_f32(us_f32_from_bits(middle - 1)), h);
    ck_assert_uint_eq(us_bf16_from_f32(us_f32_from_bits(middle)), h + (h & 1));
    ck_assert_uint_eq(us_bf16_from_f32(us_f32_from_bits(middle + 1)), h + 1);
    ck_assert_uint_eq(us_bf16_from_f32(us_f32_from_bits(middle | 0x80000000u)), (h + (h & 1)) | 0x8000);
  }
}
END_TEST

START_TEST(a_nan_stays_a_nan_whatever_its_payload) {
  uint32_t payloads[] = {0x7f800001, 0x7f80ffff, 0x7fffffff, 0xff800001, 0x7fc00000};
  for (size_t i = 0; i < sizeof payloads / sizeof *payloads; i++) {
    uint16_t half = us_bf16_from_f32(us_f32_from_bits(payloads[i]));
    ck_assert(isnan(us_bf16_to_f32(half)));
    ck_assert_uint_eq(half >> 15, payloads[i] >> 31);
    ck_assert_uint_eq(half & 0x40, 0x40);
  }
  ck_assert_uint_eq(us_bf16_from_f32(INFINITY), 0x7f80);
  ck_assert_uint_eq(us_bf16_from_f32(-INFINITY), 0xff80);
}
END_TEST

START_TEST(arrays_equal_the_scalar_functions) {
  enum { N = 1000 };
  float values[N], decoded[N], rounded[N];
  uint16_t halves[N];
  uint64_t state = us_test_seed();
  for (int i = 0; i < N; i++) values[i] = us_f32_from_bits((uint32_t)test_next(&state));
  us_bf16_encode(values, N, halves);
  us_bf16_decode(halves, N, decoded);
  us_bf16_round_all(values, N, rounded);
  for (int i = 0; i < N; i++) {
    ck_assert_uint_eq(halves[i], us_bf16_from_f32(values[i]));
    ck_assert_uint_eq(us_f32_bits(decoded[i]), (uint32_t)halves[i] << 16);
    ck_assert_uint_eq(us_f32_bits(rounded[i]), us_f32_bits(decoded[i]));
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("bf16");
  tcase_add_test(c, every_bf16_value_survives_decode_and_encode);
  tcase_add_test(c, rounding_is_to_nearest_and_ties_go_to_the_even_fraction);
  tcase_add_test(c, a_nan_stays_a_nan_whatever_its_payload);
  tcase_add_test(c, arrays_equal_the_scalar_functions);
  return us_suite("bf16", c);
}
US_TEST_MAIN(make_suite)
