/* t_checkpoint.c: models and drafters written, read back and compared in every layout; bad files, named.
 *
 * Truth: the published tensor names, dtypes and shapes, written out; files damaged tensor by tensor.
 */
#include "base/buffer.h"
#include "base/h5.h"
#include "formats/mask_embedding.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"
#include "model/random.h"
#include "same_shape.h"
#include "scratch_folder.h"
#include "suite.h"

#include <math.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char path[128], other[192];

static const char *in(const char *name, char *text) {
  snprintf(text, sizeof path, "%s/%s", scratch_folder, name);
  return text;
}

#define ck_assert_ok(call)                                                                                   \
  do {                                                                                                       \
    struct us_err err = {0};                                                                                 \
    enum us_status status_ = (call);                                                                         \
    ck_assert_msg(status_ == US_OK, "%s", err.message);                                                      \
  } while (0)

/* --- models to try --- */

#define BF16  US_FORMAT_BF16
#define F32   US_FORMAT_F32
#define FP8   US_FORMAT_FP8
#define MXFP4 US_FORMAT_MXFP4

/* embed, head, qkv, o_proj, dense, experts, router, draft */
static const struct us_precision precisions[] = {
    {BF16, BF16, BF16, BF16, BF16, BF16, F32, BF16}, /* an original */
    {F32, F32, F32, F32, F32, F32, F32, BF16},
    {BF16, BF16, FP8, BF16, FP8, FP8, F32, BF16},    /* as FP8 Pro */
    {BF16, BF16, FP8, BF16, FP8, MXFP4, F32, BF16},  /* as FP4 Pro */
    {BF16, BF16, FP8, FP8, FP8, MXFP4, BF16, BF16},  /* BF16 router, FP8 o_proj */
    {BF16, FP8, BF16, BF16, BF16, MXFP4, F32, BF16}, /* what no published key says */
    {MXFP4, MXFP4, MXFP4, MXFP4, MXFP4, MXFP4, F32, BF16},
};
enum { PRECISIONS = sizeof precisions / sizeof *precisions };

static struct us_model *make(const char *shape_name, int precision) {
  struct us_shape shape;
  struct us_model *model = NULL;
  ck_assert_ok(us_shape_load(shape_name, &shape, &err));
  shape.precision = precisions[precision];
  ck_assert_ok(us_model_random(&shape, us_test_seed(), NULL, &model, &err));
  return model;
}

static struct us_draft *make_draft(enum us_format format) {
  struct us_draft_shape shape = {.layers = 2,
                                 .hidden = 64,
                                 .vocab = 512,
                                 .inner = 96,
                                 .norm_eps = 1e-5,
                                 .value_scale = 0.612,
                                 .block = 8,
                                 .mask_id = 511,
                                 .taps = 3,
                                 .tap_layer = {0, 1, 3},
                                 .target_layers = 4,
                                 .attention = {.q_heads = 4,
                                               .kv_heads = 2,
                                               .qk_dim = 16,
                                               .v_dim = 16,
                                               .rotary_dim = 8,
                                               .rope_theta = 10000,
                                               .window = 32,
                                               .sink = true}};
  struct us_draft *draft = NULL;
  ck_assert_ok(us_draft_random(&shape, format, us_test_seed(), NULL, &draft, &err));
  return draft;
}

/* --- comparing --- */

static void compare_refs(const struct us_tensor_ref *a, const struct us_tensor_ref *b, size_t count) {
  for (size_t i = 0; i < count; i++) {
    ck_assert_str_eq(a[i].name, b[i].name);
    if (!a[i].matrix) {
      ck_assert_msg(memcmp(*a[i].vector, *b[i].vector, a[i].rows * sizeof(float)) == 0, "%s", a[i].name);
      continue;
    }
    const struct us_matrix *x = a[i].matrix, *y = b[i].matrix;
    ck_assert_int_eq(x->format, y->format);
    ck_assert_uint_eq(x->rows, y->rows);
    ck_assert_uint_eq(x->cols, y->cols);
    ck_assert_uint_eq(x->scale_chunk_rows, y->scale_chunk_rows);
    size_t data = us_matrix_data_bytes(x->format, x->rows, x->cols);
    size_t scales = us_matrix_scale_bytes(x->format, x->rows, x->cols, x->scale_chunk_rows);
    ck_assert_msg(memcmp(x->data, y->data, data) == 0, "%s differs", a[i].name);
    if (scales) ck_assert_msg(memcmp(x->scales, y->scales, scales) == 0, "scales of %s differ", a[i].name);
  }
}

