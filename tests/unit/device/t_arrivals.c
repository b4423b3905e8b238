/* t_arrivals.c: a recorded load on an executor without a model behind it: the token at position p is p.
 *
 * The executor checks what it is asked for: prompts whole and in chunks, rounds that go on where they ended, no position twice. As
 * on a GPU, a request that is cancelled gets one more round before the rounds end.
 */
#include "decode/generate.h"
#include "device/arrivals.h"
#include "device/weights_layout.h"
#include "model/small_shape.h"
#include "suite.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LONGEST 64 /* rounds of a call, so that calls end without a reason too */

struct fake {
  struct us_executor base;
  struct us_model *model;
  struct us_draft *draft;
  uint64_t clock, prompt_rows, committed;
  uint32_t round, calls;
};

static enum us_status forward(struct us_executor *ex, const struct us_pass *pass, struct us_err *err) {
  struct fake *fake = (struct fake *)ex;
  uint32_t vocab = ex->model->shape.vocab, first = pass->rows[0].position,
           last = first + (uint32_t)pass->R - 1;
  ck_assert(pass->prefill && pass->R <= US_PREFILL_CHUNK);
  ck_assert_uint_eq(first % US_PREFILL_CHUNK, 0);
  for (size_t i = 0; i < pass->R; i++) {
    ck_assert_uint_eq(pass->rows[i].position, first + i);
    ck_assert(pass->rows[i].token >= 0 && (uint32_t)pass->rows[i].token < vocab);
  }
  ck_assert((pass->draft_kv != NULL) == (ex->draft != NULL));
  fake->prompt_rows += pass->R;
  if (!pass->logits) return US_OK;
  ck_assert(pass->want_logits[pass->R - 1]);
  for (uint32_t i = 0; i < vocab; i++) pass->logits[(pass->R - 1) * vocab + i] = i == (last + 1) % vocab;
  return US_OK;
}

/* One sequence's part of a round; whether it goes on. */
static bool step(struct fake *fake, struct us_rounds *rounds, uint32_t i, uint32_t *position,
                 bool *cancelled) {
  const struct us_rounds_sequence *s = &rounds->sequences[i];
  uint32_t left = s->limit - *position, count = 1 + s->drafts / 2;
  int32_t tokens[US_MAX_BLOCK];
  if (count > left) count = left;
  for (uint32_t j = 0; j < count; j++) tokens[j] = (int32_t)((*position + 1 + j) % fake->model->shape.vocab);
  *position += count;
  fake->committed += count;
  struct us_rounds_report report = {.sequence = i,
                                    .round = fake->round,
                                    .tokens = tokens,
                                    .count = count,
                                    .drafts = s->drafts,
                                    .accepted = count - 1,
                                    .time = fake->clock};
  *cancelled |= !rounds->on_round(rounds->arg, &report);
  return *position < s->limit;
}

static enum us_status run_rounds(struct us_executor *ex, struct us_rounds *rounds, struct us_err *err) {
  struct fake *fake = (struct fake *)ex;
  uint32_t position[US_ENGINE_SEQUENCES];
  bool cancelled = false, ends = false;
  fake->calls++;
  ck_assert(rounds->n && rounds->n <= rounds->batch);
  for (uint32_t i = 0; i < rounds->n; i++) {
    const struct us_rounds_sequence *s = &rounds->sequences[i];
    position[i] = s->position;
    ck_assert_int_eq(s->anchor, (int32_t)(s->position % fake->model->shape.vocab));
    ck_assert_uint_lt(s->position, s->limit);
  }
  for (uint32_t round = 0; !ends && round < LONGEST; round++) {
    struct timespec pause = {.tv_nsec = 200000};
    nanosleep(&pause, NULL);
    ends = cancelled;
    fake->clock += 1000000, fake->round++;
    for (uint32_t i = 0; i < rounds->n; i++) ends |= !step(fake, rounds, i, &position[i], &cancelled);
  }
  return US_OK;
}

static void end(struct us_executor *ex) {
  us_model_free(((struct fake *)ex)->model);
  us_draft_free(((struct fake *)ex)->draft);
}

