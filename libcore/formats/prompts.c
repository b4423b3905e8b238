/* prompts.c: prompt sets as JSON lines. */
#include "formats/prompts.h"
#include "base/json.h"
#include <dirent.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MAX_FILE ((size_t)256 << 20)

/* Where a line's problem is reported. */
struct place {
  const char *name;
  size_t line;
  struct us_err *err;
};

#define bad(place, ...)                                                                                      \
  (us_err_set((place)->err, US_ERR_INPUT, __VA_ARGS__),                                                      \
   us_err_prefix((place)->err, "%s: line %zu", (place)->name, (place)->line))

/* Keep a JSON value as long as the prompts live; returns it, NULL when out of memory. */
static json_t *keep(struct us_prompts *prompts, json_t *value) {
  return value && json_array_append_new(prompts->memory, value) == 0 ? value : NULL;
}

static enum us_status get_turns(struct us_prompt *prompt, const json_t *turns, const struct place *place) {
  for (size_t i = 0; i < prompt->n_messages; i++) {
    const char *text = json_string_value(json_array_get(turns, i));
    if (text == NULL) return bad(place, "turns[%zu]: not a string", i);
    prompt->messages[i] = (struct us_message){.role = "user", .content = text};
  }
  return US_OK;
}

static enum us_status get_messages(struct us_prompt *prompt, const json_t *list, const struct place *place) {
  static const char *const keys[] = {"role", "content", "reasoning"};
  static const char *const roles[] = {"system", "user", "assistant", "tool"};
  for (size_t i = 0; i < prompt->n_messages; i++) {
    const char *values[3];
    for (int k = 0; k < 3; k++) {
      const json_t *value = json_object_get(json_array_get(list, i), keys[k]);
      bool missing = value == NULL || json_is_null(value);
      if (!(missing && k > 0) && !json_is_string(value))
        return bad(place, "messages[%zu].%s: not a string", i, keys[k]);
      values[k] = json_string_value(value);
    }
    bool known = false;
    for (int k = 0; k < 4; k++) known |= strcmp(values[0], roles[k]) == 0 && (k > 0 || i == 0);
    if (!known)
      return bad(place, "messages[%zu].role: \"%.32s\" is not a role, or is out of place", i, values[0]);
    prompt->messages[i] =
        (struct us_message){.role = values[0], .content = values[1], .reasoning = values[2]};
  }
  return US_OK;
}

static enum us_status get_chat(struct us_prompt *prompt, const json_t *list, const char *key,
                               const struct place *place) {
  if (!json_is_array(list) || json_array_size(list) == 0)
    return bad(place, "%s: not an array of at least one", key);
  prompt->n_messages = json_array_size(list);
  prompt->messages = calloc(prompt->n_messages, sizeof *prompt->messages);
  if (prompt->messages == NULL)
    return us_err_memory(place->err, key, prompt->n_messages * sizeof *prompt->messages);
  return prompt->kind == US_PROMPT_TURNS ? get_turns(prompt, list, place) : get_messages(prompt, list, place);
}

static enum us_status get_body(struct us_prompt *prompt, const json_t *object, const struct place *place) {
  static const char *const kinds[] = {"prompt", "turns", "messages", "question"};
  int found = -1;
  for (int k = 0; k < 4; k++) {
    if (json_object_get(object, kinds[k]) == NULL) continue;
    if (found >= 0) return bad(place, "both \"%s\" and \"%s\"", kinds[found], kinds[k]);
    found = k;
  }
  if (found < 0) return bad(place, "none of \"prompt\", \"turns\", \"messages\", \"question\"");
  const json_t *body = json_object_get(object, kinds[found]);
  prompt->kind = (enum us_prompt_kind)found;
  if (prompt->kind == US_PROMPT_TURNS || prompt->kind == US_PROMPT_MESSAGES)
    return get_chat(prompt, body, kinds[found], place);
  prompt->text = json_string_value(body);
  if (prompt->text == NULL) return bad(place, "%s: not a string", kinds[found]);
  if (prompt->kind == US_PROMPT_TEXT) return US_OK;
  prompt->answer = json_string_value(json_object_get(object, "answer"));
  return prompt->answer ? US_OK : bad(place, "answer: not a string");
}

/* "id" and "scenario": text, with what stands for a missing one. A number is taken as an id too. */
static enum us_status get_names(struct us_prompts *prompts, struct us_prompt *prompt, const json_t *object,
                                const char *scenario, const struct place *place) {
  const json_t *id = json_object_get(object, "id"), *given = json_object_get(object, "scenario");
  if (id && !json_is_string(id) && !json_is_integer(id))
    return bad(place, "id: neither a string nor a number");
  if (given && !json_is_string(given)) return bad(place, "scenario: not a string");
  if (json_is_string(id)) {
    prompt->id = json_string_value(id);
  } else {
    char number[32];
    snprintf(number, sizeof number, "%lld", id ? (long long)json_integer_value(id) : (long long)place->line);
    prompt->id = json_string_value(keep(prompts, json_string(number)));
  }
  prompt->scenario =
      given ? json_string_value(given) : json_string_value(keep(prompts, json_string(scenario)));
  if (prompt->id == NULL || prompt->scenario == NULL)
    return us_err_memory(place->err, "prompts", strlen(scenario));
  return US_OK;
}

