/* t_plan.c: lowering, the static checker and its mutations, and the byte count.
 *
 * Independent truth: the roofline table of MiMo-V2.5-Pro in decimal GB (docs/perf.md), derived from its published tensor
 * shapes; and programs broken by hand, each of which the checker must refuse.
 */
#include "plan/check.h"
#include "plan/lower.h"
#include "plan/price.h"
#include "plan/roofline.h"
#include "suite.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static struct us_attention_shape attention(uint32_t H, uint32_t G, uint32_t window) {
  return (struct us_attention_shape){.q_heads = H,
                                     .kv_heads = G,
                                     .qk_dim = 192,
                                     .v_dim = 128,
                                     .rotary_dim = 64,
                                     .rope_theta = 1e7,
                                     .window = window,
                                     .sink = window > 0};
}

static struct us_shape pro_shape(void) {
  struct us_shape s = {.name = "mimo-v2.5-pro",
                       .layers = 70,
                       .hidden = 6144,
                       .vocab = 152576,
                       .full = attention(128, 8, 0),
                       .swa = attention(128, 8, 128),
                       .dense_inner = 16384,
                       .expert_inner = 2048,
                       .experts = 384,
                       .top_k = 8,
                       .norm_topk_prob = true,
                       .routed_scaling = 1,
                       .norm_eps = 1e-5,
                       .value_scale = 0.612,
                       .qkv_chunks = 8,
                       .max_positions = 1 << 20};
  static const uint8_t full[] = {0, 7, 15, 23, 31, 39, 47, 55, 62, 69};
  memset(s.swa_layer, 1, s.layers);
  for (size_t i = 0; i < sizeof full; i++) s.swa_layer[full[i]] = 0;
  memset(s.moe_layer + 1, 1, s.layers - 1);
  s.precision = (struct us_precision){.embed = US_FORMAT_BF16,
                                      .head = US_FORMAT_BF16,
                                      .qkv = US_FORMAT_FP8,
                                      .o_proj = US_FORMAT_BF16,
                                      .dense = US_FORMAT_FP8,
                                      .experts = US_FORMAT_MXFP4,
                                      .router = US_FORMAT_F32,
                                      .draft = US_FORMAT_BF16};
  return s;
}

/* Four layers with every kind of layer, small enough that mutations of every task can be tried. */
static struct us_shape small_shape(void) {
  struct us_shape s = pro_shape();
  s.layers = 4, s.hidden = 256, s.vocab = 512, s.dense_inner = 512, s.expert_inner = 256, s.experts = 16,
  s.top_k = 2;
  s.full = attention(8, 4, 0), s.swa = attention(8, 8, 32);
  s.qkv_chunks = 4;
  return s;
}

static struct us_program *lower(const struct us_shape *shape, uint32_t ranks, uint32_t rows) {
  struct us_program *program = NULL;
  struct us_err err = {0};
  ck_assert_msg(us_lower_target(shape, &(struct us_lower_options){.ranks = ranks, .rows = rows}, &program,
                                &err) == US_OK,
                "%s", err.message);
  return program;
}

static enum us_status check(const struct us_program *program) {
  struct us_err err = {0};
  enum us_status status = us_program_check(program, &err);
  if (status != US_OK) ck_assert_uint_gt(strlen(err.message), 10);
  return status;
}

START_TEST(programs_of_every_rank_and_row_count_pass) {
  struct us_shape shape = small_shape();
  static const uint32_t ranks[] = {1, 2, 4}, rows[] = {1, 3, 8, 16};
  for (size_t i = 0; i < 3; i++)
    for (size_t j = 0; j < 4; j++) {
      struct us_program *program = lower(&shape, ranks[i], rows[j]);
      struct us_err err = {0};
      ck_assert_msg(us_program_check(program, &err) == US_OK, "ranks %u rows %u: %s", ranks[i], rows[j],
                    err.message);
      us_program_free(program);
    }
}
END_TEST

START_TEST(the_trillion_parameter_program_passes_on_eight_ranks) {
  struct us_shape shape = pro_shape();
  struct us_program *program = lower(&shape, 8, 8);
  ck_assert_int_eq(check(program), US_OK);
  us_program_free(program);
}
END_TEST

static struct us_draft_shape small_draft_shape(void) {
  return (struct us_draft_shape){.layers = 3,
                                 .hidden = 256,
                                 .vocab = 512,
                                 .inner = 512,
                                 .attention = attention(8, 4, 64),
                                 .block = 8,
                                 .taps = 3};
}

