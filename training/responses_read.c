/* responses_read.c: answers that us-serve recorded, as training text. */
#include "training/responses.h"

#include <stdlib.h>
#include <string.h>

/* One entry of `every` is held out, the first of them. */
static bool belongs(size_t i, size_t every, bool heldout) {
  return (i % every == 0) == heldout;
}

static enum us_status check_ids(const struct us_run_entry *entry, uint32_t vocab, struct us_err *err) {
  for (size_t i = 0; i < entry->prompt_count + entry->count; i++) {
    int32_t id = i < entry->prompt_count ? entry->prompt[i] : entry->ids[i - entry->prompt_count];
    if (id < 0 || (uint32_t)id >= vocab)
      return us_err_set(err, US_ERR_INPUT, "answer '%s': token %d is not in the target's vocabulary of %u",
                        entry->id, id, vocab);
  }
  return US_OK;
}

/* The last tokens of the prompt and the first of the answer; at least one of each. */
static void take(struct us_responses *r, const struct us_run_entry *entry) {
  size_t count = entry->count < r->length - 1 ? entry->count : r->length - 1;
  size_t prompt = entry->prompt_count < r->length - count ? entry->prompt_count : r->length - count;
  int32_t *ids = r->ids + r->n * r->length;
  memcpy(ids, entry->prompt + entry->prompt_count - prompt, prompt * sizeof *ids);
  memcpy(ids + prompt, entry->ids, count * sizeof *ids);
  r->prompt[r->n] = (uint32_t)prompt;
  r->total[r->n] = (uint32_t)(prompt + count);
  r->tokens += count;
  r->n++;
}

enum us_status us_responses_read(const struct us_run *run, const struct us_responses_part *part,
                                 struct us_responses *ret_responses, struct us_err *err) {
  struct us_responses *r = ret_responses;
  *r = (struct us_responses){.length = part->length};
  r->ids = calloc(run->n + 1, part->length * sizeof *r->ids);
  r->prompt = calloc(run->n + 1, sizeof *r->prompt);
  r->total = calloc(run->n + 1, sizeof *r->total);
  enum us_status status = US_OK;
  if (!r->ids || !r->prompt || !r->total)
    status = us_err_memory(err, "answers", run->n * part->length * sizeof *r->ids);
  for (size_t i = 0; i < run->n && status == US_OK; i++) {
    const struct us_run_entry *entry = &run->entries[i];
    if (!entry->prompt_count || !entry->count || !belongs(i, part->every, part->heldout)) continue;
    status = check_ids(entry, part->vocab, err);
    if (status == US_OK) take(r, entry);
  }
  if (status == US_OK && r->n == 0)
    status = us_err_set(err, US_ERR_INPUT, "no answer among %zu recorded requests", run->n);
  if (status != US_OK) us_responses_release(r);
  return status;
}
