/* ranks.c: a process's place in a parallel run. */
#include "training/ranks.h"

#include <ctype.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_PORT 29533

struct launcher {
  const char *name, *process, *processes, *local, *local_processes;
};

static const struct launcher launchers[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
    {"srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"}};

struct environment {
  us_ranks_getenv get;
  void *arg;
};

/* Leading number of a variable: of a list such as Slurm's "4(x2)" the first. *ret_found stays false if it is not set. */
static enum us_status number(const struct environment *e, const char *name, uint32_t most,
                             uint32_t *ret_value, bool *ret_found, struct us_err *err) {
  const char *text = e->get(e->arg, name);
  char *end = NULL;
  *ret_found = false;
  if (!text || !*text) return US_OK;
  errno = 0;
  unsigned long value = strtoul(text, &end, 10);
  if (errno || end == text || !isdigit((unsigned char)*text) || (*end && *end != '(' && *end != ',') ||
      value > most)
    return us_err_set(err, US_ERR_USAGE, "%s is '%.64s', not a number up to %u", name, text, most);
  *ret_value = (uint32_t)value;
  *ret_found = true;
  return US_OK;
}

/* Slurm's list of tasks by node, "4(x2),3": those of a node. */
static uint32_t tasks_of(const char *list, uint32_t node) {
  unsigned long tasks = 1;
  for (char *end; *list; list = end + (*end == ',')) {
    tasks = strtoul(list, &end, 10);
    unsigned long nodes = strncmp(end, "(x", 2) == 0 ? strtoul(end + 2, NULL, 10) : 1;
    if (node < nodes) break;
    node -= (uint32_t)nodes;
    end += strcspn(end, ",");
  }
  return tasks < 1 << 20 ? (uint32_t)tasks : 1 << 20;
}

/* Fill from one launcher's variables; *ret_found says whether this launcher started us. */
static enum us_status ask(const struct environment *e, const struct launcher *l, struct us_ranks *ranks,
                          bool *ret_found, struct us_err *err) {
  bool have[4];
  uint32_t value[4] = {0, 1, 0, 1};
  const char *names[4] = {l->process, l->processes, l->local, l->local_processes};
  for (int i = 0; i < 4; i++) {
    enum us_status status = number(e, names[i], 1 << 20, &value[i], &have[i], err);
    if (status != US_OK) return status;
  }
  if (have[3] && strcmp(l->name, "srun") == 0) {
    uint32_t node = 0;
    bool found = false;
    enum us_status status = number(e, "SLURM_NODEID", 1 << 20, &node, &found, err);
    if (status != US_OK) return status;
    value[3] = tasks_of(e->get(e->arg, l->local_processes), node);
  }
  *ret_found = have[0] && have[1];
  if (!*ret_found && strcmp(l->name, "torchrun") == 0 && have[0] != have[1])
    return us_err_set(err, US_ERR_USAGE, "%s is set without %s", have[0] ? l->process : l->processes,
                      have[0] ? l->processes : l->process);
  if (!*ret_found) return US_OK;
  ranks->launcher = l->name;
  ranks->process = value[0], ranks->processes = value[1];
  /* Without local numbers all are taken to be on one host, unless a host for them to meet is named. */
  ranks->local = have[2] ? value[2] : value[0];
  ranks->local_processes = have[3] ? value[3] : have[2] && e->get(e->arg, "MASTER_ADDR") ? 1 : value[1];
  if (ranks->local_processes <= ranks->local) ranks->local_processes = ranks->local + 1;
  if (ranks->process >= ranks->processes)
    return us_err_set(err, US_ERR_USAGE, "%s is %u, but %s %u", l->process, ranks->process, l->processes,
                      ranks->processes);
  return US_OK;
}

void us_ranks_first_host(const char *list, char *host) {
  size_t n = strcspn(list, "[,");
  if (n > 127) n = 127;
  memcpy(host, list, n);
  host[n] = '\0';
  if (list[n] != '[') return;
  size_t digits = strspn(list + n + 1, "0123456789");
  if (digits > 64) digits = 64;
  memcpy(host + n, list + n + 1, digits);
  host[n + digits] = '\0';
  const char *close = strchr(list + n, ']'); /* what follows the brackets belongs to the name */
  if (close) snprintf(host + n + digits, 60, "%.*s", (int)strcspn(close + 1, ","), close + 1);
}

/* srun's own PMI server says rank and size, but not which process of its host one is, as Slurm's variables do. A mpiexec inside a
 * Slurm job says other numbers than they, which count its proxies, or has local ones. */
