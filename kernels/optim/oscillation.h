/* oscillation.h: one weight whose rounded value goes to and fro between two codes, and when to fix it.
 *
 *     struct us_oscillation_rule rule = {.memory = 0.99f, .threshold = 0.05f};
 *     struct us_oscillation o = {share, mean, turn};                             // all 0 before the first step
 *     value = us_oscillation_watch(&rule, before, after, value, &o);             // after an update, rounded values of both masters
 *
 * Straight-through gradients push a master whose best value lies between two codes over the edge and back, step after step, so
 * that what is multiplied jumps by a whole code while nothing is learned (Nagel et al. 2022, Overcoming Oscillations in
 * Quantization-Aware Training). Their remedy, section 4.3: f = memory f + (1 - memory) [the code moved against its last move] each
 * step, and where f is above a threshold the master is fixed at the running mean of what it was rounded to. The same bits on a CPU and
 * a GPU: products and sums in FP32, not contracted.
 */
#ifndef US_KERNELS_OSCILLATION_H
#define US_KERNELS_OSCILLATION_H

#include "base/hd.h"

/* A smaller move, as a share of the value, is that of a block's FP32 scale: codes of e4m3 and e2m1 are at least a 16th apart. */
#define US_OSCILLATION_MOVE 0.03125f

#define US_OSCILLATION_HELD 2.0f /* .turn of a weight that is fixed */

struct us_oscillation_rule {
  float memory;    /* of both running means, below 1 */
  float threshold; /* INFINITY: nothing is fixed yet */
};

struct us_oscillation {
  float share; /* of the last steps in which the code moved back: the paper's f */
  float mean;  /* of the rounded values; of a fixed weight its value */
  float turn;  /* last move: 1 up, -1 down, 0 none yet; US_OSCILLATION_HELD */
};

/* The master's value after a step that took its rounded value from `before` to `after`: `value`, or where the weight is fixed. */
static US_HD float us_oscillation_watch(const struct us_oscillation_rule *rule, float before, float after,
                                        float value, struct us_oscillation *o) {
  if (o->turn == US_OSCILLATION_HELD) return o->mean;
  float move = after - before, rest = 1.0f - rule->memory;
  float size = move < 0.0f ? -move : move, from = before < 0.0f ? -before : before;
  float turn = !(size > US_OSCILLATION_MOVE * from) ? 0.0f : move < 0.0f ? -1.0f : 1.0f;
  float back = turn * o->turn < 0.0f ? 1.0f : 0.0f;
  o->mean = rule->memory * (o->turn == 0.0f ? before : o->mean) + rest * after;
  o->share = rule->memory * o->share + rest * back;
  if (turn != 0.0f) o->turn = turn;
  if (!(o->share > rule->threshold)) return value;
  o->turn = US_OSCILLATION_HELD;
  return o->mean;
}

#endif
