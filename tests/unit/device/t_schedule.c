/* t_schedule.c: the engine's lists of operations, for every shape, without a GPU.
 *
 * Independent truth: the proof in us_device_schedule_check, which must refuse every list that is broken in one place; bytes
 * from the roofline; the rotary tables' definition.
 */
#include "device/schedule.h"
#include "device/weights_layout.h"
#include "fail_alloc.h"
#include "kernels/rope/rope.h"
#include "plan/program.h"
#include "plan/roofline.h"
#include "suite.h"

#include <stddef.h>
#include <string.h>

/* ---- weights without data ---------------------------------------------------------------------------------------- */

struct fixture {
  struct us_shape shape;
  struct us_draft_shape draft;
  bool drafts;
  struct us_device_weights *weights;
  struct us_device_schedule *schedule;
  uint64_t next; /* of counted memory */
};

static struct us_shape load_shape(const char *name) {
  struct us_shape shape;
  struct us_err err = {0};
  ck_assert_msg(us_shape_load(name, &shape, &err) == US_OK, "%s", err.message);
  return shape;
}

/* A drafter of any target: windowed attention of its heads, taps of the first and last layer. */
static struct us_draft_shape draft_of(const struct us_shape *s) {
  struct us_draft_shape d = {.layers = 2,
                             .hidden = s->hidden,
                             .vocab = s->vocab,
                             .inner = s->dense_inner,
                             .attention = s->swa,
                             .norm_eps = 1e-5,
                             .value_scale = 0.5,
                             .block = 8,
                             .mask_id = 1,
                             .taps = 2,
                             .tap_layer = {0, s->layers - 1},
                             .target_layers = s->layers};
  return d;
}

/* Addresses that tell matrices and vectors apart. */
static void *fake(uint64_t *next, uint64_t bytes) {
  void *at = (void *)(uintptr_t)*next;
  *next += us_device_align(bytes);
  return at;
}

static void fake_layers(struct us_device_layer *layers, uint32_t count, uint64_t *next) {
  for (uint32_t l = 0; l < count; l++) {
    struct us_device_layer *y = &layers[l];
    struct us_device_matrix *m[] = {&y->qkv, &y->o_proj, &y->router, &y->up, &y->down};
    float **v[] = {&y->input_norm, &y->post_norm, &y->sink, &y->router_bias, &y->q_norm, &y->k_norm};
    for (size_t i = 0; i < 5; i++)
      if (m[i]->rows) m[i]->pages.pages = fake(next, 1);
    for (size_t i = 0; i < 6; i++) *v[i] = fake(next, 1);
  }
}

static void fake_pointers(struct us_device_weights *w, uint64_t *next) {
  fake_layers(w->layers, w->shape.layers, next);
  if (w->draft_layers) fake_layers(w->draft_layers, w->draft_shape.layers, next);
  float **v[] = {&w->final_norm, &w->draft_k_norms, &w->draft_hidden_norm, &w->draft_final_norm,
                 &w->mask_embedding};
  for (size_t i = 0; i < 5; i++) *v[i] = fake(next, 1);
  w->embed = fake(next, 1);
  w->head.pages.pages = fake(next, 1), w->draft_fc.pages.pages = fake(next, 1),
  w->draft_kv.pages.pages = fake(next, 1);
}

static enum us_status lay_out(struct fixture *f, uint32_t rank, uint32_t ranks, struct us_err *err) {
  uint64_t next = 4096;
  enum us_status status =
      us_device_weights_layout(&f->shape, f->drafts ? &f->draft : NULL, rank, ranks, &f->weights, err);
  if (status == US_OK) fake_pointers(f->weights, &next);
  return status;
}

static void make(struct fixture *f, uint32_t rank, uint32_t ranks,
                 struct us_device_schedule_options options) {
  struct us_err err = {0};
  options.drafter = f->drafts;
  ck_assert_msg(lay_out(f, rank, ranks, &err) == US_OK, "%s", err.message);
  f->next = (uint64_t)1 << 40;
  struct us_device_memory_ops memory = us_device_memory_count(&f->next);
  ck_assert_msg(us_device_schedule_create_in(f->weights, &options, &memory, &f->schedule, &err) == US_OK,
                "%s: %s", f->shape.name, err.message);
}

static void release(struct fixture *f) {
  us_device_schedule_free(f->schedule);
  us_device_layout_free(f->weights);
}

