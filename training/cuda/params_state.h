/* params_state.h: what params.c, update.c and oscillation.c keep beside the arenas: lists of work on the device, figures, scratch. Internal. */
#ifndef US_TRAINING_CUDA_PARAMS_STATE_H
#define US_TRAINING_CUDA_PARAMS_STATE_H

#include "kernels/optim/adamw_train.h"
#include "kernels/optim/muon_train.h"
#include "kernels/optim/oscillation_train.h"
#include "kernels/quant/quant_train.h"
#include "training/cuda/params.h"

/* Single values that kernels write, and their copies on the host. */
struct us_cuda_params_figures {
  uint64_t bad;   /* arena index of the first master that is not finite, at the last refresh */
  uint64_t index; /* of the first gradient that is not finite, from the owned range's begin on */
  double square;  /* of the owned gradients */
  float factor;   /* that gradients are multiplied by */
};

/* Matrices of one shape, next to each other in the list of matrices. */
struct us_cuda_muon_group {
  size_t rows, cols;
  double decay;
  size_t first, count;
  size_t batch; /* multiplied at once */
};

struct us_cuda_params_state {
  struct us_quant_tile *tiles; /* device */
  size_t tile_count;
  struct us_cuda_params_figures *device, *host; /* host: pinned */
  void *sum_scratch;                            /* device */

  /* What is watched for oscillation, of the owned range: tiles to round anew, spans to compare. */
  struct us_quant_tile *watched_tiles;   /* device */
  struct us_watched_span *watched_spans; /* device */
  size_t watched_tile_count, watched_span_count;

  /* The optimizer's work, listed at the first update of a kind. */
  bool listed;
  enum us_optim_kind listed_kind;
  struct us_adamw_span *spans; /* device */
  size_t span_count;
  struct us_muon_matrix *matrices;   /* device */
  struct us_cuda_muon_group *groups; /* host */
  size_t group_count, scratch_bytes;
  void *scratch; /* device, of Muon */
};

/* List what is watched, once a set's life; and what us_params_hold does, for the owned range. */
US_CHECKED enum us_status us_cuda_watch_list(struct us_cuda_params *set, struct us_err *err);
void us_cuda_watch_hold(struct us_cuda_params *set, const struct us_oscillation_rule *rule);
void us_cuda_watch_release(struct us_cuda_params_state *state);

/* The tiles that round tensor p; returns how many. opt_tiles NULL: only counts. */
size_t us_cuda_param_tiles(const struct us_param *p, struct us_quant_tile *opt_tiles);

/* A list to new memory of the device. Waits. */
US_CHECKED enum us_status us_cuda_params_send(struct us_cuda *cuda, const void *list, size_t bytes,
                                              const char *what, void **ret_memory, struct us_err *err);

/* Kernels count from the arena's begin, what is owned alone from the owned range's. */
static inline float *us_cuda_from_begin(const struct us_cuda_params *set, float *owned) {
  return owned - set->owned.begin;
}

void us_cuda_update_release(struct us_cuda_params_state *state);

#endif
