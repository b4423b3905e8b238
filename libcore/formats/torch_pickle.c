/* torch_pickle.c: a pickle machine that can only describe a dict of integers and tensors. */
#include "formats/torch_pickle.h"

#include <stdio.h>
#include <string.h>

#define MAX_VALUES 256 /* a file of one integer and one tensor makes about 30 */
#define MAX_STACK  64
#define MAX_MEMO   256
#define MAX_TUPLE  8

enum kind {
  MARK,
  INTEGER,
  TEXT,
  BOOLEAN,
  TUPLE,
  DICT,
  ORDERED_DICT,
  STORAGE_TYPE,
  STORAGE,
  TENSOR,
  FUNCTION
};
enum function { REBUILD_TENSOR, REBUILD_PARAMETER, MAKE_ORDERED_DICT };

struct value {
  enum kind kind;
  int64_t integer;  /* INTEGER, BOOLEAN; FUNCTION: which; STORAGE: elements */
  const char *text; /* TEXT, STORAGE_TYPE; STORAGE: its key. Not terminated */
  size_t text_bytes;
  const struct value *type;             /* STORAGE: its STORAGE_TYPE */
  const struct value *child[MAX_TUPLE]; /* TUPLE; TENSOR: storage, offset, sizes, strides */
  int children;
};

struct machine {
  const uint8_t *bytes;
  size_t n, at;
  struct value values[MAX_VALUES];
  int value_count;
  const struct value *stack[MAX_STACK];
  int depth;
  const struct value *memo[MAX_MEMO];
  const struct value *root; /* the dict, once made */
  struct us_torch_dict *dict;
  const char *problem;
};

/* ---- memory: every helper sets `problem` instead of failing ---- */

static const uint8_t *take(struct machine *m, size_t bytes) {
  if (m->n - m->at < bytes) {
    m->problem = "the pickle ends early";
    return NULL;
  }
  m->at += bytes;
  return m->bytes + m->at - bytes;
}

static struct value *new_value(struct machine *m, enum kind kind) {
  if (m->value_count == MAX_VALUES) {
    m->problem = "more values than such a file has";
    return NULL;
  }
  struct value *value = &m->values[m->value_count++];
  *value = (struct value){.kind = kind};
  return value;
}

static void push(struct machine *m, const struct value *value) {
  if (!value) return;
  if (m->depth == MAX_STACK)
    m->problem = "the stack is deeper than such a file needs";
  else
    m->stack[m->depth++] = value;
}

static const struct value *pop(struct machine *m) {
  if (m->depth == 0) {
    m->problem = "the stack is empty";
    return NULL;
  }
  return m->stack[--m->depth];
}

static void push_integer(struct machine *m, enum kind kind, int64_t integer) {
  struct value *value = new_value(m, kind);
  if (value) value->integer = integer;
  push(m, value);
}

static void memo_store(struct machine *m, size_t index) {
  if (m->depth == 0 || index >= MAX_MEMO)
    m->problem = "a memo entry is out of range";
  else
    m->memo[index] = m->stack[m->depth - 1];
}

static void memo_load(struct machine *m, size_t index) {
  if (index >= MAX_MEMO || !m->memo[index])
    m->problem = "a memo entry is missing";
  else
    push(m, m->memo[index]);
}

