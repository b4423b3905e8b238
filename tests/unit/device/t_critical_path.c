/* t_critical_path.c: what a round's length consists of, from intervals of two blocks written by hand. */
#include "device/critical_path.h"
#include "suite.h"

#include <stdlib.h>

enum { QKV, ATTENTION, O_PROJ, REDUCE, OPS, BLOCKS = 2, CAPACITY = 64 };

static const struct us_engine_op list[OPS] = {
    {.kind = US_ENGINE_GEMM, .program = US_ENGINE_PASS_TARGET, .task_op = US_TASK_QKV, .wait = REDUCE},
    {.kind = US_ENGINE_ATTENTION,
     .program = US_ENGINE_PASS_TARGET,
     .task_op = US_TASK_ATTENTION,
     .wait = QKV},
    {.kind = US_ENGINE_GEMM, .program = US_ENGINE_PASS_TARGET, .task_op = US_TASK_O_PROJ, .wait = ATTENTION},
    {.kind = US_ENGINE_REDUCE,
     .program = US_ENGINE_PASS_TARGET,
     .task_op = US_TASK_OP_COUNT,
     .wait = US_ENGINE_NONE}};

struct recorded {
  struct us_engine_span spans[BLOCKS][US_ENGINE_ROLES][CAPACITY];
  uint32_t counts[BLOCKS][US_ENGINE_ROLES];
};

/* [from, to) in tenths of a microsecond. */
static void put(struct recorded *r, uint32_t block, uint32_t role, uint32_t op, uint32_t what, int64_t from,
                int64_t to) {
  uint32_t at = r->counts[block][role]++;
  if (at < CAPACITY)
    r->spans[block][role][at] = (struct us_engine_span){.begin = (uint64_t)from * 100,
                                                        .ns = (uint32_t)(to - from) * 100,
                                                        .op = (uint16_t)op,
                                                        .what = (uint16_t)what};
}

/* A round of 50 us. Block 1 has the attention that block 0 waits for, and its sums come last; block 0 has the last tile of o_proj. */
static void record_round(struct recorded *r, int64_t t) {
  put(r, 0, 0, QKV, US_ENGINE_WAIT_DONE, t, t + 10);
  put(r, 0, 0, QKV, US_ENGINE_WAIT_NOTHING, t, t + 100);
  put(r, 0, 0, ATTENTION, US_ENGINE_WAIT_DONE, t + 100, t + 145);
  put(r, 0, 0, ATTENTION, US_ENGINE_WAIT_NOTHING, t + 100, t + 160);
  put(r, 0, 0, O_PROJ, US_ENGINE_WAIT_DONE, t + 160, t + 310);
  put(r, 0, 0, O_PROJ, US_ENGINE_WAIT_NOTHING, t + 160, t + 400);
  put(r, 0, 0, REDUCE, US_ENGINE_WAIT_EXCHANGE, t + 400, t + 420);
  put(r, 0, 0, REDUCE, US_ENGINE_WAIT_NORM, t + 440, t + 470);
  put(r, 0, 0, REDUCE, US_ENGINE_WAIT_NOTHING, t + 400, t + 500);
  put(r, 0, 2, QKV, US_ENGINE_WAIT_NOTHING, t, t + 130);
  put(r, 0, 2, ATTENTION, US_ENGINE_WAIT_NOTHING, t + 130, t + 130);
  put(r, 0, 2, O_PROJ, US_ENGINE_WAIT_NOTHING, t + 130, t + 410);
  put(r, 0, 2, REDUCE, US_ENGINE_WAIT_NOTHING, t + 410, t + 410);

  put(r, 1, 0, QKV, US_ENGINE_WAIT_DONE, t - 10, t + 10);
  put(r, 1, 0, QKV, US_ENGINE_WAIT_STAGE, t + 40, t + 60);
  put(r, 1, 0, QKV, US_ENGINE_WAIT_NOTHING, t - 10, t + 120);
  put(r, 1, 0, ATTENTION, US_ENGINE_WAIT_DONE, t + 120, t + 150);
  put(r, 1, 0, ATTENTION, US_ENGINE_WAIT_NOTHING, t + 120, t + 300);
  put(r, 1, 0, O_PROJ, US_ENGINE_WAIT_DONE, t + 300, t + 310);
  put(r, 1, 0, O_PROJ, US_ENGINE_WAIT_NOTHING, t + 300, t + 380);
  put(r, 1, 0, REDUCE, US_ENGINE_WAIT_EXCHANGE, t + 380, t + 450);
  put(r, 1, 0, REDUCE, US_ENGINE_WAIT_NORM, t + 465, t + 470);
  put(r, 1, 0, REDUCE, US_ENGINE_WAIT_NOTHING, t + 380, t + 490);
  put(r, 1, 2, QKV, US_ENGINE_WAIT_NOTHING, t - 10, t + 140);
  put(r, 1, 2, ATTENTION, US_ENGINE_WAIT_NOTHING, t + 140, t + 140);
  put(r, 1, 2, O_PROJ, US_ENGINE_WAIT_NOTHING, t + 140, t + 390);
  put(r, 1, 2, REDUCE, US_ENGINE_WAIT_NOTHING, t + 390, t + 390);
}

static struct us_breakdown_spans view(const struct recorded *r) {
  return (struct us_breakdown_spans){.ops = list,
                                     .op_count = OPS,
                                     .spans = r->spans[0][0],
                                     .counts = r->counts[0],
                                     .capacity = CAPACITY,
                                     .blocks = BLOCKS,
                                     .ranks = 1};
}

