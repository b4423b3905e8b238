/* train_lab.h: what the tests of CUDA training share: random text and weights, gradients of both sides, their difference. */
#ifndef US_TESTS_GPU_TRAIN_LAB_H
#define US_TESTS_GPU_TRAIN_LAB_H

#include "parity.h"
#include "training/cuda/draft.h"
#include "training/cuda/loss.h"
#include "training/cuda/model.h"
#include "training/rows.h"

/* A stream of numbers of the test's own. */
struct lab_random {
  uint64_t state;
};
uint32_t lab_word(struct lab_random *random);
float lab_normal(struct lab_random *random); /* about N(0, 1): a sum of uniform numbers */

/* R rows of random tokens in documents of at most `longest` rows; labels are the next tokens, weight 0 at a document's end. */
void lab_fill_rows(struct us_rows *rows, size_t R, size_t longest, uint32_t vocab, uint64_t seed);

/* Vectors leave their trivial values: gains 1 + N / 8, sinks N / 2, biases N / 16. */
void lab_stir_vectors(struct us_params *params, uint64_t seed);

/* bf16 of the device as floats on the host, and floats; both wait. The result is the caller's. */
float *lab_fetch_bf16(struct us_cuda *cuda, const uint16_t *device, size_t n);
float *lab_fetch(struct us_cuda *cuda, const float *device, size_t n);

/* |a - b| / |b| (Frobenius); 0 if both are zero. */
double lab_distance(const float *a, const float *b, size_t n);

/* Distances of the gradients of two runs of the host, tensor by tensor, and their root mean square: what rounding does to them. */
struct lab_noise {
  double *tensor; /* (params->count) */
  double mean;
};
struct lab_noise lab_noise_of(const struct us_params *params, const float *other);

/* How far the gradients `got` (host, an arena) are from those of the host's params. */
struct lab_difference {
  size_t tensors,
      beyond;   /* compared; further than factor * (1.5 + 3 / sqrt(n)) * (the larger of own and mean noise) */
  double worst; /* distance over that bound */
  const char *name; /* of the worst */
  double mean;      /* root mean square of distance over mean noise */
};
struct lab_difference lab_compare(const struct us_params *params, const float *got,
                                  const struct lab_noise *noise, double factor);

/* Smallest distance between the last expert chosen and the best one left out, of a row of the last forward pass in any layer. */
float lab_margin(const struct us_model_train *train, size_t row);

int lab_speed(int count, char **arguments);

#endif
