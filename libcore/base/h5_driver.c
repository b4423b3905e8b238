/* h5_driver.c: a libhdf5 file driver over an open descriptor. */
#include "base/h5_driver.h"

#include "base/atomic.h"
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

struct driver_file {
  H5FD_t base; /* libhdf5's part comes first */
  struct us_h5_driver *state;
  haddr_t end_of_addresses;
};

static struct us_h5_driver *state_of(const H5FD_t *base) {
  return ((const struct driver_file *)base)->state;
}

static H5FD_t *driver_open(const char *name, unsigned flags, hid_t access, haddr_t max_address) {
  struct us_h5_driver *const *state = H5Pget_driver_info(access);
  struct driver_file *file = state ? calloc(1, sizeof *file) : NULL;
  if (file) file->state = *state;
  return (H5FD_t *)file;
}

static herr_t driver_close(H5FD_t *base) {
  free(base);
  return 0;
}

static int driver_cmp(const H5FD_t *a, const H5FD_t *b) {
  int x = state_of(a)->fd, y = state_of(b)->fd;
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
  if (fstat(state_of(base)->fd, &info) != 0) return HADDR_UNDEF;
  return (haddr_t)info.st_size;
}

static herr_t driver_read(H5FD_t *base, H5FD_mem_t type, hid_t dxpl, haddr_t address, size_t size,
                          void *buffer) {
  char *to = buffer;
  while (size > 0) {
    ssize_t got = pread(state_of(base)->fd, to, size, (off_t)address);
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

static void remember_failure(struct us_h5_driver *state) {
  if (!state->failure) state->failure = errno ? errno : EIO;
}

static herr_t driver_write(H5FD_t *base, H5FD_mem_t type, hid_t dxpl, haddr_t address, size_t size,
                           const void *buffer) {
  if (!us_atomic_write(state_of(base)->fd, buffer, size, address)) remember_failure(state_of(base));
  return 0;
}

static herr_t driver_truncate(H5FD_t *base, hid_t dxpl, hbool_t closing) {
  haddr_t end = ((struct driver_file *)base)->end_of_addresses;
  if (ftruncate(state_of(base)->fd, (off_t)end) != 0) remember_failure(state_of(base));
  return 0;
}

static const H5FD_class_t driver_class = {
#ifdef H5FD_CLASS_VERSION /* libhdf5 1.14 */
    .version = H5FD_CLASS_VERSION,
    .value = (H5FD_class_value_t)511, /* 256 to 511 are for use without registration */
#endif
    .name = "ultraspeed_fd",
    .maxaddr = (haddr_t)INT64_MAX,
    .fc_degree = H5F_CLOSE_STRONG,
    .fapl_size = sizeof(struct us_h5_driver *),
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

hid_t us_h5_driver_create(struct us_h5_driver *driver, hid_t create, hid_t access) {
  hid_t file = H5I_INVALID_HID;
  driver->id = H5FDregister(&driver_class);
  if (driver->id < 0) return H5I_INVALID_HID;
  if (H5Pset_driver(access, driver->id, &driver) >= 0)
    file = H5Fcreate("unnamed", H5F_ACC_TRUNC, create, access);
  if (file < 0) us_h5_driver_release(driver);
  return file;
}

void us_h5_driver_release(struct us_h5_driver *driver) {
  if (driver->id >= 0) H5FDunregister(driver->id);
  driver->id = H5I_INVALID_HID;
}
