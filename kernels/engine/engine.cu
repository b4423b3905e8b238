/* engine.cu: the persistent kernel: every role of a block goes through the same list of operations.
 *
 * A launch of a whole list, many rounds, is the engine; a launch of one operation is a node of the graph executor. Bound: bytes of
 * weights from HBM; docs/perf.md has what was reached, docs/engine.md how a tile goes from HBM to a token.
 *
 * Contents: one operation, role by role; through the list; a launch begins; host.
 */
#include "kernels/engine/accept.cuh"
#include "kernels/engine/attention.cuh"
#include "kernels/engine/context.cuh"
#include "kernels/engine/down_gather.cuh"
#include "kernels/engine/gather.cuh"
#include "kernels/engine/reduce_usual.cuh"
#include "kernels/engine/reduce_wide.cuh"
#include "kernels/engine/select.cuh"
#include "kernels/engine/wide.cuh"

/* ---- one operation, role by role ---------------------------------------------------------------------------------- */

enum { ROLE_COMPUTE, ROLE_STREAM, ROLE_EPILOGUE, ROLE_PLAN };

static __device__ bool uses_experts(const struct us_engine_op *op) {
  return op->kind == US_ENGINE_DOWN || (op->kind == US_ENGINE_GEMM && op->gemm.experts);
}

/* The loops of the other roles, out of line; that of the compute warps has the kernel's own registers. */
static __device__ __noinline__ void stream_gemm(struct us_engine_block *b, const struct us_engine_op *op) {
  us_engine_gemm_stream(b, op);
}
static __device__ __noinline__ void stream_down(struct us_engine_block *b, const struct us_engine_op *op) {
  us_engine_down_stream(b, op);
}
static __device__ __noinline__ void epilogue_gemm(void) {
  us_engine_gemm_epilogue(us_engine_self(), us_engine_brought_op());
}
static __device__ __noinline__ void epilogue_down(void) {
  us_engine_down_pairs(us_engine_self(), us_engine_brought_op());
}

/* Operations of several row tiles. */
static __device__ __noinline__ void compute_several(struct us_engine_block *b,
                                                    const struct us_engine_op *op) {
  if (op->kind == US_ENGINE_GEMM)
    us_engine_wide_compute(b, op);
  else if (op->kind == US_ENGINE_DOWN)
    us_engine_down_gathered(b, op);
  else
    us_engine_reduce_wide(b, op);
}
static __device__ __noinline__ void stream_several(struct us_engine_block *b, const struct us_engine_op *op) {
  if (op->gemm.experts)
    us_engine_gather_stream(b, op);
  else
    us_engine_wide_stream(b, op);
}
static __device__ __noinline__ void epilogue_several(struct us_engine_block *b,
                                                     const struct us_engine_op *op) {
  if (op->gemm.experts)
    us_engine_gather_epilogue(b, op);
  else if (threadIdx.x < US_ENGINE_EPILOGUE + 32)
    us_engine_wide_rows(b, op);
  else
    us_engine_wide_pass(b, op);
}

/* Out of line: what runs once a round must not take registers from the loops that stream. */
namespace us_rare {
template <bool FILTERS>
static __device__ __noinline__ void decide(struct us_engine_block *b, const struct us_engine_op *op) {
  if (op->kind == US_ENGINE_SELECT)
    us_engine_select<FILTERS>(b, op);
  else
    us_engine_accept<FILTERS>(b, op);
}
} // namespace us_rare
using us_rare::decide;

template <bool FILTERS>
static __device__ void compute(struct us_engine_block *b, const struct us_engine_op *op) {
  if (US_ENGINE_SEVERAL && op->row_tiles > 1 && op->kind != US_ENGINE_ROUTE) {
    if (op->kind == US_ENGINE_GEMM && op->gemm.experts)
      us_engine_gather_compute(b, op); /* in line: called, its loop keeps activations on the stack */
    else
      compute_several(b, op);
    return;
  }
  switch ((enum us_engine_kind)op->kind) {
  case US_ENGINE_EMBED:
  case US_ENGINE_REDUCE:
    if (us_reduce_is_usual(b, op))
      us_engine_reduce_usual();
    else
      us_engine_reduce(b, op);
    break;
  case US_ENGINE_GEMM:
    us_engine_gemm_compute(b, op);
    break;
  case US_ENGINE_DOWN:
    us_engine_down_compute();
    break;
  case US_ENGINE_ATTENTION:
    us_engine_attention(b, op);
    break;
  case US_ENGINE_ROUTE:
    us_engine_route(b, op);
    break;
  case US_ENGINE_CONTEXT:
    us_engine_context_append(b, op);
    break;
  case US_ENGINE_SELECT:
  case US_ENGINE_ACCEPT:
    decide<FILTERS>(b, op);
    break;
  case US_ENGINE_KINDS:
    break;
  }
}

