/* fake_cuda.c: a stand-in for the CUDA runtime with several GPUs and no kernels, for the host's side of the engine.
 *
 * Link it in place of the runtime. Memory of a GPU is the host's, so an address sanitizer watches it; copies and fills happen at once;
 * kernels do nothing, but for a launch of the engine that holds the ACCEPT of rank 0: it draws one token a sequence, as accept.cuh goes
 * about it, so that rounds end. A call that CUDA would refuse on several GPUs (a stream of another GPU, memory that nobody owns, a graph
 * that was destroyed) ends the program, and so does a kernel on a stream while the default stream, which it does not wait for, may still
 * be copying or filling. Call number fake_cuda_fail (from 1; 0: none) of those that take memory fails; a graph's leaves
 * a handle that means nothing, as CUDA's does.
 */
#include "fake_cuda.h"

#include "kernels/engine/round.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REFUSE(...)                                                                                          \
  do {                                                                                                       \
    fprintf(stderr, "fake CUDA, %s: ", __func__);                                                            \
    fprintf(stderr, __VA_ARGS__);                                                                            \
    fputc('\n', stderr);                                                                                     \
    abort();                                                                                                 \
  } while (0)

enum { MOST = 1 << 16 };

struct block { /* memory */
  char *at;
  size_t bytes;
  int gpu; /* -1: the host's */
};
struct CUstream_st {
  int gpu, alive;
  struct CUgraph_st *capture;
};
struct CUgraph_st { /* launches and fills in order */
  int gpu, alive;
  size_t count, capacity;
  struct us_engine_launch *launches; /* ranks 0: a fill of nothing */
};
struct CUgraphExec_st {
  int gpu, alive;
  size_t count;
  struct us_engine_launch *launches;
};
struct CUevent_st {
  int gpu;
};

unsigned fake_cuda_gpus = 4, fake_cuda_calls, fake_cuda_fail, fake_cuda_held;
static struct block blocks[MOST];
static unsigned block_count;
static __thread int current;
static int filling
    [64]; /* by GPU: the default stream's copies from the host and fills, since somebody waited for it */
static unsigned streams[64], queued[64]; /* by GPU: that there are; launches of graphs so far */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Ranks are loaded by threads of their own. */
static void hold(int n) {
  __atomic_add_fetch(&fake_cuda_held, (unsigned)n, __ATOMIC_RELAXED);
}

/* ---- memory ------------------------------------------------------------------------------------------------------- */

static bool fails(void) {
  return __atomic_add_fetch(&fake_cuda_calls, 1, __ATOMIC_RELAXED) == fake_cuda_fail;
}

static cudaError_t allocate(void **ret, size_t bytes, int gpu) {
  if (fails()) return cudaErrorMemoryAllocation;
  pthread_mutex_lock(&lock);
  unsigned i = 0;
  while (i < block_count && blocks[i].at) i++;
  if (i == MOST) REFUSE("too many blocks");
  blocks[i] =
      (struct block){.at = *ret = aligned_alloc(256, (bytes + 256) / 256 * 256), .bytes = bytes, .gpu = gpu};
  if (i == block_count) block_count++;
  hold(1);
  pthread_mutex_unlock(&lock);
  return *ret ? cudaSuccess : cudaErrorMemoryAllocation;
}

static cudaError_t give_back(void *at, bool host) {
  if (!at) return cudaSuccess;
  pthread_mutex_lock(&lock);
  for (unsigned i = 0; i < block_count; i++)
    if (blocks[i].at == at && (blocks[i].gpu < 0) == host) {
      free(at);
      blocks[i].at = NULL, hold(-1);
      pthread_mutex_unlock(&lock);
      return cudaSuccess;
    }
  REFUSE("%p was not allocated", at);
}

/* Memory of a GPU, or of the host if it is known. */
static void need_memory(const void *at, size_t bytes) {
  pthread_mutex_lock(&lock);
  for (unsigned i = 0; i < block_count; i++)
    if (blocks[i].at && (const char *)at >= blocks[i].at &&
        (const char *)at + bytes <= blocks[i].at + blocks[i].bytes) {
      pthread_mutex_unlock(&lock);
      return;
    }
  REFUSE("%zu bytes at %p are nobody's", bytes, at);
}

cudaError_t cudaMalloc(void **ret, size_t bytes) {
  return allocate(ret, bytes, current);
}
cudaError_t cudaHostAlloc(void **ret, size_t bytes, unsigned flags) {
  return allocate(ret, bytes, -1);
}
cudaError_t cudaFree(void *at) {
  return give_back(at, false);
}
cudaError_t cudaFreeHost(void *at) {
  return give_back(at, true);
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
  *left = (size_t)130 << 30, *total = (size_t)140 << 30;
  return cudaSuccess;
}

