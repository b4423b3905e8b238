/* f_config.c: any bytes as a config.json: no crash, and whatever parses prints to something that parses to the same. */
#include "model/shape.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void model(const char *text, size_t size) {
  struct us_shape shape, back;
  struct us_err err = {0};
  char *json = NULL;
  if (us_shape_parse(text, size, "config.json", &shape, &err) != US_OK) {
    if (err.status != US_ERR_INPUT || !*err.message || strchr(err.message, '\n')) abort();
    return;
  }
  if (us_shape_print(&shape, &json, &err) != US_OK) return; /* two rotary shares that no one factor gives */
  if (us_shape_parse(json, strlen(json), "config.json", &back, &err) != US_OK) abort();
  if (memcmp(&shape, &back, sizeof shape) != 0) abort();
  free(json);
}

static void drafter(const char *text, size_t size) {
  struct us_draft_shape shape, back;
  struct us_err err = {0};
  char *json = NULL;
  if (us_draft_shape_parse(text, size, "config.json", &shape, &err) != US_OK) {
    if (err.status != US_ERR_INPUT || !*err.message || strchr(err.message, '\n')) abort();
    return;
  }
  if (us_draft_shape_print(&shape, &json, &err) != US_OK) abort();
  if (us_draft_shape_parse(json, strlen(json), "config.json", &back, &err) != US_OK) abort();
  if (memcmp(&shape, &back, sizeof shape) != 0) abort();
  free(json);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  model((const char *)data, size);
  drafter((const char *)data, size);
  return 0;
}
