/* t_qat.c: finetuning through the rounding: what it stores, what it learns, what it leaves alone. */
#include "model/checkpoint.h"
#include "training/metrics.h"
#include "training/qat.h"

#include "tiny_shards.h"

static struct tiny_world world;
static struct us_precision_rules rules;
static struct us_convert convert;

static void open_all(void) {
  open_world(&world);
}

static void close_all(void) {
  close_world(&world);
}

/* A run that takes `steps` steps with these rules. */
static struct us_qat new_run(const char *text, uint64_t steps) {
  struct us_err err = {0};
  US_OK_OR_FAIL(us_precision_parse(text, &rules, &err));
  convert = (struct us_convert){.rules = &rules, .scale_rule = US_SCALE_MSE};
  struct us_qat run = {.original = world.model,
                       .convert = &convert,
                       .shards = world.shards,
                       .batch = 4,
                       .length = 32,
                       .seed = 3,
                       .eval_windows = 8,
                       .trainer = {.optim = us_optim_default(US_OPTIM_ADAMW),
                                   .schedule = {.kind = US_SCHEDULE_COSINE, .peak = 1e-3},
                                   .clip = 1,
                                   .steps = steps,
                                   .options = "test"}};
  run.trainer.optim.adamw_decay = 0.0;
  return run;
}

static struct us_tensor_ref *list_tensors(struct us_model *model, size_t *ret_count) {
  struct us_tensor_ref *refs;
  struct us_err err = {0};
  US_OK_OR_FAIL(us_model_tensors(model, &refs, ret_count, &err));
  return refs;
}

static void assert_same_matrix(const char *name, const struct us_matrix *a, const struct us_matrix *b) {
  ck_assert_msg(a->format == b->format, "%s: %s, %s", name, us_format_name(a->format),
                us_format_name(b->format));
  size_t data = us_matrix_data_bytes(a->format, a->rows, a->cols);
  size_t scales = us_matrix_scale_bytes(a->format, a->rows, a->cols, a->scale_chunk_rows);
  ck_assert_msg(memcmp(a->data, b->data, data) == 0, "%s: codes differ", name);
  ck_assert_msg(!scales || memcmp(a->scales, b->scales, scales) == 0, "%s: scales differ", name);
}

static void assert_same_model(struct us_model *a, struct us_model *b) {
  size_t count, others;
  struct us_tensor_ref *x = list_tensors(a, &count), *y = list_tensors(b, &others);
  ck_assert_uint_eq(count, others);
  for (size_t i = 0; i < count; i++) {
    if (x[i].matrix)
      assert_same_matrix(x[i].name, x[i].matrix, y[i].matrix);
    else
      ck_assert_msg(memcmp(*x[i].vector, *y[i].vector, x[i].rows * sizeof(float)) == 0, "%s", x[i].name);
  }
  free(x);
  free(y);
}

START_TEST(a_file_read_back_holds_the_weights_that_the_student_multiplied_by) {
  struct us_err err = {0};
  struct us_model *quantized, *back;
  char path[64];
  size_t count;
  struct us_qat run = new_run("experts=mxfp4,attn=fp8,head=fp8", 3);
  run.scope = US_QAT_ALL;
  US_OK_OR_FAIL(us_qat(&run, world.pool, &err));
  US_OK_OR_FAIL(us_qat_export(&run, world.pool, &quantized, &err));
  snprintf(path, sizeof path, "%s/q.h5", world.folder);
  US_OK_OR_FAIL(us_model_write(path, quantized, NULL, &err));
  US_OK_OR_FAIL(us_model_open(path, &back, &err));
  US_OK_OR_FAIL(us_qat_check(&run, back, world.pool, &err));
  /* and by the definition: compute weights of the student against the decoded file */
  US_OK_OR_FAIL(us_params_refresh(&run.params, world.pool, US_SEQ_ROUND_BF16, &err));
  struct us_tensor_ref *refs = list_tensors(back, &count);
  for (size_t i = 0; i < count; i++) {
    const struct us_param *p = &run.params.items[i];
    float *values = malloc(p->rows * p->cols * sizeof *values);
    if (refs[i].matrix)
      us_matrix_decode(refs[i].matrix, values);
    else
      memcpy(values, *refs[i].vector, p->rows * sizeof *values);
    ck_assert_msg(memcmp(values, p->compute, p->rows * p->cols * sizeof *values) == 0, "%s", p->name);
    free(values);
  }
  free(refs);
  us_model_free(back);
  us_model_free(quantized);
  us_qat_release(&run);
}
END_TEST