static uint32_t le32(const uint8_t *p) {
  return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static int text_is(const struct value *value, const char *text) {
  return value && value->kind == TEXT && value->text_bytes == strlen(text) &&
         memcmp(value->text, text, value->text_bytes) == 0;
}

static int copy_text(const struct value *value, char out[US_TORCH_NAME_MAX + 1]) {
  if (value->text_bytes > US_TORCH_NAME_MAX || memchr(value->text, 0, value->text_bytes)) return 0;
  memcpy(out, value->text, value->text_bytes);
  out[value->text_bytes] = 0;
  return 1;
}

/* ---- opcodes with content ---- */

/* LONG1: a little-endian two's complement integer of at most 8 bytes. */
static void op_long(struct machine *m) {
  const uint8_t *count = take(m, 1), *p = count ? take(m, *count) : NULL;
  if (!p) return;
  if (*count > 8) {
    m->problem = "an integer of more than 64 bits";
    return;
  }
  uint64_t bits = *count && p[*count - 1] & 0x80 ? UINT64_MAX : 0;
  for (int i = *count; i-- > 0;) bits = bits << 8 | p[i];
  push_integer(m, INTEGER, (int64_t)bits);
}

static void op_text(struct machine *m) {
  const uint8_t *length = take(m, 4), *p = length ? take(m, le32(length)) : NULL;
  struct value *value = p ? new_value(m, TEXT) : NULL;
  if (!value) return;
  value->text = (const char *)p;
  value->text_bytes = le32(length);
  push(m, value);
}

/* GLOBAL: "module\nname\n". Only these names exist here; none is looked up anywhere. */
static void op_global(struct machine *m) {
  static const struct {
    const char *line;
    enum kind kind;
    enum function function;
    const char *storage;
  } known[] = {
      {"torch._utils\n_rebuild_tensor_v2\n", FUNCTION, REBUILD_TENSOR, NULL},
      {"torch._utils\n_rebuild_parameter\n", FUNCTION, REBUILD_PARAMETER, NULL},
      {"collections\nOrderedDict\n", FUNCTION, MAKE_ORDERED_DICT, NULL},
      {"torch\nBFloat16Storage\n", STORAGE_TYPE, 0, "BFloat16Storage"},
      {"torch\nHalfStorage\n", STORAGE_TYPE, 0, "HalfStorage"},
      {"torch\nFloatStorage\n", STORAGE_TYPE, 0, "FloatStorage"},
  };
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    size_t bytes = strlen(known[i].line);
    if (m->n - m->at < bytes || memcmp(m->bytes + m->at, known[i].line, bytes) != 0) continue;
    m->at += bytes;
    struct value *value = new_value(m, known[i].kind);
    if (!value) return;
    value->integer = (int64_t)known[i].function;
    value->text = known[i].storage;
    value->text_bytes = known[i].storage ? strlen(known[i].storage) : 0;
    push(m, value);
    return;
  }
  m->problem = "a global that such a file does not name";
}

static void op_tuple(struct machine *m, int children) {
  struct value *tuple = new_value(m, TUPLE);
  if (!tuple) return;
  if (children > MAX_TUPLE || children > m->depth) {
    m->problem = "a tuple of the wrong size";
    return;
  }
  m->depth -= children;
  tuple->children = children;
  for (int i = 0; i < children; i++) {
    tuple->child[i] = m->stack[m->depth + i];
    if (tuple->child[i]->kind == MARK) m->problem = "a mark inside a tuple";
  }
  push(m, tuple);
}

/* Values above the topmost MARK, which is left on the stack below them; -1 without one. */
static int above_mark(struct machine *m) {
  for (int i = m->depth; i-- > 0;)
    if (m->stack[i]->kind == MARK) return m->depth - i - 1;
  m->problem = "a mark is missing";
  return -1;
}

static void op_marked_tuple(struct machine *m) {
  int children = above_mark(m);
  if (children < 0) return;
  op_tuple(m, children);
  if (m->problem) return;
  const struct value *tuple = pop(m);
  pop(m); /* the mark */
  push(m, tuple);
}

/* BINPERSID: ('storage', type, key, 'cpu' or a device, elements). */
static void op_persistent(struct machine *m) {
  const struct value *id = pop(m);
  if (!id) return;
  if (id->kind != TUPLE || id->children != 5 || !text_is(id->child[0], "storage") ||
      id->child[1]->kind != STORAGE_TYPE || id->child[2]->kind != TEXT || id->child[3]->kind != TEXT ||
      id->child[4]->kind != INTEGER || id->child[4]->integer < 0) {
    m->problem = "a persistent id that is not a storage";
    return;
  }
  struct value *storage = new_value(m, STORAGE);
  if (!storage) return;
  storage->type = id->child[1];
  storage->text = id->child[2]->text;
  storage->text_bytes = id->child[2]->text_bytes;
  storage->integer = id->child[4]->integer;
  push(m, storage);
}

