/* record.c: printing, reading and checking artefact records. */
#include "base/record.h"
#include "base/buffer.h"
#include "base/io.h"
#include "base/json.h"
#include "base/table.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define LINE_MAX_BYTES ((size_t)1 << 16)

/* --- hashing --- */

/* A published model has its drafter's folder inside: depth 1. A link to a folder around it has no end. */
#define DEPTH_MAX 8

static int plain_entry(const struct dirent *entry) {
  return entry->d_name[0] != '.';
}

static int by_bytes(const struct dirent **a, const struct dirent **b) {
  return strcmp((*a)->d_name, (*b)->d_name);
}

static enum us_status add_line(const char *path, const char *name, struct us_buffer *listing,
                               struct us_err *err) {
  char hex[US_SHA256_HEX];
  enum us_status status = us_sha256_file(path, hex, err);
  if (status == US_OK) status = us_buffer_add(listing, hex, err);
  if (status == US_OK) status = us_buffer_add(listing, "  ", err);
  if (status == US_OK) status = us_buffer_add(listing, name, err);
  return status == US_OK ? us_buffer_add(listing, "\n", err) : status;
}

static enum us_status neither(const char *path, struct us_err *err) {
  return us_err_set(err, US_ERR_INPUT, "'%s' is neither a file nor a folder", path);
}

/* Append the lines of the files in a folder; their names begin at `prefix` of their paths. */
static enum us_status list_folder(const char *folder, size_t prefix, int depth, struct us_buffer *listing,
                                  struct us_err *err);

static enum us_status list_entry(const char *folder, const char *name, size_t prefix, int depth,
                                 struct us_buffer *listing, struct us_err *err) {
  char *path = NULL;
  struct stat info;
  enum us_status status;
  if (asprintf(&path, "%s/%s", folder, name) < 0)
    return us_err_memory(err, "a path", strlen(folder) + strlen(name));
  if (stat(path, &info) != 0)
    status = us_err_errno(err, US_ERR_IO, "cannot open '%s'", path);
  else if (S_ISDIR(info.st_mode))
    status = list_folder(path, prefix, depth + 1, listing, err);
  else
    status = S_ISREG(info.st_mode) ? add_line(path, path + prefix, listing, err) : neither(path, err);
  free(path);
  return status;
}

static enum us_status list_folder(const char *folder, size_t prefix, int depth, struct us_buffer *listing,
                                  struct us_err *err) {
  struct dirent **entries;
  if (depth > DEPTH_MAX)
    return us_err_set(err, US_ERR_INPUT, "'%s' lies more than %d folders deep", folder, DEPTH_MAX);
  int n = scandir(folder, &entries, plain_entry, by_bytes);
  if (n < 0) return us_err_errno(err, US_ERR_IO, "cannot read '%s'", folder);
  enum us_status status = US_OK;
  for (int i = 0; i < n; i++) {
    if (status == US_OK) status = list_entry(folder, entries[i]->d_name, prefix, depth, listing, err);
    free(entries[i]);
  }
  free(entries);
  return status;
}

static enum us_status hash_folder(const char *path, char ret_hex[US_SHA256_HEX], struct us_err *err) {
  struct us_buffer listing = {0};
  enum us_status status = list_folder(path, strlen(path) + 1, 0, &listing, err);
  uint8_t digest[US_SHA256_BYTES];
  if (status == US_OK) status = us_sha256_bytes(listing.data, listing.size, digest, err);
  if (status == US_OK) us_sha256_hex(digest, ret_hex);
  us_buffer_release(&listing);
  return status;
}

enum us_status us_record_hash(const char *path, char ret_hex[US_SHA256_HEX], struct us_err *err) {
  struct stat info;
  if (stat(path, &info) != 0) return us_err_errno(err, US_ERR_IO, "cannot open '%s'", path);
  if (S_ISDIR(info.st_mode)) return hash_folder(path, ret_hex, err);
  if (S_ISREG(info.st_mode)) return us_sha256_file(path, ret_hex, err);
  return neither(path, err);
}

/* --- printing --- */

enum us_status us_record_emit(FILE *out, bool json, const char *path, const char *kind, struct us_err *err) {
  char hex[US_SHA256_HEX];
  enum us_status status = us_record_hash(path, hex, err);
  if (status != US_OK) return status;
  if (json) {
    fputs("{\"path\": ", out);
    us_table_write_json_text(out, path);
    fprintf(out, ", \"sha256\": \"%s\", \"kind\": ", hex);
    us_table_write_json_text(out, kind);
    fputs("}\n", out);
  } else {
    us_table_write_tsv_text(out, path);
    fprintf(out, "\t%s\t", hex);
    us_table_write_tsv_text(out, kind);
    fputc('\n', out);
  }
  return us_io_flush(out, "standard output", err);
}

/* --- reading --- */

/* Undo us_table_write_tsv_text in place. */
static void unescape(char *text) {
  char *to = text;
  for (const char *from = text; *from; from++) {
    if (*from != '\\' || !from[1]) {
      *to++ = *from;
      continue;
    }
    from++;
    *to++ = (char)(*from == 't' ? '\t' : *from == 'n' ? '\n' : *from == 'r' ? '\r' : *from);
  }
  *to = 0;
}

