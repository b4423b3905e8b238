/* model.h: the weights of a model and of a drafter, as views of a mapped checkpoint or of an arena.
 *
 *     struct us_model *model;
 *     if (us_model_open("pico.h5", &model, &err) != US_OK) ...
 *     const struct us_layer *layer = &model->layers[3];
 *     us_model_free(model);
 *
 * Opening maps the files: nothing is copied but the small vectors (norms, sinks, router bias), which are FP32 here
 * whatever the file holds.
 */
#ifndef US_MODEL_MODEL_H
#define US_MODEL_MODEL_H

#include "model/shape.h"

struct us_expert {
  struct us_matrix gate, up; /* (F, D) */
  struct us_matrix down;     /* (D, F) */
};

struct us_layer {
  float *input_norm;               /* (D) */
  float *post_norm;                /* (D), before the MLP */
  struct us_matrix qkv;            /* fused: (H*Q + G*Q + G*V, D) in chunks; format NONE when split */
  struct us_matrix q, k, v;        /* split projections; format NONE when fused */
  struct us_matrix o_proj;         /* (D, H*V) */
  float *sink;                     /* (H) or NULL */
  struct us_matrix gate, up, down; /* dense layer; format NONE in a MoE layer */
  struct us_matrix router;         /* (E, D), F32 or BF16; MoE layer */
  float *router_bias;              /* (E) added to the scores for selection only */
  struct us_expert *experts;       /* (E) */
};

struct us_model {
  struct us_shape shape;
  struct us_matrix embed;  /* (N, D) */
  struct us_matrix head;   /* (N, D) */
  float *final_norm;       /* (D) */
  struct us_layer *layers; /* (L) */

  char *
      tokenizer_json; /* the tokenizer.json that goes with the weights, NUL-terminated; NULL if there is none */
  size_t tokenizer_bytes;
  char *provenance_json; /* provenance record of the file; NULL if there is none */
  char scale_rule[16];   /* how the MXFP4 scales were chosen ("mse", ...); "" if the file does not say */
  char *notes;     /* what opening it should tell the user (MTP tensors skipped), lines; NULL: nothing */
  char path[1024]; /* where it was opened from; "" if it was built in memory */
  void *owner;     /* what us_model_free releases: arena and mappings */
};

struct us_draft_layer {
  float *input_norm, *post_norm; /* (D) */
  float *q_norm, *k_norm;        /* (Q), per head before RoPE */
  struct us_matrix q, k, v, o_proj;
  float *sink; /* (H) or NULL */
  struct us_matrix gate, up, down;
};

struct us_draft {
  struct us_draft_shape shape;
  struct us_matrix fc;                    /* (D, taps * D) */
  struct us_matrix markov_in, markov_out; /* (rank, D), (D, rank); without data at rank 0 */
  struct us_matrix head;                  /* (N, D) its own; no rows without shape.head: see us_draft_head */
  float *hidden_norm;                     /* (D) */
  float *final_norm;                      /* (D) */
  float *mask_embedding;                  /* (D): embedding of a mask slot */
  struct us_draft_layer *layers;
  char *provenance_json;
  char *notes;
  char path[1024];
  void *owner;
};

/* The output head that drafts go through: the drafter's own, or the target's. */
static inline const struct us_matrix *us_draft_head(const struct us_draft *draft,
                                                    const struct us_model *target) {
  return draft->head.rows ? &draft->head : &target->head;
}

/* Allocate a model or drafter of this shape whose matrices have no data yet: small vectors are zeroed and owned by the
 * model, experts arrays exist. us_model_alloc gives further 64-byte aligned memory that lives as long as the model. */
US_CHECKED enum us_status us_model_create(const struct us_shape *shape, struct us_model **ret_model,
                                          struct us_err *err);
US_CHECKED enum us_status us_draft_create(const struct us_draft_shape *shape, struct us_draft **ret_draft,
                                          struct us_err *err);
US_CHECKED enum us_status us_model_alloc(struct us_model *model, size_t bytes, void **ret_memory,
                                         struct us_err *err);
US_CHECKED enum us_status us_draft_alloc(struct us_draft *draft, size_t bytes, void **ret_memory,
                                         struct us_err *err);

/* Let go of a model or drafter, its memory and its mappings; NULL is allowed. */
void us_model_free(struct us_model *model);
void us_draft_free(struct us_draft *draft);

/* One named tensor of a model or drafter in its published name (model.layers.3.mlp.experts.7.down_proj.weight, ...):
 * either a matrix or a small FP32 vector. What checkpoint I/O, precision rules, reports and training iterate over. */
struct us_tensor_ref {
  char name[128]; /* published tensor name, without the _scale suffixes */
  const char
      *family;    /* "embed", "head", "qkv", "o_proj", "dense", "experts", "router", "norm", "sink", "draft",
                     "draft.head" */
  uint32_t layer; /* UINT32_MAX outside the layers */
  struct us_matrix *matrix; /* NULL for a vector */
  float **vector;           /* NULL for a matrix */
  size_t rows, cols;        /* expected shape: (N, K), or (n, 1) for a vector */
};

/* The format that `precision` gives a tensor of a model or drafter: by its family; NONE for a vector, and for a drafter's own
 * head, whose format its shape says. */
enum us_format us_tensor_format(const struct us_precision *precision, const struct us_tensor_ref *ref);

/* FP8 scale grid of a model's tensor: it restarts after so many rows in a fused qkv projection; else 0. */
size_t us_tensor_scale_chunk_rows(const struct us_shape *shape, const struct us_tensor_ref *ref);

/* List every tensor of the model in file order (the drafter's last is the vector "mask_embedding", which the published
 * layout keeps in a side file); *ret_refs is malloc'ed (count in *ret_count), freed by the caller. */
US_CHECKED enum us_status us_model_tensors(struct us_model *model, struct us_tensor_ref **ret_refs,
                                           size_t *ret_count, struct us_err *err);
US_CHECKED enum us_status us_draft_tensors(struct us_draft *draft, struct us_tensor_ref **ret_refs,
                                           size_t *ret_count, struct us_err *err);

#endif
