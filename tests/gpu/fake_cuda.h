/* fake_cuda.h: what a test asks of the stand-in for the CUDA runtime (fake_cuda.c).
 *
 *     fake_cuda_gpus = 4;
 *     fake_cuda_calls = 0, fake_cuda_fail = 17;      // the 17th call that takes memory fails
 *     ...
 *     if (fake_cuda_held) ...                        // memory, streams, events or graphs that nobody gave back
 */
#ifndef US_TESTS_GPU_FAKE_CUDA_H
#define US_TESTS_GPU_FAKE_CUDA_H

extern unsigned fake_cuda_gpus;  /* that there are */
extern unsigned fake_cuda_calls; /* that took memory so far */
extern unsigned fake_cuda_fail;  /* the number of the one that fails; 0: none */
extern unsigned fake_cuda_held;  /* memory, streams, events, graphs */

#endif
