/* precision.c: parsing precision rules, and which format they give each tensor. */
#include "model/precision.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- parsing --- */

#define OWN_HEAD "draft.head" /* family of a drafter's own output head */

/* A module name of the rule language and what it stands for. */
struct module {
  const char *name;
  const char *families[4];
  const char *part;
};

static const struct module modules[] = {
    {"all", {"*"}, NULL},
    {"embed", {"embed"}, NULL},
    {"head", {"head"}, NULL},
    {"router", {"router"}, NULL},
    {"attn", {"qkv", "o_proj"}, NULL},
    {"attn.qkv", {"qkv"}, NULL},
    {"attn.q", {"qkv"}, NULL},
    {"attn.k", {"qkv"}, NULL},
    {"attn.v", {"qkv"}, NULL},
    {"attn.o", {"o_proj"}, NULL},
    {"mlp", {"dense", "experts"}, NULL},
    {"dense", {"dense"}, NULL},
    {"dense.gate", {"dense"}, "gate_up"},
    {"dense.up", {"dense"}, "gate_up"},
    {"dense.gate_up", {"dense"}, "gate_up"},
    {"dense.down", {"dense"}, "down"},
    {"experts", {"experts"}, NULL},
    {"experts.gate", {"experts"}, "gate_up"},
    {"experts.up", {"experts"}, "gate_up"},
    {"experts.gate_up", {"experts"}, "gate_up"},
    {"experts.down", {"experts"}, "down"},
    {"draft", {"draft", OWN_HEAD}, NULL},
    {"draft.head", {OWN_HEAD}, NULL},
};
enum { MODULES = sizeof modules / sizeof *modules };

static enum us_status bad_rule(const struct us_precision_rule *rule, struct us_err *err,
                               const char *problem) {
  return us_err_set(err, US_ERR_USAGE, "precision rule '%s': %s", rule->text, problem);
}

/* "3", "0-3" or "*"; false if it is none of them. */
static bool parse_range(const char *text, size_t length, uint32_t *first, uint32_t *last) {
  char copy[32];
  if (length == 0 || length >= sizeof copy) return false;
  memcpy(copy, text, length);
  copy[length] = 0;
  if (strcmp(copy, "*") == 0) {
    *first = 0, *last = UINT32_MAX;
    return true;
  }
  if (strspn(copy, "0123456789-") != length) return false;
  char *end = NULL;
  unsigned long a = strtoul(copy, &end, 10), b = a;
  if (end == copy) return false;
  if (*end == '-') {
    const char *second = end + 1;
    b = strtoul(second, &end, 10);
    if (end == second) return false;
  }
  if (*end || a > b || b >= US_MAX_LAYERS) return false;
  *first = (uint32_t)a, *last = (uint32_t)b;
  return true;
}

static enum us_status parse_module(struct us_precision_rule *rule, const char *name, size_t length,
                                   struct us_err *err) {
  for (size_t i = 0; i < MODULES; i++) {
    if (strlen(modules[i].name) != length || memcmp(modules[i].name, name, length) != 0) continue;
    memcpy(rule->families, modules[i].families, sizeof rule->families);
    rule->part = modules[i].part;
    return US_OK;
  }
  return us_err_set(err, US_ERR_USAGE,
                    "precision rule '%s': no module '%.*s' (all, embed, head, router, attn[.qkv|.o], mlp, "
                    "dense[.gate_up|.down], experts[.gate_up|.down], draft[.head])",
                    rule->text, (int)length, name);
}

static enum us_status parse_rule(const char *text, size_t length, struct us_precision_rule *rule,
                                 struct us_err *err) {
  *rule = (struct us_precision_rule){.last = UINT32_MAX};
  if (length >= sizeof rule->text)
    return us_err_set(err, US_ERR_USAGE, "precision rule '%.90s...': too long", text);
  memcpy(rule->text, text, length);
  const char *equals = strchr(rule->text, '=');
  if (!equals) return bad_rule(rule, err, "expected MODULE=FORMAT");
  rule->format = us_format_parse(equals + 1);
  if (rule->format == US_FORMAT_NONE) return bad_rule(rule, err, "format is not f32, bf16, fp8 or mxfp4");
  const char *module = rule->text;
  if (strncmp(module, "layers.", 7) == 0) {
    const char *range = module + 7, *dot = memchr(range, '.', (size_t)(equals - range));
    size_t span = (size_t)((dot ? dot : equals) - range);
    if (!parse_range(range, span, &rule->first, &rule->last)) {
      return bad_rule(rule, err, "layer range is not N, N-M or *");
    }
    rule->ranged = true;
    if (!dot) return parse_module(rule, "all", 3, err);
    module = dot + 1;
  }
  return parse_module(rule, module, (size_t)(equals - module), err);
}

