/* engine.h: what the persistent kernel and the kernel-per-operation graph run: a list of operations on 8 token rows.
 *
 *     struct us_engine_launch launch = {.ranks = 1, .first = 0, .last = n, .rounds = 1, .rank[0] = {...}};
 *     us_engine_run(&launch, stream);                 // the whole list, resident: the engine
 *     for (i = 0; i < n; i++)
 *       launch.first = i, launch.last = i + 1, us_engine_run(&launch, stream);  // one kernel an operation: the graph
 *
 * Both give the same bits: they run the same device functions, and no sum depends on the number of blocks. The list is made
 * from a tile program (plan/program.h) by libcore/device/schedule.h. Plain data, the same on host and device.
 *
 * Roles of a block (20 warps, one block an SM): warps 0..15 compute; warp 16 streams weight pages into a ring that spans
 * operations and layers; warps 17 and 18 add the compute warps' partial sums, apply the epilogue and hand over, and bring activations
 * into the ring where they come that way: in turns for the experts' down projection, 17 alone for dense products of several row tiles;
 * warp 19 plans attention while the product before it runs.
 *
 * Row tiles: an operation has 8 rows (a pass of R rows has ceil(R / 8) row tiles, each its own operations), but where it says how many
 * row tiles it has: the experts of up to 8 row tiles are routed, multiplied and summed together (gather.cuh), and dense products multiply up to
 * 8 row tiles (wide.cuh), so that weights are streamed once; reductions of several wait once (reduce_wide.cuh).
 *
 * Operand: activations as the tensor cores' 8-column operand: bf16 times 2^64 (so that products with weights that are decoded to
 * bf16 times 2^-126 or 2^-120 are normal FP32 numbers; |x| < 2^63), group of 32 columns g, lane 4n + t: 16 bytes, token n,
 * columns 32g + {2t, 2t+1 | 2t+8, 2t+9 | 2t+16, 2t+17 | 2t+24, 2t+25}. us_engine_operand_* below. 512 bytes a group.
 *
 * Hand-offs: an operation is done when every block of its rank has added 1 to done[op]; a later one waits for that count.
 * Sums over ranks go by data that carries its own flag (exchange), and so do a router's logits and attended rows in lists of one row
 * tile: US_ENGINE_ABSENT until they are written. Counters start at 0 in every launch.
 */
#ifndef US_KERNELS_ENGINE_ENGINE_H
#define US_KERNELS_ENGINE_ENGINE_H

#include "base/hd.h"
#include "base/sample.h"
#include "base/speculate.h"
#include "formats/matrix.h"
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define US_ENGINE_ROWS      8   /* token rows of an operation */
#define US_ENGINE_MAX_ROWS  128 /* of a pass: 8 requests x 16 */
#define US_ENGINE_MAX_TILES (US_ENGINE_MAX_ROWS / US_ENGINE_ROWS)
#define US_ENGINE_MAX_RANKS 8
#define US_ENGINE_SEQUENCES 8 /* requests that run together */
#define US_ENGINE_MAX_TOPK  8 /* experts a row; 64 active in a row tile */
#define US_ENGINE_ACTIVE    (US_ENGINE_ROWS * US_ENGINE_MAX_TOPK)
#define US_ENGINE_GATHERED  8 /* row tiles whose experts are streamed together, at most */
#define US_ENGINE_SLOTS     (US_ENGINE_GATHERED * US_ENGINE_ACTIVE)
#define US_ENGINE_NONE      UINT32_MAX

#define US_ENGINE_COMPUTE_WARPS 16
#define US_ENGINE_STAGE_BYTES   34816 /* 16 pages of 2176 bytes */
#define US_ENGINE_DOWN_TOLD     240 /* of a stage of DOWN: what a block tells itself about it (down_stream.cuh) */
#define US_ENGINE_DOWN_BYTES    (US_ENGINE_STAGE_BYTES - US_ENGINE_DOWN_TOLD) /* for pages and activations */
#define US_ENGINE_GROUPS        12 /* groups of 32 columns that a compute warp keeps in registers, at most */

#define US_ENGINE_OPERAND_UNIT 0x1p64f
/* A value that has not arrived (a NaN); one that equals it is sent as another NaN. No two bf16 that are rounded make it: their NaN is 0x7fff. */
#define US_ENGINE_ABSENT 0xffffffffu

