/* t_pretrain.c: what options of pretraining do to a model; that it learns, and alike everywhere, is t_model_train.c's and t_learner.c's. */
#include "training/model_train_state.h"
#include "training/pretrain.h"
#include "training/rows.h"

#include <math.h>

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

/* Means over rows and MoE layers. */
struct routing {
  double score;    /* of all experts */
  double distance; /* logits, about, between the last expert that is chosen and the first that is not */
};

static void add_row(struct routing *sum, const struct us_model_train *train, uint32_t l, size_t r) {
  uint32_t E = world.shape.experts, K = world.shape.top_k;
  const float *score = train->state->saved[l].scores + r * E;
  const float *bias = train->state->roles[l].router_bias->compute;
  const uint32_t *id = train->state->id[l] + r * K;
  float least = INFINITY, most = -INFINITY, slope = 1.0f;
  for (uint32_t e = 0, k = 0; e < E; e++) {
    float own = score[e] + bias[e];
    bool chosen = k < K && id[k] == e;
    k += chosen;
    sum->score += (double)score[e] / E;
    if (chosen && own < least) least = own, slope = score[e] * (1.0f - score[e]);
    if (!chosen && own > most) most = own;
  }
  sum->distance += (double)((least - most) / slope);
}

/* On a held-out window. */
static struct routing routing_of(struct us_params *params) {
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
  struct routing sum = {0};
  double count = 0.0;
  for (uint32_t l = 0; l < world.shape.layers; l++)
    for (size_t r = 0; world.shape.moe_layer[l] && r < batch.R; r++, count++) add_row(&sum, train, l, r);
  us_model_train_free(train);
  us_rows_release(&rows);
  us_window_release(&window);
  us_seq_release(&seq);
  return (struct routing){sum.score / count, sum.distance / count};
}

/* Nats a held-out token of what the run gives. */
static double train(struct us_pretrain *run, struct routing *ret_routing) {
  struct us_err err = {0};
  US_OK_OR_FAIL(us_pretrain(run, world.pool, &err));
  *ret_routing = routing_of(&run->params);
  us_pretrain_release(run);
  return run->last.heldout;
}

START_TEST(score_decay_makes_routing_scores_small_and_costs_no_loss) {
  struct us_pretrain plain = new_run(), run = new_run();
  struct routing from, to;
  run.score_decay = 0.02f, run.score_target = 0.05f;
  double before = train(&plain, &from), after = train(&run, &to);
  ck_assert_msg(from.score > 0.3 && to.score < 0.5 * from.score && to.score > 0.02, "%g became %g",
                from.score, to.score);
  ck_assert_msg(after < before + 0.05, "held out %g became %g", before, after);
}
END_TEST

START_TEST(a_margin_parts_the_chosen_experts_from_the_others_and_costs_no_loss) {
  struct us_pretrain plain = new_run(), run = new_run();
  struct routing from, to;
  run.margin = 1.0f, run.margin_weight = 0.05f;
  double before = train(&plain, &from), after = train(&run, &to);
  ck_assert_msg(to.distance > 1.5 * from.distance, "%g became %g", from.distance, to.distance);
  ck_assert_msg(after < before + 0.05, "held out %g became %g", before, after);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("pretrain");
  tcase_add_unchecked_fixture(c, open_all, close_all);
  tcase_add_test(c, score_decay_makes_routing_scores_small_and_costs_no_loss);
  tcase_add_test(c, a_margin_parts_the_chosen_experts_from_the_others_and_costs_no_loss);
  return us_suite("pretrain", c);
}

US_TEST_MAIN(make_suite)
