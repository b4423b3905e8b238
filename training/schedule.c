/* schedule.c: the learning rate over a run. */
#include "training/schedule.h"

#include <math.h>
#include <string.h>

enum us_status us_schedule_parse(const char *name, enum us_schedule_kind *ret_kind, struct us_err *err) {
  static const char *const names[] = {"constant", "cosine", "linear", "quadratic"};
  for (int i = 0; i < 4; i++)
    if (strcmp(name, names[i]) == 0) {
      *ret_kind = (enum us_schedule_kind)i;
      return US_OK;
    }
  return us_err_set(err, US_ERR_USAGE, "unknown schedule '%s' (constant, cosine, linear, quadratic)", name);
}

double us_schedule_rate(const struct us_schedule *s, double progress) {
  if (!(progress > 0.0)) progress = 0.0;
  if (progress > 1.0) progress = 1.0;
  if (progress < s->warmup) return s->peak * progress / s->warmup;
  double past = s->warmup < 1.0 ? (progress - s->warmup) / (1.0 - s->warmup) : 1.0, left = 1.0;
  if (s->kind == US_SCHEDULE_COSINE) left = 0.5 + 0.5 * cos(past * 3.14159265358979323846);
  if (s->kind == US_SCHEDULE_LINEAR) left = 1.0 - past;
  if (s->kind == US_SCHEDULE_QUADRATIC) left = (1.0 - past) * (1.0 - past);
  return s->peak * (s->floor + (1.0 - s->floor) * left);
}
