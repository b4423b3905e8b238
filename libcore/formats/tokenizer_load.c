/* tokenizer_load.c: tokenizer.json to a tokenizer, refusing what the encoder does not do.
 *
 * Contents: fields; vocabulary; merges; added tokens; normalizer, pre-tokenizer, decoder; loading.
 */
#include "formats/byte_level.h"
#include "base/json.h"
#include "formats/tokenizer_impl.h"
#include "base/utf8.h"
#include <stdlib.h>
#include <string.h>

#define MAX_ID    (1 << 24)
#define MAX_ADDED 65536
#define MAX_FILE  ((size_t)256 << 20)

struct loader {
  struct us_tokenizer *tokenizer;
  const char *name;
  struct us_err *err;
};

/* Fields */

#define bad(loader, ...)       us_err_prefix(set_input((loader), __VA_ARGS__), "%s", (loader)->name)
#define set_input(loader, ...) (us_err_set((loader)->err, US_ERR_INPUT, __VA_ARGS__), (loader)->err)

static bool absent(const json_t *value) {
  return value == NULL || json_is_null(value);
}

static const char *type_of(const json_t *object) {
  const char *type = json_string_value(json_object_get(object, "type"));
  return type ? type : "";
}

/* A boolean that may be missing. */
static enum us_status get_flag(struct loader *loader, const json_t *object, const char *key,
                               const char *field, bool missing, bool *ret_flag) {
  const json_t *value = json_object_get(object, key);
  *ret_flag = absent(value) ? missing : json_is_true(value);
  if (absent(value) || json_is_boolean(value)) return US_OK;
  return bad(loader, "%s.%s: not true or false", field, key);
}

/* Vocabulary */

static enum us_status put_token(struct loader *loader, int32_t id, const char *bytes, size_t n) {
  struct us_tokenizer *tokenizer = loader->tokenizer;
  struct us_token *token = &tokenizer->tokens[id];
  token->begin = tokenizer->bytes.size;
  token->bytes = (uint32_t)n;
  token->exists = true;
  return us_buffer_append(&tokenizer->bytes, bytes, n, loader->err);
}

/* Largest id + 1 over vocabulary and added tokens, and room for as many. A file of n bytes cannot hold more than n / 6
 * entries, so ids far above that are refused before memory is taken for them. */
static enum us_status size_tokens(struct loader *loader, const json_t *vocab, const json_t *added) {
  const char *key;
  json_t *value;
  size_t index;
  json_int_t largest = -1;
  json_object_foreach((json_t *)vocab, key, value) {
    json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
    if (id < 0 || id >= MAX_ID) return bad(loader, "model.vocab[\"%.64s\"]: not an id below 2^24", key);
    largest = id > largest ? id : largest;
  }
  json_array_foreach(added, index, value) {
    const json_t *field = json_object_get(value, "id");
    json_int_t id = json_is_integer(field) ? json_integer_value(field) : -1;
    if (id < 0 || id >= MAX_ID) return bad(loader, "added_tokens[%zu].id: not an id below 2^24", index);
    largest = id > largest ? id : largest;
  }
  if (largest > 65536 && (size_t)largest > 8 * (json_object_size(vocab) + json_array_size(added)))
    return bad(loader, "model.vocab: largest id %lld for %zu entries", (long long)largest,
               json_object_size(vocab));
  loader->tokenizer->size = (int32_t)(largest + 1);
  loader->tokenizer->tokens = calloc((size_t)largest + 2, sizeof *loader->tokenizer->tokens);
  return loader->tokenizer->tokens ? US_OK : us_err_memory(loader->err, "vocabulary", (size_t)largest * 16);
}

static enum us_status load_vocab(struct loader *loader, const json_t *vocab) {
  struct us_tokenizer *tokenizer = loader->tokenizer;
  struct us_buffer bytes = {0};
  enum us_status status = US_OK;
  const char *name;
  json_t *value;
  tokenizer->id_of_name = malloc((json_object_size(vocab) + 1) * sizeof *tokenizer->id_of_name);
  if (tokenizer->id_of_name == NULL)
    return us_err_memory(loader->err, "vocabulary", json_object_size(vocab) * 4);
  json_object_foreach((json_t *)vocab, name, value) {
    int32_t id = (int32_t)json_integer_value(value);
    uint32_t index;
    bool spelled;
    if (tokenizer->tokens[id].exists) status = bad(loader, "model.vocab: two tokens have id %d", id);
    if (status == US_OK)
      status = us_intern_add(&tokenizer->names, name, strlen(name), &index, NULL, loader->err);
    if (status != US_OK) break;
    tokenizer->id_of_name[index] = id;
    us_buffer_clear(&bytes);
    status = us_byte_level_bytes(name, strlen(name), &bytes, &spelled, loader->err);
    if (status == US_OK) status = put_token(loader, id, bytes.data, bytes.size);
    if (status != US_OK) break;
  }
  us_buffer_release(&bytes);
  for (int byte = 0; byte < 256 && status == US_OK; byte++) {
    char spelled[4];
    int length = us_utf8_put(us_byte_level_char((uint8_t)byte), spelled);
    int64_t index = us_intern_find(&tokenizer->names, spelled, (size_t)length);
    if (index < 0)
      return bad(loader, "model.vocab: no token for byte 0x%02x: not a byte-level vocabulary", byte);
    tokenizer->bpe.byte_id[byte] = tokenizer->id_of_name[index];
  }
  return status;
}

