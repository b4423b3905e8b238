/* plot.c: PNG pictures of results.
 *
 * Contents: canvas, text, colours and marks, layout, axes, lines and points, bars, timeline.
 */
#include "base/plot.h"

#include "base/plot_axis.h"
#include "base/plot_png.h"
#include "base/utf8.h"
#include "base/version.h"
#include <cairo.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TITLE_SIZE 20.0
#define TEXT_SIZE  15.0
#define GAP        10.0
#define LEGEND_ROW 24.0

/* -- Canvas -- */

struct canvas {
  const struct us_plot_axes *axes;
  cairo_surface_t *surface;
  cairo_t *cr;
  double width, height;
  double left, top, right, bottom; /* the frame that data is drawn in */
  struct us_plot_axis x, y;
};

static enum us_status canvas_init(struct canvas *canvas, const char *path, const struct us_plot_axes *axes,
                                  int height, struct us_err *err) {
  int width = axes->width ? axes->width : 1200;
  *canvas = (struct canvas){.axes = axes, .width = width, .height = height};
  if (width < 200 || height < 150 || width > 16000 || height > 16000)
    return us_err_set(err, US_ERR_USAGE, "%s: a picture of %d x %d pixels (200 x 150 to 16000 x 16000)", path,
                      width, height);
  canvas->surface = cairo_image_surface_create(CAIRO_FORMAT_ARGB32, width, height);
  canvas->cr = cairo_create(canvas->surface);
  cairo_set_source_rgb(canvas->cr, 1, 1, 1);
  cairo_paint(canvas->cr);
  /* No hinting: glyph positions then do not depend on the machine's font settings. */
  cairo_font_options_t *options = cairo_font_options_create();
  cairo_font_options_set_antialias(options, CAIRO_ANTIALIAS_GRAY);
  cairo_font_options_set_hint_style(options, CAIRO_HINT_STYLE_NONE);
  cairo_font_options_set_hint_metrics(options, CAIRO_HINT_METRICS_OFF);
  cairo_set_font_options(canvas->cr, options);
  cairo_font_options_destroy(options);
  return US_OK;
}

#define TEXT_BYTES 512 /* more than any text here has room for */

/* The beginning of `text` as UTF-8, which cairo and PNG insist on: each byte that is not becomes U+FFFD. */
static void make_utf8(const char *text, char ret_utf8[TEXT_BYTES]) {
  size_t used = 0;
  while (*text) {
    int n = us_utf8_length(text, 4, NULL); /* the final NUL ends a character that is cut */
    const char *from = n > 0 ? text : "\xef\xbf\xbd";
    size_t bytes = n > 0 ? (size_t)n : 3;
    if (used + bytes >= TEXT_BYTES) break;
    memcpy(ret_utf8 + used, from, bytes);
    used += bytes;
    text += n > 0 ? n : 1;
  }
  ret_utf8[used] = 0;
}

/* Write the picture if nothing failed, and release the canvas. */
static enum us_status canvas_finish(struct canvas *canvas, const char *path, const char *opt_provenance,
                                    enum us_status status, struct us_err *err) {
  if (canvas->cr && status == US_OK && cairo_status(canvas->cr) != CAIRO_STATUS_SUCCESS)
    status = us_err_set(err, US_ERR_MEMORY, "%s: cairo: %s", path,
                        cairo_status_to_string(cairo_status(canvas->cr)));
  if (canvas->cr && status == US_OK) {
    char software[64], title[TEXT_BYTES];
    snprintf(software, sizeof software, "UltraSpeed %s", us_version());
    make_utf8(canvas->axes->title ? canvas->axes->title : "", title);
    struct us_plot_text texts[] = {{"Title", canvas->axes->title ? title : NULL},
                                   {"Software", software},
                                   {"provenance", opt_provenance}};
    cairo_surface_flush(canvas->surface);
    status = us_plot_png_write(path, (int)canvas->width, (int)canvas->height,
                               (size_t)cairo_image_surface_get_stride(canvas->surface),
                               cairo_image_surface_get_data(canvas->surface), texts, 3, err);
  }
  if (canvas->cr) cairo_destroy(canvas->cr);
  if (canvas->surface) cairo_surface_destroy(canvas->surface);
  return status;
}

