/* mxfp4_tables.h: the 16 weights of each scale byte, ready to be looked up.
 *
 *     const float *table = us_mxfp4_tables[scale];      // table[code] == us_e2m1_to_f32(code) * us_e8m0_to_f32(scale)
 *
 * 16 KB, of which a matrix touches the few lines of its own scales: one load in place of a multiplication and a broadcast,
 * on the two ports that the fma need.
 */
#ifndef US_KERNELS_LINEAR_MXFP4_TABLES_H
#define US_KERNELS_LINEAR_MXFP4_TABLES_H

extern const float us_mxfp4_tables[256][16];

#endif