enum us_status us_precision_parse(const char *text, struct us_precision_rules *ret_rules,
                                  struct us_err *err) {
  ret_rules->count = 0;
  while (*text) {
    text += strspn(text, " ");
    size_t length = strcspn(text, ",");
    size_t trimmed = length;
    while (trimmed && text[trimmed - 1] == ' ') trimmed--;
    if (trimmed) {
      if (ret_rules->count == US_MAX_RULES) {
        return us_err_set(err, US_ERR_USAGE, "more than %d precision rules", US_MAX_RULES);
      }
      enum us_status status = parse_rule(text, trimmed, &ret_rules->rules[ret_rules->count], err);
      if (status != US_OK) return status;
      ret_rules->count++;
    }
    text += length;
    if (*text) text++;
  }
  return US_OK;
}

/* --- matching --- */

static bool matches(const struct us_precision_rule *rule, const struct us_tensor_ref *ref) {
  if (!ref->matrix) return false;
  if (rule->ranged && (ref->layer == UINT32_MAX || ref->layer < rule->first || ref->layer > rule->last))
    return false;
  bool family = false;
  for (int i = 0; i < 4 && rule->families[i]; i++) {
    if (strcmp(rule->families[i], ref->family) == 0) family = true;
    if (strcmp(rule->families[i], "*") == 0 && strcmp(ref->family, "router") != 0) family = true;
  }
  if (!family || !rule->part) return family;
  bool down = strstr(ref->name, ".down_proj.") != NULL;
  return down == (strcmp(rule->part, "down") == 0);
}

static enum us_status check_format(const struct us_precision_rule *rule, const struct us_tensor_ref *ref,
                                   struct us_err *err) {
  bool quantized = rule->format == US_FORMAT_FP8 || rule->format == US_FORMAT_MXFP4;
  if (quantized && strcmp(ref->family, "router") == 0)
    return bad_rule(rule, err, "the router is f32 or bf16");
  if (rule->format == US_FORMAT_MXFP4 && ref->cols % US_MXFP4_GROUP) {
    return us_err_set(err, US_ERR_USAGE, "precision rule '%s': %s: %zu columns are not a multiple of 32",
                      rule->text, ref->name, ref->cols);
  }
  return US_OK;
}

/* A drafter's own head: a rule that names it makes one, a wider rule changes what there is. */
static enum us_status set_own_head(const struct us_precision_rule *rule, const struct us_shape *shape,
                                   struct us_draft_shape *opt_draft, struct us_err *err) {
  struct us_matrix matrix = {0};
  struct us_tensor_ref ref = {.family = OWN_HEAD, .layer = UINT32_MAX, .matrix = &matrix};
  bool named = strcmp(rule->families[0], OWN_HEAD) == 0;
  if (named && !opt_draft) return bad_rule(rule, err, "there is no drafter");
  if (!opt_draft || !matches(rule, &ref) || (!named && opt_draft->head == US_FORMAT_NONE)) return US_OK;
  opt_draft->head = rule->format;
  opt_draft->vocab =
      shape->vocab; /* a published drafter's number is stale, but it has no head that it is the size of */
  return US_OK;
}

