/* t_kv.c: the key/value cache: what is written is read, forks share until written, rings keep what is needed. */
#include "formats/bf16.h"
#include "model/forward.h"
#include "model/kv.h"
#include "suite.h"

#include <string.h>

static struct us_kv_spec spec_of(uint32_t window) {
  return (struct us_kv_spec){
      .layers = 2,
      .attention = {{.q_heads = 4, .kv_heads = 2, .qk_dim = 24, .v_dim = 16},
                    {.q_heads = 4, .kv_heads = 1, .qk_dim = 8, .v_dim = 8, .window = window}},
      .kind = {0, 1}};
}

static struct us_kv *create(uint32_t window, enum us_kv_type type) {
  struct us_kv_spec spec = spec_of(window);
  struct us_kv *kv;
  struct us_err err = {0};
  ck_assert_int_eq(us_kv_create(&spec, 300, type, &kv, &err), US_OK);
  return kv;
}

/* A value that names its place; `salt` tells two writers apart. */
static float mark(uint32_t layer, uint32_t position, uint32_t g, uint32_t d, uint32_t salt) {
  return (float)(layer + 2 * g + 4 * (d % 8)) + (float)position + 1000.0f * (float)salt;
}

static void write_row(struct us_kv *kv, uint32_t position, uint32_t salt) {
  float k[24], v[24];
  struct us_err err = {0};
  const struct us_kv_spec *spec = us_kv_spec_used(kv);
  ck_assert_msg(us_kv_reserve(kv, position, 1, &err) == US_OK, "%s", err.message);
  for (uint32_t l = 0; l < 2; l++)
    for (uint32_t g = 0; g < spec->attention[l].kv_heads; g++) {
      for (uint32_t d = 0; d < 24; d++) {
        k[d] = mark(l, position, g, d, salt);
        v[d] = -k[d];
      }
      us_kv_write(kv, l, position, g, k, v);
    }
}

static void check_row(const struct us_kv *kv, uint32_t layer, uint32_t position, uint32_t salt) {
  float k[24], v[24];
  const struct us_attention_shape *a = &us_kv_spec_used(kv)->attention[layer];
  for (uint32_t g = 0; g < a->kv_heads; g++) {
    us_kv_read_k(kv, layer, position, g, k);
    us_kv_read_v(kv, layer, position, g, v);
    for (uint32_t d = 0; d < a->v_dim; d++) {
      float expected = mark(layer, position, g, d, salt);
      if (us_kv_type_of(kv) == US_KV_BF16) expected = us_bf16_round(expected);
      ck_assert_msg(k[d] == expected && v[d] == -expected, "layer %u position %u: %g, not %g", layer,
                    position, (double)k[d], (double)expected);
    }
  }
}

START_TEST(what_is_written_is_read_rounded_to_the_type) {
  for (int type = US_KV_BF16; type <= US_KV_F32; type++) {
    struct us_kv *kv = create(20, (enum us_kv_type)type);
    for (uint32_t p = 0; p < 300; p++) write_row(kv, p, 1);
    for (uint32_t p = 0; p < 300; p++) check_row(kv, 0, p, 1);
    us_kv_free(kv);
  }
}
END_TEST

START_TEST(a_ring_keeps_a_window_before_a_block_that_was_rejected) {
  static const uint32_t windows[] = {1, 20, 49, 50, 64, 128};
  for (size_t i = 0; i < sizeof windows / sizeof *windows; i++) {
    uint32_t window = windows[i];
    struct us_kv *kv = create(window, US_KV_F32);
    for (uint32_t p = 0; p < 200; p++) write_row(kv, p, 1);
    for (uint32_t p = 200; p < 200 + US_MAX_BLOCK; p++)
      write_row(kv, p, 2); /* drafts, all but the first rejected */
    for (uint32_t p = 200 - window + 1; p <= 200; p++) check_row(kv, 1, p, p < 200 ? 1 : 2);
    us_kv_free(kv);
  }
}
END_TEST

START_TEST(a_windowed_layer_takes_whole_pages_however_long_the_text) {
  struct us_kv *kv = create(50, US_KV_BF16); /* 50 + 15 slots are 2 pages */
  for (uint32_t p = 0; p < 300; p++) write_row(kv, p, 1);
  ck_assert_uint_eq(us_kv_keys(kv, 1).page_count, 2);
  ck_assert_uint_eq(us_kv_bytes(kv), 5 * 64 * 2 * (24 + 16) * 2 + 2 * 64 * (8 + 8) * 2);
  us_kv_free(kv);
}
END_TEST

