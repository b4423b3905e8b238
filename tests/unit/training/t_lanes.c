/* t_lanes.c: every sequence of a step and every held-out window in one pass of one lane, whatever the cut. */
#include "training/lanes.h"

#include "tiny_shards.h"

enum { LENGTH = 24, LANES = 3, BATCH = 7, MICRO = 2, SEED = 11 };
#define ACROSS 0.5

static struct tiny_world world;
static const struct us_learner learner = {.lanes = LANES, .ranks = LANES, .processes = 1};

/* What passes were given. */
struct seen {
  struct us_lanes *lanes;
  struct us_rows rows; /* all, in the order of lanes */
  double weight;
  int passes, fails_at;
};

static struct us_lanes lanes_of(bool marked_only) {
  struct us_err err = {0};
  struct us_lanes lanes = {.learner = &learner,
                           .shards = world.shards,
                           .micro = MICRO,
                           .length = LENGTH,
                           .seed = SEED,
                           .across = ACROSS,
                           .marked_only = marked_only};
  US_OK_OR_FAIL(us_lanes_open(&lanes, &err));
  return lanes;
}

static void see(struct seen *seen, struct us_lanes *lanes) {
  struct us_err err = {0};
  *seen = (struct seen){.lanes = lanes, .fails_at = -1};
  US_OK_OR_FAIL(us_rows_init(&seen->rows, 64 * LENGTH, &err));
}

static enum us_status look(void *arg, uint32_t lane, struct us_err *err) {
  struct seen *seen = arg;
  const struct us_rows *rows = &seen->lanes->lane[lane].rows;
  if (seen->passes++ == seen->fails_at) return us_err_set(err, US_ERR_INPUT, "planted");
  ck_assert_uint_le(rows->R, MICRO * LENGTH);
  for (size_t r = 0; r < rows->R; r++, seen->rows.R++) {
    ck_assert_uint_lt(seen->rows.R, seen->rows.capacity);
    seen->rows.token[seen->rows.R] = rows->token[r], seen->rows.label[seen->rows.R] = rows->label[r];
    seen->rows.position[seen->rows.R] = rows->position[r];
    seen->weight += (double)rows->weight[r];
  }
  return US_OK;
}

/* Windows put together by hand; positions do not depend on what lies before. */
static void expect(const struct seen *seen, size_t windows, void (*window)(size_t, struct us_window *)) {
  struct us_err err = {0};
  struct us_window w;
  struct us_rows rows;
  US_OK_OR_FAIL(us_window_init(&w, LENGTH + 1, &err));
  US_OK_OR_FAIL(us_rows_init(&rows, windows * LENGTH, &err));
  rows.R = 0;
  for (size_t i = 0; i < windows; i++) window(i, &w), us_rows_add(&rows, &w, false);
  ck_assert_uint_eq(seen->rows.R, rows.R);
  ck_assert_mem_eq(seen->rows.token, rows.token, rows.R * sizeof *rows.token);
  ck_assert_mem_eq(seen->rows.label, rows.label, rows.R * sizeof *rows.label);
  ck_assert_mem_eq(seen->rows.position, rows.position, rows.R * sizeof *rows.position);
  us_rows_release(&rows);
  us_window_release(&w);
}

static uint64_t the_step;
static void of_step(size_t i, struct us_window *w) {
  us_shards_sample_across(world.shards, SEED, the_step, i, ACROSS, w);
}
static void of_heldout(size_t i, struct us_window *w) {
  us_shards_heldout(world.shards, i * us_shards_n_heldout(world.shards, LENGTH + 1) / 5, w);
}

static void run_step(struct us_lanes *lanes, struct seen *seen, uint64_t step) {
  struct us_err err = {0};
  see(seen, lanes);
  for (uint32_t lane = 0; lane < LANES; lane++)
    US_OK_OR_FAIL(us_lanes_step(lanes, lane, step, BATCH, look, seen, &err));
}