/* Merges */

static int32_t id_of(const struct us_tokenizer *tokenizer, const char *name, size_t n) {
  int64_t index = us_intern_find(&tokenizer->names, name, n);
  return index < 0 ? -1 : tokenizer->id_of_name[index];
}

/* The two halves of a merge in either style; false if it is neither. */
static bool split_merge(const json_t *merge, const char *parts[2], size_t sizes[2]) {
  if (json_is_array(merge) && json_array_size(merge) == 2) {
    for (int i = 0; i < 2; i++) {
      const json_t *part = json_array_get(merge, (size_t)i);
      if (!json_is_string(part)) return false;
      parts[i] = json_string_value(part);
      sizes[i] = json_string_length(part);
    }
    return true;
  }
  const char *text = json_string_value(merge);
  const char *space = text ? strchr(text, ' ') : NULL;
  if (space == NULL || strchr(space + 1, ' ')) return false;
  parts[0] = text;
  sizes[0] = (size_t)(space - text);
  parts[1] = space + 1;
  sizes[1] = strlen(space + 1);
  return true;
}

static enum us_status load_merges(struct loader *loader, const json_t *merges) {
  struct us_tokenizer *tokenizer = loader->tokenizer;
  struct us_buffer joined = {0};
  size_t index;
  json_t *merge;
  uint32_t rank = 0;
  enum us_status status = us_bpe_reserve(&tokenizer->bpe, json_array_size(merges), loader->err);
  json_array_foreach(merges, index, merge) {
    const char *parts[2];
    size_t sizes[2];
    int32_t ids[3];
    if (status != US_OK) break;
    if (index == 0 && json_is_string(merge) && strncmp(json_string_value(merge), "#version", 8) == 0)
      continue;
    if (!split_merge(merge, parts, sizes)) {
      status = bad(loader, "model.merges[%zu]: neither \"a b\" nor [\"a\", \"b\"]", index);
      break;
    }
    us_buffer_clear(&joined);
    for (int i = 0; i < 2 && status == US_OK; i++) {
      ids[i] = id_of(tokenizer, parts[i], sizes[i]);
      status = us_buffer_append(&joined, parts[i], sizes[i], loader->err);
    }
    if (status != US_OK) break;
    ids[2] = id_of(tokenizer, joined.data, joined.size);
    if (ids[0] < 0 || ids[1] < 0 || ids[2] < 0) {
      status = bad(loader, "model.merges[%zu]: \"%.64s\" or a part of it is not in model.vocab", index,
                   joined.data);
      break;
    }
    us_bpe_add(&tokenizer->bpe, ids[0], ids[1], rank++, ids[2]);
  }
  us_buffer_release(&joined);
  return status;
}

static enum us_status load_model(struct loader *loader, const json_t *model, const json_t *added) {
  static const char *const unsupported[] = {"dropout", "unk_token", "continuing_subword_prefix",
                                            "end_of_word_suffix"};
  enum us_status status;
  bool byte_fallback;
  const char *type = type_of(model);
  if (!json_is_object(model)) return bad(loader, "model: not an object");
  if (strcmp(type, "BPE") != 0)
    return bad(loader, "model.type: \"%.32s\" is not supported, only byte-level BPE is", type);
  for (size_t i = 0; i < sizeof unsupported / sizeof *unsupported; i++) {
    const json_t *value = json_object_get(model, unsupported[i]);
    if (absent(value) || (json_is_string(value) && json_string_length(value) == 0)) continue;
    if (json_is_number(value) && json_number_value(value) == 0.0) continue;
    return bad(loader, "model.%s: not supported, must be null", unsupported[i]);
  }
  if ((status = get_flag(loader, model, "byte_fallback", "model", false, &byte_fallback)) != US_OK)
    return status;
  if (byte_fallback) return bad(loader, "model.byte_fallback: not supported, must be false");
  status = get_flag(loader, model, "ignore_merges", "model", false, &loader->tokenizer->ignore_merges);
  if (status != US_OK) return status;
  const json_t *vocab = json_object_get(model, "vocab"), *merges = json_object_get(model, "merges");
  if (!json_is_object(vocab)) return bad(loader, "model.vocab: not an object");
  if (!json_is_array(merges)) return bad(loader, "model.merges: not an array");
  if ((status = size_tokens(loader, vocab, added)) != US_OK) return status;
  if ((status = load_vocab(loader, vocab)) != US_OK) return status;
  return load_merges(loader, merges);
}

