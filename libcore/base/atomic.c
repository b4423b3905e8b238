/* atomic.c: a file that appears whole or not at all. */
#include "base/atomic.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

bool us_atomic_write(int fd, const void *data, size_t bytes, uint64_t offset) {
  const char *from = data;
  const size_t most = (size_t)1 << 30; /* one pwrite takes no more than 2 GiB - 4 KiB */
  while (bytes > 0) {
    ssize_t done = pwrite(fd, from, bytes < most ? bytes : most, (off_t)offset);
    if (done < 0 && errno == EINTR) continue;
    if (done == 0) errno = EIO;
    if (done <= 0) return false;
    from += done;
    offset += (uint64_t)done;
    bytes -= (size_t)done;
  }
  return true;
}

static int open_folder(const char *path, int flags) {
  char *folder = strdup(path);
  if (!folder) return -1;
  char *slash = strrchr(folder, '/');
  if (slash) slash[slash == folder] = 0;
  int fd = open(slash ? folder : ".", flags | O_CLOEXEC, 0666);
  int cause = errno;
  free(folder);
  errno = cause;
  return fd;
}

/* Give the file a temporary name: link `source` to it, or create it when source is NULL. */
static bool take_name(struct us_atomic *out, const char *source) {
  size_t size = strlen(out->path) + 48;
  out->temporary = malloc(size);
  for (int i = 0; out->temporary && i < 1000; i++) {
    snprintf(out->temporary, size, "%s.%d.%d.tmp", out->path, (int)getpid(), i);
    if (source && linkat(AT_FDCWD, source, AT_FDCWD, out->temporary, AT_SYMLINK_FOLLOW) == 0) return true;
    if (!source && (out->fd = open(out->temporary, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0666)) >= 0)
      return true;
    if (errno != EEXIST) break;
  }
  int cause = errno;
  free(out->temporary);
  out->temporary = NULL;
  errno = cause;
  return false;
}

enum us_status us_atomic_open(const char *path, struct us_atomic *ret_out, struct us_err *err) {
  *ret_out = (struct us_atomic){.fd = -1, .path = strdup(path)};
  if (!ret_out->path) return us_err_memory(err, "a path", strlen(path));
  struct stat info;
  if (stat(path, &info) == 0 &&
      !S_ISREG(info.st_mode)) { /* a rename over /dev/null would remove the device */
    us_atomic_abandon(ret_out);
    return us_err_set(err, US_ERR_IO, "%s: cannot create: it is %s", path,
                      S_ISDIR(info.st_mode) ? "a folder" : "not a regular file");
  }
  ret_out->fd = open_folder(path, O_TMPFILE | O_RDWR);
  bool unsupported = ret_out->fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL);
  if (unsupported) take_name(ret_out, NULL);
  if (ret_out->fd >= 0) return US_OK;
  us_err_errno(err, US_ERR_IO, "%s: cannot create", path);
  us_atomic_abandon(ret_out);
  return err ? err->status : US_ERR_IO;
}

void us_atomic_abandon(struct us_atomic *out) {
  int cause = errno;
  if (out->fd >= 0) close(out->fd);
  if (out->temporary) unlink(out->temporary);
  free(out->temporary);
  free(out->path);
  *out = (struct us_atomic){.fd = -1};
  errno = cause;
}

enum us_status us_atomic_commit(struct us_atomic *out, struct us_err *err) {
  char source[64];
  snprintf(source, sizeof source, "/proc/self/fd/%d", out->fd);
  bool ok = fsync(out->fd) == 0 && (out->temporary || take_name(out, source));
  if (!ok || rename(out->temporary, out->path) != 0) {
    us_err_errno(err, US_ERR_IO, "%s: cannot put the finished file in place", out->path);
    us_atomic_abandon(out);
    return err ? err->status : US_ERR_IO;
  }
  free(out->temporary);
  out->temporary = NULL;
  int folder = open_folder(out->path, O_RDONLY | O_DIRECTORY);
  if (folder >= 0) {
    fsync(folder);
    close(folder);
  }
  us_atomic_abandon(out);
  return US_OK;
}
