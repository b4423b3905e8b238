/* responses_read.c: answers that us-serve recorded, as training text. */
#include "training/responses.h"

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

enum us_status us_responses_read(const struct us_run *run, const struct us_responses_part *part,
                                 struct us_responses *ret_responses, struct us_err *err) {
  struct us_responses *r = ret_responses;
  enum us_status status = us_responses_init(r, run->n, part->length, err);
  for (size_t i = 0; i < run->n && status == US_OK; i++) {
    const struct us_run_entry *entry = &run->entries[i];
    if (!entry->prompt_count || !entry->count || !belongs(i, part->every, part->heldout)) continue;
    status = check_ids(entry, part->vocab, err);
    if (status != US_OK) break;
    us_responses_keep(r, r->n, entry->prompt, entry->prompt_count, entry->ids, entry->count);
    r->finish[r->n++] = (uint8_t)entry->finish;
  }
  if (status == US_OK && r->n == 0)
    status = us_err_set(err, US_ERR_INPUT, "no answer among %zu recorded requests", run->n);
  if (status != US_OK) us_responses_release(r);
  return status;
}
