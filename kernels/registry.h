/* registry.h: one row an operation: its shapes, what it reads and computes, how exact it is, which mistakes must show.
 *
 *     const struct us_op *op = us_op_find("linear");
 *     double floor_s = op->bytes(&dims) / bandwidth;
 *     for (size_t i = 0; i < us_op_count(); i++) ... us_op_at(i) ...
 *
 * Tests run from it (tests/unit/kernels/t_registry.c): each operation against an oracle in double within its tolerance, all
 * instruction sets against each other bit for bit, each mutation outside the tolerance; so do the benchmarks. A row without a
 * test there fails the test.
 */
#ifndef US_KERNELS_REGISTRY_H
#define US_KERNELS_REGISTRY_H

#include "formats/matrix.h"

/* Sizes an operation is asked about; unused ones are 0. Letters as in docs/style.md. */
struct us_op_dims {
  enum us_format format; /* of the weights */
  size_t R;              /* token rows */
  size_t D, F, N, K;     /* hidden, inner; output rows and columns of a matrix */
  size_t H, G, Q, V, T;  /* heads, KV heads, head sizes, visible positions a row */
  size_t E, top_k;       /* experts, experts a row */
  size_t active;         /* experts with at least one row */
};

#define US_OP_MAX_MUTATIONS 6

struct us_op {
  const char *name;   /* the folder */
  const char *shapes; /* inputs -> outputs */
  /* Bytes of weights, keys and values that must be read once; activations stay in caches and are not counted. */
  double (*bytes)(const struct us_op_dims *dims);
  double (*flops)(const struct us_op_dims *dims);
  /* Largest |error| in units of 2^-24 times the sum of magnitudes that the output is made of. */
  double (*tolerance)(const struct us_op_dims *dims);
  const char
      *mutations[US_OP_MAX_MUTATIONS]; /* mistakes that a test must tell from rounding; NULL-terminated */
};

size_t us_op_count(void);
const struct us_op *us_op_at(size_t index);

/* NULL if there is none of that name. */
const struct us_op *us_op_find(const char *name);

#endif
