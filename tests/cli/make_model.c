/* make_model.c: a random model and a drafter for command-line cases. Usage: make-model MODEL.h5 DRAFT.h5
 *
 * Four layers, full and windowed, dense and MoE, 288 tokens: one a byte, then special ones and padding.
 */
#include "model/checkpoint.h"
#include "model/random.h"
#include "tests/unit/model/small_shape.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 288 };

static struct us_shape shape_of_cases(void) {
  struct us_shape s = small_shape(16);
  snprintf(s.name, sizeof s.name, "cases");
  s.vocab = VOCAB;
  s.qkv_chunks = 0;
  s.max_positions = 1024;
  s.precision.qkv = s.precision.dense = US_FORMAT_BF16;
  return s;
}

static struct us_draft_shape draft_of_cases(void) {
  struct us_draft_shape s = small_draft_shape(32);
  s.layers = 1;
  s.vocab = VOCAB;
  s.mask_id = VOCAB - 1;
  s.value_scale = 1;
  return s;
}

/* Every byte one token, in the spelling of byte-level BPE, and the chat template's special tokens. */
static size_t write_tokenizer(char *json, size_t room) {
  static const char *const special[] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
  size_t at = (size_t)snprintf(json, room, "{\"version\":\"1.0\",\"added_tokens\":[");
  for (int i = 0; i < 3; i++)
    at += (size_t)snprintf(
        json + at, room - at,
        "%s{\"id\":%d,\"content\":\"%s\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,"
        "\"normalized\":false,\"special\":true}",
        i ? "," : "", 256 + i, special[i]);
  at += (size_t)snprintf(
      json + at, room - at,
      "],\"normalizer\":null,\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"
      "\"trim_offsets\":true,\"use_regex\":true},\"post_processor\":null,\"decoder\":{\"type\":"
      "\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,"
      "\"continuing_subword_prefix\":\"\",\"end_of_word_suffix\":\"\",\"fuse_unk\":false,"
      "\"byte_fallback\":false,\"merges\":[],\"vocab\":{");
  for (int b = 0, extra = 256; b < 256; b++) {
    int code = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174 ? b : extra++;
    at += (size_t)snprintf(json + at, room - at, "%s\"\\u%04x\":%d", b ? "," : "", code, b);
  }
  return at + (size_t)snprintf(json + at, room - at, "}}}");
}

int main(int argc, char **argv) {
  struct us_shape shape = shape_of_cases();
  struct us_draft_shape draft_shape = draft_of_cases();
  static char json[65536];
  struct us_model *model = NULL;
  struct us_draft *draft = NULL;
  struct us_err err = {0};
  size_t bytes = write_tokenizer(json, sizeof json);
  if (argc != 3) return 2;
  enum us_status status = us_model_random(&shape, 7, NULL, &model, &err);
  if (status == US_OK) {
    model->tokenizer_json = strdup(json); /* freed with the model */
    model->tokenizer_bytes = bytes;
    status = us_model_write(argv[1], model, NULL, &err);
  }
  if (status == US_OK) status = us_draft_random(&draft_shape, US_FORMAT_BF16, 8, NULL, &draft, &err);
  if (status == US_OK) status = us_draft_write(argv[2], draft, NULL, &err);
  if (status != US_OK) fprintf(stderr, "make-model: %s\n", err.message);
  us_draft_free(draft);
  us_model_free(model);
  return (int)status;
}
