/* table.h: records for machines: TSV with a header line, or JSON lines.
 *
 *     static const char *const columns[] = {"layer", "op", "bytes", "share"};
 *     struct us_table *table;
 *     if (us_table_open(stdout, columns, 4, json, &table, &err) != US_OK) return err.status;
 *     us_table_int(table, 3); us_table_text(table, "experts"); us_table_int(table, bytes); us_table_num(table, 0.25);
 *     if (us_table_close(table, &err) != US_OK) return err.status;
 *
 * Cells fill the columns in order; the last one of a row ends it. In TSV a tab, newline, carriage return or backslash in a
 * text is written \t, \n, \r, \\; in JSON bytes that are not UTF-8 become U+FFFD. Write errors show at close.
 */
#ifndef US_BASE_TABLE_H
#define US_BASE_TABLE_H

#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct us_table;

/* columns (n) must outlive the table. TSV writes its header now, so that an empty table has one. */
US_CHECKED enum us_status us_table_open(FILE *out, const char *const *columns, size_t n, bool json,
                                        struct us_table **ret_table, struct us_err *err);

/* The same behind rows that are there already: TSV, without a header. */
US_CHECKED enum us_status us_table_continue(FILE *out, const char *const *columns, size_t n,
                                            struct us_table **ret_table, struct us_err *err);

void us_table_text(struct us_table *table, const char *value); /* NULL is no value */
void us_table_int(struct us_table *table, int64_t value);
void us_table_num(struct us_table *table,
                  double value); /* shortest text that reads back equal; not finite: no value */
void us_table_bool(struct us_table *table, bool value);
void us_table_none(struct us_table *table); /* no value: an empty cell, null */

/* Flush, without closing the stream, and free. US_ERR_IO when something was not written, US_ERR_CHECK when the last row
 * is incomplete (a bug). */
US_CHECKED enum us_status us_table_close(struct us_table *table, struct us_err *err);

/* The same text forms, for single lines: value as a JSON string with quotes; value escaped for TSV; shortest number. */
void us_table_write_json_text(FILE *out, const char *value);
void us_table_write_tsv_text(FILE *out, const char *value);
void us_table_number(double value, char ret_text[32]);

#endif
