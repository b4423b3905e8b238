/* h5_parse.c: the subset of HDF5 that h5_write.c produces, parsed.
 *
 * Contents: bounded access, messages, object headers, datasets and texts, groups, the file.
 */
#include "base/h5_parse.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NONE UINT64_MAX

/* libhdf5's object header messages. */
enum message {
  MESSAGE_NIL = 0x00,
  MESSAGE_DATASPACE = 0x01,
  MESSAGE_LINK_INFO = 0x02,
  MESSAGE_DATATYPE = 0x03,
  MESSAGE_FILL_OLD = 0x04,
  MESSAGE_FILL = 0x05,
  MESSAGE_LINK = 0x06,
  MESSAGE_EXTERNAL_FILES = 0x07,
  MESSAGE_LAYOUT = 0x08,
  MESSAGE_GROUP_INFO = 0x0a,
  MESSAGE_FILTERS = 0x0b,
  MESSAGE_ATTRIBUTE = 0x0c,
  MESSAGE_CONTINUATION = 0x10,
  MESSAGE_SYMBOL_TABLE = 0x11,
};

struct parser {
  const uint8_t *file;
  const struct us_h5_block *block;
  struct us_h5_catalogue *catalogue;
  uint64_t budget; /* bytes of metadata that may still be visited: each is visited once, so a loop runs out */
  struct us_err *err;
  char name[US_H5_MAX_NAME + 2]; /* of the object being parsed, "" for the root */
};

/* What an object header says. */
struct object {
  bool has_space, has_type, has_layout, has_group;
  int rank;
  uint64_t dims[US_H5_MAX_RANK];
  enum us_h5_type type;
  uint64_t address, bytes; /* layout */
  uint64_t tree, heap;     /* group */
  char format[16];         /* attribute "format" of a dataset */
};

/* -- Bounded access -- */

static enum us_status refuse(struct parser *p, const char *problem) {
  return us_err_set(p->err, US_ERR_INPUT, "%s: %s", p->name[0] ? p->name : "root group", problem);
}

/* Is [offset, offset + size) free of raw data? The hash does not cover raw data, so nothing may be parsed from it. */
static bool outside_extents(const struct parser *p, uint64_t offset, uint64_t size) {
  uint64_t low = 0, high = p->block->extents; /* the first extent that ends after offset */
  while (low < high) {
    uint64_t middle = low + (high - low) / 2;
    struct us_h5_extent extent = us_h5_block_extent(p->file, p->block, middle);
    if (extent.offset + extent.bytes > offset)
      high = middle;
    else
      low = middle + 1;
  }
  return low == p->block->extents || us_h5_block_extent(p->file, p->block, low).offset >= offset + size;
}

/* `size` bytes of metadata at an HDF5 address (relative to the end of the user block); NULL if they are not there. */
static const uint8_t *look(struct parser *p, uint64_t address, uint64_t size) {
  uint64_t room = p->block->table_offset - US_H5_BLOCK_BYTES;
  if (size > p->budget || address > room || size > room - address) return NULL;
  uint64_t offset = US_H5_BLOCK_BYTES + address;
  if (!outside_extents(p, offset, size)) return NULL;
  p->budget -= size;
  return p->file + offset;
}

/* -- Messages -- */

static enum us_status parse_space(struct parser *p, const uint8_t *body, size_t size, int *ret_rank,
                                  uint64_t *dims) {
  if (size < 8 || body[0] != 1 || body[1] > US_H5_MAX_RANK || body[2] > 1)
    return refuse(p, "dataspace not simple");
  int rank = body[1];
  size_t lists = body[2] ? 2 : 1;
  if (size < 8 + 8 * lists * (size_t)rank) return refuse(p, "dataspace cut");
  for (int i = 0; i < rank; i++) {
    dims[i] = us_h5_load(body + 8 + 8 * i, 8);
    if (lists == 2 && us_h5_load(body + 8 + 8 * (rank + i), 8) != dims[i])
      return refuse(p, "dims are extendible");
  }
  *ret_rank = rank;
  return US_OK;
}

