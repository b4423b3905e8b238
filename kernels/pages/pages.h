/* pages.h: weight pages: a matrix cut into the pieces that one bulk copy brings to an SM, in the order it multiplies them.
 *
 *     struct us_pages p = {US_FORMAT_MXFP4, N, K, .tile_rows = 32, .slice_cols = K / 16};
 *     if (us_pages_check(&p, &err) != US_OK) return err.status;
 *     us_pages_pack(&p, &source, pages, &err);             // us_pages_bytes(&p) bytes, 16-byte aligned
 *     us_pages_unpack(&p, pages, data, opt_scales);        // and back, bit for bit
 *
 * A page holds tile_rows rows (16 or 32) x slice_cols columns: codes, then its scales in the tail, so one copy brings both.
 * Pages lie tile by tile, in a tile slice by slice: every page is whole, a block of K slices is contiguous. Rows that the last
 * tile has past the matrix's are zeros.
 *
 * Codes lie as the tensor cores' 16 x 16 row operand wants them (PTX ISA, mma.m16n8k16): fragment (group of 32 columns,
 * 16-row half of the tile, half of the group) of lane 4 (r % 8) + (k % 8) / 2 holds rows r, r + 8 and columns k, k + 1,
 * k + 8, k + 9; "register" (r / 8) + 2 (k % 16 / 8), "half" k % 2. A lane's words come in chunks of 16 bytes, chunk after
 * chunk for all 32 lanes: conflict-free 16-byte loads. Bits are moved so that decoding to bf16 is masks and shifts
 * (kernels/gpu/mma.cuh), and scales so that with activations times 2^64 (kernels/engine/engine.h) every product and every
 * scale is a normal FP32 number and sum x scale is the sum itself:
 *   MXFP4  one word a fragment: sign and magnitude of register 0..3 at bits 15, 8..6 | 12, 5..3 | 9, 2..0 of the half
 *          word | 13, and 11, 10, 14 of the other half: e2m1 at the place of bf16's, times 2^-126, after as few
 *          instructions as found; scale byte + 62 (a byte above 192, weights beyond 2^65, is refused)
 *   FP8    two words: registers 0, 1 | 2, 3: the even register's codes where the word turned by 12 bits has them, the odd
 *          one's where the word XOR itself 4 bits on has them: e4m3 at the place of bf16's (bits 15 and 10..4 of a half), times
 *          2^-120; scale times 2^56 (one that overflows is refused)
 *   BF16   four words, one a register: sums carry the activations' 2^64
 *   F32    eight words, two a register: likewise
 */
#ifndef US_KERNELS_PAGES_PAGES_H
#define US_KERNELS_PAGES_PAGES_H

#include "formats/matrix.h"

