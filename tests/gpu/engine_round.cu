/* engine_round.cu: the engine's decisions equal the CPU's: SELECT gives us_sample_token's tokens for any number of ranks and
 * blocks, ACCEPT does to a round what decode/generate.c does; what the host wants reaches every rank in the same round.
 *
 * Contents: select; accept; wishes; times.
 */
#include "decode/verify.h"
#include "kernels/engine/round.h"
#include "round_lab.h"

#include <cstring>

static uint32_t word(uint32_t a, uint32_t b, uint32_t c) {
  return us_philox_token(us_philox_key(20261120), a, b, c, 40);
}

/* Ranks and blocks a rank. */
static const uint32_t places[][2] = {{1, 132}, {1, 16}, {1, 5}, {2, 66}, {2, 8}, {4, 33}, {4, 3}};

/* ---- select ------------------------------------------------------------------------------------------------------- */

enum { TILES = 2, ROWS = TILES * 8, BLOCK = 2 };
enum logit_kind { NORMAL, TIES, EQUAL, BROKEN, LOGIT_KINDS };

/* What the sequences want: some draw, and of some the draw is filtered; all are filtered; the likeliest token; draws that nothing filters. */
enum want { MIXED, FILTERED, LIKELIEST, UNFILTERED, WANTS };
static const char *const want_names[WANTS] = {"mixed", "filtered", "greedy", "unfiltered"};
static const struct us_sampling samplings[2][US_ENGINE_SEQUENCES] = {
    {{0.0f, 0, 0.0f, 0.0f},
     {1.0f, 0, 1.0f, 0.0f},
     {0.7f, 0, 0.0f, 0.0f},
     {0.001f, 0, 0.0f, 0.0f},
     {1e6f, 0, 0.0f, 0.0f},
     {0.0f, 5, 0.5f, 0.1f},
     {1.0f, 0, 0.95f, 0.0f},
     {3.0f, 0, 0.0f, 0.0f}},
    {{0.7f, 40, 0.0f, 0.0f},
     {1.0f, 0, 0.95f, 0.0f},
     {1.3f, 0, 0.0f, 0.05f},
     {0.8f, 50, 0.9f, 0.02f},
     {50.0f, 0, 0.5f, 0.0f},
     {1e6f, 300, 0.99f, 0.999f},
     {0.001f, 2, 0.3f, 0.0f},
     {1.0f, 511, 0.0f, 1.0f}},
};

static struct us_sampling sampling_of(enum want want, uint32_t sequence) {
  struct us_sampling s = samplings[want == FILTERED][sequence];
  if (want == LIKELIEST) s.temperature = 0;
  if (want == UNFILTERED) s.top_k = 0, s.top_p = s.min_p = 0;
  return s;
}

static float gaussian(uint32_t a, uint32_t b) {
  float sum = -6.0f;
  for (uint32_t i = 0; i < 3; i++) {
    uint32_t w[4];
    us_philox_quad(us_philox_key(11), a, b, i, 2, w);
    for (uint32_t v : w) sum += us_uniform(v);
  }
  return sum;
}

static void make_logits(enum logit_kind kind, uint32_t N, float *logits) {
  for (uint32_t row = 0; row < ROWS; row++) {
    float *x = logits + (size_t)row * N;
    for (uint32_t i = 0; i < N; i++) {
      x[i] = 3.0f * gaussian(row + 100 * kind, i);
      if (kind == TIES) x[i] = (float)(int)(x[i] * 0.7f);
      if (kind == EQUAL) x[i] = -2.5f;
      if (kind == BROKEN && word(row, i, 1) % 3 == 0) x[i] = word(row, i, 2) % 2 ? NAN : -INFINITY;
      if (kind == BROKEN && row == 4) x[i] = i % 2 ? NAN : -INFINITY; /* nothing to draw */
    }
    if (kind == BROKEN && row == 9) x[N / 2] = INFINITY;
  }
}

