/* t_mask_embedding: files that PyTorch wrote, what is written here, and everything that must be refused. */
#include "formats/mask_embedding.h"

#include "fixture.h"
#include "formats/bf16.h"
#include "formats/f16.h"
#include "formats/torch_pickle.h"
#include "formats/zip_stored.h"
#include "gauss.h"
#include "suite.h"

START_TEST(a_file_written_by_pytorch_is_read) {
  struct us_mask_embedding mask;
  struct us_err err = {0};
  ck_assert_msg(us_mask_embedding_read(test_fixture("mask_embedding.pt"), &mask, &err) == US_OK, "%s",
                err.message);
  ck_assert_int_eq(mask.mask_token_id, 151665);
  ck_assert_uint_eq(mask.hidden, 64);
  for (int i = 0; i < 64; i++) ck_assert_float_eq(mask.values[i], us_bf16_round((float)i * 0.37f - 11.0f));
  us_mask_embedding_release(&mask);
}
END_TEST

START_TEST(a_view_of_f16_and_a_64_bit_id_are_read) {
  struct us_mask_embedding mask;
  struct us_err err = {0};
  ck_assert_msg(us_mask_embedding_read(test_fixture("mask_embedding_f16.pt"), &mask, &err) == US_OK, "%s",
                err.message);
  ck_assert_int_eq(mask.mask_token_id, INT64_C(1) << 40);
  ck_assert_uint_eq(mask.hidden, 32);
  /* bf16 has fewer fraction bits than f16, so these values passed through f16 unchanged. */
  for (int i = 0; i < 32; i++)
    ck_assert_float_eq(mask.values[i], us_bf16_round((float)(i + 8) * 0.37f - 11.0f));
  us_mask_embedding_release(&mask);
}
END_TEST

START_TEST(every_f16_value_decodes_to_its_definition) {
  for (int h = 0; h < 0x10000; h++) {
    int exponent = h >> 10 & 31, fraction = h & 0x3ff;
    double value = exponent ? ldexp(1 + fraction / 1024.0, exponent - 15) : ldexp(fraction, -24);
    if (exponent == 31) value = INFINITY;
    float got = us_f16_to_f32((uint16_t)h);
    if (exponent == 31 && fraction)
      ck_assert(isnan(got));
    else
      ck_assert_double_eq((double)got, h >> 15 ? -value : value);
  }
}
END_TEST

START_TEST(the_crc_is_the_published_check_value) {
  ck_assert_uint_eq(us_zip_crc32("123456789", 9), 0xcbf43926u);
}
END_TEST

