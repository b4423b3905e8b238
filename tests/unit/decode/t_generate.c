/* t_generate.c: the decode loop on the hash executor (fake.h). The truth is `oracle`: the fake's target function on the
 * tokens alone, drawn with the noise that sample.h defines, without caches, rounds, batches or a drafter.
 *
 *   Oracle | Equality | Prompts and samples | Ends | Text | Replay | Statistics | Faults
 */
#include "decode/sequence.h"
#include "fake.h"
#include "suite.h"

#include <stdio.h>

enum { VOCAB = 40, TOKENS = 60, PROMPT = 11 };

static int32_t prompt[3000];

static void setup(void) {
  for (uint32_t i = 0; i < sizeof prompt / sizeof *prompt; i++)
    prompt[i] = (int32_t)(fake_mix((uint32_t)us_test_seed(), i) % 5);
}

/* Oracle */

static void oracle(const struct fake *f, const struct us_request *r, uint32_t sample, int32_t *out,
                   uint32_t count) {
  int32_t tokens[4096];
  float logits[512];
  uint32_t n = (uint32_t)r->prompt_count;
  memcpy(tokens, r->prompt, n * sizeof *tokens);
  for (uint32_t i = 0; i < count; i++, n++) {
    fake_logits(f, tokens, n, logits);
    tokens[n] =
        us_sample_token(logits, f->model.shape.vocab, &r->sampling, us_noise_target(r->seed, n, sample));
    out[i] = tokens[n];
  }
}

static struct us_request request_of(uint32_t prompt_count, float temperature) {
  return (struct us_request){.prompt = prompt,
                             .prompt_count = prompt_count,
                             .sampling = {.temperature = temperature, .top_k = 12, .top_p = 0.95f},
                             .seed = us_test_seed() + prompt_count,
                             .samples = 1,
                             .max_tokens = TOKENS};
}

static void generate(struct fake *f, const struct us_request *r, size_t n,
                     const struct us_generate_options *o, struct us_result *results,
                     struct us_generate_stats *stats) {
  struct us_err err = {0};
  enum us_status status = us_generate(&f->ex, r, n, o, results, stats, &err);
  ck_assert_msg(status == US_OK, "%s", err.message);
  ck_assert_uint_eq(f->violations, 0);
}

static void assert_oracle(const struct fake *f, const struct us_request *r, const struct us_result *result) {
  int32_t expected[TOKENS];
  for (uint32_t s = 0; s < result->samples; s++) {
    const struct us_output *out = &result->outputs[s];
    ck_assert_uint_eq(out->ids.count, r->max_tokens);
    oracle(f, r, s, expected, r->max_tokens);
    for (uint32_t i = 0; i < r->max_tokens; i++)
      ck_assert_msg(out->ids.ids[i] == expected[i], "sample %u token %u: %d, expected %d", s, i,
                    out->ids.ids[i], expected[i]);
  }
}

/* Equality */

START_TEST(plain_decoding_is_the_oracle) {
  struct fake f;
  for (int warm = 0; warm < 2; warm++) {
    fake_init(&f, VOCAB, 8);
    struct us_request r = request_of(PROMPT, warm ? 0.9f : 0.0f);
    struct us_generate_options o = {.block = 1};
    struct us_result result;
    generate(&f, &r, 1, &o, &result, NULL);
    assert_oracle(&f, &r, &result);
    ck_assert_uint_eq(f.drafts + f.contexts, 0);
    us_result_release(&result);
  }
}
END_TEST

START_TEST(match_equals_plain_at_every_block_and_temperature) {
  struct fake f;
  static const float temperatures[] = {0.0f, 0.5f, 1.0f, 2.0f};
  for (uint32_t block = 1; block <= US_MAX_BLOCK; block++)
    for (size_t t = 0; t < 4; t++)
      for (int adaptive = 0; adaptive < 2; adaptive++) {
        fake_init(&f, VOCAB, US_MAX_BLOCK);
        f.blunder = block * 16;
        struct us_request r = request_of(PROMPT + block, temperatures[t]);
        struct us_generate_options o = {.block = block, .adaptive = adaptive};
        struct us_result result;
        generate(&f, &r, 1, &o, &result, NULL);
        assert_oracle(&f, &r, &result);
        us_result_release(&result);
      }
}
END_TEST