START_TEST(a_single_changed_code_fails_the_check_and_is_named) {
  struct us_err err = {0};
  struct us_model *quantized;
  struct us_qat run = new_run("experts=mxfp4", 1);
  US_OK_OR_FAIL(us_qat(&run, world.pool, &err));
  US_OK_OR_FAIL(us_qat_export(&run, world.pool, &quantized, &err));
  US_OK_OR_FAIL(us_qat_check(&run, quantized, world.pool, &err));
  uint8_t *code = (uint8_t *)(uintptr_t)quantized->layers[2].experts[1].down.data;
  code[17] ^= 0x30;
  ck_assert_int_eq(us_qat_check(&run, quantized, world.pool, &err), US_ERR_CHECK);
  ck_assert_msg(strstr(err.message, "layers.2.mlp.experts.1.down_proj") &&
                    strstr(err.message, "row 1, column 3"),
                "%s", err.message);
  code[17] ^= 0x30;
  /* a tensor that nothing was to change, in memory of its own */
  size_t bytes = us_matrix_data_bytes(US_FORMAT_BF16, quantized->embed.rows, quantized->embed.cols);
  uint16_t *embed = malloc(bytes);
  memcpy(embed, quantized->embed.data, bytes);
  quantized->embed.data = embed;
  US_OK_OR_FAIL(us_qat_check(&run, quantized, world.pool, &err));
  embed[5] ^= 1;
  ck_assert_int_eq(us_qat_check(&run, quantized, world.pool, &err), US_ERR_CHECK);
  ck_assert_msg(strstr(err.message, "embed_tokens") != NULL, "%s", err.message);
  free(embed);
  us_model_free(quantized);
  us_qat_release(&run);
}
END_TEST

START_TEST(unmoved_masters_are_stored_as_conversion_stores_them) {
  static const char *const texts[] = {"experts=mxfp4", "attn=fp8,experts=mxfp4,head=mxfp4,embed=fp8",
                                      "router=bf16"};
  struct us_err err = {0};
  for (size_t t = 0; t < 3; t++) {
    for (int scope = 0; scope < 3; scope++) {
      struct us_model *converted, *exported;
      struct us_qat run = new_run(texts[t], 0);
      run.scope = (enum us_qat_scope)scope;
      convert.scale_rule = t ? US_SCALE_RCEIL : US_SCALE_MSE;
      convert.fp8_scale = t ? US_FP8_SCALE_UE8M0 : US_FP8_SCALE_F32;
      US_OK_OR_FAIL(us_model_convert(world.model, &convert, NULL, &converted, &err));
      US_OK_OR_FAIL(us_qat_open(&run, NULL, &err)); /* masters, but no step */
      US_OK_OR_FAIL(us_qat_export(&run, world.pool, &exported, &err));
      assert_same_model(converted, exported);
      us_qat_release(&run);
      us_model_free(exported);
      US_OK_OR_FAIL(us_qat_export(&run, world.pool, &exported, &err)); /* no masters at all */
      assert_same_model(converted, exported);
      US_OK_OR_FAIL(us_qat_check(&run, exported, NULL, &err));
      us_model_free(exported);
      us_model_free(converted);
    }
  }
}
END_TEST

struct seen {
  double first, last;
  uint64_t lines, stop_after;
};

static void see(void *arg, const struct us_qat_log *log) {
  struct seen *s = arg;
  if (!s->lines++) s->first = log->heldout;
  s->last = log->heldout;
}

