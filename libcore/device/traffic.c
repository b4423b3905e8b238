/* traffic.c: bytes of a round, from its list of operations. */
#include "device/traffic.h"

bool us_device_op_of_experts(const struct us_engine_op *op) {
  return op->kind == US_ENGINE_DOWN || (op->kind == US_ENGINE_GEMM && op->gemm.experts);
}

void us_device_traffic(const struct us_engine_op *ops, uint32_t first, uint32_t last,
                       struct us_device_traffic *ret_traffic) {
  struct us_device_traffic *t = ret_traffic;
  *t = (struct us_device_traffic){0};
  for (uint32_t i = first; i < last; i++) {
    uint32_t task = ops[i].task_op < US_TASK_OP_COUNT ? ops[i].task_op : US_TASK_OP_COUNT;
    bool experts = us_device_op_of_experts(&ops[i]);
    t->by_task[task] += ops[i].bytes;
    t->of_experts[task] = experts;
    *(experts ? &t->per_expert : &t->always) += ops[i].bytes;
  }
}

double us_device_traffic_bytes(const struct us_device_traffic *traffic, double experts) {
  return (double)traffic->always + experts * (double)traffic->per_expert;
}

uint64_t us_device_kv_bytes(const struct us_engine_op *ops, uint32_t first, uint32_t last, uint32_t sequences,
                            uint32_t context) {
  uint64_t bytes = 0;
  for (uint32_t i = first; i < last; i++) {
    if (ops[i].kind != US_ENGINE_ATTENTION || ops[i].row_tile)
      continue; /* the sequences of all row tiles are counted here */
    const struct us_engine_attention *a = &ops[i].attention;
    uint32_t keys = a->window && a->window < context ? a->window : context;
    bytes += (uint64_t)sequences * keys * a->G * (us_engine_k_stride(a->Q) + a->V) * 2;
  }
  return bytes;
}
