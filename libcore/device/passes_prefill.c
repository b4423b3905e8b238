/* passes_prefill.c: prompt passes of the CUDA executor through the prefill kernels. */
#include "device/executor_impl.h"

#include "device/operand.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>

#define CHUNK 512 /* rows: decode/generate.h cuts prompts at multiples of it */

struct us_device_prefill_options us_cuda_prefill_options(const struct us_cuda *cuda, uint32_t positions) {
  return (struct us_device_prefill_options){.rows = CHUNK,
                                            .logit_rows = 1,
                                            .max_positions = positions + US_MAX_BLOCK,
                                            .uniform = cuda->options.uniform,
                                            .uniform_seed = cuda->options.uniform_seed};
}

bool us_cuda_prefill_takes(const struct us_pass *pass) {
  if (!pass->prefill || pass->observer || pass->routed || pass->R > CHUNK) return false;
  for (size_t r = 0; r < pass->R; r++) {
    bool wanted = pass->logits && (!pass->want_logits || pass->want_logits[r]);
    if (pass->rows[r].kv != pass->rows[0].kv || pass->rows[r].position != pass->rows[0].position + r ||
        (wanted && r + 1 < pass->R))
      return false;
  }
  return true;
}

/* The features of all rows as the caller has them. */
static enum us_status fetch_taps(struct us_cuda *cuda, const struct us_pass *pass, struct us_err *err) {
  size_t width = (size_t)cuda->base.draft->shape.taps * cuda->base.model->shape.hidden, n = pass->R * width;
  struct us_device_prefill_result result = us_device_prefill_result(cuda->prefill, 0);
  enum us_status status = us_cuda_staging(cuda, n * sizeof(uint16_t), err);
  if (status == US_OK)
    status = us_cuda_fetch(cuda, 0, cuda->staging, result.features, n * sizeof(uint16_t), err);
  if (status == US_OK) status = us_devices_sync(cuda->devices, NULL, 0, err);
  const uint16_t *features = cuda->staging;
  for (size_t i = 0; status == US_OK && i < n; i++)
    pass->taps[i] = us_bf16_to_f32(features[i]) / US_ENGINE_OPERAND_UNIT;
  return status;
}

enum us_status us_cuda_prefill(struct us_cuda *cuda, const struct us_pass *pass, struct us_err *err) {
  int32_t tokens[CHUNK];
  uint32_t first = pass->rows[0].position, R = (uint32_t)pass->R;
  bool wanted = pass->logits && (!pass->want_logits || pass->want_logits[R - 1]);
  struct us_device_prefill_chunk chunk = {
      .tokens = tokens, .position = first, .rows = R, .kv = cuda->tables.kv[0], .logits = wanted};
  for (uint32_t r = 0; r < R; r++) tokens[r] = pass->rows[r].token;
  enum us_status status = us_kv_pool_tables(cuda->pool, pass->rows[0].kv, cuda->tables.kv[0], err);
  if (status == US_OK && pass->draft_kv) {
    chunk.opt_draft_kv = cuda->tables.draft_kv[0];
    status = us_kv_reserve(pass->draft_kv, first, R, err);
    if (status == US_OK)
      status = us_kv_pool_tables(cuda->draft_pool, pass->draft_kv, cuda->tables.draft_kv[0], err);
  }
  if (status == US_OK) status = us_device_prefill_run(cuda->prefill, &chunk, err);
  if (status == US_OK && pass->taps) status = fetch_taps(cuda, pass, err);
  if (status == US_OK && wanted)
    status = us_device_prefill_fetch_logits(
        cuda->prefill, 1, pass->logits + (size_t)(R - 1) * cuda->base.model->shape.vocab, err);
  return status == US_OK ? us_devices_sync(cuda->devices, NULL, 0, err) : status;
}
