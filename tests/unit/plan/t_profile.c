/* t_profile.c: what a trace says about time, from spans written by hand. */
#include "base/h5.h"
#include "kernels/engine/engine.h"
#include "plan/profile.h"
#include "plan/profile_files.h"
#include "suite.h"

#include <jansson.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

/* Two workers, two passes. Pass 0 lasts 100 us: worker 0 is busy 90 us, worker 1 waits 40 and is busy 50. Pass 1 starts 30 us
 * later and lasts 20 us, all of it busy on worker 0. */
static struct us_trace *make_trace(void) {
  static const struct us_span spans[] = {
      {.claimed = 1000, .start = 1000, .end = 91000, .bytes = 900, .layer = 0, .op = US_TASK_QKV},
      {.claimed = 11000,
       .start = 51000,
       .end = 101000,
       .bytes = 100,
       .layer = 0,
       .op = US_TASK_O_PROJ,
       .worker = 1},
      {.claimed = 131000,
       .start = 131000,
       .end = 151000,
       .bytes = 50,
       .layer = US_LAYER_NONE,
       .pass = 1,
       .op = US_TASK_HEAD,
       .program = US_PROGRAM_DRAFT}};
  struct us_trace *trace;
  ck_assert_int_eq(us_trace_create(8, &trace, NULL), US_OK);
  for (size_t i = 0; i < 3; i++) us_trace_add(trace, &spans[i]);
  return trace;
}

START_TEST(times_and_bytes_are_summed_by_program_and_op) {
  struct us_trace *trace = make_trace();
  struct us_profile p;
  us_profile_summarise(trace, 2, &p);
  ck_assert_uint_eq(p.passes, 2);
  ck_assert_double_eq_tol(p.span, 150e-6, 1e-12);
  ck_assert_double_eq_tol(p.in_passes, 120e-6, 1e-12);
  ck_assert_double_eq_tol(p.busy, 160e-6, 1e-12);
  ck_assert_double_eq_tol(p.wait, 40e-6, 1e-12);
  ck_assert_double_eq_tol(p.idle_share, 1 - 160.0 / 240, 1e-12);
  ck_assert_double_eq(p.bytes, 1050);
  ck_assert_double_eq_tol(p.ops[US_PROGRAM_TARGET][US_TASK_QKV].busy, 90e-6, 1e-12);
  ck_assert_double_eq_tol(p.ops[US_PROGRAM_TARGET][US_TASK_O_PROJ].wait, 40e-6, 1e-12);
  ck_assert_uint_eq(p.ops[US_PROGRAM_DRAFT][US_TASK_HEAD].tasks, 1);
  ck_assert_uint_eq(p.ops[US_PROGRAM_TARGET][US_TASK_HEAD].tasks, 0);
  us_trace_free(trace);
}
END_TEST

START_TEST(an_empty_trace_gives_zeros) {
  struct us_trace *trace;
  struct us_profile p;
  ck_assert_int_eq(us_trace_create(8, &trace, NULL), US_OK);
  us_profile_summarise(trace, 2, &p);
  ck_assert_uint_eq(p.passes, 0);
  ck_assert_double_eq(p.idle_share, 0);
  us_trace_free(trace);
}
END_TEST

START_TEST(perfetto_events_are_json_with_a_wait_only_where_there_was_one) {
  struct us_trace *trace = make_trace();
  char *text = NULL;
  size_t size = 0;
  FILE *file = open_memstream(&text, &size);
  ck_assert_int_eq(us_profile_write_perfetto(trace, file, NULL), US_OK);
  fclose(file);
  json_t *root = json_loads(text, 0, NULL);
  ck_assert_ptr_nonnull(root);
  size_t complete = 0, waits = 0;
  size_t i;
  json_t *event;
  json_array_foreach(json_object_get(root, "traceEvents"), i, event) {
    const char *name = json_string_value(json_object_get(event, "name"));
    if (strcmp(json_string_value(json_object_get(event, "ph")), "X") != 0) continue;
    complete++;
    if (!strcmp(name, "wait o_proj")) {
      waits++;
      ck_assert_double_eq_tol(json_number_value(json_object_get(event, "dur")), 40, 1e-9);
    }
  }
  ck_assert_uint_eq(complete, 4);
  ck_assert_uint_eq(waits, 1);
  json_decref(root);
  free(text);
  us_trace_free(trace);
}
END_TEST

START_TEST(a_line_of_tsv_holds_a_span) {
  struct us_trace *trace = make_trace();
  char *text = NULL;
  size_t size = 0;
  FILE *file = open_memstream(&text, &size);
  ck_assert_int_eq(us_profile_write_tsv(trace, file, NULL), US_OK);
  fclose(file);
  ck_assert_ptr_nonnull(
      strstr(text, "\n0\ttarget\to_proj\t0\t1\t11.000\t51.000\t101.000\t100\tworker\tnothing\n"));
  ck_assert_ptr_nonnull(
      strstr(text, "\n1\tdraft\thead\t-1\t0\t131.000\t131.000\t151.000\t50\tworker\tnothing\n"));
  free(text);
  us_trace_free(trace);
}
END_TEST

