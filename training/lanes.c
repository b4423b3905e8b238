/* lanes.c: what the lanes of a learner fill their passes from. */
#include "training/lanes.h"

#include <stdlib.h>

enum us_status us_lanes_open(struct us_lanes *lanes, struct us_err *err) {
  uint32_t n = lanes->learner->lanes;
  lanes->lane = calloc(n, sizeof *lanes->lane);
  enum us_status status = lanes->lane ? US_OK : us_err_memory(err, "lanes", n * sizeof *lanes->lane);
  for (uint32_t i = 0; i < n && status == US_OK; i++) {
    struct us_lane *own = &lanes->lane[i];
    status = us_window_init(&own->window, lanes->length + 1, err);
    if (status == US_OK) status = us_rows_init(&own->rows, lanes->micro * lanes->length, err);
    own->ahead = UINT64_MAX;
  }
  return status;
}

void us_lanes_close(struct us_lanes *lanes) {
  for (uint32_t i = 0; lanes->lane && i < lanes->learner->lanes; i++) {
    us_window_release(&lanes->lane[i].window);
    us_rows_release(&lanes->lane[i].rows);
  }
  free(lanes->lane);
  lanes->lane = NULL;
}

/* Sequences [first, end) of a step, `micro` at most. */
static void fill(const struct us_lanes *lanes, struct us_lane *own, uint64_t step, size_t first, size_t end) {
  own->rows.R = 0;
  for (size_t i = first; i < end && i < first + lanes->micro; i++) {
    us_shards_sample_across(lanes->shards, lanes->seed, step, i, lanes->across, &own->window);
    us_rows_add(&own->rows, &own->window, lanes->marked_only);
  }
}

double us_lanes_labels(struct us_lanes *lanes, uint64_t step, size_t batch) {
  struct us_lane *own = &lanes->lane[0];
  double labels = 0.0;
  if (!lanes->marked_only) return (double)batch * (double)lanes->length;
  own->ahead = UINT64_MAX;
  for (size_t i = 0; i < batch; i++) {
    fill(lanes, own, step, i, i + 1);
    for (size_t r = 0; r < own->rows.R; r++) labels += (double)own->rows.weight[r];
  }
  return labels;
}

enum us_status us_lanes_step(struct us_lanes *lanes, uint32_t lane, uint64_t step, size_t batch,
                             us_lanes_pass *pass, void *arg, struct us_err *err) {
  struct us_lane *own = &lanes->lane[lane];
  size_t first, end;
  enum us_status status = US_OK;
  us_learner_share(lanes->learner, lane, batch, &first, &end);
  for (size_t i = first; i < end && status == US_OK; i += lanes->micro) {
    if (i > first || own->ahead != step) fill(lanes, own, step, i, end);
    status = pass(arg, lane, err);
  }
  fill(lanes, own, step + 1, first, end);
  own->ahead = step + 1;
  return status;
}

enum us_status us_lanes_heldout(struct us_lanes *lanes, uint32_t lane, size_t windows, size_t of,
                                us_lanes_pass *pass, void *arg, struct us_err *err) {
  struct us_lane *own = &lanes->lane[lane];
  size_t i, end;
  enum us_status status = US_OK;
  own->ahead = UINT64_MAX;
  us_learner_share(lanes->learner, lane, windows, &i, &end);
  while (i < end && status == US_OK) {
    own->rows.R = 0;
    for (size_t j = 0; j < lanes->micro && i < end; j++, i++) {
      us_shards_heldout(lanes->shards, i * of / windows, &own->window);
      us_rows_add(&own->rows, &own->window, false);
    }
    if (own->rows.R) status = pass(arg, lane, err);
  }
  return status;
}
