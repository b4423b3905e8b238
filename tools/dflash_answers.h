/* dflash_answers.h: what dflash-train trains on beside text: answers that the target writes now, or that were recorded.
 *
 *     static const struct us_opt opts[] = {..., US_DFLASH_ANSWERS_OPTIONS, US_OPT_END};
 *     struct us_dflash_answers answers = {.run = run, .learner = learner, .pool = pool, .target = model, .shards = shards,
 *                                         .length = 512, .seed = 1};
 *     us_dflash_answers_make(&answers, &err);               // answers.train and .heldout; n 0: nobody asked for any
 *     us_dflash_answers_write(&answers, &err);              // --answers-out
 *     us_dflash_answers_release(&answers);
 */
#ifndef US_TOOLS_DFLASH_ANSWERS_H
#define US_TOOLS_DFLASH_ANSWERS_H

#include "base/progress.h"
#include "formats/tokenizer.h"
#include "tools/tool.h"
#include "training/responses.h"

/* clang-format off */
#define US_DFLASH_ANSWERS_OPTIONS                                                                              \
  US_OPT_GROUP("Answers"),                                                                                     \
  US_OPT_INT("generate", 'g', "N",                                                                             \
             "let the target write N answers first and train on them; without --data and --prompts at least 256",            \
             .def = "0", .max = 4000000),                                                                      \
  US_OPT_FILE("prompts", 0, "FILE", "with --generate: prompts as JSON lines, taking turns, instead of --data's"), \
  US_OPT_INT("max-tokens", 0, "N", "of an answer; 0: what --length leaves, to --prompts half of it",           \
             .def = "0", .max = 131072),                                                                       \
  US_OPT_NUM("temperature", 0, "T", "of the answers; 0: greedy", .def = "0.8", .max = 100),                    \
  US_OPT_NUM("top-p", 0, "P", "of the answers: smallest set of tokens with this mass", .def = "1", .max = 1),  \
  US_OPT_FLAG("ignore-end", 0, "answers go on after end-of-turn and end-of-text tokens"),                                      \
  US_OPT_NUM("answer-seconds", 0, "S", "with --generate: as many of the N as are answered in S seconds; 0: all", \
             .def = "0", .max = 1e6),                                                                          \
  US_OPT_FILE("answers-out", 0, "RUN", "write the answers as JSON lines; without --output nothing is trained",  \
              .writes = US_OPT_WRITES_FILE),                                                                    \
  US_OPT_FILE("answers", 0, "RUN", "train on answers that were recorded, instead of --generate"),              \
  US_OPT_NUM("text-share", 0, "SHARE", "with answers: sequences that are text nevertheless", .def = "0", .max = 1)
/* clang-format on */

struct us_dflash_answers {
  struct us_tool_run *run;
  struct us_learner *learner;
  struct us_pool *pool;
  struct us_model *target;
  const struct us_shards *shards; /* NULL without --data */
  size_t length;                  /* tokens of a sequence */
  uint64_t seed;

  struct us_responses train, heldout; /* made */
  struct us_tokenizer *tokenizer;
  int32_t stops[3 + US_MAX_STOP_IDS]; /* the tokenizer's and the model's ends of text */
  size_t stop_count;
  int32_t *ids; /* of --prompts: the held-out ones, one in sixteen, behind the others */
  size_t *start;
  size_t prompts, heldout_prompts;
  struct us_progress progress;
};

/* US_ERR_USAGE for options that do not go together; before anything is opened. */
US_CHECKED enum us_status us_dflash_answers_check(struct us_opts *opts, struct us_err *err);

US_CHECKED enum us_status us_dflash_answers_make(struct us_dflash_answers *answers, struct us_err *err);
US_CHECKED enum us_status us_dflash_answers_write(struct us_dflash_answers *answers, struct us_err *err);
void us_dflash_answers_release(struct us_dflash_answers *answers);

#endif
