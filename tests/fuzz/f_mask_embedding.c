/* f_mask_embedding.c: any bytes as a mask_embedding.pt, and as the pickle inside one: no crash, and what is
 * accepted is a finite vector and a token id. Seeds: tests/fixtures/mask_embedding*.pt. */
#include "formats/mask_embedding.h"
#include "formats/torch_pickle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct us_mask_embedding mask;
  struct us_torch_dict dict;
  struct us_err err = {0};
  if (us_mask_embedding_parse(data, size, "x", &mask, &err) == US_OK) {
    if (mask.hidden < 1 || mask.mask_token_id < 0) abort();
    for (size_t i = 0; i < mask.hidden; i++)
      if (!isfinite(mask.values[i])) abort();
    us_mask_embedding_release(&mask);
  } else if (mask.values || !*err.message || strchr(err.message, '\n'))
    abort();

  /* The checksum keeps mutations of a whole file away from the pickle: try the bytes as one, too. */
  if (us_torch_dict_parse(data, size, &dict, &err) == US_OK)
    for (int i = 0; i < dict.count; i++)
      if (us_torch_dict_find(&dict, dict.items[i].key) != &dict.items[i]) abort();
  return 0;
}
