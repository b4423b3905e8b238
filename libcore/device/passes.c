/* passes.c: the passes of the CUDA executor: rows up, operations, results down.
 *
 * Contents: groups and memory; rows; results of a target pass; a target pass; drafter context; a drafter's block.
 */
#include "device/executor_impl.h"

#include "device/operand.h"
#include "model/forward.h"
#include "plan/program.h"

#include <cuda_runtime_api.h>
#include <string.h>

/* Rows of a sequence in one launch: a windowed layer's ring has room for so many beyond a row's own window. */
#define SEQUENCE_ROWS US_MAX_BLOCK
/* Context rows in one launch: none may take another's slot in a ring, and a ring has 64 slots at least. */
#define CONTEXT_ROWS US_KV_PAGE

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
  }
  *ret_group = cuda->groups[index];
  return US_OK;
}

static size_t most_rows(const struct us_cuda *cuda) {
  const struct us_draft *draft = cuda->base.draft;
  return draft && draft->shape.block <= 8 ? 8 * US_ENGINE_SEQUENCES : US_ENGINE_MAX_ROWS;
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

static cudaStream_t use_rank(const struct us_cuda *cuda, uint32_t rank) {
  uint32_t gpu = us_devices_gpu(cuda->devices, rank);
  us_devices_use(cuda->devices, gpu);
  return cuda->devices->stream[gpu];
}

enum us_status us_cuda_fetch(const struct us_cuda *cuda, uint32_t rank, void *to, const void *from,
                             size_t bytes, struct us_err *err) {
  cudaStream_t stream = use_rank(cuda, rank);
  return us_cuda_status((int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream),
                        "copying results", err);
}

uint32_t us_cuda_range_end(const struct us_device_schedule *schedule, enum us_engine_program program,
                           bool head) {
  uint32_t begin = schedule->begin[program],
           end = program == US_ENGINE_PASS_TARGET ? schedule->head_end : schedule->end[program];
  while (end > begin && schedule->ops[end - 1].kind == US_ENGINE_SELECT) end--;
  while (!head && end > begin && schedule->ops[end - 1].task_op == US_TASK_HEAD) end--;
  return end;
}

static enum us_status run_program(struct us_cuda *cuda, struct us_device_group *group,
                                  enum us_engine_program program, bool head, struct us_err *err) {
  const struct us_device_schedule *schedule = group->schedule[0];
  group->state.round = cuda->passes++;
  enum us_status status = us_device_group_upload(group, &cuda->tables, err);
  if (status != US_OK) return status;
  return us_device_group_run(group, cuda->options.mode, schedule->begin[program],
                             us_cuda_range_end(schedule, program, head), err);
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

static void clear_rows(struct us_engine_row *rows) {
  for (uint32_t r = 0; r < US_ENGINE_MAX_ROWS; r++)
    rows[r] = (struct us_engine_row){.sequence = US_ENGINE_NONE};
}

static bool among(const struct us_kv *const *caches, uint32_t count, const struct us_kv *kv) {
  for (uint32_t i = 0; i < count; i++)
    if (caches[i] == kv) return true;
  return false;
}

/* Fill `rows` with as many of the pass's from `begin` as may run together, their caches into `caches`: a sequence's rows lie
 * together and their positions ascend by 1. */
static size_t take_rows(const struct us_pass *pass, size_t begin, size_t most, struct us_engine_row *rows,
                        const struct us_kv **caches, uint32_t *ret_count) {
  uint32_t count = 0, slot = 0;
  size_t n = 0;
  clear_rows(rows);
  for (; n < most && begin + n < pass->R; n++) {
    const struct us_row *row = &pass->rows[begin + n];
    if (count && caches[count - 1] == row->kv) {
      if (row->position != row[-1].position + 1 || ++slot == SEQUENCE_ROWS) break;
    } else {
      if (count == US_ENGINE_SEQUENCES || among(caches, count, row->kv)) break;
      caches[count++] = row->kv;
      slot = 0;
    }
    rows[n] = (struct us_engine_row){
        .token = row->token, .position = row->position, .sequence = count - 1, .slot = slot};
  }
  *ret_count = count;
  return n;
}

static enum us_status check_rows(const struct us_cuda *cuda, const struct us_pass *pass, struct us_err *err) {
  uint32_t vocab = cuda->base.model->shape.vocab;
  if (pass->taps && !cuda->base.draft) return us_err_set(err, US_ERR_USAGE, "taps need a drafter");
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

/* End of the run of rows that begins at `r` (of the chunk) and whose logits are wanted, or not. */
static size_t run_end(const struct us_cuda_chunk *chunk, size_t r) {
  size_t end = r + 1;
  while (end < chunk->rows &&
         wanted(chunk->pass, chunk->begin + end) == wanted(chunk->pass, chunk->begin + r))
    end++;
  return end;
}

/* Rows [a, b) of the logits of all ranks side by side into the staging memory (row r at r * N). */
static enum us_status fetch_logits(const struct us_cuda *cuda, const struct us_device_group *group,
                                   bool draft, size_t a, size_t b, struct us_err *err) {
  size_t N = cuda->base.model->shape.vocab;
  float *to = cuda->staging;
  for (uint32_t r = 0; r < cuda->devices->ranks; r++) {
    const struct us_device_schedule *s = group->schedule[r];
    cudaStream_t stream = use_rank(cuda, r);
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
  at.taps = pass->logits ? chunk->rows * shape->vocab * sizeof(float) : 0;
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
    if (wanted(chunk->pass, chunk->begin + r)) status = fetch_logits(cuda, chunk->group, false, r, end, err);
  }
  if (status == US_OK && at->routed > at->taps)
    status = us_cuda_fetch(cuda, 0, staging + at->taps, first->features, at->routed - at->taps, err);
  if (status == US_OK && at->bytes > at->routed)
    status = us_cuda_fetch(cuda, 0, staging + at->routed, first->routed, at->bytes - at->routed, err);
  return status == US_OK ? us_device_group_sync(chunk->group, err) : status;
}

/* From the staging memory to where the pass wants them. */
static void hand_out(const struct us_cuda *cuda, const struct us_cuda_chunk *chunk, const struct layout *at) {
  const struct us_shape *shape = &cuda->base.model->shape;
  const struct us_pass *pass = chunk->pass;
  const uint8_t *staging = cuda->staging;
  size_t N = shape->vocab, K = shape->top_k;
  for (size_t r = 0; r < chunk->rows; r++)
    if (wanted(pass, chunk->begin + r))
      memcpy(pass->logits + (chunk->begin + r) * N, staging + r * N * sizeof(float), N * sizeof(float));
  if (pass->taps) {
    size_t width = (size_t)cuda->base.draft->shape.taps * shape->hidden;
    for (size_t r = 0; r < chunk->rows; r += US_ENGINE_ROWS) {
      size_t rows = chunk->rows - r < US_ENGINE_ROWS ? chunk->rows - r : US_ENGINE_ROWS;
      us_operand_unpack(staging + at->taps + r / US_ENGINE_ROWS * us_operand_bytes(width), rows, width,
                        pass->taps + (chunk->begin + r) * width);
    }
  }
  for (uint32_t l = 0; pass->routed && l < shape->layers; l++) {
    uint32_t *to = pass->routed + (l * pass->R + chunk->begin) * K;
    const uint8_t *from = staging + at->routed + (size_t)l * chunk->group->rows * K * sizeof *to;
    if (shape->moe_layer[l])
      memcpy(to, from, chunk->rows * K * sizeof *to);
    else
      memset(to, 0xff, chunk->rows * K * sizeof *to);
  }
}

/* ---- a target pass ----------------------------------------------------------------------------------------------- */

/* Rows of a chunk to a group that has room for them, with the page tables of their caches. */
static enum us_status prepare_chunk(struct us_cuda *cuda, struct us_cuda_chunk *chunk, struct us_err *err) {
  struct us_engine_row rows[US_ENGINE_MAX_ROWS];
  const struct us_kv *caches[US_ENGINE_SEQUENCES];
  uint32_t count;
  chunk->rows = take_rows(chunk->pass, chunk->begin, most_rows(cuda), rows, caches, &count);
  enum us_status status = us_cuda_group(cuda, chunk->rows, &chunk->group, err);
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
    return us_err_set(err, US_ERR_USAGE, "an observed pass has at most %d rows a sequence and %zu in all",
                      SEQUENCE_ROWS, most_rows(cuda));
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
    status = run_program(cuda, chunk->group, US_ENGINE_PASS_TARGET, wants_head(chunk), err);
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
  for (size_t begin = 0; status == US_OK && begin < pass->R;) {
    struct us_cuda_chunk chunk = {.pass = pass, .begin = begin};
    status = run_chunk(cuda, &chunk, err);
    begin += chunk.rows;
  }
  return status;
}

/* ---- drafter context --------------------------------------------------------------------------------------------- */

static enum us_status need_draft(const struct us_executor *executor, struct us_err *err) {
  return executor->draft ? US_OK : us_err_set(err, US_ERR_USAGE, "the executor has no drafter");
}

/* The features of a chunk of rows to every rank. */
static enum us_status upload_features(struct us_cuda *cuda, struct us_device_group *group, const float *taps,
                                      size_t R, size_t width, struct us_err *err) {
  size_t tile = us_operand_bytes(width), tiles = (R + US_ENGINE_ROWS - 1) / US_ENGINE_ROWS;
  enum us_status status = us_cuda_staging(cuda, tiles * tile, err);
  for (size_t t = 0; status == US_OK && t < tiles; t++) {
    size_t rows = R - t * US_ENGINE_ROWS;
    us_operand_pack(taps + t * US_ENGINE_ROWS * width, rows < US_ENGINE_ROWS ? rows : US_ENGINE_ROWS, width,
                    (uint8_t *)cuda->staging + t * tile);
  }
  for (uint32_t r = 0; status == US_OK && r < cuda->devices->ranks; r++) {
    cudaStream_t stream = use_rank(cuda, r);
    int code = (int)cudaMemcpyAsync(group->schedule[r]->features, cuda->staging, tiles * tile,
                                    cudaMemcpyHostToDevice, stream);
    status = us_cuda_status(code, "features of the drafter", err);
  }
  return status;
}

static enum us_status context_chunk(struct us_cuda *cuda, const struct us_draft_context *context,
                                    size_t begin, size_t R, struct us_err *err) {
  size_t width = (size_t)cuda->base.draft->shape.taps * cuda->base.draft->shape.hidden;
  struct us_device_group *group;
  enum us_status status = us_cuda_group(cuda, R, &group, err);
  if (status == US_OK)
    status = us_kv_pool_tables(cuda->draft_pool, context->kv, cuda->tables.draft_kv[0], err);
  if (status == US_OK) status = upload_features(cuda, group, context->taps + begin * width, R, width, err);
  if (status != US_OK) return status;
  clear_rows(group->state.context);
  for (size_t r = 0; r < R; r++)
    group->state.context[r] =
        (struct us_engine_row){.position = context->position + (uint32_t)(begin + r), .slot = (uint32_t)r};
  group->state.sequence[0].committed = (uint32_t)R;
  status = run_program(cuda, group, US_ENGINE_PASS_CONTEXT, true, err);
  return status == US_OK ? us_device_group_sync(group, err)
                         : status; /* the staging memory is written again */
}

enum us_status us_cuda_draft_context(struct us_executor *executor, const struct us_draft_context *context,
                                     struct us_err *err) {
  struct us_cuda *cuda = (struct us_cuda *)executor;
  enum us_status status = need_draft(executor, err);
  if (status != US_OK || !context->R) return status;
  /* No query will see rows before the last window. */
  uint32_t window = executor->draft->shape.attention.window;
  size_t begin = window && context->R > window ? context->R - window : 0;
  status =
      us_kv_reserve(context->kv, context->position + (uint32_t)begin, (uint32_t)(context->R - begin), err);
  while (status == US_OK && begin < context->R) {
    size_t R = context->R - begin < CONTEXT_ROWS ? context->R - begin : CONTEXT_ROWS;
    status = context_chunk(cuda, context, begin, R, err);
    begin += R;
  }
  return status;
}

/* ---- a drafter's block ------------------------------------------------------------------------------------------- */

/* The normed rows that enter the head: the operand of the pass's last reductions. */
static enum us_status fetch_hidden(struct us_cuda *cuda, struct us_device_group *group,
                                   const struct us_draft_pass *pass, struct us_err *err) {
  const struct us_device_schedule *schedule = group->schedule[0];
  size_t D = cuda->base.model->shape.hidden, tiles = (pass->block + US_ENGINE_ROWS - 1) / US_ENGINE_ROWS;
  enum us_status status = us_cuda_staging(cuda, tiles * us_operand_bytes(D), err);
  uint8_t *staging = cuda->staging;
  bool found[US_ENGINE_MAX_TILES] = {false};
  for (uint32_t i = schedule->end[US_ENGINE_PASS_DRAFT];
       status == US_OK && i-- > schedule->begin[US_ENGINE_PASS_DRAFT];) {
    const struct us_engine_op *op = &schedule->ops[i];
    if (op->kind != US_ENGINE_REDUCE || op->row_tile >= tiles || found[op->row_tile]) continue;
    found[op->row_tile] = true;
    status = us_cuda_fetch(cuda, 0, staging + op->row_tile * us_operand_bytes(D), op->reduce.operand,
                           us_operand_bytes(D), err);
  }
  if (status == US_OK) status = us_device_group_sync(group, err);
  for (size_t t = 0; status == US_OK && t < tiles; t++) {
    size_t rows = pass->block - t * US_ENGINE_ROWS;
    us_operand_unpack(staging + t * us_operand_bytes(D), rows < US_ENGINE_ROWS ? rows : US_ENGINE_ROWS, D,
                      pass->hidden + t * US_ENGINE_ROWS * D);
  }
  return status;
}

static enum us_status check_block(const struct us_cuda *cuda, const struct us_draft_pass *pass,
                                  struct us_err *err) {
  uint32_t vocab = cuda->base.model->shape.vocab, most = cuda->base.draft->shape.block;
  if (!pass->block || pass->block > most)
    return us_err_set(err, US_ERR_USAGE, "a block of %u; 1 to %u rows can be drafted", pass->block, most);
  if (pass->anchor < 0 || (uint32_t)pass->anchor >= vocab)
    return us_err_set(err, US_ERR_USAGE, "anchor token %d is outside the vocabulary of %u", pass->anchor,
                      vocab);
  return US_OK;
}

enum us_status us_cuda_draft(struct us_executor *executor, const struct us_draft_pass *pass,
                             struct us_err *err) {
  struct us_cuda *cuda = (struct us_cuda *)executor;
  struct us_device_group *group;
  enum us_status status = need_draft(executor, err);
  if (status == US_OK) status = check_block(cuda, pass, err);
  if (status == US_OK) status = us_cuda_group(cuda, pass->block, &group, err);
  if (status == US_OK) status = us_kv_pool_tables(cuda->draft_pool, pass->kv, cuda->tables.draft_kv[0], err);
  if (status != US_OK) return status;
  clear_rows(group->state.draft);
  for (uint32_t j = 0; j < pass->block; j++)
    group->state.draft[j] = (struct us_engine_row){
        .token = j ? US_ENGINE_MASK : pass->anchor, .position = pass->position + j, .slot = j};
  group->state.sequence[0].drafts = pass->block - 1;
  group->state.sequence[0].position = pass->position;
  status = run_program(cuda, group, US_ENGINE_PASS_DRAFT, pass->logits != NULL, err);
  size_t N = cuda->base.model->shape.vocab;
  if (status == US_OK) status = us_cuda_staging(cuda, pass->block * N * sizeof(float), err);
  if (status == US_OK && pass->logits && pass->block > 1)
    status = fetch_logits(cuda, group, true, 1, pass->block, err);
  if (status == US_OK) status = us_device_group_sync(group, err);
  if (status == US_OK && pass->logits)
    memcpy(pass->logits, (const float *)cuda->staging + N, (pass->block - 1) * N * sizeof(float));
  return status == US_OK && pass->hidden ? fetch_hidden(cuda, group, pass, err) : status;
}