/* 8 sequences of two rows, active only in the eyes of SELECT: ACCEPT leaves them as they are. */
static void make_rows(enum want want, struct us_engine_state *state) {
  *state = {};
  state->block = BLOCK;
  for (uint32_t row = 0; row < US_ENGINE_MAX_ROWS; row++)
    state->target[row] = state->draft[row] = state->context[row] = us_engine_no_row();
  for (uint32_t row = 0; row < ROWS; row++) {
    struct us_engine_sequence *s = &state->sequence[row / BLOCK];
    s->seed = 77 + row / BLOCK, s->sample = row % 3, s->sampling = sampling_of(want, row / BLOCK);
    state->target[row] = {(int32_t)row, 1000 + 7 * row, row / BLOCK, row % BLOCK};
    state->draft[row] = state->target[row];
    state->proposal[row] = state->drawn[row] = -7;
  }
  state->target[5].sequence = US_ENGINE_NONE;
}

static int32_t expected_token(const struct us_engine_state *state, uint32_t row, const float *x, uint32_t N) {
  const struct us_engine_row *at = &state->target[row];
  if (at->sequence == US_ENGINE_NONE) return -7;
  const struct us_engine_sequence *s = &state->sequence[at->sequence];
  if (!isfinite(x[us_sample_argmax(x, N)])) return -1;
  return us_sample_token(x, N, &s->sampling, us_noise_target(s->seed, at->position + 1, s->sample));
}

/* Rows of the last round on every rank against the CPU's. */
static void compare_rows(struct round_lab *lab, bool draft, const int32_t *expected, const char *what) {
  struct us_engine_state state;
  uint64_t bad = 0, first = 0;
  for (uint32_t r = 0; r < lab->ranks; r++) {
    lab_pull(lab, r, &state);
    for (uint32_t row = 0; row < ROWS; row++) {
      int32_t got = draft ? state.proposal[row] : state.drawn[row];
      if (got == expected[row]) continue;
      if (!bad++) first = row;
      fprintf(stderr, "%s: rank %u row %u: %d, expected %d\n", what, r, row, got, expected[row]);
    }
  }
  us_gpu_report(what, ROWS * lab->ranks, bad, first);
}

static void select_case(uint32_t N, enum logit_kind kind, const float *logits, const uint32_t place[2],
                        const int32_t expected[WANTS][ROWS]) {
  struct round_lab lab;
  struct us_engine_op ops[LAB_MAX_OPS];
  struct us_engine_state state;
  char what[128];
  lab_open(&lab, place[0], place[1], N, TILES);
  lab_logits(&lab, logits);
  uint32_t count = lab_selects(&lab, false, TILES, ops);
  ops[count] = lab_accept(&lab, count - 1);
  for (int want = MIXED; want < WANTS; want++) {
    if (us_gpu_patience() && want >= LIKELIEST && kind != TIES) continue;
    make_rows((enum want)want, &state);
    state.round = 100 * want;
    lab_push(&lab, &state);
    lab_run(&lab, ops, count + 1, 4, LAB_KEEP_ON | (place[1] % 2 ? LAB_JITTER : 0));
    snprintf(what, sizeof what, "select: %s, vocabulary %u, logits %d, ranks %u, blocks %u", want_names[want],
             N, kind, place[0], place[1]);
    compare_rows(&lab, false, expected[want], what);
  }
  lab_close(&lab);
}

/* The drafter's: anchors and replayed rows are left alone, and a proposal is the target row's token. */
static void draft_case(uint32_t N, const float *logits, enum want want, const uint32_t place[2]) {
  struct round_lab lab;
  struct us_engine_op ops[LAB_MAX_OPS];
  struct us_engine_state state;
  int32_t expected[ROWS];
  lab_open(&lab, place[0], place[1], N, TILES);
  lab_logits(&lab, logits);
  uint32_t count = lab_selects(&lab, true, TILES, ops);
  ops[count] = lab_accept(&lab, count - 1);
  make_rows(want, &state);
  state.sequence[3].replay = &state.proposal[0]; /* any */
  for (uint32_t row = 0; row < ROWS; row++) {
    bool drafted = state.draft[row].slot && state.draft[row].sequence != 3;
    expected[row] = drafted ? us_sample_argmax(logits + (size_t)row * N, N) : -7;
  }
  lab_push(&lab, &state);
  lab_run(&lab, ops, count + 1, 3, LAB_KEEP_ON | LAB_JITTER);
  compare_rows(&lab, true, expected, "select: proposals");
  struct us_engine_state got;
  lab_pull(&lab, lab.ranks - 1, &got);
  uint64_t bad = 0, first = 0;
  for (uint32_t row = 0; row < ROWS; row++)
    if (got.target[row].token != (expected[row] == -7 ? (int32_t)row : expected[row]) && !bad++) first = row;
  us_gpu_report("select: target rows of proposals", ROWS, bad, first);
  lab_close(&lab);
}

