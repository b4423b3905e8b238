/* pages.cu: a thread gathers 16 bytes of a page. Runs once, when a model is loaded: bound by its scattered reads, a small part
 * of the time that reading a checkpoint takes. */
#include "kernels/pages/pages_gpu.h"

static __global__ void pack_pages(struct us_pages p, const struct us_pages_source *sources, uint8_t *out) {
  uint64_t per_matrix = us_pages_count(&p), page = blockIdx.x % per_matrix, matrix = blockIdx.x / per_matrix;
  const struct us_pages_source source = sources[matrix];
  uint32_t code_bytes = us_pages_code_bytes(&p), page_bytes = us_pages_page_bytes(&p);
  uint8_t *to = out + (uint64_t)blockIdx.x * page_bytes;
  for (uint32_t i = threadIdx.x; i < page_bytes / 16; i += blockDim.x) {
    uint32_t word[4];
    if (i * 16 < code_bytes)
      for (uint32_t j = 0; j < 4; j++)
        word[j] = us_pages_gather(&p, &source, page, i % US_PAGES_LANES, i / US_PAGES_LANES * 4 + j);
    else
      for (uint32_t j = 0; j < 4; j++) {
        word[j] = 0;
        for (uint32_t byte = 0; byte < 4; byte++)
          word[j] |= (uint32_t)us_pages_gather_tail(&p, &source, page, i * 16 - code_bytes + j * 4 + byte)
                     << 8 * byte;
      }
    ((uint4 *)to)[i] = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

cudaError_t us_pages_pack_gpu(const struct us_pages *pages, const struct us_pages_source *sources,
                              uint32_t count, void *out, cudaStream_t stream) {
  uint64_t blocks = us_pages_count(pages) * count;
  if (us_pages_check(pages, NULL) != US_OK || blocks > 0x7fffffffu) return cudaErrorInvalidValue;
  if (blocks) pack_pages<<<(unsigned)blocks, 256, 0, stream>>>(*pages, sources, (uint8_t *)out);
  return cudaGetLastError();
}
