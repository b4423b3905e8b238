/* tile_profile_gpu.c: a round of the engine, split into streaming and waiting by cause, or as its critical path. */
#include "tools/tile_profile_gpu.h"

#include "base/table.h"
#include "device/bench.h"
#include "device/executor.h"
#include "device/profile_device.h"

#include <math.h>

/* ---- opening ------------------------------------------------------------------------------------------------------- */

enum us_status us_tile_profile_check(struct us_opts *opts, struct us_err *err) {
  static const char *const needs[] = {"gpus",   "engine",  "synthetic",  "precision",
                                      "share",  "uniform", "batch",      "context",
                                      "rounds", "sms",     "role-spans", "critical-path"};
  if (us_opt_device(opts, "device") >= 0) {
    if (us_opt_flag(opts, "uniform") && !us_opt_given(opts, "synthetic"))
      return us_err_set(err, US_ERR_USAGE, "--uniform needs --synthetic");
    if (us_opt_given(opts, "prompt") || us_opt_given(opts, "max-tokens"))
      return us_err_set(err, US_ERR_USAGE, "on GPUs sequences begin at --context, without a prompt");
    return us_tool_synthetic_check(opts, err);
  }
  for (size_t i = 0; i < sizeof needs / sizeof *needs; i++)
    if (us_opt_given(opts, needs[i]))
      return us_err_set(err, US_ERR_USAGE, "--%s needs --device cuda", needs[i]);
  return US_OK;
}

static void say(void *arg, const char *line) {
  us_log_notice(arg, "%s", line);
}

/* Rounds that a run takes at most, and what they add to the context. */
#define ROUNDS_BEFORE 128

enum us_status us_tile_profile_open(struct us_tool_run *run, const struct us_pair *pair,
                                    struct us_executor **ret_ex, struct us_err *err) {
  struct us_opts *o = run->opts;
  uint32_t batch = (uint32_t)us_opt_int(o, "batch"), rounds = (uint32_t)us_opt_int(o, "rounds");
  struct us_executor_cuda_options options = {
      .device = us_opt_device(o, "device"),
      .gpus = (uint32_t)us_opt_int(o, "gpus"),
      .mode = us_opt_choice(o, "engine") == 1 ? US_DEVICE_GRAPH : US_DEVICE_ENGINE,
      .sequences = batch,
      .positions = (uint32_t)us_opt_int(o, "context") + (rounds + ROUNDS_BEFORE) * US_MAX_BLOCK,
      .uniform = us_opt_flag(o, "uniform"),
      .uniform_seed = (uint64_t)us_opt_int(o, "seed"),
      .say = say,
      .arg = run->log};
  if (!us_opt_given(o, "synthetic"))
    return us_executor_create_cuda(pair->model, pair->draft, &options, ret_ex, err);
  struct us_synthetic_shape of;
  enum us_status status = us_tool_synthetic_shape(o, &of, err);
  if (status != US_OK) return status;
  return us_executor_create_synthetic(&of.shape, of.drafting ? &of.draft : NULL,
                                      (uint64_t)us_opt_int(o, "synthetic"), &options, ret_ex, err);
}

/* ---- the table ----------------------------------------------------------------------------------------------------- */

static const char *const columns[] = {
    "program",       "op",           "us",          "share",    "work_us",   "hand_off_us",
    "ring_empty_us", "sums_us",      "exchange_us", "norm_us",  "router_us", "select_us",
    "ramp_us",       "ring_full_us", "bytes",       "gb_per_s", "of_ceiling"};

static void print_line(struct us_table *table, const char *program, const char *op,
                       const struct us_breakdown_op *t, double round, double bytes, double ceiling) {
  static const enum us_engine_wait waits[] = {
      US_ENGINE_WAIT_DONE, US_ENGINE_WAIT_STAGE, US_ENGINE_WAIT_SUMS,  US_ENGINE_WAIT_EXCHANGE,
      US_ENGINE_WAIT_NORM, US_ENGINE_WAIT_ROUTE, US_ENGINE_WAIT_SELECT};
  double work = t->time;
  for (int wait = 0; wait < US_TRACE_WAITS; wait++) work -= t->wait[wait];
  us_table_text(table, program);
  us_table_text(table, op);
  us_table_num(table, 1e6 * t->time);
  us_table_num(table, t->time / round);
  us_table_num(table, 1e6 * work);
  for (size_t i = 0; i < sizeof waits / sizeof *waits; i++) us_table_num(table, 1e6 * t->wait[waits[i]]);
  us_table_num(table, 1e6 * t->ramp);
  us_table_num(table, 1e6 * t->ring_full);
  us_table_num(table, bytes);
  us_table_num(table, bytes > 0 ? bytes / t->time / 1e9 : 0);
  us_table_num(table, bytes > 0 ? bytes / t->time / ceiling : 0);
}