START_TEST(greedy_equals_plain_under_every_rule) {
  struct fake f;
  for (enum us_verify_rule rule = US_VERIFY_MATCH; rule <= US_VERIFY_BLOCK; rule++) {
    fake_init(&f, VOCAB, 8);
    struct us_request r = request_of(PROMPT, 0.0f);
    struct us_generate_options o = {.rule = rule};
    struct us_result result;
    struct us_generate_stats stats;
    generate(&f, &r, 1, &o, &result, &stats);
    assert_oracle(&f, &r, &result);
    ck_assert_double_gt(us_decode_stats_length(&stats.decode), 2.5); /* else the drafter's context is wrong */
    us_result_release(&result);
  }
}
END_TEST

START_TEST(a_batch_equals_single_runs_under_every_rule) {
  enum { N = 13 };
  struct fake f;
  struct us_request r[N];
  struct us_result alone[N], together[N];
  for (int i = 0; i < N; i++) {
    r[i] = request_of(1 + (uint32_t)i * 7, i % 3 ? 0.8f : 0.0f);
    r[i].max_tokens = 5 + (uint32_t)(i * 11) % 50;
    r[i].samples = i % 4 == 1 ? 3 : 1;
  }
  for (enum us_verify_rule rule = US_VERIFY_MATCH; rule <= US_VERIFY_BLOCK; rule++)
    for (uint32_t batch = 1; batch <= US_MAX_BATCH; batch += rule == US_VERIFY_MATCH ? 1 : 3) {
      fake_init(&f, VOCAB, 8);
      struct us_generate_options o = {.rule = rule, .block = 6, .adaptive = batch & 1, .batch = batch};
      struct us_generate_options single = o;
      single.batch = 1;
      for (int i = 0; i < N; i++) generate(&f, &r[i], 1, &single, &alone[i], NULL);
      generate(&f, r, N, &o, together, NULL);
      for (int i = 0; i < N; i++) {
        ck_assert_uint_eq(together[i].samples, alone[i].samples);
        for (uint32_t s = 0; s < alone[i].samples; s++) {
          const struct us_ids *a = &alone[i].outputs[s].ids, *b = &together[i].outputs[s].ids;
          ck_assert_uint_eq(a->count, b->count);
          ck_assert_mem_eq(a->ids, b->ids, a->count * sizeof *a->ids);
        }
        us_result_release(&alone[i]);
        us_result_release(&together[i]);
      }
    }
}
END_TEST

/* Prompts and samples */

START_TEST(prompts_take_prefill_chunks_between_multiples_of_512) {
  static const uint32_t lengths[] = {1, 2, 511, 512, 513, 1024, 1300};
  static const uint32_t chunks[] = {1, 1, 1, 1, 2, 2, 3};
  struct fake f; /* the fake counts a violation for any other edge */
  for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
    fake_init(&f, VOCAB, 8);
    struct us_request r = request_of(lengths[i], 0.7f);
    r.max_tokens = 10;
    struct us_generate_options o = {.block = 4};
    struct us_result result;
    struct us_generate_stats stats;
    generate(&f, &r, 1, &o, &result, &stats);
    assert_oracle(&f, &r, &result);
    ck_assert_uint_eq(f.prefill_rows, lengths[i]);
    ck_assert_uint_eq(f.forwards, chunks[i] + stats.passes);
    ck_assert_uint_eq(f.decode_rows, stats.rows);
    us_result_release(&result);
  }
}
END_TEST

START_TEST(samples_share_the_prompt_and_differ_by_their_noise) {
  struct fake f;
  for (uint32_t batch = 1; batch <= 8; batch += 7) {
    fake_init(&f, VOCAB, 8);
    struct us_request r = request_of(100, 1.0f);
    r.samples = 5;
    struct us_generate_options o = {.block = 8, .batch = batch};
    struct us_result result;
    generate(&f, &r, 1, &o, &result, NULL);
    ck_assert_uint_eq(f.prefill_rows, 100);
    assert_oracle(&f, &r, &result);
    ck_assert(memcmp(result.outputs[0].ids.ids, result.outputs[1].ids.ids, TOKENS * sizeof(int32_t)) != 0);
    us_result_release(&result);
  }
}
END_TEST

