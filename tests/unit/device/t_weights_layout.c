/* t_weights_layout.c: how models are cut into ranks and pages. No GPU: the plan is geometry. */
#include "device/weights_layout.h"
#include "device/weights_plan.h"
#include "suite.h"

#include <stdlib.h>
#include <string.h>

static struct us_shape load_shape(const char *name) {
  struct us_shape shape;
  struct us_err err = {0};
  ck_assert_msg(us_shape_load(name, &shape, &err) == US_OK, "%s", err.message);
  return shape;
}

/* Cut evenly by 8 ranks, every format somewhere. */
static struct us_shape even_shape(void) {
  struct us_shape s = load_shape("tiny-pro");
  s.hidden = 256, s.vocab = 512, s.dense_inner = 256, s.expert_inner = 256, s.qkv_chunks = 8;
  s.full.q_heads = s.swa.q_heads = 16, s.full.kv_heads = s.swa.kv_heads = 8;
  s.full.qk_dim = s.swa.qk_dim = 64, s.full.v_dim = s.swa.v_dim = 32;
  s.precision.qkv = US_FORMAT_FP8, s.precision.experts = US_FORMAT_MXFP4, s.precision.dense = US_FORMAT_FP8;
  return s;
}

static struct us_draft_shape even_draft(const struct us_shape *target) {
  struct us_draft_shape d = {
      .layers = 2, .hidden = 256, .vocab = 512, .inner = 256, .norm_eps = 1e-5, .value_scale = 1};
  d.attention = target->swa;
  d.block = 8, d.mask_id = 1, d.taps = 2, d.tap_layer[1] = 3, d.target_layers = 4;
  return d;
}

struct cut {
  struct us_model *model;
  struct us_draft *draft;
  struct us_weights_plan *plan;
};

