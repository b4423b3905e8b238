/* engine_exact.c: what the CUDA executor promises about whole generations, beyond engine_parity's: every accept length, every block
 * and batch, long contexts, shared prompts, very many rounds under delays, and the graph executor with as many layers as are.
 *
 *   Requests | Accept lengths | Blocks and batches | Rules | Long contexts | Samples | Many rounds | Graphs | Ends | Cases
 *
 * Usage: engine_exact [CASE...], of accepts, blocks, heads, markov, rules, long, samples, rounds, graphs, ends; hang, which loses the GPU's context,
 * small, a few rounds for a slow checker, and gpus2 and gpus4, a rank a GPU, only where they are named. US_EXACT_SECONDS (10): how long
 * rounds under delays go on. Exit 0, 1, 5, 77.
 *
 * Independent truth: plain decoding of the same executor, one sequence at a time, whose logits engine_parity holds against the CPU's.
 */
#include "decode/generate.h"
#include "device/bench.h"
#include "device/loop.h"
#include "parity_models.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <signal.h>
#include <time.h>

#define REQUESTS     8
#define MOST_SAMPLES 8

/* Requests */

struct plan {
  uint32_t block, batch, tokens, first, step; /* prompts of first + i * step tokens */
  float temperature;
  uint64_t seed;
  uint32_t samples;                  /* of every request; 0: 1 */
  uint32_t requests;                 /* 0: REQUESTS */
  const struct us_result *opt_plain; /* replayed at `accept` */
  const float *accept;
  size_t accept_count;
  enum us_verify_rule rule;
  bool adaptive, varied; /* varied: filters and log-probabilities differ from request to request */
  bool (*interrupted)(void);
  enum us_status expected;
};

static const struct us_sampling samplings[] = {{1.0f, 0, 1.0f, 0.0f},  {0.0f, 0, 1.0f, 0.0f},
                                               {0.7f, 40, 0.9f, 0.0f}, {1.3f, 0, 1.0f, 0.05f},
                                               {0.5f, 0, 0.8f, 0.0f},  {0.9f, 12, 1.0f, 0.0f}};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void generate(struct us_executor *ex, const struct plan *p, struct us_result *results,
                     struct us_generate_stats *opt_stats) {
  struct us_request requests[REQUESTS];
  struct us_replay replays[REQUESTS][MOST_SAMPLES];
  uint32_t longest = p->first + (REQUESTS - 1) * p->step, samples = p->samples ? p->samples : 1,
           count = p->requests ? p->requests : REQUESTS;
  int32_t *prompts = take(REQUESTS * (size_t)longest, sizeof *prompts);
  struct us_err err = {0};
  for (uint32_t i = 0; i < REQUESTS; i++) {
    int32_t *prompt = prompts + (size_t)i * longest;
    for (uint32_t j = 0; j < longest; j++)
      prompt[j] = (int32_t)((i * 7919u + j * 104729u + (uint32_t)p->seed) % ex->model->shape.vocab);
    requests[i] = (struct us_request){.prompt = prompt,
                                      .prompt_count = p->first + i * p->step,
                                      .sampling = {.temperature = p->temperature, .top_p = 1.0f},
                                      .seed = p->seed + i,
                                      .samples = samples,
                                      .max_tokens = p->tokens};
    if (p->varied) requests[i].sampling = samplings[i % 6], requests[i].logprobs = i % 3 == 1 || i == 2;
    if (!p->opt_plain || (p->varied && i % 2)) continue;
    for (uint32_t k = 0; k < samples; k++)
      replays[i][k] =
          (struct us_replay){p->opt_plain[i].outputs[k].ids.ids, p->opt_plain[i].outputs[k].ids.count};
    requests[i].replay = replays[i];
  }
  struct us_generate_options options = {
      .block = p->block, .batch = p->batch, .accept = p->accept, .accept_count = p->accept_count};
  options.rule = p->rule, options.adaptive = p->adaptive, options.interrupted = p->interrupted;
  memset(results, 0, REQUESTS * sizeof *results);
  enum us_status status = us_generate(ex, requests, count, &options, results, opt_stats, &err);
  if (!p->expected || status != p->expected) need(status, &err, "generate");
  free(prompts);
}

