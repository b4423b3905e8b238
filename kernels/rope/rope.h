/* rope.h: rotary position embedding of the first rotary_dim dims of a head, NeoX half split.
 *
 *     float table[64];
 *     us_rope_table(1e7, 64, position, table);
 *     us_rope_apply(table, 64, q_head);             // dims i and i + 32 are a pair; dims 64.. are left alone
 *
 * inv_freq[i] = theta^(-2i / rotary_dim); angle = position * inv_freq[i]; cos and sin are computed in double
 * and rounded once to FP32. x[i]' = x[i] cos - x[i+half] sin, x[i+half]' = x[i+half] cos + x[i] sin, each
 * product and sum rounded.
 */
#ifndef US_KERNELS_ROPE_ROPE_H
#define US_KERNELS_ROPE_ROPE_H

#include <stdint.h>

/* table (rotary_dim): rotary_dim/2 cosines, then as many sines. rotary_dim is even. */
void us_rope_table(double theta, uint32_t rotary_dim, uint32_t position, float *table);

/* Rotate x[0 .. rotary_dim) in place. */
void us_rope_apply(const float *table, uint32_t rotary_dim, float *x);

#endif
