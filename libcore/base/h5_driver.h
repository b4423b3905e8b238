/* h5_driver.h: a libhdf5 file driver over an open descriptor (internal to h5_write.c).
 *
 *     hid_t file = us_h5_driver_create(fd, create_properties, access_properties, &driver);
 *     H5Fclose(file);
 *     H5FDunregister(driver);
 *
 * libhdf5's own drivers open files by name; an unfinished artefact has none.
 */
#ifndef US_BASE_H5_DRIVER_H
#define US_BASE_H5_DRIVER_H

#include <hdf5.h>

/* H5Fcreate on a descriptor, which stays open when the HDF5 file is closed. Sets the driver in `access`. The caller keeps
 * *ret_driver registered until the file is closed: libhdf5 1.10 gives up its own reference to the driver and then calls the
 * driver's close, out of freed memory if that reference was the last. */
hid_t us_h5_driver_create(int fd, hid_t create, hid_t access, hid_t *ret_driver);

#endif
