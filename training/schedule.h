/* schedule.h: the learning rate over a run.
 *
 *     struct us_schedule s = {.kind = US_SCHEDULE_COSINE, .peak = 3e-3, .floor = 0.1, .warmup = 0.02};
 *     double rate = us_schedule_rate(&s, (step + 0.5) / steps);      // or elapsed time / time budget
 *
 * A function of progress in [0, 1], so that a run can be cut by steps or by time.
 */
#ifndef US_TRAINING_SCHEDULE_H
#define US_TRAINING_SCHEDULE_H

#include "base/err.h"

enum us_schedule_kind {
  US_SCHEDULE_CONSTANT,
  US_SCHEDULE_COSINE,
  US_SCHEDULE_LINEAR,
  US_SCHEDULE_QUADRATIC, /* the square of what is left: high at first, and long near the floor */
};

struct us_schedule {
  enum us_schedule_kind kind;
  double peak;
  double floor;  /* the last rate as a fraction of the peak */
  double warmup; /* fraction of the run that climbs linearly from 0 */
};

US_CHECKED enum us_status us_schedule_parse(const char *name, enum us_schedule_kind *ret_kind,
                                            struct us_err *err);

/* Rate at `progress`, clamped to [0, 1]. */
double us_schedule_rate(const struct us_schedule *schedule, double progress);

#endif
