/* us-plot: tables of results to pictures. */
#include "base/buffer.h"
#include "base/plot.h"
#include "base/provenance.h"
#include "tools/tool.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TABLE ((size_t)256 << 20)

static const struct us_opt opts[] = {
    US_OPT_ARG("tables", "TABLE...", "TSV files with a header; - is stdin", .required = true, .repeat = true),
    US_OPT_FILE("output", 'o', "FILE.png", "picture to write", .required = true,
                .writes = US_OPT_WRITES_FILE),
    US_OPT_STR("x", 'x', "COLUMN", "what lies along the picture", .required = true),
    US_OPT_STR("y", 'y', "COLUMN", "what is drawn; may be repeated", .required = true, .repeat = true),
    US_OPT_STR("group", 'g', "COLUMN", "a series for each text in this column"),
    US_OPT_STR("name", 'n', "TEXT", "what a table is called, in their order; default: its file",
               .repeat = true),
    US_OPT_FLAG("points", 0, "points instead of lines"),
    US_OPT_GROUP("Axes"),
    US_OPT_STR("title", 0, "TEXT", "above the picture"),
    US_OPT_STR("x-title", 0, "TEXT", "unit in parentheses; default: the column"),
    US_OPT_STR("y-title", 0, "TEXT", "unit in parentheses; default: the column"),
    US_OPT_FLAG("x-log", 0, "logarithmic"),
    US_OPT_FLAG("y-log", 0, "logarithmic"),
    US_OPT_FLAG("from-zero", 0, "the y axis begins at 0"),
    US_OPT_COMMON_TALK,
    US_OPT_END,
};

/* A line of cells; those of a table are in its memory, NUL-terminated. */
struct line {
  char **cell;
  size_t n;
};

struct table {
  const char *path, *name;
  struct us_buffer text;
  struct line *line; /* the first is the header */
  size_t n;
};

struct picture {
  struct us_tool_run *run;
  struct table *tables;
  size_t table_count;
  size_t room; /* numbers of all tables and columns: what one series may have to hold */
  struct us_plot_series series[US_PLOT_MAX_SERIES];
  char *names[US_PLOT_MAX_SERIES];
  size_t count;
};

/* --- tables --- */

static enum us_status cut_line(struct line *line, char *text, struct us_err *err) {
  size_t most = 1;
  for (const char *p = text; *p; p++) most += *p == '\t';
  line->cell = calloc(most, sizeof *line->cell);
  if (!line->cell) return us_err_memory(err, "a table", most * sizeof *line->cell);
  for (char *p = text; p;) {
    line->cell[line->n++] = p;
    if ((p = strchr(p, '\t'))) *p++ = '\0';
  }
  return US_OK;
}

static enum us_status read_table(struct table *table, const char *path, struct us_err *err) {
  table->path = path;
  enum us_status status = us_buffer_read_file(&table->text, path, MAX_TABLE, err);
  size_t lines = 1;
  for (size_t i = 0; i < table->text.size; i++) lines += table->text.data[i] == '\n';
  if (status == US_OK && table->text.size && strlen(table->text.data) != table->text.size)
    status = us_err_set(err, US_ERR_INPUT, "%s: byte %zu is NUL: no text", path, strlen(table->text.data));
  if (status == US_OK && !(table->line = calloc(lines, sizeof *table->line)))
    status = us_err_memory(err, "a table", lines * sizeof *table->line);
  for (char *p = table->text.data; status == US_OK && p && *p;) {
    char *end = strchr(p, '\n');
    if (end && end > p && end[-1] == '\r') end[-1] = '\0'; /* of other systems */
    if (end) *end++ = '\0';
    status = cut_line(&table->line[table->n++], p, err);
    p = end;
  }
  if (status == US_OK && table->n == 0) status = us_err_set(err, US_ERR_INPUT, "%s: is empty", path);
  return status;
}

