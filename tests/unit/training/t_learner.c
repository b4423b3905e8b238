/* t_learner.c: recipes divided among processes. The processes are threads with a CPU learner each, whose sums meet at a barrier as
 * NCCL's would: what is tested is the division, the sums, and who decides. */
#include "training/dflash.h"
#include "training/learner_ops.h"
#include "training/pretrain.h"

#include "tiny_shards.h"

#include <pthread.h>

enum { PROCESSES = 3, STEPS = 6 };

static struct tiny_world world;

/* --- processes that are threads --- */

struct meeting {
  pthread_barrier_t barrier;
  double values[64];
  struct us_params *params[PROCESSES];
  const struct us_learner_ops *cpu;
  struct us_learner_ops ops;
};

static struct meeting meeting;

static enum us_status sum(struct us_learner *learner, double *values, size_t n, struct us_err *err) {
  if (learner->rank == 0) memset(meeting.values, 0, sizeof meeting.values);
  for (uint32_t r = 0; r < PROCESSES; r++) {
    pthread_barrier_wait(&meeting.barrier);
    for (size_t i = 0; r == learner->rank && i < n; i++) meeting.values[i] += values[i];
  }
  pthread_barrier_wait(&meeting.barrier);
  memcpy(values, meeting.values, n * sizeof *values);
  pthread_barrier_wait(&meeting.barrier);
  return US_OK;
}

/* Gradients of all, in all, before the CPU's clip; a pending factor was applied by each before. */
static enum us_status clip(struct us_learner_set *set, double limit, double *ret_norm, struct us_err *err) {
  uint32_t rank = set->learner->rank;
  meeting.params[rank] = set->params;
  pthread_barrier_wait(&meeting.barrier);
  for (size_t i = 0; rank == 0 && i < set->params->floats; i++) {
    float total = 0.0f;
    for (int r = 0; r < PROCESSES; r++) total += meeting.params[r]->grad[i];
    for (int r = 0; r < PROCESSES; r++) meeting.params[r]->grad[i] = total;
  }
  pthread_barrier_wait(&meeting.barrier);
  return meeting.cpu->clip(set, limit, ret_norm, err);
}

static void part(struct us_learner *learner) {}

static struct us_learner *open_process(uint32_t rank) {
  struct us_learner *learner = NULL;
  struct us_err err = {0};
  US_OK_OR_FAIL(us_learner_create_cpu(NULL, &learner, &err));
  if (rank == 0) {
    meeting.cpu = learner->ops;
    meeting.ops = *learner->ops;
    meeting.ops.sum = sum, meeting.ops.clip = clip, meeting.ops.part = part;
  }
  learner->ops = &meeting.ops;
  learner->rank = rank;
  learner->ranks = learner->processes = PROCESSES;
  return learner;
}

struct process {
  struct us_learner *learner;
  enum us_status status;
  struct us_err err;
  struct us_pretrain pretrain;
  struct us_dflash dflash;
};

static void run_together(struct process *p, void *(*body)(void *)) {
  pthread_t threads[PROCESSES];
  pthread_barrier_init(&meeting.barrier, NULL, PROCESSES);
  for (uint32_t r = 0; r < PROCESSES; r++) p[r].learner = open_process(r);
  for (uint32_t r = 0; r < PROCESSES; r++)
    ck_assert_int_eq(pthread_create(&threads[r], NULL, body, &p[r]), 0);
  for (uint32_t r = 0; r < PROCESSES; r++) pthread_join(threads[r], NULL);
  for (uint32_t r = 0; r < PROCESSES; r++) us_learner_free(p[r].learner);
  pthread_barrier_destroy(&meeting.barrier);
}

/* Muon turns rounding of near-zero directions into whole ones, so weights are compared by AdamW's small steps. */
static struct us_trainer trainer(void) {
  return (struct us_trainer){.optim = us_optim_default(US_OPTIM_ADAMW),
                             .schedule = {.kind = US_SCHEDULE_COSINE, .peak = 1e-3, .warmup = 0.1},
                             .clip = 1.0,
                             .steps = STEPS};
}

