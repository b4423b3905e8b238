/* dflash_answers.c: answers of the target: prompts in, answers made or read, answers out. */
#include "tools/dflash_answers.h"

#include "base/atomic.h"
#include "decode/serve.h"
#include "model/tokenizer_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define HELDOUT_EVERY 16

/* --- options --- */

enum us_status us_dflash_answers_check(struct us_opts *opts, struct us_err *err) {
  static const char *const need_generate[] = {"prompts", "answer-seconds", "answers-out", "ignore-end",
                                              "max-tokens"};
  bool generates =
      us_opt_int(opts, "generate") > 0 || (!us_opt_str(opts, "data") && !us_opt_str(opts, "answers"));
  if (us_opt_int(opts, "generate") > 0 && us_opt_str(opts, "answers"))
    return us_err_set(err, US_ERR_USAGE, "--generate excludes --answers");
  for (size_t i = 0; i < sizeof need_generate / sizeof need_generate[0] && !generates; i++)
    if (us_opt_given(opts, need_generate[i]))
      return us_err_set(err, US_ERR_USAGE, "--%s needs --generate", need_generate[i]);
  if (us_opt_num(opts, "answer-seconds") > 0.0 && us_opt_str(opts, "state"))
    return us_err_set(err, US_ERR_USAGE,
                      "--answer-seconds excludes --state: answers are made again, and would be others");
  if (!us_opt_str(opts, "output") && !us_opt_str(opts, "answers-out"))
    return us_err_set(err, US_ERR_USAGE, "missing option '--output FILE'");
  return US_OK;
}

/* --- prompts --- */

struct encoding {
  struct us_serve serve;
  const struct us_prompts *set;
  struct us_ids *ids; /* (set->n) */
  int failed;
  struct us_err err;
};

static void encode(void *arg, size_t begin, size_t end, int worker) {
  struct encoding *e = arg;
  struct us_err err = {0};
  for (size_t i = begin; i < end && !__atomic_load_n(&e->failed, __ATOMIC_RELAXED); i++)
    if (us_serve_encode(&e->serve, &e->set->items[i], &e->ids[i], &err) != US_OK &&
        !__atomic_exchange_n(&e->failed, 1, __ATOMIC_RELAXED))
      e->err = err;
}

/* One behind the other, those held out last. */
static enum us_status join(struct us_dflash_answers *a, const struct us_ids *ids, size_t n,
                           struct us_err *err) {
  size_t tokens = 0, at = 0;
  for (size_t i = 0; i < n; i++) tokens += ids[i].count;
  a->ids = malloc((tokens + 1) * sizeof *a->ids);
  a->start = malloc((n + 1) * sizeof *a->start);
  if (!a->ids || !a->start) return us_err_memory(err, "prompts", tokens * sizeof *a->ids);
  a->start[0] = 0;
  for (int heldout = 0; heldout < 2; heldout++)
    for (size_t i = 0; i < n; i++) {
      if ((i % HELDOUT_EVERY == 0) != heldout) continue;
      memcpy(a->ids + a->start[at], ids[i].ids, ids[i].count * sizeof *a->ids);
      a->start[at + 1] = a->start[at] + ids[i].count;
      at++;
    }
  a->heldout_prompts = (n + HELDOUT_EVERY - 1) / HELDOUT_EVERY;
  a->prompts = n - a->heldout_prompts;
  return US_OK;
}

static enum us_status open_tokenizer(struct us_dflash_answers *a, struct us_err *err) {
  const struct us_model *model = a->target;
  if (!model->tokenizer_json) return US_OK;
  char name[US_TOKENIZER_NAME_MAX];
  us_tokenizer_file_name(model->path, name);
  return us_tokenizer_parse(model->tokenizer_json, model->tokenizer_bytes, name, &a->tokenizer, err);
}

/* As us-serve. */
static void collect_stops(struct us_dflash_answers *a) {
  const struct us_shape *shape = &a->target->shape;
  a->stop_count = a->tokenizer ? (size_t)us_tokenizer_stop_ids(a->tokenizer, a->stops) : 0;
  for (uint32_t i = 0; i < shape->stop_count; i++) a->stops[a->stop_count++] = (int32_t)shape->stop_ids[i];
  if (us_opt_flag(a->run->opts, "ignore-end")) a->stop_count = 0;
}

