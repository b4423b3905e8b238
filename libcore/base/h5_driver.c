/* h5_driver.c: a libhdf5 file driver over an open descriptor. */
#include "base/h5_driver.h"

#include "base/atomic.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

struct driver_file {
  H5FD_t base; /* libhdf5's part comes first */
  int fd;
  haddr_t end_of_addresses;
};

static H5FD_t *driver_open(const char *name, unsigned flags, hid_t access, haddr_t max_address) {
  struct driver_file *file = calloc(1, sizeof *file);
  if (file) file->fd = atoi(name); /* the name is the descriptor's number, see us_h5_driver_create */
  return (H5FD_t *)file;
}

static herr_t driver_close(H5FD_t *base) {
  free(base);
  return 0;
}

static int driver_cmp(const H5FD_t *a, const H5FD_t *b) {
  int x = ((const struct driver_file *)a)->fd, y = ((const struct driver_file *)b)->fd;
  return (x > y) - (x < y);
}

static haddr_t driver_get_eoa(const H5FD_t *base, H5FD_mem_t type) {
  return ((const struct driver_file *)base)->end_of_addresses;
}

static herr_t driver_set_eoa(H5FD_t *base, H5FD_mem_t type, haddr_t address) {
  ((struct driver_file *)base)->end_of_addresses = address;
  return 0;
}

static haddr_t driver_get_eof(const H5FD_t *base, H5FD_mem_t type) {
  struct stat info;
  if (fstat(((const struct driver_file *)base)->fd, &info) != 0) return HADDR_UNDEF;
  return (haddr_t)info.st_size;
}

static herr_t driver_read(H5FD_t *base, H5FD_mem_t type, hid_t dxpl, haddr_t address, size_t size,
                          void *buffer) {
  char *to = buffer;
  while (size > 0) {
    ssize_t got = pread(((struct driver_file *)base)->fd, to, size, (off_t)address);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    if (got == 0) { /* beyond the end everything is 0 */
      for (size_t i = 0; i < size; i++) to[i] = 0;
      return 0;
    }
    to += got;
    address += (haddr_t)got;
    size -= (size_t)got;
  }
  return 0;
}

static herr_t driver_write(H5FD_t *base, H5FD_mem_t type, hid_t dxpl, haddr_t address, size_t size,
                           const void *buffer) {
  return us_atomic_write(((struct driver_file *)base)->fd, buffer, size, address) ? 0 : -1;
}

static herr_t driver_truncate(H5FD_t *base, hid_t dxpl, hbool_t closing) {
  struct driver_file *file = (struct driver_file *)base;
  return ftruncate(file->fd, (off_t)file->end_of_addresses) == 0 ? 0 : -1;
}

static const H5FD_class_t driver_class = {
#ifdef H5FD_CLASS_VERSION /* libhdf5 1.14 */
    .version = H5FD_CLASS_VERSION,
    .value = (H5FD_class_value_t)511, /* 256 to 511 are for use without registration */
#endif
    .name = "ultraspeed_fd",
    .maxaddr = (haddr_t)INT64_MAX,
    .fc_degree = H5F_CLOSE_STRONG,
    .open = driver_open,
    .close = driver_close,
    .cmp = driver_cmp,
    .get_eoa = driver_get_eoa,
    .set_eoa = driver_set_eoa,
    .get_eof = driver_get_eof,
    .read = driver_read,
    .write = driver_write,
    .truncate = driver_truncate,
    .fl_map = H5FD_FLMAP_DICHOTOMY,
};

hid_t us_h5_driver_create(int fd, hid_t create, hid_t access, hid_t *ret_driver) {
  hid_t driver = H5FDregister(&driver_class), file = H5I_INVALID_HID;
  *ret_driver = driver;
  if (driver < 0) return H5I_INVALID_HID;
  char name[16];
  snprintf(name, sizeof name, "%d", fd);
  if (H5Pset_driver(access, driver, NULL) >= 0) file = H5Fcreate(name, H5F_ACC_TRUNC, create, access);
  return file;
}