START_TEST(the_best_sample_has_the_largest_mean_logprob) {
  struct fake f;
  fake_init(&f, VOCAB, 8);
  struct us_request r = request_of(PROMPT, 1.5f);
  r.samples = 6;
  r.logprobs = true;
  for (uint32_t block = 1; block <= 8; block += 7) {
    struct us_generate_options o = {.block = block, .batch = 3};
    struct us_result result;
    generate(&f, &r, 1, &o, &result, NULL);
    double best = -INFINITY;
    uint32_t winner = 0;
    for (uint32_t s = 0; s < r.samples; s++) {
      const struct us_output *out = &result.outputs[s];
      int32_t tokens[256];
      float logits[VOCAB];
      double sum = 0.0;
      memcpy(tokens, r.prompt, PROMPT * sizeof *tokens);
      for (uint32_t i = 0; i < TOKENS; i++) {
        double z = 0.0;
        fake_logits(&f, tokens, PROMPT + i, logits);
        for (int v = 0; v < VOCAB; v++) z += exp((double)logits[v]);
        double logprob = (double)logits[out->ids.ids[i]] - log(z);
        ck_assert_float_eq_tol(out->logprobs[i], (float)logprob, 1e-5f);
        sum += logprob;
        tokens[PROMPT + i] = out->ids.ids[i];
      }
      ck_assert_double_eq_tol(out->mean_logprob, sum / TOKENS, 1e-5);
      if (sum > best) best = sum, winner = s;
    }
    ck_assert_uint_eq(result.best, winner);
    us_result_release(&result);
  }
}
END_TEST

/* Ends */

START_TEST(of_equal_samples_the_first_is_the_best) {
  struct fake f;
  fake_init(&f, VOCAB, 8);
  struct us_request r = request_of(PROMPT, 0.0f);
  r.samples = 3, r.logprobs = true;
  struct us_generate_options o = {.batch = 3};
  struct us_result result;
  generate(&f, &r, 1, &o, &result, NULL);
  ck_assert_double_eq(result.outputs[2].mean_logprob, result.outputs[0].mean_logprob);
  ck_assert_uint_eq(result.best, 0);
  us_result_release(&result);
}
END_TEST

START_TEST(a_stop_id_inside_an_accepted_prefix_cuts_what_follows) {
  struct fake f;
  fake_init(&f, VOCAB, 16);
  f.blunder = 20;
  int32_t expected[TOKENS];
  int inside = 0;
  for (uint32_t n = 3; n < 40; n++) {
    struct us_request r = request_of(n, 0.0f);
    oracle(&f, &r, 0, expected, TOKENS);
    int32_t stops[2] = {expected[n % 20], 9999};
    uint32_t length = 1;
    while (expected[length - 1] != stops[0]) length++;
    r.stop_ids = stops;
    r.stop_id_count = 2;
    for (uint32_t block = 1; block <= 16; block += 5) {
      struct us_generate_options o = {.block = block};
      struct us_result result;
      generate(&f, &r, 1, &o, &result, NULL);
      struct us_output *out = &result.outputs[0];
      ck_assert_int_eq(out->finish, US_FINISH_STOP);
      ck_assert_uint_eq(out->ids.count, length);
      ck_assert_mem_eq(out->ids.ids, expected, length * sizeof *expected);
      ck_assert_uint_eq(out->stats.committed, length - 1);
      uint64_t verified = 0;
      for (uint32_t i = 0; i < US_MAX_BLOCK; i++) verified += out->stats.histogram[i] * (i + 1);
      inside += verified > out->stats.committed;
      us_result_release(&result);
    }
  }
  ck_assert_int_gt(inside, 10); /* otherwise nothing was cut and the test shows little */
}
END_TEST

START_TEST(max_tokens_are_never_exceeded) {
  struct fake f;
  fake_init(&f, VOCAB, 16);
  f.blunder = 0;
  for (uint32_t most = 1; most < 40; most++) {
    struct us_request r = request_of(PROMPT, 0.0f);
    r.max_tokens = most;
    struct us_generate_options o = {.block = 16};
    struct us_result result;
    generate(&f, &r, 1, &o, &result, NULL);
    assert_oracle(&f, &r, &result);
    ck_assert_int_eq(result.outputs[0].finish, US_FINISH_LENGTH);
    us_result_release(&result);
  }
}
END_TEST

START_TEST(the_models_last_position_ends_a_sequence) {
  struct fake f;
  fake_init(&f, VOCAB, 8);
  f.model.shape.max_positions = PROMPT + 9;
  struct us_request r = request_of(PROMPT, 0.0f);
  struct us_generate_options o = {.block = 8};
  struct us_result result;
  generate(&f, &r, 1, &o, &result, NULL);
  ck_assert_uint_eq(result.outputs[0].ids.count, 9);
  ck_assert_int_eq(result.outputs[0].finish, US_FINISH_LENGTH);
  us_result_release(&result);
}
END_TEST

