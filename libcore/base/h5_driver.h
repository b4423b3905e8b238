/* h5_driver.h: a libhdf5 file driver over an open descriptor (internal to h5_write.c).
 *
 *     struct us_h5_driver driver = {.fd = fd};
 *     hid_t file = us_h5_driver_create(&driver, create_properties, access_properties);
 *     ...
 *     H5Fclose(file);
 *     us_h5_driver_release(&driver);       // not before: libhdf5 1.10 frees the driver and then calls it
 *     if (driver.failure) ...;             // an errno
 *
 * libhdf5's own drivers open files by name; an unfinished artefact has none. A write that fails is remembered, not
 * reported to libhdf5: a file that it cannot close stays open, and its exit handler tries again.
 */
#ifndef US_BASE_H5_DRIVER_H
#define US_BASE_H5_DRIVER_H

#include <hdf5.h>

struct us_h5_driver {
  int fd;      /* stays open when the HDF5 file is closed */
  int failure; /* errno of the first write that failed, or 0 */
  hid_t id;
};

/* H5Fcreate on driver->fd; sets the driver in `access`. `driver` must outlive the file. Negative on failure, then there
 * is nothing to release. */
hid_t us_h5_driver_create(struct us_h5_driver *driver, hid_t create, hid_t access);

void us_h5_driver_release(struct us_h5_driver *driver);

#endif