/* _rebuild_tensor_v2(storage, offset, sizes, strides, requires_grad, hooks). */
static void rebuild_tensor(struct machine *m, const struct value *args) {
  if (args->children != 6 || args->child[0]->kind != STORAGE || args->child[1]->kind != INTEGER ||
      args->child[2]->kind != TUPLE || args->child[3]->kind != TUPLE || args->child[4]->kind != BOOLEAN ||
      args->child[5]->kind != ORDERED_DICT) {
    m->problem = "a tensor of other arguments than torch.save writes";
    return;
  }
  struct value *tensor = new_value(m, TENSOR);
  if (!tensor) return;
  memcpy(tensor->child, args->child, 4 * sizeof *args->child);
  tensor->children = 4;
  push(m, tensor);
}

static void op_reduce(struct machine *m) {
  const struct value *args = pop(m), *function = args ? pop(m) : NULL;
  if (!function) return;
  if (function->kind != FUNCTION || args->kind != TUPLE)
    m->problem = "a call that such a file does not make";
  else if (function->integer == REBUILD_TENSOR)
    rebuild_tensor(m, args);
  else if (function->integer == MAKE_ORDERED_DICT && args->children == 0)
    push(m, new_value(m, ORDERED_DICT));
  else if (function->integer == REBUILD_PARAMETER && args->children == 3 && args->child[0]->kind == TENSOR)
    push(m, args->child[0]);
  else
    m->problem = "a call that such a file does not make";
}

/* ---- the dict ---- */

/* Sizes (n) or (1, n); all strides must be integers, the last one counts. */
static int describe_tensor(const struct value *tensor, struct us_torch_item *item) {
  const struct value *storage = tensor->child[0], *sizes = tensor->child[2], *strides = tensor->child[3];
  if (sizes->children < 1 || sizes->children > 2 || strides->children != sizes->children) return 0;
  for (int i = 0; i < sizes->children; i++)
    if (sizes->child[i]->kind != INTEGER || strides->child[i]->kind != INTEGER) return 0;
  if (sizes->children == 2 && sizes->child[0]->integer != 1) return 0;
  item->elements = sizes->child[sizes->children - 1]->integer;
  item->stride = strides->child[sizes->children - 1]->integer;
  item->offset = tensor->child[1]->integer;
  item->storage_elements = storage->integer;
  return item->elements >= 0 && item->offset >= 0 && copy_text(storage->type, item->dtype) &&
         copy_text(storage, item->storage);
}

static void set_item(struct machine *m, const struct value *key, const struct value *value) {
  if (m->dict->count == US_TORCH_ITEMS_MAX) {
    m->problem = "more keys than such a file has";
    return;
  }
  struct us_torch_item *item = &m->dict->items[m->dict->count];
  *item = (struct us_torch_item){.type = US_TORCH_OTHER};
  if (key->kind != TEXT || !copy_text(key, item->key) || us_torch_dict_find(m->dict, item->key)) {
    m->problem = "a key that is not a short text, or is there twice";
    return;
  }
  m->dict->count++;
  if (value->kind == INTEGER) {
    item->type = US_TORCH_INT;
    item->integer = value->integer;
  } else if (value->kind == TENSOR) {
    item->type = US_TORCH_TENSOR;
    if (!describe_tensor(value, item)) m->problem = "a tensor that is not a vector";
  } else if (value->kind != TEXT && value->kind != BOOLEAN)
    m->problem = "a value that such a dict does not hold";
}

static void op_set_items(struct machine *m, int values) {
  if (values < 0) return;
  int below = m->depth - values;
  if (values % 2 || below < 1) {
    m->problem = "keys and values do not pair up";
    return;
  }
  for (int i = below; i < m->depth && !m->problem; i += 2) set_item(m, m->stack[i], m->stack[i + 1]);
  m->depth = below;
}

