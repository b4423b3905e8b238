/* plot_png.h: write pixels as a PNG file with text chunks (internal to plot.c).
 *
 *     struct us_plot_text texts[] = {{"Title", "Loss"}, {"provenance", json}};
 *     us_plot_png_write("loss.png", width, height, stride, pixels, texts, 2, &err);
 */
#ifndef US_BASE_PLOT_PNG_H
#define US_BASE_PLOT_PNG_H

#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

struct us_plot_text {
  const char *key, *value; /* a NULL value is left out */
};

/* `pixels`: cairo's ARGB32, opaque, `stride` bytes a row. Atomic. US_ERR_IO, US_ERR_MEMORY. */
US_CHECKED enum us_status us_plot_png_write(const char *path, int width, int height, size_t stride,
                                            const uint8_t *pixels, const struct us_plot_text *texts,
                                            int text_count, struct us_err *err);

#endif
