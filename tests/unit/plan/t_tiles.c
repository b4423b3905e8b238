/* t_tiles.c: the tile executor gives the bits of the reference executor, whatever the cut, and can stop after any op.
 *
 * Independent truth: the reference executor, which shares the kernels but neither the schedule nor the buffers.
 */
#include "model/random.h"
#include "plan/tiles.h"
#include "suite.h"

#include <string.h>

#define POSITIONS 80 /* several times tiny's window of 16, and more than a page of 64 */

struct fixture {
  struct us_model *model;
  struct us_draft *draft;
  struct us_pool *pool;
  struct us_executor *reference, *tiles;
};

static uint32_t markov; /* of the drafter */
static enum us_format own_head;

static struct us_draft_shape draft_shape(const struct us_shape *target) {
  struct us_draft_shape draft = {.layers = 2,
                                 .hidden = target->hidden,
                                 .vocab = target->vocab,
                                 .head = own_head,
                                 .inner = 128,
                                 .norm_eps = 1e-5,
                                 .value_scale = 0.612,
                                 .block = 8,
                                 .mask_id = 3,
                                 .taps = 3,
                                 .tap_layer = {0, 2, 3},
                                 .target_layers = target->layers,
                                 .markov = markov};
  draft.attention = (struct us_attention_shape){.q_heads = 4,
                                                .kv_heads = 2,
                                                .qk_dim = 32,
                                                .v_dim = 32,
                                                .rotary_dim = 16,
                                                .rope_theta = 1e4,
                                                .window = 24,
                                                .sink = true};
  return draft;
}

static void make(struct fixture *f, const char *name, int threads, enum us_rounding rounding) {
  struct us_shape shape;
  struct us_err err = {0};
  ck_assert_msg(us_shape_load(name, &shape, &err) == US_OK, "%s", err.message);
  struct us_draft_shape draft = draft_shape(&shape);
  ck_assert_int_eq(us_pool_create(threads, &f->pool, &err), US_OK);
  ck_assert_msg(us_model_random(&shape, 5, f->pool, &f->model, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_draft_random(&draft, US_FORMAT_BF16, 6, f->pool, &f->draft, &err) == US_OK, "%s",
                err.message);
  ck_assert_int_eq(us_executor_create_reference(f->model, f->draft, f->pool, rounding, &f->reference, &err),
                   US_OK);
  ck_assert_int_eq(us_executor_create_tiles(f->model, f->draft, f->pool, rounding, &f->tiles, &err), US_OK);
}

static void drop(struct fixture *f) {
  f->tiles->ops->free(f->tiles);
  f->reference->ops->free(f->reference);
  us_draft_free(f->draft);
  us_model_free(f->model);
  us_pool_free(f->pool);
}

/* Outputs of POSITIONS tokens run in passes of `rows` rows. */
struct outputs {
  float *logits, *taps, *drafts;
  uint32_t *routed;
};

static int32_t token_at(const struct fixture *f, uint32_t position) {
  return (int32_t)((position * 2654435761u >> 7) % f->model->shape.vocab);
}

static void run(const struct fixture *f, struct us_executor *ex, uint32_t rows, struct outputs *out) {
  const struct us_shape *s = &f->model->shape;
  size_t N = s->vocab, D = s->hidden, taps = f->draft->shape.taps;
  enum us_kv_type type = ex->rounding == US_ROUND_BF16 ? US_KV_BF16 : US_KV_F32;
  struct us_kv_spec spec = us_kv_spec_of(s), draft_spec = us_kv_spec_of_draft(&f->draft->shape);
  struct us_kv *kv, *draft_kv;
  struct us_err err = {0};
  ck_assert_int_eq(us_kv_create(&spec, 256, type, &kv, &err), US_OK);
  ck_assert_int_eq(us_kv_create(&draft_spec, 256, type, &draft_kv, &err), US_OK);
  out->logits = calloc(POSITIONS * N, sizeof(float));
  out->taps = calloc(POSITIONS * taps * D, sizeof(float));
  out->drafts = calloc(7 * N, sizeof(float));
  out->routed = calloc((size_t)s->layers * rows * s->top_k, sizeof(uint32_t));
  struct us_row *row = calloc(rows, sizeof *row);
  for (uint32_t p = 0; p < POSITIONS; p += rows) {
    uint32_t R = POSITIONS - p < rows ? POSITIONS - p : rows;
    for (uint32_t r = 0; r < R; r++)
      row[r] = (struct us_row){.token = token_at(f, p + r), .position = p + r, .kv = kv};
    struct us_pass pass = {.rows = row,
                           .R = R,
                           .logits = out->logits + p * N,
                           .taps = out->taps + p * taps * D,
                           .routed = out->routed};
    ck_assert_msg(ex->ops->forward(ex, &pass, &err) == US_OK, "%s", err.message);
    struct us_draft_context context = {
        .kv = draft_kv, .position = p, .R = R, .taps = out->taps + p * taps * D};
    ck_assert_msg(ex->ops->draft_context(ex, &context, &err) == US_OK, "%s", err.message);
  }
  struct us_draft_pass draft = {
      .kv = draft_kv, .anchor = 9, .position = POSITIONS, .block = 8, .logits = out->drafts};
  ck_assert_msg(ex->ops->draft(ex, &draft, &err) == US_OK, "%s", err.message);
  us_kv_free(kv);
  us_kv_free(draft_kv);
  free(row);
}

static void release(struct outputs *out) {
  free(out->logits);
  free(out->taps);
  free(out->drafts);
  free(out->routed);
}

static void compare(const char *shape, int threads, enum us_rounding rounding) {
  struct fixture f;
  make(&f, shape, threads, rounding);
  size_t N = f.model->shape.vocab, D = f.model->shape.hidden;
  struct outputs expected;
  run(&f, f.reference, 1, &expected);
  static const uint32_t rows[] = {1, 3, 8, 16, POSITIONS};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    struct outputs out;
    run(&f, f.tiles, rows[i], &out);
    ck_assert_msg(!memcmp(out.logits, expected.logits, POSITIONS * N * sizeof(float)),
                  "%s: logits, %u rows, %d threads", shape, rows[i], threads);
    ck_assert_msg(!memcmp(out.taps, expected.taps, POSITIONS * 3 * D * sizeof(float)), "%s: taps, %u rows",
                  shape, rows[i]);
    ck_assert_msg(!memcmp(out.drafts, expected.drafts, 7 * N * sizeof(float)), "%s: drafts, %u rows", shape,
                  rows[i]);
    release(&out);
  }
  release(&expected);
  drop(&f);
}

