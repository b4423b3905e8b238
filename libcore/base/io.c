/* io.c: mapping and writing. */
#include "base/io.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* --- reading --- */

enum us_status us_io_map_open(const char *path, struct us_io_map *ret_map, struct us_err *err) {
  *ret_map = (struct us_io_map){0};
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang the open */
  if (fd < 0) return us_err_errno(err, US_ERR_IO, "cannot open '%s'", path);
  struct stat info;
  enum us_status status = US_OK;
  if (fstat(fd, &info) != 0)
    status = us_err_errno(err, US_ERR_IO, "cannot stat '%s'", path);
  else if (!S_ISREG(info.st_mode))
    status = us_err_set(err, US_ERR_INPUT, "'%s' is not a regular file", path);
  else if (info.st_size > 0) {
    void *data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED)
      status = us_err_errno(err, US_ERR_IO, "cannot map '%s'", path);
    else
      *ret_map = (struct us_io_map){.data = data, .size = (size_t)info.st_size};
  }
  close(fd);
  return status;
}

void us_io_map_close(struct us_io_map *map) {
  if (map->data) munmap((void *)(uintptr_t)map->data, map->size);
  *map = (struct us_io_map){0};
}

/* --- writing --- */

enum us_status us_io_write_all(int fd, const void *bytes, size_t n, const char *name, struct us_err *err) {
  const char *p = bytes;
  while (n) {
    ssize_t written = write(fd, p, n < SSIZE_MAX ? n : SSIZE_MAX);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return us_err_errno(err, US_ERR_IO, "cannot write '%s'", name);
    p += written;
    n -= (size_t)written;
  }
  return US_OK;
}

enum us_status us_io_flush(FILE *file, const char *name, struct us_err *err) {
  errno = 0;
  if (fflush(file) == 0 && !ferror(file)) return US_OK;
  if (errno == 0) errno = EIO; /* an earlier write failed and its reason is gone */
  if (fileno(file) == STDOUT_FILENO) return us_err_errno(err, US_ERR_IO, "cannot write standard output");
  return us_err_errno(err, US_ERR_IO, "cannot write '%s'", name);
}