static void compare(struct us_model *a, struct us_model *b) {
  struct us_tensor_ref *x = NULL, *y = NULL;
  size_t n = 0, m = 0;
  assert_same_shape(&a->shape, &b->shape);
  ck_assert_str_eq(a->scale_rule, b->scale_rule);
  ck_assert_ok(us_model_tensors(a, &x, &n, &err));
  ck_assert_ok(us_model_tensors(b, &y, &m, &err));
  ck_assert_uint_eq(n, m);
  compare_refs(x, y, n);
  free(x);
  free(y);
}

static void compare_drafts(struct us_draft *a, struct us_draft *b) {
  struct us_tensor_ref *x = NULL, *y = NULL;
  size_t n = 0, m = 0;
  assert_same_draft_shape(&a->shape, &b->shape);
  ck_assert_ok(us_draft_tensors(a, &x, &n, &err));
  ck_assert_ok(us_draft_tensors(b, &y, &m, &err));
  ck_assert_uint_eq(n, m);
  compare_refs(x, y, n);
  free(x);
  free(y);
}

static void round_trip(struct us_model *model, const char *name, uint64_t shard_bytes) {
  struct us_model *back = NULL;
  if (shard_bytes)
    ck_assert_ok(us_model_write_folder(name, model, NULL, shard_bytes, &err));
  else
    ck_assert_ok(us_model_write(name, model, NULL, &err));
  ck_assert_ok(us_model_open(name, &back, &err));
  ck_assert_str_eq(back->path, name);
  compare(model, back);
  ck_assert_ok(us_model_check(back, &err));
  us_model_free(back);
}

/* --- round trips --- */

START_TEST(every_layout_comes_back_bit_for_bit) {
  struct us_model *model = make(_i < PRECISIONS ? "tiny" : "tiny-pro", _i % PRECISIONS);
  round_trip(model, in("folder", path), 0);
  round_trip(model, in("shards", path), 20000);
  round_trip(model, in("model.h5", path), 0);
  us_model_free(model);
}
END_TEST

START_TEST(a_folder_becomes_hdf5_and_a_folder_again) {
  struct us_model *model = make("tiny-pro", 3), *second = NULL, *third = NULL;
  ck_assert_ok(us_model_write(in("a", path), model, NULL, &err));
  ck_assert_ok(us_model_open(path, &second, &err));
  ck_assert_ok(us_model_write(in("b.h5", path), second, NULL, &err));
  ck_assert_ok(us_model_open(path, &third, &err));
  compare(model, third);
  ck_assert_ok(us_model_write(in("c", path), third, NULL, &err));
  us_model_free(third);
  ck_assert_ok(us_model_open(path, &third, &err));
  compare(model, third);
  us_model_free(third);
  us_model_free(second);
  us_model_free(model);
}
END_TEST

START_TEST(tokenizer_and_provenance_travel_along) {
  for (int i = 0; i < 2; i++) {
    struct us_model *model = make("tiny", 0), *back = NULL;
    model->tokenizer_json = strdup("{\"model\": {\"type\": \"BPE\"}, \"text\": \"\xc3\xa4\"}");
    model->tokenizer_bytes = strlen(model->tokenizer_json);
    in(i ? "with.h5" : "with", path);
    ck_assert_ok(us_model_write(path, model, "{\"tool\": \"test\"}", &err));
    ck_assert_ok(us_model_open(path, &back, &err));
    ck_assert_str_eq(back->tokenizer_json, model->tokenizer_json);
    ck_assert_uint_eq(back->tokenizer_bytes, model->tokenizer_bytes);
    ck_assert_str_eq(back->provenance_json, "{\"tool\": \"test\"}");
    us_model_free(back);
    us_model_free(model);
  }
}
END_TEST

START_TEST(a_drafter_comes_back_bit_for_bit) {
  struct us_draft *draft = make_draft(_i ? FP8 : BF16), *back = NULL;
  ck_assert_ok(us_draft_write(in("draft.h5", path), draft, "{}", &err));
  ck_assert_ok(us_draft_open(path, &back, &err));
  compare_drafts(draft, back);
  ck_assert_str_eq(back->provenance_json, "{}");
  us_draft_free(back);
  ck_assert_ok(us_draft_write(in("draft", path), draft, NULL, &err));
  ck_assert_ok(us_draft_open(path, &back, &err));
  compare_drafts(draft, back);
  ck_assert_ok(us_draft_check(back, &err));
  us_draft_free(back);
  us_draft_free(draft);
}
END_TEST

START_TEST(a_drafter_is_found_in_its_models_folder) {
  struct us_draft *draft = make_draft(BF16), *back = NULL;
  struct us_model *model = make("tiny", 0);
  ck_assert_ok(us_model_write(in("both", path), model, NULL, &err));
  ck_assert_ok(us_draft_write(in("both/dflash", other), draft, NULL, &err));
  ck_assert_ok(us_draft_open(path, &back, &err));
  compare_drafts(draft, back);
  ck_assert_ok(us_draft_check_target(back, model, &err));
  us_draft_free(back);
  us_draft_free(draft);
  us_model_free(model);
}
END_TEST