START_TEST(draft_and_context_programs_pass) {
  struct us_shape target = small_shape();
  struct us_draft_shape draft = small_draft_shape();
  struct us_lower_options options = {.ranks = 2, .rows = 8};
  struct us_program *program;
  ck_assert_int_eq(us_lower_draft(&draft, &target, &options, &program, NULL), US_OK);
  ck_assert_int_eq(check(program), US_OK);
  us_program_free(program);
  ck_assert_int_eq(us_lower_context(&draft, &target, &options, &program, NULL), US_OK);
  ck_assert_int_eq(check(program), US_OK);
  us_program_free(program);
}
END_TEST

START_TEST(a_dropped_wait_is_a_race_whichever_task_loses_it) {
  struct us_shape shape = small_shape();
  struct us_program *program = lower(&shape, 2, 8);
  for (size_t i = 0; i < program->task_count; i++) {
    uint32_t wait = program->tasks[i].waits[0];
    if (wait == US_EVENT_NONE) continue;
    program->tasks[i].waits[0] = US_EVENT_NONE;
    ck_assert_msg(check(program) == US_ERR_CHECK, "task %zu (%s) without its wait passes", i,
                  us_task_op_name(program->tasks[i].op));
    program->tasks[i].waits[0] = wait;
  }
  ck_assert_int_eq(check(program), US_OK);
  us_program_free(program);
}
END_TEST

/* A changed copy of a task, and how it was changed. */
struct change {
  const char *what;
  struct us_task task;
};

static size_t changes_of(const struct us_program *p, const struct us_task *task, struct change *changes) {
  size_t n = 0;
#define CHANGE(field, value)                                                                                 \
  do {                                                                                                       \
    changes[n] = (struct change){#field " = " #value, *task};                                                \
    changes[n].task.field = (value);                                                                         \
    n += memcmp(&changes[n].task, task, sizeof *task) != 0;                                                  \
  } while (0)
  CHANGE(begin, task->begin - 1);
  CHANGE(begin, task->begin + 1);
  CHANGE(begin, task->end);
  CHANGE(end, task->end - 1);
  CHANGE(end, task->end + 1);
  CHANGE(rank, (uint16_t)(task->rank + 1));
  CHANGE(rank, (uint16_t)((task->rank + 1) % p->ranks));
  CHANGE(layer, US_LAYER_NONE);
  CHANGE(layer, task->layer + 1);
  CHANGE(layer, task->layer - 1);
  CHANGE(layer, p->dims.layers);
  CHANGE(slot, task->slot + 1);
  CHANGE(slot, task->slot ^ 1);
  CHANGE(signal, US_EVENT_NONE);
  CHANGE(signal, task->signal + 1);
  CHANGE(signal, p->event_count);
  CHANGE(waits[0], task->waits[0] - 1);
  CHANGE(waits[1], p->event_count);
  for (uint16_t op = 0; op <= US_TASK_OP_COUNT; op++) CHANGE(op, op);
#undef CHANGE
  return n;
}

static void refuse_every_change(struct us_program *program) {
  struct change changes[18 + US_TASK_OP_COUNT + 1];
  ck_assert_int_eq(check(program), US_OK);
  for (size_t i = 0; i < program->task_count; i++) {
    struct us_task task = program->tasks[i];
    for (size_t j = changes_of(program, &task, changes); j-- > 0;) {
      program->tasks[i] = changes[j].task;
      ck_assert_msg(check(program) == US_ERR_CHECK, "task %zu (%s) with %s passes", i,
                    us_task_op_name(task.op), changes[j].what);
    }
    program->tasks[i] = task;
  }
  us_program_free(program);
}

START_TEST(a_task_with_any_field_changed_is_refused) {
  struct us_shape shape = small_shape();
  for (uint32_t ranks = 1; ranks <= 2; ranks++) refuse_every_change(lower(&shape, ranks, 3));
}
END_TEST

START_TEST(a_drafters_task_with_any_field_changed_is_refused) {
  struct us_shape target = small_shape();
  struct us_draft_shape draft = small_draft_shape();
  struct us_lower_options options = {.ranks = 2, .rows = 8};
  struct us_program *program;
  ck_assert_int_eq(us_lower_draft(&draft, &target, &options, &program, NULL), US_OK);
  refuse_every_change(program);
  ck_assert_int_eq(us_lower_context(&draft, &target, &options, &program, NULL), US_OK);
  refuse_every_change(program);
}
END_TEST

/* The last task with this op, appended once more after everything else. */
static void append_again(struct us_program *program, enum us_task_op op) {
  size_t last = program->task_count - 1, found = last;
  while (program->tasks[found].op != op) found--;
  struct us_task *grown = realloc(program->tasks, (program->task_count + 1) * sizeof *grown);
  ck_assert_ptr_nonnull(grown);
  program->tasks = grown;
  grown[program->task_count] = grown[found];
  grown[program->task_count].waits[0] = grown[last].signal;
  grown[program->task_count++].signal = US_EVENT_NONE;
}

START_TEST(what_is_computed_again_is_refused_in_any_order) {
  static const enum us_task_op ops[] = {US_TASK_EMBED_NORM,    US_TASK_QKV,       US_TASK_ATTENTION,
                                        US_TASK_O_PROJ,        US_TASK_ROUTER,    US_TASK_ROUTE,
                                        US_TASK_RESIDUAL_NORM, US_TASK_EXPERT_UP, US_TASK_EXPERT_DOWN};
  struct us_shape shape = small_shape();
  for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
    struct us_program *program = NULL;
    struct us_lower_options options = {.ranks = 1, .rows = 3, .no_head = true};
    ck_assert_int_eq(us_lower_target(&shape, &options, &program, NULL), US_OK);
    ck_assert_int_eq(check(program), US_OK);
    append_again(program, ops[i]);
    ck_assert_msg(check(program) == US_ERR_CHECK, "%s again passes", us_task_op_name(ops[i]));
    us_program_free(program);
  }
}
END_TEST