START_TEST(the_artefact_reads_back_column_by_column) {
  struct us_trace *trace = make_trace();
  char path[] = "us_t_profile_XXXXXX";
  int fd = mkstemp(path);
  ck_assert_int_ge(fd, 0);
  close(fd);
  struct us_h5 *file;
  struct us_err err = {0};
  ck_assert_msg(us_profile_write_h5(trace, path, "{}", &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_h5_open(path, US_TRACE_KIND, &file, &err) == US_OK, "%s", err.message);
  const struct us_h5_dataset *d;
  ck_assert_int_eq(us_h5_get(file, "start", US_H5_U64, 1, (size_t[]){3}, &d, &err), US_OK);
  ck_assert_uint_eq(((const uint64_t *)d->data)[1], 51000);
  ck_assert_int_eq(us_h5_get(file, "worker", US_H5_U32, 1, NULL, &d, &err), US_OK);
  ck_assert_uint_eq(((const uint32_t *)d->data)[1], 1);
  ck_assert_int_eq(us_h5_get(file, "program", US_H5_U32, 1, NULL, &d, &err), US_OK);
  ck_assert_uint_eq(((const uint32_t *)d->data)[2], US_PROGRAM_DRAFT);
  ck_assert_ptr_nonnull(strstr(us_h5_text(file, "ops"), "expert_down"));
  us_h5_close(file);
  unlink(path);
  us_trace_free(trace);
}
END_TEST

/* A block of the second GPU: 10 us of a projection, 3 of them waiting for weights; its stream role; the end of a round. */
static struct us_trace *make_engine_trace(void) {
  static const struct us_span spans[] = {
      {.start = 2000, .end = 5000, .op = US_TASK_QKV, .role = US_TRACE_COMPUTE, .wait = US_ENGINE_WAIT_STAGE},
      {.end = 10000, .op = US_TASK_QKV, .role = US_TRACE_COMPUTE},
      {.end = 9000, .bytes = 77, .op = US_TASK_QKV, .role = US_TRACE_STREAM},
      {.start = 10000,
       .end = 12000,
       .op = US_TASK_OP_COUNT,
       .role = US_TRACE_COMPUTE,
       .layer = US_LAYER_NONE}};
  struct us_trace *trace;
  ck_assert_int_eq(us_trace_create(8, &trace, NULL), US_OK);
  for (size_t i = 0; i < 4; i++) {
    struct us_span span = spans[i];
    span.worker = US_TRACE_BLOCKS + 7;
    us_trace_add(trace, &span);
  }
  return trace;
}

START_TEST(waits_of_the_engine_lie_inside_operations) {
  struct us_trace *trace = make_engine_trace();
  char *text = NULL;
  size_t size = 0, i, events = 0;
  FILE *file = open_memstream(&text, &size);
  ck_assert_int_eq(us_profile_write_perfetto(trace, file, NULL), US_OK);
  fclose(file);
  json_t *root = json_loads(text, 0, NULL), *event, *wait = NULL, *operation = NULL;
  ck_assert_ptr_nonnull(root);
  json_array_foreach(json_object_get(root, "traceEvents"), i, event) {
    const char *name = json_string_value(json_object_get(event, "name"));
    if (strcmp(json_string_value(json_object_get(event, "ph")), "X") != 0) continue;
    events++;
    if (!strcmp(name, "wait ring empty")) wait = event;
    if (!strcmp(name, "qkv") && !operation) operation = event;
  }
  ck_assert_uint_eq(events, 4);
  ck_assert(wait && operation);
  ck_assert_int_eq(json_integer_value(json_object_get(wait, "pid")), 2);
  ck_assert(json_equal(json_object_get(wait, "tid"), json_object_get(operation, "tid")));
  ck_assert_ptr_nonnull(strstr(text, "\"SM 7 stream\""));
  ck_assert_ptr_nonnull(strstr(text, "\"GPU 1\""));
  json_decref(root);
  free(text);
  us_trace_free(trace);
}
END_TEST

START_TEST(the_engine_has_a_picture_with_a_row_a_role) {
  struct us_trace *trace = make_engine_trace();
  char path[] = "us_t_profile_XXXXXX", magic[4] = "";
  int fd = mkstemp(path);
  struct us_err err = {0};
  ck_assert_int_ge(fd, 0);
  ck_assert_msg(us_profile_plot_engine(trace, 0, path, NULL, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_profile_plot_engine(trace, 0.004, path, NULL, &err) == US_OK, "%s", err.message);
  close(fd);
  FILE *file = fopen(path, "rb");
  ck_assert_ptr_nonnull(file);
  ck_assert_uint_eq(fread(magic, 1, 4, file), 4);
  ck_assert_int_eq(memcmp(magic, "\x89PNG", 4), 0);
  fclose(file);
  unlink(path);
  us_trace_free(trace);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("profile");
  tcase_add_test(c, times_and_bytes_are_summed_by_program_and_op);
  tcase_add_test(c, an_empty_trace_gives_zeros);
  tcase_add_test(c, perfetto_events_are_json_with_a_wait_only_where_there_was_one);
  tcase_add_test(c, a_line_of_tsv_holds_a_span);
  tcase_add_test(c, the_artefact_reads_back_column_by_column);
  tcase_add_test(c, waits_of_the_engine_lie_inside_operations);
  tcase_add_test(c, the_engine_has_a_picture_with_a_row_a_role);
  return us_suite("profile", c);
}
US_TEST_MAIN(make_suite)
