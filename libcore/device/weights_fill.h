/* weights_fill.h: what puts a piece's source rows into device memory: a checkpoint's through pinned memory, or the generator.
 *
 *     stage = us_weights_stage(item, &piece);
 *     us_weights_copy(item, &piece, &stage, pinned, &err);                    // then one copy of stage.bytes to `device`
 *     us_weights_inits(item, &piece, &stage, pinned);                         // or: copy stage.sources_at bytes,
 *     us_weights_make(item, &piece, &stage, device, stream, &err);            // and make the sources there
 */
#ifndef US_DEVICE_WEIGHTS_FILL_H
#define US_DEVICE_WEIGHTS_FILL_H

#include "device/weights_plan.h"

/* Checkpoint: gather the piece's sources into a stage in host memory. US_ERR_INPUT: a scale that pages cannot hold; names
 * tensor, row and column. */
US_CHECKED enum us_status us_weights_copy(const struct us_weights_item *item,
                                          const struct us_weights_piece *piece,
                                          const struct us_weights_stage *stage, uint8_t *host,
                                          struct us_err *err);

/* Synthetic: matrices' data point to their struct us_init. Fill the stage's table of them; then, once it is on the device, make
 * the sources beside it. */
void us_weights_inits(const struct us_weights_item *item, const struct us_weights_piece *piece,
                      const struct us_weights_stage *stage, uint8_t *host);
US_CHECKED enum us_status us_weights_make(const struct us_weights_item *item,
                                          const struct us_weights_piece *piece,
                                          const struct us_weights_stage *stage, uint8_t *device,
                                          cudaStream_t stream, struct us_err *err);

#endif