static struct fixture tiny(void) {
  struct fixture f = {.shape = load_shape("tiny-pro"), .drafts = true};
  f.shape.dense_inner = 256, f.shape.expert_inner = 128; /* 4 ranks can share them */
  f.draft = draft_of(&f.shape);
  return f;
}

static void expect_proved(const struct fixture *f, const char *what) {
  struct us_err err = {0};
  ck_assert_msg(us_device_schedule_check(f->schedule, &err) == US_OK, "%s, %s: %s", f->shape.name, what,
                err.message);
}

/* ---- every shape ------------------------------------------------------------------------------------------------- */

static const struct {
  uint32_t batch, block;
} passes[] = {{1, 1}, {1, 8}, {2, 8}, {8, 8}, {1, 16}, {4, 16}, {3, 5}, {8, 16}};

static void prove_shape(struct fixture *f, uint32_t ranks) {
  struct us_err err = {0};
  for (size_t i = 0; i < sizeof passes / sizeof *passes; i++) {
    char what[64];
    uint32_t rank = ranks - 1;
    snprintf(what, sizeof what, "rank %u of %u, %u x %u rows", rank, ranks, passes[i].batch, passes[i].block);
    if (lay_out(f, rank, ranks, &err) != US_OK) { /* heads or columns that so many ranks cannot share */
      ck_assert_int_eq(err.status, US_ERR_USAGE);
      ck_assert_uint_gt(ranks, 1);
      return;
    }
    us_device_layout_free(f->weights);
    make(f, rank, ranks,
         (struct us_device_schedule_options){.batch = passes[i].batch, .block = passes[i].block});
    expect_proved(f, what);
    release(f);
  }
}

START_TEST(lists_of_every_shape_rank_and_number_of_rows_are_proved) {
  static const char *const names[] = {"tiny",          "tiny-pro",  "pico",
                                      "mimo-v2-flash", "mimo-v2.5", "mimo-v2.5-pro"};
  struct fixture f = {.shape = load_shape(names[_i])};
  for (uint32_t ranks = 1; ranks <= 8; ranks *= 2)
    for (int drafts = 0; drafts < 2; drafts++) {
      f.drafts = drafts;
      f.draft = draft_of(&f.shape);
      prove_shape(&f, ranks);
    }
}
END_TEST

START_TEST(the_published_model_and_drafter_are_cut_by_1_2_4_and_8_ranks) {
  struct fixture f = {.shape = load_shape("mimo-v2.5-pro"), .drafts = true};
  f.draft = draft_of(&f.shape);
  f.draft.layers = 5, f.draft.taps = 5, f.draft.attention.qk_dim = 128, f.draft.attention.window = 1024;
  for (uint32_t t = 0; t < 5; t++) f.draft.tap_layer[t] = 16 * t;
  for (uint32_t ranks = 1; ranks <= 8; ranks *= 2) {
    make(&f, 0, ranks, (struct us_device_schedule_options){.batch = 1, .block = 8});
    expect_proved(&f, "8 rows");
    for (uint32_t i = 0; i < f.schedule->op_count; i++) { /* nothing that streams leaves warps idle */
      const struct us_engine_op *op = &f.schedule->ops[i];
      if (op->kind == US_ENGINE_GEMM) ck_assert_uint_eq(op->gemm.warps, US_ENGINE_COMPUTE_WARPS);
    }
    release(&f);
  }
}
END_TEST

START_TEST(a_vocabulary_that_ranks_do_not_divide_is_cut_as_its_weights_are) {
  struct fixture f = tiny();
  uint32_t ids = 0;
  f.shape.vocab = f.draft.vocab = 509;
  for (uint32_t rank = 0; rank < 4; rank++) {
    make(&f, rank, 4, (struct us_device_schedule_options){.batch = 1, .block = 8});
    expect_proved(&f, "4 ranks");
    ck_assert_uint_eq(f.schedule->logits_first, ids);
    ids += f.schedule->logits_count;
    release(&f);
  }
  ck_assert_uint_eq(ids, 509);
}
END_TEST

/* ---- broken lists ------------------------------------------------------------------------------------------------ */

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
                                      FIELD(task_op, 1), FIELD(row_tile, 1), FIELD(bytes, 1)};