static struct us_critical_path path_of(const struct recorded *r, uint32_t skip) {
  struct us_breakdown_spans spans = view(r);
  struct us_critical_path path = {.skip = skip};
  struct us_err err = {0};
  ck_assert_msg(us_critical_path_gpu(&path, &spans, &err) == US_OK, "%s", err.message);
  us_critical_path_finish(&path);
  return path;
}

static double microseconds(double seconds) {
  return seconds * 1e6;
}

/* Everything of an operation that is on the path. */
static double length(const struct us_critical_op *op) {
  double sum = op->work + op->epilogue;
  for (int wait = 0; wait < US_TRACE_WAITS; wait++) sum += op->wait[wait];
  return sum;
}

#define SAME(seconds, us) ck_assert_double_eq_tol(microseconds(seconds), us, 1e-6)

START_TEST(the_path_leads_through_the_blocks_that_were_last) {
  struct recorded r = {.counts = {{0}}};
  for (int round = 0; round < 3; round++) record_round(&r, 100000 + 500 * round);
  struct us_critical_path path = path_of(&r, 1);
  const struct us_critical_op *op = path.ops[US_PROGRAM_TARGET];
  ck_assert_uint_eq(path.rounds, 2);
  SAME(path.round, 50);
  SAME(op[US_TASK_QKV].work, 9); /* of block 1, whose sums are stored last */
  SAME(op[US_TASK_QKV].epilogue, 2);
  SAME(op[US_TASK_QKV].wait[US_ENGINE_WAIT_STAGE], 2);
  SAME(op[US_TASK_QKV].wait[US_ENGINE_WAIT_DONE], 1);
  SAME(op[US_TASK_ATTENTION].work, 15);
  SAME(op[US_TASK_ATTENTION].wait[US_ENGINE_WAIT_DONE], 1);
  SAME(op[US_TASK_O_PROJ].work, 9); /* of block 0: it waits 15 us, of which 1 is the hand-off */
  SAME(op[US_TASK_O_PROJ].epilogue, 1);
  SAME(op[US_TASK_O_PROJ].wait[US_ENGINE_WAIT_DONE], 1);
  SAME(op[US_TASK_OP_COUNT].work, 3);
  SAME(op[US_TASK_OP_COUNT].wait[US_ENGINE_WAIT_NORM], 2);     /* block 1 publishes at 45 */
  SAME(op[US_TASK_OP_COUNT].wait[US_ENGINE_WAIT_EXCHANGE], 4); /* block 0 pushes at 41 */
  for (int task = 0; task <= US_TASK_OP_COUNT; task++)
    ck_assert_double_eq_tol(op[task].visits, length(&op[task]) > 0, 1e-9);
}
END_TEST

START_TEST(the_pieces_add_up_to_the_rounds) {
  struct recorded r = {.counts = {{0}}};
  int64_t t = 100000;
  for (int round = 0; round < 3; round++, t += 500 + 37) record_round(&r, t); /* 3.7 us between rounds */
  struct us_critical_path path = path_of(&r, 0);
  double sum = 0;
  for (int program = 0; program < US_PROGRAM_KINDS; program++)
    for (int task = 0; task <= US_TASK_OP_COUNT; task++) sum += length(&path.ops[program][task]);
  SAME(sum, microseconds(path.round));
  SAME(path.round, (3 * 50 + 2 * 3.7 + 1) / 3); /* block 1 began 1 us before the first round's 0 */
  SAME(path.ops[US_PROGRAM_TARGET][US_TASK_OP_COUNT].wait[US_ENGINE_WAIT_ROUND], 2 * 3.7 / 3);
}
END_TEST

START_TEST(ranks_on_one_gpu_wait_for_their_own_blocks) {
  struct recorded r = {.counts = {{0}}};
  for (int round = 0; round < 3; round++) record_round(&r, 100000 + 500 * round);
  struct us_breakdown_spans spans = view(&r);
  struct us_critical_path path = {.skip = 1};
  spans.ranks = 2;
  ck_assert_int_eq(us_critical_path_gpu(&path, &spans, NULL), US_OK);
  us_critical_path_finish(&path);
  const struct us_critical_op *op = path.ops[US_PROGRAM_TARGET];
  /* Block 0 alone: it did its attention at 16, so its o_proj waited 15 us for nobody of its rank. */
  SAME(op[US_TASK_O_PROJ].wait[US_ENGINE_WAIT_DONE], 15);
  SAME(op[US_TASK_ATTENTION].work, 1.5);
  SAME(path.round, 50);
}
END_TEST

START_TEST(rounds_whose_spans_found_no_room_are_refused) {
  struct recorded r = {.counts = {{0}}};
  for (int round = 0; round < 10; round++) record_round(&r, 100000 + 500 * round); /* 100 of 64 */
  struct us_breakdown_spans spans = view(&r);
  struct us_critical_path path = {.skip = 1}, none = {.skip = 6};
  struct us_err err = {0};
  ck_assert_int_eq(us_critical_path_gpu(&path, &spans, &err), US_OK);
  ck_assert_uint_eq(path.rounds, 5);
  us_critical_path_finish(&path);
  SAME(path.round, 50);
  ck_assert_int_eq(us_critical_path_gpu(&none, &spans, &err), US_ERR_CHECK);
  ck_assert_str_eq(err.message, "64 spans a role of a block are too few for 7 rounds");
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("critical_path");
  tcase_add_test(c, the_path_leads_through_the_blocks_that_were_last);
  tcase_add_test(c, the_pieces_add_up_to_the_rounds);
  tcase_add_test(c, ranks_on_one_gpu_wait_for_their_own_blocks);
  tcase_add_test(c, rounds_whose_spans_found_no_room_are_refused);
  return us_suite("critical_path", c);
}
US_TEST_MAIN(make_suite)