static bool same_ids(const struct us_output *a, const struct us_output *b) {
  return a->ids.count == b->ids.count && !memcmp(a->ids.ids, b->ids.ids, a->ids.count * sizeof *a->ids.ids);
}

static uint64_t differing(const struct us_result *a, const struct us_result *b) {
  uint64_t bad = 0;
  for (uint32_t i = 0; i < REQUESTS; i++)
    for (uint32_t s = 0; s < a[i].samples; s++) bad += !same_ids(&a[i].outputs[s], &b[i].outputs[s]);
  return bad;
}

static void release(struct us_result *results) {
  for (uint32_t i = 0; i < REQUESTS; i++) us_result_release(&results[i]);
}

/* Accept lengths */

#define LEAST 50 /* times that each occurs */

static void check_accepts(const struct models *m, struct us_executor *ex, float temperature) {
  static const float rates[2][2] = {{0.9f, 0.93f}, {0.7f, 0.8f}};
  uint32_t block = m->draft->shape.block, round;
  uint64_t seen[US_MAX_BLOCK] = {0}, rounds = 0, bad = 0, least = 0;
  char note[160];
  struct us_result plain[REQUESTS], other[REQUESTS];
  for (round = 0; round < 40 && least < LEAST; round++) {
    struct plan p = {.block = 1,
                     .batch = 8,
                     .tokens = 400,
                     .first = 9,
                     .step = 11,
                     .temperature = temperature,
                     .seed = 100 * round};
    generate(ex, &p, plain, NULL);
    p.block = block, p.batch = 1 + round % 8, p.opt_plain = plain, p.accept = rates[round % 2],
    p.accept_count = 2;
    struct us_generate_stats stats;
    generate(ex, &p, other, &stats);
    bad += differing(plain, other);
    for (uint32_t n = 0; n < block; n++) seen[n] += stats.decode.histogram[n];
    rounds += stats.decode.rounds;
    least = UINT64_MAX;
    for (uint32_t n = 0; n < block; n++) least = seen[n] < least ? seen[n] : least;
    release(plain), release(other);
  }
  snprintf(note, sizeof note, "%u runs of 8 requests, %llu rounds, each length %llu times at least", round,
           (unsigned long long)rounds, (unsigned long long)least);
  record(m->name,
         temperature > 0 ? "T = 1: every accept length, tokens equal plain"
                         : "greedy: every accept length, tokens equal plain",
         round * REQUESTS, bad + (least < LEAST), note);
}

/* Blocks and batches */

static void check_blocks(const struct models *m, struct us_executor *ex) {
  static const float rates[] = {0.8f};
  uint64_t bad = 0, runs = 0;
  for (int t = 0; t < 2; t++) {
    struct us_result plain[REQUESTS], other[REQUESTS];
    struct plan p = {
        .block = 1, .batch = 1, .tokens = 40, .first = 3, .step = 17, .temperature = (float)t, .seed = 77};
    generate(ex, &p, plain, NULL);
    for (uint32_t block = 1; block <= m->draft->shape.block; block++)
      for (uint32_t i = 0; i < 2; i++) {
        p.block = block, p.batch = i ? 1 + (block * 5 + (uint32_t)t) % 8 : 8;
        p.opt_plain = block % 3 ? plain : NULL, p.accept = rates, p.accept_count = 1;
        generate(ex, &p, other, NULL);
        bad += differing(plain, other), runs++;
        release(other);
      }
    release(plain);
  }
  record(m->name, "blocks 1 to the drafter's, batches 1 to 8: tokens equal plain", runs * REQUESTS, bad, "");
}

/* Rules */

/* The same executor asked pass by pass: decode/generate.c decides on the host, on the same logits. */
static void by_passes(struct us_executor *ex, const struct plan *p, struct us_result *results,
                      struct us_generate_stats *stats) {
  const struct us_executor_ops *ops = ex->ops;
  struct us_executor_ops passes = *ops;
  passes.rounds = NULL;
  ex->ops = &passes;
  generate(ex, p, results, stats);
  ex->ops = ops;
}

