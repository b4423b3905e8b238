/* train_lanes.c: 1, 2, 3 and 4 lanes train, and finetune through roundings, as one does. Usage: train_lanes TEXT.h5 [SHAPE]
 *
 * The lanes are copies of the model on one GPU and NCCL is a stand-in (fake_nccl.c), so that lanes, ownership, sums, shared values, and
 * moments that are held once are tested where there is one GPU. The same global batch gives the same curve up to the order of
 * sums; state of two lanes goes on in four; the same number of lanes gives the same bits.
 */
#include "base/pool.h"
#include "training/cuda/learner.h"
#include "training/metrics.h"
#include "training/pretrain.h"
#include "training/qat.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { STEPS = 12, MOST = 4 };

struct curve {
  double loss[STEPS + 1], norm[STEPS + 1], heldout, seconds;
  float *value; /* (floats) malloc'ed */
  size_t floats;
  enum us_status status;
  struct us_err err;
};

static int failures;

static void say(const char *check, bool good, const char *note) {
  printf("{\"check\": \"%s\", \"ok\": %s, \"note\": \"%s\"}\n", check, good ? "true" : "false", note);
  fflush(stdout);
  if (!good) failures++;
}

static void keep(struct curve *curve, uint64_t step, double loss, double norm, double heldout) {
  if (step > STEPS) return;
  curve->loss[step] = loss;
  curve->norm[step] = norm;
  if (isfinite(heldout)) curve->heldout = heldout;
}

static void keep_line(void *arg, const struct us_pretrain_log *log) {
  keep(arg, log->step, log->loss, log->norm, log->heldout);
}

static struct us_pretrain recipe(const struct us_shape *shape, const struct us_shards *shards,
                                 enum us_optim_kind kind, struct curve *curve) {
  return (struct us_pretrain){
      .shape = shape,
      .shards = shards,
      .batch = 12,
      .length = 256,
      .seed = 3,
      .balance_rate = 0.01f,
      .memory = US_TRAIN_SAVE,
      .eval_windows = 8,
      .log_every = 1,
      .trainer = {.optim = us_optim_default(kind),
                  .schedule = {.kind = US_SCHEDULE_COSINE, .peak = 1e-3, .warmup = 0.1},
                  .clip = 1.0,
                  .steps = STEPS,
                  .options = "same"},
      .on_log = keep_line,
      .log_arg = curve};
}

static uint64_t stop_at;
static const struct us_pretrain *running;

static bool stops(void) {
  return running->trainer.step >= stop_at;
}

/* One run on `lanes` copies; with a state it stops at `stop` and can be resumed. */
static void train(const struct us_shape *shape, const struct us_shards *shards, enum us_optim_kind kind,
                  uint32_t lanes, const char *state, uint64_t stop, struct curve *curve) {
  static const int ordinals[MOST];
  struct us_learner *learner = NULL;
  struct us_pretrain run = recipe(shape, shards, kind, curve);
  struct us_learner_cuda_options options = {.gpus = lanes, .opt_ordinals = ordinals};
  curve->status = us_learner_create_cuda(&options, &learner, &curve->err);
  if (curve->status != US_OK) return;
  run.learner = learner;
  run.resume = state != NULL;
  run.trainer.state_path = state;
  running = &run, stop_at = stop;
  run.interrupted = stops;
  curve->status = us_pretrain(&run, NULL, &curve->err);
  if (curve->status == US_OK) {
    curve->floats = run.params.floats;
    curve->value = malloc(curve->floats * sizeof *curve->value);
    if (curve->value) memcpy(curve->value, run.params.value, curve->floats * sizeof *curve->value);
    curve->seconds = us_trainer_seconds(&run.trainer);
  }
  us_pretrain_release(&run);
  us_learner_free(learner);
}

static double apart(const double *a, const double *b, int first) {
  double worst = 0.0;
  for (int i = first; i <= STEPS; i++) {
    double d = fabs(a[i] - b[i]) / fabs(b[i]);
    if (!(d <= worst)) worst = d;
  }
  return worst;
}

static bool same_bits(const struct curve *a, const struct curve *b) {
  return a->value && b->value && a->floats == b->floats &&
         memcmp(a->value, b->value, a->floats * sizeof *a->value) == 0;
}

static void compare(const char *what, const struct curve *run, const struct curve *one, double bound) {
  char name[128], note[1200];
  snprintf(name, sizeof name, "%s", what);
  if (run->status != US_OK) {
    snprintf(note, sizeof note, "%s", run->err.message);
    say(name, false, note);
    return;
  }
  double loss = apart(run->loss, one->loss, 1), norm = apart(run->norm, one->norm, 1);
  double held = fabs(run->heldout - one->heldout) / one->heldout;
  snprintf(note, sizeof note, "loss %.2e, norm %.2e, held out %.2e apart; %.2f s, one lane %.2f s", loss,
           norm, held, run->seconds, one->seconds);
  say(name, loss <= bound && held <= bound && norm <= 20.0 * bound, note);
}

