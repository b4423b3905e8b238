/* prompts.h: prompt sets as JSON lines, one prompt a line.
 *
 *     struct us_prompts *prompts;
 *     if (us_prompts_open("data/prompts/math.jsonl", &prompts, &err) != US_OK) return err.status;
 *     for (size_t i = 0; i < prompts->n; i++) use(&prompts->items[i]);
 *     us_prompts_free(prompts);
 *
 * A line is a JSON object with exactly one of
 *   "prompt": text                                        raw text to continue
 *   "turns": [text, ...]                                  user turns of a chat; a run answers each in order
 *   "messages": [{"role", "content", "reasoning"?}, ...]  a chat ending where the assistant must act
 *   "question" with "answer"                              raw text, and what --task compares with
 * and optionally "id" (default: the line number), "scenario" (default: the file's name without suffix). Other
 * keys are ignored. Blank lines are skipped. Bad lines are US_ERR_INPUT: "FILE: line 12: messages[3].role:
 * not a string".
 */
#ifndef US_FORMATS_PROMPTS_H
#define US_FORMATS_PROMPTS_H

#include "formats/chat.h"

/* IDS is not of files: tokens that need no tokenizer. */
enum us_prompt_kind {
  US_PROMPT_TEXT,
  US_PROMPT_TURNS,
  US_PROMPT_MESSAGES,
  US_PROMPT_QUESTION,
  US_PROMPT_IDS
};

struct us_prompt {
  enum us_prompt_kind kind;
  const char *id;
  const char *scenario;
  const char *text;            /* TEXT and QUESTION; else NULL */
  const char *answer;          /* QUESTION; else NULL */
  struct us_message *messages; /* TURNS (all of role user) and MESSAGES; else NULL */
  size_t n_messages;
  const int32_t *ids; /* IDS; else NULL */
  size_t n_ids;
};

struct us_prompts {
  struct us_prompt *items;
  size_t n;
  void *memory; /* owns every string above */
};

/* Read a .jsonl file ("-": stdin) of at most 256 MiB. US_ERR_IO, US_ERR_INPUT, US_ERR_MEMORY; a file without
 * any prompt is US_ERR_INPUT. Free with us_prompts_free. */
US_CHECKED enum us_status us_prompts_open(const char *path, struct us_prompts **ret_prompts,
                                          struct us_err *err);

/* The same from memory; `name` stands for the file in messages and gives the default scenario. */
US_CHECKED enum us_status us_prompts_parse(const char *text, size_t bytes, const char *name,
                                           struct us_prompts **ret_prompts, struct us_err *err);

/* Every .jsonl file of a folder in the order of their names; a path that is a file is read as one. */
US_CHECKED enum us_status us_prompts_open_dir(const char *path, struct us_prompts **ret_prompts,
                                              struct us_err *err);

void us_prompts_free(struct us_prompts *prompts);

#endif
