/* engine_loop.cu: resident rounds (device/loop.h) against decode/generate.c's own, on one GPU: the same tokens, ends and statistics.
 *
 * Mailbox, events, caches, tables and launches are the real ones; in place of the engine runs round_lab.h's kernel, and in place
 * of a model's schedule a list of SELECT and ACCEPT over logits that depend on a row's slot alone (engine_loop_host.c). This file
 * stands in for kernels/engine/engine.cu, so it defines what that does.
 */
#include "round_lab.h"

extern "C" int engine_loop_host(int argc, char **argv);

static uint32_t *gate;

const char *us_engine_kind_name(enum us_engine_kind kind) {
  return kind == US_ENGINE_SELECT ? "select" : kind == US_ENGINE_ACCEPT ? "accept" : "?";
}

int us_engine_blocks(uint32_t ranks) {
  return (int)(132 / ranks * ranks);
}

int us_engine_run(const struct us_engine_launch *launch, cudaStream_t stream) {
  struct us_engine_launch copy = *launch;
  if (!copy.timeout_ns) copy.timeout_ns = us_gpu_timeout(5000000000u);
  return lab_launch(&copy, (uint32_t)us_engine_blocks(launch->ranks), gate, false, stream);
}

int main(int argc, char **argv) {
  us_gpu_begin();
  us_gpu_watchdog(120);
  US_CUDA(cudaMalloc(&gate, sizeof *gate));
  int status = engine_loop_host(argc, argv);
  US_CUDA(cudaFree(gate));
  return status;
}