static uint64_t differing_logprobs(const struct us_result *a, const struct us_result *b) {
  uint64_t bad = 0;
  for (uint32_t i = 0; i < REQUESTS; i++)
    for (uint32_t s = 0; s < a[i].samples; s++) {
      const struct us_output *x = &a[i].outputs[s], *y = &b[i].outputs[s];
      if (!x->logprobs != !y->logprobs)
        bad++;
      else if (x->logprobs && x->ids.count == y->ids.count)
        bad += memcmp(x->logprobs, y->logprobs, x->ids.count * sizeof *x->logprobs) != 0;
    }
  return bad;
}

static void check_rules(const struct models *m, uint32_t gpus, uint32_t ranks) {
  static const float rates[] = {0.7f};
  struct us_executor *ex = open_cuda(m, &(struct us_executor_cuda_options){.gpus = gpus, .ranks = ranks});
  char name[64], note[160];
  uint64_t bad = 0, bad_logprobs = 0, bad_rows = 0, runs = 0, accepted = 0, rounds = 0;
  snprintf(name, sizeof name, "%s, %u rank%s on %u GPU%s", m->name, ranks, ranks > 1 ? "s" : "", gpus,
           gpus > 1 ? "s" : "");
  for (uint32_t t = 0; t < 9; t++, runs++) {
    struct us_result plain[REQUESTS], own[REQUESTS], resident[REQUESTS];
    struct us_generate_stats a, b;
    struct plan p = {
        .block = 1, .batch = 8, .tokens = 28, .first = 7, .step = 13, .seed = 60 + t, .varied = true};
    generate(ex, &p, plain, NULL);
    p.block = 2 + t * 5 % (m->draft->shape.block - 1), p.batch = 1 + t * 3 % 8;
    p.rule = (enum us_verify_rule)((t + 1) % 3), p.adaptive = t / 3 % 2;
    if (t % 2) p.opt_plain = plain, p.accept = rates, p.accept_count = 1;
    by_passes(ex, &p, own, &a);
    generate(ex, &p, resident, &b);
    bad += differing(own, resident), bad_logprobs += differing_logprobs(own, resident);
    bad_rows += a.rows != b.rows || a.decode.rounds != b.decode.rounds ||
                memcmp(a.decode.histogram, b.decode.histogram, sizeof a.decode.histogram);
    accepted += b.decode.committed - b.decode.rounds, rounds += b.decode.rounds;
    release(plain), release(own), release(resident);
  }
  snprintf(note, sizeof note, "%llu rounds, %llu proposals accepted", (unsigned long long)rounds,
           (unsigned long long)accepted);
  record(name, "rules, filters, adaptive lengths: resident rounds equal the host's", runs * REQUESTS, bad,
         note);
  record(name, "log-probabilities of resident rounds equal the host's", runs * REQUESTS, bad_logprobs, "");
  record(name, "rows and accept lengths of resident rounds equal the host's", runs, bad_rows, "");
  ex->ops->free(ex);
}

/* Long contexts */

static void check_long(const struct models *m, uint32_t ranks) {
  static const float rates[] = {0.8f};
  static const uint32_t firsts[] = {1000, 8100, 32300};
  char name[64], note[96];
  struct us_executor *ex =
      open_cuda(m, &(struct us_executor_cuda_options){.ranks = ranks, .sequences = 4, .positions = 33792});
  snprintf(name, sizeof name, "%s, %u rank%s", m->name, ranks, ranks > 1 ? "s" : "");
  for (int i = 0; i < 3; i++) {
    struct us_result plain[REQUESTS], other[REQUESTS];
    struct plan p = {.block = 1,
                     .batch = 1,
                     .tokens = 96,
                     .first = firsts[i],
                     .step = 37,
                     .temperature = i == 1,
                     .seed = 5};
    double begun = now();
    generate(ex, &p, plain, NULL);
    uint64_t bad = 0;
    for (uint32_t k = 0; k < 2; k++) {
      p.block = k ? 16 : 8, p.batch = k ? 3 : 2, p.opt_plain = plain, p.accept = rates, p.accept_count = 1;
      generate(ex, &p, other, NULL);
      bad += differing(plain, other);
      release(other);
    }
    snprintf(note, sizeof note, "prompts of %u tokens and more, %.1f s", firsts[i], now() - begun);
    record(name, "long contexts: tokens equal plain", 2 * REQUESTS, bad, note);
    release(plain);
  }
  ex->ops->free(ex);
}

/* Samples */