static const struct field of_gemm[] = {FIELD(gemm.w.pages, 16),
                                       FIELD(gemm.w.matrix_bytes, 16),
                                       FIELD(gemm.w.tiles, 1),
                                       FIELD(gemm.w.slices, 1),
                                       FIELD(gemm.w.page_bytes, 16),
                                       FIELD(gemm.w.groups, 1),
                                       FIELD(gemm.w.format, 1),
                                       FIELD(gemm.w.halves, 1),
                                       FIELD(gemm.operand, 512),
                                       USED(gemm.out, 16, writes),
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
                                       FIELD(gemm.experts, 1)};
static const struct field of_down[] = {
    FIELD(down.w.pages, 16), FIELD(down.w.tiles, 1),     FIELD(down.w.slices, 1), FIELD(down.pairs, 64),
    FIELD(down.F, 32),       FIELD(down.step_slices, 1), FIELD(down.steps, 1),    FIELD(down.stage_steps, 2),
    FIELD(down.exchange, 1), FIELD(down.route, 1)};
static const struct field of_reduce[] = {
    FIELD(reduce.residual, 64),   FIELD(reduce.weight, 256),  FIELD(reduce.operand, 512),
    FIELD(reduce.opt_plain, 256), FIELD(reduce.opt_tap, 512), FIELD(reduce.eps, 1),
    FIELD(reduce.D, 32),          FIELD(reduce.addends, 1),   FIELD(reduce.replace, 1),
    FIELD(reduce.exchange, 1),    FIELD(reduce.draft, 1)};
static const struct field of_attention[] = {
    FIELD(attention.qkv, 64),        FIELD(attention.operand, 512),  FIELD(attention.partial, 256),
    FIELD(attention.arrivals, 4),    FIELD(attention.sink, 256),     FIELD(attention.q_norm, 256),
    FIELD(attention.k_norm, 256),    FIELD(attention.rope, 256),     FIELD(attention.layer, 1),
    FIELD(attention.qkv_rows, 1),    FIELD(attention.H, 1),          FIELD(attention.G, 1),
    FIELD(attention.Q, 2),           FIELD(attention.V, 8),          FIELD(attention.rotary, 2),
    FIELD(attention.window, 1),      FIELD(attention.page_count, 1), FIELD(attention.scale, 1),
    FIELD(attention.value_scale, 1), FIELD(attention.eps, 1),        FIELD(attention.draft, 1)};
static const struct field of_route[] = {
    FIELD(route.logits, 64),      FIELD(route.bias, 256),    FIELD(route.parts, 1),
    FIELD(route.stride, 1),       FIELD(route.E, 1),         FIELD(route.top_k, 1),
    FIELD(route.scaling, 1),      FIELD(route.normalise, 1), FIELD(route.uniform, 1),
    FIELD(route.uniform_seed, 1), FIELD(route.opt_routed, 4)};
static const struct field of_context[] = {
    FIELD(context.kv, 64),        FIELD(context.k_norm, 256),   FIELD(context.rope, 256),
    FIELD(context.layers, 1),     FIELD(context.G, 1),          FIELD(context.Q, 2),
    FIELD(context.V, 2),          FIELD(context.rotary, 2),     FIELD(context.eps, 1),
    FIELD(context.page_count, 1), FIELD(context.value_scale, 1)};
static const struct field of_select[] = {FIELD(select.logits, 64), FIELD(select.stride, 1),
                                         FIELD(select.count, 1),   FIELD(select.first, 1),
                                         FIELD(select.vocab, 1),   FIELD(select.draft, 1)};
static const struct field of_accept[] = {FIELD(accept.vocab, 1)};

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

/* Lists small enough to be broken in every place: one row tile, and two whose blocks do or do not share sequences. */
static const struct { uint32_t batch, block; } broken[] = {{1, 8}, {2, 8}, {1, 16}};

static struct fixture to_break(int i) {
  struct fixture f = tiny();
  f.shape.layers = 3, f.draft.layers = 1, f.draft.target_layers = 3, f.draft.tap_layer[1] = 2;
  make(&f, 1, 2,
       (struct us_device_schedule_options){
           .batch = broken[i].batch, .block = broken[i].block, .observe = true});
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
  ck_assert_uint_gt(waits, f.schedule->op_count / 2);
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
      s->row_tiles == 1 ? 1 : 3 * s->row_tiles - 1; /* one tile: EMBEDs happen to lie so that 2 are enough */
  expect_refused(&f, 0, "slots");
  *s = whole;
  release(&f);
}
END_TEST

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

/* ---- what lists are made of -------------------------------------------------------------------------------------- */

