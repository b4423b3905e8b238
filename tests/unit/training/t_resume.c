/* t_resume.c: a training run killed at any moment and resumed ends with the bits of one that was left alone. */
#include "kernels/head_loss/head_loss.h"
#include "training/model_train.h"
#include "training/trainer.h"

#include "tiny.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { STEPS = 24 };

static char folder[64];

static void make_folder(void) {
  strcpy(folder, "/tmp/us-resume-XXXXXX");
  ck_assert(mkdtemp(folder) != NULL);
}

static void remove_folder(void) {
  char command[128];
  snprintf(command, sizeof command, "rm -rf %s", folder);
  ck_assert_int_eq(system(command), 0);
}

static void path_of(const char *name, char path[128]) {
  snprintf(path, 128, "%s/%s", folder, name);
}

/* Batches are a function of (seed, step) alone, as the shard sampler's are. */
static void rows_of_step(struct tiny_rows *rows, uint64_t step) {
  tiny_rows_fill(rows);
  for (uint32_t i = 0; i < TINY_ROWS; i++) {
    rows->token[i] = (int32_t)(tiny_mix(step * 1000 + i) % 96);
    rows->label[i] = (int32_t)(tiny_mix(step * 1000 + i + 1) % 96);
  }
}

/* Train to the end; the final masters and moments in `out` (3 * floats), malloc'ed. Returns the steps found at start. */
static uint64_t train(const char *state, bool resume, int threads, uint64_t pause_us, float **out,
                      size_t *ret_floats) {
  struct us_err err = {0};
  struct us_shape shape = tiny_pro();
  struct us_params params;
  struct us_pool *pool = NULL;
  struct us_seq seq;
  struct us_model_train *model = NULL;
  struct tiny_rows rows;
  if (us_params_init_fresh(&params, &shape, 7, 0.05f, &err) != US_OK) _exit(3);
  if (us_pool_create(threads, &pool, &err) != US_OK) _exit(3);
  us_seq_init(&seq, pool, US_SEQ_ROUND_BF16);
  if (us_model_train_create(&shape, &params, &seq, 64, US_TRAIN_SAVE, &model, &err) != US_OK) _exit(3);
  struct us_learner *learner = NULL;
  struct us_learner_set *set = NULL;
  if (us_learner_create_cpu(pool, &learner, &err) != US_OK) _exit(3);
  if (us_learner_place(learner, &params, &set, &err) != US_OK) _exit(3);
  struct us_trainer t = {.set = set,
                         .optim = us_optim_default(US_OPTIM_MUON),
                         .clip = 1.0,
                         .schedule = {.kind = US_SCHEDULE_COSINE, .peak = 1e-2, .warmup = 0.1},
                         .steps = STEPS,
                         .state_path = state,
                         .save_every = 1,
                         .options = "tiny"};
  if (us_trainer_start(&t, resume, &err) != US_OK) {
    fprintf(stderr, "%s\n", err.message);
    _exit(4);
  }
  uint64_t found = t.step;
  while (!us_trainer_done(&t)) {
    rows_of_step(&rows, t.step);
    struct us_batch batch = tiny_batch(&rows);
    if (us_trainer_open_step(&t, &err) != US_OK) _exit(5);
    if (us_model_train_forward(model, &batch, NULL, &err) != US_OK) _exit(5);
    struct us_head_loss loss = {.R = TINY_ROWS,
                                .D = 32,
                                .N = 96,
                                .x = model->hidden,
                                .head = model->head->compute,
                                .label = rows.label,
                                .scale = 1.0f / TINY_ROWS,
                                .dx = model->dhidden,
                                .dhead = us_param_grad(model->head)};
    us_head_loss(&seq, &loss);
    if (us_model_train_backward(model, &err) != US_OK) _exit(5);
    us_model_train_balance(model, 1e-2f);
    if (us_trainer_close_step(&t, loss.total, TINY_ROWS, &err) != US_OK) _exit(5);
    if (pause_us) nanosleep(&(struct timespec){.tv_nsec = (long)pause_us * 1000}, NULL);
  }
  if (us_trainer_finish(&t, &err) != US_OK) _exit(5);
  if (out) {
    *out = malloc(3 * params.floats * sizeof **out);
    memcpy(*out, params.value, params.floats * sizeof **out);
    memcpy(*out + params.floats, params.moment1, params.floats * sizeof **out);
    memcpy(*out + 2 * params.floats, params.moment2, params.floats * sizeof **out);
    *ret_floats = params.floats;
  }
  us_model_train_free(model);
  us_learner_remove(set);
  us_learner_free(learner);
  us_seq_release(&seq);
  us_pool_free(pool);
  us_params_release(&params);
  return found;
}

