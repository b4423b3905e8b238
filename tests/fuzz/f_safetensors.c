/* f_safetensors.c: any bytes as a safetensors file: no crash, and what is accepted lies inside the bytes,
 * in order, found by its name. Seeds: tests/fixtures/reference.safetensors. */
#include "formats/safetensors.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Reading every byte lets a sanitizer judge the offsets. */
static unsigned touch(const struct us_safetensor *t) {
  const uint8_t *bytes = t->data;
  unsigned sum = 0;
  for (size_t i = 0; i < t->bytes; i++) sum += bytes[i];
  return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct us_safetensors *st = NULL;
  struct us_err err = {0};
  if (us_safetensors_open_memory(data, size, "x", &st, &err) != US_OK) {
    if (st || err.status != US_ERR_INPUT || strncmp(err.message, "x: ", 3) != 0 || strchr(err.message, '\n'))
      abort();
    return 0;
  }
  const uint8_t *expected = NULL;
  volatile unsigned sum = 0;
  for (size_t i = 0; i < us_safetensors_count(st); i++) {
    const struct us_safetensor *t = us_safetensors_at(st, i);
    if (expected && t->data != expected) abort();
    expected = (const uint8_t *)t->data + t->bytes;
    if (us_safetensors_find(st, t->name) != t) abort();
    if (us_safetensor_expect(t, t->dtype, t->ndim, t->dims, &err) != US_OK) abort();
    sum = sum + touch(t);
  }
  if (expected && expected != data + size) abort();
  us_safetensors_close(st);
  return 0;
}
