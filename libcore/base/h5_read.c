/* h5_read.c: HDF5 artefacts, mapped: the file is checked and catalogued once, data stays where it is. */
#include "base/h5.h"
#include "base/h5_parse.h"

#include "base/io.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct us_h5 {
  char *path;
  struct us_io_map map;
  struct us_h5_block block;
  struct us_h5_catalogue catalogue;
};

void us_h5_close(struct us_h5 *file) {
  if (!file) return;
  us_h5_catalogue_release(&file->catalogue);
  us_io_map_close(&file->map);
  free(file->path);
  free(file);
}

enum us_status us_h5_open(const char *path, const char *opt_kind, struct us_h5 **ret_file,
                          struct us_err *err) {
  *ret_file = NULL;
  struct us_err own = {0}; /* the path is put before the message, so there must be one */
  struct us_h5 *file = calloc(1, sizeof *file);
  if (!file) return us_err_memory(err, "a file", sizeof *file);
  file->path = strdup(path);
  enum us_status status =
      file->path ? us_io_map_open(path, &file->map, err) : us_err_memory(err, "a path", 0);
  if (status == US_OK) {
    status = us_h5_block_check(file->map.data, file->map.size, opt_kind, &file->block, &own);
    if (status == US_OK) status = us_h5_parse(file->map.data, &file->block, &file->catalogue, &own);
    if (status != US_OK) us_err_set(err, status, "%s: %s", path, own.message);
  }
  if (status != US_OK) {
    us_h5_close(file);
    return status;
  }
  *ret_file = file;
  return US_OK;
}

const char *us_h5_path(const struct us_h5 *file) {
  return file->path;
}
const char *us_h5_kind(const struct us_h5 *file) {
  return file->block.kind;
}

const struct us_h5_dataset *us_h5_datasets(const struct us_h5 *file, size_t *ret_count) {
  *ret_count = file->catalogue.count;
  return file->catalogue.datasets;
}

static int compare_dataset(const void *name, const void *dataset) {
  return strcmp(name, ((const struct us_h5_dataset *)dataset)->name);
}

const struct us_h5_dataset *us_h5_find(const struct us_h5 *file, const char *name) {
  const struct us_h5_catalogue *c = &file->catalogue;
  return c->count ? bsearch(name, c->datasets, c->count, sizeof *c->datasets, compare_dataset) : NULL;
}

static int compare_text(const void *name, const void *text) {
  return strcmp(name, ((const struct us_h5_named_text *)text)->name);
}

const char *us_h5_text(const struct us_h5 *file, const char *name) {
  const struct us_h5_catalogue *c = &file->catalogue;
  if (!c->text_count) return NULL;
  const struct us_h5_named_text *found =
      bsearch(name, c->texts, c->text_count, sizeof *c->texts, compare_text);
  return found ? found->text : NULL;
}

enum us_status us_h5_get(const struct us_h5 *file, const char *name, enum us_h5_type type, int rank,
                         const size_t *opt_dims, const struct us_h5_dataset **ret_dataset,
                         struct us_err *err) {
  const struct us_h5_dataset *dataset = us_h5_find(file, name);
  if (!dataset) return us_err_set(err, US_ERR_INPUT, "%s: %s: no such dataset", file->path, name);
  if (dataset->type != type || dataset->rank != rank)
    return us_err_set(err, US_ERR_INPUT, "%s: %s: %s of rank %d where %s of rank %d is expected", file->path,
                      name, us_h5_type_name(dataset->type), dataset->rank, us_h5_type_name(type), rank);
  for (int i = 0; opt_dims && i < rank; i++)
    if (opt_dims[i] && dataset->dims[i] != opt_dims[i])
      return us_err_set(err, US_ERR_INPUT, "%s: %s: dimension %d is %zu where %zu is expected", file->path,
                        name, i, dataset->dims[i], opt_dims[i]);
  *ret_dataset = dataset;
  return US_OK;
}
