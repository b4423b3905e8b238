/* t_bpe_train.c: vocabulary training against a trainer that recounts every pair in every step.
 *
 * That the `tokenizers` library loads the file and encodes equally: tests/parity/make_tokenizer_goldens.py --tool.
 */
#include "training/bpe_train.h"
#include "formats/tokenizer.h"
#include "suite.h"
#include <jansson.h>
#include <string.h>

#define MAX_SYMBOLS 4096

static const char text[] =
    "low lower lowest slow slower aaaa aaa aa abababab abab xyxyxyxyx newest widest wide new "
    "\xc3\xa9t\xc3\xa9 \xc3\xa9t\xc3\xa9s 11 22 the then there these other others another banana bananas";

static char *train(const char *input, size_t n, int32_t vocab, enum us_status expected) {
  struct us_err err = {0};
  struct us_bpe_trainer *trainer;
  struct us_buffer json = {0};
  ck_assert_int_eq(us_bpe_trainer_create(&trainer, &err), US_OK);
  ck_assert_int_eq(us_bpe_trainer_add(trainer, input, n, &err), US_OK);
  ck_assert_msg(us_bpe_trainer_finish(trainer, vocab, &json, &err) == expected, "%s", err.message);
  us_bpe_trainer_free(trainer);
  if (expected != US_OK) us_buffer_release(&json);
  return json.data;
}

/* Words of `text`, a space in front but for the first, as lists of strings. Words made of letters: what the pattern gives. */
struct naive {
  char symbols[MAX_SYMBOLS][24];
  int word[MAX_SYMBOLS]; /* which word a symbol belongs to */
  int n;
};

static void naive_init(struct naive *naive) {
  int word = 0;
  naive->n = 0;
  for (const char *p = text; *p; p++) {
    bool digit = *p >= '0' && *p <= '9';
    /* A digit is a piece by itself, and so is the space before one. */
    if (p > text && (*p == ' ' || digit)) word++;
    snprintf(naive->symbols[naive->n], 24, "%c", *p);
    naive->word[naive->n++] = word;
  }
}

/* The most frequent pair, the lowest bytes among equals; its count. */
static int naive_best(const struct naive *naive, int *ret_at) {
  int best = 0;
  for (int i = 0; i + 1 < naive->n; i++) {
    int count = 0;
    if (naive->word[i] != naive->word[i + 1]) continue;
    for (int j = 0; j + 1 < naive->n; j++)
      count += naive->word[j] == naive->word[j + 1] && strcmp(naive->symbols[i], naive->symbols[j]) == 0 &&
               strcmp(naive->symbols[i + 1], naive->symbols[j + 1]) == 0;
    int order = best ? strcmp(naive->symbols[i], naive->symbols[*ret_at]) : -1;
    if (best && order == 0) order = strcmp(naive->symbols[i + 1], naive->symbols[*ret_at + 1]);
    if (count > best || (count == best && order < 0)) {
      best = count;
      *ret_at = i;
    }
  }
  return best;
}

static void naive_merge(struct naive *naive, const char *left, const char *right) {
  int out = 0;
  for (int in = 0; in < naive->n; in++, out++) {
    bool joins = in + 1 < naive->n && naive->word[in] == naive->word[in + 1] &&
                 strcmp(naive->symbols[in], left) == 0 && strcmp(naive->symbols[in + 1], right) == 0;
    char joined[48];
    snprintf(joined, sizeof joined, "%s%s", naive->symbols[in], joins ? naive->symbols[in + 1] : "");
    naive->word[out] = naive->word[in];
    ck_assert_uint_lt(strlen(joined), 24);
    memcpy(naive->symbols[out], joined, strlen(joined) + 1);
    in += joins;
  }
  naive->n = out;
}

/* Counting differs in one place: in "aaa" the pair (a, a) stands twice but joins once; both trainers count it twice. */
START_TEST(merges_equal_those_of_recounting_in_every_step) {
  char *json = train(text, strlen(text), 266 + 30, US_OK);
  json_t *root = json_loads(json, 0, NULL),
         *merges = json_object_get(json_object_get(root, "model"), "merges");
  ck_assert_uint_eq(json_array_size(merges), 30);
  struct naive *naive = calloc(1, sizeof *naive);
  naive_init(naive);
  for (size_t i = 0; i < 30; i++) {
    int at = 0;
    ck_assert_int_ge(naive_best(naive, &at), 2);
    char left[24], right[24];
    memcpy(left, naive->symbols[at], 24);
    memcpy(right, naive->symbols[at + 1], 24);
    naive_merge(naive, left, right);
    struct us_tokenizer *tokenizer;
    struct us_err err = {0};
    size_t n;
    ck_assert_int_eq(us_tokenizer_parse(json, strlen(json), "made", &tokenizer, &err), US_OK);
    char joined[48];
    snprintf(joined, sizeof joined, "%s%s", left, right);
    const char *bytes = us_tokenizer_bytes(tokenizer, 256 + (int32_t)i, &n);
    ck_assert_msg(n == strlen(joined) && memcmp(bytes, joined, n) == 0, "merge %zu: \"%.*s\", not \"%s\"", i,
                  (int)n, bytes, joined);
    us_tokenizer_free(tokenizer);
  }
  free(naive);
  json_decref(root);
  free(json);
}
END_TEST