static const struct us_executor_ops ops = {.forward = forward, .free = end, .rounds = run_rounds};

static struct fake make(bool drafting) {
  struct us_shape shape = small_shape(16);
  struct us_draft_shape draft = small_draft_shape(16);
  struct fake fake = {.base = {.ops = &ops, .name = "fake", .makes_context = true}};
  struct us_err err = {0};
  ck_assert_msg(us_weights_skeleton(&shape, drafting ? &draft : NULL, &fake.model, &fake.draft, &err) ==
                    US_OK,
                "%s", err.message);
  fake.base.model = fake.model, fake.base.draft = fake.draft;
  return fake;
}

static const struct us_arrival load[] = {{0, 5, 1},         {0, 700, 30},   {0, 40, 7},
                                         {0.004, 512, 250}, {0.006, 3, 90}, {0.03, 8, 2}};
#define LOAD (sizeof load / sizeof *load)

static struct us_arrivals_result serve(struct fake *fake, uint32_t batch, uint32_t block) {
  struct us_arrivals_options options = {.batch = batch, .block = block, .seed = 1};
  struct us_arrivals_result result;
  struct us_err err = {0};
  ck_assert_msg(us_arrivals_serve(&fake->base, load, LOAD, &options, &result, &err) == US_OK, "%s",
                err.message);
  ck_assert_uint_eq(result.requests, LOAD);
  ck_assert_uint_eq(result.prompt_tokens, 1268);
  ck_assert_uint_eq(fake->prompt_rows, 1268);
  ck_assert_uint_eq(result.output_tokens, 380);
  ck_assert_uint_eq(fake->committed, 380 - LOAD); /* prompts give the first tokens */
  ck_assert_uint_le(result.most_together, batch);
  ck_assert_double_ge(result.seconds, 0.03);
  ck_assert(result.first_token.p50 > 0 && result.request.p99 >= result.request.p50);
  ck_assert_double_ge(result.request.p99, result.first_token.p99);
  return result;
}

START_TEST(everybody_gets_an_answer_of_the_recorded_length) {
  struct fake fake = make(true);
  struct us_arrivals_result result = serve(&fake, 2, 4);
  ck_assert_uint_eq(result.most_together, 2);
  ck_assert_uint_lt(result.steps, 374);                     /* two tokens a round but at ends */
  ck_assert_double_eq_tol(result.token.p50, 0.0005, 1e-12); /* a round of 1 ms, two tokens */
  ck_assert_uint_gt(fake.calls, 3);
  end(&fake.base);
}
END_TEST

START_TEST(one_place_serves_one_after_the_other) {
  struct fake fake = make(false);
  struct us_arrivals_result result = serve(&fake, 1, 1);
  ck_assert_uint_eq(result.most_together, 1);
  ck_assert_uint_eq(result.steps, 374);
  ck_assert_double_eq_tol(result.token.p99, 0.001, 1e-12);
  end(&fake.base);
}
END_TEST