START_TEST(finetuning_lowers_the_divergence_on_text_it_did_not_see) {
  struct us_err err = {0};
  for (int scope = 0; scope < 3; scope++) {
    struct seen seen = {0};
    struct us_qat run = new_run("experts=mxfp4,attn=mxfp4,head=mxfp4", 40);
    run.scope = (enum us_qat_scope)scope;
    run.on_log = see, run.log_arg = &seen;
    US_OK_OR_FAIL(us_qat(&run, world.pool, &err));
    ck_assert_uint_eq(seen.lines, 2);
    ck_assert_msg(seen.first > 0.0 && seen.last < 0.9 * seen.first, "scope %d: %g became %g", scope,
                  seen.first, seen.last);
    us_qat_release(&run);
  }
}
END_TEST

START_TEST(without_any_rounding_the_divergence_is_zero_and_nothing_moves) {
  struct us_err err = {0};
  struct seen seen = {0};
  struct us_model *same;
  struct us_qat run = new_run("all=bf16", 3);
  run.scope = US_QAT_ALL;
  run.on_log = see, run.log_arg = &seen;
  US_OK_OR_FAIL(us_qat(&run, world.pool, &err));
  ck_assert_double_eq(seen.first, 0.0);
  ck_assert_double_eq(seen.last, 0.0);
  US_OK_OR_FAIL(us_qat_export(&run, world.pool, &same, &err));
  assert_same_model(world.model, same);
  us_model_free(same);
  us_qat_release(&run);
}
END_TEST

START_TEST(cross_entropy_learns_the_text) {
  struct us_err err = {0};
  struct seen seen = {0};
  struct us_qat run = new_run("experts=mxfp4", 40);
  run.loss = US_QAT_CE;
  run.scope = US_QAT_ALL;
  run.on_log = see, run.log_arg = &seen;
  US_OK_OR_FAIL(us_qat(&run, world.pool, &err));
  ck_assert_msg(seen.last < seen.first - 0.2, "%g became %g", seen.first, seen.last);
  us_qat_release(&run);
}
END_TEST

START_TEST(without_an_original_beside_it_routers_are_taught_nothing) {
  struct us_err err = {0};
  struct us_qat plain = new_run("experts=mxfp4", 3), asked = new_run("experts=mxfp4", 3);
  plain.loss = asked.loss = US_QAT_CE;
  plain.scope = asked.scope = US_QAT_ALL;
  asked.routers = 0.3;
  US_OK_OR_FAIL(us_qat(&plain, world.pool, &err));
  US_OK_OR_FAIL(us_qat(&asked, world.pool, &err));
  ck_assert(memcmp(plain.params.value, asked.params.value, plain.params.floats * sizeof(float)) == 0);
  us_qat_release(&plain);
  us_qat_release(&asked);
}
END_TEST

/* Finetune in a scope that means the experts' matrices; everything else must be as conversion makes it. */
static void assert_only_experts_move(const char *text, enum us_qat_scope scope) {
  struct us_err err = {0};
  struct us_model *quantized, *converted;
  size_t count, others, moved = 0;
  struct us_qat run = new_run(text, 5);
  run.scope = scope;
  US_OK_OR_FAIL(us_qat(&run, world.pool, &err));
  US_OK_OR_FAIL(us_qat_export(&run, world.pool, &quantized, &err));
  US_OK_OR_FAIL(us_model_convert(world.model, &convert, NULL, &converted, &err));
  struct us_tensor_ref *x = list_tensors(quantized, &count), *y = list_tensors(converted, &others);
  for (size_t i = 0; i < count; i++) {
    if (!x[i].matrix) {
      ck_assert(memcmp(*x[i].vector, *y[i].vector, x[i].rows * sizeof(float)) == 0);
    } else if (strcmp(x[i].family, "experts") != 0) {
      assert_same_matrix(x[i].name, x[i].matrix, y[i].matrix);
    } else {
      size_t bytes = us_matrix_data_bytes(x[i].matrix->format, x[i].rows, x[i].cols);
      moved += memcmp(x[i].matrix->data, y[i].matrix->data, bytes) != 0;
    }
  }
  ck_assert_uint_gt(moved, 0);
  free(x);
  free(y);
  us_model_free(quantized);
  us_model_free(converted);
  us_qat_release(&run);
}

