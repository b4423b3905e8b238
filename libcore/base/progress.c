/* progress.c: one line of progress. */
#include "base/progress.h"

#include <stdarg.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define DELAY_SECONDS   2.0
#define REDRAW_SECONDS  0.1
#define NEWLINE_SECONDS 30.0

static double monotonic(void *arg) {
  (void)arg;
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

void us_progress_start(struct us_progress *progress, FILE *out, const char *label, const char *unit,
                       uint64_t total) {
  *progress =
      (struct us_progress){.out = out, .label = label, .unit = unit, .total = total, .now = monotonic};
  if (!out) return;
  progress->terminal = isatty(fileno(out)) != 0;
  progress->started = monotonic(NULL);
  progress->shown = -1;
}

/* 1234567 as "1.2M": decimal thousands, since these count things. */
static void short_count(double value, char text[16]) {
  static const char units[] = " KMGTP";
  int unit = 0;
  while (value >= 999.5 && unit < 5) {
    value /= 1000;
    unit++;
  }
  if (unit == 0)
    snprintf(text, 16, value == (double)(long long)value ? "%.0f" : "%.1f", value);
  else
    snprintf(text, 16, "%.1f%c", value, units[unit]);
}

static void short_time(double seconds, char text[16]) {
  if (seconds > 359999) seconds = 359999; /* 99 hours */
  unsigned s = (unsigned)(seconds + 0.5);
  if (s >= 3600)
    snprintf(text, 16, "%u:%02u:%02u", s / 3600, s / 60 % 60, s % 60);
  else
    snprintf(text, 16, "%u:%02u", s / 60, s % 60);
}

static void draw(struct us_progress *progress, double elapsed) {
  char done[16], total[16], rate[16], left[16], line[256];
  double speed = elapsed > 0 ? (double)progress->done / elapsed : 0;
  short_count((double)progress->done, done);
  short_count((double)progress->total, total);
  short_count(speed, rate);
  size_t used = 0;
  if (progress->total) {
    double share = (double)progress->done / (double)progress->total;
    used = (size_t)snprintf(line, sizeof line, "%.60s: %s/%s %.20s %.0f %%, %s/s", progress->label, done,
                            total, progress->unit, 100 * share, rate);
    if (speed > 0 && progress->done < progress->total) {
      double seconds = (double)(progress->total - progress->done) / speed, limit = progress->limit;
      if (limit > 0 && seconds > limit - elapsed) seconds = limit > elapsed ? limit - elapsed : 0;
      short_time(seconds, left);
      used += (size_t)snprintf(line + used, sizeof line - used, ", %s left", left);
    }
  } else
    used = (size_t)snprintf(line, sizeof line, "%.60s: %s %.20s, %s/s", progress->label, done, progress->unit,
                            rate);
  if (progress->note[0]) snprintf(line + used, sizeof line - used, ", %s", progress->note);
  if (progress->terminal)
    fprintf(progress->out, "\r%s\033[K", line);
  else
    fprintf(progress->out, "%s\n", line);
  fflush(progress->out);
  progress->drawn = true;
  progress->drawn_done = progress->done;
}

void us_progress_set(struct us_progress *progress, uint64_t done) {
  progress->done = done;
  if (!progress->out) return;
  double elapsed = progress->now(progress->now_arg) - progress->started;
  double since = elapsed - progress->shown;
  bool due = progress->drawn ? since >= (progress->terminal ? REDRAW_SECONDS : NEWLINE_SECONDS)
                             : elapsed >= (progress->terminal ? DELAY_SECONDS : NEWLINE_SECONDS);
  if (!due) return;
  progress->shown = elapsed;
  draw(progress, elapsed);
}

void us_progress_note(struct us_progress *progress, const char *format, ...) {
  if (!progress->out) return;
  va_list args;
  va_start(args, format);
  vsnprintf(progress->note, sizeof progress->note, format, args);
  va_end(args);
}

void us_progress_end(struct us_progress *progress) {
  if (!progress->out || !progress->drawn) return;
  if (progress->terminal || progress->done != progress->drawn_done)
    draw(progress, progress->now(progress->now_arg) - progress->started);
  if (progress->terminal) fputc('\n', progress->out);
  fflush(progress->out);
  progress->out = NULL;
}
