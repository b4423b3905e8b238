/* oscillation_train.cu: weights whose codes go to and fro, watched and fixed.
 *
 * Bound: bytes, 40 a value (six arrays read, four written). SLICES blocks share a span; a thread has four values at a time.
 */
#include "kernels/gpu/rows.cuh"
#include "kernels/optim/oscillation_train.h"

#define THREADS 256
#define SLICES  8

static __device__ __forceinline__ void watch_four(const struct us_oscillation_train &w, uint64_t at) {
  struct us_four before = us_load_four(w.before + at), after = us_load_four(w.after + at),
                 value = us_load_four(w.value + at), share = us_load_four(w.share + at),
                 mean = us_load_four(w.mean + at), turn = us_load_four(w.turn + at);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    struct us_oscillation o = {share.v[j], mean.v[j], turn.v[j]};
    value.v[j] = us_oscillation_watch(&w.rule, before.v[j], after.v[j], value.v[j], &o);
    share.v[j] = o.share, mean.v[j] = o.mean, turn.v[j] = o.turn;
  }
  us_store_four(w.value + at, value);
  us_store_four(w.share + at, share);
  us_store_four(w.mean + at, mean);
  us_store_four(w.turn + at, turn);
}

static __global__ void __launch_bounds__(THREADS)
    watch_spans(const __grid_constant__ struct us_oscillation_train w) {
  struct us_watched_span span = w.spans[blockIdx.x / SLICES];
  uint32_t i = (blockIdx.x % SLICES * THREADS + threadIdx.x) * 4;
  for (; i + 4 <= span.n; i += SLICES * THREADS * 4) watch_four(w, span.offset + i);
  for (; i < span.n; i++) { /* one thread: the last values of a span that is no multiple of 4 */
    uint64_t at = span.offset + i;
    struct us_oscillation o = {w.share[at], w.mean[at], w.turn[at]};
    w.value[at] = us_oscillation_watch(&w.rule, w.before[at], w.after[at], w.value[at], &o);
    w.share[at] = o.share, w.mean[at] = o.mean, w.turn[at] = o.turn;
  }
}

int us_oscillation_train(const struct us_oscillation_train *watch, cudaStream_t stream) {
  if (watch->count >= (1u << 31) / SLICES) return cudaErrorInvalidValue;
  if (watch->count) watch_spans<<<(unsigned)watch->count * SLICES, THREADS, 0, stream>>>(*watch);
  return cudaGetLastError();
}
