/* random.h: models and drafters with random weights, for tests and synthetic runs.
 *
 *     us_shape_load("tiny", &shape, &err);
 *     us_model_random(&shape, 7, pool, &model, &err);          // stored as shape.precision says
 *
 * A weight is a function of (seed, tensor name, row, column): any tensor can be made again by itself, in any order and by
 * any number of threads. Matrices are uniform with variance 1 / fan_in (embeddings: variance 1), norms lie in [0.9, 1.1),
 * sinks in [-1, 1), router biases in [-0.01, 0.01). A synthetic model has no tokenizer.
 */
#ifndef US_MODEL_RANDOM_H
#define US_MODEL_RANDOM_H

#include "base/init.h"
#include "base/pool.h"
#include "model/model.h"

US_CHECKED enum us_status us_model_random(const struct us_shape *shape, uint64_t seed, struct us_pool *pool,
                                          struct us_model **ret_model, struct us_err *err);

/* All matrices in `format`, but a head of its own as the shape says: the values of the target's head of the same seed. */
US_CHECKED enum us_status us_draft_random(const struct us_draft_shape *shape, enum us_format format,
                                          uint64_t seed, struct us_pool *pool, struct us_draft **ret_draft,
                                          struct us_err *err);

/* One tensor of a model or drafter without data: a matrix is stored in `format`, in the owner's memory (model->owner, draft->owner),
 * FP8 with its scale grid anew every `chunk` rows (0: never); a vector is filled in its place. */
US_CHECKED enum us_status us_random_tensor(const struct us_tensor_ref *ref, enum us_format format,
                                           size_t chunk, uint64_t seed, void *owner, struct us_pool *pool,
                                           struct us_err *err);

/* What makes a tensor's values, wherever they are made: quad q of row r is us_init_quad(&init, r, q). */
struct us_init us_random_init(uint64_t seed, const struct us_tensor_ref *ref);

/* One row of FP32 values (ref->cols), before storage rounds them; a vector is `rows` rows of one column. */
void us_random_row(uint64_t seed, const struct us_tensor_ref *ref, size_t row, float *ret_values);

#endif
