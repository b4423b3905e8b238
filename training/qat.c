/* qat.c: finetuning a model through the rounding that its stored form will have.
 *
 * Contents: what trains; losses; a step; the run; export; check.
 */
#include "training/qat.h"

#include "training/gptq.h"
#include "training/lanes.h"

#include <stdlib.h>

#define MOST_ROWS 8192

/* Everything a run holds beside its masters. */
struct session {
  struct us_qat *run;
  struct us_pool *pool;
  struct us_learner *learner;
  struct us_params frozen; /* the teacher's */
  struct us_learner_set *set, *frozen_set;
  struct us_learner_model *student, *teacher;
  struct us_lanes lanes;
  size_t held, eval; /* held-out windows, and those of an evaluation */
  double labels;     /* of the step */
  double loss_sum;   /* since the last line */
  uint64_t loss_steps, tokens_then;
  double seconds_then;
};

/* --- what trains --- */

static bool trains(const struct us_qat *run, const struct us_tensor_ref *ref, enum us_format format,
                   const struct us_param *p) {
  if (p->group == US_PARAM_BIAS) return false;
  if (run->scope == US_QAT_ALL) return true;
  if (run->scope == US_QAT_EXPERTS) return ref->matrix && strcmp(p->family, "experts") == 0;
  return ref->matrix && ref->matrix->format != format;
}

/* What a tensor is multiplied as. One that keeps format and bits is multiplied as it was decoded: FP8 is not encoded
 * again, since that may move its scales by one unit. */
static struct us_matrix_encoding encoding_of(const struct us_convert *how, const struct us_shape *shape,
                                             const struct us_tensor_ref *ref, enum us_format format,
                                             bool trained) {
  struct us_matrix_encoding e = {.format = US_FORMAT_F32};
  if (!ref->matrix || (!trained && ref->matrix->format == format)) return e;
  e = (struct us_matrix_encoding){
      .format = format, .scale_rule = how->scale_rule, .fp8_scale = how->fp8_scale};
  if (format == US_FORMAT_FP8) e.scale_chunk_rows = us_tensor_scale_chunk_rows(shape, ref);
  return e;
}

/* Tensors of the original and the format that each is to have; the caller frees both. */
static enum us_status list(const struct us_qat *run, struct us_tensor_ref **ret_refs,
                           enum us_format **ret_formats, size_t *ret_count, struct us_err *err) {
  *ret_formats = NULL;
  enum us_status status = us_model_tensors(run->original, ret_refs, ret_count, err);
  if (status != US_OK) return status;
  for (size_t i = 0; i < *ret_count; i++) {
    const struct us_matrix *w = (*ret_refs)[i].matrix;
    if (w && (w->format == US_FORMAT_NONE || !w->data))
      return us_err_set(err, US_ERR_USAGE, "%s: has no data", (*ret_refs)[i].name);
  }
  *ret_formats = calloc(*ret_count, sizeof **ret_formats);
  if (!*ret_formats) return us_err_memory(err, "formats", *ret_count * sizeof **ret_formats);
  return us_precision_apply(run->convert->rules, *ret_refs, *ret_count, *ret_formats, err);
}

enum us_status us_qat_open(struct us_qat *run, struct us_pool *pool, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  enum us_format *formats = NULL;
  size_t count = 0;
  run->params = (struct us_params){0};
  enum us_status status = list(run, &refs, &formats, &count, err);
  if (status == US_OK) status = us_params_init_model(&run->params, run->original, pool, false, err);
  for (size_t i = 0; i < run->params.count && status == US_OK; i++) {
    struct us_param *p = &run->params.items[i];
    p->frozen = !trains(run, &refs[i], formats[i], p);
    p->encoding = encoding_of(run->convert, &run->original->shape, &refs[i], formats[i], !p->frozen);
  }
  free(refs);
  free(formats);
  return status;
}

/* The masters as they are become those that round to what is near them. */
static enum us_status round_by_gptq(struct us_qat *run, struct us_pool *pool, struct us_err *err) {
  const struct us_shape *shape = &run->original->shape;
  struct us_params reference = {0};
  struct us_gptq gptq = {.shards = run->shards,
                         .windows = run->gptq_windows,
                         .length = run->length,
                         .seed = run->seed,
                         .across = run->across};
  enum us_status status = us_params_init_model(&reference, run->original, pool, true, err);
  if (status != US_OK) return status;
  if (run->begin) /* else they are equal */
    memcpy(reference.value, run->params.value, reference.floats * sizeof *reference.value);
  status = run->learner ? us_learner_gptq(run->learner, &gptq, shape, &reference, &run->params, err)
                        : us_gptq_start(&gptq, shape, &reference, &run->params, pool, err);
  us_params_release(&reference);
  return status;
}