/* --- the published layout --- */

static void expect_tensor(const struct us_safetensors *st, const char *name, enum us_dtype dtype,
                          uint32_t ndim, uint64_t a, uint64_t b) {
  const struct us_safetensor *t = us_safetensors_find(st, name);
  ck_assert_msg(t != NULL, "%s is missing", name);
  ck_assert_ok(us_safetensor_expect(t, dtype, ndim, (uint64_t[]){a, b}, &err));
}

START_TEST(a_folder_has_the_published_names_and_types) {
  struct us_model *model = make("tiny-pro", 3);
  struct us_safetensors *st = NULL;
  ck_assert_ok(us_model_write(in("pro", path), model, NULL, &err));
  ck_assert_ok(us_safetensors_open(path, &st, &err));
  /* 8 query and 4 KV heads of 24, values of 16: chunks of 48 + 24 + 16 = 88 rows, one scale row each: 4, not 3. */
  expect_tensor(st, "model.layers.1.self_attn.qkv_proj.weight", US_DTYPE_F8_E4M3, 2, 352, 64);
  expect_tensor(st, "model.layers.1.self_attn.qkv_proj.weight_scale_inv", US_DTYPE_F32, 2, 4, 1);
  expect_tensor(st, "model.layers.1.self_attn.o_proj.weight", US_DTYPE_BF16, 2, 64, 128);
  expect_tensor(st, "model.layers.0.mlp.down_proj.weight", US_DTYPE_F8_E4M3, 2, 64, 192);
  expect_tensor(st, "model.layers.0.mlp.down_proj.weight_scale_inv", US_DTYPE_F32, 2, 1, 2);
  expect_tensor(st, "model.layers.1.mlp.gate.weight", US_DTYPE_F32, 2, 16, 64);
  expect_tensor(st, "model.layers.1.mlp.gate.e_score_correction_bias", US_DTYPE_F32, 1, 16, 0);
  expect_tensor(st, "model.layers.1.mlp.experts.15.gate_proj.weight", US_DTYPE_U8, 2, 32, 32);
  expect_tensor(st, "model.layers.1.mlp.experts.15.gate_proj.weight_scale", US_DTYPE_U8, 2, 32, 2);
  expect_tensor(st, "model.layers.1.mlp.experts.15.down_proj.weight_scale", US_DTYPE_U8, 2, 64, 1);
  expect_tensor(st, "model.embed_tokens.weight", US_DTYPE_BF16, 2, 512, 64);
  expect_tensor(st, "lm_head.weight", US_DTYPE_BF16, 2, 512, 64);
  ck_assert_ptr_nonnull(us_safetensors_find(st, "model.layers.1.self_attn.attention_sink_bias"));
  ck_assert_ptr_null(us_safetensors_find(st, "model.layers.0.self_attn.attention_sink_bias"));
  us_safetensors_close(st);
  us_model_free(model);
}
END_TEST

START_TEST(vectors_that_are_bf16_go_out_as_bf16) {
  struct us_model *model = make("tiny", 0);
  struct us_safetensors *st = NULL;
  us_bf16_round_all(model->final_norm, 64, model->final_norm);
  model->layers[0].input_norm[5] = 1.0f + 0x1p-20f; /* not a bf16 */
  ck_assert_ok(us_model_write(in("v", path), model, NULL, &err));
  ck_assert_ok(us_safetensors_open(path, &st, &err));
  expect_tensor(st, "model.norm.weight", US_DTYPE_BF16, 1, 64, 0);
  expect_tensor(st, "model.layers.0.input_layernorm.weight", US_DTYPE_F32, 1, 64, 0);
  us_safetensors_close(st);
  us_model_free(model);
}
END_TEST

/* --- damage --- */

/* One change to a folder's tensors. */
struct damage {
  const char *name;      /* of the tensor */
  const char *rename;    /* "" drops it */
  int dtype;             /* new dtype + 1, 0: as it is */
  uint64_t dims[2];      /* new shape, 0: as it is */
  const void *data;      /* new bytes */
  size_t at, poke_bytes; /* or these bytes at this offset */
  const void *poke;
  const char *add; /* another tensor, BF16 [2], of this name */
};

static bool is_target(const struct damage *d, const struct us_safetensor *t) {
  return d->name && strcmp(d->name, t->name) == 0;
}

