/* t_schedule.c: the engine's lists of operations, for every shape, without a GPU.
 *
 * Contents: every shape; what lists are made of; memory; refusals.
 *
 * Independent truth: the proof in us_device_schedule_check (t_schedule_check.c breaks it); bytes from the roofline; the rotary
 * tables' definition.
 */
#include "fail_alloc.h"
#include "kernels/rope/rope.h"
#include "plan/roofline.h"
#include "schedule_fixture.h"

#include <string.h>

/* ---- every shape ------------------------------------------------------------------------------------------------- */

static const struct {
  uint32_t batch, block;
} passes[] = {{1, 1}, {1, 8}, {2, 8}, {8, 8}, {1, 16}, {4, 16}, {3, 5}, {8, 9}, {8, 16}};

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
         (struct us_device_schedule_options){
             .batch = passes[i].batch, .block = passes[i].block, .adaptive = i % 2});
    expect_proved(f, what);
    release(f);
  }
}

START_TEST(lists_of_every_shape_rank_and_number_of_rows_are_proved) {
  static const char *const names[] = {"tiny", "tiny-pro",      "pico",      "nano",
                                      "mini", "mimo-v2-flash", "mimo-v2.5", "mimo-v2.5-pro"};
  struct fixture f = {.shape = load_shape(names[_i])};
  for (uint32_t ranks = 1; ranks <= 8; ranks *= 2)
    for (int drafts = 0; drafts < 3; drafts++) {
      f.drafts = drafts;
      f.draft = draft_of(&f.shape);
      f.draft.markov = drafts == 2 ? 64 : 0;
      prove_shape(&f, ranks);
    }
}
END_TEST

/* As data/recipes trains them: MXFP4 experts, FP8 elsewhere. No rank count may be refused. */
START_TEST(models_of_the_recipes_are_served_by_1_2_and_4_ranks_in_fp8) {
  struct fixture f = {.shape = load_shape(_i ? "mini" : "nano"), .drafts = true};
  f.draft = draft_of(&f.shape);
  for (int head = 0; head < 2; head++)
    for (uint32_t ranks = 1; ranks <= 4; ranks *= 2) {
      f.shape.precision = (struct us_precision){.embed = US_FORMAT_BF16,
                                                .head = head ? US_FORMAT_FP8 : US_FORMAT_BF16,
                                                .qkv = US_FORMAT_FP8,
                                                .o_proj = US_FORMAT_FP8,
                                                .dense = US_FORMAT_FP8,
                                                .experts = US_FORMAT_MXFP4,
                                                .router = US_FORMAT_F32,
                                                .draft = head ? US_FORMAT_FP8 : US_FORMAT_BF16};
      make(&f, ranks - 1, ranks, (struct us_device_schedule_options){.batch = 1, .block = 8});
      expect_proved(&f, "8 rows");
      release(&f);
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

/* The pages of the operation that makes a pass's logits. */
static const void *head_pages(const struct us_device_schedule *s, uint32_t pass) {
  const void *pages = NULL;
  for (uint32_t i = s->begin[pass]; i < s->end[pass]; i++)
    if (s->ops[i].task_op == US_TASK_HEAD) pages = s->ops[i].gemm.w.pages;
  return pages;
}

START_TEST(a_drafter_with_a_head_of_its_own_streams_that) {
  static const enum us_format formats[] = {US_FORMAT_MXFP4, US_FORMAT_FP8, US_FORMAT_BF16};
  struct fixture f = tiny();
  for (uint32_t ranks = 1; ranks <= 4; ranks *= 2)
    for (uint32_t i = 0; i < 3; i++)
      for (uint32_t batch = 1; batch <= 4; batch *= 4) {
        f.draft.head = formats[i];
        make(&f, ranks - 1, ranks, (struct us_device_schedule_options){.batch = batch, .block = 8});
        expect_proved(&f, us_format_name(formats[i]));
        ck_assert_ptr_eq(head_pages(f.schedule, US_ENGINE_PASS_TARGET), f.weights->head.pages.pages);
        ck_assert_ptr_eq(head_pages(f.schedule, US_ENGINE_PASS_DRAFT), f.weights->draft_head.pages.pages);
        release(&f);
      }
}
END_TEST

/* ---- what lists are made of -------------------------------------------------------------------------------------- */

START_TEST(between_router_and_experts_nobody_waits_twice) {
  struct fixture f = tiny();
  make(&f, 0, 2, (struct us_device_schedule_options){.batch = 1, .block = 8});
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
  for (uint32_t i = 0; i < US_ENGINE_COUNTERS * s->op_count; i++) ck_assert_uint_eq(r->claimed[i], 0);
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
  tcase_add_loop_test(c, lists_of_every_shape_rank_and_number_of_rows_are_proved, 0, 8);
  tcase_add_loop_test(c, models_of_the_recipes_are_served_by_1_2_and_4_ranks_in_fp8, 0, 2);
  tcase_add_test(c, the_published_model_and_drafter_are_cut_by_1_2_4_and_8_ranks);
  tcase_add_test(c, a_vocabulary_that_ranks_do_not_divide_is_cut_as_its_weights_are);
  tcase_add_test(c, a_drafter_with_a_head_of_its_own_streams_that);
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