static __device__ void stream(struct us_engine_block *b, const struct us_engine_op *op) {
  uint32_t kind = op->kind,
           row_tiles = US_ENGINE_SEVERAL ? op->row_tiles : 1; /* both at once: a look takes long */
  if (kind == US_ENGINE_GEMM && row_tiles > 1)
    stream_several(b, op);
  else if (kind == US_ENGINE_GEMM)
    stream_gemm(b, op);
  if (kind == US_ENGINE_DOWN) stream_down(b, op);
  if (kind == US_ENGINE_ATTENTION) us_engine_attention_stream(b, op);
}

static __device__ void epilogue(struct us_engine_block *b, const struct us_engine_op *op) {
  uint32_t kind = op->kind, row_tiles = US_ENGINE_SEVERAL ? op->row_tiles : 1;
  if (kind == US_ENGINE_GEMM && row_tiles > 1)
    epilogue_several(b, op);
  else if (kind == US_ENGINE_GEMM)
    epilogue_gemm();
  if (kind == US_ENGINE_DOWN) epilogue_down();
  if (kind == US_ENGINE_ATTENTION) us_engine_attention_pass(b, op);
}

/* How many operations before the attention `op` shared memory behind the products' sums is nobody's: a dense product of one row tile, and
 * a reduction of one before it, have nothing there. */
static __device__ __forceinline__ uint32_t plans_ahead(const struct us_engine_block *b,
                                                       const struct us_engine_op *op) {
  uint32_t before = b->op_index - us_engine_launch_of(b)->first;
  if (!before || op[-1].kind != US_ENGINE_GEMM || op[-1].gemm.experts || op[-1].row_tiles != 1) return 0;
  return before > 1 && op[-2].kind == US_ENGINE_REDUCE && op[-2].row_tiles == 1 ? 2 : 1;
}

/* The planning warp: operation n of the launch. */
static __device__ __forceinline__ void plan(struct us_engine_block *b, const struct us_engine_op *op,
                                            uint32_t n) {
  if (op->kind == US_ENGINE_ATTENTION) us_engine_attention_ahead(op, n - plans_ahead(b, op), n);
}

/* ---- through the list --------------------------------------------------------------------------------------------- */

/* A role comes to a ROUTE operation: the others have done with the list before it, which the compute warps then write. A role without
 * work between two of them waits for the first, or it would arrive for another role. */
template <int ROLE> static __device__ __forceinline__ void pass_route(struct us_engine_block *b) {
  if (ROLE != ROLE_COMPUTE && b->routes) us_engine_wait_routed(b);
  if (ROLE == ROLE_EPILOGUE) __syncwarp();
  us_engine_count(&b->routes);
  if (ROLE != ROLE_COMPUTE && us_engine_lane() == 0)
    us_barrier_arrive(us_shared_address(&us_engine_shared_of(b)->listed));
}

/* The operation behind `i`: of the next round behind the last. */
static __device__ __forceinline__ uint32_t next_op(const struct us_engine_launch *launch, uint32_t i) {
  return i + 1 < launch->last ? i + 1 : launch->first;
}

/* The last compute warp: when operation n of the launch begins, n + 1 has arrived, which the barrier inside n tells the other warps,
 * and n + 2 is fetched. */
static __device__ __forceinline__ void fetch_op(const struct us_engine_block *b, uint32_t n, uint32_t i) {
  const struct us_engine_launch *launch = us_engine_launch_of(b);
  uint32_t lane = us_engine_lane();
  if (us_engine_thread() / 32 != US_ENGINE_COMPUTE_WARPS - 1 || lane >= sizeof(struct us_engine_op) / 8)
    return;
  const struct us_engine_op *from = us_engine_rank_of(b)->ops + next_op(launch, next_op(launch, i));
  uint8_t *to = (uint8_t *)&us_engine_shared_of(b)->op[(n + 2) % US_ENGINE_FETCHED];
  asm volatile("cp.async.wait_all;" ::: "memory");
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(us_shared_address(to + lane * 8)),
               "l"((const uint8_t *)from + lane * 8)
               : "memory");
}
static_assert(sizeof(struct us_engine_op) % 8 == 0 && sizeof(struct us_engine_op) <= 256,
              "a lane copies 8 bytes of an operation");

