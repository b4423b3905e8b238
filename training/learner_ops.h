/* learner_ops.h: what a kind of learner implements: the calls of learner.h, which say what each must do. Internal. */
#ifndef US_TRAINING_LEARNER_OPS_H
#define US_TRAINING_LEARNER_OPS_H

#include "training/learner.h"

struct us_learner_ops {
  void (*free)(struct us_learner *learner);
  void (*part)(struct us_learner *learner); /* called with several processes alone, as is sum */
  enum us_status (*each)(struct us_learner *learner, us_learner_body body, void *arg, struct us_err *err);
  enum us_status (*sum)(struct us_learner *learner, double *values, size_t n, struct us_err *err);

  enum us_status (*place)(struct us_learner *learner, struct us_params *params,
                          struct us_learner_set **ret_set, struct us_err *err);
  void (*remove)(struct us_learner_set *set);
  enum us_status (*send)(struct us_learner_set *set, struct us_err *err);
  enum us_status (*fetch)(struct us_learner_set *set, bool moments, struct us_err *err);
  enum us_status (*refresh)(struct us_learner_set *set, struct us_err *err);
  void (*zero_grad)(struct us_learner_set *set);
  void (*scale_grad)(struct us_learner_set *set, float factor);
  enum us_status (*clip)(struct us_learner_set *set, double limit, double *ret_norm, struct us_err *err);
  enum us_status (*nonfinite)(struct us_learner_set *set, const struct us_param **ret_param,
                              struct us_err *err);
  enum us_status (*update)(struct us_learner_set *set, const struct us_optim *optim, double rate,
                           struct us_err *err);

  enum us_status (*model_create)(struct us_learner_set *set, const struct us_shape *shape, size_t capacity,
                                 enum us_train_memory memory, struct us_learner_model **ret_model,
                                 struct us_err *err);
  void (*model_free)(struct us_learner_model *model);
  enum us_status (*pass)(struct us_learner_model *model, uint32_t lane, const struct us_learner_pass *pass,
                         struct us_err *err);
  enum us_status (*total)(struct us_learner_model *model, double *ret_total, double *ret_counted,
                          struct us_err *err);
  /* Loads of this process (L, E), added up over its lanes. */
  enum us_status (*load)(struct us_learner_model *model, uint64_t *load, struct us_err *err);
  void (*clear_load)(struct us_learner_model *model);
  /* Where the host moves the values of a router bias, and what takes them to the lanes. */
  float *(*bias)(struct us_learner_set *set, const struct us_param *p);
  enum us_status (*send_bias)(struct us_learner_set *set, const struct us_param *p, struct us_err *err);
  enum us_status (*forward)(struct us_learner_model *model, const struct us_batch *batch, struct us_err *err);
  enum us_status (*logits)(struct us_learner_model *model, size_t first, size_t rows, float *logits,
                           struct us_err *err);
  enum us_status (*routed)(struct us_learner_model *model, uint32_t layer, const uint32_t **ret_id,
                           struct us_err *err);

  enum us_status (*draft_create)(struct us_learner_set *set, const struct us_draft_shape *shape,
                                 struct us_learner_model *target, const struct us_draft_loss *loss,
                                 size_t blocks, struct us_learner_draft **ret_draft, struct us_err *err);
  void (*draft_free)(struct us_learner_draft *draft);
  enum us_status (*draft_pass)(struct us_learner_draft *draft, uint32_t lane, const struct us_batch *batch,
                               const struct us_draft_blocks *blocks, bool gradient, struct us_err *err);
  /* Of this process: all its lanes. */
  enum us_status (*draft_tally)(struct us_learner_draft *draft, struct us_draft_tally *ret_tally,
                                struct us_err *err);

  enum us_status (*gptq)(struct us_learner *learner, const struct us_gptq *gptq, const struct us_shape *shape,
                         struct us_params *original, struct us_params *params, struct us_err *err);
  /* The items are checked. */
  enum us_status (*generate)(struct us_learner *learner, struct us_generation *generation,
                             struct us_err *err);
};

#endif
