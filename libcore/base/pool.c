/* pool.c: a persistent thread pool: workers spin for a moment between jobs, then sleep. */
#include "base/pool.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

/* About 20 us of spinning covers the gaps between the operations of one decode round; longer waits should
 * sleep. */
#define SPIN_LIMIT 400

struct us_pool {
  int threads, spin_limit;
  void (*body)(void *arg, int worker, int workers);
  void *arg;
  _Atomic unsigned generation; /* counts jobs; its release publishes body and arg */
  _Atomic int pending;         /* workers that have not finished the job */
  _Atomic bool caller_waits;
  bool stop; /* written before the generation moves */
  pthread_mutex_t mutex;
  pthread_cond_t start, done;
  pthread_t *handles;
  struct worker {
    struct us_pool *pool;
    int index;
  } * workers;
};

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  atomic_signal_fence(memory_order_seq_cst);
#endif
}

static unsigned wait_for_job(struct us_pool *pool, unsigned seen) {
  for (int i = 0; i < pool->spin_limit; i++) {
    unsigned now = atomic_load_explicit(&pool->generation, memory_order_acquire);
    if (now != seen) return now;
    pause_briefly();
  }
  pthread_mutex_lock(&pool->mutex);
  while (atomic_load(&pool->generation) == seen) pthread_cond_wait(&pool->start, &pool->mutex);
  pthread_mutex_unlock(&pool->mutex);
  return atomic_load(&pool->generation);
}

static void finish_job(struct us_pool *pool) {
  if (atomic_fetch_sub(&pool->pending, 1) != 1) return;
  if (!atomic_load(&pool->caller_waits)) return;
  pthread_mutex_lock(&pool->mutex);
  pthread_cond_signal(&pool->done);
  pthread_mutex_unlock(&pool->mutex);
}

static void *worker_main(void *arg) {
  struct worker *me = arg;
  struct us_pool *pool = me->pool;
  unsigned seen = 0;
  for (;;) {
    seen = wait_for_job(pool, seen);
    if (pool->stop) return NULL;
    pool->body(pool->arg, me->index, pool->threads);
    finish_job(pool);
  }
}

static void start_job(struct us_pool *pool) {
  pthread_mutex_lock(&pool->mutex);
  atomic_fetch_add(&pool->generation, 1);
  pthread_cond_broadcast(&pool->start);
  pthread_mutex_unlock(&pool->mutex);
}

static void wait_for_workers(struct us_pool *pool) {
  for (int i = 0; i < pool->spin_limit; i++) {
    if (atomic_load_explicit(&pool->pending, memory_order_acquire) == 0) return;
    pause_briefly();
  }
  pthread_mutex_lock(&pool->mutex);
  atomic_store(&pool->caller_waits,
               true); /* before `pending` is read again: the last worker sees one or the other */
  while (atomic_load(&pool->pending) != 0) pthread_cond_wait(&pool->done, &pool->mutex);
  atomic_store(&pool->caller_waits, false);
  pthread_mutex_unlock(&pool->mutex);
}

static int usable_cores(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  int count = CPU_COUNT(&set);
  return count < 1 ? 1 : count > US_POOL_MAX_THREADS ? US_POOL_MAX_THREADS : count;
}

/* Stop the first `started` workers (index 1..started) and release everything. */
static void stop_and_release(struct us_pool *pool, int started) {
  pool->stop = true;
  start_job(pool);
  for (int i = 0; i < started; i++) pthread_join(pool->handles[i], NULL);
  pthread_cond_destroy(&pool->start);
  pthread_cond_destroy(&pool->done);
  pthread_mutex_destroy(&pool->mutex);
  free(pool->handles);
  free(pool->workers);
  free(pool);
}

enum us_status us_pool_create(int threads, struct us_pool **ret_pool, struct us_err *err) {
  *ret_pool = NULL;
  if (threads < 0 || threads > US_POOL_MAX_THREADS)
    return us_err_set(err, US_ERR_USAGE, "%d threads: 0 (all cores) to %d are possible", threads,
                      US_POOL_MAX_THREADS);
  int cores = usable_cores();
  if (threads == 0) threads = cores;
  struct us_pool *pool = calloc(1, sizeof *pool);
  if (!pool) return us_err_memory(err, "a thread pool", sizeof *pool);
  pool->threads = threads;
  pool->spin_limit =
      threads <= cores ? SPIN_LIMIT : 0; /* with fewer cores than workers spinning delays the work */
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->start, NULL);
  pthread_cond_init(&pool->done, NULL);
  pool->handles = calloc((size_t)threads, sizeof *pool->handles);
  pool->workers = calloc((size_t)threads, sizeof *pool->workers);
  if (!pool->handles || !pool->workers) {
    stop_and_release(pool, 0);
    return us_err_memory(err, "a thread pool", (size_t)threads * sizeof *pool->workers);
  }
  for (int i = 0; i < threads - 1; i++) {
    pool->workers[i] = (struct worker){pool, i + 1};
    int failure = pthread_create(&pool->handles[i], NULL, worker_main, &pool->workers[i]);
    if (failure) {
      stop_and_release(pool, i);
      errno = failure;
      return us_err_errno(err, US_ERR_IO, "cannot start thread %d of %d", i + 2, threads);
    }
  }
  *ret_pool = pool;
  return US_OK;
}

void us_pool_free(struct us_pool *pool) {
  if (pool) stop_and_release(pool, pool->threads - 1);
}

int us_pool_threads(const struct us_pool *pool) {
  return pool ? pool->threads : 1;
}

void us_pool_run(struct us_pool *pool, void (*body)(void *arg, int worker, int workers), void *arg) {
  if (!pool || pool->threads == 1) {
    body(arg, 0, 1);
    return;
  }
  pool->body = body;
  pool->arg = arg;
  atomic_store_explicit(&pool->pending, pool->threads - 1, memory_order_relaxed);
  start_job(pool);
  body(arg, 0, pool->threads);
  wait_for_workers(pool);
}

struct range_job {
  void (*body)(void *arg, size_t begin, size_t end, int worker);
  void *arg;
  size_t n, grain, units, pieces;
  _Atomic size_t next;
};

static void run_pieces(void *arg, int worker, int workers) {
  struct range_job *job = arg;
  size_t base = job->units / job->pieces, longer = job->units % job->pieces;
  for (;;) {
    size_t piece = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
    if (piece >= job->pieces) return;
    size_t first = piece * base + (piece < longer ? piece : longer);
    size_t last = first + base + (piece < longer);
    job->body(job->arg, first * job->grain, piece + 1 == job->pieces ? job->n : last * job->grain, worker);
  }
}

void us_pool_for(struct us_pool *pool, size_t n, size_t grain,
                 void (*body)(void *arg, size_t begin, size_t end, int worker), void *arg) {
  if (n == 0) return;
  if (grain == 0) grain = 1;
  struct range_job job = {.body = body, .arg = arg, .n = n, .grain = grain, .units = n / grain};
  /* Four pieces a worker even out workers of unequal speed; more would only cost claims. */
  size_t most = 4 * (size_t)us_pool_threads(pool);
  job.pieces = job.units < most ? job.units : most;
  if (us_pool_threads(pool) == 1 || job.pieces <= 1) {
    body(arg, 0, n, 0);
    return;
  }
  us_pool_run(pool, run_pieces, &job);
}
