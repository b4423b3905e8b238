/* engine_attention_kernel.cuh: a kernel that goes through attention, context and fake projections as the engine does.
 *
 *     #define ATTENTION_LAUNCH attention_launch_engine
 *     #include "engine_attention_kernel.cuh"
 *
 * Included once a way of cutting (US_ENGINE_ATTENTION_GROUPED, US_ENGINE_ATTENTION_TOGETHER).
 */
#include "engine_attention.h"
#include "kernels/engine/attention.cuh"
#include "kernels/engine/context.cuh"

/* Copy, after a delay: `logits` to `opt_routed`, E words. */
static __device__ void fake_projection(struct us_engine_block *b, const struct us_engine_op *op,
                                       uint64_t delay_ns) {
  us_engine_wait_done(b, op->wait);
  uint64_t start = us_engine_now();
  while (op->route.E && us_engine_now() - start < delay_ns) __nanosleep(100);
  for (uint32_t i = b->index * US_ENGINE_COMPUTE + threadIdx.x; i < op->route.E;
       i += b->blocks * US_ENGINE_COMPUTE)
    op->route.opt_routed[i] = __float_as_uint(op->route.logits[i]);
  us_engine_finish(b);
}

/* A warp's view of the block, in shared memory as in the engine: a local one would be read from L2 after every wait. */
static __device__ struct us_engine_block *make_view(const struct us_engine_launch *launch) {
  struct us_engine_shared *shared = us_engine_shared_of(NULL);
  struct us_engine_block *b = &shared->warp[threadIdx.x / 32];
  us_engine_check_shared();
  us_engine_keep_launch(launch, launch->rank);
  if (threadIdx.x == 0) {
    shared->decided = 0, shared->planned = 0, shared->entered = US_ENGINE_NONE;
    for (int i = 0; i < 2; i++) us_barrier_init(us_shared_address(&shared->sums_empty[i]), 1);
    for (int i = 0; i < US_ENGINE_STAGES; i++) {
      us_barrier_init(us_shared_address(&shared->full[i]), US_ENGINE_FILLERS);
      us_barrier_init(us_shared_address(&shared->empty[i]), US_ENGINE_COMPUTE_WARPS);
    }
  }
  if (threadIdx.x % 32 == 0) {
    struct us_engine_block view = {};
    view.launch = launch, view.rank = launch->rank;
    view.index = blockIdx.x, view.blocks = gridDim.x, view.grid_block = blockIdx.x;
    *b = view;
  }
  __syncthreads();
  return b;
}

/* The last compute warp: an operation into shared memory, as in the engine two ahead of its turn. */
static __device__ void fetch_op(const struct us_engine_launch *launch, uint32_t n, bool wait) {
  uint32_t lane = threadIdx.x % 32, many = launch->last - launch->first;
  if (threadIdx.x / 32 != US_ENGINE_COMPUTE_WARPS - 1 || lane >= sizeof(struct us_engine_op) / 8) return;
  const uint8_t *from = (const uint8_t *)(launch->rank[0].ops + launch->first + n % many);
  uint8_t *to = (uint8_t *)&us_engine_shared_of(NULL)->op[n % US_ENGINE_FETCHED];
  if (wait) asm volatile("cp.async.wait_all;" ::: "memory");
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(us_shared_address(to + lane * 8)),
               "l"(from + lane * 8)
               : "memory");
}

static __global__ void __launch_bounds__(US_ENGINE_THREADS, 1)
    attention_kernel(const __grid_constant__ struct us_engine_launch launch, uint64_t delay_ns) {
  struct us_engine_block *b = make_view(&launch);
  bool streams = threadIdx.x == US_ENGINE_COMPUTE, plans = threadIdx.x >= US_ENGINE_PLANNER,
       passes = threadIdx.x >= US_ENGINE_EPILOGUE && !plans, computes = threadIdx.x < US_ENGINE_COMPUTE;
  if (!computes && !streams && !passes && !plans) return;
  if (computes) {
    fetch_op(&launch, 0, false), fetch_op(&launch, 1, false);
    asm volatile("cp.async.wait_all;" ::: "memory");
    us_engine_meet();
  }
  for (uint32_t round = 0, n = 0; round < launch.rounds; round++)
    for (uint32_t i = launch.first; i < launch.last; i++, n++) {
      const struct us_engine_op *op = launch.rank[0].ops + i;
      if (computes) {
        if (threadIdx.x == 0) us_attention_enter(b, n);
        op = &us_engine_shared_of(NULL)->op[n % US_ENGINE_FETCHED];
        fetch_op(&launch, n + 2, true);
        __syncwarp();
      }
      if (threadIdx.x % 32 == 0) b->round = round, b->op_index = i, b->fetched = n % US_ENGINE_FETCHED;
      if (streams) {
        if (op->kind == US_ENGINE_ATTENTION) us_engine_attention_stream(b, op);
        continue;
      }
      __syncwarp();
      if (passes) { /* the planning warp waits for them to hear of it */
        if (op->kind == US_ENGINE_ATTENTION) us_engine_attention_pass(b, op);
        continue;
      }
      if (plans) {
        bool projects = i > launch.first && op[-1].kind == US_ENGINE_ROUTE;
        if (op->kind == US_ENGINE_ATTENTION) us_engine_attention_ahead(op, projects ? n - 1 : n, n);
        continue;
      }
      if (op->kind == US_ENGINE_ATTENTION) us_engine_attention(b, op);
      if (op->kind == US_ENGINE_CONTEXT) us_engine_context_append(b, op);
      if (op->kind == US_ENGINE_ROUTE) fake_projection(b, op, delay_ns);
    }
}

void ATTENTION_LAUNCH(const struct us_engine_launch *launch, unsigned blocks, uint64_t delay_ns) {
  US_CUDA(cudaFuncSetAttribute(attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               (int)sizeof(struct us_engine_shared)));
  attention_kernel<<<blocks, US_ENGINE_THREADS, sizeof(struct us_engine_shared)>>>(*launch, delay_ns);
  US_CUDA(cudaGetLastError());
}