/* What trains begins at another model's weights. */
static enum us_status begin_at(struct us_qat *run, struct us_model *other, struct us_pool *pool,
                               struct us_err *err) {
  struct us_params from = {0};
  enum us_status status = us_params_init_model(&from, other, pool, true, err);
  if (status == US_OK && from.count != run->params.count)
    status = us_err_set(err, US_ERR_INPUT, "%zu tensors where the original has %zu", from.count,
                        run->params.count);
  for (size_t i = 0; i < from.count && status == US_OK; i++) {
    const struct us_param *p = &run->params.items[i], *q = &from.items[i];
    if (strcmp(p->name, q->name) != 0 || p->rows != q->rows || p->cols != q->cols)
      status = us_err_set(err, US_ERR_INPUT, "%s: %zu by %zu where the original has %s, %zu by %zu", q->name,
                          q->rows, q->cols, p->name, p->rows, p->cols);
    else if (!p->frozen)
      memcpy(p->value, q->value, p->rows * p->cols * sizeof *p->value);
  }
  us_params_release(&from);
  return status;
}

enum us_status us_qat_start(struct us_qat *run, struct us_pool *pool, struct us_err *err) {
  const char *state = run->trainer.state_path;
  bool resumed = run->resume && state && us_train_state_exists(state); /* which brings its masters */
  enum us_status status = us_qat_open(run, pool, err);
  if (status == US_OK && run->begin && !resumed) status = begin_at(run, run->begin, pool, err);
  if (status != US_OK || !run->gptq_windows || resumed) return status;
  return round_by_gptq(run, pool, err);
}

/* --- losses --- */

/* Forward passes of both models over the lane's rows, and the loss: the mean over `labels` (the step's) with its gradient, or
 * for 0 the sum. */
static enum us_status run_rows(struct session *s, uint32_t lane, double labels, struct us_err *err) {
  const struct us_rows *rows = &s->lanes.lane[lane].rows;
  struct us_learner_pass pass = {.batch = us_rows_batch(rows),
                                 .label = rows->label,
                                 .weight = rows->weight,
                                 .teacher = s->teacher,
                                 .scale = labels > 0.0 ? (float)(1.0 / labels) : 1.0f,
                                 .routers = s->teacher ? (float)s->run->routers : 0.0f,
                                 .gradient = labels > 0.0};
  return us_learner_pass(s->student, lane, &pass, err);
}

static enum us_status evaluate_pass(void *arg, uint32_t lane, struct us_err *err) {
  return run_rows(arg, lane, 0.0, err);
}

static enum us_status evaluate_lane(void *arg, uint32_t lane, struct us_err *err) {
  struct session *s = arg;
  return us_lanes_heldout(&s->lanes, lane, s->eval, s->held, evaluate_pass, s, err);
}

/* Mean loss over held-out windows, spread evenly; NAN if there is none. */
static enum us_status evaluate(struct session *s, double *ret_loss, struct us_err *err) {
  struct us_qat *run = s->run;
  double total = 0.0, counted = 0.0;
  s->held = us_shards_n_heldout(run->shards, run->length + 1);
  s->eval = run->eval_windows < s->held ? run->eval_windows : s->held;
  *ret_loss = (double)NAN;
  if (!s->eval) return US_OK;
  s->student->opt_follow = NULL;
  enum us_status status = us_learner_refresh(s->set, err);
  if (status == US_OK) status = us_learner_each(s->learner, evaluate_lane, s, err);
  if (status == US_OK) status = us_learner_total(s->student, &total, &counted, err);
  us_learner_clear_load(s->student);
  if (status == US_OK && counted > 0.0) *ret_loss = total / counted;
  return status;
}

/* --- a step --- */

/* Each forward pass knows its share of the mean over the step. */
static enum us_status step_pass(void *arg, uint32_t lane, struct us_err *err) {
  struct session *s = arg;
  return run_rows(s, lane, s->labels, err);
}