static void copy_damaged(const char *from, const char *to, const struct damage *d) {
  struct us_safetensors *st = NULL;
  struct us_safetensors_writer *out = NULL;
  struct us_buffer config = {0};
  char name[256];
  ck_assert_ok(us_safetensors_open(from, &st, &err));
  ck_assert_ok(us_safetensors_writer_create(to, &out, &err));
  for (size_t i = 0; i < us_safetensors_count(st); i++) {
    const struct us_safetensor *t = us_safetensors_at(st, i);
    bool hit = is_target(d, t);
    if (hit && d->rename && !*d->rename) continue;
    ck_assert_ok(us_safetensors_writer_declare(out, hit && d->rename ? d->rename : t->name,
                                               hit && d->dtype ? (enum us_dtype)(d->dtype - 1) : t->dtype,
                                               t->ndim, hit && d->dims[0] ? d->dims : t->dims, &err));
  }
  if (d->add)
    ck_assert_ok(us_safetensors_writer_declare(out, d->add, US_DTYPE_BF16, 1, (uint64_t[]){2}, &err));
  ck_assert_ok(us_safetensors_writer_begin(out, 0, &err));
  for (size_t i = 0; i < us_safetensors_count(st); i++) {
    const struct us_safetensor *t = us_safetensors_at(st, i);
    bool hit = is_target(d, t);
    if (hit && d->rename && !*d->rename) continue;
    size_t size = us_dtype_bytes(hit && d->dtype ? (enum us_dtype)(d->dtype - 1) : t->dtype);
    size_t bytes = hit && d->dims[0] ? size * d->dims[0] * (d->dims[1] ? d->dims[1] : 1)
                                     : t->bytes / us_dtype_bytes(t->dtype) * size;
    unsigned char *data = calloc(bytes > t->bytes ? bytes : t->bytes, 1);
    memcpy(data, t->data, t->bytes);
    if (hit && d->data) memcpy(data, d->data, bytes);
    if (hit && d->poke) memcpy(data + d->at, d->poke, d->poke_bytes);
    ck_assert_ok(us_safetensors_writer_write(out, data, bytes, &err));
    free(data);
  }
  if (d->add) ck_assert_ok(us_safetensors_writer_write(out, "\0\0\0\0", 4, &err));
  ck_assert_ok(us_safetensors_writer_commit(out, &err));
  us_safetensors_writer_free(out);
  us_safetensors_close(st);
  snprintf(name, sizeof name, "%s/config.json", from);
  ck_assert_ok(us_buffer_read_file(&config, name, 1 << 20, &err));
  snprintf(name, sizeof name, "%s/config.json", to);
  FILE *file = fopen(name, "w");
  fwrite(config.data, 1, config.size, file);
  fclose(file);
  us_buffer_release(&config);
}

static const struct {
  struct damage damage;
  const char *expect;
} damaged[] = {
    {{.name = "model.norm.weight", .rename = ""}, "model.norm.weight: missing"},
    {{.name = "model.layers.2.mlp.experts.9.up_proj.weight", .rename = ""},
     "model.layers.2.mlp.experts.9.up_proj.weight: missing"},
    {{.name = "model.layers.2.mlp.experts.9.up_proj.weight_scale", .rename = ""},
     "model.layers.2.mlp.experts.9.up_proj.weight_scale: missing"},
    {{.name = "model.layers.1.self_attn.qkv_proj.weight_scale_inv", .rename = ""},
     "model.layers.1.self_attn.qkv_proj.weight_scale_inv: missing"},
    {{.name = "model.layers.1.self_attn.attention_sink_bias", .rename = ""}, "attention_sink_bias: missing"},
    {{.name = "model.layers.1.self_attn.o_proj.weight", .dims = {128, 64}},
     "model.layers.1.self_attn.o_proj.weight: shape is [128, 64], expected [64, 128]"},
    {{.name = "model.layers.1.self_attn.qkv_proj.weight_scale_inv", .dims = {3, 1}},
     "weight_scale_inv: shape is [3, 1], expected [4, 1]"},
    {{.name = "lm_head.weight", .dtype = US_DTYPE_F16 + 1}, "lm_head.weight: dtype is F16"},
    {{.name = "model.layers.1.mlp.gate.weight", .dtype = US_DTYPE_U8 + 1},
     "model.layers.1.mlp.gate.weight: dtype is U8, expected F32 or BF16"},
    {{.name = "model.layers.1.mlp.experts.0.up_proj.weight", .dtype = US_DTYPE_BF16 + 1},
     "model.layers.1.mlp.experts.0.up_proj.weight: shape is [32, 32], expected [32, 64]"},
    {{.name = "model.layers.1.mlp.experts.0.up_proj.weight_scale", .dtype = US_DTYPE_F32 + 1},
     "up_proj.weight_scale: dtype is F32, expected U8 or F8_E8M0"},
    {{.name = "model.layers.0.mlp.up_proj.weight_scale_inv", .dtype = US_DTYPE_BF16 + 1},
     "up_proj.weight_scale_inv: dtype is BF16, expected F32 or F8_E8M0"},
    {{.name = "model.layers.3.mlp.gate.e_score_correction_bias",
      .at = 8,
      .poke = "\0\0\xc0\x7f",
      .poke_bytes = 4},
     "model.layers.3.mlp.gate.e_score_correction_bias: value 2 is NaN"},
    {{.name = "model.layers.3.mlp.gate.e_score_correction_bias",
      .at = 0,
      .poke = "\0\0\x80\xff",
      .poke_bytes = 4},
     "e_score_correction_bias: value 0 is Inf"},
    {{.add = "model.layers.0.self_attn.qkv_proj.bias"}, "qkv_proj.bias: the config has no such tensor"},
    {{.add = "model.layers.0.self_attn.attention_sink_bias"},
     "attention_sink_bias: the config has no such tensor"},
    {{.name = "model.layers.0.self_attn.qkv_proj.weight", .rename = "model.layers.0.self_attn.q_proj.weight"},
     "model.layers.0.self_attn.qkv_proj.weight: missing"},
};

