/* slots_train.cu: a warp a slot commits its token and looks for the sequence's end; then one block deals out what comes next.
 *
 * Bound: two launches. Looking for loops reads what a sequence generated, 4 bytes a token, from L2; the block reads a byte a slot.
 */
#include "kernels/slots/slots_train.h"

#define THREADS      256  /* a warp a slot */
#define DEAL_THREADS 1024 /* a thread a slot, so many at a time */

enum { STAYS = 0, FREE = 1, DREW = 2 };

/* What the slot's next pass reads, and what is drawn behind it. */
static __device__ void set_next(const struct us_slots &s, uint32_t slot,
                                const struct us_slots_sequence &sequence, int32_t token, uint32_t position) {
  s.token[slot] = token;
  s.position[slot] = position;
  s.row[slot].seed = sequence.seed;
  s.row[slot].position = position + 1;
  s.row[slot].wanted = position + 1 >= sequence.prompt_count;
}

static __device__ void set_waiting(const struct us_slots &s, uint32_t slot) {
  s.token[slot] = -1;
  s.position[slot] = 0;
  s.row[slot].wanted = 0;
}

static __device__ void set_first(const struct us_slots &s, uint32_t slot, uint32_t index) {
  const struct us_slots_sequence sequence = s.sequence[index];
  s.index[slot] = (int32_t)index;
  if (s.held && sequence.prompt_count >= s.held)
    set_waiting(s, slot);
  else
    set_next(s, slot, sequence, s.prompts[sequence.prompt], 0);
}

/* How often the last `gram` of ids (count) occur in them, the last time included: us_sequence_loops by a warp. */
static __device__ uint32_t occurrences(const int32_t *ids, uint32_t count, uint32_t gram) {
  uint32_t found = 0;
  if (count < gram) return 0;
  const int32_t *last = ids + count - gram;
  const int32_t end = last[gram - 1];
  for (uint32_t at = threadIdx.x % 32; at <= count - gram; at += 32) {
    bool same = ids[at + gram - 1] == end;
    for (uint32_t k = 0; k < gram && same; k++) same = ids[at + k] == last[k];
    found += same;
  }
  return __reduce_add_sync(~0u, found);
}

/* All lanes know the token; those before it are in memory, and so is it once the warp has met. */
static __device__ uint32_t finish_of(const struct us_slots &s, const struct us_slots_sequence &sequence,
                                     const int32_t *ids, int32_t token, uint32_t count) {
  for (uint32_t i = 0; i < s.stops; i++)
    if (s.stop[i] == token) return US_SLOTS_STOP;
  if (s.repeats && occurrences(ids, count, s.gram) >= s.repeats) return US_SLOTS_LOOP;
  return count >= sequence.max_tokens ? US_SLOTS_LENGTH : US_SLOTS_GOES_ON;
}

static __global__ void __launch_bounds__(THREADS) commit(const __grid_constant__ struct us_slots s) {
  const uint32_t slot = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (slot >= s.slots) return;
  const int32_t index = s.index[slot];
  if (index < 0 || s.token[slot] < 0) {
    if (lane == 0) s.ended[slot] = STAYS;
    return;
  }
  const struct us_slots_sequence sequence = s.sequence[index];
  const uint32_t next = s.position[slot] + 1;
  const int32_t drawn = s.drawn[slot];
  __syncwarp(); /* every lane has read what lane 0 changes */
  if (next < sequence.prompt_count) {
    if (lane == 0) {
      set_next(s, slot, sequence, s.prompts[sequence.prompt + next], next);
      s.ended[slot] = STAYS;
    }
    return;
  }
  if (drawn < 0) {
    if (lane == 0) {
      if (atomicCAS(&s.status->broken, 0u, (uint32_t)index + 1) == 0) s.status->position = next;
      s.ended[slot] = FREE;
    }
    return;
  }
  int32_t *ids = s.ids + sequence.ids;
  const uint32_t count = next - sequence.prompt_count + 1;
  if (lane == 0) ids[count - 1] = drawn;
  __syncwarp();
  const uint32_t finish = finish_of(s, sequence, ids, drawn, count);
  if (lane) return;
  if (finish == US_SLOTS_GOES_ON) {
    set_next(s, slot, sequence, drawn, next);
    s.ended[slot] = DREW;
  } else {
    s.result[index].count = count;
    s.result[index].finish = finish;
    s.ended[slot] = DREW | FREE;
  }
}

