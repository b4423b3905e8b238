/* slots_train.h: sequences that step together on the GPU, a slot each: what a slot's next row is, when a sequence ends, and what
 * comes after it. The host need not look between steps.
 *
 *     us_slots_start(&slots, stream);             // the first sequences go to the slots
 *     ... a pass over slots.token, slots.position; us_sample_train over slots.row to slots.drawn ...
 *     us_slots_advance(&slots, stream);           // prompts go on, drawn tokens are committed, ended sequences make room
 *
 * A prompt's tokens are fed one a step, as the drawn ones are, but for its last one if it is held: its slot has a sequence and no token
 * until somebody has filled the slot's caches and calls us_slots_resume. A sequence ends as in decode/sequence.c: at a stop id, at
 * max_tokens, or when its last `gram` tokens occur `repeats` times in what it generated. Slots that become free in a step
 * take the next sequences in the order of slots: the same every run. Without a sequence left a slot's token is -1.
 *
 * All pointers are device memory. A call returns a cudaError_t.
 */
#ifndef US_KERNELS_SLOTS_TRAIN_H
#define US_KERNELS_SLOTS_TRAIN_H

#include "kernels/sample/sample_train.h"

#ifdef __cplusplus
extern "C" {
#endif

#define US_SLOTS_STOPS 16

struct us_slots_sequence {
  uint64_t prompt, ids; /* where they begin in slots.prompts and slots.ids */
  uint64_t seed;
  uint32_t prompt_count, max_tokens; /* at least 1 */
};

enum us_slots_finish { US_SLOTS_GOES_ON, US_SLOTS_STOP, US_SLOTS_LENGTH, US_SLOTS_LOOP };

struct us_slots_result {
  uint32_t count, finish; /* GOES_ON until then */
};

struct us_slots_status {
  uint32_t next, finished; /* sequences begun, ended */
  uint32_t broken;         /* 1 + a sequence whose logits were not finite; it does not go on. 0: none */
  uint32_t position;       /* its, of the token that could not be drawn */
  uint64_t tokens;         /* drawn */
};

struct us_slots {
  uint32_t slots, sequences;
  const struct us_slots_sequence *sequence; /* (sequences) */
  const int32_t *prompts;
  int32_t *ids;
  struct us_slots_result *result; /* (sequences) zeroed before */
  int32_t *index;                 /* (slots) sequence of a slot; -1: none */
  int32_t *token;                 /* (slots) input of the next pass; -1: none, or the prompt is held */
  uint32_t *position;             /* (slots) of that token */
  struct us_sample_row *row;      /* (slots) what is drawn after it */
  int32_t *drawn;                 /* (slots) */
  uint8_t *ended;                 /* (slots) scratch */
  struct us_slots_status *status; /* zeroed before */
  int32_t stop[US_SLOTS_STOPS];
  uint32_t stops;
  uint32_t gram, repeats; /* repeats 0: loops are not cut */
  uint32_t held;          /* prompts of at least so many tokens are, two or more; 0: none */
};

int us_slots_start(const struct us_slots *slots, cudaStream_t stream);
int us_slots_advance(const struct us_slots *slots, cudaStream_t stream);

/* Slots whose prompts were packed into rows go on at the prompt's last token, which is not among them: row r is position[r] of the prompt
 * of slot[r], if that is not negative. */
int us_slots_resume(const struct us_slots *slots, uint32_t rows, const int32_t *slot,
                    const uint32_t *position, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
