/* bpe_train.c: train a byte-level BPE vocabulary.
 *
 * Contents: counting words; pairs; the heap; merging; writing.
 */
#include "training/bpe_train.h"
#include "base/intern.h"
#include "base/json.h"
#include "formats/added_tokens.h"
#include "formats/byte_level.h"
#include "formats/pretokenize.h"
#include "base/utf8.h"
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

const char *const us_bpe_special[US_BPE_N_SPECIAL] = {
    "<|endoftext|>",   "<|im_start|>",     "<|im_end|>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<think>",    "</think>",    "<|mask|>"};

#define MAX_VOCAB (1 << 20)

struct pair {
  int32_t left, right;
  uint64_t count;  /* occurrences now */
  uint32_t *words; /* words it occurs or once occurred in */
  uint32_t n_words, capacity;
};

struct word {
  uint64_t count;
  uint32_t begin, n; /* symbols[begin, begin + n) */
};

struct heap_entry {
  uint64_t count; /* as it was when pushed; the pair's own may have fallen since */
  uint32_t pair;
};

struct us_bpe_trainer {
  struct us_pattern *pattern;
  struct us_pieces pieces;
  struct us_added_tokens special;
  struct us_intern words;
  uint64_t *counts; /* (words.n) */
  size_t counts_capacity;
  struct us_buffer normal, repaired;
  /* while merging */
  struct us_intern symbols; /* a symbol's bytes: number = id */
  struct word *list;
  int32_t *text; /* all words' symbols */
  struct us_intern pair_index;
  struct pair *pairs;
  size_t pairs_capacity;
  struct heap_entry *heap;
  size_t n_heap, heap_capacity;
  int32_t (*merges)[2];
  size_t n_merges, merges_capacity;
};

/* Counting words */

enum us_status us_bpe_trainer_create(struct us_bpe_trainer **ret_trainer, struct us_err *err) {
  struct us_bpe_trainer *trainer = calloc(1, sizeof *trainer);
  if (trainer == NULL) return us_err_memory(err, "vocabulary training", sizeof *trainer);
  enum us_status status = us_pattern_create(US_PATTERN_QWEN2, &trainer->pattern, err);
  if (status == US_OK) status = us_pieces_begin(&trainer->pieces, trainer->pattern, err);
  for (int i = 0; i < US_BPE_N_SPECIAL && status == US_OK; i++) {
    struct us_added_token token = {.content = (char *)us_bpe_special[i], .bytes = strlen(us_bpe_special[i])};
    token.id = i;
    token.special = true;
    status = us_added_tokens_add(&trainer->special, &token, err);
  }
  if (status != US_OK) {
    us_bpe_trainer_free(trainer);
    return status;
  }
  us_added_tokens_sort(&trainer->special);
  *ret_trainer = trainer;
  return US_OK;
}

/* Grow an array so that index n fits. */
static enum us_status fit(void **array, size_t *capacity, size_t n, size_t size, struct us_err *err) {
  if (n < *capacity) return US_OK;
  size_t more = *capacity ? *capacity * 2 : 256;
  void *grown = more > n && more <= SIZE_MAX / size ? realloc(*array, more * size) : NULL;
  if (grown == NULL) return us_err_memory(err, "vocabulary training", more * size);
  *array = grown;
  *capacity = more;
  return US_OK;
}

static enum us_status count(struct us_bpe_trainer *trainer, const char *word, size_t bytes, uint64_t times,
                            struct us_err *err) {
  uint32_t index;
  bool added;
  enum us_status status = us_intern_add(&trainer->words, word, bytes, &index, &added, err);
  if (status == US_OK)
    status = fit((void **)&trainer->counts, &trainer->counts_capacity, index, sizeof *trainer->counts, err);
  if (status == US_OK) trainer->counts[index] = added ? times : trainer->counts[index] + times;
  return status;
}

