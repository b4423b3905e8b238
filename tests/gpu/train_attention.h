/* train_attention.h: the parts of train_attention: problems, what double precision expects of them, speeds.
 *
 *     struct problem p;
 *     make_problem(&p, &shapes[i], seed);
 *     run_problem(&p);                                         // forward and gradient on the GPU, results fetched
 *     struct row_table right = device_rows(&p);                // lse and delta as the GPU's gradient has them
 *     struct expected e = expect_query(&p, query, head, RIGHT, right);
 */
#ifndef US_TESTS_TRAIN_ATTENTION_H
#define US_TESTS_TRAIN_ATTENTION_H

#include "kernels/attention_seq/attention_train.h"
#include "formats/bf16.h"
#include "lab.h"

#include <thread>

enum mask { FULL, WINDOW, DRAFT, RANDOM };

struct shape {
  const char *name;
  enum mask mask;
  uint32_t rows, window; /* DRAFT: rows of context; behind them blocks of 8 queries */
  uint32_t H, G, Q, V;
  bool sink;
  uint32_t blocks; /* DRAFT */
};

struct ranges {
  std::vector<uint32_t> begin[2], end[2]; /* context, block; (queries) */
};

struct problem {
  const struct shape *of;
  uint32_t queries, keys, stride, first; /* stride of a row of qkv; first: row of the first query */
  float scale;
  struct ranges ranges;
  std::vector<float> qkv, dout, sink; /* values that bf16 holds; (keys, stride), (queries, H * V), (H) */
  std::vector<uint16_t> out, dqkv;    /* fetched; dq at the queries' rows */
  std::vector<float> lse, dsink;      /* fetched */
  struct us_attention_train a;        /* device */
  struct us_attention_train_grads grads;
  std::vector<void *> owned;
};

enum mistake { RIGHT, NO_SINK, END_LATE, SCALED, WRONG_HEAD, MISTAKES };

/* lse and delta of every (query, head). */
struct row_table {
  std::vector<double> lse, delta;
};

/* Values and what each may be off by. */
struct expected {
  std::vector<double> value, allowed;
};
struct query_expected {
  struct expected out, lse, dq;
};
struct key_expected {
  struct expected dk, dv;
};

/* Ranges of a packed sequence of documents (lengths in turn), or of draft blocks over it. */
struct ranges make_ranges(enum mask mask, uint32_t rows, uint32_t window,
                          const std::vector<uint32_t> &documents, uint32_t blocks);

void make_problem(struct problem *p, const struct shape *shape, uint64_t seed);
void run_problem(struct problem *p);
void release_problem(struct problem *p);

bool mistake_applies(const struct problem *p, enum mistake m);
struct row_table device_rows(const struct problem *p);
struct row_table double_rows(const struct problem *p, enum mistake m);
struct query_expected expect_query(const struct problem *p, uint32_t query, uint32_t head, enum mistake m,
                                   const struct row_table &rows);
struct key_expected expect_key(const struct problem *p, uint32_t key, uint32_t g, enum mistake m,
                               const struct row_table &rows);
struct expected expect_sinks(const struct problem *p, const struct row_table &rows);

void time_attention(void);

/* body(i) for i < n on all cores. */
template <class Body> static inline void in_parallel(size_t n, Body body) {
  unsigned count = std::thread::hardware_concurrency();
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < count; t++)
    threads.emplace_back([=] {
      for (size_t i = t; i < n; i += count) body(i);
    });
  for (std::thread &t : threads) t.join();
}

#endif
