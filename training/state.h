/* state.h: the state of a training run on disk: masters, moments, step, clock; two files that take turns.
 *
 *     struct us_train_state state = {.params = &params, .options = "pico seed 1 batch 8 ..."};
 *     us_train_state_read("run.state", &state, &found, &err);       // the newer whole file of run.state.0 and .1
 *     us_train_state_write("run.state", &state, &err);              // over the older one, atomically
 *
 * A kill at any moment leaves at least one whole file. Everything random is a function of (seed, step), so step is also the
 * position of the generators and in the data. HDF5, kind "train-state" (docs/formats.md).
 */
#ifndef US_TRAINING_STATE_H
#define US_TRAINING_STATE_H

#include "training/params.h"

struct us_train_state {
  struct us_params *params; /* borrowed; values and moments are read into it */
  const char *options;      /* what must not change between stop and resume; compared as text */
  uint64_t step;            /* steps taken */
  uint64_t tokens;          /* tokens seen */
  double seconds;           /* time spent training */
  int slot;                 /* 0 or 1: which file the next write replaces */
};

/* Fill the state from the newer of the two files. Neither exists: *ret_found is false and nothing changes. US_ERR_INPUT
 * when the tensors or the options differ (and says how), or when files exist but none is whole. */
US_CHECKED enum us_status us_train_state_read(const char *path, struct us_train_state *state, bool *ret_found,
                                              struct us_err *err);

/* Write to path.SLOT and turn the slot. US_ERR_CHECK when a value is not finite: no run could go on from there, and the file that is there
 * stays. */
US_CHECKED enum us_status us_train_state_write(const char *path, struct us_train_state *state,
                                               struct us_err *err);

/* Whether either file exists. */
bool us_train_state_exists(const char *path);

#endif
