/* t_shape.c: config.json of models and drafters: round trips, published figures, and every bad field named.
 *
 * Truth: the published tensor shapes and totals of MiMo-V2.5-Pro, written out as numbers.
 */
#include "model/shape.h"
#include "model/shape_share.h"
#include "same_shape.h"
#include "suite.h"

#include <jansson.h>
#include <string.h>

static const char *const shapes[] = {"mimo-v2.5-pro", "mimo-v2.5", "mimo-v2-flash", "pico",
                                     "nano",          "mini",      "tiny",          "tiny-pro"};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static struct us_shape load(const char *name) {
  struct us_shape shape;
  struct us_err err = {0};
  ck_assert_msg(us_shape_load(name, &shape, &err) == US_OK, "%s", err.message);
  return shape;
}

START_TEST(printing_a_shape_and_parsing_it_gives_it_back) {
  struct us_shape shape = load(shapes[_i]), back;
  struct us_err err = {0};
  char *json = NULL;
  ck_assert_msg(us_shape_print(&shape, &json, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_shape_parse(json, strlen(json), "config.json", &back, &err) == US_OK, "%s", err.message);
  assert_same_shape(&shape, &back);
  free(json);
}
END_TEST

START_TEST(pro_has_the_published_geometry) {
  struct us_shape s = load("mimo-v2.5-pro");
  static const uint32_t full[] = {0, 7, 15, 23, 31, 39, 47, 55, 62, 69};
  ck_assert_str_eq(s.name, "mimo-v2.5-pro");
  ck_assert_uint_eq(s.layers, 70);
  uint32_t found = 0;
  for (uint32_t l = 0; l < s.layers; l++) {
    if (!s.swa_layer[l]) ck_assert_uint_eq(l, full[found++]);
    ck_assert_uint_eq(s.moe_layer[l], l != 0);
  }
  ck_assert_uint_eq(found, 10);
  ck_assert_uint_eq(s.qkv_chunks, 8);
  ck_assert_uint_eq(us_attention_qkv_rows(&s.full), 27136);
  ck_assert_uint_eq(us_attention_qkv_rows(&s.swa) / s.qkv_chunks, 3392);
  ck_assert_uint_eq(s.full.rotary_dim, 64);
  ck_assert(s.full.rope_theta == 1e7 && s.swa.rope_theta == 1e4 && s.value_scale == 0.612);
  ck_assert(s.swa.sink && !s.full.sink && s.swa.window == 128 && s.full.window == 0);
  ck_assert_int_eq(s.precision.experts, US_FORMAT_MXFP4);
  ck_assert_int_eq(s.precision.qkv, US_FORMAT_FP8);
  ck_assert_int_eq(s.precision.dense, US_FORMAT_FP8);
  ck_assert_int_eq(s.precision.o_proj, US_FORMAT_BF16);
  ck_assert_int_eq(s.precision.router, US_FORMAT_F32);
  ck_assert_uint_eq(s.stop_count, 3);
}
END_TEST

START_TEST(a_share_of_pro_is_what_a_rank_holds) {
  struct us_shape whole = load("mimo-v2.5-pro"), s = whole;
  struct us_draft_shape d;
  struct us_err err = {0};
  ck_assert_msg(us_shape_share(&s, 4, &err) == US_OK, "%s", err.message);
  ck_assert_uint_eq(s.full.q_heads, 32);
  ck_assert_uint_eq(s.swa.kv_heads, 2);
  ck_assert_uint_eq(s.qkv_chunks, 2);
  ck_assert_uint_eq(us_attention_qkv_rows(&s.full) * 4, us_attention_qkv_rows(&whole.full));
  ck_assert_uint_eq(s.expert_inner, 512);
  ck_assert_uint_eq(s.dense_inner, 4096);
  ck_assert_uint_eq(s.vocab, 38144);
  ck_assert_uint_eq(s.stop_count, 0); /* all three lie in the last quarter */
  ck_assert_uint_eq(s.hidden, 6144);
  ck_assert_uint_eq(s.experts, 384);
  ck_assert_msg(us_draft_shape_load("mimo-v2.5-pro-dflash", &d, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_draft_shape_share(&d, &s, 4, &err) == US_OK, "%s", err.message);
  ck_assert_uint_eq(d.attention.q_heads, 32);
  ck_assert_uint_eq(d.inner, 4096);
  ck_assert_uint_eq(d.mask_id, 38143);
}
END_TEST

START_TEST(a_share_that_cannot_be_cut_names_the_field_and_changes_nothing) {
  struct us_shape whole = load("mimo-v2.5-pro"), s = whole;
  struct us_draft_shape draft, d;
  struct us_err err = {0};
  ck_assert_int_eq(us_shape_share(&s, 16, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "num_key_value_heads: 8 cannot be cut into 16 equal parts");
  ck_assert_int_eq(us_shape_share(&s, 0, &err), US_ERR_USAGE);
  assert_same_shape(&s, &whole);
  s.expert_inner = 8 * 24; /* cut into 8 it is whole, but no multiple of 32 */
  err = (struct us_err){0};
  ck_assert_int_eq(us_shape_share(&s, 8, &err), US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, "moe_intermediate_size"));
  ck_assert_msg(us_draft_shape_load("mimo-v2.5-pro-dflash", &draft, &err) == US_OK, "%s", err.message);
  d = draft;
  err = (struct us_err){0};
  ck_assert_int_eq(us_draft_shape_share(&d, &whole, 3, &err), US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, "num_key_value_heads"));
  assert_same_draft_shape(&d, &draft);
}
END_TEST

START_TEST(v2_5_has_the_published_chunk_rows) {
  struct us_shape s = load("mimo-v2.5");
  ck_assert_uint_eq(us_attention_qkv_rows(&s.full), 13568);
  ck_assert_uint_eq(us_attention_qkv_rows(&s.swa), 14848);
  ck_assert_uint_eq(s.qkv_chunks, 4);
  ck_assert_uint_eq(load("mimo-v2-flash").qkv_chunks, 0);
}
END_TEST

START_TEST(heads_of_a_fused_projection_lie_in_their_chunk) {
  struct us_shape s = load("mimo-v2.5");
  /* SWA layers of V2.5: chunk = 16 Q heads, 2 K heads, 2 V heads = 3072 + 384 + 256 = 3712 rows. */
  ck_assert_uint_eq(us_attention_q_row(&s.swa, 4, 17), 3712 + 192);
  ck_assert_uint_eq(us_attention_k_row(&s.swa, 4, 3), 3712 + 3072 + 192);
  ck_assert_uint_eq(us_attention_v_row(&s.swa, 4, 7), 3 * 3712 + 3072 + 384 + 128);
}
END_TEST

/* --- bad configs --- */

/* Each case edits the tiny config: value NULL deletes the key. */
static const struct {
  const char *key, *value, *expect;
} bad[] = {
    {"model_type", NULL, "model_type: missing"},
    {"model_type", "\"llama\"", "model_type: 'llama'"},
    {"model_type", "\"a\\nb\"", "model_type: 'a?b'"},
    {"hidden_size", NULL, "hidden_size: missing"},
    {"hidden_size", "null", "hidden_size: is null"},
    {"hidden_size", "\"64\"", "hidden_size: expected an integer"},
    {"hidden_size", "64.5", "hidden_size: expected an integer"},
    {"hidden_size", "48", "hidden_size: 48 is not a multiple of 32"},
    {"hidden_size", "-64", "hidden_size: -64 is outside"},
    {"hidden_size", "9999999999999", "hidden_size: 9999999999999 is outside"},
    {"num_hidden_layers", "0", "num_hidden_layers: 0 is outside"},
    {"num_hidden_layers", "257", "num_hidden_layers: 257 is outside"},
    {"num_hidden_layers", "5", "hybrid_layer_pattern: has 4 entries, expected 5"},
    {"vocab_size", NULL, "vocab_size: missing"},
    {"vocab_size", "1", "vocab_size: 1 is outside"},
    {"hybrid_layer_pattern", NULL, "hybrid_layer_pattern: missing"},
    {"hybrid_layer_pattern", "[0,1,2,0]", "hybrid_layer_pattern: entry 2 is not 0 or 1"},
    {"hybrid_layer_pattern", "1", "hybrid_layer_pattern: expected an array"},
    {"moe_layer_freq", "[0,1,1,true]", "moe_layer_freq: entry 3 is not 0 or 1"},
    {"moe_layer_freq", NULL, "moe_layer_freq: missing"},
    {"num_attention_heads", "7", "num_attention_heads: 7 is not a multiple of num_key_value_heads 2"},
    {"num_key_value_heads", "0", "num_key_value_heads: 0 is outside"},
    {"swa_num_key_value_heads", "3",
     "swa_num_attention_heads: 8 is not a multiple of swa_num_key_value_heads 3"},
    {"head_dim", NULL, "head_dim: missing"},
    {"v_head_dim", "15", "v_head_dim: num_attention_heads * v_head_dim = 120"},
    {"rope_theta", NULL, "rope_theta: missing"},
    {"rope_theta", "0", "rope_theta: 0 is outside"},
    {"rope_theta", "true", "rope_theta: expected a number"},
    {"rope_scaling", "{\"rope_type\": \"yarn\"}", "rope_scaling: is not supported"},
    {"partial_rotary_factor", "1.5", "partial_rotary_factor: 1.5 is outside"},
    {"partial_rotary_factor", "0.05", "partial_rotary_factor: 1 rotary dimensions"},
    {"partial_rotary_factor", "0.3", "partial_rotary_factor: 7 rotary dimensions"},
    {"sliding_window", "8", "sliding_window: differs from sliding_window_size"},
    {"sliding_window", "0", "sliding_window: 0 is outside"},
    {"add_swa_attention_sink_bias", "1", "add_swa_attention_sink_bias: expected true or false"},
    {"attention_bias", "true", "attention_bias: true is not supported"},
    {"attention_value_scale", "\"x\"", "attention_value_scale: expected a number"},
    {"attention_projection_layout", "\"mixed\"", "attention_projection_layout: 'mixed'"},
    {"intermediate_size", NULL, "intermediate_size: missing"},
    {"intermediate_size", "100", "intermediate_size: 100 is not a multiple of 32"},
    {"moe_intermediate_size", "33", "moe_intermediate_size: 33 is not a multiple of 32"},
    {"n_routed_experts", NULL, "n_routed_experts: missing"},
    {"num_experts_per_tok", "17", "num_experts_per_tok: 17 is outside [1, 16]"},
    {"n_shared_experts", "1", "n_shared_experts: 1 is not supported"},
    {"hidden_act", "\"gelu\"", "hidden_act: 'gelu' is not supported"},
    {"scoring_func", "\"softmax\"", "scoring_func: 'softmax' is not supported"},
    {"topk_method", "\"greedy\"", "topk_method: 'greedy' is not supported"},
    {"n_group", "2", "n_group: 2 is not supported"},
    {"topk_group", "2", "topk_group: 2 is not supported"},
    {"norm_topk_prob", "3", "norm_topk_prob: expected true or false"},
    {"routed_scaling_factor", "-1", "routed_scaling_factor: -1 is outside"},
    {"layernorm_epsilon", NULL, "layernorm_epsilon: missing"},
    {"layernorm_epsilon", "2", "layernorm_epsilon: 2 is outside"},
    {"rms_norm_eps", "1e-6", "rms_norm_eps: differs from layernorm_epsilon"},
    {"layer_types", "[\"full_attention\",\"full_attention\",\"sliding_attention\",\"full_attention\"]",
     "layer_types: differs from hybrid_layer_pattern"},
    {"layer_types", "[\"full\",\"full\",\"full\",\"full\"]", "layer_types: entry 0 is not"},
    {"mlp_layer_types", "[\"dense\"]", "mlp_layer_types: has 1 entries, expected 4"},
    {"rope_parameters", "{\"rope_theta\": 5}", "rope_parameters.rope_theta: differs from rope_theta"},
    {"rope_parameters", "{\"rope_type\": \"yarn\"}", "rope_parameters.rope_type: 'yarn' is not supported"},
    {"max_position_embeddings", NULL, "max_position_embeddings: missing"},
    {"eos_token_id", "512", "eos_token_id: 512 is outside [0, 511]"},
    {"eos_token_id", "[0,1,2,3,4,5,6,7,8]", "eos_token_id: has 9 entries"},
    {"eos_token_id", "\"end\"", "eos_token_id: expected an integer or an array"},
    {"tie_word_embeddings", "true", "tie_word_embeddings: true is not supported"},
    {"torch_dtype", "\"float16\"", "torch_dtype: 'float16'"},
    {"quantization_config", "[]", "quantization_config: expected an object"},
    {"quantization_config", "{\"quant_method\":\"awq\"}", "quantization_config.quant_method: 'awq'"},
    {"quantization_config", "{\"weight_block_size\":[1,32]}", "quantization_config.weight_block_size: only"},
    {"quantization_config", "{\"store_dtype\":\"int4\"}", "quantization_config.store_dtype: 'int4'"},
    {"quantization_config", "{\"ignored_layers\":[1]}", "quantization_config.ignored_layers: entry 0"},
    {"ultraspeed_precision", "{\"head\":\"fp3\"}", "ultraspeed_precision.head: 'fp3' is not a format"},
};

static char *edited(const char *shape_name, const char *key, const char *value) {
  struct us_shape shape = load(shape_name);
  char *json = NULL;
  ck_assert_int_eq(us_shape_print(&shape, &json, NULL), US_OK);
  json_t *root = json_loads(json, 0, NULL);
  free(json);
  /* The second set of keys, which would stand in for a published one that a case takes away. */
  static const char *const second[] = {"layer_types", "mlp_layer_types", "rope_parameters", "rms_norm_eps"};
  for (size_t i = 0; i < sizeof second / sizeof *second; i++) json_object_del(root, second[i]);
  if (value)
    json_object_set_new(root, key, json_loads(value, JSON_DECODE_ANY, NULL));
  else
    json_object_del(root, key);
  json = json_dumps(root, 0);
  json_decref(root);
  return json;
}

static void expect_message(enum us_status status, const struct us_err *err, const char *text) {
  ck_assert_int_eq(status, US_ERR_INPUT);
  ck_assert_msg(strstr(err->message, text) != NULL, "'%s' does not say '%s'", err->message, text);
  ck_assert_msg(strncmp(err->message, "config.json: ", 13) == 0, "'%s' does not name the file", err->message);
  ck_assert(strchr(err->message, '\n') == NULL);
}

START_TEST(a_bad_field_is_named) {
  char *json = edited("tiny", bad[_i].key, bad[_i].value);
  struct us_shape shape;
  struct us_err err = {0};
  enum us_status status = us_shape_parse(json, strlen(json), "config.json", &shape, &err);
  expect_message(status, &err, bad[_i].expect);
  free(json);
}
END_TEST

START_TEST(mimo_v2_does_not_guess_what_flash_may) {
  char *json = edited("tiny-pro", "swa_num_key_value_heads", NULL);
  struct us_shape shape;
  struct us_err err = {0};
  enum us_status status = us_shape_parse(json, strlen(json), "config.json", &shape, &err);
  expect_message(status, &err, "swa_num_key_value_heads: missing");
  free(json);
  json = edited("tiny", "swa_num_key_value_heads", NULL);
  ck_assert_int_eq(us_shape_parse(json, strlen(json), "config.json", &shape, &err), US_OK);
  ck_assert_uint_eq(shape.swa.kv_heads, 2 * shape.full.kv_heads);
  free(json);
}
END_TEST

START_TEST(chunks_must_divide_the_swa_heads) {
  char *json = edited("tiny-pro", "swa_num_key_value_heads", "2");
  struct us_shape shape;
  struct us_err err = {0};
  enum us_status status = us_shape_parse(json, strlen(json), "config.json", &shape, &err);
  expect_message(status, &err, "swa_num_key_value_heads: 2 heads cannot be cut into 4 qkv chunks");
  free(json);
}
END_TEST

START_TEST(text_that_is_not_an_object_is_refused) {
  static const char *const texts[] = {"", "{", "[]", "{} {}", "{\"a\":1,\"a\":2}", "nul", "\xff\xfe"};
  struct us_shape shape;
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
    struct us_err err = {0};
    enum us_status status = us_shape_parse(texts[i], strlen(texts[i]), "config.json", &shape, &err);
    expect_message(status, &err, "config.json: ");
  }
}
END_TEST

