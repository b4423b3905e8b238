/* embed.h: token embedding: row `token` of the table as FP32, unscaled.
 *
 *     us_embed(&model->embed, token, h);      // h (D)
 */
#ifndef US_KERNELS_EMBED_EMBED_H
#define US_KERNELS_EMBED_EMBED_H

#include "formats/matrix.h"

/* Decode row `token` (< table->rows) of the table (N, D) into h (D). */
void us_embed(const struct us_matrix *table, uint32_t token, float *h);

#endif