/* Added tokens */

static enum us_status load_added_token(struct loader *loader, const json_t *object, size_t index) {
  struct us_tokenizer *tokenizer = loader->tokenizer;
  const json_t *content = json_object_get(object, "content");
  struct us_added_token token = {.id = (int32_t)json_integer_value(json_object_get(object, "id"))};
  struct us_buffer normal = {0};
  enum us_status status = US_OK;
  char field[40];
  snprintf(field, sizeof field, "added_tokens[%zu]", index);
  if (!json_is_string(content) || json_string_length(content) == 0)
    return bad(loader, "%s.content: not a string of at least one character", field);
  const struct {
    const char *key;
    bool *flag;
  } flags[] = {{"special", &token.special},
               {"normalized", &token.normalized},
               {"lstrip", &token.lstrip},
               {"rstrip", &token.rstrip},
               {"single_word", &token.single_word}};
  for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
    status = get_flag(loader, object, flags[i].key, field, i == 1 && !token.special, flags[i].flag);
    if (status != US_OK) return status;
  }
  const char *text = json_string_value(content);
  size_t n = json_string_length(content);
  int32_t in_vocab = id_of(tokenizer, text, n);
  if (in_vocab >= 0 ? in_vocab != token.id : tokenizer->tokens[token.id].exists)
    return bad(loader, "%s.id: %d does not agree with model.vocab or another added token", field, token.id);
  if ((status = put_token(loader, token.id, text, n)) != US_OK) return status;
  tokenizer->tokens[token.id].special = token.special;
  if (token.normalized && tokenizer->nfc) {
    status = us_utf8_nfc(text, n, &normal, loader->err);
    text = normal.data;
    n = normal.size;
  }
  token.content = (char *)text;
  token.bytes = n;
  tokenizer->any_normalized |= token.normalized;
  if (status == US_OK) status = us_added_tokens_add(&tokenizer->added, &token, loader->err);
  us_buffer_release(&normal);
  return status;
}

static enum us_status load_added(struct loader *loader, const json_t *added) {
  enum us_status status = US_OK;
  size_t index;
  json_t *object;
  json_array_foreach(added, index, object) {
    if ((status = load_added_token(loader, object, index)) != US_OK) return status;
  }
  us_added_tokens_sort(&loader->tokenizer->added);
  return status;
}

/* Normalizer, pre-tokenizer, decoder */

static enum us_status load_normalizer(struct loader *loader, const json_t *normalizer) {
  if (absent(normalizer)) return US_OK;
  const char *type = type_of(normalizer);
  const json_t *list = json_object_get(normalizer, "normalizers");
  if (strcmp(type, "Sequence") == 0 && json_is_array(list) && json_array_size(list) <= 1) {
    if (json_array_size(list) == 0) return US_OK;
    type = type_of(json_array_get(list, 0));
  }
  if (strcmp(type, "NFC") != 0)
    return bad(loader, "normalizer.type: \"%.32s\" is not supported, only NFC or null is", type);
  loader->tokenizer->nfc = true;
  return US_OK;
}

/* ByteLevel as a pre-tokenizer; whether it splits by its own pattern. */
static enum us_status check_byte_level(struct loader *loader, const json_t *part, const char *field,
                                       bool *ret_regex) {
  bool prefix;
  enum us_status status = get_flag(loader, part, "add_prefix_space", field, true, &prefix);
  if (status == US_OK && prefix)
    return bad(loader, "%s.add_prefix_space: not supported, must be false", field);
  return status == US_OK ? get_flag(loader, part, "use_regex", field, true, ret_regex) : status;
}

