/* scratch_folder.h: a folder for one test case's files, gone with all in it when the case ends, and an edit of what lies there.
 *
 *     tcase_add_checked_fixture(c, scratch_folder_make, scratch_folder_remove);
 *     ... snprintf(path, sizeof path, "%s/d.h5", scratch_folder);
 *     replace_in_config(path, "\"split\"", "\"fused_qkv\"");       // of the checkpoint folder `path`
 *
 * Below the working directory, which the build's tests have to themselves.
 */
#ifndef US_TESTS_SCRATCH_FOLDER_H
#define US_TESTS_SCRATCH_FOLDER_H

#include "base/buffer.h"
#include "suite.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char scratch_folder[64];

static int scratch_folder_remove_one(const char *name, const struct stat *st, int type, struct FTW *ftw) {
  return remove(name);
}
static void scratch_folder_make(void) {
  strcpy(scratch_folder, "us_test.XXXXXX");
  ck_assert_ptr_nonnull(mkdtemp(scratch_folder));
}
static void scratch_folder_remove(void) {
  nftw(scratch_folder, scratch_folder_remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* The first `from` in the folder's config.json becomes `to`. */
static inline void replace_in_config(const char *name, const char *from, const char *to) {
  char file_name[256];
  struct us_buffer text = {0};
  struct us_err err = {0};
  snprintf(file_name, sizeof file_name, "%s/config.json", name);
  ck_assert_msg(us_buffer_read_file(&text, file_name, 1 << 20, &err) == US_OK, "%s", err.message);
  char *at = strstr(text.data, from);
  ck_assert_ptr_nonnull(at);
  FILE *file = fopen(file_name, "w");
  ck_assert_ptr_nonnull(file);
  fprintf(file, "%.*s%s%s", (int)(at - text.data), text.data, to, at + strlen(from));
  fclose(file);
  us_buffer_release(&text);
}

#endif
