/* bench_linear.c: how fast decode streams MXFP4 experts, as a fraction of this machine's read bandwidth in the same run.
 *
 *     bench_linear [--bytes N] [--threads N] [--isa best|plain|avx2|avx512] [--passes N] [ROWS ...]
 *
 * A synthetic pool of experts in the widths of MiMo-V2.5-Pro (hidden 6144, inner 2048), 1 GB unless --bytes says otherwise,
 * through the operation that decoding uses, at ROWS (1 and 8) token rows. Routed "all": every expert multiplies every row, which
 * at 8 rows is fma-bound; routed "top8": each row has 8 experts of its own, as in decoding, and the bytes are those of the
 * experts that someone chose. One JSON line a figure; the median of the passes counts. With --check, exits 1 when 1 row of
 * "all" stays under 50 % or 8 rows of "top8" under 25 % of the read bandwidth.
 */
#include "base/bandwidth.h"
#include "kernels/experts/experts.h"
#include "kernels/registry.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { D = 6144, F = 2048, TILE = 64, MAX_ROWS = 64, MAX_PASSES = 99 };

struct bench {
  size_t bytes;
  int threads, passes;
  enum us_isa isa;
  bool check;
  struct us_pool *pool;
  struct us_matrix *experts; /* (E, 3) */
  uint32_t E;
  struct us_experts_args args;
  float *scratch;
  size_t scratch_floats;
};

static double seconds_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void *need(size_t bytes) {
  void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!memory) {
    fprintf(stderr, "bench_linear: cannot allocate %zu bytes\n", bytes);
    exit(6);
  }
  return memory;
}

/* Codes and scales of one matrix; a cheap generator, since only speed is measured. */
static struct us_matrix new_matrix(size_t N, size_t K, uint64_t *state) {
  uint64_t *codes = need(N * K / 2);
  uint8_t *scales = need(N * K / 32);
  for (size_t i = 0; i < N * K / 16; i++)
    codes[i] = *state = *state * 6364136223846793005u + 1442695040888963407u;
  for (size_t i = 0; i < N * K / 32; i++) scales[i] = (uint8_t)(116 + i % 3);
  return (struct us_matrix){.format = US_FORMAT_MXFP4, .rows = N, .cols = K, .data = codes, .scales = scales};
}

static void build_pool(struct bench *b) {
  const struct us_op_dims one = {.format = US_FORMAT_MXFP4, .D = D, .F = F, .active = 1};
  size_t each = (size_t)us_op_find("experts")->bytes(&one);
  uint64_t state = 1;
  b->E = (uint32_t)((b->bytes + each - 1) / each);
  b->bytes = b->E * each;
  b->experts = need(b->E * 3 * sizeof *b->experts);
  for (uint32_t e = 0; e < b->E; e++) {
    b->experts[3 * e] = new_matrix(F, D, &state);
    b->experts[3 * e + 1] = new_matrix(F, D, &state);
    b->experts[3 * e + 2] = new_matrix(D, F, &state);
  }
}

/* `top` experts a row: all of them, or drawn without repetition. */
static void choose(uint32_t E, uint32_t top, uint64_t *state, uint32_t *ids) {
  uint32_t used = 0;
  for (uint32_t e = 0; e < E && used < top; e++) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    if ((*state >> 33) % (E - e) < top - used) ids[used++] = e;
  }
}

static void build_rows(struct bench *b, size_t R, uint32_t top) {
  size_t pairs = R * top;
  uint64_t state = 7;
  struct us_expert_groups *groups = need(sizeof *groups);
  *groups = (struct us_expert_groups){.expert = need(b->E * 4),
                                      .begin = need((b->E + 1) * (size_t)4),
                                      .row = need(pairs * 4),
                                      .weight = need(pairs * 4)};
  uint32_t *ids = need(pairs * 4);
  float *weights = need(pairs * 4), *x = need(R * D * 4), *packed = need(R * D * 4);
  for (size_t r = 0; r < R; r++) choose(b->E, top, &state, ids + r * top);
  for (size_t i = 0; i < pairs; i++) weights[i] = 1.0f / 8;
  for (size_t i = 0; i < R * D; i++) x[i] = (float)(i % 97) / 97 - 0.5f;
  us_linear_pack(x, R, D, D, packed, D);
  us_experts_group(ids, weights, R, top, b->E, groups);
  b->args = (struct us_experts_args){.experts = b->experts,
                                     .groups = groups,
                                     .x = packed,
                                     .x_stride = D,
                                     .R = R,
                                     .D = D,
                                     .F = F,
                                     .inner = need(pairs * F * 4),
                                     .y = need(R * D * 4),
                                     .y_stride = D,
                                     .round_bf16 = true,
                                     .isa = b->isa};
  b->scratch_floats = us_experts_scratch(R, TILE) + 16;
  b->scratch = need((size_t)us_pool_threads(b->pool) * b->scratch_floats * 4);
}