/* Chats are turns as in training documents, text is as it stands. */
static enum us_status read_prompts(struct us_dflash_answers *a, const char *path, struct us_err *err) {
  struct us_prompts *set = NULL;
  enum us_status status = us_prompts_open_dir(path, &set, err);
  if (status != US_OK) return status;
  struct encoding e = {.serve = {.tokenizer = a->tokenizer, .chat = {.plain_turns = true}}, .set = set};
  e.ids = calloc(set->n, sizeof *e.ids);
  if (!e.ids) status = us_err_memory(err, "prompts", set->n * sizeof *e.ids);
  if (status == US_OK) us_pool_for(a->pool, set->n, 64, encode, &e);
  if (status == US_OK && e.failed) status = us_err_set(err, e.err.status, "%s", e.err.message);
  if (status == US_OK && set->n < 2)
    status = us_err_set(err, US_ERR_INPUT, "one prompt; two are needed, one of them to be held out");
  if (status == US_OK) status = join(a, e.ids, set->n, err);
  for (size_t i = 0; e.ids && i < set->n; i++) us_ids_release(&e.ids[i]);
  free(e.ids);
  us_prompts_free(set);
  return status == US_OK ? US_OK : us_err_prefix(err, "%s", path);
}

/* --- answers --- */

static void on_answers(void *arg, size_t done, size_t all) {
  us_progress_set(&((struct us_dflash_answers *)arg)->progress, done);
}

/* Of a recorded run, one answer in sixteen is held out. */
static enum us_status read_answers(struct us_dflash_answers *a, const char *path, struct us_err *err) {
  struct us_run *run = NULL;
  struct us_responses_part part = {
      .length = a->length, .every = HELDOUT_EVERY, .heldout = true, .vocab = a->target->shape.vocab};
  enum us_status status = us_run_open(path, &run, err);
  if (status != US_OK) return status;
  status = us_responses_read(run, &part, &a->heldout, err);
  part.heldout = false;
  if (status == US_OK) status = us_responses_read(run, &part, &a->train, err);
  us_run_free(run);
  if (status != US_OK) return us_err_prefix(err, "%s", path);
  us_log_notice(a->run->log, "%zu answers of %s, %zu tokens; %zu more are held out", a->train.n, path,
                a->train.tokens, a->heldout.n);
  return US_OK;
}

static struct us_responses_options options_of(struct us_dflash_answers *a, size_t count) {
  struct us_opts *o = a->run->opts;
  const struct us_shape *shape = &a->target->shape;
  return (struct us_responses_options){.count = count,
                                       .length = a->length,
                                       .max_tokens = (uint32_t)us_opt_int(o, "max-tokens"),
                                       .first = shape->stop_count ? (int32_t)shape->stop_ids[0] : 0,
                                       .stop_ids = a->stops,
                                       .stop_id_count = a->stop_count,
                                       .seconds = us_opt_num(o, "answer-seconds"),
                                       .sampling = {.temperature = (float)us_opt_num(o, "temperature"),
                                                    .top_p = (float)us_opt_num(o, "top-p")},
                                       .seed = a->seed,
                                       .pool = a->pool,
                                       .interrupted = us_tool_interrupted,
                                       .progress = on_answers,
                                       .progress_arg = a};
}

static enum us_status generate(struct us_dflash_answers *a, size_t count, struct us_err *err) {
  struct us_responses_prompts prompts[2] = {
      {.ids = a->ids, .start = a->start, .n = a->prompts},
      {.ids = a->ids, .start = a->start ? a->start + a->prompts : NULL, .n = a->heldout_prompts}};
  struct us_responses_options options = options_of(a, count);
  options.prompts = a->prompts ? &prompts[0] : NULL;
  enum us_status status =
      us_responses_generate(a->learner, a->target, a->shards, US_PART_TRAIN, &options, &a->train, err);
  options.count = count / 16 < 8 ? 8 : count / 16 > 64 ? 64 : count / 16;
  options.prompts = a->prompts ? &prompts[1] : NULL;
  options.seed += 0x5851F42D4C957F2Du;
  options.seconds = 0.0;
  options.progress = NULL;
  enum us_part part =
      a->shards && us_shards_documents(a->shards, US_PART_HELDOUT) ? US_PART_HELDOUT : US_PART_TRAIN;
  if (status == US_OK)
    status = us_responses_generate(a->learner, a->target, a->shards, part, &options, &a->heldout, err);
  return status;
}