static enum us_status count_plain(struct us_bpe_trainer *trainer, const char *text, size_t n,
                                  struct us_err *err) {
  if (!us_utf8_is_plain(text, n)) {
    us_buffer_clear(&trainer->normal);
    enum us_status status = us_utf8_nfc(text, n, &trainer->normal, err);
    if (status != US_OK) return status;
    text = trainer->normal.data;
    n = trainer->normal.size;
  }
  us_pieces_set(&trainer->pieces, text, n);
  for (;;) {
    const char *piece;
    size_t bytes;
    enum us_status status = us_pieces_next(&trainer->pieces, &piece, &bytes, err);
    if (status != US_OK || piece == NULL) return status;
    if ((status = count(trainer, piece, bytes, 1, err)) != US_OK) return status;
  }
}

enum us_status us_bpe_trainer_add(struct us_bpe_trainer *trainer, const char *text, size_t bytes,
                                  struct us_err *err) {
  struct us_added_cut cut;
  size_t done = 0, at = 0;
  enum us_status status = US_OK;
  if (us_utf8_valid(text, bytes) != bytes) {
    us_buffer_clear(&trainer->repaired);
    if ((status = us_utf8_repair(text, bytes, &trainer->repaired, err)) != US_OK) return status;
    text = trainer->repaired.data;
    bytes = trainer->repaired.size;
  }
  while (status == US_OK && us_added_tokens_next(&trainer->special, text, bytes, &at, false, true, &cut)) {
    status = count_plain(trainer, text + done, cut.begin - done, err);
    done = cut.end;
  }
  return status == US_OK ? count_plain(trainer, text + done, bytes - done, err) : status;
}

enum us_status us_bpe_trainer_join(struct us_bpe_trainer *trainer, const struct us_bpe_trainer *other,
                                   struct us_err *err) {
  enum us_status status = US_OK;
  for (uint32_t i = 0; i < other->words.n && status == US_OK; i++) {
    size_t n;
    const char *word = us_intern_get(&other->words, i, &n);
    status = count(trainer, word, n, other->counts[i], err);
  }
  return status;
}

/* Pairs */

/* Order of merging: most frequent first; ties by the bytes of the left, then of the right symbol. */
static int compare_bytes(const struct us_bpe_trainer *trainer, int32_t a, int32_t b) {
  size_t n, m;
  const char *x = us_intern_get(&trainer->symbols, (uint32_t)a, &n);
  const char *y = us_intern_get(&trainer->symbols, (uint32_t)b, &m);
  int order = memcmp(x, y, n < m ? n : m);
  return order ? order : n < m ? -1 : n > m;
}

static bool before(const struct us_bpe_trainer *trainer, const struct heap_entry *a,
                   const struct heap_entry *b) {
  if (a->count != b->count) return a->count > b->count;
  const struct pair *p = &trainer->pairs[a->pair], *q = &trainer->pairs[b->pair];
  int order = compare_bytes(trainer, p->left, q->left);
  return order ? order < 0 : compare_bytes(trainer, p->right, q->right) < 0;
}

/* The entry of a pair, made if it is new. */
static enum us_status pair_of(struct us_bpe_trainer *trainer, int32_t left, int32_t right, uint32_t *ret_pair,
                              struct us_err *err) {
  int32_t key[2] = {left, right};
  bool added;
  enum us_status status = us_intern_add(&trainer->pair_index, key, sizeof key, ret_pair, &added, err);
  if (status != US_OK || !added) return status;
  status = fit((void **)&trainer->pairs, &trainer->pairs_capacity, *ret_pair, sizeof *trainer->pairs, err);
  if (status == US_OK) trainer->pairs[*ret_pair] = (struct pair){.left = left, .right = right};
  return status;
}

/* Count an occurrence of (left, right) in a word. */
static enum us_status add_pair(struct us_bpe_trainer *trainer, int32_t left, int32_t right, uint32_t word,
                               uint32_t *ret_pair, struct us_err *err) {
  enum us_status status = pair_of(trainer, left, right, ret_pair, err);
  if (status != US_OK) return status;
  struct pair *pair = &trainer->pairs[*ret_pair];
  pair->count += trainer->list[word].count;
  if (pair->n_words > 0 && pair->words[pair->n_words - 1] == word) return US_OK;
  if (pair->n_words == pair->capacity) {
    uint32_t capacity = pair->capacity ? pair->capacity * 2 : 4;
    uint32_t *words = realloc(pair->words, capacity * sizeof *words);
    if (words == NULL) return us_err_memory(err, "vocabulary training", capacity * sizeof *words);
    pair->words = words;
    pair->capacity = capacity;
  }
  pair->words[pair->n_words++] = word;
  return US_OK;
}