START_TEST(the_order_of_documents_does_not_matter) {
  static const char *const parts[] = {"the cat sat ", "on the mat and the cat ",
                                      "sat at the mat of that cat"};
  struct us_err err = {0};
  struct us_buffer json[2] = {{0}};
  for (int order = 0; order < 2; order++) {
    struct us_bpe_trainer *trainer;
    ck_assert_int_eq(us_bpe_trainer_create(&trainer, &err), US_OK);
    for (int i = 0; i < 3; i++) {
      const char *part = parts[order ? 2 - i : i];
      ck_assert_int_eq(us_bpe_trainer_add(trainer, part, strlen(part), &err), US_OK);
    }
    ck_assert_int_eq(us_bpe_trainer_finish(trainer, 272, &json[order], &err), US_OK);
    us_bpe_trainer_free(trainer);
  }
  ck_assert_str_eq(json[0].data, json[1].data);
  us_buffer_release(&json[0]);
  us_buffer_release(&json[1]);
}
END_TEST

START_TEST(counts_of_two_trainers_join_to_those_of_one) {
  struct us_err err = {0};
  struct us_buffer json[2] = {{0}};
  for (int joined = 0; joined < 2; joined++) {
    struct us_bpe_trainer *trainers[2];
    for (int i = 0; i < 2; i++) ck_assert_int_eq(us_bpe_trainer_create(&trainers[i], &err), US_OK);
    for (size_t at = 0, i = 0; at < strlen(text);
         at += 20, i++) { /* cut anywhere: both count the same pieces */
      size_t n = strlen(text + at) < 20 ? strlen(text + at) : 20;
      ck_assert_int_eq(us_bpe_trainer_add(trainers[joined && i % 2], text + at, n, &err), US_OK);
    }
    ck_assert_int_eq(us_bpe_trainer_join(trainers[0], trainers[1], &err), US_OK);
    ck_assert_msg(us_bpe_trainer_finish(trainers[0], 290, &json[joined], &err) == US_OK, "%s", err.message);
    us_bpe_trainer_free(trainers[0]), us_bpe_trainer_free(trainers[1]);
  }
  ck_assert_str_eq(json[0].data, json[1].data);
  us_buffer_release(&json[0]), us_buffer_release(&json[1]);
}
END_TEST

START_TEST(special_tokens_stand_last_and_are_not_learned) {
  static const char with[] = "<|im_end|><|im_end|><|im_end|><|im_end|>abab abab<|im_start|>abab";
  struct us_err err = {0};
  struct us_tokenizer *tokenizer;
  char *json = train(with, strlen(with), 268, US_OK);
  ck_assert_int_eq(us_tokenizer_parse(json, strlen(json), "made", &tokenizer, &err), US_OK);
  ck_assert_int_eq(us_tokenizer_size(tokenizer), 268);
  for (int i = 0; i < US_BPE_N_SPECIAL; i++) {
    ck_assert_int_eq(us_tokenizer_id(tokenizer, us_bpe_special[i]), 258 + i);
    ck_assert(us_tokenizer_is_special(tokenizer, 258 + i));
  }
  ck_assert_int_eq(us_tokenizer_id(tokenizer, "ab"), 256);
  ck_assert_int_eq(us_tokenizer_id(tokenizer, "abab"), 257);
  us_tokenizer_free(tokenizer);
  free(json);
}
END_TEST

START_TEST(too_little_text_and_bad_sizes_are_errors) {
  train("ab", 2, 300, US_ERR_INPUT);
  train(text, strlen(text), 265, US_ERR_USAGE);
  train(text, strlen(text), (1 << 20) + 1, US_ERR_USAGE);
  free(train("", 0, 266, US_OK));
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("bpe_train");
  tcase_add_test(c, merges_equal_those_of_recounting_in_every_step);
  tcase_add_test(c, the_order_of_documents_does_not_matter);
  tcase_add_test(c, counts_of_two_trainers_join_to_those_of_one);
  tcase_add_test(c, special_tokens_stand_last_and_are_not_learned);
  tcase_add_test(c, too_little_text_and_bad_sizes_are_errors);
  return us_suite("bpe_train", c);
}

US_TEST_MAIN(make_suite)
