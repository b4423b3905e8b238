/* t_laws.c: at a temperature, reject and block are equal to plain decoding in law: draws of the whole decode loop on the
 * hash executor (fake.h) against the exact law of its logits, and against plain draws.
 */
#include "decode/generate.h"
#include "fake.h"
#include "stats.h"
#include "suite.h"

static int32_t prompt[64];

static void setup(void) {
  for (uint32_t i = 0; i < sizeof prompt / sizeof *prompt; i++)
    prompt[i] = (int32_t)(fake_mix((uint32_t)us_test_seed(), i) % 5);
}

static struct us_request request_of(uint32_t prompt_count, float temperature) {
  return (struct us_request){
      .prompt = prompt, .prompt_count = prompt_count, .sampling = {.temperature = temperature}};
}

static void generate(struct fake *f, const struct us_request *r, const struct us_generate_options *o,
                     struct us_result *result, struct us_generate_stats *stats) {
  struct us_err err = {0};
  enum us_status status = us_generate(&f->ex, r, 1, o, result, stats, &err);
  ck_assert_msg(status == US_OK, "%s", err.message);
  ck_assert_uint_eq(f->violations, 0);
}

enum { FEW = 5, LAW = FEW * FEW * FEW, DRAWS = 200000 };

/* Exact law of the first three tokens, from the oracle's logits. */
static void exact_law(const struct fake *f, const struct us_request *r, double *law) {
  int32_t tokens[64];
  float logits[FEW];
  double p[4][FEW];
  uint32_t n = (uint32_t)r->prompt_count;
  memcpy(tokens, r->prompt, n * sizeof *tokens);
  for (int32_t i = 0; i < LAW; i++) {
    int32_t path[3] = {i / (FEW * FEW), i / FEW % FEW, i % FEW};
    law[i] = 1.0;
    for (uint32_t k = 0; k < 3; k++) {
      fake_logits(f, tokens, n + k, logits);
      us_sample_probs(logits, FEW, &r->sampling, p[k]);
      law[i] *= p[k][path[k]];
      tokens[n + k] = path[k];
    }
  }
}

/* Counts of the first three tokens of DRAWS samples. */
static void draw(struct fake *f, struct us_request r, enum us_verify_rule rule, uint32_t block,
                 double *counts, struct us_decode_stats *ret_stats) {
  memset(counts, 0, LAW * sizeof *counts);
  memset(ret_stats, 0, sizeof *ret_stats);
  r.samples = 1000;
  r.max_tokens = 4; /* a round of three drafts at most, then what is left */
  for (uint32_t i = 0; i < DRAWS / 1000; i++) {
    struct us_generate_options o = {.rule = rule, .block = block, .batch = 1};
    struct us_result result;
    struct us_generate_stats stats;
    r.seed = us_test_seed() + 1000 * block + i;
    generate(f, &r, &o, &result, &stats);
    for (uint32_t s = 0; s < r.samples; s++) {
      const int32_t *ids = result.outputs[s].ids.ids;
      counts[(ids[0] * FEW + ids[1]) * FEW + ids[2]]++;
    }
    ret_stats->rounds += stats.decode.rounds;
    for (int k = 0; k < US_MAX_BLOCK; k++) {
      ret_stats->offered[k] += stats.decode.offered[k];
      ret_stats->accepted[k] += stats.decode.accepted[k];
    }
    us_result_release(&result);
  }
}

START_TEST(reject_and_block_keep_the_law_of_plain_decoding) {
  struct fake f;
  fake_init(&f, FEW, 4);
  f.blunder = 256; /* a drafter that is always off: rejections and residuals everywhere */
  struct us_request r = request_of(7, 1.6f);
  r.sampling = (struct us_sampling){.temperature = 1.6f, .top_k = 4, .top_p = 0.97f};
  double law[LAW], counts[3][LAW];
  struct us_decode_stats stats[3];
  exact_law(&f, &r, law);
  draw(&f, r, US_VERIFY_MATCH, 1, counts[0], &stats[0]);
  draw(&f, r, US_VERIFY_REJECT, 4, counts[1], &stats[1]);
  draw(&f, r, US_VERIFY_BLOCK, 4, counts[2], &stats[2]);
  for (int k = 0; k < 3; k++) ck_assert_double_lt(fabs(g_test_z(counts[k], law, LAW)), 4.5);
  for (int k = 1; k < 3; k++) {
    ck_assert_double_lt(fabs(g_test_two_z(counts[0], counts[k], LAW)), 4.5);
    ck_assert_uint_gt(stats[k].accepted[1], DRAWS / 100); /* accepted and rejected, both often */
    ck_assert_uint_lt(stats[k].accepted[0], stats[k].offered[0] * 9 / 10);
  }
}
END_TEST

START_TEST(the_first_slot_accepts_as_often_as_the_laws_overlap) {
  struct fake f;
  fake_init(&f, FEW, 2);
  f.blunder = 256;
  struct us_request r = request_of(9, 1.3f);
  r.sampling = (struct us_sampling){.temperature = 1.3f};
  r.samples = 1000;
  r.max_tokens = 3; /* one round with one draft, if it is rejected one more without */
  uint64_t offered = 0, accepted = 0;
  for (uint32_t i = 0; i < 60; i++) {
    struct us_generate_options o = {.rule = US_VERIFY_REJECT, .block = 2};
    struct us_result result;
    struct us_generate_stats stats;
    r.seed = us_test_seed() + i;
    generate(&f, &r, &o, &result, &stats);
    offered += stats.decode.offered[0], accepted += stats.decode.accepted[0];
    us_result_release(&result);
  }
  /* The blundering drafter's row is a hash of the complement of the true one. */
  int32_t tokens[64];
  float logits[FEW];
  double first[FEW], p[FEW], q[FEW], expected = 0.0;
  memcpy(tokens, r.prompt, 9 * sizeof *tokens);
  fake_logits(&f, tokens, 9, logits);
  us_sample_probs(logits, FEW, &r.sampling, first);
  for (int32_t y = 0; y < FEW; y++) {
    uint32_t states[10];
    tokens[9] = y;
    for (uint32_t t = 0; t < 10; t++) states[t] = fake_fold(t ? states[t - 1] : 3, tokens[t], t);
    fake_row(&f, fake_window_hash(states, 9), y, logits);
    us_sample_probs(logits, FEW, &r.sampling, p);
    fake_row(&f, ~fake_window_hash(states, 9), y, logits);
    us_sample_probs(logits, FEW, &r.sampling, q);
    for (int v = 0; v < FEW; v++) expected += first[y] * fmin(p[v], q[v]);
  }
  ck_assert_uint_eq(offered, 60000);
  double z =
      ((double)accepted / (double)offered - expected) / sqrt(expected * (1 - expected) / (double)offered);
  ck_assert_double_lt(fabs(z), 4.0);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("laws");
  tcase_add_checked_fixture(c, setup, NULL);
  tcase_add_test(c, reject_and_block_keep_the_law_of_plain_decoding);
  tcase_add_test(c, the_first_slot_accepts_as_often_as_the_laws_overlap);
  return us_suite("laws", c);
}
US_TEST_MAIN(make_suite)
