/* linear_simd.h: y = x W^T over 16 lanes, one source for AVX2 and AVX-512.
 *
 * Bound: one row streams the weights (MXFP4: 17 bytes a group of 32) from memory; from 4 rows on, fma. OUTS output rows are
 * taken at once, so that the fma latency of one lane's chain (2 a group) hides behind the others'; a decoded group serves
 * up to WIDE_BATCH token rows, WIDE_OUTS output rows at once.
 *
 * Contents: decoding a group; dots of a block; the loop.
 */
#include "kernels/cpu/vec16.h"
#include "kernels/linear/linear_impl.h"
#include "kernels/linear/mxfp4_tables.h"

#include "formats/fp8.h"
#include <string.h>

#define LANES 16

/* ---- Decoding a group: even k in *even, odd k in *odd ---- */

struct row_view {
  const uint8_t *data;   /* first group of the row */
  const uint8_t *scales; /* MXFP4: bytes of the row; FP8: floats of the row */
};

#if defined(__AVX512F__)

VEC16_INLINE void decode_mxfp4(const uint8_t *codes, uint8_t scale, vec16 *even, vec16 *odd) {
  __m512 table = _mm512_load_ps(us_mxfp4_tables[scale]);
  __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)codes));
  *even = _mm512_permutexvar_ps(bytes, table); /* the index is the low 4 bits */
  *odd = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
}

VEC16_INLINE void decode_bf16(const uint8_t *data, vec16 *even, vec16 *odd) {
  __m512i pair = _mm512_loadu_si512(data);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000u)));
}

VEC16_INLINE void decode_f32(const float *data, vec16 *even, vec16 *odd) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  __m512 a = _mm512_loadu_ps(data), b = _mm512_loadu_ps(data + LANES);
  *even = _mm512_permutex2var_ps(a, evens, b);
  *odd = _mm512_permutex2var_ps(a, odds, b);
}

/* E4M3 to FP32 in each 32-bit lane whose low byte is the code: as an f16 of the same fields (a 4-bit exponent in 5), times
 * 2^8; exact, and no FP32 subnormal on the way. The NaN codes are refused when a checkpoint is checked. */
VEC16_INLINE __m512 e4m3_to_f32(__m512i code) {
  __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 8);
  __m512i magnitude = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x7f)), 7);
  __m256i half = _mm512_cvtepi32_epi16(_mm512_or_si512(sign, magnitude));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}

VEC16_INLINE void decode_fp8(const uint8_t *data, float scale, vec16 *even, vec16 *odd) {
  __m512i pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)data));
  *even = _mm512_mul_ps(e4m3_to_f32(pair), _mm512_set1_ps(scale));
  *odd = _mm512_mul_ps(e4m3_to_f32(_mm512_srli_epi32(pair, 8)), _mm512_set1_ps(scale));
}

#else

/* Magnitudes from an 8-entry table, the sign from bit 3. */
VEC16_INLINE __m256 e2m1_to_f32(__m256i code, __m256 table) {
  __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(8)), 28);
  return _mm256_or_ps(_mm256_permutevar8x32_ps(table, code), _mm256_castsi256_ps(sign));
}

VEC16_INLINE void decode_mxfp4(const uint8_t *codes, uint8_t scale, vec16 *even, vec16 *odd) {
  __m256 table = _mm256_load_ps(us_mxfp4_tables[scale]);
  __m256i lo = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)codes));
  __m256i hi = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(codes + 8)));
  even->lo = e2m1_to_f32(lo, table);
  even->hi = e2m1_to_f32(hi, table);
  odd->lo = e2m1_to_f32(_mm256_srli_epi32(lo, 4), table);
  odd->hi = e2m1_to_f32(_mm256_srli_epi32(hi, 4), table);
}