/* -- Text -- */

enum align { ALIGN_LEFT, ALIGN_CENTER, ALIGN_RIGHT };

static void set_font(struct canvas *canvas, double size, bool bold) {
  cairo_select_font_face(canvas->cr, "DejaVu Sans", CAIRO_FONT_SLANT_NORMAL,
                         bold ? CAIRO_FONT_WEIGHT_BOLD : CAIRO_FONT_WEIGHT_NORMAL);
  cairo_set_font_size(canvas->cr, size);
}

static double text_width(struct canvas *canvas, const char *text) {
  char utf8[TEXT_BYTES];
  cairo_text_extents_t extents;
  make_utf8(text, utf8);
  cairo_text_extents(canvas->cr, utf8, &extents);
  return extents.x_advance;
}

/* Copy `text`, cut with an ellipsis so that it is at most `room` wide in the font that is set. */
static void shorten(struct canvas *canvas, const char *text, double room, char *ret_text, size_t size) {
  size_t length = strlen(text);
  if (length > size - 4) length = size - 4;
  while (true) {
    while (length > 0 && ((unsigned char)text[length] & 0xc0) == 0x80)
      length--; /* not inside a UTF-8 sequence */
    snprintf(ret_text, size, "%.*s%s", (int)length, text, text[length] ? "\xe2\x80\xa6" : "");
    if (length == 0 || text_width(canvas, ret_text) <= room) return;
    length--;
  }
}

/* Text whose baseline begins, is centred or ends at (x, y), turned by `angle` around that point. */
static void draw_text(struct canvas *canvas, double x, double y, enum align align, double angle,
                      const char *text) {
  char utf8[TEXT_BYTES];
  double width = text_width(canvas, text);
  make_utf8(text, utf8);
  cairo_save(canvas->cr);
  cairo_translate(canvas->cr, x, y);
  cairo_rotate(canvas->cr, angle);
  cairo_move_to(canvas->cr, align == ALIGN_LEFT ? 0 : align == ALIGN_CENTER ? -width / 2 : -width, 0);
  cairo_show_text(canvas->cr, utf8);
  cairo_restore(canvas->cr);
}

/* -- Colours and marks -- */

/* Okabe and Ito's palette without black, in an order that keeps neighbours apart. */
static const double palette[8][3] = {
    {0.000, 0.447, 0.698}, {0.835, 0.369, 0.000}, {0.000, 0.620, 0.451}, {0.800, 0.475, 0.655},
    {0.902, 0.624, 0.000}, {0.337, 0.706, 0.914}, {0.380, 0.380, 0.380}, {0.941, 0.894, 0.259},
};

static void set_colour(struct canvas *canvas, size_t index) {
  const double *base = palette[index % 8];
  size_t shade = index / 8 % 3;
  double white = shade == 1 ? 0.5 : 0, factor = shade == 2 ? 0.55 : 1 - white;
  cairo_set_source_rgb(canvas->cr, base[0] * factor + white, base[1] * factor + white,
                       base[2] * factor + white);
}

static void set_gray(struct canvas *canvas, double level) {
  cairo_set_source_rgb(canvas->cr, level, level, level);
}