static bool pmi_is_sruns(const struct environment *e) {
  static const char *const same[2][2] = {{"PMI_RANK", "SLURM_PROCID"}, {"PMI_SIZE", "SLURM_STEP_NUM_TASKS"}};
  for (int i = 0; i < 2; i++) {
    const char *pmi = e->get(e->arg, same[i][0]), *slurm = e->get(e->arg, same[i][1]);
    if (!pmi || !slurm || strcmp(pmi, slurm) != 0) return false;
  }
  return !e->get(e->arg, "MPI_LOCALRANKID");
}

static uint32_t hash_of(const struct environment *e, const char *name, uint32_t hash, bool *found) {
  const char *text = e->get(e->arg, name);
  for (const char *c = text ? text : ""; *c; c++) hash = hash * 31 + (unsigned char)*c;
  *found = *found || text;
  return hash;
}

/* A port that two runs on one host do not share: two jobs, two steps of a job, two calls of mpirun in a job. The variables are those
 * that are the same in all processes of a run: a batch script's mpirun has a step on every host but its own. */
static uint16_t port_of(const struct environment *e, const char *launcher) {
  bool found = false;
  uint32_t hash = 0;
  if (strcmp(launcher, "mpirun") == 0) hash = hash_of(e, "PMIX_NAMESPACE", hash, &found);
  if (!found) hash = hash_of(e, "SLURM_JOB_ID", hash, &found);
  if (strcmp(launcher, "srun") == 0) hash = hash_of(e, "SLURM_STEP_ID", hash * 31 + '.', &found);
  return found ? (uint16_t)(20000 + hash % 10000) : DEFAULT_PORT;
}

static enum us_status find_meeting(const struct environment *e, struct us_ranks *ranks, struct us_err *err) {
  const char *address = e->get(e->arg, "MASTER_ADDR"), *file = e->get(e->arg, "US_RENDEZVOUS");
  bool step = strcmp(ranks->launcher, "srun") == 0;
  const char *nodes = e->get(e->arg, step ? "SLURM_STEP_NODELIST" : "SLURM_JOB_NODELIST");
  uint32_t port = port_of(e, ranks->launcher);
  bool found = false;
  enum us_status status = number(e, "MASTER_PORT", 65534, &port, &found, err);
  if (status != US_OK) return status;
  /* torchrun's own store listens on MASTER_PORT. */
  ranks->port = (uint16_t)(found && e->get(e->arg, "TORCHELASTIC_USE_AGENT_STORE") ? port + 1 : port);
  if (file && strlen(file) >= sizeof ranks->file)
    return us_err_set(err, US_ERR_USAGE, "US_RENDEZVOUS: the path is too long");
  if (file && *file)
    snprintf(ranks->file, sizeof ranks->file, "%s", file);
  else if (address && *address)
    snprintf(ranks->address, sizeof ranks->address, "%.255s", address);
  else if (ranks->local_processes >= ranks->processes)
    snprintf(ranks->address, sizeof ranks->address, "127.0.0.1");
  else if (nodes && *nodes)
    us_ranks_first_host(nodes, ranks->address);
  else
    return us_err_set(
        err, US_ERR_USAGE,
        "%u processes started by %s: set MASTER_ADDR to process 0's host, or US_RENDEZVOUS to a "
        "file that all can see",
        ranks->processes, ranks->launcher);
  return US_OK;
}

enum us_status us_ranks_discover(us_ranks_getenv get, void *arg, struct us_ranks *ret_ranks,
                                 struct us_err *err) {
  struct environment e = {.get = get, .arg = arg};
  bool found = false;
  *ret_ranks = (struct us_ranks){.processes = 1, .local_processes = 1};
  for (size_t i = 0; i < sizeof launchers / sizeof launchers[0] && !found; i++) {
    if (strcmp(launchers[i].name, "mpiexec") == 0 && pmi_is_sruns(&e)) continue;
    enum us_status status = ask(&e, &launchers[i], ret_ranks, &found, err);
    if (status != US_OK) return status;
  }
  return ret_ranks->processes > 1 ? find_meeting(&e, ret_ranks, err) : US_OK;
}

enum us_status us_ranks_first_gpu(const struct us_ranks *ranks, uint32_t visible, uint32_t gpus,
                                  uint32_t *ret_first, struct us_err *err) {
  *ret_first = 0;
  if (gpus > visible)
    return us_err_set(err, US_ERR_DEVICE, "%u GPU%s asked for; there %s %u", gpus, gpus == 1 ? "" : "s",
                      visible == 1 ? "is" : "are", visible);
  if ((uint64_t)ranks->local_processes * gpus <= visible) *ret_first = ranks->local * gpus;
  /* Slurm and others may show each process only its own GPUs; with all of them in sight two processes would share one. */
  else if (visible != gpus)
    return us_err_set(err, US_ERR_DEVICE, "%u processes of %u GPU%s on this host; it has %u",
                      ranks->local_processes, gpus, gpus == 1 ? "" : "s", visible);
  return US_OK;
}
