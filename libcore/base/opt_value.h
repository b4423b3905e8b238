/* opt_value.h: an option's text as a value: for opt.c, and for tools whose option is a list of values or repeats. Of one value the
 * getters of opt.h are enough.
 *
 *     int64_t steps;
 *     if (!us_opt_value_int("3K", &steps)) ...;        // 3072
 */
#ifndef US_BASE_OPT_VALUE_H
#define US_BASE_OPT_VALUE_H

#include "base/opt.h"

bool us_opt_value_is_true(const char *text);  /* true, yes, on, 1 */
bool us_opt_value_is_false(const char *text); /* false, no, off, 0 */

/* False when the text is not such a value, overflow included. */
bool us_opt_value_int(const char *text, int64_t *ret_value);
bool us_opt_value_num(const char *text, double *ret_value);
bool us_opt_value_device(const char *text, int *ret_ordinal); /* -1: the CPU */

/* Index of `word` among "a|b|c"; -1 when it is none of them. */
int us_opt_value_choice(const char *words, const char *word);

#endif