/* Class and version, three bytes of flags, size, properties: as libhdf5 writes the little-endian types. */
static const struct {
  enum us_h5_type type;
  uint8_t bytes, code[20];
} known_types[] = {
    {US_H5_U8, 12, {0x10, 0, 0, 0, 1, 0, 0, 0, 0, 0, 8, 0}},
    {US_H5_BF16, 12, {0x10, 0, 0, 0, 2, 0, 0, 0, 0, 0, 16, 0}},
    {US_H5_U32, 12, {0x10, 0, 0, 0, 4, 0, 0, 0, 0, 0, 32, 0}},
    {US_H5_I32, 12, {0x10, 8, 0, 0, 4, 0, 0, 0, 0, 0, 32, 0}},
    {US_H5_U64, 12, {0x10, 0, 0, 0, 8, 0, 0, 0, 0, 0, 64, 0}},
    {US_H5_I64, 12, {0x10, 8, 0, 0, 8, 0, 0, 0, 0, 0, 64, 0}},
    {US_H5_F32, 20, {0x11, 0x20, 31, 0, 4, 0, 0, 0, 0, 0, 32, 0, 23, 8, 0, 23, 127, 0, 0, 0}},
    {US_H5_F64, 20, {0x11, 0x20, 63, 0, 8, 0, 0, 0, 0, 0, 64, 0, 52, 11, 0, 52, 0xff, 3, 0, 0}},
};

static enum us_status parse_type(struct parser *p, const uint8_t *body, size_t size,
                                 enum us_h5_type *ret_type) {
  for (size_t i = 0; i < sizeof known_types / sizeof known_types[0]; i++)
    if (size >= known_types[i].bytes && memcmp(body, known_types[i].code, known_types[i].bytes) == 0) {
      *ret_type = known_types[i].type;
      return US_OK;
    }
  return refuse(p, "unknown data type");
}

static enum us_status parse_layout(struct parser *p, const uint8_t *body, size_t size,
                                   struct object *object) {
  if (size < 18 || body[0] != 3 || body[1] != 1) return refuse(p, "data is not contiguous");
  object->address = us_h5_load(body + 2, 8);
  object->bytes = us_h5_load(body + 10, 8);
  return US_OK;
}

static size_t padded(size_t size) {
  return (size + 7) / 8 * 8;
}

static enum us_status keep_text(struct parser *p, const char *name, const char *text, size_t length) {
  struct us_h5_catalogue *c = p->catalogue;
  if (memchr(text, 0, length)) return refuse(p, "text with a NUL inside");
  if (c->text_count == c->text_capacity) {
    size_t capacity = c->text_capacity ? 2 * c->text_capacity : 8;
    struct us_h5_named_text *texts = realloc(c->texts, capacity * sizeof *texts);
    if (!texts) return us_err_memory(p->err, "texts", capacity * sizeof *texts);
    c->texts = texts;
    c->text_capacity = capacity;
  }
  struct us_h5_named_text *entry = &c->texts[c->text_count++];
  entry->name = strdup(name);
  entry->text = strndup(text, length);
  return entry->name && entry->text ? US_OK : us_err_memory(p->err, "a text", length);
}

/* A fixed-length string: a text of the root, or the format of a dataset (decided by `opt_object`). */
static enum us_status parse_attribute(struct parser *p, const uint8_t *body, size_t size,
                                      struct object *opt_object) {
  if (size < 8 || body[0] != 1) return refuse(p, "attribute of an unknown version");
  size_t name_bytes = us_h5_load(body + 2, 2), type_bytes = us_h5_load(body + 4, 2);
  size_t space_bytes = us_h5_load(body + 6, 2);
  size_t type_at = 8 + padded(name_bytes), space_at = type_at + padded(type_bytes);
  size_t data_at = space_at + padded(space_bytes);
  if (data_at > size || name_bytes == 0 || type_bytes != 8 || space_bytes != 8)
    return refuse(p, "attribute cut");
  const char *name = (const char *)body + 8;
  if (memchr(name, 0, name_bytes) != name + name_bytes - 1 || !us_h5_name_valid(name) || strchr(name, '/'))
    return refuse(p, "attribute with a bad name");
  /* Class 3, version 1; NUL-padded UTF-8; then the length. The space: version 1, rank 0. */
  const uint8_t *type = body + type_at, *space = body + space_at;
  if (type[0] != 0x13 || type[1] != 0x11 || type[2] || type[3] || space[0] != 1 || space[1] != 0)
    return us_err_set(p->err, US_ERR_INPUT, "attribute %s: not a string of fixed length", name);
  size_t length = us_h5_load(type + 4, 4);
  if (length == 0 || length > size - data_at) return refuse(p, "attribute cut");
  const char *text = (const char *)body + data_at;
  while (length > 0 && text[length - 1] == 0) length--;
  if (!opt_object) return keep_text(p, name, text, length);
  if (strcmp(name, "format") != 0 || length >= sizeof opt_object->format || opt_object->format[0])
    return refuse(p, "an attribute other than format");
  memcpy(opt_object->format, text, length);
  return US_OK;
}