static void draw_mark(struct canvas *canvas, double x, double y, size_t shape) {
  cairo_t *cr = canvas->cr;
  const double r = 4;
  cairo_new_path(cr);
  switch (shape % 4) {
  case 0:
    cairo_arc(cr, x, y, r, 0, 2 * M_PI);
    break;
  case 1:
    cairo_rectangle(cr, x - 0.88 * r, y - 0.88 * r, 1.76 * r, 1.76 * r);
    break;
  case 2:
    cairo_move_to(cr, x, y - 1.2 * r);
    cairo_line_to(cr, x + 1.1 * r, y + 0.8 * r);
    cairo_line_to(cr, x - 1.1 * r, y + 0.8 * r);
    break;
  default:
    cairo_move_to(cr, x, y - 1.25 * r);
    cairo_line_to(cr, x + 1.25 * r, y);
    cairo_line_to(cr, x, y + 1.25 * r);
    cairo_line_to(cr, x - 1.25 * r, y);
  }
  cairo_close_path(cr);
  cairo_fill(cr);
}

static void set_line(struct canvas *canvas, size_t index) {
  static const double dashes[] = {8, 4};
  cairo_set_line_width(canvas->cr, 2.2);
  cairo_set_line_join(canvas->cr, CAIRO_LINE_JOIN_ROUND);
  cairo_set_dash(canvas->cr, dashes, index < 8 ? 0 : 2, 0);
}

/* -- Layout -- */

enum swatch { SWATCH_BOX, SWATCH_SERIES };

struct legend {
  size_t count;
  const char *names[US_PLOT_MAX_SERIES];
  size_t colours[US_PLOT_MAX_SERIES];
  enum us_plot_style styles[US_PLOT_MAX_SERIES];
  enum swatch swatch;
};

static void draw_swatch(struct canvas *canvas, const struct legend *legend, size_t i, double x, double y) {
  set_colour(canvas, legend->colours[i]);
  if (legend->swatch == SWATCH_BOX) {
    cairo_rectangle(canvas->cr, x + 6, y - 11, 14, 12);
    cairo_fill(canvas->cr);
    return;
  }
  if (legend->styles[i] != US_PLOT_POINTS) {
    set_line(canvas, legend->colours[i]);
    cairo_move_to(canvas->cr, x, y - 5);
    cairo_line_to(canvas->cr, x + 26, y - 5);
    cairo_stroke(canvas->cr);
  }
  if (legend->styles[i] != US_PLOT_LINE) draw_mark(canvas, x + 13, y - 5, legend->colours[i]);
}

/* Draw the legend from the line at y on, wrapped at the right margin; returns the y below it. */
static double draw_legend(struct canvas *canvas, const struct legend *legend, double y) {
  if (!legend->count) return y;
  const double begin = 22, end = canvas->width - 22;
  double x = begin;
  y += LEGEND_ROW - 6;
  set_font(canvas, TEXT_SIZE, false);
  for (size_t i = 0; i < legend->count; i++) {
    char name[128];
    shorten(canvas, legend->names[i], end - begin - 40, name, sizeof name);
    double width = 34 + text_width(canvas, name);
    if (x > begin && x + width > end) x = begin, y += LEGEND_ROW;
    draw_swatch(canvas, legend, i, x, y);
    set_gray(canvas, 0.1);
    draw_text(canvas, x + 34, y, ALIGN_LEFT, 0, name);
    x += width + 24;
  }
  return y + 6;
}

/* Draw title and legend; sets the top of the frame. */
static void draw_head(struct canvas *canvas, const struct legend *legend) {
  double y = 14;
  if (canvas->axes->title) {
    char title[256];
    set_font(canvas, TITLE_SIZE, true);
    set_gray(canvas, 0);
    shorten(canvas, canvas->axes->title, canvas->width - 44, title, sizeof title);
    draw_text(canvas, 22, y + TITLE_SIZE, ALIGN_LEFT, 0, title);
    y += TITLE_SIZE + GAP;
  }
  canvas->top = draw_legend(canvas, legend, y) + GAP + 4;
}

static double tick_width(struct canvas *canvas, const struct us_plot_axis *axis) {
  double widest = 0;
  for (int i = 0; i < axis->tick_count; i++) widest = fmax(widest, text_width(canvas, axis->labels[i]));
  return widest;
}

