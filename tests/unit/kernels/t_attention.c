/* t_attention.c: paged attention, against a naive softmax in double. */
#include "kernels/attention/attention.h"
#include "values.h"

#include <math.h>

enum { MAX_PAGES = 5 };

struct problem {
  struct us_attention_keys keys;
  void *pages[MAX_PAGES];
  float *q, *sink;
  uint32_t H;
};

static size_t value_bytes(const struct problem *p) {
  return p->keys.type == US_KV_F32 ? 4 : 2;
}

static struct problem new_problem(enum us_kv_type type, uint32_t pages, uint32_t H, uint32_t G, uint32_t Q,
                                  uint32_t V, uint64_t *state) {
  struct problem p = {.keys = {.page_count = pages, .type = type, .G = G, .Q = Q, .V = V}, .H = H};
  for (uint32_t i = 0; i < pages; i++) {
    size_t bytes = us_attention_page_bytes(&p.keys), n = bytes / value_bytes(&p);
    float *values = new_values(n, 1.5f, state);
    p.pages[i] = malloc(bytes);
    if (type == US_KV_F32)
      memcpy(p.pages[i], values, bytes);
    else
      us_bf16_encode(values, n, p.pages[i]);
    free(values);
  }
  p.q = new_values((size_t)H * Q, 1, state);
  p.sink = new_values(H, 1, state);
  return p;
}

static void free_problem(struct problem *p) {
  for (uint32_t i = 0; i < p->keys.page_count; i++) free(p->pages[i]);
  free(p->q);
  free(p->sink);
}

static double at(const struct problem *p, const void *page, size_t byte_offset, uint32_t d) {
  const char *row = (const char *)page + byte_offset;
  return p->keys.type == US_KV_F32 ? (double)((const float *)(const void *)row)[d]
                                   : (double)us_bf16_to_f32(((const uint16_t *)(const void *)row)[d]);
}

struct query {
  uint32_t position, cached, window;
  bool sink;
  const void *block;
  uint32_t block_rows;
};

static void run(const struct problem *p, const struct query *query, uint32_t begin, uint32_t end,
                enum us_isa isa, float *out) {
  struct us_attention_keys keys = p->keys;
  keys.pages = p->pages;
  float *scratch = calloc(us_attention_scratch(&keys, p->H), sizeof *scratch);
  us_attention(&(struct us_attention_args){.keys = &keys,
                                           .q = p->q,
                                           .H = p->H,
                                           .position = query->position,
                                           .cached = query->cached,
                                           .window = query->window,
                                           .sink = query->sink ? p->sink : NULL,
                                           .scale = (float)(1 / sqrt(p->keys.Q)),
                                           .opt_block = query->block,
                                           .block_position = query->cached,
                                           .block_rows = query->block_rows,
                                           .head_begin = begin,
                                           .head_end = end,
                                           .out = out,
                                           .isa = isa},
               scratch);
  free(scratch);
}

/* Head h of the same query by the formula, over positions in any order. */
static void naive(const struct problem *p, const struct query *query, uint32_t h, double *out) {
  uint32_t g = h / (p->H / p->keys.G), total = query->cached + query->block_rows;
  double sum = 0, max = query->sink ? (double)p->sink[h] : -INFINITY, scores[1024];
  for (uint32_t d = 0; d < p->keys.V; d++) out[d] = 0;
  for (int step = 0; step < 2; step++) {
    for (uint32_t key = 0; key < total; key++) {
      if (query->window && (int64_t)query->position - (int64_t)key >= (int64_t)query->window) continue;
      bool in_block = key >= query->cached;
      const void *page = in_block ? query->block : p->pages[key / US_KV_PAGE % p->keys.page_count];
      uint32_t slot = in_block ? key - query->cached : key % US_KV_PAGE;
      if (step == 0) {
        scores[key] = 0;
        for (uint32_t d = 0; d < p->keys.Q; d++)
          scores[key] +=
              (double)p->q[h * p->keys.Q + d] * at(p, page, us_attention_k_offset(&p->keys, g, slot), d);
        scores[key] /= sqrt(p->keys.Q);
        max = fmax(max, scores[key]);
      } else {
        double weight = exp(scores[key] - max);
        sum += weight;
        for (uint32_t d = 0; d < p->keys.V; d++)
          out[d] += weight * at(p, page, us_attention_v_offset(&p->keys, g, slot), d);
      }
    }
  }
  if (query->sink) sum += exp((double)p->sink[h] - max);
  for (uint32_t d = 0; d < p->keys.V; d++) out[d] /= sum;
}

static void check_against_naive(const struct problem *p, const struct query *query) {
  float out[8 * 64];
  double truth[64];
  run(p, query, 0, p->H, US_ISA_BEST, out);
  for (uint32_t h = 0; h < p->H; h++) {
    naive(p, query, h, truth);
    for (uint32_t d = 0; d < p->keys.V; d++)
      ck_assert_msg(fabs((double)out[h * p->keys.V + d] - truth[d]) < 4e-6,
                    "position %u head %u dim %u: %g, not %g", query->position, h, d,
                    (double)out[h * p->keys.V + d], truth[d]);
  }
}