static enum us_status parse_message(struct parser *p, unsigned kind, const uint8_t *body, size_t size,
                                    bool root, struct object *object) {
  bool *once = kind == MESSAGE_DATASPACE      ? &object->has_space
               : kind == MESSAGE_DATATYPE     ? &object->has_type
               : kind == MESSAGE_LAYOUT       ? &object->has_layout
               : kind == MESSAGE_SYMBOL_TABLE ? &object->has_group
                                              : NULL;
  if (once && *once) return refuse(p, "a header message occurs twice");
  if (once) *once = true;
  switch (kind) {
  case MESSAGE_NIL:
  case MESSAGE_FILL_OLD:
  case MESSAGE_FILL:
    return US_OK;
  case MESSAGE_DATASPACE:
    return parse_space(p, body, size, &object->rank, object->dims);
  case MESSAGE_DATATYPE:
    return parse_type(p, body, size, &object->type);
  case MESSAGE_LAYOUT:
    return parse_layout(p, body, size, object);
  case MESSAGE_ATTRIBUTE:
    return parse_attribute(p, body, size, root ? NULL : object);
  case MESSAGE_SYMBOL_TABLE:
    if (size < 16) return refuse(p, "symbol table cut");
    object->tree = us_h5_load(body, 8);
    object->heap = us_h5_load(body + 8, 8);
    return US_OK;
  case MESSAGE_LINK:
  case MESSAGE_GROUP_INFO:
  case MESSAGE_LINK_INFO:
    return refuse(p, "soft, external or user-defined links");
  case MESSAGE_EXTERNAL_FILES:
    return refuse(p, "data in an external file");
  case MESSAGE_FILTERS:
    return refuse(p, "data behind a filter");
  default:
    break;
  }
  char problem[64];
  snprintf(problem, sizeof problem, "header message of type %u", kind);
  return refuse(p, problem);
}

/* -- Object headers: version 1, in blocks chained by continuation messages -- */

#define MAX_BLOCKS 64 /* libhdf5 adds a block when attributes outgrow the last one */

struct header_blocks {
  uint64_t address[MAX_BLOCKS], bytes[MAX_BLOCKS];
  int count;
};

static enum us_status parse_block(struct parser *p, const uint8_t *at, uint64_t bytes, bool root,
                                  struct header_blocks *blocks, struct object *object) {
  uint64_t used = 0;
  while (bytes - used >= 8) {
    const uint8_t *message = at + used;
    unsigned kind = (unsigned)us_h5_load(message, 2);
    size_t size = us_h5_load(message + 2, 2);
    if (size % 8 != 0 || size > bytes - used - 8) return refuse(p, "header message cut");
    if (message[4] & 2) return refuse(p, "shared header message");
    if (kind == MESSAGE_CONTINUATION) {
      if (size < 16 || blocks->count == MAX_BLOCKS) return refuse(p, "header continuation");
      blocks->address[blocks->count] = us_h5_load(message + 8, 8);
      blocks->bytes[blocks->count++] = us_h5_load(message + 16, 8);
    } else {
      enum us_status status = parse_message(p, kind, message + 8, size, root, object);
      if (status != US_OK) return status;
    }
    used += 8 + size;
  }
  return US_OK;
}

static enum us_status parse_header(struct parser *p, uint64_t address, bool root, struct object *object) {
  memset(object, 0, sizeof *object);
  const uint8_t *prefix = look(p, address, 16);
  if (!prefix || prefix[0] != 1) return refuse(p, "no object header of version 1");
  if (us_h5_load(prefix + 4, 4) != 1) return refuse(p, "the object has more than one hard link");
  struct header_blocks blocks = {.address = {address + 16}, .bytes = {us_h5_load(prefix + 8, 4)}, .count = 1};
  for (int i = 0; i < blocks.count; i++) {
    const uint8_t *at = look(p, blocks.address[i], blocks.bytes[i]);
    if (!at) return refuse(p, "object header outside the metadata");
    enum us_status status = parse_block(p, at, blocks.bytes[i], root, &blocks, object);
    if (status != US_OK) return status;
  }
  return US_OK;
}