static void need_stream(cudaStream_t stream) {
  if (!stream) return;
  if (!stream->alive) REFUSE("the stream is gone");
  if (stream->gpu != current) REFUSE("a stream of GPU %d while GPU %d is current", stream->gpu, current);
}

/* Before a kernel on a stream of its own. */
static void need_settled(void) {
  if (__atomic_load_n(&filling[current], __ATOMIC_RELAXED)) REFUSE("the default stream may still be at work");
}

static cudaError_t copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  if (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) need_memory(to, bytes);
  if (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice) need_memory(from, bytes);
  memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  __atomic_store_n(&filling[current], kind == cudaMemcpyHostToDevice, __ATOMIC_RELAXED);
  return copy(to, from, bytes, kind);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  need_stream(stream);
  if (stream && stream->capture) REFUSE("a copy into a graph");
  return copy(to, from, bytes, kind);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  need_stream(stream);
  for (size_t i = 0; i < height; i++)
    copy((char *)to + i * to_pitch, (const char *)from + i * pitch, width, kind);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t pitch, size_t width,
                         size_t height, enum cudaMemcpyKind kind) {
  return cudaMemcpy2DAsync(to, to_pitch, from, pitch, width, height, kind, NULL);
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
  need_stream(stream);
  need_memory(to, bytes);
  if (!stream || !stream->capture) memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) {
  __atomic_store_n(&filling[current], 1, __ATOMIC_RELAXED);
  return cudaMemsetAsync(to, value, bytes, NULL);
}

/* ---- GPUs, streams, events ------------------------------------------------------------------------------------------ */

