/* lab_engine.cu: weights made and packed on the device, the truth about their products, lists of operations and their launches.
 *
 * Contents: weights; truth; runs; operations; launches. */
#include "lab_engine.h"

#include "device/operand.h"

#include <cstring>

#define LAB_SHIFTS (1u << 20) /* engine.h: a shift is below 2^21 */

/* ---- weights ------------------------------------------------------------------------------------------------------ */

struct lab_weights lab_weights(enum us_format format, uint32_t rows, uint32_t cols) {
  struct lab_weights w = {};
  w.format = format, w.rows = rows, w.cols = cols, w.count = w.parts = 1;
  return w;
}

/* Groups of 32 columns of the largest pages that divide so many: what device/weights_layout.c gives the engine. */
static uint32_t largest_page(enum us_format format, uint32_t halves, uint32_t groups) {
  uint32_t g = US_ENGINE_PAGE_GROUPS(format, halves);
  while (groups % g || (format == US_FORMAT_FP8 && g == 3)) g--;
  return g;
}

/* The most warps, then the largest pages; or the largest pages, then the most warps. */
static struct lab_cut choose_cut(const struct lab_weights *w, uint32_t halves) {
  struct lab_cut best = {};
  uint32_t most = US_ENGINE_PAGE_GROUPS(w->format, halves), groups = w->cols / 32 / w->parts;
  uint32_t subs = US_ENGINE_MAX_SUBS(w->format, halves);
  for (uint32_t g = w->large_pages ? largest_page(w->format, halves, groups) : 1; g <= most; g++)
    for (uint32_t warps = 1; warps <= US_ENGINE_COMPUTE_WARPS; warps++) {
      if (groups % (g * warps) || groups / (g * warps) > subs) continue;
      if (w->format == US_FORMAT_FP8 && g == 3) continue; /* would cut blocks of 128 */
      if (warps * g < best.warps * best.groups ||
          (warps * g == best.warps * best.groups && warps < best.warps))
        continue;
      best = {w->format, g, warps, groups / (g * warps), w->parts};
    }
  if (!best.warps) fprintf(stderr, "no cut of %u columns in %u parts\n", w->cols, w->parts), exit(3);
  return best;
}

static size_t code_bytes(const struct lab_weights *w) {
  return us_matrix_data_bytes(w->format, w->gated ? w->rows / 2 : w->rows, w->cols);
}

static size_t scale_bytes(const struct lab_weights *w) {
  return us_matrix_scale_bytes(w->format, w->gated ? w->rows / 2 : w->rows, w->cols, 0);
}

static void make_codes(struct lab_weights *w, uint32_t kind, uint64_t seed) {
  uint32_t rows = w->gated ? w->rows / 2 : w->rows;
  std::vector<struct us_init> inits(w->count);
  for (uint32_t i = 0; i < w->count; i++) {
    char name[64];
    snprintf(name, sizeof name, "lab.%u.%u.%u.%u", w->rows, w->cols, kind, i);
    inits[i] = {us_philox_key(seed), us_init_name(name), 0, w->half};
  }
  struct us_init *device = lab_upload(inits);
  US_CUDA(cudaMalloc(&w->codes[kind], code_bytes(w) * w->count));
  if (scale_bytes(w)) US_CUDA(cudaMalloc(&w->scales[kind], scale_bytes(w) * w->count));
  US_CUDA(
      us_synthetic_gpu(w->format, device, w->count, rows, w->cols, 0, w->codes[kind], w->scales[kind], 0));
  US_CUDA(cudaDeviceSynchronize());
  US_CUDA(cudaFree(device));
}

static struct us_pages_source source_of(const struct lab_weights *w, uint32_t index) {
  struct us_pages_source source = {};
  source.matrices = w->gated ? 2 : 1;
  for (uint32_t kind = 0; kind < source.matrices; kind++) {
    struct us_matrix *m = &source.w[kind];
    m->format = w->format, m->rows = w->rows / source.matrices, m->cols = w->cols;
    m->data = w->codes[kind] + index * code_bytes(w);
    if (w->scales[kind]) m->scales = w->scales[kind] + index * scale_bytes(w);
  }
  return source;
}

