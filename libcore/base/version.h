/* version.h: which UltraSpeed this is.
 *
 *     fprintf(out, "%s (%s)\n", us_version(), us_revision());      // 0.1.0 (1a2b3c4d5e6f-dirty)
 */
#ifndef US_BASE_VERSION_H
#define US_BASE_VERSION_H

const char *us_version(void); /* release number */
const char *us_revision(
    void); /* commit it was built from, "-dirty" when the tree had changes; "unknown" without git */

#endif
