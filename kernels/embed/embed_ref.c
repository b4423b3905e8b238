/* embed_ref.c: token embedding. */
#include "kernels/embed/embed.h"

void us_embed(const struct us_matrix *table, uint32_t token, float *h) {
  us_matrix_decode_row(table, token, h);
}
