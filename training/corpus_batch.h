/* corpus_batch.h: work on many documents at a time, one thread each, results in the order they were read.
 *
 *     struct us_corpus_batch batch;
 *     us_corpus_batch_init(&batch, pool, NULL, work, done, &state);
 *     us_corpus_read("text/", &options, us_corpus_batch_take, &batch, &err);
 *     us_corpus_batch_flush(&batch, &err);                        // what is still waiting
 *     us_corpus_batch_release(&batch);
 *
 * Documents are copied until 16 MB wait (with one thread: each is worked on at once, uncopied). `work` must depend on its document
 * alone, so that the number of threads changes nothing.
 */
#ifndef US_TRAINING_CORPUS_BATCH_H
#define US_TRAINING_CORPUS_BATCH_H

#include "base/pool.h"
#include "training/corpus.h"

/* On some thread, `worker` < us_pool_threads(pool): the document with number `index` of its batch. */
typedef enum us_status us_corpus_batch_work(const struct us_document *document, size_t index, int worker,
                                            void *arg, struct us_err *err);
/* On the caller's thread, in order, after the work on the whole batch. */
typedef enum us_status us_corpus_batch_done(const struct us_document *document, size_t index, void *arg,
                                            struct us_err *err);
/* Before the work on a batch of n documents; NULL: nothing to prepare. */
typedef enum us_status us_corpus_batch_begin(size_t n, void *arg, struct us_err *err);

struct us_corpus_batch_item;

struct us_corpus_batch {
  struct us_pool *pool;
  us_corpus_batch_begin *begin;
  us_corpus_batch_work *work;
  us_corpus_batch_done *done;
  void *arg;
  struct us_corpus_batch_item *items; /* (capacity), the first n in use */
  size_t n, capacity, bytes;
};

/* The pool (NULL: one thread) must outlive the batch. */
void us_corpus_batch_init(struct us_corpus_batch *batch, struct us_pool *pool,
                          us_corpus_batch_begin *opt_begin, us_corpus_batch_work *work,
                          us_corpus_batch_done *done, void *arg);
void us_corpus_batch_release(struct us_corpus_batch *batch);

/* A us_corpus_take whose arg is the batch. The first error, in the order of documents, of work or done is returned; documents
 * before it are done. */
US_CHECKED enum us_status us_corpus_batch_take(const struct us_document *document, void *batch,
                                               struct us_err *err);
US_CHECKED enum us_status us_corpus_batch_flush(struct us_corpus_batch *batch, struct us_err *err);

#endif