/* -- Datasets and texts -- */

static enum us_status resolve_type(struct parser *p, const struct object *object, enum us_h5_type *ret_type) {
  *ret_type = object->type;
  bool bf16 = strcmp(object->format, us_h5_type_name(US_H5_BF16)) == 0;
  bool fp8 = strcmp(object->format, us_h5_type_name(US_H5_FP8)) == 0;
  if (fp8 && object->type == US_H5_U8) *ret_type = US_H5_FP8;
  bool ok = object->type == US_H5_BF16 ? bf16 : fp8 ? object->type == US_H5_U8 : object->format[0] == 0;
  return ok ? US_OK : refuse(p, "attribute format does not fit the data type");
}

static enum us_status fill_dataset(struct parser *p, const struct object *object,
                                   struct us_h5_dataset *dataset) {
  if (!object->has_space || !object->has_type || !object->has_layout || object->rank < 1)
    return refuse(p, "dataset without dims, type or layout");
  enum us_status status = resolve_type(p, object, &dataset->type);
  if (status != US_OK) return status;
  dataset->rank = object->rank;
  dataset->count = 1;
  for (int i = 0; i < object->rank; i++) {
    dataset->dims[i] = object->dims[i];
    if (__builtin_mul_overflow(dataset->count, dataset->dims[i], &dataset->count))
      return refuse(p, "dims overflow");
  }
  if (__builtin_mul_overflow(dataset->count, us_h5_type_size(dataset->type), &dataset->bytes))
    return refuse(p, "dims overflow");
  if (dataset->count == 0) return US_OK;
  uint64_t room = p->block->table_offset - US_H5_BLOCK_BYTES;
  if (object->bytes != dataset->bytes) return refuse(p, "dims and the bytes of data differ");
  if (object->address > room || dataset->bytes > room - object->address)
    return refuse(p, "data outside the file");
  dataset->data = p->file + US_H5_BLOCK_BYTES + object->address;
  return US_OK;
}

static enum us_status add_dataset(struct parser *p, const struct object *object) {
  struct us_h5_catalogue *c = p->catalogue;
  struct us_h5_dataset dataset = {0};
  enum us_status status = fill_dataset(p, object, &dataset);
  if (status != US_OK) return status;
  if (c->count == US_H5_MAX_DATASETS) return refuse(p, "too many datasets");
  if (c->count == c->capacity) {
    size_t capacity = c->capacity ? 2 * c->capacity : 64;
    struct us_h5_dataset *datasets = realloc(c->datasets, capacity * sizeof *datasets);
    if (!datasets) return us_err_memory(p->err, "datasets", capacity * sizeof *datasets);
    c->datasets = datasets;
    c->capacity = capacity;
  }
  dataset.name = strdup(p->name);
  if (!dataset.name) return us_err_memory(p->err, "a name", strlen(p->name));
  c->datasets[c->count++] = dataset;
  return US_OK;
}

/* -- Groups: a B-tree of symbol nodes, names in a heap -- */

struct heap {
  const uint8_t *bytes;
  uint64_t size;
};

static enum us_status parse_object(struct parser *p, uint64_t address, int depth);

static enum us_status parse_heap(struct parser *p, uint64_t address, struct heap *heap) {
  const uint8_t *head = look(p, address, 32);
  if (!head || memcmp(head, "HEAP\0", 5) != 0) return refuse(p, "group without a name heap");
  heap->size = us_h5_load(head + 8, 8);
  heap->bytes = look(p, us_h5_load(head + 24, 8), heap->size);
  return heap->bytes ? US_OK : refuse(p, "name heap outside the metadata");
}

/* Parse the child of that name; p->name is the parent's before and after. */
static enum us_status parse_child(struct parser *p, const char *name, uint64_t address, int depth) {
  size_t before = strlen(p->name);
  int added = snprintf(p->name + before, sizeof p->name - before, "%s%s", before ? "/" : "", name);
  bool fits = !strchr(name, '/') && added > 0 && before + (size_t)added < sizeof p->name;
  const char *checked = p->name[0] == '@' ? p->name + 1 : p->name; /* "@name" holds a long text */
  if (!fits || !us_h5_name_valid(checked) || (checked != p->name && before)) {
    p->name[before] = 0;
    return refuse(p, "a member with a bad name");
  }
  enum us_status status = parse_object(p, address, depth + 1);
  p->name[before] = 0;
  return status;
}

