/* h5_parse.h: the subset of HDF5 that h5_write.c produces, parsed (internal to h5_read.c).
 *
 *     struct us_h5_catalogue catalogue = {0};
 *     status = us_h5_parse(file, &block, &catalogue, &err);      // block: checked by us_h5_block_check
 *     us_h5_catalogue_release(&catalogue);
 *
 * Superblock version 0, groups as symbol tables, object headers of version 1, contiguous layout: "HDF5 File Format
 * Specification Version 3.0". Every address is bounded by the metadata, every node is visited once, anything else is
 * refused.
 */
#ifndef US_BASE_H5_PARSE_H
#define US_BASE_H5_PARSE_H

#include "base/h5_block.h"

struct us_h5_named_text {
  char *name, *text;
};

struct us_h5_catalogue {
  struct us_h5_dataset *datasets; /* names are owned; sorted by name */
  size_t count, capacity;
  struct us_h5_named_text *texts; /* sorted by name */
  size_t text_count, text_capacity;
};

/* US_ERR_INPUT names the object and what is wrong with it; US_ERR_MEMORY. Release the catalogue in any case. */
US_CHECKED enum us_status us_h5_parse(const uint8_t *file, const struct us_h5_block *block,
                                      struct us_h5_catalogue *catalogue, struct us_err *err);

void us_h5_catalogue_release(struct us_h5_catalogue *catalogue);

#endif
