/* several_gpus.c: the host's side of the CUDA executor on 1, 2 and 4 GPUs, with a stand-in for CUDA (fake_cuda.c): no GPU is needed.
 *
 * Usage: several_gpus [SEED]. Rounds of a bench and generations end and leave nothing behind; when a call that takes memory fails, a
 * stream, a buffer, a graph on any GPU, the call that asked says so, nothing breaks, and nothing is left behind either. What the
 * stand-in refuses, it aborts on; build with an address sanitizer to see the rest.
 */
#include "device/bench.h"
#include "fake_cuda.h"
#include "parity_models.h"

#include <signal.h>

static const struct us_executor_cuda_options places[] = {
    {.gpus = 1, .ranks = 1}, {.gpus = 2, .ranks = 2}, {.gpus = 4, .ranks = 4}, {.gpus = 2, .ranks = 4}};

/* An executor, rounds of two sequences with a drafter, and its end. */
static enum us_status run(const struct models *m, struct us_executor_cuda_options options, uint32_t rounds,
                          struct us_err *err) {
  struct us_executor *ex = NULL;
  struct us_bench_result result;
  struct us_bench_device device;
  struct us_bench_options bench = {
      .batch = 2, .block = 8, .context = 40, .rounds = rounds, .warmup = 1, .seed = 1};
  options.sequences = 3, options.positions = 640;
  enum us_status status = us_executor_create_cuda(m->model, m->draft, &options, &ex, err);
  if (status != US_OK) return status;
  status = us_bench_device(ex, &device, err);
  if (status == US_OK) status = us_bench_run(ex, &bench, &result, err);
  ex->ops->free(ex);
  return status;
}

static void check_place(const struct models *m, struct us_executor_cuda_options options) {
  char name[64];
  struct us_err err = {0};
  snprintf(name, sizeof name, "%s, %s, %u GPUs, %u ranks", m->name,
           options.mode == US_DEVICE_GRAPH ? "graph" : "engine", options.gpus, options.ranks);
  fake_cuda_calls = fake_cuda_fail = 0;
  enum us_status status = run(m, options, 30, &err);
  unsigned calls = fake_cuda_calls;
  record(name, "rounds end and leave nothing", 1, status != US_OK || fake_cuda_held, err.message);
  uint64_t bad = 0, tried = 0, told = 0;
  for (unsigned n = 1; n <= calls; n += n < 40 ? 1 : 7, tried++) {
    fake_cuda_calls = 0, fake_cuda_fail = n, err = (struct us_err){0};
    status = run(m, options, 3, &err);
    bad += fake_cuda_held || (status != US_OK && status != US_ERR_MEMORY), told += status == US_ERR_MEMORY;
    if (fake_cuda_held || (status != US_OK && status != US_ERR_MEMORY))
      fprintf(stderr, "%s, call %u: %u held, %s\n", name, n, fake_cuda_held, err.message);
    fake_cuda_held = 0;
    if (fake_cuda_calls < n) break;
  }
  fake_cuda_fail = 0;
  record(name, "memory that is not there is an error and no more", tried, bad + (told < tried / 2), "");
}

int main(void) {
  struct models m = open_random("short", shorten), deep = open_random("deep", deepen);
  signal(SIGALRM, hung);
  alarm(watchdog_seconds(300));
  for (size_t i = 0; i < sizeof places / sizeof *places; i++)
    for (int graph = 0; graph < 2; graph++) {
      struct us_executor_cuda_options options = places[i];
      options.mode = graph ? US_DEVICE_GRAPH : US_DEVICE_ENGINE;
      check_place(&m, options);
    }
  struct us_executor_cuda_options four = {.gpus = 4, .ranks = 4, .mode = US_DEVICE_GRAPH};
  struct us_err err = {0};
  fake_cuda_calls = fake_cuda_fail = 0;
  enum us_status status = run(&deep, four, 40, &err);
  record("deep, 4 GPUs", "rounds as graphs end and leave nothing", 1, status != US_OK || fake_cuda_held,
         err.message);
  close_models(&m), close_models(&deep);
  return any_failed ? 1 : 0;
}
