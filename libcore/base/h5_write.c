/* h5_write.c: HDF5 artefacts, written: libhdf5 lays out the metadata, the data goes straight into the file. */
#include "base/atomic.h"
#include "base/h5.h"
#include "base/h5_block.h"
#include "base/h5_driver.h"

#include <errno.h>
#include <hdf5.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* An attribute lives in an object header message, 64 KiB at most; longer texts become datasets. */
#define TEXT_ATTRIBUTE_MAX 32768

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "datasets are mapped, so the host must be little-endian");

struct slot {
  char *name;
  enum us_h5_type type;
  int rank;
  size_t dims[US_H5_MAX_RANK];
  size_t count;               /* elements; of a stream: appended so far */
  size_t row;                 /* elements of a row, for a stream */
  uint64_t offset;            /* in the file; set once the dataset is laid down */
  struct us_atomic side_file; /* of a stream, never committed; fd is -1 otherwise */
};

struct us_h5_writer {
  struct us_atomic out;
  const char *path; /* out.path */
  char kind[US_H5_MAX_KIND + 1];
  struct us_h5_driver driver; /* outlives the file, see h5_driver.h */
  hid_t file;
  _Atomic bool broken; /* data is missing: the file must not be finished */
  struct slot *slots;
  size_t slot_count, slot_capacity;
};

/* -- libhdf5 prints its errors unless told otherwise; the setting of the caller is put back -- */

struct quiet {
  H5E_auto2_t function;
  void *data;
};

static struct quiet quiet_begin(void) {
  struct quiet quiet = {NULL, NULL};
  H5Eget_auto2(H5E_DEFAULT, &quiet.function, &quiet.data);
  H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
  return quiet;
}

static void quiet_end(struct quiet quiet) {
  H5Eclear2(H5E_DEFAULT);
  H5Eset_auto2(H5E_DEFAULT, quiet.function, quiet.data);
}

/* -- Types -- */

static const struct {
  const char *name;
  size_t size;
} types[US_H5_TYPE_COUNT] = {
    [US_H5_U8] = {"u8", 1},   [US_H5_I32] = {"i32", 4},   [US_H5_U32] = {"u32", 4},
    [US_H5_I64] = {"i64", 8}, [US_H5_U64] = {"u64", 8},   [US_H5_F32] = {"f32", 4},
    [US_H5_F64] = {"f64", 8}, [US_H5_BF16] = {"bf16", 2}, [US_H5_FP8] = {"fp8_e4m3", 1},
};

const char *us_h5_type_name(enum us_h5_type type) {
  return types[type].name;
}
size_t us_h5_type_size(enum us_h5_type type) {
  return types[type].size;
}

static hid_t stored_type(enum us_h5_type type) {
  switch (type) {
  case US_H5_I32:
    return H5T_STD_I32LE;
  case US_H5_U32:
    return H5T_STD_U32LE;
  case US_H5_I64:
    return H5T_STD_I64LE;
  case US_H5_U64:
    return H5T_STD_U64LE;
  case US_H5_F32:
    return H5T_IEEE_F32LE;
  case US_H5_F64:
    return H5T_IEEE_F64LE;
  case US_H5_BF16:
    return H5T_STD_U16LE;
  default:
    return H5T_STD_U8LE;
  }
}

/* -- Files -- */

static hid_t create_hdf5(struct us_h5_driver *driver) {
  hid_t create = H5Pcreate(H5P_FILE_CREATE), access = H5Pcreate(H5P_FILE_ACCESS), file = H5I_INVALID_HID;
  if (create >= 0 && access >= 0 && H5Pset_userblock(create, US_H5_BLOCK_BYTES) >= 0 &&
      H5Pset_alignment(access, 1, US_H5_ALIGNMENT) >= 0 &&
      H5Pset_small_data_block_size(access, 0) >= 0 && /* every dataset gets an aligned place of its own */
      H5Pset_libver_bounds(access, H5F_LIBVER_EARLIEST, H5F_LIBVER_V18) >=
          0) /* the subset that h5_read.c parses */
    file = us_h5_driver_create(driver, create, access);
  if (create >= 0) H5Pclose(create);
  if (access >= 0) H5Pclose(access);
  return file;
}

