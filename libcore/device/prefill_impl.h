/* prefill_impl.h: what the sources of prompt passes share. Internal to device/. */
#ifndef US_DEVICE_PREFILL_IMPL_H
#define US_DEVICE_PREFILL_IMPL_H

#include "device/prefill.h"
#include "kernels/prefill/prefill.h"

enum us_prefill_attention_kind { US_PREFILL_FULL, US_PREFILL_WINDOWED, US_PREFILL_DRAFT, US_PREFILL_KINDS };

/* One rank's memory; rows are options.rows, own rows a rank's share of them. */
struct us_prefill_buffers {
  int32_t *tokens;    /* (rows) */
  float *residual;    /* (own rows, D) */
  float *sums;        /* (addends, own rows, D): partial sums that arrive */
  uint16_t *normed;   /* (rows, D) */
  float *qkv;         /* (rows, qkv_stride) */
  uint16_t *attended; /* (rows, H * V of the rank) */
  float *router;      /* (router parts, rows, E) */
  uint32_t *routed;   /* (L, rows, top_k) */
  float *weights;     /* (rows, top_k) */
  struct us_prefill_groups groups;
  uint16_t *inner;               /* (rows * top_k, F) or (rows, F of dense layers) */
  float *pairs;                  /* (rows * top_k, D) */
  uint8_t *staging;              /* pages of a windowed layer's chunk */
  uint16_t *features;            /* (rows, taps * D) */
  float *context;                /* (rows, all K and V of the drafter's layers) */
  float *logits;                 /* (logit_rows, logits_stride) */
  float *rope[US_PREFILL_KINDS]; /* (max_positions, rotary) */
};

struct us_prefill_sizes {
  uint32_t own_rows, addends, qkv_stride, attended, logits_stride;
  uint64_t inner, router, staging;
};

struct us_prefill_rank {
  const struct us_device_weights *weights;
  struct us_prefill_buffers buffers;
  void *arena;
  uint8_t *pool, *draft_pool; /* pages */
  void *arrived;              /* cudaEvent_t: the work of its GPU so far; of a GPU's first rank */
};

struct us_device_prefill {
  struct us_devices *devices;
  struct us_device_prefill_options options;
  struct us_prefill_sizes sizes;
  struct us_prefill_rank rank[US_ENGINE_MAX_RANKS];
};

/* The attention geometry of a kind; NULL: no such layer. */
const struct us_attention_shape *us_prefill_attention_shape(const struct us_device_weights *weights,
                                                            enum us_prefill_attention_kind kind);

#endif
