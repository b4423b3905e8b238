/* t_plot.c: pictures, decoded again with libpng; ticks. */
#include "base/plot.h"
#include "base/plot_axis.h"
#include "suite.h"

#include <math.h>
#include <png.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char path[64];
static struct us_err err;

#define OK(call) ck_assert_msg((call) == US_OK, "%s", err.message)

static void make_path(void) {
  strcpy(path, "/tmp/us_t_plot_XXXXXX");
  int fd = mkstemp(path);
  ck_assert_int_ge(fd, 0);
  close(fd);
  err = (struct us_err){0};
}

struct picture {
  png_image image;
  uint8_t *rgb;
};

static struct picture decode(void) {
  struct picture picture = {.image = {.version = PNG_IMAGE_VERSION}};
  ck_assert_msg(png_image_begin_read_from_file(&picture.image, path), "%s", picture.image.message);
  picture.image.format = PNG_FORMAT_RGB;
  picture.rgb = malloc(PNG_IMAGE_SIZE(picture.image));
  ck_assert_msg(png_image_finish_read(&picture.image, NULL, picture.rgb, 0, NULL), "%s",
                picture.image.message);
  return picture;
}

/* Number of pixels of exactly this colour inside a rectangle. */
static int count_colour(const struct picture *picture, int colour, int x0, int y0, int x1, int y1) {
  int count = 0;
  for (int y = y0; y < y1; y++)
    for (int x = x0; x < x1; x++) {
      const uint8_t *p = picture->rgb + 3 * ((size_t)y * picture->image.width + (size_t)x);
      count += p[0] << 16 == (colour & 0xff0000) && p[1] << 8 == (colour & 0xff00) && p[2] == (colour & 0xff);
    }
  return count;
}

static int count_everywhere(const struct picture *picture, int colour) {
  return count_colour(picture, colour, 0, 0, (int)picture->image.width, (int)picture->image.height);
}

#define BLUE       0x0072b2
#define VERMILLION 0xd55e00
#define WHITE      0xffffff

START_TEST(a_picture_has_its_size_and_its_texts) {
  make_path();
  struct us_plot_axes axes = {.title = "Loss", .width = 640, .height = 400};
  double y[3] = {1, 2, 3};
  struct us_plot_series series = {.y = y, .n = 3};
  const char *provenance = "{\"tool\":\"t_plot\",\"who\":\"\xc3\xa9\"}";
  OK(us_plot_xy(path, &axes, &series, 1, provenance, &err));
  FILE *file = fopen(path, "rb");
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
  png_infop info = png_create_info_struct(png);
  ck_assert(setjmp(png_jmpbuf(png)) == 0);
  png_init_io(png, file);
  png_read_info(png, info);
  ck_assert_uint_eq(png_get_image_width(png, info), 640);
  ck_assert_uint_eq(png_get_image_height(png, info), 400);
  png_textp texts;
  int count = 0, found = 0;
  png_get_text(png, info, &texts, &count);
  for (int i = 0; i < count; i++) {
    found += !strcmp(texts[i].key, "provenance") && !strcmp(texts[i].text, provenance);
    found += !strcmp(texts[i].key, "Title") && !strcmp(texts[i].text, "Loss");
  }
  ck_assert_int_eq(found, 2);
  png_destroy_read_struct(&png, &info, NULL);
  fclose(file);
  unlink(path);
}
END_TEST

START_TEST(series_are_drawn_in_their_colours) {
  make_path();
  struct us_plot_axes axes = {.width = 600, .height = 400};
  double low[2] = {0, 0}, high[2] = {10, 10};
  struct us_plot_series series[] = {{.y = low, .n = 2}, {.y = high, .n = 2}};
  OK(us_plot_xy(path, &axes, series, 2, NULL, &err));
  struct picture picture = decode();
  /* The first lies at the bottom of the frame, the second at the top. */
  ck_assert_int_eq(count_colour(&picture, BLUE, 0, 0, 600, 200), 0);
  ck_assert_int_gt(count_colour(&picture, BLUE, 0, 200, 600, 400), 400);
  ck_assert_int_gt(count_colour(&picture, VERMILLION, 0, 0, 600, 200), 400);
  ck_assert_int_eq(count_colour(&picture, VERMILLION, 0, 200, 600, 400), 0);
  ck_assert_int_gt(count_everywhere(&picture, WHITE), 600 * 400 * 8 / 10);
  free(picture.rgb);
  unlink(path);
}
END_TEST

START_TEST(values_that_cannot_be_drawn_leave_a_gap) {
  make_path();
  struct us_plot_axes axes = {.width = 600, .height = 400, .y_log = true, .x_log = true};
  double x[] = {1, 10, 100, 1000, 0, 2000}, y[] = {10, NAN, -1, INFINITY, 5, 0};
  struct us_plot_series series = {.x = x, .y = y, .n = 6, .style = US_PLOT_LINE_POINTS};
  OK(us_plot_xy(path, &axes, &series, 1, NULL, &err));
  struct picture picture = decode();
  int mark = count_everywhere(&picture, BLUE); /* one point is left */
  ck_assert_int_gt(mark, 5);
  ck_assert_int_lt(mark, 80);
  free(picture.rgb);
  unlink(path);
}
END_TEST