static void test_select(void) {
  static const uint32_t sizes[] = {512, 4096, 5003, 152576};
  for (uint32_t N : sizes) {
    if (us_gpu_patience() && N > 512) break;
    std::vector<float> logits((size_t)ROWS * N);
    for (int kind = NORMAL; kind < LOGIT_KINDS; kind++) {
      make_logits((enum logit_kind)kind, N, logits.data());
      int32_t expected[WANTS][ROWS];
      for (int want = MIXED; want < WANTS; want++) {
        struct us_engine_state state;
        make_rows((enum want)want, &state);
        for (uint32_t row = 0; row < ROWS; row++)
          expected[want][row] = expected_token(&state, row, &logits[(size_t)row * N], N);
      }
      for (const uint32_t *place : places)
        select_case(N, (enum logit_kind)kind, logits.data(), place, expected);
      draft_case(N, logits.data(), FILTERED, places[kind + 2]);
      draft_case(N, logits.data(), LIKELIEST, places[kind + 2]);
    }
  }
}

/* ---- accept ------------------------------------------------------------------------------------------------------- */

/* A sequence in the middle of a round: proposals that mostly equal what is drawn, at times a stop token, the limit, or a row that
 * is not finite. `t` numbers the trial. */
static void make_round(uint32_t t, uint32_t i, uint32_t N, const int32_t *replay,
                       struct us_engine_state *state) {
  struct us_engine_sequence *s = &state->sequence[i];
  uint32_t w[4];
  us_philox_quad(us_philox_key(5), t, i, 0, 1, w);
  s->active = w[0] % 8 != 0;
  s->id = 100 * t + i, s->anchor = (int32_t)(w[1] % N), s->position = 50 + w[2] % 100;
  s->limit = s->position + 1 + (w[3] % 3 ? w[3] / 3 % 200 : w[3] / 3 % state->block);
  s->sample = i, s->seed = t;
  s->most_drafts = w[1] % 5 ? state->block - 1 : w[1] / 5 % state->block;
  s->stop_count = w[2] % 4, s->replay = w[0] % 3 ? NULL : replay, s->replay_first = 45, s->replay_count = 150;
  for (uint32_t j = 0; j < 4; j++) s->stop[j] = (int32_t)(1 + j);
  for (uint32_t j = 0; j < 16; j++) s->accept[j] = j % 2 ? 0.5f : 0.9f;
  us_engine_begin_round(state, i, N);
  for (uint32_t slot = 0; s->active && slot <= s->drafts; slot++) {
    uint32_t at = i * state->block + slot, v[4];
    us_philox_quad(us_philox_key(6), t, i, slot, 1, v);
    state->drawn[at] = v[0] % 40 == 0 ? -1 : (int32_t)(v[1] % N);
    if (slot == s->drafts) continue;
    int32_t *proposal = &state->target[at + 1].token;
    *proposal = v[2] % 8 ? (int32_t)(v[1] % N) : (int32_t)(v[3] % N);
  }
}