START_TEST(a_loop_is_cut_when_a_24_gram_occurs_the_third_time) {
  static const uint32_t periods[] = {1, 2, 5, 17};
  for (size_t i = 0; i < 4; i++)
    for (uint32_t block = 1; block <= 8; block += 7) {
      struct fake f;
      fake_init(&f, VOCAB, 8);
      f.period = periods[i];
      struct us_request r = request_of(PROMPT, 0.0f);
      r.max_tokens = 100;
      r.cut_loops = true;
      struct us_generate_options o = {.block = block};
      struct us_result result;
      generate(&f, &r, 1, &o, &result, NULL);
      ck_assert_int_eq(result.outputs[0].finish, US_FINISH_LOOP);
      ck_assert_uint_eq(result.outputs[0].ids.count, 24 + 2 * periods[i]);
      us_result_release(&result);
    }
}
END_TEST

/* Text */

/* A byte-level vocabulary: token b is byte b in the spelling of byte-level BPE; then a few pairs of letters. */
static struct us_tokenizer *letters_tokenizer(void) {
  static char json[65536];
  int at = snprintf(
      json, sizeof json,
      "{\"version\":\"1.0\",\"normalizer\":null,\"added_tokens\":[],\"pre_tokenizer\":{\"type\":"
      "\"ByteLevel\","
      "\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},"
      "\"post_processor\":null,\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\","
      "\"dropout\":null,\"unk_token\":null,\"continuing_subword_prefix\":\"\",\"end_of_word_suffix\":\"\","
      "\"fuse_unk\":false,\"byte_fallback\":false,\"merges\":[\"a b\",\"b c\"],\"vocab\":{");
  for (int b = 0, extra = 256; b < 256; b++) {
    bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    int code = printable ? b : extra++;
    at += snprintf(json + at, sizeof json - (size_t)at, "%s\"\\u%04x\":%d", b ? "," : "", code, b);
  }
  snprintf(json + at, sizeof json - (size_t)at, ",\"ab\":256,\"bc\":257}}}");
  struct us_tokenizer *tokenizer = NULL;
  struct us_err err = {0};
  enum us_status status = us_tokenizer_parse(json, strlen(json), "letters", &tokenizer, &err);
  ck_assert_msg(status == US_OK, "%s", err.message);
  return tokenizer;
}

struct heard {
  char text[4096];
  size_t bytes, ids, events;
  enum us_finish finish;
  size_t stop_after;
};

static bool listen(void *arg, const struct us_text_event *event) {
  struct heard *h = arg;
  ck_assert_int_eq(h->finish, US_FINISH_NONE);
  ck_assert_uint_le(event->bytes, sizeof h->text - h->bytes); /* what was sent cannot be taken back */
  memcpy(h->text + h->bytes, event->text, event->bytes);
  h->bytes += event->bytes;
  h->ids += event->count;
  h->finish = event->finish;
  return !h->stop_after || ++h->events < h->stop_after;
}

START_TEST(streamed_text_is_the_whole_text_and_stop_strings_never_show) {
  struct us_tokenizer *tokenizer = letters_tokenizer();
  struct fake f;
  fake_init(&f, 260, 8); /* two ids of padding that no token has */
  f.blunder = 30;
  for (uint32_t n = 2; n < 30; n++) {
    struct us_request r = request_of(n, n % 2 ? 1.0f : 0.0f);
    struct us_generate_options plain = {.block = 1, .tokenizer = tokenizer};
    struct us_result whole;
    generate(&f, &r, 1, &plain, &whole, NULL);
    const struct us_buffer *text = &whole.outputs[0].text;
    ck_assert_uint_ge(text->size, TOKENS - 4);
    char stop[16] = {0};
    size_t from = n + 3; /* a string of three bytes, or five, that spans tokens */
    memcpy(stop, text->data + from, n % 3 ? 3 : 5);
    const char *expected_end = strstr(text->data, stop);
    if (strlen(stop) < 3 || memchr(text->data, 0, text->size)) expected_end = NULL;
    const char *stops[] = {"never in it, surely", stop};
    r.stop_strings = stops;
    r.stop_string_count = expected_end ? 2 : 1;
    for (uint32_t block = 1; block <= 8; block++) {
      struct heard heard = {0};
      struct us_generate_options o = {
          .block = block, .tokenizer = tokenizer, .on_text = listen, .arg = &heard};
      struct us_result result;
      generate(&f, &r, 1, &o, &result, NULL);
      const struct us_output *out = &result.outputs[0];
      size_t length = expected_end ? (size_t)(expected_end - text->data) : text->size;
      ck_assert_uint_eq(out->text.size, length);
      ck_assert_mem_eq(out->text.data, text->data, length);
      ck_assert_int_eq(out->finish, expected_end ? US_FINISH_STRING : US_FINISH_LENGTH);
      ck_assert_uint_eq(heard.bytes, length);
      ck_assert_mem_eq(heard.text, text->data, length);
      ck_assert_uint_eq(heard.ids, out->ids.count);
      ck_assert_int_eq(heard.finish, out->finish);
      us_result_release(&result);
    }
    us_result_release(&whole);
  }
  us_tokenizer_free(tokenizer);
}
END_TEST

