/* safetensors_header.h: the JSON header of one safetensors file, checked. Internal to the reader.
 *
 *     struct us_st_header header;
 *     if (us_st_header_parse(bytes, n, "model.safetensors", &header, &err) != US_OK) ...
 *     us_st_header_release(&header);
 */
#ifndef US_FORMATS_SAFETENSORS_HEADER_H
#define US_FORMATS_SAFETENSORS_HEADER_H

#include "formats/safetensors.h"

struct us_st_header {
  struct us_safetensor *tensors; /* by offset; names are owned, `file` is left NULL */
  size_t count;
  char **metadata; /* key, value, key, value, ... owned */
  size_t metadata_count;
};

/* Parse and check the whole file's bytes: dtypes, shapes, sizes, offsets, overlap, holes. No tensor byte is read.
 * US_ERR_INPUT names `name` and the tensor; nothing is held then. */
US_CHECKED enum us_status us_st_header_parse(const void *bytes, size_t n, const char *name,
                                             struct us_st_header *ret_header, struct us_err *err);

void us_st_header_release(struct us_st_header *header);

/* 1 if a tensor or metadata name can be shown in a one-line message: not empty, at most US_SAFETENSORS_MAX_NAME
 * bytes, no control characters. */
int us_st_name_ok(const char *name);

#endif