START_TEST(training_the_experts_alone_leaves_every_other_bit) {
  assert_only_experts_move("experts=mxfp4,attn=fp8", US_QAT_EXPERTS);
}
END_TEST

START_TEST(by_default_what_keeps_its_format_keeps_its_bits) {
  assert_only_experts_move("experts=mxfp4", US_QAT_ROUNDED);
}
END_TEST

/* KL of what a run exports on held-out text, and the share of its choices of experts that are the original's. */
static double exported_kl(const struct us_qat *run, size_t windows, double *ret_same_experts) {
  struct us_err err = {0};
  struct us_model *quantized;
  struct us_metrics metrics;
  US_OK_OR_FAIL(us_qat_export(run, world.pool, &quantized, &err));
  struct us_metrics_job job = {
      .models = {world.model, quantized}, .n = 2, .shards = world.shards, .length = 32, .windows = windows};
  US_OK_OR_FAIL(us_metrics_run(&job, world.pool, &metrics, &err));
  double kl = metrics.models[1].kl;
  *ret_same_experts = metrics.models[1].router;
  us_metrics_release(&metrics);
  us_model_free(quantized);
  return kl;
}

/* Share of held-out choices of experts that are the original's, after 40 steps. */
static double choices_kept(double routers) {
  struct us_err err = {0};
  double kept = 0.0;
  struct us_qat run = new_run("all=mxfp4,router=f32", 40);
  run.scope = US_QAT_ALL;
  run.routers = routers;
  US_OK_OR_FAIL(us_qat(&run, world.pool, &err));
  exported_kl(&run, 64, &kept);
  us_qat_release(&run);
  return kept;
}

START_TEST(the_originals_routing_scores_keep_choices_of_experts) {
  double plain = choices_kept(0.0), taught = choices_kept(1.0);
  ck_assert_msg(taught > plain + 0.02, "%g kept, %g without", taught, plain);
}
END_TEST

/* Held-out loss before the first step, and the loss of the passes of that step. */
struct first_losses {
  double heldout, step;
};

static void see_both_losses(void *arg, const struct us_qat_log *log) {
  struct first_losses *first = arg;
  if (log->step == 0) first->heldout = log->heldout;
  if (log->step == 1) first->step = log->loss;
}

static struct first_losses first_losses(bool original_experts) {
  struct us_err err = {0};
  struct first_losses first = {(double)NAN, (double)NAN};
  struct us_qat run = new_run("all=mxfp4,router=f32", 1);
  run.scope = US_QAT_ALL;
  run.original_experts = original_experts;
  run.log_every = 1;
  run.on_log = see_both_losses, run.log_arg = &first;
  US_OK_OR_FAIL(us_qat(&run, world.pool, &err));
  us_qat_release(&run);
  return first;
}

START_TEST(the_originals_experts_are_visited_while_learning_alone) {
  struct first_losses own = first_losses(false), theirs = first_losses(true);
  ck_assert(memcmp(&own.heldout, &theirs.heldout, sizeof own.heldout) == 0);
  ck_assert_msg(theirs.step < 0.95 * own.step, "%g with the original's experts, %g with its own", theirs.step,
                own.step);
}
END_TEST

static void see_first_loss(void *arg, const struct us_qat_log *log) {
  if (!log->step) *(double *)arg = log->heldout;
}

/* GPTQ rounds what it is given, not the original: weights that are on codes stay there. */
START_TEST(a_run_begins_at_the_weights_of_another_result) {
  struct us_err err = {0};
  struct us_model *result;
  double same = 0.0;
  struct us_qat run = new_run("all=fp8,experts=mxfp4", 20);
  run.scope = US_QAT_ALL;
  US_OK_OR_FAIL(us_qat(&run, world.pool, &err));
  US_OK_OR_FAIL(us_qat_export(&run, world.pool, &result, &err));
  double kl = exported_kl(&run, 8, &same);
  us_qat_release(&run);
  for (size_t gptq = 0; gptq <= 64; gptq += 64) {
    double first = 0.0;
    struct us_qat next = new_run("all=fp8,experts=mxfp4", 1);
    next.scope = US_QAT_ALL;
    next.begin = result;
    next.gptq_windows = gptq;
    next.on_log = see_first_loss, next.log_arg = &first;
    US_OK_OR_FAIL(us_qat(&next, world.pool, &err));
    ck_assert_double_eq_tol(first, kl, 1e-3 * kl);
    us_qat_release(&next);
  }
  us_model_free(result);
}
END_TEST