#ifdef __cplusplus
extern "C" {
#endif

#define US_PAGES_LANES 32
/* What the value of a code, decoded to bf16, is multiplied by, and what undoes it together with the activations' 2^64. */
#define US_PAGES_MXFP4_UNIT  0x1p-126f
#define US_PAGES_FP8_UNIT    0x1p-120f
#define US_PAGES_MXFP4_SCALE 62      /* added to a scale byte: times 2^62 */
#define US_PAGES_FP8_SCALE   0x1p56f /* times an FP8 scale */
#define US_PAGES_SCALE_MOST  192     /* the largest MXFP4 scale byte that fits */

struct us_pages {
  enum us_format format;
  uint32_t rows, cols; /* (N, K) of what is packed: one rank's share */
  uint32_t tile_rows;  /* 16 or 32; the last tile may have fewer rows */
  uint32_t
      slice_cols; /* columns a page; divides cols; a multiple of 32; for FP8 32, 64, a multiple of 128, or cols */
};

/* Where the packed rows and columns come from: a window of one matrix, or of gate and up interleaved in 16-row halves of
 * 32-row tiles, so that one lane holds gate and up of the same output. Matrices on the device for us_pages_pack_gpu. */
struct us_pages_source {
  struct us_matrix w[2];
  uint32_t matrices; /* 1, or 2: gate and up, of rows / 2 rows each */
  uint32_t first_row, first_col;
};

/* The part [begin, end) of n equal things that rank owns of ranks (1, 2, 4, 8): columns of an expert (inner size F), query
 * heads, KV heads. */
struct us_share {
  uint32_t begin, end;
};

static US_HD struct us_share us_share_of(uint32_t n, uint32_t rank, uint32_t ranks) {
  struct us_share share = {n / ranks * rank, n / ranks * (rank + 1)};
  return share;
}

/* A place in the pages: byte offset of a 32-bit word. */
struct us_pages_place {
  uint64_t page;     /* index of the page */
  uint32_t fragment; /* in the page */
  uint32_t lane, reg, half;
};

/* Words a fragment has a lane. */
static US_HD uint32_t us_pages_fragment_words(enum us_format format) {
  return format == US_FORMAT_MXFP4 ? 1 : format == US_FORMAT_FP8 ? 2 : format == US_FORMAT_BF16 ? 4 : 8;
}

static US_HD uint32_t us_pages_halves(const struct us_pages *p) {
  return p->tile_rows / 16;
}

static US_HD uint32_t us_pages_slices(const struct us_pages *p) {
  return p->cols / p->slice_cols;
}

static US_HD uint32_t us_pages_tiles(const struct us_pages *p) {
  return (p->rows + p->tile_rows - 1) / p->tile_rows;
}

static US_HD uint64_t us_pages_count(const struct us_pages *p) {
  return (uint64_t)us_pages_tiles(p) * us_pages_slices(p);
}

/* 16-byte chunks of codes a lane has in a page. */
static US_HD uint32_t us_pages_chunks(const struct us_pages *p) {
  uint32_t fragments = p->slice_cols / 16 * us_pages_halves(p);
  return (fragments * us_pages_fragment_words(p->format) + 3) / 4;
}

static US_HD uint32_t us_pages_code_bytes(const struct us_pages *p) {
  return us_pages_chunks(p) * US_PAGES_LANES * 16;
}

/* Groups of 4 x 32 columns whose MXFP4 scales lie together; 128-column blocks of FP8. */
static US_HD uint32_t us_pages_scale_quads(const struct us_pages *p) {
  return (p->slice_cols + 127) / 128;
}

static US_HD uint32_t us_pages_tail_bytes(const struct us_pages *p) {
  uint32_t quads = us_pages_scale_quads(p), halves = us_pages_halves(p);
  if (p->format == US_FORMAT_MXFP4) return 8 * quads * 8 * halves;
  if (p->format == US_FORMAT_FP8) return (quads * halves * 4 + 15) / 16 * 16;
  return 0;
}

static US_HD uint32_t us_pages_page_bytes(const struct us_pages *p) {
  return us_pages_code_bytes(p) + us_pages_tail_bytes(p);
}

static US_HD uint64_t us_pages_bytes(const struct us_pages *p) {
  return us_pages_count(p) * us_pages_page_bytes(p);
}

/* Where weight (n, k) is. */
static US_HD struct us_pages_place us_pages_place(const struct us_pages *p, uint32_t n, uint32_t k) {
  uint32_t row = n % p->tile_rows, col = k % p->slice_cols, r = row % 16, c = col % 16;
  struct us_pages_place at;
  at.page = (uint64_t)(n / p->tile_rows) * us_pages_slices(p) + k / p->slice_cols;
  at.fragment = (col / 32 * us_pages_halves(p) + row / 16) * 2 + col % 32 / 16;
  at.lane = r % 8 * 4 + c % 8 / 2;
  at.reg = r / 8 + c / 8 * 2;
  at.half = c % 2;
  return at;
}

/* Byte offset in a page of word `word` of a lane's words. */
static US_HD uint32_t us_pages_word_offset(uint32_t lane, uint32_t word) {
  return (word / 4 * US_PAGES_LANES + lane) * 16 + word % 4 * 4;
}

/* Byte offset in its page of the scale of row `row` of the tile, column `col` of the slice: MXFP4 (a byte a row and 32
 * columns), FP8 (a float a 16-row half and 128 columns). */
static US_HD uint32_t us_pages_scale_offset(const struct us_pages *p, uint32_t row, uint32_t col) {
  uint32_t halves = us_pages_halves(p), base = us_pages_code_bytes(p), quad = col / 128;
  if (p->format == US_FORMAT_FP8) return base + (quad * halves + row / 16) * 4;
  uint32_t lane_group = row % 8, quads = us_pages_scale_quads(p);
  return base + (lane_group * quads + quad) * 8 * halves + row / 8 * 4 + col / 32 % 4;
}

/* The word w of FP8 with (w turned left by 12 bits) & 0x87f087f0 = even and (w ^ w << 4) & 0x87f087f0 = odd. Each bit of the word is the XOR
 * of some of theirs, which no order of them can do: codes side by side take three instructions more to decode. */
static US_HD uint32_t us_pages_fp8_word(uint32_t even, uint32_t odd) {
  uint32_t word = even >> 12 | even << 20, rest = odd ^ ((word ^ word << 4) & 0x87f087f0u);
  return word ^ (rest & 0x80808080u) ^ (rest >> 4 & 0x00770077u) ^ (rest >> 8 & 0x00070007u);
}

/* What an MXFP4 or FP8 code contributes to its word, the XOR of all of its codes', by register and half of that register. */
static US_HD uint32_t us_pages_place_code(enum us_format format, uint32_t code, uint32_t reg, uint32_t half) {
  if (format == US_FORMAT_FP8) {
    uint32_t bits = ((code & 0x80u) << 8 | (code & 0x7fu) << 4) << 16 * half;
    return reg & 1u ? us_pages_fp8_word(0, bits) : us_pages_fp8_word(bits, 0);
  }
  uint32_t magnitude = code & 7u, sign = code >> 3;
  if (reg < 3) return (magnitude << (6 - 3 * reg) | sign << (15 - 3 * reg)) << 16 * half;
  return ((magnitude & 1u) << 14 | sign << 13 | magnitude >> 1 << 10) << 16 * (half ^ 1u);
}

/* The matrix that packed row n < rows comes from, and its row there. */
static US_HD const struct us_matrix *us_pages_source_row(const struct us_pages_source *s, uint32_t n,
                                                         uint32_t *ret_row) {
  if (s->matrices == 1) {
    *ret_row = s->first_row + n;
    return &s->w[0];
  }
  *ret_row = s->first_row + n / 32 * 16 + n % 16;
  return &s->w[n / 16 % 2];
}

/* A weight's code or bits as stored: 4, 8, 16 or 32 bits. */
static US_HD uint32_t us_pages_source_code(const struct us_pages_source *s, uint32_t n, uint32_t k) {
  uint32_t row;
  const struct us_matrix *w = us_pages_source_row(s, n, &row);
  size_t at = (size_t)row * w->cols + s->first_col + k;
  if (w->format == US_FORMAT_MXFP4) return ((const uint8_t *)w->data)[at / 2] >> (at & 1 ? 4 : 0) & 15u;
  if (w->format == US_FORMAT_FP8) return ((const uint8_t *)w->data)[at];
  if (w->format == US_FORMAT_BF16) return ((const uint16_t *)w->data)[at];
  return ((const uint32_t *)w->data)[at];
}

/* The scale of (n, k): the MXFP4 byte, or the bits of the FP8 float. */
static US_HD uint32_t us_pages_source_scale(const struct us_pages_source *s, uint32_t n, uint32_t k) {
  uint32_t row;
  const struct us_matrix *w = us_pages_source_row(s, n, &row);
  size_t col = (size_t)s->first_col + k;
  if (w->format == US_FORMAT_MXFP4)
    return ((const uint8_t *)w->scales)[((size_t)row * w->cols + col) / US_MXFP4_GROUP];
  size_t scale_cols = (w->cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  return ((const uint32_t *)w->scales)[us_matrix_scale_row(w, row) * scale_cols + col / US_FP8_BLOCK];
}

/* The same of packed row n, or 0 past the rows: padding. */
static US_HD uint32_t us_pages_padded_code(const struct us_pages *p, const struct us_pages_source *s,
                                           uint32_t n, uint32_t k) {
  return n < p->rows ? us_pages_source_code(s, n, k) : 0;
}

/* The scale of (n, k) as a page holds it: a byte, or the bits of a float. Past the rows, that of a block of zeros. */
static US_HD uint32_t us_pages_stored_scale(const struct us_pages *p, const struct us_pages_source *s,
                                            uint32_t n, uint32_t k) {
  if (p->format == US_FORMAT_MXFP4)
    return (n < p->rows ? us_pages_source_scale(s, n, k) : 0) + US_PAGES_MXFP4_SCALE;
  float scale = n < p->rows ? us_f32_from_bits(us_pages_source_scale(s, n, k))
                            : us_fp8_block_scale(0, US_FP8_SCALE_F32);
  return us_f32_bits(scale * US_PAGES_FP8_SCALE);
}

/* Word `word` of `lane` in page `page`, gathered from the source: what packing writes at us_pages_word_offset. */
static US_HD uint32_t us_pages_gather(const struct us_pages *p, const struct us_pages_source *s,
                                      uint64_t page, uint32_t lane, uint32_t word) {
  uint32_t words = us_pages_fragment_words(p->format), fragment = word / words, sub = word % words;
  uint32_t halves = us_pages_halves(p), group = fragment / (2 * halves), slices = us_pages_slices(p);
  if (group >= p->slice_cols / 32) return 0; /* padding of the last chunk */
  uint32_t row = (uint32_t)(page / slices) * p->tile_rows + fragment / 2 % halves * 16 + lane / 4;
  uint32_t col = (uint32_t)(page % slices) * p->slice_cols + group * 32 + fragment % 2 * 16 + lane % 4 * 2;
  if (words == 8) return us_pages_padded_code(p, s, row + sub / 2 % 2 * 8, col + sub / 4 * 8 + sub % 2);
  uint32_t value = 0, regs = 4 / words, first = sub * regs;
  for (uint32_t reg = first; reg < first + regs; reg++)
    for (uint32_t half = 0; half < 2; half++) {
      uint32_t code = us_pages_padded_code(p, s, row + reg % 2 * 8, col + reg / 2 * 8 + half);
      value ^= words == 4 ? code << 16 * half : us_pages_place_code(p->format, code, reg, half);
    }
  return value;
}

/* Byte `index` of the tail of page `page`. */
static US_HD uint8_t us_pages_gather_tail(const struct us_pages *p, const struct us_pages_source *s,
                                          uint64_t page, uint32_t index) {
  uint32_t halves = us_pages_halves(p), slices = us_pages_slices(p), quads = us_pages_scale_quads(p);
  uint32_t row0 = (uint32_t)(page / slices) * p->tile_rows, col0 = (uint32_t)(page % slices) * p->slice_cols;
  if (p->format == US_FORMAT_FP8) {
    uint32_t entry = index / 4;
    if (entry >= quads * halves) return 0;
    uint32_t bits = us_pages_stored_scale(p, s, row0 + entry % halves * 16, col0 + entry / halves * 128);
    return (uint8_t)(bits >> 8 * (index % 4));
  }
  uint32_t per_group = quads * 8 * halves, within = index % per_group;
  uint32_t row = index / per_group + within / 4 % (2 * halves) * 8;
  uint32_t col = within / (8 * halves) * 128 + within % 4 * 32;
  return col < p->slice_cols ? (uint8_t)us_pages_stored_scale(p, s, row0 + row, col0 + col) : 0;
}

/* US_ERR_USAGE if rows and columns do not divide into such pages. */
US_CHECKED enum us_status us_pages_check(const struct us_pages *p, struct us_err *err);

/* Pack on the CPU: `pages` is us_pages_bytes long. Does us_pages_source_check and us_pages_scales_check first. */
US_CHECKED enum us_status us_pages_pack(const struct us_pages *p, const struct us_pages_source *source,
                                        void *pages, struct us_err *err);

/* Whether the source can be packed so; reads no weights. US_ERR_USAGE if the window leaves the source or a page would need two
 * FP8 scales for a 16-row half and 128 columns. */
US_CHECKED enum us_status us_pages_source_check(const struct us_pages *p,
                                                const struct us_pages_source *source, struct us_err *err);

/* US_ERR_INPUT names the first scale (in host memory) that a page cannot hold: an MXFP4 byte above US_PAGES_SCALE_MOST, an FP8
 * scale that overflows times US_PAGES_FP8_SCALE. */
US_CHECKED enum us_status us_pages_scales_check(const struct us_pages *p,
                                                const struct us_pages_source *source, struct us_err *err);

/* Back to rows, for tests and dumps: data (us_matrix_data_bytes of (rows, cols)) in packed row order; MXFP4 scale bytes
 * (rows, cols / 32), FP8 scales a float for each 16 rows and 128 columns of a slice (ceil(rows / 16), slices *
 * ceil(slice_cols / 128)); opt_scales may be NULL. */
void us_pages_unpack(const struct us_pages *p, const void *pages, void *data, void *opt_scales);

#ifdef __cplusplus
}
#endif
#endif
