/* prefill_speed.c: tokens a second of a prompt through MiMo-V2.5-Pro's layers, with synthetic weights, routed uniformly.
 *
 * Usage: prefill_speed [LAYERS [GPUS [RANKS [ROWS [PROMPT]]]]], of 4, 1, 4, 512, 4096: the first layers of the shape, ranks on so
 * many GPUs, rows a chunk. Ranks that share a GPU take turns, so a GPU of one rank would take its share of the time. The first
 * chunk is not counted. Exit 0, 5, 77.
 */
#include "device/prefill.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void need(enum us_status status, const struct us_err *err, const char *what) {
  if (status == US_OK) return;
  fprintf(stderr, "%s: %s\n", what, err->message);
  exit(strstr(err->message, "no GPU") ? 77 : 5);
}

static void hung(int number) {
  static const char message[] = "the run hangs: its watchdog ends it\n";
  if (write(2, message, sizeof message - 1) < 0) _exit(4);
  _exit(5);
}

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

struct run {
  struct us_shape shape;
  struct us_devices *devices;
  struct us_device_weights *weights[US_ENGINE_MAX_RANKS];
  struct us_kv_pool *pool;
  struct us_kv *kv;
  struct us_device_prefill *prefill;
};

static void open_run(struct run *r, uint32_t layers, uint32_t gpus, uint32_t ranks, uint32_t rows,
                     uint32_t positions) {
  struct us_err err = {0};
  need(us_shape_load("mimo-v2.5-pro", &r->shape, &err), &err, "shape");
  if (layers < r->shape.layers) r->shape.layers = layers;
  need(us_devices_open(0, gpus, ranks, &r->devices, &err), &err, "GPUs");
  for (uint32_t i = 0; i < ranks; i++) {
    struct us_device_weights_options options = {
        .device = r->devices->ordinal[us_devices_gpu(r->devices, i)], .rank = i, .ranks = ranks};
    us_devices_use(r->devices, us_devices_gpu(r->devices, i));
    need(us_device_weights_synthetic(&r->shape, NULL, 1, &options, &r->weights[i], &err), &err, "weights");
  }
  struct us_kv_spec spec = us_kv_spec_of(&r->shape);
  struct us_kv_pool_options pool = {.positions = positions};
  us_kv_pool_need(&spec, positions, 1, pool.pages);
  need(us_kv_pool_create(r->devices, &spec, &pool, &r->pool, &err), &err, "pool");
  need(us_kv_create_in(us_kv_pool_memory(r->pool), &spec, positions, US_KV_BF16, &r->kv, &err), &err,
       "cache");
  struct us_device_prefill_options options = {
      .rows = rows, .logit_rows = 1, .max_positions = positions, .uniform = true, .uniform_seed = 1};
  need(us_device_prefill_create(r->devices, r->weights, &options, &r->prefill, &err), &err, "prefill");
  us_device_prefill_caches(r->prefill, r->pool, NULL);
}

static void close_run(struct run *r) {
  us_device_prefill_free(r->prefill);
  us_kv_free(r->kv);
  us_kv_pool_free(r->pool);
  for (uint32_t i = 0; i < r->devices->ranks; i++) us_device_weights_free(r->weights[i]);
  us_devices_close(r->devices);
}

/* Seconds of one chunk, until every GPU is done; *ret_queued: until the host was. */
static double run_chunk(struct run *r, uint32_t position, uint32_t rows, double *ret_queued) {
  static int32_t tokens[2048];
  struct us_engine_kv tables[US_ENGINE_MAX_RANKS];
  struct us_err err = {0};
  for (uint32_t i = 0; i < rows; i++) tokens[i] = (int32_t)((position + i) * 2654435761u % r->shape.vocab);
  need(us_kv_reserve(r->kv, position, rows, &err), &err, "pages");
  need(us_kv_pool_tables(r->pool, r->kv, tables, &err), &err, "tables");
  struct us_device_prefill_chunk chunk = {
      .tokens = tokens, .position = position, .rows = rows, .kv = tables, .logits = 1};
  need(us_devices_sync(r->devices, NULL, 0, &err), &err, "before a chunk");
  double start = seconds();
  need(us_device_prefill_run(r->prefill, &chunk, &err), &err, "chunk");
  *ret_queued = seconds() - start;
  need(us_devices_sync(r->devices, NULL, 0, &err), &err, "chunk");
  return seconds() - start;
}

static uint32_t argument(int argc, char **argv, int i, uint32_t otherwise) {
  return argc > i ? (uint32_t)strtoul(argv[i], NULL, 10) : otherwise;
}

int main(int argc, char **argv) {
  uint32_t layers = argument(argc, argv, 1, 4), gpus = argument(argc, argv, 2, 1),
           ranks = argument(argc, argv, 3, 4);
  uint32_t rows = argument(argc, argv, 4, 512), prompt = argument(argc, argv, 5, 4096), counted = 0;
  struct run r = {0};
  double total = 0, queued;
  signal(SIGALRM, hung);
  alarm(120);
  open_run(&r, layers, gpus, ranks, rows, prompt);
  for (uint32_t position = 0; position < prompt; position += rows) {
    double taken = run_chunk(&r, position, rows, &queued);
    if (position) total += taken, counted += rows;
    printf("{\"rows\": %u, \"position\": %u, \"ms\": %.2f, \"queued_ms\": %.2f, \"us_a_layer_and_rank\": "
           "%.0f}\n",
           rows, position, taken * 1e3, queued * 1e3, taken * 1e6 / r.shape.layers / (ranks / gpus));
  }
  if (counted)
    printf("{\"layers\": %u, \"gpus\": %u, \"ranks\": %u, \"rows\": %u, \"tokens_per_second\": %.0f, "
           "\"synthetic\": true}\n",
           r.shape.layers, gpus, ranks, rows, counted / total);
  close_run(&r);
  return 0;
}