/* An epilogue warp: its operation, to shared memory: one look at L2 for all that it reads of it, and no pointer that is kept. */
static __device__ __forceinline__ void bring_op(const struct us_engine_op *op) {
  uint32_t lane = us_engine_lane();
  uint64_t *to = (uint64_t *)us_engine_brought_op();
  if (lane < sizeof *op / 8) to[lane] = ((const uint64_t *)op)[lane];
  __syncwarp();
}

/* All threads, when the kernel starts: what lies in shared memory (shared.cuh). */
static __device__ void copy_launch(struct us_engine_shared *s, const struct us_engine_launch *launch) {
  const struct us_engine_rank *rank = &launch->rank[blockIdx.x / (gridDim.x / launch->ranks)];
  us_engine_keep_launch(launch, rank);
  us_engine_copy_words(&s->op[0], rank->ops + launch->first, sizeof s->op[0]);
  us_engine_copy_words(&s->op[1], rank->ops + next_op(launch, launch->first), sizeof s->op[1]);
}

/* One role's operation: b->op_index. Lanes share `b`, so all have left the operation before. */
template <int ROLE, bool FILTERS> static __device__ __forceinline__ void run_op(void) {
  struct us_engine_block *b = us_engine_self();
  if (ROLE != ROLE_STREAM) __syncwarp();
  const struct us_engine_launch *launch = us_engine_launch_of(b);
  uint32_t i = b->op_index;
  const struct us_engine_op *op = us_engine_rank_of(b)->ops + i;
  uint32_t n = b->round * (launch->last - launch->first) + i - launch->first;
  if (ROLE == ROLE_PLAN) {
    plan(b, op, n);
    return;
  }
  if (ROLE == ROLE_COMPUTE) {
    if (threadIdx.x == 0) us_attention_enter(b, n);
    fetch_op(b, n, i);
    b->fetched = n % US_ENGINE_FETCHED, op = us_engine_fetched_op(b);
  }
  if (ROLE == ROLE_EPILOGUE) bring_op(op), op = us_engine_brought_op();
  if (op->kind == US_ENGINE_ROUTE) pass_route<ROLE>(b);
  if (ROLE == ROLE_COMPUTE) compute<FILTERS>(b, op);
  if (ROLE == ROLE_STREAM) stream(b, op);
  if (ROLE == ROLE_EPILOGUE) epilogue(b, op);
}

/* To the next operation; false: the round is over, and the next one, if there is one, begins with the first. */
template <int ROLE> static __device__ __forceinline__ bool next_of_round(void) {
  struct us_engine_block *b = us_engine_self();
  const struct us_engine_launch *launch = us_engine_launch_of(b);
  if (ROLE != ROLE_STREAM) __syncwarp();
  uint32_t i = b->op_index + 1;
  bool over = i == launch->last;
  if (ROLE != ROLE_STREAM) __syncwarp(); /* all lanes have read it */
  b->op_index = over ? launch->first : i;
  return !over;
}

/* A role other than the compute warps knows how a round ended. */
template <int ROLE> static __device__ __forceinline__ void hear_end(const struct us_engine_block *b) {
  if (ROLE == ROLE_COMPUTE) return;
  if (ROLE != ROLE_STREAM) __syncwarp();
  if (threadIdx.x % 32 == 0) us_barrier_arrive(us_shared_address(&us_engine_shared_of(b)->heard));
}

/* A round is over. A role that is not computing learns from `ended` whether another follows: no copy may be under way when the block
 * leaves. A barrier tells one phase from the next only, so the next round does not end before all have heard. */
template <int ROLE> static __device__ __forceinline__ bool next_round(void) {
  struct us_engine_block *b = us_engine_self();
  uint32_t round = b->round;
  us_engine_spans_close(b);
  if (round + 1 == us_engine_launch_of(b)->rounds) return false;
  if (ROLE == ROLE_COMPUTE) {
    us_engine_meet();
    if (threadIdx.x == 0) {
      if (round)
        us_engine_barrier_wait(b, &us_engine_shared_of(b)->heard, (round & 1) ^ 1, US_ENGINE_WAIT_ROUND);
      us_barrier_arrive(us_shared_address(&us_engine_shared_of(b)->ended));
    }
    us_engine_meet();
  } else {
    us_engine_jitter(b);
  }
  us_engine_barrier_wait(b, &us_engine_shared_of(b)->ended, round & 1, US_ENGINE_WAIT_ROUND);
  bool stop = *(volatile uint32_t *)&us_engine_shared_of(b)->stop[round & 1];
  hear_end<ROLE>(b);
  if (stop) return false;
  if (ROLE != ROLE_STREAM) __syncwarp();
  b->round = round + 1;
  us_engine_spans_round(b);
  return true;
}

