/* t_rendezvous.c: processes find each other and notice who is gone; here they are threads on the loopback. */
#include "training/rendezvous.h"
#include "suite.h"

#include <arpa/inet.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
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
  const struct process *late = p[1].status == US_ERR_USAGE ? &p[1] : &p[2];
  ck_assert_int_eq(late->status, US_ERR_USAGE);
  ck_assert_msg(strstr(late->err.message, "refuses process 1 of 4") != NULL, "%s", late->err.message);
  for (uint32_t i = 0; i < 3; i++) us_rendezvous_close(p[i].rendezvous);
}
END_TEST

static int listen_on_loopback(uint16_t *ret_port) {
  struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t n = sizeof own;
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  ck_assert_int_eq(bind(fd, (struct sockaddr *)&own, sizeof own), 0);
  ck_assert_int_eq(listen(fd, 4), 0);
  ck_assert_int_eq(getsockname(fd, (struct sockaddr *)&own, &n), 0);
  *ret_port = ntohs(own.sin_port);
  return fd;
}

/* Sends back what one connection says, as a connection that ends at itself does. */
static void *echo(void *arg) {
  char bytes[64];
  int fd = accept(*(int *)arg, NULL, NULL);
  ssize_t n = recv(fd, bytes, sizeof bytes, 0);
  if (n > 0) n = send(fd, bytes, (size_t)n, MSG_NOSIGNAL);
  close(fd);
  close(*(int *)arg);
  return NULL;
}

START_TEST(another_program_is_not_taken_for_process_0) {
  struct process p[2];
  pthread_t threads[2], stranger;
  uint16_t strangers_port;
  char name[64];
  int listener = listen_on_loopback(&strangers_port);
  snprintf(name, sizeof name, "/tmp/us-meet-%ld", (long)getpid());
  FILE *file = fopen(name, "w"); /* of a run that was killed */
  fprintf(file, "127.0.0.1 %u\n", (unsigned)strangers_port);
  fclose(file);
  for (uint32_t i = 0; i < 2; i++)
    fill(&p[i], i, name), p[i].ranks.processes = p[i].ranks.local_processes = 2;
  ck_assert_int_eq(pthread_create(&stranger, NULL, echo, &listener), 0);
  ck_assert_int_eq(pthread_create(&threads[1], NULL, take_part, &p[1]), 0);
  pthread_join(stranger, NULL);
  ck_assert_int_eq(pthread_create(&threads[0], NULL, take_part, &p[0]), 0);
  for (uint32_t i = 0; i < 2; i++) pthread_join(threads[i], NULL);
  for (uint32_t i = 0; i < 2; i++) ck_assert_msg(p[i].status == US_OK, "%u: %s", i, p[i].err.message);
  ck_assert_str_eq(p[1].bytes, "from process 0");
  for (uint32_t i = 0; i < 2; i++) us_rendezvous_close(p[i].rendezvous);
}
END_TEST

/* Whether all connections at a local port ask now and then whether the other side is there: timer 2 of /proc/net/tcp. */
static bool ask_now_and_then(uint16_t local_port) {
  FILE *table = fopen("/proc/net/tcp", "r");
  char line[256];
  unsigned port_found, state, timer, connections = 0, asking = 0;
  while (table && fgets(line, sizeof line, table)) {
    if (sscanf(line, " %*d: %*8x:%x %*8x:%*x %x %*x:%*x %x:", &port_found, &state, &timer) != 3) continue;
    if (port_found == local_port && state == 1) connections++, asking += timer == 2;
  }
  if (table) fclose(table);
  return connections == PROCESSES - 1 && asking == connections;
}

START_TEST(a_host_without_power_is_asked_for) {
  struct process p[PROCESSES];
  meet(p, NULL);
  bool asks = false; /* once what was sent is acknowledged */
  for (int i = 0; i < 200 && !asks; i++) {
    asks = ask_now_and_then(port());
    nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
  }
  ck_assert(asks);
  leave(p);
}
END_TEST

static bool answers_at(const char *address, uint16_t at) {
  struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons(at)};
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  inet_pton(AF_INET, address, &there.sin_addr);
  bool good = connect(fd, (struct sockaddr *)&there, sizeof there) == 0;
  close(fd);
  return good;
}

/* On Linux all of 127.0.0.0/8 is this host: who listens everywhere listens at 127.0.0.2. */
START_TEST(processes_of_one_host_are_out_of_reach_of_others) {
  struct process p[PROCESSES];
  char name[64], host[32];
  unsigned at = 0;
  snprintf(name, sizeof name, "/tmp/us-meet-%ld", (long)getpid());
  meet(p, name);
  FILE *file = fopen(name, "r");
  ck_assert_int_eq(fscanf(file, "%31s %u", host, &at), 2);
  fclose(file);
  ck_assert(answers_at("127.0.0.1", (uint16_t)at));
  ck_assert(!answers_at("127.0.0.2", (uint16_t)at));
  leave(p);
}
END_TEST

static bool has_ipv6(void) {
  struct sockaddr_in6 own = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
  int fd = socket(AF_INET6, SOCK_STREAM, 0);
  bool good = fd >= 0 && bind(fd, (struct sockaddr *)&own, sizeof own) == 0;
  if (fd >= 0) close(fd);
  return good;
}

START_TEST(they_meet_by_ipv6_and_by_name) {
  static const char *const addresses[] = {"localhost", "::1"};
  for (int a = 0; a < (has_ipv6() ? 2 : 1); a++) {
    struct process p[PROCESSES];
    pthread_t threads[PROCESSES];
    for (uint32_t i = 0; i < PROCESSES; i++) {
      fill(&p[i], i, NULL);
      strcpy(p[i].ranks.address, addresses[a]);
      ck_assert_int_eq(pthread_create(&threads[i], NULL, take_part, &p[i]), 0);
    }
    for (uint32_t i = 0; i < PROCESSES; i++) pthread_join(threads[i], NULL);
    for (uint32_t i = 0; i < PROCESSES; i++)
      ck_assert_msg(p[i].status == US_OK, "%u: %s", i, p[i].err.message);
    leave(p);
  }
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
  tcase_add_test(c, another_program_is_not_taken_for_process_0);
  tcase_add_test(c, a_host_without_power_is_asked_for);
  tcase_add_test(c, processes_of_one_host_are_out_of_reach_of_others);
  tcase_add_test(c, they_meet_by_ipv6_and_by_name);
  return us_suite("rendezvous", c);
}

US_TEST_MAIN(make_suite)
