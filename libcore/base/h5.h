/* h5.h: the toolkit's artefacts: HDF5 files of contiguous datasets that are mapped, not read.
 *
 *     struct us_h5_writer *out;
 *     us_h5_create("shards.h5", "token-shards", &out, &err);
 *     us_h5_put_text(out, "provenance", json, &err);
 *     us_h5_put(out, "train/tokens", US_H5_U32, 1, (size_t[]){n}, tokens, &err);
 *     us_h5_finish(out, &err);                      // only now the file exists, whole; us_h5_abandon drops it instead
 *
 *     struct us_h5 *file;
 *     us_h5_open("shards.h5", "token-shards", &file, &err);
 *     const struct us_h5_dataset *d;
 *     us_h5_get(file, "train/tokens", US_H5_U32, 1, NULL, &d, &err);    // d->data points into the mapped file
 *     us_h5_close(file);
 *
 * h5dump, h5py and every other HDF5 reader opens these files: little-endian scalars, no filters, no chunks. They begin
 * with a user block of 4096 bytes (docs/formats.md) whose SHA-256 covers all of the file that is not a dataset's data.
 * Reading does not use libhdf5: its parser is no match for a hostile file, so h5_read.c checks the hash and then parses
 * the small subset of HDF5 that the writer produces, refusing anything else; opening touches only metadata pages.
 *
 * A reader may be shared between threads. Writing uses libhdf5, which is not thread-safe: one thread of a process at a
 * time may be in us_h5_create, _put*, _reserve and _finish. A file that is cut short while it is mapped raises SIGBUS.
 */
#ifndef US_BASE_H5_H
#define US_BASE_H5_H

#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define US_H5_MAX_RANK     4
#define US_H5_MAX_NAME     240     /* bytes of a dataset's full name, without NUL */
#define US_H5_MAX_DEPTH    8       /* groups around a dataset */
#define US_H5_MAX_DATASETS 1000000 /* MiMo-V2.5-Pro has 159,000 expert tensors, scales included */
#define US_H5_MAX_KIND     31      /* bytes of a kind, without NUL */
#define US_H5_ALIGNMENT    64      /* every dataset's offset in the file is a multiple of this */

enum us_h5_type {
  US_H5_U8,
  US_H5_I32,
  US_H5_U32,
  US_H5_I64,
  US_H5_U64,
  US_H5_F32,
  US_H5_F64,
  US_H5_BF16, /* stored as u16 with attribute format = "bf16" */
  US_H5_FP8,  /* E4M3, stored as u8 with attribute format = "fp8_e4m3" */
  US_H5_TYPE_COUNT
};

/* "u8", "i32", ... "bf16", "fp8_e4m3". */
const char *us_h5_type_name(enum us_h5_type type);

/* Bytes of an element. */
size_t us_h5_type_size(enum us_h5_type type);

/* -- Reading -- */

struct us_h5;

struct us_h5_dataset {
  const char *name; /* "layers.3/experts/codes": groups separated by '/', no leading one */
  enum us_h5_type type;
  int rank;
  size_t dims[US_H5_MAX_RANK];
  size_t count, bytes; /* elements; bytes = count * size of an element */
  const void *data;    /* inside the mapped file, 64-byte aligned, read-only; NULL if count is 0 */
};

/* Map and check a file. `opt_kind`: the kind it must have, NULL for any. US_ERR_IO when it cannot be read; US_ERR_INPUT,
 * naming file and field, when it is cut, changed, of another kind, or holds anything that the writer does not produce
 * (links, external storage, chunks, filters, unknown types, extents that overlap or leave the file). */
US_CHECKED enum us_status us_h5_open(const char *path, const char *opt_kind, struct us_h5 **ret_file,
                                     struct us_err *err);

/* Unmap; every pointer got from the file ends. NULL is allowed. */
void us_h5_close(struct us_h5 *file);

const char *us_h5_path(const struct us_h5 *file);
const char *us_h5_kind(const struct us_h5 *file);

/* All datasets, sorted by name. */
const struct us_h5_dataset *us_h5_datasets(const struct us_h5 *file, size_t *ret_count);

/* The dataset of that name, NULL if there is none. */
const struct us_h5_dataset *us_h5_find(const struct us_h5 *file, const char *name);

/* The dataset of that name, type and rank; `opt_dims` (rank): its dims, an entry of 0 for any. US_ERR_INPUT says what
 * differs. */
US_CHECKED enum us_status us_h5_get(const struct us_h5 *file, const char *name, enum us_h5_type type,
                                    int rank, const size_t *opt_dims,
                                    const struct us_h5_dataset **ret_dataset, struct us_err *err);

/* A root text ("provenance", "header", ...), NUL-terminated, owned by the file; NULL if there is none. */
const char *us_h5_text(const struct us_h5 *file, const char *name);

/* -- Writing -- */

struct us_h5_writer;

/* Begin a file that will replace `path` when finished. `kind`: [a-z0-9-], at most US_H5_MAX_KIND. The data goes to an
 * unnamed file in the same folder where the file system has those (a killed program leaves nothing), else to a
 * temporary name. US_ERR_IO when the folder cannot be written. */
US_CHECKED enum us_status us_h5_create(const char *path, const char *kind, struct us_h5_writer **ret_writer,
                                       struct us_err *err);

/* Add a dataset with its data; groups in `name` come into being as needed. Names are unique, of [A-Za-z0-9._-] and
 * '/'. US_ERR_USAGE for a bad or repeated name or dims, US_ERR_IO for a full disk. */
US_CHECKED enum us_status us_h5_put(struct us_h5_writer *writer, const char *name, enum us_h5_type type,
                                    int rank, const size_t *dims, const void *data, struct us_err *err);

/* Add a dataset whose data follows in pieces; what is never written reads as 0. *ret_slot names it for us_h5_write. */
US_CHECKED enum us_status us_h5_reserve(struct us_h5_writer *writer, const char *name, enum us_h5_type type,
                                        int rank, const size_t *dims, size_t *ret_slot, struct us_err *err);

/* Write elements [first, first + count) of a reserved dataset, counted in row-major order. Any order, any thread. */
US_CHECKED enum us_status us_h5_write(struct us_h5_writer *writer, size_t slot, size_t first, size_t count,
                                      const void *data, struct us_err *err);

/* Add a dataset whose number of rows is not known yet (logs, traces): dims[0] is ignored, rows are appended to a side
 * file, and the dataset is laid down by us_h5_finish. */
US_CHECKED enum us_status us_h5_stream(struct us_h5_writer *writer, const char *name, enum us_h5_type type,
                                       int rank, const size_t *dims, size_t *ret_slot, struct us_err *err);

/* Append rows to a stream: rows * product(dims[1..]) elements. */
US_CHECKED enum us_status us_h5_append(struct us_h5_writer *writer, size_t slot, size_t rows,
                                       const void *data, struct us_err *err);

/* Set a root text (UTF-8, no NUL inside): a string attribute, or above 32 KiB a u8 dataset "@name". */
US_CHECKED enum us_status us_h5_put_text(struct us_h5_writer *writer, const char *name, const char *text,
                                         struct us_err *err);

/* Write the user block, sync, and rename to the final path. Frees the writer in any case; on failure nothing is left. */
US_CHECKED enum us_status us_h5_finish(struct us_h5_writer *writer, struct us_err *err);

/* Drop everything; NULL is allowed. */
void us_h5_abandon(struct us_h5_writer *writer);

#endif