/* One round of one sequence as decode/generate.c goes about it: verify all, then commit token by token. */
static void expect_sequence(struct us_engine_state *state, uint32_t i, uint32_t N,
                            struct us_engine_event *ret_event) {
  struct us_engine_sequence *s = &state->sequence[i];
  uint32_t first = i * state->block;
  int32_t proposals[16];
  struct us_engine_event e = {};
  for (uint32_t j = 0; j < s->drafts; j++) proposals[j] = state->target[first + 1 + j].token;
  e.id = s->id, e.round = state->round, e.drafts = s->drafts;
  e.accepted = us_verify_match(proposals, state->drawn + first, s->drafts);
  bool broken = state->drawn[first + e.accepted] < 0;
  for (uint32_t j = 0; j < e.accepted + !broken && !e.finish; j++) {
    e.token[e.count++] = state->drawn[first + j];
    for (uint32_t k = 0; k < s->stop_count; k++)
      if (s->stop[k] == e.token[j]) e.finish = US_ENGINE_STOP;
    if (!e.finish && s->position + 1 + j >= s->limit) e.finish = US_ENGINE_LENGTH;
  }
  if (broken) { /* before any of the round is committed */
    e.finish = US_ENGINE_BROKEN, e.count = e.accepted;
    memcpy(e.token, state->drawn + first, e.count * sizeof *e.token);
  }
  if (!e.finish && state->cancel >> i & 1) e.finish = US_ENGINE_CANCELLED;
  *ret_event = e;
  if (e.finish) {
    s->active = 0;
    return;
  }
  s->position += e.accepted + 1, s->committed = e.accepted + 1, s->anchor = e.token[e.accepted];
  uint32_t left = s->limit - s->position;
  s->drafts = s->most_drafts < left - 1 ? s->most_drafts : left - 1;
}

/* The rows of the next round, from the definitions in engine.h. */
static uint64_t wrong_rows(const struct us_engine_state *got, const struct us_engine_state *want,
                           const int32_t *replay, uint32_t N) {
  uint64_t bad = 0;
  for (uint32_t row = 0; row < US_ENGINE_SEQUENCES * want->block; row++) {
    const struct us_engine_sequence *s = &want->sequence[row / want->block];
    uint32_t slot = row % want->block, here = s->position + slot;
    bool there = s->active && slot <= s->drafts, context = s->active && slot < s->committed;
    const struct us_engine_row *t = &got->target[row], *d = &got->draft[row], *c = &got->context[row];
    bad += (t->sequence != US_ENGINE_NONE) != there ||
           (d->sequence != US_ENGINE_NONE) != (there && s->drafts) ||
           (c->sequence != US_ENGINE_NONE) != context;
    if (context)
      bad += c->position != here - s->committed || c->slot != slot || c->sequence != row / want->block;
    if (!there) continue;
    bad += t->position != here || t->slot != slot || t->sequence != row / want->block;
    if (slot == 0) bad += t->token != s->anchor;
    if (s->drafts)
      bad += d->position != here || d->slot != slot || d->token != (slot ? US_ENGINE_MASK : s->anchor);
    if (!slot || !s->replay) continue;
    uint32_t at = here - s->replay_first;
    bad += t->token !=
           us_noise_corrupt(us_noise_round(s->seed, s->position, slot - 1, s->sample, US_STREAM_CORRUPT),
                            at < s->replay_count ? replay[at] : 0, s->accept[slot - 1], N);
  }
  return bad;
}

static bool same_event(const struct us_engine_event *a, const struct us_engine_event *b) {
  return a->id == b->id && a->round == b->round && a->count == b->count && a->finish == b->finish &&
         a->accepted == b->accepted && a->drafts == b->drafts &&
         !memcmp(a->token, b->token, a->count * sizeof *a->token);
}

static uint64_t wrong_sequences(const struct us_engine_state *got, const struct us_engine_state *want) {
  uint64_t bad = 0;
  for (uint32_t i = 0; i < US_ENGINE_SEQUENCES; i++) {
    const struct us_engine_sequence *a = &got->sequence[i], *b = &want->sequence[i];
    bad += a->active != b->active;
    if (b->active)
      bad += a->anchor != b->anchor || a->position != b->position || a->drafts != b->drafts ||
             a->committed != b->committed;
  }
  return bad + (got->stop != want->stop) + (got->live != want->live) + (got->round != want->round) +
         (got->events != want->events);
}

