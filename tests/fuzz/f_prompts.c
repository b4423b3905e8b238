/* f_prompts.c: any bytes as a prompt set: what is accepted is complete, and its chats can be formatted. */
#include "formats/prompts.h"
#include "fuzz.h"

static void check_prompt(const struct us_prompt *prompt) {
  struct us_err err = {0};
  US_FUZZ_REQUIRE(prompt->id && prompt->scenario);
  bool chat = prompt->kind == US_PROMPT_TURNS || prompt->kind == US_PROMPT_MESSAGES;
  US_FUZZ_REQUIRE(chat == (prompt->text == NULL) && chat == (prompt->n_messages > 0));
  US_FUZZ_REQUIRE((prompt->kind == US_PROMPT_QUESTION) == (prompt->answer != NULL));
  for (int options = 0; options < 16 && chat; options++) {
    struct us_buffer text = {0};
    struct us_chat_options chat_options = {.generate = options & 1,
                                           .thinking = options & 2,
                                           .keep_reasoning = options & 4,
                                           .plain_turns = options & 8};
    US_FUZZ_REQUIRE(us_chat_format(prompt->messages, prompt->n_messages, &chat_options, &text, &err) ==
                    US_OK);
    us_buffer_release(&text);
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct us_err err = {0};
  struct us_prompts *prompts = NULL;
  enum us_status status = us_prompts_parse((const char *)data, size, "x.jsonl", &prompts, &err);
  if (status != US_OK) {
    US_FUZZ_REQUIRE(status == US_ERR_INPUT && strncmp(err.message, "x.jsonl: ", 9) == 0 &&
                    !strchr(err.message, '\n'));
    return 0;
  }
  US_FUZZ_REQUIRE(prompts->n > 0);
  for (size_t i = 0; i < prompts->n; i++) check_prompt(&prompts->items[i]);
  us_prompts_free(prompts);
  return 0;
}
