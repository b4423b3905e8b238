/* memory.c: buffers in host memory, and buffers that are only counted. */
#include "device/memory.h"

#include <stdlib.h>
#include <string.h>

static enum us_status host_alloc(void *arg, uint64_t bytes, void **ret_memory, struct us_err *err) {
  *ret_memory = aligned_alloc(US_DEVICE_ALIGN, us_device_align(bytes ? bytes : 1));
  return *ret_memory ? US_OK : us_err_memory(err, "a buffer", bytes);
}

static void host_free(void *arg, void *memory) {
  free(memory);
}

static enum us_status host_upload(void *arg, void *to, const void *from, uint64_t bytes, struct us_err *err) {
  memcpy(to, from, bytes);
  return US_OK;
}

static enum us_status host_fill(void *arg, void *to, uint8_t byte, uint64_t bytes, struct us_err *err) {
  memset(to, byte, bytes);
  return US_OK;
}

const struct us_device_memory_ops us_device_memory_host = {host_alloc, host_free, host_upload, host_fill,
                                                           NULL};

static enum us_status count_alloc(void *arg, uint64_t bytes, void **ret_memory, struct us_err *err) {
  uint64_t *next = arg;
  *ret_memory = (void *)(uintptr_t)*next;
  *next += us_device_align(bytes);
  return US_OK;
}

static void count_free(void *arg, void *memory) {}

struct us_device_memory_ops us_device_memory_count(uint64_t *next) {
  *next = us_device_align(*next ? *next : 1);
  return (struct us_device_memory_ops){.alloc = count_alloc, .free = count_free, .arg = next};
}
