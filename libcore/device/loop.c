/* loop.c: admission, launches and the mailbox of resident rounds.
 *
 * Contents: admission; launches; reports; rounds; creation and end.
 */
#include "device/loop.h"

#include "kernels/engine/round.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct us_device_loop {
  struct us_executor_cuda_parts parts;
  struct us_device_loop_options options;
  struct us_device_group *group;
  struct us_engine_mailbox *mailbox; /* mapped */
  struct us_device_tables tables;
  int32_t *replays; /* (batch, replay_capacity) on the first GPU; the others read it there */
  size_t replay_capacity;
  uint32_t events; /* taken from the ring */
};

/* ---- admission --------------------------------------------------------------------------------------------------- */

static enum us_status check_sequence(const struct us_device_loop *loop, const struct us_rounds_sequence *s,
                                     struct us_err *err) {
  uint32_t vocab = loop->parts.weights[0]->shape.vocab;
  bool filters = us_engine_filters(&s->sampling, vocab);
  if (s->limit <= s->position)
    return us_err_set(err, US_ERR_USAGE, "a sequence at position %u may not commit past %u", s->position,
                      s->limit);
  if (s->drafts >= loop->options.block)
    return us_err_set(err, US_ERR_USAGE, "%u proposals do not fit a block of %u", s->drafts,
                      loop->options.block);
  if (filters && loop->parts.devices->ranks > 1 && !loop->group->schedule[0]->rank.logits_all[0])
    return us_err_set(err, US_ERR_USAGE,
                      "top-k, top-p and min-p on several ranks need a buffer for whole rows");
  return US_OK;
}

static enum us_status check_rounds(const struct us_device_loop *loop, const struct us_rounds *rounds,
                                   struct us_err *err) {
  if (rounds->adaptive && !loop->options.adaptive)
    return us_err_set(err, US_ERR_USAGE, "the loop was not made for adaptive lengths");
  if (!rounds->n || rounds->n > loop->options.batch || rounds->block > loop->options.block)
    return us_err_set(err, US_ERR_USAGE,
                      "%u sequences in blocks of %u; the loop was made for %u in blocks of %u", rounds->n,
                      rounds->block, loop->options.batch, loop->options.block);
  enum us_status status = US_OK;
  for (uint32_t i = 0; status == US_OK && i < rounds->n; i++)
    status = check_sequence(loop, &rounds->sequences[i], err);
  return status;
}

