/* tiny_shards.h: a small bf16 model with random weights, and token shards that it can read. */
#ifndef US_TESTS_TINY_SHARDS_H
#define US_TESTS_TINY_SHARDS_H

#include "model/random.h"
#include "training/bpe_train.h"
#include "training/shards_write.h"

#include "tiny.h"

#include <unistd.h>

#define US_OK_OR_FAIL(call) ck_assert_msg((call) == US_OK, "%s", err.message)

static struct us_shape shards_shape(void) {
  struct us_shape shape = tiny_pro();
  shape.vocab = 288;
  shape.stop_count = 0;
  return shape;
}

static void shards_text(int i, char text[96]) {
  snprintf(text, 96, "document %d says %d and then %d, %s", i, i * i, 7 * i % 31,
           i % 3 ? "more or less" : "no more");
}

/* Bytes at a document's beginning that are not marked. */
static size_t shards_unmarked;

static struct us_document shards_document(struct us_segment segment[2], const char *text) {
  size_t bytes = strlen(text), cut = shards_unmarked;
  segment[0] = (struct us_segment){.end = cut ? cut : bytes, .loss = !cut};
  segment[1] = (struct us_segment){.begin = cut, .end = bytes, .loss = true};
  return (struct us_document){
      .source = "test", .text = text, .bytes = bytes, .segments = segment, .n_segments = cut ? 2 : 1};
}

/* A file of 300 documents, a third held out. */
static void make_shards(const char *path) {
  struct us_err err = {0};
  struct us_bpe_trainer *trainer;
  struct us_buffer json = {0};
  struct us_tokenizer *tokenizer;
  struct us_shards_writer *writer;
  struct us_segment segment[2];
  char text[96];
  US_OK_OR_FAIL(us_bpe_trainer_create(&trainer, &err));
  for (int i = 0; i < 300; i++) {
    shards_text(i, text);
    US_OK_OR_FAIL(us_bpe_trainer_add(trainer, text, strlen(text), &err));
  }
  US_OK_OR_FAIL(us_bpe_trainer_finish(trainer, 280, &json, &err));
  us_bpe_trainer_free(trainer);
  US_OK_OR_FAIL(us_tokenizer_parse(json.data, json.size, "test", &tokenizer, &err));
  US_OK_OR_FAIL(us_shards_writer_create(tokenizer, json.data, 0.3, &writer, &err));
  for (int i = 0; i < 300; i++) {
    shards_text(i, text);
    struct us_document document = shards_document(segment, text);
    US_OK_OR_FAIL(us_shards_writer_take(&document, writer, &err));
  }
  US_OK_OR_FAIL(us_shards_writer_finish(writer, path, "{}", &err));
  us_shards_writer_free(writer);
  us_tokenizer_free(tokenizer);
  us_buffer_release(&json);
}

/* Model, shards and a folder for files, opened once a suite. */
struct tiny_world {
  char folder[32], path[64];
  struct us_shape shape;
  struct us_model *model;
  struct us_shards *shards;
  struct us_pool *pool;
};

static void open_world(struct tiny_world *w) {
  struct us_err err = {0};
  *w = (struct tiny_world){.folder = "/tmp/us-tiny-XXXXXX", .shape = shards_shape()};
  ck_assert_ptr_nonnull(mkdtemp(w->folder));
  snprintf(w->path, sizeof w->path, "%s/text.h5", w->folder);
  make_shards(w->path);
  US_OK_OR_FAIL(us_shards_open(w->path, &w->shards, &err));
  US_OK_OR_FAIL(us_pool_create(2, &w->pool, &err));
  US_OK_OR_FAIL(us_model_random(&w->shape, 5, w->pool, &w->model, &err));
}

static void close_world(struct tiny_world *w) {
  char command[96];
  us_model_free(w->model);
  us_pool_free(w->pool);
  us_shards_close(w->shards);
  snprintf(command, sizeof command, "rm -rf %s", w->folder);
  ck_assert_int_eq(system(command), 0);
}

#endif
