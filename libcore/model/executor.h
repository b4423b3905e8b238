/* executor.h: whatever can run a model: the reference forward pass, the tile program on the CPU, later the GPU.
 *
 *     struct us_executor *ex;
 *     us_executor_create_reference(model, opt_draft, pool, US_ROUND_BF16, &ex, &err);
 *     struct us_row rows[8] = {{.token = t, .position = p, .kv = kv}, ...};
 *     ex->ops->forward(ex, &(struct us_pass){.rows = rows, .R = 8, .logits = logits, .taps = taps}, &err);
 *     ex->ops->free(ex);
 *
 * Decoding is written once against this table. Every executor gives the same bits for a row, however many rows run with
 * it and whatever their neighbours are.
 */
#ifndef US_MODEL_EXECUTOR_H
#define US_MODEL_EXECUTOR_H

#include "base/pool.h"
#include "base/sample.h"
#include "base/speculate.h"
#include "model/kv.h"
#include "model/model.h"

/* Where activations are rounded to bf16 (docs/numerics.md); NONE keeps FP32 throughout, for parity tests. */
enum us_rounding { US_ROUND_BF16, US_ROUND_NONE };

/* One token row of a pass: the token, its position, and the cache of its sequence. */
struct us_row {
  int32_t token;
  uint32_t position;
  struct us_kv *kv;
};

/* Called after each operation of each layer when set: `op` is the operation's name ("attn_norm", "qkv", "attention",
 * "o_proj", "mlp_norm", "router", "experts", "residual", "final_norm", "head"), values its (R, width) FP32 output.
 * Returning false stops the pass there: stop-after-op. */
struct us_observer {
  bool (*after_op)(void *arg, const char *op, uint32_t layer, const float *values, size_t R, size_t width);
  void *arg;
};

/* A target pass: K/V of all rows are appended first, then each row attends to positions <= its own. */
struct us_pass {
  const struct us_row *rows; /* (R) of one or several sequences; those of one have ascending positions */
  size_t R;
  float *logits;              /* (R, N) written; NULL if not wanted */
  const uint8_t *want_logits; /* (R) 1: compute this row's logits; NULL: all rows */
  float *taps;      /* (R, taps * D) residual stream after the drafter's tap layers; NULL if not wanted */
  uint32_t *routed; /* (L, R, K) expert ids, ascending; UINT32_MAX in dense layers; NULL if not wanted */
  const struct us_observer *observer; /* NULL if not wanted */
  bool prefill; /* prompt rows, for the prefill kernels: one sequence, one chunk between multiples of 512 */
  /* Prefill by an executor that makes_context: the rows become drafter context in this cache; NULL: not wanted. */
  struct us_kv *draft_kv;
};

/* Drafter context: features of committed tokens at positions [position, position + R) become context K/V. */
struct us_draft_context {
  struct us_kv *kv; /* the drafter's cache of this sequence */
  uint32_t position;
  size_t R;
  const float *taps; /* (R, taps * D) */
};

/* How proposals are drawn: with the drafter's noise of the round (base/sample.h). */
struct us_draft_draw {
  const struct us_sampling *sampling;
  uint64_t seed;
  uint32_t sample;
};

/* A draft pass: block rows [anchor, mask x (B-1)] at positions p .. p+B-1; context strictly before p. The block's own
 * K/V are temporary. */
struct us_draft_pass {
  struct us_kv *kv;
  int32_t anchor;
  uint32_t position; /* p, the anchor's */
  uint32_t block;    /* B, at most the drafter's block */
  float *logits;     /* (B-1, N): row j-1 predicts the token at p+j */
  const struct us_draft_draw *
      opt_draw; /* with a Markov head, whose slots depend on the token of the slot before; NULL: the likeliest */
  float *hidden; /* (B, D) final normed hidden rows; NULL if not wanted */
};

