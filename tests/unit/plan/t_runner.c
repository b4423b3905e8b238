/* t_runner.c: claiming in order by many workers. Run under TSan too.
 *
 * Independent truth: the body itself checks, through plain (non-atomic) cells that only correct ordering makes safe, that
 * every task its events stand for has run; a data race here is what ThreadSanitizer reports.
 */
#include "plan/lower.h"
#include "plan/runner.h"
#include "suite.h"

#include <string.h>

static struct us_shape small_shape(void) {
  struct us_attention_shape attention = {
      .q_heads = 8, .kv_heads = 4, .qk_dim = 64, .v_dim = 32, .rotary_dim = 32, .rope_theta = 1e4};
  struct us_shape s = {.layers = 3,
                       .hidden = 256,
                       .vocab = 512,
                       .full = attention,
                       .swa = attention,
                       .dense_inner = 256,
                       .expert_inner = 128,
                       .experts = 8,
                       .top_k = 2};
  s.moe_layer[1] = s.moe_layer[2] = 1;
  s.precision = (struct us_precision){US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_BF16,
                                      US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_F32,  US_FORMAT_BF16};
  return s;
}

struct pass {
  const struct us_program *program;
  uint32_t *done; /* (task_count) how often the task ran */
  bool wrong;
};

static uint64_t body(void *arg, const struct us_task *task, int worker) {
  struct pass *pass = arg;
  size_t index = (size_t)(task - pass->program->tasks);
  for (int w = 0; w < US_TASK_WAITS; w++) {
    if (task->waits[w] == US_EVENT_NONE) continue;
    for (size_t i = 0; i < index; i++)
      if (pass->program->tasks[i].signal == task->waits[w] && pass->done[i] != 1) pass->wrong = true;
  }
  pass->done[index]++;
  return task->bytes;
}

static void run_with(int threads, struct us_trace *trace) {
  struct us_shape shape = small_shape();
  struct us_program *program;
  ck_assert_int_eq(us_lower_target(&shape, &(struct us_lower_options){.rows = 4, .tile = 32}, &program, NULL),
                   US_OK);
  struct us_pool *pool;
  ck_assert_int_eq(us_pool_create(threads, &pool, NULL), US_OK);
  struct us_runner runner = {.trace = trace};
  struct pass pass = {.program = program, .done = calloc(program->task_count, sizeof *pass.done)};
  for (int round = 1; round <= 20; round++) {
    memset(pass.done, 0, program->task_count * sizeof *pass.done);
    ck_assert_int_eq(us_runner_run(&runner, program, pool, body, &pass, NULL), US_OK);
    ck_assert(!pass.wrong);
    for (size_t i = 0; i < program->task_count; i++) ck_assert_uint_eq(pass.done[i], 1);
  }
  if (trace) ck_assert_uint_eq(us_trace_count(trace) + us_trace_dropped(trace), 20 * program->task_count);
  us_runner_release(&runner);
  us_pool_free(pool);
  us_program_free(program);
  free(pass.done);
}

START_TEST(every_task_runs_once_and_after_its_events) {
  for (int threads = 1; threads <= 4; threads++) run_with(threads, NULL);
}
END_TEST

START_TEST(a_trace_keeps_spans_in_order_and_counts_what_it_drops) {
  struct us_trace *trace;
  ck_assert_int_eq(us_trace_create(100, &trace, NULL), US_OK);
  run_with(2, trace);
  ck_assert_uint_eq(us_trace_count(trace), 100);
  for (size_t i = 0; i < 100; i++) {
    const struct us_span *span = us_trace_span(trace, i);
    ck_assert_uint_le(span->claimed, span->start);
    ck_assert_uint_le(span->start, span->end);
    ck_assert_uint_lt(span->worker, 2);
  }
  us_trace_free(trace);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("runner");
  tcase_add_test(c, every_task_runs_once_and_after_its_events);
  tcase_add_test(c, a_trace_keeps_spans_in_order_and_counts_what_it_drops);
  return us_suite("runner", c);
}
US_TEST_MAIN(make_suite)