/* Sample k of n is the last of k + 1, which owns its prompt's pages alone, one sequence at a time. */
static void check_samples(const struct models *m, struct us_executor *ex) {
  uint64_t bad = 0, checked = 0;
  for (int t = 0; t < 2; t++) {
    struct us_result together[REQUESTS], alone[REQUESTS];
    struct plan p = {.block = 8,
                     .batch = 8,
                     .tokens = 60,
                     .first = 60,
                     .step = 9,
                     .temperature = (float)t,
                     .seed = 9,
                     .samples = MOST_SAMPLES};
    if (p.block > m->draft->shape.block) p.block = m->draft->shape.block;
    generate(ex, &p, together, NULL);
    for (uint32_t k = 0; k < MOST_SAMPLES; k++) {
      p.samples = k + 1, p.batch = 1, p.block = 1;
      generate(ex, &p, alone, NULL);
      for (uint32_t i = 0; i < REQUESTS; i++, checked++)
        bad += !same_ids(&together[i].outputs[k], &alone[i].outputs[k]);
      release(alone);
    }
    for (uint32_t i = 0; t && i < REQUESTS; i++) /* drawn samples differ, or the comparison says little */
      bad += same_ids(&together[i].outputs[0], &together[i].outputs[1]);
    release(together);
  }
  record(m->name, "n samples share a prompt's pages and equal single runs", checked, bad, "");
}

/* Many rounds */

static double seconds_asked(void) {
  const char *text = getenv("US_EXACT_SECONDS");
  return text ? atof(text) : 10;
}

#define LATE_RUNS 6 /* of one plain one */

/* Random delays at every hand-off, batches, blocks, drafted and replayed proposals in turn, until the time is over. Rounds are counted
 * as the engine reported them; only those with delays. */
static void check_rounds(const struct models *m, uint32_t gpus, uint32_t ranks) {
  static const float rates[] = {0.75f};
  struct us_executor_cuda_options options = {.gpus = gpus, .ranks = ranks};
  struct us_executor *quick = open_cuda(m, &options);
  options.jitter = 2000;
  struct us_executor *late = open_cuda(m, &options);
  char name[96], note[128];
  snprintf(name, sizeof name, "%s, %u rank%s on %u GPU%s", m->name, ranks, ranks > 1 ? "s" : "", gpus,
           gpus > 1 ? "s" : "");
  double begun = now(), end = begun + seconds_asked();
  uint64_t passes = 0, bad = 0, checked = 0;
  for (uint32_t i = 0; now() < end; i++) {
    struct us_result plain[REQUESTS], other[REQUESTS];
    struct us_generate_stats stats;
    struct plan p = {.block = 1,
                     .batch = 8,
                     .tokens = 800,
                     .first = 5,
                     .step = 13,
                     .temperature = (float)(i & 1),
                     .seed = 1000 + i};
    generate(quick, &p, plain, NULL);
    for (uint32_t k = 0; k < LATE_RUNS && now() < end; k++) {
      p.block = 1 + (i * LATE_RUNS + k) * 3 % 8, p.batch = 1 + (i + k) % 3;
      p.opt_plain = p.block > 1 && k % 3 == 0 ? plain : NULL, p.accept = rates, p.accept_count = 1;
      generate(late, &p, other, &stats);
      bad += differing(plain, other), checked += REQUESTS, passes += stats.passes;
      release(other);
    }
    release(plain);
  }
  snprintf(note, sizeof note, "%llu rounds of the engine in %.1f s", (unsigned long long)passes,
           now() - begun);
  record(name, "rounds with random delays at every hand-off equal plain ones without", checked, bad, note);
  quick->ops->free(quick), late->ops->free(late);
}

/* Graphs */

/* Taken of the GPU, by all its programs. */
static double taken_mib(void) {
  size_t left = 0, total = 0;
  (void)cudaMemGetInfo(&left, &total);
  return (double)(total - left) / (1 << 20);
}