/* The thread's place among those of the block with `flag`, and how many there are. */
static __device__ uint32_t rank_in_block(bool flag, uint32_t *ret_all, uint32_t *warps) {
  const uint32_t mask = __ballot_sync(~0u, flag), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t before = 0, all = 0;
  __syncthreads();
  if (lane == 0) warps[warp] = __popc(mask);
  __syncthreads();
  for (uint32_t w = 0; w < DEAL_THREADS / 32; w++) {
    if (w < warp) before += warps[w];
    all += warps[w];
  }
  *ret_all = all;
  return before + __popc(mask & ((1u << lane) - 1));
}

/* Free slots take what is next; start: all are free. */
static __global__ void __launch_bounds__(DEAL_THREADS)
    deal(const __grid_constant__ struct us_slots s, bool start) {
  __shared__ uint32_t warps[DEAL_THREADS / 32];
  uint32_t next = s.status->next, finished = 0, drawn = 0;
  for (uint32_t first = 0; first < s.slots; first += DEAL_THREADS) {
    const uint32_t slot = first + threadIdx.x;
    const uint8_t ended = slot >= s.slots ? STAYS : start ? FREE : s.ended[slot];
    uint32_t freed, drew, place = next + rank_in_block(ended & FREE, &freed, warps);
    rank_in_block(ended & DREW, &drew, warps);
    if (ended & FREE) {
      if (place < s.sequences) {
        set_first(s, slot, place);
      } else {
        s.index[slot] = -1;
        set_waiting(s, slot);
      }
    }
    next += freed, finished += freed, drawn += drew;
  }
  __syncthreads();
  if (threadIdx.x) return;
  s.status->next = next < s.sequences ? next : s.sequences;
  if (start) return;
  s.status->finished += finished;
  s.status->tokens += drawn;
}

static __global__ void __launch_bounds__(THREADS)
    resume(const __grid_constant__ struct us_slots s, uint32_t rows, const int32_t *slot,
           const uint32_t *position) {
  const uint32_t r = blockIdx.x * THREADS + threadIdx.x;
  if (r >= rows || slot[r] < 0) return;
  const struct us_slots_sequence sequence = s.sequence[s.index[slot[r]]];
  const uint32_t last = sequence.prompt_count - 1;
  if (position[r] + 1 == last)
    set_next(s, (uint32_t)slot[r], sequence, s.prompts[sequence.prompt + last], last);
}

static bool valid(const struct us_slots *s) {
  return s->slots && s->slots <= 1u << 20 && s->sequences <= INT32_MAX && s->stops <= US_SLOTS_STOPS &&
         (!s->repeats || s->gram) && s->held != 1;
}

int us_slots_start(const struct us_slots *slots, cudaStream_t stream) {
  if (!valid(slots)) return cudaErrorInvalidValue;
  deal<<<1, DEAL_THREADS, 0, stream>>>(*slots, true);
  return cudaGetLastError();
}

int us_slots_advance(const struct us_slots *slots, cudaStream_t stream) {
  if (!valid(slots)) return cudaErrorInvalidValue;
  commit<<<(slots->slots * 32 + THREADS - 1) / THREADS, THREADS, 0, stream>>>(*slots);
  deal<<<1, DEAL_THREADS, 0, stream>>>(*slots, false);
  return cudaGetLastError();
}

int us_slots_resume(const struct us_slots *slots, uint32_t rows, const int32_t *slot,
                    const uint32_t *position, cudaStream_t stream) {
  if (!valid(slots)) return cudaErrorInvalidValue;
  if (!rows) return cudaSuccess;
  resume<<<(rows + THREADS - 1) / THREADS, THREADS, 0, stream>>>(*slots, rows, slot, position);
  return cudaGetLastError();
}