/* The state that half a run of two lanes left, for another run to go on with. */
static void copy_state(const char *from, const char *to) {
  char command[1200];
  for (int slot = 0; slot < 2; slot++) {
    snprintf(command, sizeof command, "[ ! -e %s.%d ] || cp %s.%d %s.%d", from, slot, from, slot, to, slot);
    if (system(command) != 0) say("copy of the state", false, command);
  }
}

static void test_resume(const struct us_shape *shape, const struct us_shards *shards, enum us_optim_kind kind,
                        const char *name, const char *folder, const struct curve *one,
                        const struct curve *two) {
  struct curve part = {0}, same = {0}, rest = {0};
  char text[128], state[256], other[256];
  snprintf(state, sizeof state, "%s/%s.state", folder, name);
  snprintf(other, sizeof other, "%s/%s.other", folder, name);
  train(shape, shards, kind, 2, state, STEPS / 2, &part);
  copy_state(state, other);
  rest = part;
  train(shape, shards, kind, 2, state, UINT64_MAX, &same);
  snprintf(text, sizeof text, "%s: two lanes stopped and resumed give the same bits", name);
  say(text, part.status == US_INTERRUPTED && same_bits(&same, two),
      same.status == US_OK ? "" : same.err.message);
  train(shape, shards, kind, 4, other, UINT64_MAX, &rest);
  snprintf(text, sizeof text, "%s: what two lanes began four go on with", name);
  compare(text, &rest, one, 0.01);
  free(same.value);
  free(rest.value);
}

static void test_kind(const struct us_shape *shape, const struct us_shards *shards, enum us_optim_kind kind,
                      const char *name, const char *folder) {
  struct curve run[MOST + 1], again = {0};
  char text[128];
  memset(run, 0, sizeof run);
  for (uint32_t lanes = 1; lanes <= MOST; lanes++)
    train(shape, shards, kind, lanes, NULL, UINT64_MAX, &run[lanes]);
  for (uint32_t lanes = 1; lanes <= MOST; lanes++) {
    snprintf(text, sizeof text, "%s: %u lane%s as one", name, lanes, lanes == 1 ? " trains" : "s train");
    compare(text, &run[lanes], &run[1], 0.01); /* roundings of bf16 weights that fall the other way */
  }
  train(shape, shards, kind, 2, NULL, UINT64_MAX, &again);
  snprintf(text, sizeof text, "%s: two lanes give the same bits again", name);
  say(text, same_bits(&again, &run[2]), "");
  test_resume(shape, shards, kind, name, folder, &run[1], &run[2]);
  for (uint32_t lanes = 1; lanes <= MOST; lanes++) free(run[lanes].value);
  free(again.value);
}

/* --- finetuning, with weights that oscillate fixed --- */

static const struct us_qat *finetuning;

static bool stops_finetuning(void) {
  return finetuning->trainer.step >= stop_at;
}

static void keep_qat_line(void *arg, const struct us_qat_log *log) {
  keep(arg, log->step, log->loss, log->norm, log->heldout);
}

/* One run on `lanes` copies; curve->value has masters, and behind them what was watched. */
static double finetune(struct us_model *model, const struct us_shards *shards, uint32_t lanes,
                       const char *state, uint64_t stop, struct curve *curve) {
  static const int ordinals[MOST];
  struct us_precision_rules rules;
  struct us_convert convert = {.rules = &rules, .scale_rule = US_SCALE_MSE, .fp8_scale = US_FP8_SCALE_UE8M0};
  struct us_learner *learner = NULL;
  struct us_learner_cuda_options options = {.gpus = lanes, .opt_ordinals = ordinals};
  struct us_qat run = {.original = model,
                       .convert = &convert,
                       .shards = shards,
                       .scope = US_QAT_ALL,
                       .batch = 12,
                       .length = 256,
                       .seed = 3,
                       .eval_windows = 8,
                       .log_every = 1,
                       .resume = state != NULL,
                       .trainer = {.optim = us_optim_default(US_OPTIM_ADAMW),
                                   .schedule = {.kind = US_SCHEDULE_COSINE, .peak = 3e-4},
                                   .freeze = {.first = 0.3, .last = 0.1, .memory = 0.7},
                                   .clip = 1.0,
                                   .steps = STEPS,
                                   .state_path = state,
                                   .options = "same"},
                       .on_log = keep_qat_line,
                       .log_arg = curve,
                       .interrupted = stops_finetuning};
  finetuning = &run, stop_at = stop;
  curve->status = us_precision_parse("all=fp8,experts=mxfp4", &rules, &curve->err);
  if (curve->status == US_OK) curve->status = us_learner_create_cuda(&options, &learner, &curve->err);
  run.learner = learner;
  if (curve->status == US_OK) curve->status = us_qat(&run, NULL, &curve->err);
  if (curve->status == US_OK) {
    const struct us_params *p = &run.params;
    const float *parts[4] = {p->value, p->watch.share, p->watch.mean, p->watch.turn};
    curve->floats = 4 * p->floats;
    curve->value = malloc(curve->floats * sizeof *curve->value);
    for (size_t i = 0; i < 4 && curve->value; i++)
      memcpy(curve->value + i * p->floats, parts[i], p->floats * sizeof *curve->value);
    curve->seconds = us_trainer_seconds(&run.trainer);
  }
  double held = run.held;
  us_qat_release(&run);
  us_learner_free(learner);
  return held;
}