static void op_marked_set_items(struct machine *m) {
  op_set_items(m, above_mark(m));
  if (m->problem) return;
  pop(m); /* the mark */
  if (m->depth == 0 || m->stack[m->depth - 1] != m->root)
    m->problem = "items are set on something else than the dict";
}

static void op_dict(struct machine *m) {
  if (m->root)
    m->problem = "a second dict";
  else {
    m->root = new_value(m, DICT);
    push(m, m->root);
  }
}

/* ---- the machine ---- */

static void op_set_item(struct machine *m) {
  if (m->depth < 3 || m->stack[m->depth - 3] != m->root)
    m->problem = "an item is set on something else than the dict";
  else
    op_set_items(m, 2);
}

static void op_index(struct machine *m, size_t width, void (*use)(struct machine *m, size_t index)) {
  const uint8_t *p = take(m, width);
  if (p) use(m, width == 1 ? *p : le32(p));
}

static void op_integer(struct machine *m, size_t width) {
  const uint8_t *p = take(m, width);
  if (!p) return;
  push_integer(m, INTEGER, width == 1 ? p[0] : width == 2 ? p[0] | p[1] << 8 : (int32_t)le32(p));
}

static void step(struct machine *m, uint8_t op) {
  switch (op) {
  case '}':
    op_dict(m);
    break;
  case '(':
    push(m, new_value(m, MARK));
    break;
  case 'q':
    op_index(m, 1, memo_store);
    break;
  case 'r':
    op_index(m, 4, memo_store);
    break;
  case 'h':
    op_index(m, 1, memo_load);
    break;
  case 'j':
    op_index(m, 4, memo_load);
    break;
  case 'X':
    op_text(m);
    break;
  case 'K':
    op_integer(m, 1);
    break;
  case 'M':
    op_integer(m, 2);
    break;
  case 'J':
    op_integer(m, 4);
    break;
  case 0x8a:
    op_long(m);
    break;
  case 0x88:
    push_integer(m, BOOLEAN, 1);
    break;
  case 0x89:
    push_integer(m, BOOLEAN, 0);
    break;
  case 'c':
    op_global(m);
    break;
  case ')':
    op_tuple(m, 0);
    break;
  case 0x85:
    op_tuple(m, 1);
    break;
  case 0x86:
    op_tuple(m, 2);
    break;
  case 0x87:
    op_tuple(m, 3);
    break;
  case 't':
    op_marked_tuple(m);
    break;
  case 'Q':
    op_persistent(m);
    break;
  case 'R':
    op_reduce(m);
    break;
  case 's':
    op_set_item(m);
    break;
  case 'u':
    op_marked_set_items(m);
    break;
  default:
    m->problem = "an opcode that such a file does not contain";
  }
}

enum us_status us_torch_dict_parse(const void *bytes, size_t n, struct us_torch_dict *ret_dict,
                                   struct us_err *err) {
  *ret_dict = (struct us_torch_dict){0};
  struct machine m = {.bytes = bytes, .n = n, .dict = ret_dict};
  if (n < 2 || m.bytes[0] != 0x80 || m.bytes[1] != 2)
    return us_err_set(err, US_ERR_INPUT, "the pickle is not of protocol 2");
  m.at = 2;
  while (!m.problem) {
    size_t at = m.at;
    const uint8_t *op = take(&m, 1);
    if (op && *op == '.') {
      if (m.depth == 1 && m.root && m.stack[0] == m.root) return US_OK;
      m.problem = "the pickle is not a dict";
    } else if (op)
      step(&m, *op);
    if (m.problem) return us_err_set(err, US_ERR_INPUT, "%s (pickle byte %zu)", m.problem, at);
  }
  return US_ERR_INPUT;
}

const struct us_torch_item *us_torch_dict_find(const struct us_torch_dict *dict, const char *key) {
  for (int i = 0; i < dict->count; i++)
    if (strcmp(dict->items[i].key, key) == 0) return &dict->items[i];
  return NULL;
}