/* The heap */

static enum us_status push(struct us_bpe_trainer *trainer, uint32_t pair, struct us_err *err) {
  struct heap_entry entry = {.count = trainer->pairs[pair].count, .pair = pair};
  enum us_status status =
      fit((void **)&trainer->heap, &trainer->heap_capacity, trainer->n_heap, sizeof *trainer->heap, err);
  if (status != US_OK) return status;
  size_t i = trainer->n_heap++;
  for (; i > 0 && before(trainer, &entry, &trainer->heap[(i - 1) / 2]); i = (i - 1) / 2)
    trainer->heap[i] = trainer->heap[(i - 1) / 2];
  trainer->heap[i] = entry;
  return US_OK;
}

static struct heap_entry pop(struct us_bpe_trainer *trainer) {
  struct heap_entry top = trainer->heap[0], last = trainer->heap[--trainer->n_heap];
  size_t i = 0;
  for (size_t child; (child = 2 * i + 1) < trainer->n_heap; i = child) {
    if (child + 1 < trainer->n_heap && before(trainer, &trainer->heap[child + 1], &trainer->heap[child]))
      child++;
    if (!before(trainer, &trainer->heap[child], &last)) break;
    trainer->heap[i] = trainer->heap[child];
  }
  trainer->heap[i] = last;
  return top;
}

/* Merging */

/* Words as lists of symbols, the 256 bytes as the first symbols, every pair counted and in the heap. */
static enum us_status begin_merging(struct us_bpe_trainer *trainer, struct us_err *err) {
  size_t total = 0;
  enum us_status status = US_OK;
  uint32_t index;
  for (uint32_t i = 0; i < trainer->words.n; i++) total += trainer->words.entries[i].bytes;
  if (total > INT32_MAX) return us_err_set(err, US_ERR_INPUT, "more than 2 GiB of distinct words");
  for (int byte = 0; byte < 256 && status == US_OK; byte++) {
    char as_char = (char)byte;
    status = us_intern_add(&trainer->symbols, &as_char, 1, &index, NULL, err);
  }
  trainer->list = calloc((size_t)trainer->words.n + 1, sizeof *trainer->list);
  trainer->text = calloc(total + 1, sizeof *trainer->text);
  if (!trainer->list || !trainer->text) return us_err_memory(err, "vocabulary training", total * 4);
  size_t begin = 0;
  for (uint32_t i = 0; i < trainer->words.n && status == US_OK; i++) {
    size_t n;
    const char *bytes = us_intern_get(&trainer->words, i, &n);
    trainer->list[i] = (struct word){.count = trainer->counts[i], .begin = (uint32_t)begin, .n = (uint32_t)n};
    for (size_t j = 0; j < n; j++) trainer->text[begin + j] = (unsigned char)bytes[j];
    for (size_t j = 0; j + 1 < n && status == US_OK; j++)
      status = add_pair(trainer, (unsigned char)bytes[j], (unsigned char)bytes[j + 1], i, &index, err);
    begin += n;
  }
  for (uint32_t i = 0; i < trainer->pair_index.n && status == US_OK; i++) status = push(trainer, i, err);
  return status;
}

/* Join every occurrence of the pair in a word; counts of the pairs around it follow. Pairs that came into being or grew
 * are pushed by the caller, from `grown`. */