START_TEST(a_picture_without_data_has_empty_axes) {
  make_path();
  struct us_plot_axes axes = {.title = "nothing", .x_title = "x", .y_title = "y"};
  struct us_plot_series series = {.name = "none"};
  OK(us_plot_xy(path, &axes, &series, 1, NULL, &err));
  struct picture picture = decode();
  ck_assert_uint_eq(picture.image.width, 1200);
  ck_assert_uint_eq(picture.image.height, 700);
  free(picture.rgb);
  unlink(path);
}
END_TEST

START_TEST(bars_are_as_high_as_their_values) {
  make_path();
  struct us_plot_axes axes = {.width = 800, .height = 500};
  double a[] = {1, 2}, b[] = {4, 8};
  struct us_plot_series series[] = {{.y = a}, {.y = b}}; /* no names: no legend */
  OK(us_plot_bars(path, &axes, (const char *[]){"one", "two"}, 2, series, 2, NULL, &err));
  struct picture picture = decode();
  double blue = count_everywhere(&picture, BLUE), red = count_everywhere(&picture, VERMILLION);
  ck_assert_double_gt(blue, 5000);
  ck_assert_double_eq_tol(red / blue, 4, 0.15);
  int right = count_colour(&picture, VERMILLION, 400, 0, 800, 500);
  ck_assert_double_eq_tol(right / (red - right), 2, 0.1);
  free(picture.rgb);
  unlink(path);
}
END_TEST

START_TEST(spans_are_as_long_as_their_times) {
  make_path();
  struct us_plot_axes axes = {.x_title = "time (us)", .width = 1000, .height = 300};
  struct us_plot_span spans[] = {{0, 30, 0, 0}, {30, 90, 0, 1}, {0, 60, 1, 0}};
  OK(us_plot_timeline(path, &axes, (const char *[]){"w0", "w1"}, 2, (const char *[]){"qkv", "experts"}, 2,
                      spans, 3, NULL, &err));
  struct picture picture = decode();
  double blue = count_colour(&picture, BLUE, 60, 60, 1000, 300);
  double red = count_colour(&picture, VERMILLION, 60, 60, 1000, 300);
  ck_assert_double_eq_tol(blue / red, 1.5, 0.05);
  free(picture.rgb);
  spans[2].row = 2;
  ck_assert_int_eq(us_plot_timeline(path, &axes, (const char *[]){"w0", "w1"}, 2,
                                    (const char *[]){"qkv", "experts"}, 2, spans, 3, NULL, &err),
                   US_ERR_USAGE);
  unlink(path);
}
END_TEST

/* Tables may be in any encoding; cairo draws UTF-8 alone. */
START_TEST(texts_that_are_not_utf8_are_drawn_with_replacements) {
  static const double y[] = {1, 2};
  static const char *const labels[] = {"\xff", "na\xefve"};
  struct us_plot_axes axes = {.title = "caf\xe9", .x_title = "\xe9", .y_title = "\xc3"};
  struct us_plot_series series = {.name = "\xe9t\xe9", .y = y, .n = 2};
  char bytes[4096] = {0};
  make_path();
  OK(us_plot_bars(path, &axes, labels, 2, &series, 1, NULL, &err));
  OK(us_plot_xy(path, &axes, &series, 1, NULL, &err));
  FILE *file = fopen(path, "rb");
  ck_assert_uint_eq(fread(bytes, 1, sizeof bytes, file), sizeof bytes);
  fclose(file);
  ck_assert_ptr_nonnull(memmem(bytes, sizeof bytes, "caf\xef\xbf\xbd", 6)); /* the text chunk "Title" */
  unlink(path);
}
END_TEST

START_TEST(the_same_input_gives_the_same_bytes) {
  make_path();
  struct us_plot_axes axes = {.title = "t", .x_title = "x", .y_title = "y"};
  double y[4] = {1, 5, 2, 8};
  struct us_plot_series series = {.name = "s", .y = y, .n = 4};
  static char once[1 << 20], again[1 << 20];
  size_t sizes[2];
  for (int i = 0; i < 2; i++) {
    OK(us_plot_xy(path, &axes, &series, 1, "{}", &err));
    FILE *file = fopen(path, "rb");
    sizes[i] = fread(i ? again : once, 1, sizeof once, file);
    fclose(file);
  }
  ck_assert_uint_eq(sizes[0], sizes[1]);
  ck_assert_mem_eq(once, again, sizes[0]);
  unlink(path);
}
END_TEST

