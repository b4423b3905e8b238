/* table.c: TSV and JSON lines. */
#include "base/table.h"
#include "base/io.h"
#include "base/utf8.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct us_table {
  FILE *out;
  const char *const *columns;
  size_t n, next;
  bool json;
};

void us_table_write_json_text(FILE *out, const char *value) {
  fputc('"', out);
  for (const unsigned char *p = (const unsigned char *)value; *p;) {
    int n = us_utf8_length((const char *)p, 4, NULL); /* the final NUL ends a character that is cut */
    if (n < 0)
      fputs("\\ufffd", out);
    else if (*p == '"' || *p == '\\')
      fprintf(out, "\\%c", *p);
    else if (*p == '\n')
      fputs("\\n", out);
    else if (*p < 0x20 || *p == 0x7f)
      fprintf(out, "\\u%04x", *p);
    else
      fwrite(p, 1, (size_t)n, out);
    p += n > 0 ? n : 1;
  }
  fputc('"', out);
}

void us_table_write_tsv_text(FILE *out, const char *value) {
  for (; *value; value++) switch (*value) {
    case '\t':
      fputs("\\t", out);
      break;
    case '\n':
      fputs("\\n", out);
      break;
    case '\r':
      fputs("\\r", out);
      break;
    case '\\':
      fputs("\\\\", out);
      break;
    default:
      fputc(*value, out);
    }
}

void us_table_number(double value, char ret_text[32]) {
  if (value == trunc(value) && fabs(value) < 0x1p53) { /* bytes are not 1.31e+06 */
    snprintf(ret_text, 32, "%.0f", value);
    return;
  }
  for (int digits = 6; digits <= 17; digits++) {
    snprintf(ret_text, 32, "%.*g", digits, value);
    if (strtod(ret_text, NULL) == value) return;
  }
}

static enum us_status create(FILE *out, const char *const *columns, size_t n, bool json,
                             struct us_table **ret_table, struct us_err *err) {
  struct us_table *table = calloc(1, sizeof *table);
  if (!table) return us_err_memory(err, "a table", sizeof *table);
  *table = (struct us_table){.out = out, .columns = columns, .n = n, .json = json};
  *ret_table = table;
  return US_OK;
}

enum us_status us_table_open(FILE *out, const char *const *columns, size_t n, bool json,
                             struct us_table **ret_table, struct us_err *err) {
  enum us_status status = create(out, columns, n, json, ret_table, err);
  for (size_t i = 0; i < n && !json && status == US_OK; i++)
    fprintf(out, "%s%s", columns[i], i + 1 < n ? "\t" : "\n");
  return status;
}

enum us_status us_table_continue(FILE *out, const char *const *columns, size_t n, struct us_table **ret_table,
                                 struct us_err *err) {
  return create(out, columns, n, false, ret_table, err);
}

static void begin_cell(struct us_table *table) {
  size_t i = table->next;
  if (table->json) {
    fputs(i ? ", " : "{", table->out);
    us_table_write_json_text(table->out, table->columns[i]);
    fputs(": ", table->out);
  } else if (i)
    fputc('\t', table->out);
}

static void end_cell(struct us_table *table) {
  table->next++;
  if (table->next < table->n) return;
  fputs(table->json ? "}\n" : "\n", table->out);
  table->next = 0;
}

void us_table_none(struct us_table *table) {
  begin_cell(table);
  if (table->json) fputs("null", table->out);
  end_cell(table);
}

void us_table_text(struct us_table *table, const char *value) {
  if (!value) {
    us_table_none(table);
    return;
  }
  begin_cell(table);
  if (table->json)
    us_table_write_json_text(table->out, value);
  else
    us_table_write_tsv_text(table->out, value);
  end_cell(table);
}

void us_table_int(struct us_table *table, int64_t value) {
  begin_cell(table);
  fprintf(table->out, "%lld", (long long)value);
  end_cell(table);
}

void us_table_num(struct us_table *table, double value) {
  if (!isfinite(value)) {
    us_table_none(table);
    return;
  }
  char text[32];
  us_table_number(value, text);
  begin_cell(table);
  fputs(text, table->out);
  end_cell(table);
}

void us_table_bool(struct us_table *table, bool value) {
  begin_cell(table);
  fputs(value ? "true" : "false", table->out);
  end_cell(table);
}

enum us_status us_table_close(struct us_table *table, struct us_err *err) {
  enum us_status status = US_OK;
  if (table->next)
    status = us_err_set(err, US_ERR_CHECK, "bug: a row ended at column %zu of %zu", table->next, table->n);
  if (status == US_OK) status = us_io_flush(table->out, "output", err);
  free(table);
  return status;
}