/* Byte offset of (token, column) in an operand of one row tile. */
static US_HD uint32_t us_engine_operand_offset(uint32_t token, uint32_t column) {
  uint32_t c = column % 32;
  return column / 32 * 512 + (token * 4 + c % 8 / 2) * 16 + (c / 16 * 2 + c / 8 % 2) * 4 + c % 2 * 2;
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

/* A packed matrix (kernels/pages/pages.h), or the experts of a layer one after the other. */
struct us_engine_matrix {
  const uint8_t *pages;
  uint64_t matrix_bytes; /* from one expert to the next */
  uint32_t tiles;        /* of 16 * halves rows */
  uint32_t slices;       /* pages a tile: K / (32 * groups) */
  uint32_t page_bytes;
  uint16_t groups; /* of 32 columns a page */
  uint8_t format;  /* enum us_format */
  uint8_t halves;  /* 16-row halves a tile: 1, or 2 (gate above up, or MXFP4 with rows % 32 == 0) */
};

/* ---- operations -------------------------------------------------------------------------------------------------- */

enum us_engine_kind {
  US_ENGINE_EMBED,     /* residual = embedding row (or the mask's), then as REDUCE without a sum */
  US_ENGINE_GEMM,      /* weights x operand, K split over the compute warps */
  US_ENGINE_DOWN,      /* sum over active experts of routing weight * down h, pushed to every rank */
  US_ENGINE_REDUCE,    /* residual += partial sums of all ranks in order; taps; norm; operand */
  US_ENGINE_ATTENTION, /* rotate, append K/V, attend, operand */
  US_ENGINE_ROUTE,     /* scores to chosen experts: the active list in every block's shared memory */
  US_ENGINE_CONTEXT,   /* K/V of committed rows into the drafter's cache */
  US_ENGINE_SELECT,    /* logits of all ranks to one token a row */
  US_ENGINE_ACCEPT,    /* end of a round: verify, commit, emit, set the rows of the next round */
  US_ENGINE_KINDS
};

/* "embed", "gemm", ... */
const char *us_engine_kind_name(enum us_engine_kind kind);

enum us_engine_epilogue {
  US_ENGINE_STORE, /* out: float (parts, 8, out_stride); column = output row, < valid */
  US_ENGINE_PUSH, /* to every rank's exchange at part rank * parts + part (gather: part 0), column first + row */
  US_ENGINE_SWIGLU,        /* halves 2: out: operand of F columns, one row tile */
  US_ENGINE_SWIGLU_EXPERT, /* halves 2, active experts: out: pairs, us_engine_pair_bytes(F) each */
};

/* One pair (row, chosen expert): inner activations in operand order of one token: group, t, 16 bytes; then padding, so that
 * neighbours copied together start in different banks. Pairs lie as struct us_engine_active numbers them. */
#define US_ENGINE_PAIR_PAD 64
static US_HD uint32_t us_engine_pair_bytes(uint32_t F) {
  return F * 2 + US_ENGINE_PAIR_PAD;
}

struct us_engine_gemm {
  struct us_engine_matrix w;
  const void *operand;   /* of this row tile; K / 32 groups */
  uint64_t operand_tile; /* several row tiles: bytes from one's operand to the next's */
  void *out;
  uint64_t out_tile;   /* several row tiles: bytes from one's output to the next's */
  uint32_t parts;      /* K is cut into so many parts, each a partial sum of its own */
  uint32_t warps;      /* compute warps that share a part: slices of a part = warps * subs */
  uint32_t subs;       /* stages a tile and part */
  uint32_t out_stride; /* STORE */
  uint32_t valid;      /* output rows that exist; rows of the last tile past it are padding */
  uint32_t first;      /* PUSH: column of output row 0 */
  uint32_t epilogue;   /* enum us_engine_epilogue */
  uint32_t exchange;   /* PUSH: of the REDUCE that adds it up; of the first row tile, the others follow */
  uint32_t route;      /* experts: the ROUTE operation, run again by a launch that starts here */
  uint32_t F;          /* SWIGLU_EXPERT: columns of a pair */
  bool gather;         /* PUSH: ranks hold different columns, not different sums */
  bool experts;        /* w is a layer's experts, the list of ROUTE says which */
  bool flagged;        /* STORE: no sum is US_ENGINE_ABSENT */
  bool awaits;         /* the operand is read until no word is US_ENGINE_ABSENT; nobody waits for `wait` */
};
/* Groups a page has at most: what 16 of them leave in a stage. */
#define US_ENGINE_PAGE_GROUPS(format, halves)                                                                \
  ((format) == US_FORMAT_MXFP4  ? 4                                                                          \
   : (format) == US_FORMAT_FP8  ? 4 / (halves)                                                               \
   : (format) == US_FORMAT_BF16 ? 2 / (halves)                                                               \
                                : 1)
/* Stages a tile and part, at most; F32, a small matrix whose code is long, is cut into more parts. */
#define US_ENGINE_MAX_SUBS(format, halves)                                                                   \
  ((format) == US_FORMAT_F32 ? 3 : US_ENGINE_GROUPS / US_ENGINE_PAGE_GROUPS(format, halves))

struct us_engine_down {
  struct us_engine_matrix w; /* tiles of 16 rows; an expert's (D, F) */
  const void *pairs;         /* (8 * top_k) pairs a row tile */
  uint32_t F;                /* of one rank */
  uint32_t step_slices;      /* slices a step: step_slices * groups <= 16 */
  uint32_t steps;            /* steps an expert: slices / step_slices */
  uint32_t
      stage_steps; /* steps a ring stage, 1 or 2; a step's pages of three tiles and 8 rows' activations fit a stage */
  uint32_t exchange; /* of the REDUCE that adds it up; of the first row tile, the others follow */
  uint32_t route;    /* the ROUTE operation, run again by a launch that starts here */
};

/* Partial sums cross between ranks as tensor-core accumulators lie: tile of 16 columns, lane, 4 floats. Index in (8, D). */
static US_HD uint32_t us_engine_fragment_index(uint32_t token, uint32_t column) {
  uint32_t r = column % 16;
  return column / 16 * 128 + (r % 8 * 4 + token / 2) * 4 + r / 8 * 2 + token % 2;
}

/* Columns that one block reduces and norms at a time. */
static US_HD uint32_t us_engine_slice(uint32_t D) {
  return D % 48 == 0 ? 48 : 32;
}

struct us_engine_reduce { /* also EMBED */
  float *residual;        /* (8, D) of this row tile; read and written */
  const float *weight;    /* (D) of the norm; NULL: no norm (and no operand) */
  void *operand;          /* normed rows */
  float *opt_plain;       /* (8, D): what was normed, for observers; NULL: not wanted */
  void *opt_tap;          /* operand of the drafter's features: this layer's D columns; NULL: not tapped */
  uint64_t operand_tile,
      tap_tile; /* several row tiles: bytes from one's to the next's; residuals lie one behind the other */
  float eps;
  uint32_t D;
  uint32_t addends; /* partial sums that arrive: ranks * parts; 1 if gathered; 0: EMBED */
  bool replace;     /* the sum replaces the residual (drafter context) */
  uint32_t
      exchange; /* which REDUCE or EMBED of a round, from 0 (both count); running index = launch.exchanges + round * exchanges_a_round + this,
                        slot = running index mod slots, a power of two */
  uint32_t draft;       /* EMBED: 1: rows of the drafter's block */
  uint32_t absent;      /* words of opt_absent */
  uint32_t *opt_absent; /* become US_ENGINE_ABSENT before others write them (flagged, awaits) */
};

/* Attention of one layer and row tile: of the target, or of the drafter's block. Rows of one sequence lie together in the pass, at
 * most 16, their positions ascend by 1. Target: a row sees the cache before the sequence's first row, and new keys up to its own,
 * which it appends. Draft: rows see the cache before the block's first position and the whole block. New keys come from the
 * projection: the qkv of the pass's row tiles lie one behind the other, and `wait` covers all that the rows' sequences touch
 * (target: up to this tile). */
struct us_engine_attention {
  const float
      *qkv;       /* (8, qkv_rows) as the projection stores it: [Q heads | K heads | V heads] of this rank */
  void *operand;  /* H * V columns */
  float *partial; /* us_engine_attention_partial_bytes, one for each row tile; layers may share it */
  uint32_t *arrivals; /* (us_engine_attention_counters), one for each row tile; zero before and after */
  const float *sink;  /* (H) or NULL */
  const float *q_norm, *k_norm; /* (Q) per-head norms of the drafter; NULL: none */
  const float *
      rope; /* (max_positions, rotary): row p is us_rope_table(theta, rotary, p): rotary / 2 cosines, as many sines */
  uint32_t
      ready; /* operation after which the pass's rows and the cached keys before them stand (target: ACCEPT; draft: the
                        * last CONTEXT): they are fetched before `wait`; US_ENGINE_NONE: only after it */
  uint32_t layer; /* of the cache's page tables */
  uint32_t qkv_rows;
  uint16_t H, G, Q, V,
      rotary;      /* of this rank; H / G <= 16 or a multiple of 16, Q <= 192, V <= 128 and a multiple of 8;
                                * rotary <= 64 or 128 */
  uint32_t window; /* 0: all */
  uint32_t page_count; /* pages of the layer's table: p lies in page p / 64 % page_count */
  float scale, value_scale, eps;
  bool draft; /* a block that sees itself whole; nothing is appended */
};

/* Sixteen query heads that share a KV head: what a tensor core's 16 rows hold of one token row. */
static US_HD uint32_t us_engine_attention_chunks(uint32_t H, uint32_t G) {
  return G * ((H / G + 15) / 16);
}
/* Counters of a row tile. */
static US_HD uint32_t us_engine_attention_counters(uint32_t H, uint32_t G) {
  return US_ENGINE_ROWS * us_engine_attention_chunks(H, G);
}
/* Partial results that a row's keys are cut into, at most: groups of 256 keys up to 4096 keys, segments of 1024 beyond; a window
 * may begin and end inside one, and a block is one more. */
#ifndef US_ENGINE_ATTENTION_GROUPED    /* tests cut otherwise: the same bits */
#define US_ENGINE_ATTENTION_TOGETHER 4 /* leaves of 64 keys that one block does at once, and closes the row */
#define US_ENGINE_ATTENTION_GROUPED  64 /* leaves up to which groups are what blocks work on */
#endif
static US_HD uint32_t us_engine_attention_pieces(uint32_t window, uint32_t max_positions) {
  uint32_t keys = window && window < max_positions ? window : max_positions;
  uint32_t groups = US_ENGINE_ATTENTION_GROUPED / 4 + 1, segments = keys / 1024 + 2;
  return (segments > groups ? segments : groups) + 1;
}
/* Floats of one partial result: 16 sums of V, their maxima and denominators. */
static US_HD uint32_t us_engine_attention_piece(uint32_t V) {
  return 16 * (V + 2);
}
/* Bytes of `partial` of a row tile. */
static US_HD uint64_t us_engine_attention_partial_bytes(uint32_t H, uint32_t G, uint32_t V, uint32_t window,
                                                        uint32_t max_positions) {
  return (uint64_t)us_engine_attention_counters(H, G) * us_engine_attention_pieces(window, max_positions) *
         us_engine_attention_piece(V) * sizeof(float);
}

struct us_engine_route {
  const float *logits; /* (parts, 8, stride) */
  const float *bias;   /* (E) added for choosing */
  uint32_t parts, stride, E, top_k;
  float scaling;
  bool normalise;
  bool
      uniform; /* draw experts from Philox instead (key: uniform_seed ^ request seed; counter: position, sample, layer) */
  uint64_t uniform_seed;
  uint32_t
      *opt_routed; /* (8 a row tile, top_k) ascending ids, for statistics and observers; NULL: not wanted */
  /* Several row tiles: each is a block's to choose for, and all blocks read what it chose. */
  uint64_t logits_tile; /* floats from one's logits to the next's */
  uint64_t *choices;    /* (rows, 8) routing weight | running << 32 | expert << 48: who waits for `running` */
  uint32_t exchange;    /* of the first row tile's REDUCE, which makes the running number */
  bool flagged;         /* logits are read until none is US_ENGINE_ABSENT; nobody waits for `wait` */
};

/* Drafter context: K and V of committed rows (slot < the sequence's committed) into every layer of the drafter's cache. */
struct us_engine_context {
  const float *kv;     /* (8, layers * (G*Q + G*V)): layer after layer, K heads, then V heads */
  const float *k_norm; /* (layers, Q) or NULL */
  const float *rope;   /* as in us_engine_attention */
  uint32_t layers;
  uint16_t G, Q, V, rotary;
  uint32_t page_count;
  float value_scale, eps;
};

/* Logits of 8 rows to tokens: a row tile's, or with a Markov head a slot's of all sequences, slot after slot in one operation. The target's
 * SELECTs also carry what the host wants (mailbox) from rank 0 to all ranks. */
struct us_engine_select {
  float
      *logits; /* (8, stride): this rank's share of the vocabulary; a Markov head's part is added in place */
  uint32_t stride;       /* floats from one of the eight rows to the next */
  uint32_t count, first; /* ids [first, first + count) */
  uint32_t vocab;
  uint32_t row, step, rows; /* rows of the pass: row, row + step, ..., eight at most, below `rows` */
  uint32_t number;          /* of its place in rank.select, < US_ENGINE_SELECTS */
  uint32_t
      slots; /* with a Markov head: from `row` on, each with its own place, `number` and those after it; 0: none */
  const uint16_t *before,
      *after;      /* Markov head (model/markov.h): bf16 (vocab, markov) and this rank's (count, markov) */
  uint32_t markov; /* rank of it, a multiple of 32, at most US_ENGINE_MARKOV; 0: none */
  bool
      draft; /* proposals: argmax, or draws for rules REJECT and BLOCK; else the target's draw of each row with its sequence's
               * sampling */
  bool last; /* rows of the pass: after the drafter's it is decided how many proposals are verified */
};
#define US_ENGINE_SELECTS 32
#define US_ENGINE_MARKOV  256

/* The row of the pass that is row r of the eight; US_ENGINE_NONE: none. */
static US_HD uint32_t us_engine_select_row(const struct us_engine_select *s, uint32_t r) {
  uint32_t row = s->row + r * s->step;
  return row < s->rows ? row : US_ENGINE_NONE;
}

/* Waits for the target's last SELECT. What REJECT, BLOCK and log-probabilities need to know of the rows' laws is found here. */
struct us_engine_accept {
  uint32_t vocab, tiles;
  const float *logits,
      *opt_draft_logits; /* (tiles * 8, stride): this rank's share; a draft row's slot is one above its target's */
  uint32_t stride, count, first; /* as in us_engine_select */
};

struct us_engine_op {
  uint16_t kind;    /* enum us_engine_kind */
  uint16_t program; /* enum us_engine_program */
  uint32_t layer;   /* US_LAYER_NONE outside the layers */
  uint32_t task_op; /* enum us_task_op of the tile program, for profiles */
  uint32_t row_tile;
  uint32_t row_tiles; /* from row_tile on: 1, or of ROUTE, products and reductions up to US_ENGINE_GATHERED */
  uint32_t
      wait; /* op whose output is read, US_ENGINE_NONE: the launch's start; of the round before if not earlier */
  uint32_t shift; /* < 2^21: the block that takes tile 0: spreads the remainders of consecutive operations */
  uint64_t bytes; /* weights it streams on this rank; of one active expert for expert operations */
  union {
    struct us_engine_gemm gemm;
    struct us_engine_down down;
    struct us_engine_reduce reduce;
    struct us_engine_attention attention;
    struct us_engine_route route;
    struct us_engine_context context;
    struct us_engine_select select;
    struct us_engine_accept accept;
  };
};

/* Parts of a round's list, in this order; any may be empty. */
enum us_engine_program {
  US_ENGINE_PASS_CONTEXT,
  US_ENGINE_PASS_DRAFT,
  US_ENGINE_PASS_TARGET,
  US_ENGINE_PASSES
};

/* ---- state of the rows and requests ------------------------------------------------------------------------------ */

/* A row of a pass. */
struct us_engine_row {
  int32_t token; /* US_ENGINE_MASK: the drafter's mask */
  uint32_t position;
  uint32_t sequence; /* US_ENGINE_NONE: the row does not exist */
  uint32_t slot;     /* 0: the anchor, i: the i-th draft of its block */
};
#define US_ENGINE_MASK (-1)

/* Page tables of a sequence's cache: byte offsets into the pool, the same on every rank (a rank's page holds its own KV
 * heads). A page is 64 positions: K bf16 (G, 64, us_engine_k_stride(Q)), zero beyond Q, then V bf16 transposed (G, V, 64). */
struct us_engine_kv {
  const uint64_t *const
      *tables; /* (layers) each (page_count): offsets of pages, in bytes of this rank's pool */
};

static US_HD uint32_t us_engine_k_stride(uint32_t Q) {
  return (Q + 31) / 32 * 32;
}
static US_HD uint32_t us_engine_v_offset(uint32_t G, uint32_t Q) { /* of V in a page, bytes */
  return G * 64 * us_engine_k_stride(Q) * 2;
}
static US_HD uint32_t us_engine_page_bytes(uint32_t G, uint32_t Q, uint32_t V) {
  return (us_engine_v_offset(G, Q) + G * V * 64 * 2 + 255) / 256 * 256;
}

/* A request's sample while it runs; every rank holds a copy and computes the same. The host fills it while no launch runs, the
 * page tables on each rank with that rank's, then calls us_engine_begin_round (engine/round.h) for its first rows. */
struct us_engine_sequence {
  uint32_t active;   /* 0: free or ended */
  uint32_t id;       /* of the request's sample, for the token ring */
  int32_t anchor;    /* last committed token */
  uint32_t position; /* of the anchor */
  uint32_t limit;    /* of the last token that may be committed; position < limit while active */
  uint32_t sample;
  uint64_t seed;
  struct us_sampling sampling;
  uint32_t most_drafts; /* proposals a round, at most: block - 1; 0 without drafter or replay */
  uint32_t drafts;      /* proposals of this round: fewer than most_drafts near the limit */
  uint32_t committed;   /* rows of the last target pass whose taps become context */
  uint32_t stop_count;
  int32_t stop[16];
  const int32_t *replay; /* device: recorded tokens proposed instead of the drafter's; NULL: drafter */
  uint32_t replay_first, replay_count; /* position of replay[0]; past the record's end token 0 is proposed */
  float accept[16]; /* replay: rate at which slot i (from 0: the first draft) proposes the recorded token */
  uint32_t rule;    /* enum us_verify_rule; what it says at temperature 0 does not matter */
  bool logprobs;    /* events have log-probabilities */
  struct us_engine_kv kv, draft_kv;
};

/* The law of a row of logits, but for its sampling: the largest logit, and the cut that filters make (struct us_cut). */
struct us_engine_law {
  float max;
  uint32_t key, last;
};

/* Everything that changes from round to round on one rank. Row i of a pass is slot i % block of sequence i / block, in all three
 * row tables; sequences * block <= US_ENGINE_MAX_ROWS. */
struct us_engine_state {
  struct us_engine_sequence sequence[US_ENGINE_SEQUENCES];
  struct us_engine_row target[US_ENGINE_MAX_ROWS], draft[US_ENGINE_MAX_ROWS], context[US_ENGINE_MAX_ROWS];
  int32_t proposal[US_ENGINE_MAX_ROWS]; /* by row of the drafter's pass: SELECT of the drafter */
  int32_t drawn
      [US_ENGINE_MAX_ROWS]; /* by row of the target's pass: SELECT of the target; -1: logits that are not finite */
  uint32_t block;           /* rows a sequence, 1 to 16 */
  uint32_t round; /* ACCEPTs since the buffers were made: never goes back, flags of SELECT are made from it */
  uint32_t live;  /* active sequences */
  uint32_t events; /* written to the ring so far */
  uint32_t park,
      cancel;    /* the host's wish as rank 0 saw it in this round's last SELECT: the same on every rank */
  uint32_t stop; /* of the last ACCEPT: no further round, because a sequence ended, none is live, or park */
  /* Of rows that are drawn in the kernel with filters: the target's, the drafter's; the drafter's largest probability. */
  struct us_engine_law law[US_ENGINE_MAX_ROWS], draft_law[US_ENGINE_MAX_ROWS];
  float confidence[US_ENGINE_MAX_ROWS];
  uint32_t adaptive; /* verify only as many proposals as pay, by `cost` */
  struct us_verify_cost cost;
  uint64_t experts; /* active experts summed over MoE layers and row tiles */
  uint64_t expert_layers;
};

/* What a round did to one sequence. */
enum us_engine_finish {
  US_ENGINE_GOES_ON,
  US_ENGINE_STOP,      /* a stop token: the last of the event's */
  US_ENGINE_LENGTH,    /* the limit */
  US_ENGINE_CANCELLED, /* the mailbox said so; the round's tokens are valid */
  US_ENGINE_BROKEN,    /* the logits of the token after the event's last are not finite */
};
struct us_engine_event {
  uint32_t id, round, count; /* tokens committed */
  uint32_t finish;           /* enum us_engine_finish */
  uint32_t accepted,
      drafts; /* proposals that survived (a stop among them may leave fewer tokens), and that were verified */
  uint64_t time; /* globaltimer, ns */
  int32_t token[16];
  bool has_logprobs;
  float logprob[16];
};

/* The same on its way: every word carries the event's number + 1 in its upper half, so rank 0 stores them without a fence and
 * the host takes an event when all words have arrived. */
#define US_ENGINE_EVENT_WORDS 40
#define US_ENGINE_EVENTS      4096 /* of the ring; event n is at n % US_ENGINE_EVENTS */
struct us_engine_event_words {
  uint64_t word[US_ENGINE_EVENT_WORDS];
};

/* Mapped host memory that rank 0 and the host share, all zero at first. The kernel reads the first 16 bytes once a round, in one
 * load. It never waits for the host: when the ring has no room for two more rounds it ends after this one. */
struct us_engine_mailbox {
  volatile uint32_t park;   /* end after this round */
  volatile uint32_t cancel; /* bit i ends sequence i after this round; cleared when no launch runs */
  volatile uint32_t read;   /* events taken */
  uint32_t unused;
  uint64_t gap[14];
  struct us_engine_event_words event[US_ENGINE_EVENTS];
};

/* Where a role of a block waits when the watchdog fires. */
struct us_engine_stuck {
  uint32_t op, what; /* what: enum us_engine_wait */
  uint32_t round, index;
  uint64_t have, want;
};
enum us_engine_wait {
  US_ENGINE_WAIT_NOTHING,
  US_ENGINE_WAIT_DONE,     /* hand-off: an operation's count */
  US_ENGINE_WAIT_STAGE,    /* weights in the ring */
  US_ENGINE_WAIT_FREE,     /* a free stage */
  US_ENGINE_WAIT_SUMS,     /* compute warps' partial sums, or their buffer */
  US_ENGINE_WAIT_EXCHANGE, /* a rank's partial sum */
  US_ENGINE_WAIT_NORM,     /* another block's part of a sum of squares */
  US_ENGINE_WAIT_ROUTE,    /* the active list */
  US_ENGINE_WAIT_SELECT,   /* another block's or rank's best token */
  US_ENGINE_WAIT_ROUND,    /* the end of a round */
};
/* Compute, stream, epilogue; the planning warp reports as an epilogue warp. */
#define US_ENGINE_ROLES 3

/* ---- profile ----------------------------------------------------------------------------------------------------- */

/* One interval of one role of one block, which stores it in one go. */
struct us_engine_span {
  uint64_t begin;    /* globaltimer ns */
  uint32_t ns;       /* how long */
  uint16_t op, what; /* what: enum us_engine_wait; NOTHING: the operation, its waits included */
};
struct us_engine_profile {
  struct us_engine_span *spans; /* (blocks, US_ENGINE_ROLES, capacity) */
  uint32_t *counts;             /* (blocks, US_ENGINE_ROLES) spans seen, also those that found no room */
  uint32_t capacity;
  uint32_t first; /* rounds of a launch before it are not recorded: the clocks come up */
  /* us_engine_profiled: the kernel that records; the usual one has nothing of it. */
  const void *(*kernel)(bool several);
};

/* The kernel that knows operations of several row tiles (engine_several.cu); `unfiltered` as in us_engine_launch. */
const void *us_engine_several(bool unfiltered);

/* Only a program that profiles carries these kernels (engine_profile.cu, engine_profile_several.cu): of lists that may have operations of
 * several row tiles, or not. */
const void *us_engine_profiled(bool several);
const void *us_engine_profiled_several(void);

/* ---- launch ------------------------------------------------------------------------------------------------------ */

/* Counters of an operation: one a part of a product, if it has few, and one of its first experts. */
#define US_ENGINE_PARTS    4
#define US_ENGINE_EARLY    US_ENGINE_PARTS
#define US_ENGINE_COUNTERS 8

/* One rank: pointers into the memory of its GPU, peers' where it says so. */
struct us_engine_rank {
  uint32_t rank, ranks;
  uint32_t blocks; /* of the launch, for this rank */
  const struct us_engine_op *ops;
  uint32_t *done; /* (ops) zero at the launch */
  /* (ops, US_ENGINE_COUNTERS) Zero before the first launch. Of each part of a product: tiles that blocks have asked for, zero again when
   * all have done so. They ask before they wait for anything, so a round's last operation waits for all of its products. And how many
   * epilogue warps have done with the experts that DOWN begins with; zero at a launch of several operations. */
  uint32_t *claimed;
  struct us_engine_state *state;
  float *exchange
      [US_ENGINE_MAX_RANKS]; /* every rank's: (slots, addends, 8 * D by us_engine_fragment_index), ABSENT before use */
  uint32_t slots, addends,
      D; /* slots: a power of two, at least 3 a row tile. A rank may push an exchange while another still empties those of the norm
                               * before, and an EMBED between the two takes numbers without sums; fewer are refused by the
                               * proof in device/schedule_order.c, which follows who knows what from whose sums */
  uint64_t *norm;      /* (2, norm_tiles, 8, D / slice) {float bits, running index} */
  uint32_t norm_tiles; /* row tiles of a pass: exchanges from one of a row tile to its next; 0 is 1 */
  void *select[US_ENGINE_MAX_RANKS]; /* every rank's: us_engine_select_bytes, zero before round 0 */
  uint32_t selects;                  /* places in it: one a SELECT of a round, of a Markov head one a slot */
  const uint8_t *kv_pool, *draft_pool; /* pages of this rank */
  const uint16_t *embed
      [US_ENGINE_MAX_RANKS]; /* every rank's rows of the bf16 embedding: token / embed_rows is the rank */
  uint32_t embed_rows;
  const float *mask_embedding; /* (D) */
  /* Every rank's (row tiles * 8, vocab): target logits of all ranks, for top-k, top-p and min-p. NULL if ranks is 1 (the
   * operation's logits are whole) or no request filters. */
  float *logits_all[US_ENGINE_MAX_RANKS];
  struct us_engine_mailbox *mailbox; /* rank 0: wherever a target's SELECT or an ACCEPT runs */
  struct us_engine_stuck *stuck;     /* mapped: (blocks of the launch, US_ENGINE_ROLES) */
};

/* A rank's buffer for SELECT and ACCEPT: counts that blocks of the rank exchange while they filter (parts of 16 bytes: 8 groups,
 * slots, parts, words); then for every place of a SELECT the candidates of all blocks of all ranks (128 bytes each, and 128 for what
 * the host wants, or for what filtered rows drew); then as many places for sums of all blocks of all ranks: a row tile's laws, or how sure
 * the drafter is of a SELECT's rows. `blocks`: of one rank. Each is used again one round later, when every rank has passed the ACCEPT between. */
#define US_ENGINE_HOP_WORDS 256 /* counts of a radix pass */
#define US_ENGINE_HOP_SLOTS 3
#define US_ENGINE_HOP_PARTS 16 /* blocks that filter a row together, at most */
#define US_ENGINE_HOP_BYTES                                                                                  \
  ((uint64_t)US_ENGINE_ROWS * US_ENGINE_HOP_SLOTS * US_ENGINE_HOP_PARTS * US_ENGINE_HOP_WORDS * 16)
static US_HD uint64_t us_engine_candidate_bytes(uint32_t ranks, uint32_t blocks) { /* of one SELECT */
  return ((uint64_t)ranks * blocks + 1) * US_ENGINE_ROWS * 16;
}
/* What blocks tell of a row tile's laws (sums.cuh), words a row: masses and the token's weights; what a residual draws; the mass of a
 * drafter's row. */
#define US_ENGINE_MASSES   6
#define US_ENGINE_EMISSION 3
#define US_ENGINE_SURE     1
static US_HD uint64_t us_engine_sums_bytes(uint32_t ranks, uint32_t blocks) { /* of a row tile */
  return (uint64_t)ranks * blocks * US_ENGINE_ROWS *
         (US_ENGINE_MASSES + US_ENGINE_EMISSION + US_ENGINE_SURE) * 16;
}
/* selects: places, no fewer than row tiles. */
static US_HD uint64_t us_engine_select_bytes(uint32_t ranks, uint32_t blocks, uint32_t selects) {
  return US_ENGINE_HOP_BYTES +
         selects * (us_engine_candidate_bytes(ranks, blocks) + us_engine_sums_bytes(ranks, blocks));
}

struct us_engine_launch {
  uint32_t ranks;       /* on this GPU */
  uint32_t first, last; /* operations [first, last) of every rank's list */
  uint32_t rounds;      /* repetitions, at most; the engine stops early when no sequence is live or on park */
  uint32_t
      exchanges; /* running index of exchange 0: REDUCE and EMBED operations executed before, less those of the list before `first` */
  uint32_t exchanges_a_round; /* of the whole list */
  bool several;               /* the lists may have operations of several row tiles: a kernel of their own */
  bool unfiltered; /* us_engine_is_simple (round.h): a kernel whose streaming loops have more registers */
  uint32_t jitter; /* test: random delays of up to so many ns before every hand-off; 0: none */
  bool
      resident; /* measuring: rounds after the first multiply what already lies in the ring, copying no weights */
  uint64_t timeout_ns;              /* watchdog of one wait; us_engine_run makes 0 five seconds */
  struct us_engine_profile profile; /* spans NULL: off */
  struct us_engine_rank rank[US_ENGINE_MAX_RANKS];
};

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#else
typedef struct CUstream_st *cudaStream_t;
#endif

/* Launch on the current device: one block an SM, shared among the ranks. `launch` is copied. Returns a cudaError_t. */
int us_engine_run(const struct us_engine_launch *launch, cudaStream_t stream);

/* Blocks of a launch on the current device for `ranks` ranks, in all; a multiple of ranks. Negative: a cudaError_t. */
int us_engine_blocks(uint32_t ranks);

#ifdef __cplusplus
}
#endif
#endif