START_TEST(between_router_and_experts_nobody_waits_twice) {
  struct fixture f = to_break(0);
  for (uint32_t i = 0; i < f.schedule->op_count; i++)
    if (f.schedule->ops[i].task_op == US_TASK_EXPERT_UP)
      ck_assert_uint_eq(f.schedule->ops[i].wait, US_ENGINE_NONE);
  release(&f);
}
END_TEST

START_TEST(ranks_run_lists_that_are_alike) {
  struct fixture first = tiny();
  make(&first, 0, 4, (struct us_device_schedule_options){.batch = 2, .block = 8});
  for (uint32_t rank = 1; rank < 4; rank++) {
    struct fixture f = tiny();
    make(&f, rank, 4, (struct us_device_schedule_options){.batch = 2, .block = 8});
    ck_assert_uint_eq(f.schedule->op_count, first.schedule->op_count);
    for (uint32_t i = 0; i < f.schedule->op_count; i++) {
      const struct us_engine_op *a = &first.schedule->ops[i], *b = &f.schedule->ops[i];
      ck_assert_uint_eq(a->kind, b->kind);
      ck_assert_uint_eq(a->wait, b->wait);
      ck_assert_uint_eq(a->task_op, b->task_op);
      ck_assert_uint_eq(a->layer, b->layer);
      ck_assert_uint_eq(a->row_tile, b->row_tile);
    }
    release(&f);
  }
  release(&first);
}
END_TEST

/* Bytes of the operations that do `op`, all ranks. */
static double streamed(const struct us_device_schedule *s, enum us_task_op op) {
  double bytes = 0;
  for (uint32_t i = s->begin[US_ENGINE_PASS_TARGET]; i < s->end[US_ENGINE_PASS_TARGET]; i++)
    if (s->ops[i].task_op == op) bytes += (double)s->ops[i].bytes;
  return bytes;
}

START_TEST(bytes_are_the_rooflines_but_for_padding) {
  struct fixture f = {.shape = load_shape("mimo-v2.5-pro")};
  struct us_roofline roofline;
  struct us_err err = {0};
  double qkv = 0, o_proj = 0, dense = 0, router = 0, head = 0, experts = 0;
  ck_assert_int_eq(us_roofline_of_shape(&f.shape, NULL, 8, &roofline, &err), US_OK);
  for (uint32_t rank = 0; rank < 4; rank++) {
    make(&f, rank, 4, (struct us_device_schedule_options){.batch = 1, .block = 8});
    const struct us_device_schedule *s = f.schedule;
    qkv += streamed(s, US_TASK_QKV), o_proj += streamed(s, US_TASK_O_PROJ), head += streamed(s, US_TASK_HEAD);
    dense += streamed(s, US_TASK_DENSE_UP) + streamed(s, US_TASK_DENSE_DOWN);
    router += streamed(s, US_TASK_ROUTER) / 4; /* every rank has the whole */
    experts += roofline.distinct * (streamed(s, US_TASK_EXPERT_UP) + streamed(s, US_TASK_EXPERT_DOWN));
    release(&f);
  }
  ck_assert_double_eq_tol(qkv / roofline.qkv, 1, 0.01); /* FP8: 16 bytes of scale a page of 2064 */
  ck_assert_double_eq_tol(dense / roofline.dense, 1, 0.01);
  ck_assert_double_eq_tol(o_proj / roofline.o_proj, 1, 1e-9);
  ck_assert_double_eq_tol(router / roofline.router, 1, 1e-9);
  ck_assert_double_eq_tol(head / roofline.head, 1, 1e-9);
  ck_assert_double_eq_tol(experts / roofline.experts, 1, 1e-9);
}
END_TEST

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static void make_on_host(struct fixture *f, uint32_t rank, uint32_t ranks) {
  struct us_err err = {0};
  struct us_device_schedule_options options = {.batch = 2, .block = 8, .max_positions = 256, .drafter = true};
  ck_assert_msg(lay_out(f, rank, ranks, &err) == US_OK, "%s", err.message);
  enum us_status status =
      us_device_schedule_create_in(f->weights, &options, &us_device_memory_host, &f->schedule, &err);
  ck_assert_msg(status == US_OK, "%s", err.message);
}

