/* replay.c: the main of a fuzz target in an ordinary build: runs it once on every file of the folders named.
 *
 * So the seed corpus, and every input that was once a finding, is part of the test suite without clang.
 */
#include "fuzz.h"

#include <dirent.h>

__attribute__((weak)) int LLVMFuzzerInitialize(int *argc, char ***argv);

static int run_file(const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) return 0;
  size_t capacity = 1 << 24, size;
  uint8_t *data = malloc(capacity);
  US_FUZZ_REQUIRE(data);
  size = fread(data, 1, capacity, file);
  fclose(file);
  uint8_t *exact = malloc(size ? size : 1); /* so that a sanitizer sees reads beyond the end */
  US_FUZZ_REQUIRE(exact);
  memcpy(exact, data, size);
  free(data);
  LLVMFuzzerTestOneInput(exact, size);
  free(exact);
  return 1;
}

int main(int argc, char **argv) {
  if (LLVMFuzzerInitialize) LLVMFuzzerInitialize(&argc, &argv);
  int count = 0;
  for (int i = 1; i < argc; i++) {
    DIR *dir = opendir(argv[i]);
    if (!dir) continue;
    for (struct dirent *entry; (entry = readdir(dir));) {
      char path[4096];
      snprintf(path, sizeof path, "%s/%s", argv[i], entry->d_name);
      if (entry->d_name[0] != '.') count += run_file(path);
    }
    closedir(dir);
  }
  uint8_t nothing[1] = {0};
  LLVMFuzzerTestOneInput(nothing, 0);
  printf("%d inputs\n", count);
  return count ? 0 : 1;
}
