/* t_measure.c: what bytes, spans and times of rounds come to, from lists and intervals written by hand. */
#include "device/arrivals.h"
#include "device/breakdown.h"
#include "device/traffic.h"
#include "suite.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- bytes --------------------------------------------------------------------------------------------------------- */

/* Projection, attention over a window and over everything, one MoE layer of two row tiles, the end of a round. */
static const struct us_engine_op list[] = {
    {.kind = US_ENGINE_GEMM, .program = US_ENGINE_PASS_TARGET, .task_op = US_TASK_QKV, .bytes = 1000},
    {.kind = US_ENGINE_ATTENTION,
     .program = US_ENGINE_PASS_TARGET,
     .task_op = US_TASK_ATTENTION,
     .attention = {.G = 2, .Q = 24, .V = 16, .window = 100}},
    {.kind = US_ENGINE_ATTENTION,
     .program = US_ENGINE_PASS_TARGET,
     .task_op = US_TASK_ATTENTION,
     .layer = 1,
     .attention = {.G = 2, .Q = 24, .V = 16}},
    {.kind = US_ENGINE_ATTENTION,
     .program = US_ENGINE_PASS_TARGET,
     .task_op = US_TASK_ATTENTION,
     .layer = 1,
     .row_tile = 1,
     .attention = {.G = 2, .Q = 24, .V = 16}},
    {.kind = US_ENGINE_GEMM,
     .program = US_ENGINE_PASS_TARGET,
     .task_op = US_TASK_EXPERT_UP,
     .bytes = 20,
     .gemm = {.experts = true}},
    {.kind = US_ENGINE_DOWN, .program = US_ENGINE_PASS_TARGET, .task_op = US_TASK_EXPERT_DOWN, .bytes = 10},
    {.kind = US_ENGINE_GEMM,
     .program = US_ENGINE_PASS_TARGET,
     .task_op = US_TASK_EXPERT_UP,
     .row_tile = 1,
     .bytes = 20,
     .gemm = {.experts = true}},
    {.kind = US_ENGINE_DOWN,
     .program = US_ENGINE_PASS_TARGET,
     .task_op = US_TASK_EXPERT_DOWN,
     .row_tile = 1,
     .bytes = 10},
    {.kind = US_ENGINE_ACCEPT, .program = US_ENGINE_PASS_TARGET, .task_op = US_TASK_OP_COUNT}};
#define LIST (sizeof list / sizeof *list)

START_TEST(expert_bytes_count_for_every_active_expert) {
  struct us_device_traffic t;
  us_device_traffic(list, 0, LIST, &t);
  ck_assert_uint_eq(t.always, 1000);
  ck_assert_uint_eq(t.per_expert, 60);
  ck_assert_uint_eq(t.by_task[US_TASK_EXPERT_UP], 40);
  ck_assert(t.of_experts[US_TASK_EXPERT_DOWN] && !t.of_experts[US_TASK_QKV]);
  ck_assert_double_eq(us_device_traffic_bytes(&t, 2.5), 1150);
}
END_TEST

START_TEST(a_window_reads_no_more_keys_than_it_sees) {
  /* K padded to 32 columns, V, bf16; two heads; the second row tile belongs to the same sequences */
  uint64_t key = 2 * (32 + 16) * 2;
  ck_assert_uint_eq(us_device_kv_bytes(list, 0, LIST, 3, 50), 3 * (50 + 50) * key);
  ck_assert_uint_eq(us_device_kv_bytes(list, 0, LIST, 3, 5000), 3 * (100 + 5000) * key);
}
END_TEST

/* ---- figures ------------------------------------------------------------------------------------------------------- */

START_TEST(quantiles_are_of_the_weight) {
  struct us_bench_sample samples[] = {{4, 1}, {1, 90}, {3, 4}, {2, 5}};
  struct us_bench_spread s = us_bench_spread_of(samples, 4);
  ck_assert_double_eq_tol(s.mean, 1.16, 1e-12);
  ck_assert_double_eq(s.p50, 1);
  ck_assert_double_eq(s.p95, 2);
  ck_assert_double_eq(s.p99, 3);
}
END_TEST

START_TEST(a_replay_records_what_its_rates_come_to) {
  float rates[] = {0.5f, 1.0f};
  struct us_bench_options o = {
      .block = 4, .context = 100, .rounds = 90, .warmup = 10, .accept = rates, .accept_count = 2};
  ck_assert_uint_eq(us_bench_replayed(&o),
                    291); /* 1 + 0.5 + 0.5 + 0.5 tokens a round, 110 rounds, and 4 blocks */
  ck_assert_uint_eq(us_bench_positions(&o), 100 + 291 + US_MAX_BLOCK);
  o.accept = NULL;
  ck_assert_uint_eq(us_bench_positions(&o), 100 + 102 * 4 + US_MAX_BLOCK);
}
END_TEST

/* ---- spans --------------------------------------------------------------------------------------------------------- */

#define CAPACITY 16

