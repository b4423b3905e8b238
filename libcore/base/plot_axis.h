/* plot_axis.h: the range and the ticks of a plot's axis (internal to plot.c and its test).
 *
 *     struct us_plot_axis axis;
 *     us_plot_axis_fit(&axis, low, high, log, false, 8);
 *     double where = us_plot_axis_map(&axis, value);    // 0 at the axis' begin, 1 at its end
 */
#ifndef US_BASE_PLOT_AXIS_H
#define US_BASE_PLOT_AXIS_H

#include <stdbool.h>
#include <stddef.h>

#define US_PLOT_MAX_TICKS 32

struct us_plot_axis {
  double low, high;
  bool log;
  int tick_count;
  double ticks[US_PLOT_MAX_TICKS];
  char labels[US_PLOT_MAX_TICKS][16];
};

/* Choose round limits around [low, high] and at most `most` (3 to 12) ticks at steps of 1, 2 or 5 times a power of ten;
 * on a logarithmic axis at decades, and at 2 and 5 between them where there is room. Bad limits become [0, 1]; equal ones
 * are widened. `tight` keeps the limits as they are. */
void us_plot_axis_fit(struct us_plot_axis *axis, double low, double high, bool log, bool tight, int most);

/* Position of a value, 0 to 1 within the axis. */
double us_plot_axis_map(const struct us_plot_axis *axis, double value);

#endif
