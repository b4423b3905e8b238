/* us_model.c: what a model is made of, what a decode round costs, and whether a checkpoint is sound. */
#include "tool.h"

#include "base/opt_value.h"
#include "base/record.h"
#include "base/table.h"
#include "model/checkpoint.h"
#include "model/count.h"
#include "model/markov.h"
#include "model/precision.h"
#include "plan/check.h"
#include "plan/lower.h"
#include "plan/roofline.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const struct us_opt opts[] = {
    US_OPT_ARG("command", "info|roofline|plan|check", "what to do", .required = true),
    US_OPT_ARG(
        "model", "SHAPE|MODEL",
        "a shape's name (mimo-v2.5-pro), a config.json, a Hugging Face folder or an .h5 file; - reads a "
        "model's record from stdin",
        .required = true),
    US_OPT_GROUP("Decode rounds"),
    US_OPT_INT("rows", 'r', "R", "token rows of a round; may be repeated (1, 8 and 32)", .min = 1,
               .max = 4096, .repeat = true),
    US_OPT_INT("ranks", 0, "N", "plan: shards of the weights", .def = "1", .min = 1, .max = 8),
    US_OPT_INT("gpus", 0, "N", "GPUs that share the bytes; may be repeated (4 and 8)", .min = 1, .max = 1024,
               .repeat = true),
    US_OPT_NUM("bandwidth", 0, "TB/S", "read bandwidth of one GPU, decimal", .def = "4.62", .min = 0,
               .above_min = true),
    US_OPT_FILE("draft", 'd', "FILE",
                "drafter whose bytes are added to a round: a shape or config.json, a folder or an .h5 file; "
                "info counts the latter two; - reads its record from stdin"),
    US_OPT_GROUP("Output"),
    US_OPT_FLAG("json", 0, "records as JSON lines instead of TSV"),
    US_OPT_COMMON_TALK,
    US_OPT_END};

/* What is looked at: a shape, or a model whose numbers are those of its tensors; and a drafter's. */
struct subject {
  struct us_shape shape;
  struct us_count count;
  struct us_draft_shape draft;
  struct us_count draft_count;
  bool drafts, draft_counted;
};

static void print_row(struct us_table *table, const char *family, const struct us_count_row *row) {
  us_table_text(table, family);
  us_table_int(table, (int64_t)row->tensors);
  us_table_int(table, (int64_t)row->parameters);
  us_table_int(table, (int64_t)row->bytes);
  us_table_int(table, (int64_t)row->scale_bytes);
}

/* The drafter's matrices, and all that it reads to draft: its own tensors, the head, whosever that is, and the table of a Markov head,
 * which is no tensor. */
static void print_draft(struct us_table *table, const struct subject *s) {
  struct us_count_row all = s->draft_count.total;
  const struct us_count_row *head = &s->count.family[US_FAMILY_HEAD];
  if (s->draft.head == US_FORMAT_NONE) {
    all.tensors += head->tensors, all.parameters += head->parameters;
    all.bytes += head->bytes, all.scale_bytes += head->scale_bytes;
  }
  for (int f = US_FAMILY_DRAFT; f <= US_FAMILY_DRAFT_HEAD; f++)
    if (s->draft_count.family[f].tensors) print_row(table, us_family_name(f), &s->draft_count.family[f]);
  if (s->draft.markov) {
    struct us_count_row made = {.parameters = (uint64_t)s->draft.markov * s->shape.vocab,
                                .bytes = us_markov_bytes(&s->draft, s->shape.vocab)};
    print_row(table, "draft.markov", &made);
    all.parameters += made.parameters, all.bytes += made.bytes;
  }
  print_row(table, "drafter with head", &all);
}

static enum us_status print_families(struct us_tool_run *run, const struct subject *s, struct us_err *err) {
  static const char *const columns[] = {"family", "tensors", "parameters", "bytes", "scale_bytes"};
  struct us_table *table;
  enum us_status status = us_table_open(run->out, columns, 5, us_opt_flag(run->opts, "json"), &table, err);
  if (status != US_OK) return status;
  for (int f = 0; f < US_FAMILY_COUNT; f++)
    if (s->count.family[f].tensors) print_row(table, us_family_name(f), &s->count.family[f]);
  print_row(table, "total", &s->count.total);
  print_row(table, "active a token", &s->count.active);
  if (s->draft_counted) print_draft(table, s);
  return us_table_close(table, err);
}

static bool ends_with(const char *text, const char *end) {
  size_t n = strlen(text), m = strlen(end);
  return n >= m && !strcmp(text + n - m, end);
}