/* Let libhdf5 write what it still holds; false, with errno, if that or any earlier write of metadata failed. */
static bool close_hdf5(struct us_h5_writer *writer) {
  if (writer->file < 0) return true;
  struct quiet quiet = quiet_begin();
  bool ok = H5Fclose(writer->file) >= 0;
  us_h5_driver_release(&writer->driver);
  quiet_end(quiet);
  writer->file = H5I_INVALID_HID;
  errno = writer->driver.failure ? writer->driver.failure : EIO;
  return ok && !writer->driver.failure;
}

static void writer_free(struct us_h5_writer *writer) {
  close_hdf5(writer);
  us_atomic_abandon(&writer->out);
  for (size_t i = 0; i < writer->slot_count; i++) {
    us_atomic_abandon(&writer->slots[i].side_file);
    free(writer->slots[i].name);
  }
  free(writer->slots);
  free(writer);
}

void us_h5_abandon(struct us_h5_writer *writer) {
  if (writer) writer_free(writer);
}

enum us_status us_h5_create(const char *path, const char *kind, struct us_h5_writer **ret_writer,
                            struct us_err *err) {
  *ret_writer = NULL;
  if (!us_h5_kind_valid(kind))
    return us_err_set(err, US_ERR_USAGE, "%s: '%s' is not a kind of file", path, kind);
  struct us_h5_writer *writer = calloc(1, sizeof *writer);
  if (!writer) return us_err_memory(err, "a file writer", sizeof *writer);
  writer->file = H5I_INVALID_HID;
  strcpy(writer->kind, kind);
  enum us_status status = us_atomic_open(path, &writer->out, err);
  if (status != US_OK) {
    free(writer);
    return status;
  }
  writer->path = writer->out.path;
  writer->driver.fd = writer->out.fd;
  struct quiet quiet = quiet_begin();
  writer->file = create_hdf5(&writer->driver);
  quiet_end(quiet);
  if (writer->file < 0) {
    writer_free(writer);
    return us_err_set(err, US_ERR_IO, "%s: libhdf5 cannot create the file", path);
  }
  *ret_writer = writer;
  return US_OK;
}

/* -- Datasets -- */

static bool put_string_attribute(hid_t object, const char *name, const char *text) {
  size_t length = strlen(text);
  hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR), attribute = H5I_INVALID_HID;
  bool ok = type >= 0 && space >= 0 && H5Tset_size(type, length ? length : 1) >= 0 &&
            H5Tset_strpad(type, H5T_STR_NULLPAD) >= 0 && H5Tset_cset(type, H5T_CSET_UTF8) >= 0;
  if (ok) attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
  ok = attribute >= 0 && H5Awrite(attribute, type, text) >= 0;
  if (attribute >= 0) H5Aclose(attribute);
  if (space >= 0) H5Sclose(space);
  if (type >= 0) H5Tclose(type);
  return ok;
}

static bool lay_down_quietly(struct us_h5_writer *writer, struct slot *slot) {
  hsize_t dims[US_H5_MAX_RANK];
  for (int i = 0; i < slot->rank; i++) dims[i] = slot->dims[i];
  hid_t space = H5Screate_simple(slot->rank, dims, NULL), dataset = H5I_INVALID_HID;
  hid_t create = H5Pcreate(H5P_DATASET_CREATE), link = H5Pcreate(H5P_LINK_CREATE);
  bool ok = space >= 0 && create >= 0 && link >= 0 && H5Pset_layout(create, H5D_CONTIGUOUS) >= 0 &&
            H5Pset_alloc_time(create, H5D_ALLOC_TIME_EARLY) >= 0 &&
            H5Pset_fill_time(create, H5D_FILL_TIME_NEVER) >= 0 &&
            H5Pset_obj_track_times(create, false) >= 0 && /* the same input gives the same bytes */
            H5Pset_create_intermediate_group(link, 1) >= 0;
  if (ok)
    dataset = H5Dcreate2(writer->file, slot->name, stored_type(slot->type), space, link, create, H5P_DEFAULT);
  ok = dataset >= 0;
  if (ok && (slot->type == US_H5_BF16 || slot->type == US_H5_FP8))
    ok = put_string_attribute(dataset, "format", us_h5_type_name(slot->type));
  if (ok && slot->count > 0) {
    slot->offset = H5Dget_offset(dataset);
    ok = slot->offset != HADDR_UNDEF &&
         H5Dget_storage_size(dataset) == slot->count * us_h5_type_size(slot->type);
  }
  if (dataset >= 0) H5Dclose(dataset);
  if (space >= 0) H5Sclose(space);
  if (create >= 0) H5Pclose(create);
  if (link >= 0) H5Pclose(link);
  return ok;
}