static enum us_status find_column(const struct table *table, const char *name, size_t *ret_column,
                                  struct us_err *err) {
  for (size_t i = 0; i < table->line[0].n; i++)
    if (strcmp(table->line[0].cell[i], name) == 0) return *ret_column = i, US_OK;
  return us_err_set(err, US_ERR_INPUT, "%s: no column '%s'", table->path, name);
}

/* A number, or NAN where the cell is empty or missing. */
static enum us_status number(const struct table *table, size_t row, size_t column, double *ret_number,
                             struct us_err *err) {
  const struct line *line = &table->line[row];
  const char *text = column < line->n ? line->cell[column] : "";
  char *end;
  *ret_number = *text ? strtod(text, &end) : (double)NAN;
  if (*text && *end)
    return us_err_set(err, US_ERR_INPUT, "%s: line %zu: %s: '%s' is no number", table->path, row + 1,
                      table->line[0].cell[column], text);
  return US_OK;
}

/* --- series --- */

/* The series of this name, made if it is new. */
static enum us_status series_of(struct picture *p, const char *name, struct us_plot_series **ret_series,
                                struct us_err *err) {
  for (size_t i = 0; i < p->count; i++)
    if (strcmp(p->names[i], name) == 0) return *ret_series = &p->series[i], US_OK;
  if (p->count == US_PLOT_MAX_SERIES)
    return us_err_set(err, US_ERR_USAGE, "more than %d series", US_PLOT_MAX_SERIES);
  struct us_plot_series *s = &p->series[p->count];
  p->names[p->count] = strdup(name);
  *s = (struct us_plot_series){.name = p->names[p->count],
                               .x = calloc(p->room, sizeof *s->x),
                               .y = calloc(p->room, sizeof *s->y),
                               .style = us_opt_flag(p->run->opts, "points") ? US_PLOT_POINTS : US_PLOT_LINE};
  p->count++;
  if (!s->name || !s->x || !s->y) return us_err_memory(err, "series", 2 * p->room * sizeof *s->x);
  *ret_series = s;
  return US_OK;
}

/* What the row's series is called: of table, column and group, those that there are several of. */
static void name_of(const struct picture *p, const struct table *table, const char *y, const char *group,
                    char *name, size_t size) {
  bool files = p->table_count > 1, columns = us_opt_count(p->run->opts, "y") > 1;
  snprintf(name, size, "%s%s%s%s%s", files ? table->name : "", files && (columns || group) ? " " : "",
           columns || (!files && !group) ? y : "", columns && group ? " " : "", group ? group : "");
}

/* A place in the picture: a logarithmic axis has none for what is not above 0. */
static bool is_drawn(const struct picture *p, double x, double y) {
  struct us_opts *o = p->run->opts;
  return isfinite(x) && isfinite(y) && (x > 0 || !us_opt_flag(o, "x-log")) &&
         (y > 0 || !us_opt_flag(o, "y-log"));
}

static enum us_status add_column(struct picture *p, const struct table *table, const char *y_name,
                                 struct us_err *err) {
  struct us_opts *o = p->run->opts;
  const char *group_name = us_opt_str(o, "group");
  size_t x_column, y_column, group_column = 0;
  enum us_status status = find_column(table, us_opt_str(o, "x"), &x_column, err);
  if (status == US_OK) status = find_column(table, y_name, &y_column, err);
  if (status == US_OK && group_name) status = find_column(table, group_name, &group_column, err);
  for (size_t row = 1; row < table->n && status == US_OK; row++) {
    const struct line *line = &table->line[row];
    const char *group = !group_name ? NULL : group_column < line->n ? line->cell[group_column] : "";
    char name[256];
    double x, y;
    struct us_plot_series *s = NULL;
    status = number(table, row, x_column, &x, err);
    if (status == US_OK) status = number(table, row, y_column, &y, err);
    if (status != US_OK || !is_drawn(p, x, y)) continue;
    name_of(p, table, y_name, group, name, sizeof name);
    status = series_of(p, name, &s, err);
    if (status != US_OK) break;
    ((double *)s->x)[s->n] = x;
    ((double *)s->y)[s->n++] = y;
  }
  return status;
}

