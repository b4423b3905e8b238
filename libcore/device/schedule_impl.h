/* schedule_impl.h: the parts of a schedule: programs and their units, cuts, buffers, the list. Internal to device/schedule*.c.
 *
 * schedule.c        creates: limits, programs, buffers, list, upload
 * schedule_units.c  lowers the programs of a round; groups a rank's tasks into units
 * schedule_cut.c    how a matrix is cut among blocks and warps
 * schedule_buffers.c  the arena of activations
 * schedule_list.c   a unit becomes an operation a row tile; waits, exchanges
 * schedule_fill.c   what an operation is told about weights and buffers
 * schedule_check.c  the proof; schedule_fields.c: of sizes; schedule_order.c, schedule_pieces.c: of hand-offs
 */
#ifndef US_DEVICE_SCHEDULE_IMPL_H
#define US_DEVICE_SCHEDULE_IMPL_H

#include "device/schedule.h"
#include "plan/program.h"

/* ---- programs and units ------------------------------------------------------------------------------------------ */

/* The tile programs of a round; NULL: not part of it. */
struct us_schedule_programs {
  struct us_program *program[US_ENGINE_PASSES];
};

US_CHECKED enum us_status us_schedule_lower(const struct us_device_schedule *schedule,
                                            struct us_schedule_programs *ret_programs, struct us_err *err);
void us_schedule_programs_release(struct us_schedule_programs *programs);

/* All tasks of one rank with the same operation, layer and slot; of the experts' gate and up, all slots; of the context's keys
 * and values, all layers. */
struct us_schedule_unit {
  enum us_task_op op;
  uint32_t layer, slot;
  uint32_t waits[US_TASK_WAITS], wait_count; /* units whose tasks signal what this one's wait for */
  uint32_t begin, end;                       /* of its tasks' ranges, those of slot or layer 0 */
  uint32_t repeats;                          /* slots or layers */
  uint64_t bytes;                            /* of one expert for expert operations; else of all */
};

struct us_schedule_units {
  struct us_schedule_unit *unit;
  uint32_t count;
};

/* US_ERR_CHECK: a range with a gap, or a task that waits for a unit of no operation. */
US_CHECKED enum us_status us_schedule_units_create(const struct us_program *program, uint32_t rank,
                                                   struct us_schedule_units *ret_units, struct us_err *err);

/* ---- cuts -------------------------------------------------------------------------------------------------------- */

#define US_SCHEDULE_NOMINAL_BLOCKS                                                                           \
  132 /* SMs of an H200: balance is tuned for it, results do not depend on it */

struct us_schedule_cut {
  uint32_t parts, warps, subs;
};

/* How to cut a product's K. most_parts: 1 if the output is stored once; addends: partial sums that a part adds for whoever adds
 * them up. False: K is too long for so few parts. */
bool us_schedule_cut(const struct us_engine_matrix *w, uint32_t most_parts, uint32_t addends,
                     struct us_schedule_cut *ret_cut);

/* The cut of a task's matrix: sums that are exchanged and the router's logits may have parts. US_ERR_USAGE: K is too long. */
US_CHECKED enum us_status us_schedule_cut_of(const struct us_device_schedule *s, uint32_t program,
                                             enum us_task_op op, uint32_t layer,
                                             struct us_schedule_cut *ret_cut, struct us_err *err);

/* Bytes in a stage of a step of the experts' down projection: three tiles' pages, and behind them (`rows`) the activations of all
 * rows (kernels/engine/down.cuh: 64 bytes apart). */
uint32_t us_schedule_step_bytes(const struct us_engine_matrix *w, uint32_t step_slices, bool rows);

/* Fills step_slices, steps and stage_steps: two steps a stage if their pages fit; the kernel takes one where the rows do not. */
void us_schedule_cut_down(const struct us_engine_matrix *w, struct us_engine_down *down);

/* Row tiles, `tile` the first, that a task's operation takes together. Experts are gathered (kernels/engine/gather.cuh, down_gather.cuh) if
 * their pages are MXFP4, down's of four groups; other products are wide (wide.cuh) unless they are MXFP4, and
 * so are reductions (reduce_wide.cuh). */
uint32_t us_schedule_together(const struct us_device_schedule *s, uint32_t program, enum us_task_op op,
                              uint32_t layer, uint32_t tile);

/* ---- attention --------------------------------------------------------------------------------------------------- */

enum us_schedule_attention {
  US_SCHEDULE_FULL,
  US_SCHEDULE_WINDOWED,
  US_SCHEDULE_DRAFT,
  US_SCHEDULE_ATTENTIONS
};

static inline bool us_schedule_drafts(const struct us_device_schedule *s) {
  return s->options.drafter;
}

/* Slots that the drafter's one SELECT chooses one after the other, if it has a Markov head; 0: all rows of a tile are chosen at once. */
static inline uint32_t us_schedule_slots(const struct us_device_schedule *s) {
  return s->options.drafter && s->weights->draft_shape.markov ? s->options.block - 1 : 0;
}

