/* t_pool.c: the thread pool; also run under ThreadSanitizer (suite tsan). */
#include "base/pool.h"
#include "suite.h"

#include <pthread.h>
#include <string.h>
#include <unistd.h>

struct tally {
  int calls[US_POOL_MAX_THREADS];
  int workers;
};

static void count_call(void *arg, int worker, int workers) {
  struct tally *tally = arg;
  tally
      ->calls[worker]++; /* plain: each worker its own; a second call of one worker at once would be a race */
  if (worker == 0) tally->workers = workers;
}

static struct us_pool *make_pool(int threads) {
  struct us_pool *pool = NULL;
  struct us_err err = {0};
  ck_assert_msg(us_pool_create(threads, &pool, &err) == US_OK, "%s", err.message);
  return pool;
}

START_TEST(run_calls_the_body_once_on_every_worker) {
  for (int threads = 1; threads <= 9; threads++) {
    struct us_pool *pool = make_pool(threads);
    ck_assert_int_eq(us_pool_threads(pool), threads);
    struct tally tally = {0};
    for (int job = 0; job < 200; job++) us_pool_run(pool, count_call, &tally);
    ck_assert_int_eq(tally.workers, threads);
    for (int i = 0; i < US_POOL_MAX_THREADS; i++) ck_assert_int_eq(tally.calls[i], i < threads ? 200 : 0);
    us_pool_free(pool);
  }
}
END_TEST

static void remember_thread(void *arg, int worker, int workers) {
  ((pthread_t *)arg)[worker] = pthread_self();
}

START_TEST(the_caller_is_worker_0) {
  struct us_pool *pool = make_pool(3);
  pthread_t ids[3];
  us_pool_run(pool, remember_thread, ids);
  ck_assert(pthread_equal(ids[0], pthread_self()));
  ck_assert(!pthread_equal(ids[1], pthread_self()) && !pthread_equal(ids[1], ids[2]));
  us_pool_free(pool);
}
END_TEST

static void sleep_once(void *arg, int worker, int workers) {
  if (worker == *(int *)arg) usleep(3000);
}

START_TEST(a_job_after_a_pause_wakes_sleeping_workers) {
  struct us_pool *pool = make_pool(4);
  struct tally tally = {0};
  for (int i = 0; i < 8; i++) {
    int slow = i % 4; /* the caller waits for a slow worker, and workers wait for a slow caller */
    us_pool_run(pool, sleep_once, &slow);
    usleep(2000);
    us_pool_run(pool, count_call, &tally);
  }
  for (int i = 0; i < 4; i++) ck_assert_int_eq(tally.calls[i], 8);
  us_pool_free(pool);
}
END_TEST

struct cover {
  unsigned char *seen;
  size_t n, grain;
  int bad;
  pthread_mutex_t mutex;
};

static void cover_range(void *arg, size_t begin, size_t end, int worker) {
  struct cover *cover = arg;
  int bad = begin >= end || end > cover->n || begin % cover->grain != 0 ||
            (end - begin < cover->grain && cover->n >= cover->grain);
  for (size_t i = begin; i < end; i++) cover->seen[i]++;
  if (!bad) return;
  pthread_mutex_lock(&cover->mutex);
  cover->bad = 1;
  pthread_mutex_unlock(&cover->mutex);
}

START_TEST(for_covers_every_index_once_in_aligned_pieces) {
  const size_t sizes[] = {0, 1, 2, 3, 7, 64, 65, 1000, 4097}, grains[] = {1, 2, 3, 64, 5000};
  for (int threads = 1; threads <= 5; threads += 2) {
    struct us_pool *pool = make_pool(threads);
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
      for (size_t g = 0; g < sizeof grains / sizeof *grains; g++) {
        unsigned char seen[4097] = {0};
        struct cover cover = {seen, sizes[s], grains[g], 0, PTHREAD_MUTEX_INITIALIZER};
        us_pool_for(pool, sizes[s], grains[g], cover_range, &cover);
        ck_assert_int_eq(cover.bad, 0);
        for (size_t i = 0; i < sizeof seen; i++) ck_assert_int_eq(seen[i], i < sizes[s]);
      }
    us_pool_free(pool);
  }
}
END_TEST