/* Steps one after the other, whose first rows are filled ahead, and one again, whose are not. */
START_TEST(every_sequence_of_a_step_once) {
  struct us_lanes lanes = lanes_of(false);
  static const uint64_t order[] = {4, 5, 6, 6, 5};
  for (size_t i = 0; i < sizeof order / sizeof *order; i++) {
    struct seen seen;
    run_step(&lanes, &seen, the_step = order[i]);
    expect(&seen, BATCH, of_step);
    ck_assert_int_eq(seen.passes, 1 + 1 + 2); /* of 2, 2 and 3 sequences */
    us_rows_release(&seen.rows);
  }
  us_lanes_close(&lanes);
}
END_TEST

/* Between two steps, whose rows it must not become. */
START_TEST(heldout_windows_between_two_steps) {
  struct us_err err = {0};
  struct us_lanes lanes = lanes_of(false);
  struct seen seen;
  run_step(&lanes, &seen, the_step = 8);
  us_rows_release(&seen.rows);
  see(&seen, &lanes);
  for (uint32_t lane = 0; lane < LANES; lane++)
    US_OK_OR_FAIL(
        us_lanes_heldout(&lanes, lane, 5, us_shards_n_heldout(world.shards, LENGTH + 1), look, &seen, &err));
  expect(&seen, 5, of_heldout);
  us_rows_release(&seen.rows);
  run_step(&lanes, &seen, the_step = 9);
  expect(&seen, BATCH, of_step);
  us_rows_release(&seen.rows);
  us_lanes_close(&lanes);
}
END_TEST

/* Labels are counted as the passes weigh them, and counting spoils no step. */
START_TEST(labels_are_counted_as_they_weigh) {
  struct us_lanes lanes = lanes_of(true), all = lanes_of(false);
  struct seen seen;
  run_step(&lanes, &seen, 1);
  us_rows_release(&seen.rows);
  double labels = us_lanes_labels(&lanes, 2, BATCH);
  run_step(&lanes, &seen, the_step = 2);
  expect(&seen, BATCH, of_step);
  ck_assert_double_gt(labels, 0.0);
  ck_assert_double_lt(labels, BATCH * LENGTH); /* "document " never is */
  ck_assert_double_eq(labels, seen.weight);
  ck_assert_double_eq(us_lanes_labels(&all, 2, BATCH), BATCH * LENGTH);
  us_rows_release(&seen.rows);
  us_lanes_close(&lanes);
  us_lanes_close(&all);
}
END_TEST

START_TEST(an_error_ends_it) {
  struct us_err err = {0};
  struct us_lanes lanes = lanes_of(false), never = {.learner = &learner};
  struct seen seen;
  see(&seen, &lanes);
  seen.fails_at = 0;
  ck_assert_int_eq(us_lanes_step(&lanes, 2, 1, BATCH, look, &seen, &err), US_ERR_INPUT);
  ck_assert_int_eq(seen.passes, 1);
  seen.passes = 0;
  ck_assert_int_eq(us_lanes_heldout(&lanes, 2, 15, 15, look, &seen, &err), US_ERR_INPUT);
  ck_assert_int_eq(seen.passes, 1);
  us_rows_release(&seen.rows);
  us_lanes_close(&lanes);
  us_lanes_close(&never);
}
END_TEST

static void open_all(void) {
  shards_unmarked = 9;
  open_world(&world);
}
static void close_all(void) {
  close_world(&world);
}

static Suite *make_suite(void) {
  TCase *c = tcase_create("lanes");
  tcase_add_unchecked_fixture(c, open_all, close_all);
  tcase_add_test(c, every_sequence_of_a_step_once);
  tcase_add_test(c, heldout_windows_between_two_steps);
  tcase_add_test(c, labels_are_counted_as_they_weigh);
  tcase_add_test(c, an_error_ends_it);
  return us_suite("lanes", c);
}

US_TEST_MAIN(make_suite)
