/* scratch_folder.h: a folder for one test case's files, gone with all in it when the case ends.
 *
 *     tcase_add_checked_fixture(c, scratch_folder_make, scratch_folder_remove);
 *     ... snprintf(path, sizeof path, "%s/d.h5", scratch_folder);
 *
 * Below the working directory, which the build's tests have to themselves.
 */
#ifndef US_TESTS_SCRATCH_FOLDER_H
#define US_TESTS_SCRATCH_FOLDER_H

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

#endif