/* Run in a child that is killed after `life_us`; true if it ended by itself. */
static bool run_and_kill(const char *state, uint64_t life_us, int threads) {
  pid_t child = fork();
  if (child == 0) {
    train(state, true, threads, 3000, NULL, NULL);
    _exit(0);
  }
  ck_assert_int_gt(child, 0);
  int how = 0;
  for (uint64_t waited = 0; waited < life_us; waited += 500) {
    if (waitpid(child, &how, WNOHANG) == child) {
      ck_assert_msg(WIFEXITED(how) && WEXITSTATUS(how) == 0, "the run failed with %d", WEXITSTATUS(how));
      return true;
    }
    nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
  }
  kill(child, SIGKILL);
  ck_assert_int_eq(waitpid(child, &how, 0), child);
  ck_assert_msg(WIFSIGNALED(how) || WEXITSTATUS(how) == 0, "the run failed with %d", WEXITSTATUS(how));
  return !WIFSIGNALED(how);
}

START_TEST(killed_at_random_moments_it_ends_with_the_same_bits) {
  float *alone = NULL, *resumed = NULL;
  size_t floats = 0;
  char state[128];
  int kills = 0;
  train(NULL, false, 1, 0, &alone, &floats);
  make_folder();
  path_of("run.state", state);
  uint64_t random = us_test_seed();
  for (int round = 0; round < 400; round++) {
    random = tiny_mix(random);
    /* A whole run pauses for 72 ms alone, so the first lives are too short; slow machines get longer ones. */
    uint64_t life = (5000 + random % 25000) * (1 + (uint64_t)round / 8);
    if (run_and_kill(state, life, 1 + round % 3)) break;
    kills++;
  }
  uint64_t found = train(state, true, 2, 0, &resumed, &floats); /* nothing is left to do */
  ck_assert_uint_eq(found, STEPS);
  ck_assert_msg(kills >= 2, "only %d kills: the test says nothing", kills);
  ck_assert(memcmp(alone, resumed, 3 * floats * sizeof *alone) == 0);
  remove_folder();
  free(alone);
  free(resumed);
}
END_TEST

struct fixture {
  struct us_shape shape;
  struct us_params params;
  struct us_train_state state;
  char path[128];
};

static void open_fixture(struct fixture *f) {
  make_folder();
  *f = (struct fixture){.shape = tiny_pro()};
  ck_assert_int_eq(us_params_init_fresh(&f->params, &f->shape, 1, 0.1f, NULL), US_OK);
  path_of("s", f->path);
  f->state = (struct us_train_state){
      .params = &f->params, .options = "a=1", .step = 5, .tokens = 50, .seconds = 1.5};
}

static void close_fixture(struct fixture *f) {
  us_params_release(&f->params);
  remove_folder();
}

START_TEST(the_newer_of_two_files_is_read_and_the_older_is_written) {
  struct fixture f;
  bool found = true;
  open_fixture(&f);
  ck_assert_int_eq(us_train_state_read(f.path, &f.state, &found, NULL), US_OK);
  ck_assert(!found);
  for (uint64_t step = 5; step < 9; step++) {
    f.state.step = step;
    f.params.value[0] = (float)step;
    ck_assert_int_eq(us_train_state_write(f.path, &f.state, NULL), US_OK);
    f.params.value[0] = -1.0f;
    struct us_train_state back = {.params = &f.params, .options = "a=1"};
    ck_assert_int_eq(us_train_state_read(f.path, &back, &found, NULL), US_OK);
    ck_assert(found && back.step == step && back.tokens == 50 && f.params.value[0] == (float)step);
    ck_assert_int_eq(back.slot, f.state.slot);
  }
  close_fixture(&f);
}
END_TEST

