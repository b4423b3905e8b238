/* corpus.c: files of text, questions and dialogues, one document at a time.
 *
 * Contents: emitting; dialogues; JSON; files and folders.
 */
#include "training/corpus.h"
#include "base/json.h"
#include "formats/chat.h"
#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MAX_DEPTH    16
#define MAX_MESSAGES 4096

struct reader {
  const struct us_corpus_options *options;
  us_corpus_take *take;
  void *arg;
  struct us_err *err;
  struct us_buffer text;
  struct us_segment *segments;
  size_t n_segments, capacity;
  size_t n_files;
};

/* Emitting */

/* End the segment that began where the last one ended. Empty ones are left out. */
static enum us_status cut(struct reader *reader, size_t end, bool loss) {
  size_t begin = reader->n_segments ? reader->segments[reader->n_segments - 1].end : 0;
  if (end <= begin) return US_OK;
  if (reader->n_segments == reader->capacity) {
    size_t capacity = reader->capacity ? 2 * reader->capacity : 16;
    struct us_segment *segments = realloc(reader->segments, capacity * sizeof *segments);
    if (segments == NULL) return us_err_memory(reader->err, "segments", capacity * sizeof *segments);
    reader->segments = segments;
    reader->capacity = capacity;
  }
  reader->segments[reader->n_segments++] = (struct us_segment){.begin = begin, .end = end, .loss = loss};
  return US_OK;
}

static void start(struct reader *reader) {
  us_buffer_clear(&reader->text);
  reader->n_segments = 0;
}

static enum us_status emit(struct reader *reader, const char *source, bool formatted) {
  struct us_document document = {.source = source,
                                 .text = reader->text.data,
                                 .bytes = reader->text.size,
                                 .segments = reader->segments,
                                 .n_segments = reader->n_segments,
                                 .formatted = formatted};
  return reader->text.size ? reader->take(&document, reader->arg, reader->err) : US_OK;
}

/* One text, all of it to be learned. */
static enum us_status emit_text(struct reader *reader, const char *source, const char *text, size_t n) {
  start(reader);
  enum us_status status = us_buffer_append(&reader->text, text, n, reader->err);
  if (status == US_OK) status = cut(reader, n, true);
  return status == US_OK ? emit(reader, source, false) : status;
}

/* Dialogues */

static enum us_status add_lines(struct reader *reader, const struct us_message *messages, size_t n) {
  enum us_status status = US_OK;
  for (size_t i = 0; i < n && status == US_OK; i++) {
    const char *content = messages[i].content ? messages[i].content : "None";
    status = us_buffer_add(&reader->text, messages[i].role, reader->err);
    if (status == US_OK) status = us_buffer_add(&reader->text, ":", reader->err);
    if (status == US_OK) status = cut(reader, reader->text.size, false);
    if (status == US_OK) status = us_buffer_add(&reader->text, " ", reader->err);
    if (status == US_OK) status = us_buffer_add(&reader->text, content, reader->err);
    if (status == US_OK) status = us_buffer_add(&reader->text, "\n", reader->err);
    if (status == US_OK) status = cut(reader, reader->text.size, strcmp(messages[i].role, "assistant") == 0);
  }
  return status;
}

static enum us_status add_template(struct reader *reader, const struct us_message *messages, size_t n) {
  struct us_chat_options options = {.plain_turns = reader->options->template == US_TEMPLATE_PLAIN};
  struct us_chat_span *spans = calloc(n, sizeof *spans);
  size_t n_spans = 0;
  if (spans == NULL) return us_err_memory(reader->err, "messages", n * sizeof *spans);
  enum us_status status =
      us_chat_format_spans(messages, n, &options, &reader->text, spans, &n_spans, reader->err);
  for (size_t i = 0; i < n_spans && status == US_OK; i++) {
    status = cut(reader, spans[i].begin, false);
    if (status == US_OK) status = cut(reader, spans[i].end, true);
  }
  free(spans);
  return status == US_OK ? cut(reader, reader->text.size, false) : status;
}

static enum us_status emit_messages(struct reader *reader, const char *source,
                                    const struct us_message *messages, size_t n) {
  bool lines = reader->options->template == US_TEMPLATE_LINES;
  bool drop = reader->options->drop_system && n > 0 && strcmp(messages[0].role, "system") == 0;
  messages += drop;
  n -= drop;
  if (n == 0) return US_OK;
  start(reader);
  enum us_status status = lines ? add_lines(reader, messages, n) : add_template(reader, messages, n);
  if (status == US_ERR_USAGE) {
    reader->err->status = US_ERR_INPUT;
    return us_err_prefix(reader->err, "%s", source);
  }
  return status == US_OK ? emit(reader, source, !lines) : status;
}

