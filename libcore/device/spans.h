/* spans.h: walking the spans that the engine recorded; for breakdown.c and critical_path.c.
 *
 * A lane is one role of one block: its spans in the order of their ends, round after round; an operation's waits come before the
 * operation itself.
 */
#ifndef US_DEVICE_SPANS_H
#define US_DEVICE_SPANS_H

#include "device/breakdown.h"

/* Roles of a block, as kernels/engine/engine.cu numbers them. */
enum { US_SPANS_COMPUTE, US_SPANS_STREAM, US_SPANS_EPILOGUE };

static inline const struct us_engine_span *us_spans_of(const struct us_breakdown_spans *s, uint32_t block,
                                                       uint32_t role, uint32_t *ret_count) {
  uint32_t lane = block * US_ENGINE_ROLES + role, seen = s->counts[lane];
  *ret_count = seen < s->capacity ? seen : s->capacity;
  return s->spans + (size_t)lane * s->capacity;
}

/* Whether a round begins between two spans of a lane: the list starts again. */
static inline bool us_spans_wrap(const struct us_engine_span *before, const struct us_engine_span *span) {
  return span->op < before->op;
}

/* Rounds of a lane whose spans are all there. */
static inline uint32_t us_spans_rounds(const struct us_breakdown_spans *s, uint32_t block, uint32_t role) {
  uint32_t count, rounds = 0;
  const struct us_engine_span *span = us_spans_of(s, block, role, &count);
  for (uint32_t i = 1; i < count; i++) rounds += us_spans_wrap(&span[i - 1], &span[i]);
  return rounds + (count && s->counts[block * US_ENGINE_ROLES + role] <= s->capacity);
}

/* Rounds that every block has whole in both roles. US_ERR_CHECK: no more than the `skip` at the start. */
static inline enum us_status us_spans_whole(const struct us_breakdown_spans *s, const uint32_t roles[2],
                                            uint32_t skip, uint32_t *ret_rounds, struct us_err *err) {
  *ret_rounds = UINT32_MAX;
  for (uint32_t block = 0; block < s->blocks; block++)
    for (int i = 0; i < 2; i++) {
      uint32_t whole = us_spans_rounds(s, block, roles[i]);
      if (whole < *ret_rounds) *ret_rounds = whole;
    }
  if (*ret_rounds > skip) return US_OK;
  return us_err_set(err, US_ERR_CHECK, "%u spans a role of a block are too few for %u rounds", s->capacity,
                    skip + 1);
}

static inline enum us_program_kind us_spans_program(const struct us_engine_op *op) {
  return op->program == US_ENGINE_PASS_TARGET  ? US_PROGRAM_TARGET
         : op->program == US_ENGINE_PASS_DRAFT ? US_PROGRAM_DRAFT
                                               : US_PROGRAM_CONTEXT;
}

/* Of the tile program, or US_TASK_OP_COUNT. */
static inline uint32_t us_spans_task(const struct us_engine_op *op) {
  return op->task_op < US_TASK_OP_COUNT ? op->task_op : US_TASK_OP_COUNT;
}

#endif