static uint8_t *pack(const struct lab_weights *w) {
  std::vector<struct us_pages_source> sources(w->count);
  struct us_err err;
  uint8_t *pages;
  for (uint32_t i = 0; i < w->count; i++) sources[i] = source_of(w, i);
  if (us_pages_source_check(&w->pages, &sources[0], &err) != US_OK)
    fprintf(stderr, "%s\n", err.message), exit(3);
  US_CUDA(cudaMalloc(&pages, us_pages_bytes(&w->pages) * w->count));
  struct us_pages_source *device = lab_upload(sources);
  US_CUDA(us_pages_pack_gpu(&w->pages, device, w->count, pages, 0));
  US_CUDA(cudaDeviceSynchronize());
  US_CUDA(cudaFree(device));
  return pages;
}

void lab_weights_make(struct lab_weights *w, uint64_t seed, uint32_t tile_rows) {
  if (!tile_rows) tile_rows = w->gated || (w->format == US_FORMAT_MXFP4 && w->rows % 32 == 0) ? 32 : 16;
  if (w->half == 0) w->half = sqrtf(3.0f / (float)w->cols);
  for (uint32_t kind = 0; kind < (w->gated ? 2 : 1); kind++) make_codes(w, kind, seed);
  w->cut = choose_cut(w, tile_rows / 16);
  w->pages = {w->format, w->rows, w->cols, tile_rows, w->cut.groups * 32};
  struct us_engine_matrix *m = &w->matrix;
  m->pages = pack(w), m->matrix_bytes = us_pages_bytes(&w->pages), m->tiles = us_pages_tiles(&w->pages);
  m->slices = us_pages_slices(&w->pages), m->page_bytes = us_pages_page_bytes(&w->pages);
  m->groups = (uint16_t)w->cut.groups, m->format = (uint8_t)w->format, m->halves = (uint8_t)(tile_rows / 16);
}

void lab_weights_free(struct lab_weights *w) {
  void *owned[] = {w->codes[0], w->codes[1], w->scales[0], w->scales[1], (void *)w->matrix.pages};
  for (void *p : owned) US_CUDA(cudaFree(p));
  memset((void *)w, 0, sizeof *w);
}

const char *const lab_mutation_names[LAB_MUTATIONS] = {"none", "a scale one step up", "32 columns left out",
                                                       "neighbouring columns swapped",
                                                       "weights rounded to bf16"};

bool lab_mutation_applies(enum lab_mutation mutation, enum us_format format) {
  if (mutation == LAB_SCALE) return format == US_FORMAT_MXFP4 || format == US_FORMAT_FP8;
  return mutation != LAB_COARSE || format == US_FORMAT_F32;
}

/* Row `row` of `m`: codes, and the scales of its blocks. */
static void download_row(const struct us_matrix *m, uint32_t row, std::vector<uint8_t> *codes,
                         std::vector<uint8_t> *scales) {
  size_t bytes = us_matrix_data_bytes(m->format, 1, m->cols),
         scale_bytes = us_matrix_scale_bytes(m->format, 1, m->cols, 0);
  size_t scale_row = m->format == US_FORMAT_FP8 ? us_matrix_scale_row(m, row) : row;
  *codes = lab_download((const uint8_t *)m->data + row * bytes, bytes);
  scales->clear();
  if (scale_bytes) *scales = lab_download((const uint8_t *)m->scales + scale_row * scale_bytes, scale_bytes);
}

static double scale_of(const struct us_matrix *m, const std::vector<uint8_t> &scales, uint32_t k,
                       enum lab_mutation mutation) {
  uint32_t unit = m->format == US_FORMAT_MXFP4 ? US_MXFP4_GROUP : US_FP8_BLOCK;
  bool wrong = mutation == LAB_SCALE && k / unit == (m->cols - 1) / unit / 2;
  if (m->format == US_FORMAT_MXFP4) return ldexp(1, scales[k / unit] - 127 + (wrong ? 1 : 0));
  if (m->format != US_FORMAT_FP8) return 1;
  float scale;
  memcpy(&scale, &scales[k / unit * 4], 4);
  return scale * (wrong ? 1.25 : 1.0);
}