/* One block, three rounds of a projection (operation 0: 10 us, of that 2 hand-off and 3 ring empty) and the end of the round
 * (operation 8: 4 us, of that 1 select); the stream role meets a full ring for 5 us. Waits stand before their operation: they
 * end first. */
struct recorded {
  struct us_engine_span spans[US_ENGINE_ROLES][CAPACITY];
  uint32_t counts[US_ENGINE_ROLES];
};

static void put(struct recorded *r, uint32_t role, uint32_t op, uint32_t what, uint64_t begin, uint64_t us) {
  uint32_t at = r->counts[role]++;
  if (at < CAPACITY)
    r->spans[role][at] = (struct us_engine_span){
        .begin = begin, .ns = (uint32_t)us * 1000, .op = (uint16_t)op, .what = (uint16_t)what};
}

static struct recorded record(uint32_t rounds) {
  struct recorded r = {.counts = {0}};
  for (uint32_t i = 0; i < rounds; i++) {
    uint64_t t = 5000000 + 14000 * i;
    put(&r, 0, 0, US_ENGINE_WAIT_DONE, t, 2);
    put(&r, 0, 0, US_ENGINE_WAIT_STAGE, t + 3000, 3);
    put(&r, 0, 0, US_ENGINE_WAIT_NOTHING, t, 10);
    put(&r, 0, 8, US_ENGINE_WAIT_SELECT, t + 10000, 1);
    put(&r, 0, 8, US_ENGINE_WAIT_NOTHING, t + 10000, 4);
    put(&r, 1, 0, US_ENGINE_WAIT_FREE, t, 5);
    put(&r, 1, 0, US_ENGINE_WAIT_NOTHING, t, 9);
    put(&r, 1, 8, US_ENGINE_WAIT_NOTHING, t + 9000, 0);
  }
  return r;
}

static struct us_breakdown_spans view(const struct recorded *r) {
  return (struct us_breakdown_spans){.ops = list,
                                     .op_count = LIST,
                                     .spans = r->spans[0],
                                     .counts = r->counts,
                                     .capacity = CAPACITY,
                                     .blocks = 1,
                                     .ranks = 1};
}

START_TEST(a_round_is_split_into_streaming_other_work_and_waits) {
  struct recorded r = record(3);
  struct us_breakdown_spans spans = view(&r);
  struct us_breakdown b = {.skip = 1};
  ck_assert_int_eq(us_breakdown_gpu(&b, &spans, NULL), US_OK);
  us_breakdown_finish(&b);
  const struct us_breakdown_op *qkv = &b.ops[US_PROGRAM_TARGET][US_TASK_QKV];
  ck_assert_uint_eq(b.rounds, 2);
  ck_assert_double_eq_tol(b.round, 14e-6, 1e-12);
  ck_assert_double_eq_tol(b.streaming, 8e-6, 1e-12); /* 5 of multiplying, 3 of waiting for weights */
  ck_assert_double_eq_tol(b.vectors, 3e-6, 1e-12);
  ck_assert_double_eq_tol(b.wait[US_ENGINE_WAIT_DONE], 2e-6, 1e-12);
  ck_assert_double_eq_tol(b.wait[US_ENGINE_WAIT_SELECT], 1e-6, 1e-12);
  ck_assert_double_eq(b.wait[US_ENGINE_WAIT_STAGE], 0);
  ck_assert_double_eq_tol(qkv->time, 10e-6, 1e-12);
  ck_assert_double_eq_tol(qkv->wait[US_ENGINE_WAIT_STAGE], 3e-6, 1e-12);
  ck_assert_double_eq_tol(qkv->ring_full, 5e-6, 1e-12);
  ck_assert_double_eq_tol(qkv->ramp, 3e-6, 1e-12); /* it asks 1 us behind its input */
  ck_assert(qkv->weights && !b.ops[US_PROGRAM_TARGET][US_TASK_OP_COUNT].weights);
}
END_TEST

START_TEST(rounds_whose_spans_found_no_room_do_not_count) {
  struct recorded r = record(5); /* 25 spans of the compute role: the fourth round has lost its end */
  struct us_breakdown_spans spans = view(&r);
  struct us_breakdown b = {.skip = 1}, none = {.skip = 3};
  struct us_err err = {0};
  ck_assert_int_eq(us_breakdown_gpu(&b, &spans, NULL), US_OK);
  us_breakdown_finish(&b);
  ck_assert_uint_eq(b.rounds, 2);
  ck_assert_uint_eq(b.dropped, 25 - CAPACITY);
  ck_assert_double_eq_tol(b.round, 14e-6, 1e-12);
  ck_assert_int_eq(us_breakdown_gpu(&none, &spans, &err), US_ERR_CHECK);
}
END_TEST

