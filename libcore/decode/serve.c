/* serve.c: prompts to requests, results to entries, turn by turn. */
#include "decode/serve.h"

#include "base/json.h"

#include <stdlib.h>
#include <string.h>

/* One prompt while its turns are answered. */
struct conversation {
  const struct us_prompt *prompt;
  struct us_message *messages; /* so far; the assistant's contents are ours */
  size_t n_messages, capacity;
  struct us_ids ids;        /* of the current turn's prompt */
  struct us_replay *replay; /* (samples) */
};

struct batch {
  const struct us_serve *serve;
  struct conversation *conversations;
  size_t n;
  uint32_t turn;
  struct us_request *requests;
  size_t *owner;           /* conversation of each request */
  size_t n_requests, next; /* the next request whose entries are to be written */
  const struct us_result **ready;
  const char *settings_json;
  struct us_err *err;
};

struct us_prompt us_serve_text_prompt(const char *id, const char *text) {
  return (struct us_prompt){.kind = US_PROMPT_TEXT, .id = id, .scenario = "", .text = text};
}

struct us_prompt us_serve_ids_prompt(const char *id, const int32_t *ids, size_t n) {
  return (struct us_prompt){.kind = US_PROMPT_IDS, .id = id, .scenario = "", .ids = ids, .n_ids = n};
}

/* Prompts to requests */

static bool is_chat(const struct us_serve *serve, const struct us_prompt *p) {
  return (serve->mode == US_SERVE_CHAT && p->kind != US_PROMPT_IDS) || p->kind == US_PROMPT_TURNS ||
         p->kind == US_PROMPT_MESSAGES;
}

static uint32_t turns_of(const struct us_prompt *p) {
  return p->kind == US_PROMPT_TURNS ? (uint32_t)p->n_messages : 1;
}

size_t us_serve_entries(const struct us_serve *serve, const struct us_prompt *prompts, size_t n) {
  size_t turns = 0;
  for (size_t i = 0; i < n; i++) turns += turns_of(&prompts[i]);
  return turns * (serve->best || !serve->samples ? 1 : serve->samples);
}

static enum us_status add_message(struct conversation *c, struct us_message message, struct us_err *err) {
  if (c->n_messages == c->capacity) {
    size_t capacity = c->capacity ? 2 * c->capacity : 8;
    struct us_message *grown = realloc(c->messages, capacity * sizeof *grown);
    if (!grown) return us_err_memory(err, "messages", capacity * sizeof *grown);
    c->messages = grown;
    c->capacity = capacity;
  }
  c->messages[c->n_messages++] = message;
  return US_OK;
}

/* The messages that this turn adds: one user turn, or all that a prompt of messages has. */
static enum us_status add_turn(struct conversation *c, uint32_t turn, struct us_err *err) {
  const struct us_prompt *p = c->prompt;
  if (p->kind == US_PROMPT_TURNS) return add_message(c, p->messages[turn], err);
  if (p->kind != US_PROMPT_MESSAGES)
    return add_message(c, (struct us_message){.role = "user", .content = p->text}, err);
  enum us_status status = US_OK;
  for (size_t i = 0; status == US_OK && i < p->n_messages; i++) status = add_message(c, p->messages[i], err);
  return status;
}

static enum us_status encode_turn(const struct us_serve *serve, struct conversation *c, uint32_t turn,
                                  struct us_err *err) {
  struct us_buffer text = {0};
  enum us_status status = US_OK;
  c->ids.count = 0;
  if (c->prompt->kind == US_PROMPT_IDS) return us_ids_append(&c->ids, c->prompt->ids, c->prompt->n_ids, err);
  if (!serve->tokenizer)
    return us_err_set(err, US_ERR_USAGE, "prompt '%s' is text, and the model has no tokenizer",
                      c->prompt->id);
  if (is_chat(serve, c->prompt)) {
    if (serve->mode == US_SERVE_RAW)
      return us_err_set(err, US_ERR_USAGE, "prompt '%s' is a chat and cannot be raw", c->prompt->id);
    struct us_chat_options chat = serve->chat;
    chat.generate = true;
    status = add_turn(c, turn, err);
    if (status == US_OK) status = us_chat_format(c->messages, c->n_messages, &chat, &text, err);
  } else {
    status = us_buffer_add(&text, c->prompt->text, err);
  }
  if (status == US_OK)
    status = us_tokenizer_encode(serve->tokenizer, text.data ? text.data : "", text.size, true, &c->ids, err);
  us_buffer_release(&text);
  return status == US_OK ? US_OK : us_err_prefix(err, "prompt '%s'", c->prompt->id);
}

