/* round_lab.cu: the small kernel behind round_lab.h. */
#include "round_lab.h"

#include "kernels/engine/accept.cuh"
#include "kernels/engine/select.cuh"

/* All blocks of all ranks: between two rounds of a real list the passes' exchanges do this. */
static __device__ void meet_all(const struct us_engine_block *b, uint32_t *gate) {
  us_engine_meet();
  if (threadIdx.x == 0) {
    struct us_engine_watch watch = {0, 0};
    uint32_t want = (b->round + 1) * gridDim.x, have;
    us_add_release(gate, 1);
    while ((have = us_load_acquire(gate)) < want)
      us_engine_watch_try(b, &watch, US_ENGINE_WAIT_ROUND, 0, have, want);
  }
  us_engine_meet();
}

static __global__ void __launch_bounds__(US_ENGINE_COMPUTE, 1)
    lab_rounds(const __grid_constant__ struct us_engine_launch launch, uint32_t *gate, bool keep_on) {
  struct us_engine_shared *shared = us_engine_shared_of(NULL);
  struct us_engine_block *b = &shared->warp[threadIdx.x / 32];
  us_engine_check_shared();
  us_engine_keep_launch(&launch, &launch.rank[blockIdx.x / (gridDim.x / launch.ranks)]);
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; i++) us_barrier_init(us_shared_address(&shared->sums_empty[i]), 1);
  us_barrier_init_fence();
  if (threadIdx.x % 32 == 0) {
    struct us_engine_block view = {};
    view.launch = &launch, view.blocks = gridDim.x / launch.ranks, view.grid_block = blockIdx.x;
    view.rank = &launch.rank[blockIdx.x / view.blocks], view.index = blockIdx.x % view.blocks;
    *b = view;
  }
  __syncthreads();
  for (uint32_t round = 0; round != launch.rounds; round++) {
    for (uint32_t i = launch.first; i != launch.last; i++) {
      const struct us_engine_op *op = b->rank->ops + i;
      us_engine_meet();
      if (threadIdx.x % 32 == 0) b->round = round, b->op_index = i;
      __syncwarp();
      if (threadIdx.x == 0) us_engine_jitter(b);
      if (op->kind == US_ENGINE_SELECT && launch.unfiltered) us_engine_select<false>(b, op);
      if (op->kind == US_ENGINE_SELECT && !launch.unfiltered) us_engine_select<true>(b, op);
      if (op->kind == US_ENGINE_ACCEPT && launch.unfiltered) us_engine_accept<false>(b, op);
      if (op->kind == US_ENGINE_ACCEPT && !launch.unfiltered) us_engine_accept<true>(b, op);
    }
    if (launch.ranks > 1) meet_all(b, gate);
    if (!keep_on && *(volatile uint32_t *)&shared->stop) return;
  }
}

/* Zeroed device memory that lab_close frees. */
static void *take(struct round_lab *lab, size_t bytes) {
  void *memory;
  US_CUDA(cudaMalloc(&memory, bytes));
  US_CUDA(cudaMemset(memory, 0, bytes));
  lab->owned.push_back(memory);
  return memory;
}

void lab_open(struct round_lab *lab, uint32_t ranks, uint32_t blocks, uint32_t N, uint32_t tiles) {
  lab->ranks = ranks, lab->blocks = blocks, lab->N = N, lab->tiles = tiles,
  lab->share = (N + ranks - 1) / ranks;
  lab->launch = {};
  lab->launch.ranks = ranks, lab->launch.timeout_ns = us_gpu_timeout(3000000000u);
  US_CUDA(cudaHostAlloc((void **)&lab->mailbox, sizeof *lab->mailbox, cudaHostAllocMapped));
  *lab->mailbox = {};
  lab->gate = (uint32_t *)take(lab, sizeof(uint32_t));
  struct us_engine_stuck *stuck =
      (struct us_engine_stuck *)take(lab, ranks * blocks * US_ENGINE_ROLES * sizeof *stuck);
  float *all[US_ENGINE_MAX_RANKS];
  void *select[US_ENGINE_MAX_RANKS];
  for (uint32_t r = 0; r < ranks; r++) {
    all[r] = (float *)take(lab, (size_t)tiles * 8 * N * sizeof(float));
    select[r] = take(lab, us_engine_select_bytes(ranks, blocks, 2 * tiles));
  }
  for (uint32_t r = 0; r < ranks; r++) {
    struct us_engine_rank *rank = &lab->launch.rank[r];
    rank->rank = r, rank->ranks = ranks, rank->blocks = blocks, rank->stuck = stuck;
    rank->selects = 2 * tiles;
    rank->ops = lab->ops[r] = (struct us_engine_op *)take(lab, LAB_MAX_OPS * sizeof(struct us_engine_op));
    rank->done = (uint32_t *)take(lab, LAB_MAX_OPS * sizeof(uint32_t));
    rank->state = (struct us_engine_state *)take(lab, sizeof *rank->state);
    rank->mailbox = r == 0 ? lab->mailbox : NULL;
    for (uint32_t to = 0; to < ranks; to++)
      rank->select[to] = select[to], rank->logits_all[to] = ranks > 1 ? all[to] : NULL;
    lab->logits[r] = (float *)take(lab, (size_t)tiles * 8 * lab->share * sizeof(float));
  }
}

void lab_close(struct round_lab *lab) {
  for (void *memory : lab->owned) US_CUDA(cudaFree(memory));
  lab->owned.clear();
  US_CUDA(cudaFreeHost(lab->mailbox));
}