START_TEST(a_trace_holds_roles_waits_and_passes) {
  struct recorded r = record(2);
  struct us_breakdown_spans spans = view(&r);
  struct us_trace *trace;
  ck_assert_int_eq(us_trace_create(64, &trace, NULL), US_OK);
  us_breakdown_trace(&spans, 3, 0, us_breakdown_origin(&spans), 2, trace);
  ck_assert_uint_eq(us_trace_count(trace), 16);
  const struct us_span *wait = us_trace_span(trace, 0), *second = us_trace_span(trace, 5),
                       *stream = us_trace_span(trace, 11);
  ck_assert_uint_eq(wait->start, 0);
  ck_assert_uint_eq(wait->end, 2000);
  ck_assert_uint_eq(wait->wait, US_ENGINE_WAIT_DONE);
  ck_assert_uint_eq(wait->role, US_TRACE_COMPUTE);
  ck_assert_uint_eq(wait->worker, 3 * US_TRACE_BLOCKS);
  ck_assert_uint_eq(second->start, 14000);
  ck_assert_uint_eq(second->pass, wait->pass + US_ENGINE_PASSES);
  ck_assert_uint_eq(stream->role, US_TRACE_STREAM);
  ck_assert_uint_eq(stream->bytes, 1000);
  us_trace_free(trace);
}
END_TEST

/* ---- loads --------------------------------------------------------------------------------------------------------- */

static enum us_status read_load(const char *text, struct us_arrival **arrivals, size_t *n,
                                struct us_err *err) {
  char path[] = "us_t_measure_XXXXXX";
  int fd = mkstemp(path);
  ck_assert_int_ge(fd, 0);
  ck_assert_int_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
  close(fd);
  enum us_status status = us_arrivals_read(path, arrivals, n, err);
  unlink(path);
  return status;
}

START_TEST(a_load_starts_with_its_first_arrival) {
  struct us_arrival *a;
  size_t n;
  struct us_err err = {0};
  const char *text = "prompt_tokens\tarrival_ms\toutput_tokens\n10\t2000\t5\n700\t2000.5\t1\n20\t4000\t30\n";
  ck_assert_msg(read_load(text, &a, &n, &err) == US_OK, "%s", err.message);
  ck_assert_uint_eq(n, 3);
  ck_assert_double_eq(a[0].seconds, 0);
  ck_assert_double_eq_tol(a[1].seconds, 0.0005, 1e-12);
  ck_assert_double_eq(a[2].seconds, 2);
  ck_assert_uint_eq(a[1].prompt_tokens, 700);
  ck_assert_uint_eq(a[2].output_tokens, 30);
  ck_assert_uint_eq(us_arrivals_positions(a, n), 701 + US_MAX_BLOCK);
  free(a);
}
END_TEST

static const struct {
  const char *text, *expect;
} bad_loads[] = {
    {"", "no arrivals"},
    {"arrival_ms\tprompt_tokens\toutput_tokens\n", "no arrivals"},
    {"arrival_ms\tprompt_tokens\n1\t2\n", "line 1: expected"},
    {"arrival_ms\tprompt_tokens\ttokens\n", "line 1: 'tokens'"},
    {"arrival_ms\tarrival_ms\toutput_tokens\n", "line 1: 'arrival_ms'"},
    {"arrival_ms\tprompt_tokens\toutput_tokens\n1\t2\n", "line 2"},
    {"arrival_ms\tprompt_tokens\toutput_tokens\n1\t2\t3\t4\n", "line 2"},
    {"arrival_ms\tprompt_tokens\toutput_tokens\n1\t0\t3\n", "line 2"},
    {"arrival_ms\tprompt_tokens\toutput_tokens\n1\t2\tx\n", "line 2"},
    {"arrival_ms\tprompt_tokens\toutput_tokens\n1\t2\tnan\n", "line 2"},
    {"arrival_ms\tprompt_tokens\toutput_tokens\n-1\t2\t3\n", "line 2"},
    {"arrival_ms\tprompt_tokens\toutput_tokens\n5\t2\t3\n4\t2\t3\n", "line 3: arrives before"},
};

START_TEST(a_load_that_cannot_be_read_names_the_line) {
  struct us_arrival *a;
  size_t n;
  struct us_err err = {0};
  ck_assert_int_eq(read_load(bad_loads[_i].text, &a, &n, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, bad_loads[_i].expect) != NULL, "%s", err.message);
  ck_assert_ptr_null(a);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("measure");
  tcase_add_test(c, expert_bytes_count_for_every_active_expert);
  tcase_add_test(c, a_window_reads_no_more_keys_than_it_sees);
  tcase_add_test(c, quantiles_are_of_the_weight);
  tcase_add_test(c, a_replay_records_what_its_rates_come_to);
  tcase_add_test(c, a_round_is_split_into_streaming_other_work_and_waits);
  tcase_add_test(c, rounds_whose_spans_found_no_room_do_not_count);
  tcase_add_test(c, a_trace_holds_roles_waits_and_passes);
  tcase_add_test(c, a_load_starts_with_its_first_arrival);
  tcase_add_loop_test(c, a_load_that_cannot_be_read_names_the_line, 0, sizeof bad_loads / sizeof *bad_loads);
  return us_suite("measure", c);
}
US_TEST_MAIN(make_suite)
