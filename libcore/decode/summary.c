/* summary.c: what recorded runs show, scenario by scenario. */
#include "decode/summary.h"

#include "decode/answer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static enum us_status find_group(struct us_summary *summary, const char *scenario,
                                 struct us_summary_group **ret_group, struct us_err *err) {
  struct us_summary_group fresh = {0};
  snprintf(fresh.scenario, sizeof fresh.scenario, "%s", scenario ? scenario : "");
  for (size_t i = 0; i < summary->n; i++) {
    *ret_group = &summary->groups[i];
    if (strcmp((*ret_group)->scenario, fresh.scenario) == 0) return US_OK;
  }
  struct us_summary_group *groups = realloc(summary->groups, (summary->n + 1) * sizeof *groups);
  if (!groups) return us_err_memory(err, "scenarios", (summary->n + 1) * sizeof *groups);
  summary->groups = groups;
  groups[summary->n] = fresh;
  *ret_group = &groups[summary->n++];
  return US_OK;
}

static void add(struct us_summary_group *g, const struct us_run_entry *e, bool exact) {
  const struct us_decode_stats *s = &e->stats;
  double committed = (double)s->committed, rounds = (double)s->rounds;
  g->entries++;
  g->tokens += e->count;
  g->loops += e->finish == US_FINISH_LOOP;
  g->answered += e->answer != NULL;
  g->exact += exact;
  g->stats.rounds += s->rounds;
  g->stats.committed += s->committed;
  g->stats.seconds += s->seconds;
  g->stats.first_token_seconds += s->first_token_seconds;
  for (int i = 0; i < US_MAX_BLOCK; i++) {
    g->stats.offered[i] += s->offered[i];
    g->stats.accepted[i] += s->accepted[i];
    g->stats.histogram[i] += s->histogram[i];
  }
  g->squares_committed += committed * committed;
  g->squares_rounds += rounds * rounds;
  g->cross += committed * rounds;
}

enum us_status us_summary_add(struct us_summary *summary, const struct us_run_entry *entry,
                              struct us_err *err) {
  struct us_summary_group *group = NULL;
  enum us_status status = find_group(summary, entry->scenario, &group, err);
  if (status != US_OK) return status;
  bool exact = entry->answer && us_answer_matches(entry->text, entry->answer);
  add(group, entry, exact);
  add(&summary->all, entry, exact);
  return US_OK;
}

static double share(double part, double whole) {
  return whole > 0.0 ? part / whole : (double)NAN;
}

static void finish(struct us_summary_group *g) {
  double n = (double)g->entries, rounds = (double)g->stats.rounds;
  g->length = share((double)g->stats.committed, rounds);
  double squares =
      g->squares_committed - 2.0 * g->length * g->cross + g->length * g->length * g->squares_rounds;
  g->length_error = n > 1.0 && rounds > 0.0 ? sqrt(fmax(squares, 0.0) * n / (n - 1.0)) / rounds : (double)NAN;
  g->slots = 0;
  for (uint32_t i = 0; i < US_MAX_BLOCK; i++) {
    g->rate[i] = share((double)g->stats.accepted[i], (double)g->stats.offered[i]);
    if (g->stats.offered[i]) g->slots = i + 1;
  }
  g->tokens_per_second = share((double)g->stats.committed, g->stats.seconds);
  g->first_token_seconds = share(g->stats.first_token_seconds, n);
  g->loop_share = share((double)g->loops, n);
  g->exact_share = share((double)g->exact, (double)g->answered);
  g->exact_error = sqrt(share(g->exact_share * (1.0 - g->exact_share), (double)g->answered));
}

void us_summary_finish(struct us_summary *summary) {
  for (size_t i = 0; i < summary->n; i++) finish(&summary->groups[i]);
  snprintf(summary->all.scenario, sizeof summary->all.scenario, "all");
  finish(&summary->all);
}

void us_summary_release(struct us_summary *summary) {
  free(summary->groups);
  *summary = (struct us_summary){0};
}
