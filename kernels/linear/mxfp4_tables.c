/* mxfp4_tables.c: 16 weights a scale byte. */
#include "kernels/linear/mxfp4_tables.h"

/* Code order: bit 3 is the sign. */
#define CODES(s)                                                                                             \
  {0.0f * s,  0.5f * s,  1.0f * s,  1.5f * s,  2.0f * s,  3.0f * s,  4.0f * s,  6.0f * s,                    \
   -0.0f * s, -0.5f * s, -1.0f * s, -1.5f * s, -2.0f * s, -3.0f * s, -4.0f * s, -6.0f * s},
#define NEG(n) CODES(0x1p-##n##f)
#define POS(n) CODES(0x1p##n##f)

/* From byte 252 on the larger codes pass FP32's range: 6 * 2^126 is Inf. */
#define INF __builtin_inff()

const float us_mxfp4_tables[256][16] __attribute__((aligned(64))) = {
    NEG(127) NEG(126) NEG(125) NEG(124) NEG(123) NEG(122) NEG(121) NEG(120) NEG(119) NEG(118) NEG(117)
        NEG(116) NEG(115) NEG(114) NEG(113) NEG(112) NEG(111) NEG(110) NEG(109) NEG(108) NEG(107) NEG(106)
            NEG(105) NEG(104) NEG(103) NEG(102) NEG(101) NEG(100) NEG(99) NEG(98) NEG(97) NEG(96) NEG(95)
                NEG(94) NEG(93) NEG(92) NEG(91) NEG(90) NEG(89) NEG(88) NEG(87) NEG(86) NEG(85) NEG(84)
                    NEG(83) NEG(82) NEG(81) NEG(80) NEG(79) NEG(78) NEG(77) NEG(76) NEG(75) NEG(74) NEG(73)
                        NEG(72) NEG(71) NEG(70) NEG(69) NEG(68) NEG(67) NEG(66) NEG(65) NEG(64) NEG(63)
                            NEG(62) NEG(61) NEG(60) NEG(59) NEG(58) NEG(57) NEG(56) NEG(55) NEG(54) NEG(53)
                                NEG(52) NEG(51) NEG(50) NEG(49) NEG(48) NEG(47) NEG(46) NEG(45) NEG(44)
                                    NEG(43) NEG(42) NEG(41) NEG(40) NEG(39) NEG(38) NEG(37) NEG(36) NEG(35)
                                        NEG(34) NEG(33) NEG(32) NEG(31) NEG(30) NEG(29) NEG(28) NEG(27)
                                            NEG(26) NEG(25) NEG(24) NEG(23) NEG(22) NEG(21) NEG(20) NEG(19)
                                                NEG(18) NEG(17) NEG(16) NEG(15) NEG(14) NEG(13) NEG(12)
                                                    NEG(11) NEG(10) NEG(9) NEG(8) NEG(7) NEG(6) NEG(5) NEG(4)
                                                        NEG(3) NEG(2) NEG(1) POS(0) POS(1) POS(2) POS(3)
                                                            POS(4) POS(5) POS(6) POS(7) POS(8) POS(9) POS(10)
                                                                POS(11) POS(12) POS(13) POS(14) POS(15)
                                                                    POS(16) POS(17) POS(18) POS(19) POS(20)
                                                                        POS(21) POS(22) POS(23) POS(24)
                                                                            POS(25) POS(26) POS(27) POS(28)
                                                                                POS(29) POS(30) POS(31)
                                                                                    POS(32) POS(33) POS(34)
                                                                                        POS(35) POS(36) POS(
                                                                                            37) POS(38) POS(39)
                                                                                            POS(
                                                                                                40) POS(41)
                                                                                                POS(
                                                                                                    42) POS(43)
                                                                                                    POS(44)
                                                                                                        POS(45) POS(
                                                                                                            46) POS(47)
                                                                                                            POS(48) POS(
                                                                                                                49) POS(50)
                                                                                                                POS(51) POS(
                                                                                                                    52) POS(53)
                                                                                                                    POS(54)
                                                                                                                        POS(55) POS(56) POS(57) POS(58) POS(59) POS(60) POS(61) POS(62) POS(63) POS(64) POS(65) POS(66) POS(67) POS(68) POS(69) POS(70) POS(71) POS(72) POS(73) POS(74) POS(75) POS(
                                                                                                                            76) POS(77)
                                                                                                                            POS(
                                                                                                                                78) POS(79)
                                                                                                                                POS(
                                                                                                                                    80) POS(81)
                                                                                                                                    POS(82) POS(
                                                                                                                                        83) POS(84)
                                                                                                                                        POS(85) POS(86) POS(87) POS(88) POS(89) POS(90) POS(91) POS(92) POS(93) POS(94) POS(95) POS(96) POS(
                                                                                                                                            97) POS(98)
                                                                                                                                            POS(
                                                                                                                                                99) POS(100)
                                                                                                                                                POS(101)
                                                                                                                                                    POS(102)
                                                                                                                                                        POS(103)
                                                                                                                                                            POS(104)
                                                                                                                                                                POS(105)
                                                                                                                                                                    POS(106) POS(107) POS(108) POS(109) POS(110) POS(111) POS(112) POS(113) POS(114) POS(115) POS(116) POS(117) POS(118) POS(119) POS(120) POS(121) POS(122) POS(123) POS(124){0.0f,
                                                                                                                                                                                                                                                                                                                                               0x1p124f,
                                                                                                                                                                                                                                                                                                                                               0x1p125f, 0x1.8p125f, 0x1p126f, 0x1.8p126f, 0x1p127f, 0x1.8p127f, -0.0f,
                                                                                                                                                                                                                                                                                                                                               -0x1p124f,
                                                                                                                                                                                                                                                                                                                                               -0x1p125f, -0x1.8p125f, -0x1p126f, -0x1.8p126f,
                                                                                                                                                                                                                                                                                                                                               -0x1p127f,
                                                                                                                                                                                                                                                                                                                                               -0x1.8p127f},
    {0.0f, 0x1p125f, 0x1p126f, 0x1.8p126f, 0x1p127f, 0x1.8p127f, INF, INF, -0.0f, -0x1p125f, -0x1p126f,
     -0x1.8p126f, -0x1p127f, -0x1.8p127f, -INF, -INF},
    {0.0f, 0x1p126f, 0x1p127f, 0x1.8p127f, INF, INF, INF, INF, -0.0f, -0x1p126f, -0x1p127f, -0x1.8p127f, -INF,
     -INF, -INF, -INF},
    {__builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""),
     __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""),
     __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""),
     __builtin_nanf("")},
};
