/* program.c: names of the tile program's operations, and how ranks share what has no width of a rank. */
#include "plan/program.h"

/* ceil(N / ranks) ids a rank, the last has what is left: so an id's rank is a division. */
uint32_t us_program_first_id(const struct us_program *program, uint32_t rank) {
  uint32_t N = program->dims.vocab;
  uint64_t first = (uint64_t)rank * ((N + program->ranks - 1) / program->ranks);
  return first < N ? (uint32_t)first : N;
}

uint32_t us_program_first_fused(const struct us_program *program, uint32_t rank) {
  return (uint32_t)((uint64_t)program->dims.hidden * rank / program->ranks);
}

const char *us_task_op_name(enum us_task_op op) {
  static const char *const names[US_TASK_OP_COUNT] = {[US_TASK_EMBED_NORM] = "embed_norm",
                                                      [US_TASK_QKV] = "qkv",
                                                      [US_TASK_ATTENTION] = "attention",
                                                      [US_TASK_O_PROJ] = "o_proj",
                                                      [US_TASK_RESIDUAL_NORM] = "residual_norm",
                                                      [US_TASK_ROUTER] = "router",
                                                      [US_TASK_ROUTE] = "route",
                                                      [US_TASK_EXPERT_UP] = "expert_up",
                                                      [US_TASK_EXPERT_DOWN] = "expert_down",
                                                      [US_TASK_DENSE_UP] = "dense_up",
                                                      [US_TASK_DENSE_DOWN] = "dense_down",
                                                      [US_TASK_HEAD] = "head",
                                                      [US_TASK_CONTEXT_FC] = "context_fc",
                                                      [US_TASK_CONTEXT_NORM] = "context_norm",
                                                      [US_TASK_CONTEXT_KV] = "context_kv"};
  return op >= 0 && op < US_TASK_OP_COUNT ? names[op] : "unknown";
}
