/* answer.h: exact match of a generated text with the reference answer of a question.
 *
 *     us_answer_matches("... so she pays 18.0 dollars.", "She sells 9 * 2 = 18.\n#### 18");      // true
 *
 * The convention of GSM8K-like files: what counts of a reference is what follows its last "####", or all of it. If that
 * is a number, the text's number is compared with it by value: the one after the text's last "####", or else the last
 * number in it; "1,234", "$5" and "42." are numbers, and 18 equals 18.0. Any other reference must be the text after the
 * text's last "####", or the text's last line that is not blank, with spaces trimmed and letters of ASCII compared
 * without case.
 */
#ifndef US_DECODE_ANSWER_H
#define US_DECODE_ANSWER_H

#include <stdbool.h>

bool us_answer_matches(const char *text, const char *reference);

#endif