START_TEST(an_unfinished_character_is_text_even_if_padding_ends_the_sample) {
  struct us_tokenizer *tokenizer = letters_tokenizer();
  struct us_request r = request_of(PROMPT, 0.0f);
  for (int32_t last = 256; last < 259; last++) { /* "ab", "bc", and an id that no token has */
    struct us_output out = {0};
    struct us_sequence s = {.request = &r, .output = &out, .limit = 2};
    ck_assert_int_eq(us_sequence_commit(&s, tokenizer, 0xc3, 0, NULL), US_OK);
    ck_assert_uint_eq(out.text.size, 0);
    ck_assert_int_eq(us_sequence_commit(&s, tokenizer, last, 0, NULL), US_OK);
    ck_assert_int_eq(out.finish, US_FINISH_LENGTH);
    ck_assert_uint_eq(out.text.size, last < 258 ? 3 : 1);
    ck_assert_int_eq(out.text.data[0], (char)0xc3);
    us_ids_release(&out.ids);
    us_buffer_release(&out.text);
  }
  us_tokenizer_free(tokenizer);
}
END_TEST

START_TEST(of_stop_strings_that_one_token_completes_the_one_that_began_first_counts) {
  struct us_tokenizer *tokenizer = letters_tokenizer();
  const char *stops[] = {"bc", "xbc", "c"};
  struct us_request r = request_of(PROMPT, 0.0f);
  r.stop_strings = stops, r.stop_string_count = 3;
  struct us_output out = {0};
  struct us_sequence s = {.request = &r, .output = &out, .limit = 9};
  ck_assert_int_eq(us_sequence_commit(&s, tokenizer, 'a', 0, NULL), US_OK);
  ck_assert_int_eq(us_sequence_commit(&s, tokenizer, 'x', 0, NULL), US_OK);
  ck_assert_int_eq(out.finish, US_FINISH_NONE);
  ck_assert_int_eq(us_sequence_commit(&s, tokenizer, 257, 0, NULL), US_OK); /* "bc" */
  ck_assert_int_eq(out.finish, US_FINISH_STRING);
  ck_assert_str_eq(out.text.data, "a");
  us_ids_release(&out.ids);
  us_buffer_release(&out.text);
  us_tokenizer_free(tokenizer);
}
END_TEST

static enum us_status refuse_second(void *arg, size_t request, const struct us_result *result,
                                    struct us_err *err) {
  ck_assert(request < 4 && result->samples == 1 && result->outputs[0].finish == US_FINISH_LENGTH);
  return ++*(size_t *)arg == 2 ? us_err_set(err, US_ERR_IO, "no room") : US_OK;
}

START_TEST(a_result_that_cannot_be_taken_ends_the_call) {
  enum { N = 4 };
  struct fake f;
  struct us_request requests[N];
  for (uint32_t batch = 1; batch <= 2; batch++)
    for (uint32_t tokens = 1; tokens <= 9; tokens += 8) { /* ends with its prompt, and after rounds */
      fake_init(&f, VOCAB, 8);
      for (uint32_t i = 0; i < N; i++)
        requests[i] = request_of(PROMPT + i, 0.0f), requests[i].max_tokens = tokens;
      struct us_result results[N];
      struct us_err err = {0};
      size_t taken = 0;
      struct us_generate_options o = {.batch = batch, .on_result = refuse_second, .arg = &taken};
      ck_assert_int_eq(us_generate(&f.ex, requests, N, &o, results, NULL, &err), US_ERR_IO);
      ck_assert_str_eq(err.message, "no room");
      ck_assert_uint_eq(taken, 2);
      ck_assert_ptr_null(results[0].outputs);
    }
}
END_TEST

START_TEST(a_listener_can_cancel_one_sample) {
  struct us_tokenizer *tokenizer = letters_tokenizer();
  struct fake f;
  fake_init(&f, 258, 8);
  struct us_request r = request_of(PROMPT, 0.0f);
  struct heard heard = {.stop_after = 3};
  struct us_generate_options o = {.block = 1, .tokenizer = tokenizer, .on_text = listen, .arg = &heard};
  struct us_result result;
  generate(&f, &r, 1, &o, &result, NULL);
  ck_assert_int_eq(result.outputs[0].finish, US_FINISH_CANCELLED);
  ck_assert_uint_eq(result.outputs[0].ids.count, 3);
  us_result_release(&result);
  us_tokenizer_free(tokenizer);
}
END_TEST

