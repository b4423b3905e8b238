/* ceiling.h: the rate at which a GPU's memory can be read at all, measured now: what an engine's rate is a fraction of.
 *
 *     double bytes_per_second;
 *     us_device_ceiling(data, bytes, stream, &bytes_per_second, &err);     // of the current GPU
 *
 * Every SM streams chunks through a ring of bulk copies, as the engine does, and looks at each 16 bytes once: no arithmetic, no
 * hand-offs. The best of three rings counts, since which one it is differs between machines.
 */
#ifndef US_DEVICE_CEILING_H
#define US_DEVICE_CEILING_H

#include "base/err.h"
#include "kernels/engine/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* data: memory of the current GPU, at least 1 GiB for a figure that the 50 MiB of L2 cannot flatter; 16-byte aligned, only read.
 * Takes about 50 ms after a warm-up of as long, and waits for the stream. US_ERR_DEVICE: CUDA. */
US_CHECKED enum us_status us_device_ceiling(const void *data, size_t bytes, cudaStream_t stream,
                                            double *ret_bytes_per_second, struct us_err *err);

#ifdef __cplusplus
}
#endif
#endif