static void check_graphs(const struct models *m, uint32_t ranks) {
  static const float rates[] = {0.8f};
  struct us_executor_cuda_options options = {.ranks = ranks};
  struct us_result plain[REQUESTS], engine[REQUESTS], graph[REQUESTS];
  char name[64], note[160];
  snprintf(name, sizeof name, "%s, %u rank%s", m->name, ranks, ranks > 1 ? "s" : "");
  double nothing = taken_mib();
  struct plan p = {.block = 1, .batch = 8, .tokens = 24, .first = 5, .step = 3, .seed = 3};
  struct us_executor *ex = open_cuda(m, &options);
  generate(ex, &p, plain, NULL);
  p.block = 8, p.batch = 1;
  generate(ex, &p, engine, NULL);
  double with_engine = taken_mib();
  ex->ops->free(ex);
  options.mode = US_DEVICE_GRAPH;
  ex = open_cuda(m, &options);
  double before = taken_mib();
  generate(ex, &p, graph, NULL);
  snprintf(note, sizeof note,
           "MiB taken: %.0f at first, %.0f with the engine, %.0f before and %.0f with graphs and their loop",
           nothing, with_engine, before, taken_mib());
  uint64_t bad = differing(plain, engine) + differing(engine, graph);
  release(graph);
  p.opt_plain = plain, p.accept = rates, p.accept_count = 1, p.batch = 2, p.temperature = 0;
  generate(ex, &p, graph, NULL);
  bad += differing(plain, graph);
  ex->ops->free(ex);
  release(plain), release(engine), release(graph);
  record(name, "rounds as graphs equal the engine's", 3 * REQUESTS, bad, note);
}