static enum us_status emit_answer(struct reader *reader, const char *source, const char *question,
                                  const char *answer) {
  if (reader->options->template != US_TEMPLATE_LINES) {
    struct us_message messages[] = {{.role = "user", .content = question},
                                    {.role = "assistant", .content = answer}};
    return emit_messages(reader, source, messages, 2);
  }
  start(reader);
  enum us_status status = us_buffer_add(&reader->text, question, reader->err);
  if (status == US_OK) status = us_buffer_add(&reader->text, "\n", reader->err);
  if (status == US_OK) status = cut(reader, reader->text.size, false);
  if (status == US_OK) status = us_buffer_add(&reader->text, answer, reader->err);
  if (status == US_OK) status = cut(reader, reader->text.size, true);
  return status == US_OK ? emit(reader, source, false) : status;
}

/* JSON */

#define bad(reader, source, ...)                                                                             \
  (us_err_set((reader)->err, US_ERR_INPUT, __VA_ARGS__), us_err_prefix((reader)->err, "%s", source))

/* One call as the chat template writes it. Arguments are a JSON object, or a text that holds one. */
static enum us_status add_call(struct reader *reader, const json_t *call, struct us_buffer *content) {
  const json_t *function = json_object_get(call, "function");
  const char *name = json_string_value(json_object_get(function ? function : call, "name"));
  json_t *arguments = json_object_get(function ? function : call, "arguments");
  json_t *owned = json_is_string(arguments) ? json_loads(json_string_value(arguments), 0, NULL) : NULL;
  const char *keys[64], *key;
  char *values[64];
  size_t n = 0;
  json_t *value;
  enum us_status status = US_OK;
  json_object_foreach(owned ? owned : arguments, key, value) {
    if (n == 64) break;
    keys[n] = key;
    values[n] = json_is_string(value) ? strdup(json_string_value(value)) : json_dumps(value, JSON_ENCODE_ANY);
    if (values[n++] == NULL) status = us_err_memory(reader->err, "tool call", 64);
  }
  if (status == US_OK && content->size > 0) status = us_buffer_add(content, "\n", reader->err);
  if (status == US_OK)
    status = us_chat_tool_call(name ? name : "", keys, (const char *const *)values, n, content, reader->err);
  for (size_t i = 0; i < n; i++) free(values[i]);
  json_decref(owned);
  return status;
}

/* A message's content with its tool calls behind it, or NULL for neither; *ret_content is malloc'd. */
static enum us_status get_content(struct reader *reader, const json_t *message, char **ret_content) {
  const json_t *text = json_object_get(message, "content"), *calls = json_object_get(message, "tool_calls");
  const json_t *single = json_object_get(message, "function_call");
  struct us_buffer content = {0};
  enum us_status status = US_OK;
  *ret_content = NULL;
  if (!json_is_string(text) && json_array_size(calls) == 0 && !json_is_object(single)) return US_OK;
  status = us_buffer_add(&content, json_is_string(text) ? json_string_value(text) : "", reader->err);
  for (size_t i = 0; i < json_array_size(calls) && status == US_OK; i++)
    status = add_call(reader, json_array_get(calls, i), &content);
  if (json_is_object(single) && status == US_OK) status = add_call(reader, single, &content);
  if (status == US_OK)
    *ret_content = content.data;
  else
    us_buffer_release(&content);
  return status;
}

static enum us_status read_dialogue(struct reader *reader, const char *source, const json_t *list,
                                    const char *field) {
  size_t n = json_array_size(list);
  if (n == 0 || n > MAX_MESSAGES)
    return bad(reader, source, "%s: not a list of 1 to %d messages", field, MAX_MESSAGES);
  struct us_message *messages = calloc(n, sizeof *messages);
  if (messages == NULL) return us_err_memory(reader->err, "messages", n * sizeof *messages);
  enum us_status status = US_OK;
  for (size_t i = 0; i < n && status == US_OK; i++) {
    const json_t *message = json_array_get(list, i), *content = json_object_get(message, "content");
    const char *role = json_string_value(json_object_get(message, "role"));
    char *owned = NULL;
    if (role == NULL)
      status = bad(reader, source, "%s[%zu].role: not a string", field, i);
    else if (content && !json_is_string(content) && !json_is_null(content))
      status = bad(reader, source, "%s[%zu].content: neither a string nor null", field, i);
    else
      status = get_content(reader, message, &owned);
    messages[i] = (struct us_message){.role = role,
                                      .content = owned,
                                      .reasoning = json_string_value(json_object_get(message, "reasoning"))};
  }
  if (status == US_OK) status = emit_messages(reader, source, messages, n);
  for (size_t i = 0; i < n; i++) free((char *)messages[i].content);
  free(messages);
  return status;
}

static enum us_status read_object(struct reader *reader, const char *source, const json_t *object) {
  static const char *const pairs[][2] = {{"question", "answer"}, {"prompt", "response"}};
  static const char *const lists[] = {"messages", "traj"};
  const json_t *text = json_object_get(object, "text");
  if (json_is_string(text))
    return emit_text(reader, source, json_string_value(text), json_string_length(text));
  for (int i = 0; i < 2; i++) {
    const char *question = json_string_value(json_object_get(object, pairs[i][0]));
    const char *answer = json_string_value(json_object_get(object, pairs[i][1]));
    if (question && answer) return emit_answer(reader, source, question, answer);
  }
  for (int i = 0; i < 2; i++) {
    const json_t *list = json_object_get(object, lists[i]);
    if (json_is_array(list)) return read_dialogue(reader, source, list, lists[i]);
  }
  return bad(reader, source, "no text, question and answer, prompt and response, messages or traj");
}