START_TEST(a_beginning_of_another_shape_is_refused) {
  struct us_err err = {0};
  struct us_shape shape = world.model->shape;
  struct us_params params;
  struct us_model *other;
  shape.vocab += 32;
  US_OK_OR_FAIL(us_params_init_fresh(&params, &shape, 5, 0.0f, &err));
  US_OK_OR_FAIL(us_model_create(&shape, &other, &err));
  US_OK_OR_FAIL(us_params_export(&params, other, &err));
  struct us_qat run = new_run("experts=mxfp4", 1);
  run.begin = other;
  ck_assert_int_eq(us_qat_start(&run, world.pool, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "where the original has") != NULL, "%s", err.message);
  us_qat_release(&run);
  us_params_release(&params);
  us_model_free(other);
}
END_TEST

static const struct us_qat *watched;
static uint64_t stop_at;

static bool stop(void) {
  return watched->trainer.step >= stop_at;
}

/* What a run logged: lines, and those before its first step. */
struct lines {
  size_t count, first;
};

static void count_lines(void *arg, const struct us_qat_log *log) {
  struct lines *lines = arg;
  lines->count++;
  lines->first += log->step == 0;
}

START_TEST(a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not) {
  struct us_err err = {0};
  char state[64];
  snprintf(state, sizeof state, "%s/run.state", world.folder);
  struct us_qat whole = new_run("experts=mxfp4,attn=fp8", 8), part = new_run("experts=mxfp4,attn=fp8", 8);
  whole.scope = part.scope = US_QAT_ALL;
  whole.trainer.freeze = part.trainer.freeze = (struct us_freeze){.first = 0.2, .last = 0.1, .memory = 0.6};
  whole.gptq_windows = part.gptq_windows = 4;
  whole.routers = part.routers = 0.3;
  US_OK_OR_FAIL(us_qat(&whole, NULL, &err)); /* one thread */
  struct lines lines = {0};
  part.on_log = count_lines, part.log_arg = &lines, part.log_every = 1;
  part.trainer.state_path = state;
  watched = &part;
  part.interrupted = stop;
  for (stop_at = 3; stop_at <= 6; stop_at += 3) {
    part.resume = stop_at > 3;
    ck_assert_int_eq(us_qat(&part, world.pool, &err), US_INTERRUPTED);
    ck_assert_uint_eq(part.trainer.step, stop_at);
    us_qat_release(&part);
  }
  part.interrupted = NULL;
  part.resume = true;
  US_OK_OR_FAIL(us_qat(&part, world.pool, &err));
  ck_assert_uint_eq(part.trainer.step, 8);
  ck_assert_uint_eq(lines.first, 1); /* a resumed run measures nothing before its first step */
  ck_assert_uint_eq(lines.count, 9);
  size_t bytes = whole.params.floats * sizeof(float);
  ck_assert(memcmp(whole.params.value, part.params.value, bytes) == 0);
  ck_assert(memcmp(whole.params.moment1, part.params.moment1, bytes) == 0);
  ck_assert(memcmp(whole.params.moment2, part.params.moment2, bytes) == 0);
  ck_assert(memcmp(whole.params.watch.share, part.params.watch.share, bytes) == 0);
  ck_assert(memcmp(whole.params.watch.mean, part.params.watch.mean, bytes) == 0);
  ck_assert(memcmp(whole.params.watch.turn, part.params.watch.turn, bytes) == 0);
  ck_assert_msg(whole.held > 0.0 && whole.held < 0.5, "%g of the weights were fixed", whole.held);
  ck_assert_double_eq(whole.held, part.held);
  us_qat_release(&whole);
  us_qat_release(&part);
}
END_TEST