START_TEST(a_damaged_tensor_is_named) {
  struct us_model *model = make("tiny-pro", 3), *back = NULL;
  struct us_err problem = {0};
  ck_assert_ok(us_model_write(in("good", path), model, NULL, &err));
  copy_damaged(path, in("bad", other), &damaged[_i].damage);
  ck_assert_int_eq(us_model_open(other, &back, &problem), US_ERR_INPUT);
  ck_assert_ptr_null(back);
  ck_assert_msg(strstr(problem.message, damaged[_i].expect) != NULL, "'%s' does not say '%s'",
                problem.message, damaged[_i].expect);
  ck_assert_msg(strncmp(problem.message, other, strlen(other)) == 0, "'%s' does not name the file",
                problem.message);
  us_model_free(model);
}
END_TEST

START_TEST(mtp_and_other_modalities_are_skipped_with_a_line) {
  struct us_model *model = make("tiny-pro", 3), *back = NULL;
  ck_assert_ok(us_model_write(in("good", path), model, NULL, &err));
  copy_damaged(path, in("mtp", other), &(struct damage){.add = "model.mtp.layers.0.enorm.weight"});
  ck_assert_ok(us_model_open(other, &back, &err));
  ck_assert_ptr_nonnull(back->notes);
  ck_assert_msg(strstr(back->notes, "skipped 1 MTP tensors") == back->notes, "%s", back->notes);
  compare(model, back);
  us_model_free(back);
  copy_damaged(path, in("vit", other), &(struct damage){.add = "visual.blocks.0.bias"});
  ck_assert_ok(us_model_open(other, &back, &err));
  ck_assert_msg(strstr(back->notes, "skipped 1 tensors that are not part") == back->notes, "%s", back->notes);
  us_model_free(back);
  us_model_free(model);
}
END_TEST

START_TEST(e8m0_scales_of_fp8_are_expanded) {
  struct us_model *model = make("tiny-pro", 3), *back = NULL;
  static const uint8_t bytes[] = {127, 126, 0, 130};
  ck_assert_ok(us_model_write(in("good", path), model, NULL, &err));
  copy_damaged(path, in("ue8m0", other),
               &(struct damage){.name = "model.layers.1.self_attn.qkv_proj.weight_scale_inv",
                                .dtype = US_DTYPE_F8_E8M0 + 1,
                                .data = bytes});
  ck_assert_ok(us_model_open(other, &back, &err));
  const float *scales = back->layers[1].qkv.scales;
  ck_assert(scales[0] == 1 && scales[1] == 0.5f && scales[2] == 0x1p-127f && scales[3] == 8);
  us_model_free(back);
  us_model_free(model);
}
END_TEST

START_TEST(the_check_finds_what_opening_does_not_touch) {
  struct us_model *model = make("tiny-pro", 3), *back = NULL;
  struct us_err problem = {0};
  ck_assert_ok(us_model_write(in("good", path), model, NULL, &err));
  copy_damaged(path, in("scale", other),
               &(struct damage){.name = "model.layers.2.mlp.experts.7.down_proj.weight_scale",
                                .at = 12,
                                .poke = "\xff",
                                .poke_bytes = 1});
  ck_assert_ok(us_model_open(other, &back, &err));
  ck_assert_int_eq(us_model_check(back, &problem), US_ERR_INPUT);
  ck_assert_msg(strstr(problem.message, "model.layers.2.mlp.experts.7.down_proj.weight") != NULL, "%s",
                problem.message);
  us_model_free(back);
  copy_damaged(path, in("nan", other),
               &(struct damage){.name = "lm_head.weight", .at = 64, .poke = "\xc0\x7f", .poke_bytes = 2});
  ck_assert_ok(us_model_open(other, &back, &err));
  ck_assert_int_eq(us_model_check(back, &problem), US_ERR_INPUT);
  ck_assert_msg(strstr(problem.message, "lm_head.weight") != NULL, "%s", problem.message);
  us_model_free(back);
  us_model_free(model);
}
END_TEST

