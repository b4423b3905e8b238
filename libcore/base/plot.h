/* plot.h: PNG pictures of results: lines, points, bars, timelines.
 *
 *     struct us_plot_axes axes = {.title = "Training loss", .x_title = "step", .y_title = "loss (nats)", .y_log = true};
 *     struct us_plot_series series[] = {{.name = "QAT", .x = step, .y = qat, .n = n},
 *                                       {.name = "PTQ", .x = step, .y = ptq, .n = n, .style = US_PLOT_POINTS}};
 *     us_plot_xy("loss.png", &axes, series, 2, provenance_json, &err);
 *
 * Axis titles carry the unit in parentheses. The provenance goes into an iTXt chunk "provenance", the title into "Title".
 * The file is replaced as a whole (atomic.h), and the same input gives the same bytes on one machine. Colours stay apart
 * for colour-blind readers (Okabe and Ito, 2008) and repeat in other shades after eight. NaN and infinite values, and
 * values <= 0 on a logarithmic axis, are left out; bytes of texts that are not UTF-8 become U+FFFD. cairo draws, libpng
 * writes; the caller's locale must not be a decimal-comma one (the toolkit never calls setlocale).
 */
#ifndef US_BASE_PLOT_H
#define US_BASE_PLOT_H

#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>

#define US_PLOT_MAX_SERIES 64
#define US_PLOT_MAX_ROWS   4096

struct us_plot_axes {
  const char *title; /* above the picture; NULL for none */
  const char *x_title, *y_title;
  bool x_log, y_log; /* of us_plot_xy; bars take y_log */
  bool y_from_zero;  /* the linear y axis includes 0; bars always do */
  int width, height; /* pixels; 0 for 1200 x 700 (a timeline grows with its rows) */
};

enum us_plot_style {
  US_PLOT_LINE = 0,
  US_PLOT_POINTS,
  US_PLOT_LINE_POINTS,
};

struct us_plot_series {
  const char *name; /* in the legend; NULL keeps it out */
  enum us_plot_style style;
  const double *x, *y; /* (n); x NULL: 0, 1, 2, ... */
  size_t n;
};

/* Lines and scatter plots. US_ERR_USAGE for no or too many series or an impossible size; a picture without a single
 * point in it is drawn with empty axes. US_ERR_IO when the file cannot be written. */
US_CHECKED enum us_status us_plot_xy(const char *path, const struct us_plot_axes *axes,
                                     const struct us_plot_series *series, size_t series_count,
                                     const char *opt_provenance, struct us_err *err);

/* Grouped bars: one group a label, in each one bar a series. series[i].y (label_count); x and style are ignored. */
US_CHECKED enum us_status us_plot_bars(const char *path, const struct us_plot_axes *axes,
                                       const char *const *labels, size_t label_count,
                                       const struct us_plot_series *series, size_t series_count,
                                       const char *opt_provenance, struct us_err *err);

struct us_plot_span {
  double begin, end; /* on the x axis */
  size_t row, kind;
};

/* A timeline: spans in rows (workers), coloured by kind (operation); y_title and the log flags are ignored. */
US_CHECKED enum us_status us_plot_timeline(const char *path, const struct us_plot_axes *axes,
                                           const char *const *rows, size_t row_count,
                                           const char *const *kinds, size_t kind_count,
                                           const struct us_plot_span *spans, size_t span_count,
                                           const char *opt_provenance, struct us_err *err);

#endif