START_TEST(what_is_written_is_read_back_rounded_to_bf16) {
  char folder[256], path[300];
  test_folder(folder);
  snprintf(path, sizeof path, "%s/mask.pt", folder);
  float values[100];
  uint64_t state = us_test_seed();
  for (int i = 0; i < 100; i++) values[i] = (float)test_uniform(&state) - 0.5f;
  struct us_mask_embedding mask = {.mask_token_id = 4095, .hidden = 100, .values = values}, back;
  struct us_err err = {0};
  ck_assert_msg(us_mask_embedding_write(path, &mask, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_mask_embedding_read(path, &back, &err) == US_OK, "%s", err.message);
  ck_assert_int_eq(back.mask_token_id, 4095);
  ck_assert_uint_eq(back.hidden, 100);
  for (int i = 0; i < 100; i++) ck_assert_float_eq(back.values[i], us_bf16_round(values[i]));
  us_mask_embedding_release(&back);
  test_remove(folder);
}
END_TEST

START_TEST(a_file_cut_anywhere_is_refused) {
  size_t n;
  uint8_t *bytes = test_read(test_fixture("mask_embedding.pt"), &n);
  for (size_t cut = 0; cut < n; cut++) {
    uint8_t *part = malloc(cut + 1); /* its own allocation, so that a sanitizer sees a read past the end */
    memcpy(part, bytes, cut);
    struct us_mask_embedding mask;
    struct us_err err = {0};
    ck_assert_int_eq(us_mask_embedding_parse(part, cut, "cut.pt", &mask, &err), US_ERR_INPUT);
    ck_assert_ptr_nonnull(strstr(err.message, "cut.pt: "));
    free(part);
  }
  free(bytes);
}
END_TEST

START_TEST(a_changed_byte_is_refused_or_changes_nothing) {
  size_t n;
  uint8_t *bytes = test_read(test_fixture("mask_embedding.pt"), &n);
  for (size_t at = 0; at < n; at++)
    for (int bit = 0; bit < 8; bit++) {
      bytes[at] ^= (uint8_t)(1 << bit);
      struct us_mask_embedding mask;
      struct us_err err = {0};
      if (us_mask_embedding_parse(bytes, n, "x.pt", &mask, &err) == US_OK) {
        ck_assert_int_eq(mask.mask_token_id, 151665);
        ck_assert_uint_eq(mask.hidden, 64);
        for (int i = 0; i < 64; i++)
          ck_assert_float_eq(mask.values[i], us_bf16_round((float)i * 0.37f - 11.0f));
        us_mask_embedding_release(&mask);
      }
      bytes[at] ^= (uint8_t)(1 << bit);
    }
  free(bytes);
}
END_TEST

/* ---- the pickle ---- */

static uint8_t *fixture_pickle(size_t *ret_bytes) {
  size_t n;
  uint8_t *file = test_read(test_fixture("mask_embedding.pt"), &n);
  struct us_zip_member member;
  struct us_err err = {0};
  ck_assert_int_eq(us_zip_find(file, n, "x.pt", "/data.pkl", &member, &err), US_OK);
  uint8_t *pickle = malloc(member.bytes);
  memcpy(pickle, member.data, member.bytes);
  *ret_bytes = member.bytes;
  free(file);
  return pickle;
}

/* Parse a text (with its length), expecting the given message. */
static void refuse(const char *bytes, size_t n, const char *message) {
  struct us_torch_dict dict;
  struct us_err err = {0};
  ck_assert_int_eq(us_torch_dict_parse(bytes, n, &dict, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, message) != NULL, "'%s', expected '%s'", err.message, message);
}
#define REFUSE(bytes, message) refuse(bytes, sizeof bytes - 1, message)

START_TEST(a_pickle_that_would_run_something_is_refused) {
  REFUSE("\x80\x02"
         "cos\nsystem\nX\x02\0\0\0id\x85R.",
         "a global that such a file does not name (pickle byte 2)");
  REFUSE("\x80\x02"
         "c__builtin__\neval\n(tR.",
         "a global that such a file does not name");
  REFUSE("\x80\x02"
         "(ios\nsystem\n.",
         "an opcode that such a file does not contain");
  REFUSE("\x80\x02"
         "ccollections\nOrderedDict\nK\x01\x85R.",
         "a call that such a file does not make");
  REFUSE("\x80\x02"
         "ctorch\nFloatStorage\n)R.",
         "a call that such a file does not make");
  REFUSE("\x80\x04"
         "}.",
         "not of protocol 2");
}
END_TEST

START_TEST(every_opcode_outside_the_list_is_refused) {
  const char *known = "}(qrhjXKMJc)tQRsu.\x8a\x88\x89\x85\x86\x87";
  for (int op = 1; op < 256; op++) {
    if (strchr(known, op)) continue;
    char pickle[] = {(char)0x80, 2, '}', (char)op, 0, 0, 0, 0, 0, 0, 0, 0, '.'};
    refuse(pickle, sizeof pickle, "an opcode that such a file does not contain (pickle byte 3)");
  }
}
END_TEST

START_TEST(a_malformed_pickle_is_refused_with_its_reason) {
  REFUSE("\x80\x02}", "the pickle ends early (pickle byte 3)");
  REFUSE("\x80\x02.", "not a dict");
  REFUSE("\x80\x02K\x01.", "not a dict");
  REFUSE("\x80\x02}}.", "a second dict");
  REFUSE("\x80\x02}h\x05.", "a memo entry is missing");
  REFUSE("\x80\x02q\x01.", "a memo entry is out of range");
  REFUSE("\x80\x02}r\0\x01\0\0.", "a memo entry is out of range");
  REFUSE("\x80\x02}X\xff\xff\xff\xff"
         "a.",
         "the pickle ends early");
  REFUSE("\x80\x02}\x8a\x09\0\0\0\0\0\0\0\0\0.", "more than 64 bits");
  REFUSE("\x80\x02}(K\x01u.", "keys and values do not pair up");
  REFUSE("\x80\x02}(K\x01K\x02u.", "a key that is not a short text");
  REFUSE("\x80\x02}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u.", "is there twice");
  REFUSE("\x80\x02}u.", "a mark is missing");
  REFUSE("\x80\x02}K\x01s.", "something else than the dict");
  REFUSE("\x80\x02}X\x01\0\0\0a)s.", "a value that such a dict does not hold");
  REFUSE("\x80\x02}(\x85.", "a mark inside a tuple");
  REFUSE("\x80\x02)\x87.", "a tuple of the wrong size");
  REFUSE("\x80\x02}Q.", "not a storage");
  REFUSE("\x80\x02R.", "the stack is empty");
  REFUSE("\x80\x02(K\1K\1K\1K\1K\1K\1K\1K\1K\1t.", "a tuple of the wrong size");
}
END_TEST

START_TEST(a_pickle_cannot_use_more_memory_than_a_real_one_needs) {
  char marks[1000], values[2000];
  memset(marks, '(', sizeof marks);
  memcpy(marks, "\x80\x02", 2);
  refuse(marks, sizeof marks, "the stack is deeper");
  memcpy(values, "\x80\x02", 2);
  for (size_t i = 2; i + 2 < sizeof values; i += 3) memcpy(values + i, ")\x85\x85", 3);
  refuse(values, sizeof values, "the stack is deeper");
  memset(values + 3, 0x85, sizeof values - 3); /* one value, wrapped for ever */
  values[2] = ')';
  refuse(values, sizeof values, "more values than such a file has");
}
END_TEST

START_TEST(mutated_pickles_never_read_outside) {
  size_t n;
  uint8_t *pickle = fixture_pickle(&n), *copy = malloc(n);
  uint64_t state = us_test_seed();
  int accepted = 0;
  for (int round = 0; round < 200000; round++) {
    memcpy(copy, pickle, n);
    int changes = 1 + (int)(test_next(&state) % 4);
    for (int i = 0; i < changes; i++) copy[test_next(&state) % n] = (uint8_t)test_next(&state);
    struct us_torch_dict dict;
    struct us_err err = {0};
    accepted += us_torch_dict_parse(copy, n, &dict, &err) == US_OK;
  }
  ck_assert_int_gt(accepted, 0); /* a changed number is still a pickle: the mutations reach the deep paths */
  free(pickle), free(copy);
}
END_TEST

/* ---- what the pickle says against what the zip holds ---- */

/* The fixture with a change at `offset` of its pickle, and the checksum made right again. */
static void refuse_changed(size_t offset, uint8_t byte, const char *message) {
  size_t n, pickle_bytes;
  uint8_t *file = test_read(test_fixture("mask_embedding.pt"), &n), *pickle = fixture_pickle(&pickle_bytes);
  uint32_t before = us_zip_crc32(pickle, pickle_bytes);
  struct us_zip_member member;
  struct us_mask_embedding mask;
  struct us_err err = {0};
  ck_assert_int_eq(us_zip_find(file, n, "x.pt", "/data.pkl", &member, &err), US_OK);
  file[(size_t)(member.data - file) + offset] = byte;
  uint32_t after = us_zip_crc32(member.data, pickle_bytes);
  for (size_t i = 0; i + 4 <= n; i++)
    if (memcmp(file + i, &before, 4) == 0) memcpy(file + i, &after, 4);
  ck_assert_int_eq(us_mask_embedding_parse(file, n, "x.pt", &mask, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, message) != NULL, "'%s', expected '%s'", err.message, message);
  free(file), free(pickle);
}

START_TEST(a_tensor_that_does_not_fit_its_storage_is_refused) {
  refuse_changed(150, 65, "embedding reaches beyond its storage"); /* 65 elements of 64 */
  refuse_changed(148, 1, "embedding reaches beyond its storage");  /* from element 1 */
  refuse_changed(142, 63, "embedding reaches beyond its storage"); /* a storage of 63 */
  refuse_changed(142, 65, "storage is missing or has another size");
  refuse_changed(128, '1', "storage is missing or has another size"); /* member data/1 */
  refuse_changed(155, 2, "embedding has a stride of 2");
  refuse_changed(150, 0, "embedding has 0 values");
  refuse_changed(11, 'M', "mask_token_id is missing");
  refuse_changed(36, 'E', "embedding is missing");
  refuse_changed(30, 0x80, "mask_token_id is missing or not a token id"); /* negative */
}
END_TEST

START_TEST(nan_in_the_vector_is_refused) {
  char folder[256], path[300];
  test_folder(folder);
  snprintf(path, sizeof path, "%s/mask.pt", folder);
  float values[3] = {1, NAN, 2};
  struct us_mask_embedding mask = {.mask_token_id = 1, .hidden = 3, .values = values}, back;
  struct us_err err = {0};
  ck_assert_int_eq(us_mask_embedding_write(path, &mask, &err), US_OK);
  ck_assert_int_eq(us_mask_embedding_read(path, &back, &err), US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, "embedding value 1 is not finite"));
  test_remove(folder);
}
END_TEST

