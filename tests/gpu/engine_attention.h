/* engine_attention.h: what the attention test's parts share: cases, a world of sequences on host and device, the oracle.
 *
 *     struct world w;
 *     world_make(&w, &shape, {{0, 300}, {0, 301}, {1, 7}}, seed);   // rows of the pass: sequence, position
 *     world_run(&w, {.blocks = 132});                               // fake projection, then attention of every row tile
 *     world_outputs(&w);                                            // (rows, H * V), and the pool, from the device
 *     oracle(&w, mistake, expected, magnitude);                     // double precision
 *
 * The host keeps its own copy of the pool and appends to it as the definition says. Whatever no row sees is NaN.
 */
#ifndef US_TESTS_GPU_ENGINE_ATTENTION_H
#define US_TESTS_GPU_ENGINE_ATTENTION_H

#include "kernels/engine/engine.h"
#include "lab.h"

#define ATTENTION_LAYERS 2 /* the last is used, the other's pages are NaN */

/* Launches of the test's kernel; the second cuts keys otherwise. Return when queued. */
typedef void attention_launch_fn(const struct us_engine_launch *launch, unsigned blocks, uint64_t delay_ns);
attention_launch_fn attention_launch_engine, attention_launch_segments;

struct attention_shape {
  const char *name;
  uint32_t Q, V, H, G, rotary, window;
  bool sink, draft;
};

#define ATTENTION_ABSENT US_ENGINE_NONE
struct attention_row {
  uint32_t sequence, position;
};

struct world {
  struct attention_shape s;
  std::vector<struct attention_row> rows; /* of the pass, padded to whole row tiles */
  uint32_t sequences, positions, page_count, page_bytes, qkv_rows, tiles;
  float scale, value_scale, eps;
  std::vector<uint16_t> pool_first, pool; /* what the device begins with; what it should hold */
  std::vector<uint64_t> table;            /* (sequences, layers, page_count) byte offsets */
  std::vector<float> qkv, rope, sink, q_norm, k_norm;
  std::vector<float> out; /* (rows, H * V) of the device */
  std::vector<uint16_t> pool_out;
  struct us_engine_rank rank; /* device pointers */
  struct us_engine_op *ops;
  uint8_t *d_pool, *d_operand;
  float *d_qkv, *d_source;
  uint32_t *d_arrivals;
  std::vector<void *> owned;
};

struct run_options {
  attention_launch_fn *launch = attention_launch_engine;
  unsigned blocks = 132;
  bool early = true;        /* fetch before the projection is done */
  uint64_t delay_ns = 5000; /* of the projection */
  uint32_t jitter = 0, shift = 0;
  int only = -1;     /* the one row that exists */
  bool reset = true; /* the pool */
};

void world_make(struct world *w, const struct attention_shape *s, std::vector<struct attention_row> rows,
                uint64_t seed);
void world_free(struct world *w);
void world_upload_qkv(struct world *w);
void world_run(struct world *w, struct run_options o);
/* Rows and pool from the device; false if a counter did not go back to 0. */
bool world_outputs(struct world *w);

/* Mistakes that an oracle can make. */
struct mistake {
  bool no_sink = false, theta = false;
  int values = 0; /* a key's value is that of so many keys later */
  int window = 0; /* added */
};

/* Append the rows' keys and values, times a power of two, to the host's pool. Once. */
void oracle_append(struct world *w, uint32_t layer, float keys, float values);
/* expected, magnitude (rows, H * V): the output, and the sum of weight times |value|. */
void oracle(const struct world *w, struct mistake m, std::vector<double> *expected,
            std::vector<double> *magnitude);

/* engine_attention_time.cu: microseconds of an operation among others: rows of each sequence, sequences * rows <= 8. */
struct attention_load {
  uint32_t position, sequences, rows;
};
void attention_time(const struct attention_shape *s, struct attention_load load);

#endif
