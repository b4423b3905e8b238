/* gemm_ring.cuh: the work of a product's blocks, and the ring of pages and rows that loading warps keep ahead of the others.
 *
 * What the narrow and the wide kernel share. Items go round robin over the blocks; every warp finds the next one while it works
 * on this one, so that lists on the device cost no wait.
 */
#ifndef US_KERNELS_PREFILL_GEMM_RING_CUH
#define US_KERNELS_PREFILL_GEMM_RING_CUH

#include "kernels/gpu/async.cuh"
#include "kernels/prefill/prefill.h"

#define LOADERS      4 /* warps */
#define MAX_STAGES   8
#define SHARED_BYTES (226 * 1024)
#define PATCH_BYTES  1024 /* of a warp, for its outputs */

struct gemm_args {
  struct us_prefill_gemm g;
  struct us_prefill_groups groups;
  uint32_t row_tiles; /* 0: on the device, groups.tile_count */
  uint32_t blocks;    /* of weight rows */
  uint32_t part_slices;
  uint32_t stages, slot_bytes, stage_bytes; /* slot: pages of 32 weight rows */
};

/* Projections, unless the pages are odd (wide.cu). */
cudaError_t us_prefill_wide(struct gemm_args *args, cudaStream_t stream);

/* A block's piece of work: rows x one block of weight rows x one part of K. */
struct gemm_item {
  uint32_t expert, first, rows, part, block;
};

struct gemm_shared {
  uint64_t full[MAX_STAGES], empty[MAX_STAGES];
};

/* Place in the ring. */
struct gemm_cursor {
  uint32_t stage, phase;
};

static __device__ __forceinline__ void advance(struct gemm_cursor *c, uint32_t stages) {
  if (++c->stage == stages) c->stage = 0, c->phase ^= 1;
}

/* One warp: it has read the stage. */
static __device__ __forceinline__ void release(struct gemm_shared *s, struct gemm_cursor *c, uint32_t stages,
                                               int lane) {
  __syncwarp();
  if (lane == 0) us_barrier_arrive(us_shared_address(&s->empty[c->stage]));
  advance(c, stages);
}

static __device__ __forceinline__ void init_ring(struct gemm_shared *s, uint32_t stages, uint32_t arrivals,
                                                 uint32_t readers) {
  if (threadIdx.x == 0)
    for (uint32_t i = 0; i < stages; i++) {
      us_barrier_init(us_shared_address(&s->full[i]), arrivals);
      us_barrier_init(us_shared_address(&s->empty[i]), readers);
    }
  us_barrier_init_fence();
  __syncthreads();
}

/* All warps of a warpgroup. A loading warpgroup gives registers to the others: a block starts with 168 a thread for 3 warpgroups,
 * 96 for 5, and no more can be had. */
template <uint32_t REGISTERS, bool MORE> static __device__ __forceinline__ void set_registers(void) {
  if (MORE)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
  else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

static __device__ __forceinline__ uint32_t item_count(const struct gemm_args *a) {
  uint32_t tiles = a->g.opt_experts ? __ldg(a->groups.tile_count) : a->row_tiles;
  return tiles * a->blocks * a->g.parts;
}

/* Projections: row tiles of the same weights run side by side and share them in L2. Experts: blocks of the same rows. Past the
 * last item: that of item 0. */
template <int TOKENS>
static __device__ __forceinline__ struct gemm_item item_at(const struct gemm_args *a, uint32_t i,
                                                           uint32_t items) {
  struct gemm_item item;
  if (i >= items) i = 0;
  if (a->g.opt_experts) {
    const uint32_t *tile = &a->groups.tiles[i / a->blocks].expert;
    item.expert = __ldg(tile), item.first = __ldg(tile + 1), item.rows = __ldg(tile + 2);
    item.part = 0, item.block = i % a->blocks;
    return item;
  }
  uint32_t rest = i / a->row_tiles, left;
  item.expert = 0, item.first = i % a->row_tiles * TOKENS, left = a->g.rows - item.first;
  item.rows = left < TOKENS ? left : TOKENS;
  item.block = rest % a->blocks, item.part = rest / a->blocks;
  return item;
}

/* Which pages a loading warp's lane brings: `mine` lanes from page `first` of the block's. */
struct page_share {
  uint32_t lanes; /* that have a page */
  uint32_t to;    /* of the lane's, in a stage */
  const uint8_t *from;
};
template <int HALVES, int PAGES, int MINE>
static __device__ __forceinline__ struct page_share share_pages(const struct gemm_args *a,
                                                                const struct gemm_item *item, int loader,
                                                                int lane) {
  const struct us_engine_matrix *w = &a->g.w;
  uint32_t place = loader * MINE + lane, left = w->tiles - item->block * PAGES;
  struct page_share s;
  s.lanes = left <= loader * MINE ? 0 : left - loader * MINE < MINE ? left - loader * MINE : MINE;
  s.to = HALVES == 2 ? place * a->slot_bytes : place / 2 * a->slot_bytes + place % 2 * w->page_bytes;
  s.from =
      w->pages + item->expert * w->matrix_bytes +
      ((uint64_t)(item->block * PAGES + place) * w->slices + item->part * a->part_slices) * w->page_bytes;
  return s;
}

#endif