START_TEST(tiles_give_the_reference_bits_for_any_rows_and_threads) {
  for (int threads = 1; threads <= 4; threads++) compare("tiny", threads, US_ROUND_BF16);
}
END_TEST

START_TEST(tiles_give_the_reference_bits_with_fused_chunks) {
  compare("tiny-pro", 3, US_ROUND_BF16);
}
END_TEST

START_TEST(tiles_give_the_reference_bits_without_rounding) {
  compare("tiny", 2, US_ROUND_NONE);
}
END_TEST

START_TEST(tiles_give_the_reference_bits_with_a_markov_head) {
  struct fixture f;
  struct outputs plain, chained;
  make(&f, "tiny", 2, US_ROUND_BF16);
  run(&f, f.tiles, 8, &plain);
  drop(&f);
  markov = 32;
  compare("tiny", 3, US_ROUND_BF16);
  make(&f, "tiny", 2, US_ROUND_BF16);
  run(&f, f.tiles, 8, &chained);
  ck_assert(memcmp(plain.drafts, chained.drafts, 7 * f.model->shape.vocab * sizeof(float)) != 0);
  drop(&f);
  markov = 0;
  release(&plain);
  release(&chained);
}
END_TEST

START_TEST(tiles_give_the_reference_bits_with_a_head_of_the_drafters_own) {
  struct fixture f;
  struct outputs plain, own;
  make(&f, "tiny", 2, US_ROUND_BF16);
  run(&f, f.tiles, 8, &plain);
  drop(&f);
  own_head = US_FORMAT_MXFP4;
  compare("tiny", 3, US_ROUND_BF16);
  make(&f, "tiny", 2, US_ROUND_BF16);
  run(&f, f.tiles, 8, &own);
  size_t N = f.model->shape.vocab;
  ck_assert(memcmp(plain.drafts, own.drafts, 7 * N * sizeof(float)) != 0);
  ck_assert_mem_eq(plain.logits, own.logits, POSITIONS * N * sizeof(float)); /* the target's stay */
  drop(&f);
  markov = 32; /* row by row */
  compare("tiny", 1, US_ROUND_BF16);
  markov = 0, own_head = US_FORMAT_NONE;
  release(&plain);
  release(&own);
}
END_TEST

START_TEST(routes_are_those_of_the_reference) {
  struct fixture f;
  make(&f, "tiny", 2, US_ROUND_BF16);
  struct outputs a, b;
  run(&f, f.reference, 8, &a);
  run(&f, f.tiles, 8, &b);
  size_t ids = (size_t)f.model->shape.layers * 8 * f.model->shape.top_k;
  ck_assert(!memcmp(a.routed, b.routed, ids * sizeof *a.routed));
  release(&a);
  release(&b);
  drop(&f);
}
END_TEST