enum us_status us_serve_encode(const struct us_serve *serve, const struct us_prompt *prompt,
                               struct us_ids *ids, struct us_err *err) {
  struct conversation c = {.prompt = prompt};
  enum us_status status = encode_turn(serve, &c, 0, err);
  if (status == US_OK) status = us_ids_append(ids, c.ids.ids, c.ids.count, err);
  free(c.messages);
  us_ids_release(&c.ids);
  return status;
}

static enum us_status find_replay(const struct us_serve *serve, struct conversation *c, uint32_t samples,
                                  struct us_err *err) {
  if (!c->replay && !(c->replay = calloc(samples, sizeof *c->replay)))
    return us_err_memory(err, "replays", samples * sizeof *c->replay);
  for (uint32_t s = 0; s < samples; s++) {
    const struct us_run_entry *e = us_run_find(serve->replay, c->ids.ids, c->ids.count, s);
    if (!e)
      return us_err_set(err, US_ERR_INPUT,
                        "the run to draft from has no sample %u of prompt '%s' (%zu tokens)", (unsigned)s,
                        c->prompt->id, c->ids.count);
    c->replay[s] = (struct us_replay){.ids = e->ids, .count = e->count};
  }
  return US_OK;
}

static enum us_status make_requests(struct batch *b, const int32_t *stop_ids, size_t stop_id_count) {
  const struct us_serve *serve = b->serve;
  b->n_requests = b->next = 0;
  for (size_t i = 0; i < b->n; i++) {
    struct conversation *c = &b->conversations[i];
    if (b->turn >= turns_of(c->prompt)) continue;
    uint32_t samples = serve->samples ? serve->samples : 1;
    enum us_status status = encode_turn(serve, c, b->turn, b->err);
    if (status == US_OK && serve->replay) status = find_replay(serve, c, samples, b->err);
    if (status != US_OK) return status;
    b->ready[b->n_requests] = NULL;
    b->owner[b->n_requests] = i;
    b->requests[b->n_requests++] = (struct us_request){
        .prompt = c->ids.ids,
        .prompt_count = c->ids.count,
        .sampling = serve->sampling,
        .seed = serve->seed,
        .samples = samples,
        .max_tokens = serve->max_tokens,
        .stop_ids = stop_ids,
        .stop_id_count = stop_id_count,
        .stop_strings = serve->stop_strings,
        .stop_string_count = serve->stop_string_count,
        .cut_loops = serve->cut_loops,
        .logprobs = serve->logprobs || serve->best,
        .replay = serve->replay ? c->replay : NULL,
    };
  }
  return US_OK;
}

/* Results to entries */

static enum us_status write_request(const struct batch *b, size_t request, struct us_err *err) {
  const struct us_serve *serve = b->serve;
  const struct conversation *c = &b->conversations[b->owner[request]];
  const struct us_result *result = b->ready[request];
  enum us_status status = US_OK;
  for (uint32_t s = 0; status == US_OK && s < result->samples; s++) {
    if (serve->best && s != result->best) continue;
    struct us_run_entry entry = {.id = c->prompt->id,
                                 .scenario = c->prompt->scenario,
                                 .answer = c->prompt->answer,
                                 .turn = b->turn,
                                 .sample = s,
                                 .best = s == result->best &&
                                         (result->samples == 1 || b->requests[request].logprobs),
                                 .prompt = c->ids.ids,
                                 .prompt_count = c->ids.count,
                                 .settings_json = b->settings_json};
    us_run_entry_take(&entry, &result->outputs[s]);
    if (!serve->logprobs) entry.logprobs = NULL;
    status = serve->on_entry(serve->arg, &entry, err);
  }
  return status;
}

static enum us_status result_ready(void *arg, size_t request, const struct us_result *result,
                                   struct us_err *err) {
  struct batch *b = arg;
  enum us_status status = US_OK;
  b->ready[request] = result;
  while (status == US_OK && b->next < b->n_requests && b->ready[b->next])
    status = write_request(b, b->next++, err);
  return status;
}

