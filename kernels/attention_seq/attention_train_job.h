/* attention_train_job.h: checked arguments, as the kernels take them. */
#ifndef US_KERNELS_ATTENTION_TRAIN_JOB_H
#define US_KERNELS_ATTENTION_TRAIN_JOB_H

#include "kernels/attention_seq/attention_train_tile.cuh"

/* cudaErrorInvalidValue where attention_train.h does not allow the arguments. */
int us_attention_job_of(const struct us_attention_train *a, struct us_attention_job *ret_job);

#endif