static void same_weights(const struct us_params *a, const struct us_params *b, double bound) {
  for (size_t i = 0; i < a->floats; i++)
    ck_assert_double_eq_tol((double)a->value[i], (double)b->value[i], bound);
}

static void same_bits(const struct us_params *a, const struct us_params *b) {
  ck_assert(memcmp(a->value, b->value, a->floats * sizeof *a->value) == 0);
}

/* --- pretraining --- */

static struct us_pretrain pretrain(void) {
  return (struct us_pretrain){.shape = &world.shape,
                              .shards = world.shards,
                              .batch = 8,
                              .length = 32,
                              .micro = 2,
                              .seed = 3,
                              .balance_rate = 0.01f,
                              .trainer = trainer()};
}

static void *pretrain_body(void *arg) {
  struct process *p = arg;
  p->pretrain = pretrain();
  p->pretrain.learner = p->learner;
  p->status = us_pretrain(&p->pretrain, NULL, &p->err);
  return NULL;
}

/* A rounding of compute weights to bf16 that falls the other way moves what follows by 2^-9: hence the bounds. */
START_TEST(three_processes_pretrain_as_one_does) {
  static struct process p[PROCESSES];
  struct us_err err = {0};
  struct us_pretrain alone = pretrain();
  US_OK_OR_FAIL(us_pretrain(&alone, world.pool, &err));
  run_together(p, pretrain_body);
  for (int r = 0; r < PROCESSES; r++) {
    ck_assert_msg(p[r].status == US_OK, "%s", p[r].err.message);
    ck_assert_double_eq_tol(p[r].pretrain.last.loss, alone.last.loss, 1e-3);
    ck_assert_double_eq_tol(p[r].pretrain.last.heldout, alone.last.heldout, 1e-3);
    ck_assert_double_eq_tol(p[r].pretrain.last.norm, alone.last.norm, 1e-2 * alone.last.norm);
    ck_assert_double_eq_tol(p[r].pretrain.last.imbalance, alone.last.imbalance, 0.05);
    ck_assert_uint_eq(p[r].pretrain.trainer.tokens, alone.trainer.tokens);
    same_bits(&p[r].pretrain.params, &p[0].pretrain.params);
    same_weights(&p[r].pretrain.params, &alone.params, STEPS * 2e-3);
  }
  for (int r = 0; r < PROCESSES; r++) us_pretrain_release(&p[r].pretrain);
  us_pretrain_release(&alone);
}
END_TEST

/* --- interruption --- */

static bool always(void) {
  return true;
}

static void *interrupted_body(void *arg) {
  struct process *p = arg;
  p->pretrain = pretrain();
  p->pretrain.learner = p->learner;
  if (p->learner->rank == 1) p->pretrain.interrupted = always;
  p->status = us_pretrain(&p->pretrain, NULL, &p->err);
  return NULL;
}

START_TEST(an_interruption_of_one_stops_all) {
  static struct process p[PROCESSES];
  run_together(p, interrupted_body);
  for (int r = 0; r < PROCESSES; r++) {
    ck_assert_int_eq(p[r].status, US_INTERRUPTED);
    ck_assert_uint_eq(p[r].pretrain.trainer.step, 0);
    us_pretrain_release(&p[r].pretrain);
  }
}
END_TEST

/* --- a batch that is too small --- */

static void *small_body(void *arg) {
  struct process *p = arg;
  p->pretrain = pretrain();
  p->pretrain.learner = p->learner;
  p->pretrain.batch = PROCESSES - 1;
  p->status = us_pretrain(&p->pretrain, NULL, &p->err);
  return NULL;
}

START_TEST(fewer_sequences_than_ranks_are_refused) {
  static struct process p[PROCESSES];
  run_together(p, small_body);
  for (int r = 0; r < PROCESSES; r++) {
    ck_assert_int_eq(p[r].status, US_ERR_USAGE);
    ck_assert_str_eq(p[r].err.message, "2 sequences a step cannot be divided among 3 GPUs");
    us_pretrain_release(&p[r].pretrain);
  }
}
END_TEST

/* --- distillation --- */

