/* tile_pass.h: what the tasks of one pass work on. Internal to plan/.
 *
 * tiles.c fills a tile_pass for a target, draft or context program and hands it to us_runner_run with us_tile_run as the
 * body. A target layer and a drafter layer look the same to a task: struct us_tile_layer.
 */
#ifndef US_PLAN_TILE_PASS_H
#define US_PLAN_TILE_PASS_H

#include "kernels/experts/experts.h"
#include "model/executor.h"
#include "plan/program.h"

#include <stdbool.h>

/* One layer's weights as tasks use them. */
struct us_tile_layer {
  const struct us_attention_shape *attention;
  uint32_t chunks;                       /* of a fused projection; 0: split */
  const struct us_matrix *projection[3]; /* fused: one; split: q, k, v */
  const struct us_matrix *o_proj, *gate, *up, *down, *router;
  const float *input_norm, *post_norm, *sink, *router_bias;
  const float *q_norm, *k_norm; /* drafter only */
  const struct us_expert *experts;
};

/* Activations, (R, ...) each; "packed" rows are in us_linear's order. One arena, made for a number of rows. */
struct us_tile_buffers {
  size_t capacity; /* rows */
  void *arena;
  float *residual, *normed, *normed_packed; /* (R, D) */
  float *qkv;                               /* (R, widest projection) */
  float *q;                                 /* (R, H * Q) rotated */
  float *attended, *attended_packed;        /* (R, H * V) */
  float *partial[2];                        /* (R, D) of attention, of the MLP */
  float *router;                            /* (R, E) */
  uint32_t *ids;                            /* (R, K) */
  float *weights;                           /* (R, K) */
  struct us_expert_groups groups;
  float *inner_packed;    /* (R * K, packed F) of experts or (R, packed F) of a dense layer */
  float *features_packed; /* (R, taps * D) drafter context */
  float *context;         /* (R, D) */
  float *rope[2];         /* (R, rotary_dim) tables: full, swa; a drafter uses [1] */
  float *scratch;         /* (workers, scratch_floats) */
  size_t scratch_floats;
  void *block_page; /* the draft block's K/V of one layer */
};

struct us_tile_pass {
  const struct us_program *program;
  const struct us_model *model;
  const struct us_draft *draft; /* set: a drafter's layers */
  struct us_tile_layer *layers;
  struct us_tile_buffers *buffers;
  bool round_bf16;
  enum us_isa isa;

  const struct us_row *rows; /* (R) token, position, cache; of a draft block or context too */
  float *logits;             /* (R, N), or (R - 1, N) from row 1 on for a draft block */
  const uint8_t *want_logits;
  float *taps; /* (R, tap_count * D) */
  uint32_t tap_count;
  const uint32_t *tap_layer;
  uint32_t *routed; /* (L, R, K) or NULL */
};

/* Floats of scratch a worker needs for this program with R rows. */
size_t us_tile_scratch(const struct us_tile_pass *pass);

/* Run one task (a us_task_body: pass is a struct us_tile_pass). Returns the weight bytes it streamed. */
uint64_t us_tile_run(void *pass, const struct us_task *task, int worker);

#endif
