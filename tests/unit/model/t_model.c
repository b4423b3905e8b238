/* t_model.c: empty models and drafters, what they own, and the names of their tensors.
 *
 * Truth: the published lists, counted by hand: 63 tensors of the Pro drafter, 159,581 of the FP8 Pro checkpoint.
 */
#include "model/model.h"
#include "model/owner.h"
#include "suite.h"

#include <string.h>

static struct us_shape load(const char *name) {
  struct us_shape shape;
  struct us_err err = {0};
  ck_assert_msg(us_shape_load(name, &shape, &err) == US_OK, "%s", err.message);
  return shape;
}

START_TEST(pro_lists_every_published_tensor) {
  struct us_shape pro = load("mimo-v2.5-pro");
  struct us_model *model = NULL;
  struct us_tensor_ref *refs = NULL;
  size_t count = 0, matrices = 0;
  ck_assert_int_eq(us_model_create(&pro, &model, NULL), US_OK);
  ck_assert_int_eq(us_model_tensors(model, &refs, &count, NULL), US_OK);
  for (size_t i = 0; i < count; i++) matrices += refs[i].matrix != NULL;
  /* A scale beside every FP8 matrix: all but embedding, head, 70 o_proj and 69 routers. Each of 3 MTP layers has eh_proj,
   * 5 norms, 3 MLP matrices and qkv with scales, o_proj and a sink. */
  size_t scales = matrices - 2 - 70 - 69, mtp = 3 * (1 + 5 + 2 * 4 + 1 + 1);
  ck_assert_uint_eq(count + scales + mtp, 159581);
  ck_assert_str_eq(refs[0].name, "model.embed_tokens.weight");
  ck_assert_str_eq(refs[count - 1].name, "lm_head.weight");
  free(refs);
  us_model_free(model);
}
END_TEST

START_TEST(names_are_unique_and_vectors_have_memory) {
  struct us_shape tiny = load("tiny");
  struct us_model *model = NULL;
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  ck_assert_int_eq(us_model_create(&tiny, &model, NULL), US_OK);
  ck_assert_int_eq(us_model_tensors(model, &refs, &count, NULL), US_OK);
  for (size_t i = 0; i < count; i++) {
    ck_assert((refs[i].matrix == NULL) != (refs[i].vector == NULL));
    if (refs[i].vector) {
      ck_assert_uint_eq((uintptr_t)*refs[i].vector % 64, 0);
      for (size_t n = 0; n < refs[i].rows; n++) ck_assert((*refs[i].vector)[n] == 0);
    } else {
      ck_assert_int_eq(refs[i].matrix->format, US_FORMAT_NONE);
      ck_assert_uint_eq(refs[i].matrix->rows, refs[i].rows);
    }
    for (size_t j = 0; j < i; j++) ck_assert_str_ne(refs[i].name, refs[j].name);
  }
  free(refs);
  us_model_free(model);
}
END_TEST

START_TEST(a_drafter_lists_63_tensors_and_its_mask) {
  struct us_draft_shape shape = {.layers = 5,
                                 .hidden = 6144,
                                 .vocab = 152064,
                                 .inner = 16384,
                                 .norm_eps = 1e-5,
                                 .value_scale = 0.612,
                                 .block = 8,
                                 .mask_id = 151669,
                                 .taps = 5,
                                 .tap_layer = {0, 15, 31, 47, 69},
                                 .target_layers = 70,
                                 .attention = {.q_heads = 128,
                                               .kv_heads = 8,
                                               .qk_dim = 128,
                                               .v_dim = 128,
                                               .rotary_dim = 64,
                                               .rope_theta = 10000,
                                               .window = 1024,
                                               .sink = true}};
  struct us_draft *draft = NULL;
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  uint64_t parameters = 0;
  ck_assert_int_eq(us_draft_create(&shape, &draft, NULL), US_OK);
  ck_assert_int_eq(us_draft_tensors(draft, &refs, &count, NULL), US_OK);
  ck_assert_uint_eq(count, 63 + 1);
  ck_assert_str_eq(refs[count - 1].name, "mask_embedding");
  for (size_t i = 0; i + 1 < count; i++) parameters += (uint64_t)refs[i].rows * refs[i].cols;
  ck_assert_uint_eq(parameters / 1000000, 2768); /* published: 2.768 G */
  free(refs);
  us_draft_free(draft);
}
END_TEST

