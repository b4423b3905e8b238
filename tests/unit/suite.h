/* suite.h: the main of a unit test program: prints the seed, runs one suite, returns 1 if a test failed.
 *
 *     static Suite *make_suite(void) { TCase *c = tcase_create("err"); tcase_add_test(c, ...); return us_suite("err", c); }
 *     US_TEST_MAIN(make_suite)
 *
 * US_TEST_SEED in the environment changes the seed of randomised tests; the default is fixed.
 */
#ifndef US_TESTS_SUITE_H
#define US_TESTS_SUITE_H

#include <check.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static inline uint64_t us_test_seed(void) {
  const char *text = getenv("US_TEST_SEED");
  return text ? strtoull(text, NULL, 0) : 20261120u;
}

static inline Suite *us_suite(const char *name, TCase *tcase) {
  Suite *suite = suite_create(name);
  tcase_set_timeout(tcase, 110);
  suite_add_tcase(suite, tcase);
  return suite;
}

#define US_TEST_MAIN(make_suite)                                                                             \
  int main(void) {                                                                                           \
    fprintf(stderr, "seed %llu\n", (unsigned long long)us_test_seed());                                      \
    SRunner *runner = srunner_create(make_suite());                                                          \
    srunner_run_all(runner, CK_NORMAL);                                                                      \
    int failed = srunner_ntests_failed(runner);                                                              \
    srunner_free(runner);                                                                                    \
    return failed ? 1 : 0;                                                                                   \
  }

#endif
