/* generate.h: from requests to tokens, plain or speculative, several sequences at a time, on any executor.
 *
 *     struct us_request request = {.prompt = ids, .prompt_count = n, .sampling = {.temperature = 0.8f, .top_p = 0.95f},
 *                                  .seed = 1, .samples = 1, .max_tokens = 256};
 *     struct us_generate_options options = {.tokenizer = tokenizer, .block = 8, .batch = 1};
 *     struct us_result result;
 *     if (us_generate(ex, &request, 1, &options, &result, NULL, &err) != US_OK) return err.status;
 *     fwrite(result.outputs[0].text.data, 1, result.outputs[0].text.size, stdout);
 *     us_result_release(&result);
 *
 * A prompt runs through prefill passes with chunk edges at absolute multiples of US_PREFILL_CHUNK, once for all samples of
 * a request; generated tokens run through decode passes. A round of a sequence whose last token y stands at position s:
 * the drafter, whose context holds positions < s, proposes tokens for s + 1 ..; one target pass over y and the proposals
 * verifies them (verify.h); the survivors and one token of the target are committed; the taps of exactly the committed
 * rows become drafter context. Plain decoding is the same round without proposals.
 *
 * With rule match, or greedily, the tokens are those of plain decoding, whatever block, batch, threads, drafter or adaptive
 * length; with reject and block at a temperature they follow the same law. Every draw is a function of the request's seed
 * and of positions: a request's output does not depend on what runs beside it. See docs/decoding.md.
 */
#ifndef US_DECODE_GENERATE_H
#define US_DECODE_GENERATE_H

#include "base/buffer.h"
#include "decode/sample.h"
#include "decode/verify.h"
#include "formats/tokenizer.h"
#include "model/executor.h"

#define US_PREFILL_CHUNK 512
#define US_MAX_BATCH     8
#define US_MAX_SAMPLES   1024
#define US_LOOP_GRAM     24 /* cut_loops: a request ends once so many tokens in a row occur ... */
#define US_LOOP_REPEATS  3  /* ... so many times */

enum us_finish {
  US_FINISH_NONE,
  US_FINISH_STOP,      /* a stop id: it is the last of the ids, and gives no text */
  US_FINISH_STRING,    /* a stop string: the text ends before it, the ids with the token that completed it */
  US_FINISH_LENGTH,    /* max_tokens, or the model's last position */
  US_FINISH_LOOP,      /* cut_loops */
  US_FINISH_CANCELLED, /* on_text said so */
};

/* "stop", "string", "length", "loop", "cancelled". */
const char *us_finish_name(enum us_finish finish);

/* Tokens of a recorded plain run of the same request, proposed instead of the drafter's. */
struct us_replay {
  const int32_t *ids;
  size_t count;
};

struct us_request {
  const int32_t *prompt; /* (prompt_count) at least one */
  size_t prompt_count;
  struct us_sampling sampling;
  uint64_t seed;
  uint32_t samples;    /* n; 0 counts as 1 */
  uint32_t max_tokens; /* generated tokens, at least 1 */
  const int32_t *stop_ids;
  size_t stop_id_count;
  const char *const *stop_strings; /* need a tokenizer; none empty */
  size_t stop_string_count;
  bool cut_loops;
  bool logprobs;                  /* compute log-probabilities (model's distribution at temperature 1) */
  const struct us_replay *replay; /* (samples) or NULL */
};

/* New text of one sample. `text` ends at a character, and never holds what may become a stop string. */
struct us_text_event {
  size_t request;
  uint32_t sample;
  const int32_t *ids; /* the tokens committed since the last event */
  size_t count;
  const char *text;
  size_t bytes;
  enum us_finish finish; /* other than NONE in the last event of a sample */
};

struct us_result;

struct us_generate_options {
  const struct us_tokenizer *tokenizer; /* NULL: no text and no stop strings */
  enum us_verify_rule rule;
  uint32_t block; /* anchor + drafts a round, 1 to the drafter's block; 0: the drafter's block; 1: plain */
  bool adaptive;  /* verify only as many drafts as pay (adaptive.h) */
  uint32_t batch; /* sequences that step together, 1 to US_MAX_BATCH; 0 counts as 1 */
  const float *accept; /* replay: rate at which slot i keeps the recorded token; the last one repeats */
  size_t accept_count; /* 0: always kept */
  bool (*on_text)(void *arg, const struct us_text_event *event); /* may be NULL; false cancels the sample */
  /* Called once a request when all of its samples have ended; the result is complete but still the call's. May be NULL. What is
   * not US_OK ends the call with it. */
  enum us_status (*on_result)(void *arg, size_t request, const struct us_result *result, struct us_err *err);
  void *arg;
  bool (*interrupted)(void); /* asked every round; true returns US_INTERRUPTED; may be NULL */
};

struct us_decode_stats {
  uint64_t rounds;                  /* target decode rounds of the sequence */
  uint64_t committed;               /* tokens those rounds committed, the target's own included */
  uint64_t offered[US_MAX_BLOCK];   /* rounds that verified a proposal in slot i */
  uint64_t accepted[US_MAX_BLOCK];  /* rounds in which slot i survived */
  uint64_t histogram[US_MAX_BLOCK]; /* rounds that accepted exactly i proposals */
  double first_token_seconds;       /* from the call to the first token */
  double seconds;                   /* from the first token to the last */
};

/* Committed tokens a round, the target's own included: the acceptance length. 0 without rounds. */
double us_decode_stats_length(const struct us_decode_stats *stats);

struct us_output {
  struct us_ids ids;
  float *logprobs;     /* (ids.count) or NULL */
  double mean_logprob; /* 0 without logprobs */
  struct us_buffer text;
  enum us_finish finish;
  struct us_decode_stats stats;
};

struct us_result {
  struct us_output *outputs; /* (samples) */
  uint32_t samples;
  uint32_t best; /* largest mean log-probability, the first of equals; 0 without logprobs */
};

/* Sums over everything a call ran. */
struct us_generate_stats {
  struct us_decode_stats decode; /* pooled over samples; seconds: wall time of all decode rounds */
  uint64_t prompt_tokens, generated_tokens;
  uint64_t passes, rows;                    /* target decode passes and their rows */
  uint64_t expert_layers, distinct_experts; /* MoE layers passed in decode passes; distinct experts in them */
  double seconds, prefill_seconds, draft_seconds, verify_seconds; /* wall time */
};

/* Run the requests (n) to their ends; ret_results (n) are filled in order, each to be released. On an error nothing is
 * left in them. US_ERR_USAGE: an argument out of range (the message names it); US_ERR_CHECK: logits that are not finite;
 * US_INTERRUPTED; and whatever the executor or on_result returns. */
US_CHECKED enum us_status us_generate(struct us_executor *ex, const struct us_request *requests, size_t n,
                                      const struct us_generate_options *options,
                                      struct us_result *ret_results, struct us_generate_stats *opt_stats,
                                      struct us_err *err);

void us_result_release(struct us_result *result);

#endif