static enum us_status lay_down(struct us_h5_writer *writer, struct slot *slot, struct us_err *err) {
  struct quiet quiet = quiet_begin();
  bool ok = lay_down_quietly(writer, slot);
  quiet_end(quiet);
  if (ok) return US_OK;
  return us_err_set(err, US_ERR_USAGE,
                    "%s: %s: libhdf5 cannot add the dataset (a repeated name, or a full disk)", writer->path,
                    slot->name);
}

static bool count_elements(int rank, const size_t *dims, size_t size, size_t *ret_count) {
  size_t count = 1;
  for (int i = 0; i < rank; i++)
    if (__builtin_mul_overflow(count, dims[i], &count)) return false;
  size_t bytes;
  if (__builtin_mul_overflow(count, size, &bytes) || bytes > INT64_MAX / 2) return false;
  *ret_count = count;
  return true;
}

/* Append a slot; `name` is checked unless it is an internal one. */
static enum us_status add_slot(struct us_h5_writer *writer, const char *name, enum us_h5_type type, int rank,
                               const size_t *dims, struct slot **ret_slot, struct us_err *err) {
  if (rank < 1 || rank > US_H5_MAX_RANK || (unsigned)type >= US_H5_TYPE_COUNT)
    return us_err_set(err, US_ERR_USAGE, "%s: %s: type %d of rank %d cannot be stored", writer->path, name,
                      (int)type, rank);
  size_t count;
  if (!count_elements(rank, dims, us_h5_type_size(type), &count))
    return us_err_set(err, US_ERR_USAGE, "%s: %s: the dims overflow", writer->path, name);
  if (writer->slot_count == US_H5_MAX_DATASETS)
    return us_err_set(err, US_ERR_USAGE, "%s: %s: more than %d datasets", writer->path, name,
                      US_H5_MAX_DATASETS);
  if (writer->slot_count == writer->slot_capacity) {
    size_t capacity = writer->slot_capacity ? 2 * writer->slot_capacity : 16;
    struct slot *slots = realloc(writer->slots, capacity * sizeof *slots);
    if (!slots) return us_err_memory(err, "the list of datasets", capacity * sizeof *slots);
    writer->slots = slots;
    writer->slot_capacity = capacity;
  }
  struct slot *slot = &writer->slots[writer->slot_count];
  *slot = (struct slot){
      .name = strdup(name), .type = type, .rank = rank, .count = count, .side_file = {.fd = -1}};
  if (!slot->name) return us_err_memory(err, "a dataset's name", strlen(name));
  memcpy(slot->dims, dims, (size_t)rank * sizeof *dims);
  writer->slot_count++;
  *ret_slot = slot;
  return US_OK;
}

static enum us_status check_name(const struct us_h5_writer *writer, const char *name, struct us_err *err) {
  if (us_h5_name_valid(name)) return US_OK;
  return us_err_set(err, US_ERR_USAGE, "%s: '%s' is not a dataset name", writer->path, name);
}

/* Forget the slot that was added last. */
static enum us_status drop_slot(struct us_h5_writer *writer, enum us_status status) {
  struct slot *slot = &writer->slots[--writer->slot_count];
  us_atomic_abandon(&slot->side_file);
  free(slot->name);
  return status;
}

static enum us_status reserve(struct us_h5_writer *writer, const char *name, enum us_h5_type type, int rank,
                              const size_t *dims, size_t *ret_slot, struct us_err *err) {
  struct slot *slot;
  enum us_status status = add_slot(writer, name, type, rank, dims, &slot, err);
  if (status != US_OK) return status;
  status = lay_down(writer, slot, err);
  if (status != US_OK) return drop_slot(writer, status);
  *ret_slot = writer->slot_count - 1;
  return US_OK;
}

enum us_status us_h5_reserve(struct us_h5_writer *writer, const char *name, enum us_h5_type type, int rank,
                             const size_t *dims, size_t *ret_slot, struct us_err *err) {
  enum us_status status = check_name(writer, name, err);
  return status == US_OK ? reserve(writer, name, type, rank, dims, ret_slot, err) : status;
}

