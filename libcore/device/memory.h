/* memory.h: where device buffers come from, so that what plans and fills them needs no GPU.
 *
 *     us_device_schedule_create_in(weights, &options, &memory, &schedule, &err);
 *
 *     const struct us_device_memory_ops *us_device_memory_cuda     the current GPU's memory (builds with CUDA)
 *                                        us_device_memory_host     this process's: for tests
 *     us_device_memory_count(&next)                                addresses that nobody may touch: for plans and budgets
 *
 * Addresses are aligned to US_DEVICE_ALIGN bytes.
 */
#ifndef US_DEVICE_MEMORY_H
#define US_DEVICE_MEMORY_H

#include "base/err.h"
#include <stdint.h>

#define US_DEVICE_ALIGN 256

struct us_device_memory_ops {
  enum us_status (*alloc)(void *arg, uint64_t bytes, void **ret_memory, struct us_err *err);
  void (*free)(void *arg, void *memory); /* NULL is allowed */
  /* Both NULL: memory that is only counted. They return when the memory has its new content. */
  enum us_status (*upload)(void *arg, void *to, const void *from, uint64_t bytes, struct us_err *err);
  enum us_status (*fill)(void *arg, void *to, uint8_t byte, uint64_t bytes, struct us_err *err);
  void *arg;
};

extern const struct us_device_memory_ops us_device_memory_host;
extern const struct us_device_memory_ops us_device_memory_cuda;

/* *next is the first address that is given, then counts up; the caller keeps it. */
struct us_device_memory_ops us_device_memory_count(uint64_t *next);

static inline uint64_t us_device_align(uint64_t bytes) {
  return (bytes + US_DEVICE_ALIGN - 1) / US_DEVICE_ALIGN * US_DEVICE_ALIGN;
}

#endif