void lab_logits(struct round_lab *lab, const float *logits) {
  for (uint32_t r = 0; r < lab->ranks; r++) {
    uint32_t first = r * lab->share, count = lab->N - first < lab->share ? lab->N - first : lab->share;
    /* What lies behind the share would win, if it were looked at. */
    std::vector<float> own((size_t)lab->tiles * 8 * lab->share, 3e38f);
    for (uint32_t row = 0; row < lab->tiles * 8; row++)
      for (uint32_t i = 0; i < count; i++)
        own[(size_t)row * lab->share + i] = logits[(size_t)row * lab->N + first + i];
    US_CUDA(cudaMemcpy(lab->logits[r], own.data(), own.size() * sizeof(float), cudaMemcpyHostToDevice));
  }
}

void lab_push(struct round_lab *lab, const struct us_engine_state *state) {
  lab->launch.unfiltered = !state->adaptive;
  for (const struct us_engine_sequence &s : state->sequence)
    lab->launch.unfiltered &= us_engine_is_simple(&s, lab->N);
  for (uint32_t r = 0; r < lab->ranks; r++)
    US_CUDA(cudaMemcpy(lab->launch.rank[r].state, state, sizeof *state, cudaMemcpyHostToDevice));
}

void lab_pull(const struct round_lab *lab, uint32_t rank, struct us_engine_state *ret_state) {
  US_CUDA(cudaMemcpy(ret_state, lab->launch.rank[rank].state, sizeof *ret_state, cudaMemcpyDeviceToHost));
}

uint32_t lab_selects(const struct round_lab *lab, bool draft, uint32_t wait, struct us_engine_op *ops) {
  for (uint32_t t = 0; t < lab->tiles; t++) {
    ops[t] = {};
    ops[t].kind = US_ENGINE_SELECT, ops[t].row_tile = t, ops[t].wait = wait;
    ops[t].program = draft ? US_ENGINE_PASS_DRAFT : US_ENGINE_PASS_TARGET;
    ops[t].select.stride = lab->share, ops[t].select.vocab = lab->N, ops[t].select.draft = draft;
    ops[t].select.row = 8 * t, ops[t].select.step = 1, ops[t].select.rows = 8 * t + 8;
    ops[t].select.number = draft ? t : lab->tiles + t, ops[t].select.last = t + 1 == lab->tiles;
  }
  return lab->tiles;
}

struct us_engine_op lab_accept(const struct round_lab *lab, uint32_t wait) {
  struct us_engine_op op = {};
  op.kind = US_ENGINE_ACCEPT, op.program = US_ENGINE_PASS_TARGET, op.wait = wait;
  op.accept.vocab = lab->N, op.accept.tiles = lab->tiles;
  return op;
}

static void push_ops(struct round_lab *lab, const struct us_engine_op *ops, uint32_t count) {
  for (uint32_t r = 0; r < lab->ranks; r++) {
    std::vector<struct us_engine_op> own(ops, ops + count);
    for (struct us_engine_op &op : own) {
      if (op.kind != US_ENGINE_SELECT) continue;
      op.select.first = r * lab->share;
      op.select.count = lab->N - op.select.first < lab->share ? lab->N - op.select.first : lab->share;
      op.select.logits = lab->logits[r] + (size_t)op.row_tile * 8 * lab->share;
    }
    US_CUDA(cudaMemcpy(lab->ops[r], own.data(), count * sizeof *ops, cudaMemcpyHostToDevice));
  }
}

int lab_launch(const struct us_engine_launch *launch, uint32_t blocks, uint32_t *gate, bool keep_on,
               cudaStream_t stream) {
  struct us_engine_launch copy = *launch;
  void *arguments[] = {&copy, &gate, &keep_on};
  cudaError_t status = cudaFuncSetAttribute(lab_rounds, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            (int)sizeof(struct us_engine_shared));
  if (status == cudaSuccess) status = cudaMemsetAsync(gate, 0, sizeof *gate, stream);
  for (uint32_t r = 0; status == cudaSuccess && r < launch->ranks; r++)
    status = cudaMemsetAsync(launch->rank[r].done, 0, LAB_MAX_OPS * sizeof(uint32_t), stream);
  if (status != cudaSuccess) return status;
  return cudaLaunchCooperativeKernel((const void *)lab_rounds, dim3(blocks), dim3(US_ENGINE_COMPUTE),
                                     arguments, sizeof(struct us_engine_shared), stream);
}

double lab_run(struct round_lab *lab, const struct us_engine_op *ops, uint32_t count, uint32_t rounds,
               int flags) {
  cudaEvent_t begin, end;
  float ms;
  US_CUDA(cudaEventCreate(&begin));
  US_CUDA(cudaEventCreate(&end));
  push_ops(lab, ops, count);
  lab->launch.first = 0, lab->launch.last = count, lab->launch.rounds = rounds;
  lab->launch.jitter = flags & LAB_JITTER ? 4000 : 0;
  US_CUDA(cudaEventRecord(begin));
  US_CUDA((cudaError_t)lab_launch(&lab->launch, lab->ranks * lab->blocks, lab->gate, flags & LAB_KEEP_ON, 0));
  US_CUDA(cudaEventRecord(end));
  US_CUDA(cudaDeviceSynchronize());
  US_CUDA(cudaEventElapsedTime(&ms, begin, end));
  US_CUDA(cudaEventDestroy(begin));
  US_CUDA(cudaEventDestroy(end));
  return (double)ms * 1e3 / rounds;
}
