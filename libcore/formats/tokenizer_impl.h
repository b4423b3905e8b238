/* tokenizer_impl.h: what the tokenizer's loader fills and its encoder reads; not installed. */
#ifndef US_FORMATS_TOKENIZER_IMPL_H
#define US_FORMATS_TOKENIZER_IMPL_H

#include "base/intern.h"
#include "formats/added_tokens.h"
#include "formats/bpe.h"
#include "formats/pretokenize.h"
#include "formats/tokenizer.h"

struct us_tokenizer {
  struct us_intern names; /* vocabulary entries in the file's spelling */
  int32_t *id_of_name;    /* (names.n) */
  struct us_buffer bytes; /* the tokens' bytes, one after the other */
  struct us_token {
    size_t begin;
    uint32_t bytes;
    bool exists, special;
  } * tokens; /* (size) */
  int32_t size;
  struct us_bpe bpe;
  struct us_pattern *pattern;
  struct us_added_tokens added;
  bool nfc, ignore_merges, any_normalized; /* any_normalized: an added token with normalized content exists */
};

#endif
