/* make_model.c: a random model and a drafter for command-line cases. Usage: make-model MODEL.h5 DRAFT.h5
 *
 * Four layers, full and windowed, dense and MoE, 288 tokens: one a byte, then special ones and padding.
 */
#include "model/checkpoint.h"
#include "model/random.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 288 };

static const struct us_shape shape = {
    .name = "cases",
    .type = US_MODEL_MIMO_V2,
    .layers = 4,
    .hidden = 64,
    .vocab = VOCAB,
    .full = {.q_heads = 4, .kv_heads = 2, .qk_dim = 24, .v_dim = 16, .rotary_dim = 8, .rope_theta = 1e6},
    .swa = {.q_heads = 8,
            .kv_heads = 4,
            .qk_dim = 24,
            .v_dim = 16,
            .rotary_dim = 8,
            .rope_theta = 1e4,
            .window = 16,
            .sink = true},
    .swa_layer = {0, 1, 1, 0},
    .moe_layer = {0, 1, 1, 1},
    .dense_inner = 96,
    .expert_inner = 32,
    .experts = 12,
    .top_k = 3,
    .norm_topk_prob = true,
    .routed_scaling = 1,
    .norm_eps = 1e-5,
    .value_scale = 0.612,
    .max_positions = 1024,
    .precision = {.embed = US_FORMAT_BF16,
                  .head = US_FORMAT_BF16,
                  .qkv = US_FORMAT_BF16,
                  .o_proj = US_FORMAT_BF16,
                  .dense = US_FORMAT_BF16,
                  .experts = US_FORMAT_MXFP4,
                  .router = US_FORMAT_F32,
                  .draft = US_FORMAT_BF16}};

static const struct us_draft_shape draft_shape = {.layers = 1,
                                                  .hidden = 64,
                                                  .vocab = VOCAB,
                                                  .inner = 96,
                                                  .attention = {.q_heads = 4,
                                                                .kv_heads = 2,
                                                                .qk_dim = 16,
                                                                .v_dim = 16,
                                                                .rotary_dim = 8,
                                                                .rope_theta = 1e4,
                                                                .window = 32,
                                                                .sink = true},
                                                  .norm_eps = 1e-5,
                                                  .value_scale = 1,
                                                  .block = 8,
                                                  .mask_id = VOCAB - 1,
                                                  .taps = 2,
                                                  .tap_layer = {0, 3},
                                                  .target_layers = 4};

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