START_TEST(unknown_keys_are_ignored) {
  char *json = edited("tiny", "attention_chunk_size", "128");
  struct us_shape shape, plain = load("tiny");
  ck_assert_int_eq(us_shape_parse(json, strlen(json), "config.json", &shape, NULL), US_OK);
  assert_same_shape(&shape, &plain);
  free(json);
}
END_TEST

START_TEST(the_form_that_transformers_saves_is_read) {
  static const char json[] =
      "{\"model_type\":\"mimo_v2_flash\",\"vocab_size\":512,\"hidden_size\":64,\"num_hidden_layers\":3,"
      "\"num_attention_heads\":8,\"num_key_value_heads\":2,\"head_dim\":24,\"v_head_dim\":16,\"sliding_"
      "window\":16,"
      "\"intermediate_size\":192,\"moe_intermediate_size\":32,\"n_routed_experts\":16,\"num_experts_per_"
      "tok\":4,"
      "\"layer_types\":[\"full_attention\",\"sliding_attention\",\"sliding_attention\"],"
      "\"mlp_layer_types\":[\"dense\",\"sparse\",\"sparse\"],\"rms_norm_eps\":1e-05,\"dtype\":\"float32\","
      "\"max_position_embeddings\":1024,\"routed_scaling_factor\":1.0,\"rope_parameters\":{"
      "\"full_attention\":{\"rope_type\":\"default\",\"rope_theta\":5000000.0,\"partial_rotary_factor\":0."
      "334},"
      "\"sliding_attention\":{\"rope_type\":\"default\",\"rope_theta\":10000.0,\"partial_rotary_factor\":0.5}"
      "}}";
  struct us_shape s;
  struct us_err err = {0};
  ck_assert_msg(us_shape_parse(json, strlen(json), "x/config.json", &s, &err) == US_OK, "%s", err.message);
  ck_assert_str_eq(s.name, "x");
  ck_assert(s.full.rope_theta == 5e6 && s.swa.rope_theta == 1e4);
  ck_assert_uint_eq(s.full.rotary_dim, 8);
  ck_assert_uint_eq(s.swa.rotary_dim, 12);
  ck_assert(s.swa.sink && s.swa.kv_heads == 4 && s.swa.window == 16 && s.qkv_chunks == 0);
  ck_assert(s.value_scale == 0.707 && s.precision.qkv == US_FORMAT_F32);
  ck_assert(s.swa_layer[0] == 0 && s.swa_layer[1] == 1 && s.moe_layer[0] == 0 && s.moe_layer[2] == 1);
}
END_TEST