/* Places that the drafter's SELECTs take in their buffer; the target's, one a row tile, come after them. */
static inline uint32_t us_schedule_draft_places(const struct us_device_schedule *s) {
  return !s->options.drafter ? 0 : us_schedule_slots(s) ? us_schedule_slots(s) : s->row_tiles;
}

/* Geometry of a kind, or NULL where the model has no such layer. */
const struct us_attention_shape *us_schedule_attention(const struct us_device_schedule *s,
                                                       enum us_schedule_attention kind);

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

/* Bytes of a row tile as an operand, and as plain rows. */
static inline uint64_t us_schedule_operand_bytes(uint64_t columns) {
  return columns / 32 * 512;
}
static inline uint64_t us_schedule_row_bytes(uint64_t columns) {
  return US_ENGINE_ROWS * columns * sizeof(float);
}

/* Activations of all row tiles, tile after tile; `..._tile`: bytes of one. */
struct us_schedule_buffers {
  float *residual;                    /* (tiles * 8, D) */
  uint8_t *normed, *attended, *inner; /* operands: D, H*V and F columns */
  uint64_t normed_tile, attended_tile, inner_tile;
  float *
      qkv; /* (tiles * 8, qkv rows of the layer): without a gap, since a row's new keys may lie in another tile */
  float *router; /* (tiles, parts, 8, E) */
  uint8_t *pairs;
  uint64_t router_tile, pairs_tile;
  uint64_t *choices; /* (tiles, US_ENGINE_ACTIVE); NULL: one row tile */
  uint8_t *features;
  uint64_t features_tile;
  float *context_kv; /* (tiles * 8, rows of draft_kv) */
  float *logits, *draft_logits;
  uint64_t logits_tile;
  uint8_t *partial; /* of attention */
  uint32_t *arrivals;
  uint64_t partial_tile, arrivals_tile;
  float *rope[US_SCHEDULE_ATTENTIONS]; /* kinds with the same angles share one */
  uint32_t *routed;                    /* (L, tiles * 8, top_k) */
};

struct us_schedule_owner {
  struct us_device_memory_ops memory;
  struct us_schedule_buffers buffers;
  uint8_t *arena;
  uint64_t arena_bytes;
  void *ops, *done; /* on the device */
};

static inline struct us_schedule_owner *us_schedule_owner(const struct us_device_schedule *s) {
  return (struct us_schedule_owner *)s->owner;
}

/* Sets the schedule's buffers and rank.slots, addends, D and pointers into one allocation, filled as round 0 expects it. */
US_CHECKED enum us_status us_schedule_buffers_create(struct us_device_schedule *s, struct us_err *err);

/* ---- list -------------------------------------------------------------------------------------------------------- */

/* Fills ops, begin, end, head_end and the counts. */
US_CHECKED enum us_status us_schedule_list_create(struct us_device_schedule *s,
                                                  const struct us_schedule_programs *programs,
                                                  struct us_err *err);

/* Sets everything of an operation that does not refer to another: kind, program, layer, task_op and the row tiles are there. slot: of a
 * reduction's tasks. US_ERR_USAGE: a K that is too long. */
US_CHECKED enum us_status us_schedule_fill(const struct us_device_schedule *s, struct us_engine_op *op,
                                           uint32_t slot, struct us_err *err);

/* Items that an operation deals out to blocks one by one; of the experts', when as many as can be are active. */
uint32_t us_schedule_items(const struct us_device_schedule *s, const struct us_engine_op *op);

static inline const struct us_device_layer *us_schedule_layer(const struct us_device_schedule *s,
                                                              uint32_t program, uint32_t layer) {
  return program == US_ENGINE_PASS_TARGET ? &s->weights->layers[layer] : &s->weights->draft_layers[layer];
}

/* The matrix that a task's operation streams; NULL: none. */
const struct us_device_matrix *us_schedule_matrix(const struct us_device_schedule *s, uint32_t program,
                                                  enum us_task_op op, uint32_t layer);

/* Index of a tapped layer among the taps, or US_ENGINE_NONE. */
uint32_t us_schedule_tap(const struct us_device_schedule *s, uint32_t layer);

/* The norm that a RESIDUAL_NORM after attention (slot 0) or the MLP (1) of a layer applies; EMBED_NORM: layer 0's first. */
const float *us_schedule_norm(const struct us_device_schedule *s, uint32_t program, enum us_task_op op,
                              uint32_t layer, uint32_t slot);

/* Row tiles [first, last] whose rows may share a sequence's block with rows of `tile`, as ACCEPT lays rows out. */
struct us_schedule_span {
  uint32_t first, last;
};
struct us_schedule_span us_schedule_span(const struct us_device_schedule *s, uint32_t tile);

/* ---- the proof --------------------------------------------------------------------------------------------------- */