/* One role's way through the launch. Place and round lie in shared memory (us_engine_self). */
template <int ROLE, bool FILTERS> static __device__ __forceinline__ void run_rounds(void) {
  do {
    uint64_t begin = us_engine_span_begin(us_engine_self()); /* one after the other, without a gap */
    do {
      run_op<ROLE, FILTERS>();
      begin = us_engine_span_end(us_engine_self(), US_ENGINE_WAIT_NOTHING, begin);
    } while (next_of_round<ROLE>());
  } while (next_round<ROLE>());
}

/* ---- a launch begins ---------------------------------------------------------------------------------------------- */

/* Which rank and which of its blocks this block is; a warp's view of it. */
static __device__ struct us_engine_block *make_block(const struct us_engine_launch *launch,
                                                     struct us_engine_shared *shared) {
  uint32_t each = gridDim.x / launch->ranks, warp = threadIdx.x / 32;
  struct us_engine_block *b = &shared->warp[warp];
  if (threadIdx.x % 32 == 0) {
    struct us_engine_block view = {};
    view.launch = (const struct us_engine_launch *)shared->launch, view.rank = &shared->rank;
    view.index = blockIdx.x % each, view.blocks = each, view.grid_block = blockIdx.x;
    view.op_index = launch->first;
    view.role = warp < US_ENGINE_COMPUTE_WARPS    ? ROLE_COMPUTE
                : warp == US_ENGINE_COMPUTE_WARPS ? ROLE_STREAM
                                                  : ROLE_EPILOGUE;
    *b = view;
    us_engine_spans_open(b);
  }
  __syncwarp();
  return b;
}

static __device__ void init_barriers(struct us_engine_shared *s) {
  for (int i = 0; i < US_ENGINE_STAGES; i++) {
    us_barrier_init(us_shared_address(&s->full[i]), US_ENGINE_FILLERS);
    us_barrier_init(us_shared_address(&s->empty[i]), US_ENGINE_COMPUTE_WARPS);
  }
  for (int i = 0; i < 2; i++) {
    us_barrier_init(us_shared_address(&s->sums_full[i]), US_ENGINE_COMPUTE_WARPS);
    us_barrier_init(us_shared_address(&s->sums_empty[i]), 1);
  }
  us_barrier_init(us_shared_address(&s->routed), 1);
  us_barrier_init(us_shared_address(&s->listed), 1 + US_ENGINE_EPILOGUES);
  us_barrier_init(us_shared_address(&s->ended), 1);
  us_barrier_init(us_shared_address(&s->heard), 2 + US_ENGINE_EPILOGUES); /* streaming, planning */
  s->stop[0] = s->stop[1] = 0, s->decided = 0, s->rows.pass = 0, s->entered = US_ENGINE_NONE, s->planned = 0;
}

/* A launch that begins behind its ROUTE operation: the compute warps make the active list again, the others count it. */
static __device__ bool begins_behind_route(const struct us_engine_block *b) {
  return uses_experts(b->rank->ops + b->launch->first);
}
static __device__ void skip_route(struct us_engine_block *b) {
  if (!begins_behind_route(b) || threadIdx.x / 32 > US_ENGINE_COMPUTE_WARPS + US_ENGINE_EPILOGUES) return;
  pass_route<ROLE_STREAM>(b);
}
static __device__ void restore_route(struct us_engine_block *b) {
  const struct us_engine_op *first = b->rank->ops + b->launch->first;
  if (!begins_behind_route(b)) return;
  pass_route<ROLE_COMPUTE>(b);
  struct us_engine_op *op = &us_engine_shared_of(b)->op[US_ENGINE_FETCHED - 1]; /* not in use yet */
  us_engine_copy_words(
      op, b->rank->ops + (first->kind == US_ENGINE_DOWN ? first->down.route : first->gemm.route), sizeof *op);
  us_engine_meet();
  if (threadIdx.x == 0) op->wait = US_ENGINE_NONE;
  us_engine_meet();
  b->fetched = US_ENGINE_FETCHED - 1;
  us_engine_route_list(b, op);
  if (threadIdx.x == 0) us_barrier_arrive(us_shared_address(&us_engine_shared_of(b)->routed));
}