enum us_status us_dflash_answers_make(struct us_dflash_answers *a, struct us_err *err) {
  struct us_opts *o = a->run->opts;
  if (us_opt_str(o, "answers")) return read_answers(a, us_opt_str(o, "answers"), err);
  size_t count = (size_t)us_opt_int(o, "generate");
  if (!a->shards && !us_opt_str(o, "prompts") && count < 256) count = 256;
  if (!count) return US_OK;
  enum us_status status = open_tokenizer(a, err);
  collect_stops(a);
  if (status == US_OK && us_opt_str(o, "prompts")) status = read_prompts(a, us_opt_str(o, "prompts"), err);
  if (status != US_OK) return status;
  us_progress_start(&a->progress, a->run->quiet || !us_learner_leads(a->learner) ? NULL : stderr, "answers",
                    "answers", count);
  a->progress.limit = us_opt_num(o, "answer-seconds");
  status = generate(a, count, err);
  us_progress_end(&a->progress);
  if (status == US_OK)
    us_log_notice(a->run->log, "the target wrote %zu answers, %zu tokens; %zu more are held out", a->train.n,
                  a->train.tokens, a->heldout.n);
  return status;
}

/* --- what comes out --- */

/* A vocabulary is often padded: some ids have no token. */
static bool has_text(const struct us_tokenizer *tokenizer, int32_t id) {
  size_t bytes;
  return id < us_tokenizer_size(tokenizer) && us_tokenizer_bytes(tokenizer, id, &bytes);
}

static enum us_status write_entry(const struct us_dflash_answers *a, FILE *out, const struct us_responses *r,
                                  size_t i, const char *id, struct us_err *err) {
  const int32_t *ids = r->ids + i * r->length;
  struct us_buffer text = {0};
  struct us_run_entry entry = {.id = id,
                               .prompt = ids,
                               .prompt_count = r->prompt[i],
                               .ids = ids + r->prompt[i],
                               .count = r->total[i] - r->prompt[i],
                               .finish = (enum us_finish)r->finish[i]};
  enum us_status status = US_OK;
  for (size_t k = 0; a->tokenizer && k < entry.count && status == US_OK; k++)
    if (has_text(a->tokenizer, entry.ids[k]))
      status = us_tokenizer_decode(a->tokenizer, &entry.ids[k], 1, true, &text, err);
  entry.text = text.data ? text.data : "";
  entry.text_bytes = text.size;
  if (status == US_OK) status = us_run_write(out, &entry, err);
  us_buffer_release(&text);
  return status;
}

/* Where the held-out ones are found again: the first of each sixteen, as long as there are any. */
static enum us_status write_entries(const struct us_dflash_answers *a, FILE *out, struct us_err *err) {
  enum us_status status = US_OK;
  size_t train = 0, heldout = 0;
  for (size_t i = 0; train + heldout < a->train.n + a->heldout.n && status == US_OK; i++) {
    bool apart = heldout < a->heldout.n && (i % HELDOUT_EVERY == 0 || train == a->train.n);
    size_t *next = apart ? &heldout : &train;
    char id[32];
    snprintf(id, sizeof id, "%s-%zu", apart ? "heldout" : "answer", *next);
    status = write_entry(a, out, apart ? &a->heldout : &a->train, *next, id, err);
    ++*next;
  }
  return status;
}

enum us_status us_dflash_answers_write(struct us_dflash_answers *a, struct us_err *err) {
  const char *path = us_opt_str(a->run->opts, "answers-out");
  struct us_atomic file;
  enum us_status status = us_atomic_open(path, &file, err);
  if (status != US_OK) return status;
  int fd = dup(file.fd);
  FILE *out = fd < 0 ? NULL : fdopen(fd, "w");
  if (!out) {
    if (fd >= 0) close(fd);
    status = us_err_set(err, US_ERR_IO, "cannot write '%s': %s", path, strerror(errno));
  }
  if (status == US_OK) status = write_entries(a, out, err);
  if (out && fclose(out) != 0 && status == US_OK)
    status = us_err_set(err, US_ERR_IO, "cannot write '%s': %s", path, strerror(errno));
  if (status == US_OK) return us_atomic_commit(&file, err);
  us_atomic_abandon(&file);
  return status;
}

void us_dflash_answers_release(struct us_dflash_answers *a) {
  us_responses_release(&a->train);
  us_responses_release(&a->heldout);
  us_tokenizer_free(a->tokenizer);
  free(a->ids);
  free(a->start);
}