START_TEST(buffers_are_as_the_first_round_expects_them) {
  struct fixture f = tiny();
  make_on_host(&f, 0, 1);
  const struct us_device_schedule *s = f.schedule;
  const struct us_engine_rank *r = &s->rank;
  const uint32_t *exchange = (const uint32_t *)r->exchange[0];
  for (size_t i = 0; i < (size_t)r->slots * r->addends * US_ENGINE_ROWS * r->D; i++)
    ck_assert_uint_eq(exchange[i], US_ENGINE_ABSENT);
  for (size_t i = 0; i < 2ull * US_ENGINE_ROWS * (r->D / us_engine_slice(r->D)); i++)
    ck_assert(r->norm[i] == 0);
  const uint8_t *features = s->features;
  for (size_t i = 0; i < 2ull * f.draft.taps * r->D * 16; i++) ck_assert_uint_eq(features[i], 0);
  ck_assert_int_eq(memcmp(r->ops, s->ops, s->op_count * sizeof *s->ops), 0);
  for (uint32_t i = 0; i < s->op_count; i++) ck_assert_uint_eq(r->done[i], 0);
  release(&f);
}
END_TEST

START_TEST(attention_turns_positions_by_its_own_angles) {
  struct fixture f = tiny();
  f.draft.attention.rope_theta = 5e5;
  make_on_host(&f, 0, 1);
  for (uint32_t i = 0; i < f.schedule->op_count; i++) {
    const struct us_engine_op *op = &f.schedule->ops[i];
    if (op->kind != US_ENGINE_ATTENTION) continue;
    const struct us_attention_shape *a =
        op->attention.draft ? &f.draft.attention : us_shape_attention(&f.shape, op->layer);
    float want[128];
    for (uint32_t p = 0; p < 256; p += 51) {
      us_rope_table(a->rope_theta, a->rotary_dim, p, want);
      ck_assert_int_eq(memcmp(op->attention.rope + p * a->rotary_dim, want, a->rotary_dim * sizeof *want), 0);
    }
  }
  release(&f);
}
END_TEST

START_TEST(ranks_learn_each_others_buffers) {
  struct fixture f[2] = {tiny(), tiny()};
  struct us_device_schedule *schedules[2];
  for (uint32_t rank = 0; rank < 2; rank++) {
    make_on_host(&f[rank], rank, 2);
    schedules[rank] = f[rank].schedule;
  }
  us_device_schedule_connect(schedules, 2);
  for (uint32_t rank = 0; rank < 2; rank++)
    for (uint32_t peer = 0; peer < 2; peer++) {
      ck_assert_ptr_nonnull(schedules[rank]->rank.exchange[peer]);
      ck_assert_ptr_eq(schedules[rank]->rank.exchange[peer], schedules[peer]->rank.exchange[peer]);
      ck_assert_ptr_eq(schedules[rank]->rank.select[peer], schedules[peer]->rank.select[peer]);
      ck_assert_ptr_eq(schedules[rank]->rank.logits_all[peer], schedules[peer]->rank.logits_all[peer]);
      ck_assert_ptr_eq(schedules[rank]->rank.embed[peer], f[peer].weights->embed);
    }
  ck_assert_ptr_ne(schedules[0]->rank.exchange[0], schedules[0]->rank.exchange[1]);
  release(&f[0]), release(&f[1]);
}
END_TEST

START_TEST(memory_is_known_before_anything_is_allocated) {
  struct fixture f = tiny();
  struct us_device_schedule_options options = {.batch = 4, .block = 16, .drafter = true, .observe = true};
  make(&f, 0, 2, options);
  uint64_t taken = f.next - ((uint64_t)1 << 40);
  ck_assert_uint_eq(f.schedule->workspace_bytes, taken);
  ck_assert_uint_eq(us_device_schedule_bytes(&f.shape, &f.draft, 2, &options), taken);
  ck_assert_uint_eq(us_device_schedule_bytes(&f.shape, NULL, 2, &options), 0); /* no drafter to schedule */
  release(&f);
}
END_TEST

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

static void expect_not_made(struct fixture *f, struct us_device_schedule_options options, const char *why) {
  struct us_err err = {0};
  uint64_t next = 0;
  struct us_device_memory_ops memory = us_device_memory_count(&next);
  ck_assert_msg(lay_out(f, 0, 1, &err) == US_OK, "%s", err.message);
  ck_assert_int_eq(us_device_schedule_create_in(f->weights, &options, &memory, &f->schedule, &err),
                   US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, why), "%s", err.message);
  ck_assert_ptr_null(f->schedule);
  us_device_layout_free(f->weights);
}