/* The frame's other sides; `below` is what the x labels take, axes title not counted. */
static void set_frame(struct canvas *canvas, double label_width, double below) {
  canvas->left = 22 + label_width + GAP + (canvas->axes->y_title ? TEXT_SIZE + GAP : 0);
  canvas->right = canvas->width - 34;
  canvas->bottom = canvas->height - 16 - below - (canvas->axes->x_title ? TEXT_SIZE + GAP : 0);
}

static double map_x(const struct canvas *canvas, double value) {
  return canvas->left + us_plot_axis_map(&canvas->x, value) * (canvas->right - canvas->left);
}

static double map_y(const struct canvas *canvas, double value) {
  return canvas->bottom - us_plot_axis_map(&canvas->y, value) * (canvas->bottom - canvas->top);
}

/* -- Axes -- */

static void draw_segment(struct canvas *canvas, double x0, double y0, double x1, double y1) {
  cairo_move_to(canvas->cr, x0, y0);
  cairo_line_to(canvas->cr, x1, y1);
  cairo_stroke(canvas->cr);
}

static void begin_grid(struct canvas *canvas) {
  cairo_set_dash(canvas->cr, NULL, 0, 0);
  cairo_set_line_width(canvas->cr, 1);
  set_font(canvas, TEXT_SIZE, false);
}

static void draw_x_ticks(struct canvas *canvas) {
  begin_grid(canvas);
  double last_end = -1e9;
  for (int i = 0; i < canvas->x.tick_count; i++) {
    double at = floor(map_x(canvas, canvas->x.ticks[i])) + 0.5,
           half = text_width(canvas, canvas->x.labels[i]) / 2;
    set_gray(canvas, 0.88);
    draw_segment(canvas, at, canvas->top, at, canvas->bottom);
    if (at - half < last_end + 8) continue; /* the line stays, the label would touch its neighbour */
    set_gray(canvas, 0.2);
    draw_text(canvas, at, canvas->bottom + 8 + TEXT_SIZE, ALIGN_CENTER, 0, canvas->x.labels[i]);
    last_end = at + half;
  }
}

static void draw_y_ticks(struct canvas *canvas) {
  begin_grid(canvas);
  for (int i = 0; i < canvas->y.tick_count; i++) {
    double at = floor(map_y(canvas, canvas->y.ticks[i])) + 0.5;
    set_gray(canvas, 0.88);
    draw_segment(canvas, canvas->left, at, canvas->right, at);
    set_gray(canvas, 0.2);
    draw_text(canvas, canvas->left - GAP, at + 0.36 * TEXT_SIZE, ALIGN_RIGHT, 0, canvas->y.labels[i]);
  }
}

static void draw_axis_titles(struct canvas *canvas) {
  char text[256];
  set_font(canvas, TEXT_SIZE, false);
  set_gray(canvas, 0);
  if (canvas->axes->x_title) {
    shorten(canvas, canvas->axes->x_title, canvas->right - canvas->left, text, sizeof text);
    draw_text(canvas, (canvas->left + canvas->right) / 2, canvas->height - 18, ALIGN_CENTER, 0, text);
  }
  if (canvas->axes->y_title) {
    shorten(canvas, canvas->axes->y_title, canvas->bottom - canvas->top, text, sizeof text);
    draw_text(canvas, 16 + TEXT_SIZE, (canvas->top + canvas->bottom) / 2, ALIGN_CENTER, -M_PI / 2, text);
  }
}

static void draw_axis_lines(struct canvas *canvas) {
  begin_grid(canvas);
  set_gray(canvas, 0.25);
  draw_segment(canvas, canvas->left, floor(canvas->bottom) + 0.5, canvas->right, floor(canvas->bottom) + 0.5);
  draw_segment(canvas, floor(canvas->left) + 0.5, canvas->top, floor(canvas->left) + 0.5, canvas->bottom);
}