START_TEST(what_cannot_be_served_is_refused) {
  struct fake fake = make(false);
  struct us_kv_memory memory = {.max_positions = 700};
  struct us_executor_ops no_rounds = {.forward = forward};
  struct us_arrivals_options blocks = {.batch = 1, .block = 4}, many = {.batch = 9, .block = 1},
                             one = {.batch = 1, .block = 1};
  struct us_arrivals_result result;
  struct us_err err = {0};
  ck_assert_int_eq(us_arrivals_serve(&fake.base, load, LOAD, &blocks, &result, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_arrivals_serve(&fake.base, load, LOAD, &many, &result, &err), US_ERR_USAGE);
  fake.base.kv_memory = &memory;
  ck_assert_int_eq(us_arrivals_serve(&fake.base, load, LOAD, &one, &result, &err), US_ERR_USAGE);
  ck_assert_ptr_nonnull(strstr(err.message, "778 positions"));
  fake.base.kv_memory = NULL, fake.base.ops = &no_rounds;
  ck_assert_int_eq(us_arrivals_serve(&fake.base, load, LOAD, &one, &result, &err), US_ERR_USAGE);
  end(&fake.base);
}
END_TEST

#define HEADER "prompt_tokens\tarrival_ms\toutput_tokens\n"

/* The status of reading these bytes; the message, or the arrivals. */
static enum us_status read_load(const char *bytes, size_t size, struct us_arrival **ret_arrivals,
                                size_t *ret_n, struct us_err *err) {
  char path[] = "/tmp/us_arrivals_XXXXXX";
  int file = mkstemp(path);
  ck_assert_int_ge(file, 0);
  ck_assert_int_eq(write(file, bytes, size), (ssize_t)size);
  close(file);
  enum us_status status = us_arrivals_read(path, ret_arrivals, ret_n, err);
  unlink(path);
  return status;
}

START_TEST(a_load_is_read_by_the_names_of_its_columns) {
  static const char text[] = HEADER "\r\n7\t1000\t9\r\n\n1048576\t1500.5\t1";
  struct us_arrival *arrivals;
  size_t n = 0;
  struct us_err err = {0};
  ck_assert_msg(read_load(text, sizeof text - 1, &arrivals, &n, &err) == US_OK, "%s", err.message);
  ck_assert_uint_eq(n, 2);
  ck_assert(arrivals[0].seconds == 0 && arrivals[0].prompt_tokens == 7 && arrivals[0].output_tokens == 9);
  ck_assert_double_eq(arrivals[1].seconds, 0.5005);
  ck_assert_uint_eq(arrivals[1].prompt_tokens, 1 << 20);
  ck_assert_uint_eq(us_arrivals_positions(arrivals, n), (1 << 20) + 1 + US_MAX_BLOCK);
  free(arrivals);
}
END_TEST

START_TEST(a_row_that_is_none_is_refused_by_its_line) {
  static const struct {
    const char *text, *says;
    size_t size; /* 0: up to the NUL */
  } cases[] = {
      /* no line feed: one line, however many returns */
      {"prompt_tokens\tarrival_ms\toutput_tokens\r7\t1\t1\r7\t2\t1\r7\t3\t1\r7\t4\t1\r", "line 1", 0},
      {"", "no arrivals", 0},
      {HEADER "\n", "no arrivals", 0},
      {"prompt_tokens\tarrival_ms\n", "line 1: expected", 0},
      {"\nprompt_tokens\tarrival_ms\tarrival_ms\n", "line 2: 'arrival_ms' is not", 0},
      {HEADER "7\t1000\n", "line 2: expected", 0},
      {HEADER "7\t1000\t9\t9\n", "line 2: expected", 0},
      {HEADER "7\t\t1000\t9\n", "line 2: expected", 0},
      {HEADER "\n\n7\t1000\t0\n", "line 4: expected", 0},
      {HEADER "7.5\t1000\t9\n", "line 2: expected", 0},
      {HEADER "1048577\t1000\t9\n", "line 2: expected", 0},
      {HEADER "7\tnan\t9\n", "line 2: expected", 0},
      {HEADER "7\t5\t9\n7\t4\t9\n", "line 3: arrives before", 0},
      {HEADER "7\t5\t9\0008\n7\t6\t9\n", "line 2: has a NUL byte", sizeof HEADER - 1 + 8 + 6}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct us_arrival *arrivals;
    size_t n, size = cases[i].size ? cases[i].size : strlen(cases[i].text);
    struct us_err err = {0};
    ck_assert_msg(read_load(cases[i].text, size, &arrivals, &n, &err) == US_ERR_INPUT, "case %zu", i);
    ck_assert_msg(strstr(err.message, cases[i].says), "case %zu: %s", i, err.message);
    ck_assert_ptr_null(arrivals);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("arrivals");
  tcase_add_test(c, everybody_gets_an_answer_of_the_recorded_length);
  tcase_add_test(c, one_place_serves_one_after_the_other);
  tcase_add_test(c, what_cannot_be_served_is_refused);
  tcase_add_test(c, a_load_is_read_by_the_names_of_its_columns);
  tcase_add_test(c, a_row_that_is_none_is_refused_by_its_line);
  return us_suite("arrivals", c);
}
US_TEST_MAIN(make_suite)
