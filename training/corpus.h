/* corpus.h: files of text, questions and dialogues, one document at a time.
 *
 *     struct us_corpus_options options = {.template = US_TEMPLATE_CHAT};
 *     us_corpus_read("text/", &options, take, &state, &err);      // take(&document, &state, &err) for each
 *
 * A file is one document, unless it is JSON:
 *   .jsonl  a document a line: {"text"}, {"question", "answer"}, {"prompt", "response"} or {"messages": [...]}
 *   .json   an object or a list of objects, each with "messages" or "traj": a list of {"role", "content", "tool_calls"?}
 * A folder is read in the order of its entries' names, hidden entries and links left out, of the suffixes txt md rst py c h
 * cc cpp hpp cu js ts sh java go rs html css tex toml yaml json jsonl; a path given by itself is read whatever its suffix.
 */
#ifndef US_TRAINING_CORPUS_H
#define US_TRAINING_CORPUS_H

#include "base/buffer.h"
#include <stdbool.h>

#define US_CORPUS_MAX_FILE ((size_t)1 << 30)

/* How dialogues (and questions with answers) become text. */
enum us_template {
  US_TEMPLATE_CHAT,  /* MiMo's chat template: formats/chat.h */
  US_TEMPLATE_PLAIN, /* the same without the default system turn and empty think tags */
  US_TEMPLATE_LINES, /* "role: content" lines; question, newline, answer */
};

struct us_corpus_options {
  enum us_template template;
  bool drop_system; /* leave system messages out: agent data repeats one long policy in every dialogue */
};

/* Part of a document that is tokenised by itself: a token never crosses from a prompt into its answer. */
struct us_segment {
  size_t begin, end;
  bool loss; /* predicting these tokens counts */
};

struct us_document {
  const char *source; /* path, or "path: line 12" */
  const char *text;
  size_t bytes;
  const struct us_segment *segments; /* cover the text in order */
  size_t n_segments;
  bool formatted; /* holds the template's special tokens; plain text must not */
};

typedef enum us_status us_corpus_take(const struct us_document *document, void *arg, struct us_err *err);

/* Read a file or folder. Stops at the first status that is not US_OK and returns it. US_ERR_IO; US_ERR_INPUT names file,
 * line and field; US_ERR_INPUT for a folder without any readable file. */
US_CHECKED enum us_status us_corpus_read(const char *path, const struct us_corpus_options *options,
                                         us_corpus_take *take, void *arg, struct us_err *err);

#endif