static enum us_status parse_symbols(struct parser *p, uint64_t address, const struct heap *heap, int depth) {
  const uint8_t *node = look(p, address, 8);
  if (!node || memcmp(node, "SNOD\1", 5) != 0) return refuse(p, "no symbol node");
  unsigned count = (unsigned)us_h5_load(node + 6, 2);
  const uint8_t *entries = look(p, address + 8, (uint64_t)count * 40);
  if (!entries) return refuse(p, "symbol node outside the metadata");
  for (unsigned i = 0; i < count; i++) {
    const uint8_t *entry = entries + (size_t)i * 40;
    uint64_t name = us_h5_load(entry, 8);
    if (us_h5_load(entry + 16, 4) > 1) return refuse(p, "a soft link");
    if (name >= heap->size || !memchr(heap->bytes + name, 0, heap->size - name))
      return refuse(p, "name outside the heap");
    enum us_status status = parse_child(p, (const char *)heap->bytes + name, us_h5_load(entry + 8, 8), depth);
    if (status != US_OK) return status;
  }
  return US_OK;
}

static enum us_status parse_tree(struct parser *p, uint64_t address, const struct heap *heap, int level,
                                 int depth) {
  const uint8_t *node = look(p, address, 24);
  if (!node || memcmp(node, "TREE\0", 5) != 0) return refuse(p, "no group B-tree");
  if (level >= 0 && node[5] != level) return refuse(p, "B-tree of uneven depth");
  if (node[5] > 8) return refuse(p, "B-tree too deep");
  unsigned count = (unsigned)us_h5_load(node + 6, 2);
  const uint8_t *children =
      look(p, address + 24, 8 + (uint64_t)count * 16); /* key, child, key, child, ..., key */
  if (!children) return refuse(p, "B-tree outside the metadata");
  for (unsigned i = 0; i < count; i++) {
    uint64_t child = us_h5_load(children + 8 + (size_t)i * 16, 8);
    enum us_status status =
        node[5] == 0 ? parse_symbols(p, child, heap, depth) : parse_tree(p, child, heap, node[5] - 1, depth);
    if (status != US_OK) return status;
  }
  return US_OK;
}

static enum us_status parse_object(struct parser *p, uint64_t address, int depth) {
  struct object object;
  enum us_status status = parse_header(p, address, depth == 0, &object);
  if (status != US_OK) return status;
  if (!object.has_group) return add_dataset(p, &object);
  if (object.has_space || object.has_type || object.has_layout || object.format[0])
    return refuse(p, "both a group and a dataset");
  if (depth > US_H5_MAX_DEPTH) return refuse(p, "groups too deep");
  struct heap heap;
  status = parse_heap(p, object.heap, &heap);
  return status == US_OK ? parse_tree(p, object.tree, &heap, -1, depth) : status;
}

/* -- The file -- */

static enum us_status parse_superblock(struct parser *p, uint64_t *ret_root) {
  /* Signature; versions of the superblock, free space and root entry; shared header version; bytes of an offset and a
   * length. Then the tree ranks, flags, base address, free space, end of file, driver block, root entry. */
  static const uint8_t start[16] = {0x89, 'H', 'D', 'F', '\r', '\n', 0x1a, '\n', 0, 0, 0, 0, 0, 8, 8, 0};
  const uint8_t *s = look(p, 0, 96);
  if (!s || memcmp(s, start, sizeof start) != 0) return refuse(p, "no HDF5 superblock of version 0");
  uint64_t end = us_h5_load(s + 40, 8); /* of file, absolute */
  if (us_h5_load(s + 24, 8) != US_H5_BLOCK_BYTES || us_h5_load(s + 48, 8) != NONE ||
      us_h5_load(s + 32, 8) != NONE || end < US_H5_BLOCK_BYTES || end > p->block->table_offset)
    return refuse(p, "superblock with an unexpected address");
  *ret_root = us_h5_load(s + 64, 8);
  return US_OK;
}

static int compare_data(const void *a, const void *b) {
  const struct us_h5_dataset *x = *(const struct us_h5_dataset *const *)a,
                             *y = *(const struct us_h5_dataset *const *)b;
  return (x->data > y->data) - (x->data < y->data);
}

