/* ranks.h: which process of a parallel run this one is, from what the launcher put into the environment.
 *
 *     struct us_ranks ranks;
 *     us_ranks_discover(getenv_of, NULL, &ranks, &err);        // getenv_of(arg, name): getenv, or a test's table
 *     if (ranks.processes > 1) us_rendezvous_open(&ranks, 120.0, &rendezvous, &err);
 *     us_ranks_first_gpu(&ranks, visible, gpus, &first, &err); // of this process
 *
 * In this order: RANK, WORLD_SIZE, LOCAL_RANK (torchrun and hand-written scripts); OMPI_COMM_WORLD_* (mpirun); PMI_RANK, PMI_SIZE
 * (MPICH, Intel MPI; srun --mpi=pmi2 counts as srun); SLURM_PROCID, SLURM_STEP_NUM_TASKS (srun; a batch script alone has no step).
 * None: one process.
 * Where they meet: the file US_RENDEZVOUS on a file system that all see; or MASTER_ADDR and MASTER_PORT; or this host, if all
 * run on it; or the first node of the Slurm step, for mpirun and mpiexec of the Slurm job.
 */
#ifndef US_TRAINING_RANKS_H
#define US_TRAINING_RANKS_H

#include "base/err.h"
#include <stdint.h>

struct us_ranks {
  uint32_t process, processes;     /* this one, and how many */
  uint32_t local, local_processes; /* on this host */
  const char *launcher;            /* "torchrun", "mpirun", "mpiexec", "srun"; NULL: started alone */
  char address[256];               /* where process 0 listens; empty with a file */
  uint16_t port;
  char file[1024]; /* US_RENDEZVOUS; empty without */
};

typedef const char *(*us_ranks_getenv)(void *arg, const char *name);

/* US_ERR_USAGE for variables that are not numbers, contradict each other, or do not say where to meet. */
US_CHECKED enum us_status us_ranks_discover(us_ranks_getenv get, void *arg, struct us_ranks *ret_ranks,
                                            struct us_err *err);

/* First of the `gpus` GPUs of this process among `visible`: the local processes divide them, or, where the launcher shows each
 * process its own alone, it is 0. US_ERR_DEVICE if there are too few. */
US_CHECKED enum us_status us_ranks_first_gpu(const struct us_ranks *ranks, uint32_t visible, uint32_t gpus,
                                             uint32_t *ret_first, struct us_err *err);

/* First host of a Slurm node list ("gpu[03-07,9],login1": gpu03). `host` holds 256 bytes. */
void us_ranks_first_host(const char *list, char *host);

#endif
