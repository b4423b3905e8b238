/* sample_tool.c: a tool that exists only to test what every tool's main does. */
#include "tools/tool.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct us_opt opts[] = {
    US_OPT_FILE("model", 'm', "FILE", "checkpoint: a Hugging Face folder or an .h5 file"),
    US_OPT_INT("steps", 'n', "N", "finetuning steps; 0 only quantizes", .def = "200", .max = 1000000),
    US_OPT_NUM("rate", 0, "RATE", "learning rate", .def = "1e-4", .above_min = true, .max = 1),
    US_OPT_ENUM("do", 0, "list|fail|wait|bug|spam", "what to do", .def = "list"),
    US_OPT_STR("prompt", 'p', "TEXT", "text to work on", .repeat = true),
    US_OPT_RULES("precision", 0, "RULES", "module=format,..., last match wins (experts=mxfp4)"),
    US_OPT_ARG("input", "FILE", "what to read", .repeat = true),
    US_OPT_COMMON,
    US_OPT_END,
};

static enum us_status list(struct us_tool_run *run) {
  char *record = us_opts_record(run->opts);
  fprintf(run->out, "%s\n", record ? record : "no memory");
  free(record);
  us_log_notice(run->log, "listed");
  us_log_debug(run->log, "a \033 b");
  return US_OK;
}

/* Runs until a signal comes; says so when it is ready for one. */
static enum us_status wait_for_signal(struct us_tool_run *run, struct us_err *err) {
  fprintf(run->out, "ready\n");
  fflush(run->out);
  for (int i = 0; i < 1000 && !us_tool_interrupted(); i++) usleep(10000);
  if (us_tool_interrupted()) return us_err_set(err, US_INTERRUPTED, "interrupted");
  return us_err_set(err, US_ERR_CHECK, "no signal came");
}

static enum us_status run(struct us_tool_run *run, struct us_err *err) {
  switch (us_opt_choice(run->opts, "do")) {
  case 0:
    return list(run);
  case 1:
    return us_err_set(err, US_ERR_INPUT, "pico.h5: layers.3.experts.7.down: scale 255 is NaN (block 12)");
  case 2:
    return wait_for_signal(run, err);
  case 3:
    return us_opt_int(run->opts, "stpes") ? US_OK : US_OK;
  default:
    for (int i = 0; i < 100000; i++) fprintf(run->out, "line %d\n", i);
    return US_OK;
  }
}

static const struct us_tool tool = {
    .name = "sample-tool",
    .summary = "show what every tool has",
    .description =
        "Prints the recorded run.\n\nExists for tests; a second paragraph with -dashes, \\ and 'quotes'.",
    .examples = "# the recorded run with ten steps\nsample-tool -n 10\nsample-tool --do fail",
    .opts = opts,
    .run = run,
};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
