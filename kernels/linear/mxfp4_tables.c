/* mxfp4_tables.c: 16 weights a scale byte. */
#include "kernels/linear/mxfp4_tables.h"

/* The weights of scale s, in the order of the codes: bit 3 is the sign. */
#define CODES(s)                                                                                             \
  {                                                                                                          \
    0.0f * s, 0.5f * s, 1.0f * s, 1.5f * s, 2.0f * s, 3.0f * s, 4.0f * s, 6.0f * s, -0.0f * s, -0.5f * s,    \
        -1.0f * s, -1.5f * s, -2.0f * s, -3.0f * s, -4.0f * s, -6.0f * s                                     \
  }
#define NEG(n) CODES(0x1p-##n##f)
#define POS(n) CODES(0x1p##n##f)

/* Ten exponents, ascending, by the digits before the last. */
#define NEG_TEN(d)                                                                                           \
  NEG(d##9), NEG(d##8), NEG(d##7), NEG(d##6), NEG(d##5), NEG(d##4), NEG(d##3), NEG(d##2), NEG(d##1), NEG(d##0)
#define POS_TEN(d)                                                                                           \
  POS(d##0), POS(d##1), POS(d##2), POS(d##3), POS(d##4), POS(d##5), POS(d##6), POS(d##7), POS(d##8), POS(d##9)

#define INF  __builtin_inff()
#define NAN4 __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf("")

const float us_mxfp4_tables[256][16] __attribute__((aligned(64))) = {
    NEG(127),
    NEG(126),
    NEG(125),
    NEG(124),
    NEG(123),
    NEG(122),
    NEG(121),
    NEG(120),
    NEG_TEN(11),
    NEG_TEN(10),
    NEG_TEN(9),
    NEG_TEN(8),
    NEG_TEN(7),
    NEG_TEN(6),
    NEG_TEN(5),
    NEG_TEN(4),
    NEG_TEN(3),
    NEG_TEN(2),
    NEG_TEN(1),
    NEG_TEN(0),
    POS(1),
    POS(2),
    POS(3),
    POS(4),
    POS(5),
    POS(6),
    POS(7),
    POS(8),
    POS(9),
    POS_TEN(1),
    POS_TEN(2),
    POS_TEN(3),
    POS_TEN(4),
    POS_TEN(5),
    POS_TEN(6),
    POS_TEN(7),
    POS_TEN(8),
    POS_TEN(9),
    POS_TEN(10),
    POS_TEN(11),
    POS(120),
    POS(121),
    POS(122),
    POS(123),
    POS(124),
    POS(125),
    /* From byte 253 on the larger codes pass FP32's range: 4 * 2^126 is 2^128. */
    {0.0f, 0x1p125f, 0x1p126f, 0x1.8p126f, 0x1p127f, 0x1.8p127f, INF, INF, -0.0f, -0x1p125f, -0x1p126f,
     -0x1.8p126f, -0x1p127f, -0x1.8p127f, -INF, -INF},
    {0.0f, 0x1p126f, 0x1p127f, 0x1.8p127f, INF, INF, INF, INF, -0.0f, -0x1p126f, -0x1p127f, -0x1.8p127f, -INF,
     -INF, -INF, -INF},
    {NAN4, NAN4, NAN4, NAN4},
};