VEC16_INLINE void decode_bf16(const uint8_t *data, vec16 *even, vec16 *odd) {
  __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
  __m256i lo = _mm256_loadu_si256((const __m256i *)(const void *)data);
  __m256i hi = _mm256_loadu_si256((const __m256i *)(const void *)(data + 32));
  even->lo = _mm256_castsi256_ps(_mm256_slli_epi32(lo, 16));
  even->hi = _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16));
  odd->lo = _mm256_castsi256_ps(_mm256_and_si256(lo, mask));
  odd->hi = _mm256_castsi256_ps(_mm256_and_si256(hi, mask));
}

/* 16 consecutive floats to their 8 even and 8 odd ones. */
VEC16_INLINE void split_pairs(const float *data, __m256 *even, __m256 *odd) {
  __m256 a = _mm256_loadu_ps(data), b = _mm256_loadu_ps(data + 8);
  __m256 e = _mm256_shuffle_ps(a, b, 0x88), o = _mm256_shuffle_ps(a, b, 0xdd);
  *even = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(e), 0xd8));
  *odd = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(o), 0xd8));
}

VEC16_INLINE void decode_f32(const float *data, vec16 *even, vec16 *odd) {
  split_pairs(data, &even->lo, &odd->lo);
  split_pairs(data + LANES, &even->hi, &odd->hi);
}

VEC16_INLINE __m256 e4m3_to_f32(__m256i code) {
  __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 8);
  __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x7f)), 7);
  __m256i wide = _mm256_or_si256(sign, magnitude);
  __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

VEC16_INLINE void decode_fp8(const uint8_t *data, float scale, vec16 *even, vec16 *odd) {
  __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)data));
  __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(data + 16)));
  __m256 s = _mm256_set1_ps(scale);
  even->lo = _mm256_mul_ps(e4m3_to_f32(lo), s);
  even->hi = _mm256_mul_ps(e4m3_to_f32(hi), s);
  odd->lo = _mm256_mul_ps(e4m3_to_f32(_mm256_srli_epi32(lo, 8)), s);
  odd->hi = _mm256_mul_ps(e4m3_to_f32(_mm256_srli_epi32(hi, 8)), s);
}

#endif

/* Bytes of a group of 32 codes. */
VEC16_INLINE size_t group_bytes(enum us_format format) {
  return format == US_FORMAT_F32 ? 128 : format == US_FORMAT_BF16 ? 64 : format == US_FORMAT_FP8 ? 32 : 16;
}

VEC16_INLINE void decode_group(const struct row_view *row, enum us_format format, size_t g, vec16 *even,
                               vec16 *odd) {
  const uint8_t *data = row->data + g * group_bytes(format);
  if (format == US_FORMAT_MXFP4) {
    decode_mxfp4(data, row->scales[g], even, odd);
  } else if (format == US_FORMAT_FP8) {
    decode_fp8(data, ((const float *)(const void *)row->scales)[g / (US_FP8_BLOCK / US_LINEAR_GROUP)], even,
               odd);
  } else if (format == US_FORMAT_BF16) {
    decode_bf16(data, even, odd);
  } else {
    decode_f32((const float *)(const void *)data, even, odd);
  }
}

