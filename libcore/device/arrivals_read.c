/* arrivals_read.c: a load from a table. */
#include "device/arrivals.h"

#include "base/buffer.h"

#include <stdlib.h>
#include <string.h>

enum { ARRIVAL, PROMPT, OUTPUT, COLUMNS };

static const char *const names[COLUMNS] = {"arrival_ms", "prompt_tokens", "output_tokens"};

/* Which column stands where. */
static enum us_status read_header(char *line, int order[COLUMNS], struct us_err *err) {
  bool seen[COLUMNS] = {false};
  int count = 0;
  for (char *word; (word = strsep(&line, "\t"));) {
    int column = 0;
    while (column < COLUMNS && strcmp(word, names[column])) column++;
    if (column == COLUMNS || seen[column])
      return us_err_set(err, US_ERR_INPUT,
                        "'%s' is not arrival_ms, prompt_tokens or output_tokens, each once", word);
    seen[column] = true;
    order[count++] = column;
  }
  if (count != COLUMNS)
    return us_err_set(err, US_ERR_INPUT, "expected arrival_ms, prompt_tokens, output_tokens");
  return US_OK;
}

/* Whether a value is a whole number from 1 to 2^20. */
static bool is_count(double value) {
  return value >= 1 && value <= 1 << 20 && value == (double)(uint32_t)value;
}

static bool read_row(char *line, const int order[COLUMNS], struct us_arrival *ret_arrival) {
  double values[COLUMNS];
  int count = 0;
  for (char *word; (word = strsep(&line, "\t"));) {
    char *end;
    if (count == COLUMNS) return false;
    values[order[count]] = strtod(word, &end);
    if (end == word || *end || !(values[order[count]] >= 0 && values[order[count]] < 1e12)) return false;
    count++;
  }
  if (count != COLUMNS || !is_count(values[PROMPT]) || !is_count(values[OUTPUT])) return false;
  *ret_arrival = (struct us_arrival){.seconds = values[ARRIVAL] / 1e3,
                                     .prompt_tokens = (uint32_t)values[PROMPT],
                                     .output_tokens = (uint32_t)values[OUTPUT]};
  return true;
}

/* Lines end in \n or \r\n; empty ones are skipped. `arrivals` has room for as many as there are lines. */
static enum us_status read_lines(struct us_buffer *text, struct us_arrival *arrivals, size_t *ret_n,
                                 struct us_err *err) {
  int order[COLUMNS];
  bool header = false;
  size_t number = 0, n = 0;
  for (char *line = text->data, *end = text->data + text->size, *next; line < end; line = next) {
    char *stop = memchr(line, '\n', (size_t)(end - line));
    next = stop ? stop + 1 : end;
    if (!stop) stop = end;
    *stop = 0;
    if (stop > line && stop[-1] == '\r') *--stop = 0;
    number++;
    if (strlen(line) != (size_t)(stop - line))
      return us_err_set(err, US_ERR_INPUT, "line %zu: has a NUL byte", number);
    if (line == stop) continue;
    if (!header) {
      enum us_status status = read_header(line, order, err);
      if (status != US_OK) return us_err_prefix(err, "line %zu", number);
      header = true;
      continue;
    }
    if (!read_row(line, order, &arrivals[n]))
      return us_err_set(err, US_ERR_INPUT, "line %zu: expected a time and two counts from 1 on", number);
    if (n && arrivals[n].seconds < arrivals[n - 1].seconds)
      return us_err_set(err, US_ERR_INPUT, "line %zu: arrives before the line above it", number);
    n++;
  }
  if (!n) return us_err_set(err, US_ERR_INPUT, "no arrivals");
  for (size_t i = n; i-- > 0;) arrivals[i].seconds -= arrivals[0].seconds;
  *ret_n = n;
  return US_OK;
}

enum us_status us_arrivals_read(const char *path, struct us_arrival **ret_arrivals, size_t *ret_n,
                                struct us_err *err) {
  struct us_buffer text = {0};
  size_t lines = 1;
  *ret_arrivals = NULL;
  enum us_status status = us_buffer_read_file(&text, path, (size_t)64 << 20, err);
  for (size_t i = 0; status == US_OK && i < text.size; i++) lines += text.data[i] == '\n';
  struct us_arrival *arrivals = status == US_OK ? calloc(lines, sizeof *arrivals) : NULL;
  if (status == US_OK && !arrivals) status = us_err_memory(err, "arrivals", lines * sizeof *arrivals);
  if (status == US_OK && !text.size)
    status = us_err_set(err, US_ERR_INPUT, "%s: no arrivals", path);
  else if (status == US_OK && (status = read_lines(&text, arrivals, ret_n, err)) != US_OK)
    us_err_prefix(err, "%s", path);
  us_buffer_release(&text);
  if (status == US_OK)
    *ret_arrivals = arrivals;
  else
    free(arrivals);
  return status;
}

uint32_t us_arrivals_positions(const struct us_arrival *arrivals, size_t n) {
  uint32_t most = 0;
  for (size_t i = 0; i < n; i++) {
    uint32_t positions = arrivals[i].prompt_tokens + arrivals[i].output_tokens + US_MAX_BLOCK;
    if (positions > most) most = positions;
  }
  return most;
}