START_TEST(a_fork_shares_pages_until_one_side_writes) {
  struct us_kv *parent = create(20, US_KV_F32), *child;
  struct us_err err = {0};
  for (uint32_t p = 0; p < 100; p++) write_row(parent, p, 1);
  ck_assert_int_eq(us_kv_fork(parent, &child, &err), US_OK);
  ck_assert_ptr_eq(us_kv_k(parent, 0, 10, 0), us_kv_k(child, 0, 10, 0));
  ck_assert_ptr_eq(us_kv_k(parent, 0, 99, 0), us_kv_k(child, 0, 99, 0));
  write_row(child, 100, 2);
  write_row(parent, 100, 3);
  ck_assert_ptr_eq(us_kv_k(parent, 0, 10, 0), us_kv_k(child, 0, 10, 0));
  ck_assert_ptr_ne(us_kv_k(parent, 0, 99, 0), us_kv_k(child, 0, 99, 0));
  for (uint32_t l = 0; l < 2; l++) {
    for (uint32_t p = 90; p < 100; p++) {
      check_row(parent, l, p, 1);
      check_row(child, l, p, 1);
    }
    check_row(child, l, 100, 2);
    check_row(parent, l, 100, 3);
  }
  us_kv_free(parent);
  for (uint32_t p = 0; p < 100; p++) check_row(child, 0, p, 1); /* outlives its parent */
  us_kv_free(child);
}
END_TEST