START_TEST(layers_that_change_places_are_refused) {
  struct us_shape shape = small_shape();
  shape.swa_layer[1] = shape.swa_layer[2] = 1;
  struct us_program *program = lower(&shape, 1, 3);
  for (size_t i = 0; i < program->task_count; i++)
    if (program->tasks[i].layer == 1 || program->tasks[i].layer == 2) program->tasks[i].layer ^= 3;
  ck_assert_int_eq(check(program), US_ERR_CHECK);
  us_program_free(program);
}
END_TEST

START_TEST(a_wait_for_a_later_task_is_a_deadlock) {
  struct us_shape shape = small_shape();
  struct us_program *program = lower(&shape, 1, 2);
  program->tasks[3].waits[1] = program->tasks[program->task_count / 2].signal;
  ck_assert_int_eq(check(program), US_ERR_CHECK);
  us_program_free(program);
}
END_TEST

START_TEST(an_event_that_counts_too_far_is_refused) {
  struct us_shape shape = small_shape();
  struct us_program *program = lower(&shape, 1, 2);
  program->event_totals[program->event_count - 1]++;
  ck_assert_int_eq(check(program), US_ERR_CHECK);
  us_program_free(program);
}
END_TEST

START_TEST(tiles_share_out_the_bytes_exactly) {
  struct us_shape shape = pro_shape();
  for (uint32_t ranks = 1; ranks <= 8; ranks *= 2) {
    struct us_program *program = lower(&shape, ranks, 1);
    struct us_price price;
    us_program_price(program, 8, &price);
    /* 70 fused projections of [27136, 6144] bytes and [216, 48] scales; 69 routers of [384, 6144] f32 a rank. */
    ck_assert_double_eq(price.by_op[US_TASK_QKV], 70.0 * (27136.0 * 6144 + 216 * 48 * 4));
    ck_assert_double_eq(price.by_op[US_TASK_ROUTER], 69.0 * 384 * 6144 * 4 * ranks);
    us_program_free(program);
  }
}
END_TEST

START_TEST(the_price_of_mimo_pro_is_the_published_roofline) {
  static const struct {
    uint32_t rows;
    double distinct, expert_gb, total_gb;
  } table[] = {{1, 8.0, 11.1, 39.7}, {8, 59.5, 82.4, 111.0}, {32, 188, 260, 289}};
  struct us_shape shape = pro_shape();
  for (size_t i = 0; i < 3; i++) {
    struct us_program *program = lower(&shape, 1, table[i].rows);
    struct us_price price;
    double active = us_expected_active(384, 8, table[i].rows);
    us_program_price(program, active, &price);
    double expert_gb = (price.by_op[US_TASK_EXPERT_UP] + price.by_op[US_TASK_EXPERT_DOWN]) / 1e9;
    ck_assert_double_le(fabs(active / table[i].distinct - 1), 0.01);
    ck_assert_double_le(fabs(expert_gb / table[i].expert_gb - 1), 0.01);
    ck_assert_double_le(fabs(price.total / 1e9 / table[i].total_gb - 1), 0.01);
    us_program_free(program);
  }
}
END_TEST

