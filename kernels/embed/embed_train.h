/* embed_train.h: rows of the embedding table on the GPU, and their gradient.
 *
 *     us_embed_train(&(struct us_embed_train){.R = R, .D = D, .token = token, .table = table, .x = x}, stream);
 *
 *     size_t pieces = us_embed_train_plan(token, R, row, piece, work);           // on the host; row and piece go to the device
 *     us_embed_train_grad(&(struct us_embed_train_grad){.D = D, .row = row, .piece = piece, .pieces = pieces, .dx = dx,
 *                                                       .dtable = dtable, .scratch = scratch}, stream);
 *
 * Rows of one token add in ascending order, in pieces of US_EMBED_TRAIN_PIECE rows: up to that many the bits are those of
 * us_embed_grad. No atomics. Pointers are device memory unless said; a call returns a cudaError_t. D is a multiple of 4.
 */
#ifndef US_KERNELS_EMBED_TRAIN_H
#define US_KERNELS_EMBED_TRAIN_H

#include "kernels/gpu/stream.h"
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct us_embed_train {
  size_t R, D;
  const int32_t *token;     /* (R) */
  const uint16_t *table;    /* (N, D) bf16 */
  const uint16_t *opt_mask; /* (D) bf16: the row of a negative token; NULL: zeros */
  float *x;                 /* (R, D) written */
};
int us_embed_train(const struct us_embed_train *embed, cudaStream_t stream);

#define US_EMBED_TRAIN_PIECE 32

/* Up to US_EMBED_TRAIN_PIECE rows of one token. */
struct us_embed_train_piece {
  uint32_t first, rows; /* in the list of rows */
  int32_t token;        /* -1: the mask */
  uint32_t pieces;      /* of this token, in its first piece; 0 in the others, which follow it */
};

/* On the host: rows sorted by token (stable), cut into pieces. Rows of negative tokens come first, with token -1.
 *   token (R) host;  row (R), piece (R at most) written, host memory;  work (2 R) host.  Returns the number of pieces. */
size_t us_embed_train_plan(const int32_t *token, size_t R, uint32_t *row, struct us_embed_train_piece *piece,
                           uint64_t *work);

struct us_embed_train_grad {
  size_t D;
  const uint32_t *row; /* from the plan, on the device */
  const struct us_embed_train_piece *piece;
  size_t pieces;
  const float *dx;  /* (R, D) */
  float *dtable;    /* (N, D) added to; NULL: frozen */
  float *opt_dmask; /* (D) added to: the sum of the rows of negative tokens; NULL: they are left out */
  void *scratch;    /* us_embed_train_scratch(pieces, D) bytes */
};
size_t us_embed_train_scratch(size_t pieces, size_t D);
int us_embed_train_grad(const struct us_embed_train_grad *grad, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
