/* operand.h: rows as the host has them, to and from the engine's operands (engine.h).
 *
 *     us_operand_pack(rows, R, width, operand);          // R <= 8 rows of FP32: rounded to bf16; the others become zeros
 *     us_operand_unpack(operand, R, width, rows);
 */
#ifndef US_DEVICE_OPERAND_H
#define US_DEVICE_OPERAND_H

#include "formats/bf16.h"
#include "kernels/engine/engine.h"

/* Bytes of an operand of one row tile; width is a multiple of 32. */
static inline size_t us_operand_bytes(size_t width) {
  return width / 32 * 512;
}

/* rows (R, width) -> operand (us_operand_bytes). */
static inline void us_operand_pack(const float *rows, size_t R, size_t width, uint8_t *operand) {
  for (uint32_t r = 0; r < US_ENGINE_ROWS; r++)
    for (uint32_t c = 0; c < width; c++) {
      uint16_t bits =
          r < R ? us_bf16_from_f32(us_bf16_round(rows[r * width + c]) * US_ENGINE_OPERAND_UNIT) : 0;
      memcpy(operand + us_engine_operand_offset(r, c), &bits, sizeof bits);
    }
}

/* Row r of an operand -> row (width). */
static inline void us_operand_unpack_row(const uint8_t *operand, uint32_t r, size_t width, float *row) {
  for (uint32_t c = 0; c < width; c++) {
    uint16_t bits;
    memcpy(&bits, operand + us_engine_operand_offset(r, c), sizeof bits);
    row[c] = us_bf16_to_f32(bits) / US_ENGINE_OPERAND_UNIT;
  }
}

/* The first R rows of an operand -> rows (R, width). */
static inline void us_operand_unpack(const uint8_t *operand, size_t R, size_t width, float *rows) {
  for (uint32_t r = 0; r < R; r++) us_operand_unpack_row(operand, r, width, rows + r * width);
}

#endif
