/* lab_wide.cu: dense products of several row tiles at once against one row tile after the other, whose sums lab_gemm.cu holds against
 * double: the same bits; and the speed of both. */
#include "lab_engine.h"

#include <cstring>

static const uint32_t SERIES = 8;

struct wide_case {
  const char *name;
  enum us_format format;
  uint32_t rows, cols, parts, tiles;
  bool gated, timed;
};

static const struct wide_case cases[] = {
    {"qkv of four ranks", US_FORMAT_FP8, 6784, 6144, 1, 8, false, true},
    {"o_proj of four ranks", US_FORMAT_FP8, 6144, 4096, 2, 8, false, true},
    {"qkv of one rank", US_FORMAT_FP8, 27136, 6144, 1, 8, false, true},
    {"router", US_FORMAT_F32, 384, 6144, 8, 8, false, true},
    {"head of four ranks", US_FORMAT_BF16, 38144, 6144, 1, 8, false, true},
    {"gate and up of four ranks", US_FORMAT_FP8, 8192, 6144, 1, 8, true, true},
    {"a few rows", US_FORMAT_FP8, 200, 512, 1, 5, false, false},
    {"gate and up of three row tiles", US_FORMAT_FP8, 512, 256, 1, 3, true, false},
    {"gate and up in bf16", US_FORMAT_BF16, 320, 128, 1, 7, true, false},
    {"bf16 in parts", US_FORMAT_BF16, 100, 384, 3, 2, false, false},
    {"F32 in parts", US_FORMAT_F32, 40, 192, 2, 4, false, false},
};

struct problem {
  const struct wide_case *of;
  struct lab_weights w;
  uint8_t *operand;
  uint64_t operand_tile, out_tile;
  enum us_engine_epilogue epilogue;
};

/* Product `index`: `each` row tiles at once. */
static void add_product(struct lab_run *run, const struct problem *p, uint32_t each, uint32_t index,
                        uint8_t *out) {
  for (uint32_t t = 0; t < p->of->tiles; t += each) {
    uint32_t op = lab_add_gemm(run, 0, &p->w, index % p->w.count, p->operand + t * p->operand_tile,
                               out + t * p->out_tile, p->epilogue);
    struct us_engine_op *o = lab_op(run, 0, op);
    o->row_tile = t, o->row_tiles = each;
    o->gemm.operand_tile = p->operand_tile, o->gemm.out_tile = p->out_tile;
    if (p->epilogue == US_ENGINE_STORE) o->gemm.valid = p->w.rows - 3; /* the last rows are padding */
  }
}

static std::vector<uint8_t> run_list(const struct problem *p, uint32_t each, uint32_t jitter) {
  struct lab_run run;
  size_t bytes = p->of->tiles * p->out_tile;
  lab_run_begin(&run, lab_ranks{1, false, 384, 1, 24});
  uint8_t *out = (uint8_t *)lab_buffer(&run, bytes, 0);
  for (uint32_t i = 0; i < 3; i++) add_product(&run, p, each, i ? 0 : p->w.count - 1, out);
  lab_upload_ops(&run);
  run.launch.jitter = jitter;
  lab_launch(&run, 2);
  std::vector<uint8_t> got = lab_download(out, bytes);
  lab_run_end(&run);
  return got;
}

static void time_both(const struct problem *p) {
  for (uint32_t each = 1; each <= p->of->tiles; each += p->of->tiles - 1) {
    struct lab_run run;
    lab_run_begin(&run, lab_ranks{1, false, 384, 1, 24});
    uint8_t *out = (uint8_t *)lab_buffer(&run, p->of->tiles * p->out_tile, 0);
    for (uint32_t i = 0; i < SERIES; i++) add_product(&run, p, each, i, out);
    lab_upload_ops(&run, false);
    double us = lab_round_us(&run, 3) / SERIES, resident = lab_resident_us(&run, 3) / SERIES,
           bytes = (double)p->w.matrix.matrix_bytes;
    printf("{\"wide\": \"%s\", \"row_tiles_at_once\": %u, \"us\": %.1f, \"resident_us\": %.1f, \"mbytes\": "
           "%.1f, "
           "\"gbs\": %.0f, \"of_ceiling\": %.3f}\n",
           p->of->name, each, us, resident, bytes * 1e-6, bytes / us * 1e-3,
           lab_ceiling > 0 ? bytes / us * 1e6 / lab_ceiling : 0.0);
    lab_run_end(&run);
  }
}

static void lab_one(const struct wide_case *c, uint64_t seed) {
  struct problem p = {};
  uint64_t state = seed + c->rows, differing = 0;
  char name[160];
  p.of = c, p.w = lab_weights(c->format, c->rows, c->cols);
  p.w.gated = c->gated, p.w.parts = c->parts, p.w.count = c->timed ? 6 : 2;
  lab_weights_make(&p.w, seed);
  p.epilogue = c->gated ? US_ENGINE_SWIGLU : US_ENGINE_STORE;
  if (c->gated && c->rows % 64) fprintf(stderr, "%u rows of gate and up are no operand\n", c->rows), exit(3);
  p.operand_tile = (uint64_t)c->cols * 16 + 512;
  p.out_tile = c->gated ? (uint64_t)c->rows / 2 * 16 : (uint64_t)c->parts * 8 * c->rows * 4;
  US_CUDA(cudaMalloc(&p.operand, c->tiles * p.operand_tile));
  for (uint32_t t = 0; t < c->tiles; t++) {
    void *one = lab_operand(lab_rows(c->cols, &state), c->cols);
    US_CUDA(cudaMemcpy(p.operand + t * p.operand_tile, one, (size_t)c->cols * 16, cudaMemcpyDeviceToDevice));
    US_CUDA(cudaFree(one));
  }
  std::vector<uint8_t> alone = run_list(&p, 1, 0), together = run_list(&p, c->tiles, 0),
                       late = run_list(&p, c->tiles, 2000);
  for (size_t i = 0; i < alone.size(); i++) differing += alone[i] != together[i] || alone[i] != late[i];
  uint64_t written = 0;
  for (uint8_t byte : alone) written += byte != 0;
  snprintf(name, sizeof name, "wide: %s, %u x %u in %s, %u row tiles: bits of one after the other", c->name,
           c->rows, c->cols, us_format_name(c->format), c->tiles);
  us_gpu_report(name, alone.size(), differing + (written < alone.size() / 2), 0);
  if (c->timed && !us_gpu_patience()) time_both(&p);
  lab_weights_free(&p.w);
  US_CUDA(cudaFree(p.operand));
}

void lab_wide(uint64_t seed) {
  for (const struct wide_case &c : cases) lab_one(&c, seed);
}