START_TEST(full_attention_is_the_softmax_of_all_earlier_keys) {
  uint64_t state = us_test_seed();
  for (int type = US_KV_BF16; type <= US_KV_F32; type++) {
    struct problem p = new_problem((enum us_kv_type)type, 4, 8, 2, 48, 40, &state);
    for (uint32_t position = 0; position < 256; position += 17)
      check_against_naive(&p, &(struct query){.position = position, .cached = position + 1});
    free_problem(&p);
  }
}
END_TEST

START_TEST(a_window_counts_the_query_itself_and_the_sink_only_enlarges_the_denominator) {
  uint64_t state = us_test_seed() + 1;
  struct problem p = new_problem(US_KV_BF16, 5, 4, 4, 24, 16, &state);
  for (uint32_t window = 1; window < 150; window += 37)
    for (uint32_t position = 0; position < 300; position += 23)
      check_against_naive(
          &p, &(struct query){.position = position, .cached = position + 1, .window = window, .sink = true});
  free_problem(&p);
}
END_TEST

START_TEST(a_ring_wraps_at_whole_pages) {
  uint64_t state = us_test_seed() + 2;
  struct problem p = new_problem(US_KV_F32, 3, 4, 2, 32, 32, &state);
  for (uint32_t position = 150; position < 1000; position += 61)
    check_against_naive(
        &p, &(struct query){.position = position, .cached = position + 1, .window = 128, .sink = true});
  free_problem(&p);
}
END_TEST

START_TEST(keys_outside_the_window_are_never_read) {
  uint64_t state = us_test_seed() + 3;
  struct problem p = new_problem(US_KV_F32, 3, 2, 1, 16, 16, &state);
  struct query query = {.position = 130, .cached = 131, .window = 20};
  float clean[32], out[32];
  run(&p, &query, 0, 2, US_ISA_BEST, clean);
  for (uint32_t key = 0; key < 192; key++) {
    if (key >= 111 && key <= 130) continue;
    float *k = (float *)(void *)((char *)p.pages[key / 64] + us_attention_k_offset(&p.keys, 0, key % 64));
    float *v = (float *)(void *)((char *)p.pages[key / 64] + us_attention_v_offset(&p.keys, 0, key % 64));
    for (int d = 0; d < 16; d++) k[d] = v[d] = NAN;
  }
  for (int isa = US_ISA_BEST; isa < US_ISA_COUNT; isa++) {
    run(&p, &query, 0, 2, (enum us_isa)isa, out);
    assert_same_bits(out, clean, 32, us_isa_name((enum us_isa)isa));
  }
  free_problem(&p);
}
END_TEST

START_TEST(a_block_is_visible_as_a_whole) {
  uint64_t state = us_test_seed() + 4;
  struct problem p = new_problem(US_KV_BF16, 4, 4, 2, 32, 32, &state);
  struct problem block = new_problem(US_KV_BF16, 1, 4, 2, 32, 32, &state);
  for (uint32_t cached = 0; cached < 230; cached += 29)
    for (uint32_t j = 0; j < 8; j += 3)
      for (uint32_t window = 0; window < 120; window += 40)
        check_against_naive(&p, &(struct query){.position = cached + j,
                                                .cached = cached,
                                                .window = window,
                                                .sink = true,
                                                .block = block.pages[0],
                                                .block_rows = 8});
  free_problem(&p);
  free_problem(&block);
}
END_TEST

START_TEST(instruction_sets_and_head_ranges_give_the_same_bits) {
  uint64_t state = us_test_seed() + 5;
  enum us_isa isas[2];
  size_t isa_count = fast_isas(isas);
  for (int type = US_KV_BF16; type <= US_KV_F32; type++) {
    struct problem p = new_problem((enum us_kv_type)type, 4, 8, 2, 40, 56, &state);
    for (uint32_t position = 3; position < 256; position += 25) {
      struct query query = {
          .position = position, .cached = position + 1, .window = position % 2 ? 100 : 0, .sink = true};
      float plain[8 * 56], fast[8 * 56];
      run(&p, &query, 0, 8, US_ISA_PLAIN, plain);
      for (size_t i = 0; i < isa_count; i++) {
        for (uint32_t h = 0; h < 8; h += 3) run(&p, &query, h, h + 3 < 8 ? h + 3 : 8, isas[i], fast);
        assert_same_bits(fast, plain, 8 * 56, us_isa_name(isas[i]));
      }
    }
    free_problem(&p);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("attention");
  tcase_add_test(c, full_attention_is_the_softmax_of_all_earlier_keys);
  tcase_add_test(c, a_window_counts_the_query_itself_and_the_sink_only_enlarges_the_denominator);
  tcase_add_test(c, a_ring_wraps_at_whole_pages);
  tcase_add_test(c, keys_outside_the_window_are_never_read);
  tcase_add_test(c, a_block_is_visible_as_a_whole);
  tcase_add_test(c, instruction_sets_and_head_ranges_give_the_same_bits);
  return us_suite("attention", c);
}
US_TEST_MAIN(make_suite)