static struct cut cut(const struct us_shape *shape, const struct us_draft_shape *opt_draft, uint32_t rank,
                      uint32_t ranks) {
  struct cut c;
  struct us_err err = {0};
  ck_assert_msg(us_weights_skeleton(shape, opt_draft, &c.model, &c.draft, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_weights_plan_create(c.model, c.draft, rank, ranks, &c.plan, &err) == US_OK, "%s",
                err.message);
  return c;
}

static void release(struct cut *c) {
  us_weights_plan_free(c->plan);
  us_model_free(c->model), us_draft_free(c->draft);
}

static void expect_refused(const struct us_shape *shape, uint32_t ranks, const char *why) {
  struct us_device_weights *weights;
  struct us_err err = {0};
  ck_assert_int_eq(us_device_weights_layout(shape, NULL, 0, ranks, &weights, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, why), "%s", err.message);
}

START_TEST(pages_are_whole_and_fit_a_stage) {
  static const char *const names[] = {"mimo-v2.5-pro", "mimo-v2-flash", "tiny", "tiny-pro",
                                      "pico",          "nano",          "mini"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    struct us_shape shape = load_shape(names[i]);
    struct cut c = cut(&shape, NULL, 0, 1);
    for (uint32_t j = 0; j < c.plan->item_count; j++) {
      const struct us_weights_item *item = &c.plan->items[j];
      const struct us_engine_matrix *m = &item->to->pages;
      ck_assert_uint_le(m->page_bytes, US_WEIGHTS_PAGE_BYTES);
      ck_assert_uint_eq(m->page_bytes % 16, 0);
      ck_assert_uint_eq(m->slices * m->groups * 32, item->to->cols);
      ck_assert_uint_eq(m->tiles, (item->to->rows + m->halves * 16u - 1) / (m->halves * 16u));
      ck_assert_uint_eq(item->to->bytes, (uint64_t)m->tiles * m->slices * m->page_bytes);
    }
    release(&c);
  }
}
END_TEST

START_TEST(gate_and_up_and_experts_down_have_their_tiles) {
  struct us_shape shape = load_shape("mimo-v2.5-pro");
  struct cut c = cut(&shape, NULL, 3, 4);
  const struct us_device_layer *moe = &c.plan->weights->layers[1], *dense = c.plan->weights->layers;
  ck_assert_uint_eq(moe->up.rows, 1024);
  ck_assert_uint_eq(moe->up.pages.halves, 2);
  ck_assert_uint_eq(moe->up.pages.groups, 4);
  ck_assert_uint_eq(moe->up.pages.page_bytes, 2176);
  ck_assert_uint_eq(moe->down.cols, 512);
  ck_assert_uint_eq(moe->down.pages.halves, 1);
  ck_assert_uint_eq(moe->qkv.rows, 32 * 192 + 2 * (192 + 128));
  ck_assert_uint_eq(dense->up.pages.format, US_FORMAT_FP8);
  ck_assert_uint_eq(dense->up.pages.halves, 2);
  ck_assert_uint_eq(dense->up.pages.groups, 2);
  release(&c);
}
END_TEST

/* MiMo-V2.5-Pro with its drafter on four GPUs: codes and scales as published, plus tails and padding. */
START_TEST(the_large_model_fits_four_gpus) {
  struct us_shape shape = load_shape("mimo-v2.5-pro");
  struct us_device_bytes bytes;
  struct us_err err = {0};
  struct us_device_weights_options options = {.rank = 1, .ranks = 4};
  ck_assert_msg(us_device_weights_bytes(&shape, NULL, &options, &bytes, &err) == US_OK, "%s", err.message);
  uint64_t expert = 3ull * 512 * 6144 / 32 * 17;
  ck_assert_uint_eq(bytes.experts, 69 * 384 * expert);
  ck_assert_uint_lt(us_device_bytes_weights(&bytes), 134ull << 30);
  ck_assert_uint_gt(us_device_bytes_weights(&bytes), 128ull << 30);
  ck_assert_uint_lt(bytes.scratch, 512ull << 20);
}
END_TEST

/* Every weight of every matrix belongs to exactly one rank (the router, whole on each, and K and V of the drafter apart). */
START_TEST(ranks_take_every_weight_once) {
  struct us_shape shape = even_shape();
  struct us_draft_shape draft = even_draft(&shape);
  for (uint32_t ranks = 1; ranks <= 8; ranks *= 2) {
    uint64_t weights = 0, expected = 0;
    for (uint32_t rank = 0; rank < ranks; rank++) {
      struct cut c = cut(&shape, &draft, rank, ranks);
      for (uint32_t i = 0; i < c.plan->item_count; i++) {
        const struct us_weights_item *item = &c.plan->items[i];
        if (strstr(item->name, "router") || strstr(item->name, "drafter kv")) continue;
        weights += (uint64_t)item->count * item->pages.rows * item->pages.cols;
      }
      struct us_tensor_ref *refs[2];
      size_t count[2];
      struct us_err err = {0};
      ck_assert_int_eq(us_model_tensors(c.model, &refs[0], &count[0], &err), US_OK);
      ck_assert_int_eq(us_draft_tensors(c.draft, &refs[1], &count[1], &err), US_OK);
      for (int k = 0; rank == 0 && k < 2; k++)
        for (size_t i = 0; i < count[k]; i++)
          if (refs[k][i].matrix && strcmp(refs[k][i].family, "router") && strcmp(refs[k][i].family, "embed"))
            expected += (uint64_t)refs[k][i].rows * refs[k][i].cols;
      free(refs[0]), free(refs[1]);
      release(&c);
    }
    ck_assert_uint_eq(weights, expected);
  }
}
END_TEST

START_TEST(heads_of_fused_chunks_become_queries_keys_values) {
  struct us_shape shape = even_shape();
  struct cut c =
      cut(&shape, NULL, 1, 4); /* heads 4..7, KV heads 2, 3: chunks 2 and 3 of (2 * 64 + 64 + 32) rows */
  const struct us_weights_item *item = NULL;
  for (uint32_t i = 0; i < c.plan->item_count; i++)
    if (!strcmp(c.plan->items[i].name, "layers.2.qkv")) item = &c.plan->items[i];
  ck_assert_ptr_nonnull(item);
  static const struct us_weights_gather rows[] = {{.first = 448, .rows = 128}, {.first = 672, .rows = 128},
                                                  {.first = 576, .rows = 64},  {.first = 800, .rows = 64},
                                                  {.first = 640, .rows = 32},  {.first = 864, .rows = 32}};
  ck_assert_uint_eq(item->gathers, 6);
  for (int i = 0; i < 6; i++) {
    ck_assert_uint_eq(item->gather[i].first, rows[i].first);
    ck_assert_uint_eq(item->gather[i].rows, rows[i].rows);
  }
  release(&c);
}
END_TEST

START_TEST(pieces_cover_an_item_once) {
  struct us_shape shape = load_shape("mimo-v2.5-pro");
  struct cut c = cut(&shape, NULL, 0, 4);
  for (uint32_t i = 0; i < c.plan->item_count; i++) {
    const struct us_weights_item *item = &c.plan->items[i];
    struct us_weights_piece piece = {0};
    uint64_t tiles = 0, next = 0, per_matrix = us_pages_tiles(&item->pages);
    while (us_weights_next(item, &piece)) {
      ck_assert_uint_eq(piece.first * per_matrix + piece.tile, next);
      ck_assert(piece.count == 1 || piece.tiles == per_matrix);
      ck_assert_uint_le(us_weights_stage(item, &piece).bytes, c.plan->piece_bytes);
      next += (uint64_t)piece.count * piece.tiles, tiles = next;
    }
    ck_assert_uint_eq(tiles, item->count * per_matrix);
  }
  release(&c);
}
END_TEST

START_TEST(a_vocabulary_that_does_not_divide_ends_early) {
  struct us_shape shape = even_shape();
  shape.vocab = 500;
  struct cut c = cut(&shape, NULL, 7, 8);
  ck_assert_uint_eq(c.plan->weights->embed_rows, 63);
  ck_assert_uint_eq(c.plan->weights->head.rows, 59);
  ck_assert_uint_eq(c.plan->weights->head.pages.tiles, 4);
  release(&c);
  shape.vocab = 9;
  struct us_device_weights *weights;
  struct us_err err = {0};
  ck_assert_int_eq(us_device_weights_layout(&shape, NULL, 7, 8, &weights, &err), US_ERR_USAGE);
}
END_TEST

START_TEST(a_drafters_own_head_is_cut_as_the_targets_and_counted_apart) {
  static const enum us_format formats[] = {US_FORMAT_MXFP4, US_FORMAT_FP8, US_FORMAT_BF16};
  struct us_shape shape = even_shape();
  struct us_draft_shape draft = even_draft(&shape);
  struct us_device_bytes shared, own;
  struct us_err err = {0};
  shape.vocab = draft.vocab = 500;
  for (uint32_t rank = 0; rank < 8; rank += 7)
    for (size_t i = 0; i < 3; i++) {
      draft.head = US_FORMAT_NONE;
      struct us_device_weights_options options = {.rank = rank, .ranks = 8};
      ck_assert_int_eq(us_device_weights_bytes(&shape, &draft, &options, &shared, &err), US_OK);
      draft.head = formats[i];
      ck_assert_int_eq(us_device_weights_bytes(&shape, &draft, &options, &own, &err), US_OK);
      struct cut c = cut(&shape, &draft, rank, 8);
      const struct us_device_weights *w = c.plan->weights;
      ck_assert_uint_eq(w->draft_head.rows, w->head.rows);
      ck_assert_int_eq(w->draft_head.pages.format, formats[i]);
      ck_assert_uint_eq(own.draft_head, us_weights_align(w->draft_head.bytes));
      ck_assert_uint_eq(us_device_bytes_weights(&own), us_device_bytes_weights(&shared) + own.draft_head);
      ck_assert_uint_eq(shared.draft_head, 0);
      release(&c);
    }
}
END_TEST

/* Every rank has the table of the tokens before whole, and the rows of its own ids of the other. */
START_TEST(a_markov_heads_tables_are_counted_and_too_large_a_rank_refused) {
  struct us_shape shape = even_shape();
  struct us_draft_shape draft = even_draft(&shape);
  struct us_device_bytes without, with;
  struct us_err err = {0};
  shape.vocab = draft.vocab = 500;
  for (uint32_t rank = 0; rank < 8; rank += 7) { /* 63 ids, and 59 */
    struct us_device_weights_options options = {.rank = rank, .ranks = 8};
    draft.markov = 0;
    ck_assert_int_eq(us_device_weights_bytes(&shape, &draft, &options, &without, &err), US_OK);
    draft.markov = 64;
    ck_assert_int_eq(us_device_weights_bytes(&shape, &draft, &options, &with, &err), US_OK);
    ck_assert_uint_eq(with.draft - without.draft,
                      us_weights_align(500 * 128) + us_weights_align((rank ? 59 : 63) * 128));
  }
  shape.hidden = draft.hidden = 512; /* a rank is no larger */
  draft.markov = US_ENGINE_MARKOV + 32;
  ck_assert_int_eq(
      us_device_weights_bytes(&shape, &draft, &(struct us_device_weights_options){.ranks = 8}, &with, &err),
      US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, "rank 288; on the GPU 256 at most"), "%s", err.message);
}
END_TEST