/* --- folders --- */

START_TEST(a_config_that_does_not_match_its_tensors_is_refused) {
  static const struct {
    const char *from, *to, *expect;
  } edits[] = {
      {"\"fused_qkv\"", "\"split\"", "model.layers.0.self_attn.q_proj.weight: missing"},
      {"\"n_routed_experts\": 16", "\"n_routed_experts\": 15",
       "model.layers.1.mlp.gate.weight: shape is [16, 64], expected [15, 64]"},
      {"\"vocab_size\": 512", "\"vocab_size\": 513",
       "model.embed_tokens.weight: shape is [512, 64], expected [513, 64]"},
      {"\"add_swa_attention_sink_bias\": true", "\"add_swa_attention_sink_bias\": false",
       "attention_sink_bias: the config has no such tensor"},
      {"\"head_dim\": 24", "\"head_dim\": 32", "qkv_proj.weight: shape is [352, 64], expected [448, 64]"},
  };
  struct us_model *model = make("tiny-pro", 0), *back = NULL;
  for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
    char name[32];
    struct us_err problem = {0};
    snprintf(name, sizeof name, "edit%zu", i);
    ck_assert_ok(us_model_write(in(name, path), model, NULL, &err));
    replace_in_config(path, edits[i].from, edits[i].to);
    ck_assert_int_eq(us_model_open(path, &back, &problem), US_ERR_INPUT);
    ck_assert_msg(strstr(problem.message, edits[i].expect) != NULL, "%s", problem.message);
  }
  us_model_free(model);
}
END_TEST

START_TEST(stop_ids_come_from_generation_config) {
  struct us_model *model = make("tiny", 0), *back = NULL;
  ck_assert_ok(us_model_write(in("gen", path), model, NULL, &err));
  FILE *file = fopen(in("gen/generation_config.json", other), "w");
  fputs("{\"eos_token_id\": [3, 7, 9]}", file);
  fclose(file);
  ck_assert_ok(us_model_open(path, &back, &err));
  ck_assert_uint_eq(back->shape.stop_count, 3);
  ck_assert_uint_eq(back->shape.stop_ids[2], 9);
  us_model_free(back);
  us_model_free(model);
}
END_TEST

START_TEST(a_folder_is_not_written_over) {
  struct us_model *model = make("tiny", 0);
  struct us_err problem = {0};
  ck_assert_ok(us_model_write(in("once", path), model, NULL, &err));
  ck_assert_int_eq(us_model_write(path, model, NULL, &problem), US_ERR_IO);
  ck_assert_msg(strstr(problem.message, "exists") != NULL, "%s", problem.message);
  us_model_free(model);
}
END_TEST

START_TEST(a_failed_write_leaves_nothing) {
  struct us_model *model = make("tiny", 0);
  struct us_err problem = {0};
  struct stat st;
  model->layers[2].o_proj.format = US_FORMAT_NONE;
  ck_assert_int_eq(us_model_write(in("none", path), model, NULL, &problem), US_ERR_USAGE);
  ck_assert_str_eq(problem.message, "model.layers.2.self_attn.o_proj.weight: has no data");
  ck_assert_int_eq(us_model_write(in("none.h5", other), model, NULL, &problem), US_ERR_USAGE);
  ck_assert_int_ne(stat(path, &st), 0);
  ck_assert_int_ne(stat(other, &st), 0);
  ck_assert_int_eq(rmdir(scratch_folder), 0); /* empty: no temporary either */
  us_model_free(model);
}
END_TEST

START_TEST(a_path_that_is_not_there_is_io) {
  struct us_model *model = NULL;
  struct us_draft *draft = NULL;
  struct us_err problem = {0};
  ck_assert_int_eq(us_model_open(in("absent", path), &model, &problem), US_ERR_IO);
  ck_assert_int_eq(us_draft_open(path, &draft, &problem), US_ERR_IO);
}
END_TEST

/* --- HDF5 headers --- */

START_TEST(a_drafter_is_no_model) {
  struct us_draft *draft = make_draft(BF16);
  struct us_model *back = NULL;
  struct us_err problem = {0};
  ck_assert_ok(us_draft_write(in("d.h5", path), draft, NULL, &err));
  ck_assert_int_eq(us_model_open(path, &back, &problem), US_ERR_INPUT);
  ck_assert_msg(strstr(problem.message, "draft") != NULL, "%s", problem.message);
  us_draft_free(draft);
}
END_TEST

