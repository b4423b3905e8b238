/* atomic.h: a file that appears whole or not at all.
 *
 *     struct us_atomic out;
 *     if (us_atomic_open("q.h5", &out, &err) != US_OK) return err.status;
 *     write(out.fd, ...);                                        // or fdopen(dup(out.fd), "w")
 *     us_atomic_commit(&out, &err);                              // synced and renamed; us_atomic_abandon drops it
 *
 * Until the commit the file has no name (O_TMPFILE), so that a killed program leaves nothing behind; where the file
 * system has no such files it is called PATH.PID.N.tmp.
 */
#ifndef US_BASE_ATOMIC_H
#define US_BASE_ATOMIC_H

#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct us_atomic {
  int fd; /* read and write; -1 after commit or abandon */
  char *path;
  char *temporary; /* NULL while the file has no name */
};

/* Begin a file that will replace `path`. US_ERR_IO or US_ERR_MEMORY; then nothing is left to abandon. */
US_CHECKED enum us_status us_atomic_open(const char *path, struct us_atomic *ret_out, struct us_err *err);

/* Sync, rename to the final path, sync the folder. On failure nothing is left; closes in any case. */
US_CHECKED enum us_status us_atomic_commit(struct us_atomic *out, struct us_err *err);

/* Close and drop. Does nothing after a commit, and on a zeroed struct with fd -1. */
void us_atomic_abandon(struct us_atomic *out);

/* Write all bytes at an offset, whatever a single pwrite manages; false with errno set. */
bool us_atomic_write(int fd, const void *data, size_t bytes, uint64_t offset);

#endif