static enum us_status merge_word(struct us_bpe_trainer *trainer, uint32_t index, uint32_t own, int32_t joined,
                                 struct us_ids *grown, struct us_err *err) {
  int32_t left = trainer->pairs[own].left, right = trainer->pairs[own].right;
  struct word *word = &trainer->list[index];
  int32_t *symbols = trainer->text + word->begin;
  uint32_t out = 0, pair;
  enum us_status status = US_OK;
  for (uint32_t in = 0; in < word->n && status == US_OK;) {
    if (in + 1 == word->n || symbols[in] != left || symbols[in + 1] != right) {
      symbols[out++] = symbols[in++];
      continue;
    }
    /* Neighbours: the one before is already in its new form, the one after still in its old. */
    if (out > 0) {
      if ((status = pair_of(trainer, symbols[out - 1], left, &pair, err)) != US_OK) break;
      trainer->pairs[pair].count -= word->count;
      status = add_pair(trainer, symbols[out - 1], joined, index, &pair, err);
      if (status == US_OK) status = us_ids_append(grown, &(int32_t){(int32_t)pair}, 1, err);
    }
    if (status == US_OK && in + 2 < word->n) {
      if ((status = pair_of(trainer, right, symbols[in + 2], &pair, err)) != US_OK) break;
      trainer->pairs[pair].count -= word->count;
      status = add_pair(trainer, joined, symbols[in + 2], index, &pair, err);
      if (status == US_OK) status = us_ids_append(grown, &(int32_t){(int32_t)pair}, 1, err);
    }
    if (status != US_OK) break;
    trainer->pairs[own].count -= word->count;
    symbols[out++] = joined;
    in += 2;
  }
  word->n = out;
  return status;
}

static enum us_status merge_pair(struct us_bpe_trainer *trainer, uint32_t index, struct us_ids *grown,
                                 struct us_err *err) {
  struct pair pair = trainer->pairs[index];
  struct us_buffer bytes = {0};
  uint32_t joined;
  bool added;
  enum us_status status = US_OK;
  for (int half = 0; half < 2 && status == US_OK; half++) {
    size_t n;
    const char *part = us_intern_get(&trainer->symbols, (uint32_t)(half ? pair.right : pair.left), &n);
    status = us_buffer_append(&bytes, part, n, err);
  }
  if (status == US_OK)
    status = us_intern_add(&trainer->symbols, bytes.data, bytes.size, &joined, &added, err);
  us_buffer_release(&bytes);
  if (status != US_OK) return status;
  /* Two merges may give the same bytes ("ab" + "c", "a" + "bc"): both are written, the token is one. */
  status = fit((void **)&trainer->merges, &trainer->merges_capacity, trainer->n_merges,
               sizeof *trainer->merges, err);
  if (status != US_OK) return status;
  trainer->merges[trainer->n_merges][0] = pair.left;
  trainer->merges[trainer->n_merges++][1] = pair.right;
  grown->count = 0;
  /* The pair's own list of words does not change while it is merged: its symbols are older than what comes into being. */
  for (uint32_t i = 0; i < pair.n_words && status == US_OK; i++)
    status = merge_word(trainer, trainer->pairs[index].words[i], index, (int32_t)joined, grown, err);
  for (size_t i = 0; i < grown->count && status == US_OK; i++)
    status = push(trainer, (uint32_t)grown->ids[i], err);
  free(trainer->pairs[index].words);
  trainer->pairs[index].words = NULL;
  trainer->pairs[index].n_words = trainer->pairs[index].capacity = 0;
  return status;
}

static enum us_status merge_all(struct us_bpe_trainer *trainer, int32_t vocab, struct us_err *err) {
  struct us_ids grown = {0};
  enum us_status status = US_OK;
  while (status == US_OK && trainer->symbols.n < (uint32_t)(vocab - US_BPE_N_SPECIAL)) {
    if (trainer->n_heap == 0) {
      status = us_err_set(err, US_ERR_INPUT,
                          "the text gives only %u tokens of the %d asked for: no pair occurs twice",
                          trainer->symbols.n + US_BPE_N_SPECIAL, vocab);
      break;
    }
    struct heap_entry top = pop(trainer);
    uint64_t count = trainer->pairs[top.pair].count;
    if (count < 2) continue;
    status = count == top.count ? merge_pair(trainer, top.pair, &grown, err) : push(trainer, top.pair, err);
  }
  us_ids_release(&grown);
  return status;
}

/* Writing */

static json_t *spelled(const struct us_bpe_trainer *trainer, int32_t symbol, struct us_buffer *scratch) {
  size_t n;
  struct us_err ignored;
  const char *bytes = us_intern_get(&trainer->symbols, (uint32_t)symbol, &n);
  us_buffer_clear(scratch);
  if (us_byte_level_spell(bytes, n, scratch, &ignored) != US_OK) return NULL;
  return json_stringn(scratch->data, scratch->size);
}

