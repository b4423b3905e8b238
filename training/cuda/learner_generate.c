/* learner_generate.c: a generation divided among the lanes of the CUDA learner. */
#include "training/cuda/generate.h"
#include "training/cuda/learner_state.h"

struct shares {
  struct cuda_learner *learner;
  struct cuda_set *set;
  struct us_generation *generation;
};

/* Lanes divide what every process generates. */
static enum us_status generate_share(void *arg, uint32_t lane, struct us_err *err) {
  struct shares *s = arg;
  size_t n = s->generation->n, lanes = s->learner->base.lanes, first = n * lane / lanes;
  return us_cuda_generate(&(struct us_cuda_generate){.cuda = s->learner->cuda[lane],
                                                     .params = s->set->lane[lane],
                                                     .generation = s->generation,
                                                     .first = first,
                                                     .n = n * (lane + 1) / lanes - first,
                                                     .leads = lane == 0},
                          err);
}

enum us_status us_cuda_learner_generate(struct us_learner *learner, struct us_generation *generation,
                                        struct us_err *err) {
  struct us_params params = {0};
  struct us_learner_set *set = NULL;
  enum us_status status = us_params_init_model(&params, generation->model, generation->pool, true, err);
  if (status == US_OK) status = us_learner_place(learner, &params, &set, err);
  if (status == US_OK)
    status = us_learner_each(learner, generate_share,
                             &(struct shares){.learner = (struct cuda_learner *)learner,
                                              .set = (struct cuda_set *)set,
                                              .generation = generation},
                             err);
  us_learner_remove(set);
  us_params_release(&params);
  return status;
}
