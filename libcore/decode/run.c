/* run.c: recorded runs as JSON lines. */
#include "decode/run.h"

#include "base/io.h"
#include "base/json.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

void us_run_entry_take(struct us_run_entry *entry, const struct us_output *output) {
  entry->ids = output->ids.ids;
  entry->count = output->ids.count;
  entry->text = output->text.data ? output->text.data : "";
  entry->text_bytes = output->text.size;
  entry->logprobs = output->logprobs;
  entry->mean_logprob = output->mean_logprob;
  entry->finish = output->finish;
  entry->stats = output->stats;
}

/* Writing */

static json_t *id_array(const int32_t *ids, size_t n, bool *whole) {
  json_t *array = json_array();
  for (size_t i = 0; i < n; i++) us_json_append(array, json_integer(ids[i]), whole);
  return array;
}

static json_t *count_array(const uint64_t *counts, uint32_t n, bool *whole) {
  json_t *array = json_array();
  for (uint32_t i = 0; i < n; i++) us_json_append(array, json_integer((json_int_t)counts[i]), whole);
  return array;
}

/* JSON has no infinities: the log-probability of the impossible is the lowest float. */
static json_t *logprob_array(const float *logprobs, size_t n, bool *whole) {
  json_t *array = json_array();
  for (size_t i = 0; i < n; i++)
    us_json_append(array, json_real((double)fmaxf(logprobs[i], -FLT_MAX)), whole);
  return array;
}

static uint32_t used_slots(const uint64_t *counts) {
  uint32_t n = US_MAX_BLOCK;
  while (n && !counts[n - 1]) n--;
  return n;
}

static json_t *stats_object(const struct us_decode_stats *s, bool *whole) {
  uint32_t slots = used_slots(s->offered);
  double rate = s->seconds > 0.0 ? (double)s->committed / s->seconds : 0.0;
  return json_pack("{s:I,s:I,s:f,s:o,s:o,s:o,s:f,s:f,s:f}", "rounds", (json_int_t)s->rounds, "committed",
                   (json_int_t)s->committed, "acceptance_length", us_decode_stats_length(s), "offered",
                   count_array(s->offered, slots, whole), "accepted", count_array(s->accepted, slots, whole),
                   "histogram", count_array(s->histogram, s->rounds ? slots + 1 : 0, whole),
                   "first_token_seconds", s->first_token_seconds, "seconds", s->seconds, "tokens_per_second",
                   rate);
}

/* NULL when out of memory. */
static json_t *entry_object(const struct us_run_entry *e) {
  json_t *root = json_object();
  bool whole = true;
  if (e->id) us_json_set(root, "id", us_json_any_string(e->id, strlen(e->id)), &whole);
  if (e->scenario)
    us_json_set(root, "scenario", us_json_any_string(e->scenario, strlen(e->scenario)), &whole);
  us_json_set(root, "turn", json_integer(e->turn), &whole);
  us_json_set(root, "sample", json_integer(e->sample), &whole);
  us_json_set(root, "best", json_boolean(e->best), &whole);
  us_json_set(root, "text", us_json_any_string(e->text, e->text_bytes), &whole);
  us_json_set(root, "finish", json_string(us_finish_name(e->finish)), &whole);
  if (e->answer) us_json_set(root, "answer", us_json_any_string(e->answer, strlen(e->answer)), &whole);
  if (e->logprobs) us_json_set(root, "logprob", json_real(e->mean_logprob), &whole);
  us_json_set(root, "prompt_ids", id_array(e->prompt, e->prompt_count, &whole), &whole);
  us_json_set(root, "ids", id_array(e->ids, e->count, &whole), &whole);
  if (e->logprobs) us_json_set(root, "logprobs", logprob_array(e->logprobs, e->count, &whole), &whole);
  if (e->settings_json) us_json_set(root, "settings", json_loads(e->settings_json, 0, NULL), &whole);
  us_json_set(root, "stats", stats_object(&e->stats, &whole), &whole);
  if (!whole) json_decref(root), root = NULL;
  return root;
}

