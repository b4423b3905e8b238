/* group.h: GPUs that train together, through NCCL: gradients to their owners, new values to all.
 *
 *     struct us_cuda_group *group;
 *     us_cuda_group_create(cuda, lanes, rank, ranks, rendezvous, &group, &err);   // every process; rank: of lane 0
 *     us_cuda_group_reduce(group, owned, grad, &err);          // queued: owned[r] of all gradients, summed, to rank r
 *     us_cuda_group_share(group, owned, own, value, &err);     // queued: owned[r] from rank r to all
 *     us_cuda_group_sum(group, values, 2, &err);               // a few doubles over all processes; waits
 *     us_cuda_group_wait(group, &err);                         // as a stream synchronisation, but ends when a process is gone
 *     us_cuda_group_free(group);
 *
 * Sums have the order that NCCL chooses for a number of ranks and their links: the same bits from run to run. NVLink multicast
 * stays off by NCCL_NVLS_ENABLE=0, which the tools set.
 */
#ifndef US_TRAINING_CUDA_GROUP_H
#define US_TRAINING_CUDA_GROUP_H

#include "training/ownership.h"
#include "training/rendezvous.h"

struct us_cuda;
struct us_cuda_group;

/* Borrows cuda (lanes) and the rendezvous, which is NULL where one process holds all ranks. US_ERR_DEVICE: what NCCL says. */
US_CHECKED enum us_status us_cuda_group_create(struct us_cuda *const *cuda, uint32_t lanes, uint32_t rank,
                                               uint32_t ranks, struct us_rendezvous *opt_rendezvous,
                                               struct us_cuda_group **ret_group, struct us_err *err);
void us_cuda_group_free(struct us_cuda_group *group); /* NULL is allowed */

/* owned (ranks); grad (lanes) device arenas. */
US_CHECKED enum us_status us_cuda_group_reduce(struct us_cuda_group *group, const struct us_owned *owned,
                                               float *const *grad, struct us_err *err);

/* from (lanes): where the lane's own range begins; to (lanes): arenas that receive every range, the own one too. */
US_CHECKED enum us_status us_cuda_group_share(struct us_cuda_group *group, const struct us_owned *owned,
                                              float *const *from, float *const *to, struct us_err *err);

/* Values (n, at most 64) of lane 0 of each process, summed; the same in all. */
US_CHECKED enum us_status us_cuda_group_sum(struct us_cuda_group *group, double *values, size_t n,
                                            struct us_err *err);

/* US_ERR_DEVICE when a process is gone or NCCL failed: what was queued is given up, the group is of no further use. */
US_CHECKED enum us_status us_cuda_group_wait(struct us_cuda_group *group, struct us_err *err);

#endif
