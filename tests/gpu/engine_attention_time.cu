/* engine_attention_time.cu: what an attention operation costs between others, keys cold in L2.
 *
 * A chain: fake projection, attention, fake projection, attention, ... over as many layers as exceed L2, against the same chain
 * with empty operations. Reported: a pair with attention, a pair without, bytes of keys and values of all sequences, HBM's time
 * for them, and the rate at which they were read.
 */
#include "engine_attention.h"

#define POOL_BYTES ((size_t)256 << 20) /* of all layers, at least */
#define PROJECTION 5000                /* ns that the fake projection takes: less than any real one */
#define BLOCKS     132
#define HBM        4.62e12 /* bytes a second, measured (docs/perf.md) */

struct chain {
  std::vector<struct us_engine_op> ops;
  struct us_engine_launch launch;
  std::vector<void *> owned;
};

static void *take(struct chain *c, size_t bytes, int fill) {
  void *device;
  US_CUDA(cudaMalloc(&device, bytes));
  US_CUDA(cudaMemset(device, fill, bytes));
  c->owned.push_back(device);
  return device;
}
template <class T> static T *put(struct chain *c, const std::vector<T> &host) {
  T *device = lab_upload(host);
  c->owned.push_back(device);
  return device;
}

static struct us_engine_attention operation(struct chain *c, const struct attention_shape *s,
                                            uint32_t positions, uint32_t pages) {
  struct us_engine_attention a = {};
  uint64_t partial = us_engine_attention_partial_bytes(s->H, s->G, s->V, s->window, positions);
  a.qkv_rows = s->H * s->Q + s->G * (s->Q + s->V);
  a.qkv = (float *)take(c, (size_t)8 * a.qkv_rows * 4, 0x3c),
  a.operand = take(c, (size_t)s->H * s->V * 16, 0);
  a.partial = (float *)take(c, partial, 0);
  a.arrivals = (uint32_t *)take(c, us_engine_attention_counters(s->H, s->G) * 4, 0);
  a.sink = (float *)take(c, s->H * 4, 0), a.rope = (float *)take(c, (size_t)positions * s->rotary * 4, 0x3c);
  if (s->draft) a.q_norm = a.k_norm = (float *)take(c, s->Q * 4, 0x3c);
  a.H = (uint16_t)s->H, a.G = (uint16_t)s->G, a.Q = (uint16_t)s->Q, a.V = (uint16_t)s->V,
  a.rotary = (uint16_t)s->rotary;
  a.window = s->window, a.page_count = pages, a.draft = s->draft, a.scale = 0.07f, a.value_scale = 0.6f,
  a.eps = 1e-5f;
  return a;
}

/* The rows, and page tables of `layers` layers in one pool. */
static void state(struct chain *c, const struct attention_shape *s, struct attention_load load,
                  uint32_t layers, uint32_t pages) {
  std::vector<struct us_engine_state> host(1);
  std::vector<uint64_t> table;
  uint32_t page_bytes = us_engine_page_bytes(s->G, s->Q, s->V);
  for (uint32_t i = 0; i < load.sequences * layers * pages; i++) table.push_back((uint64_t)i * page_bytes);
  uint64_t *device = put(c, table);
  for (uint32_t q = 0; q < load.sequences; q++) {
    std::vector<const uint64_t *> tables;
    for (uint32_t l = 0; l < layers; l++) tables.push_back(device + (size_t)(q * layers + l) * pages);
    (s->draft ? host[0].sequence[q].draft_kv : host[0].sequence[q].kv).tables = put(c, tables);
  }
  for (uint32_t i = 0; i < US_ENGINE_MAX_ROWS; i++) {
    uint32_t q = i / load.rows;
    struct us_engine_row row = {0, load.position + i % load.rows, q < load.sequences ? q : US_ENGINE_NONE, i};
    host[0].target[i] = host[0].draft[i] = row;
  }
  struct us_engine_rank *rank = &c->launch.rank[0];
  rank->state = put(c, host);
  rank->kv_pool = rank->draft_pool =
      (uint8_t *)take(c, (size_t)load.sequences * layers * pages * page_bytes, 0x3c);
}

