/* lab_engine.h: lists of engine operations made by hand, for the kernel lab: weights, operands, runs, and sums in double.
 *
 *     struct lab_weights w = lab_weights(US_FORMAT_FP8, 6784, 6144);   // rows, columns
 *     lab_weights_make(&w, seed);                                      // on the device: row-major, and packed into pages
 *     struct lab_run run;
 *     lab_run_begin(&run, (struct lab_ranks){.count = 1, .D = 6144, .addends = 1});
 *     lab_add_gemm(&run, 0, &w, 0, operand, out, US_ENGINE_STORE);     // operation 0 of rank 0
 *     lab_launch(&run, 1);                                             // the whole list, one round
 *     struct lab_sum s = lab_dot(&w.cut, row, x);                      // what (row, x) gives, and how far it may be off
 *
 * Buffers of a run live until lab_run_end. A launch that fails says where every role of every block stood, and ends the program.
 */
#ifndef US_TESTS_GPU_LAB_ENGINE_H
#define US_TESTS_GPU_LAB_ENGINE_H

#include "kernels/engine/engine.h"
#include "kernels/pages/pages_gpu.h"
#include "lab.h"

#define LAB_UNIT  0x1p-24 /* half an ulp of FP32 */
#define LAB_TRUNC 0x1p-22 /* what a sum in the tensor cores may lose of its largest term */

/* ---- weights ------------------------------------------------------------------------------------------------------ */

/* How K is cut: slice ((part * subs + j) * warps + warp) of groups * 32 columns belongs to that warp. */
struct lab_cut {
  enum us_format format;
  uint32_t groups, warps, subs, parts;
};

/* `count` equal matrices on the device. */
struct lab_weights {
  enum us_format format;
  uint32_t rows, cols, count, parts;
  bool gated;       /* gate above up, each (rows / 2, cols) */
  bool large_pages; /* as the engine's weights are cut; else smaller ones if more warps work on them */
  float half;       /* weights are uniform in +- half; 0: variance of a product with unit rows is 1 */
  uint8_t *codes[2], *scales[2]; /* as a checkpoint has them: gate and up, or one */
  struct us_pages pages;
  struct us_engine_matrix matrix;
  struct lab_cut cut; /* of a GEMM */
};

struct lab_weights lab_weights(enum us_format format, uint32_t rows, uint32_t cols);
/* tile_rows 16 or 32; 0: 32 where MXFP4's rows or gate and up allow it. */
void lab_weights_make(struct lab_weights *w, uint64_t seed, uint32_t tile_rows = 0);
void lab_weights_free(struct lab_weights *w);

enum lab_mutation {
  LAB_NONE,
  LAB_SCALE,  /* a scale one step up: MXFP4's byte + 1, FP8's times 1 + 2^-7 */
  LAB_SKIP,   /* 32 columns left out */
  LAB_SWAP,   /* neighbouring columns swapped */
  LAB_COARSE, /* FP32 weights rounded to bf16 */
  LAB_MUTATIONS
};
extern const char *const lab_mutation_names[LAB_MUTATIONS];
/* Whether such a mistake exists in that format. */
bool lab_mutation_applies(enum lab_mutation mutation, enum us_format format);

/* Row `row` of gate (kind 0) or up (kind 1) of matrix `index`, as it is stored, exact in double. */
std::vector<double> lab_row(const struct lab_weights *w, uint32_t index, uint32_t kind, uint32_t row,
                            enum lab_mutation mutation);

/* ---- truth -------------------------------------------------------------------------------------------------------- */

/* A product: its value, the sum of |w x|, and what the engine's order of sums may err by. */
struct lab_sum {
  double value, magnitude, allowed;
};
struct lab_sum lab_dot(const struct lab_cut *cut, const double *w, const float *x);

/* One multiply of 16 columns into `sum`: returns what it may lose, adds to the sum of |w x|. */
double lab_multiply(double *sum, const double *w, const float *x, double *magnitude);

double lab_silu(double g);
/* What silu(g) u, rounded to bf16, may differ by. */
double lab_gated_allowed(const struct lab_sum *g, const struct lab_sum *u);

