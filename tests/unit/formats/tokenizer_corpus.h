/* tokenizer_corpus.h: the inputs of the tokenizer's parity test, as tests/parity/make_tokenizer_goldens.py makes them. */
#ifndef US_TESTS_TOKENIZER_CORPUS_H
#define US_TESTS_TOKENIZER_CORPUS_H

#include "base/buffer.h"
#include "base/intern.h"
#include "base/sha256.h"
#include "formats/byte_level.h"
#include "formats/pretokenize.h"
#include "base/utf8.h"
#include "suite.h"
#include <jansson.h>
#include <string.h>

#define CORPUS_BYTES   2500000
#define CORPUS_VOCAB   150000
#define CORPUS_SPECIAL 10

static const char *const corpus_special[CORPUS_SPECIAL] = {
    "<|endoftext|>",   "<|im_start|>",     "<|im_end|>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<think>",    "</think>",    "<|mask|>"};

static inline void corpus_ok(enum us_status status, const struct us_err *err) {
  ck_assert_msg(status == US_OK, "%s", err->message);
}

static inline json_t *corpus_fixture(const char *name) {
  char path[1024];
  json_error_t problem;
  snprintf(path, sizeof path, "%s/tokenizer/%s", getenv("US_TEST_FIXTURES"), name);
  json_t *root = json_load_file(path, 0, &problem);
  ck_assert_msg(root != NULL, "%s: %s", path, problem.text);
  return root;
}

static inline void corpus_sha256(const void *bytes, size_t n, char hex[US_SHA256_HEX]) {
  uint8_t digest[US_SHA256_BYTES];
  struct us_err err = {0};
  corpus_ok(us_sha256_bytes(bytes, n, digest, &err), &err);
  us_sha256_hex(digest, hex);
}

