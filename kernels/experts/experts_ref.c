/* experts_ref.c: grouped experts over us_linear; the instruction sets are us_linear's, us_swiglu's and us_axpy's. */
#include "kernels/experts/experts.h"

#include "kernels/cpu/axpy.h"
#include "kernels/swiglu/swiglu.h"
#include <string.h>

void us_experts_group(const uint32_t *ids, const float *weights, size_t R, uint32_t K, uint32_t E,
                      struct us_expert_groups *groups) {
  uint32_t active = 0, used = 0;
  /* Count in begin[e + 1], fill, then drop the experts without rows. */
  memset(groups->begin, 0, ((size_t)E + 1) * sizeof *groups->begin);
  for (size_t i = 0; i < R * K; i++) groups->begin[ids[i] + 1]++;
  for (uint32_t e = 0; e < E; e++) groups->begin[e + 1] += groups->begin[e];
  for (uint32_t e = 0; e < E; e++) groups->expert[e] = groups->begin[e];
  for (size_t i = 0; i < R * K; i++) {
    uint32_t at = groups->expert[ids[i]]++;
    groups->row[at] = (uint32_t)(i / K);
    groups->weight[at] = weights[i];
  }
  for (uint32_t e = 0; e < E; e++) {
    uint32_t end = groups->begin[e + 1];
    if (end == used) continue;
    groups->expert[active] = e;
    groups->begin[active++] = used;
    used = end;
  }
  groups->begin[active] = used;
  groups->active = active;
}

size_t us_experts_scratch(size_t R, size_t width) {
  return 2 * R * width;
}

void us_experts_inner(const struct us_experts_args *args, uint32_t i, size_t begin, size_t end,
                      float *scratch) {
  const struct us_expert_groups *groups = args->groups;
  const struct us_matrix *expert = &args->experts[3 * (size_t)groups->expert[i]];
  uint32_t first = groups->begin[i], rows = groups->begin[i + 1] - first;
  size_t width = end - begin, packed = us_linear_packed_width(args->F);
  float *gate = scratch, *up = scratch + rows * width;
  struct us_linear_args linear = {.w = &expert[0],
                                  .x = args->x,
                                  .x_stride = args->x_stride,
                                  .opt_x_rows = groups->row + first,
                                  .y = gate,
                                  .y_stride = width,
                                  .R = rows,
                                  .begin = begin,
                                  .end = end,
                                  .isa = args->isa};
  us_linear(&linear);
  linear.w = &expert[1];
  linear.y = up;
  us_linear(&linear);
  us_swiglu(&(struct us_swiglu_args){.gate = gate,
                                     .up = up,
                                     .y = gate,
                                     .n = rows * width,
                                     .round_bf16 = args->round_bf16,
                                     .isa = args->isa});
  us_linear_pack(gate, rows, width, width, args->inner + first * packed + begin, packed);
}

void us_experts_outer(const struct us_experts_args *args, size_t begin, size_t end, float *scratch) {
  const struct us_expert_groups *groups = args->groups;
  size_t width = end - begin, packed = us_linear_packed_width(args->F);
  for (size_t r = 0; r < args->R; r++)
    memset(args->y + r * args->y_stride + begin, 0, width * sizeof *args->y);
  for (uint32_t i = 0; i < groups->active; i++) {
    uint32_t first = groups->begin[i], rows = groups->begin[i + 1] - first;
    us_linear(&(struct us_linear_args){.w = &args->experts[3 * (size_t)groups->expert[i] + 2],
                                       .x = args->inner + first * packed,
                                       .x_stride = packed,
                                       .y = scratch,
                                       .y_stride = width,
                                       .R = rows,
                                       .begin = begin,
                                       .end = end,
                                       .isa = args->isa});
    for (uint32_t j = 0; j < rows; j++) {
      float *y = args->y + groups->row[first + j] * args->y_stride + begin,
            weight = groups->weight[first + j];
      us_axpy(weight, scratch + j * width, width, y, args->isa);
    }
  }
}
