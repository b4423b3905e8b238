/* io.h: mapping files, and writing everything or saying why not.
 *
 *     struct us_io_map map;
 *     if (us_io_map_open("pico.h5", &map, &err) != US_OK) return err.status;      // map.data[0 .. map.size - 1]
 *     us_io_map_close(&map);
 *     if (us_io_write_all(fd, bytes, n, "report.tsv", &err) != US_OK) return err.status;
 *
 * A file read whole into memory: us_buffer_read_file (buffer.h). A file written whole or not at all: atomic.h.
 */
#ifndef US_BASE_IO_H
#define US_BASE_IO_H

#include "base/err.h"
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct us_io_map {
  const uint8_t *data; /* read-only, page aligned; NULL for an empty file */
  size_t size;
};

/* Map a regular file privately and read-only. US_ERR_IO, and US_ERR_INPUT for a folder, pipe or device, name the path. */
US_CHECKED enum us_status us_io_map_open(const char *path, struct us_io_map *ret_map, struct us_err *err);
void us_io_map_close(struct us_io_map *map); /* a zeroed map is allowed */

/* Write all n bytes to fd, across signals and short writes. `name` is for the message: "cannot write 'name': reason". */
US_CHECKED enum us_status us_io_write_all(int fd, const void *bytes, size_t n, const char *name,
                                          struct us_err *err);

/* Flush a stream and say whether everything reached it; for streams that are not ours to close. Of stdout the message says
 * "standard output", else `name`. */
US_CHECKED enum us_status us_io_flush(FILE *file, const char *name, struct us_err *err);

#endif