enum us_status us_precision_shape(const struct us_precision_rules *rules, struct us_shape *shape,
                                  struct us_draft_shape *opt_draft, struct us_err *err) {
  struct us_precision *precision = &shape->precision;
  struct us_matrix matrix = {0}; /* a reference without a matrix is a vector's, which no rule means */
  const struct {
    const char *family;
    enum us_format *format;
  } all[] = {{"embed", &precision->embed},   {"head", &precision->head},   {"qkv", &precision->qkv},
             {"o_proj", &precision->o_proj}, {"dense", &precision->dense}, {"experts", &precision->experts},
             {"router", &precision->router}, {"draft", &precision->draft}};
  for (size_t r = 0; r < rules->count; r++) {
    const struct us_precision_rule *rule = &rules->rules[r];
    if (rule->ranged || rule->part) return bad_rule(rule, err, "random weights have one format a family");
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
      struct us_tensor_ref ref = {.family = all[i].family, .layer = UINT32_MAX, .matrix = &matrix};
      if (!matches(rule, &ref)) continue;
      enum us_status status = check_format(rule, &ref, err);
      if (status != US_OK) return status;
      *all[i].format = rule->format;
    }
    enum us_status status = set_own_head(rule, shape, opt_draft, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

enum us_status us_precision_apply(const struct us_precision_rules *rules, const struct us_tensor_ref *refs,
                                  size_t count, enum us_format *ret_formats, struct us_err *err) {
  for (size_t i = 0; i < count; i++) {
    ret_formats[i] = refs[i].matrix ? refs[i].matrix->format : US_FORMAT_NONE;
  }
  for (size_t r = 0; r < rules->count; r++) {
    const struct us_precision_rule *rule = &rules->rules[r];
    bool matched = false;
    for (size_t i = 0; i < count; i++) {
      if (!matches(rule, &refs[i])) continue;
      enum us_status status = check_format(rule, &refs[i], err);
      if (status != US_OK) return status;
      ret_formats[i] = rule->format;
      matched = true;
    }
    if (!matched) return bad_rule(rule, err, "matches no tensor");
  }
  return US_OK;
}

/* --- the table --- */

static enum us_status table(const struct us_shape *opt_shape, struct us_tensor_ref *refs, size_t count,
                            const struct us_precision_rules *opt_rules, struct us_precision_row **ret_rows,
                            struct us_err *err) {
  static const struct us_precision_rules none;
  struct us_precision_row *rows = calloc(count, sizeof *rows);
  enum us_format *formats = calloc(count, sizeof *formats);
  enum us_status status = rows && formats
                              ? us_precision_apply(opt_rules ? opt_rules : &none, refs, count, formats, err)
                              : us_err_memory(err, "precision table", count * sizeof *rows);
  for (size_t i = 0; status == US_OK && i < count; i++) {
    const struct us_tensor_ref *ref = &refs[i];
    size_t chunk = opt_shape ? us_tensor_scale_chunk_rows(opt_shape, ref) : 0;
    rows[i].ref = *ref;
    rows[i].from = ref->matrix ? ref->matrix->format : US_FORMAT_F32;
    rows[i].to = ref->matrix ? formats[i] : US_FORMAT_F32;
    rows[i].from_bytes = us_matrix_data_bytes(rows[i].from, ref->rows, ref->cols) +
                         us_matrix_scale_bytes(rows[i].from, ref->rows, ref->cols, chunk);
    rows[i].to_bytes = us_matrix_data_bytes(rows[i].to, ref->rows, ref->cols) +
                       us_matrix_scale_bytes(rows[i].to, ref->rows, ref->cols, chunk);
  }
  free(formats);
  if (status != US_OK) {
    free(rows);
    return status;
  }
  *ret_rows = rows;
  return US_OK;
}

enum us_status us_model_precision(const struct us_model *model, const struct us_precision_rules *opt_rules,
                                  struct us_precision_row **ret_rows, size_t *ret_count, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  enum us_status status = us_model_tensors((struct us_model *)model, &refs, ret_count, err);
  if (status != US_OK) return status;
  status = table(&model->shape, refs, *ret_count, opt_rules, ret_rows, err);
  free(refs);
  return status;
}

enum us_status us_draft_precision(const struct us_draft *draft, const struct us_precision_rules *opt_rules,
                                  struct us_precision_row **ret_rows, size_t *ret_count, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  enum us_status status = us_draft_tensors((struct us_draft *)draft, &refs, ret_count, err);
  if (status != US_OK) return status;
  status = table(NULL, refs, *ret_count, opt_rules, ret_rows, err);
  free(refs);
  return status;
}

/* --- what a model has --- */

struct tally {
  uint64_t parameters[US_FORMAT_COUNT];
};

static void tally_add(struct tally *tally, const struct us_matrix *w) {
  if (w->rows) tally->parameters[w->format] += (uint64_t)w->rows * w->cols;
}

static void tally_most(const struct tally *tally, enum us_format *format) {
  int best = US_FORMAT_NONE;
  for (int f = US_FORMAT_F32; f < US_FORMAT_COUNT; f++) {
    if (tally->parameters[f] > (best ? tally->parameters[best] : 0)) best = f;
  }
  if (best) *format = (enum us_format)best;
}

void us_model_update_precision(struct us_model *model) {
  struct tally embed = {0}, head = {0}, qkv = {0}, o_proj = {0}, dense = {0}, experts = {0}, router = {0};
  const struct us_shape *s = &model->shape;
  tally_add(&embed, &model->embed);
  tally_add(&head, &model->head);
  for (uint32_t l = 0; l < s->layers; l++) {
    const struct us_layer *w = &model->layers[l];
    const struct us_matrix *projections[] = {&w->qkv, &w->q, &w->k, &w->v},
                           *mlp[] = {&w->gate, &w->up, &w->down};
    for (int i = 0; i < 4; i++) tally_add(&qkv, projections[i]);
    for (int i = 0; i < 3; i++) tally_add(&dense, mlp[i]);
    tally_add(&o_proj, &w->o_proj);
    tally_add(&router, &w->router);
    for (uint32_t e = 0; s->moe_layer[l] && e < s->experts; e++) {
      tally_add(&experts, &w->experts[e].gate);
      tally_add(&experts, &w->experts[e].up);
      tally_add(&experts, &w->experts[e].down);
    }
  }
  struct us_precision *p = &model->shape.precision;
  tally_most(&embed, &p->embed);
  tally_most(&head, &p->head);
  tally_most(&qkv, &p->qkv);
  tally_most(&o_proj, &p->o_proj);
  tally_most(&dense, &p->dense);
  tally_most(&experts, &p->experts);
  tally_most(&router, &p->router);
}

enum us_format us_draft_format(const struct us_draft *draft) {
  struct tally all = {0};
  enum us_format format = US_FORMAT_BF16;
  tally_add(&all, &draft->fc);
  for (uint32_t l = 0; l < draft->shape.layers; l++) {
    const struct us_draft_layer *w = &draft->layers[l];
    const struct us_matrix *matrices[] = {&w->q, &w->k, &w->v, &w->o_proj, &w->gate, &w->up, &w->down};
    for (int i = 0; i < 7; i++) tally_add(&all, matrices[i]);
  }
  tally_most(&all, &format);
  return format;
}