static enum us_status load_pre_tokenizer(struct loader *loader, const json_t *pre) {
  const char *regex = NULL;
  bool own_regex;
  enum us_status status;
  const json_t *list = json_object_get(pre, "pretokenizers");
  if (strcmp(type_of(pre), "ByteLevel") == 0) {
    if ((status = check_byte_level(loader, pre, "pre_tokenizer", &own_regex)) != US_OK) return status;
    regex = own_regex ? US_PATTERN_GPT2 : "(?s).+";
  } else if (strcmp(type_of(pre), "Sequence") == 0 && json_array_size(list) == 2 &&
             strcmp(type_of(json_array_get(list, 0)), "Split") == 0 &&
             strcmp(type_of(json_array_get(list, 1)), "ByteLevel") == 0) {
    const json_t *split = json_array_get(list, 0);
    const char *behavior = json_string_value(json_object_get(split, "behavior"));
    const char *field = "pre_tokenizer.pretokenizers[1]";
    regex = json_string_value(json_object_get(json_object_get(split, "pattern"), "Regex"));
    if (regex == NULL) return bad(loader, "pre_tokenizer.pretokenizers[0].pattern.Regex: not a string");
    if (behavior == NULL || strcmp(behavior, "Isolated") != 0)
      return bad(loader, "pre_tokenizer.pretokenizers[0].behavior: only \"Isolated\" is supported");
    if ((status = check_byte_level(loader, json_array_get(list, 1), field, &own_regex)) != US_OK)
      return status;
    if (own_regex) return bad(loader, "%s.use_regex: not supported after a Split, must be false", field);
  } else {
    return bad(loader, "pre_tokenizer: only [Split, ByteLevel] and ByteLevel are supported, not \"%.32s\"",
               type_of(pre));
  }
  status = us_pattern_create(regex, &loader->tokenizer->pattern, loader->err);
  if (status == US_ERR_INPUT) us_err_prefix(loader->err, "%s: pre_tokenizer", loader->name);
  return status;
}

static enum us_status check_byte_level_only(struct loader *loader, const json_t *part, const char *field,
                                            bool may_be_null) {
  if (absent(part) && may_be_null) return US_OK;
  if (strcmp(type_of(part), "ByteLevel") == 0) return US_OK;
  return bad(loader, "%s.type: \"%.32s\" is not supported, only ByteLevel is", field, type_of(part));
}

/* Loading */

static enum us_status load(struct loader *loader, const json_t *root) {
  const json_t *added = json_object_get(root, "added_tokens");
  enum us_status status;
  if (!json_is_object(root)) return bad(loader, "not a JSON object");
  if (!absent(added) && !json_is_array(added)) return bad(loader, "added_tokens: not an array");
  if (json_array_size(added) > MAX_ADDED) return bad(loader, "added_tokens: more than %d", MAX_ADDED);
  if ((status = load_model(loader, json_object_get(root, "model"), added)) != US_OK) return status;
  if ((status = load_normalizer(loader, json_object_get(root, "normalizer"))) != US_OK) return status;
  if ((status = load_pre_tokenizer(loader, json_object_get(root, "pre_tokenizer"))) != US_OK) return status;
  status = check_byte_level_only(loader, json_object_get(root, "decoder"), "decoder", false);
  if (status != US_OK) return status;
  status = check_byte_level_only(loader, json_object_get(root, "post_processor"), "post_processor", true);
  return status == US_OK ? load_added(loader, added) : status;
}

enum us_status us_tokenizer_parse(const char *json, size_t bytes, const char *name,
                                  struct us_tokenizer **ret_tokenizer, struct us_err *err) {
  struct us_err own = {0};
  struct loader loader = {.name = name, .err = err ? err : &own};
  json_t *root;
  enum us_status status = us_json_parse(json, bytes, name, &root, loader.err);
  if (status != US_OK) return status;
  loader.tokenizer = calloc(1, sizeof *loader.tokenizer);
  status = loader.tokenizer ? load(&loader, root)
                            : us_err_memory(loader.err, "tokenizer", sizeof *loader.tokenizer);
  json_decref(root);
  if (status != US_OK) {
    us_tokenizer_free(loader.tokenizer);
    return status;
  }
  *ret_tokenizer = loader.tokenizer;
  return US_OK;
}

enum us_status us_tokenizer_open(const char *path, struct us_tokenizer **ret_tokenizer, struct us_err *err) {
  struct us_buffer json = {0};
  enum us_status status = us_buffer_read_file(&json, path, MAX_FILE, err);
  if (status == US_OK) status = us_tokenizer_parse(json.data, json.size, path, ret_tokenizer, err);
  us_buffer_release(&json);
  return status;
}

void us_tokenizer_free(struct us_tokenizer *tokenizer) {
  if (tokenizer == NULL) return;
  us_intern_release(&tokenizer->names);
  us_buffer_release(&tokenizer->bytes);
  us_bpe_release(&tokenizer->bpe);
  us_pattern_free(tokenizer->pattern);
  us_added_tokens_release(&tokenizer->added);
  free(tokenizer->id_of_name);
  free(tokenizer->tokens);
  free(tokenizer);
}
