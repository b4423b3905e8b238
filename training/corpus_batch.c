/* corpus_batch.c: documents that wait for all threads. */
#include "training/corpus_batch.h"
#include <stdlib.h>
#include <string.h>

/* Enough for every thread to find work, little beside the tokens of a corpus. */
#define BATCH_BYTES ((size_t)16 << 20)

struct us_corpus_batch_item {
  struct us_document document; /* its pointers are into `memory` */
  char *memory;
  enum us_status status;
  struct us_err err;
};

void us_corpus_batch_init(struct us_corpus_batch *batch, struct us_pool *pool,
                          us_corpus_batch_begin *opt_begin, us_corpus_batch_work *work,
                          us_corpus_batch_done *done, void *arg) {
  *batch = (struct us_corpus_batch){.pool = pool, .begin = opt_begin, .work = work, .done = done, .arg = arg};
}

static void drop_items(struct us_corpus_batch *batch) {
  for (size_t i = 0; i < batch->n; i++) free(batch->items[i].memory);
  batch->n = batch->bytes = 0;
}

void us_corpus_batch_release(struct us_corpus_batch *batch) {
  drop_items(batch);
  free(batch->items);
  *batch = (struct us_corpus_batch){0};
}

/* The document, its segments, text and source in one piece of memory. */
static enum us_status copy(const struct us_document *document, struct us_corpus_batch_item *item,
                           struct us_err *err) {
  size_t segments = document->n_segments * sizeof *document->segments, source = strlen(document->source) + 1;
  char *memory = malloc(segments + document->bytes + 1 + source);
  if (memory == NULL) return us_err_memory(err, "documents", segments + document->bytes + source);
  *item = (struct us_corpus_batch_item){.document = *document, .memory = memory};
  if (segments) memcpy(memory, document->segments, segments);
  memcpy(memory + segments, document->text, document->bytes);
  memory[segments + document->bytes] = '\0';
  memcpy(memory + segments + document->bytes + 1, document->source, source);
  item->document.segments = (const struct us_segment *)(void *)memory;
  item->document.text = memory + segments;
  item->document.source = memory + segments + document->bytes + 1;
  return US_OK;
}

static void work_on(void *arg, size_t begin, size_t end, int worker) {
  struct us_corpus_batch *batch = arg;
  for (size_t i = begin; i < end; i++) {
    struct us_corpus_batch_item *item = &batch->items[i];
    item->status = batch->work(&item->document, i, worker, batch->arg, &item->err);
  }
}

enum us_status us_corpus_batch_flush(struct us_corpus_batch *batch, struct us_err *err) {
  enum us_status status = batch->begin && batch->n ? batch->begin(batch->n, batch->arg, err) : US_OK;
  if (status == US_OK) us_pool_for(batch->pool, batch->n, 1, work_on, batch);
  for (size_t i = 0; i < batch->n && status == US_OK; i++) {
    struct us_corpus_batch_item *item = &batch->items[i];
    if (item->status != US_OK && err) *err = item->err;
    status = item->status;
    if (status == US_OK) status = batch->done(&item->document, i, batch->arg, err);
  }
  drop_items(batch);
  return status;
}

/* One thread: no copy, no waiting. */
static enum us_status take_alone(struct us_corpus_batch *batch, const struct us_document *document,
                                 struct us_err *err) {
  enum us_status status = batch->begin ? batch->begin(1, batch->arg, err) : US_OK;
  if (status == US_OK) status = batch->work(document, 0, 0, batch->arg, err);
  return status == US_OK ? batch->done(document, 0, batch->arg, err) : status;
}

enum us_status us_corpus_batch_take(const struct us_document *document, void *arg, struct us_err *err) {
  struct us_corpus_batch *batch = arg;
  if (us_pool_threads(batch->pool) == 1) return take_alone(batch, document, err);
  if (batch->n == batch->capacity) {
    size_t capacity = batch->capacity ? 2 * batch->capacity : 256;
    struct us_corpus_batch_item *items = realloc(batch->items, capacity * sizeof *items);
    if (items == NULL) return us_err_memory(err, "documents", capacity * sizeof *items);
    batch->items = items;
    batch->capacity = capacity;
  }
  enum us_status status = copy(document, &batch->items[batch->n], err);
  if (status != US_OK) return status;
  batch->n++;
  batch->bytes += document->bytes;
  return batch->bytes < BATCH_BYTES ? US_OK : us_corpus_batch_flush(batch, err);
}