static enum us_status add_line(struct us_prompts *prompts, const char *text, size_t bytes,
                               const char *scenario, const struct place *place) {
  char where[US_ERR_MESSAGE_MAX];
  json_t *object;
  snprintf(where, sizeof where, "%s: line %zu", place->name, place->line);
  enum us_status status = us_json_parse(text, bytes, where, &object, place->err);
  if (status != US_OK) return status;
  if (keep(prompts, object) == NULL) return us_err_memory(place->err, "prompts", bytes);
  if (!json_is_object(object)) return bad(place, "not a JSON object");
  if ((prompts->n & (prompts->n - 1)) == 0) {
    size_t capacity = prompts->n ? 2 * prompts->n : 1;
    struct us_prompt *items = realloc(prompts->items, capacity * sizeof *items);
    if (items == NULL) return us_err_memory(place->err, "prompts", capacity * sizeof *items);
    prompts->items = items;
  }
  struct us_prompt *prompt = &prompts->items[prompts->n++];
  *prompt = (struct us_prompt){0};
  status = get_names(prompts, prompt, object, scenario, place);
  return status == US_OK ? get_body(prompt, object, place) : status;
}

/* "data/prompts/math.jsonl" gives "math". */
static void scenario_of(const char *name, char out[64]) {
  const char *slash = strrchr(name, '/');
  snprintf(out, 64, "%s", slash ? slash + 1 : name);
  char *dot = strchr(out, '.');
  if (dot && dot > out) *dot = '\0';
  /* A cut name could end inside a character, which JSON strings refuse. */
  for (char *p = out; *p; p++)
    if ((unsigned char)*p >= 0x80) *p = '_';
}

static enum us_status add_lines(struct us_prompts *prompts, const char *text, size_t bytes, const char *name,
                                struct us_err *err) {
  struct place place = {.name = name, .err = err};
  char scenario[64];
  scenario_of(name, scenario);
  for (size_t at = 0; at < bytes;) {
    const char *end = memchr(text + at, '\n', bytes - at);
    size_t next = end ? (size_t)(end - text) + 1 : bytes, begin = at;
    while (begin < next && strchr(" \t\r\n", text[begin]) && text[begin]) begin++;
    place.line++;
    if (begin < next) {
      enum us_status status = add_line(prompts, text + begin, next - begin, scenario, &place);
      if (status != US_OK) return status;
    }
    at = next;
  }
  return US_OK;
}

static enum us_status create(struct us_prompts **ret_prompts, struct us_err *err) {
  struct us_prompts *prompts = calloc(1, sizeof *prompts);
  if (prompts) prompts->memory = json_array();
  *ret_prompts = prompts;
  if (prompts && prompts->memory) return US_OK;
  us_prompts_free(prompts);
  *ret_prompts = NULL;
  return us_err_memory(err, "prompts", sizeof *prompts);
}

static enum us_status add_file(struct us_prompts *prompts, const char *path, struct us_err *err) {
  struct us_buffer text = {0};
  enum us_status status = us_buffer_read_file(&text, path, MAX_FILE, err);
  if (status == US_OK) status = add_lines(prompts, text.data, text.size, path, err);
  us_buffer_release(&text);
  return status;
}

/* Hand the prompts over, or drop them. */
static enum us_status finish(struct us_prompts *prompts, enum us_status status, const char *name,
                             struct us_prompts **ret_prompts, struct us_err *err) {
  if (status == US_OK && prompts->n == 0) status = us_err_set(err, US_ERR_INPUT, "%s: no prompt in it", name);
  if (status == US_OK)
    *ret_prompts = prompts;
  else
    us_prompts_free(prompts);
  return status;
}

enum us_status us_prompts_parse(const char *text, size_t bytes, const char *name,
                                struct us_prompts **ret_prompts, struct us_err *err) {
  struct us_prompts *prompts;
  struct us_err own;
  enum us_status status = create(&prompts, err = err ? err : &own);
  if (status != US_OK) return status;
  return finish(prompts, add_lines(prompts, text, bytes, name, err), name, ret_prompts, err);
}

enum us_status us_prompts_open(const char *path, struct us_prompts **ret_prompts, struct us_err *err) {
  struct us_prompts *prompts;
  struct us_err own;
  enum us_status status = create(&prompts, err = err ? err : &own);
  if (status != US_OK) return status;
  return finish(prompts, add_file(prompts, path, err), path, ret_prompts, err);
}

static int is_jsonl(const struct dirent *entry) {
  const char *dot = strrchr(entry->d_name, '.');
  return dot && strcmp(dot, ".jsonl") == 0;
}

static int by_name(const struct dirent **a, const struct dirent **b) {
  return strcmp((*a)->d_name, (*b)->d_name);
}

enum us_status us_prompts_open_dir(const char *path, struct us_prompts **ret_prompts, struct us_err *err) {
  struct us_prompts *prompts;
  struct dirent **entries;
  struct stat info;
  struct us_err own;
  err = err ? err : &own;
  if (strcmp(path, "-") == 0 || (stat(path, &info) == 0 && !S_ISDIR(info.st_mode)))
    return us_prompts_open(path, ret_prompts, err);
  int n = scandir(path, &entries, is_jsonl, by_name);
  if (n < 0) return us_err_errno(err, US_ERR_IO, "%s: cannot list", path);
  enum us_status status = create(&prompts, err);
  for (int i = 0; i < n; i++) {
    struct us_buffer name = {0};
    if (status == US_OK) status = us_buffer_add(&name, path, err);
    if (status == US_OK) status = us_buffer_add(&name, "/", err);
    if (status == US_OK) status = us_buffer_add(&name, entries[i]->d_name, err);
    if (status == US_OK) status = add_file(prompts, name.data, err);
    us_buffer_release(&name);
    free(entries[i]);
  }
  free(entries);
  return prompts ? finish(prompts, status, path, ret_prompts, err) : status;
}

void us_prompts_free(struct us_prompts *prompts) {
  if (prompts == NULL) return;
  for (size_t i = 0; i < prompts->n; i++) free(prompts->items[i].messages);
  free(prompts->items);
  json_decref(prompts->memory);
  free(prompts);
}