static struct us_dflash dflash(void) {
  struct us_draft_shape shape = {.layers = 1,
                                 .hidden = world.shape.hidden,
                                 .vocab = world.shape.vocab,
                                 .inner = 64,
                                 .attention = {.q_heads = 2,
                                               .kv_heads = 1,
                                               .qk_dim = 16,
                                               .v_dim = 16,
                                               .rotary_dim = 16,
                                               .rope_theta = 1e4,
                                               .window = 16,
                                               .sink = true},
                                 .norm_eps = 1e-5,
                                 .value_scale = 1.0,
                                 .block = 4,
                                 .mask_id = world.shape.vocab - 1,
                                 .target_layers = world.shape.layers,
                                 .taps = 2,
                                 .tap_layer = {0, world.shape.layers - 1}};
  return (struct us_dflash){.target = world.model,
                            .shape = shape,
                            .shards = world.shards,
                            .batch = 7,
                            .length = 32,
                            .anchors = 6,
                            .micro = 2,
                            .seed = 5,
                            .loss = {.kind = US_DRAFT_CE, .weights = US_DRAFT_DPACE, .alpha = 0.5f},
                            .eval_sequences = 4,
                            .trainer = trainer()};
}

static void *dflash_body(void *arg) {
  struct process *p = arg;
  p->dflash = dflash();
  p->dflash.learner = p->learner;
  p->status = us_dflash(&p->dflash, NULL, &p->err);
  return NULL;
}

START_TEST(three_processes_distil_as_one_does) {
  static struct process p[PROCESSES];
  struct us_err err = {0};
  struct us_dflash alone = dflash();
  US_OK_OR_FAIL(us_dflash(&alone, world.pool, &err));
  run_together(p, dflash_body);
  for (int r = 0; r < PROCESSES; r++) {
    ck_assert_msg(p[r].status == US_OK, "%s", p[r].err.message);
    ck_assert_uint_eq(p[r].dflash.last.rows, alone.last.rows);
    ck_assert_uint_eq(p[r].dflash.last.train.blocks, alone.last.train.blocks);
    ck_assert_uint_eq(p[r].dflash.last.heldout.rows[1], alone.last.heldout.rows[1]);
    ck_assert_double_eq_tol(us_draft_tally_loss(&p[r].dflash.last.train),
                            us_draft_tally_loss(&alone.last.train), 2e-3);
    ck_assert_double_eq_tol(us_draft_tally_loss(&p[r].dflash.last.heldout),
                            us_draft_tally_loss(&alone.last.heldout), 2e-3);
    same_bits(&p[r].dflash.params, &p[0].dflash.params);
  }
  for (int r = 0; r < PROCESSES; r++) us_dflash_release(&p[r].dflash);
  us_dflash_release(&alone);
}
END_TEST

/* --- saves that are written meanwhile --- */

/* As of a GPU: training is somewhere else, here nowhere, and the host's arenas stay as they are. */
static enum us_status stay(struct us_learner_set *set, const struct us_optim *optim, double rate,
                           struct us_err *err) {
  return US_OK;
}

static float *bias_elsewhere(struct us_learner_set *set, const struct us_param *p) {
  static float bias[256];
  ck_assert_uint_le(p->rows, sizeof bias / sizeof *bias);
  return bias;
}

static enum us_status keep_bias(struct us_learner_set *set, const struct us_param *p, struct us_err *err) {
  return US_OK;
}

static struct us_learner_ops apart_ops(const struct us_learner_ops *cpu) {
  struct us_learner_ops ops = *cpu;
  ops.update = stay, ops.bias = bias_elsewhere, ops.send_bias = keep_bias;
  return ops;
}

static enum us_status save_apart(const char *state, uint64_t steps, struct us_pretrain *run,
                                 struct us_err *err) {
  struct us_learner *learner = NULL;
  ck_assert_int_eq(us_learner_create_cpu(world.pool, &learner, err), US_OK);
  struct us_learner_ops ops = apart_ops(learner->ops);
  learner->ops = &ops, learner->apart = true;
  *run = pretrain();
  run->learner = learner;
  run->balance_rate = 0.0f;
  run->trainer.steps = steps;
  run->trainer.state_path = state;
  run->trainer.save_every = 1;
  enum us_status status = us_pretrain(run, world.pool, err);
  us_learner_free(learner);
  return status;
}

