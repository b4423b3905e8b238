/* regions.h: which parts of which buffers a task reads and writes, and whose writing it means to read: what races and coverage
 * are defined on.
 *
 *     struct us_access *accesses = calloc(us_task_accesses_max(program), sizeof *accesses);
 *     if (us_task_extent(program, task, &begin, &end)) n = us_task_accesses(program, task, accesses);
 */
#ifndef US_PLAN_REGIONS_H
#define US_PLAN_REGIONS_H

#include "plan/program.h"

#include <stdbool.h>

/* Activation buffers of a pass. All but LOGITS, CONTEXT and the partials belong to the rank that works on them; the
 * partials are written by one rank and read by all. */
enum us_buffer {
  US_BUFFER_RESIDUAL,          /* (R, D) */
  US_BUFFER_NORMED,            /* (R, D) */
  US_BUFFER_QKV,               /* (R, qkv rows) */
  US_BUFFER_ATTENDED,          /* (R, H*V) */
  US_BUFFER_PARTIAL_ATTENTION, /* (R, D) */
  US_BUFFER_PARTIAL_MLP,       /* (R, D) */
  US_BUFFER_ROUTER,            /* (R, E) */
  US_BUFFER_ROUTES,            /* (1, 1) */
  US_BUFFER_EXPERT_INNER,      /* (R, F), one a slot */
  US_BUFFER_DENSE_INNER,       /* (R, F) */
  US_BUFFER_LOGITS,            /* (R, N) */
  US_BUFFER_KV,                /* (R, KV heads), one a layer */
  US_BUFFER_CONTEXT,           /* (R, D) */
  US_BUFFER_COUNT
};

/* A rectangle of one buffer: rows [row0, row1), columns [col0, col1). index: slot or layer. */
struct us_region {
  enum us_buffer buffer;
  uint32_t rank, index;
  uint32_t row0, row1, col0, col1;
};

/* All tasks of one op, layer and slot, on every rank. */
struct us_operation {
  enum us_task_op op;
  uint32_t layer, slot;
};

struct us_access {
  struct us_region region;
  bool writes;
  struct us_operation from; /* of a read: the operation that must have written the region last */
};

/* The whole [begin, end) that the tiles of this task's operation share out on its rank. False: such a program has no such task
 * (op, rank, layer or slot), and us_task_accesses must not be asked. */
bool us_task_extent(const struct us_program *program, const struct us_task *task, uint32_t *ret_begin,
                    uint32_t *ret_end);

/* The norm before a layer's attention: of the embedding, or the last of the layer below; `layer` may be the number of layers: the norm
 * before the head. */
struct us_operation us_norm_before(uint32_t layer);

/* Most accesses a task of this program can have. */
size_t us_task_accesses_max(const struct us_program *program);

/* Fill accesses (room for us_task_accesses_max); returns their number. */
size_t us_task_accesses(const struct us_program *program, const struct us_task *task,
                        struct us_access *accesses);

/* "residual", ...; never NULL. */
const char *us_buffer_name(enum us_buffer buffer);

#endif
