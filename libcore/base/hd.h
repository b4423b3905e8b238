/* hd.h: US_HD marks an inline function that is compiled for the host and for the device, one source.
 *
 *     static US_HD uint32_t us_rotate(uint32_t x, int n) { return x << n | x >> (32 - n); }
 *
 * Such a function must give the same bits on both sides: no library function but fmaf and fabsf, and a
 * product that feeds a sum is either an explicit fmaf or goes through a translation unit compiled without
 * contraction (all are: -ffp-contract=off, -fmad=false).
 */
#ifndef US_BASE_HD_H
#define US_BASE_HD_H

#ifdef __CUDACC__
#define US_HD __host__ __device__ __forceinline__
#else
#define US_HD inline
#endif

#endif