static enum us_status fill(struct us_record *record, const char *path, const char *sha256, const char *kind,
                           struct us_err *err) {
  if (!*path) return us_err_set(err, US_ERR_INPUT, "artefact record: the path is empty");
  if (!us_sha256_is_hex(sha256))
    return us_err_set(err, US_ERR_INPUT, "artefact record: sha256 is not 64 hexadecimal digits");
  record->path = strdup(path);
  record->kind = strdup(kind);
  memcpy(record->sha256, sha256, US_SHA256_HEX);
  if (record->path && record->kind) return US_OK;
  us_record_release(record);
  return us_err_memory(err, "an artefact record", strlen(path));
}

static enum us_status parse_json(const char *line, size_t size, struct us_record *record,
                                 struct us_err *err) {
  json_t *root;
  enum us_status status = us_json_parse(line, size, "artefact record", &root, err);
  if (status != US_OK) return status;
  const char *path = NULL, *sha256 = NULL, *kind = NULL;
  status = us_json_str(root, "artefact record", "path", &path, err);
  if (status == US_OK) status = us_json_str(root, "artefact record", "sha256", &sha256, err);
  if (status == US_OK) status = us_json_str(root, "artefact record", "kind", &kind, err);
  if (status == US_OK) status = fill(record, path, sha256, kind, err);
  json_decref(root);
  return status;
}

static enum us_status parse_tsv(char *line, struct us_record *record, struct us_err *err) {
  char *rest = line;
  char *path = strsep(&rest, "\t"), *sha256 = strsep(&rest, "\t"), *kind = strsep(&rest, "\t");
  if (!kind || rest)
    return us_err_set(err, US_ERR_INPUT,
                      "artefact record: expected path, sha256 and kind, separated by tabs");
  unescape(path);
  unescape(kind);
  return fill(record, path, sha256, kind, err);
}

enum us_status us_record_parse(const char *line, struct us_record *ret_record, struct us_err *err) {
  *ret_record = (struct us_record){0};
  size_t size = strcspn(line, "\r\n");
  if (size > LINE_MAX_BYTES) return us_err_set(err, US_ERR_INPUT, "artefact record: the line is too long");
  if (line[0] == '{') return parse_json(line, size, ret_record, err);
  char *copy = strndup(line, size);
  if (!copy) return us_err_memory(err, "an artefact record", size);
  enum us_status status = parse_tsv(copy, ret_record, err);
  free(copy);
  return status;
}

/* One line of at most LINE_MAX_BYTES: a producer that never ends a line must not fill the memory. */
static enum us_status read_line(FILE *in, struct us_buffer *line, struct us_err *err) {
  for (int c; (c = getc(in)) != EOF && c != '\n';) {
    char byte = (char)c;
    if (line->size >= LINE_MAX_BYTES)
      return us_err_set(err, US_ERR_INPUT, "artefact record: the line is too long");
    if (byte == 0) return us_err_set(err, US_ERR_INPUT, "artefact record: the line has a NUL byte");
    enum us_status status = us_buffer_append(line, &byte, 1, err);
    if (status != US_OK) return status;
  }
  if (ferror(in)) return us_err_errno(err, US_ERR_IO, "cannot read standard input");
  if (line->size == 0)
    return us_err_set(err, US_ERR_INPUT,
                      "standard input has no artefact record; did the tool before the pipe fail?");
  return US_OK;
}

static enum us_status check_record(const struct us_record *record, const char *kind, struct us_err *err) {
  if (kind && strcmp(kind, record->kind) != 0)
    return us_err_set(err, US_ERR_INPUT, "%s: kind is '%s', expected '%s'", record->path, record->kind, kind);
  char hex[US_SHA256_HEX];
  enum us_status status = us_record_hash(record->path, hex, err);
  if (status != US_OK) return status;
  if (strcmp(hex, record->sha256) == 0) return US_OK;
  return us_err_set(err, US_ERR_INPUT, "%s: sha256 is %.12s..., its record says %.12s...", record->path, hex,
                    record->sha256);
}

static enum us_status from_argument(const char *path, struct us_record *record, struct us_err *err) {
  record->path = strdup(path);
  record->kind = strdup("");
  if (record->path && record->kind) return US_OK;
  us_record_release(record);
  return us_err_memory(err, "a path", strlen(path));
}

enum us_status us_record_resolve(const char *argument, FILE *in, const char *kind,
                                 struct us_record *ret_record, struct us_err *err) {
  *ret_record = (struct us_record){0};
  if (strcmp(argument, "-") != 0) return from_argument(argument, ret_record, err);
  if (isatty(fileno(in)))
    return us_err_set(err, US_ERR_USAGE,
                      "'-' reads an artefact record from a pipe, but standard input is a terminal");
  struct us_buffer line = {0};
  enum us_status status = read_line(in, &line, err);
  if (status == US_OK) status = us_record_parse(line.data, ret_record, err);
  us_buffer_release(&line);
  if (status == US_OK) {
    status = check_record(ret_record, kind, err);
    if (status != US_OK) us_record_release(ret_record);
  }
  return status;
}

void us_record_release(struct us_record *record) {
  free(record->path);
  free(record->kind);
  *record = (struct us_record){0};
}
