/* stream.h: cudaStream_t for C headers that must compile without the CUDA toolkit. */
#ifndef US_KERNELS_GPU_STREAM_H
#define US_KERNELS_GPU_STREAM_H

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#else
typedef struct CUstream_st *cudaStream_t;
#endif

#endif
