/* train_mutations.c: what is wrong on the GPU's side alone must be seen in the gradients. Needs the CPU's cross-entropy gradients. */
#include "train_parity.h"

struct mutation {
  const char *name;
  void (*apply)(struct target *t, struct variant *v);
};

static void swap_thetas(struct target *t, struct variant *v) {
  v->shape.full.rope_theta = t->shape.swa.rope_theta;
  v->shape.swa.rope_theta = t->shape.full.rope_theta;
}
static void scale_values(struct target *t, struct variant *v) {
  v->shape.value_scale *= 1.0625;
}
static void widen_window(struct target *t, struct variant *v) {
  v->shape.swa.window++;
}
static void scale_routes(struct target *t, struct variant *v) {
  v->shape.routed_scaling *= 1.0625;
}
static void leave_sums(struct target *t, struct variant *v) {
  v->shape.norm_topk_prob = false;
}
static void raise_epsilon(struct target *t, struct variant *v) {
  v->shape.norm_eps = 0.0625;
}
static void shift_positions(struct target *t, struct variant *v) {
  for (size_t i = 0; i < v->rows.R; i++) v->rows.position[i] += v->rows.position[i] >= 4;
}
static void join_documents(struct target *t, struct variant *v) {
  for (size_t i = 0; i < v->rows.R; i++) v->rows.document[i] -= v->rows.document[i] > 0;
}
static void shift_label(struct target *t, struct variant *v) {
  for (size_t i = 0; i < v->rows.R; i += 8) v->rows.label[i] ^= 1;
}
static void count_ends(struct target *t, struct variant *v) {
  for (size_t i = 0; i < v->rows.R; i++) v->rows.weight[i] = 1.0f;
}
static void drop_sinks(struct target *t, struct variant *v) {
  struct us_param *p = tensor(t, "model.layers.1.self_attn.attention_sink_bias");
  for (size_t i = 0; i < p->rows * p->cols; i++) p->value[i] = -64.0f;
}
static void scale_gain(struct target *t, struct variant *v) {
  struct us_param *p = tensor(t, "model.layers.2.post_attention_layernorm.weight");
  for (size_t i = 0; i < p->rows * p->cols; i++) p->value[i] *= 1.0625f;
}
static void swap_experts(struct target *t, struct variant *v) {
  struct us_param *a = tensor(t, "model.layers.1.mlp.experts.0.down_proj.weight");
  struct us_param *b = tensor(t, "model.layers.1.mlp.experts.1.down_proj.weight");
  for (size_t i = 0; i < a->rows * a->cols; i++) {
    float kept = a->value[i];
    a->value[i] = b->value[i], b->value[i] = kept;
  }
}

static const struct mutation mutations[] = {{"thetas swapped", swap_thetas},
                                            {"values scaled by 1/16 more", scale_values},
                                            {"window one wider", widen_window},
                                            {"routes scaled by 1/16 more", scale_routes},
                                            {"weights of experts not normalised", leave_sums},
                                            {"epsilon of norms 1/16", raise_epsilon},
                                            {"positions shifted inside documents", shift_positions},
                                            {"documents joined at one row", join_documents},
                                            {"every eighth label wrong", shift_label},
                                            {"ends of documents counted", count_ends},
                                            {"sinks of a layer dropped", drop_sinks},
                                            {"a gain 1/16 larger", scale_gain},
                                            {"two experts' down swapped", swap_experts}};

void check_mutations(struct target *t) {
  struct us_err err = {0};
  size_t floats = t->params.floats;
  float *value = take(floats, sizeof *value);
  memcpy(value, t->params.value, floats * sizeof *value);
  for (size_t i = 0; i < sizeof mutations / sizeof mutations[0]; i++) {
    struct variant v = {.shape = t->shape, .memory = US_TRAIN_SAVE};
    char name[96], note[256];
    need(us_rows_init(&v.rows, ROWS, &err), &err, t->name);
    v.rows.R = t->rows.R;
    memcpy(v.rows.token, t->rows.token, v.rows.R * sizeof *v.rows.token);
    memcpy(v.rows.label, t->rows.label, v.rows.R * sizeof *v.rows.label);
    memcpy(v.rows.position, t->rows.position, v.rows.R * sizeof *v.rows.position);
    memcpy(v.rows.document, t->rows.document, v.rows.R * sizeof *v.rows.document);
    memcpy(v.rows.weight, t->rows.weight, v.rows.R * sizeof *v.rows.weight);
    mutations[i].apply(t, &v);
    struct result r = run_gpu(t, &v, false);
    struct lab_difference d = lab_compare(&t->params, r.grad, &t->noise, GRADIENT_FACTOR);
    snprintf(name, sizeof name, "mutation is seen: %s", mutations[i].name);
    snprintf(note, sizeof note, "%zu of %zu tensors beyond, worst %.1f: %s", d.beyond, d.tensors, d.worst,
             d.name);
    record(t->name, name, 1, d.beyond == 0, note);
    memcpy(t->params.value, value, floats * sizeof *value);
    us_rows_release(&v.rows);
    release_result(&r);
  }
  free(value);
}
