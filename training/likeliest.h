/* likeliest.h: what a model thinks of held-out tokens, small enough to keep: its K likeliest tokens a row and the mass of the rest.
 *
 *     struct us_likeliest_job job = {.model = original, .shards = shards, .windows = 16, .length = 513, .k = 64};
 *     us_likeliest_measure(&job, pool, &base, &err);                   // 8,192 rows
 *     us_likeliest_write(&base, "top64.h5", provenance_json, &err);    // 2.2 MB
 *
 *     us_likeliest_open("top64.h5", &base, &err);
 *     us_likeliest_compare(&base, quantized, NULL, pool, &figures, &err);
 *     figures.kl, figures.kl_error;
 *     us_likeliest_release(&base);
 *
 * So that anyone can measure a bundled model against an original that is not bundled. The tokens lie in the file too. The KL is
 * that of the distributions over K tokens and "any other": at most the KL over all tokens (the data-processing inequality), and
 * close to it where the rest has little mass. File: docs/formats.md.
 */
#ifndef US_TRAINING_LIKELIEST_H
#define US_TRAINING_LIKELIEST_H

#include "base/pool.h"
#include "base/sha256.h"
#include "training/learner.h"
#include "training/rows.h"

#define US_LIKELIEST_MOST_K 256
/* -ln p in 16 bits: steps of 1/2048 up to 32. Rounding is at most 0.00024 nats a token, without bias. */
#define US_LIKELIEST_STEP (1.0 / 2048.0)

struct us_likeliest {
  uint32_t vocab, k;
  size_t windows, length; /* tokens a window; rows a window: length - 1 */
  size_t rows;
  char tokenizer_sha256[US_SHA256_HEX];
  int32_t *token, *document; /* (windows, length) as struct us_window has them */
  uint32_t *entry;           /* (rows, k) id << 16 | -ln p in steps, likeliest first, ties by id */
  float *rest;               /* (rows) mass of all other tokens */
  float *label_logprob;      /* (rows) ln p of the token that follows */
};

struct us_likeliest_job {
  struct us_learner
      *learner; /* where the forward passes run (lane 0); NULL: the CPU, on the pool of the call */
  struct us_model *model;
  const struct us_shards *shards;
  size_t windows; /* evenly spread over the held-out part */
  size_t length;
  uint32_t k;
};

/* US_ERR_INPUT when so many whole windows are not held out, or the vocabulary is over 65,536. */
US_CHECKED enum us_status us_likeliest_measure(const struct us_likeliest_job *job, struct us_pool *pool,
                                               struct us_likeliest *ret_likeliest, struct us_err *err);
void us_likeliest_release(struct us_likeliest *likeliest);

US_CHECKED enum us_status us_likeliest_write(const struct us_likeliest *likeliest, const char *path,
                                             const char *provenance_json, struct us_err *err);
/* US_ERR_INPUT names file and field. */
US_CHECKED enum us_status us_likeliest_open(const char *path, struct us_likeliest *ret_likeliest,
                                            struct us_err *err);

/* Errors are over windows, as in metrics.h; that of top1 is binomial. */
struct us_likeliest_figures {
  size_t tokens;
  double kl, kl_error;             /* nats a token */
  double top1, top1_error;         /* same likeliest token */
  double perplexity, base;         /* of the model, and of the original */
  double ln_ratio, ln_ratio_error; /* ln(perplexity / base), paired */
};

/* Run the model over the same tokens. opt_learner as above. US_ERR_INPUT for another vocabulary or tokenizer; US_ERR_CHECK for
 * logits that are not finite. */
US_CHECKED enum us_status us_likeliest_compare(const struct us_likeliest *base, struct us_model *model,
                                               struct us_learner *opt_learner, struct us_pool *pool,
                                               struct us_likeliest_figures *ret_figures, struct us_err *err);

#endif
