/* qat.h: finetuning a model through the rounding that its stored form will have.
 *
 *     struct us_convert convert = {.rules = &rules, .scale_rule = US_SCALE_MSE};
 *     struct us_qat run = {.original = model, .convert = &convert, .shards = shards, .loss = US_QAT_KL, .batch = 8,
 *                          .length = 256, .seed = 1, .trainer = {.steps = 200, ...}};
 *     us_qat(&run, pool, &err);
 *     us_qat_export(&run, pool, &quantized, &err);                // without us_qat: rounding to nearest
 *     us_model_write("q.h5", quantized, provenance, &err);
 *     us_qat_check(&run, reopened, pool, &err);                   // it multiplies by what was trained, bit for bit
 *     us_qat_release(&run);
 *
 * The student has FP32 masters, begun at the original's weights, at another model's, or where GPTQ rounds either well (gptq.h); each
 * step encodes and decodes them by the code that writes the file (scales anew every step), and gradients pass the rounding
 * unchanged (straight-through). The teacher is the
 * original, forward only, with the same rounding points: KL(teacher || student) at T = 1 is self-distillation. Norms,
 * sinks and an F32 router are multiplied as their masters are. The router's selection bias does not move. Tensors that
 * are neither trained nor change their format keep their bits. With trainer.freeze, weights whose codes go to and fro are fixed on the
 * way (oscillation.h).
 */
#ifndef US_TRAINING_QAT_H
#define US_TRAINING_QAT_H

#include "model/precision.h"
#include "training/rows.h"
#include "training/trainer.h"

enum us_qat_loss { US_QAT_KL, US_QAT_CE };
enum us_qat_scope {
  US_QAT_ROUNDED, /* matrices whose format changes */
  US_QAT_ALL,     /* everything but the router's selection bias */
  US_QAT_EXPERTS, /* expert matrices */
};

/* A line of the log. Line 0 is before the first step: the loss of post-training quantization. A resumed run has none. */
struct us_qat_log {
  uint64_t step, tokens;
  double seconds;
  double loss;    /* nats a token, mean over the steps since the last line; NAN in line 0 */
  double heldout; /* the same loss on held-out windows; NAN unless evaluated now */
  double rate, norm;
  double tokens_per_second;
  double mfu; /* of the learner's peak; NAN where that is not known */
};

struct us_qat {
  struct us_learner *learner; /* where; NULL: the CPU, on the pool of the call */
  struct us_model *original;
  struct us_model *begin; /* of the same shape: where masters begin; NULL: at the original's weights */
  const struct us_convert *convert;
  const struct us_shards *shards;
  enum us_qat_loss loss;
  enum us_qat_scope scope;
  size_t batch, length; /* sequences a step, tokens a sequence */
  size_t micro;         /* sequences a forward pass; 0: as many as 8,192 rows hold */
  uint64_t seed;
  bool
      original_experts; /* with US_QAT_KL: in a step's passes tokens visit the experts that the original chose */
  double routers; /* with US_QAT_KL: weight of the original's routing scores in what is minimised; 0: none */
  size_t
      gptq_windows; /* training sequences whose inputs say where the masters begin; 0: at the original's weights */
  enum us_train_memory memory;    /* US_TRAIN_SAVE or US_TRAIN_RECOMPUTE */
  bool marked_only;               /* learn on the tokens that the shards mark alone */
  double across;                  /* share of the windows in which attention goes on over document edges */
  uint64_t eval_every, log_every; /* steps; 0: first and last alone */
  size_t eval_windows;            /* held-out sequences of an evaluation; 0: none */
  bool resume;
  struct us_trainer
      trainer; /* optim, schedule, freeze, clip, steps, minutes, state and options; the rest is filled */

  void (*on_log)(void *arg, const struct us_qat_log *log);
  void *log_arg;
  bool (*interrupted)(void); /* asked between steps; NULL: never */

  struct us_params params; /* result: masters; empty if nothing was trained */
  double held;             /* result: share of the rounded weights that trainer.freeze fixed */
};

/* Masters, decoded by the threads of a pool (NULL: this one alone), encodings and what is frozen, as a run begins: run->params. */
US_CHECKED enum us_status us_qat_open(struct us_qat *run, struct us_pool *pool, struct us_err *err);

/* The same, and with gptq_windows moved to where GPTQ rounds them well: what us_qat begins with, or by itself quantization without a step
 * of training. */
US_CHECKED enum us_status us_qat_start(struct us_qat *run, struct us_pool *pool, struct us_err *err);

/* Train. US_ERR_USAGE for rules that match nothing; US_ERR_INPUT for shards of another vocabulary; US_INTERRUPTED after
 * a clean stop and a save. */
US_CHECKED enum us_status us_qat(struct us_qat *run, struct us_pool *pool, struct us_err *err);

/* A new model in the formats of the rules: from the masters, or from the original if nothing was trained. Unchanged
 * tensors are shared with the original: free *ret_model before it. */
US_CHECKED enum us_status us_qat_export(const struct us_qat *run, struct us_pool *pool,
                                        struct us_model **ret_model, struct us_err *err);

/* Compare a model, as it was read back, with the fake-quantised weights of the run, bit for bit. US_ERR_CHECK names the
 * first tensor and element that differ. */
US_CHECKED enum us_status us_qat_check(const struct us_qat *run, struct us_model *model, struct us_pool *pool,
                                       struct us_err *err);

void us_qat_release(struct us_qat *run);

#endif
