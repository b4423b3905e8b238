/* train_speed.c: tokens a second and MFU of training steps on random text, and where the time goes.
 *
 * Times are of the stream: CUDA events around whole steps, and behind every operation (cuda->opt_trace) in a pass of their own,
 * since an event a launch costs something.
 */
#include "train_lab.h"

#include "training/draft_train.h"

#define MOST_EVENTS 8192
#define MOST_NAMES  64

struct trace {
  struct us_cuda *cuda;
  size_t count;
  cudaEvent_t event[MOST_EVENTS];
  const char *what[MOST_EVENTS];
};

static void traced(void *arg, const char *what) {
  struct trace *t = arg;
  if (t->count == MOST_EVENTS) return;
  t->what[t->count] = what;
  (void)cudaEventRecord(t->event[t->count++], t->cuda->stream);
}

static void print_trace(const struct trace *t, double steps) {
  const char *name[MOST_NAMES];
  double ms[MOST_NAMES] = {0}, total = 0.0;
  size_t calls[MOST_NAMES] = {0}, names = 0;
  for (size_t i = 1; i < t->count; i++) {
    float spent = 0.0f;
    size_t n = 0;
    if (cudaEventElapsedTime(&spent, t->event[i - 1], t->event[i]) != cudaSuccess) continue;
    while (n < names && strcmp(name[n], t->what[i]) != 0) n++;
    if (n == MOST_NAMES) continue;
    if (n == names) name[names++] = t->what[i];
    ms[n] += (double)spent;
    calls[n]++;
    total += (double)spent;
  }
  for (size_t done = 0; done < names; done++) {
    size_t most = 0;
    for (size_t n = 1; n < names; n++)
      if (ms[n] > ms[most]) most = n;
    printf("  %8.3f ms %5.1f %% %5zu x %s\n", ms[most] / steps, 100.0 * ms[most] / total,
           calls[most] / (size_t)steps, name[most]);
    ms[most] = -1.0;
  }
}

struct speed {
  struct us_shape shape;
  struct us_params params;
  struct us_rows rows;
  size_t length;
  struct us_cuda *cuda;
  struct us_cuda_params *set;
  struct us_cuda_model *model;
  struct us_cuda_loss *loss;
};

static void step(struct speed *s) {
  struct us_err err = {0};
  struct us_batch batch = us_rows_batch(&s->rows);
  struct us_cuda_head_loss head = {.R = s->rows.R,
                                   .x = s->model->hidden,
                                   .head = s->model->head,
                                   .label = s->rows.label,
                                   .scale = 1.0f / (float)s->rows.R,
                                   .dx = s->model->dhidden,
                                   .dhead = s->model->head_grad};
  need(us_cuda_model_forward(s->model, &batch, NULL, &err), &err, "forward");
  need(us_cuda_loss_add(s->loss, &head, &err), &err, "loss");
  need(us_cuda_model_backward(s->model, &err), &err, "backward");
}

/* Milliseconds of a step: all of them between two events. */
static double time_steps(struct speed *s, int steps) {
  struct us_err err = {0};
  cudaEvent_t begin, end;
  float ms = 0.0f;
  double total;
  size_t counted;
  if (cudaEventCreate(&begin) != cudaSuccess || cudaEventCreate(&end) != cudaSuccess) return 0.0;
  (void)cudaEventRecord(begin, s->cuda->stream);
  for (int i = 0; i < steps; i++) step(s);
  (void)cudaEventRecord(end, s->cuda->stream);
  need(us_cuda_loss_collect(s->loss, &total, &counted, &err), &err, "collect");
  (void)cudaEventElapsedTime(&ms, begin, end);
  (void)cudaEventDestroy(begin);
  (void)cudaEventDestroy(end);
  return (double)ms / steps;
}

static void report(struct speed *s, enum us_train_memory memory, const char *what) {
  struct us_err err = {0};
  size_t R = s->rows.R, D = s->shape.hidden;
  size_t bytes = us_cuda_model_bytes(&s->shape, R, memory),
         head = us_cuda_loss_bytes(R, D, s->shape.vocab, 0);
  need(us_cuda_model_create(s->cuda, &s->shape, s->set, R, memory, &s->model, &err), &err, what);
  (void)time_steps(s, 3);
  double ms = time_steps(s, 10);
  double flops = 3.0 * us_model_train_flops(&s->shape, 0.5 * (double)(s->length + 1)) * (double)R;
  printf("%s %s: rows %zu, length %zu, layers %u: %.3f ms, %.0f tokens/s, %.1f TFLOP/s, MFU %.1f %%; "
         "activations %zu MiB, "
         "loss %zu MiB, chunk %zu\n",
         s->shape.name, what, R, s->length, s->shape.layers, ms, (double)R / ms * 1e3, flops / ms * 1e-9,
         100.0 * flops / (ms * 1e-3) / s->cuda->peak, bytes >> 20, head >> 20, s->loss->chunk);
}