START_TEST(shapes_that_cannot_be_cut_say_which_size) {
  struct us_shape shape = load_shape("pico");
  expect_refused(
      &shape, 2,
      "layers.1.experts: an inner size of 96 does not make 2 shares of a multiple of 32 columns; it "
      "runs on 1 rank");
  expect_refused(&shape, 4, "KV heads: 2 cannot be shared by 4 ranks");
  expect_refused(&shape, 3, "rank 0 of 3");
  shape.precision.experts = US_FORMAT_F32;
  expect_refused(&shape, 1, "f32");
  shape = even_shape();
  shape.precision.embed = US_FORMAT_F32;
  expect_refused(&shape, 1, "embedding");
  shape = load_shape("tiny-pro");
  shape.precision.qkv = US_FORMAT_FP8; /* heads of 24 rows */
  expect_refused(&shape, 1, "layers.0.qkv: its rows cut FP8 blocks");
}
END_TEST

START_TEST(parts_of_different_formats_are_refused) {
  struct us_shape shape = even_shape();
  struct us_model *model;
  struct us_draft *draft;
  struct us_weights_plan *plan;
  struct us_err err = {0};
  ck_assert_int_eq(us_weights_skeleton(&shape, NULL, &model, &draft, &err), US_OK);
  model->layers[2].experts[5].up.format = US_FORMAT_BF16;
  ck_assert_int_eq(us_weights_plan_create(model, NULL, 0, 1, &plan, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, "layers.2.experts: parts in mxfp4 and in bf16"), "%s", err.message);
  us_model_free(model);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("weights_layout");
  tcase_add_test(c, pages_are_whole_and_fit_a_stage);
  tcase_add_test(c, gate_and_up_and_experts_down_have_their_tiles);
  tcase_add_test(c, the_large_model_fits_four_gpus);
  tcase_add_test(c, ranks_take_every_weight_once);
  tcase_add_test(c, heads_of_fused_chunks_become_queries_keys_values);
  tcase_add_test(c, pieces_cover_an_item_once);
  tcase_add_test(c, a_vocabulary_that_does_not_divide_ends_early);
  tcase_add_test(c, a_drafters_own_head_is_cut_as_the_targets_and_counted_apart);
  tcase_add_test(c, a_markov_heads_tables_are_counted_and_too_large_a_rank_refused);
  tcase_add_test(c, shapes_that_cannot_be_cut_say_which_size);
  tcase_add_test(c, parts_of_different_formats_are_refused);
  return us_suite("weights_layout", c);
}
US_TEST_MAIN(make_suite)