START_TEST(saves_are_whole_when_a_run_ends) {
  struct us_pretrain run;
  struct us_params params;
  struct us_err err = {0};
  char path[96];
  bool found = false;
  snprintf(path, sizeof path, "%s/apart", world.folder);
  US_OK_OR_FAIL(save_apart(path, 5, &run, &err));
  US_OK_OR_FAIL(us_params_init_fresh(&params, &world.shape, 99, 0.0f, &err));
  struct us_train_state state = {.params = &params};
  US_OK_OR_FAIL(us_train_state_read(path, &state, &found, &err));
  ck_assert(found);
  ck_assert_uint_eq(state.step, 5);
  same_bits(&params, &run.params);
  us_params_release(&params);
  us_pretrain_release(&run);
}
END_TEST

START_TEST(a_save_that_fails_meanwhile_ends_the_run) {
  struct us_pretrain run;
  struct us_err err = {0};
  ck_assert_int_eq(save_apart("/nonexistent/folder/state", 50, &run, &err), US_ERR_IO);
  ck_assert_msg(strstr(err.message, "/nonexistent/folder/state") != NULL, "%s", err.message);
  ck_assert_uint_lt(run.trainer.step, 50);
  us_pretrain_release(&run);
}
END_TEST

/* --- shares --- */

START_TEST(shares_are_the_whole_in_order) {
  for (uint32_t ranks = 1; ranks <= 9; ranks++)
    for (size_t n = 0; n < 40; n++) {
      size_t at = 0;
      for (uint32_t r = 0; r < ranks; r++) {
        struct us_learner learner = {.rank = r, .ranks = ranks};
        size_t begin, end;
        us_learner_share(&learner, 0, n, &begin, &end);
        ck_assert_uint_eq(begin, at);
        ck_assert_uint_le(end - begin, (n + ranks - 1) / ranks);
        at = end;
      }
      ck_assert_uint_eq(at, n);
    }
}
END_TEST

START_TEST(a_pass_holds_what_rows_and_ranks_allow) {
  struct us_learner cpu = {.ranks = 1}, gpus = {.ranks = 4, .busy = 32768};
  ck_assert_uint_eq(us_learner_micro(&cpu, 0, 16384, 512, 100), 32);
  ck_assert_uint_eq(us_learner_micro(&cpu, 0, 16384, 512, 8), 8);     /* the batch */
  ck_assert_uint_eq(us_learner_micro(&cpu, 0, 16384, 20000, 8), 1);   /* one is more than that */
  ck_assert_uint_eq(us_learner_micro(&cpu, 5, 16384, 512, 100), 5);   /* as told */
  ck_assert_uint_eq(us_learner_micro(&gpus, 0, 16384, 512, 400), 64); /* more keeps a GPU busy */
  ck_assert_uint_eq(us_learner_micro(&gpus, 50, 16384, 512, 10), 3);  /* a rank's share */
}
END_TEST

static void open_all(void) {
  open_world(&world);
}

static void close_all(void) {
  close_world(&world);
}

static Suite *make_suite(void) {
  TCase *c = tcase_create("learner");
  tcase_add_unchecked_fixture(c, open_all, close_all);
  tcase_add_test(c, shares_are_the_whole_in_order);
  tcase_add_test(c, a_pass_holds_what_rows_and_ranks_allow);
  tcase_add_test(c, three_processes_pretrain_as_one_does);
  tcase_add_test(c, an_interruption_of_one_stops_all);
  tcase_add_test(c, fewer_sequences_than_ranks_are_refused);
  tcase_add_test(c, three_processes_distil_as_one_does);
  tcase_add_test(c, saves_are_whole_when_a_run_ends);
  tcase_add_test(c, a_save_that_fails_meanwhile_ends_the_run);
  return us_suite("learner", c);
}

US_TEST_MAIN(make_suite)