static void add(struct us_breakdown_op *sum, const struct us_breakdown_op *t) {
  sum->time += t->time, sum->ring_full += t->ring_full, sum->ramp += t->ramp;
  for (int wait = 0; wait < US_TRACE_WAITS; wait++) sum->wait[wait] += t->wait[wait];
}

/* Weights that a program's operations of a task stream in a round, on all ranks. */
static double bytes_of(const struct us_device_profile_result *r, int program, int task) {
  const struct us_device_traffic *traffic = &r->traffic[program];
  return r->ranks * (double)traffic->by_task[task] * (traffic->of_experts[task] ? r->experts : 1);
}

static enum us_status print_means(struct us_tool_run *run, const struct us_device_profile_result *r,
                                  double ceiling, struct us_err *err) {
  struct us_table *table;
  struct us_breakdown_op all = {0};
  double all_bytes = 0;
  enum us_status status = us_table_open(run->out, columns, sizeof columns / sizeof *columns,
                                        us_opt_flag(run->opts, "json"), &table, err);
  if (status != US_OK) return status;
  for (int program = 0; program < US_PROGRAM_KINDS; program++)
    for (int op = 0; op <= US_TASK_OP_COUNT; op++) {
      const struct us_breakdown_op *t = &r->breakdown.ops[program][op];
      double bytes = bytes_of(r, program, op);
      if (t->time <= 0) continue;
      print_line(table, us_program_kind_name((enum us_program_kind)program), us_trace_op_name(op), t,
                 r->breakdown.round, bytes, ceiling);
      add(&all, t);
      all_bytes += bytes;
    }
  print_line(table, "all", "all", &all, r->breakdown.round, all_bytes, ceiling);
  return us_table_close(table, err);
}

/* ---- the critical path --------------------------------------------------------------------------------------------- */

static const char *const path_columns[] = {"program",     "op",      "visits",        "us",
                                           "share",       "work_us", "epilogue_us",   "hand_off_us",
                                           "exchange_us", "norm_us", "ring_empty_us", "sums_us",
                                           "select_us",   "other_us"};

static double length_of(const struct us_critical_op *t) {
  double sum = t->work + t->epilogue;
  for (int wait = 0; wait < US_TRACE_WAITS; wait++) sum += t->wait[wait];
  return sum;
}

static void print_path_line(struct us_table *table, const char *program, const char *op,
                            const struct us_critical_op *t, double round) {
  static const enum us_engine_wait waits[] = {US_ENGINE_WAIT_DONE, US_ENGINE_WAIT_EXCHANGE,
                                              US_ENGINE_WAIT_NORM, US_ENGINE_WAIT_STAGE,
                                              US_ENGINE_WAIT_SUMS, US_ENGINE_WAIT_SELECT};
  double length = length_of(t), other = length - t->work - t->epilogue;
  us_table_text(table, program);
  us_table_text(table, op);
  us_table_num(table, t->visits);
  us_table_num(table, 1e6 * length);
  us_table_num(table, length / round);
  us_table_num(table, 1e6 * t->work);
  us_table_num(table, 1e6 * t->epilogue);
  for (size_t i = 0; i < sizeof waits / sizeof *waits; i++) {
    us_table_num(table, 1e6 * t->wait[waits[i]]);
    other -= t->wait[waits[i]];
  }
  us_table_num(table, 1e6 * fmax(other, 0));
}

