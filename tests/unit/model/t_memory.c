/* t_memory.c: configs and checkpoints when memory ends: the operation says so, or its result is whole. */
#include "fail_alloc.h"

#include "base/record.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/random.h"
#include "scratch_folder.h"
#include "small_shape.h"

static struct us_model *model;
static struct us_draft *draft;

static void make(void) {
  struct us_shape shape = small_shape(16);
  struct us_draft_shape draft_shape = small_draft_shape(16);
  struct us_err err = {0};
  shape.type = US_MODEL_MIMO_V2_FLASH;          /* which prints the most keys */
  shape.layers = draft_shape.target_layers = 2; /* every tensor is a dozen allocations, each a run */
  shape.experts = shape.top_k = 2;
  draft_shape.layers = draft_shape.taps = 1;
  draft_shape.markov = 32;
  draft_shape.head = US_FORMAT_MXFP4;
  ck_assert_msg(us_model_random(&shape, 1, NULL, &model, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_draft_random(&draft_shape, US_FORMAT_BF16, 2, NULL, &draft, &err) == US_OK, "%s",
                err.message);
  scratch_folder_make();
}

static void drop(void) {
  us_model_free(model);
  us_draft_free(draft);
  scratch_folder_remove();
}

/* What the undisturbed run gave; every later one that succeeds must give the same. */
static char expected[1 << 14];

static enum us_status compare(const char *text, struct us_err *err) {
  if (!expected[0]) snprintf(expected, sizeof expected, "%s", text);
  return strcmp(text, expected) == 0 ? US_OK : us_err_set(err, US_ERR_CHECK, "a part is missing: %s", text);
}

static enum us_status print_shape(void *arg, struct us_err *err) {
  char *text = NULL;
  enum us_status status =
      arg ? us_draft_shape_print(&draft->shape, &text, err) : us_shape_print(&model->shape, &text, err);
  if (status == US_OK) status = compare(text, err);
  free(text);
  return status;
}

START_TEST(a_config_is_printed_whole) {
  for (int i = 0; i < 2; i++) {
    expected[0] = 0;
    us_fail_alloc(print_shape, i ? draft : NULL, US_FAIL_ALLOC_MAY_SUCCEED);
  }
}
END_TEST

/* Short texts: where memory ends at a closing quote, jansson 2.14 itself ends (lex_scan_string). */
static enum us_status read_config(void *arg, struct us_err *err) {
  json_t *root = NULL;
  enum us_status status = us_config_parse(arg, strlen(arg), "config.json", &root, err);
  json_decref(root);
  return status;
}

static enum us_status read_tensors(void *arg, struct us_err *err) {
  static const char header[] =
      "{\"__metadata__\":{\"a\":\"b\"},\"w\":{\"dtype\":\"U8\",\"shape\":[2,1],\"data_offsets\":[0,2]}}";
  char file[8 + sizeof header - 1 + 2] = {(char)(sizeof header - 1)};
  memcpy(file + 8, header, sizeof header - 1);
  struct us_safetensors *st = NULL;
  enum us_status status = us_safetensors_open_memory(file, sizeof file, "m.safetensors", &st, err);
  bool whole = status != US_OK || (us_safetensors_find(st, "w") && us_safetensors_metadata(st, "a"));
  us_safetensors_close(st);
  return whole ? status : us_err_set(err, US_ERR_CHECK, "a part is missing");
}

START_TEST(what_is_read_is_whole_or_out_of_memory) {
  char text[] = "{\"hidden_size\": 64, \"rope_theta\": 1e6}";
  us_fail_alloc(read_config, text, US_FAIL_ALLOC_BALANCED);
  us_fail_alloc(read_tensors, NULL, US_FAIL_ALLOC_BALANCED);
}
END_TEST

/* A model or drafter (arg) written to a path of a name that no run before had. */
static enum us_status write_folder(void *arg, struct us_err *err) {
  static int run;
  char path[128], hex[US_SHA256_HEX];
  snprintf(path, sizeof path, "%s/%d", scratch_folder, run++);
  enum us_status status =
      arg ? us_draft_write(path, draft, "{}", err) : us_model_write_folder(path, model, "{}", 100000, err);
  struct us_err own = {0}; /* the hash may fail for want of memory too, which says nothing about the folder */
  while (status == US_OK && us_record_hash(path, hex, &own) != US_OK)
    if (own.status != US_ERR_MEMORY) return us_err_set(err, US_ERR_CHECK, "%s", own.message);
  return status == US_OK ? compare(hex, err) : status;
}

START_TEST(a_folder_is_written_whole) {
  for (int i = 0; i < 2; i++) {
    expected[0] = 0;
    us_fail_alloc(write_folder, i ? draft : NULL, US_FAIL_ALLOC_MAY_SUCCEED | US_FAIL_ALLOC_KEEPS);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("memory");
  tcase_add_checked_fixture(c, make, drop);
  tcase_set_timeout(c, 600);
  tcase_add_test(c, a_config_is_printed_whole);
  tcase_add_test(c, what_is_read_is_whole_or_out_of_memory);
  tcase_add_test(c, a_folder_is_written_whole);
  return us_suite("memory", c);
}
US_TEST_MAIN(make_suite)
