/* owner.h: what a model owns: memory of its own, and things to close (mappings, open files) when it goes.
 *
 *     us_owner_create(&owner, &err);
 *     us_owner_alloc(owner, 6144 * sizeof(float), &norm, &err);      // 64-byte aligned, zeroed
 *     us_owner_attach(owner, file, close_file, &err);                // close_file(file) when the owner is freed
 *     us_owner_free(owner);
 *
 * One thread at a time. Used by model.c and the checkpoint readers; models hand it out as us_model_alloc.
 */
#ifndef US_MODEL_OWNER_H
#define US_MODEL_OWNER_H

#include "base/err.h"
#include <stddef.h>

#define US_OWNER_ALIGN 64

struct us_owner;

US_CHECKED enum us_status us_owner_create(struct us_owner **ret_owner, struct us_err *err);

/* Zeroed memory, aligned to US_OWNER_ALIGN, that lives as long as the owner. US_ERR_MEMORY. */
US_CHECKED enum us_status us_owner_alloc(struct us_owner *owner, size_t bytes, void **ret_memory,
                                         struct us_err *err);

/* Call release(thing) when the owner is freed, last attached first. If this fails, thing has been released. */
US_CHECKED enum us_status us_owner_attach(struct us_owner *owner, void *thing, void (*release)(void *thing),
                                          struct us_err *err);

/* Release everything; NULL is allowed. */
void us_owner_free(struct us_owner *owner);

#endif