enum us_status us_run_write(FILE *out, const struct us_run_entry *entry, struct us_err *err) {
  json_t *root = entry_object(entry);
  char *line = root ? us_json_dump(root, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
  json_decref(root);
  if (!line) return us_err_memory(err, "a run's line", entry->count * 16);
  fputs(line, out);
  fputc('\n', out);
  free(line);
  return us_io_flush(out, "the run", err);
}

/* Reading */

/* The lines' JSON, whose texts the entries point to. */
struct memory {
  json_t **roots;
  size_t n_roots, capacity;
};

/* A const pointer to something that the run owns. */
static void release(const void *owned) {
  free((void *)(uintptr_t)owned);
}

static enum us_status read_ids(json_t *root, const char *where, const char *key, const int32_t **ret_ids,
                               size_t *ret_count, struct us_err *err) {
  json_t *array;
  enum us_status status = us_json_array(root, where, key, INT32_MAX, &array, err);
  if (status != US_OK) return status;
  size_t n = json_array_size(array);
  int32_t *ids = malloc((n + 1) * sizeof *ids);
  if (!ids) return us_err_memory(err, key, n * sizeof *ids);
  *ret_ids = ids;
  *ret_count = n;
  for (size_t i = 0; i < n; i++) {
    json_t *value = json_array_get(array, i);
    json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
    if (id < 0 || id > INT32_MAX)
      return us_err_set(err, US_ERR_INPUT, "%s: %s[%zu]: not a token id", where, key, i);
    ids[i] = (int32_t)id;
  }
  return US_OK;
}

static enum us_status read_logprobs(json_t *root, const char *where, struct us_run_entry *e,
                                    struct us_err *err) {
  json_t *array;
  enum us_status status = us_json_array(root, where, "logprobs", INT32_MAX, &array, err);
  if (status != US_OK) return status;
  if (json_array_size(array) != e->count)
    return us_err_set(err, US_ERR_INPUT, "%s: logprobs: %zu values for %zu ids", where,
                      json_array_size(array), e->count);
  float *logprobs = malloc((e->count + 1) * sizeof *logprobs);
  if (!logprobs) return us_err_memory(err, "logprobs", e->count * sizeof *logprobs);
  e->logprobs = logprobs;
  for (size_t i = 0; i < e->count; i++) {
    json_t *value = json_array_get(array, i);
    double number = json_is_number(value) ? json_number_value(value) : INFINITY;
    if (!(fabs(number) < 3.4028236e38)) /* rounds to FLT_MAX at most */
      return us_err_set(err, US_ERR_INPUT, "%s: logprobs[%zu]: not a number that a float holds", where, i);
    logprobs[i] = (float)number;
  }
  return US_OK;
}

static enum us_status read_counts(json_t *stats, const char *where, const char *key, uint64_t *counts,
                                  struct us_err *err) {
  json_t *array;
  if (!us_json_has(stats, key)) return US_OK;
  enum us_status status = us_json_array(stats, where, key, US_MAX_BLOCK, &array, err);
  for (size_t i = 0; status == US_OK && i < json_array_size(array); i++) {
    json_t *value = json_array_get(array, i);
    if (!json_is_integer(value) || json_integer_value(value) < 0)
      return us_err_set(err, US_ERR_INPUT, "%s: stats.%s[%zu]: not a count", where, key, i);
    counts[i] = (uint64_t)json_integer_value(value);
  }
  return status;
}

static enum us_status read_stats(json_t *root, const char *where, struct us_decode_stats *s,
                                 struct us_err *err) {
  json_t *stats;
  int64_t rounds = 0, committed = 0;
  enum us_status status = us_json_object(root, where, "stats", &stats, err);
  if (status == US_OK && us_json_has(stats, "rounds"))
    status = us_json_int(stats, where, "rounds", 0, INT64_MAX, &rounds, err);
  if (status == US_OK && us_json_has(stats, "committed"))
    status = us_json_int(stats, where, "committed", 0, INT64_MAX, &committed, err);
  if (status == US_OK && us_json_has(stats, "first_token_seconds"))
    status = us_json_num(stats, where, "first_token_seconds", 0, 1e18, &s->first_token_seconds, err);
  if (status == US_OK && us_json_has(stats, "seconds"))
    status = us_json_num(stats, where, "seconds", 0, 1e18, &s->seconds, err);
  s->rounds = (uint64_t)rounds;
  s->committed = (uint64_t)committed;
  if (status == US_OK) status = read_counts(stats, where, "offered", s->offered, err);
  if (status == US_OK) status = read_counts(stats, where, "accepted", s->accepted, err);
  if (status == US_OK) status = read_counts(stats, where, "histogram", s->histogram, err);
  return status;
}

static enum us_status read_finish(const json_t *root, const char *where, enum us_finish *ret_finish,
                                  struct us_err *err) {
  const char *name;
  enum us_status status = us_json_str(root, where, "finish", &name, err);
  if (status != US_OK) return status;
  for (enum us_finish f = US_FINISH_NONE; f <= US_FINISH_CANCELLED; f++)
    if (!strcmp(name, us_finish_name(f))) {
      *ret_finish = f;
      return US_OK;
    }
  return us_err_set(err, US_ERR_INPUT, "%s: finish: no such end", where);
}

static enum us_status read_text(json_t *root, const char *where, const char *key, const char **ret_text,
                                struct us_err *err) {
  return us_json_has(root, key) ? us_json_str(root, where, key, ret_text, err) : US_OK;
}

static enum us_status read_number(json_t *root, const char *where, const char *key, uint32_t *ret,
                                  struct us_err *err) {
  int64_t value = 0;
  if (!us_json_has(root, key)) return US_OK;
  enum us_status status = us_json_int(root, where, key, 0, UINT32_MAX, &value, err);
  *ret = (uint32_t)value;
  return status;
}

static enum us_status read_entry(json_t *root, const char *where, struct us_run_entry *e,
                                 struct us_err *err) {
  if (!json_is_object(root)) return us_err_set(err, US_ERR_INPUT, "%s: not an object", where);
  e->text = "";
  enum us_status status = us_json_str(root, where, "id", &e->id, err);
  if (status == US_OK) status = read_ids(root, where, "prompt_ids", &e->prompt, &e->prompt_count, err);
  if (status == US_OK) status = read_ids(root, where, "ids", &e->ids, &e->count, err);
  if (status == US_OK) status = read_text(root, where, "scenario", &e->scenario, err);
  if (status == US_OK) status = read_text(root, where, "answer", &e->answer, err);
  if (status == US_OK) status = read_text(root, where, "text", &e->text, err);
  if (status == US_OK) status = read_number(root, where, "turn", &e->turn, err);
  if (status == US_OK) status = read_number(root, where, "sample", &e->sample, err);
  if (status == US_OK && us_json_has(root, "best")) status = us_json_bool(root, where, "best", &e->best, err);
  if (status == US_OK && us_json_has(root, "logprob"))
    status = us_json_num(root, where, "logprob", -1e300, 1e300, &e->mean_logprob, err);
  if (status == US_OK && us_json_has(root, "logprobs")) status = read_logprobs(root, where, e, err);
  if (status == US_OK && us_json_has(root, "finish")) status = read_finish(root, where, &e->finish, err);
  if (status == US_OK && us_json_has(root, "stats")) status = read_stats(root, where, &e->stats, err);
  e->text_bytes = strlen(e->text);
  return status;
}

static enum us_status grow(struct us_run *run, struct memory *memory, struct us_err *err) {
  if (run->n < memory->capacity) return US_OK;
  size_t capacity = memory->capacity ? 2 * memory->capacity : 16;
  struct us_run_entry *entries = realloc(run->entries, capacity * sizeof *entries);
  if (entries) run->entries = entries;
  json_t **roots = realloc(memory->roots, capacity * sizeof *roots);
  if (roots) memory->roots = roots;
  if (!entries || !roots) return us_err_memory(err, "a run", capacity * sizeof *entries);
  memory->capacity = capacity;
  return US_OK;
}

static enum us_status read_line(struct us_run *run, const char *line, size_t bytes, const char *where,
                                struct us_err *err) {
  struct memory *memory = run->memory;
  json_t *root;
  enum us_status status = grow(run, memory, err);
  if (status == US_OK) status = us_json_parse(line, bytes, where, &root, err);
  if (status != US_OK) return status;
  memory->roots[memory->n_roots++] = root;
  struct us_run_entry *entry = &run->entries[run->n++];
  memset(entry, 0, sizeof *entry);
  return read_entry(root, where, entry, err);
}

enum us_status us_run_parse(const char *text, size_t bytes, const char *name, struct us_run **ret_run,
                            struct us_err *err) {
  struct us_run *run = calloc(1, sizeof *run);
  if (run && !(run->memory = calloc(1, sizeof(struct memory)))) free(run), run = NULL;
  if (!run) return us_err_memory(err, "a run", sizeof *run);
  enum us_status status = US_OK;
  size_t number = 0;
  for (const char *line = text, *end = text + bytes; status == US_OK && line < end;) {
    const char *next = memchr(line, '\n', (size_t)(end - line));
    size_t length = (size_t)((next ? next : end) - line);
    char where[512];
    snprintf(where, sizeof where, "%.400s: line %zu", name, ++number);
    size_t blank = 0;
    while (blank < length && strchr(" \t\r", line[blank])) blank++;
    if (blank < length) status = read_line(run, line, length, where, err);
    line += length + 1;
  }
  if (status != US_OK)
    us_run_free(run);
  else
    *ret_run = run;
  return status;
}

enum us_status us_run_open(const char *path, struct us_run **ret_run, struct us_err *err) {
  struct us_buffer text = {0};
  enum us_status status = us_buffer_read_file(&text, path, US_RUN_MAX_BYTES, err);
  if (status == US_OK) status = us_run_parse(text.data ? text.data : "", text.size, path, ret_run, err);
  us_buffer_release(&text);
  return status;
}

void us_run_free(struct us_run *run) {
  if (!run) return;
  struct memory *memory = run->memory;
  for (size_t i = 0; i < run->n; i++) {
    release(run->entries[i].prompt);
    release(run->entries[i].ids);
    release(run->entries[i].logprobs);
  }
  for (size_t i = 0; i < memory->n_roots; i++) json_decref(memory->roots[i]);
  free(memory->roots);
  free(memory);
  free(run->entries);
  free(run);
}

const struct us_run_entry *us_run_find(const struct us_run *run, const int32_t *prompt, size_t count,
                                       uint32_t sample) {
  for (size_t i = 0; i < run->n; i++) {
    const struct us_run_entry *e = &run->entries[i];
    if (e->sample == sample && e->prompt_count == count && !memcmp(e->prompt, prompt, count * sizeof *prompt))
      return e;
  }
  return NULL;
}
