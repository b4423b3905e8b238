/* t_dflash.c: anchors, labels and weights of blocks against hand values; the recipe as a whole. */
#include "tiny_shards.h"
#include "model/precision.h"
#include "training/dflash.h"

#include <math.h>

enum { B = 4, LENGTH = 24 };

static struct us_draft_shape draft_shape(void) {
  return (struct us_draft_shape){.layers = 1,
                                 .hidden = 32,
                                 .vocab = 288,
                                 .inner = 32,
                                 .attention = {.q_heads = 2,
                                               .kv_heads = 1,
                                               .qk_dim = 16,
                                               .v_dim = 16,
                                               .rotary_dim = 16,
                                               .rope_theta = 1e4,
                                               .window = 6,
                                               .sink = true},
                                 .norm_eps = 1e-5,
                                 .value_scale = 1.0,
                                 .block = B,
                                 .mask_id = 287,
                                 .taps = 2,
                                 .tap_layer = {0, 2},
                                 .target_layers = 3};
}

/* --- anchors and labels --- */

/* 13 tokens 100 .. 112: a document of 6 and one of 7, whose tokens 8 and 9 do not count. */
static void open_rows(struct us_rows *rows, struct us_draft_blocks *blocks, size_t capacity) {
  struct us_err err = {0};
  struct us_draft_shape shape = draft_shape();
  struct us_window window;
  ck_assert_int_eq(us_window_init(&window, 13, &err), US_OK);
  window.n = 13;
  for (int i = 0; i < 13; i++) {
    window.ids[i] = 100 + i;
    window.document[i] = i >= 6;
    window.loss[i] = i != 8 && i != 9;
  }
  ck_assert_int_eq(us_rows_init(rows, 12, &err), US_OK);
  ck_assert_uint_eq(us_rows_add(rows, &window, true), 12);
  us_draft_cut_labels(rows, 0, &window);
  ck_assert_int_eq(us_draft_blocks_init(blocks, &shape, capacity, &err), US_OK);
  us_window_release(&window);
}

static void close_rows(struct us_rows *rows, struct us_draft_blocks *blocks) {
  us_draft_blocks_release(blocks);
  us_rows_release(rows);
}

START_TEST(anchors_count_themselves_and_have_a_label_and_a_context) {
  struct us_rows rows;
  struct us_draft_blocks blocks;
  open_rows(&rows, &blocks, 12);
  /* 0 and 6 begin documents; 5's next token is another document's; 7's next does not count; 8 and 9 do not count. */
  for (size_t r = 0; r < 12; r++)
    ck_assert_msg(us_draft_can_anchor(&rows, r, 12) == (strchr("\1\2\3\4\12\13", (int)r) != NULL && r > 0),
                  "row %zu", r);
  ck_assert(!us_draft_can_anchor(&rows, 4, 4)); /* outside the sequence */
  close_rows(&rows, &blocks);
}
END_TEST

START_TEST(labels_are_unshifted_and_end_with_document_and_sequence) {
  struct us_rows rows;
  struct us_draft_blocks blocks;
  open_rows(&rows, &blocks, 12);
  ck_assert_uint_eq(us_draft_blocks_add(&blocks, &rows, 0, 12, 100, 1, 0, 0), 6);
  static const uint32_t anchor[6] = {1, 2, 3, 4, 10, 11}, labels[6] = {3, 3, 2, 1, 2, 1};
  us_draft_blocks_aim(&blocks, 12);
  for (uint32_t b = 0; b < 6; b++) {
    ck_assert_uint_eq(blocks.anchor[b], anchor[b]);
    ck_assert_uint_eq(blocks.labels[b], labels[b]);
    uint32_t start = anchor[b] < 6 ? 0 : 6;
    for (uint32_t j = 0; j < B; j++) {
      size_t row = b * B + j;
      ck_assert_int_eq(blocks.token[row], j ? -1 : 100 + (int32_t)anchor[b]);
      ck_assert_int_eq(blocks.label[row], j && j <= labels[b] ? 100 + (int32_t)(anchor[b] + j) : -1);
      ck_assert_uint_eq(blocks.position[row], anchor[b] - start + j);
      uint32_t begin = anchor[b] + j + 1 > start + 6 ? anchor[b] + j - 5 : start;
      ck_assert_uint_eq(blocks.range[0][row], begin);
      ck_assert_uint_eq(blocks.range[1][row], anchor[b]); /* strictly before the anchor */
      ck_assert_uint_eq(blocks.range[2][row], 12 + b * B);
      ck_assert_uint_eq(blocks.range[3][row], 12 + b * B + B);
    }
  }
  close_rows(&rows, &blocks);
}
END_TEST

