/* train_decode.h: the kernels of generation by themselves: attention over kept keys, draws. */
#ifndef US_TESTS_GPU_TRAIN_DECODE_H
#define US_TESTS_GPU_TRAIN_DECODE_H

#include "train_lab.h"

void check_attention_decode(struct us_cuda *cuda);
void check_draws(struct us_cuda *cuda);

#endif
