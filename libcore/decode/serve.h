/* serve.h: prompts in, recorded runs out: what us-serve does between its options and its output.
 *
 *     struct us_serve serve = {.tokenizer = tokenizer, .sampling = {.temperature = 0.7f}, .seed = 1, .max_tokens = 256,
 *                              .generate = {.block = 8, .batch = 4}, .on_entry = write_line, .arg = stdout};
 *     if (us_serve_run(&serve, ex, prompts, n, &stats, &err) != US_OK) return err.status;
 *
 * A raw prompt is encoded as it is; a chat goes through the model's template (formats/chat.h). The user turns of a
 * prompt are answered in order, each seeing the answers before it (of several samples, the best); answers to the same
 * turn of all prompts run together. Entries come out in the order of the prompts, turn by turn, as soon as they are
 * complete. Generation ends at the tokenizer's and the model's end-of-turn ids.
 */
#ifndef US_DECODE_SERVE_H
#define US_DECODE_SERVE_H

#include "decode/run.h"
#include "formats/prompts.h"

enum us_serve_mode {
  US_SERVE_AUTO, /* text and questions raw, turns and messages as chat */
  US_SERVE_RAW,  /* US_ERR_USAGE for turns and messages */
  US_SERVE_CHAT, /* text and questions become one user turn */
};

struct us_serve {
  const struct us_tokenizer *tokenizer; /* NULL: prompts are ids, answers have no text */
  enum us_serve_mode mode;
  struct us_chat_options chat; /* `generate` is set by us_serve_run */
  struct us_sampling sampling;
  uint64_t seed;
  uint32_t samples, max_tokens;
  bool best;       /* only the sample with the largest mean log-probability becomes an entry */
  bool logprobs;   /* entries carry log-probabilities */
  bool ignore_end; /* do not stop at end-of-turn ids */
  bool cut_loops;
  const char *const *stop_strings;
  size_t stop_string_count;
  const struct us_run *replay; /* recorded plain run to draft from, or NULL */
  struct us_generate_options
      generate; /* on_text may be set; tokenizer, on_result and arg are us_serve_run's */
  enum us_status (*on_entry)(void *arg, const struct us_run_entry *entry,
                             struct us_err *err); /* what is not US_OK ends the run with it */
  void *arg;                                      /* of on_entry and generate.on_text */
};

/* A prompt of plain text, for a command line; strings are borrowed. */
struct us_prompt us_serve_text_prompt(const char *id, const char *text);

/* A prompt of tokens: it needs no tokenizer, and the chat template leaves it alone; ids are borrowed. */
struct us_prompt us_serve_ids_prompt(const char *id, const int32_t *ids, size_t n);

/* Token ids of a prompt whose first turn is to be answered, appended: of `serve`, tokenizer, mode and chat count. Any thread. US_ERR_USAGE as
 * us_serve_run, US_ERR_INPUT what the tokenizer returns. */
US_CHECKED enum us_status us_serve_encode(const struct us_serve *serve, const struct us_prompt *prompt,
                                          struct us_ids *ids, struct us_err *err);

/* Answer prompts (n). US_ERR_USAGE: a mode that does not fit a prompt, text without a tokenizer, or what us_generate refuses; US_ERR_INPUT: the
 * replay has no run of a prompt. opt_stats is the sum over turns. */
US_CHECKED enum us_status us_serve_run(const struct us_serve *serve, struct us_executor *ex,
                                       const struct us_prompt *prompts, size_t n,
                                       struct us_generate_stats *opt_stats, struct us_err *err);

/* How many entries us_serve_run makes of the prompts (n) when nothing stops it: one a turn and sample, or a turn if only the best counts. */
size_t us_serve_entries(const struct us_serve *serve, const struct us_prompt *prompts, size_t n);

/* Write the statistics of a run for people, one figure a line: tokens a second, acceptance length (pooled: committed
 * tokens / rounds, the target's own included), time to first token; with `detail` also acceptance by slot. */
void us_serve_write_stats(FILE *out, const struct us_generate_stats *stats, bool detail);

#endif
