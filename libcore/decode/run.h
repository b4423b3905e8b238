/* run.h: recorded runs: one JSON line a sample, what us-serve prints to a pipe and us-eval and --draft-from read.
 *
 *     struct us_run_entry entry = {.id = "gsm-1", .scenario = "math", .prompt = ids, .prompt_count = n};
 *     us_run_entry_take(&entry, &result.outputs[0]);
 *     us_run_write(stdout, &entry, &err);
 *
 *     struct us_run *run;
 *     if (us_run_open("plain.jsonl", &run, &err) != US_OK) return err.status;     // "-": stdin
 *     const struct us_run_entry *same = us_run_find(run, prompt, n, 0);
 *     us_run_free(run);
 *
 * Fields of a line: id, scenario, turn, sample, best, prompt_ids, ids, text, finish, logprob and logprobs (if computed),
 * answer (if the prompt has one), settings (how it was drawn), stats. Text that is not UTF-8 is written with U+FFFD; ids
 * are exact. Unknown fields are ignored when reading; id, prompt_ids and ids are required.
 */
#ifndef US_DECODE_RUN_H
#define US_DECODE_RUN_H

#include "decode/generate.h"
#include <stdio.h>

#define US_RUN_MAX_BYTES ((size_t)1 << 30)

struct us_run_entry {
  const char *id, *scenario;
  const char *answer; /* NULL without */
  uint32_t turn, sample;
  bool best; /* of the samples of its prompt, by mean log-probability; false if that was not computed */
  const int32_t *prompt, *ids;
  size_t prompt_count, count;
  const char *text;
  size_t text_bytes;
  const float *logprobs; /* (count) or NULL */
  double mean_logprob;
  enum us_finish finish;
  struct us_decode_stats stats;
  const char *settings_json; /* a JSON object, or NULL */
};

struct us_run {
  struct us_run_entry *entries;
  size_t n;
  void *memory; /* owns the entries' texts; us_run_free frees their arrays too */
};

/* Point the entry's output fields at `output`, which must outlive it. */
void us_run_entry_take(struct us_run_entry *entry, const struct us_output *output);

/* Write one line and flush it, so that a reader sees it at once. US_ERR_IO, US_ERR_MEMORY. */
US_CHECKED enum us_status us_run_write(FILE *out, const struct us_run_entry *entry, struct us_err *err);

/* Read a run. US_ERR_INPUT names file, line and field. */
US_CHECKED enum us_status us_run_open(const char *path, struct us_run **ret_run, struct us_err *err);
US_CHECKED enum us_status us_run_parse(const char *text, size_t bytes, const char *name,
                                       struct us_run **ret_run, struct us_err *err);
void us_run_free(struct us_run *run);

/* The first entry with this prompt and sample; NULL if there is none. */
const struct us_run_entry *us_run_find(const struct us_run *run, const int32_t *prompt, size_t count,
                                       uint32_t sample);

#endif