VEC16_INLINE struct row_view view_row(const struct us_matrix *w, enum us_format format, size_t n) {
  size_t row_bytes =
      format == US_FORMAT_MXFP4 ? w->cols / 2 : w->cols * (group_bytes(format) / US_LINEAR_GROUP);
  struct row_view row = {.data = (const uint8_t *)w->data + n * row_bytes};
  if (format == US_FORMAT_MXFP4) row.scales = (const uint8_t *)w->scales + n * (w->cols / US_MXFP4_GROUP);
  if (format == US_FORMAT_FP8) {
    size_t scale_cols = (w->cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
    row.scales = (const uint8_t *)((const float *)w->scales + us_matrix_scale_row(w, n) * scale_cols);
  }
  return row;
}

/* ---- Dots of a block: OUTS weight rows times BATCH token rows ---- */

/* The last group of a row whose K is not a multiple of 32, copied and zero-padded, so that nothing past the row is read.
 * Code 0 is zero in every format. */
VEC16_INLINE struct row_view pad_tail(const struct row_view *row, enum us_format format, size_t K,
                                      uint8_t *copy) {
  size_t g = K / US_LINEAR_GROUP, used = K % US_LINEAR_GROUP * (group_bytes(format) / US_LINEAR_GROUP);
  memset(copy, 0, 128);
  memcpy(copy, row->data + g * group_bytes(format), used);
  struct row_view padded = {.data = copy};
  if (format == US_FORMAT_FP8)
    padded.scales = row->scales + g / (US_FP8_BLOCK / US_LINEAR_GROUP) * sizeof(float);
  return padded;
}

/* A run of groups of a block of dots. A row's lanes are carried from one run to the next in memory, so that the sum is the
 * one of a single run. */
struct run {
  size_t first, end;        /* groups */
  size_t ahead;             /* bytes from a group to what is needed next: prefetched */
  float (*carry)[8][LANES]; /* lanes of the block's output rows */
};

VEC16_INLINE void add_tail(const struct row_view *rows, enum us_format format, size_t K,
                           const float *const *x, const size_t outs, const size_t batch, vec16 (*acc)[8]) {
#pragma GCC unroll 4
  for (size_t i = 0; i < outs; i++) {
    uint8_t copy[128];
    struct row_view tail = pad_tail(&rows[i], format, K, copy);
    vec16 even, odd;
    decode_group(&tail, format, 0, &even, &odd);
#pragma GCC unroll 8
    for (size_t j = 0; j < batch; j++) {
      const float *x_tail = x[j] + K / US_LINEAR_GROUP * US_LINEAR_GROUP;
      acc[i][j] = vec16_fma(even, vec16_load(x_tail), acc[i][j]);
      acc[i][j] = vec16_fma(odd, vec16_load(x_tail + LANES), acc[i][j]);
    }
  }
}

VEC16_INLINE void dot_block(const struct us_linear_args *args, enum us_format format, size_t n, size_t r,
                            const size_t outs, const size_t batch, const struct run *run) {
  struct row_view rows[4];
  const float *x[8];
  vec16 acc[4][8];
  size_t K = args->w->cols, groups = K / US_LINEAR_GROUP;
#pragma GCC unroll 4
  for (size_t i = 0; i < outs; i++) rows[i] = view_row(args->w, format, n + i);
#pragma GCC unroll 8
  for (size_t j = 0; j < batch; j++) x[j] = us_linear_x_row(args, r + j);
#pragma GCC unroll 4
  for (size_t i = 0; i < outs; i++)
#pragma GCC unroll 8
    for (size_t j = 0; j < batch; j++) acc[i][j] = run->first ? vec16_load(run->carry[i][j]) : vec16_zero();

  for (size_t g = run->first; g < run->end; g++) {
    vec16 even[4], odd[4];
#pragma GCC unroll 4
    for (size_t i = 0; i < outs; i++) {
      _mm_prefetch((const char *)rows[i].data + g * group_bytes(format) + run->ahead, _MM_HINT_T0);
      decode_group(&rows[i], format, g, &even[i], &odd[i]);
    }
#pragma GCC unroll 8
    for (size_t j = 0; j < batch; j++) {
      vec16 x_even = vec16_load(x[j] + g * US_LINEAR_GROUP);
      vec16 x_odd = vec16_load(x[j] + g * US_LINEAR_GROUP + LANES);
      VEC16_KEEP(x_even);
      VEC16_KEEP(x_odd);
#pragma GCC unroll 4
      for (size_t i = 0; i < outs; i++) acc[i][j] = vec16_fma(even[i], x_even, acc[i][j]);
#pragma GCC unroll 4
      for (size_t i = 0; i < outs; i++) acc[i][j] = vec16_fma(odd[i], x_odd, acc[i][j]);
    }
  }
  if (run->end < groups) {
#pragma GCC unroll 4
    for (size_t i = 0; i < outs; i++)
#pragma GCC unroll 8
      for (size_t j = 0; j < batch; j++) vec16_store(run->carry[i][j], acc[i][j]);
    return;
  }
  if (format != US_FORMAT_MXFP4 && groups * US_LINEAR_GROUP < K)
    add_tail(rows, format, K, x, outs, batch, acc);
#pragma GCC unroll 4
  for (size_t i = 0; i < outs; i++)
#pragma GCC unroll 8
    for (size_t j = 0; j < batch; j++)
      args->y[(r + j) * args->y_stride + n + i - args->begin] = vec16_sum(acc[i][j]);
}

/* ---- The loop ---- */

/* Output rows that pass together before the next run of K, and groups a run, so that `batch` token rows of a run (32 KB)
 * stay in the first-level cache. */
#define SPAN              12
#define RUN_GROUPS(batch) (256 / (batch))

/* Output rows [n, n + count), count at most SPAN, in runs of K; `count` is a multiple of outs. */
VEC16_INLINE void dot_span(const struct us_linear_args *args, enum us_format format, size_t n, size_t count,
                           size_t r, const size_t outs, const size_t batch) {
  float carry[SPAN][8][LANES];
  size_t groups = args->w->cols / US_LINEAR_GROUP, bytes = group_bytes(format);
  struct run run = {0};
  do {
    size_t left = groups - run.first, length = left < RUN_GROUPS(batch) ? left : RUN_GROUPS(batch);
    run.end = run.first + length;
    /* Next come the same rows' next run, or after the last run the next rows' first. */
    run.ahead = run.end < groups ? length * bytes : (count * groups - run.first) * bytes;
    for (size_t i = 0; i < count; i += outs) {
      run.carry = carry + i;
      dot_block(args, format, n + i, r, outs, batch, &run);
    }
    run.first = run.end;
  } while (run.first < groups);
}

/* `batch` token rows from r on against the whole range. */
VEC16_INLINE void dot_range(const struct us_linear_args *args, enum us_format format, size_t r,
                            const size_t outs, const size_t batch) {
  size_t n = args->begin, span = batch > 2 ? SPAN / outs * outs : outs;
  for (; n + outs <= args->end; n += span) {
    if (n + span > args->end) span = (args->end - n) / outs * outs;
    dot_span(args, format, n, span, r, outs, batch);
  }
  for (; n < args->end; n++) dot_span(args, format, n, 1, r, 1, batch);
}

/* The tile's weights stay in the second-level cache while the next token rows pass. */
#define DEFINE_LINEAR(name, format)                                                                          \
  static void name(const struct us_linear_args *args) {                                                      \
    size_t r = 0;                                                                                            \
    for (; r + LINEAR_WIDE_BATCH <= args->R; r += LINEAR_WIDE_BATCH)                                         \
      dot_range(args, format, r, LINEAR_WIDE_OUTS, LINEAR_WIDE_BATCH);                                       \
    if (LINEAR_WIDE_BATCH > 4 && r + 4 <= args->R) {                                                         \
      dot_range(args, format, r, LINEAR_OUTS, 4);                                                            \
      r += 4;                                                                                                \
    }                                                                                                        \
    for (; r + 2 <= args->R; r += 2) dot_range(args, format, r, LINEAR_OUTS, 2);                             \
    for (; r < args->R; r++) dot_range(args, format, r, LINEAR_OUTS, 1);                                     \
  }

DEFINE_LINEAR(linear_f32, US_FORMAT_F32)
DEFINE_LINEAR(linear_bf16, US_FORMAT_BF16)
DEFINE_LINEAR(linear_fp8, US_FORMAT_FP8)
DEFINE_LINEAR(linear_mxfp4, US_FORMAT_MXFP4)

static void linear_any(const struct us_linear_args *args) {
  switch (args->w->format) {
  case US_FORMAT_F32:
    linear_f32(args);
    break;
  case US_FORMAT_BF16:
    linear_bf16(args);
    break;
  case US_FORMAT_FP8:
    linear_fp8(args);
    break;
  case US_FORMAT_MXFP4:
    linear_mxfp4(args);
    break;
  default:
    us_linear_plain(args);
    break;
  }
}
