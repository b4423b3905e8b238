/* schedule_fixture.h: weights without data, and schedules over memory that is only counted. */
#ifndef US_TESTS_DEVICE_SCHEDULE_FIXTURE_H
#define US_TESTS_DEVICE_SCHEDULE_FIXTURE_H

#include "device/schedule.h"
#include "device/weights_layout.h"
#include "plan/program.h"
#include "suite.h"

struct fixture {
  struct us_shape shape;
  struct us_draft_shape draft;
  bool drafts;
  struct us_device_weights *weights;
  struct us_device_schedule *schedule;
  uint64_t next; /* of counted memory */
};

static inline struct us_shape load_shape(const char *name) {
  struct us_shape shape;
  struct us_err err = {0};
  ck_assert_msg(us_shape_load(name, &shape, &err) == US_OK, "%s", err.message);
  return shape;
}

/* A drafter of any target: windowed attention of its heads, taps of the first and last layer. */
static inline struct us_draft_shape draft_of(const struct us_shape *s) {
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
static inline void *fake(uint64_t *next, uint64_t bytes) {
  void *at = (void *)(uintptr_t)*next;
  *next += us_device_align(bytes);
  return at;
}

static inline void fake_layers(struct us_device_layer *layers, uint32_t count, uint64_t *next) {
  for (uint32_t l = 0; l < count; l++) {
    struct us_device_layer *y = &layers[l];
    struct us_device_matrix *m[] = {&y->qkv, &y->o_proj, &y->router, &y->up, &y->down};
    float **v[] = {&y->input_norm, &y->post_norm, &y->sink, &y->router_bias, &y->q_norm, &y->k_norm};
    for (size_t i = 0; i < 5; i++)
      if (m[i]->rows) m[i]->pages.pages = fake(next, 1);
    for (size_t i = 0; i < 6; i++) *v[i] = fake(next, 1);
  }
}

static inline void fake_pointers(struct us_device_weights *w, uint64_t *next) {
  fake_layers(w->layers, w->shape.layers, next);
  if (w->draft_layers) fake_layers(w->draft_layers, w->draft_shape.layers, next);
  float **v[] = {&w->final_norm, &w->draft_k_norms, &w->draft_hidden_norm, &w->draft_final_norm,
                 &w->mask_embedding};
  for (size_t i = 0; i < 5; i++) *v[i] = fake(next, 1);
  w->embed = fake(next, 1);
  w->head.pages.pages = fake(next, 1), w->draft_fc.pages.pages = fake(next, 1),
  w->draft_kv.pages.pages = fake(next, 1);
  if (w->draft_head.rows) w->draft_head.pages.pages = fake(next, 1);
  if (w->draft_shape.markov) w->markov_before = fake(next, 1), w->markov_after = fake(next, 1);
}

static inline enum us_status lay_out(struct fixture *f, uint32_t rank, uint32_t ranks, struct us_err *err) {
  uint64_t next = 4096;
  enum us_status status =
      us_device_weights_layout(&f->shape, f->drafts ? &f->draft : NULL, rank, ranks, &f->weights, err);
  if (status == US_OK) fake_pointers(f->weights, &next);
  return status;
}

static inline void make(struct fixture *f, uint32_t rank, uint32_t ranks,
                        struct us_device_schedule_options options) {
  struct us_err err = {0};
  options.drafter = f->drafts;
  ck_assert_msg(lay_out(f, rank, ranks, &err) == US_OK, "%s", err.message);
  f->next = (uint64_t)1 << 40;
  struct us_device_memory_ops memory = us_device_memory_count(&f->next);
  ck_assert_msg(us_device_schedule_create_in(f->weights, &options, &memory, &f->schedule, &err) == US_OK,
                "%s: %s", f->shape.name, err.message);
}

static inline void release(struct fixture *f) {
  us_device_schedule_free(f->schedule);
  us_device_layout_free(f->weights);
}

static inline struct fixture tiny(void) {
  struct fixture f = {.shape = load_shape("tiny-pro"), .drafts = true};
  f.shape.dense_inner = 256, f.shape.expert_inner = 128; /* 4 ranks can share them */
  f.draft = draft_of(&f.shape);
  return f;
}

static inline void expect_proved(const struct fixture *f, const char *what) {
  struct us_err err = {0};
  ck_assert_msg(us_device_schedule_check(f->schedule, &err) == US_OK, "%s, %s: %s", f->shape.name, what,
                err.message);
}

#endif