cudaError_t cudaGetLastError(void) {
  return cudaSuccess;
}
const char *cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorMemoryAllocation ? "out of memory" : "an error";
}
cudaError_t cudaGetDeviceCount(int *count) {
  *count = (int)fake_cuda_gpus;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int gpu) {
  if (gpu < 0 || gpu >= (int)fake_cuda_gpus) REFUSE("GPU %d", gpu);
  current = gpu;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int *gpu) {
  *gpu = current;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int gpu) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "fake GPU %d", gpu);
  p->major = 9, p->multiProcessorCount = 132;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int gpu) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) {
  *can = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int gpu, unsigned flags) {
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *ret, unsigned flags) {
  if (fails()) {
    *ret = NULL;
    return cudaErrorMemoryAllocation;
  }
  *ret = calloc(1, sizeof **ret);
  (*ret)->gpu = current, (*ret)->alive = 1, hold(1);
  streams[current]++;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  need_stream(stream);
  if (--streams[stream->gpu] == 0) queued[stream->gpu] = 0;
  hold(-1);
  free(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  need_stream(stream);
  if (!stream) __atomic_store_n(&filling[current], 0, __ATOMIC_RELAXED);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  need_stream(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  need_stream(stream);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *ret, unsigned flags) {
  *ret = calloc(1, sizeof **ret);
  (*ret)->gpu = current, hold(1);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *ret) {
  return cudaEventCreateWithFlags(ret, 0);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (event) hold(-1);
  free(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  need_stream(stream);
  if (event->gpu != current) REFUSE("an event of GPU %d on GPU %d", event->gpu, current);
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = 1;
  return cudaSuccess;
}

/* ---- rounds of the engine ------------------------------------------------------------------------------------------- */

static void put_event(struct us_engine_mailbox *mailbox, uint32_t number, const uint32_t *value, uint32_t n) {
  volatile uint64_t *word = mailbox->event[number % US_ENGINE_EVENTS].word;
  for (uint32_t i = 0; i < n; i++) word[i] = value[i] | (uint64_t)(number + 1) << 32;
}

static void accept(const struct us_engine_rank *rank, const struct us_engine_op *op) {
  struct us_engine_state *state = rank->state;
  struct us_engine_mailbox *mailbox = rank->mailbox;
  uint32_t ended = 0, live = 0, vocab = op->accept.vocab;
  for (uint32_t i = 0; i < US_ENGINE_SEQUENCES; i++) {
    struct us_engine_sequence *s = &state->sequence[i];
    if (!s->active) continue;
    int32_t token = (int32_t)((uint32_t)(s->anchor + 1) % vocab);
    uint32_t finish = us_engine_end_of(s, token, s->position + 1);
    if (!finish && mailbox->cancel >> i & 1u) finish = US_ENGINE_CANCELLED;
    uint32_t value[6] = {
        s->id, state->round,   us_engine_event_facts(1, finish, 0, s->drafts), state->round * 1000u,
        0,     (uint32_t)token};
    put_event(mailbox, state->events++, value, 6);
    s->position++, s->committed = 1, s->anchor = token;
    if (finish) s->active = 0, ended = 1;
    if (!finish) s->drafts = us_engine_drafts(state, s), live++;
    for (uint32_t slot = 0; slot < state->block; slot++) us_engine_set_rows(state, i, slot, vocab);
  }
  state->round++, state->live = live;
  state->stop = ended || !live || mailbox->park ||
                state->events - mailbox->read + 2 * US_ENGINE_SEQUENCES > US_ENGINE_EVENTS;
}

static void run(const struct us_engine_launch *launch, int gpu) {
  for (uint32_t i = 0; i < launch->ranks; i++) {
    const struct us_engine_rank *rank = &launch->rank[i];
    need_memory(rank->ops, launch->last * sizeof *rank->ops);
    need_memory(rank->done + launch->first, (launch->last - launch->first) * sizeof *rank->done);
    need_memory(rank->state, sizeof *rank->state);
    for (uint32_t r = 0; r < rank->ranks; r++) {
      need_memory(rank->exchange[r],
                  (size_t)rank->slots * rank->addends * US_ENGINE_ROWS * rank->D * sizeof(float));
      need_memory(rank->select[r], 16);
    }
  }
  const struct us_engine_rank *first = &launch->rank[0];
  if (first->rank != 0) return;
  for (uint32_t round = 0; round < launch->rounds; round++)
    for (uint32_t i = launch->first; i < launch->last; i++) {
      if (first->ops[i].kind != US_ENGINE_ACCEPT) continue;
      accept(first, &first->ops[i]);
      if (first->state->stop) return;
    }
}

cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) {
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
  const struct us_engine_launch *launch = arguments[0];
  need_stream(config->stream);
  need_settled();
  if (config->gridDim.x != 132 / launch->ranks * launch->ranks) REFUSE("%u blocks", config->gridDim.x);
  struct CUgraph_st *graph = config->stream->capture;
  if (!graph) {
    run(launch, current);
    return cudaSuccess;
  }
  if (graph->count == graph->capacity) {
    graph->capacity = 2 * graph->capacity + 64;
    graph->launches = realloc(graph->launches, graph->capacity * sizeof *graph->launches);
  }
  graph->launches[graph->count++] = *launch;
  return cudaSuccess;
}

/* ---- graphs --------------------------------------------------------------------------------------------------------- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  need_stream(stream);
  if (stream->capture) REFUSE("captured already");
  stream->capture = calloc(1, sizeof *stream->capture);
  stream->capture->gpu = current, hold(1);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *ret) {
  need_stream(stream);
  *ret = stream->capture;
  stream->capture = NULL;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  free(graph->launches), free(graph);
  hold(-1);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *ret, cudaGraph_t graph, unsigned long long flags) {
  if (fails()) {
    *ret = (cudaGraphExec_t)(uintptr_t)0xdead;
    return cudaErrorMemoryAllocation;
  }
  *ret = calloc(1, sizeof **ret);
  **ret = (struct CUgraphExec_st){graph->gpu, 1, graph->count,
                                  malloc(graph->count * sizeof *graph->launches + 1)};
  memcpy((*ret)->launches, graph->launches, graph->count * sizeof *graph->launches);
  hold(1);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  free(exec->launches), free(exec);
  hold(-1);
  return cudaSuccess;
}
/* Operations of several GPUs wait for each other, and a launch waits while its GPU's queue is full: a GPU may be ahead by a part of a queue. */
#define QUEUE 256
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  need_stream(stream);
  if (exec->gpu != current) REFUSE("a graph of GPU %d on GPU %d", exec->gpu, current);
  if (fails()) return cudaErrorMemoryAllocation;
  queued[current] += (unsigned)exec->count;
  for (int gpu = 0; gpu < 64; gpu++)
    if (streams[gpu] && queued[current] > queued[gpu] + QUEUE)
      REFUSE("GPU %d is %u launches ahead of GPU %d", current, queued[current] - queued[gpu], gpu);
  for (size_t i = 0; i < exec->count; i++) run(&exec->launches[i], current);
  return cudaSuccess;
}

/* ---- what compiled kernels call ------------------------------------------------------------------------------------- */

void **__cudaRegisterFatBinary(void *binary);
void __cudaRegisterFatBinaryEnd(void **handle);
void __cudaUnregisterFatBinary(void **handle);
void __cudaRegisterFunction(void);
unsigned __cudaPushCallConfiguration(void);
cudaError_t __cudaPopCallConfiguration(void);
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function);
cudaError_t __cudaLaunchKernel(void);
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void) {}
unsigned __cudaPushCallConfiguration(void) {
  need_settled();
  return 1; /* no launch */
}
cudaError_t __cudaPopCallConfiguration(void) {
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = NULL;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(void) {
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **ret, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *ret = NULL;
  return cudaErrorNotSupported;
}