START_TEST(a_bad_shape_creates_nothing) {
  struct us_shape shape = load("tiny");
  struct us_model *model = NULL;
  struct us_err err = {0};
  shape.top_k = 17;
  ck_assert_int_eq(us_model_create(&shape, &model, &err), US_ERR_INPUT);
  ck_assert_ptr_null(model);
  ck_assert_str_eq(err.message, "num_experts_per_tok: 17 is outside [1, 16]");
}
END_TEST

static size_t size_of(int i) {
  static const size_t sizes[] = {1, 64, 100, 70000, 3, 300000, 65, 1 << 20, 0, 17};
  return i < 20 ? sizes[i % 10] : sizes[i % 10] % 1000;
}

static bool all_bytes_are(const unsigned char *memory, size_t n, unsigned char value) {
  for (size_t i = 0; i < n; i++)
    if (memory[i] != value) return false;
  return true;
}

START_TEST(memory_is_aligned_zeroed_and_apart) {
  struct us_owner *owner = NULL;
  unsigned char *memory[1000];
  ck_assert_int_eq(us_owner_create(&owner, NULL), US_OK);
  for (int i = 0; i < 1000; i++) {
    void *p = NULL;
    ck_assert_int_eq(us_owner_alloc(owner, size_of(i), &p, NULL), US_OK);
    ck_assert_uint_eq((uintptr_t)p % 64, 0);
    ck_assert(all_bytes_are(p, size_of(i), 0));
    memory[i] = memset(p, i % 255 + 1, size_of(i));
  }
  for (int i = 0; i < 1000; i++)
    ck_assert(all_bytes_are(memory[i], size_of(i), (unsigned char)(i % 255 + 1)));
  us_owner_free(owner);
}
END_TEST

START_TEST(more_memory_than_there_is_is_an_error) {
  struct us_owner *owner = NULL;
  struct us_err err = {0};
  void *p = NULL;
  ck_assert_int_eq(us_owner_create(&owner, NULL), US_OK);
  ck_assert_int_eq(us_owner_alloc(owner, SIZE_MAX, &p, &err), US_ERR_MEMORY);
  ck_assert_int_eq(us_owner_alloc(owner, SIZE_MAX / 2 - 100, &p, &err), US_ERR_MEMORY);
  us_owner_free(owner);
}
END_TEST

static char order[8];
static void note_a(void *thing) {
  strcat(order, "a");
}
static void note_b(void *thing) {
  strcat(order, "b");
}

START_TEST(things_are_released_last_first) {
  struct us_owner *owner = NULL;
  order[0] = 0;
  ck_assert_int_eq(us_owner_create(&owner, NULL), US_OK);
  ck_assert_int_eq(us_owner_attach(owner, NULL, note_a, NULL), US_OK);
  ck_assert_int_eq(us_owner_attach(owner, NULL, note_b, NULL), US_OK);
  us_owner_free(owner);
  ck_assert_str_eq(order, "ba");
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("model");
  tcase_add_test(c, pro_lists_every_published_tensor);
  tcase_add_test(c, names_are_unique_and_vectors_have_memory);
  tcase_add_test(c, a_drafter_lists_63_tensors_and_its_mask);
  tcase_add_test(c, a_bad_shape_creates_nothing);
  tcase_add_test(c, memory_is_aligned_zeroed_and_apart);
  tcase_add_test(c, more_memory_than_there_is_is_an_error);
  tcase_add_test(c, things_are_released_last_first);
  return us_suite("model", c);
}
US_TEST_MAIN(make_suite)
