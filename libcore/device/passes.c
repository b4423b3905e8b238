/* passes.c: the passes of the CUDA executor: rows up, operations, results down.
 *
 * Contents: groups and memory; rows; results of a target pass; a target pass. The drafter's are in passes_draft.c.
 */
#include "device/executor_impl.h"

#include "device/operand.h"
#include "model/forward.h"
#include "plan/program.h"

#include <cuda_runtime_api.h>
#include <string.h>

/* ---- groups and memory ------------------------------------------------------------------------------------------- */

enum us_status us_cuda_group(struct us_cuda *cuda, size_t rows, struct us_device_group **ret_group,
                             struct us_err *err) {
  const struct us_draft *draft = cuda->base.draft;
  uint32_t index = 0;
  while (8u << index < rows) index++;
  if (!cuda->groups[index]) {
    struct us_device_schedule_options options =
        us_device_group_options(index, draft ? draft->shape.block : 0);
    options.max_positions = cuda->budget.options.positions + US_MAX_BLOCK;
    options.uniform = cuda->options.uniform;
    options.uniform_seed = cuda->options.uniform_seed;
    options.observe = true;
    enum us_status status =
        us_device_group_create(cuda->devices, cuda->weights, &options, &cuda->groups[index], err);
    if (status != US_OK) return status;
    us_device_group_caches(cuda->groups[index], cuda->pool, cuda->draft_pool);
    cuda->groups[index]->jitter = cuda->options.jitter;
    cuda->groups[index]->timeout_ns = cuda->options.timeout_ns;
  }
  *ret_group = cuda->groups[index];
  return US_OK;
}

/* Rows that a schedule's hand-offs take for one sequence's (us_device_group_options): a sequence's rows lie within a window of
 * so many, at a multiple of it. */
static uint32_t window_of(const struct us_cuda *cuda) {
  const struct us_draft *draft = cuda->base.draft;
  return us_device_group_options(US_DEVICE_GROUPS - 1, draft ? draft->shape.block : 0).block;
}

enum us_status us_cuda_staging(struct us_cuda *cuda, size_t bytes, struct us_err *err) {
  if (bytes <= cuda->staging_bytes) return US_OK;
  (void)cudaFreeHost(cuda->staging);
  cuda->staging = NULL, cuda->staging_bytes = 0;
  enum us_status status = us_cuda_status((int)cudaHostAlloc(&cuda->staging, bytes, cudaHostAllocPortable),
                                         "results of a pass", err);
  if (status == US_OK) cuda->staging_bytes = bytes;
  return status;
}

cudaStream_t us_cuda_use_rank(const struct us_cuda *cuda, uint32_t rank) {
  uint32_t gpu = us_devices_gpu(cuda->devices, rank);
  us_devices_use(cuda->devices, gpu);
  return cuda->devices->stream[gpu];
}

enum us_status us_cuda_fetch(const struct us_cuda *cuda, uint32_t rank, void *to, const void *from,
                             size_t bytes, struct us_err *err) {
  cudaStream_t stream = us_cuda_use_rank(cuda, rank);
  return us_cuda_status((int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream),
                        "copying results", err);
}

uint32_t us_cuda_range_end(const struct us_device_schedule *schedule, enum us_engine_program program,
                           bool head) {
  uint32_t begin = schedule->begin[program],
           end = program == US_ENGINE_PASS_TARGET ? schedule->head_end : schedule->end[program];
  bool slots = program == US_ENGINE_PASS_DRAFT && head && schedule->weights->draft_shape.markov;
  while (!slots && end > begin && schedule->ops[end - 1].kind == US_ENGINE_SELECT) end--;
  while (!head && end > begin && schedule->ops[end - 1].task_op == US_TASK_HEAD) end--;
  return end;
}

