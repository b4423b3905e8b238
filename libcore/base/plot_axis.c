/* plot_axis.c: the range and the ticks of a plot's axis. */
#include "base/plot_axis.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* The shortest usual form: 0.001 to 9999 in full, thousands and more with k, M, G, T, the rest as 1e-5. */
static void format_tick(double value, char *label, size_t size) {
  static const struct {
    double unit;
    const char *suffix;
  } suffixes[] = {{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e3, "k"}};
  double magnitude = fabs(value);
  if (magnitude >= 1e15 || (magnitude > 0 && magnitude < 0.9e-3)) {
    int exponent = (int)floor(log10(magnitude) + 1e-9);
    double mantissa = value / pow(10, exponent);
    snprintf(label, size, "%.3ge%d", mantissa, exponent);
    return;
  }
  if (magnitude >= 9999.5)
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++)
      if (magnitude >= suffixes[i].unit) {
        snprintf(label, size, "%.6g%s", value / suffixes[i].unit, suffixes[i].suffix);
        return;
      }
  snprintf(label, size, "%.6g", value);
}

static void add_tick(struct us_plot_axis *axis, double value) {
  if (axis->tick_count == US_PLOT_MAX_TICKS) return;
  axis->ticks[axis->tick_count] = value;
  format_tick(value, axis->labels[axis->tick_count++], sizeof axis->labels[0]);
}

/* The least step of 1, 2 or 5 times a power of ten that is not below `raw`. */
static double round_step(double raw) {
  double power = pow(10, floor(log10(raw))), mantissa = raw / power;
  return (mantissa <= 1 + 1e-9 ? 1 : mantissa <= 2 + 1e-9 ? 2 : mantissa <= 5 + 1e-9 ? 5 : 10) * power;
}

static void fit_linear(struct us_plot_axis *axis, bool tight, int most) {
  double step = round_step((axis->high - axis->low) / (most - 1));
  double first = floor(axis->low / step + 1e-9), last = ceil(axis->high / step - 1e-9);
  if (!tight && last - first + 1 > most) { /* rounding outwards cost a tick too many */
    step = round_step(step * 1.5);
    first = floor(axis->low / step + 1e-9);
    last = ceil(axis->high / step - 1e-9);
  }
  if (tight) {
    first = ceil(axis->low / step - 1e-9);
    last = floor(axis->high / step + 1e-9);
  } else {
    axis->low = first * step;
    axis->high = last * step;
  }
  for (double k = first; k <= last + 0.5; k++) add_tick(axis, k * step == 0 ? 0 : k * step);
}

static void fit_log(struct us_plot_axis *axis, bool tight, int most) {
  double decades = log10(axis->high / axis->low);
  /* Marks inside a decade: 1, 2, 5 where all fit, 1 alone otherwise, every second or third decade when there are many. */
  bool inner = decades * 3 <= most - 1;
  int first = (int)floor(log10(axis->low) + 1e-9), last = (int)ceil(log10(axis->high) - 1e-9);
  int every = inner ? 1 : 1 + (last - first) / most;
  static const double marks[] = {1, 2, 5};
  double low = axis->low, high = axis->high;
  if (!tight && inner) {
    for (int m = 2; m >= 0; m--)
      if (marks[m] * pow(10, first) <= axis->low * (1 + 1e-9)) {
        low = marks[m] * pow(10, first);
        break;
      }
    for (int m = 2; m >= 0; m--)
      if (marks[m] * pow(10, last - 1) >= axis->high * (1 - 1e-9)) high = marks[m] * pow(10, last - 1);
    if (high < axis->high * (1 - 1e-9)) high = pow(10, last);
    if (5 * pow(10, last - 1) < axis->high * (1 - 1e-9)) high = pow(10, last);
  } else if (!tight) {
    low = pow(10, first);
    high = pow(10, last);
  }
  axis->low = low;
  axis->high = high;
  for (int decade = first; decade <= last; decade += every)
    for (int m = 0; m < (inner ? 3 : 1); m++) {
      double value = marks[m] * pow(10, decade);
      if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) add_tick(axis, value);
    }
}

void us_plot_axis_fit(struct us_plot_axis *axis, double low, double high, bool log, bool tight, int most) {
  memset(axis, 0, sizeof *axis);
  bool bad = !isfinite(low) || !isfinite(high) || low > high || (log && low <= 0);
  if (bad) low = log ? 1 : 0, high = log ? 10 : 1;
  if (log && high / low < 1.0001) low /= 2, high *= 2;
  double spread = high - low, size = fmax(fabs(low), fabs(high));
  if (!log && spread <= 1e-9 * size) low -= 0.5 * size, high += 0.5 * size;
  if (!log && low == high) low = 0, high = 1;
  *axis = (struct us_plot_axis){.low = low, .high = high, .log = log};
  most = most < 3 ? 3 : most > 12 ? 12 : most;
  if (log)
    fit_log(axis, tight, most);
  else
    fit_linear(axis, tight, most);
}

double us_plot_axis_map(const struct us_plot_axis *axis, double value) {
  if (axis->log) return log(value / axis->low) / log(axis->high / axis->low);
  return (value - axis->low) / (axis->high - axis->low);
}
