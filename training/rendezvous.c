/* rendezvous.c: process 0 listens, the others connect; connections stay open to tell who is gone.
 *
 * Contents: time; bytes; process 0; the others; life.
 */
#include "training/rendezvous.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAGIC      0x75732d72 /* "us-r" */
#define WELCOME    0x75732d77 /* process 0's answer to a hello */
#define REFUSED    0x75732d6e
#define RETRY_MS   50
#define TRY_SECS   5          /* of a connection; a host that drops packets would hold it for two minutes */
#define PARTED     0xfffffffe /* a word of a process that is through; others are the number of one that is gone */
#define SHARE_SECS 600.0      /* process 0 may still load a model when the others wait for its bytes */

struct us_rendezvous {
  struct us_ranks ranks;
  int listener;
  int *peer;     /* (processes) process 0: a connection each, its own -1; others: peer[0] alone */
  uint32_t lost; /* the process that is gone; UINT32_MAX: none */
};

/* What a process says first, in the order of bytes of the network. */
struct hello {
  uint32_t magic, process, processes;
};

/* --- time --- */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Milliseconds until `end`, for poll. */
static int left(double end) {
  double ms = 1e3 * (end - now());
  return ms < 0.0 ? 0 : ms > 1e6 ? 1000000 : (int)ms;
}

static void nap(void) {
  nanosleep(&(struct timespec){.tv_nsec = RETRY_MS * 1000000L}, NULL);
}

/* --- bytes --- */