enum us_status us_h5_write(struct us_h5_writer *writer, size_t index, size_t first, size_t count,
                           const void *data, struct us_err *err) {
  const struct slot *slot = &writer->slots[index];
  if (slot->side_file.fd >= 0 || first > slot->count || count > slot->count - first)
    return us_err_set(err, US_ERR_USAGE, "%s: %s: elements %zu + %zu of %zu", writer->path, slot->name, first,
                      count, slot->count);
  size_t size = us_h5_type_size(slot->type);
  if (us_atomic_write(writer->out.fd, data, count * size, slot->offset + first * size)) return US_OK;
  writer->broken = true;
  return us_err_errno(err, US_ERR_IO, "%s: %s: cannot write", writer->path, slot->name);
}

enum us_status us_h5_put(struct us_h5_writer *writer, const char *name, enum us_h5_type type, int rank,
                         const size_t *dims, const void *data, struct us_err *err) {
  size_t slot;
  enum us_status status = us_h5_reserve(writer, name, type, rank, dims, &slot, err);
  return status == US_OK ? us_h5_write(writer, slot, 0, writer->slots[slot].count, data, err) : status;
}

enum us_status us_h5_stream(struct us_h5_writer *writer, const char *name, enum us_h5_type type, int rank,
                            const size_t *dims, size_t *ret_slot, struct us_err *err) {
  enum us_status status = check_name(writer, name, err);
  if (status != US_OK) return status;
  size_t one_row[US_H5_MAX_RANK] = {1};
  for (int i = 1; i < rank && i < US_H5_MAX_RANK; i++) one_row[i] = dims[i];
  struct slot *slot;
  status = add_slot(writer, name, type, rank, one_row, &slot, err);
  if (status != US_OK) return status;
  slot->row = slot->count;
  slot->count = slot->dims[0] = 0;
  status = us_atomic_open(writer->path, &slot->side_file, err);
  if (status != US_OK) return drop_slot(writer, status);
  *ret_slot = writer->slot_count - 1;
  return US_OK;
}

enum us_status us_h5_append(struct us_h5_writer *writer, size_t index, size_t rows, const void *data,
                            struct us_err *err) {
  struct slot *slot = &writer->slots[index];
  size_t size = us_h5_type_size(slot->type), more, count, bytes;
  if (slot->side_file.fd < 0 || __builtin_mul_overflow(rows, slot->row, &more) ||
      __builtin_add_overflow(slot->count, more, &count) || __builtin_mul_overflow(count, size, &bytes))
    return us_err_set(err, US_ERR_USAGE, "%s: %s: cannot append %zu rows", writer->path, slot->name, rows);
  if (!us_atomic_write(slot->side_file.fd, data, more * size, slot->count * size)) {
    writer->broken = true;
    return us_err_errno(err, US_ERR_IO, "%s: %s: cannot append", writer->path, slot->name);
  }
  slot->count = count;
  slot->dims[0] += rows;
  return US_OK;
}

enum us_status us_h5_put_text(struct us_h5_writer *writer, const char *name, const char *text,
                              struct us_err *err) {
  if (!us_h5_name_valid(name) || strchr(name, '/') || strlen(name) > US_H5_MAX_NAME - 1)
    return us_err_set(err, US_ERR_USAGE, "%s: '%s' is not the name of a text", writer->path, name);
  size_t length = strlen(text);
  if (length > TEXT_ATTRIBUTE_MAX) {
    char dataset[US_H5_MAX_NAME + 2];
    snprintf(dataset, sizeof dataset, "@%s", name);
    size_t slot;
    enum us_status status = reserve(writer, dataset, US_H5_U8, 1, &length, &slot, err);
    return status == US_OK ? us_h5_write(writer, slot, 0, length, text, err) : status;
  }
  struct quiet quiet = quiet_begin();
  bool ok = put_string_attribute(writer->file, name, text);
  quiet_end(quiet);
  if (ok) return US_OK;
  return us_err_set(err, US_ERR_USAGE, "%s: libhdf5 cannot add the text %s (a repeated name?)", writer->path,
                    name);
}

/* -- Finishing -- */

