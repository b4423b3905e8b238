/* safetensors.h: read and write safetensors, one file or shards with an index.
 *
 *     struct us_safetensors *st;
 *     if (us_safetensors_open("MiMo-V2.5-Pro", &st, &err) != US_OK) return err.status;
 *     const struct us_safetensor *t = us_safetensors_find(st, "model.norm.weight");
 *     us_safetensors_close(st);
 *
 *     us_safetensors_writer_create("out", &writer, &err);                      // a folder, or x.safetensors
 *     us_safetensors_writer_declare(writer, "model.norm.weight", US_DTYPE_BF16, 1, dims, &err);
 *     us_safetensors_writer_begin(writer, 5000000000, &err);                     // bytes a shard at most
 *     us_safetensors_writer_write(writer, data, bytes, &err);                    // in the order declared
 *     us_safetensors_writer_commit(writer, &err);                                // all files appear, whole
 *     us_safetensors_writer_free(writer);
 *
 * A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes. Files are hostile until
 * checked: opening checks every name, dtype, size and offset, and that the tensors cover the file without overlap and
 * without hole; it reads no tensor. What the bytes mean is the caller's to check.
 */
#ifndef US_FORMATS_SAFETENSORS_H
#define US_FORMATS_SAFETENSORS_H

#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

#define US_SAFETENSORS_MAX_HEADER  100000000ull /* bytes, as the reference reader */
#define US_SAFETENSORS_MAX_TENSORS 2000000u     /* over all shards */
#define US_SAFETENSORS_MAX_NAME    512u         /* bytes */
#define US_SAFETENSORS_MAX_DIMS    8u
#define US_SAFETENSORS_MAX_SHARDS  4096u

enum us_dtype {
  US_DTYPE_BOOL,
  US_DTYPE_U8,
  US_DTYPE_I8,
  US_DTYPE_F8_E5M2,
  US_DTYPE_F8_E4M3,
  US_DTYPE_F8_E8M0,
  US_DTYPE_I16,
  US_DTYPE_U16,
  US_DTYPE_F16,
  US_DTYPE_BF16,
  US_DTYPE_I32,
  US_DTYPE_U32,
  US_DTYPE_F32,
  US_DTYPE_F64,
  US_DTYPE_I64,
  US_DTYPE_U64,
  US_DTYPE_COUNT
};

/* "BF16", ... as in the header; "?" outside the enum. */
const char *us_dtype_name(enum us_dtype dtype);

/* Bytes of one element; 0 outside the enum. */
size_t us_dtype_bytes(enum us_dtype dtype);

/* One tensor of an open file. Everything is borrowed from the us_safetensors. */
struct us_safetensor {
  const char *name;
  const char *file; /* path of the file that holds it */
  enum us_dtype dtype;
  uint32_t ndim; /* 0: a scalar */
  uint64_t dims[US_SAFETENSORS_MAX_DIMS];
  const void *data; /* into the mapping; aligned only as the file has it: copy before casting if in doubt */
  size_t bytes;
};

struct us_safetensors;

/* Map a .safetensors file, an index (*.json), or a folder: the one index in it (*.safetensors.index.json, if there
 * are several model.safetensors.index.json), else model.safetensors, else its only .safetensors file. An index's
 * shards must lie in its folder and hold the tensors that it says; tensors of a shard that the index does not name
 * are ignored. US_ERR_IO if something cannot be read; US_ERR_INPUT names file and tensor if a check fails. */
US_CHECKED enum us_status us_safetensors_open(const char *path, struct us_safetensors **ret_st,
                                              struct us_err *err);

/* Parse one file's bytes in memory (borrowed until close); `name` is for messages. */
US_CHECKED enum us_status us_safetensors_open_memory(const void *bytes, size_t n, const char *name,
                                                     struct us_safetensors **ret_st, struct us_err *err);

/* Unmap; NULL is allowed. */
void us_safetensors_close(struct us_safetensors *st);

/* Tensors are ordered by file, then by offset. */
size_t us_safetensors_count(const struct us_safetensors *st);
const struct us_safetensor *us_safetensors_at(const struct us_safetensors *st, size_t i);

/* The tensor of that name, or NULL. */
const struct us_safetensor *us_safetensors_find(const struct us_safetensors *st, const char *name);

/* Value of a `__metadata__` key in the first file that has it, or NULL. */
const char *us_safetensors_metadata(const struct us_safetensors *st, const char *key);

/* US_ERR_INPUT naming file and tensor unless it has this dtype and shape. */
US_CHECKED enum us_status us_safetensor_expect(const struct us_safetensor *t, enum us_dtype dtype,
                                               uint32_t ndim, const uint64_t *dims, struct us_err *err);

struct us_safetensors_writer;

/* Start writing to a single file (a path ending in .safetensors) or into a folder, which is created if it is missing. The
 * folder must hold no other checkpoint: a reader goes by the index it finds. */
US_CHECKED enum us_status us_safetensors_writer_create(const char *path,
                                                       struct us_safetensors_writer **ret_writer,
                                                       struct us_err *err);

/* Add a `__metadata__` entry, written to every file; before begin. */
US_CHECKED enum us_status us_safetensors_writer_metadata(struct us_safetensors_writer *writer,
                                                         const char *key, const char *value,
                                                         struct us_err *err);

/* Add a tensor; before begin. US_ERR_USAGE for a name that is empty, too long or not UTF-8, and for an overflowing
 * size. */
US_CHECKED enum us_status us_safetensors_writer_declare(struct us_safetensors_writer *writer,
                                                        const char *name, enum us_dtype dtype, uint32_t ndim,
                                                        const uint64_t *dims, struct us_err *err);

/* Cut the tensors into files of at most max_shard_bytes each (0: no limit; a larger tensor gets a file of its own; a
 * single file is never cut). In a folder the files are model.safetensors, or model-00001-of-0000N.safetensors with
 * model.safetensors.index.json. Nothing may be declared afterwards. US_ERR_USAGE for a name declared twice. */
US_CHECKED enum us_status us_safetensors_writer_begin(struct us_safetensors_writer *writer,
                                                      uint64_t max_shard_bytes, struct us_err *err);

/* Append the tensors' bytes in declared order, in pieces of any size that may span tensors. */
US_CHECKED enum us_status us_safetensors_writer_write(struct us_safetensors_writer *writer, const void *data,
                                                      size_t bytes, struct us_err *err);

/* Sync all files and rename them into place, the index last. US_ERR_USAGE if bytes are missing. */
US_CHECKED enum us_status us_safetensors_writer_commit(struct us_safetensors_writer *writer,
                                                       struct us_err *err);

/* Release the writer; without a commit before, its temporary files are removed. NULL is allowed. */
void us_safetensors_writer_free(struct us_safetensors_writer *writer);

#endif
