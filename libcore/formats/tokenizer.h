/* tokenizer.h: byte-level BPE from a Hugging Face tokenizer.json (the Qwen2 family: MiMo's tokenizer).
 *
 *     struct us_tokenizer *tokenizer;
 *     if (us_tokenizer_open("model/tokenizer.json", &tokenizer, &err) != US_OK) return err.status;
 *     struct us_ids ids = {0};
 *     us_tokenizer_encode(tokenizer, text, strlen(text), true, &ids, &err);
 *     struct us_token_stream stream = {0};                            // text as it is generated
 *     for (size_t i = 0; i < ids.count; i++) us_tokenizer_stream(tokenizer, &stream, ids.ids[i], true, &out, &err);
 *     us_tokenizer_stream_end(&stream, &out, &err);
 *     us_ids_release(&ids); us_tokenizer_free(tokenizer);
 *
 * Order of the steps, as in the `tokenizers` library: added tokens whose content is not normalised are cut
 * out; the rest is normalised (NFC or nothing); added tokens with normalised content are cut out; what is
 * left is split by the file's own pattern (PCRE2, Unicode properties, \s = White_Space); each piece's bytes
 * are merged by rank. No beginning-of-text or other template token is ever added: formats/chat.h writes those
 * as text.
 *
 * Text that is not UTF-8: each maximal invalid subpart becomes one U+FFFD (Unicode 3.9, what Python's
 * bytes.decode("utf-8", errors="replace") does) before anything else. Decoding is exact in bytes: it returns
 * the tokens' bytes, valid UTF-8 or not.
 *
 * Letters and digits are those of PCRE2's Unicode (14 in Debian 12); the library's engine knows later ones too.
 *
 * Supported: model BPE without dropout, unknown token, byte fallback, prefixes or suffixes, all 256 bytes in
 * the vocabulary; merges as "a b" strings or ["a", "b"] pairs; ignore_merges; normalizer null or NFC;
 * pre-tokenizer [Split(Regex, Isolated), ByteLevel] or ByteLevel alone; decoder and post-processor ByteLevel.
 * Anything else is one US_ERR_INPUT line with file and field. An open tokenizer is read-only: threads may
 * share it.
 */
#ifndef US_FORMATS_TOKENIZER_H
#define US_FORMATS_TOKENIZER_H

#include "base/buffer.h"
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct us_tokenizer;

/* Read the file at `path`, at most 256 MiB. US_ERR_IO, US_ERR_INPUT, US_ERR_MEMORY. Free with
 * us_tokenizer_free. */
US_CHECKED enum us_status us_tokenizer_open(const char *path, struct us_tokenizer **ret_tokenizer,
                                            struct us_err *err);

/* The same from JSON text in memory; `name` stands for the file in messages. The text is not kept. */
US_CHECKED enum us_status us_tokenizer_parse(const char *json, size_t bytes, const char *name,
                                             struct us_tokenizer **ret_tokenizer, struct us_err *err);

void us_tokenizer_free(struct us_tokenizer *tokenizer);

/* Append the ids of `text` to ids. With allow_special, special tokens found in the text become their ids;
 * without, they are encoded as plain text (for text that must not be able to end a turn). Added tokens that
 * are not special are matched either way. US_ERR_MEMORY; US_ERR_INPUT if the pattern gives up on the text (a
 * pattern of exponential cost). */
US_CHECKED enum us_status us_tokenizer_encode(const struct us_tokenizer *tokenizer, const char *text,
                                              size_t bytes, bool allow_special, struct us_ids *ids,
                                              struct us_err *err);

/* The same for many texts, one thread at a time: it keeps its buffers, and the words it has met, from text to text, which is twice
 * as fast for texts of a few kilobytes. The tokenizer must outlive it. */
struct us_encoder;
US_CHECKED enum us_status us_encoder_create(const struct us_tokenizer *tokenizer,
                                            struct us_encoder **ret_encoder, struct us_err *err);
void us_encoder_free(struct us_encoder *encoder); /* NULL is allowed */
US_CHECKED enum us_status us_encoder_encode(struct us_encoder *encoder, const char *text, size_t bytes,
                                            bool allow_special, struct us_ids *ids, struct us_err *err);

/* Append the bytes of n ids to out; with skip_special, special tokens give nothing. US_ERR_USAGE for an id
 * that no token has: the message names it and its index. */
US_CHECKED enum us_status us_tokenizer_decode(const struct us_tokenizer *tokenizer, const int32_t *ids,
                                              size_t n, bool skip_special, struct us_buffer *out,
                                              struct us_err *err);

/* Bytes of a character that is not complete yet: at most 3. */
struct us_token_stream {
  uint8_t held[4];
  int n_held;
};

/* As decode of one id, but an incomplete UTF-8 sequence at the end is held back until it is complete or
 * broken, so that every write to a terminal ends at a character. The bytes over all calls equal
 * us_tokenizer_decode's. */
US_CHECKED enum us_status us_tokenizer_stream(const struct us_tokenizer *tokenizer,
                                              struct us_token_stream *stream, int32_t id, bool skip_special,
                                              struct us_buffer *out, struct us_err *err);

/* Append what is held back; the stream is empty afterwards. */
US_CHECKED enum us_status us_tokenizer_stream_end(struct us_token_stream *stream, struct us_buffer *out,
                                                  struct us_err *err);

/* Largest id + 1; a model's vocabulary (often padded) must be at least this. */
int32_t us_tokenizer_size(const struct us_tokenizer *tokenizer);

/* The id of an added token's content or of a vocabulary entry in the file's spelling; -1 if there is none. */
int32_t us_tokenizer_id(const struct us_tokenizer *tokenizer, const char *token);

/* The bytes of an id, owned by the tokenizer, valid until it is freed; NULL if no token has this id. */
const char *us_tokenizer_bytes(const struct us_tokenizer *tokenizer, int32_t id, size_t *ret_bytes);

/* Whether the id is a special token (flag "special" of an added token). */
bool us_tokenizer_is_special(const struct us_tokenizer *tokenizer, int32_t id);

/* Ids a generation ends at: those of <|im_end|>, <|endoftext|> and <|mimo_audio_eod|> that exist. Returns
 * their number. */
int us_tokenizer_stop_ids(const struct us_tokenizer *tokenizer, int32_t ret_ids[3]);

#endif
