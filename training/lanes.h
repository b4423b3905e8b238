/* lanes.h: what the lanes of a learner fill their passes from: the sequences of a step, or held-out windows.
 *
 *     struct us_lanes lanes = {.learner = learner, .shards = shards, .micro = 8, .length = 512, .seed = 1};
 *     us_lanes_open(&lanes, &err);
 *     us_lanes_step(&lanes, lane, step, batch, pass, arg, &err);          // in us_learner_each: pass(arg, lane) once a forward pass
 *     us_lanes_heldout(&lanes, lane, windows, of, pass, arg, &err);
 *     us_lanes_close(&lanes);
 *
 * A lane takes its rank's share of the sequences (us_learner_share), `micro` of them a pass; pass() finds them in lanes->lane[lane].rows.
 * Different lanes may be filled by different threads at once.
 */
#ifndef US_TRAINING_LANES_H
#define US_TRAINING_LANES_H

#include "training/learner.h"
#include "training/rows.h"

struct us_lane {
  struct us_window window;
  struct us_rows rows; /* of the pass: micro * length at most */
  uint64_t ahead;      /* the step whose first rows are filled already; UINT64_MAX: none */
};

struct us_lanes {
  const struct us_learner *learner; /* borrowed, as the shards are */
  const struct us_shards *shards;
  size_t micro, length; /* sequences of a pass; tokens of one, without the last label */
  uint64_t seed;
  double across;        /* share of a step's sequences in which attention goes on over document edges */
  bool marked_only;     /* labels that the shards do not mark weigh nothing, but for held-out ones */
  struct us_lane *lane; /* (learner->lanes), owned */
};

typedef enum us_status us_lanes_pass(void *arg, uint32_t lane, struct us_err *err);

/* US_ERR_MEMORY. After an error us_lanes_close releases what there is; it allows lanes that were never opened. */
US_CHECKED enum us_status us_lanes_open(struct us_lanes *lanes, struct us_err *err);
void us_lanes_close(struct us_lanes *lanes);

/* Weight of all labels of a step of `batch` sequences. Not while lanes are being filled. */
double us_lanes_labels(struct us_lanes *lanes, uint64_t step, size_t batch);

/* The lane's sequences of a step, pass after pass; behind the last one the next step's first rows are filled, while a GPU is still at
 * it. The first error of a pass ends it. */
US_CHECKED enum us_status us_lanes_step(struct us_lanes *lanes, uint32_t lane, uint64_t step, size_t batch,
                                        us_lanes_pass *pass, void *arg, struct us_err *err);

/* The lane's share of `windows` held-out windows, spread evenly over the first `of`. */
US_CHECKED enum us_status us_lanes_heldout(struct us_lanes *lanes, uint32_t lane, size_t windows, size_t of,
                                           us_lanes_pass *pass, void *arg, struct us_err *err);

#endif
