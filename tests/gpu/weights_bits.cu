/* weights_bits.cu: a rank's weights on the GPU are the model's, code by code and scale by scale; made there or loaded, the bytes
 * are the same, and as many as predicted. With "large": MiMo-V2.5-Pro's share of one of four ranks, made and sampled.
 *
 * Truth: the CPU's random model, read by the formulas of weights.h; not the plan that loading works through.
 *
 * Contents: shapes; comparing; one rank against the model; bytes; cases; the large model.
 */
#include "gpu_test.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

extern "C" {
#include "device/weights.h"
#include "kernels/pages/pages.h"
#include "model/random.h"
}

static void must(enum us_status status, const struct us_err *err) {
  if (status == US_OK) return;
  fprintf(stderr, "%s\n", err->message);
  exit(3);
}

/* ---- shapes ------------------------------------------------------------------------------------------------------ */

/* Every storage format; 8 ranks can share it. */
static struct us_shape even_shape(void) {
  struct us_shape s = {};
  strcpy(s.name, "even");
  s.type = US_MODEL_MIMO_V2, s.layers = 4, s.hidden = 256, s.vocab = 500;
  s.full.q_heads = 16, s.full.kv_heads = 8, s.full.qk_dim = 64, s.full.v_dim = 32, s.full.rotary_dim = 16;
  s.full.rope_theta = 1e6;
  s.swa = s.full, s.swa.window = 16, s.swa.sink = true;
  s.swa_layer[1] = s.swa_layer[2] = 1, s.moe_layer[1] = s.moe_layer[2] = s.moe_layer[3] = 1;
  s.dense_inner = 256, s.expert_inner = 256, s.experts = 16, s.top_k = 4, s.norm_topk_prob = true;
  s.routed_scaling = 1, s.norm_eps = 1e-5, s.value_scale = 0.6, s.qkv_chunks = 8, s.max_positions = 512;
  s.precision = {US_FORMAT_BF16, US_FORMAT_BF16,  US_FORMAT_FP8, US_FORMAT_BF16,
                 US_FORMAT_FP8,  US_FORMAT_MXFP4, US_FORMAT_F32, US_FORMAT_BF16};
  return s;
}

/* The same with each family in another format. */
static struct us_shape other_formats(void) {
  struct us_shape s = even_shape();
  strcpy(s.name, "other formats");
  s.qkv_chunks = 0;
  s.precision = {US_FORMAT_BF16,  US_FORMAT_MXFP4, US_FORMAT_MXFP4, US_FORMAT_FP8,
                 US_FORMAT_MXFP4, US_FORMAT_FP8,   US_FORMAT_BF16,  US_FORMAT_FP8};
  return s;
}

/* Heads of 24 rows, experts of 32: only one rank. */
static struct us_shape tiny_shape(uint32_t chunks) {
  struct us_shape s = even_shape();
  strcpy(s.name, chunks ? "tiny-pro" : "tiny");
  s.hidden = 64, s.vocab = 512, s.dense_inner = 192, s.expert_inner = 32, s.qkv_chunks = chunks;
  s.full.q_heads = s.swa.q_heads = 8, s.swa.kv_heads = 4, s.full.kv_heads = chunks ? chunks : 2;
  s.full.qk_dim = s.swa.qk_dim = 24, s.full.v_dim = s.swa.v_dim = 16,
  s.full.rotary_dim = s.swa.rotary_dim = 8;
  s.precision = {US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_BF16,
                 US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_F32,  US_FORMAT_BF16};
  return s;
}

static struct us_draft_shape draft_of(const struct us_shape *s) {
  struct us_draft_shape d = {};
  d.layers = 3, d.hidden = s->hidden, d.vocab = s->vocab, d.inner = s->dense_inner, d.attention = s->swa;
  d.norm_eps = 1e-5, d.value_scale = 0.6, d.block = 8, d.mask_id = 1, d.taps = 2, d.tap_layer[1] = 3;
  d.target_layers = s->layers;
  d.head = s->hidden == 64 ? US_FORMAT_FP8 : US_FORMAT_MXFP4;
  return d;
}

/* ---- comparing --------------------------------------------------------------------------------------------------- */

