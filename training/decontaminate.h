/* decontaminate.h: keep prompts that models are judged by out of what they are trained on.
 *
 *     struct us_decontaminator *filter;
 *     us_decontaminator_create(&filter, &err);
 *     us_decontaminator_add(filter, prompt, bytes, &err);
 *     us_decontaminator_check(filter, document, bytes, &overlaps, NULL, &err);     // overlaps: leave the document out
 *     us_decontaminator_free(filter);
 *
 * Words are maximal runs of letters, marks and digits (Unicode L, M, N) of the text after NFC and simple lower-casing;
 * everything else only separates. A document overlaps when 13 consecutive words of it equal 13 consecutive words of
 * one prompt (the n-gram of Brown et al. 2020, appendix C). Prompts of fewer than 13 words overlap with nothing.
 */
#ifndef US_TRAINING_DECONTAMINATE_H
#define US_TRAINING_DECONTAMINATE_H

#include "base/buffer.h"
#include <stdbool.h>

#define US_OVERLAP_WORDS 13

struct us_decontaminator;

US_CHECKED enum us_status us_decontaminator_create(struct us_decontaminator **ret_filter, struct us_err *err);
void us_decontaminator_free(struct us_decontaminator *filter);

/* Another filter that knows the prompts of the first, for another thread. The first must outlive it and learn no more prompts. */
US_CHECKED enum us_status us_decontaminator_share(const struct us_decontaminator *filter,
                                                  struct us_decontaminator **ret_filter, struct us_err *err);

/* Add one prompt's text; turns and messages that a model sees as one text are added as one. */
US_CHECKED enum us_status us_decontaminator_add(struct us_decontaminator *filter, const char *text,
                                                size_t bytes, struct us_err *err);

/* Whether the document overlaps with a prompt. On overlap and with opt_words, appends the 13 words, space between. */
US_CHECKED enum us_status us_decontaminator_check(struct us_decontaminator *filter, const char *text,
                                                  size_t bytes, bool *ret_overlaps,
                                                  struct us_buffer *opt_words, struct us_err *err);

/* Windows of 13 words known. */
size_t us_decontaminator_windows(const struct us_decontaminator *filter);

#endif
