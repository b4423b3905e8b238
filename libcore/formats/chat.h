/* chat.h: MiMo's chat template: messages to the text a model sees.
 *
 *     struct us_message messages[] = {{.role = "user", .content = "hello"}};
 *     struct us_buffer text = {0};
 *     struct us_chat_options options = {.generate = true, .thinking = true};
 *     us_chat_format(messages, 1, &options, &text, &err);
 *     // <|im_start|>system\nYou are MiMo, ...<|im_end|><|im_start|>user\nhello<|im_end|><|im_start|>assistant\n
 *
 * A turn is `<|im_start|>ROLE\nCONTENT<|im_end|>`, nothing between turns. The system turn is always first; if
 * the messages have none, US_CHAT_SYSTEM stands there. Every assistant turn begins with `<think>...</think>`:
 * what the message's reasoning says if the turn follows the last user turn or keep_reasoning is set, else
 * empty. The results of consecutive tool messages share one tool turn, each
 * `<tool_response>\n...\n</tool_response>\n`.
 */
#ifndef US_FORMATS_CHAT_H
#define US_FORMATS_CHAT_H

#include "base/buffer.h"
#include <stdbool.h>

#define US_CHAT_SYSTEM "You are MiMo, a helpful AI assistant engineered by Xiaomi."

struct us_message {
  const char *role;      /* system, user, assistant or tool */
  const char *content;   /* NULL counts as empty */
  const char *reasoning; /* assistant only: text between the think tags; NULL for none */
};

struct us_chat_options {
  bool generate;       /* end with the cue `<|im_start|>assistant\n` */
  bool thinking;       /* without it the cue goes on with `<think></think>` */
  bool keep_reasoning; /* keep the reasoning of turns before the last user turn */
  bool plain_turns;    /* no default system turn and no empty think tags: short training documents */
};

/* A range of the text, in bytes, that an assistant wrote, its end of turn included: what a loss counts. */
struct us_chat_span {
  size_t begin, end;
};

/* Append the formatted messages to text. US_ERR_USAGE names a role that is none of the four, a system message
 * that is not first, or n == 0. Messages' own text is copied as it is: encode with allow_special only if it
 * can be trusted. */
US_CHECKED enum us_status us_chat_format(const struct us_message *messages, size_t n,
                                         const struct us_chat_options *options, struct us_buffer *text,
                                         struct us_err *err);

/* The same, and in ret_spans, which has room for n, the assistant turns' spans (offsets in text->data). */
US_CHECKED enum us_status us_chat_format_spans(const struct us_message *messages, size_t n,
                                               const struct us_chat_options *options, struct us_buffer *text,
                                               struct us_chat_span *ret_spans, size_t *ret_n_spans,
                                               struct us_err *err);

/* Write a tool call:
 * `<tool_call>\n<function=NAME>\n<parameter=K>V</parameter>\n...</function>\n</tool_call>`. */
US_CHECKED enum us_status us_chat_tool_call(const char *name, const char *const *keys,
                                            const char *const *values, size_t n, struct us_buffer *text,
                                            struct us_err *err);

#endif
