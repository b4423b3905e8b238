/* err.c: status and message. */
#include "base/err.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void set_message(struct us_err *err, enum us_status status, const char *format, va_list args) {
  err->status = status;
  vsnprintf(err->message, sizeof err->message, format, args);
  /* Text from a bad file may be quoted in it: still one line. */
  for (char *p = err->message; *p; p++)
    if ((unsigned char)*p < 0x20 || *p == 0x7f) *p = '?';
}

enum us_status us_err_set(struct us_err *err, enum us_status status, const char *format, ...) {
  if (!err) return status;
  va_list args;
  va_start(args, format);
  set_message(err, status, format, args);
  va_end(args);
  return status;
}

enum us_status us_err_errno(struct us_err *err, enum us_status status, const char *format, ...) {
  int cause = errno;
  if (cause == ENOMEM) status = US_ERR_MEMORY;
  if (!err) return status;
  va_list args;
  va_start(args, format);
  set_message(err, status, format, args);
  va_end(args);
  size_t used = strlen(err->message);
  char reason[128];
  /* GNU strerror_r: thread-safe, returns the text. */
  snprintf(err->message + used, sizeof err->message - used, ": %s", strerror_r(cause, reason, sizeof reason));
  return status;
}

enum us_status us_err_prefix(struct us_err *err, const char *format, ...) {
  if (!err) return US_ERR_CHECK; /* the status is lost with the err; callers that need it pass one */
  char old[US_ERR_MESSAGE_MAX];
  memcpy(old, err->message, sizeof old);
  va_list args;
  va_start(args, format);
  set_message(err, err->status, format, args);
  va_end(args);
  size_t used = strlen(err->message);
  snprintf(err->message + used, sizeof err->message - used, ": %s", old);
  return err->status;
}

enum us_status us_err_memory(struct us_err *err, const char *what, unsigned long long bytes) {
  return us_err_set(err, US_ERR_MEMORY, "cannot allocate %llu bytes for %s", bytes, what);
}
