/* schedule_order.h: what the proof of hand-offs keeps: what blocks know, and who wrote and read each piece of memory. Internal to
 * device/schedule_order.c and schedule_pieces.c.
 */
#ifndef US_DEVICE_SCHEDULE_ORDER_H
#define US_DEVICE_SCHEDULE_ORDER_H

#include "device/schedule_impl.h"

/* Operations are numbered through the rounds. All vector operations up to `vector` are over in every block, and what products
 * before it read has been read; all products up to `gemm` are written. */
struct known {
  int64_t vector, gemm;
};
struct view {
  struct known seen, over; /* over: seen included */
  int64_t peers;           /* vector operations up to it are over on every rank */
  int64_t pushed;          /* reductions up to it have had all their addends */
};

/* Bytes [begin, end) as they were last written, and who has read them since. */
struct piece {
  uintptr_t begin, end;
  int64_t writer;
  bool own;                                /* written by blocks that own its columns */
  int64_t vector, gemm, pushing, own_read; /* the last reader of each kind; -1: none */
};

struct us_schedule_order {
  const struct us_device_schedule *s;
  uint32_t n, exchanges;
  struct view *start;   /* (ROUNDS * n) when an operation touches memory; reductions: of blocks with slices */
  struct view *end;     /* (ROUNDS * n) what its count tells: blocks with slices have ended it */
  struct view all, own; /* now: what every block knows, what blocks with slices know */
  struct view loads;    /* and what the warps know that load activations of wide products */
  uint32_t *pusher, *reduction; /* (exchanges) operations by their number */
  uint32_t *source;             /* (n, US_ENGINE_GATHERED) of each of its row tiles */
  uint32_t last_attention[2][US_MAX_LAYERS], last_context; /* by target, drafter; US_ENGINE_NONE */
  struct piece *piece;                                     /* ascending, apart */
  size_t count, capacity;
  struct us_err *err;
};

/* An access of operation x: what it knows then, what it touches. */
struct access {
  int64_t x;
  const struct view *view;
  struct us_schedule_range range;
  bool own; /* by blocks that own the columns */
};

static inline const struct us_engine_op *us_schedule_op(const struct us_schedule_order *o, int64_t x) {
  return &o->s->ops[x % o->n];
}

static inline void us_schedule_raise(int64_t *to, int64_t from) {
  if (from > *to) *to = from;
}

static inline struct us_schedule_range us_schedule_range(const void *begin, uint64_t bytes) {
  return (struct us_schedule_range){(uintptr_t)begin, (uintptr_t)begin + bytes};
}

/* "operation 12 (...): what". */
enum us_status us_schedule_order_wrong(const struct us_schedule_order *o, int64_t x, const char *what);

/* Whether everything that `reader` has read is read, as far as the view tells; -1: nobody. */
bool us_schedule_read_is_over(const struct us_schedule_order *o, const struct view *v, int64_t reader);

/* Whether what `writer` wrote is written; -1: it stood there before the first round. */
bool us_schedule_is_written(const struct us_schedule_order *o, const struct known *k, int64_t writer);

/* A read of what one operation has written, all of it; `parts`: of what several have. Sets *opt_writer. */
US_CHECKED enum us_status us_schedule_read(struct us_schedule_order *o, const struct access *a, bool parts,
                                           int64_t *opt_writer);
US_CHECKED enum us_status us_schedule_write(struct us_schedule_order *o, const struct access *a);

/* Who wrote exactly this range last; -1: nobody, or another range. */
int64_t us_schedule_writer(const struct us_schedule_order *o, struct us_schedule_range range);

/* The range has content before the first round. */
US_CHECKED enum us_status us_schedule_stands(struct us_schedule_order *o, struct us_schedule_range range);

#endif