enum us_status us_cuda_run(struct us_cuda *cuda, struct us_device_group *group,
                           enum us_engine_program program, bool head, struct us_err *err) {
  const struct us_device_schedule *schedule = group->schedule[0];
  group->state.round = cuda->passes++;
  enum us_status status = us_device_group_upload(group, &cuda->tables, err);
  if (status != US_OK) return status;
  return us_device_group_run(group, cuda->options.mode, schedule->begin[program],
                             us_cuda_range_end(schedule, program, head), err);
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

void us_cuda_clear_rows(struct us_engine_row rows[US_ENGINE_MAX_ROWS]) {
  for (uint32_t r = 0; r < US_ENGINE_MAX_ROWS; r++)
    rows[r] = (struct us_engine_row){.sequence = US_ENGINE_NONE};
}

static bool among(const struct us_kv *const *caches, uint32_t count, const struct us_kv *kv) {
  for (uint32_t i = 0; i < count; i++)
    if (caches[i] == kv) return true;
  return false;
}

/* How many rows of the pass from `r` on are one sequence's at ascending positions, at most `most`. A windowed layer's ring has
 * room for a block of rows beyond a row's own window, no more. */
static uint32_t run_of(const struct us_pass *pass, size_t r, uint32_t most) {
  const struct us_row *row = &pass->rows[r];
  uint32_t n = 1;
  while (n < most && r + n < pass->R && row[n].kv == row->kv && row[n].position == row->position + n) n++;
  return n;
}

/* Place as many of the pass's rows from chunk->begin on as may run together: no sequence twice, none across a window's edge.
 * Fills `rows`, and `caches` with the sequences' caches. */
static void place_rows(const struct us_cuda *cuda, struct us_cuda_chunk *chunk, struct us_engine_row *rows,
                       const struct us_kv **caches, uint32_t *ret_count) {
  const struct us_pass *pass = chunk->pass;
  uint32_t window = window_of(cuda), count = 0, at = 0;
  us_cuda_clear_rows(rows);
  while (chunk->begin + chunk->rows < pass->R && count < US_ENGINE_SEQUENCES) {
    const struct us_row *row = &pass->rows[chunk->begin + chunk->rows];
    uint32_t n = run_of(pass, chunk->begin + chunk->rows, window);
    if (at % window + n > window) at = (at / window + 1) * window;
    if (among(caches, count, row->kv) || at + n > US_ENGINE_SEQUENCES * window) break;
    for (uint32_t i = 0; i < n; i++, at++) {
      rows[at] = (struct us_engine_row){
          .token = row[i].token, .position = row[i].position, .sequence = count, .slot = i};
      chunk->place[chunk->rows++] = at;
    }
    caches[count++] = row->kv;
  }
  *ret_count = count;
}

static enum us_status check_rows(const struct us_cuda *cuda, const struct us_pass *pass, struct us_err *err) {
  uint32_t vocab = cuda->base.model->shape.vocab;
  if ((pass->taps || pass->draft_kv) && !cuda->base.draft)
    return us_err_set(err, US_ERR_USAGE, "taps need a drafter");
  if (pass->draft_kv && !us_cuda_prefill_takes(pass))
    return us_err_set(err, US_ERR_USAGE,
                      "only a prompt's rows, with logits of the last, become context in a pass");
  for (size_t r = 0; r < pass->R; r++) {
    const struct us_row *row = &pass->rows[r];
    if (row->token < 0 || (uint32_t)row->token >= vocab)
      return us_err_set(err, US_ERR_USAGE, "token %d is outside the vocabulary of %u", row->token, vocab);
    if (!row->kv) return us_err_set(err, US_ERR_USAGE, "a row has no key/value cache");
    enum us_status status = us_kv_reserve(row->kv, row->position, 1, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

/* ---- results of a target pass ------------------------------------------------------------------------------------ */

static bool wanted(const struct us_pass *pass, size_t r) {
  return pass->logits && (!pass->want_logits || pass->want_logits[r]);
}

/* End of the run of rows that begins at `r` (of the chunk), lies together, and whose logits are wanted, or not. */
static size_t run_end(const struct us_cuda_chunk *chunk, size_t r) {
  size_t end = r + 1;
  while (end < chunk->rows && chunk->place[end] == chunk->place[end - 1] + 1 &&
         wanted(chunk->pass, chunk->begin + end) == wanted(chunk->pass, chunk->begin + r))
    end++;
  return end;
}

enum us_status us_cuda_fetch_logits(const struct us_cuda *cuda, const struct us_device_group *group,
                                    bool draft, size_t a, size_t b, struct us_err *err) {
  size_t N = cuda->base.model->shape.vocab;
  float *to = cuda->staging;
  for (uint32_t r = 0; r < cuda->devices->ranks; r++) {
    const struct us_device_schedule *s = group->schedule[r];
    cudaStream_t stream = us_cuda_use_rank(cuda, r);
    if (!s->logits_count) continue;
    const float *from = (draft ? s->draft_logits : s->logits) + a * s->logits_stride;
    int code = (int)cudaMemcpy2DAsync(to + a * N + s->logits_first, N * sizeof(float), from,
                                      s->logits_stride * sizeof(float), s->logits_count * sizeof(float),
                                      b - a, cudaMemcpyDeviceToHost, stream);
    enum us_status status = us_cuda_status(code, "copying logits", err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

/* Where the parts of a chunk's results lie in the staging memory. */
struct layout {
  size_t logits, taps, routed, bytes;
};
static struct layout layout_of(const struct us_cuda *cuda, const struct us_cuda_chunk *chunk) {
  const struct us_shape *shape = &cuda->base.model->shape;
  const struct us_pass *pass = chunk->pass;
  size_t taps = cuda->base.draft ? cuda->base.draft->shape.taps : 0;
  struct layout at = {.logits = 0};
  at.taps = pass->logits ? (chunk->place[chunk->rows - 1] + (size_t)1) * shape->vocab * sizeof(float) : 0;
  at.routed = at.taps +
              (pass->taps ? chunk->group->rows / US_ENGINE_ROWS * us_operand_bytes(taps * shape->hidden) : 0);
  at.bytes =
      at.routed +
      (pass->routed ? (size_t)shape->layers * chunk->group->rows * shape->top_k * sizeof(uint32_t) : 0);
  return at;
}

static enum us_status fetch_results(const struct us_cuda *cuda, const struct us_cuda_chunk *chunk,
                                    const struct layout *at, struct us_err *err) {
  const struct us_device_schedule *first = chunk->group->schedule[0];
  uint8_t *staging = cuda->staging;
  enum us_status status = US_OK;
  for (size_t r = 0, end; status == US_OK && chunk->pass->logits && r < chunk->rows; r = end) {
    end = run_end(chunk, r);
    if (wanted(chunk->pass, chunk->begin + r))
      status = us_cuda_fetch_logits(cuda, chunk->group, false, chunk->place[r],
                                    chunk->place[end - 1] + (size_t)1, err);
  }
  if (status == US_OK && at->routed > at->taps)
    status = us_cuda_fetch(cuda, 0, staging + at->taps, first->features, at->routed - at->taps, err);
  if (status == US_OK && at->bytes > at->routed)
    status = us_cuda_fetch(cuda, 0, staging + at->routed, first->routed, at->bytes - at->routed, err);
  return status == US_OK ? us_device_group_sync(chunk->group, err) : status;
}

/* The taps of row `r` of the chunk. */
static void hand_out_taps(const struct us_cuda *cuda, const struct us_cuda_chunk *chunk,
                          const uint8_t *operands, size_t r) {
  size_t width = (size_t)cuda->base.draft->shape.taps * cuda->base.model->shape.hidden;
  us_operand_unpack_row(operands + chunk->place[r] / US_ENGINE_ROWS * us_operand_bytes(width),
                        chunk->place[r] % US_ENGINE_ROWS, width,
                        chunk->pass->taps + (chunk->begin + r) * width);
}

/* The experts that row `r` of the chunk chose in every layer. */
static void hand_out_routes(const struct us_cuda *cuda, const struct us_cuda_chunk *chunk,
                            const uint32_t *routed, size_t r) {
  const struct us_shape *shape = &cuda->base.model->shape;
  size_t K = shape->top_k;
  for (uint32_t l = 0; l < shape->layers; l++) {
    uint32_t *to = chunk->pass->routed + (l * chunk->pass->R + chunk->begin + r) * K;
    if (shape->moe_layer[l])
      memcpy(to, routed + ((size_t)l * chunk->group->rows + chunk->place[r]) * K, K * sizeof *to);
    else
      memset(to, 0xff, K * sizeof *to);
  }
}

/* From the staging memory to where the pass wants them. */
static void hand_out(const struct us_cuda *cuda, const struct us_cuda_chunk *chunk, const struct layout *at) {
  const struct us_pass *pass = chunk->pass;
  const uint8_t *staging = cuda->staging;
  size_t N = cuda->base.model->shape.vocab;
  for (size_t r = 0; r < chunk->rows; r++) {
    if (wanted(pass, chunk->begin + r))
      memcpy(pass->logits + (chunk->begin + r) * N, staging + chunk->place[r] * N * sizeof(float),
             N * sizeof(float));
    if (pass->taps) hand_out_taps(cuda, chunk, staging + at->taps, r);
    if (pass->routed) hand_out_routes(cuda, chunk, (const uint32_t *)(const void *)(staging + at->routed), r);
  }
}

/* ---- a target pass ----------------------------------------------------------------------------------------------- */

/* Rows of a chunk to a group that has room for them, with the page tables of their caches. */
static enum us_status prepare_chunk(struct us_cuda *cuda, struct us_cuda_chunk *chunk, struct us_err *err) {
  struct us_engine_row rows[US_ENGINE_MAX_ROWS];
  const struct us_kv *caches[US_ENGINE_SEQUENCES];
  uint32_t count;
  place_rows(cuda, chunk, rows, caches, &count);
  enum us_status status = us_cuda_group(cuda, chunk->place[chunk->rows - 1] + (size_t)1, &chunk->group, err);
  for (uint32_t s = 0; status == US_OK && s < count; s++)
    status = us_kv_pool_tables(cuda->pool, caches[s], cuda->tables.kv[s], err);
  if (status == US_OK) memcpy(chunk->group->state.target, rows, sizeof rows);
  return status;
}

static bool wants_head(const struct us_cuda_chunk *chunk) {
  for (size_t r = 0; r < chunk->rows; r++)
    if (wanted(chunk->pass, chunk->begin + r)) return true;
  return false;
}

static enum us_status run_observed(struct us_cuda *cuda, const struct us_cuda_chunk *chunk, bool *ret_stopped,
                                   struct us_err *err) {
  const struct us_device_schedule *schedule = chunk->group->schedule[0];
  if (chunk->rows < chunk->pass->R)
    return us_err_set(err, US_ERR_USAGE, "an observed pass has at most %u rows a sequence and %d sequences",
                      window_of(cuda), US_ENGINE_SEQUENCES);
  enum us_status status = us_device_group_upload(chunk->group, &cuda->tables, err);
  if (status != US_OK) return status;
  return us_cuda_observe(cuda, chunk, schedule->begin[US_ENGINE_PASS_TARGET],
                         us_cuda_range_end(schedule, US_ENGINE_PASS_TARGET, chunk->pass->logits != NULL),
                         ret_stopped, err);
}

static enum us_status run_chunk(struct us_cuda *cuda, struct us_cuda_chunk *chunk, struct us_err *err) {
  bool stopped = false;
  enum us_status status = prepare_chunk(cuda, chunk, err);
  if (status != US_OK) return status;
  if (chunk->pass->observer)
    status = run_observed(cuda, chunk, &stopped, err);
  else
    status = us_cuda_run(cuda, chunk->group, US_ENGINE_PASS_TARGET, wants_head(chunk), err);
  if (status != US_OK || stopped) return status;
  struct layout at = layout_of(cuda, chunk);
  status = us_cuda_staging(cuda, at.bytes, err);
  if (status == US_OK) status = fetch_results(cuda, chunk, &at, err);
  if (status == US_OK) hand_out(cuda, chunk, &at);
  return status;
}

enum us_status us_cuda_forward(struct us_executor *executor, const struct us_pass *pass, struct us_err *err) {
  struct us_cuda *cuda = (struct us_cuda *)executor;
  enum us_status status = check_rows(cuda, pass, err);
  if (status == US_OK && pass->R && us_cuda_prefill_takes(pass)) return us_cuda_prefill(cuda, pass, err);
  for (size_t begin = 0; status == US_OK && begin < pass->R;) {
    struct us_cuda_chunk chunk = {.pass = pass, .begin = begin};
    status = run_chunk(cuda, &chunk, err);
    begin += chunk.rows;
  }
  return status;
}