/* ---- stop after op ---- */

struct seen {
  int count, stop_after;
  uint64_t hash;
  char last[32];
};

static bool see(void *arg, const char *op, uint32_t layer, const float *values, size_t R, size_t width) {
  struct seen *seen = arg;
  const unsigned char *bytes = (const unsigned char *)values;
  for (const char *c = op; *c; c++) seen->hash = (seen->hash ^ (unsigned char)*c) * 1099511628211u;
  seen->hash = (seen->hash ^ layer) * 1099511628211u;
  for (size_t i = 0; i < R * width * sizeof *values; i++)
    seen->hash = (seen->hash ^ bytes[i]) * 1099511628211u;
  snprintf(seen->last, sizeof seen->last, "%s", op);
  return ++seen->count != seen->stop_after;
}

static struct seen watch(struct us_executor *ex, const struct us_shape *shape, int stop_after) {
  struct seen seen = {.stop_after = stop_after};
  struct us_observer observer = {.after_op = see, .arg = &seen};
  struct us_kv_spec spec = us_kv_spec_of(shape);
  struct us_kv *kv;
  ck_assert_int_eq(us_kv_create(&spec, 64, US_KV_BF16, &kv, NULL), US_OK);
  struct us_row rows[5];
  for (uint32_t r = 0; r < 5; r++)
    rows[r] = (struct us_row){.token = (int32_t)(r + 1), .position = r, .kv = kv};
  float *logits = calloc(5 * (size_t)shape->vocab, sizeof *logits);
  struct us_pass pass = {.rows = rows, .R = 5, .logits = logits, .observer = &observer};
  ck_assert_int_eq(ex->ops->forward(ex, &pass, NULL), US_OK);
  free(logits);
  us_kv_free(kv);
  return seen;
}

START_TEST(every_op_can_be_seen_and_stopped_after_with_the_reference_values) {
  struct fixture f;
  make(&f, "tiny", 3, US_ROUND_BF16);
  struct seen all = watch(f.reference, &f.model->shape, 0);
  ck_assert_str_eq(all.last, "head");
  ck_assert_int_gt(all.count, 30);
  for (int stop = 1; stop <= all.count; stop++) {
    struct seen a = watch(f.reference, &f.model->shape, stop), b = watch(f.tiles, &f.model->shape, stop);
    ck_assert_int_eq(a.count, stop);
    ck_assert_msg(a.count == b.count && a.hash == b.hash, "after op %d: %s and %s differ", stop, a.last,
                  b.last);
  }
  drop(&f);
}
END_TEST

START_TEST(bad_passes_are_usage_errors) {
  struct fixture f;
  make(&f, "tiny", 1, US_ROUND_BF16);
  struct us_kv_spec spec = us_kv_spec_of(&f.model->shape);
  struct us_kv *kv;
  ck_assert_int_eq(us_kv_create(&spec, 16, US_KV_BF16, &kv, NULL), US_OK);
  struct us_row row = {.token = (int32_t)f.model->shape.vocab, .kv = kv};
  struct us_pass pass = {.rows = &row, .R = 1};
  ck_assert_int_eq(f.tiles->ops->forward(f.tiles, &pass, NULL), US_ERR_USAGE);
  row = (struct us_row){.token = 1, .position = 16, .kv = kv};
  ck_assert_int_eq(f.tiles->ops->forward(f.tiles, &pass, NULL), US_ERR_USAGE);
  struct us_draft_pass draft = {.kv = kv, .anchor = 1, .block = 8};
  ck_assert_int_eq(f.tiles->ops->draft(f.tiles, &draft, NULL),
                   US_ERR_USAGE); /* the target's cache, not the drafter's */
  us_kv_free(kv);
  drop(&f);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("tiles");
  tcase_add_test(c, tiles_give_the_reference_bits_for_any_rows_and_threads);
  tcase_add_test(c, tiles_give_the_reference_bits_with_fused_chunks);
  tcase_add_test(c, tiles_give_the_reference_bits_without_rounding);
  tcase_add_test(c, tiles_give_the_reference_bits_with_a_markov_head);
  tcase_add_test(c, tiles_give_the_reference_bits_with_a_head_of_the_drafters_own);
  tcase_add_test(c, routes_are_those_of_the_reference);
  tcase_add_test(c, every_op_can_be_seen_and_stopped_after_with_the_reference_values);
  tcase_add_test(c, bad_passes_are_usage_errors);
  return us_suite("tiles", c);
}
US_TEST_MAIN(make_suite)