static enum us_status step_lane(void *arg, uint32_t lane, struct us_err *err) {
  struct session *s = arg;
  return us_lanes_step(&s->lanes, lane, s->run->trainer.step, s->run->batch, step_pass, s, err);
}

static enum us_status take_step(void *arg, struct us_err *err) {
  struct session *s = arg;
  struct us_qat *run = s->run;
  double loss = 0.0, counted = 0.0;
  s->student->opt_follow = run->original_experts ? s->teacher : NULL;
  s->labels = us_lanes_labels(&s->lanes, run->trainer.step, run->batch);
  if (!(s->labels > 0.0)) s->labels = 1.0;
  enum us_status status = us_trainer_open_step(&run->trainer, err);
  if (status == US_OK) status = us_learner_each(s->learner, step_lane, s, err);
  if (status == US_OK) status = us_learner_total(s->student, &loss, &counted, err);
  us_learner_clear_load(s->student);
  if (status == US_OK) status = us_trainer_close_step(&run->trainer, loss, run->batch * run->length, err);
  s->loss_sum += loss;
  s->loss_steps++;
  return status;
}

/* --- the run --- */

static enum us_status report(void *arg, bool evaluates, struct us_err *err) {
  struct session *s = arg;
  struct us_qat *run = s->run;
  double now = us_trainer_seconds(&run->trainer), spent = now - s->seconds_then;
  struct us_qat_log log = {.step = run->trainer.step,
                           .tokens = run->trainer.tokens,
                           .seconds = now,
                           .loss = s->loss_steps ? s->loss_sum / (double)s->loss_steps : (double)NAN,
                           .heldout = (double)NAN,
                           .rate = run->trainer.rate,
                           .norm = run->trainer.norm};
  if (s->loss_steps && spent > 0.0) log.tokens_per_second = (double)(log.tokens - s->tokens_then) / spent;
  /* The student's passes count three, the teacher's one. */
  double passes = run->loss == US_QAT_KL ? 4.0 : 3.0,
         flops = us_model_train_flops(&run->original->shape, 0.5 * (double)run->length);
  log.mfu = s->learner->peak > 0.0 ? passes * flops * log.tokens_per_second / s->learner->peak : (double)NAN;
  enum us_status status = evaluates ? evaluate(s, &log.heldout, err) : US_OK;
  if (status == US_OK && run->on_log) run->on_log(run->log_arg, &log);
  s->loss_sum = 0.0, s->loss_steps = 0, s->tokens_then = log.tokens;
  s->seconds_then = us_trainer_seconds(&run->trainer);
  return status;
}

static enum us_status train(struct session *s, struct us_err *err) {
  struct us_qat *run = s->run;
  struct us_trainer_loop loop = {.arg = s,
                                 .step = take_step,
                                 .report = report,
                                 .log_every = run->log_every,
                                 .eval_every = run->eval_every,
                                 .interrupted = run->interrupted};
  bool begins = run->trainer.step == 0 && !us_trainer_done(&run->trainer);
  enum us_status status = begins ? report(s, true, err) : US_OK;
  return status == US_OK ? us_trainer_run(&run->trainer, &loop, err) : status;
}

static enum us_status open_models(struct session *s, struct us_err *err) {
  struct us_qat *run = s->run;
  const struct us_shape *shape = &run->original->shape;
  size_t rows = s->lanes.micro * run->length;
  enum us_status status = us_qat_start(run, s->pool, err);
  if (status == US_OK && run->trainer.freeze.first > 0.0) status = us_params_watch(&run->params, err);
  if (status == US_OK) status = us_learner_place(s->learner, &run->params, &s->set, err);
  if (status == US_OK) status = us_learner_model_create(s->set, shape, rows, run->memory, &s->student, err);
  if (status != US_OK || run->loss != US_QAT_KL) return status;
  status = us_params_init_model(&s->frozen, run->original, s->pool, true, err);
  if (status == US_OK) status = us_learner_place(s->learner, &s->frozen, &s->frozen_set, err);
  if (status == US_OK)
    status = us_learner_model_create(s->frozen_set, shape, rows, US_TRAIN_FORWARD, &s->teacher, err);
  return status;
}

static enum us_status open_session(struct session *s, struct us_err *err) {
  enum us_status status = us_lanes_open(&s->lanes, err);
  return status == US_OK ? open_models(s, err) : status;
}

