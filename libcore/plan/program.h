/* program.h: the tile program: a static list of tile tasks that every executor runs.
 *
 *     for (size_t i = 0; i < program->task_count; i++) {
 *       const struct us_task *task = &program->tasks[i];     // claimed in order by any number of workers
 *       ... wait until every event in task->waits is complete, run the tile, then signal task->signal
 *     }
 *
 * Plain data: the CPU executor, the profiler, the checker and the CUDA engine read it; only plan/lower.c makes it.
 * An event is complete when all tasks that signal it have finished; a task may wait for complete events only, so a
 * dependency is an event id and nothing else. Tasks stand in an order in which every event is signalled before it is
 * waited for, which is why in-order claiming can't deadlock (plan/check.h proves it for a given program).
 */
#ifndef US_PLAN_PROGRAM_H
#define US_PLAN_PROGRAM_H

#include <stddef.h>
#include <stdint.h>

enum us_program_kind {
  US_PROGRAM_TARGET,  /* a target pass over R rows: decode, verify or prefill */
  US_PROGRAM_DRAFT,   /* a draft block of R rows: anchor and R-1 masks */
  US_PROGRAM_CONTEXT, /* R committed rows' features become drafter context K/V */
};

/* What a task computes. The tile [begin, end) counts what the last column says. */
enum us_task_op {
  US_TASK_EMBED_NORM,    /* residual = embedding; normed = norm of layer 0           token rows */
  US_TASK_QKV,           /* qkv = W normed                                           output rows of q|k|v */
  US_TASK_ATTENTION,     /* rotate, append K/V, attend                               KV heads */
  US_TASK_O_PROJ,        /* partial = W attended                                     output rows */
  US_TASK_RESIDUAL_NORM, /* residual += partials in rank order; normed = next norm   token rows */
  US_TASK_ROUTER,        /* router logits = W normed                                 experts */
  US_TASK_ROUTE,         /* choose experts, list the active ones                     1 */
  US_TASK_EXPERT_UP,     /* inner[slot] = silu(gate) * up of the slot-th active expert  inner columns */
  US_TASK_EXPERT_DOWN,   /* partial = sum over active experts, ascending id          output rows */
  US_TASK_DENSE_UP,      /* inner = silu(gate) * up                                  inner columns */
  US_TASK_DENSE_DOWN,    /* partial = W inner                                        output rows */
  US_TASK_HEAD,          /* logits = W normed                                        vocabulary rows */
  US_TASK_CONTEXT_FC,    /* context = W features                                     output rows */
  US_TASK_CONTEXT_NORM,  /* context = norm(context)                                  token rows */
  US_TASK_CONTEXT_KV,    /* one drafter layer's context K/V: project, norm, rotate, append  KV heads */
  US_TASK_OP_COUNT
};

#define US_TASK_WAITS 4
#define US_EVENT_NONE UINT32_MAX
#define US_LAYER_NONE UINT32_MAX

struct us_task {
  uint16_t op;                   /* enum us_task_op */
  uint16_t rank;                 /* whose shard of the weights */
  uint32_t layer;                /* US_LAYER_NONE outside the layers */
  uint32_t slot;                 /* EXPERT_UP: the slot-th active expert; a slot past the last does nothing.
                                    RESIDUAL_NORM: 0 after attention, 1 after the MLP */
  uint32_t begin, end;           /* the tile */
  uint32_t waits[US_TASK_WAITS]; /* events to be complete first; US_EVENT_NONE fills up */
  uint32_t signal;               /* event this task counts towards; US_EVENT_NONE for a last task */
  uint64_t bytes;                /* weight bytes it streams; EXPERT_DOWN: for one active expert */
};

/* Geometry that regions and coverage are derived from. Widths are of one rank. */
struct us_program_dims {
  uint32_t rows;          /* R */
  uint32_t hidden, vocab; /* D, N */
  uint32_t layers;
  uint32_t slots;                                 /* most active experts in a pass: min(E, R*K) */
  uint32_t experts;                               /* E */
  uint32_t expert_inner, dense_inner;             /* F of one rank */
  uint32_t qkv_rows[2], kv_heads[2], attended[2]; /* full, swa: of one rank */
  uint32_t features;                              /* taps * D */
};

struct us_program {
  enum us_program_kind kind;
  uint32_t ranks;
  struct us_program_dims dims;
  uint8_t *swa_layer, *moe_layer; /* (layers) */
  struct us_task *tasks;
  size_t task_count;
  uint32_t *event_totals; /* (event_count) tasks that signal the event */
  uint32_t event_count;
};

/* The first of the vocabulary's ids (HEAD) and of the fused context's outputs (CONTEXT_FC) that rank `rank` computes; those of rank
 * `ranks` are the ends of the last. */
uint32_t us_program_first_id(const struct us_program *program, uint32_t rank);
uint32_t us_program_first_fused(const struct us_program *program, uint32_t rank);

/* "embed_norm", "qkv", ...; never NULL. */
const char *us_task_op_name(enum us_task_op op);

#endif