/* A sequence in resident rounds. */
struct us_rounds_sequence {
  struct us_kv *kv;       /* holds the positions before `position` */
  struct us_kv *draft_kv; /* the same of the drafter's context; NULL: the drafter does not run */
  int32_t anchor;         /* the last committed token */
  uint32_t position;      /* of the anchor */
  uint32_t limit;         /* of the last token that may be committed; above `position` */
  uint32_t drafts;        /* proposals a round, at most */
  struct us_sampling sampling;
  uint64_t seed;
  uint32_t sample;
  const int32_t
      *stop_ids; /* any of them ends the sequence; a round may commit more of one that the caller ends */
  size_t stop_id_count;
  const int32_t *
      replay; /* (replay_count) proposed instead of the drafter's argmax, 0 past the end; NULL: not replayed */
  size_t replay_count;
  uint32_t replay_first; /* position of replay[0] */
  const float *
      accept; /* (accept_count) rate at which slot i keeps the recorded token; the last one repeats; 0: always */
  size_t accept_count;
  enum us_verify_rule rule; /* MATCH at temperature 0 */
  bool logprobs;            /* reports have log-probabilities */
};

/* What one round did to one sequence. */
struct us_rounds_report {
  uint32_t sequence;
  uint32_t round;        /* the same for all sequences that ran together; ascends */
  const int32_t *tokens; /* (count) committed */
  const float *logprobs; /* (count) of the model's own law; NULL: not asked for */
  uint32_t count, drafts, accepted;
  bool broken;   /* the logits of the token after these are not finite: nothing more will come */
  uint64_t time; /* ns on a clock of the device: when the round was over */
};

/* Rounds of several sequences without the caller: draft, verify, commit, again and again; as decode/generate.c does round by
 * round. */
struct us_rounds {
  const struct us_rounds_sequence *sequences; /* (n) */
  uint32_t n;
  uint32_t batch,
      block;     /* most sequences, and most rows of one, that this and later calls will run together */
  bool drafting; /* the drafter runs */
  const struct us_verify_cost *adaptive; /* verify only as many proposals as pay; NULL: all */
  /* In the order of rounds, then of sequences. false: this sequence has ended for the caller; rounds of it that are under way
   * are still reported. */
  bool (*on_round)(void *arg, const struct us_rounds_report *report);
  bool (*interrupted)(void); /* asked now and then; true returns US_INTERRUPTED; may be NULL */
  void *arg;
  uint64_t expert_layers, experts; /* out: MoE layers passed by target passes, active experts in them */
};

struct us_executor;

struct us_executor_ops {
  enum us_status (*forward)(struct us_executor *ex, const struct us_pass *pass, struct us_err *err);
  enum us_status (*draft_context)(struct us_executor *ex, const struct us_draft_context *context,
                                  struct us_err *err);
  enum us_status (*draft)(struct us_executor *ex, const struct us_draft_pass *pass, struct us_err *err);
  void (*free)(struct us_executor *ex);
  /* Run rounds until one in which a sequence ended; then draft_kv holds all positions before each sequence's last token again.
   * NULL: this executor needs its caller between rounds. */
  enum us_status (*rounds)(struct us_executor *ex, struct us_rounds *rounds, struct us_err *err);
};

struct us_executor {
  const struct us_executor_ops *ops;
  const char *name;             /* "reference", "tiles", "cuda-engine", "cuda-graph" */
  const struct us_model *model; /* borrowed */
  const struct us_draft *draft; /* borrowed; NULL without a drafter */
  enum us_rounding rounding;
  /* Where the caches of its sequences must lie (us_kv_create_in); NULL: this process's memory. */
  const struct us_kv_memory *kv_memory, *draft_kv_memory;
  bool makes_context; /* prefill passes take draft_kv, so that no taps come to the host */
};

/* The reference forward pass: operation by operation, in the order of the formulas. Borrows model, draft and pool. */
US_CHECKED enum us_status us_executor_create_reference(const struct us_model *model,
                                                       const struct us_draft *opt_draft, struct us_pool *pool,
                                                       enum us_rounding rounding,
                                                       struct us_executor **ret_executor, struct us_err *err);

#endif