static void close_session(struct session *s) {
  us_learner_model_free(s->student);
  us_learner_model_free(s->teacher);
  us_learner_remove(s->set);
  us_learner_remove(s->frozen_set);
  us_params_release(&s->frozen);
  us_lanes_close(&s->lanes);
}

static enum us_status run_session(struct session *s, struct us_err *err) {
  struct us_qat *run = s->run;
  s->lanes = (struct us_lanes){
      .learner = s->learner,
      .shards = run->shards,
      .micro = us_learner_micro(s->learner, run->micro, MOST_ROWS, run->length, run->batch),
      .length = run->length,
      .seed = run->seed,
      .across = run->across,
      .marked_only = run->marked_only,
  };
  enum us_status status = us_learner_check_batch(s->learner, run->batch, err);
  if (status == US_OK) status = open_session(s, err);
  run->trainer.set = s->set;
  if (status == US_OK) status = us_trainer_start(&run->trainer, run->resume, err);
  s->tokens_then = run->trainer.tokens;
  s->seconds_then = status == US_OK ? us_trainer_seconds(&run->trainer) : 0.0;
  if (status == US_OK) status = train(s, err);
  if (status == US_OK) status = us_learner_fetch(s->set, run->trainer.freeze.first > 0.0, err);
  if (status == US_OK) run->held = us_params_held(&run->params);
  if (status == US_OK) us_learner_part(s->learner);
  close_session(s);
  run->trainer.set = NULL;
  return status;
}

enum us_status us_qat(struct us_qat *run, struct us_pool *pool, struct us_err *err) {
  struct session s = {.run = run, .pool = pool, .learner = run->learner};
  struct us_learner *cpu = NULL;
  run->params = (struct us_params){0};
  if (!run->batch || !run->length || run->length > (size_t)1 << 17)
    return us_err_set(err, US_ERR_USAGE, "%zu sequences of %zu tokens a step", run->batch, run->length);
  if (!us_shards_can_sample(run->shards, run->length + 1))
    return us_err_set(err, US_ERR_INPUT, "the shards hold fewer than %zu training tokens", run->length + 1);
  enum us_status status = us_rows_check_vocabulary(run->shards, run->original, err);
  if (status == US_OK && !s.learner) status = us_learner_create_cpu(pool, &cpu, err);
  if (!s.learner) s.learner = cpu;
  if (status == US_OK) status = run_session(&s, err);
  us_learner_free(cpu);
  return status;
}

void us_qat_release(struct us_qat *run) {
  us_params_release(&run->params);
}

/* --- export --- */

static void master_row(void *arg, size_t row, float *out) {
  const struct us_param *p = arg;
  memcpy(out, p->value + row * p->cols, p->cols * sizeof *out);
}

static enum us_status export_trained(const struct us_params *params, struct us_model *model,
                                     struct us_pool *pool, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  enum us_status status = us_model_tensors(model, &refs, &count, err);
  for (size_t i = 0; i < count && status == US_OK; i++) {
    struct us_param *p = &params->items[i];
    if (p->frozen) continue;
    if (p->vector) {
      memcpy(*refs[i].vector, p->value, p->rows * sizeof(float));
      continue;
    }
    status = us_matrix_build(model->owner, p->rows, p->cols, &p->encoding, master_row, p, pool,
                             refs[i].matrix, err);
    if (status != US_OK) us_err_prefix(err, "%s", p->name);
  }
  free(refs);
  return status;
}

enum us_status us_qat_export(const struct us_qat *run, struct us_pool *pool, struct us_model **ret_model,
                             struct us_err *err) {
  enum us_status status = us_model_convert(run->original, run->convert, pool, ret_model, err);
  if (status != US_OK || !run->params.count) return status;
  status = export_trained(&run->params, *ret_model, pool, err);
  if (status == US_OK) return US_OK;
  us_model_free(*ret_model);
  *ret_model = NULL;
  return status;
}

/* --- check --- */

struct check {
  const struct us_qat *run;
  const struct us_tensor_ref *before, *after;
  const enum us_format *formats;
  struct us_err *errs; /* (count) */
};

static bool same_bytes(const struct us_matrix *a, const struct us_matrix *b) {
  size_t data = us_matrix_data_bytes(a->format, a->rows, a->cols);
  size_t scales = us_matrix_scale_bytes(a->format, a->rows, a->cols, a->scale_chunk_rows);
  return a->format == b->format && a->scale_chunk_rows == b->scale_chunk_rows &&
         memcmp(a->data, b->data, data) == 0 && (!scales || memcmp(a->scales, b->scales, scales) == 0);
}

