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
  while (us_engine_now() - start < delay_ns) __nanosleep(100);
  for (uint32_t i = b->index * US_ENGINE_COMPUTE + threadIdx.x; i < op->route.E;
       i += b->blocks * US_ENGINE_COMPUTE)
    op->route.opt_routed[i] = __float_as_uint(op->route.logits[i]);
  us_engine_finish(b);
}

static __global__ void __launch_bounds__(US_ENGINE_THREADS, 1)
    attention_kernel(const __grid_constant__ struct us_engine_launch launch, uint64_t delay_ns) {
  extern __shared__ __align__(128) uint8_t raw[];
  struct us_engine_shared *shared = (struct us_engine_shared *)raw;
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; i++) us_barrier_init(us_shared_address(&shared->sums_empty[i]), 1);
  __syncthreads();
  if (threadIdx.x >= US_ENGINE_COMPUTE) return;
  struct us_engine_block b = {};
  b.shared = shared, b.launch = &launch, b.rank = launch.rank;
  b.index = blockIdx.x, b.blocks = gridDim.x, b.grid_block = blockIdx.x;
  for (uint32_t round = 0; round < launch.rounds; round++)
    for (uint32_t i = launch.first; i < launch.last; i++) {
      const struct us_engine_op *op = b.rank->ops + i;
      b.round = round;
      b.op_index = i;
      if (op->kind == US_ENGINE_ATTENTION) us_engine_attention(&b, op);
      if (op->kind == US_ENGINE_CONTEXT) us_engine_context_append(&b, op);
      if (op->kind == US_ENGINE_ROUTE) fake_projection(&b, op, delay_ns);
    }
}

void ATTENTION_LAUNCH(const struct us_engine_launch *launch, unsigned blocks, uint64_t delay_ns) {
  US_CUDA(cudaFuncSetAttribute(attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               (int)sizeof(struct us_engine_shared)));
  attention_kernel<<<blocks, US_ENGINE_THREADS, sizeof(struct us_engine_shared)>>>(*launch, delay_ns);
  US_CUDA(cudaGetLastError());
}