static double chain_us(struct chain *c, unsigned pairs) {
  struct us_engine_rank *rank = &c->launch.rank[0];
  rank->ops = put(c, c->ops), rank->done = (uint32_t *)take(c, c->ops.size() * 4, 0);
  rank->stuck = (struct us_engine_stuck *)take(c, BLOCKS * US_ENGINE_ROLES * sizeof *rank->stuck, 0);
  c->launch.ranks = 1, c->launch.last = (uint32_t)c->ops.size(), c->launch.rounds = 1,
  c->launch.timeout_ns = us_gpu_timeout(1000000000);
  return lab_median_us([&]() {
           cudaError_t status = cudaMemsetAsync(rank->done, 0, c->ops.size() * 4);
           attention_launch_engine(&c->launch, BLOCKS, PROJECTION);
           return status;
         }) /
         pairs;
}

void attention_time(const struct attention_shape *s, struct attention_load load) {
  struct chain c = {};
  uint32_t positions = load.position + load.rows, all = (positions + 63) / 64,
           ring = s->window ? (s->window + 15 + 63) / 64 : all;
  uint32_t pages = ring < all ? ring : all, page_bytes = us_engine_page_bytes(s->G, s->Q, s->V);
  size_t layer = (size_t)load.sequences * pages * page_bytes;
  uint32_t layers = (uint32_t)(POOL_BYTES / layer) + 1, pairs = layers < 64 ? 64 : 256;
  struct us_engine_attention a = operation(&c, s, positions, pages);
  float *source = (float *)take(&c, (size_t)8 * a.qkv_rows * 4, 0x3c);
  state(&c, s, load, layers, pages);
  if (layer > (size_t)50 << 20) pairs = 16;
  double us[2]; /* with attention, empty */
  for (int kind = 0; kind < 2; kind++) {
    c.ops.clear();
    for (uint32_t i = 0; i < 2 * pairs; i++) {
      struct us_engine_op op = {};
      op.kind = i % 2 == 0 || kind == 1 ? US_ENGINE_ROUTE : US_ENGINE_ATTENTION,
      op.wait = i ? i - 1 : US_ENGINE_NONE;
      op.program = s->draft ? US_ENGINE_PASS_DRAFT : US_ENGINE_PASS_TARGET, op.shift = i * 7;
      if (i % 2 == 0)
        op.route.logits = source, op.route.opt_routed = (uint32_t *)a.qkv, op.route.E = 8 * a.qkv_rows;
      if (op.kind == US_ENGINE_ATTENTION) {
        op.attention = a, op.attention.layer = i / 2 % layers;
        op.attention.ready = i > 1 ? 0 : US_ENGINE_NONE; /* long past, as in the engine */
      }
      c.ops.push_back(op);
    }
    us[kind] = chain_us(&c, pairs);
  }
  double keys = s->window && s->window < load.position ? s->window + load.rows - 1 : positions;
  double bytes = keys * load.sequences * s->G * (us_engine_k_stride(s->Q) + s->V) * 2, over = us[0] - us[1];
  printf(
      "{\"time\": \"attention, %s\", \"position\": %u, \"sequences\": %u, \"rows\": %u, \"us_pair\": %.2f, "
      "\"us_pair_empty\": %.2f, \"us_over_empty\": %.2f, \"mb\": %.2f, \"hbm_us\": %.2f, \"tb_s\": %.2f}\n",
      s->name, load.position, load.sequences, load.rows, us[0], us[1], over, bytes * 1e-6, bytes / HBM * 1e6,
      bytes / over * 1e-6);
  fflush(stdout);
  for (void *p : c.owned) US_CUDA(cudaFree(p));
}