/* Replay */

START_TEST(a_replay_reaches_every_accept_length_and_equals_the_plain_run) {
  static const float rates[] = {0.9f, 0.95f, 0.9f, 0.85f, 0.9f, 0.9f, 0.8f};
  for (int warm = 0; warm < 2; warm++)
    for (int drafter = 0; drafter < 2; drafter++) {
      struct fake f;
      fake_init(&f, VOCAB, 8);
      if (!drafter) f.ex.draft = NULL;
      struct us_request r = request_of(PROMPT, warm ? 1.0f : 0.0f);
      r.max_tokens = 1000;
      struct us_generate_options plain = {.block = 1}, o = {.block = 8, .accept = rates, .accept_count = 7};
      struct us_result recorded, result;
      generate(&f, &r, 1, &plain, &recorded, NULL);
      const struct us_ids *ids = &recorded.outputs[0].ids;
      struct us_replay replay = {ids->ids, ids->count};
      r.replay = &replay;
      generate(&f, &r, 1, &o, &result, NULL);
      ck_assert_uint_eq(result.outputs[0].ids.count, 1000);
      ck_assert_mem_eq(result.outputs[0].ids.ids, ids->ids, 1000 * sizeof(int32_t));
      const struct us_decode_stats *stats = &result.outputs[0].stats;
      for (int i = 0; i < 8; i++) ck_assert_uint_gt(stats->histogram[i], 0);
      if (drafter) ck_assert_uint_ge(f.drafts, stats->rounds - 1); /* no draft pass when one token is left */
      us_result_release(&result);
      us_result_release(&recorded);
    }
}
END_TEST

START_TEST(replay_rates_of_0_and_1_accept_nothing_and_everything) {
  struct fake f;
  fake_init(&f, VOCAB, 8);
  struct us_request r = request_of(PROMPT, 1.0f);
  r.max_tokens = 57; /* the first token and 7 rounds of 8 */
  struct us_generate_options plain = {.block = 1};
  struct us_result recorded, result;
  generate(&f, &r, 1, &plain, &recorded, NULL);
  struct us_replay replay = {recorded.outputs[0].ids.ids, recorded.outputs[0].ids.count};
  r.replay = &replay;
  for (int all = 0; all < 2; all++) {
    float rate = (float)all;
    struct us_generate_options o = {.block = 8, .accept = &rate, .accept_count = 1};
    generate(&f, &r, 1, &o, &result, NULL);
    ck_assert_mem_eq(result.outputs[0].ids.ids, replay.ids, 57 * sizeof(int32_t));
    ck_assert_uint_eq(result.outputs[0].stats.rounds, all ? 7 : 56);
    us_result_release(&result);
  }
  us_result_release(&recorded);
}
END_TEST

START_TEST(the_last_of_the_replay_rates_repeats) {
  struct fake f;
  fake_init(&f, VOCAB, 8);
  struct us_request r = request_of(PROMPT, 1.0f);
  static const float rates[] = {0.3f, 1.0f};
  struct us_generate_options plain = {.block = 1}, o = {.block = 8, .accept = rates, .accept_count = 2};
  struct us_result recorded, result;
  generate(&f, &r, 1, &plain, &recorded, NULL);
  struct us_replay replay = {recorded.outputs[0].ids.ids, recorded.outputs[0].ids.count};
  r.replay = &replay;
  generate(&f, &r, 1, &o, &result, NULL);
  const uint64_t *histogram = result.outputs[0].stats.histogram;
  uint64_t some = 0; /* rounds that kept some of their proposals: none, or all of the fewer before the end */
  for (uint32_t i = 1; i < 7; i++) some += histogram[i];
  ck_assert_uint_le(some, 1);
  ck_assert(histogram[0] > 1 && histogram[7] > 1);
  us_result_release(&result);
  us_result_release(&recorded);
}
END_TEST

/* Statistics */

