/* f_run.c: any bytes as a recorded run: no crash, and whatever parses writes to something that parses to the same. */
#include "decode/run.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void compare(const struct us_run_entry *a, const struct us_run_entry *b) {
  if (a->count != b->count || memcmp(a->ids, b->ids, a->count * sizeof *a->ids)) abort();
  if (a->prompt_count != b->prompt_count || memcmp(a->prompt, b->prompt, a->prompt_count * sizeof *a->prompt))
    abort();
  if (strcmp(a->text, b->text) || a->turn != b->turn || a->sample != b->sample || a->finish != b->finish)
    abort();
  if (!a->logprobs != !b->logprobs) abort();
  if (a->logprobs && memcmp(a->logprobs, b->logprobs, a->count * sizeof *a->logprobs)) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct us_run *run, *back;
  struct us_err err = {0};
  char *text;
  size_t bytes;
  if (us_run_parse((const char *)data, size, "run.jsonl", &run, &err) != US_OK) {
    if (err.status != US_ERR_INPUT || !*err.message || strchr(err.message, '\n')) abort();
    return 0;
  }
  FILE *out = open_memstream(&text, &bytes);
  for (size_t i = 0; out && i < run->n; i++)
    if (us_run_write(out, &run->entries[i], &err) != US_OK) abort();
  if (!out || fclose(out)) abort();
  if (us_run_parse(text, bytes, "run.jsonl", &back, &err) != US_OK || back->n != run->n) abort();
  for (size_t i = 0; i < run->n; i++) compare(&run->entries[i], &back->entries[i]);
  us_run_free(back);
  us_run_free(run);
  free(text);
  return 0;
}
