/* t_rendezvous.c: processes find each other and notice who is gone; here they are threads on the loopback. */
#include "training/rendezvous.h"
#include "suite.h"

#include <pthread.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { PROCESSES = 4 };

struct process {
  struct us_ranks ranks;
  double seconds;
  struct us_rendezvous *rendezvous;
  char bytes[32];
  enum us_status status;
  struct us_err err;
};

static uint16_t port(void) {
  return (uint16_t)(20000 + getpid() % 10000); /* below those that outgoing connections get */
}

static void *take_part(void *arg) {
  struct process *p = arg;
  p->status = us_rendezvous_open(&p->ranks, p->seconds, &p->rendezvous, &p->err);
  if (p->status == US_OK) p->status = us_rendezvous_share(p->rendezvous, p->bytes, sizeof p->bytes, &p->err);
  return NULL;
}

static void fill(struct process *p, uint32_t i, const char *file) {
  *p = (struct process){
      .ranks = {.process = i, .processes = PROCESSES, .local = i, .local_processes = PROCESSES},
      .seconds = 20.0};
  p->ranks.port = port();
  if (file)
    snprintf(p->ranks.file, sizeof p->ranks.file, "%s", file);
  else
    strcpy(p->ranks.address, "127.0.0.1");
  if (i == 0) strcpy(p->bytes, "from process 0");
}

/* All of them, the last first, so that most must wait for process 0. */
static void meet(struct process *p, const char *file) {
  pthread_t threads[PROCESSES];
  for (uint32_t i = 0; i < PROCESSES; i++) fill(&p[i], i, file);
  for (uint32_t i = PROCESSES; i-- > 0;) {
    ck_assert_int_eq(pthread_create(&threads[i], NULL, take_part, &p[i]), 0);
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
  }
  for (uint32_t i = 0; i < PROCESSES; i++) pthread_join(threads[i], NULL);
  for (uint32_t i = 0; i < PROCESSES; i++) {
    ck_assert_msg(p[i].status == US_OK, "process %u: %s", i, p[i].err.message);
    ck_assert_str_eq(p[i].bytes, "from process 0");
    ck_assert_int_eq(us_rendezvous_check(p[i].rendezvous, &p[i].err), US_OK);
  }
}

static void leave(struct process *p) {
  for (uint32_t i = 0; i < PROCESSES; i++) us_rendezvous_close(p[i].rendezvous);
}

/* A closed connection takes a moment to be seen. */
static enum us_status check_soon(struct process *p) {
  enum us_status status = US_OK;
  for (int i = 0; i < 200 && status == US_OK; i++) {
    status = us_rendezvous_check(p->rendezvous, &p->err);
    nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
  }
  return status;
}

START_TEST(all_get_the_bytes_of_process_0_by_tcp) {
  struct process p[PROCESSES];
  meet(p, NULL);
  leave(p);
}
END_TEST

START_TEST(all_find_process_0_by_a_file) {
  struct process p[PROCESSES];
  char file[64];
  snprintf(file, sizeof file, "/tmp/us-meet-%ld", (long)getpid());
  meet(p, file);
  leave(p);
  ck_assert_int_ne(access(file, F_OK), 0); /* removed again */
}
END_TEST

START_TEST(a_process_that_ends_is_named_by_all) {
  struct process p[PROCESSES];
  meet(p, NULL);
  us_rendezvous_close(p[2].rendezvous);
  p[2].rendezvous = NULL;
  ck_assert_int_eq(check_soon(&p[0]), US_ERR_DEVICE);
  ck_assert_str_eq(p[0].err.message, "process 2 of 4 is gone; the run ends here");
  ck_assert_int_eq(check_soon(&p[3]), US_ERR_DEVICE);
  ck_assert_str_eq(p[3].err.message, "process 2 of 4 is gone; the run ends here");
  leave(p);
}
END_TEST

START_TEST(process_0_is_missed_too) {
  struct process p[PROCESSES];
  meet(p, NULL);
  us_rendezvous_close(p[0].rendezvous);
  p[0].rendezvous = NULL;
  ck_assert_int_eq(check_soon(&p[1]), US_ERR_DEVICE);
  ck_assert_str_eq(p[1].err.message, "process 0 of 4 is gone; the run ends here");
  leave(p);
}
END_TEST

START_TEST(one_that_is_through_may_end) {
  struct process p[PROCESSES];
  meet(p, NULL);
  us_rendezvous_part(p[1].rendezvous);
  us_rendezvous_close(p[1].rendezvous);
  p[1].rendezvous = NULL;
  nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
  for (int i = 0; i < 3; i++) ck_assert_int_eq(us_rendezvous_check(p[0].rendezvous, &p[0].err), US_OK);
  leave(p);
}
END_TEST

START_TEST(who_does_not_come_is_named) {
  struct process alone, other;
  fill(&alone, 0, NULL);
  alone.seconds = 0.3;
  take_part(&alone);
  ck_assert_int_eq(alone.status, US_ERR_IO);
  ck_assert_msg(strstr(alone.err.message, "1 of 4 processes arrived") != NULL, "%s", alone.err.message);
  fill(&other, 2, NULL);
  other.seconds = 0.3;
  take_part(&other);
  ck_assert_int_eq(other.status, US_ERR_IO);
  ck_assert_msg(strstr(other.err.message, "process 2 found no process 0") != NULL, "%s", other.err.message);
}
END_TEST

START_TEST(two_with_one_number_are_refused) {
  struct process p[3];
  pthread_t threads[3];
  for (uint32_t i = 0; i < 3; i++) {
    fill(&p[i], i ? 1 : 0, NULL);
    p[i].seconds = 5.0;
    ck_assert_int_eq(pthread_create(&threads[i], NULL, take_part, &p[i]), 0);
  }
  for (uint32_t i = 0; i < 3; i++) pthread_join(threads[i], NULL);
  ck_assert_int_eq(p[0].status, US_ERR_USAGE);
  ck_assert_str_eq(p[0].err.message, "two processes say that they are number 1");
  ck_assert_int_ne(p[1].status, US_OK);
  for (uint32_t i = 0; i < 3; i++) us_rendezvous_close(p[i].rendezvous);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("rendezvous");
  tcase_add_test(c, all_get_the_bytes_of_process_0_by_tcp);
  tcase_add_test(c, all_find_process_0_by_a_file);
  tcase_add_test(c, a_process_that_ends_is_named_by_all);
  tcase_add_test(c, process_0_is_missed_too);
  tcase_add_test(c, one_that_is_through_may_end);
  tcase_add_test(c, who_does_not_come_is_named);
  tcase_add_test(c, two_with_one_number_are_refused);
  return us_suite("rendezvous", c);
}

US_TEST_MAIN(make_suite)