/* The recorded tokens of all sequences, side by side on the first GPU. */
static enum us_status upload_replays(struct us_device_loop *loop, const struct us_rounds *rounds,
                                     struct us_err *err) {
  size_t longest = 0;
  for (uint32_t i = 0; i < rounds->n; i++)
    if (rounds->sequences[i].replay && rounds->sequences[i].replay_count > longest)
      longest = rounds->sequences[i].replay_count;
  us_devices_use(loop->parts.devices, 0);
  if (longest > loop->replay_capacity) {
    size_t capacity = longest + longest / 2;
    (void)cudaFree(loop->replays);
    loop->replays = NULL, loop->replay_capacity = 0;
    int code = (int)cudaMalloc((void **)&loop->replays, loop->options.batch * capacity * sizeof(int32_t));
    enum us_status status = us_cuda_status(code, "recorded tokens", err);
    if (status != US_OK) return status;
    loop->replay_capacity = capacity;
  }
  for (uint32_t i = 0; i < rounds->n; i++) {
    const struct us_rounds_sequence *s = &rounds->sequences[i];
    if (!s->replay || !s->replay_count) continue;
    int code = (int)cudaMemcpyAsync(loop->replays + i * loop->replay_capacity, s->replay,
                                    s->replay_count * sizeof(int32_t), cudaMemcpyHostToDevice,
                                    loop->parts.devices->stream[0]);
    enum us_status status = us_cuda_status(code, "recorded tokens", err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

/* A sequence's first round, in slot i of the state. */
static void admit(struct us_device_loop *loop, const struct us_rounds_sequence *from, uint32_t i) {
  struct us_engine_sequence *s = &loop->group->state.sequence[i];
  *s = (struct us_engine_sequence){.active = 1,
                                   .id = i,
                                   .anchor = from->anchor,
                                   .position = from->position,
                                   .limit = from->limit,
                                   .sample = from->sample,
                                   .seed = from->seed,
                                   .sampling = from->sampling,
                                   .most_drafts = from->drafts,
                                   .rule = from->rule,
                                   .logprobs = from->logprobs,
                                   .replay = from->replay,
                                   .replay_first = from->replay_first,
                                   .replay_count = (uint32_t)from->replay_count};
  for (; s->stop_count < from->stop_id_count && s->stop_count < sizeof s->stop / sizeof *s->stop;
       s->stop_count++)
    s->stop[s->stop_count] = from->stop_ids[s->stop_count];
  for (uint32_t j = 0; j < sizeof s->accept / sizeof *s->accept; j++)
    s->accept[j] =
        !from->accept_count ? 1.0f : from->accept[j < from->accept_count ? j : from->accept_count - 1];
  us_engine_begin_round(&loop->group->state, i, loop->parts.weights[0]->shape.vocab);
  if (s->replay) s->replay = loop->replays + i * loop->replay_capacity;
}

/* The state of a loop in which nothing runs. */
static void clear_rows(struct us_engine_state *state) {
  for (uint32_t i = 0; i < US_ENGINE_SEQUENCES; i++) state->sequence[i].active = 0;
  for (uint32_t r = 0; r < US_ENGINE_MAX_ROWS; r++)
    state->target[r] = state->draft[r] = state->context[r] = us_engine_no_row();
}

static enum us_status admit_all(struct us_device_loop *loop, const struct us_rounds *rounds,
                                struct us_err *err) {
  enum us_status status = upload_replays(loop, rounds, err);
  clear_rows(&loop->group->state);
  loop->group->state.adaptive = rounds->adaptive != NULL;
  if (rounds->adaptive) loop->group->state.cost = *rounds->adaptive;
  for (uint32_t i = 0; status == US_OK && i < rounds->n; i++) admit(loop, &rounds->sequences[i], i);
  loop->mailbox->park = loop->mailbox->cancel = 0;
  return status;
}

/* Pages for every position that a launch of so many rounds may write, and the tables that name them. */
static enum us_status reserve(struct us_device_loop *loop, const struct us_rounds *rounds, uint32_t count,
                              struct us_err *err) {
  enum us_status status = US_OK;
  for (uint32_t i = 0; status == US_OK && i < rounds->n; i++) {
    const struct us_rounds_sequence *from = &rounds->sequences[i];
    const struct us_engine_sequence *s = &loop->group->state.sequence[i];
    uint32_t first = s->position - s->committed, rows = s->committed + count * loop->options.block;
    if (!s->active) continue;
    if (rows > s->limit - first) rows = s->limit - first;
    status = us_kv_reserve(from->kv, first, rows, err);
    if (status == US_OK) status = us_kv_pool_tables(loop->parts.pool, from->kv, loop->tables.kv[i], err);
    if (status != US_OK || !rounds->drafting) continue;
    status = us_kv_reserve(from->draft_kv, first, rows, err);
    if (status == US_OK)
      status = us_kv_pool_tables(loop->parts.draft_pool, from->draft_kv, loop->tables.draft_kv[i], err);
  }
  return status;
}

/* ---- reports ----------------------------------------------------------------------------------------------------- */

/* Give on_round what has arrived. A sequence that has ended for the caller is cancelled; its last rounds are reported too. */
static bool take_events(struct us_device_loop *loop, struct us_rounds *rounds) {
  struct us_engine_event e;
  bool any = false;
  while (us_engine_event_take(loop->mailbox, loop->events, &e)) {
    struct us_rounds_report report = {.sequence = e.id,
                                      .round = e.round,
                                      .tokens = e.token,
                                      .logprobs = e.has_logprobs ? e.logprob : NULL,
                                      .count = e.count,
                                      .drafts = e.drafts,
                                      .accepted = e.accepted,
                                      .broken = e.finish == US_ENGINE_BROKEN,
                                      .time = e.time};
    loop->mailbox->read = ++loop->events;
    any = true;
    if (!rounds->on_round(rounds->arg, &report)) loop->mailbox->cancel |= 1u << e.id;
  }
  return any;
}

/* Whether every GPU has finished, or one has failed. */
static bool finished(const struct us_device_loop *loop) {
  bool all = true;
  for (uint32_t gpu = 0; gpu < loop->parts.devices->gpus; gpu++) {
    us_devices_use(loop->parts.devices, gpu);
    cudaError_t code = cudaStreamQuery(loop->parts.devices->stream[gpu]);
    if (code != cudaSuccess && code != cudaErrorNotReady) return true;
    all &= code == cudaSuccess;
  }
  return all;
}

static enum us_status interrupted(const struct us_rounds *rounds, struct us_err *err) {
  if (rounds->interrupted && rounds->interrupted()) return us_err_set(err, US_INTERRUPTED, "interrupted");
  return US_OK;
}

/* Until the launch has ended. An interrupt parks it. */
static enum us_status listen(struct us_device_loop *loop, struct us_rounds *rounds, struct us_err *err) {
  const struct timespec pause = {.tv_nsec = 20000};
  enum us_status status = US_OK;
  while (!finished(loop)) {
    if (!take_events(loop, rounds)) nanosleep(&pause, NULL);
    if (status == US_OK && (status = interrupted(rounds, err)) != US_OK) loop->mailbox->park = 1;
  }
  enum us_status end = us_device_group_sync(loop->group, status == US_OK ? err : &(struct us_err){0});
  if (end == US_OK) take_events(loop, rounds);
  return status == US_OK ? end : status;
}

/* ---- launches ---------------------------------------------------------------------------------------------------- */

static uint32_t list_begin(const struct us_device_loop *loop) {
  return loop->group->schedule[0]
      ->begin[loop->options.drafting ? US_ENGINE_PASS_CONTEXT : US_ENGINE_PASS_TARGET];
}

static uint32_t list_end(const struct us_device_loop *loop) {
  return loop->group->schedule[0]->end[US_ENGINE_PASS_TARGET];
}

/* One kernel a GPU for up to `count` rounds. */
static enum us_status launch(struct us_device_loop *loop, uint32_t count, struct us_err *err) {
  enum us_status status = US_OK;
  for (uint32_t gpu = 0; status == US_OK && gpu < loop->parts.devices->gpus; gpu++) {
    struct us_engine_launch one;
    us_device_group_fill(loop->group, gpu, list_begin(loop), list_end(loop), &one);
    one.rounds = count;
    us_devices_use(loop->parts.devices, gpu);
    status =
        us_cuda_status(us_engine_run(&one, loop->parts.devices->stream[gpu]), "launching the engine", err);
  }
  return status;
}

/* Rank 0's state as the launch left it becomes the host's copy; any rank's is the same but for its page tables. */
static enum us_status fetch_state(struct us_device_loop *loop, struct us_err *err) {
  us_devices_use(loop->parts.devices, 0);
  int code =
      (int)cudaMemcpyAsync(&loop->group->state, loop->group->schedule[0]->rank.state,
                           sizeof loop->group->state, cudaMemcpyDeviceToHost, loop->parts.devices->stream[0]);
  enum us_status status = us_cuda_status(code, "the state of the rounds", err);
  return status == US_OK ? us_device_group_sync(loop->group, err) : status;
}

/* Up to `count` rounds and what they report. */
static enum us_status run_launch(struct us_device_loop *loop, struct us_rounds *rounds, uint32_t count,
                                 struct us_err *err) {
  struct us_device_group *group = loop->group;
  uint32_t round = group->state.round;
  enum us_status status = us_device_group_upload(group, &loop->tables, err), heard;
  if (status != US_OK) return status;
  if (loop->parts.mode == US_DEVICE_ENGINE) {
    status = launch(loop, count, err);
    heard = status == US_OK ? listen(loop, rounds, err) : status;
  } else {
    status = us_device_group_run(group, loop->parts.mode, list_begin(loop), list_end(loop), err);
    heard = status == US_OK ? listen(loop, rounds, err) : status;
  }
  if (heard != US_OK && heard != US_INTERRUPTED) return heard;
  status = fetch_state(loop, heard == US_OK ? err : &(struct us_err){0});
  if (status == US_OK && loop->parts.mode == US_DEVICE_ENGINE)
    us_device_group_ran(group, list_begin(loop), list_end(loop), group->state.round - round);
  return heard == US_OK ? status : heard;
}

/* ---- rounds ------------------------------------------------------------------------------------------------------ */

/* Committed rows that the next round would have made context of. */
static enum us_status settle_context(struct us_device_loop *loop, const struct us_rounds *rounds,
                                     struct us_err *err) {
  const struct us_device_schedule *schedule = loop->group->schedule[0];
  bool any = false;
  for (uint32_t r = 0; r < US_ENGINE_MAX_ROWS; r++)
    any |= loop->group->state.context[r].sequence != US_ENGINE_NONE;
  if (!rounds->drafting || !any) return US_OK;
  enum us_status status =
      us_device_group_run(loop->group, loop->parts.mode, schedule->begin[US_ENGINE_PASS_CONTEXT],
                          schedule->end[US_ENGINE_PASS_CONTEXT], err);
  return status == US_OK ? us_device_group_sync(loop->group, err) : status;
}

enum us_status us_device_loop_run(struct us_device_loop *loop, struct us_rounds *rounds, struct us_err *err) {
  struct us_engine_state *state = &loop->group->state;
  uint32_t count = loop->parts.mode == US_DEVICE_ENGINE ? US_DEVICE_LOOP_ROUNDS : 1;
  uint64_t experts = state->experts, layers = state->expert_layers;
  enum us_status status = check_rounds(loop, rounds, err);
  if (status == US_OK) status = admit_all(loop, rounds, err);
  do {
    if (status == US_OK) status = reserve(loop, rounds, count, err);
    if (status == US_OK) status = run_launch(loop, rounds, count, err);
  } while (status == US_OK && state->live == rounds->n);
  if (status == US_OK) status = settle_context(loop, rounds, err);
  rounds->experts = state->experts - experts;
  rounds->expert_layers = state->expert_layers - layers;
  return status;
}

enum us_status us_device_rounds(const struct us_executor *executor, struct us_device_loop **loop,
                                struct us_rounds *rounds, struct us_err *err) {
  struct us_device_loop_options o = {.batch = rounds->batch,
                                     .block = rounds->block,
                                     .drafting = rounds->drafting,
                                     .adaptive = rounds->adaptive != NULL};
  struct us_executor_cuda_parts parts;
  if (*loop) {
    const struct us_device_loop_options *have = &(*loop)->options;
    if (have->batch == o.batch && have->block == o.block && have->drafting == o.drafting &&
        have->adaptive == o.adaptive)
      return us_device_loop_run(*loop, rounds, err);
    us_device_loop_free(*loop);
    *loop = NULL;
  }
  if (!us_executor_cuda_parts(executor, &parts))
    return us_err_set(err, US_ERR_USAGE, "%s is not an executor on GPUs", executor->name);
  enum us_status status = us_device_loop_create(&parts, &o, loop, err);
  return status == US_OK ? us_device_loop_run(*loop, rounds, err) : status;
}

/* ---- creation and end -------------------------------------------------------------------------------------------- */

enum us_status us_device_loop_create(const struct us_executor_cuda_parts *parts,
                                     const struct us_device_loop_options *options,
                                     struct us_device_loop **ret_loop, struct us_err *err) {
  *ret_loop = NULL;
  if (!options->batch || options->batch > US_ENGINE_SEQUENCES || !options->block ||
      options->block > US_MAX_BLOCK)
    return us_err_set(err, US_ERR_USAGE,
                      "%u sequences in blocks of %u; the engine runs up to %d in blocks of %d",
                      options->batch, options->block, US_ENGINE_SEQUENCES, US_MAX_BLOCK);
  struct us_device_loop *loop = calloc(1, sizeof *loop);
  if (!loop) return us_err_memory(err, "the decode loop", sizeof *loop);
  loop->parts = *parts, loop->options = *options;
  struct us_device_schedule_options schedule = {.batch = options->batch,
                                                .block = options->block,
                                                .max_positions = parts->positions,
                                                .drafter = options->drafting,
                                                .adaptive = options->adaptive,
                                                .uniform = parts->uniform,
                                                .uniform_seed = parts->uniform_seed};
  enum us_status status =
      us_device_group_create(parts->devices, parts->weights, &schedule, &loop->group, err);
  us_devices_use(parts->devices, 0);
  if (status == US_OK)
    status = us_cuda_status((int)cudaHostAlloc((void **)&loop->mailbox, sizeof *loop->mailbox,
                                               cudaHostAllocMapped | cudaHostAllocPortable),
                            "the mailbox", err);
  if (status != US_OK) {
    us_device_loop_free(loop);
    return status;
  }
  loop->group->jitter = parts->jitter, loop->group->timeout_ns = parts->timeout_ns;
  memset(loop->mailbox, 0, sizeof *loop->mailbox);
  loop->group->schedule[0]->rank.mailbox = loop->mailbox;
  us_device_group_caches(loop->group, parts->pool, options->drafting ? parts->draft_pool : NULL);
  clear_rows(&loop->group->state);
  *ret_loop = loop;
  return US_OK;
}

void us_device_loop_free(struct us_device_loop *loop) {
  if (!loop) return;
  us_devices_use(loop->parts.devices, 0);
  (void)cudaFree(loop->replays);
  (void)cudaFreeHost(loop->mailbox);
  us_device_group_free(loop->group);
  free(loop);
}

struct us_device_group *us_device_loop_group(struct us_device_loop *loop) {
  return loop->group;
}