START_TEST(a_second_answer_inside_a_block_is_not_predicted) {
  struct us_rows rows;
  struct us_draft_blocks blocks;
  open_rows(&rows, &blocks, 12);
  rows.weight[3] = 0.0f; /* token 4 does not count, token 5 does */
  us_draft_blocks_put(&blocks, &rows, 2, 12);
  ck_assert_uint_eq(blocks.labels[0], 1);
  ck_assert_int_eq(blocks.label[2], -1);
  ck_assert_int_eq(blocks.label[3], -1);
  close_rows(&rows, &blocks);
}
END_TEST

/* 60 rows of one document: 58 anchors are possible. */
static void open_long(struct us_rows *rows, struct us_draft_blocks *blocks) {
  struct us_err err = {0};
  struct us_draft_shape shape = draft_shape();
  ck_assert_int_eq(us_rows_init(rows, 60, &err), US_OK);
  rows->R = 60;
  for (uint32_t r = 0; r < 60; r++) rows->position[r] = r, rows->weight[r] = 1.0f;
  ck_assert_int_eq(us_draft_blocks_init(blocks, &shape, 64, &err), US_OK);
}

START_TEST(anchors_are_distinct_in_order_and_new_every_step) {
  struct us_rows rows;
  struct us_draft_blocks blocks;
  uint32_t first[20], counts[60] = {0};
  open_long(&rows, &blocks);
  for (uint64_t step = 0; step < 2000; step++) {
    blocks.n = 0;
    ck_assert_uint_eq(us_draft_blocks_add(&blocks, &rows, 0, 60, 20, 9, step, 3), 20);
    for (size_t i = 0; i < 20; i++) {
      ck_assert(i == 0 || blocks.anchor[i] > blocks.anchor[i - 1]);
      counts[blocks.anchor[i]]++;
    }
    if (step == 0) memcpy(first, blocks.anchor, sizeof first);
    if (step == 1) ck_assert(memcmp(first, blocks.anchor, sizeof first) != 0);
  }
  blocks.n = 0;
  us_draft_blocks_add(&blocks, &rows, 0, 60, 20, 9, 0, 3);
  ck_assert(memcmp(first, blocks.anchor, sizeof first) == 0);
  ck_assert_uint_eq(counts[0], 0);
  /* Uniform: 2000 * 20 / 59 = 678 each, deviation sqrt(2000 p (1 - p)) = 21; five deviations. */
  for (int r = 1; r < 60; r++) ck_assert_msg(abs((int)counts[r] - 678) < 105, "row %d: %u", r, counts[r]);
  close_rows(&rows, &blocks);
}
END_TEST

START_TEST(more_anchors_than_rows_are_all_rows) {
  struct us_rows rows;
  struct us_draft_blocks blocks;
  open_long(&rows, &blocks);
  ck_assert_uint_eq(us_draft_blocks_add(&blocks, &rows, 0, 60, 512, 9, 0, 0), 59);
  for (uint32_t i = 0; i < 59; i++) ck_assert_uint_eq(blocks.anchor[i], i + 1);
  ck_assert_uint_eq(us_draft_blocks_add(&blocks, &rows, 0, 60, 512, 9, 0, 1), 5); /* room for 64 */
  close_rows(&rows, &blocks);
}
END_TEST

/* --- weights --- */

START_TEST(slot_weights_are_those_of_the_formulas) {
  struct us_draft_loss loss = {.weights = US_DRAFT_EXP, .gamma = 4.0f, .alpha = 0.5f};
  const float logprob[3] = {logf(0.8f), logf(0.5f), logf(0.1f)};
  float w[3];
  us_draft_slot_weights(&loss, logprob, 3, w);
  ck_assert_double_eq_tol((double)w[0], 1.0, 1e-7);
  ck_assert_double_eq_tol((double)w[1], 0.7788007830714049, 1e-7);
  ck_assert_double_eq_tol((double)w[2], 0.6065306597126334, 1e-7);
  /* Smoothed 0.9, 0.75, 0.55: prefix products 0.9, 0.675, 0.37125; their sums from the end. */
  loss.weights = US_DRAFT_DPACE;
  us_draft_slot_weights(&loss, logprob, 3, w);
  ck_assert_double_eq_tol((double)w[0], 1.94625, 1e-6);
  ck_assert_double_eq_tol((double)w[1], 1.04625, 1e-6);
  ck_assert_double_eq_tol((double)w[2], 0.37125, 1e-6);
  us_draft_slot_weights(&loss, logprob, 1,
                        w); /* a block that ends early: what cannot be accepted does not count */
  ck_assert_double_eq_tol((double)w[0], 0.9, 1e-6);
  loss.weights = US_DRAFT_UNIFORM;
  us_draft_slot_weights(&loss, logprob, 3, w);
  ck_assert(w[0] == 1.0f && w[1] == 1.0f && w[2] == 1.0f);
}
END_TEST