static void split(struct speed *s) {
  static struct trace trace;
  struct us_err err = {0};
  double total;
  size_t counted;
  trace.cuda = s->cuda;
  for (size_t i = 0; i < MOST_EVENTS; i++)
    if (cudaEventCreate(&trace.event[i]) != cudaSuccess) return;
  s->cuda->opt_trace = traced;
  s->cuda->trace_arg = &trace;
  for (int i = 0; i < 2; i++) step(s);
  s->cuda->opt_trace = NULL;
  need(us_cuda_loss_collect(s->loss, &total, &counted, &err), &err, "collect");
  print_trace(&trace, 2.0);
}

static void optimizer(struct speed *s) {
  struct us_err err = {0};
  double sum;
  struct us_optim optim = us_optim_default(US_OPTIM_MUON);
  cudaEvent_t at[4];
  float ms[3] = {0};
  for (int i = 0; i < 4; i++)
    if (cudaEventCreate(&at[i]) != cudaSuccess) return;
  for (int i = 0; i < 3; i++) {
    optim.step++;
    (void)cudaEventRecord(at[0], s->cuda->stream);
    need(us_cuda_params_square(s->set, &sum, &err), &err, "norm");
    (void)cudaEventRecord(at[1], s->cuda->stream);
    need(us_cuda_params_update(s->set, &optim, 1e-5, 1.0f, &err), &err, "update");
    (void)cudaEventRecord(at[2], s->cuda->stream);
    us_cuda_params_refresh(s->set);
    us_cuda_params_zero_grad(s->set);
    (void)cudaEventRecord(at[3], s->cuda->stream);
    need(us_cuda_sync(s->cuda, &err), &err, "optimizer");
  }
  for (int i = 0; i < 3; i++) (void)cudaEventElapsedTime(&ms[i], at[i], at[i + 1]);
  printf("  Muon: norm %.3f ms, update %.3f ms, rounding and zeroing %.3f ms\n", (double)ms[0], (double)ms[1],
         (double)ms[2]);
  for (int i = 0; i < 4; i++) (void)cudaEventDestroy(at[i]);
}

/* A drafter as nano's recipe makes it: 128 anchors in each sequence of 512 rows. */
static struct us_draft_shape drafter_of(const struct us_shape *target) {
  uint32_t L = target->layers;
  return (struct us_draft_shape){.layers = 3,
                                 .hidden = target->hidden,
                                 .vocab = target->vocab,
                                 .inner = target->hidden,
                                 .norm_eps = 1e-5,
                                 .value_scale = target->value_scale,
                                 .block = 8,
                                 .mask_id = 3,
                                 .taps = 3,
                                 .tap_layer = {L / 5, L / 2, L - 1},
                                 .target_layers = L,
                                 .attention = {.q_heads = 4,
                                               .kv_heads = 2,
                                               .qk_dim = 64,
                                               .v_dim = 64,
                                               .rotary_dim = 32,
                                               .rope_theta = 1e4,
                                               .window = 128}};
}

struct draft_speed {
  struct speed *s;
  struct us_draft_blocks blocks;
  struct us_cuda_model *target;
  struct us_cuda_draft *draft;
  struct us_cuda_draft_loss *loss;
};

/* Target, drafter, loss, backward: milliseconds each of a step, behind a few to warm up. */
static void time_draft(struct draft_speed *d, const struct us_draft_shape *shape, double *ms) {
  struct us_err err = {0};
  struct speed *s = d->s;
  struct us_batch batch = us_rows_batch(&s->rows);
  struct us_cuda_taps tap = {.count = shape->taps, .out = d->draft->taps};
  struct us_cuda_draft_teacher teacher = {.head = d->target->head};
  struct us_draft_tally tally;
  cudaEvent_t at[5];
  memcpy(tap.layer, shape->tap_layer, sizeof tap.layer);
  for (int i = 0; i < 5; i++)
    if (cudaEventCreate(&at[i]) != cudaSuccess) return;
  for (int i = 0; i < 8; i++) {
    (void)cudaEventRecord(at[0], s->cuda->stream);
    need(us_cuda_model_forward(d->target, &batch, &tap, &err), &err, "target");
    (void)cudaEventRecord(at[1], s->cuda->stream);
    need(us_cuda_draft_forward(d->draft, s->rows.R, s->rows.position, &d->blocks, &err), &err, "drafter");
    (void)cudaEventRecord(at[2], s->cuda->stream);
    need(us_cuda_draft_loss_add(d->loss, d->draft, &d->blocks, &teacher, true, &err), &err, "loss");
    (void)cudaEventRecord(at[3], s->cuda->stream);
    need(us_cuda_draft_backward(d->draft, &err), &err, "backward");
    (void)cudaEventRecord(at[4], s->cuda->stream);
  }
  need(us_cuda_draft_loss_collect(d->loss, &tally, &err), &err, "collect");
  for (int i = 0; i < 4; i++) {
    float spent = 0.0f;
    (void)cudaEventElapsedTime(&spent, at[i], at[i + 1]);
    ms[i] = (double)spent;
  }
  for (int i = 0; i < 5; i++) (void)cudaEventDestroy(at[i]);
}