static enum us_status lay_down_stream(struct us_h5_writer *writer, struct slot *slot, struct us_err *err) {
  enum us_status status = lay_down(writer, slot, err);
  if (status != US_OK) return status;
  size_t bytes = slot->count * us_h5_type_size(slot->type);
  char *buffer = malloc(1 << 20);
  if (!buffer) return us_err_memory(err, "a copy buffer", 1 << 20);
  for (size_t at = 0; at < bytes;) {
    ssize_t got = pread(slot->side_file.fd, buffer, bytes - at < 1 << 20 ? bytes - at : 1 << 20, (off_t)at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0 || !us_atomic_write(writer->out.fd, buffer, (size_t)got, slot->offset + at)) {
      free(buffer);
      return us_err_errno(err, US_ERR_IO, "%s: %s: cannot copy the rows", writer->path, slot->name);
    }
    at += (size_t)got;
  }
  free(buffer);
  return US_OK;
}

static int compare_offsets(const void *a, const void *b) {
  const struct us_h5_extent *x = a, *y = b;
  return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Append the extent table at the end of the HDF5 part. */
static enum us_status write_table(struct us_h5_writer *writer, struct us_h5_block *block,
                                  struct us_err *err) {
  struct stat info;
  if (fstat(writer->out.fd, &info) != 0)
    return us_err_errno(err, US_ERR_IO, "%s: cannot inspect", writer->path);
  struct us_h5_extent *table = calloc(writer->slot_count + 1, sizeof *table);
  if (!table) return us_err_memory(err, "the extent table", writer->slot_count * sizeof *table);
  for (size_t i = 0; i < writer->slot_count; i++)
    if (writer->slots[i].count > 0)
      table[block->extents++] = (struct us_h5_extent){
          writer->slots[i].offset, writer->slots[i].count * us_h5_type_size(writer->slots[i].type)};
  qsort(table, block->extents, sizeof *table, compare_offsets);
  block->table_offset = ((uint64_t)info.st_size + 7) / 8 * 8;
  block->file_bytes = block->table_offset + block->extents * sizeof *table;
  bool ok = ftruncate(writer->out.fd, (off_t)block->table_offset) == 0 &&
            us_atomic_write(writer->out.fd, table, block->extents * sizeof *table, block->table_offset);
  free(table);
  return ok ? US_OK : us_err_errno(err, US_ERR_IO, "%s: cannot write the extent table", writer->path);
}

static enum us_status write_user_block(struct us_h5_writer *writer, const struct us_h5_block *block,
                                       struct us_err *err) {
  uint8_t *file = mmap(NULL, block->file_bytes, PROT_READ, MAP_SHARED, writer->out.fd, 0);
  if (file == MAP_FAILED) return us_err_errno(err, US_ERR_IO, "%s: cannot map", writer->path);
  uint8_t user_block[US_H5_BLOCK_BYTES];
  us_h5_block_fill(user_block, block);
  enum us_status status = us_h5_block_hash(file, user_block, block, user_block + US_H5_SHA_AT, err);
  munmap(file, block->file_bytes);
  if (status != US_OK) return status;
  /* The data first, then the block that vouches for it. */
  if (fsync(writer->out.fd) != 0 || !us_atomic_write(writer->out.fd, user_block, sizeof user_block, 0))
    return us_err_errno(err, US_ERR_IO, "%s: cannot write", writer->path);
  return US_OK;
}

static enum us_status finish(struct us_h5_writer *writer, struct us_err *err) {
  enum us_status status = US_OK;
  if (writer->broken)
    status = us_err_set(err, US_ERR_IO, "%s: not finished: an earlier write failed", writer->path);
  for (size_t i = 0; i < writer->slot_count && status == US_OK; i++)
    if (writer->slots[i].side_file.fd >= 0) status = lay_down_stream(writer, &writer->slots[i], err);
  bool closed = close_hdf5(writer);
  if (status != US_OK) return status;
  if (!closed) return us_err_errno(err, US_ERR_IO, "%s: cannot write the metadata", writer->path);
  struct us_h5_block block = {0};
  memcpy(block.kind, writer->kind, sizeof block.kind);
  status = write_table(writer, &block, err);
  if (status == US_OK) status = write_user_block(writer, &block, err);
  if (status != US_OK) return status;
  return us_atomic_commit(&writer->out, err);
}

enum us_status us_h5_finish(struct us_h5_writer *writer, struct us_err *err) {
  enum us_status status = finish(writer, err);
  writer_free(writer);
  return status;
}
