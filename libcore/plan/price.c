/* price.c: bytes of a tile program. */
#include "plan/price.h"

#include <math.h>
#include <string.h>

double us_expected_active(uint32_t experts, uint32_t top_k, uint32_t rows) {
  if (!experts) return 0;
  return experts * (1 - pow(1 - (double)top_k / experts, rows));
}

void us_program_price(const struct us_program *program, double active_experts, struct us_price *ret_price) {
  memset(ret_price, 0, sizeof *ret_price);
  for (size_t i = 0; i < program->task_count; i++) {
    const struct us_task *task = &program->tasks[i];
    double bytes = (double)task->bytes;
    /* Every slot's tasks stand in the list; EXPERT_DOWN visits all active experts in one task. */
    if (task->op == US_TASK_EXPERT_UP) bytes *= active_experts / program->dims.slots;
    if (task->op == US_TASK_EXPERT_DOWN) bytes *= active_experts;
    ret_price->by_op[task->op] += bytes;
    ret_price->total += bytes;
  }
}
