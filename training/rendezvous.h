/* rendezvous.h: how the processes of a run find each other, and notice when one is gone.
 *
 *     struct us_rendezvous *r;
 *     us_rendezvous_open(&ranks, 120.0, &r, &err);             // returns when all have arrived
 *     us_rendezvous_share(r, id, sizeof id, &err);             // process 0's bytes to all
 *     if (us_rendezvous_check(r, &err) != US_OK) ...           // "process 3 is gone": now and then
 *     us_rendezvous_close(r);
 *
 * Process 0 listens, the others keep a connection to it: by TCP (IPv4 or IPv6) at an address and port, or at an address that process 0
 * writes into a file all can see. Whoever is there instead and does not answer as process 0 would is left, and looked for again. A process
 * that ends, however it does, closes its connection; one whose host or network is lost is missed after 35 s. Process 0 passes on who it was.
 */
#ifndef US_TRAINING_RENDEZVOUS_H
#define US_TRAINING_RENDEZVOUS_H

#include "training/ranks.h"

#include <stddef.h>

struct us_rendezvous;

/* US_ERR_IO when one does not arrive within `seconds` (process 0 says which), or the port is taken; US_ERR_USAGE when two say they
 * are the same process, or have other ideas of how many there are (process 0 says so, and whoever it refuses). */
US_CHECKED enum us_status us_rendezvous_open(const struct us_ranks *ranks, double seconds,
                                             struct us_rendezvous **ret_rendezvous, struct us_err *err);
void us_rendezvous_close(struct us_rendezvous *rendezvous); /* NULL is allowed */

/* Every process calls it: process 0's bytes are copied to the others. */
US_CHECKED enum us_status us_rendezvous_share(struct us_rendezvous *rendezvous, void *bytes, size_t n,
                                              struct us_err *err);

/* This process needs the others no more: that it ends will not be told as a loss. */
void us_rendezvous_part(struct us_rendezvous *rendezvous);

/* US_ERR_DEVICE with a clear line once a process is gone. Does not wait. */
US_CHECKED enum us_status us_rendezvous_check(struct us_rendezvous *rendezvous, struct us_err *err);

#endif