/* Two whole blocks and one of two labels over a vocabulary of 3 and D = 3, head = identity: the logits are the rows. */
START_TEST(tallies_count_hits_until_the_first_miss) {
  struct us_err err = {0};
  struct us_draft_shape shape = draft_shape();
  struct us_draft_blocks blocks;
  struct us_draft_loss loss = {.kind = US_DRAFT_CE, .weights = US_DRAFT_EXP, .gamma = 2.0f};
  struct us_seq seq;
  static const float head[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
  static const int32_t label[3][B] = {{-1, 0, 1, 2}, {-1, 2, 2, 2}, {-1, 1, 0, -1}};
  static const int says[3][B] = {{2, 0, 1, 0}, {2, 0, 2, 2}, {1, 1, 0, 2}};
  float hidden[3 * B * 3] = {0}, dhidden[3 * B * 3];
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  ck_assert_int_eq(us_draft_blocks_init(&blocks, &shape, 3, &err), US_OK);
  ck_assert_int_eq(us_draft_loss_init(&loss, 3, B, 3, &err), US_OK);
  blocks.n = 3;
  for (int b = 0; b < 3; b++) {
    blocks.labels[b] = b < 2 ? 3 : 2;
    memcpy(blocks.label + b * B, label[b], sizeof label[b]);
    for (int j = 0; j < B; j++) hidden[(b * B + j) * 3 + says[b][j]] = 2.0f;
  }
  us_draft_loss(&seq, &loss, &blocks, hidden, head, 3, 3, NULL, NULL, dhidden);
  ck_assert_uint_eq(loss.sum.blocks, 2);
  ck_assert_uint_eq(loss.sum.accepted, 2); /* two of the first block, none of the second */
  ck_assert_double_eq_tol(us_draft_tally_length(&loss.sum), 2.0, 1e-12);
  ck_assert_double_eq_tol(us_draft_tally_accuracy(&loss.sum, 1), 2.0 / 3.0, 1e-12);
  ck_assert_double_eq_tol(us_draft_tally_accuracy(&loss.sum, 3), 0.5, 1e-12);
  double hit = log(exp(2.0) + 2.0) - 2.0, miss = log(exp(2.0) + 2.0), w[3] = {1.0, exp(-0.5), exp(-1.0)};
  double total = w[0] * (2 * hit + miss) + w[1] * 3 * hit + w[2] * (hit + miss);
  ck_assert_double_eq_tol(loss.sum.loss, total, 1e-5);
  ck_assert_double_eq_tol(loss.sum.weight, 3 * w[0] + 3 * w[1] + 2 * w[2], 1e-6);
  double p = exp(2.0) / (exp(2.0) + 2.0); /* of the largest; slot 2 of block 0 is a hit */
  ck_assert_double_eq_tol((double)dhidden[2 * 3 + 1], w[1] * (p - 1.0), 1e-6);
  for (int b = 0; b < 3; b++)
    for (int i = 0; i < 3; i++) ck_assert(dhidden[b * B * 3 + i] == 0.0f); /* slot 0 */
  for (int i = 0; i < 3; i++) ck_assert(dhidden[(2 * B + 3) * 3 + i] == 0.0f);
  us_draft_loss_release(&loss);
  us_draft_blocks_release(&blocks);
  us_seq_release(&seq);
}
END_TEST

/* --- the recipe --- */

static struct tiny_world world;

static struct us_dflash recipe(uint64_t steps) {
  return (struct us_dflash){.target = world.model,
                            .shape = draft_shape(),
                            .shards = world.shards,
                            .batch = 3,
                            .length = LENGTH,
                            .anchors = 10,
                            .micro = 2,
                            .seed = 4,
                            .loss = {.kind = US_DRAFT_CE, .weights = US_DRAFT_DPACE, .alpha = 0.5f},
                            .eval_sequences = 2,
                            .trainer = {.optim = us_optim_default(US_OPTIM_MUON),
                                        .schedule = {.kind = US_SCHEDULE_CONSTANT, .peak = 5e-3},
                                        .clip = 1.0,
                                        .steps = steps,
                                        .options = "same"}};
}

static void train(struct us_dflash *run, int threads) {
  struct us_err err = {0};
  struct us_pool *pool;
  ck_assert_int_eq(us_pool_create(threads, &pool, &err), US_OK);
  ck_assert_msg(us_dflash(run, pool, &err) == US_OK, "%s", err.message);
  us_pool_free(pool);
}

static void ck_same(const struct us_params *a, const struct us_params *b) {
  ck_assert(memcmp(a->value, b->value, a->floats * sizeof *a->value) == 0);
}

static void keep_first_loss(void *arg, const struct us_dflash_log *log) {
  double *first = arg;
  if (log->step == 1) *first = us_draft_tally_loss(&log->train);
}

START_TEST(the_loss_falls_and_the_target_stays) {
  struct us_dflash run = recipe(60);
  double first = 0.0;
  run.log_every = 1, run.on_log = keep_first_loss, run.log_arg = &first;
  train(&run, 2);
  double last = us_draft_tally_loss(&run.last.train);
  ck_assert_msg(first > 5.0 && last < first - 1.5, "%g to %g", first, last);
  ck_assert_uint_gt(run.last.heldout.blocks, 0);
  us_dflash_release(&run);
}
END_TEST

START_TEST(a_run_does_not_depend_on_threads_and_kl_learns_too) {
  for (int kind = 0; kind < 2; kind++) {
    struct us_dflash one = recipe(3), three = recipe(3);
    one.loss.kind = three.loss.kind = kind ? US_DRAFT_KL : US_DRAFT_CE;
    train(&one, 1);
    train(&three, 3);
    ck_same(&one.params, &three.params);
    us_dflash_release(&one);
    us_dflash_release(&three);
  }
}
END_TEST

START_TEST(passes_of_any_size_take_the_same_step) {
  struct us_dflash one = recipe(2), all = recipe(2);
  one.micro = 1, all.micro = 3;
  train(&one, 2);
  train(&all, 2);
  double largest = 0.0;
  for (size_t i = 0; i < one.params.floats; i++)
    largest = fmax(largest, fabs((double)one.params.value[i] - (double)all.params.value[i]));
  ck_assert_msg(largest < 2e-3, "%g", largest); /* sums in another order; two updates of 5e-3 */
  us_dflash_release(&one);
  us_dflash_release(&all);
}
END_TEST

static uint64_t stop_at;
static struct us_dflash *running;
static bool interrupt(void) {
  return running->trainer.step >= stop_at;
}

START_TEST(an_interrupted_run_ends_with_the_bits_of_one_left_alone) {
  struct us_err err = {0};
  char state[96];
  snprintf(state, sizeof state, "%s/run.state", world.folder);
  struct us_dflash alone = recipe(6), cut = recipe(6), rest = recipe(6);
  train(&alone, 2);
  cut.trainer.state_path = rest.trainer.state_path = state;
  cut.interrupted = interrupt;
  running = &cut, stop_at = 3;
  ck_assert_int_eq(us_dflash(&cut, world.pool, &err), US_INTERRUPTED);
  rest.resume = true;
  train(&rest, 1);
  ck_assert_uint_eq(rest.trainer.step, 6);
  ck_same(&alone.params, &rest.params);
  us_dflash_release(&alone);
  us_dflash_release(&cut);
  us_dflash_release(&rest);
}
END_TEST

START_TEST(a_drafter_goes_on_from_where_it_was) {
  struct us_err err = {0};
  struct us_dflash run = recipe(20), more = recipe(1);
  struct us_draft *draft;
  train(&run, 2);
  ck_assert_int_eq(us_draft_create(&run.shape, &draft, &err), US_OK);
  ck_assert_msg(us_params_export_draft(&run.params, draft, &err) == US_OK, "%s", err.message);
  more.init = draft;
  more.trainer.schedule.peak = 1e-9;
  train(&more, 2);
  double before = us_draft_tally_loss(&run.last.heldout), after = us_draft_tally_loss(&more.last.heldout);
  ck_assert_double_eq_tol(before, after, 1e-2);
  us_draft_free(draft);
  us_dflash_release(&run);
  us_dflash_release(&more);
}
END_TEST

static const float *decoded_head(const struct us_draft *draft, float *values) {
  us_matrix_decode(&draft->head, values);
  return values;
}

START_TEST(a_head_of_its_own_is_the_targets_rounded_and_is_not_trained) {
  static float target[288 * 32], got[288 * 32];
  struct us_matrix_encoding encoding = {.format = US_FORMAT_MXFP4, .scale_rule = US_SCALE_MSE};
  struct us_err err = {0};
  struct us_dflash shared = recipe(4), run = recipe(4), on = recipe(2);
  struct us_draft *draft;
  run.shape.head = US_FORMAT_MXFP4, run.head = &encoding;
  train(&shared, 2), train(&run, 2);
  /* The same blocks, through another head. */
  ck_assert(us_draft_tally_loss(&run.last.train) != us_draft_tally_loss(&shared.last.train));
  ck_assert_double_eq_tol(us_draft_tally_loss(&run.last.train), us_draft_tally_loss(&shared.last.train), 0.3);
  ck_assert_int_eq(us_draft_create(&run.shape, &draft, &err), US_OK);
  ck_assert_msg(us_params_export_draft(&run.params, draft, &err) == US_OK, "%s", err.message);
  us_matrix_decode(&world.model->head, target);
  ck_assert_int_eq(us_matrix_fake_quant(target, 288, 32, &encoding, target, &err), US_OK);
  ck_assert_mem_eq(decoded_head(draft, got), target, sizeof target);
  on.init = draft, on.shape = draft->shape; /* and stays when it goes on */
  train(&on, 1);
  struct us_draft *later;
  ck_assert_int_eq(us_draft_create(&on.shape, &later, &err), US_OK);
  ck_assert_msg(us_params_export_draft(&on.params, later, &err) == US_OK, "%s", err.message);
  ck_assert_mem_eq(decoded_head(later, got), target, sizeof target);
  us_draft_free(draft), us_draft_free(later);
  us_dflash_release(&shared), us_dflash_release(&run), us_dflash_release(&on);
}
END_TEST

START_TEST(a_drafter_goes_on_with_a_head_or_without) {
  struct us_matrix_encoding encoding = {.format = US_FORMAT_BF16};
  struct us_err err = {0};
  struct us_dflash run = recipe(10), with = recipe(2), back = recipe(2), plain = recipe(2);
  struct us_draft *draft, *headed;
  train(&run, 2);
  ck_assert_int_eq(us_draft_create(&run.shape, &draft, &err), US_OK);
  ck_assert_msg(us_params_export_draft(&run.params, draft, &err) == US_OK, "%s", err.message);
  with.init = plain.init = draft, with.shape.head = US_FORMAT_BF16, with.head = &encoding;
  train(&with, 2), train(&plain, 2);
  /* The target's head in bf16 is what it is: the same losses. */
  ck_assert_double_eq(us_draft_tally_loss(&with.last.heldout), us_draft_tally_loss(&plain.last.heldout));
  ck_assert_int_eq(us_draft_with_head(draft, &world.model->head, &encoding, NULL, &headed, &err), US_OK);
  back.init = headed;
  train(&back, 2);
  ck_same(&back.params, &plain.params);
  us_draft_free(headed), us_draft_free(draft);
  us_dflash_release(&run), us_dflash_release(&with), us_dflash_release(&back), us_dflash_release(&plain);
}
END_TEST

/* --- answers --- */

START_TEST(answers_continue_prompts_and_do_not_depend_on_threads) {
  struct us_err err = {0};
  struct us_pool *pool;
  struct us_learner *alone, *threads;
  struct us_responses one, three;
  struct us_responses_options options = {.count = 20,
                                         .length = LENGTH,
                                         .prompt_min = 3,
                                         .prompt_max = 9,
                                         .sampling = {.temperature = 1.0f},
                                         .seed = 8};
  ck_assert_int_eq(us_pool_create(3, &pool, &err), US_OK);
  ck_assert_int_eq(us_learner_create_cpu(NULL, &alone, &err), US_OK);
  ck_assert_int_eq(us_learner_create_cpu(pool, &threads, &err), US_OK);
  US_OK_OR_FAIL(us_responses_generate(alone, world.model, world.shards, US_PART_TRAIN, &options, &one, &err));
  US_OK_OR_FAIL(
      us_responses_generate(threads, world.model, world.shards, US_PART_TRAIN, &options, &three, &err));
  struct us_window window, text;
  size_t tokens = 0;
  ck_assert_int_eq(us_window_init(&window, LENGTH, &err), US_OK);
  ck_assert_int_eq(us_window_init(&text, LENGTH, &err), US_OK);
  ck_assert_uint_eq(one.n, 20);
  for (size_t i = 0; i < one.n; i++) {
    us_responses_window(&one, i, &window);
    ck_assert(one.prompt[i] >= 3 && one.prompt[i] <= 9 && window.n > one.prompt[i] && window.n <= LENGTH);
    tokens += window.n - one.prompt[i];
    for (size_t k = 0; k < window.n; k++) ck_assert_uint_eq(window.loss[k], k >= one.prompt[i]);
    ck_assert_uint_eq(three.total[i], one.total[i]);
    ck_assert(memcmp(one.ids + i * LENGTH, three.ids + i * LENGTH, one.total[i] * sizeof(int32_t)) == 0);
    bool found = false; /* the prompt is text of the training part */
    for (size_t at = 0; at + LENGTH <= us_shards_tokens(world.shards, US_PART_TRAIN) && !found; at++) {
      us_shards_copy(world.shards, US_PART_TRAIN, at, &text);
      found = memcmp(text.ids, window.ids, one.prompt[i] * sizeof(int32_t)) == 0;
    }
    ck_assert_msg(found, "answer %zu", i);
  }
  ck_assert_uint_eq(tokens, one.tokens);
  ck_assert(memcmp(one.ids, one.ids + LENGTH, LENGTH * sizeof(int32_t)) != 0);
  us_window_release(&window);
  us_window_release(&text);
  us_responses_release(&one);
  us_responses_release(&three);
  us_learner_free(alone);
  us_learner_free(threads);
  us_pool_free(pool);
}
END_TEST

START_TEST(answers_are_trained_on_and_without_text_they_are_enough) {
  struct us_err err = {0};
  struct us_responses answers;
  struct us_learner *learner;
  struct us_responses_options options = {
      .count = 6, .length = LENGTH, .first = 5, .sampling = {.temperature = 1.0f}, .seed = 8};
  US_OK_OR_FAIL(us_learner_create_cpu(world.pool, &learner, &err));
  US_OK_OR_FAIL(us_responses_generate(learner, world.model, NULL, US_PART_TRAIN, &options, &answers, &err));
  us_learner_free(learner);
  for (size_t i = 0; i < answers.n; i++) ck_assert(answers.prompt[i] == 1 && answers.ids[i * LENGTH] == 5);
  struct us_dflash run = recipe(80);
  run.shards = NULL;
  run.answers = run.heldout = &answers;
  train(&run, 2);
  ck_assert_msg(us_draft_tally_loss(&run.last.heldout) < 4.0, "%g", us_draft_tally_loss(&run.last.heldout));
  us_dflash_release(&run);
  run.answers = NULL;
  ck_assert_int_eq(us_dflash(&run, NULL, &err), US_ERR_USAGE); /* neither text nor answers */
  us_responses_release(&answers);
}
END_TEST

static void open_all(void) {
  open_world(&world);
}

static void close_all(void) {
  close_world(&world);
}

static Suite *make_suite(void) {
  TCase *c = tcase_create("dflash");
  tcase_add_unchecked_fixture(c, open_all, close_all);
  tcase_add_test(c, anchors_count_themselves_and_have_a_label_and_a_context);
  tcase_add_test(c, labels_are_unshifted_and_end_with_document_and_sequence);
  tcase_add_test(c, a_second_answer_inside_a_block_is_not_predicted);
  tcase_add_test(c, anchors_are_distinct_in_order_and_new_every_step);
  tcase_add_test(c, more_anchors_than_rows_are_all_rows);
  tcase_add_test(c, slot_weights_are_those_of_the_formulas);
  tcase_add_test(c, tallies_count_hits_until_the_first_miss);
  tcase_add_test(c, the_loss_falls_and_the_target_stays);
  tcase_add_test(c, a_run_does_not_depend_on_threads_and_kl_learns_too);
  tcase_add_test(c, passes_of_any_size_take_the_same_step);
  tcase_add_test(c, an_interrupted_run_ends_with_the_bits_of_one_left_alone);
  tcase_add_test(c, a_drafter_goes_on_from_where_it_was);
  tcase_add_test(c, a_head_of_its_own_is_the_targets_rounded_and_is_not_trained);
  tcase_add_test(c, a_drafter_goes_on_with_a_head_or_without);
  tcase_add_test(c, answers_continue_prompts_and_do_not_depend_on_threads);
  tcase_add_test(c, answers_are_trained_on_and_without_text_they_are_enough);
  return us_suite("dflash", c);
}

US_TEST_MAIN(make_suite)