static void clip_to_frame(struct canvas *canvas, double margin) {
  cairo_save(canvas->cr);
  cairo_rectangle(canvas->cr, canvas->left - margin, canvas->top - margin,
                  canvas->right - canvas->left + 2 * margin, canvas->bottom - canvas->top + 2 * margin);
  cairo_clip(canvas->cr);
}

/* -- Lines and points -- */

static enum us_status check_series(const char *path, size_t count, struct us_err *err) {
  if (count >= 1 && count <= US_PLOT_MAX_SERIES) return US_OK;
  return us_err_set(err, US_ERR_USAGE, "%s: a plot of %zu series (1 to %d)", path, count, US_PLOT_MAX_SERIES);
}

static struct legend make_legend(const struct us_plot_series *series, size_t count, enum swatch swatch) {
  struct legend legend = {.swatch = swatch};
  for (size_t i = 0; i < count; i++) {
    if (!series[i].name) continue;
    legend.names[legend.count] = series[i].name;
    legend.colours[legend.count] = i;
    legend.styles[legend.count++] = series[i].style;
  }
  return legend;
}

static bool get_point(const struct us_plot_axes *axes, const struct us_plot_series *series, size_t i,
                      double *ret_x, double *ret_y) {
  *ret_x = series->x ? series->x[i] : (double)i;
  *ret_y = series->y[i];
  return isfinite(*ret_x) && isfinite(*ret_y) && (!axes->x_log || *ret_x > 0) && (!axes->y_log || *ret_y > 0);
}

static void find_limits(const struct us_plot_axes *axes, const struct us_plot_series *series, size_t count,
                        double limits[4]) {
  limits[0] = limits[2] = INFINITY;
  limits[1] = limits[3] = -INFINITY;
  for (size_t s = 0; s < count; s++)
    for (size_t i = 0; i < series[s].n; i++) {
      double x, y;
      if (!get_point(axes, &series[s], i, &x, &y)) continue;
      limits[0] = fmin(limits[0], x);
      limits[1] = fmax(limits[1], x);
      limits[2] = fmin(limits[2], y);
      limits[3] = fmax(limits[3], y);
    }
  if (axes->y_from_zero && !axes->y_log && limits[2] <= limits[3]) {
    limits[2] = fmin(limits[2], 0);
    limits[3] = fmax(limits[3], 0);
  }
}

static void draw_line(struct canvas *canvas, const struct us_plot_series *series, size_t index) {
  bool drawing = false;
  set_line(canvas, index);
  if (series->n > 500) cairo_set_line_width(canvas->cr, 1.2); /* a noisy curve must not become a band */
  cairo_new_path(canvas->cr);
  for (size_t i = 0; i < series->n; i++) {
    double x, y;
    if (!get_point(canvas->axes, series, i, &x, &y)) {
      drawing = false; /* a gap */
      continue;
    }
    if (drawing)
      cairo_line_to(canvas->cr, map_x(canvas, x), map_y(canvas, y));
    else
      cairo_move_to(canvas->cr, map_x(canvas, x), map_y(canvas, y));
    drawing = true;
    if (i % 4096 == 4095) { /* long paths cost more than linear time */
      cairo_stroke(canvas->cr);
      cairo_move_to(canvas->cr, map_x(canvas, x), map_y(canvas, y));
    }
  }
  cairo_stroke(canvas->cr);
}

static void draw_series(struct canvas *canvas, const struct us_plot_series *series, size_t index) {
  set_colour(canvas, index);
  if (series->style != US_PLOT_POINTS) draw_line(canvas, series, index);
  if (series->style == US_PLOT_LINE) return;
  for (size_t i = 0; i < series->n; i++) {
    double x, y;
    if (get_point(canvas->axes, series, i, &x, &y))
      draw_mark(canvas, map_x(canvas, x), map_y(canvas, y), index);
  }
}

