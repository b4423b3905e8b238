/* version.c: version and revision, the one file that changes with every commit. */
#include "base/version.h"
#include "us_revision.h"
#include "us_version.h"

const char *us_version(void) {
  return US_VERSION;
}

const char *us_revision(void) {
  return US_REVISION;
}
