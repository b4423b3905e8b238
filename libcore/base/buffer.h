/* buffer.h: growable bytes and growable token ids.
 *
 *     struct us_buffer text = {0};
 *     if (us_buffer_append(&text, "abc", 3, &err) != US_OK) ...;
 *     fwrite(text.data, 1, text.size, file);
 *     us_buffer_release(&text);
 *
 * A zeroed struct is an empty one. data[size] is always NUL once anything was appended, and not counted.
 */
#ifndef US_BASE_BUFFER_H
#define US_BASE_BUFFER_H

#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

struct us_buffer {
  char *data;
  size_t size;
  size_t capacity;
};

struct us_ids {
  int32_t *ids;
  size_t count;
  size_t capacity;
};

/* Make room for `more` further bytes and the NUL. US_ERR_MEMORY when the system refuses; the content stays.
 */
US_CHECKED enum us_status us_buffer_reserve(struct us_buffer *buffer, size_t more, struct us_err *err);

US_CHECKED enum us_status us_buffer_append(struct us_buffer *buffer, const void *bytes, size_t n,
                                           struct us_err *err);

/* Append a NUL-terminated string. */
US_CHECKED enum us_status us_buffer_add(struct us_buffer *buffer, const char *text, struct us_err *err);

/* Size 0, memory kept. */
void us_buffer_clear(struct us_buffer *buffer);

void us_buffer_release(struct us_buffer *buffer);

/* Read a whole file of at most max_bytes into an empty buffer; "-" is stdin. US_ERR_IO, or US_ERR_INPUT when
 * larger; the message names the path. */
US_CHECKED enum us_status us_buffer_read_file(struct us_buffer *buffer, const char *path, size_t max_bytes,
                                              struct us_err *err);

US_CHECKED enum us_status us_ids_append(struct us_ids *ids, const int32_t *more, size_t n,
                                        struct us_err *err);
void us_ids_release(struct us_ids *ids);

#endif