enum us_status us_plot_xy(const char *path, const struct us_plot_axes *axes,
                          const struct us_plot_series *series, size_t series_count,
                          const char *opt_provenance, struct us_err *err) {
  enum us_status status = check_series(path, series_count, err);
  struct canvas canvas;
  if (status == US_OK) status = canvas_init(&canvas, path, axes, axes->height ? axes->height : 700, err);
  if (status != US_OK) return status;
  struct legend legend = make_legend(series, series_count, SWATCH_SERIES);
  double limits[4];
  find_limits(axes, series, series_count, limits);
  draw_head(&canvas, &legend);
  us_plot_axis_fit(&canvas.y, limits[2], limits[3], axes->y_log, false,
                   (int)(canvas.height - canvas.top - 80) / 60);
  set_font(&canvas, TEXT_SIZE, false);
  set_frame(&canvas, tick_width(&canvas, &canvas.y), TEXT_SIZE + 12);
  us_plot_axis_fit(&canvas.x, limits[0], limits[1], axes->x_log, true,
                   (int)(canvas.right - canvas.left) / 100);
  draw_x_ticks(&canvas);
  draw_y_ticks(&canvas);
  clip_to_frame(&canvas, 5);
  for (size_t i = 0; i < series_count; i++) draw_series(&canvas, &series[i], i);
  cairo_restore(canvas.cr);
  draw_axis_lines(&canvas);
  draw_axis_titles(&canvas);
  return canvas_finish(&canvas, path, opt_provenance, US_OK, err);
}

/* -- Bars -- */

static bool bar_visible(const struct us_plot_axes *axes, double value) {
  return isfinite(value) && (!axes->y_log || value > 0);
}

static void fit_bars(struct canvas *canvas, const struct us_plot_series *series, size_t series_count,
                     size_t label_count) {
  double low = canvas->axes->y_log ? INFINITY : 0, high = canvas->axes->y_log ? -INFINITY : 0;
  for (size_t s = 0; s < series_count; s++)
    for (size_t i = 0; i < label_count; i++)
      if (bar_visible(canvas->axes, series[s].y[i])) {
        low = fmin(low, series[s].y[i]);
        high = fmax(high, series[s].y[i]);
      }
  if (canvas->axes->y_log) low /= 1.5; /* the least bar must have a height */
  us_plot_axis_fit(&canvas->y, low, high, canvas->axes->y_log, false,
                   (int)(canvas->height - canvas->top - 80) / 60);
}

static void draw_bar(struct canvas *canvas, double x, double width, double value, size_t colour) {
  double base = canvas->axes->y_log ? canvas->y.low : 0, y0 = map_y(canvas, base), y1 = map_y(canvas, value);
  set_colour(canvas, colour);
  cairo_rectangle(canvas->cr, x, fmin(y0, y1), width, fabs(y1 - y0));
  cairo_fill(canvas->cr);
  set_font(canvas, TEXT_SIZE - 2, false);
  if (text_width(canvas, "0.888") > width + 4) return; /* all bars are labelled, or none */
  char label[16];
  snprintf(label, sizeof label, "%.3g", value);
  set_gray(canvas, 0.2);
  bool inside = y1 - TEXT_SIZE - 2 < canvas->top || value < base;
  if (inside) set_gray(canvas, 1);
  draw_text(canvas, x + width / 2, inside ? (value < base ? y1 - 5 : y1 + TEXT_SIZE) : y1 - 5, ALIGN_CENTER,
            0, label);
}

#define UPRIGHT_MAX 200.0

/* Room below the frame for the group labels, which stand upright when they would touch. */
static double group_labels_height(struct canvas *canvas, const char *const *labels, size_t count, double slot,
                                  bool *ret_upright) {
  double widest = 0;
  for (size_t i = 0; i < count; i++) widest = fmax(widest, text_width(canvas, labels[i]));
  *ret_upright = widest > slot - 8;
  return *ret_upright ? fmin(widest, UPRIGHT_MAX) + 18 : TEXT_SIZE + 12;
}