/* --- GPTQ --- */

/* Loss before the first step, on the GPU; the masters begin where `gptq` sequences say, on the GPU or on the CPU. */
static double begin(struct us_model *model, const struct us_shards *shards, size_t gptq, size_t length,
                    bool on_cpu, float **ret_value, size_t *ret_floats, struct us_err *err) {
  static const int ordinals[1];
  struct us_precision_rules rules;
  struct us_convert convert = {.rules = &rules, .scale_rule = US_SCALE_MSE, .fp8_scale = US_FP8_SCALE_UE8M0};
  struct us_learner_cuda_options options = {.gpus = 1, .opt_ordinals = ordinals};
  struct us_model *rounded = NULL;
  struct us_metrics_job job = {.models = {model}, .n = 2, .shards = shards, .length = 256, .windows = 16};
  struct us_metrics metrics = {0};
  struct us_pool *pool = NULL;
  struct us_qat run = {.original = model,
                       .convert = &convert,
                       .shards = shards,
                       .scope = US_QAT_ALL,
                       .length = length,
                       .seed = 3,
                       .gptq_windows = gptq};
  enum us_status status = us_pool_create(0, &pool, err);
  if (status == US_OK) status = us_precision_parse("all=fp8,experts=mxfp4", &rules, err);
  if (status == US_OK) status = us_learner_create_cuda(&options, &job.learner, err);
  run.learner = on_cpu ? NULL : job.learner;
  if (status == US_OK) status = us_qat_start(&run, pool, err);
  if (status == US_OK) status = us_qat_export(&run, pool, &rounded, err);
  job.models[1] = rounded;
  if (status == US_OK) status = us_metrics_run(&job, pool, &metrics, err);
  double kl = status == US_OK ? metrics.models[1].kl : (double)NAN;
  *ret_floats = run.params.floats;
  *ret_value = malloc((run.params.floats + 1) * sizeof **ret_value);
  if (*ret_value && run.params.value)
    memcpy(*ret_value, run.params.value, run.params.floats * sizeof **ret_value);
  us_metrics_release(&metrics);
  us_model_free(rounded);
  us_qat_release(&run);
  us_learner_free(job.learner);
  us_pool_free(pool);
  return kl;
}

/* KL of a model rounded to nearest with the original's experts; *ret_same is the share of the choices that are the same. */
static double with_base_experts(struct us_model *model, const struct us_shards *shards,
                                struct us_learner *learner, double *ret_same, struct us_err *err) {
  struct us_precision_rules rules;
  struct us_convert convert = {.rules = &rules, .scale_rule = US_SCALE_MSE, .fp8_scale = US_FP8_SCALE_UE8M0};
  struct us_model *rounded = NULL;
  struct us_metrics metrics = {0};
  enum us_status status = us_precision_parse("all=fp8,experts=mxfp4", &rules, err);
  if (status == US_OK) status = us_model_convert(model, &convert, NULL, &rounded, err);
  struct us_metrics_job job = {.learner = learner,
                               .models = {model, rounded},
                               .n = 2,
                               .shards = shards,
                               .base_experts = true,
                               .length = 256,
                               .windows = 16};
  if (status == US_OK) status = us_metrics_run(&job, NULL, &metrics, err);
  double kl = status == US_OK ? metrics.models[1].kl : (double)NAN;
  *ret_same = status == US_OK ? metrics.models[1].router : 0.0;
  us_metrics_release(&metrics);
  us_model_free(rounded);
  return kl;
}

static void test_base_experts(struct us_model *model, const struct us_shards *shards) {
  static const int ordinals[1];
  struct us_learner_cuda_options options = {.gpus = 1, .opt_ordinals = ordinals};
  struct us_learner *learner = NULL;
  struct us_err err = {0};
  char note[1200];
  double gpu = (double)NAN, same = 0.0, cpu_same = 0.0;
  double cpu = with_base_experts(model, shards, NULL, &cpu_same, &err);
  if (us_learner_create_cuda(&options, &learner, &err) == US_OK)
    gpu = with_base_experts(model, shards, learner, &same, &err);
  snprintf(note, sizeof note, "KL %.6f, on the CPU %.6f; %.4f and %.4f the same; %s", gpu, cpu, same,
           cpu_same, err.message);
  say("with the original's experts the divergence is the CPU's",
      !(same < 1.0) && !(cpu_same < 1.0) && fabs(gpu - cpu) < 0.05 * cpu, note);
  us_learner_free(learner);
}