/* --- the picture --- */

static enum us_status draw(struct picture *p, struct us_err *err) {
  struct us_opts *o = p->run->opts;
  struct us_plot_axes axes = {
      .title = us_opt_str(o, "title"),
      .x_title = us_opt_str(o, "x-title") ? us_opt_str(o, "x-title") : us_opt_str(o, "x"),
      .y_title = us_opt_str(o, "y-title") ? us_opt_str(o, "y-title") : us_opt_nth(o, "y", 0),
      .x_log = us_opt_flag(o, "x-log"),
      .y_log = us_opt_flag(o, "y-log"),
      .y_from_zero = us_opt_flag(o, "from-zero")};
  struct us_provenance *provenance = NULL;
  char *text = NULL;
  enum us_status status = us_tool_provenance(p->run, 0, &provenance, err);
  for (size_t i = 0; i < p->table_count && status == US_OK; i++)
    if (strcmp(p->tables[i].path, "-") != 0)
      status = us_tool_add_parent(provenance, p->tables[i].path, "table", err);
  if (status == US_OK && !(text = us_provenance_text(provenance, err))) status = err->status;
  if (status == US_OK) status = us_plot_xy(us_opt_str(o, "output"), &axes, p->series, p->count, text, err);
  us_provenance_free(provenance);
  free(text);
  return status;
}

static void release(struct picture *p) {
  for (size_t i = 0; i < p->table_count; i++) {
    for (size_t k = 0; k < p->tables[i].n; k++) free(p->tables[i].line[k].cell);
    free(p->tables[i].line);
    us_buffer_release(&p->tables[i].text);
  }
  for (size_t i = 0; i < p->count; i++) {
    free((double *)p->series[i].x), free((double *)p->series[i].y);
    free(p->names[i]);
  }
  free(p->tables);
}

static enum us_status run(struct us_tool_run *tool_run, struct us_err *err) {
  struct us_opts *o = tool_run->opts;
  struct picture p = {.run = tool_run, .table_count = us_opt_count(o, "tables")};
  enum us_status status = us_tool_check_outputs(tool_run, err);
  p.tables = calloc(p.table_count, sizeof *p.tables);
  if (status == US_OK && !p.tables) status = us_err_memory(err, "tables", p.table_count * sizeof *p.tables);
  for (size_t i = 0; i < p.table_count && status == US_OK; i++) {
    const char *path = us_opt_nth(o, "tables", i), *slash = strrchr(path, '/');
    p.tables[i].name = i < us_opt_count(o, "name") ? us_opt_nth(o, "name", i) : slash ? slash + 1 : path;
    status = read_table(&p.tables[i], path, err);
    p.room += p.tables[i].n * us_opt_count(o, "y");
  }
  for (size_t i = 0; i < p.table_count && status == US_OK; i++)
    for (size_t k = 0; k < us_opt_count(o, "y") && status == US_OK; k++)
      status = add_column(&p, &p.tables[i], us_opt_nth(o, "y", k), err);
  if (status == US_OK && p.count == 0)
    status = us_err_set(err, US_ERR_INPUT, "no row has both numbers, above 0 where the axis is logarithmic");
  if (status == US_OK) status = draw(&p, err);
  if (p.tables) release(&p);
  return status;
}

static const struct us_tool tool = {
    .name = "us-plot",
    .summary = "tables of results to pictures",
    .description =
        "Draws columns of TSV tables (training logs, tables of us-eval and of the recipes) against each "
        "other: a line, "
        "or points, for each table, each column of --y, and each text in the column --group. Cells without a "
        "number are left out.",
    .examples = "# loss curves of two runs\n"
                "us-plot muon.tsv adamw.tsv -x tokens -y loss -o loss.png\n"
                "# quality against bytes, a colour a module family\n"
                "us-plot precision.tsv -x bytes -y kl -g family --points --y-log -o pareto.png",
    .opts = opts,
    .run = run,
};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