static struct us_draft_shape draft_of(const struct us_shape *target) {
  return (struct us_draft_shape){.layers = 1,
                                 .hidden = target->hidden,
                                 .vocab = target->vocab,
                                 .inner = 512,
                                 .attention = attention(8, 4, 64),
                                 .block = 8,
                                 .taps = 1};
}

START_TEST(a_drafters_own_head_is_priced_by_its_format) {
  struct us_shape target = pro_shape();
  struct us_draft_shape draft = draft_of(&target);
  struct us_roofline shared, own;
  double parameters = (double)target.vocab * target.hidden;
  ck_assert_int_eq(us_roofline_of_shape(&target, &draft, 8, &shared, NULL), US_OK);
  draft.head = US_FORMAT_MXFP4;
  ck_assert_int_eq(us_roofline_of_shape(&target, &draft, 8, &own, NULL), US_OK);
  ck_assert_double_eq(shared.draft_head, shared.head);
  ck_assert_double_eq(own.draft_head, parameters * 17 / 32);
  ck_assert_double_eq(own.head, shared.head);
  ck_assert_double_eq_tol(own.total, shared.total - shared.draft_head + own.draft_head, 1);
}
END_TEST

START_TEST(a_markov_heads_table_is_read_once_a_round) {
  struct us_shape target = pro_shape();
  struct us_draft_shape draft = draft_of(&target);
  struct us_roofline without, with;
  ck_assert_int_eq(us_roofline_of_shape(&target, &draft, 8, &without, NULL), US_OK);
  draft.markov = 64;
  ck_assert_int_eq(us_roofline_of_shape(&target, &draft, 8, &with, NULL), US_OK);
  ck_assert_double_eq_tol(with.draft - without.draft, 128.0 * target.vocab, 1);
  ck_assert_double_eq_tol(with.total - without.total, 128.0 * target.vocab, 1);
}
END_TEST

START_TEST(a_shape_that_cannot_be_shared_is_a_usage_error) {
  struct us_shape shape = small_shape();
  struct us_program *program;
  struct us_err err = {0};
  ck_assert_int_eq(us_lower_target(&shape, &(struct us_lower_options){.ranks = 8, .rows = 1}, &program, &err),
                   US_ERR_USAGE);
  ck_assert_ptr_nonnull(strstr(err.message, "4 KV heads"));
  ck_assert_int_eq(us_lower_target(&shape, &(struct us_lower_options){.ranks = 9, .rows = 1}, &program, &err),
                   US_ERR_USAGE);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("plan");
  tcase_add_test(c, programs_of_every_rank_and_row_count_pass);
  tcase_add_test(c, the_trillion_parameter_program_passes_on_eight_ranks);
  tcase_add_test(c, draft_and_context_programs_pass);
  tcase_add_test(c, a_dropped_wait_is_a_race_whichever_task_loses_it);
  tcase_add_test(c, a_task_with_any_field_changed_is_refused);
  tcase_add_test(c, a_drafters_task_with_any_field_changed_is_refused);
  tcase_add_test(c, what_is_computed_again_is_refused_in_any_order);
  tcase_add_test(c, layers_that_change_places_are_refused);
  tcase_add_test(c, a_wait_for_a_later_task_is_a_deadlock);
  tcase_add_test(c, an_event_that_counts_too_far_is_refused);
  tcase_add_test(c, tiles_share_out_the_bytes_exactly);
  tcase_add_test(c, the_price_of_mimo_pro_is_the_published_roofline);
  tcase_add_test(c, a_drafters_own_head_is_priced_by_its_format);
  tcase_add_test(c, a_markov_heads_table_is_read_once_a_round);
  tcase_add_test(c, a_shape_that_cannot_be_shared_is_a_usage_error);
  return us_suite("plan", c);
}
US_TEST_MAIN(make_suite)