static json_t *make_model(const struct us_bpe_trainer *trainer, bool *whole) {
  struct us_buffer scratch = {0};
  json_t *vocab = json_object(), *merges = json_array();
  for (uint32_t i = 0; i < trainer->symbols.n; i++) {
    json_t *name = spelled(trainer, (int32_t)i, &scratch);
    if (name)
      us_json_set(vocab, json_string_value(name), json_integer(i), whole);
    else
      *whole = false;
    json_decref(name);
  }
  for (size_t i = 0; i < trainer->n_merges; i++) {
    json_t *merge = json_array();
    for (int half = 0; half < 2; half++)
      us_json_append(merge, spelled(trainer, trainer->merges[i][half], &scratch), whole);
    us_json_append(merges, merge, whole);
  }
  us_buffer_release(&scratch);
  return json_pack("{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:b, s:o, s:o}", "type", "BPE", "dropout",
                   "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 0,
                   "byte_fallback", 0, "ignore_merges", 0, "vocab", vocab, "merges", merges);
}

static json_t *make_added(int32_t first, bool *whole) {
  json_t *added = json_array();
  for (int i = 0; i < US_BPE_N_SPECIAL; i++)
    us_json_append(added,
                   json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", (int)first + i, "content",
                             us_bpe_special[i], "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0,
                             "special", 1),
                   whole);
  return added;
}

static json_t *make_byte_level(void) {
  return json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 0,
                   "use_regex", 0);
}

enum us_status us_bpe_trainer_finish(struct us_bpe_trainer *trainer, int32_t vocab, struct us_buffer *json,
                                     struct us_err *err) {
  if (vocab < 256 + US_BPE_N_SPECIAL || vocab > MAX_VOCAB)
    return us_err_set(err, US_ERR_USAGE, "a vocabulary has %d to %d tokens, not %d", 256 + US_BPE_N_SPECIAL,
                      MAX_VOCAB, vocab);
  if (trainer->list) return us_err_set(err, US_ERR_USAGE, "this trainer has already finished a vocabulary");
  enum us_status status = begin_merging(trainer, err);
  if (status == US_OK) status = merge_all(trainer, vocab, err);
  if (status != US_OK) return status;
  bool whole = true;
  json_t *split = json_pack("{s:s, s:{s:s}, s:s, s:b}", "type", "Split", "pattern", "Regex", US_PATTERN_QWEN2,
                            "behavior", "Isolated", "invert", 0);
  json_t *pre = json_pack("{s:s, s:[o, o]}", "type", "Sequence", "pretokenizers", split, make_byte_level());
  json_t *root =
      json_pack("{s:s, s:n, s:n, s:o, s:{s:s}, s:o, s:o, s:o, s:o}", "version", "1.0", "truncation",
                "padding", "added_tokens", make_added((int32_t)trainer->symbols.n, &whole), "normalizer",
                "type", "NFC", "pre_tokenizer", pre, "post_processor", make_byte_level(), "decoder",
                make_byte_level(), "model", make_model(trainer, &whole));
  char *text = root && whole ? us_json_dump(root, JSON_COMPACT) : NULL;
  json_decref(root);
  status =
      text ? us_buffer_add(json, text, err) : us_err_memory(err, "tokenizer.json", (unsigned)vocab * 40u);
  free(text);
  return status;
}

void us_bpe_trainer_free(struct us_bpe_trainer *trainer) {
  if (trainer == NULL) return;
  for (uint32_t i = 0; i < trainer->pair_index.n; i++) free(trainer->pairs[i].words);
  us_pieces_end(&trainer->pieces);
  us_pattern_free(trainer->pattern);
  us_added_tokens_release(&trainer->special);
  us_intern_release(&trainer->words);
  us_intern_release(&trainer->symbols);
  us_intern_release(&trainer->pair_index);
  us_buffer_release(&trainer->normal);
  us_buffer_release(&trainer->repaired);
  free(trainer->counts);
  free(trainer->list);
  free(trainer->text);
  free(trainer->pairs);
  free(trainer->heap);
  free(trainer->merges);
  free(trainer);
}
