/* t_run_log.c: the log of a training run, and how a resumed run continues it. */
#include "training/run_log.h"
#include "suite.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const columns[] = {"step", "loss", "heldout"};

static char path[64];

static void make_path(void) {
  strcpy(path, "/tmp/us-run-log-XXXXXX");
  int fd = mkstemp(path);
  ck_assert_int_ge(fd, 0);
  close(fd);
}

static void remove_path(void) {
  unlink(path);
}

static void put(const char *text) {
  FILE *file = fopen(path, "w");
  fputs(text, file);
  fclose(file);
}

static void holds(const char *expected) {
  char text[512] = "";
  FILE *file = fopen(path, "r");
  size_t n = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[n] = '\0';
  ck_assert_str_eq(text, expected);
}

static void open_log(struct us_run_log *log, bool append) {
  struct us_err err = {0};
  ck_assert_msg(us_run_log_open(log, columns, 3, path, append, &err) == US_OK, "%s", err.message);
}

static void add(struct us_run_log *log, double step, double loss, double heldout) {
  us_run_log_add(log, (const double[]){step, loss, heldout});
}

static void end(struct us_run_log *log) {
  struct us_err err = {0};
  ck_assert_msg(us_run_log_close(log, &err) == US_OK, "%s", err.message);
}

START_TEST(a_row_is_a_line_and_no_value_an_empty_cell) {
  struct us_run_log log;
  put("of another time\n");
  open_log(&log, false);
  add(&log, 10, 0.1, (double)NAN);
  add(&log, 20, 1.0 / 3.0, 2.5);
  end(&log);
  holds("step\tloss\theldout\n10\t0.1\t\n20\t0.3333333333333333\t2.5\n");
  us_run_log_release(&log);
}
END_TEST

/* Killed behind step 30, resumed from the save of step 20. */
START_TEST(what_was_logged_after_the_save_is_logged_again) {
  struct us_run_log log;
  double step[8], loss[8];
  put("step\tloss\theldout\n10\t3\t\n20\t0.3333333333333333\t1.5\n30\t1\t\n");
  open_log(&log, true);
  add(&log, 30, 0.5, (double)NAN);
  add(&log, 40, 0.25, 1.25);
  end(&log);
  holds("step\tloss\theldout\n10\t3\t\n20\t0.3333333333333333\t1.5\n30\t0.5\t\n40\t0.25\t1.25\n");
  ck_assert_uint_eq(log.count, 4); /* pictures and artefacts have the whole run */
  us_run_log_column(&log, 0, step);
  us_run_log_column(&log, 1, loss);
  ck_assert(step[0] == 10 && step[1] == 20 && step[2] == 30 && step[3] == 40);
  ck_assert(loss[1] == 1.0 / 3.0 && loss[2] == 0.5);
  us_run_log_release(&log);
}
END_TEST

START_TEST(a_save_before_the_first_row_takes_back_all_rows) {
  struct us_run_log log;
  put("step\tloss\theldout\n10\t3\t\n20\t2\t\n");
  open_log(&log, true);
  add(&log, 5, 4, (double)NAN);
  end(&log);
  holds("step\tloss\theldout\n5\t4\t\n");
  us_run_log_release(&log);
}
END_TEST

START_TEST(a_run_that_had_ended_keeps_the_values_of_its_last_row) {
  struct us_run_log log;
  put("step\tloss\theldout\n10\t3\t\n20\t2\t1.5\n");
  open_log(&log, true);
  add(&log, 20, (double)NAN, 1.25);
  end(&log);
  holds("step\tloss\theldout\n10\t3\t\n20\t2\t1.25\n");
  ck_assert_uint_eq(log.count, 2);
  us_run_log_release(&log);
}
END_TEST

START_TEST(a_line_that_was_cut_short_is_dropped) {
  struct us_run_log log;
  put("step\tloss\theldout\n10\t3\t\n20\t2");
  open_log(&log, true);
  add(&log, 20, 2.5, (double)NAN);
  end(&log);
  holds("step\tloss\theldout\n10\t3\t\n20\t2.5\t\n");
  us_run_log_release(&log);
  put("step\tlo"); /* the header too */
  open_log(&log, true);
  add(&log, 10, 3, (double)NAN);
  end(&log);
  holds("step\tloss\theldout\n10\t3\t\n");
  us_run_log_release(&log);
}
END_TEST

START_TEST(a_log_that_is_not_there_is_begun) {
  struct us_run_log log;
  unlink(path);
  open_log(&log, true);
  add(&log, 10, 3, (double)NAN);
  end(&log);
  holds("step\tloss\theldout\n10\t3\t\n");
  us_run_log_release(&log);
}
END_TEST

static void refuse(const char *text) {
  struct us_run_log log;
  struct us_err err = {0};
  put(text);
  ck_assert_int_eq(us_run_log_open(&log, columns, 3, path, true, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "not of a log of this run") != NULL, "%s", err.message);
  holds(text);
}

START_TEST(a_file_that_is_no_log_of_such_a_run_is_left_as_it_is) {
  refuse("step\tloss\n10\t3\n");
  refuse("step\tloss\theldout\tmfu\n");
  refuse("step\tloss\theldout\n10\t3\tmany\n");
  refuse("step\tloss\theldout\n10\t3\n");
  refuse("step\tloss\theldout\n10\t3\t4\t5\n");
  refuse("Dear diary,\n");
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("run_log");
  tcase_add_checked_fixture(c, make_path, remove_path);
  tcase_add_test(c, a_row_is_a_line_and_no_value_an_empty_cell);
  tcase_add_test(c, what_was_logged_after_the_save_is_logged_again);
  tcase_add_test(c, a_save_before_the_first_row_takes_back_all_rows);
  tcase_add_test(c, a_run_that_had_ended_keeps_the_values_of_its_last_row);
  tcase_add_test(c, a_line_that_was_cut_short_is_dropped);
  tcase_add_test(c, a_log_that_is_not_there_is_begun);
  tcase_add_test(c, a_file_that_is_no_log_of_such_a_run_is_left_as_it_is);
  return us_suite("run_log", c);
}

US_TEST_MAIN(make_suite)