static double code_of(enum us_format format, const std::vector<uint8_t> &codes, uint32_t k) {
  static const double e2m1[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  uint16_t half;
  float value;
  if (format == US_FORMAT_FP8) return us_fp8_to_f32(codes[k]);
  if (format == US_FORMAT_BF16) return memcpy(&half, &codes[2 * k], 2), us_bf16_to_f32(half);
  if (format == US_FORMAT_F32) return memcpy(&value, &codes[4 * k], 4), value;
  uint32_t code = codes[k / 2] >> (k % 2 ? 4 : 0) & 15u;
  return code & 8 ? -e2m1[code & 7] : e2m1[code];
}

std::vector<double> lab_row(const struct lab_weights *w, uint32_t index, uint32_t kind, uint32_t row,
                            enum lab_mutation mutation) {
  struct us_pages_source source = source_of(w, index);
  const struct us_matrix *m = &source.w[kind];
  std::vector<uint8_t> codes, scales;
  std::vector<double> values(w->cols);
  download_row(m, row, &codes, &scales);
  uint32_t skipped = w->cols / 64;
  for (uint32_t k = 0; k < w->cols; k++) {
    double code = code_of(w->format, codes, mutation == LAB_SWAP ? k ^ 1u : k);
    if (mutation == LAB_SKIP && k / 32 == skipped) code = 0;
    if (mutation == LAB_COARSE) code = us_bf16_round((float)code);
    values[k] = code * scale_of(m, scales, k, mutation);
  }
  return values;
}

/* ---- truth -------------------------------------------------------------------------------------------------------- */

double lab_multiply(double *sum, const double *w, const float *x, double *magnitude) {
  double largest = fabs(*sum);
  for (int i = 0; i < 16; i++) {
    double term = w[i] * (double)x[i];
    *sum += term, *magnitude += fabs(term);
    largest = fmax(largest, fabs(term));
  }
  return LAB_TRUNC * fmax(largest, fabs(*sum));
}

/* One page of one warp: MXFP4 sums each group, FP8 the even and the odd halves of a page's groups, the others all of it. */
static void add_page(const struct lab_cut *cut, const double *w, const float *x, double *acc,
                     struct lab_sum *s) {
  double chain[2] = {0, 0};
  for (uint32_t q = 0; q < cut->groups; q++, w += 32, x += 32) {
    bool mxfp4 = cut->format == US_FORMAT_MXFP4, fp8 = cut->format == US_FORMAT_FP8;
    if (mxfp4) chain[0] = 0;
    double *even = mxfp4 || fp8 ? &chain[0] : acc, *odd = fp8 ? &chain[1] : even;
    double lost = lab_multiply(even, w, x, &s->magnitude) + lab_multiply(odd, w + 16, x + 16, &s->magnitude);
    s->allowed += cut->format == US_FORMAT_F32 ? 3 * lost : lost;
    if (mxfp4) *acc += chain[0], s->allowed += LAB_UNIT * fabs(*acc);
  }
  if (cut->format != US_FORMAT_FP8) return;
  double both = chain[0] + chain[1];
  *acc += both, s->allowed += LAB_UNIT * (2 * fabs(both) + fabs(*acc));
}

struct lab_sum lab_dot(const struct lab_cut *cut, const double *w, const float *x) {
  struct lab_sum s = {0, 0, 0};
  uint32_t columns = cut->groups * 32;
  for (uint32_t part = 0; part < cut->parts; part++) {
    double sum = 0;
    for (uint32_t warp = 0; warp < cut->warps; warp++) {
      double acc = 0;
      for (uint32_t j = 0; j < cut->subs; j++) {
        size_t at = (size_t)((part * cut->subs + j) * cut->warps + warp) * columns;
        add_page(cut, w + at, x + at, &acc, &s);
      }
      sum += acc, s.allowed += LAB_UNIT * fabs(sum);
    }
    s.value += sum, s.allowed += LAB_UNIT * fabs(s.value);
  }
  return s;
}

double lab_silu(double g) {
  return g / (1 + exp(-g));
}

/* Both sums' errors through silu(g) u, 8 roundings of FP32, and half a unit of bf16's 8 significant bits. */
double lab_gated_allowed(const struct lab_sum *g, const struct lab_sum *u) {
  double h = lab_silu(g->value) * u->value;
  double before = 1.1 * g->allowed * (fabs(u->value) + u->allowed) +
                  (fabs(lab_silu(g->value)) + 1.1 * g->allowed) * u->allowed + 8 * LAB_UNIT * fabs(h);
  int exponent;
  frexp(fabs(h) + before, &exponent);
  return before + ldexp(1, exponent - 9);
}

std::vector<float> lab_rows(size_t K, uint64_t *state) {
  static const float scale[8] = {1, 1, 1e5f, 1, 1e-6f, 1, 1, 0.01f};
  std::vector<float> x(8 * K);
  for (size_t i = 0; i < x.size(); i++) {
    float uniform = (float)(lab_random(state) >> 40) * 0x1p-23f - 1.0f;
    x[i] = us_bf16_round(uniform * scale[i / K] * (i == 7 * K + 11 ? 4000.0f : 1.0f));
  }
  return x;
}

void *lab_operand(const std::vector<float> &x, uint32_t K) {
  std::vector<uint8_t> operand(us_operand_bytes(K));
  us_operand_pack(x.data(), 8, K, operand.data());
  return lab_upload(operand);
}

std::vector<float> lab_operand_rows(const void *operand, uint32_t K) {
  std::vector<uint8_t> bytes = lab_download((const uint8_t *)operand, us_operand_bytes(K));
  std::vector<float> x(8 * (size_t)K);
  us_operand_unpack(bytes.data(), 8, K, x.data());
  return x;
}

/* A pair is an operand of one token: 64 bytes for each group of 32 columns. */
std::vector<float> lab_pair_row(const void *pairs, uint32_t pair, uint32_t F) {
  std::vector<uint16_t> bits =
      lab_download((const uint16_t *)pairs + (size_t)pair * us_engine_pair_bytes(F) / 2, F);
  std::vector<float> h(F);
  for (uint32_t f = 0; f < F; f++)
    h[f] = us_bf16_to_f32(bits[f / 32 * 32 + us_engine_operand_offset(0, f % 32) / 2]) * 0x1p-64f;
  return h;
}

/* ---- runs --------------------------------------------------------------------------------------------------------- */

void *lab_buffer(struct lab_run *run, size_t bytes, int fill) {
  void *p;
  US_CUDA(cudaMalloc(&p, bytes));
  US_CUDA(cudaMemset(p, fill, bytes));
  run->owned.push_back(p);
  return p;
}

static void make_rank(struct lab_run *run, uint32_t i, struct us_engine_stuck *stuck) {
  struct us_engine_rank *rank = &run->launch.rank[i];
  const struct lab_ranks *shape = &run->shape;
  uint32_t D = shape->D;
  rank->rank = shape->apart ? 0 : i, rank->ranks = shape->apart ? 1 : shape->count;
  rank->blocks = (uint32_t)us_engine_blocks(shape->count) / shape->count;
  rank->slots = shape->slots, rank->addends = shape->addends, rank->D = D;
  rank->norm = (uint64_t *)lab_buffer(run, sizeof(uint64_t) * 2 * 8 * (D / us_engine_slice(D)), 0);
  rank->state = run->state[i] = (struct us_engine_state *)lab_buffer(run, sizeof(struct us_engine_state), 0);
  rank->stuck = stuck;
}

void lab_run_begin(struct lab_run *run, struct lab_ranks shape) {
  run->launch = {}, run->shape = shape, run->items = 0;
  for (run->shape.slots = 1; run->shape.slots < shape.slots; run->shape.slots *= 2) {} /* a power of two */
  run->launch.ranks = shape.count, run->launch.timeout_ns = us_gpu_timeout(2000000000u);
  run->launch.unfiltered = true; /* what decodes usually: the other instance's loops spill */
  int blocks = us_engine_blocks(shape.count);
  if (blocks <= 0) exit(5);
  struct us_engine_stuck *stuck;
  US_CUDA(cudaHostAlloc(&stuck, blocks * US_ENGINE_ROLES * sizeof *stuck, cudaHostAllocMapped));
  memset(stuck, 0, blocks * US_ENGINE_ROLES * sizeof *stuck);
  size_t bytes = sizeof(float) * run->shape.slots * shape.addends * 8 * shape.D;
  for (uint32_t i = 0; i < shape.count; i++) {
    run->exchanges[i] = 0;
    make_rank(run, i, stuck);
    float *exchange = (float *)lab_buffer(run, bytes, 0xff);
    for (uint32_t j = 0; !shape.apart && j < shape.count; j++) run->launch.rank[j].exchange[i] = exchange;
    if (shape.apart) run->launch.rank[i].exchange[0] = exchange;
  }
  lab_set_rows(run, 0xff);
}

void lab_run_end(struct lab_run *run) {
  for (void *p : run->owned) US_CUDA(cudaFree(p));
  US_CUDA(cudaFreeHost(run->launch.rank[0].stuck));
  for (auto &ops : run->ops) ops.clear();
  run->owned.clear();
}

void lab_set_rows(struct lab_run *run, uint32_t mask) {
  std::vector<struct us_engine_state> state(1);
  memset((void *)state.data(), 0, sizeof state[0]);
  for (uint32_t i = 0; i < US_ENGINE_MAX_ROWS; i++) {
    bool exists = i < US_ENGINE_ROWS && mask >> i & 1u;
    struct us_engine_row row = {(int32_t)i, 100 + i, exists ? 0 : US_ENGINE_NONE, i};
    state[0].target[i] = state[0].draft[i] = state[0].context[i] = row;
  }
  for (uint32_t i = 0; i < run->shape.count; i++)
    US_CUDA(cudaMemcpy(run->state[i], state.data(), sizeof state[0], cudaMemcpyHostToDevice));
}

/* ---- operations --------------------------------------------------------------------------------------------------- */

uint32_t lab_add(struct lab_run *run, uint32_t rank, struct us_engine_op op) {
  op.program = US_ENGINE_PASS_TARGET;
  op.wait = (uint32_t)run->ops[rank].size() - 1;
  run->ops[rank].push_back(op);
  return (uint32_t)run->ops[rank].size() - 1;
}

uint32_t lab_add_gemm(struct lab_run *run, uint32_t rank, const struct lab_weights *w, uint32_t index,
                      const void *operand, void *out, enum us_engine_epilogue epilogue) {
  struct us_engine_op op = {};
  struct us_engine_gemm *g = &op.gemm;
  op.kind = US_ENGINE_GEMM, op.shift = run->items % LAB_SHIFTS, op.bytes = w->matrix.matrix_bytes;
  g->w = w->matrix, g->w.pages += index * w->matrix.matrix_bytes;
  g->operand = operand, g->out = out, g->epilogue = epilogue, g->exchange = run->exchanges[rank];
  g->parts = w->cut.parts, g->warps = w->cut.warps, g->subs = w->cut.subs;
  g->out_stride = g->valid = w->rows, g->F = w->rows / 2;
  if (rank == 0) run->items += w->matrix.tiles * w->cut.parts;
  return lab_add(run, rank, op);
}

uint32_t lab_add_reduce(struct lab_run *run, uint32_t rank, struct us_engine_reduce reduce) {
  struct us_engine_op op = {};
  op.kind = reduce.addends ? US_ENGINE_REDUCE : US_ENGINE_EMBED;
  op.reduce = reduce, op.reduce.D = run->shape.D, op.reduce.exchange = run->exchanges[rank]++;
  return lab_add(run, rank, op);
}

uint32_t lab_add_route(struct lab_run *run, uint32_t rank, struct us_engine_route route, uint32_t layer) {
  struct us_engine_op op = {};
  op.kind = US_ENGINE_ROUTE, op.layer = layer, op.route = route;
  return lab_add(run, rank, op);
}

uint32_t lab_add_up(struct lab_run *run, uint32_t rank, const struct lab_weights *w, uint32_t first,
                    const void *operand, void *pairs, uint32_t route) {
  uint32_t op = lab_add_gemm(run, rank, w, first, operand, pairs, US_ENGINE_SWIGLU_EXPERT);
  lab_op(run, rank, op)->gemm.experts = true, lab_op(run, rank, op)->gemm.route = route;
  return op;
}

/* Bytes of a step's weights, three tiles of them, and of the activations of 8 rows. */
static uint32_t step_bytes(const struct lab_weights *w, uint32_t slices, bool rows) {
  return 3 * slices * w->matrix.page_bytes + (rows ? 8 * (slices * w->matrix.groups * 64 + 64) : 0);
}

/* As many as divide the expert's, feed 16 warps and fit a stage. */
uint32_t lab_down_slices(const struct lab_weights *w) {
  const struct us_engine_matrix *m = &w->matrix;
  uint32_t best = 1;
  for (uint32_t s = 1; s * m->groups <= US_ENGINE_COMPUTE_WARPS; s++)
    if (m->slices % s == 0 && step_bytes(w, s, true) <= US_ENGINE_DOWN_BYTES) best = s;
  return best;
}

uint32_t lab_add_down(struct lab_run *run, uint32_t rank, const struct lab_weights *w, uint32_t first,
                      const void *pairs, uint32_t route) {
  struct us_engine_op op = {};
  struct us_engine_down *d = &op.down;
  op.kind = US_ENGINE_DOWN, op.shift = run->items % LAB_SHIFTS, op.bytes = w->matrix.matrix_bytes;
  d->w = w->matrix, d->w.pages += first * w->matrix.matrix_bytes;
  d->pairs = pairs, d->F = w->cols, d->exchange = run->exchanges[rank], d->route = route;
  d->step_slices = lab_down_slices(w), d->steps = w->matrix.slices / d->step_slices;
  d->stage_steps = 2 * step_bytes(w, d->step_slices, false) <= US_ENGINE_DOWN_BYTES ? 2 : 1;
  if (rank == 0) run->items += (w->matrix.tiles + 2) / 3;
  return lab_add(run, rank, op);
}

/* ---- launches ----------------------------------------------------------------------------------------------------- */

void lab_upload_ops(struct lab_run *run, bool chained) {
  uint32_t count = (uint32_t)run->ops[0].size();
  for (uint32_t i = 0; i < run->shape.count; i++) {
    run->ops[i][0].wait = count - 1;
    for (const struct us_engine_op &op : run->ops[i]) run->launch.several |= op.row_tiles > 1;
    for (struct us_engine_op &op : run->ops[i])
      if (!chained) op.wait = US_ENGINE_NONE;
    run->launch.rank[i].ops = lab_keep(run, lab_upload(run->ops[i]));
    run->launch.rank[i].done = (uint32_t *)lab_buffer(run, count * sizeof(uint32_t), 0);
    run->launch.rank[i].claimed =
        (uint32_t *)lab_buffer(run, US_ENGINE_COUNTERS * count * sizeof(uint32_t), 0);
  }
  run->launch.first = 0, run->launch.last = count, run->launch.exchanges_a_round = run->exchanges[0];
}

cudaError_t lab_fire(struct lab_run *run, uint32_t rounds) {
  run->launch.rounds = rounds;
  cudaError_t status = cudaSuccess;
  for (uint32_t i = 0; status == cudaSuccess && i < run->shape.count; i++) /* a list to time may mix rounds */
    status = cudaMemsetAsync(run->launch.rank[i].claimed, 0,
                             US_ENGINE_COUNTERS * run->launch.last * sizeof(uint32_t));
  if (status == cudaSuccess) status = (cudaError_t)us_engine_run(&run->launch, 0);
  run->launch.exchanges += rounds * run->launch.exchanges_a_round;
  return status;
}

/* What failed, and where every role stood. */
static void wait_for(struct lab_run *run) {
  cudaError_t status = cudaDeviceSynchronize();
  if (status == cudaSuccess) return;
  fprintf(stderr, "launch of operations %u..%u: %s\n", run->launch.first, run->launch.last,
          cudaGetErrorString(status));
  uint32_t each = run->launch.rank[0].blocks * US_ENGINE_ROLES;
  for (uint32_t i = 0; i < each * run->launch.ranks; i++) {
    const struct us_engine_stuck *s = &run->launch.rank[0].stuck[i];
    if (!s->what) continue;
    fprintf(stderr,
            "rank %u block %u role %u: op %u (%s) wait %u, round %u, index %u, have %llx, want %llx\n",
            i / each, i % each / US_ENGINE_ROLES, i % US_ENGINE_ROLES, s->op,
            us_engine_kind_name((enum us_engine_kind)run->ops[0][s->op].kind), s->what, s->round, s->index,
            (unsigned long long)s->have, (unsigned long long)s->want);
  }
  exit(5);
}

void lab_launch(struct lab_run *run, uint32_t rounds) {
  US_CUDA(lab_fire(run, rounds));
  wait_for(run);
}

void lab_launch_one(struct lab_run *run, uint32_t op) {
  uint32_t count = run->launch.last;
  run->launch.rounds = 1, run->launch.first = op, run->launch.last = op + 1;
  US_CUDA((cudaError_t)us_engine_run(&run->launch, 0));
  wait_for(run);
  run->launch.first = 0, run->launch.last = count;
}

void lab_launch_each(struct lab_run *run) {
  for (uint32_t i = 0; i < run->launch.last; i++) lab_launch_one(run, i);
  run->launch.exchanges += run->launch.exchanges_a_round;
}

double lab_round_us(struct lab_run *run, uint32_t rounds) {
  double us = lab_median_us([&]() { return lab_fire(run, rounds); }) / rounds;
  wait_for(run);
  return us;
}

double lab_resident_us(struct lab_run *run, uint32_t rounds) {
  run->launch.resident = true;
  double first = lab_round_us(run, 1), all = lab_round_us(run, rounds + 1) * (rounds + 1);
  run->launch.resident = false;
  return (all - first) / rounds;
}
