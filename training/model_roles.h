/* model_roles.h: which tensor of a us_params is which in the graph of a target and of a drafter.
 *
 *     struct us_layer_roles roles;
 *     us_layer_roles_find(&shape, &params, l, &roles, &err);
 *     ... roles.qkv->compute ...
 *
 * Both training paths read tensors that lie behind each other as one matrix: q, k and v; gate and up; and, on a GPU, all
 * experts of a layer at one distance. US_ERR_CHECK where a tensor is missing or lies elsewhere.
 */
#ifndef US_TRAINING_MODEL_ROLES_H
#define US_TRAINING_MODEL_ROLES_H

#include "training/params.h"

struct us_layer_roles {
  struct us_param *input_norm, *post_norm, *qkv, *o_proj, *sink; /* sink NULL: none */
  struct us_param *gate_up, *down;                               /* dense */
  struct us_param *router, *router_bias, *experts;               /* MoE: experts[3 e + {gate, up, down}] */
};

struct us_model_roles {
  struct us_param *embed, *final_norm, *head;
};

US_CHECKED enum us_status us_model_roles_find(const struct us_params *params,
                                              struct us_model_roles *ret_roles, struct us_err *err);
US_CHECKED enum us_status us_layer_roles_find(const struct us_shape *shape, const struct us_params *params,
                                              uint32_t l, struct us_layer_roles *ret_roles,
                                              struct us_err *err);

struct us_draft_layer_roles {
  struct us_param *input_norm, *post_norm, *q, *k, *q_norm, *k_norm, *o_proj, *sink, *gate_up, *down;
};

struct us_draft_roles {
  struct us_param *fc, *hidden_norm, *final_norm, *mask;
  struct us_param *markov_in, *markov_out; /* NULL: none */
  struct us_draft_layer_roles layer[US_MAX_DRAFT_LAYERS];
};

US_CHECKED enum us_status us_draft_roles_find(const struct us_draft_shape *shape,
                                              const struct us_params *params,
                                              struct us_draft_roles *ret_roles, struct us_err *err);

#endif
