/* tokenizer.c: text to ids and back. */
#include "formats/tokenizer.h"
#include "base/intern.h"
#include "formats/byte_level.h"
#include "formats/tokenizer_impl.h"
#include "base/utf8.h"
#include <stdlib.h>
#include <string.h>

/* Words already merged by this encoder, one a slot, the newest wins. 32 bytes and 12 ids hold 99 % of the words of code and
 * prose; 8,192 slots are 0.8 MB, which stays in L2. */
#define CACHE_SLOTS 8192
#define CACHE_BYTES 32
#define CACHE_IDS   12
#define CACHE_FROM  512 /* shorter texts do without */

struct cached {
  uint64_t hash;
  uint8_t bytes, n; /* bytes 0: empty */
  char word[CACHE_BYTES];
  int32_t ids[CACHE_IDS];
};

struct us_encoder {
  const struct us_tokenizer *tokenizer;
  struct us_pieces pieces;
  struct us_bpe_scratch scratch;
  struct us_buffer normal, spelled, repaired;
  struct cached *cache;
  struct us_ids *ids;
  struct us_err *err;
};

static enum us_status encode_uncached(struct us_encoder *encoder, const char *word, size_t n) {
  const struct us_tokenizer *tokenizer = encoder->tokenizer;
  if (tokenizer->ignore_merges) {
    us_buffer_clear(&encoder->spelled);
    enum us_status status = us_byte_level_spell(word, n, &encoder->spelled, encoder->err);
    if (status != US_OK) return status;
    int64_t index = us_intern_find(&tokenizer->names, encoder->spelled.data, encoder->spelled.size);
    if (index >= 0) return us_ids_append(encoder->ids, &tokenizer->id_of_name[index], 1, encoder->err);
  }
  return us_bpe_merge(&tokenizer->bpe, word, n, &encoder->scratch, encoder->ids, encoder->err);
}

static enum us_status encode_word(struct us_encoder *encoder, const char *word, size_t n) {
  if (encoder->cache == NULL || n > CACHE_BYTES) return encode_uncached(encoder, word, n);
  uint64_t hash = us_hash_bytes(word, n);
  struct cached *cached = &encoder->cache[hash & (CACHE_SLOTS - 1)];
  if (cached->hash == hash && cached->bytes == n && memcmp(cached->word, word, n) == 0)
    return us_ids_append(encoder->ids, cached->ids, cached->n, encoder->err);
  size_t before = encoder->ids->count;
  enum us_status status = encode_uncached(encoder, word, n);
  size_t count = encoder->ids->count - before;
  if (status != US_OK || count > CACHE_IDS) return status;
  cached->hash = hash;
  cached->bytes = (uint8_t)n;
  cached->n = (uint8_t)count;
  memcpy(cached->word, word, n);
  memcpy(cached->ids, encoder->ids->ids + before, count * sizeof *cached->ids);
  return US_OK;
}

/* Text without added tokens, normalised. */
static enum us_status encode_plain(struct us_encoder *encoder, const char *text, size_t n) {
  const char *piece;
  size_t bytes;
  us_pieces_set(&encoder->pieces, text, n);
  for (;;) {
    enum us_status status = us_pieces_next(&encoder->pieces, &piece, &bytes, encoder->err);
    if (status != US_OK || piece == NULL) return status;
    if ((status = encode_word(encoder, piece, bytes)) != US_OK) return status;
  }
}

/* Cut out the added tokens of one kind and hand the stretches between them on. */
static enum us_status encode_cut(struct us_encoder *encoder, const char *text, size_t n, bool normalized,
                                 bool allow_special,
                                 enum us_status (*between)(struct us_encoder *, const char *, size_t, bool)) {
  struct us_added_cut cut;
  size_t done = 0, at = 0;
  enum us_status status = US_OK;
  while (us_added_tokens_next(&encoder->tokenizer->added, text, n, &at, normalized, allow_special, &cut)) {
    if (cut.begin > done) status = between(encoder, text + done, cut.begin - done, allow_special);
    if (status == US_OK) status = us_ids_append(encoder->ids, &cut.token->id, 1, encoder->err);
    if (status != US_OK) return status;
    done = cut.end;
  }
  return done < n ? between(encoder, text + done, n - done, allow_special) : US_OK;
}

static enum us_status encode_normal(struct us_encoder *encoder, const char *text, size_t n,
                                    bool allow_special) {
  (void)allow_special;
  return encode_plain(encoder, text, n);
}

static enum us_status encode_raw(struct us_encoder *encoder, const char *text, size_t n, bool allow_special) {
  if (encoder->tokenizer->nfc && !us_utf8_is_plain(text, n)) {
    us_buffer_clear(&encoder->normal);
    enum us_status status = us_utf8_nfc(text, n, &encoder->normal, encoder->err);
    if (status != US_OK) return status;
    text = encoder->normal.data;
    n = encoder->normal.size;
  }
  if (!encoder->tokenizer->any_normalized) return encode_plain(encoder, text, n);
  return encode_cut(encoder, text, n, true, allow_special, encode_normal);
}

static void end(struct us_encoder *encoder) {
  us_pieces_end(&encoder->pieces);
  us_bpe_scratch_release(&encoder->scratch);
  us_buffer_release(&encoder->normal);
  us_buffer_release(&encoder->spelled);
  us_buffer_release(&encoder->repaired);
  free(encoder->cache);
}

