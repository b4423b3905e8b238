/* ownership.h: which rank updates which tensors.
 *
 *     struct us_owned owned[8];
 *     us_ownership_plan(&params, US_OPTIM_MUON, 8, owned);      // owned[r]: floats [begin, end) of the arenas
 *
 * Each rank owns a run of whole tensors, so that Muon's matrices stay in one piece, that sums of gradients go to their owner and new
 * values from it in one transfer each, and that moments are held once. Runs are cut by the cost of the update: AdamW by memory,
 * 28 bytes a value; Muon by its products, 5 steps of 6 n min(rows, cols) operations.
 */
#ifndef US_TRAINING_OWNERSHIP_H
#define US_TRAINING_OWNERSHIP_H

#include "training/optim.h"

/* Floats of the arenas; begin and end are multiples of 16. */
struct us_owned {
  size_t begin, end;
};

/* Fill owned (ranks): together they cover the arenas once, in the order of ranks; some may be empty. A function of the arguments
 * alone, so that all processes agree. */
void us_ownership_plan(const struct us_params *params, enum us_optim_kind kind, uint32_t ranks,
                       struct us_owned *owned);

#endif
