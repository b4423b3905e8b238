/* mxfp4.h: OCP MX FP4 blocks: 32 E2M1 codes that share one E8M0 scale.
 *
 *     uint8_t codes[K / 2], scales[K / 32];
 *     if (us_mxfp4_encode(w, K, US_SCALE_MSE, codes, scales, &err) != US_OK) return err.status;
 *     us_mxfp4_decode(codes, scales, K, w_back);      // w_back is what every engine multiplies by
 *
 * Low nibble first, scales beside the codes (OCP MX v1.0 section 6.3). Codes 0..7 are 0 .5 1 1.5 2 3 4 6, bit
 * 3 is the sign, which is kept (a negative value that rounds to zero is -0, code 8; +0 is code 0). Scale byte
 * b is 2^(b-127); 255 is NaN and refused. The scalar functions are compiled for host and device. No function allocates.
 */
#ifndef US_FORMATS_MXFP4_H
#define US_FORMATS_MXFP4_H

#include "base/err.h"
#include "formats/bf16.h"

#ifdef __cplusplus
extern "C" {
#endif

#define US_MXFP4_GROUP     32
#define US_MXFP4_SCALE_NAN 255

/* How the exponent s of a block's scale follows from a = max |w|. Decoders do not care which made a file. */
enum us_scale_rule {
  US_SCALE_MSE,   /* floor or floor + 1, whichever has the smaller squared error; a tie takes floor (the
                     default) */
  US_SCALE_FLOOR, /* floor(log2 a) - 2: OCP; clips values above 6 * 2^s */
  US_SCALE_EVEN,  /* floor, + 1 when a's mantissa is 1.75 or more (compressed-tensors, Quark) */
  US_SCALE_RCEIL, /* ceil(log2(a / 6)): never clips (cuDNN, ModelOpt, DeepSeek); re-encoding may change bytes
                   */
  US_SCALE_R7_25, /* ceil(log2(a / 7.25)): within 0.01 dB of MSE without a search */
  US_SCALE_RULE_COUNT
};

/* "mse", "floor", "even", "rceil", "r7.25"; NULL outside the enum. */
const char *us_scale_rule_name(enum us_scale_rule rule);

/* Sets *ret_rule; US_ERR_USAGE lists the names if this is none of them. */
US_CHECKED enum us_status us_scale_rule_parse(const char *name, enum us_scale_rule *ret_rule,
                                              struct us_err *err);

/* E8M0: 2^(byte-127), exact: byte 0 is the subnormal 2^-127; 255 gives NaN. */
static US_HD float us_e8m0_to_f32(uint8_t byte) {
  uint32_t bits = byte ? (uint32_t)byte << 23 : 0x00400000u;
  return us_f32_from_bits(byte == US_MXFP4_SCALE_NAN ? 0x7fc00000u : bits);
}

/* 2^(127-byte), exact; 255 gives NaN. */
static US_HD float us_e8m0_inverse(uint8_t byte) {
  uint32_t bits = byte < 254 ? (uint32_t)(254 - byte) << 23 : 0x00400000u;
  return us_f32_from_bits(byte == US_MXFP4_SCALE_NAN ? 0x7fc00000u : bits);
}

/* The value of a code, 0..15. Codes 2..7 are normal: bias 1, one fraction bit. */
static US_HD float us_e2m1_to_f32(uint8_t code) {
  uint32_t magnitude = code & 7u;
  uint32_t bits =
      magnitude > 1 ? ((magnitude >> 1) + 126u) << 23 | (magnitude & 1u) << 22 : magnitude * 0x3f000000u;
  return us_f32_from_bits(bits | (uint32_t)(code & 8u) << 28);
}

/* The nearest code: ties to the even code, saturating at 6. x is not NaN. */
static US_HD uint8_t us_e2m1_from_f32(float x) {
  uint32_t bits = us_f32_bits(x);
  float m = us_f32_from_bits(bits & 0x7fffffffu);
  uint32_t code = (uint32_t)(m > 0.25f) + (uint32_t)(m >= 0.75f) + (uint32_t)(m > 1.25f) +
                  (uint32_t)(m >= 1.75f) + (uint32_t)(m > 2.5f) + (uint32_t)(m >= 3.5f) +
                  (uint32_t)(m > 5.0f);
  return (uint8_t)(code | bits >> 31 << 3);
}

/* Scale byte of a block whose largest magnitude is amax (finite, >= 0), by its exponent and fraction bits;
 * for MSE it is the lower candidate. Bytes below 0 are clamped to 0, so a zero or tiny block gets byte 0; 255
 * cannot occur. */
static US_HD uint8_t us_mxfp4_scale_byte(float amax, enum us_scale_rule rule) {
  uint32_t bits = us_f32_bits(amax), fraction = bits & 0x7fffffu, up = 0;
  if (rule == US_SCALE_EVEN)
    up = fraction >= 0x600000u; /* mantissa 1.75 */
  else if (rule == US_SCALE_RCEIL)
    up = fraction > 0x400000u; /* above 1.5 * 4 = 6 */
  else if (rule == US_SCALE_R7_25)
    up = fraction > 0x680000u; /* above 1.8125 * 4 = 7.25 */
  uint32_t biased = (bits >> 23) + up;
  return (uint8_t)(biased > 2 ? biased - 2 : 0);
}

/* Encode K values, K a multiple of 32. Rounds to nearest even, saturates at 6 * scale.
 *   w       (K)      finite; NaN or Inf is US_ERR_INPUT and names the index; nothing usable is written then
 *   codes   (K/2)    written
 *   scales  (K/32)   written; an all-zero block gets byte 0
 * Finite values of 3.5 * 2^126 and above may be rounded up to 2^128, which decodes to Inf: us_mxfp4_check
 * refuses it. */
US_CHECKED enum us_status us_mxfp4_encode(const float *w, size_t K, enum us_scale_rule rule, uint8_t *codes,
                                          uint8_t *scales, struct us_err *err);

/* Decode K values to code * 2^(byte-127), exact in FP32 (and in bf16). Scale byte 255 gives NaN. */
void us_mxfp4_decode(const uint8_t *codes, const uint8_t *scales, size_t K, float *values);

/* US_ERR_INPUT, naming the block, for scale byte 255 and for a code whose value overflows FP32 (byte 253 or
 * 254). */
US_CHECKED enum us_status us_mxfp4_check(const uint8_t *codes, const uint8_t *scales, size_t K,
                                         struct us_err *err);

#ifdef __cplusplus
}
#endif
#endif