/* Memory that a graph would take is gone: the call says so, or finds room; nothing breaks, and it works when there is room again. */
static void check_full(const struct models *m) {
  struct us_executor *ex =
      open_cuda(m, &(struct us_executor_cuda_options){.ranks = 4, .mode = US_DEVICE_GRAPH});
  struct us_err err = {0};
  void *held[64];
  size_t count = 0;
  for (size_t bytes = (size_t)1 << 36; bytes >= (size_t)1 << 21 && count < 64;)
    if (cudaMalloc(&held[count], bytes) == cudaSuccess)
      count++;
    else
      bytes /= 2;
  (void)cudaGetLastError();
  int32_t prompt[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  struct us_request request = {.prompt = prompt, .prompt_count = 9, .max_tokens = 40, .seed = 1};
  struct us_generate_options options = {.block = 8, .batch = 1};
  struct us_result first, second;
  enum us_status status = us_generate(ex, &request, 1, &options, &first, NULL, &err);
  char note[200];
  snprintf(note, sizeof note, "%.150s", status == US_OK ? "there was room" : err.message);
  for (size_t i = 0; i < count; i++) (void)cudaFree(held[i]);
  bool bad = status != US_OK && status != US_ERR_MEMORY;
  if (status == US_OK) us_result_release(&first);
  need(us_generate(ex, &request, 1, &options, &second, NULL, &err), &err, "with room again");
  us_result_release(&second);
  record("deep, 4 ranks", "a graph that the GPU has no room for is an error and no more", 1, bad, note);
  ex->ops->free(ex);
}

/* Ends */

static int looks;
static bool interrupt(void) {
  return --looks == 0;
}

/* An interrupt in the midst of a launch: the call says so, and the executor goes on afterwards as if nothing had been. */
static void check_interrupt(const struct models *m, struct us_executor *ex) {
  struct us_result before[REQUESTS], cut[REQUESTS], after[REQUESTS];
  struct plan p = {.block = 8, .batch = 4, .tokens = 200, .first = 5, .step = 3, .temperature = 1, .seed = 8};
  generate(ex, &p, before, NULL);
  uint64_t bad = 0;
  for (int at = 10; at <= 1000; at *= 10) {
    struct plan interrupted = p;
    interrupted.interrupted = interrupt, interrupted.expected = US_INTERRUPTED, looks = at;
    generate(ex, &interrupted, cut, NULL);
    bad += looks > 0;
    if (looks > 0) release(cut);
    generate(ex, &p, after, NULL);
    bad += differing(before, after);
    release(after);
  }
  release(before);
  record(m->name, "an interrupt ends a launch, and nothing is left of it", 3 * REQUESTS, bad, "");
}

static bool take_none(void *arg, const struct us_rounds_report *report) {
  return true;
}

/* Lines that the watchdog says, and those that name what was planted. */
static uint32_t lines, planted;
static void count_line(void *arg, const char *line) {
  lines++, planted += strstr(line, "waits for a rank's partial sums") != NULL;
}

/* Rank 1's partial sums go where nobody looks: the watchdog ends the launch and says who waits for what. The context is gone then, so
 * this is a program of its own. */
static void check_hang(void) {
  struct models m = open_random("wide", widen);
  struct us_executor_cuda_options options = {
      .gpus = 1, .ranks = 2, .sequences = 2, .timeout_ns = 300000000, .say = count_line};
  struct us_executor_cuda_parts parts;
  struct us_device_loop *loop;
  struct us_executor *ex;
  struct us_bench_place place;
  struct us_err err = {0};
  void *nowhere;
  need(us_executor_create_cuda(m.model, m.draft, &options, &ex, &err), &err, "wide");
  bool ours = us_executor_cuda_parts(ex, &parts);
  struct us_device_loop_options shape = {.batch = 1, .block = 1};
  need(us_device_loop_create(&parts, &shape, &loop, &err), &err, "loop");
  struct us_device_group *group = us_device_loop_group(loop);
  const struct us_engine_rank *rank = &group->schedule[1]->rank;
  size_t bytes = (size_t)rank->slots * rank->addends * US_ENGINE_ROWS * rank->D * sizeof(float);
  need(us_cuda_status(cudaMalloc(&nowhere, bytes), "memory", &err), &err, "nowhere");
  group->schedule[1]->rank.exchange[0] = nowhere;
  need(us_bench_place(ex, 1, 4, 64, false, 1, &place, &err), &err, "place");
  place.sequence[0].limit = 40;
  struct us_rounds rounds = {
      .sequences = place.sequence, .n = 1, .batch = 1, .block = 1, .on_round = take_none};
  lines = planted = 0;
  double begun = now();
  enum us_status status = us_device_loop_run(loop, &rounds, &err);
  double took = now() - begun;
  bool named = strstr(err.message, "the engine hangs") && strstr(err.message, "GPU 0 SM") &&
               strstr(err.message, "layer 0");
  char note[330];
  snprintf(note, sizeof note, "%.1f s, %u lines, %.250s", took, lines, err.message);
  record("wide, 2 ranks", "a planted hang is reported with role, operation, layer and counts", 1,
         !(ours && status == US_ERR_DEVICE && named && planted && took < 5), note);
  us_bench_unplace(&place);
  us_device_loop_free(loop);
  ex->ops->free(ex);
  close_models(&m);
}

/* Cases */

static bool asked(int argc, char **argv, const char *name) {
  for (int i = 1; i < argc; i++)
    if (!strcmp(argv[i], name)) return true;
  return argc == 1;
}

/* Four layers, one rank: two prompts, and some rounds of 8 rows with a drafter, greedy, then by law with filters, log-probabilities and
 * adaptive lengths, twice. */
static void run_small(struct models m) {
  struct us_executor *ex = open_cuda(&m, NULL);
  struct us_result plain[REQUESTS], other[REQUESTS];
  struct plan p = {.block = 1, .batch = 2, .tokens = 3, .first = 3, .step = 6, .seed = 2, .requests = 2};
  generate(ex, &p, plain, NULL);
  p.block = 8;
  generate(ex, &p, other, NULL);
  record(m.name, "a few rounds equal plain ones", p.requests, differing(plain, other), "");
  release(plain), release(other);
  p.rule = US_VERIFY_BLOCK, p.varied = p.adaptive = true, p.requests = 3;
  generate(ex, &p, plain, NULL);
  generate(ex, &p, other, NULL);
  record(m.name, "a few rounds by law, twice the same", p.requests, differing(plain, other), "");
  release(plain), release(other);
  ex->ops->free(ex);
  close_models(&m);
}

static void run_model(int argc, char **argv, const struct models *m) {
  struct us_executor *ex = open_cuda(m, NULL);
  for (int t = 0; asked(argc, argv, "accepts") && t < 2; t++) check_accepts(m, ex, (float)t);
  if (asked(argc, argv, "blocks")) check_blocks(m, ex);
  if (asked(argc, argv, "samples")) check_samples(m, ex);
  if (asked(argc, argv, "ends")) check_interrupt(m, ex);
  ex->ops->free(ex);
  uint32_t most = m->model->shape.hidden >= 256 ? 4 : 1; /* pico's heads are two */
  for (uint32_t ranks = most; asked(argc, argv, "rules") && ranks; ranks /= 2) check_rules(m, 1, ranks);
}

/* Drafters that read a head of their own: their proposals differ, the tokens do not. */
static void run_heads(void) {
  struct models m = open_random("wide", widen), pico;
  give_head(&m, US_FORMAT_MXFP4, "wide, own head in mxfp4");
  struct us_executor *ex = open_cuda(&m, &(struct us_executor_cuda_options){.ranks = 2});
  for (int t = 0; t < 2; t++) check_accepts(&m, ex, (float)t);
  check_blocks(&m, ex);
  ex->ops->free(ex);
  close_models(&m);
  if (!open_pico(&pico)) return;
  give_head(&pico, US_FORMAT_MXFP4, "pico, own head in mxfp4");
  ex = open_cuda(&pico, NULL);
  check_blocks(&pico, ex);
  ex->ops->free(ex);
  close_models(&pico);
}

/* A drafter whose slots are chosen one after the other. */
static void run_markov(void) {
  struct models m = open_markov("wide, Markov head", widen);
  struct us_executor *ex = open_cuda(&m, &(struct us_executor_cuda_options){.ranks = 2});
  check_blocks(&m, ex);
  check_samples(&m, ex);
  ex->ops->free(ex);
  for (uint32_t ranks = 4; ranks; ranks /= 2) check_rules(&m, 1, ranks);
  close_models(&m);
  m = open_markov("short, Markov head", shorten);
  check_rounds(&m, 1, 2);
  close_models(&m);
}

/* A rank a GPU: every accept length, blocks and batches, very many rounds under delays, and a Markov head by every rule. */
static void run_gpus(uint32_t gpus) {
  struct models m = open_random("wide", widen);
  struct us_executor *ex = open_cuda(&m, &(struct us_executor_cuda_options){.gpus = gpus, .ranks = gpus});
  for (int t = 0; t < 2; t++) check_accepts(&m, ex, (float)t);
  check_blocks(&m, ex);
  ex->ops->free(ex);
  close_models(&m);
  m = open_random("short", shorten);
  check_rounds(&m, gpus, gpus);
  close_models(&m);
  m = open_markov("wide, Markov head", widen);
  check_rules(&m, gpus, gpus);
  close_models(&m);
}

int main(int argc, char **argv) {
  signal(SIGALRM, hung);
  alarm(watchdog_seconds(140));
  if (argc > 1 && asked(argc, argv, "small")) {
    run_small(open_random("tiny-pro", NULL));
    run_small(open_markov("tiny-pro, Markov head", NULL));
    return any_failed ? 1 : 0;
  }
  if (argc > 1 && asked(argc, argv, "hang")) {
    check_hang();
    return any_failed ? 1 : 0;
  }
  for (uint32_t gpus = 2; gpus <= 4; gpus *= 2) {
    char name[16];
    snprintf(name, sizeof name, "gpus%u", gpus);
    if (argc == 1 || !asked(argc, argv, name)) continue;
    run_gpus(gpus);
    if (argc == 2) return any_failed ? 1 : 0;
  }
  struct models wide = open_random("wide", widen), pico;
  bool bundled = open_pico(&pico);
  run_model(argc, argv, &wide);
  if (bundled) run_model(argc, argv, &pico), close_models(&pico);
  close_models(&wide);
  if (asked(argc, argv, "heads")) run_heads();
  if (asked(argc, argv, "markov")) run_markov();
  if (asked(argc, argv, "rounds")) {
    struct models m = open_random("short", shorten);
    for (uint32_t ranks = 1; ranks <= 4; ranks *= 4) check_rounds(&m, 1, ranks);
    close_models(&m);
  }
  if (asked(argc, argv, "graphs")) {
    struct models deep = open_random("deep", deepen);
    for (uint32_t ranks = 1; ranks <= 4; ranks *= 2) check_graphs(&deep, ranks);
    check_full(&deep);
    close_models(&deep);
  }
  if (asked(argc, argv, "long")) {
    struct models m = open_random("long", lengthen);
    for (uint32_t ranks = 1; ranks <= 2; ranks *= 2) check_long(&m, ranks);
    close_models(&m);
  }
  return any_failed ? 1 : 0;
}
