/* router_grad.h: choose K experts a row by sigmoid scores, weigh them, and the gradient through the chosen scores.
 *
 *     us_router_seq(&seq, &router, x, w, bias, scores, id, weight);
 *     us_router_grad(&seq, &router, x, w, scores, id, dweight, NULL, dx, dw);
 *     us_router_load(id, R * K, E, load);
 *     us_router_balance(bias, load, E, 1e-3f);             // once a step: DeepSeek-V3's auxiliary-loss-free balancing
 *
 * scores = sigmoid(x w^T); the K largest of scores + bias are chosen (ties to the lowest id), listed in ascending id;
 * weight = score / (sum of the chosen scores + 1e-20) * scaling. The bias steers selection only: it has no gradient. Nor has the
 * choice itself, which another router's scores can teach: the cross-entropy of every expert's score against the other's. And a margin
 * keeps it from tipping: an expert is chosen where its score is above t = (least of the chosen + most of the others) / 2 - its bias, both
 * with their biases, and its logit is d from there, with tanh(d / 2) = (score - t) / (score + t - 2 score t).
 */
#ifndef US_KERNELS_ROUTER_GRAD_H
#define US_KERNELS_ROUTER_GRAD_H

#include "kernels/seq/seq.h"

struct us_router_rows {
  size_t R, D;
  uint32_t E, K;
  bool normalise;
  float scaling;
  const uint32_t *opt_chosen; /* (R, K) the experts that rows visit, whatever their scores; NULL: the best */
};

/* x (R, D), w (E, D), bias (E) or NULL; scores (R, E), id (R, K), weight (R, K) written. */
void us_router_seq(struct us_seq *seq, const struct us_router_rows *router, const float *x, const float *w,
                   const float *bias, float *scores, uint32_t *id, float *weight);

/* Adds sum over rows of weight * sum over experts of
 *   scale * cross-entropy(theirs, own), which is least where own is theirs, and
 *   margin_scale * a hinge: the logit is pushed away from t by max(0, 1 - |tanh(d / 2)| / tanh(margin / 2)), t held, less the
 *   mean of such pushes to this expert over the rows, by their weights: a push that all rows share would draw them to the expert or
 *   away from it faster than a bias can follow. An expert whose t is not within (0, 1) is (not) chosen whatever its score, and is
 *   not pushed from there. */
struct us_router_teacher {
  const float *opt_scores; /* (R, E); NULL: `target` everywhere */
  float target;
  const float *opt_weight; /* (R); NULL: all 1 */
  float scale;
  float margin, margin_scale; /* logits, above 0; 0: no margin */
  const float *opt_bias;      /* (E) that the choice was made with; NULL: 0 */
};

/* dweight (R, K). scores become the gradient of the logits. dx (R, D) is added to; dw (E, D) is added to, NULL if frozen. */
void us_router_grad(struct us_seq *seq, const struct us_router_rows *router, const float *x, const float *w,
                    float *scores, const uint32_t *id, const float *dweight,
                    const struct us_router_teacher *opt_teacher, float *dx, float *dw);

/* Add how often each expert occurs in id (n) to load (E). */
void us_router_load(const uint32_t *id, size_t n, uint32_t E, uint64_t *load);

/* bias += rate * sign(mean load - load). */
void us_router_balance(float *bias, const uint64_t *load, uint32_t E, float rate);

#endif