static void accept_cases(const uint32_t place[2], uint32_t block, uint32_t trials) {
  enum { N = 211, RECORD = 150 };
  struct round_lab lab;
  lab_open(&lab, place[0], place[1], N, 1);
  struct us_engine_op op = lab_accept(&lab, US_ENGINE_NONE);
  int32_t record[RECORD], *replay;
  for (uint32_t i = 0; i < RECORD; i++) record[i] = (int32_t)(word(i, 3, 5) % N);
  US_CUDA(cudaMalloc(&replay, sizeof record));
  US_CUDA(cudaMemcpy(replay, record, sizeof record, cudaMemcpyHostToDevice));
  uint64_t bad[3] = {0, 0, 0}, first[3] = {0, 0, 0}, events = 0;
  uint32_t finishes[5] = {0};
  for (uint32_t t = 0; t < trials; t++) {
    struct us_engine_state state = {}, got;
    state.block = block, state.round = 7 * t, state.events = (uint32_t)events;
    state.park = t % 5 == 0, state.cancel = t % 3 ? 0 : word(t, 1, 1) & 255;
    for (uint32_t i = 0; i < US_ENGINE_SEQUENCES; i++) make_round(t, i, N, record, &state);
    for (struct us_engine_sequence &s : state.sequence) s.replay = s.replay ? replay : NULL;
    lab_push(&lab, &state);
    lab_run(&lab, &op, 1, 1, LAB_JITTER);
    bool ended = false;
    for (uint32_t i = 0; i < US_ENGINE_SEQUENCES; i++) {
      struct us_engine_event want, event;
      if (!state.sequence[i].active) continue;
      expect_sequence(&state, i, N, &want);
      ended |= want.finish != 0, finishes[want.finish]++;
      if ((!us_engine_event_take(lab.mailbox, (uint32_t)events, &event) || !same_event(&event, &want)) &&
          !bad[0]++)
        first[0] = t;
      events++, state.live += want.finish == 0;
    }
    state.stop = ended || !state.live || state.park, state.round++, state.events = (uint32_t)events;
    for (uint32_t r = 0; r < lab.ranks; r++) {
      lab_pull(&lab, r, &got);
      uint64_t rows = wrong_rows(&got, &state, record, N), sequences = wrong_sequences(&got, &state);
      if (rows && !bad[1]) first[1] = t;
      if (sequences && !bad[2]) first[2] = t;
      bad[1] += rows, bad[2] += sequences;
    }
  }
  us_gpu_report("accept: events", events, bad[0], first[0]);
  us_gpu_report("accept: rows of the next round", trials, bad[1], first[1]);
  us_gpu_report("accept: sequences", trials, bad[2], first[2]);
  us_gpu_report("accept: every way to finish occurred", 5,
                !finishes[0] + !finishes[1] + !finishes[2] + !finishes[3] + !finishes[4], 0);
  struct us_engine_event none;
  us_gpu_report("accept: no event that nobody wrote", 1,
                us_engine_event_take(lab.mailbox, (uint32_t)events, &none), 0);
  US_CUDA(cudaFree(replay));
  lab_close(&lab);
}

/* ---- wishes ------------------------------------------------------------------------------------------------------- */

/* Eight sequences that would go on for ever, one row each. */
static void make_endless(struct us_engine_state *state, const struct us_sampling *sampling, uint32_t drafts,
                         uint32_t count) {
  *state = {};
  state->block = drafts + 1;
  for (uint32_t row = 0; row < US_ENGINE_MAX_ROWS; row++)
    state->target[row] = state->draft[row] = state->context[row] = us_engine_no_row();
  for (uint32_t i = 0; i < count; i++) {
    struct us_engine_sequence *s = &state->sequence[i];
    s->active = 1, s->id = i, s->limit = 1u << 30, s->seed = i, s->sampling = *sampling,
    s->most_drafts = drafts;
    us_engine_begin_round(state, i, 1000);
  }
}

