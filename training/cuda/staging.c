/* staging.c: two slots of pinned memory that take turns. */
#include "training/cuda/staging.h"

#include "device/device.h"

enum us_status us_cuda_staging_create(struct us_cuda *cuda, size_t bytes, struct us_cuda_staging *staging,
                                      struct us_err *err) {
  void *memory = NULL;
  *staging = (struct us_cuda_staging){.cuda = cuda, .bytes = bytes};
  us_cuda_use(cuda); /* events belong to the current GPU, and one thread opens those of several */
  enum us_status status = us_cuda_take_pinned(bytes * US_CUDA_STAGING_SLOTS, "pinned memory", &memory, err);
  staging->memory = memory;
  for (int i = 0; i < US_CUDA_STAGING_SLOTS && status == US_OK; i++)
    status = us_cuda_status(cudaEventCreateWithFlags(&staging->sent[i], cudaEventDisableTiming),
                            "making an event", err);
  return status;
}

void us_cuda_staging_free(struct us_cuda_staging *staging) {
  us_cuda_give_pinned(staging->memory);
  for (int i = 0; i < US_CUDA_STAGING_SLOTS; i++)
    if (staging->sent[i]) (void)cudaEventDestroy(staging->sent[i]);
  *staging = (struct us_cuda_staging){0};
}

enum us_status us_cuda_staging_begin(struct us_cuda_staging *staging, struct us_err *err) {
  staging->slot = (staging->slot + 1) % US_CUDA_STAGING_SLOTS;
  staging->used = 0;
  staging->puts = 0;
  return us_cuda_status(cudaEventSynchronize(staging->sent[staging->slot]), "waiting for an upload", err);
}

void *us_cuda_staging_put(struct us_cuda_staging *staging, void *device, size_t bytes) {
  char *host = staging->memory + staging->slot * staging->bytes + staging->used;
  staging->put[staging->puts].device = device;
  staging->put[staging->puts].host = host;
  staging->put[staging->puts++].bytes = bytes;
  staging->used += (bytes + 63) / 64 * 64;
  return host;
}

void us_cuda_staging_shorten(struct us_cuda_staging *staging, size_t bytes) {
  staging->put[staging->puts - 1].bytes = bytes;
}

void us_cuda_staging_send(struct us_cuda_staging *staging) {
  struct us_cuda *cuda = staging->cuda;
  for (unsigned i = 0; i < staging->puts; i++)
    us_cuda_upload(cuda, staging->put[i].device, staging->put[i].host, staging->put[i].bytes);
  us_cuda_did(cuda, cudaEventRecord(staging->sent[staging->slot], cuda->stream), "recording an upload");
}
