/* linear_ref.c: y = x W^T in plain C: the definition of the canonical dot product. */
#include "kernels/linear/linear_impl.h"

#include "formats/bf16.h"
#include "formats/fp8.h"
#include "formats/mxfp4.h"
#include <math.h>

#define LANES (US_LINEAR_GROUP / 2)

/* Weights [k0, k0 + 32) of one row as FP32, zeros past K. */
static void decode_group(const struct us_matrix *w, size_t row, size_t k0, float *values) {
  for (size_t i = 0; i < US_LINEAR_GROUP; i++) {
    size_t k = k0 + i, at = row * w->cols + k;
    values[i] = 0;
    if (k >= w->cols) continue;
    if (w->format == US_FORMAT_F32) values[i] = ((const float *)w->data)[at];
    if (w->format == US_FORMAT_BF16) values[i] = us_bf16_to_f32(((const uint16_t *)w->data)[at]);
    if (w->format == US_FORMAT_FP8) {
      size_t scale_cols = (w->cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
      const float *scales = (const float *)w->scales + us_matrix_scale_row(w, row) * scale_cols;
      values[i] = us_fp8_to_f32(((const uint8_t *)w->data)[at]) * scales[k / US_FP8_BLOCK];
    }
    if (w->format == US_FORMAT_MXFP4) {
      uint8_t byte = ((const uint8_t *)w->data)[at / 2];
      uint8_t scale = ((const uint8_t *)w->scales)[at / US_MXFP4_GROUP];
      values[i] = us_e2m1_to_f32(at & 1 ? byte >> 4 : byte & 15) * us_e8m0_to_f32(scale);
    }
  }
}

static float sum_lanes(float *lane) {
  for (size_t width = LANES / 2; width; width /= 2)
    for (size_t l = 0; l < width; l++) lane[l] = lane[l] + lane[l + width];
  return lane[0];
}

static float dot(const struct us_matrix *w, size_t row, const float *x) {
  float lane[LANES] = {0}, values[US_LINEAR_GROUP];
  for (size_t k = 0; k < w->cols; k += US_LINEAR_GROUP) {
    decode_group(w, row, k, values);
    for (size_t l = 0; l < LANES; l++) {
      lane[l] = fmaf(values[2 * l], x[k + l], lane[l]);
      lane[l] = fmaf(values[2 * l + 1], x[k + LANES + l], lane[l]);
    }
  }
  return sum_lanes(lane);
}

void us_linear_plain(const struct us_linear_args *args) {
  for (size_t n = args->begin; n < args->end; n++)
    for (size_t r = 0; r < args->R; r++)
      args->y[r * args->y_stride + n - args->begin] = dot(args->w, n, us_linear_x_row(args, r));
}