static void draw_groups(struct canvas *canvas, const char *const *labels, size_t label_count,
                        const struct us_plot_series *series, size_t series_count, bool upright) {
  double slot = (canvas->right - canvas->left) / (double)label_count;
  double width = 0.8 * slot / (double)series_count;
  if (width > 90) width = 90;
  size_t every = upright ? (size_t)ceil((TEXT_SIZE + 2) / slot) : 1;
  for (size_t i = 0; i < label_count; i++) {
    double middle = canvas->left + ((double)i + 0.5) * slot, x = middle - width * (double)series_count / 2;
    for (size_t s = 0; s < series_count; s++)
      if (bar_visible(canvas->axes, series[s].y[i]))
        draw_bar(canvas, x + (double)s * width + 0.04 * width, 0.92 * width, series[s].y[i], s);
    if (i % every) continue;
    char label[128];
    set_font(canvas, TEXT_SIZE, false);
    set_gray(canvas, 0.2);
    shorten(canvas, labels[i], upright ? UPRIGHT_MAX : slot, label, sizeof label);
    if (upright)
      draw_text(canvas, middle + 0.36 * TEXT_SIZE, canvas->bottom + 8, ALIGN_RIGHT, -M_PI / 2, label);
    else
      draw_text(canvas, middle, canvas->bottom + 8 + TEXT_SIZE, ALIGN_CENTER, 0, label);
  }
}

enum us_status us_plot_bars(const char *path, const struct us_plot_axes *axes, const char *const *labels,
                            size_t label_count, const struct us_plot_series *series, size_t series_count,
                            const char *opt_provenance, struct us_err *err) {
  enum us_status status = check_series(path, series_count, err);
  if (status == US_OK && (label_count < 1 || label_count > US_PLOT_MAX_ROWS))
    status = us_err_set(err, US_ERR_USAGE, "%s: bars for %zu labels (1 to %d)", path, label_count,
                        US_PLOT_MAX_ROWS);
  struct canvas canvas;
  if (status == US_OK) status = canvas_init(&canvas, path, axes, axes->height ? axes->height : 700, err);
  if (status != US_OK) return status;
  struct legend legend = make_legend(series, series_count, SWATCH_BOX);
  if (series_count == 1) legend.count = 0; /* the y title says what it is */
  draw_head(&canvas, &legend);
  fit_bars(&canvas, series, series_count, label_count);
  set_font(&canvas, TEXT_SIZE, false);
  double label_width = tick_width(&canvas, &canvas.y);
  set_frame(&canvas, label_width, 0);
  bool upright;
  double slot = (canvas.right - canvas.left) / (double)label_count;
  set_frame(&canvas, label_width, group_labels_height(&canvas, labels, label_count, slot, &upright));
  draw_y_ticks(&canvas);
  draw_groups(&canvas, labels, label_count, series, series_count, upright);
  draw_axis_lines(&canvas);
  if (!axes->y_log && canvas.y.low < 0) { /* the line that bars stand on */
    double zero = floor(map_y(&canvas, 0)) + 0.5;
    draw_segment(&canvas, canvas.left, zero, canvas.right, zero);
  }
  draw_axis_titles(&canvas);
  return canvas_finish(&canvas, path, opt_provenance, US_OK, err);
}

/* -- Timeline -- */

static void draw_row_labels(struct canvas *canvas, const char *const *rows, size_t row_count,
                            double row_height, double room) {
  size_t every = row_height >= TEXT_SIZE + 1 ? 1 : (size_t)ceil((TEXT_SIZE + 3) / row_height);
  char label[64];
  set_font(canvas, TEXT_SIZE, false);
  set_gray(canvas, 0.2);
  for (size_t i = 0; i < row_count; i += every) {
    shorten(canvas, rows[i], room, label, sizeof label);
    draw_text(canvas, canvas->left - GAP, canvas->top + ((double)i + 0.5) * row_height + 0.36 * TEXT_SIZE,
              ALIGN_RIGHT, 0, label);
  }
}