template <bool FILTERS>
static __global__ void __launch_bounds__(US_ENGINE_THREADS, 1)
    us_engine_kernel(const __grid_constant__ struct us_engine_launch launch) {
  struct us_engine_shared *shared = us_engine_shared_of(NULL);
  us_engine_check_shared();
  if (threadIdx.x == 0) init_barriers(shared);
  copy_launch(shared, &launch);
  us_barrier_init_fence();
  __syncthreads();
  struct us_engine_block *b = make_block(&launch, shared);
  if (threadIdx.x < US_ENGINE_COMPUTE) {
    restore_route(b);
    run_rounds<ROLE_COMPUTE, FILTERS>();
  } else {
    skip_route(b);
    if (threadIdx.x == US_ENGINE_COMPUTE) run_rounds<ROLE_STREAM, FILTERS>();
    if (threadIdx.x >= US_ENGINE_EPILOGUE && threadIdx.x < US_ENGINE_EPILOGUE + 32 * US_ENGINE_EPILOGUES)
      run_rounds<ROLE_EPILOGUE, FILTERS>();
    if (threadIdx.x >= US_ENGINE_PLANNER) run_rounds<ROLE_PLAN, FILTERS>();
  }
}

/* ---- host --------------------------------------------------------------------------------------------------------- */

#if US_ENGINE_PROFILED && US_ENGINE_SEVERAL

const void *us_engine_profiled_several(void) {
  return (const void *)us_engine_kernel<false>; /* profiles draw without filters */
}

#elif US_ENGINE_PROFILED

const void *us_engine_profiled(bool several) {
  return several ? us_engine_profiled_several() : (const void *)us_engine_kernel<false>;
}

#elif US_ENGINE_SEVERAL

const void *us_engine_several(bool unfiltered) {
  return unfiltered ? (const void *)us_engine_kernel<false> : (const void *)us_engine_kernel<true>;
}

#else

const char *us_engine_kind_name(enum us_engine_kind kind) {
  static const char *const names[] = {"embed", "gemm",    "down",   "reduce", "attention",
                                      "route", "context", "select", "accept"};
  return kind < US_ENGINE_KINDS ? names[kind] : "?";
}

int us_engine_blocks(uint32_t ranks) {
  int device, blocks;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return -(int)status;
  return blocks / (int)ranks * (int)ranks;
}

int us_engine_run(const struct us_engine_launch *launch, cudaStream_t stream) {
  if (!launch->ranks || launch->ranks > US_ENGINE_MAX_RANKS || launch->first >= launch->last)
    return cudaErrorInvalidValue;
  int blocks = us_engine_blocks(launch->ranks);
  if (blocks < 0) return -blocks;
  if (launch->profile.spans && !launch->profile.kernel) return cudaErrorInvalidValue;
  const void *kernel = launch->profile.spans ? launch->profile.kernel(launch->several)
                       : launch->several     ? us_engine_several(launch->unfiltered)
                       : launch->unfiltered  ? (const void *)us_engine_kernel<false>
                                             : (const void *)us_engine_kernel<true>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            (int)sizeof(struct us_engine_shared));
  uint32_t ops = launch->last - launch->first;
  for (uint32_t i = 0; status == cudaSuccess && i < launch->ranks; i++) {
    const struct us_engine_rank *rank = &launch->rank[i];
    status = cudaMemsetAsync(rank->done + launch->first, 0, ops * sizeof(uint32_t), stream);
    if (status == cudaSuccess && ops > 1 && rank->claimed) /* lists without products have none */
      status = cudaMemsetAsync(rank->claimed + launch->first * US_ENGINE_COUNTERS, 0,
                               ops * US_ENGINE_COUNTERS * sizeof(uint32_t), stream);
  }
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative, together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)blocks), config.blockDim = dim3(US_ENGINE_THREADS);
  config.dynamicSmemBytes = sizeof(struct us_engine_shared), config.stream = stream;
  config.attrs = &together, config.numAttrs = 1;
  struct us_engine_launch copy = *launch;
  if (!copy.timeout_ns) copy.timeout_ns = 5000000000ull;
  void *arguments[] = {&copy};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

#endif