/* A product whose epilogue warps count it done. One of several row tiles that is not the experts' ends in the compute warps, as a vector
 * operation does. */
static inline bool us_schedule_is_gemm(const struct us_engine_op *op) {
  return op->kind == US_ENGINE_GEMM && (op->row_tiles == 1 || op->gemm.experts);
}
/* A dense product of several row tiles (kernels/engine/wide.cuh). */
static inline bool us_schedule_is_wide(const struct us_engine_op *op) {
  return op->kind == US_ENGINE_GEMM && op->row_tiles > 1 && !op->gemm.experts;
}
static inline bool us_schedule_pushes(const struct us_engine_op *op) {
  return op->kind == US_ENGINE_DOWN || (op->kind == US_ENGINE_GEMM && op->gemm.epilogue == US_ENGINE_PUSH);
}
/* Whether it pushes the sums of an exchange: one a row tile, one behind the other. */
static inline uint32_t us_schedule_exchange(const struct us_engine_op *op);
static inline bool us_schedule_pushes_to(const struct us_engine_op *op, uint32_t exchange) {
  return us_schedule_pushes(op) && exchange - us_schedule_exchange(op) < op->row_tiles;
}
static inline bool us_schedule_reduces(const struct us_engine_op *op) {
  return op->kind == US_ENGINE_EMBED || op->kind == US_ENGINE_REDUCE;
}
static inline uint32_t us_schedule_exchange(const struct us_engine_op *op) {
  return op->kind == US_ENGINE_DOWN   ? op->down.exchange
         : op->kind == US_ENGINE_GEMM ? op->gemm.exchange
                                      : op->reduce.exchange;
}

/* "operation 12 (qkv, target, layer 1, row tile 0): ..." as US_ERR_CHECK. */
US_PRINTF(4, 5)
enum us_status us_schedule_wrong(const struct us_device_schedule *s, uint32_t op, struct us_err *err,
                                 const char *format, ...);

/* Sizes, cuts and numbers of every operation. */
US_CHECKED enum us_status us_schedule_check_fields(const struct us_device_schedule *s, struct us_err *err);

/* Bytes that an operation reads, or writes. One that pieces of several operations make up: the taps. */
struct us_schedule_range {
  uintptr_t begin, end;
};

/* Whether words that blocks hand to each other within a rank carry their own flag: in lists of one row tile, a router's logits and attended
 * rows. */
static inline bool us_schedule_flags(const struct us_device_schedule *s) {
  return s->row_tiles == 1;
}
/* Whether `op` reads such words, and so waits for no count. */
static inline bool us_schedule_reads_flags(const struct us_engine_op *op) {
  if (op->kind == US_ENGINE_GEMM) return op->gemm.awaits;
  return op->kind == US_ENGINE_ROUTE && op->route.flagged;
}
/* Words that a reduction makes absent: the logits of the router that reads its operand, or the attended rows of the layer that does. NULL:
 * none. slot as in struct us_schedule_unit. */
US_CHECKED enum us_status us_schedule_absent(const struct us_device_schedule *s,
                                             const struct us_engine_op *op, uint32_t slot,
                                             uint32_t **ret_words, uint32_t *ret_count, struct us_err *err);

/* What an operation reads first of all: a product its operand, attention its projection, a choice its logits. Empty for others. One
 * piece each of its row tiles, from 0; pairs are one piece. */
struct us_schedule_range us_schedule_input(const struct us_device_schedule *s, const struct us_engine_op *op,
                                           uint32_t piece);
static inline uint32_t us_schedule_inputs(const struct us_engine_op *op) {
  return op->kind == US_ENGINE_DOWN ? 1 : op->row_tiles;
}
/* What it writes for another operation to read; a reduction's is the normed operand. Empty: partial sums, state. */
struct us_schedule_range us_schedule_output(const struct us_device_schedule *s, const struct us_engine_op *op,
                                            uint32_t piece);
static inline uint32_t us_schedule_outputs(const struct us_engine_op *op) {
  return op->kind == US_ENGINE_GEMM && op->gemm.experts ? 1 : op->row_tiles;
}

/* Hand-offs over several rounds; *ret_order keeps what every operation knows, for whoever asks about tasks. */
struct us_schedule_order;
US_CHECKED enum us_status us_schedule_check_order(const struct us_device_schedule *s,
                                                  struct us_schedule_order **ret_order, struct us_err *err);
void us_schedule_order_free(struct us_schedule_order *order);

/* Whether every block knows, when it begins operation `op` of a round, that `before` of the same round is done and visible. */
bool us_schedule_after(const struct us_schedule_order *order, uint32_t op, uint32_t before);

/* The operation that wrote what `op` reads first of all for one of its row tiles; US_ENGINE_NONE: none of the list. */
uint32_t us_schedule_source(const struct us_schedule_order *order, uint32_t op, uint32_t row_tile);

#endif
