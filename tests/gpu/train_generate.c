/* train_generate.c: generation on a GPU: its kernels, its rules, and its tokens against the CPU's logits.
 *
 * Usage: train_generate [kernels]; train_generate speed SHAPE [ANSWERS [TOKENS [SLOTS [LONGEST_PROMPT]]]]. Exit 0, 1, 5, 77.
 *
 * Bound. Every answer is run through the CPU's forward pass as it stands. Where the GPU drew a token greedily, its own logit of it was
 * the largest, so on the CPU it may lie below the largest by no more than twice what logits of the two sides differ by. The CPU
 * says what roundings do to logits: it runs with its own and without any. As in train_parity.h the other side's differ by
 * FORWARD_FACTOR of that; a single logit may by the largest of any row. At a temperature the same holds for
 * logit + T * noise. Where a choice of experts has not its margin, the rest of that answer is left out; `tiny` here has as
 * many experts as a token takes, so nothing is, and pico another router bias.
 */
#include "train_decode.h"
#include "train_parity.h"

#include "decode/sequence.h"
#include "model/checkpoint.h"
#include "model/random.h"
#include "training/cuda/generate.h"
#include "training/cuda/learner.h"

#include <math.h>
#include <signal.h>
#include <time.h>

enum { ANSWERS = 300, TOKENS = 120, LONGEST = 100, COMPARED = 24, TEST_SLOTS = 64 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- items --- */

struct text {
  struct us_continuation *items;
  size_t n;
  int32_t *prompts, *ids;
};

static struct text open_text(size_t n, uint32_t longest, uint32_t tokens, uint32_t vocab) {
  struct lab_random random = {31};
  struct text t = {.items = take(n, sizeof *t.items),
                   .n = n,
                   .prompts = take(n * longest, sizeof *t.prompts),
                   .ids = take(n * tokens, sizeof *t.ids)};
  for (size_t i = 0; i < n; i++) {
    int32_t *prompt = t.prompts + i * longest;
    uint32_t count = 1 + lab_word(&random) % longest, most = 1 + lab_word(&random) % tokens;
    for (uint32_t k = 0; k < count; k++) prompt[k] = (int32_t)(lab_word(&random) % vocab);
    t.items[i] = (struct us_continuation){.prompt = prompt,
                                          .prompt_count = count,
                                          .max_tokens = n > ANSWERS ? tokens : most,
                                          .seed = 1000 + i,
                                          .ids = t.ids + i * tokens};
  }
  return t;
}

static void close_text(struct text *t) {
  free(t->items);
  free(t->prompts);
  free(t->ids);
}

/* --- rules --- */

/* What ends an answer of `count` tokens, by decode/sequence.c; NONE: it goes on. */
static enum us_finish rule(const struct us_generation *g, const struct us_continuation *item,
                           uint32_t count) {
  for (size_t i = 0; i < g->stop_id_count; i++)
    if (item->ids[count - 1] == g->stop_ids[i]) return US_FINISH_STOP;
  if (g->cut_loops && us_sequence_loops(item->ids, count, US_LOOP_GRAM) >= US_LOOP_REPEATS)
    return US_FINISH_LOOP;
  return count >= item->max_tokens ? US_FINISH_LENGTH : US_FINISH_NONE;
}

static void check_rules(const char *name, const struct us_generation *g) {
  size_t bad = 0, kinds[8] = {0};
  char note[96];
  for (size_t i = 0; i < g->n; i++) {
    const struct us_continuation *item = &g->items[i];
    bool right = item->count > 0 && item->count <= item->max_tokens;
    for (uint32_t count = 1; right && count <= item->count; count++)
      right = rule(g, item, count) == (count == item->count ? item->finish : US_FINISH_NONE);
    bad += !right;
    kinds[item->finish]++;
  }
  snprintf(note, sizeof note, "%zu at a stop id, %zu at their length, %zu loops", kinds[US_FINISH_STOP],
           kinds[US_FINISH_LENGTH], kinds[US_FINISH_LOOP]);
  record(name, "answers end where they should", g->n, bad, note);
}

/* --- the same bits --- */

static size_t differ(const struct us_continuation *a, const struct us_continuation *b) {
  return a->count != b->count || a->finish != b->finish || memcmp(a->ids, b->ids, a->count * sizeof *a->ids);
}

static void generate(struct us_learner *learner, struct us_generation *g, const char *name) {
  struct us_err err = {0};
  need(us_learner_generate(learner, g, &err), &err, name);
}

/* Again, and in another company: the other way around, a third left out. */
static void check_bits(const char *name, struct us_learner *learner, const struct us_generation *first,
                       uint32_t vocab) {
  struct text again = open_text(first->n, LONGEST, TOKENS, vocab),
              other = open_text(first->n, LONGEST, TOKENS, vocab);
  struct us_generation g = *first;
  size_t bad = 0, n = first->n, kept = 0;
  g.items = again.items;
  generate(learner, &g, name);
  for (size_t i = 0; i < n; i++) bad += differ(&first->items[i], &again.items[i]) != 0;
  record(name, "the same bits twice", n, bad, "");
  struct us_continuation *items = take(n, sizeof *items);
  for (size_t i = n; i-- > 0;)
    if (i % 3 != 1) items[kept++] = other.items[i];
  g.items = items, g.n = kept, bad = 0;
  generate(learner, &g, name);
  for (size_t k = 0, i = n; k < kept; k++) {
    while (--i % 3 == 1) continue;
    bad += differ(&first->items[i], &items[k]) != 0;
  }
  record(name, "the same bits beside others", kept, bad, "");
  free(items);
  close_text(&again);
  close_text(&other);
}

/* --- against the CPU --- */

struct host {
  struct us_params params;
  struct us_pool *pool;
  struct us_seq seq;
  struct us_model_train *train;
  struct us_rows rows;
  size_t first[COMPARED + 1]; /* row of each answer */
  float *logits[2];           /* (R, N) without roundings, with them */
  bool *settled;              /* (R) no choice of experts before or at the row is doubtful */
};

static void fill_rows(struct host *h, const struct us_generation *g) {
  struct us_err err = {0};
  size_t rows = 0;
  for (size_t i = 0; i < COMPARED; i++) rows += g->items[i].prompt_count + g->items[i].count;
  need(us_rows_init(&h->rows, rows, &err), &err, "rows");
  h->rows.R = rows;
  for (size_t i = 0, r = 0; i < COMPARED; i++) {
    const struct us_continuation *item = &g->items[i];
    uint32_t n = item->prompt_count + item->count;
    h->first[i] = r;
    h->first[i + 1] = r + n;
    for (uint32_t k = 0; k < n; k++, r++) {
      h->rows.token[r] = k < item->prompt_count ? item->prompt[k] : item->ids[k - item->prompt_count];
      h->rows.position[r] = k;
      h->rows.document[r] = (uint32_t)h->first[i];
    }
  }
}

static void run_host(struct host *h, const struct us_generation *g) {
  struct us_err err = {0};
  struct us_batch batch = us_rows_batch(&h->rows);
  size_t R = h->rows.R, D = g->model->shape.hidden, N = g->model->shape.vocab;
  h->settled = take(R, sizeof *h->settled);
  memset(h->settled, 1, R);
  for (int rounded = 0; rounded < 2; rounded++) {
    h->seq.rounding = rounded ? US_SEQ_ROUND_BF16 : US_SEQ_ROUND_NONE;
    need(us_model_train_forward(h->train, &batch, NULL, &err), &err, "forward");
    h->logits[rounded] = take(R * N, sizeof(float));
    us_seq_gemm(false, true, R, N, D, 1.0f, h->train->hidden, D, h->train->head->compute, D, 0.0f,
                h->logits[rounded], N);
    for (size_t i = 0; i < COMPARED; i++)
      for (size_t r = h->first[i]; r < h->first[i + 1]; r++)
        if (lab_margin(h->train, r) < MARGIN || (r > h->first[i] && !h->settled[r - 1]))
          h->settled[r] = false;
  }
}

/* The GPU's products take weights in bf16, which FP8 values with FP32 scales are not. */
static void round_weights(struct us_params *params) {
  for (size_t i = 0; i < params->count; i++) {
    struct us_param *p = &params->items[i];
    if (p->vector || strcmp(p->family, "router") == 0) continue;
    for (size_t k = 0; k < p->rows * p->cols; k++)
      p->compute[k] = us_bf16_to_f32(us_bf16_from_f32(p->compute[k]));
  }
}

static void open_host(struct host *h, const struct us_generation *g) {
  struct us_err err = {0};
  *h = (struct host){0};
  need(us_pool_create(0, &h->pool, &err), &err, "pool");
  us_seq_init(&h->seq, h->pool, US_SEQ_ROUND_BF16);
  need(us_params_init_model(&h->params, g->model, NULL, true, &err), &err, "weights");
  round_weights(&h->params);
  fill_rows(h, g);
  need(
      us_model_train_create(&g->model->shape, &h->params, &h->seq, h->rows.R, US_TRAIN_SAVE, &h->train, &err),
      &err, "model");
  run_host(h, g);
}

static void close_host(struct host *h) {
  us_model_train_free(h->train);
  us_rows_release(&h->rows);
  us_params_release(&h->params);
  us_seq_release(&h->seq);
  us_pool_free(h->pool);
  free(h->logits[0]);
  free(h->logits[1]);
  free(h->settled);
}

/* How far a token lies below the best of the row, in units of logits. */
static double gap_of(const struct us_generation *g, const float *row, const struct us_continuation *item,
                     uint32_t position, int32_t token) {
  size_t N = g->model->shape.vocab;
  struct us_noise noise = us_noise_target(item->seed, position, 0);
  double best = (double)-INFINITY, own = 0.0, T = (double)g->sampling.temperature;
  for (size_t i = 0; i < N; i++) {
    double score = (double)row[i];
    if (T > 0.0)
      score += T * (double)us_gumbel_bits(
                       us_philox_token(noise.key, noise.position, noise.sample, (uint32_t)i, noise.stream));
    if (score > best) best = score;
    if ((int32_t)i == token) own = score;
  }
  return best - own;
}

static double largest_noise(const struct host *h, size_t N) {
  double most = 0.0;
  for (size_t r = 0; r < h->rows.R; r++)
    for (size_t i = 0; i < N && h->settled[r]; i++)
      most = fmax(most, fabs((double)h->logits[0][r * N + i] - (double)h->logits[1][r * N + i]));
  return most;
}

static void check_tokens(const char *name, const struct us_generation *g) {
  struct host h;
  open_host(&h, g);
  size_t N = g->model->shape.vocab, checked = 0, bad = 0, others = 0, left_out = 0;
  double bound = 2.0 * FORWARD_FACTOR * largest_noise(&h, N), worst = 0.0;
  char note[160];
  for (size_t i = 0; i < COMPARED; i++) {
    const struct us_continuation *item = &g->items[i];
    for (uint32_t k = 0; k < item->count; k++) {
      uint32_t position = item->prompt_count + k;
      size_t r = h.first[i] + position - 1; /* the row whose logits chose it */
      if (!h.settled[r]) {
        left_out++;
        continue;
      }
      double gap = gap_of(g, h.logits[1] + r * N, item, position, item->ids[k]);
      checked++, others += gap > 0.0, bad += !(gap <= bound);
      worst = fmax(worst, gap);
    }
  }
  snprintf(note, sizeof note,
           "largest gap %.4g, bound %.4g; %zu tokens are the CPU's second choice; %zu left out", worst, bound,
           others, left_out);
  record(name, "tokens are likeliest by the CPU's logits", checked, bad, note);
  close_host(&h);
}

/* Prompts read a token a step instead: both keep what the CPU would within its bound, so most answers are the same. */
static void check_stepwise(const char *name, struct us_learner *learner, const struct us_generation *first) {
  struct text text = open_text(first->n, LONGEST, TOKENS, first->model->shape.vocab);
  struct us_generation g = *first;
  char label[160];
  size_t same = 0;
  g.items = text.items, g.stepwise = true;
  generate(learner, &g, name);
  for (size_t i = 0; i < g.n; i++) same += !differ(&first->items[i], &g.items[i]);
  snprintf(label, sizeof label, "%s, prompts a token a step (%zu of %zu answers the same)", name, same, g.n);
  check_tokens(label, &g);
  close_text(&text);
}

/* --- refusals --- */

static void refuse(const char *name, struct us_learner *learner, struct us_generation *g,
                   enum us_status expected, const char *part) {
  struct us_err err = {0};
  char check[96];
  enum us_status status = us_learner_generate(learner, g, &err);
  snprintf(check, sizeof check, "refused: %s", part);
  record(name, check, 1, status != expected || !strstr(err.message, part), err.message);
}

static void check_refusals_of(const char *name, struct us_learner *learner,
                              const struct us_generation *first) {
  struct us_generation g = *first;
  struct us_continuation item = first->items[0];
  g.items = &item, g.n = 1;
  item.max_tokens = g.model->shape.max_positions;
  refuse(name, learner, &g, US_ERR_USAGE, "do not fit the model's");
  item = first->items[0];
  item.max_tokens = 8, g.slots = 20000000;
  refuse(name, learner, &g, US_ERR_MEMORY, "MiB of device memory wanted");
}

/* Without a final norm every token is 0: a 24-gram has occurred three times after 26 of them. */
static void check_loops(const char *name, struct us_learner *learner, const struct us_generation *first) {
  struct us_generation g = *first;
  size_t D = g.model->shape.hidden, bad = 0;
  float *kept = take(D, sizeof *kept);
  memcpy(kept, g.model->final_norm, D * sizeof *kept);
  memset(g.model->final_norm, 0, D * sizeof *kept);
  generate(learner, &g, name);
  for (size_t i = 0; i < g.n; i++) {
    bool loops = g.items[i].max_tokens >= 26;
    bad += g.items[i].finish != (loops ? US_FINISH_LOOP : US_FINISH_LENGTH) ||
           g.items[i].count != (loops ? 26 : g.items[i].max_tokens);
  }
  record(name, "loops are cut", g.n, bad, "");
  memcpy(g.model->final_norm, kept, D * sizeof *kept);
  free(kept);
}

/* Logits that are not finite end the run and say where. */
static void check_broken(const char *name, struct us_learner *learner, const struct us_generation *first) {
  struct us_generation g = *first;
  float *gain = &g.model->final_norm[0], kept = *gain;
  *gain = NAN;
  refuse(name, learner, &g, US_ERR_CHECK, "are not finite");
  *gain = kept;
}

/* --- models --- */

static void run_model(const char *name, struct us_model *model, struct us_learner *learner, float temperature,
                      bool breakable) {
  struct text text = open_text(ANSWERS, LONGEST, TOKENS, model->shape.vocab);
  int32_t stops[2] = {5, (int32_t)model->shape.vocab - 3};
  struct us_generation g = {.model = model,
                            .items = text.items,
                            .n = text.n,
                            .sampling = {.temperature = temperature},
                            .stop_ids = stops,
                            .stop_id_count = 2,
                            .cut_loops = true,
                            .slots = TEST_SLOTS};
  char label[64];
  snprintf(label, sizeof label, "%s at %g", name, (double)temperature);
  generate(learner, &g, label);
  check_rules(label, &g);
  check_bits(label, learner, &g, model->shape.vocab);
  check_tokens(label, &g);
  check_stepwise(label, learner, &g);
  if (breakable) check_refusals_of(label, learner, &g);
  if (breakable) check_loops(label, learner, &g);
  if (breakable) check_broken(label, learner, &g);
  close_text(&text);
}

static struct us_model *random_model(const char *shape_name, bool all_experts, struct us_pool *pool) {
  struct us_err err = {0};
  struct us_shape shape;
  struct us_model *model;
  need(us_shape_load(shape_name, &shape, &err), &err, shape_name);
  if (shape.full.qk_dim % 16) shape.full.qk_dim = shape.swa.qk_dim = 32;
  if (all_experts) shape.top_k = shape.experts;
  need(us_model_random(&shape, 5, pool, &model, &err), &err, shape_name);
  return model;
}

/* The bias decides about most experts, so that few choices are doubtful: of pico as it is, none of the answers compared would be left. */
static void spread_choices(struct us_model *model) {
  const struct us_shape *s = &model->shape;
  for (uint32_t l = 0; l < s->layers; l++)
    for (uint32_t e = 0; s->moe_layer[l] && e < s->experts; e++)
      model->layers[l].router_bias[e] = (float)((e * 5 + l) % s->experts) * 0.25f;
}

static void check_models(struct us_learner *learner, struct us_pool *pool) {
  static const char *const shapes[] = {"tiny", "tiny-pro"};
  const char *data = getenv("ULTRASPEED_DATA");
  struct us_err err = {0};
  for (size_t i = 0; i < 2; i++) {
    struct us_model *model = random_model(shapes[i], true, pool);
    run_model(shapes[i], model, learner, 0.0f, true);
    run_model(shapes[i], model, learner, 1.0f, false);
    us_model_free(model);
  }
  char path[1024];
  struct us_model *pico;
  snprintf(path, sizeof path, "%s/models/pico/pico.h5", data ? data : ".");
  need(us_model_open(path, &pico, &err), &err, path);
  spread_choices(pico);
  run_model("pico", pico, learner, 0.0f, false);
  run_model("pico", pico, learner, 0.8f, false);
  us_model_free(pico);
}

/* --- lanes --- */

/* Three copies of the model on one GPU, a stream and a thread each, give the answers of one. */
static void check_lanes(struct us_learner *one, struct us_pool *pool) {
  static const int ordinals[3];
  struct us_err err = {0};
  struct us_learner *three;
  struct us_model *model = random_model("tiny", true, pool);
  struct text alone = open_text(ANSWERS, LONGEST, TOKENS, model->shape.vocab),
              divided = open_text(ANSWERS, LONGEST, TOKENS, model->shape.vocab);
  struct us_generation g = {.model = model,
                            .items = alone.items,
                            .n = alone.n,
                            .sampling = {.temperature = 1.0f, .top_p = 0.9f},
                            .cut_loops = true};
  size_t bad = 0;
  need(us_learner_create_cuda(&(struct us_learner_cuda_options){.gpus = 3, .opt_ordinals = ordinals}, &three,
                              &err),
       &err, "lanes");
  generate(one, &g, "lanes");
  g.items = divided.items;
  generate(three, &g, "lanes");
  for (size_t i = 0; i < g.n; i++) bad += differ(&alone.items[i], &divided.items[i]) != 0;
  record("three lanes", "the answers of one", g.n, bad, "");
  us_learner_free(three);
  us_model_free(model);
  close_text(&alone);
  close_text(&divided);
}

/* --- speed --- */

struct trace {
  struct us_cuda *cuda;
  size_t count;
  bool over; /* the first step alone: the next is captured */
  cudaEvent_t event[1024];
  const char *what[1024];
};

static void traced(void *arg, const char *what) {
  struct trace *t = arg;
  if (t->over || t->count == 1024) return;
  t->what[t->count] = what;
  (void)cudaEventCreate(&t->event[t->count]);
  (void)cudaEventRecord(t->event[t->count++], t->cuda->stream);
  t->over = strcmp(what, "end of sequences") == 0;
}

static void print_trace(const struct trace *t) {
  for (size_t i = 1; i < t->count; i++) {
    double ms = 0.0;
    size_t calls = 0, before = 1;
    while (before < i && strcmp(t->what[before], t->what[i]) != 0) before++;
    if (before < i) continue;
    for (size_t k = i; k < t->count; k++) {
      float spent = 0.0f;
      if (strcmp(t->what[k], t->what[i]) != 0) continue;
      (void)cudaEventElapsedTime(&spent, t->event[k - 1], t->event[k]);
      ms += (double)spent, calls++;
    }
    printf("  %8.4f ms %4zu x %s\n", ms, calls, t->what[i]);
  }
}

static int speed(int count, char **arguments) {
  struct us_err err = {0};
  struct us_pool *pool;
  struct us_cuda *cuda;
  struct us_params params;
  struct us_cuda_params *set;
  size_t answers = count > 1 ? strtoul(arguments[1], NULL, 10) : 8192;
  uint32_t tokens = count > 2 ? (uint32_t)strtoul(arguments[2], NULL, 10) : 256;
  uint32_t longest = count > 4 ? (uint32_t)strtoul(arguments[4], NULL, 10) : 40;
  need(us_cuda_open(0, &cuda, &err), &err, "GPU");
  need(us_pool_create(0, &pool, &err), &err, "pool");
  struct us_model *model = random_model(count > 0 ? arguments[0] : "nano", false, pool);
  need(us_params_init_model(&params, model, NULL, true, &err), &err, "weights");
  need(us_cuda_params_create(cuda, &params, (struct us_owned){0, params.floats}, &set, &err), &err,
       "weights");
  for (int run = 0; run < 3; run++) { /* the second is traced, the third reads prompts a token a step */
    struct text text = open_text(answers, longest, tokens, model->shape.vocab);
    struct us_generation g = {.model = model,
                              .items = text.items,
                              .n = answers,
                              .sampling = {.temperature = run == 1 ? 0.8f : 0.2f},
                              .cut_loops = true,
                              .stepwise = run == 2,
                              .slots = count > 3 ? (uint32_t)strtoul(arguments[3], NULL, 10) : 0};
    struct trace trace = {.cuda = cuda};
    cuda->opt_trace = NULL;
    if (run == 1) cuda->opt_trace = traced, cuda->trace_arg = &trace;
    double begun = now(), generated = 0.0, fed = 0.0;
    need(us_cuda_generate(
             &(struct us_cuda_generate){.cuda = cuda, .params = set, .generation = &g, .n = answers}, &err),
         &err, "generation");
    double seconds = now() - begun;
    for (size_t i = 0; i < answers; i++) generated += g.items[i].count, fed += g.items[i].prompt_count;
    printf("%s: %zu answers, %.0f tokens and %.0f of prompts in %.3f s: %.0f tokens/s; %u at a time\n",
           model->shape.name, answers, generated, fed, seconds, generated / seconds,
           us_cuda_generate_slots(&g));
    if (run == 1) print_trace(&trace);
    close_text(&text);
  }
  us_cuda_params_free(set);
  us_params_release(&params);
  us_model_free(model);
  us_pool_free(pool);
  us_cuda_close(cuda);
  return 0;
}

int main(int count, char **arguments) {
  struct us_err err = {0};
  struct us_cuda *cuda;
  struct us_learner *learner;
  struct us_pool *pool;
  signal(SIGALRM, hung);
  alarm(watchdog_seconds(120));
  if (count > 1 && strcmp(arguments[1], "speed") == 0) return speed(count - 2, arguments + 2);
  need(us_cuda_open(0, &cuda, &err), &err, "GPU");
  check_attention_decode(cuda);
  check_draws(cuda);
  us_cuda_close(cuda);
  if (count > 1 && strcmp(arguments[1], "kernels") == 0) return any_failed ? 1 : 0;
  need(us_pool_create(0, &pool, &err), &err, "pool");
  need(us_learner_create_cuda(&(struct us_learner_cuda_options){.gpus = 1}, &learner, &err), &err, "GPU");
  check_models(learner, pool);
  check_lanes(learner, pool);
  us_learner_free(learner);
  us_pool_free(pool);
  return any_failed ? 1 : 0;
}