START_TEST(statistics_add_up) {
  struct fake f;
  fake_init(&f, VOCAB, 8);
  struct us_request r = request_of(PROMPT, 0.7f);
  r.samples = 3;
  struct us_generate_options o = {.block = 5, .batch = 2};
  struct us_result result;
  struct us_generate_stats stats;
  generate(&f, &r, 1, &o, &result, &stats);
  uint64_t rounds = 0;
  for (uint32_t s = 0; s < 3; s++) {
    const struct us_decode_stats *st = &result.outputs[s].stats;
    uint64_t sum = 0, committed = 0;
    ck_assert_uint_eq(st->committed + 1, result.outputs[s].ids.count);
    for (uint32_t i = 0; i < US_MAX_BLOCK; i++) {
      sum += st->histogram[i];
      committed += st->histogram[i] * (i + 1);
      ck_assert_uint_le(st->accepted[i], st->offered[i]);
    }
    ck_assert_uint_eq(sum, st->rounds);
    ck_assert_uint_eq(committed, st->committed);
    ck_assert_double_eq(us_decode_stats_length(st), (double)st->committed / (double)st->rounds);
    ck_assert(st->first_token_seconds > 0.0 && st->seconds >= 0.0);
    rounds += st->rounds;
  }
  ck_assert_uint_eq(stats.decode.rounds, rounds);
  ck_assert_uint_eq(stats.generated_tokens, 3 * TOKENS);
  ck_assert_uint_eq(stats.prompt_tokens, PROMPT);
  ck_assert_uint_le(stats.passes, rounds);
  ck_assert_uint_eq(stats.expert_layers, stats.passes); /* one MoE layer */
  ck_assert(stats.distinct_experts >= 2 * stats.passes && stats.distinct_experts <= 6 * stats.passes);
  us_result_release(&result);
}
END_TEST

START_TEST(adaptive_length_verifies_fewer_rows_when_the_drafter_is_unsure) {
  struct us_generate_stats full, adaptive;
  struct us_result result;
  struct fake f;
  for (int i = 0; i < 2; i++) {
    fake_init(&f, VOCAB, 16);
    struct us_request r = request_of(PROMPT, 0.0f);
    struct us_generate_options o = {.block = 16, .adaptive = i == 1};
    generate(&f, &r, 1, &o, &result, i ? &adaptive : &full);
    assert_oracle(&f, &r, &result);
    us_result_release(&result);
  }
  ck_assert_uint_lt(adaptive.rows, full.rows); /* the fake's largest probability is about 0.2 */
}
END_TEST

/* Faults */

static enum us_status attempt(struct fake *f, struct us_request r, struct us_generate_options o,
                              struct us_err *err) {
  struct us_result result;
  memset(&result, 0xff, sizeof result);
  enum us_status status = us_generate(&f->ex, &r, 1, &o, &result, NULL, err);
  if (status != US_OK) ck_assert_ptr_null(result.outputs);
  us_result_release(&result);
  return status;
}

START_TEST(bad_arguments_are_named) {
  struct fake f;
  struct us_err err = {0};
  int32_t bad = VOCAB;
  const char *empty = "";
  struct us_request good = request_of(PROMPT, 1.0f), r = good;
  struct us_generate_options nothing = {0}, block = {.block = 9}, batch = {.batch = 9};
  fake_init(&f, VOCAB, 8);
#define REFUSED(options, text)                                                                               \
  do {                                                                                                       \
    ck_assert_int_eq(attempt(&f, r, options, &err), US_ERR_USAGE);                                           \
    ck_assert_msg(strstr(err.message, text) != NULL, "%s", err.message);                                     \
    r = good;                                                                                                \
  } while (0)
  r.prompt = &bad, r.prompt_count = 1;
  REFUSED(nothing, "prompt token 0");
  r.prompt_count = 0;
  REFUSED(nothing, "no tokens");
  r.prompt_count = 4096;
  REFUSED(nothing, "does not fit");
  r.max_tokens = 0;
  REFUSED(nothing, "max tokens");
  r.sampling.temperature = NAN;
  REFUSED(nothing, "temperature");
  r.sampling.temperature = 1e-5f;
  REFUSED(nothing, "temperature");
  r.sampling.top_p = 1.5f;
  REFUSED(nothing, "top-p");
  r.sampling.min_p = -1.0f;
  REFUSED(nothing, "min-p");
  r.samples = 5000;
  REFUSED(nothing, "samples");
  r.stop_strings = &empty, r.stop_string_count = 1;
  REFUSED(nothing, "tokenizer");
  REFUSED(block, "block 9");
  REFUSED(batch, "batch 9");
  f.ex.draft = NULL;
  block.block = 4;
  REFUSED(block, "needs a drafter");
#undef REFUSED
}
END_TEST