/* 240 sequences of 256 tokens are two chunks on the GPU; of 33,000, each is one. */
static void test_gptq(struct us_model *model, const struct us_shards *shards) {
  struct us_err err = {0};
  char note[1200];
  float *value[5] = {NULL};
  size_t floats = 0;
  double nearest = begin(model, shards, 0, 256, false, &value[0], &floats, &err);
  double cpu = begin(model, shards, 240, 256, true, &value[1], &floats, &err);
  double gpu = begin(model, shards, 240, 256, false, &value[2], &floats, &err);
  double again = begin(model, shards, 240, 256, false, &value[3], &floats, &err);
  double wide = begin(model, shards, 2, 33000, false, &value[4], &floats, &err);
  snprintf(note, sizeof note, "KL %.6f, on the CPU %.6f, nearest %.6f; two long sequences %.6f; %s", gpu, cpu,
           nearest, wide, err.message);
  say("GPTQ on the GPU begins about as near as on the CPU",
      cpu < 0.95 * nearest && fabs(gpu - cpu) < 0.1 * (nearest - cpu), note);
  say("GPTQ by sequences longer than a chunk", wide < nearest, note);
  say("GPTQ gives the same bits again",
      again > 0.0 && value[2] && value[3] && memcmp(value[2], value[3], floats * sizeof(float)) == 0, "");
  for (int i = 0; i < 5; i++) free(value[i]);
}

static void test_finetuning(const struct us_shape *shape, const struct us_shards *shards,
                            const char *folder) {
  struct us_params params = {0};
  struct us_model *model = NULL;
  struct curve one = {0}, two = {0}, part = {0}, rest = {0};
  struct us_err err = {0};
  char state[256], note[128];
  enum us_status status = us_params_init_fresh(&params, shape, 9, 0.05f, &err);
  if (status == US_OK) status = us_model_create(shape, &model, &err);
  if (status == US_OK) status = us_params_export(&params, model, &err);
  us_params_release(&params);
  if (status != US_OK) {
    say("finetuning: a model to begin at", false, err.message);
    return;
  }
  test_gptq(model, shards);
  test_base_experts(model, shards);
  snprintf(state, sizeof state, "%s/qat.state", folder);
  double alone = finetune(model, shards, 1, NULL, UINT64_MAX, &one);
  double shared = finetune(model, shards, 2, NULL, UINT64_MAX, &two);
  compare("finetuning: two lanes train as one", &two, &one, 0.02);
  snprintf(note, sizeof note, "%.4f, one lane %.4f", shared, alone);
  say("finetuning: two lanes fix about as many weights", alone > 0.001 && fabs(shared - alone) < 0.1 * alone,
      note);
  finetune(model, shards, 2, state, STEPS / 2, &part);
  double resumed = finetune(model, shards, 2, state, UINT64_MAX, &rest);
  say("finetuning: two lanes stopped and resumed give the same bits, and fix the same weights",
      part.status == US_INTERRUPTED && same_bits(&rest, &two) && !(resumed < shared) && !(resumed > shared),
      rest.status == US_OK ? "" : rest.err.message);
  free(one.value), free(two.value), free(part.value), free(rest.value);
  us_model_free(model);
}

int main(int argc, char **argv) {
  struct us_err err = {0};
  struct us_shape shape;
  struct us_shards *shards = NULL;
  char folder[] = "/tmp/us-lanes-XXXXXX", command[64];
  if (argc < 2) {
    fprintf(stderr, "usage: train_lanes TEXT.h5 [SHAPE]\n");
    return 2;
  }
  if (us_shape_load(argc > 2 ? argv[2] : "pico", &shape, &err) != US_OK ||
      us_shards_open(argv[1], &shards, &err) != US_OK || !mkdtemp(folder)) {
    fprintf(stderr, "train_lanes: %s\n", err.message);
    return 3;
  }
  shape.precision = (struct us_precision){US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_BF16,
                                          US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_F32,  US_FORMAT_BF16};
  test_kind(&shape, shards, US_OPTIM_ADAMW, "adamw", folder);
  test_kind(&shape, shards, US_OPTIM_MUON, "muon", folder);
  test_finetuning(&shape, shards, folder);
  us_shards_close(shards);
  snprintf(command, sizeof command, "rm -rf %s", folder);
  if (system(command) < 0) return 4;
  return failures ? 1 : 0;
}
