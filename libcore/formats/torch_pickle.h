/* torch_pickle.h: the pickle of a torch.save'd dict of integers and one-dimensional tensors. Internal
 * to mask_embedding.
 *
 *     struct us_torch_dict dict;
 *     if (us_torch_dict_parse(bytes, n, &dict, &err) != US_OK) return err.status;
 *     const struct us_torch_item *item = us_torch_dict_find(&dict, "embedding");
 *
 * A pickle is a program for a stack machine. This one has the protocol 2 opcodes that torch.save emits for such a
 * dict, a fixed memory, and no way to call anything: the globals it knows are six names, and "calling" one builds
 * the description of a tensor. Whatever else a file asks for is US_ERR_INPUT.
 */
#ifndef US_FORMATS_TORCH_PICKLE_H
#define US_FORMATS_TORCH_PICKLE_H

#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

#define US_TORCH_NAME_MAX  63
#define US_TORCH_ITEMS_MAX 16

enum us_torch_type { US_TORCH_INT, US_TORCH_TENSOR, US_TORCH_OTHER };

struct us_torch_item {
  char key[US_TORCH_NAME_MAX + 1];
  enum us_torch_type type;
  int64_t integer;
  /* A tensor: element i is storage element offset + i * stride of the member data/STORAGE. */
  char dtype[US_TORCH_NAME_MAX + 1];   /* "BFloat16Storage", "HalfStorage", "FloatStorage" */
  char storage[US_TORCH_NAME_MAX + 1]; /* digits */
  int64_t storage_elements, offset, elements, stride;
};

struct us_torch_dict {
  struct us_torch_item items[US_TORCH_ITEMS_MAX];
  int count;
};

/* US_ERR_INPUT says which opcode or value is not one that such a file contains, and at which byte. */
US_CHECKED enum us_status us_torch_dict_parse(const void *bytes, size_t n, struct us_torch_dict *ret_dict,
                                              struct us_err *err);

/* The item of that key, or NULL. */
const struct us_torch_item *us_torch_dict_find(const struct us_torch_dict *dict, const char *key);

#endif
