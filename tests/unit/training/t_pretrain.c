/* t_pretrain.c: what options of pretraining do to a model; that it learns, and alike everywhere, is t_model_train.c's and t_learner.c's. */
#include "training/model_train_state.h"
#include "training/pretrain.h"
#include "training/rows.h"

#include "tiny_shards.h"

static struct tiny_world world;

static void open_all(void) {
  open_world(&world);
}

static void close_all(void) {
  close_world(&world);
}

static struct us_pretrain new_run(void) {
  return (struct us_pretrain){
      .shape = &world.shape,
      .shards = world.shards,
      .batch = 8,
      .length = 32,
      .seed = 3,
      .balance_rate = 0.01f,
      .trainer = {.optim = us_optim_default(US_OPTIM_ADAMW),
                  .schedule = {.kind = US_SCHEDULE_COSINE, .peak = 1e-2, .warmup = 0.1},
                  .clip = 1.0,
                  .steps = 30}};
}

/* Of all experts of the MoE layers, on a held-out window. */
static double mean_score(struct us_params *params) {
  struct us_err err = {0};
  struct us_seq seq;
  struct us_model_train *train;
  struct us_rows rows;
  struct us_window window;
  us_seq_init(&seq, world.pool, US_SEQ_ROUND_BF16);
  US_OK_OR_FAIL(us_window_init(&window, 33, &err));
  US_OK_OR_FAIL(us_rows_init(&rows, 32, &err));
  us_shards_heldout(world.shards, 0, &window);
  us_rows_add(&rows, &window, false);
  struct us_batch batch = us_rows_batch(&rows);
  US_OK_OR_FAIL(us_params_refresh(params, world.pool, US_SEQ_ROUND_BF16, &err));
  US_OK_OR_FAIL(us_model_train_create(&world.shape, params, &seq, 32, US_TRAIN_FORWARD, &train, &err));
  US_OK_OR_FAIL(us_model_train_forward(train, &batch, NULL, &err));
  double sum = 0.0, count = 0.0;
  for (uint32_t l = 0; l < world.shape.layers; l++)
    for (size_t i = 0; world.shape.moe_layer[l] && i < batch.R * world.shape.experts; i++, count++)
      sum += (double)train->state->saved[l].scores[i];
  us_model_train_free(train);
  us_rows_release(&rows);
  us_window_release(&window);
  us_seq_release(&seq);
  return sum / count;
}

START_TEST(score_decay_makes_routing_scores_small_and_costs_no_loss) {
  struct us_err err = {0};
  double score[2], heldout[2];
  for (int i = 0; i < 2; i++) {
    struct us_pretrain run = new_run();
    run.score_decay = i ? 0.02f : 0.0f, run.score_target = 0.05f;
    US_OK_OR_FAIL(us_pretrain(&run, world.pool, &err));
    heldout[i] = run.last.heldout, score[i] = mean_score(&run.params);
    us_pretrain_release(&run);
  }
  ck_assert_msg(score[0] > 0.3 && score[1] < 0.5 * score[0] && score[1] > 0.02, "%g became %g", score[0],
                score[1]);
  ck_assert_msg(heldout[1] < heldout[0] + 0.05, "held out %g became %g", heldout[0], heldout[1]);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("pretrain");
  tcase_add_unchecked_fixture(c, open_all, close_all);
  tcase_add_test(c, score_decay_makes_routing_scores_small_and_costs_no_loss);
  return us_suite("pretrain", c);
}

US_TEST_MAIN(make_suite)
