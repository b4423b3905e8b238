/* tile_buffers.h: making room for the activations of a pass. Internal to plan/. */
#ifndef US_PLAN_TILE_BUFFERS_H
#define US_PLAN_TILE_BUFFERS_H

#include "plan/tile_pass.h"

/* Room for R rows of any layer of model and drafter (NULL: none). What the buffers held is lost when they grow. */
US_CHECKED enum us_status us_tile_buffers_reserve(struct us_tile_buffers *buffers,
                                                  const struct us_model *model, const struct us_draft *draft,
                                                  size_t R, struct us_err *err);

/* Scratch of at least so many floats for each worker. */
US_CHECKED enum us_status us_tile_buffers_reserve_scratch(struct us_tile_buffers *buffers,
                                                          size_t floats_a_worker, int workers,
                                                          struct us_err *err);
void us_tile_buffers_release(struct us_tile_buffers *buffers);

#endif
