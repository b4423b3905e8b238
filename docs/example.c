/* example.c: a program that uses the installed library: quantize a block of weights to MXFP4 and read it back.
 *
 *     cc example.c -o example $(pkg-config --static --cflags --libs ultraspeed) && ./example
 */
#include "formats/mxfp4.h"
#include <stdio.h>

int main(void) {
  float w[US_MXFP4_GROUP], back[US_MXFP4_GROUP];
  for (int i = 0; i < US_MXFP4_GROUP; i++) w[i] = 0.1f * (float)(i - 16);
  uint8_t codes[US_MXFP4_GROUP / 2], scale;
  struct us_err err = {0};
  if (us_mxfp4_encode(w, US_MXFP4_GROUP, US_SCALE_MSE, codes, &scale, &err) != US_OK) {
    fprintf(stderr, "example: %s\n", err.message);
    return (int)err.status;
  }
  us_mxfp4_decode(codes, &scale, US_MXFP4_GROUP, back);
  for (int i = 0; i < US_MXFP4_GROUP; i++) printf("%g\t%g\n", (double)w[i], (double)back[i]);
  return 0;
}
