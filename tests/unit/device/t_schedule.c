/* t_schedule.c: the engine's lists of operations, for every shape, without a GPU.
 *
 * Independent truth: the proof in us_device_schedule_check, which must refuse every list that is broken in one place; bytes
 * from the roofline; the rotary tables' definition.
 */
#include "device/schedule.h"
#include "device/weights_layout.h"
#include "kernels/rope/rope.h"
#include "plan/price.h"
#include "plan/roofline.h"
#include "suite.h"

#include <math.h>
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

__attribute__((unused)) static struct fixture tiny(void) {
  struct fixture f = {.shape = load_shape("tiny-pro"), .drafts = true};
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

static Suite *make_suite(void) {
  TCase *c = tcase_create("schedule");
  tcase_add_loop_test(c, lists_of_every_shape_rank_and_number_of_rows_are_proved, 0, 6);
  return us_suite("schedule", c);
}

US_TEST_MAIN(make_suite)