/* Copy an artefact with its header edited. */
static void copy_h5(const char *from, const char *to, const char *kind, const char *find,
                    const char *replace) {
  struct us_h5 *file = NULL;
  struct us_h5_writer *out = NULL;
  ck_assert_ok(us_h5_open(from, kind, &file, &err));
  const char *header = us_h5_text(file, "header"), *at = strstr(header, find);
  ck_assert_ptr_nonnull(at);
  char *edited = malloc(strlen(header) + strlen(replace) + 1);
  sprintf(edited, "%.*s%s%s", (int)(at - header), header, replace, at + strlen(find));
  ck_assert_ok(us_h5_create(to, kind, &out, &err));
  ck_assert_ok(us_h5_put_text(out, "header", edited, &err));
  size_t count = 0;
  const struct us_h5_dataset *d = us_h5_datasets(file, &count);
  for (size_t i = 0; i < count; i++)
    ck_assert_ok(us_h5_put(out, d[i].name, d[i].type, d[i].rank, d[i].dims, d[i].data, &err));
  ck_assert_ok(us_h5_finish(out, &err));
  us_h5_close(file);
  free(edited);
}

START_TEST(a_header_that_contradicts_the_tensors_says_where) {
  struct us_model *model = make("tiny", 3), *back = NULL;
  struct us_err problem = {0};
  ck_assert_ok(us_model_write(in("a.h5", path), model, NULL, &err));
  copy_h5(path, in("b.h5", other), "model", "\"experts\": \"mxfp4\"", "\"experts\": \"bf16\"");
  ck_assert_int_eq(us_model_open(other, &back, &problem), US_ERR_INPUT);
  ck_assert_msg(strstr(problem.message, "precision.experts: says bf16, but the tensors are mxfp4") != NULL,
                "%s", problem.message);
  us_model_free(model);
}
END_TEST

START_TEST(a_drafter_of_other_conventions_is_refused) {
  static const struct {
    const char *from, *to, *expect;
  } edits[] = {
      {"\"labels\": \"unshifted", "\"labels\": \"shifted", "conventions.labels: is \"shifted"},
      {"strictly before the anchor", "up to the anchor", "conventions.context: is"},
      {"\"mask_token_id\": 511,\n    \"target_layers\"", "\"mask_token_id\": 510,\n    \"target_layers\"",
       "conventions.mask_token_id: is 510, expected 511"},
      {"before the final norm", "after the final norm", "conventions.taps"},
  };
  struct us_draft *draft = make_draft(BF16), *back = NULL;
  ck_assert_ok(us_draft_write(in("a.h5", path), draft, NULL, &err));
  for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
    struct us_err problem = {0};
    copy_h5(path, in("b.h5", other), "draft", edits[i].from, edits[i].to);
    ck_assert_int_eq(us_draft_open(other, &back, &problem), US_ERR_INPUT);
    ck_assert_msg(strstr(problem.message, edits[i].expect) != NULL, "%s", problem.message);
  }
  us_draft_free(draft);
}
END_TEST

/* --- the side file --- */

static void replace_mask(const char *name, int64_t id, size_t hidden) {
  static float values[128];
  struct us_mask_embedding mask = {id, hidden, values};
  snprintf(other, sizeof other, "%s/mask_embedding.pt", name);
  ck_assert_ok(us_mask_embedding_write(other, &mask, &err));
}

START_TEST(a_mask_file_that_does_not_fit_is_refused) {
  struct us_draft *draft = make_draft(BF16), *back = NULL;
  struct us_err problem = {0};
  ck_assert_ok(us_draft_write(in("draft", path), draft, NULL, &err));
  replace_mask(path, 510, 64);
  ck_assert_int_eq(us_draft_open(path, &back, &problem), US_ERR_INPUT);
  ck_assert_msg(strstr(problem.message, "mask_token_id is 510, but config.json says 511") != NULL, "%s",
                problem.message);
  replace_mask(path, 511, 63);
  ck_assert_int_eq(us_draft_open(path, &back, &problem), US_ERR_INPUT);
  ck_assert_msg(strstr(problem.message, "embedding has 63 values, expected 64") != NULL, "%s",
                problem.message);
  ck_assert_int_eq(remove(other), 0);
  ck_assert_int_eq(us_draft_open(path, &back, &problem), US_ERR_IO);
  ck_assert_msg(strstr(problem.message, "mask_embedding.pt") != NULL, "%s", problem.message);
  us_draft_free(draft);
}
END_TEST

START_TEST(a_drafter_for_another_model_names_both) {
  struct us_draft *draft = make_draft(BF16);
  struct us_model *model = make("pico", 0);
  struct us_err problem = {0};
  strcpy(draft->path, "d.h5");
  strcpy(model->path, "pico.h5");
  ck_assert_int_eq(us_draft_check_target(draft, model, &problem), US_ERR_INPUT);
  ck_assert_str_eq(problem.message,
                   "d.h5 does not fit pico.h5: drafter hidden_size: 64, but the model's is 128");
  us_draft_free(draft);
  us_model_free(model);
}
END_TEST