/* SplitMix64. */
static inline uint64_t corpus_next(uint64_t *state) {
  uint64_t z = *state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

static inline uint64_t corpus_below(uint64_t *state, uint64_t n) {
  return corpus_next(state) % n;
}

static inline void corpus_add(struct us_buffer *out, const void *bytes, size_t n) {
  struct us_err err; /* not cleared: a kilobyte a call would be most of the test's time */
  corpus_ok(us_buffer_append(out, bytes, n, &err), &err);
}

/* One run of the kind that the generator drew. */
static inline void corpus_run(struct us_buffer *out, uint64_t *state, const json_t *fragments) {
  static const uint32_t ranges[][2] = {
      {0x4E00, 0x9FA5},   {0x3041, 0x3096},   {0x30A1, 0x30FA}, {0xAC00, 0xD7A3}, {0x1F600, 0x1F64F},
      {0x1F300, 0x1F5FF}, {0x300, 0x36F},     {0x3B1, 0x3C9},   {0x410, 0x44F},   {0x5D0, 0x5EA},
      {0x620, 0x64A},     {0x905, 0x939},     {0x94B, 0x951},   {0xE01, 0xE2E},   {0x1100, 0x1112},
      {0x1161, 0x1175},   {0x20A0, 0x20BE},   {0x2190, 0x21FF}, {0x2F00, 0x2FD5}, {0xF900, 0xFA6D},
      {0xFF01, 0xFF5E},   {0x1D400, 0x1D454}, {0x2000, 0x200F}};
  uint64_t kind = corpus_below(state, 16), n = 1 + corpus_below(state, 40);
  if (kind < 8) {
    for (; n > 0; n--) {
      const json_t *fragment = json_array_get(fragments, corpus_below(state, json_array_size(fragments)));
      corpus_add(out, json_string_value(fragment), json_string_length(fragment));
    }
  } else if (kind < 11) {
    for (; n > 0; n--) {
      corpus_add(out, " ", 1);
      for (uint64_t syllables = 1 + corpus_below(state, 5); syllables > 0; syllables--) {
        corpus_add(out, &"bcdfghjklmnpqrstvwxz"[corpus_below(state, 20)], 1);
        corpus_add(out, &"aeiouy"[corpus_below(state, 6)], 1);
      }
    }
  } else if (kind < 14) {
    const uint32_t *range = ranges[corpus_below(state, sizeof ranges / sizeof *ranges)];
    for (; n > 0; n--) {
      char bytes[4];
      corpus_add(
          out, bytes,
          (size_t)us_utf8_put(range[0] + (uint32_t)corpus_below(state, range[1] - range[0] + 1), bytes));
    }
  } else if (kind == 14) {
    for (; n > 0; n--) {
      char number[16];
      corpus_add(out, number,
                 (size_t)snprintf(number, sizeof number, "%d", (int)corpus_below(state, 1000000)));
      corpus_add(out, &" ,.\n\t"[corpus_below(state, 5)], 1);
    }
  } else {
    for (n = 1 + n / 8; n > 0; n--) corpus_add(out, &(uint8_t){(uint8_t)corpus_below(state, 256)}, 1);
  }
}

static inline void corpus_text(struct us_buffer *out) {
  uint64_t state = 2026;
  json_t *fragments = corpus_fixture("fragments.json");
  while (out->size < CORPUS_BYTES) corpus_run(out, &state, fragments);
  out->size = CORPUS_BYTES;
  json_decref(fragments);
}

/* The large vocabulary: what has become a token, and merges as pairs of numbers of `tokens`. */
struct corpus_vocab {
  struct us_intern tokens;
  uint32_t (*merges)[2];
  size_t n_merges;
};

static inline bool corpus_full(const struct corpus_vocab *vocab) {
  return 256 + vocab->n_merges + CORPUS_SPECIAL >= CORPUS_VOCAB;
}

/* Make `word` a token by joining its two parts, made first; false when the vocabulary is full. */
static inline bool corpus_build(struct corpus_vocab *vocab, const char *word, size_t n) {
  struct us_err err = {0};
  uint32_t index;
  if (us_intern_find(&vocab->tokens, word, n) >= 0) return true;
  if (corpus_full(vocab)) return false;
  size_t sum = 0;
  for (size_t i = 0; i < n; i++) sum += (unsigned char)word[i];
  size_t cut = 1 + (sum * 31 + n * 7) % (n - 1);
  if (!corpus_build(vocab, word, cut) || !corpus_build(vocab, word + cut, n - cut) || corpus_full(vocab))
    return false;
  corpus_ok(us_intern_add(&vocab->tokens, word, n, &index, NULL, &err), &err);
  vocab->merges[vocab->n_merges][0] = (uint32_t)us_intern_find(&vocab->tokens, word, cut);
  vocab->merges[vocab->n_merges++][1] = (uint32_t)us_intern_find(&vocab->tokens, word + cut, n - cut);
  return true;
}

static inline void corpus_vocab_init(struct corpus_vocab *vocab, const struct us_buffer *text) {
  struct us_err err = {0};
  struct us_buffer repaired = {0}, normal = {0};
  struct us_intern seen = {0};
  struct us_pattern *pattern;
  struct us_pieces pieces;
  uint32_t index;
  vocab->merges = calloc(CORPUS_VOCAB, sizeof *vocab->merges);
  ck_assert_ptr_nonnull(vocab->merges);
  for (int byte = 0; byte < 256; byte++)
    corpus_ok(us_intern_add(&vocab->tokens, &(uint8_t){(uint8_t)byte}, 1, &index, NULL, &err), &err);
  corpus_ok(us_utf8_repair(text->data, text->size, &repaired, &err), &err);
  corpus_ok(us_utf8_nfc(repaired.data, repaired.size, &normal, &err), &err);
  corpus_ok(us_pattern_create(US_PATTERN_QWEN2, &pattern, &err), &err);
  corpus_ok(us_pieces_begin(&pieces, pattern, &err), &err);
  us_pieces_set(&pieces, normal.data, normal.size);
  for (;;) {
    const char *piece;
    size_t n;
    bool added;
    corpus_ok(us_pieces_next(&pieces, &piece, &n, &err), &err);
    if (piece == NULL) break;
    corpus_ok(us_intern_add(&seen, piece, n, &index, &added, &err), &err);
    if (added && n <= 48) corpus_build(vocab, piece, n);
  }
  us_pieces_end(&pieces);
  us_pattern_free(pattern);
  us_intern_release(&seen);
  us_buffer_release(&repaired);
  us_buffer_release(&normal);
}

static inline void corpus_vocab_release(struct corpus_vocab *vocab) {
  us_intern_release(&vocab->tokens);
  free(vocab->merges);
}

/* A token in the spelling of tokenizer.json: overwritten by the next call on the same scratch. */
static inline const char *corpus_spell(const struct corpus_vocab *vocab, uint32_t token,
                                       struct us_buffer *scratch) {
  struct us_err err = {0};
  size_t n;
  const char *bytes = us_intern_get(&vocab->tokens, token, &n);
  us_buffer_clear(scratch);
  corpus_ok(us_byte_level_spell(bytes, n, scratch, &err), &err);
  return scratch->data;
}

/* The whole tokenizer.json, with merges in the older style "a b"; settings are taken from the 4 K fixture. */
static inline char *corpus_vocab_json(const struct corpus_vocab *vocab) {
  struct us_buffer a = {0}, b = {0};
  json_t *root = corpus_fixture("4k.json"), *entries = json_object(), *merges = json_array(),
         *added = json_array();
  for (uint32_t i = 0; i < vocab->tokens.n; i++)
    json_object_set_new(entries, corpus_spell(vocab, i, &a), json_integer(i));
  for (size_t i = 0; i < vocab->n_merges; i++)
    json_array_append_new(merges, json_sprintf("%s %s", corpus_spell(vocab, vocab->merges[i][0], &a),
                                               corpus_spell(vocab, vocab->merges[i][1], &b)));
  for (int i = 0; i < CORPUS_SPECIAL; i++)
    json_array_append_new(added, json_pack("{s:i, s:s, s:b, s:b}", "id", (int)vocab->tokens.n + i, "content",
                                           corpus_special[i], "special", 1, "normalized", 0));
  json_object_set_new(json_object_get(root, "model"), "vocab", entries);
  json_object_set_new(json_object_get(root, "model"), "merges", merges);
  json_object_set_new(root, "added_tokens", added);
  char *text = json_dumps(root, JSON_COMPACT);
  json_decref(root);
  us_buffer_release(&a);
  us_buffer_release(&b);
  return text;
}

#endif
