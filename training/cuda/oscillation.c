/* oscillation.c: weights that oscillate, of the tensors that a GPU owns: what us_params_hold does (training/oscillation.h).
 *
 * Masters are rounded anew into the arena of the gradients, which nobody needs between an update and the next step.
 */
#include "training/cuda/cuda.h"
#include "training/cuda/params_state.h"
#include "training/oscillation.h"

#include <stdlib.h>

struct work {
  struct us_quant_tile *tiles; /* NULL while counting, as are the spans */
  struct us_watched_span *spans;
  size_t tile_count, span_count;
};

static void add_spans(struct work *work, const struct us_param *p) {
  size_t n = p->rows * p->cols;
  for (size_t first = 0; first < n; first += US_WATCHED_SPAN, work->span_count++)
    if (work->spans)
      work->spans[work->span_count] = (struct us_watched_span){
          .offset = p->offset + first,
          .n = (uint32_t)(n - first < US_WATCHED_SPAN ? n - first : US_WATCHED_SPAN)};
}

static void fill_work(const struct us_cuda_params *set, struct work *work) {
  work->tile_count = work->span_count = 0;
  for (size_t i = 0; i < set->host->count; i++) {
    const struct us_param *p = &set->host->items[i];
    if (p->offset < set->owned.begin || p->offset >= set->owned.end) continue;
    if (!us_param_is_watched(set->host, p)) continue;
    work->tile_count += us_cuda_param_tiles(p, work->tiles ? work->tiles + work->tile_count : NULL);
    add_spans(work, p);
  }
}

enum us_status us_cuda_watch_list(struct us_cuda_params *set, struct us_err *err) {
  struct us_cuda_params_state *s = set->state;
  struct work work = {0};
  void *tiles = NULL, *spans = NULL;
  fill_work(set, &work);
  work.tiles = calloc(work.tile_count + 1, sizeof *work.tiles);
  work.spans = calloc(work.span_count + 1, sizeof *work.spans);
  enum us_status status = work.tiles && work.spans
                              ? US_OK
                              : us_err_memory(err, "lists of tensors", work.tile_count * sizeof *work.tiles);
  if (status == US_OK) {
    fill_work(set, &work);
    status = us_cuda_params_send(set->cuda, work.tiles, work.tile_count * sizeof *work.tiles, "watched tiles",
                                 &tiles, err);
  }
  if (status == US_OK)
    status = us_cuda_params_send(set->cuda, work.spans, work.span_count * sizeof *work.spans, "watched spans",
                                 &spans, err);
  s->watched_tiles = tiles, s->watched_tile_count = work.tile_count;
  s->watched_spans = spans, s->watched_span_count = work.span_count;
  free(work.tiles);
  free(work.spans);
  return status;
}

void us_cuda_watch_hold(struct us_cuda_params *set, const struct us_oscillation_rule *rule) {
  struct us_cuda_params_state *s = set->state;
  if (!set->watch.share || !(rule->threshold > 0.0f)) return;
  struct us_quant_train quant = {.tiles = s->watched_tiles,
                                 .count = s->watched_tile_count,
                                 .value = set->value,
                                 .opt_rounded = set->grad};
  us_cuda_did(set->cuda, us_quant_train(&quant, set->cuda->stream), "rounding weights anew");
  struct us_oscillation_train watch = {.spans = s->watched_spans,
                                       .count = s->watched_span_count,
                                       .rule = *rule,
                                       .before = set->rounded,
                                       .after = set->grad,
                                       .value = set->value,
                                       .share = us_cuda_from_begin(set, set->watch.share),
                                       .mean = us_cuda_from_begin(set, set->watch.mean),
                                       .turn = us_cuda_from_begin(set, set->watch.turn)};
  us_cuda_did(set->cuda, us_oscillation_train(&watch, set->cuda->stream), "fixing weights");
}

void us_cuda_watch_release(struct us_cuda_params_state *s) {
  us_cuda_give(s->watched_tiles);
  us_cuda_give(s->watched_spans);
}
