/* sequence.c: commitment, stop handling and streaming of one sample. */
#include "decode/sequence.h"

#include <stdlib.h>
#include <string.h>

uint32_t us_sequence_loops(const int32_t *ids, size_t count, size_t gram) {
  if (count < gram) return 0;
  const int32_t *last = ids + count - gram;
  uint32_t found = 0;
  for (const int32_t *at = ids; at <= last; at++)
    if (at[gram - 1] == last[gram - 1] && !memcmp(at, last, gram * sizeof *at)) found++;
  return found;
}

static bool is_stop_id(const struct us_request *request, int32_t token) {
  for (size_t i = 0; i < request->stop_id_count; i++)
    if (request->stop_ids[i] == token) return true;
  return false;
}

/* Offset of the first stop string that ends after `known` bytes of text; SIZE_MAX if there is none. */
static size_t find_stop_string(const struct us_request *request, const struct us_buffer *text, size_t known) {
  size_t first = SIZE_MAX;
  for (size_t i = 0; i < request->stop_string_count; i++) {
    const char *stop = request->stop_strings[i];
    size_t length = strlen(stop), from = known >= length ? known - length + 1 : 0;
    if (text->size < from + length) continue;
    const char *hit = memmem(text->data + from, text->size - from, stop, length);
    if (hit && (size_t)(hit - text->data) < first) first = (size_t)(hit - text->data);
  }
  return first;
}

/* Bytes at the end of the text that could still become a stop string. */
static size_t held_bytes(const struct us_request *request, const struct us_buffer *text, size_t sent) {
  size_t held = 0;
  for (size_t i = 0; i < request->stop_string_count; i++) {
    const char *stop = request->stop_strings[i];
    size_t most = strlen(stop) - 1;
    if (most > text->size - sent) most = text->size - sent;
    for (size_t n = most; n > held; n--)
      if (!memcmp(text->data + text->size - n, stop, n)) held = n;
  }
  return held;
}

static enum us_status append_logprob(struct us_sequence *s, float logprob, struct us_err *err) {
  struct us_output *out = s->output;
  if (out->ids.count > s->logprob_capacity) {
    size_t capacity = s->logprob_capacity ? 2 * s->logprob_capacity : 64;
    float *grown = realloc(out->logprobs, capacity * sizeof *grown);
    if (!grown) return us_err_memory(err, "log-probabilities", capacity * sizeof *grown);
    out->logprobs = grown;
    s->logprob_capacity = capacity;
  }
  out->logprobs[out->ids.count - 1] = logprob;
  s->logprob_sum += (double)logprob;
  out->mean_logprob = s->logprob_sum / (double)out->ids.count;
  return US_OK;
}

static enum us_status append_text(struct us_sequence *s, const struct us_tokenizer *tokenizer, int32_t token,
                                  struct us_err *err) {
  struct us_output *out = s->output;
  size_t known = out->text.size;
  enum us_status status = us_tokenizer_stream(tokenizer, &s->stream, token, true, &out->text, err);
  /* What is held back at the end is an incomplete character: it belongs to the text, and to no stop string. */
  if (status == US_OK && out->finish != US_FINISH_NONE)
    status = us_tokenizer_stream_end(&s->stream, &out->text, err);
  if (status != US_OK) return status;
  size_t stop = find_stop_string(s->request, &out->text, known);
  if (stop == SIZE_MAX) return US_OK;
  out->finish = US_FINISH_STRING;
  out->text.size = stop;
  out->text.data[stop] = 0;
  return US_OK;
}

enum us_status us_sequence_commit(struct us_sequence *s, const struct us_tokenizer *tokenizer, int32_t token,
                                  float logprob, struct us_err *err) {
  struct us_output *out = s->output;
  enum us_status status = us_ids_append(&out->ids, &token, 1, err);
  if (status == US_OK && s->request->logprobs) status = append_logprob(s, logprob, err);
  if (status != US_OK) return status;
  if (is_stop_id(s->request, token))
    out->finish = US_FINISH_STOP;
  else if (s->request->cut_loops &&
           us_sequence_loops(out->ids.ids, out->ids.count, US_LOOP_GRAM) >= US_LOOP_REPEATS)
    out->finish = US_FINISH_LOOP;
  else if (out->ids.count >= s->limit)
    out->finish = US_FINISH_LENGTH;
  if (!tokenizer) return US_OK;
  /* A vocabulary is often padded: an id that no token has gives no text, and neither does a stop id. */
  if (out->finish != US_FINISH_STOP && token < us_tokenizer_size(tokenizer) &&
      us_tokenizer_bytes(tokenizer, token, &(size_t){0}))
    return append_text(s, tokenizer, token, err);
  return out->finish == US_FINISH_NONE ? US_OK : us_tokenizer_stream_end(&s->stream, &out->text, err);
}

void us_sequence_send(struct us_sequence *s, const struct us_generate_options *options) {
  struct us_output *out = s->output;
  if (!options->on_text) return;
  size_t end = out->text.size;
  if (out->finish == US_FINISH_NONE) end -= held_bytes(s->request, &out->text, s->sent_bytes);
  struct us_text_event event = {.request = s->request_index,
                                .sample = s->sample,
                                .ids = out->ids.ids + s->sent_ids,
                                .count = out->ids.count - s->sent_ids,
                                .text = out->text.data ? out->text.data + s->sent_bytes : "",
                                .bytes = end - s->sent_bytes,
                                .finish = out->finish};
  s->sent_ids = out->ids.count;
  s->sent_bytes = end;
  if (!options->on_text(options->arg, &event) && out->finish == US_FINISH_NONE)
    out->finish = US_FINISH_CANCELLED;
}