static void test_wishes(const uint32_t place[2]) {
  const struct us_sampling greedy = {0.0f, 0, 0.0f, 0.0f};
  struct round_lab lab;
  struct us_engine_op ops[LAB_MAX_OPS];
  struct us_engine_state state, got;
  lab_open(&lab, place[0], place[1], 1000, 1);
  std::vector<float> logits(8 * 1000, 1.0f);
  lab_logits(&lab, logits.data());
  lab_selects(&lab, false, 1, ops);
  ops[1] = lab_accept(&lab, 0);
  uint64_t bad = 0;
  for (uint32_t wish = 0; wish < 4; wish++) { /* nothing, park, cancel, a ring whose reader is late */
    make_endless(&state, &greedy, 0, 8);
    state.round = 1000 * wish;
    lab.mailbox->park = wish == 1, lab.mailbox->cancel = wish == 2 ? 0x24 : 0;
    state.events = wish == 3 ? US_ENGINE_EVENTS - 30 : 0;
    lab_push(&lab, &state);
    lab_run(&lab, ops, 2, 20, LAB_JITTER);
    for (uint32_t r = 0; r < lab.ranks; r++) {
      lab_pull(&lab, r, &got);
      static const uint32_t rounds[] = {20, 1, 1, 3}, stop[] = {0, 1, 1, 1}, live[] = {8, 8, 6, 8};
      bad += got.round - state.round != rounds[wish] || got.stop != stop[wish] || got.live != live[wish];
      bad += wish == 2 && (got.sequence[2].active || got.sequence[5].active);
      if (bad)
        fprintf(stderr, "wish %u rank %u: rounds %u stop %u live %u\n", wish, r, got.round - state.round,
                got.stop, got.live);
    }
  }
  us_gpu_report("wishes: park, cancel and a late reader reach every rank", 4, bad, 0);
  lab_close(&lab);
}

/* ---- times -------------------------------------------------------------------------------------------------------- */

/* One row tile of one sequence of 8 rows, behind an ACCEPT as ACCEPT is behind it. */
static void time_case(const char *name, uint32_t ranks, uint32_t N, const struct us_sampling *opt_sampling) {
  const struct us_sampling greedy = {0.0f, 0, 0.0f, 0.0f};
  struct round_lab lab;
  struct us_engine_op ops[LAB_MAX_OPS];
  struct us_engine_state state;
  enum { ROUNDS = 300 };
  lab_open(&lab, ranks, 132 / ranks, N, 1);
  std::vector<float> logits(8 * (size_t)N);
  for (uint32_t i = 0; i < N; i++) logits[i] = 3.0f * gaussian(1, i);
  for (uint32_t row = 1; row < 8; row++) memcpy(&logits[(size_t)row * N], logits.data(), N * sizeof(float));
  lab_logits(&lab, logits.data());
  make_endless(&state, opt_sampling ? opt_sampling : &greedy, 7, 1);
  lab_push(&lab, &state);
  ops[0] = lab_accept(&lab, US_ENGINE_NONE);
  double accept = lab_run(&lab, ops, 1, ROUNDS, LAB_KEEP_ON);
  lab_selects(&lab, !opt_sampling, 1, ops);
  ops[1] = lab_accept(&lab, 0);
  double both = lab_run(&lab, ops, 2, ROUNDS, LAB_KEEP_ON);
  printf(
      "{\"measure\": \"%s\", \"vocabulary\": %u, \"ranks\": %u, \"select_us\": %.2f, \"accept_us\": %.2f}\n",
      name, N, ranks, both - accept, accept);
  fflush(stdout);
  lab_close(&lab);
}

static void measure(void) {
  const struct us_sampling greedy = {0.0f, 0, 0.0f, 0.0f}, warm = {1.0f, 0, 0.0f, 0.0f},
                           top_p = {1.0f, 0, 0.95f, 0.0f}, top_k = {0.7f, 40, 0.0f, 0.0f},
                           all = {0.8f, 50, 0.9f, 0.02f};
  for (uint32_t ranks = 1; ranks <= 4; ranks *= 4) {
    time_case("proposals", ranks, 38144, NULL);
    time_case("greedy", ranks, 38144, &greedy);
    time_case("temperature", ranks, 38144, &warm);
    time_case("greedy", ranks, 152576, &greedy);
    time_case("temperature", ranks, 152576, &warm);
    time_case("top-p", ranks, 152576, &top_p);
    time_case("top-k", ranks, 152576, &top_k);
    time_case("top-k, top-p, min-p", ranks, 152576, &all);
  }
}

int main() {
  us_gpu_begin();
  us_gpu_watchdog(60);
  test_select();
  for (const uint32_t *place : places)
    accept_cases(place, place[1] % 2 ? 16 : 8, us_gpu_patience() ? 24 : 120);
  for (const uint32_t *place : places) test_wishes(place);
  if (!us_gpu_patience()) measure();
  return us_gpu_status();
}
