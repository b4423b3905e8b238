/* log.c: lines of talk. */
#include "base/log.h"

#include <stdarg.h>
#include <string.h>

#define LINE_MAX_BYTES 2048

bool us_log_shows(const struct us_log *log, enum us_log_level level) {
  return log && log->out && level <= log->level;
}

void us_log_clean(const char *text, char *ret_clean, size_t size) {
  size_t n = 0;
  for (; text[n] && n + 1 < size; n++) {
    unsigned char c = (unsigned char)text[n];
    ret_clean[n] = c < 0x20 || c == 0x7f ? '?' : (char)c;
  }
  ret_clean[n] = 0;
}

static void write_line(const struct us_log *log, const char *label, const char *format, va_list args) {
  char text[LINE_MAX_BYTES], clean[LINE_MAX_BYTES];
  vsnprintf(text, sizeof text, format, args);
  us_log_clean(text, clean, sizeof clean);
  fprintf(log->out, "%s%s%s%s\n", log->name ? log->name : "", log->name ? ": " : "", label, clean);
  fflush(log->out);
}

#define LOG_AT(level_, label_)                                                                               \
  if (!us_log_shows(log, level_)) return;                                                                    \
  va_list args;                                                                                              \
  va_start(args, format);                                                                                    \
  write_line(log, label_, format, args);                                                                     \
  va_end(args)

void us_log_warning(const struct us_log *log, const char *format, ...) {
  LOG_AT(US_LOG_WARNING, "warning: ");
}
void us_log_notice(const struct us_log *log, const char *format, ...) {
  LOG_AT(US_LOG_NOTICE, "");
}
void us_log_info(const struct us_log *log, const char *format, ...) {
  LOG_AT(US_LOG_INFO, "");
}
void us_log_debug(const struct us_log *log, const char *format, ...) {
  LOG_AT(US_LOG_DEBUG, "debug: ");
}