START_TEST(logits_that_are_not_finite_end_the_run) {
  for (enum us_verify_rule rule = US_VERIFY_MATCH; rule <= US_VERIFY_BLOCK; rule++) {
    struct fake f;
    struct us_err err = {0};
    fake_init(&f, VOCAB, 8);
    f.nan_position = PROMPT + 5;
    ck_assert_int_eq(
        attempt(&f, request_of(PROMPT, 1.0f), (struct us_generate_options){.rule = rule, .block = 8}, &err),
        US_ERR_CHECK);
    ck_assert(strstr(err.message, "position 16") != NULL);
  }
}
END_TEST

START_TEST(an_executors_error_comes_through_whenever_it_happens) {
  for (uint32_t after = 1; after < 12; after++) {
    struct fake f;
    struct us_err err = {0};
    fake_init(&f, VOCAB, 8);
    f.fail_after = after;
    struct us_request r = request_of(700, 1.0f);
    r.samples = 3;
    ck_assert_int_eq(attempt(&f, r, (struct us_generate_options){.block = 4, .batch = 2}, &err),
                     US_ERR_DEVICE);
    ck_assert_str_eq(err.message, "the device is gone");
  }
}
END_TEST

static int questions;
static bool interrupt_soon(void) {
  return ++questions > 5;
}

START_TEST(an_interrupt_ends_the_run_between_rounds) {
  struct fake f;
  struct us_err err = {0};
  fake_init(&f, VOCAB, 8);
  questions = 0;
  struct us_generate_options o = {.block = 2, .interrupted = interrupt_soon};
  ck_assert_int_eq(attempt(&f, request_of(PROMPT, 1.0f), o, &err), US_INTERRUPTED);
}
END_TEST

START_TEST(a_cache_that_keeps_rejected_rows_would_be_noticed) {
  struct fake f;
  fake_init(&f, VOCAB, 8);
  f.keep_first_write = true;
  struct us_request r = request_of(PROMPT, 0.0f);
  struct us_generate_options o = {.block = 8};
  struct us_result result;
  int32_t expected[TOKENS];
  generate(&f, &r, 1, &o, &result, NULL);
  oracle(&f, &r, 0, expected, TOKENS);
  ck_assert(memcmp(result.outputs[0].ids.ids, expected, sizeof expected) != 0);
  us_result_release(&result);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("generate");
  tcase_add_checked_fixture(c, setup, NULL);
  tcase_add_test(c, plain_decoding_is_the_oracle);
  tcase_add_test(c, match_equals_plain_at_every_block_and_temperature);
  tcase_add_test(c, greedy_equals_plain_under_every_rule);
  tcase_add_test(c, a_batch_equals_single_runs_under_every_rule);
  tcase_add_test(c, prompts_take_prefill_chunks_between_multiples_of_512);
  tcase_add_test(c, samples_share_the_prompt_and_differ_by_their_noise);
  tcase_add_test(c, the_best_sample_has_the_largest_mean_logprob);
  tcase_add_test(c, of_equal_samples_the_first_is_the_best);
  tcase_add_test(c, a_stop_id_inside_an_accepted_prefix_cuts_what_follows);
  tcase_add_test(c, max_tokens_are_never_exceeded);
  tcase_add_test(c, the_models_last_position_ends_a_sequence);
  tcase_add_test(c, a_loop_is_cut_when_a_24_gram_occurs_the_third_time);
  tcase_add_test(c, streamed_text_is_the_whole_text_and_stop_strings_never_show);
  tcase_add_test(c, an_unfinished_character_is_text_even_if_padding_ends_the_sample);
  tcase_add_test(c, of_stop_strings_that_one_token_completes_the_one_that_began_first_counts);
  tcase_add_test(c, a_result_that_cannot_be_taken_ends_the_call);
  tcase_add_test(c, a_listener_can_cancel_one_sample);
  tcase_add_test(c, a_replay_reaches_every_accept_length_and_equals_the_plain_run);
  tcase_add_test(c, replay_rates_of_0_and_1_accept_nothing_and_everything);
  tcase_add_test(c, the_last_of_the_replay_rates_repeats);
  tcase_add_test(c, statistics_add_up);
  tcase_add_test(c, adaptive_length_verifies_fewer_rows_when_the_drafter_is_unsure);
  tcase_add_test(c, bad_arguments_are_named);
  tcase_add_test(c, logits_that_are_not_finite_end_the_run);
  tcase_add_test(c, an_executors_error_comes_through_whenever_it_happens);
  tcase_add_test(c, an_interrupt_ends_the_run_between_rounds);
  tcase_add_test(c, a_cache_that_keeps_rejected_rows_would_be_noticed);
  return us_suite("generate", c);
}
US_TEST_MAIN(make_suite)
