/* round_lab.h: the decisions of a round on a GPU without a model: SELECT and ACCEPT of several ranks, each a group of blocks of one
 * small kernel that goes through their operations as the engine does.
 *
 *     struct round_lab lab;
 *     lab_open(&lab, ranks, blocks, N, tiles);             // blocks a rank
 *     lab_logits(&lab, logits);                            // (tiles * 8, N) of all ranks
 *     lab_push(&lab, &state);
 *     lab_run(&lab, ops, count, rounds, flags);
 *     lab_pull(&lab, rank, &state);
 *     lab_close(&lab);
 */
#ifndef US_TESTS_ROUND_LAB_H
#define US_TESTS_ROUND_LAB_H

#include "gpu_test.h"
#include "kernels/engine/engine.h"

#include <vector>

enum { LAB_JITTER = 1, LAB_KEEP_ON = 2, LAB_MAX_OPS = 40 };

/* The kernel alone: the launch's list on `blocks` blocks in all. gate: one word of device memory. Returns a cudaError_t. */
int lab_launch(const struct us_engine_launch *launch, uint32_t blocks, uint32_t *gate, bool keep_on,
               cudaStream_t stream);

struct round_lab {
  uint32_t ranks, blocks, N, tiles, share; /* share: ids a rank */
  struct us_engine_launch launch;
  struct us_engine_op *ops[US_ENGINE_MAX_RANKS];
  float *logits[US_ENGINE_MAX_RANKS]; /* (tiles * 8, share) */
  struct us_engine_mailbox *mailbox;
  uint32_t *gate;
  std::vector<void *> owned;
};

void lab_open(struct round_lab *lab, uint32_t ranks, uint32_t blocks, uint32_t N, uint32_t tiles);
void lab_close(struct round_lab *lab);
void lab_logits(struct round_lab *lab, const float *logits);

/* The same state to every rank. */
void lab_push(struct round_lab *lab, const struct us_engine_state *state);
void lab_pull(const struct round_lab *lab, uint32_t rank, struct us_engine_state *ret_state);

/* SELECT of every tile (draft or target), each behind `wait`; returns how many were written. */
uint32_t lab_selects(const struct round_lab *lab, bool draft, uint32_t wait, struct us_engine_op *ops);
struct us_engine_op lab_accept(const struct round_lab *lab, uint32_t wait);

/* Rounds of a list whose SELECTs may belong to any rank (their logits are filled in here). KEEP_ON: also after a stop. Returns
 * microseconds a round. */
double lab_run(struct round_lab *lab, const struct us_engine_op *ops, uint32_t count, uint32_t rounds,
               int flags);

#endif
