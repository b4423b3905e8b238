/* metrics.h: models against each other on the same held-out tokens: perplexity, KL divergence, agreement.
 *
 *     struct us_metrics_job job = {.models = {original, ptq, qat}, .n = 3, .shards = shards, .length = 512, .windows = 64};
 *     struct us_metrics metrics;
 *     if (us_metrics_run(&job, pool, &metrics, &err) != US_OK) return err.status;
 *     metrics.models[1].kl, metrics.models[1].kl_error;            // KL(original || ptq), nats a token
 *     us_metrics_gap(&metrics, 1, 2, &closed, &error);
 *     us_metrics_release(&metrics);
 *
 * Model 0 is the base. All models see the same windows, documents apart, by the training forward pass (whole sequences,
 * the rounding points of the executors). Logits exist for a few rows at a time; one float a token is kept for percentiles.
 *
 * Tokens of one window are not independent, so standard errors of means are taken over windows (ratio estimator):
 *   m = sum S_w / sum n_w,   SE^2 = W / (W - 1) * sum (S_w - m n_w)^2 / (sum n_w)^2
 * and differences between models are paired, window by window. Agreements also have their binomial error.
 * KL, ln ratio, agreement as in llama.cpp's perplexity tool, without its quantised base logits.
 */
#ifndef US_TRAINING_METRICS_H
#define US_TRAINING_METRICS_H

#include "base/pool.h"
#include "training/learner.h"
#include "training/rows.h"

#define US_METRICS_MODELS 4

/* Sums over one window's tokens. */
struct us_metrics_window {
  double tokens;
  double nll;       /* -ln p(label) */
  double kl;        /* KL(base || this) */
  double agree;     /* tokens where both have the same likeliest token */
  double overlap;   /* sum over tokens of sum_i min(p_base, p_this) */
  double sets;      /* (token, MoE layer) pairs with the same set of experts */
  double set_pairs; /* pairs compared */
  double hits;      /* label is the likeliest token */
};

/* What one model did; the second half compares with model 0 and is 0 in model 0. NAN where nothing could be measured. */
struct us_metrics_model {
  double nll, nll_error; /* nats a token */
  double perplexity;     /* exp(nll) */
  double bits_per_byte;
  double accuracy; /* share of labels that are the likeliest token */

  double kl, kl_error;                                   /* nats a token */
  double kl_median, kl_90, kl_95, kl_99, kl_999, kl_max; /* over tokens */
  double top1, top1_error;                               /* same likeliest token; binomial error */
  double overlap, overlap_error;   /* 1 - total variation: acceptance of a perfect draft */
  double router, router_error;     /* same set of experts; error over windows */
  double ln_ratio, ln_ratio_error; /* ln(perplexity / base perplexity), paired */

  struct us_metrics_window *window; /* (windows) */
  float *token_kl;                  /* (tokens) ascending; NULL in model 0 */
};

struct us_metrics {
  size_t n, windows, tokens;
  struct us_metrics_model models[US_METRICS_MODELS];
};

struct us_metrics_job {
  struct us_learner
      *learner; /* where the forward passes run (lane 0); NULL: the CPU, on the pool of the call */
  struct us_model
      *models[US_METRICS_MODELS]; /* same vocabulary; the experts compare where the MoE layers are alike */
  size_t n;
  const struct us_shards *shards;
  bool base_experts;         /* rows visit the experts that model 0 chose, by their own gates */
  size_t length;             /* tokens a window */
  size_t windows;            /* evenly spread over the held-out part; 0: all */
  bool (*interrupted)(void); /* asked between windows; NULL: never */
  void (*on_progress)(void *arg, size_t done, size_t windows); /* may be NULL */
  void *arg;
};

/* Measure. US_ERR_INPUT when vocabularies differ, or MoE layers where base_experts needs them alike, or nothing is held out;
 * US_ERR_CHECK for logits that are not finite. */
US_CHECKED enum us_status us_metrics_run(const struct us_metrics_job *job, struct us_pool *pool,
                                         struct us_metrics *ret_metrics, struct us_err *err);
void us_metrics_release(struct us_metrics *metrics);

/* Share of `before`'s KL that `after` closed, 1 - KL_after / KL_before, with the paired error over windows. */
void us_metrics_gap(const struct us_metrics *metrics, size_t before, size_t after, double *ret_closed,
                    double *ret_error);

/* The value below which share q of n ascending values lie, linear between neighbours; NAN for none. */
double us_metrics_quantile(const float *sorted, size_t n, double q);

#endif