/* --- mapping --- */

static size_t resident_bytes(void) {
  unsigned long size = 0, resident = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  ck_assert_int_eq(fscanf(file, "%lu %lu", &size, &resident), 2);
  fclose(file);
  return (size_t)resident * (size_t)sysconf(_SC_PAGESIZE);
}

/* A model whose experts are 64 * 3 * 1024 * 1024 bytes of FP8 zeros: 201 MB. */
static struct us_model *make_large(void) {
  struct us_shape shape;
  struct us_model *model = NULL;
  ck_assert_ok(us_shape_load("tiny", &shape, &err));
  shape.layers = 1, shape.moe_layer[0] = 1;
  memset(shape.swa_layer, 0, sizeof shape.swa_layer);
  memset(shape.moe_layer + 1, 0, sizeof shape.moe_layer - 1);
  shape.top_k = 1, shape.experts = 2, shape.hidden = shape.expert_inner = 1024;
  shape.precision.experts = FP8;
  ck_assert_ok(us_model_random(&shape, 1, NULL, &model, &err));
  struct us_expert expert = model->layers[0].experts[0];
  void *experts = NULL;
  ck_assert_ok(us_model_alloc(model, 64 * sizeof expert, &experts, &err));
  model->layers[0].experts = experts;
  for (int e = 0; e < 64; e++) model->layers[0].experts[e] = expert;
  void *router = NULL;
  ck_assert_ok(us_model_alloc(model, 64 * 1024 * sizeof(float), &router, &err));
  model->layers[0].router = (struct us_matrix){F32, 64, 1024, router, NULL, 0};
  ck_assert_ok(us_model_alloc(model, 64 * sizeof(float), &router, &err));
  model->layers[0].router_bias = router;
  model->shape.experts = 64;
  return model;
}

START_TEST(opening_maps_and_reads_nothing) {
  struct us_model *model = make_large(), *back = NULL;
  ck_assert_ok(us_model_write(in(_i ? "large.h5" : "large", path), model, NULL, &err));
  us_model_free(model);
  size_t before = resident_bytes();
  ck_assert_ok(us_model_open(path, &back, &err));
  size_t opened = resident_bytes();
  ck_assert_msg(opened < before + 20000000, "resident memory grew by %zu bytes", opened - before);
  ck_assert_ok(us_model_check(back, &err));
  size_t touched = resident_bytes();
  ck_assert_msg(touched > before + 100000000, "touching everything grew only %zu bytes", touched - before);
  us_model_free(back);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("checkpoint");
  tcase_add_checked_fixture(c, scratch_folder_make, scratch_folder_remove);
  tcase_add_loop_test(c, every_layout_comes_back_bit_for_bit, 0, 2 * PRECISIONS);
  tcase_add_test(c, a_folder_becomes_hdf5_and_a_folder_again);
  tcase_add_test(c, tokenizer_and_provenance_travel_along);
  tcase_add_loop_test(c, a_drafter_comes_back_bit_for_bit, 0, 2);
  tcase_add_test(c, a_drafter_is_found_in_its_models_folder);
  tcase_add_test(c, a_folder_has_the_published_names_and_types);
  tcase_add_test(c, vectors_that_are_bf16_go_out_as_bf16);
  tcase_add_loop_test(c, a_damaged_tensor_is_named, 0, sizeof damaged / sizeof *damaged);
  tcase_add_test(c, mtp_and_other_modalities_are_skipped_with_a_line);
  tcase_add_test(c, e8m0_scales_of_fp8_are_expanded);
  tcase_add_test(c, the_check_finds_what_opening_does_not_touch);
  tcase_add_test(c, a_config_that_does_not_match_its_tensors_is_refused);
  tcase_add_test(c, stop_ids_come_from_generation_config);
  tcase_add_test(c, a_folder_is_not_written_over);
  tcase_add_test(c, a_failed_write_leaves_nothing);
  tcase_add_test(c, a_path_that_is_not_there_is_io);
  tcase_add_test(c, a_drafter_is_no_model);
  tcase_add_test(c, a_header_that_contradicts_the_tensors_says_where);
  tcase_add_test(c, a_drafter_of_other_conventions_is_refused);
  tcase_add_test(c, a_mask_file_that_does_not_fit_is_refused);
  tcase_add_test(c, a_drafter_for_another_model_names_both);
  tcase_add_loop_test(c, opening_maps_and_reads_nothing, 0, 2);
  return us_suite("checkpoint", c);
}
US_TEST_MAIN(make_suite)
