/* train_learner.c: --device and --gpus of the training tools. */
#include "tools/train_learner.h"
#include "training/cuda/learner.h"

#include <stdlib.h>
#include <string.h>

static const char *get(void *arg, const char *name) {
  (void)arg;
  return getenv(name);
}

static bool has_option(const struct us_opt *table, const char *name) {
  for (const struct us_opt *opt = table; opt->kind; opt++)
    if (opt->name && strcmp(opt->name, name) == 0) return true;
  return false;
}

static enum us_status open_cuda(struct us_tool_run *run, int first, struct us_learner **ret_learner,
                                struct us_err *err) {
  bool parallel = has_option(run->table, "gpus");
  uint32_t gpus = parallel ? (uint32_t)us_opt_int(run->opts, "gpus") : 1;
  struct us_ranks ranks = {.processes = 1, .local_processes = 1};
  if (parallel) {
    enum us_status status = us_ranks_discover(get, NULL, &ranks, err);
    if (status != US_OK) return status;
  }
  /* NVLink multicast takes driver calls that some machines forbid, and gains nothing at this size. */
  setenv("NCCL_NVLS_ENABLE", "0", 0);
  struct us_learner_cuda_options options = {.first = first, .gpus = gpus, .ranks = &ranks};
  enum us_status status = us_learner_create_cuda(&options, ret_learner, err);
  if (status != US_OK || !us_learner_leads(*ret_learner)) return status;
  us_log_notice(run->log, "on %u GPU%s (%s)%s%s", (*ret_learner)->ranks,
                (*ret_learner)->ranks == 1 ? "" : "s", (*ret_learner)->name,
                ranks.launcher ? ", started by " : "", ranks.launcher ? ranks.launcher : "");
  return US_OK;
}

/* On a CPU the processes of a launcher know nothing of each other: each trains the whole run. */
static void warn_of_company(struct us_tool_run *run) {
  struct us_ranks ranks;
  struct us_err ignored;
  if (us_ranks_discover(get, NULL, &ranks, &ignored) == US_OK && ranks.processes > 1)
    us_log_warning(
        run->log,
        "process %u of %u that %s started: on a CPU each trains the whole run and writes its files; "
        "--device cuda divides it",
        ranks.process, ranks.processes, ranks.launcher);
}

enum us_status us_tool_open_learner(struct us_tool_run *run, struct us_pool *pool,
                                    struct us_learner **ret_learner, struct us_err *err) {
  int first = us_opt_device(run->opts, "device");
  enum us_status status = US_OK;
  if (first >= 0) {
    status = open_cuda(run, first, ret_learner, err);
    return status == US_OK && us_learner_leads(*ret_learner) ? us_tool_check_outputs(run, err) : status;
  }
  if (has_option(run->table, "gpus") && us_opt_given(run->opts, "gpus"))
    return us_err_set(err, US_ERR_USAGE, "--gpus needs --device cuda");
  if (has_option(run->table, "gpus")) warn_of_company(run);
  status = us_tool_check_outputs(run, err);
  return status == US_OK ? us_learner_create_cpu(pool, ret_learner, err) : status;
}
