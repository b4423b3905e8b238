/* progress.h: how far long work is, on stderr.
 *
 *     struct us_progress progress;
 *     us_progress_start(&progress, quiet ? NULL : stderr, "training", "tokens", total);
 *     for (...) { ...; us_progress_set(&progress, done); }
 *     us_progress_end(&progress);
 *
 *     training: 1.2M/8.0M tokens 15 %, 21.3K/s, 5:19 left, loss 2.314
 *
 * Nothing is shown in the first two seconds, so short work stays silent. On a terminal one line is redrawn ten times a
 * second at most; elsewhere a new line is written every thirty seconds. One thread at a time.
 */
#ifndef US_BASE_PROGRESS_H
#define US_BASE_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct us_progress {
  FILE *out; /* NULL: silent */
  const char *label, *unit;
  uint64_t total, done, drawn_done; /* total 0: not known */
  double started, shown;
  double limit; /* seconds after which the work ends whatever is left; 0: none. To be set after the start */
  bool terminal, drawn;
  char note[64];
  double (*now)(void *arg); /* seconds, never going back; tests set their own */
  void *now_arg;
};

/* label and unit must outlive the progress. */
void us_progress_start(struct us_progress *progress, FILE *out, const char *label, const char *unit,
                       uint64_t total);

/* `done` of the total so far; cheap enough to call a million times a second. */
void us_progress_set(struct us_progress *progress, uint64_t done);

/* A few words at the end of the line, "loss 2.314". */
void us_progress_note(struct us_progress *progress, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Last state, and the end of the line if one was drawn. */
void us_progress_end(struct us_progress *progress);

#endif