START_TEST(a_picture_that_cannot_be_written_is_an_error) {
  struct us_plot_axes axes = {.title = "t"};
  double y[4] = {1, 5, 2, 8};
  struct us_plot_series series = {.name = "s", .y = y, .n = 4};
  ck_assert_int_eq(us_plot_xy("/nonexistent/a.png", &axes, &series, 1, NULL, &err), US_ERR_IO);
  ck_assert_ptr_nonnull(strstr(err.message, "/nonexistent/a.png"));
  ck_assert_int_eq(us_plot_xy("/tmp/a.png", &axes, &series, 0, NULL, &err), US_ERR_USAGE);
  axes.width = 100000;
  ck_assert_int_eq(us_plot_xy("/tmp/a.png", &axes, &series, 1, NULL, &err), US_ERR_USAGE);
}
END_TEST

static void expect_ticks(double low, double high, bool log, bool tight, int most, const char *expected) {
  struct us_plot_axis axis;
  us_plot_axis_fit(&axis, low, high, log, tight, most);
  char text[512] = "";
  for (int i = 0; i < axis.tick_count; i++) {
    strcat(text, i ? " " : "");
    strcat(text, axis.labels[i]);
  }
  ck_assert_str_eq(text, expected);
}

START_TEST(ticks_stand_at_round_values) {
  expect_ticks(0, 1, false, false, 6, "0 0.2 0.4 0.6 0.8 1");
  expect_ticks(0.3, 9.7, false, false, 6, "0 2 4 6 8 10");
  expect_ticks(-37, 120, false, false, 6, "-50 0 50 100 150");
  expect_ticks(0, 20000, false, false, 5, "0 5000 10k 15k 20k");
  expect_ticks(1, 19.2e9, false, true, 6, "0 5G 10G 15G");
  expect_ticks(0, 4e-5, false, false, 5, "0 1e-5 2e-5 3e-5 4e-5");
  expect_ticks(1, 8, false, true, 8, "1 2 3 4 5 6 7 8");
  expect_ticks(0.3, 12, true, false, 8, "0.2 0.5 1 2 5 10 20");
  expect_ticks(1e-5, 1, true, false, 7, "1e-5 1e-4 0.001 0.01 0.1 1");
  expect_ticks(1, 1e12, true, false, 7, "1 100 10k 1M 100M 10G 1T");
}
END_TEST

START_TEST(an_axis_always_covers_its_data) {
  uint64_t state = us_test_seed();
  for (int trial = 0; trial < 20000; trial++) {
    double value[2];
    for (int i = 0; i < 2; i++) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      value[i] = exp(((double)(state >> 11) * 0x1p-53 - 0.5) * (trial % 60));
      if (trial % 2 && state & 1024) value[i] = -value[i];
    }
    double low = fmin(value[0], value[1]), high = fmax(value[0], value[1]);
    bool log = trial % 2 == 0;
    struct us_plot_axis axis;
    us_plot_axis_fit(&axis, low, high, log, false, 3 + trial % 8);
    ck_assert_double_ge(us_plot_axis_map(&axis, low), -1e-6);
    ck_assert_double_le(us_plot_axis_map(&axis, high), 1 + 1e-6);
    ck_assert_int_ge(axis.tick_count, 2);
    ck_assert_int_le(axis.tick_count, 14);
    for (int i = 1; i < axis.tick_count; i++) ck_assert_double_gt(axis.ticks[i], axis.ticks[i - 1]);
  }
}
END_TEST

START_TEST(impossible_limits_still_give_an_axis) {
  struct us_plot_axis axis;
  const double bad[][2] = {{INFINITY, -INFINITY}, {NAN, 1}, {3, 3}, {0, 0}, {-2, -2}, {1e300, 1e300}};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    us_plot_axis_fit(&axis, bad[i][0], bad[i][1], false, false, 6);
    ck_assert(isfinite(axis.low) && isfinite(axis.high) && axis.low < axis.high);
    us_plot_axis_fit(&axis, bad[i][0], bad[i][1], true, false, 6);
    ck_assert(isfinite(axis.low) && isfinite(axis.high) && 0 < axis.low && axis.low < axis.high);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("plot");
  tcase_add_test(c, a_picture_has_its_size_and_its_texts);
  tcase_add_test(c, series_are_drawn_in_their_colours);
  tcase_add_test(c, values_that_cannot_be_drawn_leave_a_gap);
  tcase_add_test(c, a_picture_without_data_has_empty_axes);
  tcase_add_test(c, bars_are_as_high_as_their_values);
  tcase_add_test(c, spans_are_as_long_as_their_times);
  tcase_add_test(c, texts_that_are_not_utf8_are_drawn_with_replacements);
  tcase_add_test(c, the_same_input_gives_the_same_bytes);
  tcase_add_test(c, a_picture_that_cannot_be_written_is_an_error);
  tcase_add_test(c, ticks_stand_at_round_values);
  tcase_add_test(c, an_axis_always_covers_its_data);
  tcase_add_test(c, impossible_limits_still_give_an_axis);
  return us_suite("plot", c);
}
US_TEST_MAIN(make_suite)