/* Datasets and extents must be one to one: then no two datasets overlap and no byte is neither data nor hashed. */
static enum us_status match_extents(struct parser *p) {
  struct us_h5_catalogue *c = p->catalogue;
  const struct us_h5_dataset **order = calloc(c->count + 1, sizeof *order);
  if (!order) return us_err_memory(p->err, "datasets", c->count * sizeof *order);
  size_t filled = 0;
  for (size_t i = 0; i < c->count; i++)
    if (c->datasets[i].count > 0) order[filled++] = &c->datasets[i];
  qsort(order, filled, sizeof *order, compare_data);
  enum us_status status = US_OK;
  for (size_t i = 0; i < filled && status == US_OK; i++) {
    struct us_h5_extent extent = {0, 0};
    if (i < p->block->extents) extent = us_h5_block_extent(p->file, p->block, i);
    if (p->file + extent.offset != order[i]->data || extent.bytes != order[i]->bytes)
      status = us_err_set(p->err, US_ERR_INPUT, "%s: its data is not the extent that the user block lists",
                          order[i]->name);
  }
  free(order);
  if (status == US_OK && filled != p->block->extents)
    status = us_err_set(p->err, US_ERR_INPUT, "extent table: %llu extents for %zu datasets",
                        (unsigned long long)p->block->extents, filled);
  return status;
}

static int compare_names(const void *a, const void *b) {
  return strcmp(((const struct us_h5_dataset *)a)->name, ((const struct us_h5_dataset *)b)->name);
}

static int compare_texts(const void *a, const void *b) {
  return strcmp(((const struct us_h5_named_text *)a)->name, ((const struct us_h5_named_text *)b)->name);
}

/* Move the datasets "@name" to the texts; sort both lists; refuse a name that occurs twice. */
static enum us_status sort_catalogue(struct parser *p) {
  struct us_h5_catalogue *c = p->catalogue;
  size_t kept = 0;
  enum us_status status = US_OK;
  for (size_t i = 0; i < c->count; i++) {
    struct us_h5_dataset *dataset = &c->datasets[i];
    if (dataset->name[0] != '@' || status != US_OK) {
      c->datasets[kept++] = *dataset;
      continue;
    }
    if (dataset->type != US_H5_U8 || dataset->rank != 1 || dataset->count == 0)
      status = us_err_set(p->err, US_ERR_INPUT, "%s: not a text", dataset->name);
    else
      status = keep_text(p, dataset->name + 1, dataset->data, dataset->count);
    free((char *)dataset->name);
  }
  c->count = kept;
  if (status != US_OK) return status;
  if (c->count) qsort(c->datasets, c->count, sizeof *c->datasets, compare_names);
  if (c->text_count) qsort(c->texts, c->text_count, sizeof *c->texts, compare_texts);
  for (size_t i = 1; i < c->count; i++)
    if (compare_names(&c->datasets[i - 1], &c->datasets[i]) == 0)
      return us_err_set(p->err, US_ERR_INPUT, "%s: occurs twice", c->datasets[i].name);
  for (size_t i = 1; i < c->text_count; i++)
    if (compare_texts(&c->texts[i - 1], &c->texts[i]) == 0)
      return us_err_set(p->err, US_ERR_INPUT, "text %s: occurs twice", c->texts[i].name);
  return US_OK;
}

enum us_status us_h5_parse(const uint8_t *file, const struct us_h5_block *block,
                           struct us_h5_catalogue *catalogue, struct us_err *err) {
  struct parser p = {.file = file, .block = block, .catalogue = catalogue, .err = err};
  p.budget = block->table_offset - US_H5_BLOCK_BYTES;
  for (uint64_t i = 0; i < block->extents; i++) p.budget -= us_h5_block_extent(file, block, i).bytes;
  uint64_t root = 0;
  enum us_status status = parse_superblock(&p, &root);
  if (status == US_OK) status = parse_object(&p, root, 0);
  if (status == US_OK) status = match_extents(&p);
  if (status == US_OK) status = sort_catalogue(&p);
  return status;
}

void us_h5_catalogue_release(struct us_h5_catalogue *catalogue) {
  for (size_t i = 0; i < catalogue->count; i++) free((char *)catalogue->datasets[i].name);
  for (size_t i = 0; i < catalogue->text_count; i++) {
    free(catalogue->texts[i].name);
    free(catalogue->texts[i].text);
  }
  free(catalogue->datasets);
  free(catalogue->texts);
  *catalogue = (struct us_h5_catalogue){0};
}