static bool send_all(int fd, const void *bytes, size_t n) {
  for (size_t done = 0; done < n;) {
    ssize_t sent = send(fd, (const char *)bytes + done, n - done, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    done += (size_t)sent;
  }
  return true;
}

static bool receive_all(int fd, void *bytes, size_t n, double end) {
  for (size_t done = 0; done < n;) {
    struct pollfd wait = {.fd = fd, .events = POLLIN};
    int ready = poll(&wait, 1, left(end));
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) return false;
    ssize_t got = recv(fd, (char *)bytes + done, n - done, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    done += (size_t)got;
  }
  return true;
}

/* A host that loses its power or its network sends no last packet: without questions it would never be missed. */
static void stay_in_touch(int fd) {
  int on = 1, idle = 15, between = 5, most = 4; /* seconds, seconds, questions: gone after 35 s */
  (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &between, sizeof between);
  (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &most, sizeof most);
}

/* --- process 0 --- */

/* Whether all processes run on this host and meet by its loopback, which no other host can reach. */
static bool meets_here(const struct us_ranks *ranks) {
  return ranks->file[0] ? ranks->local_processes >= ranks->processes
                        : strcmp(ranks->address, "127.0.0.1") == 0;
}

/* With AF_INET6 IPv4 comes in as well. */
static bool try_listen(struct us_rendezvous *r, int family, const char *port) {
  bool here = meets_here(&r->ranks);
  struct addrinfo hints = {.ai_family = family, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found;
  if (getaddrinfo(here ? "127.0.0.1" : NULL, port, &hints, &found) != 0) return false;
  int one = 1, zero = 0;
  r->listener = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  bool good =
      r->listener >= 0 && setsockopt(r->listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0 &&
      (family != AF_INET6 || setsockopt(r->listener, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero) == 0) &&
      bind(r->listener, found->ai_addr, found->ai_addrlen) == 0 &&
      listen(r->listener, (int)r->ranks.processes) == 0;
  int reason = errno;
  freeaddrinfo(found);
  if (!good && r->listener >= 0) {
    close(r->listener);
    r->listener = -1;
  }
  errno = reason;
  return good;
}

static enum us_status listen_at(struct us_rendezvous *r, struct us_err *err) {
  char port[8];
  bool file = r->ranks.file[0] != '\0';
  snprintf(port, sizeof port, "%u", file ? 0u : (unsigned)r->ranks.port);
  errno = 0;
  if (!meets_here(&r->ranks) && try_listen(r, AF_INET6, port)) return US_OK;
  if (errno != EADDRINUSE && try_listen(r, AF_INET, port)) return US_OK; /* a host may be without IPv6 */
  return us_err_errno(err, US_ERR_IO, "cannot listen on port %s", file ? "of its own" : port);
}

static uint16_t port_of(int listener) {
  struct sockaddr_storage own = {0};
  socklen_t n = sizeof own;
  if (getsockname(listener, (struct sockaddr *)&own, &n) != 0) return 0;
  return ntohs(own.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&own)->sin6_port
                                         : ((struct sockaddr_in *)&own)->sin_port);
}

/* The file appears whole: host and port of the listener. */
static enum us_status write_file(struct us_rendezvous *r, struct us_err *err) {
  char host[256] = "127.0.0.1", name[1100];
  if (!meets_here(&r->ranks) && gethostname(host, sizeof host) != 0)
    return us_err_errno(err, US_ERR_IO, "this host's name");
  snprintf(name, sizeof name, "%s.%ld", r->ranks.file, (long)getpid());
  FILE *file = fopen(name, "w");
  bool good = file && fprintf(file, "%s %u\n", host, (unsigned)port_of(r->listener)) > 0;
  good = file && fclose(file) == 0 && good;
  if (good && rename(name, r->ranks.file) == 0) return US_OK;
  enum us_status status = us_err_errno(err, US_ERR_IO, "cannot write '%s'", r->ranks.file);
  if (file) unlink(name);
  return status;
}

static bool answer(int fd, uint32_t word) {
  word = htonl(word);
  return send_all(fd, &word, sizeof word);
}

/* Who it is that connected. A stranger is turned away without a word; a wrong process is an error. */
static enum us_status greet(struct us_rendezvous *r, int fd, uint32_t *arrived, struct us_err *err) {
  struct hello hello;
  if (!receive_all(fd, &hello, sizeof hello, now() + 5.0) || ntohl(hello.magic) != MAGIC) {
    close(fd);
    return US_OK;
  }
  uint32_t process = ntohl(hello.process), processes = ntohl(hello.processes);
  enum us_status status = US_OK;
  if (processes != r->ranks.processes)
    status = us_err_set(err, US_ERR_USAGE, "a process of a run of %u came to a run of %u", processes,
                        r->ranks.processes);
  else if (!process || process >= processes || r->peer[process] >= 0)
    status = us_err_set(err, US_ERR_USAGE, "two processes say that they are number %u", process);
  if (!answer(fd, status == US_OK ? WELCOME : REFUSED) || status != US_OK) {
    close(fd);
    return status;
  }
  stay_in_touch(fd);
  r->peer[process] = fd;
  (*arrived)++;
  return US_OK;
}

static enum us_status gather(struct us_rendezvous *r, double seconds, struct us_err *err) {
  double end = now() + seconds;
  uint32_t arrived = 1;
  enum us_status status = US_OK;
  while (arrived < r->ranks.processes && status == US_OK) {
    struct pollfd wait = {.fd = r->listener, .events = POLLIN};
    int ready = poll(&wait, 1, left(end));
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) {
      uint32_t missing = 1;
      while (missing + 1 < r->ranks.processes && r->peer[missing] >= 0) missing++;
      return us_err_set(err, US_ERR_IO, "%u of %u processes arrived within %.0f s; number %u did not",
                        arrived, r->ranks.processes, seconds, missing);
    }
    int fd = accept4(r->listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd >= 0) status = greet(r, fd, &arrived, err);
  }
  return status;
}

/* --- the others --- */

/* Where process 0 is, if it is known by now. */
static bool read_file(const struct us_rendezvous *r, char host[256], char port[8]) {
  FILE *file = fopen(r->ranks.file, "r");
  bool good = file && fscanf(file, "%255s %7s", host, port) == 2;
  if (file) fclose(file);
  return good;
}

/* The first of the host's addresses that answers; -1: none. */
static int connect_once(const char *host, const char *port) {
  struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM}, *found;
  struct timeval most = {.tv_sec = TRY_SECS}, none = {0};
  int fd = -1;
  if (getaddrinfo(host, port, &hints, &found) != 0) return -1;
  for (const struct addrinfo *at = found; at && fd < 0; at = at->ai_next) {
    fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof most); /* holds for connect too */
    if (connect(fd, at->ai_addr, at->ai_addrlen) == 0) {
      (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &none, sizeof none);
      continue;
    }
    close(fd);
    fd = -1;
  }
  freeaddrinfo(found);
  return fd;
}

/* Whether it is process 0 of this run that listens there: another program may, when the file is an old one or the port is another's; and
 * a connection to one of the ports that outgoing connections get may end at itself. */
static bool introduce(struct us_rendezvous *r, int fd, double end, bool *ret_refused) {
  struct hello hello = {htonl(MAGIC), htonl(r->ranks.process), htonl(r->ranks.processes)};
  uint32_t word;
  if (!send_all(fd, &hello, sizeof hello) || !receive_all(fd, &word, sizeof word, end)) return false;
  *ret_refused = ntohl(word) == REFUSED;
  return ntohl(word) == WELCOME;
}

