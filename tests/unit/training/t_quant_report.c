/* t_quant_report.c: rows of tensors, and what is written of them. */
#include "base/h5.h"
#include "training/quant_report.h"

#include "tiny_shards.h"

#include <math.h>

static struct tiny_world world;
static struct us_precision_rules formats;
static struct us_convert convert;
static struct us_qat run;
static struct us_model *stored;
static struct us_quant_row *rows; /* of tensors */
static size_t count;

static void open_all(void) {
  struct us_err err = {0};
  open_world(&world);
  US_OK_OR_FAIL(us_precision_parse("experts=mxfp4,attn.o=fp8", &formats, &err));
  convert = (struct us_convert){.rules = &formats, .scale_rule = US_SCALE_FLOOR};
  run = (struct us_qat){.original = world.model, .convert = &convert};
  US_OK_OR_FAIL(us_qat_open(&run, world.pool, &err));
  /* one master moves: down of expert 2 in layer 1 becomes twice itself */
  struct us_param *p = us_params_find(&run.params, "model.layers.1.mlp.experts.2.down_proj.weight");
  for (size_t i = 0; i < p->rows * p->cols; i++) p->value[i] *= 2.0f;
  US_OK_OR_FAIL(us_qat_export(&run, world.pool, &stored, &err));
  US_OK_OR_FAIL(us_quant_report(&run, stored, world.pool, &rows, &count, &err));
}

static void close_all(void) {
  free(rows);
  us_model_free(stored);
  us_qat_release(&run);
  close_world(&world);
}

START_TEST(every_matrix_that_changed_has_a_row_in_file_order) {
  /* 2 MoE layers of 4 experts with 3 matrices, 3 output projections */
  ck_assert_uint_eq(count, 2 * 4 * 3 + 3);
  ck_assert_str_eq(rows[0].name, "model.layers.0.self_attn.o_proj.weight");
  ck_assert_int_eq(rows[0].to, US_FORMAT_FP8);
  ck_assert_uint_eq(rows[0].from_bytes, 2 * rows[0].rows * rows[0].cols);
  for (size_t i = 1; i < count; i++) ck_assert_uint_ge(rows[i].layer, rows[i - 1].layer);
}
END_TEST

START_TEST(noise_is_that_of_the_stored_values_against_the_masters) {
  struct us_err err = {0};
  US_OK_OR_FAIL(us_params_refresh(&run.params, world.pool, US_SEQ_ROUND_BF16, &err));
  for (size_t i = 0; i < count; i++) {
    const struct us_param *p = us_params_find(&run.params, rows[i].name);
    double noise = 0.0, signal = 0.0;
    for (size_t k = 0; k < p->rows * p->cols; k++) {
      double d = (double)p->compute[k] - (double)p->value[k];
      noise += d * d;
      signal += (double)p->value[k] * (double)p->value[k];
    }
    ck_assert_double_eq_tol(rows[i].stats.sqnr_db, 10.0 * log10(signal / noise), 1e-6);
    bool moved = strstr(rows[i].name, "layers.1.mlp.experts.2.down_proj") != NULL;
    ck_assert_double_eq_tol(rows[i].moved, moved ? 1.0 : 0.0, 1e-6);
  }
}
END_TEST

START_TEST(an_artefact_holds_every_column_of_the_text_report) {
  struct us_err err = {0};
  char tsv[64], h5[64], line[4096];
  struct us_h5 *file;
  const struct us_h5_dataset *d;
  snprintf(tsv, sizeof tsv, "%s/r.tsv", world.folder);
  snprintf(h5, sizeof h5, "%s/r.h5", world.folder);
  US_OK_OR_FAIL(us_quant_report_write(tsv, rows, count, "{}", &err));
  US_OK_OR_FAIL(us_quant_report_write(h5, rows, count, "{}", &err));
  US_OK_OR_FAIL(us_h5_open(h5, "quant-report", &file, &err));
  FILE *text = fopen(tsv, "r");
  ck_assert_ptr_nonnull(text);
  ck_assert_ptr_nonnull(fgets(line, sizeof line, text));
  size_t columns = 0;
  for (char *name = strtok(line, "\t\n"); name; name = strtok(NULL, "\t\n"), columns++) {
    char path[128];
    snprintf(path, sizeof path, "tensors/%s", name);
    ck_assert_msg(us_h5_find(file, path) != NULL, "%s", path);
  }
  size_t datasets, lines = 0;
  us_h5_datasets(file, &datasets);
  ck_assert_uint_eq(datasets, columns);
  while (fgets(line, sizeof line, text)) lines++;
  ck_assert_uint_eq(lines, count);
  fclose(text);
  US_OK_OR_FAIL(us_h5_get(file, "tensors/sqnr_db", US_H5_F64, 1, (size_t[]){count}, &d, &err));
  for (size_t i = 0; i < count; i++) ck_assert_double_eq(((const double *)d->data)[i], rows[i].stats.sqnr_db);
  US_OK_OR_FAIL(us_h5_get(file, "tensors/tensor", US_H5_U8, 2, (size_t[]){count, 128}, &d, &err));
  ck_assert_str_eq((const char *)d->data + 128 * 3, rows[3].name);
  us_h5_close(file);
}
END_TEST

START_TEST(a_report_that_cannot_be_written_is_an_error) {
  struct us_err err = {0};
  ck_assert_int_eq(us_quant_report_write("/nowhere/r.tsv", rows, count, NULL, &err), US_ERR_IO);
  ck_assert_int_eq(us_quant_report_write("/nowhere/r.h5", rows, count, NULL, &err), US_ERR_IO);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("quant_report");
  tcase_add_unchecked_fixture(c, open_all, close_all);
  tcase_add_test(c, every_matrix_that_changed_has_a_row_in_file_order);
  tcase_add_test(c, noise_is_that_of_the_stored_values_against_the_masters);
  tcase_add_test(c, an_artefact_holds_every_column_of_the_text_report);
  tcase_add_test(c, a_report_that_cannot_be_written_is_an_error);
  return us_suite("quant_report", c);
}

US_TEST_MAIN(make_suite)
