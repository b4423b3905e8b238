/* chat.c: MiMo's chat template (ChatML with think tags and grouped tool responses). */
#include "formats/chat.h"
#include <stdarg.h>
#include <string.h>

/* Append several strings; the last argument is NULL. */
static enum us_status add_all(struct us_buffer *text, struct us_err *err, ...) {
  enum us_status status = US_OK;
  va_list args;
  va_start(args, err);
  for (const char *part; status == US_OK && (part = va_arg(args, const char *)) != NULL;)
    status = us_buffer_add(text, part, err);
  va_end(args);
  return status;
}

static bool is_role(const struct us_message *message, const char *role) {
  return strcmp(message->role, role) == 0;
}

static enum us_status check(const struct us_message *messages, size_t n, struct us_err *err) {
  if (n == 0) return us_err_set(err, US_ERR_USAGE, "a chat without messages");
  for (size_t i = 0; i < n; i++) {
    const struct us_message *message = &messages[i];
    if (message->role == NULL) return us_err_set(err, US_ERR_USAGE, "messages[%zu].role: missing", i);
    if (is_role(message, "system") && i > 0)
      return us_err_set(err, US_ERR_USAGE, "messages[%zu].role: a system message must come first", i);
    if (!is_role(message, "system") && !is_role(message, "user") && !is_role(message, "assistant") &&
        !is_role(message, "tool"))
      return us_err_set(err, US_ERR_USAGE,
                        "messages[%zu].role: \"%.32s\" is not system, user, assistant or tool", i,
                        message->role);
  }
  return US_OK;
}

static enum us_status add_tool(const struct us_message *messages, size_t n, size_t i, struct us_buffer *text,
                               const char *content, struct us_err *err) {
  bool first = i == 0 || !is_role(&messages[i - 1], "tool");
  bool last = i + 1 == n || !is_role(&messages[i + 1], "tool");
  return add_all(text, err, first ? "<|im_start|>tool\n" : "", "<tool_response>\n", content,
                 "\n</tool_response>\n", last ? "<|im_end|>" : "", NULL);
}

enum us_status us_chat_format_spans(const struct us_message *messages, size_t n,
                                    const struct us_chat_options *options, struct us_buffer *text,
                                    struct us_chat_span *ret_spans, size_t *ret_n_spans, struct us_err *err) {
  enum us_status status = check(messages, n, err);
  size_t last_user = 0, n_spans = 0;
  if (status != US_OK) return status;
  for (size_t i = 0; i < n; i++)
    if (is_role(&messages[i], "user")) last_user = i;
  if (!is_role(&messages[0], "system") && !options->plain_turns)
    status = us_buffer_add(text, "<|im_start|>system\n" US_CHAT_SYSTEM "<|im_end|>", err);
  for (size_t i = 0; i < n && status == US_OK; i++) {
    const struct us_message *message = &messages[i];
    const char *content = message->content ? message->content : "";
    if (is_role(message, "tool")) {
      status = add_tool(messages, n, i, text, content, err);
      continue;
    }
    if ((status = add_all(text, err, "<|im_start|>", message->role, "\n", NULL)) != US_OK) break;
    size_t begin = text->size;
    if (is_role(message, "assistant")) {
      bool keep = message->reasoning && (options->keep_reasoning || i > last_user);
      if (keep || !options->plain_turns)
        status = add_all(text, err, "<think>", keep ? message->reasoning : "", "</think>", NULL);
    }
    if (status == US_OK) status = add_all(text, err, content, "<|im_end|>", NULL);
    if (is_role(message, "assistant") && ret_spans)
      ret_spans[n_spans++] = (struct us_chat_span){.begin = begin, .end = text->size};
  }
  if (status == US_OK && options->generate)
    status =
        add_all(text, err, "<|im_start|>assistant\n", options->thinking ? NULL : "<think></think>", NULL);
  if (ret_n_spans) *ret_n_spans = n_spans;
  return status;
}

enum us_status us_chat_format(const struct us_message *messages, size_t n,
                              const struct us_chat_options *options, struct us_buffer *text,
                              struct us_err *err) {
  return us_chat_format_spans(messages, n, options, text, NULL, NULL, err);
}

enum us_status us_chat_tool_call(const char *name, const char *const *keys, const char *const *values,
                                 size_t n, struct us_buffer *text, struct us_err *err) {
  enum us_status status = add_all(text, err, "<tool_call>\n<function=", name, ">\n", NULL);
  for (size_t i = 0; i < n && status == US_OK; i++)
    status = add_all(text, err, "<parameter=", keys[i], ">", values[i], "</parameter>\n", NULL);
  return status == US_OK ? us_buffer_add(text, "</function>\n</tool_call>", err) : status;
}