START_TEST(a_broken_newer_file_leaves_the_older_one) {
  struct fixture f;
  struct us_err err = {0};
  bool found = false;
  char name[160];
  open_fixture(&f);
  for (f.state.step = 5; f.state.step < 7; f.state.step++)
    ck_assert_int_eq(us_train_state_write(f.path, &f.state, &err), US_OK);
  snprintf(name, sizeof name, "%s.1", f.path); /* step 6 */
  ck_assert_int_eq(truncate(name, 1000), 0);
  ck_assert_int_eq(us_train_state_read(f.path, &f.state, &found, &err), US_OK);
  ck_assert(found && f.state.step == 5 && f.state.slot == 1);
  snprintf(name, sizeof name, "%s.0", f.path);
  ck_assert_int_eq(truncate(name, 1000), 0);
  ck_assert_int_eq(us_train_state_read(f.path, &f.state, &found, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, f.path) != NULL, "%s", err.message);
  close_fixture(&f);
}
END_TEST

START_TEST(other_options_or_tensors_are_refused_and_named) {
  struct fixture f;
  struct us_err err = {0};
  bool found = false;
  open_fixture(&f);
  ck_assert_int_eq(us_train_state_write(f.path, &f.state, &err), US_OK);
  f.state.options = "a=2";
  ck_assert_int_eq(us_train_state_read(f.path, &f.state, &found, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "a=1") && strstr(err.message, "a=2"), "%s", err.message);
  f.state.options = "a=1";
  f.params.items[2].rows++;
  ck_assert_int_eq(us_train_state_read(f.path, &f.state, &found, &err), US_ERR_INPUT);
  f.params.items[2].rows--;
  struct us_learner *learner = NULL;
  struct us_learner_set *set = NULL;
  ck_assert_int_eq(us_learner_create_cpu(NULL, &learner, &err), US_OK);
  ck_assert_int_eq(us_learner_place(learner, &f.params, &set, &err), US_OK);
  struct us_trainer t = {.set = set, .steps = 10, .state_path = f.path, .options = "a=1"};
  ck_assert_int_eq(us_trainer_start(&t, false, &err), US_ERR_USAGE); /* it would be overwritten */
  ck_assert_int_eq(us_trainer_start(&t, true, &err), US_OK);
  ck_assert_uint_eq(t.step, 5);
  us_learner_remove(set);
  us_learner_free(learner);
  close_fixture(&f);
}
END_TEST

START_TEST(a_failed_write_keeps_the_last_state) {
  struct fixture f;
  struct us_err err = {0};
  bool found = false;
  open_fixture(&f);
  ck_assert_int_eq(us_train_state_write(f.path, &f.state, &err), US_OK);
  char name[160];
  snprintf(name, sizeof name, "%s.1", f.path);
  ck_assert_int_eq(mkdir(name, 0700), 0); /* cannot be replaced by a file */
  f.state.step = 6;
  ck_assert_int_ne(us_train_state_write(f.path, &f.state, &err), US_OK);
  ck_assert_int_eq(f.state.slot, 1);
  ck_assert_int_eq(rmdir(name), 0);
  ck_assert_int_eq(us_train_state_read(f.path, &f.state, &found, &err), US_OK);
  ck_assert(found && f.state.step == 5);
  close_fixture(&f);
}
END_TEST

START_TEST(weights_that_are_no_numbers_are_not_saved) {
  struct fixture f;
  struct us_err err = {0};
  bool found = false;
  open_fixture(&f);
  ck_assert_int_eq(us_train_state_write(f.path, &f.state, &err), US_OK);
  f.state.step = 6;
  f.params.items[3].value[1] = INFINITY;
  ck_assert_int_eq(us_train_state_write(f.path, &f.state, &err), US_ERR_CHECK);
  ck_assert_msg(strstr(err.message, "step 6") && strstr(err.message, f.params.items[3].name), "%s",
                err.message);
  ck_assert_int_eq(us_train_state_read(f.path, &f.state, &found, &err), US_OK);
  ck_assert(found && f.state.step == 5);
  close_fixture(&f);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("resume");
  tcase_add_test(c, killed_at_random_moments_it_ends_with_the_same_bits);
  tcase_add_test(c, the_newer_of_two_files_is_read_and_the_older_is_written);
  tcase_add_test(c, a_broken_newer_file_leaves_the_older_one);
  tcase_add_test(c, other_options_or_tensors_are_refused_and_named);
  tcase_add_test(c, a_failed_write_keeps_the_last_state);
  tcase_add_test(c, weights_that_are_no_numbers_are_not_saved);
  return us_suite("resume", c);
}

US_TEST_MAIN(make_suite)
