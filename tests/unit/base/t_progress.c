/* t_progress.c: the progress line, under a clock of its own. */
#include "base/log.h"
#include "base/progress.h"
#include "suite.h"

#include <string.h>

static double clock_now(void *arg) {
  return *(double *)arg;
}

/* A progress that writes into memory, as if on a terminal or not, from second 0 on. */
static FILE *start(struct us_progress *progress, char **text, size_t *size, bool terminal, double *clock) {
  FILE *out = open_memstream(text, size);
  us_progress_start(progress, out, "training", "tokens", 8000000);
  progress->terminal = terminal;
  progress->now = clock_now;
  progress->now_arg = clock;
  progress->started = 0;
  *clock = 0;
  return out;
}

START_TEST(short_work_is_silent) {
  struct us_progress progress;
  char *text;
  size_t size;
  double clock;
  FILE *out = start(&progress, &text, &size, true, &clock);
  clock = 1.9;
  us_progress_set(&progress, 1200000);
  us_progress_end(&progress);
  fclose(out);
  ck_assert_str_eq(text, "");
  free(text);
}
END_TEST

START_TEST(a_terminal_line_has_share_rate_and_time_left) {
  struct us_progress progress;
  char *text;
  size_t size;
  double clock;
  FILE *out = start(&progress, &text, &size, true, &clock);
  clock = 60;
  us_progress_note(&progress, "loss %.3f", 2.314);
  us_progress_set(&progress, 1200000);
  clock = 60.05; /* too soon to draw again */
  us_progress_set(&progress, 1300000);
  fflush(out);
  ck_assert_str_eq(text, "\rtraining: 1.2M/8.0M tokens 15 %, 20.0K/s, 5:40 left, loss 2.314\033[K");
  clock = 400;
  us_progress_set(&progress, 8000000);
  us_progress_end(&progress);
  fclose(out);
  ck_assert_ptr_nonnull(strstr(text, "\rtraining: 8.0M/8.0M tokens 100 %, 20.0K/s, loss 2.314\033[K\n"));
  free(text);
}
END_TEST

START_TEST(a_file_gets_a_plain_line_every_thirty_seconds) {
  struct us_progress progress;
  char *text;
  size_t size;
  double clock;
  FILE *out = start(&progress, &text, &size, false, &clock);
  for (int second = 1; second < 100; second++) {
    clock = second;
    us_progress_set(&progress, (uint64_t)second * 1000);
  }
  fclose(out);
  size_t lines = 0;
  for (const char *p = text; *p; p++) lines += *p == '\n';
  ck_assert_uint_eq(lines, 3);
  ck_assert_ptr_null(strchr(text, '\r'));
  ck_assert_ptr_null(strchr(text, '\033'));
  free(text);
}
END_TEST

START_TEST(a_file_gets_its_last_line_once) {
  struct us_progress progress;
  char *text;
  size_t size;
  double clock;
  FILE *out = start(&progress, &text, &size, false, &clock);
  clock = 40;
  us_progress_set(&progress, 4000000);
  clock = 50;
  us_progress_set(&progress, 8000000); /* too soon to draw */
  us_progress_end(&progress);
  fclose(out);
  ck_assert_str_eq(text, "training: 4.0M/8.0M tokens 50 %, 100.0K/s, 0:40 left\n"
                         "training: 8.0M/8.0M tokens 100 %, 160.0K/s\n");
  free(text);
  out = start(&progress, &text, &size, false, &clock);
  clock = 40;
  us_progress_set(&progress, 8000000);
  clock = 41;
  us_progress_end(&progress);
  fclose(out);
  ck_assert_str_eq(text, "training: 8.0M/8.0M tokens 100 %, 200.0K/s\n");
  free(text);
}
END_TEST

START_TEST(what_is_left_ends_with_the_time_allowed) {
  struct us_progress progress;
  char *text;
  size_t size;
  double clock;
  FILE *out = start(&progress, &text, &size, false, &clock);
  progress.limit = 120;
  clock = 40;
  us_progress_set(&progress, 1000000);
  clock = 130;
  us_progress_set(&progress, 2000000);
  fclose(out);
  ck_assert_str_eq(text, "training: 1.0M/8.0M tokens 12 %, 25.0K/s, 1:20 left\n"
                         "training: 2.0M/8.0M tokens 25 %, 15.4K/s, 0:00 left\n");
  free(text);
}
END_TEST

START_TEST(quiet_is_silent) {
  struct us_progress progress;
  us_progress_start(&progress, NULL, "x", "y", 0);
  us_progress_set(&progress, 1);
  us_progress_note(&progress, "n");
  us_progress_end(&progress);
  ck_assert(!progress.drawn);
}
END_TEST

START_TEST(an_unknown_total_shows_count_and_rate) {
  struct us_progress progress;
  char *text;
  size_t size;
  double clock;
  FILE *out = start(&progress, &text, &size, false, &clock);
  progress.total = 0;
  clock = 40;
  us_progress_set(&progress, 20);
  fclose(out);
  ck_assert_str_eq(text, "training: 20 tokens, 0.5/s\n");
  free(text);
}
END_TEST

START_TEST(a_log_writes_what_its_level_shows_and_cleans_it) {
  char *text;
  size_t size;
  FILE *out = open_memstream(&text, &size);
  struct us_log log = {.out = out, .level = US_LOG_NOTICE, .name = "tool"};
  us_log_warning(&log, "a%d", 1);
  us_log_notice(&log, "b\033[31m\n");
  us_log_info(&log, "c");
  us_log_debug(&log, "d");
  us_log_notice(NULL, "e");
  log.level = US_LOG_DEBUG;
  us_log_debug(&log, "f");
  fclose(out);
  ck_assert_str_eq(text, "tool: warning: a1\ntool: b?[31m?\ntool: debug: f\n");
  free(text);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("progress");
  tcase_add_test(c, short_work_is_silent);
  tcase_add_test(c, a_terminal_line_has_share_rate_and_time_left);
  tcase_add_test(c, a_file_gets_a_plain_line_every_thirty_seconds);
  tcase_add_test(c, a_file_gets_its_last_line_once);
  tcase_add_test(c, what_is_left_ends_with_the_time_allowed);
  tcase_add_test(c, quiet_is_silent);
  tcase_add_test(c, an_unknown_total_shows_count_and_rate);
  tcase_add_test(c, a_log_writes_what_its_level_shows_and_cleans_it);
  return us_suite("progress", c);
}
US_TEST_MAIN(make_suite)