static enum us_status read_json(struct reader *reader, const char *path, const char *text, size_t n) {
  json_t *root;
  enum us_status status = us_json_parse(text, n, path, &root, reader->err);
  if (status != US_OK) return status;
  size_t count = json_is_array(root) ? json_array_size(root) : 1;
  for (size_t i = 0; i < count && status == US_OK; i++) {
    char source[512];
    snprintf(source, sizeof source, "%s: item %zu", path, i);
    status = read_object(reader, source, json_is_array(root) ? json_array_get(root, i) : root);
  }
  json_decref(root);
  return status;
}

static enum us_status read_json_lines(struct reader *reader, const char *path, const char *text, size_t n) {
  enum us_status status = US_OK;
  size_t line = 1;
  for (size_t at = 0; at < n && status == US_OK; line++) {
    const char *end = memchr(text + at, '\n', n - at);
    size_t next = end ? (size_t)(end - text) + 1 : n;
    char source[512];
    json_t *object;
    snprintf(source, sizeof source, "%s: line %zu", path, line);
    if (strspn(text + at, " \t\r\n") < next - at) {
      if ((status = us_json_parse(text + at, next - at, source, &object, reader->err)) != US_OK) break;
      status = read_object(reader, source, object);
      json_decref(object);
    }
    at = next;
  }
  return status;
}

/* Files and folders */

static bool has_suffix(const char *name, const char *suffix) {
  const char *dot = strrchr(name, '.');
  return dot && strcmp(dot + 1, suffix) == 0;
}

static bool is_text(const char *name) {
  static const char *const suffixes[] = {"txt",  "md",  "rst", "py",   "c",    "h",    "cc",   "cpp",
                                         "hpp",  "cu",  "js",  "ts",   "sh",   "java", "go",   "rs",
                                         "html", "css", "tex", "toml", "yaml", "json", "jsonl"};
  for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++)
    if (has_suffix(name, suffixes[i])) return true;
  return false;
}

static enum us_status read_file(struct reader *reader, const char *path) {
  struct us_buffer file = {0};
  enum us_status status = us_buffer_read_file(&file, path, US_CORPUS_MAX_FILE, reader->err);
  reader->n_files++;
  if (status == US_OK && has_suffix(path, "jsonl"))
    status = read_json_lines(reader, path, file.data, file.size);
  else if (status == US_OK && has_suffix(path, "json"))
    status = read_json(reader, path, file.data, file.size);
  else if (status == US_OK)
    status = emit_text(reader, path, file.data, file.size);
  us_buffer_release(&file);
  return status;
}

static int is_shown(const struct dirent *entry) {
  return entry->d_name[0] != '.';
}
static int by_name(const struct dirent **a, const struct dirent **b) {
  return strcmp((*a)->d_name, (*b)->d_name);
}

static enum us_status read_folder(struct reader *reader, const char *path, int depth) {
  struct dirent **entries;
  int n = depth < MAX_DEPTH ? scandir(path, &entries, is_shown, by_name) : 0;
  if (n < 0) return us_err_errno(reader->err, US_ERR_IO, "%s: cannot list", path);
  if (depth >= MAX_DEPTH)
    return us_err_set(reader->err, US_ERR_INPUT, "%s: more than %d folders deep", path, MAX_DEPTH);
  enum us_status status = US_OK;
  for (int i = 0; i < n; i++) {
    struct us_buffer name = {0};
    struct stat info;
    if (status == US_OK) status = us_buffer_add(&name, path, reader->err);
    if (status == US_OK) status = us_buffer_add(&name, "/", reader->err);
    if (status == US_OK) status = us_buffer_add(&name, entries[i]->d_name, reader->err);
    if (status == US_OK && lstat(name.data, &info) == 0) {
      if (S_ISDIR(info.st_mode))
        status = read_folder(reader, name.data, depth + 1);
      else if (S_ISREG(info.st_mode) && is_text(entries[i]->d_name))
        status = read_file(reader, name.data);
    }
    us_buffer_release(&name);
    free(entries[i]);
  }
  free(entries);
  return status;
}

enum us_status us_corpus_read(const char *path, const struct us_corpus_options *options, us_corpus_take *take,
                              void *arg, struct us_err *err) {
  struct us_err own;
  struct reader reader = {.options = options, .take = take, .arg = arg, .err = err ? err : &own};
  struct stat info;
  if (stat(path, &info) != 0) return us_err_errno(reader.err, US_ERR_IO, "%s: cannot open", path);
  enum us_status status = S_ISDIR(info.st_mode) ? read_folder(&reader, path, 0) : read_file(&reader, path);
  if (status == US_OK && reader.n_files == 0)
    status = us_err_set(reader.err, US_ERR_INPUT, "%s: no text file in it", path);
  us_buffer_release(&reader.text);
  free(reader.segments);
  return status;
}