START_TEST(a_precision_that_published_keys_cannot_say_survives) {
  struct us_shape shape = load("tiny"), back;
  shape.precision.head = US_FORMAT_FP8;
  shape.precision.experts = US_FORMAT_MXFP4;
  shape.precision.router = US_FORMAT_BF16;
  char *json = NULL;
  struct us_err err = {0};
  ck_assert_msg(us_shape_print(&shape, &json, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_shape_parse(json, strlen(json), "c", &back, &err) == US_OK, "%s", err.message);
  assert_same_shape(&shape, &back);
  free(json);
}
END_TEST

START_TEST(a_name_is_kept_printable) {
  char *json = edited("tiny", "name", "\"a\\n\xc3\xa4\"");
  struct us_shape shape;
  ck_assert_int_eq(us_shape_parse(json, strlen(json), "config.json", &shape, NULL), US_OK);
  ck_assert_str_eq(shape.name, "a___");
  free(json);
}
END_TEST

START_TEST(an_unknown_name_says_where_it_looked) {
  struct us_shape shape;
  struct us_err err = {0};
  ck_assert_int_eq(us_shape_load("no-such-shape", &shape, &err), US_ERR_USAGE);
  ck_assert(strstr(err.message, "no shape 'no-such-shape'") != NULL);
  ck_assert_int_eq(us_shape_load("./no/such/file.json", &shape, &err), US_ERR_IO);
}
END_TEST

/* --- drafters --- */

/* The published dflash/config.json of MiMo-V2.5-Pro-FP4-DFlash, its facts as research sheets give them. */
static const char pro_draft[] =
    "{\"architectures\":[\"DFlashDraftModel\"],\"model_type\":\"qwen3\",\"hidden_size\":6144,\"intermediate_"
    "size\":16384,"
    "\"num_hidden_layers\":5,\"num_attention_heads\":128,\"num_key_value_heads\":8,\"head_dim\":128,\"v_head_"
    "dim\":128,"
    "\"partial_rotary_factor\":0.5,\"block_size\":8,\"num_target_layers\":70,\"vocab_size\":152064,"
    "\"max_position_embeddings\":262144,\"rope_theta\":10000,\"sliding_window\":1024,\"rms_norm_eps\":1e-05,"
    "\"attention_bias\":false,\"tie_word_embeddings\":false,\"dflash_config\":{\"target_layer_ids\":[0,15,31,"
    "47,69],"
    "\"mask_token_id\":151669,\"num_anchors\":4096,\"block_size\":8,\"loss_decay_gamma\":7.0,\"use_swa\":"
    "true,"
    "\"swa_window_size\":1024,\"backbone_rotary_base\":5000000,\"attention_value_scale\":0.612,"
    "\"attention_sink_bias\":true}}";

static struct us_draft_shape parse_draft(void) {
  struct us_draft_shape d;
  struct us_err err = {0};
  ck_assert_msg(us_draft_shape_parse(pro_draft, strlen(pro_draft), "config.json", &d, &err) == US_OK, "%s",
                err.message);
  return d;
}

START_TEST(the_published_drafter_parses_and_fits_its_model) {
  struct us_draft_shape d = parse_draft();
  struct us_shape pro = load("mimo-v2.5-pro");
  struct us_err err = {0};
  ck_assert_uint_eq(d.taps, 5);
  ck_assert_uint_eq(d.tap_layer[4], 69);
  ck_assert_uint_eq(d.attention.rotary_dim, 64);
  ck_assert_uint_eq(d.mask_id, 151669);
  ck_assert(d.attention.rope_theta == 1e4 && d.attention.sink && d.value_scale == 0.612);
  ck_assert_msg(us_draft_shape_check(&d, &pro, &err) == US_OK, "%s", err.message);
}
END_TEST

START_TEST(a_drafter_survives_printing) {
  struct us_draft_shape d = parse_draft(), back;
  char *json = NULL;
  struct us_err err = {0};
  ck_assert_msg(us_draft_shape_print(&d, &json, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_draft_shape_parse(json, strlen(json), "c", &back, &err) == US_OK, "%s", err.message);
  assert_same_draft_shape(&d, &back);
  ck_assert(strstr(json, "markov") == NULL && strstr(json, "own_head") == NULL);
  free(json);
  d.markov = 64, d.head = US_FORMAT_MXFP4;
  ck_assert_msg(us_draft_shape_print(&d, &json, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_draft_shape_parse(json, strlen(json), "c", &back, &err) == US_OK, "%s", err.message);
  assert_same_draft_shape(&d, &back);
  free(json);
  d.markov = 48;
  ck_assert_int_eq(us_draft_shape_check(&d, NULL, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "markov_rank") != NULL, "%s", err.message);
}
END_TEST

START_TEST(a_drafter_of_another_model_says_what_differs) {
  struct us_draft_shape d = parse_draft();
  struct us_shape flash = load("mimo-v2.5"), pro = load("mimo-v2.5-pro");
  struct us_err err = {0};
  ck_assert_int_eq(us_draft_shape_check(&d, &flash, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "drafter hidden_size: 6144, but the model's is 4096");
  pro.layers = 69;
  ck_assert_int_eq(us_draft_shape_check(&d, &pro, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "drafter num_target_layers: 70, but the model has 69 layers");
  pro.layers = 70, pro.vocab = 151669;
  ck_assert_int_eq(us_draft_shape_check(&d, &pro, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "drafter mask_token_id: 151669 is not in the model's vocabulary of 151669");
}
END_TEST

START_TEST(a_head_of_the_drafters_own_has_the_models_vocabulary) {
  struct us_draft_shape d = parse_draft();
  struct us_shape pro = load("mimo-v2.5-pro");
  struct us_err err = {0};
  d.head = US_FORMAT_FP8;
  ck_assert_int_eq(us_draft_shape_check(&d, &pro, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "drafter vocab_size: 152064, but the model's is 152576, and the drafter has "
                                "an output head of its own");
  d.vocab = pro.vocab;
  ck_assert_int_eq(us_draft_shape_check(&d, &pro, &err), US_OK);
}
END_TEST

static const struct {
  const char *where, *with, *expect;
} bad_draft[] = {
    {"\"dflash_config\"", "\"other_config\"", "dflash_config: missing"},
    {"\"mask_token_id\":151669,", "", "dflash_config.mask_token_id: missing"},
    {"\"target_layer_ids\":[0,15,31,47,69],", "", "dflash_config.target_layer_ids: missing"},
    {"[0,15,31,47,69]", "[]", "dflash_config.target_layer_ids: 0 is outside"},
    {"[0,15,31,47,69]", "[0,15,31,47,70]", "dflash_config.target_layer_ids: layer 70 of 70"},
    {"[0,15,31,47,69]", "[15,0]", "dflash_config.target_layer_ids: not ascending"},
    {"\"block_size\":8,\"num", "\"block_size\":17,\"num", "block_size: 17 is outside [2, 16]"},
    {"\"block_size\":8,\"loss", "\"block_size\":4,\"loss", "dflash_config.block_size: differs"},
    {"\"use_swa\":true", "\"use_swa\":false", "dflash_config.use_swa: false is not supported"},
    {"\"swa_window_size\":1024", "\"swa_window_size\":512", "dflash_config.swa_window_size: differs"},
    {"\"attention_sink_bias\":true", "\"attention_sink_bias\":7",
     "dflash_config.attention_sink_bias: expected true"},
    {"\"rope_theta\":10000,", "", "rope_theta: missing"},
    {"\"rms_norm_eps\":1e-05", "\"rms_norm_eps\":\"x\"", "rms_norm_eps: expected a number"},
    {"\"num_target_layers\":70", "\"num_target_layers\":0", "num_target_layers: 0 is outside"},
    {"\"attention_bias\":false", "\"is_causal\":true", "is_causal: true is not supported"},
    {"\"use_swa\":true", "\"own_head\":\"fp3\"", "dflash_config.own_head: 'fp3' is not a format"},
    {"\"use_swa\":true", "\"own_head\":true", "dflash_config.own_head: expected a string"},
};

START_TEST(a_bad_drafter_field_is_named) {
  char json[2048];
  const char *at = strstr(pro_draft, bad_draft[_i].where);
  ck_assert_ptr_nonnull(at);
  snprintf(json, sizeof json, "%.*s%s%s", (int)(at - pro_draft), pro_draft, bad_draft[_i].with,
           at + strlen(bad_draft[_i].where));
  struct us_draft_shape d;
  struct us_err err = {0};
  enum us_status status = us_draft_shape_parse(json, strlen(json), "config.json", &d, &err);
  expect_message(status, &err, bad_draft[_i].expect);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("shape");
  tcase_add_loop_test(c, printing_a_shape_and_parsing_it_gives_it_back, 0, SHAPES);
  tcase_add_test(c, pro_has_the_published_geometry);
  tcase_add_test(c, a_share_of_pro_is_what_a_rank_holds);
  tcase_add_test(c, a_share_that_cannot_be_cut_names_the_field_and_changes_nothing);
  tcase_add_test(c, v2_5_has_the_published_chunk_rows);
  tcase_add_test(c, heads_of_a_fused_projection_lie_in_their_chunk);
  tcase_add_loop_test(c, a_bad_field_is_named, 0, sizeof bad / sizeof *bad);
  tcase_add_test(c, mimo_v2_does_not_guess_what_flash_may);
  tcase_add_test(c, chunks_must_divide_the_swa_heads);
  tcase_add_test(c, text_that_is_not_an_object_is_refused);
  tcase_add_test(c, unknown_keys_are_ignored);
  tcase_add_test(c, the_form_that_transformers_saves_is_read);
  tcase_add_test(c, a_precision_that_published_keys_cannot_say_survives);
  tcase_add_test(c, a_name_is_kept_printable);
  tcase_add_test(c, an_unknown_name_says_where_it_looked);
  tcase_add_test(c, the_published_drafter_parses_and_fits_its_model);
  tcase_add_test(c, a_drafter_survives_printing);
  tcase_add_test(c, a_drafter_of_another_model_says_what_differs);
  tcase_add_test(c, a_head_of_the_drafters_own_has_the_models_vocabulary);
  tcase_add_loop_test(c, a_bad_drafter_field_is_named, 0, sizeof bad_draft / sizeof *bad_draft);
  return us_suite("shape", c);
}
US_TEST_MAIN(make_suite)