static enum us_status print_path(struct us_tool_run *run, const struct us_critical_path *path,
                                 struct us_err *err) {
  struct us_table *table;
  struct us_critical_op all = {0};
  enum us_status status = us_table_open(run->out, path_columns, sizeof path_columns / sizeof *path_columns,
                                        us_opt_flag(run->opts, "json"), &table, err);
  if (status != US_OK) return status;
  for (int program = 0; program < US_PROGRAM_KINDS; program++)
    for (int op = 0; op <= US_TASK_OP_COUNT; op++) {
      const struct us_critical_op *t = &path->ops[program][op];
      if (t->visits <= 0) continue;
      print_path_line(table, us_program_kind_name((enum us_program_kind)program), us_trace_op_name(op), t,
                      path->round);
      all.visits += t->visits, all.work += t->work, all.epilogue += t->epilogue;
      for (int wait = 0; wait < US_TRACE_WAITS; wait++) all.wait[wait] += t->wait[wait];
    }
  print_path_line(table, "all", "all", &all, path->round);
  return us_table_close(table, err);
}

/* ---- the run ------------------------------------------------------------------------------------------------------- */

static void tell(struct us_tool_run *run, const struct us_device_profile_result *r,
                 const struct us_bench_device *device) {
  const struct us_breakdown *b = &r->breakdown;
  const struct us_log *log = run->log;
  double share = 100 / b->round, bytes = 0;
  for (int program = 0; program < US_PROGRAM_KINDS; program++)
    for (int op = 0; op <= US_TASK_OP_COUNT; op++) bytes += bytes_of(r, program, op);
  us_log_notice(log, "%u x %s%s: a round takes %.3f ms, recorded %.3f ms: the recording costs %.1f %%",
                device->gpus, device->name,
                us_opt_given(run->opts, "synthetic") ? ", weights are synthetic" : "", 1e3 * r->plain_round,
                1e3 * r->recorded_round, 100 * (r->recorded_round / r->plain_round - 1));
  if (us_opt_given(run->opts, "share"))
    us_log_notice(log, "it is the share of %u of %lld ranks", device->ranks,
                  (long long)us_opt_int(run->opts, "share"));
  us_log_notice(log, "of a recorded round %.1f %% is streaming weights, %.1f %% other work",
                share * b->streaming, share * b->vectors);
  for (int wait = 1; wait < US_TRACE_WAITS; wait++)
    if (share * b->wait[wait] >= 0.05)
      us_log_notice(log, "and %.1f %% waiting: %s", share * b->wait[wait], us_trace_wait_name(wait));
  us_log_notice(
      log,
      "a round without recording reads %.3f GB of weights at %.0f GB/s, %.1f %% of the %.0f GB/s measured",
      bytes / 1e9, bytes / r->plain_round / 1e9, 100 * bytes / r->plain_round / device->ceiling,
      device->ceiling / 1e9);
  if (b->dropped)
    us_log_warning(log, "%llu intervals found no room; --role-spans makes some",
                   (unsigned long long)b->dropped);
}

enum us_status us_tile_profile_gpu(struct us_tool_run *run, struct us_executor *ex, struct us_trace *trace,
                                   struct us_err *err) {
  struct us_opts *o = run->opts;
  uint32_t block = (uint32_t)us_opt_int(o, "block");
  struct us_device_profile_options options = {.batch = (uint32_t)us_opt_int(o, "batch"),
                                              .block = block       ? block
                                                       : ex->draft ? ex->draft->shape.block
                                                                   : 8,
                                              .context = (uint32_t)us_opt_int(o, "context"),
                                              .rounds = (uint32_t)us_opt_int(o, "rounds"),
                                              .capacity = (uint32_t)us_opt_int(o, "role-spans"),
                                              .keep = (uint32_t)us_opt_int(o, "sms"),
                                              .path = us_opt_flag(o, "critical-path"),
                                              .seed = (uint64_t)us_opt_int(o, "seed"),
                                              .interrupted = us_tool_interrupted};
  struct us_device_profile_result result;
  struct us_bench_device device;
  enum us_status status = us_bench_device(ex, &device, err);
  if (status == US_OK) status = us_device_profile_run(ex, &options, &result, trace, err);
  if (status == US_OK)
    status =
        options.path ? print_path(run, &result.path, err) : print_means(run, &result, device.ceiling, err);
  if (status == US_OK) tell(run, &result, &device);
  return status;
}
