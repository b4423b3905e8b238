/* passes_draft.c: the drafter's passes of the CUDA executor: context of committed rows, and a block. */
#include "device/executor_impl.h"

#include "device/operand.h"

#include <cuda_runtime_api.h>
#include <string.h>

/* Context rows in one launch: none may take another's slot in a ring, and a ring has 64 slots at least. */
#define CONTEXT_ROWS US_KV_PAGE

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
    cudaStream_t stream = us_cuda_use_rank(cuda, r);
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
  us_cuda_clear_rows(group->state.context);
  for (size_t r = 0; r < R; r++)
    group->state.context[r] =
        (struct us_engine_row){.position = context->position + (uint32_t)(begin + r), .slot = (uint32_t)r};
  group->state.sequence[0].committed = (uint32_t)R;
  status = us_cuda_run(cuda, group, US_ENGINE_PASS_CONTEXT, true, err);
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
    if (op->kind != US_ENGINE_REDUCE) continue;
    for (uint32_t t = op->row_tile; status == US_OK && t < op->row_tile + op->row_tiles && t < tiles; t++) {
      if (found[t]) continue;
      found[t] = true;
      status =
          us_cuda_fetch(cuda, 0, staging + t * us_operand_bytes(D),
                        (const uint8_t *)op->reduce.operand + (t - op->row_tile) * op->reduce.operand_tile,
                        us_operand_bytes(D), err);
    }
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

/* With a Markov head the pass chooses the slots' tokens: the likeliest, or as its draw says, which may take the kernel that filters:
 * that is chosen by what active sequences want. */
static void begin_sequence(struct us_engine_sequence *s, const struct us_draft_pass *pass,
                           const struct us_draft_draw *draw) {
  s->active = draw != NULL;
  s->drafts = pass->block - 1, s->position = pass->position;
  s->replay = NULL;
  s->rule = draw ? US_VERIFY_REJECT : US_VERIFY_MATCH;
  s->sampling = draw ? *draw->sampling : (struct us_sampling){0};
  s->seed = draw ? draw->seed : 0, s->sample = draw ? draw->sample : 0;
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
  us_cuda_clear_rows(group->state.draft);
  for (uint32_t j = 0; j < pass->block; j++)
    group->state.draft[j] = (struct us_engine_row){
        .token = j ? US_ENGINE_MASK : pass->anchor, .position = pass->position + j, .slot = j};
  begin_sequence(&group->state.sequence[0], pass, executor->draft->shape.markov ? pass->opt_draw : NULL);
  status = us_cuda_run(cuda, group, US_ENGINE_PASS_DRAFT, pass->logits != NULL, err);
  group->state.sequence[0].active = 0;
  size_t N = cuda->base.model->shape.vocab;
  if (status == US_OK) status = us_cuda_staging(cuda, pass->block * N * sizeof(float), err);
  if (status == US_OK && pass->logits && pass->block > 1)
    status = us_cuda_fetch_logits(cuda, group, true, 1, pass->block, err);
  if (status == US_OK) status = us_device_group_sync(group, err);
  if (status == US_OK && pass->logits)
    memcpy(pass->logits, (const float *)cuda->staging + N, (pass->block - 1) * N * sizeof(float));
  return status == US_OK && pass->hidden ? fetch_hidden(cuda, group, pass, err) : status;
}