START_TEST(forward_passes_of_fewer_sequences_change_nothing_but_rounding) {
  struct us_err err = {0};
  struct us_qat whole = new_run("experts=mxfp4", 2), parts = new_run("experts=mxfp4", 2);
  parts.micro = 1;
  US_OK_OR_FAIL(us_qat(&whole, world.pool, &err));
  US_OK_OR_FAIL(us_qat(&parts, world.pool, &err));
  double apart = 0.0, power = 0.0;
  for (size_t i = 0; i < whole.params.floats; i++) {
    double d = (double)whole.params.moment1[i] - (double)parts.params.moment1[i];
    apart += d * d;
    power += (double)whole.params.moment1[i] * (double)whole.params.moment1[i];
  }
  ck_assert_msg(power > 0.0 && sqrt(apart / power) < 1e-2, "%g", sqrt(apart / power));
  us_qat_release(&whole);
  us_qat_release(&parts);
}
END_TEST

START_TEST(rules_and_shards_that_do_not_fit_are_refused) {
  struct us_err err = {0};
  struct us_qat run = new_run("experts=mxfp4,layers.9.experts=bf16", 2);
  ck_assert_int_eq(us_qat(&run, world.pool, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, "layers.9.experts=bf16") != NULL, "%s", err.message);
  us_qat_release(&run);
  struct us_shape narrow = world.shape;
  struct us_model *other;
  narrow.vocab = 256;
  US_OK_OR_FAIL(us_model_random(&narrow, 1, NULL, &other, &err));
  run = new_run("experts=mxfp4", 2);
  run.original = other;
  ck_assert_int_eq(us_qat(&run, world.pool, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "256") != NULL, "%s", err.message);
  us_qat_release(&run);
  us_model_free(other);
}
END_TEST

START_TEST(a_weight_that_is_not_finite_is_refused_and_named) {
  struct us_err err = {0};
  struct us_qat run = new_run("experts=mxfp4", 2);
  float *router = (float *)(uintptr_t)world.model->layers[1].router.data, kept = router[7];
  ck_assert_int_eq(world.model->layers[1].router.format, US_FORMAT_F32);
  router[7] = NAN;
  ck_assert_int_eq(us_qat(&run, world.pool, &err), US_ERR_CHECK);
  ck_assert_msg(strstr(err.message, "not finite") || strstr(err.message, "layers.1"), "%s", err.message);
  router[7] = kept;
  us_qat_release(&run);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("qat");
  tcase_add_unchecked_fixture(c, open_all, close_all);
  tcase_add_test(c, a_file_read_back_holds_the_weights_that_the_student_multiplied_by);
  tcase_add_test(c, a_single_changed_code_fails_the_check_and_is_named);
  tcase_add_test(c, unmoved_masters_are_stored_as_conversion_stores_them);
  tcase_add_test(c, finetuning_lowers_the_divergence_on_text_it_did_not_see);
  tcase_add_test(c, without_any_rounding_the_divergence_is_zero_and_nothing_moves);
  tcase_add_test(c, cross_entropy_learns_the_text);
  tcase_add_test(c, without_an_original_beside_it_routers_are_taught_nothing);
  tcase_add_test(c, training_the_experts_alone_leaves_every_other_bit);
  tcase_add_test(c, by_default_what_keeps_its_format_keeps_its_bits);
  tcase_add_test(c, the_originals_routing_scores_keep_choices_of_experts);
  tcase_add_test(c, the_originals_experts_are_visited_while_learning_alone);
  tcase_add_test(c, a_run_begins_at_the_weights_of_another_result);
  tcase_add_test(c, a_beginning_of_another_shape_is_refused);
  tcase_add_test(c, a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not);
  tcase_add_test(c, forward_passes_of_fewer_sequences_change_nothing_but_rounding);
  tcase_add_test(c, rules_and_shards_that_do_not_fit_are_refused);
  tcase_add_test(c, a_weight_that_is_not_finite_is_refused_and_named);
  return us_suite("qat", c);
}

US_TEST_MAIN(make_suite)
