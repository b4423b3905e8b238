/* f_tokenizer.c: bytes that begin with '{' as a tokenizer.json, which encodes a fixed text if it opens; other bytes, after the
 * first, as text for a fixed tokenizer: decoding gives the text back, repaired and normalised. */
#include "formats/tokenizer.h"
#include "base/utf8.h"
#include "training/bpe_train.h"
#include "fuzz.h"

static struct us_tokenizer *fixed;
static const char sample[] =
    "It's 12 o'clock: <|im_end|> \n\n caf\xc3\xa9 e\xcc\x81 \xf0\x9f\x98\x80 aaaa  x\xff";

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  struct us_err err = {0};
  struct us_bpe_trainer *trainer;
  struct us_buffer json = {0};
  (void)argc, (void)argv;
  US_FUZZ_REQUIRE(us_bpe_trainer_create(&trainer, &err) == US_OK);
  for (int i = 0; i < 2; i++)
    US_FUZZ_REQUIRE(us_bpe_trainer_add(trainer, sample, strlen(sample), &err) == US_OK);
  US_FUZZ_REQUIRE(us_bpe_trainer_finish(trainer, 280, &json, &err) == US_OK);
  US_FUZZ_REQUIRE(us_tokenizer_parse(json.data, json.size, "fixed", &fixed, &err) == US_OK);
  us_bpe_trainer_free(trainer);
  us_buffer_release(&json);
  return 0;
}

/* Stream and decode agree, and every id is one that decode knows. */
static void decode_both(const struct us_tokenizer *tokenizer, const struct us_ids *ids,
                        struct us_buffer *text) {
  struct us_err err = {0};
  struct us_buffer streamed = {0};
  struct us_token_stream stream = {0};
  US_FUZZ_REQUIRE(us_tokenizer_decode(tokenizer, ids->ids, ids->count, false, text, &err) == US_OK);
  for (size_t i = 0; i < ids->count; i++) {
    US_FUZZ_REQUIRE(us_tokenizer_stream(tokenizer, &stream, ids->ids[i], false, &streamed, &err) == US_OK);
    US_FUZZ_REQUIRE(stream.n_held <= 3);
  }
  US_FUZZ_REQUIRE(us_tokenizer_stream_end(&stream, &streamed, &err) == US_OK);
  US_FUZZ_REQUIRE(streamed.size == text->size);
  US_FUZZ_REQUIRE(text->size == 0 || memcmp(streamed.data, text->data, text->size) == 0);
  us_buffer_release(&streamed);
}

static void fuzz_file(const uint8_t *data, size_t size) {
  struct us_err err = {0};
  struct us_tokenizer *tokenizer = NULL;
  struct us_ids ids = {0};
  struct us_buffer text = {0};
  enum us_status status = us_tokenizer_parse((const char *)data, size, "x", &tokenizer, &err);
  if (status != US_OK) {
    US_FUZZ_REQUIRE(status == US_ERR_INPUT && strncmp(err.message, "x: ", 3) == 0 &&
                    !strchr(err.message, '\n'));
    return;
  }
  /* A pattern of exponential cost is refused when it is met, and that is the only way to fail. */
  status = us_tokenizer_encode(tokenizer, sample, strlen(sample), true, &ids, &err);
  US_FUZZ_REQUIRE(status == US_OK || status == US_ERR_INPUT);
  if (status == US_OK) decode_both(tokenizer, &ids, &text);
  us_tokenizer_free(tokenizer);
  us_ids_release(&ids);
  us_buffer_release(&text);
}

static void fuzz_text(const char *data, size_t size) {
  struct us_err err = {0};
  struct us_ids ids = {0}, special = {0};
  struct us_buffer repaired = {0}, normal = {0}, again = {0}, text = {0};
  US_FUZZ_REQUIRE(us_utf8_repair(data, size, &repaired, &err) == US_OK);
  US_FUZZ_REQUIRE(us_utf8_valid(repaired.data, repaired.size) == repaired.size);
  US_FUZZ_REQUIRE(us_utf8_nfc(repaired.data, repaired.size, &normal, &err) == US_OK);
  US_FUZZ_REQUIRE(us_utf8_valid(normal.data, normal.size) == normal.size);
  US_FUZZ_REQUIRE(us_utf8_nfc(normal.data, normal.size, &again, &err) == US_OK);
  US_FUZZ_REQUIRE(again.size == normal.size && memcmp(again.data, normal.data, normal.size) == 0);
  US_FUZZ_REQUIRE(us_tokenizer_encode(fixed, data, size, false, &ids, &err) == US_OK);
  decode_both(fixed, &ids, &text);
  US_FUZZ_REQUIRE(text.size == normal.size);
  US_FUZZ_REQUIRE(text.size == 0 || memcmp(text.data, normal.data, text.size) == 0);
  US_FUZZ_REQUIRE(us_tokenizer_encode(fixed, data, size, true, &special, &err) == US_OK);
  US_FUZZ_REQUIRE(special.count <= ids.count);
  us_ids_release(&ids);
  us_ids_release(&special);
  us_buffer_release(&repaired);
  us_buffer_release(&normal);
  us_buffer_release(&again);
  us_buffer_release(&text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size > 0 && data[0] == '{')
    fuzz_file(data, size);
  else if (size > 1)
    fuzz_text((const char *)data + 1, size - 1);
  return 0;
}
