/* train_sizes.cu: sizes that the operations over rows refuse before they launch anything, so there need be no GPU.
 *
 * Threads and pieces have 32-bit numbers: a size whose pieces have none would be computed twice in one place and never in another.
 */
#include "gpu_test.h"
#include "kernels/embed/embed_train.h"
#include "kernels/head_loss/head_loss_train.h"
#include "kernels/rmsnorm/rmsnorm_train.h"
#include "kernels/rope/rope_train.h"
#include "kernels/swiglu/swiglu_train.h"

static void refuse(const char *check, int status) {
  us_gpu_report(check, 1, status != cudaErrorInvalidValue, 0);
}

static void refuse_embeddings(void) {
  struct us_embed_train embed = {};
  embed.R = (size_t)1 << 23, embed.D = 1024;
  refuse("2^31 pieces of embeddings", us_embed_train(&embed, 0));
  struct us_embed_train_grad grad = {};
  grad.D = 1024;
  for (size_t warps = (size_t)1 << 26; warps < (size_t)1 << 32; warps *= 2) { /* 8 a piece of 1024 columns */
    grad.pieces = warps / 8;
    refuse("2^31 threads or more of an embedding's gradient", us_embed_train_grad(&grad, 0));
  }
  grad.D = 1022, grad.pieces = 1;
  refuse("a gradient of embeddings of no multiple of 4", us_embed_train_grad(&grad, 0));
}

static void refuse_rows(void) {
  refuse("2^31 pieces of SwiGLU", us_swiglu_train((size_t)1 << 20, 16384, NULL, NULL, 0));
  refuse("2^31 pieces of SwiGLU's gradient",
         us_swiglu_train_grad((size_t)1 << 20, 16384, NULL, NULL, NULL, NULL, 0));
  struct us_rope_train rope = {};
  rope.R = (size_t)1 << 25, rope.stride = 64 * 128, rope.rotary = 128, rope.rotated_heads = 8, rope.scale = 1;
  refuse("2^31 pieces of a rotation", us_rope_train(&rope, 0));
  struct us_rmsnorm_train norm = {};
  float x;
  norm.R = 1, norm.D = 12288, norm.x = &x;
  refuse("a norm over 12288 values", us_rmsnorm_train(&norm, 0));
  struct us_head_loss_train loss = {};
  loss.rows = 1, loss.N = 50257, loss.stride = 50260;
  refuse("a loss over 50257 logits", us_head_loss_train(&loss, 0));
}

int main() {
  refuse_embeddings();
  refuse_rows();
  return us_gpu_status();
}