static void draw_spans(struct canvas *canvas, const struct us_plot_span *spans, size_t span_count,
                       double row_height) {
  double inset = row_height >= 6 ? 0.1 * row_height : 0;
  clip_to_frame(canvas, 0);
  for (size_t i = 0; i < span_count; i++) {
    if (!isfinite(spans[i].begin) || !isfinite(spans[i].end)) continue;
    double x0 = map_x(canvas, spans[i].begin), x1 = map_x(canvas, spans[i].end);
    set_colour(canvas, spans[i].kind);
    cairo_rectangle(canvas->cr, x0, canvas->top + (double)spans[i].row * row_height + inset, x1 - x0,
                    row_height - 2 * inset);
    cairo_fill(canvas->cr);
  }
  cairo_restore(canvas->cr);
}

static enum us_status check_timeline(const char *path, size_t row_count, size_t kind_count,
                                     const struct us_plot_span *spans, size_t span_count,
                                     struct us_err *err) {
  if (row_count < 1 || row_count > US_PLOT_MAX_ROWS || kind_count < 1 || kind_count > US_PLOT_MAX_SERIES)
    return us_err_set(err, US_ERR_USAGE, "%s: a timeline of %zu rows (1 to %d) and %zu kinds (1 to %d)", path,
                      row_count, US_PLOT_MAX_ROWS, kind_count, US_PLOT_MAX_SERIES);
  for (size_t i = 0; i < span_count; i++)
    if (spans[i].row >= row_count || spans[i].kind >= kind_count)
      return us_err_set(err, US_ERR_USAGE, "%s: span %zu: row %zu of %zu, kind %zu of %zu", path, i,
                        spans[i].row, row_count, spans[i].kind, kind_count);
  return US_OK;
}

enum us_status us_plot_timeline(const char *path, const struct us_plot_axes *axes, const char *const *rows,
                                size_t row_count, const char *const *kinds, size_t kind_count,
                                const struct us_plot_span *spans, size_t span_count,
                                const char *opt_provenance, struct us_err *err) {
  enum us_status status = check_timeline(path, row_count, kind_count, spans, span_count, err);
  if (status != US_OK) return status;
  struct legend legend = {.swatch = SWATCH_BOX, .count = kind_count};
  for (size_t i = 0; i < kind_count; i++) {
    legend.names[i] = kinds[i];
    legend.colours[i] = i;
  }
  double low = INFINITY, high = -INFINITY;
  for (size_t i = 0; i < span_count; i++)
    if (isfinite(spans[i].begin) && isfinite(spans[i].end)) {
      low = fmin(low, spans[i].begin);
      high = fmax(high, spans[i].end);
    }
  double wanted = 200 + 30 * (double)row_count;
  int height = axes->height ? axes->height : wanted > 1600 ? 1600 : wanted < 320 ? 320 : (int)wanted;
  struct us_plot_axes own = *axes;
  own.y_title = NULL;
  struct canvas canvas;
  status = canvas_init(&canvas, path, &own, height, err);
  if (status != US_OK) return status;
  draw_head(&canvas, &legend);
  set_font(&canvas, TEXT_SIZE, false);
  double room = 0;
  for (size_t i = 0; i < row_count; i++) room = fmax(room, text_width(&canvas, rows[i]));
  room = fmin(room, 0.2 * canvas.width);
  set_frame(&canvas, room, TEXT_SIZE + 12);
  us_plot_axis_fit(&canvas.x, low, high, false, true, (int)(canvas.right - canvas.left) / 100);
  double row_height = (canvas.bottom - canvas.top) / (double)row_count;
  draw_x_ticks(&canvas);
  draw_spans(&canvas, spans, span_count, row_height);
  draw_row_labels(&canvas, rows, row_count, row_height, room);
  draw_axis_lines(&canvas);
  draw_axis_titles(&canvas);
  return canvas_finish(&canvas, path, opt_provenance, US_OK, err);
}
