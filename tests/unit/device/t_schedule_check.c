/* t_schedule_check.c: the proof of a list refuses every list that is broken in one place.
 *
 * Contents: fields; waits; counts; order.
 */
#include "device/schedule_impl.h"
#include "schedule_fixture.h"

#include <stddef.h>
#include <string.h>

/* ---- fields ------------------------------------------------------------------------------------------------------ */

/* A field of an operation, and what is added to it. */
struct field {
  const char *name;
  size_t offset, size; /* 1: a bool, turned around */
  uint32_t delta;
  bool (*used)(const struct us_engine_op *op); /* NULL: always */
};

#define FIELD(path, add)                                                                                     \
  { #path, offsetof(struct us_engine_op, path), sizeof(((struct us_engine_op *)0)->path), add, NULL }
#define USED(path, add, when)                                                                                \
  { #path, offsetof(struct us_engine_op, path), sizeof(((struct us_engine_op *)0)->path), add, when }

static bool pushes(const struct us_engine_op *op) {
  return op->gemm.epilogue == US_ENGINE_PUSH;
}
static bool stores(const struct us_engine_op *op) {
  return op->gemm.epilogue == US_ENGINE_STORE;
}
static bool writes(const struct us_engine_op *op) {
  return !pushes(op);
}
static bool is_expert(const struct us_engine_op *op) {
  return op->gemm.experts;
}

static const struct field of_all[] = {FIELD(kind, 1),    FIELD(program, 1),  FIELD(layer, 1),
                                      FIELD(task_op, 1), FIELD(row_tile, 1), FIELD(row_tiles, 1),
                                      FIELD(bytes, 1)};
static const struct field of_gemm[] = {FIELD(gemm.w.pages, 16),
                                       FIELD(gemm.w.matrix_bytes, 16),
                                       FIELD(gemm.w.tiles, 1),
                                       FIELD(gemm.w.slices, 1),
                                       FIELD(gemm.w.page_bytes, 16),
                                       FIELD(gemm.w.groups, 1),
                                       FIELD(gemm.w.format, 1),
                                       FIELD(gemm.w.halves, 1),
                                       FIELD(gemm.operand, 512),
                                       FIELD(gemm.operand_tile, 512),
                                       USED(gemm.out, 16, writes),
                                       FIELD(gemm.out_tile, 16),
                                       FIELD(gemm.parts, 1),
                                       FIELD(gemm.warps, 1),
                                       FIELD(gemm.subs, 1),
                                       USED(gemm.out_stride, 1, stores),
                                       FIELD(gemm.valid, 1),
                                       USED(gemm.first, 16, pushes),
                                       FIELD(gemm.epilogue, 1),
                                       USED(gemm.exchange, 1, pushes),
                                       USED(gemm.route, 1, is_expert),
                                       FIELD(gemm.F, 1),
                                       USED(gemm.gather, 1, pushes),
                                       FIELD(gemm.experts, 1),
                                       FIELD(gemm.flagged, 1),
                                       FIELD(gemm.awaits, 1)};
static const struct field of_down[] = {
    FIELD(down.w.pages, 16), FIELD(down.w.tiles, 1),     FIELD(down.w.slices, 1), FIELD(down.pairs, 64),
    FIELD(down.F, 32),       FIELD(down.step_slices, 1), FIELD(down.steps, 1),    FIELD(down.stage_steps, 2),
    FIELD(down.exchange, 1), FIELD(down.route, 1)};
static const struct field of_reduce[] = {
    FIELD(reduce.residual, 64),   FIELD(reduce.weight, 256),  FIELD(reduce.operand, 512),
    FIELD(reduce.opt_plain, 256), FIELD(reduce.opt_tap, 512), FIELD(reduce.eps, 1),
    FIELD(reduce.D, 32),          FIELD(reduce.addends, 1),   FIELD(reduce.replace, 1),
    FIELD(reduce.exchange, 1),    FIELD(reduce.draft, 1),     FIELD(reduce.operand_tile, 512),
    FIELD(reduce.tap_tile, 512),  FIELD(reduce.absent, 1),    FIELD(reduce.opt_absent, 4)};
static const struct field of_attention[] = {
    FIELD(attention.qkv, 64),        FIELD(attention.operand, 512),  FIELD(attention.partial, 256),
    FIELD(attention.arrivals, 4),    FIELD(attention.sink, 256),     FIELD(attention.q_norm, 256),
    FIELD(attention.k_norm, 256),    FIELD(attention.rope, 256),     FIELD(attention.layer, 1),
    FIELD(attention.qkv_rows, 1),    FIELD(attention.H, 1),          FIELD(attention.G, 1),
    FIELD(attention.Q, 2),           FIELD(attention.V, 8),          FIELD(attention.rotary, 2),
    FIELD(attention.window, 1),      FIELD(attention.page_count, 1), FIELD(attention.scale, 1),
    FIELD(attention.value_scale, 1), FIELD(attention.eps, 1),        FIELD(attention.draft, 1)};
static const struct field of_route[] = {
    FIELD(route.logits, 64),      FIELD(route.bias, 256),     FIELD(route.parts, 1),
    FIELD(route.stride, 1),       FIELD(route.E, 1),          FIELD(route.top_k, 1),
    FIELD(route.scaling, 1),      FIELD(route.normalise, 1),  FIELD(route.uniform, 1),
    FIELD(route.uniform_seed, 1), FIELD(route.opt_routed, 4), FIELD(route.logits_tile, 8),
    FIELD(route.choices, 64),     FIELD(route.exchange, 1),   FIELD(route.flagged, 1)};
static const struct field of_context[] = {
    FIELD(context.kv, 64),        FIELD(context.k_norm, 256),   FIELD(context.rope, 256),
    FIELD(context.layers, 1),     FIELD(context.G, 1),          FIELD(context.Q, 2),
    FIELD(context.V, 2),          FIELD(context.rotary, 2),     FIELD(context.eps, 1),
    FIELD(context.page_count, 1), FIELD(context.value_scale, 1)};
static const struct field of_select[] = {
    FIELD(select.logits, 64), FIELD(select.stride, 1), FIELD(select.count, 1),  FIELD(select.first, 1),
    FIELD(select.vocab, 1),   FIELD(select.row, 1),    FIELD(select.step, 1),   FIELD(select.rows, 1),
    FIELD(select.number, 1),  FIELD(select.slots, 1),  FIELD(select.before, 2), FIELD(select.after, 2),
    FIELD(select.markov, 32), FIELD(select.draft, 1),  FIELD(select.last, 1)};
static const struct field of_accept[] = {FIELD(accept.vocab, 1),   FIELD(accept.tiles, 1),
                                         FIELD(accept.logits, 64), FIELD(accept.opt_draft_logits, 64),
                                         FIELD(accept.stride, 1),  FIELD(accept.count, 1),
                                         FIELD(accept.first, 1)};

#define COUNT(array) (sizeof array / sizeof *array)
static const struct {
  const struct field *fields;
  size_t count;
} of_kind[US_ENGINE_KINDS] = {[US_ENGINE_EMBED] = {of_reduce, COUNT(of_reduce)},
                              [US_ENGINE_GEMM] = {of_gemm, COUNT(of_gemm)},
                              [US_ENGINE_DOWN] = {of_down, COUNT(of_down)},
                              [US_ENGINE_REDUCE] = {of_reduce, COUNT(of_reduce)},
                              [US_ENGINE_ATTENTION] = {of_attention, COUNT(of_attention)},
                              [US_ENGINE_ROUTE] = {of_route, COUNT(of_route)},
                              [US_ENGINE_CONTEXT] = {of_context, COUNT(of_context)},
                              [US_ENGINE_SELECT] = {of_select, COUNT(of_select)},
                              [US_ENGINE_ACCEPT] = {of_accept, COUNT(of_accept)}};

/* The check refuses the schedule as it is now, and names an operation. */
static void expect_refused(const struct fixture *f, uint32_t op, const char *what) {
  struct us_err err = {0};
  enum us_status status = us_device_schedule_check(f->schedule, &err);
  ck_assert_msg(status == US_ERR_CHECK, "operation %u, %s broken: not seen (status %d, %s)", op, what, status,
                err.message);
  ck_assert_uint_gt(strlen(err.message), 10);
}

/* Add to a little-endian field of 1, 2, 4 or 8 bytes. */
static void add_to(struct us_engine_op *op, const struct field *field) {
  uint8_t *at = (uint8_t *)op + field->offset;
  uint64_t value = 0;
  memcpy(&value, at, field->size);
  value = field->size == 1 && field->delta == 1 && value < 2 ? !value : value + field->delta;
  memcpy(at, &value, field->size);
}

static void break_fields(struct fixture *f, uint32_t index, const struct field *fields, size_t count) {
  struct us_engine_op *op = &f->schedule->ops[index], whole = *op;
  for (size_t i = 0; i < count; i++) {
    if (fields[i].used && !fields[i].used(op)) continue;
    add_to(op, &fields[i]);
    expect_refused(f, index, fields[i].name);
    *op = whole;
  }
}

/* Lists small enough to be broken in every place: one row tile, and two whose blocks do or do not share sequences, whose experts are or
 * are not streamed together. */
static const struct {
  uint32_t batch, block;
  bool adaptive;
  uint32_t inner;  /* of experts, on two ranks: from 256 on pages have four groups */
  uint32_t markov; /* rank of the drafter's Markov head: its slots are chosen one after the other */
} broken[] = {{1, 8, false, 256, 0}, {2, 8, false, 128, 0},  {1, 16, false, 256, 0}, {1, 16, true, 128, 0},
              {2, 8, false, 256, 0}, {2, 8, false, 128, 32}, {1, 16, true, 128, 32}};

static struct fixture to_break(int i) {
  struct fixture f = tiny();
  f.shape.expert_inner = broken[i].inner;
  f.draft.markov = broken[i].markov;
  f.shape.layers = 3, f.draft.layers = 1, f.draft.target_layers = 3, f.draft.tap_layer[1] = 2;
  make(&f, 1, 2,
       (struct us_device_schedule_options){.batch = broken[i].batch,
                                           .block = broken[i].block,
                                           .observe = true,
                                           .adaptive = broken[i].adaptive});
  expect_proved(&f, "unbroken");
  return f;
}

START_TEST(an_operation_with_any_field_changed_is_refused) {
  struct fixture f = to_break(_i);
  for (uint32_t i = 0; i < f.schedule->op_count; i++) {
    uint32_t kind = f.schedule->ops[i].kind;
    break_fields(&f, i, of_all, COUNT(of_all));
    break_fields(&f, i, of_kind[kind].fields, of_kind[kind].count);
  }
  release(&f);
}
END_TEST

/* ---- waits ------------------------------------------------------------------------------------------------------- */

START_TEST(a_list_without_any_one_of_its_waits_is_refused) {
  struct fixture f = to_break(_i);
  uint32_t waits = 0;
  for (uint32_t i = 0; i < f.schedule->op_count; i++) {
    struct us_engine_op *op = &f.schedule->ops[i];
    uint32_t wait = op->wait;
    if (wait == US_ENGINE_NONE) continue;
    op->wait = US_ENGINE_NONE;
    expect_refused(&f, i, "wait");
    op->wait = i; /* itself in the round before */
    expect_refused(&f, i, "wait for an earlier round");
    op->wait = f.schedule->op_count;
    expect_refused(&f, i, "wait for nothing");
    op->wait = wait, waits++;
  }
  ck_assert_uint_gt(waits, f.schedule->op_count / 3);
  release(&f);
}
END_TEST

/* Which rows there are is known when the last row tile's proposals are. */
START_TEST(adaptive_rows_that_are_embedded_before_the_last_proposals_are_refused) {
  struct fixture f = to_break(3);
  const struct us_device_schedule *s = f.schedule;
  uint32_t embeds = 0;
  for (uint32_t i = s->begin[US_ENGINE_PASS_TARGET]; i < s->op_count; i++) {
    struct us_engine_op *op = &f.schedule->ops[i];
    if (op->kind != US_ENGINE_EMBED || op->wait == US_ENGINE_NONE) continue;
    uint32_t wait = op->wait;
    ck_assert_uint_eq(wait, s->end[US_ENGINE_PASS_DRAFT] - 1);
    op->wait = wait - 1;
    expect_refused(&f, i, "the wait for the last row tile");
    op->wait = wait, embeds++;
  }
  ck_assert_uint_gt(embeds, 0);
  release(&f);
}
END_TEST

/* 16 row tiles: o_proj takes 8, but the other 8 may hold the ring. */
START_TEST(activations_that_come_while_attention_has_the_ring_are_refused) {
  struct fixture f = tiny();
  f.shape.layers = 3, f.draft.layers = 1, f.draft.target_layers = 3, f.draft.tap_layer[1] = 2;
  make(&f, 1, 2, (struct us_device_schedule_options){.batch = 8, .block = 16});
  expect_proved(&f, "unbroken");
  uint32_t products = 0;
  for (uint32_t i = 0; i < f.schedule->op_count; i++) {
    struct us_engine_op *op = &f.schedule->ops[i];
    if (op->task_op != US_TASK_O_PROJ || op->wait == US_ENGINE_NONE) continue;
    uint32_t wait = op->wait;
    ck_assert_uint_eq(f.schedule->ops[wait].row_tile, 15);
    op->wait = wait - 8; /* the last of its own row tiles */
    expect_refused(&f, i, "the wait for all of attention");
    op->wait = wait, products++;
  }
  ck_assert_uint_eq(products, 4);
  release(&f);
}
END_TEST

START_TEST(keys_fetched_after_no_operation_are_refused) {
  struct fixture f = to_break(_i);
  for (uint32_t i = 0; i < f.schedule->op_count; i++) {
    struct us_engine_op *op = &f.schedule->ops[i];
    if (op->kind != US_ENGINE_ATTENTION) continue;
    uint32_t ready = op->attention.ready;
    op->attention.ready = f.schedule->op_count;
    expect_refused(&f, i, "ready");
    op->attention.ready = ready;
  }
  release(&f);
}
END_TEST

/* ---- counts ------------------------------------------------------------------------------------------------------ */

START_TEST(a_schedule_with_other_counts_is_refused) {
  struct fixture f = to_break(_i);
  struct us_device_schedule *s = f.schedule, whole = *s;
  uint32_t *numbers[] = {&s->head_end, &s->logits_stride, &s->rank.D};
  for (size_t i = 0; i < COUNT(numbers); i++) {
    ++*numbers[i];
    expect_refused(&f, 0, "a number");
    *s = whole;
  }
  for (int pass = 0; pass < US_ENGINE_PASSES; pass++) {
    uint32_t *counts[] = {&s->begin[pass], &s->end[pass], &s->exchanges[pass], &s->selects[pass]};
    for (size_t i = 0; i < COUNT(counts); i++) {
      ++*counts[i];
      expect_refused(&f, 0, "a count");
      *s = whole;
    }
  }
  s->rank.addends = 1;
  expect_refused(&f, 0, "addends");
  *s = whole;
  s->rank.slots =
      s->row_tiles == 1 ? 1 : s->rank.slots / 2; /* one tile: EMBEDs happen to lie so that 2 are enough */
  expect_refused(&f, 0, "slots");
  s->rank.slots = whole.rank.slots - 1; /* enough, but no power of two */
  expect_refused(&f, 0, "slots");
  *s = whole;
  release(&f);
}
END_TEST

/* ---- order ------------------------------------------------------------------------------------------------------- */

/* Two neighbours change places, and waits follow them. */
static void swap(struct us_device_schedule *s, uint32_t i) {
  struct us_engine_op op = s->ops[i];
  s->ops[i] = s->ops[i + 1], s->ops[i + 1] = op;
  for (uint32_t j = 0; j < s->op_count; j++) {
    uint32_t *refers[] = {
        &s->ops[j].wait, s->ops[j].kind == US_ENGINE_ATTENTION ? &s->ops[j].attention.ready : NULL,
        s->ops[j].kind == US_ENGINE_DOWN ? &s->ops[j].down.route : NULL,
        s->ops[j].kind == US_ENGINE_GEMM && s->ops[j].gemm.experts ? &s->ops[j].gemm.route : NULL};
    for (size_t k = 0; k < COUNT(refers); k++)
      if (refers[k] && (*refers[k] == i || *refers[k] == i + 1)) *refers[k] = 2 * i + 1 - *refers[k];
  }
}

START_TEST(with_one_row_tile_no_two_neighbours_can_change_places) {
  struct fixture f = to_break(0);
  for (uint32_t i = 0; i + 1 < f.schedule->op_count; i++) {
    swap(f.schedule, i);
    expect_refused(&f, i, "place");
    swap(f.schedule, i);
  }
  expect_proved(&f, "put back");
  release(&f);
}
END_TEST

/* DOWN tells of its stages in scratch, ahead of the compute warps: what uses that must not stand behind the choice of experts. */
START_TEST(nothing_but_products_stands_between_a_choice_and_its_down) {
  struct fixture f = to_break(0);
  uint32_t downs = 0;
  for (uint32_t i = 0; i + 1 < f.schedule->op_count; i++) {
    struct us_err err = {0};
    if (f.schedule->ops[i].kind != US_ENGINE_DOWN) continue;
    swap(f.schedule, i); /* the reduction behind it comes before it */
    ck_assert_int_eq(us_device_schedule_check(f.schedule, &err), US_ERR_CHECK);
    ck_assert_msg(strstr(err.message, "scratch") != NULL, "%s", err.message);
    swap(f.schedule, i);
    downs++;
  }
  ck_assert_uint_gt(downs, 0);
  release(&f);
}
END_TEST

/* The proof of hand-offs by itself, without that of fields. */
static void expect_disordered(const struct fixture *f, uint32_t op, const char *what) {
  struct us_schedule_order *order = NULL;
  struct us_err err = {0};
  enum us_status status = us_schedule_check_order(f->schedule, &order, &err);
  us_schedule_order_free(order);
  ck_assert_msg(status == US_ERR_CHECK, "operation %u, %s: not seen (status %d, %s)", op, what, status,
                err.message);
}

/* Words that carry their own flag: logits and attended rows. */
START_TEST(words_that_are_not_made_absent_before_they_are_written_are_refused) {
  struct fixture f = to_break(0);
  uint32_t marks = 0;
  for (uint32_t i = 0; i < f.schedule->op_count; i++) {
    struct us_engine_op *op = &f.schedule->ops[i], whole = *op;
    if ((op->kind != US_ENGINE_EMBED && op->kind != US_ENGINE_REDUCE) || !op->reduce.opt_absent) continue;
    op->reduce.opt_absent = NULL;
    expect_disordered(&f, i, "nothing made absent");
    *op = whole, op->reduce.absent--;
    expect_disordered(&f, i, "a word less made absent");
    *op = whole, op->reduce.opt_absent++;
    expect_disordered(&f, i, "other words made absent");
    *op = whole, marks++;
  }
  ck_assert_uint_gt(marks, 4);
  release(&f);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("schedule_check");
  tcase_add_loop_test(c, an_operation_with_any_field_changed_is_refused, 0, COUNT(broken));
  tcase_add_loop_test(c, a_list_without_any_one_of_its_waits_is_refused, 0, COUNT(broken));
  tcase_add_test(c, adaptive_rows_that_are_embedded_before_the_last_proposals_are_refused);
  tcase_add_test(c, activations_that_come_while_attention_has_the_ring_are_refused);
  tcase_add_loop_test(c, keys_fetched_after_no_operation_are_refused, 0, COUNT(broken));
  tcase_add_loop_test(c, a_schedule_with_other_counts_is_refused, 0, COUNT(broken));
  tcase_add_test(c, with_one_row_tile_no_two_neighbours_can_change_places);
  tcase_add_test(c, nothing_but_products_stands_between_a_choice_and_its_down);
  tcase_add_test(c, words_that_are_not_made_absent_before_they_are_written_are_refused);
  return us_suite("schedule_check", c);
}

US_TEST_MAIN(make_suite)