START_TEST(a_null_pool_runs_everything_in_the_caller) {
  struct tally tally = {0};
  us_pool_run(NULL, count_call, &tally);
  ck_assert_int_eq(tally.calls[0], 1);
  ck_assert_int_eq(tally.workers, 1);
  ck_assert_int_eq(us_pool_threads(NULL), 1);
  unsigned char seen[100] = {0};
  struct cover cover = {seen, 100, 7, 0, PTHREAD_MUTEX_INITIALIZER};
  us_pool_for(NULL, 100, 7, cover_range, &cover);
  for (int i = 0; i < 100; i++) ck_assert_int_eq(seen[i], 1);
  us_pool_free(NULL);
}
END_TEST

struct chain {
  double *x;
  size_t n;
};

static void add_neighbour(void *arg, size_t begin, size_t end, int worker) {
  struct chain *chain = arg;
  for (size_t i = begin; i < end; i++) chain->x[chain->n + i] = chain->x[i] + chain->x[(i + 1) % chain->n];
}

static void move_back(void *arg, size_t begin, size_t end, int worker) {
  struct chain *chain = arg;
  for (size_t i = begin; i < end; i++) chain->x[i] = chain->x[chain->n + i] / 2;
}

START_TEST(each_job_sees_all_writes_of_the_one_before) {
  enum { N = 1000 };
  double one[2 * N], many[2 * N];
  for (int i = 0; i < N; i++) one[i] = many[i] = (i * 7919) % 1000;
  struct us_pool *pool = make_pool(4);
  for (int round = 0; round < 300; round++) {
    us_pool_for(NULL, N, 16, add_neighbour, &(struct chain){one, N});
    us_pool_for(NULL, N, 16, move_back, &(struct chain){one, N});
    us_pool_for(pool, N, 16, add_neighbour, &(struct chain){many, N});
    us_pool_for(pool, N, 16, move_back, &(struct chain){many, N});
  }
  ck_assert_mem_eq(one, many, N * sizeof *one);
  us_pool_free(pool);
}
END_TEST

START_TEST(a_pool_that_never_worked_can_be_freed) {
  for (int i = 0; i < 20; i++) us_pool_free(make_pool(1 + i % 6));
}
END_TEST

START_TEST(an_impossible_thread_count_is_a_usage_error) {
  struct us_pool *pool = (void *)1;
  struct us_err err = {0};
  ck_assert_int_eq(us_pool_create(US_POOL_MAX_THREADS + 1, &pool, &err), US_ERR_USAGE);
  ck_assert_ptr_null(pool);
  ck_assert_ptr_nonnull(strstr(err.message, "257 threads"));
  ck_assert_int_eq(us_pool_create(-1, &pool, &err), US_ERR_USAGE);
}
END_TEST

START_TEST(zero_threads_means_the_usable_cores) {
  struct us_pool *pool = make_pool(0);
  long online = sysconf(_SC_NPROCESSORS_ONLN);
  ck_assert_int_ge(us_pool_threads(pool), 1);
  ck_assert_int_le(us_pool_threads(pool), online < US_POOL_MAX_THREADS ? (int)online : US_POOL_MAX_THREADS);
  us_pool_free(pool);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("pool");
  tcase_add_test(c, run_calls_the_body_once_on_every_worker);
  tcase_add_test(c, the_caller_is_worker_0);
  tcase_add_test(c, a_job_after_a_pause_wakes_sleeping_workers);
  tcase_add_test(c, for_covers_every_index_once_in_aligned_pieces);
  tcase_add_test(c, a_null_pool_runs_everything_in_the_caller);
  tcase_add_test(c, each_job_sees_all_writes_of_the_one_before);
  tcase_add_test(c, a_pool_that_never_worked_can_be_freed);
  tcase_add_test(c, an_impossible_thread_count_is_a_usage_error);
  tcase_add_test(c, zero_threads_means_the_usable_cores);
  return us_suite("pool", c);
}
US_TEST_MAIN(make_suite)