static void inner(void *arg, size_t begin, size_t end, int worker) {
  struct bench *b = arg;
  for (size_t i = begin; i < end; i++)
    us_experts_inner(&b->args, (uint32_t)(i / (F / TILE)), i % (F / TILE) * TILE,
                     i % (F / TILE) * TILE + TILE, b->scratch + (size_t)worker * b->scratch_floats);
}

static void outer(void *arg, size_t begin, size_t end, int worker) {
  struct bench *b = arg;
  for (size_t i = begin; i < end; i++)
    us_experts_outer(&b->args, i * TILE, i * TILE + TILE, b->scratch + (size_t)worker * b->scratch_floats);
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median_seconds(struct bench *b) {
  double times[MAX_PASSES];
  for (int pass = -1; pass < b->passes; pass++) { /* the first is not counted */
    double start = seconds_now();
    us_pool_for(b->pool, (size_t)b->args.groups->active * (F / TILE), 1, inner, b);
    us_pool_for(b->pool, D / TILE, 1, outer, b);
    if (pass >= 0) times[pass] = seconds_now() - start;
  }
  qsort(times, (size_t)b->passes, sizeof *times, by_value);
  return times[b->passes / 2];
}

static int usage(void) {
  fprintf(stderr,
          "usage: bench_linear [--bytes N] [--threads N] [--isa NAME] [--passes N] [--check] [ROWS ...]\n");
  return 2;
}

static int parse(int argc, char **argv, struct bench *b, size_t *rows, size_t *ret_count) {
  for (int i = 1; i < argc; i++) {
    if (strcmp(argv[i], "--check") == 0) {
      b->check = true;
    } else if (argv[i][0] != '-') {
      if (*ret_count < 8) rows[(*ret_count)++] = strtoul(argv[i], NULL, 10);
    } else if (i + 1 == argc) {
      return usage();
    } else if (strcmp(argv[i], "--bytes") == 0) {
      b->bytes = strtoull(argv[++i], NULL, 10);
    } else if (strcmp(argv[i], "--threads") == 0) {
      b->threads = atoi(argv[++i]);
    } else if (strcmp(argv[i], "--passes") == 0) {
      b->passes = atoi(argv[++i]);
    } else if (strcmp(argv[i], "--isa") == 0) {
      i++;
      for (int isa = US_ISA_BEST; isa < US_ISA_COUNT; isa++)
        if (strcmp(argv[i], us_isa_name((enum us_isa)isa)) == 0) b->isa = (enum us_isa)isa;
    } else {
      return usage();
    }
  }
  for (size_t i = 0; i < *ret_count; i++)
    if (rows[i] < 1 || rows[i] > MAX_ROWS) return usage();
  return b->passes < 1 || b->passes > MAX_PASSES || !b->bytes ? usage() : 0;
}

/* Returns whether the figure is at least `wanted` of the bandwidth. */
static bool report(struct bench *b, size_t R, bool all, double bandwidth, double wanted) {
  uint32_t top = all || b->E < 8 ? b->E : 8;
  build_rows(b, R, top);
  double bytes = (double)b->bytes / b->E * b->args.groups->active, seconds = median_seconds(b),
         rate = bytes / seconds;
  printf("{\"bench\":\"mxfp4_experts\",\"routed\":\"%s\",\"isa\":\"%s\",\"threads\":%d,\"rows\":%zu,"
         "\"bytes\":%.0f,"
         "\"ms\":%.2f,\"gb_per_s\":%.2f,\"fraction_of_read\":%.3f,\"gflop_per_s\":%.1f}\n",
         all ? "all" : "top8", us_isa_name(us_isa_resolve(b->isa)), us_pool_threads(b->pool), R, bytes,
         seconds * 1e3, rate * 1e-9, rate / bandwidth, 6e-9 * D * F * top * (double)R / seconds);
  fflush(stdout);
  return rate >= wanted * bandwidth;
}

int main(int argc, char **argv) {
  struct bench b = {.bytes = 1000000000, .passes = 5};
  size_t rows[8] = {0}, count = 0;
  struct us_err err = {0};
  int status = parse(argc, argv, &b, rows, &count);
  if (status) return status;
  if (!count) rows[count++] = 1, rows[count++] = 8;
  double bandwidth;
  if (us_pool_create(b.threads, &b.pool, &err) != US_OK ||
      us_bandwidth_measure(b.pool, 1u << 30, &bandwidth, &err) != US_OK) {
    fprintf(stderr, "bench_linear: %s\n", err.message);
    return (int)err.status;
  }
  printf("{\"bench\":\"read\",\"threads\":%d,\"gb_per_s\":%.2f}\n", us_pool_threads(b.pool),
         bandwidth * 1e-9);
  build_pool(&b);
  for (size_t i = 0; i < count; i++) {
    bool all = report(&b, rows[i], true, bandwidth, 0.5),
         routed = report(&b, rows[i], false, bandwidth, 0.25);
    if (b.check && ((rows[i] == 1 && !all) || (rows[i] == 8 && !routed))) status = 1;
  }
  us_pool_free(b.pool);
  return status;
}