static enum us_status check_vector(const struct check *c, size_t i, const float *master, struct us_err *err) {
  const float *expected = master ? master : *c->before[i].vector;
  for (size_t k = 0; k < c->before[i].rows; k++)
    if (memcmp(&expected[k], &(*c->after[i].vector)[k], sizeof *expected) != 0)
      return us_err_set(err, US_ERR_CHECK, "%s: element %zu is %.9g, trained as %.9g", c->before[i].name, k,
                        (double)(*c->after[i].vector)[k], (double)expected[k]);
  return US_OK;
}

static enum us_status check_matrix(const struct check *c, size_t i, const float *master, struct us_err *err) {
  const struct us_tensor_ref *ref = &c->before[i];
  const struct us_matrix *stored = c->after[i].matrix;
  if (stored->format != c->formats[i])
    return us_err_set(err, US_ERR_CHECK, "%s: stored as %s, not %s", ref->name,
                      us_format_name(stored->format), us_format_name(c->formats[i]));
  if (!master && ref->matrix->format == c->formats[i])
    return same_bytes(ref->matrix, stored) ? US_OK
                                           : us_err_set(err, US_ERR_CHECK, "%s: its bits changed", ref->name);
  struct us_matrix_encoding encoding =
      encoding_of(c->run->convert, &c->run->original->shape, ref, c->formats[i], master != NULL);
  size_t n = ref->rows * ref->cols;
  float *expected = malloc((n + ref->cols) * sizeof *expected);
  float *row = expected ? expected + n : NULL;
  if (!expected) return us_err_memory(err, ref->name, n * sizeof *expected);
  if (!master) us_matrix_decode(ref->matrix, expected);
  enum us_status status =
      us_matrix_fake_quant(master ? master : expected, ref->rows, ref->cols, &encoding, expected, err);
  for (size_t r = 0; r < ref->rows && status == US_OK; r++) {
    us_matrix_decode_row(stored, r, row);
    for (size_t k = 0; k < ref->cols && status == US_OK; k++)
      if (memcmp(&expected[r * ref->cols + k], &row[k], sizeof *row) != 0)
        status =
            us_err_set(err, US_ERR_CHECK, "%s: row %zu, column %zu is stored as %.9g, multiplied as %.9g",
                       ref->name, r, k, (double)row[k], (double)expected[r * ref->cols + k]);
  }
  free(expected);
  return status;
}

static void check_tensors(void *arg, size_t begin, size_t end, int worker) {
  struct check *c = arg;
  (void)worker;
  for (size_t i = begin; i < end; i++) {
    const struct us_param *p = c->run->params.count ? &c->run->params.items[i] : NULL;
    const float *master = p && !p->frozen ? p->value : NULL;
    enum us_status status = c->before[i].matrix ? check_matrix(c, i, master, &c->errs[i])
                                                : check_vector(c, i, master, &c->errs[i]);
    if (status != US_OK) c->errs[i].status = status;
  }
}

enum us_status us_qat_check(const struct us_qat *run, struct us_model *model, struct us_pool *pool,
                            struct us_err *err) {
  struct us_tensor_ref *before = NULL, *after = NULL;
  enum us_format *formats = NULL;
  struct us_err *errs = NULL;
  size_t count = 0, others = 0;
  enum us_status status = list(run, &before, &formats, &count, err);
  if (status == US_OK) status = us_model_tensors(model, &after, &others, err);
  if (status == US_OK && others != count)
    status = us_err_set(err, US_ERR_CHECK, "%zu tensors were written, %zu trained", others, count);
  if (status == US_OK && !(errs = calloc(count, sizeof *errs)))
    status = us_err_memory(err, "check", count * sizeof *errs);
  if (status == US_OK) {
    struct check c = {.run = run, .before = before, .after = after, .formats = formats, .errs = errs};
    us_pool_for(pool, count, 1, check_tensors, &c);
    for (size_t i = 0; i < count && status == US_OK; i++)
      if (errs[i].status != US_OK) status = us_err_set(err, errs[i].status, "%s", errs[i].message);
  }
  free(before);
  free(after);
  free(formats);
  free(errs);
  return status;
}
