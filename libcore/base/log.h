/* log.h: talk for people, on a stream that the tool chose.
 *
 *     struct us_log log = {.out = stderr, .level = US_LOG_NOTICE, .name = "qat-quant"};
 *     us_log_notice(&log, "layer %d of %d", l, L);
 *
 * A log is passed explicitly; NULL logs nothing. Lines are written whole, so threads may share one.
 */
#ifndef US_BASE_LOG_H
#define US_BASE_LOG_H

#include "base/err.h"
#include <stdbool.h>
#include <stdio.h>

enum us_log_level { US_LOG_WARNING, US_LOG_NOTICE, US_LOG_INFO, US_LOG_DEBUG };

struct us_log {
  FILE *out;
  enum us_log_level level; /* the most talkative level that is written */
  const char *name;        /* put before every line */
};

void us_log_warning(const struct us_log *log, const char *format, ...) US_PRINTF(2, 3);
void us_log_notice(const struct us_log *log, const char *format, ...)
    US_PRINTF(2, 3); /* shown unless --quiet */
void us_log_info(const struct us_log *log, const char *format, ...) US_PRINTF(2, 3);  /* shown with -v */
void us_log_debug(const struct us_log *log, const char *format, ...) US_PRINTF(2, 3); /* shown with -vv */

/* True when lines of `level` are written: to skip costly arguments. */
bool us_log_shows(const struct us_log *log, enum us_log_level level);

/* Copy `text` (up to size - 1 bytes) with control characters replaced by '?', so that a file's name cannot steer the
 * terminal. */
void us_log_clean(const char *text, char *ret_clean, size_t size);

#endif
