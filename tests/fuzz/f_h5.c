/* f_h5.c: HDF5 artefacts. The first byte of the input chooses:
 *
 *   even  the rest is a file: it must fail at the user block (nobody guesses a SHA-256);
 *   odd   the rest is a list of edits to a valid file, whose hash is then put right, so that the parser behind it runs.
 *
 * An edit is 12 bytes: position u16, operation u8, an unused byte, value u64.
 */
#include "base/h5.h"
#include "base/h5_block.h"
#include "fuzz.h"

static uint8_t *template_bytes;
static size_t template_size;

static void put(struct us_h5_writer *writer, const char *name, enum us_h5_type type, int rank,
                const size_t *dims) {
  static const uint8_t data[4096];
  struct us_err err;
  US_FUZZ_REQUIRE(us_h5_put(writer, name, type, rank, dims, data, &err) == US_OK);
}

static void make_template(const char *path) {
  struct us_err err;
  struct us_h5_writer *writer;
  US_FUZZ_REQUIRE(us_h5_create(path, "test", &writer, &err) == US_OK);
  US_FUZZ_REQUIRE(us_h5_put_text(writer, "provenance", "{\"tool\": \"f_h5\"}", &err) == US_OK);
  US_FUZZ_REQUIRE(us_h5_put_text(writer, "header", "{}", &err) == US_OK);
  char long_text[33000];
  memset(long_text, 'x', sizeof long_text);
  long_text[sizeof long_text - 1] = 0;
  US_FUZZ_REQUIRE(us_h5_put_text(writer, "tokenizer", long_text, &err) == US_OK);
  put(writer, "g/h/f", US_H5_F32, 4, (size_t[]){2, 3, 4, 5});
  put(writer, "g/h/b", US_H5_BF16, 2, (size_t[]){3, 5});
  put(writer, "g/e", US_H5_FP8, 1, (size_t[]){64});
  put(writer, "zero", US_H5_I64, 2, (size_t[]){0, 3});
  char name[16];
  for (int i = 0; i < 40; i++) { /* enough for a B-tree with several symbol nodes */
    snprintf(name, sizeof name, "many/%d", i);
    put(writer, name, (enum us_h5_type)(i % US_H5_TYPE_COUNT), 1, (size_t[]){(size_t)i});
  }
  US_FUZZ_REQUIRE(us_h5_finish(writer, &err) == US_OK);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  char folder[] = "/tmp/us_f_h5_XXXXXX", path[64];
  US_FUZZ_REQUIRE(mkdtemp(folder));
  snprintf(path, sizeof path, "%s/a.h5", folder);
  make_template(path);
  FILE *file = fopen(path, "rb");
  US_FUZZ_REQUIRE(file && fseek(file, 0, SEEK_END) == 0);
  template_size = (size_t)ftell(file);
  template_bytes = malloc(template_size);
  rewind(file);
  US_FUZZ_REQUIRE(template_bytes && fread(template_bytes, 1, template_size, file) == template_size);
  fclose(file);
  unlink(path);
  rmdir(folder);
  return 0;
}

/* Open and read everything that the file offers. */
static enum us_status open_and_read(const uint8_t *bytes, size_t size, struct us_err *err) {
  char path[32];
  int fd = us_fuzz_file(bytes, size, path);
  struct us_h5 *file;
  enum us_status status = us_h5_open(path, NULL, &file, err);
  close(fd);
  if (status != US_OK) {
    US_FUZZ_REQUIRE(!file && err->message[0]);
    return status;
  }
  size_t count;
  const struct us_h5_dataset *d = us_h5_datasets(file, &count);
  volatile uint8_t sum = 0;
  for (size_t i = 0; i < count; i++) {
    US_FUZZ_REQUIRE(d[i].rank >= 1 && d[i].rank <= US_H5_MAX_RANK && strlen(d[i].name) <= US_H5_MAX_NAME);
    US_FUZZ_REQUIRE(us_h5_find(file, d[i].name) == &d[i]);
    for (size_t b = 0; b < d[i].bytes; b++) sum = (uint8_t)(sum + ((const uint8_t *)d[i].data)[b]);
  }
  const char *text = us_h5_text(file, "provenance");
  if (text) sum = (uint8_t)(sum + strlen(text));
  us_h5_close(file);
  return US_OK;
}

static void apply_edit(uint8_t *bytes, const uint8_t *edit) {
  size_t room = template_size - US_H5_BLOCK_BYTES;
  size_t at = US_H5_BLOCK_BYTES + us_h5_load(edit, 2) * 8 % (room - 8);
  uint64_t value = us_h5_load(edit + 4, 8);
  switch (edit[2] % 5) {
  case 0:
    bytes[at + value % 8] = (uint8_t)(value >> 8);
    break;
  case 1:
    us_h5_store(bytes + at, value, 8);
    break;
  case 2:
    us_h5_store(bytes + at + value % 4, value >> 8, 2);
    break;
  case 3:
    memmove(bytes + at, bytes + US_H5_BLOCK_BYTES + value % (room - 8), 8);
    break;
  default:
    us_h5_store(bytes + at, us_h5_load(bytes + at, 8) + (uint64_t)(int64_t)(int8_t)value, 8);
  }
}

static void run_edits(const uint8_t *data, size_t size) {
  uint8_t *bytes = malloc(template_size);
  US_FUZZ_REQUIRE(bytes);
  memcpy(bytes, template_bytes, template_size);
  for (size_t used = 0; size - used >= 12; used += 12) apply_edit(bytes, data + used);
  struct us_h5_block block;
  struct us_err err = {0};
  enum us_status status = us_h5_block_check(bytes, template_size, NULL, &block, &err);
  if (status != US_OK &&
      strstr(err.message, "SHA-256")) /* otherwise the extent table is broken, and was refused */
    status = us_h5_block_hash(bytes, bytes, &block, bytes + US_H5_SHA_AT, &err);
  if (status == US_OK) status = open_and_read(bytes, template_size, &err);
  US_FUZZ_REQUIRE(status == US_OK || status == US_ERR_INPUT);
  free(bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size == 0) return 0;
  if (data[0] & 1) {
    run_edits(data + 1, size - 1);
    return 0;
  }
  struct us_err err = {0};
  US_FUZZ_REQUIRE(open_and_read(data + 1, size - 1, &err) == US_ERR_INPUT);
  US_FUZZ_REQUIRE(strstr(err.message, "user block") || strstr(err.message, "extent table"));
  return 0;
}
