/* ceiling.cu: reading memory through a ring in every SM's shared memory, and nothing else.
 *
 * Bound: HBM. On an H200 4.5 to 4.7 TB/s of the 4.8 that its data sheet says.
 */
#include "device/ceiling.h"

#include "kernels/gpu/async.cuh"

#define READERS 128 /* threads; one warp more copies */

/* `laps` times all chunks, so that a launch lasts long enough for its start not to count. */
template <int CHUNK, int STAGES>
static __global__ void __launch_bounds__(READERS + 32, 1)
    stream_all(const uint8_t *data, size_t chunks, uint32_t laps, uint32_t *out) {
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
  if (threadIdx.x == 0)
    for (int s = 0; s < STAGES; s++) {
      us_barrier_init(us_shared_address(&full[s]), 1);
      us_barrier_init(us_shared_address(&empty[s]), READERS / 32);
    }
  us_barrier_init_fence();
  __syncthreads();
  int stage = 0;
  uint32_t phase = 0, mixed = 0;
  for (size_t i = blockIdx.x; i < chunks * laps; i += gridDim.x) {
    uint32_t f = us_shared_address(&full[stage]), e = us_shared_address(&empty[stage]);
    if (threadIdx.x == READERS) {
      us_barrier_wait(e, phase ^ 1);
      us_barrier_expect(f, CHUNK);
      us_bulk_load(us_shared_address(ring + stage * CHUNK), data + i % chunks * CHUNK, CHUNK, f);
    } else if (threadIdx.x < READERS) {
      us_barrier_wait(f, phase);
      const uint4 *chunk = (const uint4 *)(ring + stage * CHUNK);
      for (int k = threadIdx.x; k < CHUNK / 16; k += READERS)
        mixed ^= chunk[k].x ^ chunk[k].y ^ chunk[k].z ^ chunk[k].w;
      __syncwarp();
      if (threadIdx.x % 32 == 0) us_barrier_arrive(e);
    }
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  if (mixed == 0x12345u) *out = mixed; /* or the loads would be for nothing */
}

struct measure {
  const uint8_t *data;
  size_t bytes;
  cudaStream_t stream;
  uint32_t *out;
  cudaEvent_t begin, end;
  int blocks;
  double best; /* bytes a second */
};

template <int CHUNK, int STAGES> static cudaError_t try_ring(struct measure *m) {
  size_t chunks = m->bytes / CHUNK;
  uint32_t laps = (uint32_t)(((size_t)32 << 30) / m->bytes + 1); /* about 8 ms */
  cudaError_t code = cudaFuncSetAttribute(stream_all<CHUNK, STAGES>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, CHUNK * STAGES);
  for (int turn = 0; code == cudaSuccess && turn < 4; turn++) { /* the first ones bring the clocks up */
    float ms = 0;
    (void)cudaEventRecord(m->begin, m->stream);
    stream_all<CHUNK, STAGES>
        <<<m->blocks, READERS + 32, CHUNK * STAGES, m->stream>>>(m->data, chunks, laps, m->out);
    code = cudaGetLastError();
    (void)cudaEventRecord(m->end, m->stream);
    if (code == cudaSuccess) code = cudaEventSynchronize(m->end);
    if (code == cudaSuccess) code = cudaEventElapsedTime(&ms, m->begin, m->end);
    double rate = (double)chunks * CHUNK * laps / ms * 1e3;
    if (code == cudaSuccess && turn && rate > m->best) m->best = rate;
  }
  return code;
}

static cudaError_t measure_all(struct measure *m) {
  int device;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&m->blocks, cudaDevAttrMultiProcessorCount, device);
  if (code == cudaSuccess) code = cudaMalloc(&m->out, sizeof *m->out);
  if (code == cudaSuccess) code = cudaEventCreate(&m->begin);
  if (code == cudaSuccess) code = cudaEventCreate(&m->end);
  if (code == cudaSuccess) code = try_ring<32768, 6>(m);
  if (code == cudaSuccess) code = try_ring<16384, 12>(m);
  if (code == cudaSuccess) code = try_ring<8192, 8>(m);
  if (m->begin) (void)cudaEventDestroy(m->begin);
  if (m->end) (void)cudaEventDestroy(m->end);
  (void)cudaFree(m->out);
  return code;
}

enum us_status us_device_ceiling(const void *data, size_t bytes, cudaStream_t stream,
                                 double *ret_bytes_per_second, struct us_err *err) {
  struct measure m = {};
  m.data = (const uint8_t *)data, m.bytes = bytes, m.stream = stream;
  cudaError_t code = measure_all(&m);
  *ret_bytes_per_second = m.best;
  if (code == cudaSuccess) return US_OK;
  (void)cudaGetLastError();
  return us_err_set(err, code == cudaErrorMemoryAllocation ? US_ERR_MEMORY : US_ERR_DEVICE,
                    "measuring the memory's rate: %s", cudaGetErrorString(code));
}