START_TEST(what_the_kernels_cannot_run_is_refused_by_name) {
  struct fixture f = tiny();
  expect_not_made(&f, (struct us_device_schedule_options){.batch = 9, .block = 8}, "9 sequences of 8 rows");
  expect_not_made(&f, (struct us_device_schedule_options){.batch = 1, .block = 17}, "1 sequences of 17 rows");
  f.drafts = false;
  expect_not_made(&f, (struct us_device_schedule_options){.drafter = true}, "the weights have no drafter");
  struct fixture many = tiny();
  many.shape.experts = 1024;
  expect_not_made(&many, (struct us_device_schedule_options){.block = 8}, "1024 experts, 4 a token");
  struct fixture heads = tiny();
  heads.drafts = false, heads.shape.full.qk_dim = 256;
  expect_not_made(&heads, (struct us_device_schedule_options){.block = 8},
                  "full attention: heads of 256 and 16");
  heads = tiny(), heads.drafts = false, heads.shape.swa.q_heads = 72;
  expect_not_made(&heads, (struct us_device_schedule_options){.block = 8},
                  "windowed attention: 18 query heads");
  heads = tiny(), heads.drafts = false, heads.shape.full.qk_dim = 192, heads.shape.full.rotary_dim = 96;
  expect_not_made(&heads, (struct us_device_schedule_options){.block = 8}, "full attention: 96 dims rotate");
  struct fixture wide = tiny();
  wide.drafts = false, wide.shape.hidden = 16384, wide.shape.precision.qkv = US_FORMAT_F32;
  expect_not_made(&wide, (struct us_device_schedule_options){.block = 8}, "16384 columns");
}
END_TEST

static enum us_status make_and_check(void *arg, struct us_err *err) {
  struct fixture *f = arg;
  struct us_device_schedule_options options = {.batch = 2, .block = 8, .drafter = true};
  uint64_t next = (uint64_t)1 << 40;
  struct us_device_memory_ops memory = us_device_memory_count(&next);
  enum us_status status = us_device_schedule_create_in(f->weights, &options, &memory, &f->schedule, err);
  if (status == US_OK) status = us_device_schedule_check(f->schedule, err);
  us_device_schedule_free(f->schedule);
  return status;
}

START_TEST(every_failed_allocation_is_reported_and_leaks_nothing) {
  struct fixture f = tiny();
  struct us_err err = {0};
  f.shape.layers = 2, f.draft.layers = 1, f.draft.target_layers = 2, f.draft.tap_layer[1] = 1;
  ck_assert_int_eq(lay_out(&f, 0, 2, &err), US_OK);
  us_fail_alloc(make_and_check, &f, US_FAIL_ALLOC_BALANCED);
  us_device_layout_free(f.weights);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("schedule");
  tcase_add_loop_test(c, lists_of_every_shape_rank_and_number_of_rows_are_proved, 0, 6);
  tcase_add_test(c, the_published_model_and_drafter_are_cut_by_1_2_4_and_8_ranks);
  tcase_add_test(c, a_vocabulary_that_ranks_do_not_divide_is_cut_as_its_weights_are);
  tcase_add_loop_test(c, an_operation_with_any_field_changed_is_refused, 0, 3);
  tcase_add_loop_test(c, a_list_without_any_one_of_its_waits_is_refused, 0, 3);
  tcase_add_loop_test(c, keys_fetched_after_no_operation_are_refused, 0, 3);
  tcase_add_loop_test(c, a_schedule_with_other_counts_is_refused, 0, 3);
  tcase_add_test(c, with_one_row_tile_no_two_neighbours_can_change_places);
  tcase_add_test(c, between_router_and_experts_nobody_waits_twice);
  tcase_add_test(c, ranks_run_lists_that_are_alike);
  tcase_add_test(c, bytes_are_the_rooflines_but_for_padding);
  tcase_add_test(c, buffers_are_as_the_first_round_expects_them);
  tcase_add_test(c, attention_turns_positions_by_its_own_angles);
  tcase_add_test(c, ranks_learn_each_others_buffers);
  tcase_add_test(c, memory_is_known_before_anything_is_allocated);
  tcase_add_test(c, what_the_kernels_cannot_run_is_refused_by_name);
  tcase_add_test(c, every_failed_allocation_is_reported_and_leaks_nothing);
  return us_suite("schedule", c);
}

US_TEST_MAIN(make_suite)
