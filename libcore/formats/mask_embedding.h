/* mask_embedding.h: the DFlash drafter's mask_embedding.pt, without PyTorch.
 *
 *     struct us_mask_embedding mask;
 *     if (us_mask_embedding_read("draft/mask_embedding.pt", &mask, &err) != US_OK) return err.status;
 *     ... mask.mask_token_id, mask.values[0 .. mask.hidden) ...
 *     us_mask_embedding_release(&mask);
 *
 * The file is torch.save({'mask_token_id': int, 'embedding': tensor[hidden]}): an uncompressed zip that holds a
 * pickle and the tensor's bytes. A pickle is a program; this reader knows the dozen opcodes that such a file contains
 * and the one constructor (torch._utils._rebuild_tensor_v2) and refuses everything else. Nothing is ever executed.
 */
#ifndef US_FORMATS_MASK_EMBEDDING_H
#define US_FORMATS_MASK_EMBEDDING_H

#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

#define US_MASK_EMBEDDING_MAX 1048576u /* hidden size cap */

struct us_mask_embedding {
  int64_t mask_token_id;
  size_t hidden;
  float *values; /* (hidden) FP32, exact: the file holds bf16, f16 or f32 */
};

/* Read and check; US_ERR_INPUT names the file and the field. Release with us_mask_embedding_release. */
US_CHECKED enum us_status us_mask_embedding_read(const char *path, struct us_mask_embedding *ret_mask,
                                                 struct us_err *err);

/* The same from bytes in memory; `name` is for messages. */
US_CHECKED enum us_status us_mask_embedding_parse(const void *bytes, size_t n, const char *name,
                                                  struct us_mask_embedding *ret_mask, struct us_err *err);

/* Write what torch.load(weights_only=True) reads back: values rounded to bf16. Atomic. */
US_CHECKED enum us_status us_mask_embedding_write(const char *path, const struct us_mask_embedding *mask,
                                                  struct us_err *err);

void us_mask_embedding_release(struct us_mask_embedding *mask);

#endif