template <class T> static std::vector<T> download(const void *device, size_t n) {
  std::vector<T> host(n);
  US_CUDA(cudaMemcpy(host.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

struct tally {
  uint64_t checked = 0, bad = 0;
  std::string first;
  void count(bool same, const std::string &what, uint64_t n, uint64_t k) {
    checked++;
    if (!same && bad++ == 0) first = what + " (" + std::to_string(n) + ", " + std::to_string(k) + ")";
  }
  void report(const std::string &check) {
    if (bad) fprintf(stderr, "%s: first at %s\n", check.c_str(), first.c_str());
    us_gpu_report(check.c_str(), checked, bad, 0);
  }
};

/* A row of a matrix of the model. */
struct place {
  const struct us_matrix *w;
  uint32_t row;
};
typedef std::function<struct place(uint32_t n)> row_map;

static uint32_t code_at(const struct us_matrix *w, uint32_t n, uint32_t k) {
  struct us_pages_source one = {};
  one.w[0] = *w, one.matrices = 1;
  return us_pages_source_code(&one, n, k);
}

static uint32_t scale_at(const struct us_matrix *w, uint32_t n, uint32_t k) {
  struct us_pages_source one = {};
  one.w[0] = *w, one.matrices = 1;
  return us_pages_source_scale(&one, n, k);
}

static struct us_pages pages_of(const struct us_device_matrix *m) {
  return {(enum us_format)m->pages.format, m->rows, m->cols, m->pages.halves * 16u, m->pages.groups * 32u};
}

struct unpacked {
  struct us_matrix w;
  std::vector<uint8_t> data, scales;
  uint32_t scale(const struct us_pages *p, uint32_t n, uint32_t k) const {
    if (p->format == US_FORMAT_MXFP4) return scales[((size_t)n * p->cols + k) / 32];
    uint32_t quads = us_pages_scale_quads(p), bits;
    size_t at = ((size_t)(n / 16) * us_pages_slices(p) + k / p->slice_cols) * quads + k % p->slice_cols / 128;
    memcpy(&bits, &scales[at * 4], 4);
    return bits;
  }
};

static struct unpacked unpack(const struct us_device_matrix *m, uint32_t index) {
  struct us_pages p = pages_of(m);
  struct unpacked u;
  std::vector<uint8_t> pages = download<uint8_t>(m->pages.pages + index * m->pages.matrix_bytes, m->bytes);
  u.data.resize(us_matrix_data_bytes(p.format, p.rows, p.cols));
  u.scales.resize((size_t)p.rows * p.cols / 32 + 4096);
  us_pages_unpack(&p, pages.data(), u.data.data(), u.scales.data());
  u.w = {p.format, p.rows, p.cols, u.data.data(), NULL, 0};
  return u;
}

/* Matrix `index` of m: row n is row map(n) of the model, from column first_col on. */
static void compare(struct tally *t, const std::string &what, const struct us_device_matrix *m,
                    uint32_t index, uint32_t first_col, const row_map &map) {
  struct us_pages p = pages_of(m);
  struct unpacked u = unpack(m, index);
  const std::string what_scale = what + " scale";
  bool scaled = p.format == US_FORMAT_MXFP4 || p.format == US_FORMAT_FP8;
  for (uint32_t n = 0; n < p.rows; n++) {
    struct place from = map(n);
    for (uint32_t k = 0; k < p.cols; k++) {
      t->count(code_at(&u.w, n, k) == code_at(from.w, from.row, first_col + k), what, n, k);
      if (scaled && k % 32 == 0)
        t->count(u.scale(&p, n, k) == scale_at(from.w, from.row, first_col + k), what_scale, n, k);
    }
  }
}

static void compare_vector(struct tally *t, const std::string &what, const float *device, const float *host,
                           uint32_t n) {
  std::vector<float> got = download<float>(device, n);
  for (uint32_t i = 0; i < n; i++) t->count(memcmp(&got[i], &host[i], 4) == 0, what, i, 0);
}

/* ---- one rank against the model ---------------------------------------------------------------------------------- */

struct view { /* of a layer of the model or of the drafter */
  const struct us_matrix *qkv, *q, *k, *v, *o_proj, *gate, *up, *down, *router;
  const struct us_expert *experts;
  const float *input_norm, *post_norm, *sink, *bias, *q_norm, *k_norm;
};

static struct view view_of(const struct us_layer *l) {
  return {&l->qkv,    &l->q,      &l->k,         &l->v,        &l->o_proj, &l->gate,       &l->up, &l->down,
          &l->router, l->experts, l->input_norm, l->post_norm, l->sink,    l->router_bias, NULL,   NULL};
}
static struct view view_of(const struct us_draft_layer *l) {
  return {NULL, &l->q, &l->k,         &l->v,        &l->o_proj, &l->gate, &l->up,    &l->down,
          NULL, NULL,  l->input_norm, l->post_norm, l->sink,    NULL,     l->q_norm, l->k_norm};
}

static struct place qkv_row(const struct view *v, const struct us_attention_shape *a, uint32_t chunks,
                            uint32_t rank, uint32_t ranks, uint32_t n) {
  uint32_t H = a->q_heads / ranks, G = a->kv_heads / ranks, Q = a->qk_dim, V = a->v_dim;
  uint32_t row = n, kind = n < H * Q ? 0 : n < (H + G) * Q ? 1 : 2;
  row -= kind == 0 ? 0 : kind == 1 ? H * Q : (H + G) * Q;
  uint32_t dim = kind == 2 ? V : Q, head = (kind ? G : H) * rank + row / dim;
  if (!chunks) return {kind == 0 ? v->q : kind == 1 ? v->k : v->v, head * dim + row % dim};
  uint32_t first = kind == 0   ? us_attention_q_row(a, chunks, head)
                   : kind == 1 ? us_attention_k_row(a, chunks, head)
                               : us_attention_v_row(a, chunks, head);
  return {v->qkv, first + row % dim};
}

static void check_mlp(struct tally *t, const std::string &name, const struct view *v,
                      const struct us_device_layer *l, uint32_t index, uint32_t rank, uint32_t ranks) {
  const struct us_matrix *gate = v->experts ? &v->experts[index].gate : v->gate;
  const struct us_matrix *up = v->experts ? &v->experts[index].up : v->up;
  const struct us_matrix *down = v->experts ? &v->experts[index].down : v->down;
  uint32_t F = (uint32_t)gate->rows / ranks;
  compare(
      t, name + "up", &l->up, index, 0, [&](uint32_t n) -> struct place {
        return {n % 32 < 16 ? gate : up, rank * F + n / 32 * 16 + n % 16};
      });
  compare(
      t, name + "down", &l->down, index, rank * F, [&](uint32_t n) -> struct place {
        return {down, n};
      });
}

static void check_layer(struct tally *t, const std::string &name, const struct view *v,
                        const struct us_device_layer *l, const struct us_attention_shape *a, uint32_t chunks,
                        uint32_t D, uint32_t experts, uint32_t rank, uint32_t ranks) {
  uint32_t H = a->q_heads / ranks;
  compare(t, name + "qkv", &l->qkv, 0, 0, [&](uint32_t n) { return qkv_row(v, a, chunks, rank, ranks, n); });
  compare(
      t, name + "o_proj", &l->o_proj, 0, rank * H * a->v_dim, [&](uint32_t n) -> struct place {
        return {v->o_proj, n};
      });
  for (uint32_t e = 0; e < (v->experts ? experts : 1); e++) check_mlp(t, name, v, l, e, rank, ranks);
  compare_vector(t, name + "input_norm", l->input_norm, v->input_norm, D);
  compare_vector(t, name + "post_norm", l->post_norm, v->post_norm, D);
  if (v->sink) compare_vector(t, name + "sink", l->sink, v->sink + rank * H, H);
  if (v->q_norm) compare_vector(t, name + "q_norm", l->q_norm, v->q_norm, a->qk_dim);
  if (v->k_norm) compare_vector(t, name + "k_norm", l->k_norm, v->k_norm, a->qk_dim);
  if (!v->experts) return;
  compare(
      t, name + "router", &l->router, 0, 0, [&](uint32_t n) -> struct place {
        return {v->router, n};
      });
  compare_vector(t, name + "bias", l->router_bias, v->bias, experts);
}

static void check_vocabulary(struct tally *t, const struct us_model *m, const struct us_device_weights *w) {
  uint32_t N = m->shape.vocab, D = m->shape.hidden, first = w->rank * w->embed_rows;
  compare(
      t, "head", &w->head, 0, 0, [&](uint32_t n) -> struct place {
        return {&m->head, first + n};
      });
  t->count(w->head.rows == std::min(w->embed_rows, N - first), "head rows", w->head.rows, 0);
  std::vector<uint16_t> embed = download<uint16_t>(w->embed, (size_t)w->embed_rows * D);
  for (size_t i = 0; i < embed.size(); i++) {
    uint32_t id = first + (uint32_t)(i / D);
    uint32_t expected = id < N ? code_at(&m->embed, id, (uint32_t)(i % D)) : 0;
    t->count(embed[i] == expected, "embed", i / D, i % D);
  }
  compare_vector(t, "final_norm", w->final_norm, m->final_norm, D);
}

static void check_draft(struct tally *t, const struct us_draft *d, const struct us_device_weights *w) {
  const struct us_attention_shape *a = &d->shape.attention;
  uint32_t D = d->shape.hidden, G = a->kv_heads / w->ranks, K = G * a->qk_dim, a_layer = K + G * a->v_dim;
  for (uint32_t l = 0; l < d->shape.layers; l++) {
    struct view v = view_of(&d->layers[l]);
    check_layer(t, "drafter " + std::to_string(l) + " ", &v, &w->draft_layers[l], a, 0, D, 0, w->rank,
                w->ranks);
    compare_vector(t, "draft_k_norms", w->draft_k_norms + l * a->qk_dim, v.k_norm, a->qk_dim);
  }
  compare(
      t, "draft_kv", &w->draft_kv, 0, 0, [&](uint32_t n) -> struct place {
        const struct us_draft_layer *l = &d->layers[n / a_layer];
        uint32_t r = n % a_layer;
        if (r < K) return {&l->k, w->rank * K + r};
        return {&l->v, w->rank * G * a->v_dim + r - K};
      });
  compare(
      t, "draft_fc", &w->draft_fc, 0, 0, [&](uint32_t n) -> struct place {
        return {&d->fc, w->rank * (D / w->ranks) + n};
      });
  compare(
      t, "draft_head", &w->draft_head, 0, 0, [&](uint32_t n) -> struct place {
        return {&d->head, w->rank * w->embed_rows + n};
      });
  t->count(w->draft_head.rows == w->head.rows, "draft_head rows", w->draft_head.rows, 0);
  compare_vector(t, "hidden_norm", w->draft_hidden_norm, d->hidden_norm, D);
  compare_vector(t, "draft final_norm", w->draft_final_norm, d->final_norm, D);
  compare_vector(t, "mask_embedding", w->mask_embedding, d->mask_embedding, D);
}

static void check_model(const std::string &name, const struct us_model *m, const struct us_draft *d,
                        const struct us_device_weights *w) {
  struct tally t;
  for (uint32_t l = 0; l < m->shape.layers; l++) {
    struct view v = view_of(&m->layers[l]);
    check_layer(&t, "layer " + std::to_string(l) + " ", &v, &w->layers[l], us_shape_attention(&m->shape, l),
                m->shape.qkv_chunks, m->shape.hidden, m->shape.experts, w->rank, w->ranks);
  }
  check_vocabulary(&t, m, w);
  check_draft(&t, d, w);
  t.report(name + ": every weight is the model's");
}

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

struct extent {
  const uint8_t *at;
  uint64_t bytes;
};

/* Everything that weights point to. */
static std::vector<struct extent> extents(const struct us_device_weights *w) {
  std::vector<struct extent> list;
  auto matrix = [&](const struct us_device_matrix &m, uint32_t count) {
    if (m.pages.pages) list.push_back({m.pages.pages, m.bytes * count});
  };
  auto vector = [&](const float *v, uint64_t n) {
    if (v) list.push_back({(const uint8_t *)v, n * 4});
  };
  auto layer = [&](const struct us_device_layer &l, const struct us_attention_shape *a, uint32_t D,
                   uint32_t experts) {
    matrix(l.qkv, 1), matrix(l.o_proj, 1), matrix(l.router, 1);
    matrix(l.up, experts ? experts : 1), matrix(l.down, experts ? experts : 1);
    vector(l.input_norm, D), vector(l.post_norm, D), vector(l.sink, a->q_heads / w->ranks);
    vector(l.router_bias, experts), vector(l.q_norm, a->qk_dim);
  };
  const struct us_shape *s = &w->shape;
  for (uint32_t i = 0; i < s->layers; i++)
    layer(w->layers[i], us_shape_attention(s, i), s->hidden, s->moe_layer[i] ? s->experts : 0);
  for (uint32_t i = 0; i < w->draft_shape.layers; i++)
    layer(w->draft_layers[i], &w->draft_shape.attention, s->hidden, 0);
  matrix(w->head, 1), matrix(w->draft_fc, 1), matrix(w->draft_kv, 1), matrix(w->draft_head, 1);
  list.push_back({(const uint8_t *)w->embed, (uint64_t)w->embed_rows * s->hidden * 2});
  vector(w->draft_k_norms, (uint64_t)w->draft_shape.layers * w->draft_shape.attention.qk_dim);
  for (const float *v : {w->final_norm, w->draft_hidden_norm, w->draft_final_norm, w->mask_embedding})
    vector(v, s->hidden);
  return list;
}

/* One after the other, each from a multiple of 256 on, and together as long as predicted. */
static void check_bytes(const std::string &name, const struct us_device_weights *w,
                        const struct us_device_bytes *predicted) {
  std::vector<struct extent> list = extents(w);
  struct tally t;
  std::sort(list.begin(), list.end(),
            [](const struct extent &a, const struct extent &b) { return a.at < b.at; });
  const uint8_t *next = list[0].at;
  for (size_t i = 0; i < list.size(); i++) {
    t.count(list[i].at == next, "extent", i, 0);
    next = list[i].at + (list[i].bytes + 255) / 256 * 256;
  }
  uint64_t total = (uint64_t)(next - list[0].at);
  t.count(total == us_device_bytes_weights(predicted), "total", total, us_device_bytes_weights(predicted));
  t.count(memcmp(&w->bytes, predicted, sizeof *predicted) == 0, "kinds", 0, 0);
  t.report(name + ": bytes as predicted");
}

static void check_same(const std::string &name, const struct us_device_weights *a,
                       const struct us_device_weights *b) {
  std::vector<struct extent> left = extents(a), right = extents(b);
  struct tally t;
  for (size_t i = 0; i < left.size(); i++) {
    std::vector<uint8_t> x = download<uint8_t>(left[i].at, left[i].bytes),
                         y = download<uint8_t>(right[i].at, right[i].bytes);
    for (size_t j = 0; j < x.size(); j++) t.count(x[j] == y[j], "extent", i, j);
  }
  t.report(name + ": made = loaded");
}

/* ---- cases ------------------------------------------------------------------------------------------------------- */

static void run_rank(const struct us_model *model, const struct us_draft *draft, uint32_t rank,
                     uint32_t ranks) {
  struct us_device_weights_options options = {};
  struct us_device_weights *loaded, *made;
  struct us_device_bytes predicted;
  struct us_err err = {};
  std::string name =
      std::string(model->shape.name) + " rank " + std::to_string(rank) + "/" + std::to_string(ranks);
  options.rank = rank, options.ranks = ranks;
  must(us_device_weights_bytes(&model->shape, &draft->shape, &options, &predicted, &err), &err);
  must(us_device_weights_load(model, draft, &options, &loaded, &err), &err);
  must(us_device_weights_synthetic(&model->shape, &draft->shape, 7, &options, &made, &err), &err);
  check_bytes(name, loaded, &predicted);
  check_same(name, loaded, made);
  check_model(name, model, draft, loaded);
  us_device_weights_free(loaded);
  us_device_weights_free(made);
}

static void run_shape(struct us_shape shape, uint32_t most) {
  struct us_draft_shape draft_shape = draft_of(&shape);
  struct us_model *model;
  struct us_draft *draft;
  struct us_err err = {};
  must(us_model_random(&shape, 7, NULL, &model, &err), &err);
  must(us_draft_random(&draft_shape, shape.precision.draft, 7, NULL, &draft, &err), &err);
  for (uint32_t ranks = 1; ranks <= most; ranks *= 2)
    for (uint32_t rank = 0; rank < ranks; rank++)
      if (ranks < 4 || rank == 1 || rank == ranks - 1) run_rank(model, draft, rank, ranks);
  us_model_free(model);
  us_draft_free(draft);
}

/* A scale that pages cannot hold is refused by its place. */
static void run_bad_scale(void) {
  struct us_shape shape = even_shape();
  struct us_model *model;
  struct us_device_weights *weights;
  struct us_device_weights_options options = {};
  struct us_err err = {};
  options.rank = 1, options.ranks = 2;
  must(us_model_random(&shape, 7, NULL, &model, &err), &err);
  uint8_t *scales = (uint8_t *)(uintptr_t)model->layers[2].experts[9].down.scales;
  scales[200 * 8 + 5] = 201; /* row 200, column 160: of rank 1 */
  bool refused = us_device_weights_load(model, NULL, &options, &weights, &err) == US_ERR_INPUT;
  bool says =
      strstr(err.message, "layers.2.experts.down, expert 9: scale byte 201 at row 200, column 160") != NULL;
  if (!says) fprintf(stderr, "%s\n", err.message);
  us_gpu_report("a scale byte above 192 is refused", 1, !refused || !says, 0);
  options.rank = 0;
  must(us_device_weights_load(model, NULL, &options, &weights, &err), &err);
  us_device_weights_free(weights);
  us_model_free(model);
}

/* ---- the large model --------------------------------------------------------------------------------------------- */

/* Row n of an MXFP4 tensor, made and encoded on the CPU, against the columns of a device matrix's row. */
static void sample_mxfp4(struct tally *t, const char *tensor, uint32_t cols, uint32_t row,
                         const struct unpacked *u, const struct us_pages *p, uint32_t n, uint32_t first_col) {
  struct us_matrix shape = {};
  struct us_tensor_ref ref = {};
  snprintf(ref.name, sizeof ref.name, "%s", tensor);
  ref.family = "experts", ref.matrix = &shape, ref.cols = cols;
  std::vector<float> values(cols);
  std::vector<uint8_t> codes(cols / 2), scales(cols / 32);
  struct us_err err = {};
  struct us_matrix_encoding encoding = {};
  encoding.format = US_FORMAT_MXFP4, encoding.scale_rule = US_SCALE_MSE;
  us_random_row(7, &ref, row, values.data());
  must(us_matrix_encode(values.data(), 1, cols, &encoding, codes.data(), scales.data(), &err), &err);
  for (uint32_t k = 0; k < p->cols; k++) {
    uint32_t col = first_col + k, code = codes[col / 2] >> (col & 1 ? 4 : 0) & 15u;
    t->count(code_at(&u->w, n, k) == code, tensor, row, col);
    t->count(u->scale(p, n, k) == scales[col / 32], tensor, row, col);
  }
}

static void sample_expert(struct tally *t, const struct us_device_layer *layer, uint32_t l, uint32_t e,
                          uint32_t rank) {
  std::string base = "model.layers." + std::to_string(l) + ".mlp.experts." + std::to_string(e);
  struct unpacked up = unpack(&layer->up, e), down = unpack(&layer->down, e);
  struct us_pages up_pages = pages_of(&layer->up), down_pages = pages_of(&layer->down);
  for (uint32_t n = 0; n < up_pages.rows; n += 67)
    sample_mxfp4(t, (base + (n % 32 < 16 ? ".gate_proj.weight" : ".up_proj.weight")).c_str(), 6144,
                 rank * 512 + n / 32 * 16 + n % 16, &up, &up_pages, n, 0);
  for (uint32_t n = 0; n < down_pages.rows; n += 301)
    sample_mxfp4(t, (base + ".down_proj.weight").c_str(), 2048, n, &down, &down_pages, n, rank * 512);
}

static void run_large(void) {
  struct us_shape shape;
  struct us_draft_shape draft;
  struct us_device_weights_options options = {};
  struct us_device_weights *w;
  struct us_device_bytes predicted;
  struct us_err err = {};
  must(us_shape_load("mimo-v2.5-pro", &shape, &err), &err);
  draft = draft_of(&shape);
  draft.layers = 5, draft.inner = 16384, draft.taps = 5, draft.attention.qk_dim = 128;
  for (uint32_t i = 0; i < 5; i++) draft.tap_layer[i] = i * 15;
  options.rank = 2, options.ranks = 4;
  must(us_device_weights_bytes(&shape, &draft, &options, &predicted, &err), &err);
  auto start = std::chrono::steady_clock::now();
  must(us_device_weights_synthetic(&shape, &draft, 7, &options, &w, &err), &err);
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  printf("{\"check\": \"mimo-v2.5-pro, rank 2 of 4\", \"seconds\": %.2f, \"gib\": %.2f}\n", seconds,
         (double)us_device_bytes_weights(&predicted) * 0x1p-30);
  check_bytes("mimo-v2.5-pro", w, &predicted);
  struct tally t;
  for (uint32_t l = 1; l < 70; l += 17) sample_expert(&t, &w->layers[l], l, (l * 29) % 384, 2);
  t.report("mimo-v2.5-pro: sampled experts");
  struct us_device_weights *again;
  us_gpu_report("no room for a second copy", 1,
                us_device_weights_synthetic(&shape, &draft, 7, &options, &again, &err) != US_ERR_MEMORY, 0);
  fprintf(stderr, "%s\n", err.message);
  us_device_weights_free(w);
}

int main(int argc, char **argv) {
  us_gpu_begin();
  us_gpu_watchdog(90);
  run_shape(tiny_shape(0), 1);
  run_shape(tiny_shape(4), 1);
  run_shape(even_shape(), 8);
  run_shape(other_formats(), 8);
  run_bad_scale();
  if (argc > 1 && strcmp(argv[1], "large") == 0) run_large();
  return us_gpu_status();
}