static bool is_folder(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* --draft: a checkpoint's formats are its tensors', a config's what its target's shape says. */
static enum us_status open_draft(struct subject *s, const char *path, struct us_err *err) {
  struct us_draft *draft = NULL;
  if (!ends_with(path, ".h5") && !is_folder(path)) return us_draft_shape_load(path, &s->draft, err);
  enum us_status status = us_draft_open(path, &draft, err);
  if (status == US_OK) status = us_draft_count(draft, &s->draft_count, err);
  if (status == US_OK) {
    s->draft_counted = true;
    s->draft = draft->shape;
    s->shape.precision.draft = us_draft_format(draft);
    status = us_draft_shape_check(&draft->shape, &s->shape, err);
    if (status != US_OK) us_err_prefix(err, "%s", path);
  }
  us_draft_free(draft);
  return status;
}

static enum us_status load_draft(struct us_tool_run *run, struct subject *s, struct us_err *err) {
  struct us_record record = {0};
  if (!us_opt_given(run->opts, "draft")) return US_OK;
  s->drafts = true;
  enum us_status status = us_record_resolve(us_opt_str(run->opts, "draft"), stdin, "draft", &record, err);
  if (status == US_OK) status = open_draft(s, record.path, err);
  us_record_release(&record);
  return status;
}

/* Value i of a repeated integer option, or of the defaults. */
static uint32_t number_at(struct us_opts *options, const char *name, const char *const *defaults, size_t i) {
  int64_t value = 0; /* the option's table has checked it */
  (void)us_opt_value_int(us_opt_count(options, name) ? us_opt_nth(options, name, i) : defaults[i], &value);
  return (uint32_t)value;
}

static size_t numbers(struct us_opts *options, const char *name, size_t defaults) {
  return us_opt_count(options, name) ? us_opt_count(options, name) : defaults;
}

/* Three decimals: the inputs are no better; of what is small three digits. */
static double thousandths(double value) {
  double scale = value > 0 && value < 0.1 ? pow(10, 2 - floor(log10(value))) : 1e3;
  return round(value * scale) / scale;
}

static void print_round(struct us_table *table, const struct us_roofline *r, uint32_t gpus,
                        double bandwidth) {
  us_table_int(table, r->rows);
  us_table_num(table, thousandths(r->distinct));
  const double gigabytes[] = {r->experts, r->qkv,   r->o_proj,     r->dense, r->router,
                              r->head,    r->draft, r->draft_head, r->total};
  for (size_t i = 0; i < sizeof gigabytes / sizeof *gigabytes; i++)
    us_table_num(table, thousandths(gigabytes[i] / 1e9));
  us_table_int(table, gpus);
  us_table_num(table, bandwidth / 1e12);
  us_table_num(table, thousandths(1e3 * us_roofline_seconds(r, gpus, bandwidth)));
}

static enum us_status print_rounds(struct us_tool_run *run, const struct subject *s, struct us_err *err) {
  static const char *const columns[] = {
      "rows",    "distinct_experts", "experts_gb",    "qkv_gb",   "o_proj_gb", "dense_gb", "router_gb",
      "head_gb", "draft_gb",         "draft_head_gb", "total_gb", "gpus",      "tb_per_s", "floor_ms"};
  static const char *const default_rows[] = {"1", "8", "32"}, *const default_gpus[] = {"4", "8"};
  struct us_table *table;
  enum us_status status = us_table_open(run->out, columns, 14, us_opt_flag(run->opts, "json"), &table, err);
  if (status != US_OK) return status;
  double bandwidth = 1e12 * us_opt_num(run->opts, "bandwidth");
  for (size_t i = 0; i < numbers(run->opts, "rows", 3) && status == US_OK; i++) {
    struct us_roofline roofline;
    status = us_roofline_of_shape(&s->shape, s->drafts ? &s->draft : NULL,
                                  number_at(run->opts, "rows", default_rows, i), &roofline, err);
    for (size_t g = 0; g < numbers(run->opts, "gpus", 2) && status == US_OK; g++)
      print_round(table, &roofline, number_at(run->opts, "gpus", default_gpus, g), bandwidth);
  }
  enum us_status closed = us_table_close(table, status == US_OK ? err : NULL);
  return status == US_OK ? closed : status;
}

/* One line an op of the lowered and proved program. */
static enum us_status print_plan(struct us_tool_run *run, const struct us_shape *shape, struct us_err *err) {
  static const char *const columns[] = {"op", "tasks", "bytes"}, *const default_rows[] = {"8"};
  struct us_lower_options options = {.rows = number_at(run->opts, "rows", default_rows, 0),
                                     .ranks = (uint32_t)us_opt_int(run->opts, "ranks")};
  struct us_program *program;
  enum us_status status = us_lower_target(shape, &options, &program, err);
  if (status != US_OK) return status;
  status = us_program_check(program, err);
  struct us_table *table;
  if (status == US_OK)
    status = us_table_open(run->out, columns, 3, us_opt_flag(run->opts, "json"), &table, err);
  if (status == US_OK) {
    for (int op = 0; op < US_TASK_OP_COUNT; op++) {
      int64_t tasks = 0, bytes = 0;
      for (size_t i = 0; i < program->task_count; i++) {
        tasks += program->tasks[i].op == op;
        bytes += program->tasks[i].op == op ? (int64_t)program->tasks[i].bytes : 0;
      }
      if (!tasks) continue;
      us_table_text(table, us_task_op_name(op));
      us_table_int(table, tasks);
      us_table_int(table, bytes);
    }
    status = us_table_close(table, err);
    us_log_notice(run->log, "%zu tasks, %u events, %u ranks, %u rows: no deadlock, no race, every tile once",
                  program->task_count, program->event_count, program->ranks, program->dims.rows);
  }
  us_program_free(program);
  return status;
}

/* A checkpoint is opened, so that the numbers are those of its tensors; anything else is a shape. */
static enum us_status info(struct us_tool_run *run, const char *path, struct us_err *err) {
  struct subject s = {0};
  struct us_model *model = NULL;
  enum us_status status;
  if (ends_with(path, ".h5")) {
    status = us_model_open(path, &model, err);
    if (status == US_OK) status = us_model_count(model, &s.count, err);
    if (status == US_OK) s.shape = model->shape;
  } else {
    status = us_shape_load(path, &s.shape, err);
    if (status == US_OK) status = us_shape_count(&s.shape, &s.count, err);
  }
  if (status == US_OK) status = load_draft(run, &s, err);
  if (status == US_OK) status = print_families(run, &s, err);
  if (status == US_OK && !us_opt_flag(run->opts, "json")) fputc('\n', run->out);
  if (status == US_OK) status = print_rounds(run, &s, err);
  us_model_free(model);
  return status;
}

static enum us_status check(struct us_tool_run *run, const char *path, struct us_err *err) {
  struct us_model *model;
  enum us_status status = us_model_open(path, &model, err);
  if (status != US_OK) return status;
  status = us_model_check(model, err);
  if (status == US_OK) us_log_notice(run->log, "%s: every weight is finite", path);
  us_model_free(model);
  return status;
}

static enum us_status run_command(struct us_tool_run *run, const char *path, struct us_err *err) {
  const char *command = us_opt_str(run->opts, "command");
  struct subject s = {0};
  if (!strcmp(command, "info")) return info(run, path, err);
  if (!strcmp(command, "check")) return check(run, path, err);
  bool roofline = !strcmp(command, "roofline"), plan = !strcmp(command, "plan");
  if (!roofline && !plan)
    return us_err_set(err, US_ERR_USAGE, "'%s' is not a command: info, roofline, plan or check", command);
  if (plan && us_opt_count(run->opts, "rows") > 1)
    return us_err_set(err, US_ERR_USAGE, "plan takes one --rows");
  enum us_status status = us_shape_load(path, &s.shape, err);
  if (status == US_OK && roofline) status = load_draft(run, &s, err);
  if (status != US_OK) return status;
  return roofline ? print_rounds(run, &s, err) : print_plan(run, &s.shape, err);
}

static enum us_status run_tool(struct us_tool_run *run, struct us_err *err) {
  struct us_record record = {0};
  enum us_status status = us_record_resolve(us_opt_str(run->opts, "model"), stdin, "model", &record, err);
  if (status == US_OK) status = run_command(run, record.path, err);
  us_record_release(&record);
  return status;
}

static const struct us_tool tool = {
    .name = "us-model",
    .summary = "what a model is made of and what a decode round costs",
    .description = "info prints parameters and bytes by module family, a drafter's too, then the bytes that "
                   "one decode round "
                   "streams and the time "
                   "below which no engine can get, for numbers of rows and GPUs. roofline prints the rounds "
                   "alone. plan lowers the "
                   "shape to a tile program, proves that it can neither hang nor race, and prints its "
                   "operations; an expert's down "
                   "projection is counted once for each tile, whatever the number of active experts. check "
                   "reads every weight of a "
                   "checkpoint.",
    .examples = "# the roofline table of the one-trillion-parameter model, with its drafter\n"
                "us-model info mimo-v2.5-pro --draft data/shapes/mimo-v2.5-pro-dflash.json\n"
                "# is this file sound?\nus-model check q.h5\n"
                "# what do a drafter and its head read, of what the model reads a token?\n"
                "us-model info q.h5 --draft d.h5\n",
    .opts = opts,
    .run = run_tool};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
