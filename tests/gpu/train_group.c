/* train_group.c: NCCL itself behind group.h, with the one rank that one GPU allows: every call is made, and changes nothing it should
 * not. Several ranks are train_lanes' (around a stand-in) and a machine's with several GPUs. */
#include "training/cuda/cuda.h"
#include "training/cuda/group.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FLOATS = 1 << 20, BEGIN = 4096, END = FLOATS - 4096 };

static int failures;

static void say(const char *check, bool good, const char *note) {
  printf("{\"check\": \"%s\", \"ok\": %s, \"note\": \"%s\"}\n", check, good ? "true" : "false", note);
  if (!good) failures++;
}

static enum us_status test(struct us_cuda *cuda, float *host, struct us_err *err) {
  struct us_cuda_group *group = NULL;
  struct us_owned owned = {BEGIN, END};
  void *memory[2] = {NULL};
  double values[3] = {1.0, -2.5, 1e300};
  enum us_status status = us_cuda_group_create(&cuda, 1, 0, 1, NULL, &group, err);
  for (int i = 0; i < 2 && status == US_OK; i++)
    status = us_cuda_take(cuda, FLOATS * sizeof(float), "arena", &memory[i], err);
  float *from = memory[0], *to = memory[1];
  if (status == US_OK) us_cuda_upload(cuda, from, host, FLOATS * sizeof(float));
  if (status == US_OK) status = us_cuda_group_reduce(group, &owned, &from, err);
  float *own = from ? from + BEGIN : NULL;
  if (status == US_OK) status = us_cuda_group_share(group, &owned, &own, &to, err);
  if (status == US_OK) status = us_cuda_group_wait(group, err);
  if (status == US_OK) status = us_cuda_group_sum(group, values, 3, err);
  if (status == US_OK) us_cuda_download(cuda, host + FLOATS, to, FLOATS * sizeof(float));
  if (status == US_OK) status = us_cuda_sync(cuda, err);
  if (status == US_OK) {
    say("a sum over one rank is its value", values[0] == 1.0 && values[1] == -2.5 && values[2] == 1e300, "");
    say("the owned range is shared",
        memcmp(host + BEGIN, host + FLOATS + BEGIN, (END - BEGIN) * sizeof(float)) == 0, "");
    bool outside = false;
    for (size_t i = 0; i < BEGIN; i++) outside |= host[FLOATS + i] != 0.0f || host[FLOATS + END + i] != 0.0f;
    say("nothing outside of it is touched", !outside, "");
  }
  us_cuda_group_free(group);
  us_cuda_give(from);
  us_cuda_give(to);
  return status;
}

int main(void) {
  struct us_cuda *cuda = NULL;
  struct us_err err = {0};
  void *pinned = NULL;
  int found = 0;
  if (cudaGetDeviceCount(&found) != cudaSuccess || found == 0) return 77;
  setenv("NCCL_NVLS_ENABLE", "0", 0);
  enum us_status status = us_cuda_open(0, &cuda, &err);
  if (status == US_OK) status = us_cuda_take_pinned(2 * FLOATS * sizeof(float), "arena", &pinned, &err);
  float *host = pinned;
  for (size_t i = 0; status == US_OK && i < FLOATS; i++) host[i] = (float)i * 0.5f - 7.0f;
  if (status == US_OK) status = test(cuda, host, &err);
  if (status != US_OK) say("calls succeed", false, err.message);
  us_cuda_give_pinned(pinned);
  us_cuda_close(cuda);
  return failures ? 1 : 0;
}