enum us_status us_encoder_create(const struct us_tokenizer *tokenizer, struct us_encoder **ret_encoder,
                                 struct us_err *err) {
  struct us_encoder *encoder = calloc(1, sizeof *encoder);
  if (encoder == NULL) return us_err_memory(err, "encoder", sizeof *encoder);
  encoder->tokenizer = tokenizer;
  enum us_status status = us_pieces_begin(&encoder->pieces, tokenizer->pattern, err);
  if (status != US_OK) {
    free(encoder);
    return status;
  }
  *ret_encoder = encoder;
  return US_OK;
}

void us_encoder_free(struct us_encoder *encoder) {
  if (encoder == NULL) return;
  end(encoder);
  free(encoder);
}

enum us_status us_encoder_encode(struct us_encoder *encoder, const char *text, size_t bytes,
                                 bool allow_special, struct us_ids *ids, struct us_err *err) {
  encoder->ids = ids;
  encoder->err = err;
  if (us_utf8_valid(text, bytes) != bytes) {
    us_buffer_clear(&encoder->repaired);
    enum us_status status = us_utf8_repair(text, bytes, &encoder->repaired, err);
    if (status != US_OK) return status;
    text = encoder->repaired.data;
    bytes = encoder->repaired.size;
  }
  /* Without memory for it, encoding works without the cache. */
  if (bytes >= CACHE_FROM && encoder->cache == NULL)
    encoder->cache = calloc(CACHE_SLOTS, sizeof *encoder->cache);
  return encode_cut(encoder, text, bytes, false, allow_special, encode_raw);
}

enum us_status us_tokenizer_encode(const struct us_tokenizer *tokenizer, const char *text, size_t bytes,
                                   bool allow_special, struct us_ids *ids, struct us_err *err) {
  struct us_encoder encoder = {.tokenizer = tokenizer};
  enum us_status status = us_pieces_begin(&encoder.pieces, tokenizer->pattern, err);
  if (status != US_OK) return status;
  status = us_encoder_encode(&encoder, text, bytes, allow_special, ids, err);
  end(&encoder);
  return status;
}

enum us_status us_tokenizer_decode(const struct us_tokenizer *tokenizer, const int32_t *ids, size_t n,
                                   bool skip_special, struct us_buffer *out, struct us_err *err) {
  for (size_t i = 0; i < n; i++) {
    size_t bytes;
    const char *text = us_tokenizer_bytes(tokenizer, ids[i], &bytes);
    if (text == NULL) return us_err_set(err, US_ERR_USAGE, "token %zu: no token has id %d", i, ids[i]);
    if (skip_special && tokenizer->tokens[ids[i]].special) continue;
    enum us_status status = us_buffer_append(out, text, bytes, err);
    if (status != US_OK) return status;
  }
  return us_buffer_reserve(out, 0, err);
}

enum us_status us_tokenizer_stream(const struct us_tokenizer *tokenizer, struct us_token_stream *stream,
                                   int32_t id, bool skip_special, struct us_buffer *out, struct us_err *err) {
  size_t begin = out->size;
  enum us_status status = us_buffer_append(out, stream->held, (size_t)stream->n_held, err);
  if (status == US_OK) status = us_tokenizer_decode(tokenizer, &id, 1, skip_special, out, err);
  if (status != US_OK) {
    out->size = begin;
    return status;
  }
  stream->n_held = 0;
  /* Only the last three bytes can belong to a character that goes on. */
  size_t from = out->size - begin > 3 ? out->size - 3 : begin;
  for (size_t at = from; at < out->size; at++) {
    bool cut;
    if (us_utf8_length(out->data + at, out->size - at, &cut) > 0 || !cut) continue;
    stream->n_held = (int)(out->size - at);
    memcpy(stream->held, out->data + at, (size_t)stream->n_held);
    out->size = at;
    out->data[at] = '\0';
    break;
  }
  return US_OK;
}

enum us_status us_tokenizer_stream_end(struct us_token_stream *stream, struct us_buffer *out,
                                       struct us_err *err) {
  enum us_status status = us_buffer_append(out, stream->held, (size_t)stream->n_held, err);
  stream->n_held = 0;
  return status;
}

int32_t us_tokenizer_size(const struct us_tokenizer *tokenizer) {
  return tokenizer->size;
}

int32_t us_tokenizer_id(const struct us_tokenizer *tokenizer, const char *token) {
  size_t n = strlen(token);
  for (size_t i = 0; i < tokenizer->added.n; i++) {
    const struct us_added_token *added = &tokenizer->added.items[i];
    if (added->bytes == n && memcmp(added->content, token, n) == 0) return added->id;
  }
  int64_t index = us_intern_find(&tokenizer->names, token, n);
  return index < 0 ? -1 : tokenizer->id_of_name[index];
}

const char *us_tokenizer_bytes(const struct us_tokenizer *tokenizer, int32_t id, size_t *ret_bytes) {
  if (id < 0 || id >= tokenizer->size || !tokenizer->tokens[id].exists) return NULL;
  *ret_bytes = tokenizer->tokens[id].bytes;
  return tokenizer->bytes.data + tokenizer->tokens[id].begin;
}

bool us_tokenizer_is_special(const struct us_tokenizer *tokenizer, int32_t id) {
  return id >= 0 && id < tokenizer->size && tokenizer->tokens[id].special;
}

int us_tokenizer_stop_ids(const struct us_tokenizer *tokenizer, int32_t ret_ids[3]) {
  static const char *const names[] = {"<|im_end|>", "<|endoftext|>", "<|mimo_audio_eod|>"};
  int n = 0;
  for (int i = 0; i < 3; i++) {
    int32_t id = us_tokenizer_id(tokenizer, names[i]);
    if (id >= 0) ret_ids[n++] = id;
  }
  return n;
}