static void draft_speed(struct speed *s) {
  struct us_err err = {0};
  struct draft_speed d = {.s = s};
  struct us_draft_shape shape = drafter_of(&s->shape);
  struct us_draft_loss options = {.kind = US_DRAFT_CE, .weights = US_DRAFT_DPACE, .alpha = 0.5f};
  struct us_params params;
  struct us_cuda_params *set;
  size_t R = s->rows.R, blocks = R / 4;
  double ms[4] = {0};
  for (size_t i = 0; i < R; i++) s->rows.weight[i] = (i + 1) % s->length ? 1.0f : 0.0f;
  need(us_params_init_fresh_draft(&params, &shape, 7, 0.0f, &err), &err, "drafter");
  need(us_cuda_params_create(s->cuda, &params, (struct us_owned){0, params.floats}, &set, &err), &err,
       "drafter");
  us_cuda_params_refresh(set);
  us_cuda_params_zero_grad(set);
  need(us_draft_blocks_init(&d.blocks, &shape, blocks, &err), &err, "blocks");
  for (size_t first = 0; first < R; first += 512)
    us_draft_blocks_add(&d.blocks, &s->rows, first, R - first < 512 ? R - first : 512, 128, 5, 0, first);
  us_draft_blocks_aim(&d.blocks, R);
  need(us_cuda_model_create(s->cuda, &s->shape, s->set, R, US_TRAIN_FORWARD, &d.target, &err), &err,
       "target");
  const struct us_param *embed = us_params_find(&s->params, "model.embed_tokens.weight");
  need(us_cuda_draft_create(s->cuda, &shape, set, us_cuda_param_compute(s->set, embed), R, blocks, &d.draft,
                            &err),
       &err, "drafter");
  need(us_cuda_draft_loss_create(s->cuda, &shape, &options, blocks, &d.loss, &err), &err, "loss");
  time_draft(&d, &shape, ms);
  double rows = (double)(d.blocks.n * d.blocks.B), total = ms[0] + ms[1] + ms[2] + ms[3];
  double flops = (double)d.blocks.n * us_draft_train_block_flops(&shape, 128.0) +
                 (double)R * us_draft_train_context_flops(&shape);
  printf("drafter of %s: %zu context rows, %zu blocks of %u: target %.3f ms, forward %.3f, loss %.3f, "
         "backward %.3f; %.0f block "
         "rows/s, drafter's MFU %.1f %%\n",
         s->shape.name, R, d.blocks.n, d.blocks.B, ms[0], ms[1], ms[2], ms[3], rows / total * 1e3,
         100.0 * flops / ((total - ms[0]) * 1e-3) / s->cuda->peak);
  us_cuda_draft_loss_free(d.loss);
  us_cuda_draft_free(d.draft);
  us_cuda_model_free(d.target);
  us_cuda_params_free(set);
  us_draft_blocks_release(&d.blocks);
  us_params_release(&params);
}

int lab_speed(int count, char **arguments) {
  struct us_err err = {0};
  struct speed s = {0};
  const char *name = count > 0 ? arguments[0] : "nano";
  need(us_shape_load(name, &s.shape, &err), &err, name);
  if (count > 1 && atoi(arguments[1]) > 0) s.shape.layers = (uint32_t)atoi(arguments[1]);
  size_t R = count > 2 ? (size_t)atol(arguments[2]) : 32768;
  s.length = count > 3 ? (size_t)atol(arguments[3]) : 2048;
  need(us_cuda_open(0, &s.cuda, &err), &err, "GPU");
  struct us_pool *pool;
  need(us_pool_create(0, &pool, &err), &err, name);
  need(us_params_init_fresh_on(&s.params, &s.shape, pool, 1, 0.0f, &err), &err, name);
  us_pool_free(pool);
  need(us_cuda_params_create(s.cuda, &s.params, (struct us_owned){0, s.params.floats}, &s.set, &err), &err,
       name);
  us_cuda_params_refresh(s.set);
  us_cuda_params_zero_grad(s.set);
  need(us_rows_init(&s.rows, R, &err), &err, name);
  lab_fill_rows(&s.rows, R, s.length, s.shape.vocab, 3);
  for (size_t i = 0; i < R; i++) {
    s.rows.document[i] = (uint32_t)(i / s.length * s.length);
    s.rows.position[i] = (uint32_t)(i % s.length);
  }
  need(us_cuda_loss_create(s.cuda, R, s.shape.hidden, s.shape.vocab, 0, &s.loss, &err), &err, name);
  report(&s, US_TRAIN_RECOMPUTE, "recompute");
  us_cuda_model_free(s.model);
  report(&s, US_TRAIN_SAVE, "save");
  split(&s);
  optimizer(&s);
  us_cuda_model_free(s.model);
  draft_speed(&s);
  us_cuda_loss_free(s.loss);
  us_cuda_params_free(s.set);
  us_params_release(&s.params);
  us_rows_release(&s.rows);
  us_cuda_close(s.cuda);
  return 0;
}