START_TEST(positions_past_the_end_are_refused) {
  struct us_kv *kv = create(20, US_KV_BF16);
  struct us_err err = {0};
  ck_assert_int_eq(us_kv_reserve(kv, 299, 1, &err), US_OK);
  ck_assert_int_eq(us_kv_reserve(kv, 299, 2, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_kv_reserve(kv, 0xfffffff0u, 32, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_kv_reserve(kv, 300, 0, &err), US_OK);
  us_kv_free(kv);
  us_kv_free(NULL);
}
END_TEST

/* ---- pages in another memory ---- */

#define PLACES 64

/* A memory of PLACES pages of one word: taken or not, and what it holds. */
struct elsewhere {
  bool taken[PLACES];
  uint64_t content[PLACES];
  uint32_t takes, copies, gives, forgotten;
};

static enum us_status take_place(void *arg, uint32_t kind, uint64_t *ret_place, struct us_err *err) {
  struct elsewhere *e = arg;
  for (uint32_t i = kind * PLACES / 2; i < (kind + 1) * PLACES / 2; i++)
    if (!e->taken[i]) {
      e->taken[i] = true, e->content[i] = 0, e->takes++;
      *ret_place = i;
      return US_OK;
    }
  return us_err_set(err, US_ERR_MEMORY, "no place");
}

static enum us_status copy_place(void *arg, uint32_t kind, uint64_t to, uint64_t from, struct us_err *err) {
  struct elsewhere *e = arg;
  ck_assert(e->taken[to] && e->taken[from] && to / (PLACES / 2) == kind && from / (PLACES / 2) == kind);
  e->content[to] = e->content[from], e->copies++;
  return US_OK;
}

static void give_place(void *arg, uint32_t kind, uint64_t place) {
  struct elsewhere *e = arg;
  ck_assert(e->taken[place] && place / (PLACES / 2) == kind);
  e->taken[place] = false, e->gives++;
}

static void forget_cache(void *arg, const struct us_kv *kv) {
  ((struct elsewhere *)arg)->forgotten++;
}

static struct us_kv_memory memory_of(struct elsewhere *e) {
  return (struct us_kv_memory){.take = take_place,
                               .copy = copy_place,
                               .give = give_place,
                               .forget = forget_cache,
                               .arg = e,
                               .page_bytes = {100, 10},
                               .max_positions = 400};
}

static struct us_kv *create_elsewhere(const struct us_kv_memory *memory) {
  struct us_kv_spec spec = spec_of(20);
  struct us_kv *kv;
  struct us_err err = {0};
  ck_assert_int_eq(us_kv_create_in(memory, &spec, 300, US_KV_BF16, &kv, &err), US_OK);
  return kv;
}

START_TEST(pages_elsewhere_are_taken_when_reserved_and_given_back_once) {
  struct elsewhere e = {.takes = 0};
  struct us_kv_memory memory = memory_of(&e);
  struct us_kv *kv = create_elsewhere(&memory), *host = create(20, US_KV_BF16);
  struct us_err err = {0};
  ck_assert_ptr_eq(us_kv_memory_of(kv), &memory);
  ck_assert_ptr_null(us_kv_memory_of(host));
  ck_assert(us_kv_place(kv, 0, 1) == US_KV_ABSENT);
  ck_assert_int_eq(us_kv_reserve(kv, 0, 130, &err), US_OK);
  ck_assert_uint_eq(e.takes, 3 + 1); /* 130 positions of the full layer; the ring is one page */
  ck_assert(us_kv_place(kv, 0, 2) != US_KV_ABSENT && us_kv_place(kv, 0, 3) == US_KV_ABSENT);
  uint64_t version = us_kv_version(kv);
  ck_assert_int_eq(us_kv_reserve(kv, 130, 8, &err), US_OK);
  ck_assert_msg(us_kv_version(kv) == version, "no place changed");
  ck_assert_int_eq(us_kv_reserve(kv, 190, 8, &err), US_OK);
  ck_assert(us_kv_version(kv) > version);
  ck_assert_uint_eq(us_kv_bytes(kv), 4 * 100 + 10);
  us_kv_free(kv);
  us_kv_free(host);
  ck_assert_uint_eq(e.gives, e.takes);
  ck_assert_uint_eq(e.forgotten, 1);
}
END_TEST

START_TEST(forks_elsewhere_share_until_reserved_and_then_copy) {
  struct elsewhere e = {.takes = 0};
  struct us_kv_memory memory = memory_of(&e);
  struct us_kv *parent = create_elsewhere(&memory), *child;
  struct us_err err = {0};
  ck_assert_int_eq(us_kv_reserve(parent, 0, 100, &err), US_OK);
  e.content[us_kv_place(parent, 0, 1)] = 7;
  ck_assert_int_eq(us_kv_fork(parent, &child, &err), US_OK);
  ck_assert(us_kv_place(parent, 0, 1) == us_kv_place(child, 0, 1));
  ck_assert_int_eq(us_kv_reserve(child, 100, 1, &err), US_OK);
  ck_assert(us_kv_place(parent, 0, 0) == us_kv_place(child, 0, 0));
  ck_assert(us_kv_place(parent, 0, 1) != us_kv_place(child, 0, 1));
  ck_assert_uint_eq(e.content[us_kv_place(child, 0, 1)], 7);
  ck_assert_uint_eq(e.copies, 2);
  us_kv_free(parent);
  ck_assert(e.taken[us_kv_place(child, 0, 0)]); /* outlives its parent */
  us_kv_free(child);
  ck_assert_uint_eq(e.gives, e.takes);
}
END_TEST

START_TEST(a_full_memory_elsewhere_is_an_error_and_loses_nothing) {
  struct elsewhere e = {.takes = 0};
  struct us_kv_memory memory = memory_of(&e);
  struct us_kv_spec spec = spec_of(20);
  struct us_kv *kv[8], *wide;
  struct us_err err = {0};
  uint32_t made = 0;
  while (made < 8) {
    kv[made++] = create_elsewhere(&memory);
    if (us_kv_reserve(kv[made - 1], 0, 300, &err) != US_OK) break;
  }
  ck_assert_int_eq(err.status, US_ERR_MEMORY);
  ck_assert_uint_eq(made, 7); /* 5 pages a cache of 32 */
  ck_assert_int_eq(us_kv_create_in(&memory, &spec, 401, US_KV_BF16, &wide, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "a sequence of 401 positions; the device's caches have room for 400");
  while (made) us_kv_free(kv[--made]);
  ck_assert_uint_eq(e.gives, e.takes);
}
END_TEST

START_TEST(an_executor_of_this_process_refuses_pages_elsewhere) {
  struct elsewhere e = {.takes = 0};
  struct us_kv_memory memory = memory_of(&e);
  struct us_kv_spec spec = spec_of(20);
  struct us_kv *kv = create_elsewhere(&memory);
  struct us_err err = {0};
  ck_assert_int_eq(us_forward_check_kv(kv, &spec, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "the key/value cache lies in the memory of a device");
  us_kv_free(kv);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("kv");
  tcase_add_test(c, what_is_written_is_read_rounded_to_the_type);
  tcase_add_test(c, a_ring_keeps_a_window_before_a_block_that_was_rejected);
  tcase_add_test(c, a_windowed_layer_takes_whole_pages_however_long_the_text);
  tcase_add_test(c, a_fork_shares_pages_until_one_side_writes);
  tcase_add_test(c, positions_past_the_end_are_refused);
  tcase_add_test(c, pages_elsewhere_are_taken_when_reserved_and_given_back_once);
  tcase_add_test(c, forks_elsewhere_share_until_reserved_and_then_copy);
  tcase_add_test(c, a_full_memory_elsewhere_is_an_error_and_loses_nothing);
  tcase_add_test(c, an_executor_of_this_process_refuses_pages_elsewhere);
  return us_suite("kv", c);
}
US_TEST_MAIN(make_suite)
