/* attention_train.cu: what attention for training is called with, and the forward pass.
 *
 * Head dims run in the smallest of the compiled sizes that holds them, the rest filled with zeros.
 */
#include "kernels/attention_seq/attention_train_job.h"
#include "kernels/attention_seq/attention_train_forward_long.cuh"

int us_attention_job_of(const struct us_attention_train *a, struct us_attention_job *ret_job) {
  bool heads = a->kv_heads && a->q_heads && a->q_heads % a->kv_heads == 0;
  bool dims = a->qk_dim && a->v_dim && a->qk_dim % 16 == 0 && a->v_dim % 16 == 0 && a->qk_dim <= 192 &&
              a->v_dim <= 128;
  bool rows = a->q_stride % 8 == 0 && a->k_stride % 8 == 0 && a->v_stride % 8 == 0;
  if (!heads || !dims || !rows || !(a->scale > 0) || !a->plan || !a->block_begin != !a->block_end)
    return cudaErrorInvalidValue;
  *ret_job = (struct us_attention_job){};
  ret_job->a = *a;
  ret_job->cut = us_attention_cut_of(a->queries, a->keys, a->q_heads, a->kv_heads);
  ret_job->plan = us_attention_plan_of(a->plan, &ret_job->cut);
  return cudaSuccess;
}

int us_attention_train(const struct us_attention_train *a, cudaStream_t stream) {
  struct us_attention_job job;
  int status = us_attention_job_of(a, &job);
  if (status != cudaSuccess || !a->queries) return status;
  bool window = a->opt_window && a->opt_window <= US_SHORT_WINDOW;
  if (a->qk_dim <= 64 && a->v_dim <= 64)
    return window ? us_launch_forward<64, 64, 64, 1, 3>(&job, stream)
                  : us_launch_forward<64, 64, 64, 2, 2>(&job, stream);
  if (a->qk_dim <= 128)
    return window ? us_launch_forward<128, 128, 48, 1, 3>(&job, stream)
                  : us_launch_forward_long<128, 128, 64, 3, 3>(&job, stream);
  return us_launch_forward_long<192, 128, 64, 2, 2>(&job, stream);
}