/* 8 rows of bf16 values: ordinary, one of 1e5, one of 1e-6, one with a single outlier. */
std::vector<float> lab_rows(size_t K, uint64_t *state);
/* (8, K) rows into an operand on the device. */
void *lab_operand(const std::vector<float> &x, uint32_t K);
/* And back. */
std::vector<float> lab_operand_rows(const void *operand, uint32_t K);
/* A pair's F values. */
std::vector<float> lab_pair_row(const void *pairs, uint32_t pair, uint32_t F);

/* ---- runs --------------------------------------------------------------------------------------------------------- */

struct lab_ranks {
  uint32_t count = 1;
  bool apart = false; /* each rank is alone and does the same work */
  uint32_t D, addends = 1, slots = 2;
};

struct lab_run {
  struct us_engine_launch launch;
  struct lab_ranks shape;
  std::vector<struct us_engine_op> ops[US_ENGINE_MAX_RANKS];
  uint32_t exchanges[US_ENGINE_MAX_RANKS]; /* REDUCE and EMBED operations listed so far */
  uint32_t items;                          /* tiles listed so far: where the next operation starts */
  struct us_engine_state *state[US_ENGINE_MAX_RANKS];
  std::vector<void *> owned;
};

void lab_run_begin(struct lab_run *run, struct lab_ranks shape);
void lab_run_end(struct lab_run *run);

/* Device memory of the run, every byte `fill`. */
void *lab_buffer(struct lab_run *run, size_t bytes, int fill);
template <class T> static T *lab_keep(struct lab_run *run, T *device) {
  run->owned.push_back((void *)device);
  return device;
}

/* Rows whose bit is set exist, in sequence 0, tokens 0..7 at positions 100..107. */
void lab_set_rows(struct lab_run *run, uint32_t mask);

/* Append to a rank's list; return the operation's index. It waits for the one before it, the first for the last of the round
 * before. */
uint32_t lab_add(struct lab_run *run, uint32_t rank, struct us_engine_op op);
/* out: (parts, 8, rows) STORE, operand SWIGLU, pairs SWIGLU_EXPERT. */
uint32_t lab_add_gemm(struct lab_run *run, uint32_t rank, const struct lab_weights *w, uint32_t index,
                      const void *operand, void *out, enum us_engine_epilogue epilogue);
uint32_t lab_add_reduce(struct lab_run *run, uint32_t rank, struct us_engine_reduce reduce);
uint32_t lab_add_route(struct lab_run *run, uint32_t rank, struct us_engine_route route, uint32_t layer);
/* Slices of an expert that a step of DOWN takes. */
uint32_t lab_down_slices(const struct lab_weights *w);
/* Experts `first`.. of w by the list of operation `route`: gate and up into pairs, and down from pairs. */
uint32_t lab_add_up(struct lab_run *run, uint32_t rank, const struct lab_weights *w, uint32_t first,
                    const void *operand, void *pairs, uint32_t route);
uint32_t lab_add_down(struct lab_run *run, uint32_t rank, const struct lab_weights *w, uint32_t first,
                      const void *pairs, uint32_t route);
static inline struct us_engine_op *lab_op(struct lab_run *run, uint32_t rank, uint32_t op) {
  return &run->ops[rank][op];
}

/* The lists to the device, after the last change of them. Not chained: no operation waits for another. */
void lab_upload_ops(struct lab_run *run, bool chained = true);
/* Queue the whole list. */
cudaError_t lab_fire(struct lab_run *run, uint32_t rounds);
/* The same, and wait for it. */
void lab_launch(struct lab_run *run, uint32_t rounds);
/* One operation alone, as the graph does. */
void lab_launch_one(struct lab_run *run, uint32_t op);
/* All of them so. */
void lab_launch_each(struct lab_run *run);
/* Microseconds of one round, steady. */
double lab_round_us(struct lab_run *run, uint32_t rounds);
/* The same on pages that already lie in shared memory: what the multiplying alone takes. */
double lab_resident_us(struct lab_run *run, uint32_t rounds);

/* ---- the parts ---------------------------------------------------------------------------------------------------- */

void lab_gemm(uint64_t seed);
void lab_route(uint64_t seed);
void lab_experts(uint64_t seed);
void lab_gather(uint64_t seed);
void lab_wide(uint64_t seed);
void lab_reduce(uint64_t seed);
void lab_chain(uint64_t seed);

#endif