static enum us_status join(struct us_rendezvous *r, double seconds, struct us_err *err) {
  double end = now() + seconds;
  char host[256] = "", port[8] = "";
  bool file = r->ranks.file[0] != '\0', refused = false;
  if (!file) {
    snprintf(host, sizeof host, "%s", r->ranks.address);
    snprintf(port, sizeof port, "%u", (unsigned)r->ranks.port);
  }
  while (now() < end && !refused) {
    int fd = !file || read_file(r, host, port) ? connect_once(host, port) : -1;
    if (fd >= 0 && introduce(r, fd, end, &refused)) {
      stay_in_touch(fd);
      r->peer[0] = fd;
      return US_OK;
    }
    if (fd >= 0) close(fd);
    nap();
  }
  if (refused)
    return us_err_set(err, US_ERR_USAGE, "process 0 at %s:%s refuses process %u of %u", host, port,
                      r->ranks.process, r->ranks.processes);
  return us_err_set(err, US_ERR_IO, "process %u found no process 0 at %s%s%s within %.0f s", r->ranks.process,
                    file ? r->ranks.file : host, file ? "" : ":", file ? "" : port, seconds);
}

/* --- life --- */

enum us_status us_rendezvous_open(const struct us_ranks *ranks, double seconds,
                                  struct us_rendezvous **ret_rendezvous, struct us_err *err) {
  struct us_rendezvous *r = calloc(1, sizeof *r);
  *ret_rendezvous = NULL;
  if (!r) return us_err_memory(err, "rendezvous", sizeof *r);
  *r = (struct us_rendezvous){.ranks = *ranks, .listener = -1, .lost = UINT32_MAX};
  r->peer = calloc(ranks->processes, sizeof *r->peer);
  enum us_status status = r->peer ? US_OK : us_err_memory(err, "rendezvous", ranks->processes);
  for (uint32_t i = 0; r->peer && i < ranks->processes; i++) r->peer[i] = -1;
  if (status == US_OK && ranks->process > 0) status = join(r, seconds, err);
  if (status == US_OK && ranks->process == 0) status = listen_at(r, err);
  if (status == US_OK && ranks->process == 0 && ranks->file[0]) status = write_file(r, err);
  if (status == US_OK && ranks->process == 0) status = gather(r, seconds, err);
  if (status != US_OK) {
    us_rendezvous_close(r);
    return status;
  }
  *ret_rendezvous = r;
  return US_OK;
}

void us_rendezvous_close(struct us_rendezvous *r) {
  if (!r) return;
  for (uint32_t i = 0; r->peer && i < r->ranks.processes; i++)
    if (r->peer[i] >= 0) close(r->peer[i]);
  if (r->listener >= 0) {
    close(r->listener);
    if (r->ranks.file[0]) unlink(r->ranks.file);
  }
  free(r->peer);
  free(r);
}

enum us_status us_rendezvous_share(struct us_rendezvous *r, void *bytes, size_t n, struct us_err *err) {
  if (r->ranks.process > 0)
    return receive_all(r->peer[0], bytes, n, now() + SHARE_SECS)
               ? US_OK
               : us_err_set(err, US_ERR_DEVICE, "process 0 is gone");
  for (uint32_t i = 1; i < r->ranks.processes; i++)
    if (!send_all(r->peer[i], bytes, n)) return us_err_set(err, US_ERR_DEVICE, "process %u is gone", i);
  return US_OK;
}

static void tell_all(const struct us_rendezvous *r, uint32_t word, uint32_t except) {
  word = htonl(word);
  for (uint32_t i = 0; i < r->ranks.processes; i++)
    if (i != except && r->peer[i] >= 0)
      (void)send(r->peer[i], &word, sizeof word,
                 MSG_NOSIGNAL | MSG_DONTWAIT); /* one that cannot hear is gone too */
}

void us_rendezvous_part(struct us_rendezvous *r) {
  tell_all(r, PARTED, UINT32_MAX);
}

/* Number of the process that is gone, as seen on one connection; UINT32_MAX: none. */
static uint32_t ask(struct us_rendezvous *r, uint32_t peer) {
  uint32_t word;
  ssize_t got = recv(r->peer[peer], &word, sizeof word, MSG_DONTWAIT);
  if (got == (ssize_t)sizeof word && ntohl(word) == PARTED) {
    close(r->peer[peer]);
    r->peer[peer] = -1;
    return UINT32_MAX;
  }
  if (got == (ssize_t)sizeof word) return ntohl(word);
  if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return UINT32_MAX;
  return peer;
}

enum us_status us_rendezvous_check(struct us_rendezvous *r, struct us_err *err) {
  uint32_t peers = r->ranks.process == 0 ? r->ranks.processes : 1;
  for (uint32_t i = 0; i < peers && r->lost == UINT32_MAX; i++)
    if (r->peer[i] >= 0) r->lost = ask(r, i);
  if (r->lost == UINT32_MAX) return US_OK;
  if (r->ranks.process == 0) tell_all(r, r->lost, r->lost);
  return us_err_set(err, US_ERR_DEVICE, "process %u of %u is gone; the run ends here", r->lost,
                    r->ranks.processes);
}
