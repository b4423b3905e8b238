/* weights.h: one rank's share of a model and its drafter on a GPU, packed into pages.
 *
 *     struct us_device_weights_options options = {.device = 0, .rank = 0, .ranks = 4};
 *     struct us_device_bytes need;
 *     us_device_weights_bytes(&shape, opt_draft_shape, &options, &need, &err);  // before anything is allocated
 *     us_device_weights_load(model, opt_draft, &options, &weights, &err);       // from a checkpoint
 *     us_device_weights_synthetic(&shape, opt_draft_shape, seed, &options, &weights, &err);   // or made on the GPU
 *     us_device_weights_free(weights);
 *
 * Shares: query and KV heads of every attention layer; columns of every expert and dense MLP (rows of gate and up, columns of
 * down); columns of o_proj that belong to the rank's heads; rows of both heads, of the embedding and of the drafter's fc. Router,
 * norms and biases are whole on every rank. Rows that do not fill a tile are padded with zeros. Of the vocabulary a rank has ids
 * [rank * embed_rows, + head.rows): ceil(N / ranks), the last rank what is left. Formats are the checkpoint's, tensor by tensor:
 * nothing is converted here, but for an embedding in FP8, which becomes bf16 on the GPU: the same values when its scales are powers
 * of two, and refused when they are not. Experts and MLPs are not f32; the parts of one projection, and gate and up, have one
 * format. The geometry alone, without a GPU: device/weights_layout.h.
 */
#ifndef US_DEVICE_WEIGHTS_H
#define US_DEVICE_WEIGHTS_H

#include "kernels/engine/engine.h"
#include "model/markov.h"

/* A packed matrix with what the schedule asks about it. */
struct us_device_matrix {
  struct us_engine_matrix pages; /* pages.pages NULL: absent */
  uint32_t rows, cols;           /* of this rank, without padding; gate and up: 2F, D */
  uint64_t bytes;                /* of all pages; experts: of one expert */
};

struct us_device_layer {
  struct us_device_matrix
      qkv; /* rows [Q heads | K heads | V heads] of this rank, whatever the checkpoint's chunks */
  struct us_device_matrix o_proj; /* (D, H*V of this rank) */
  struct us_device_matrix router; /* MoE layers: (E, D) */
  struct us_device_matrix
      up; /* halves 2: gate above up in every tile of 32 rows: (2F, D); MoE: of every expert */
  struct us_device_matrix down;  /* (D, F); MoE: of every expert, tiles of 16 rows */
  float *input_norm, *post_norm; /* (D) */
  float *sink;                   /* (H of this rank) or NULL */
  float *router_bias;            /* (E) or NULL */
  float *q_norm, *k_norm;        /* drafter: (Q) */
};

/* GPU memory by kind, each thing rounded up to 256 bytes. */
struct us_device_bytes {
  uint64_t experts, attention, dense, router, head, embed, draft, draft_head,
      vectors;      /* weights of this rank; draft_head: a drafter's own */
  uint64_t scratch; /* while loading, freed after it */
};

struct us_device_weights {
  int device;
  uint32_t rank, ranks;
  struct us_device_bytes bytes;
  struct us_device_layer *layers;       /* (L) */
  struct us_device_matrix head;         /* (N / ranks, D): of ids [rank * embed_rows, + head.rows) */
  uint16_t *embed;                      /* bf16 (embed_rows, D): rows of token ids [rank * embed_rows, ...) */
  uint32_t embed_rows;                  /* ceil(N / ranks); rows past the vocabulary are zero */
  float *final_norm;                    /* (D) */
  struct us_device_layer *draft_layers; /* NULL without a drafter */
  struct us_device_matrix draft_fc;     /* (D / ranks, taps * D): rows of this rank */
  struct us_device_matrix draft_kv;   /* all drafter layers' [K heads | V heads] of this rank: one product */
  struct us_device_matrix draft_head; /* rows and ids as head's; no rows: drafts go through the target's */
  float *draft_k_norms;               /* (layers, Q) */
  uint16_t *markov_before,
      *markov_after; /* of a Markov head: bf16 (N, rank) whole, (head.rows, rank) of this rank's ids */
  float *draft_hidden_norm, *draft_final_norm, *mask_embedding; /* (D) */
  struct us_shape shape;
  struct us_draft_shape draft_shape; /* layers 0: no drafter */
  void *owner;                       /* what us_device_weights_free releases */
};

struct us_device_weights_options {
  int device;                         /* CUDA device */
  uint32_t rank, ranks;               /* 1, 2, 4, 8 */
  const struct us_markov *opt_markov; /* the tables, in bf16, of a drafter that has such a head */
  void (*progress)(void *arg, uint64_t done, uint64_t total); /* bytes; may be NULL */
  void *arg;
};

static inline uint64_t us_device_bytes_weights(const struct us_device_bytes *b) {
  return b->experts + b->attention + b->dense + b->router + b->head + b->embed + b->draft + b->draft_head +
         b->vectors;
}

/* What a rank needs, from the shapes and their precision alone. US_ERR_USAGE: the shape cannot be cut so (says which size). */
US_CHECKED enum us_status us_device_weights_bytes(const struct us_shape *shape,
                                                  const struct us_draft_shape *opt_draft,
                                                  const struct us_device_weights_options *options,
                                                  struct us_device_bytes *ret_bytes, struct us_err *err);

/* Copy and pack. US_ERR_USAGE: a Markov head without tables. US_ERR_DEVICE: CUDA; US_ERR_MEMORY: too little GPU memory (says how much is needed and free); US_ERR_INPUT: a
 * scale that pages cannot hold. */
US_CHECKED enum us_status us_device_weights_load(const struct us_model *model,
                                                 const struct us_draft *opt_draft,
                                                 const struct us_device_weights_options *options,
                                                 struct us_device_weights **ret_weights, struct us_err *err);

/* Random weights of the shape and its precision: the tensors that us_model_random(seed) and us_draft_random(precision.draft, seed)
 * make on the CPU (model/random.h), made on the GPU, bit for bit. */
US_CHECKED enum us_status us_device_weights_synthetic(const struct us_shape *shape,
                                                      const struct us_draft_shape *opt_draft, uint64_t seed,
                                                      const struct us_device_weights_options *options,
                                                      struct us_device_weights **ret_weights,
                                                      struct us_err *err);

void us_device_weights_free(struct us_device_weights *weights); /* NULL is allowed */

#endif