static bool text_ready(void *arg, const struct us_text_event *event) {
  const struct us_serve *serve = ((const struct batch *)arg)->serve;
  return serve->generate.on_text(serve->arg, event);
}

/* The best answer joins the conversation; what was thought before </think> is not its content. */
static enum us_status add_answer(struct conversation *c, const struct us_result *result, struct us_err *err) {
  const struct us_buffer *text = &result->outputs[result->best].text;
  const char *content = text->data ? text->data : "", *think_end;
  while ((think_end = strstr(content, "</think>"))) content = think_end + strlen("</think>");
  char *copy = strdup(content);
  if (!copy) return us_err_memory(err, "an answer", strlen(content));
  enum us_status status = add_message(c, (struct us_message){.role = "assistant", .content = copy}, err);
  if (status != US_OK) free(copy);
  return status;
}

/* Running */

/* Rows of a round: a replay without a drafter takes as many as there may be. */
static uint32_t block_of(const struct us_serve *s, const struct us_executor *ex) {
  if (s->generate.block) return s->generate.block;
  return ex->draft ? ex->draft->shape.block : s->replay ? US_MAX_BLOCK : 1;
}

static json_t *path_value(const char *path) {
  return us_json_any_string(path, strlen(path));
}

/* NULL without memory. */
static char *settings_text(const struct us_serve *s, const struct us_executor *ex) {
  const struct us_generate_options *g = &s->generate;
  json_t *root = json_pack(
      "{s:f,s:I,s:f,s:f,s:I,s:I,s:I,s:s,s:I,s:b,s:I,s:b,s:s,s:o,s:o}", "temperature",
      (double)s->sampling.temperature, "top_k", (json_int_t)s->sampling.top_k, "top_p",
      (double)s->sampling.top_p, "min_p", (double)s->sampling.min_p, "seed", (json_int_t)s->seed, "samples",
      (json_int_t)(s->samples ? s->samples : 1), "max_tokens", (json_int_t)s->max_tokens, "verify",
      us_verify_name(g->rule), "block", (json_int_t)block_of(s, ex), "adaptive", g->adaptive, "batch",
      (json_int_t)(g->batch ? g->batch : 1), "replayed", s->replay != NULL, "executor", ex->name, "model",
      path_value(ex->model->path), "draft", path_value(ex->draft ? ex->draft->path : ""));
  char *text = root ? json_dumps(root, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
  json_decref(root);
  return text;
}

static size_t collect_stop_ids(const struct us_serve *serve, const struct us_shape *shape, int32_t *ids) {
  if (serve->ignore_end) return 0;
  size_t n = serve->tokenizer ? (size_t)us_tokenizer_stop_ids(serve->tokenizer, ids) : 0;
  for (uint32_t i = 0; i < shape->stop_count; i++) ids[n++] = (int32_t)shape->stop_ids[i];
  return n;
}

static void add_stats(struct us_generate_stats *sum, const struct us_generate_stats *s) {
  if (!sum->generated_tokens) sum->decode.first_token_seconds = s->decode.first_token_seconds;
  sum->decode.rounds += s->decode.rounds;
  sum->decode.committed += s->decode.committed;
  for (int i = 0; i < US_MAX_BLOCK; i++) {
    sum->decode.offered[i] += s->decode.offered[i];
    sum->decode.accepted[i] += s->decode.accepted[i];
    sum->decode.histogram[i] += s->decode.histogram[i];
  }
  sum->decode.seconds += s->decode.seconds;
  sum->prompt_tokens += s->prompt_tokens;
  sum->generated_tokens += s->generated_tokens;
  sum->passes += s->passes;
  sum->rows += s->rows;
  sum->expert_layers += s->expert_layers;
  sum->distinct_experts += s->distinct_experts;
  sum->seconds += s->seconds;
  sum->prefill_seconds += s->prefill_seconds;
  sum->draft_seconds += s->draft_seconds;
  sum->verify_seconds += s->verify_seconds;
}

static enum us_status run_turn(struct batch *b, struct us_executor *ex, struct us_generate_stats *sum) {
  struct us_generate_options options = b->serve->generate;
  options.tokenizer = b->serve->tokenizer;
  options.on_result = result_ready;
  options.on_text = options.on_text ? text_ready : NULL;
  options.arg = b;
  struct us_result *results = calloc(b->n_requests, sizeof *results);
  if (!results) return us_err_memory(b->err, "results", b->n_requests * sizeof *results);
  struct us_generate_stats stats = {0};
  enum us_status status = us_generate(ex, b->requests, b->n_requests, &options, results, &stats, b->err);
  add_stats(sum, &stats);
  for (size_t i = 0; i < b->n_requests; i++) {
    struct conversation *c = &b->conversations[b->owner[i]];
    if (status == US_OK && b->turn + 1 < turns_of(c->prompt)) status = add_answer(c, &results[i], b->err);
    us_result_release(&results[i]);
  }
  free(results);
  return status;
}

static void free_conversation(struct conversation *c) {
  const struct us_prompt *p = c->prompt;
  /* In a prompt of turns the answers, every second message, are ours. */
  for (size_t i = 1; p->kind == US_PROMPT_TURNS && i < c->n_messages; i += 2)
    free((void *)(uintptr_t)c->messages[i].content);
  free(c->messages);
  free(c->replay);
  us_ids_release(&c->ids);
}

enum us_status us_serve_run(const struct us_serve *serve, struct us_executor *ex,
                            const struct us_prompt *prompts, size_t n, struct us_generate_stats *opt_stats,
                            struct us_err *err) {
  int32_t stop_ids[3 + US_MAX_STOP_IDS];
  size_t stop_id_count = collect_stop_ids(serve, &ex->model->shape, stop_ids);
  struct us_generate_stats stats = {0};
  char *settings = settings_text(serve, ex);
  struct batch b = {.serve = serve, .n = n, .settings_json = settings, .err = err};
  b.conversations = calloc(n, sizeof *b.conversations);
  b.requests = calloc(n, sizeof *b.requests);
  b.owner = calloc(n, sizeof *b.owner);
  b.ready = calloc(n, sizeof *b.ready);
  enum us_status status = US_OK;
  uint32_t turns = 0;
  if (!b.conversations || !b.requests || !b.owner || !b.ready || !settings)
    status = us_err_memory(err, "prompts", n * sizeof *b.conversations);
  for (size_t i = 0; status == US_OK && i < n; i++) {
    b.conversations[i].prompt = &prompts[i];
    if (turns_of(&prompts[i]) > turns) turns = turns_of(&prompts[i]);
  }
  for (b.turn = 0; status == US_OK && b.turn < turns; b.turn++) {
    status = make_requests(&b, stop_ids, stop_id_count);
    if (status == US_OK) status = run_turn(&b, ex, &stats);
  }
  for (size_t i = 0; b.conversations && i < n && b.conversations[i].prompt; i++)
    free_conversation(&b.conversations[i]);
  free(b.conversations);
  free(b.requests);
  free(b.owner);
  free(b.ready);
  free(settings);
  if (opt_stats) *opt_stats = stats;
  return status;
}

void us_serve_write_stats(FILE *out, const struct us_generate_stats *s, bool detail) {
  const struct us_decode_stats *d = &s->decode;
  double rate = d->seconds > 0.0 ? (double)d->committed / d->seconds : 0.0;
  fprintf(out, "%llu tokens, %.4g tokens/s decoding, first token after %.4g s",
          (unsigned long long)s->generated_tokens, rate, d->first_token_seconds);
  if (d->offered[0])
    fprintf(out, ", acceptance length %.3f (%llu tokens / %llu rounds)", us_decode_stats_length(d),
            (unsigned long long)d->committed, (unsigned long long)d->rounds);
  fputc('\n', out);
  if (!detail) return;
  fprintf(out, "prompt: %llu tokens in %.4g s; drafting %.4g s, verifying %.4g s, whole %.4g s\n",
          (unsigned long long)s->prompt_tokens, s->prefill_seconds, s->draft_seconds, s->verify_seconds,
          s->seconds);
  fprintf(out, "passes: %llu of %.3g rows\n", (unsigned long long)s->passes,
          s->passes ? (double)s->rows / (double)s->passes : 0.0);
  if (s->expert_layers)
    fprintf(out, "experts: %.4g distinct a layer and pass\n",
            (double)s->distinct_experts / (double)s->expert_layers);
  for (int i = 0; i < US_MAX_BLOCK && d->offered[i]; i++)
    fprintf(out, "slot %d: verified %llu times, accepted %.2f %%\n", i + 1, (unsigned long long)d->offered[i],
            100.0 * (double)d->accepted[i] / (double)d->offered[i]);
}
