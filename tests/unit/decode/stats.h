/* stats.h: goodness of fit for tests of laws. Header-only; a fixed seed makes every verdict repeatable. */
#ifndef US_TESTS_STATS_H
#define US_TESTS_STATS_H

#include <math.h>
#include <stddef.h>

/* Standard normal deviate of a chi-square value (Wilson and Hilferty 1931): above 4.5 has probability 3e-6. */
static inline double chi_square_z(double value, double freedom) {
  double spread = 2.0 / (9.0 * freedom);
  return (cbrt(value / freedom) - (1.0 - spread)) / sqrt(spread);
}

/* G statistic of counts (bins) against a law, bins that expect fewer than 5 pooled into one. */
static inline double g_test_z(const double *counts, const double *law, size_t bins) {
  double total = 0.0, g = 0.0, rest_count = 0.0, rest_law = 0.0, freedom = -1.0;
  for (size_t i = 0; i < bins; i++) total += counts[i];
  for (size_t i = 0; i < bins; i++) {
    if (law[i] * total < 5.0) {
      rest_count += counts[i], rest_law += law[i];
      continue;
    }
    if (counts[i] > 0.0) g += 2.0 * counts[i] * log(counts[i] / (law[i] * total));
    freedom++;
  }
  if (rest_law * total >= 5.0) {
    if (rest_count > 0.0) g += 2.0 * rest_count * log(rest_count / (rest_law * total));
    freedom++;
  } else if (rest_count > 5.0 + 5.0 * sqrt(rest_law * total)) {
    return INFINITY; /* draws where the law has next to nothing */
  }
  return chi_square_z(g, freedom);
}

/* G statistic of two samples against each other (2 x bins table). */
static inline double g_test_two_z(const double *a, const double *b, size_t bins) {
  double na = 0.0, nb = 0.0, g = 0.0, ra = 0.0, rb = 0.0, freedom = -1.0;
  for (size_t i = 0; i < bins; i++) na += a[i], nb += b[i];
  for (size_t i = 0; i <= bins; i++) {
    double x = i < bins ? a[i] : ra, y = i < bins ? b[i] : rb, share = (x + y) / (na + nb);
    if (share * fmin(na, nb) < 5.0) {
      if (i < bins) ra += x, rb += y;
      continue;
    }
    if (x > 0.0) g += 2.0 * x * log(x / (share * na));
    if (y > 0.0) g += 2.0 * y * log(y / (share * nb));
    freedom++;
  }
  return chi_square_z(g, freedom);
}

#endif