START_TEST(a_missing_file_is_an_io_error) {
  struct us_mask_embedding mask;
  struct us_err err = {0};
  ck_assert_int_eq(us_mask_embedding_read("/no/such/file.pt", &mask, &err), US_ERR_IO);
  ck_assert_ptr_null(mask.values);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("mask_embedding");
  tcase_add_test(c, a_file_written_by_pytorch_is_read);
  tcase_add_test(c, a_view_of_f16_and_a_64_bit_id_are_read);
  tcase_add_test(c, every_f16_value_decodes_to_its_definition);
  tcase_add_test(c, the_crc_is_the_published_check_value);
  tcase_add_test(c, what_is_written_is_read_back_rounded_to_bf16);
  tcase_add_test(c, a_file_cut_anywhere_is_refused);
  tcase_add_test(c, a_changed_byte_is_refused_or_changes_nothing);
  tcase_add_test(c, a_pickle_that_would_run_something_is_refused);
  tcase_add_test(c, every_opcode_outside_the_list_is_refused);
  tcase_add_test(c, a_malformed_pickle_is_refused_with_its_reason);
  tcase_add_test(c, a_pickle_cannot_use_more_memory_than_a_real_one_needs);
  tcase_add_test(c, mutated_pickles_never_read_outside);
  tcase_add_test(c, a_tensor_that_does_not_fit_its_storage_is_refused);
  tcase_add_test(c, nan_in_the_vector_is_refused);
  tcase_add_test(c, a_missing_file_is_an_io_error);
  return us_suite("mask_embedding", c);
}
US_TEST_MAIN(make_suite)
