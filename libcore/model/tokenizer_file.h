/* tokenizer_file.h: the tokenizer.json of whatever a user names: the file itself, or a model that carries one.
 *
 *     struct us_buffer json = {0};
 *     us_tokenizer_file_read("pico.h5", &json, &err);             // or a model's folder, or tokenizer.json
 *     us_tokenizer_file_name("pico.h5", name);                    // "pico.h5: tokenizer.json"
 *     us_tokenizer_parse(json.data, json.size, name, &tokenizer, &err);
 *     us_buffer_release(&json);
 */
#ifndef US_MODEL_TOKENIZER_FILE_H
#define US_MODEL_TOKENIZER_FILE_H

#include "base/buffer.h"

/* Append the JSON text, NUL-terminated. US_ERR_IO; US_ERR_INPUT when a model file is bad or has no tokenizer. */
US_CHECKED enum us_status us_tokenizer_file_read(const char *path, struct us_buffer *json,
                                                 struct us_err *err);

/* What messages call it: the file itself, a folder's tokenizer.json, or that of a model file. */
#define US_TOKENIZER_NAME_MAX 4096
void us_tokenizer_file_name(const char *path, char ret_name[US_TOKENIZER_NAME_MAX]);

#endif
