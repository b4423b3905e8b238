/* fake_nccl.c: NCCL's calls for ranks that are lanes of one process and may share a GPU, which the real one refuses.
 *
 * Linked before the real library by train_lanes. Calls of a group are kept and carried out at its end, through the host, in the
 * order of ranks: what is tested is who calls what, not the transport.
 */
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <stdlib.h>
#include <string.h>

/* The header's declarations of these have no prototype. */
ncclResult_t ncclGroupStart(void);
ncclResult_t ncclGroupEnd(void);

enum { MOST_RANKS = 16, MOST_CALLS = 4096 };

enum kind { REDUCE, ALL_REDUCE, BROADCAST };

struct call {
  enum kind kind;
  const void *from;
  void *to;
  size_t bytes;
  ncclDataType_t type;
  int root, rank;
  cudaStream_t stream;
};

struct ncclComm {
  int rank, ranks;
};

static struct call calls[MOST_CALLS];
static size_t count;
static int depth;

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  memset(id, 7, sizeof *id);
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank) {
  (void)id;
  if (ranks > MOST_RANKS) return ncclInvalidArgument;
  *comm = malloc(sizeof **comm);
  if (!*comm) return ncclSystemError;
  **comm = (struct ncclComm){.rank = rank, .ranks = ranks};
  return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  free(comm);
  return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  free(comm);
  return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
  (void)comm;
  *error = ncclSuccess;
  return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result) {
  return result == ncclSuccess ? "no error" : "refused by the stand-in";
}

static ncclResult_t keep(enum kind kind, const void *from, void *to, size_t n, ncclDataType_t type, int root,
                         ncclComm_t comm, cudaStream_t stream) {
  if (!depth || count == MOST_CALLS) return ncclInvalidUsage;
  size_t size = type == ncclDouble ? sizeof(double) : sizeof(float);
  calls[count++] = (struct call){.kind = kind,
                                 .from = from,
                                 .to = to,
                                 .bytes = n * size,
                                 .type = type,
                                 .root = root,
                                 .rank = comm->rank,
                                 .stream = stream};
  return ncclSuccess;
}

ncclResult_t ncclReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t stream) {
  return op == ncclSum ? keep(REDUCE, from, to, n, type, root, comm, stream) : ncclInvalidArgument;
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  return op == ncclSum ? keep(ALL_REDUCE, from, to, n, type, -1, comm, stream) : ncclInvalidArgument;
}

ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  return keep(BROADCAST, from, to, n, type, root, comm, stream);
}

ncclResult_t ncclGroupStart(void) {
  depth++;
  return ncclSuccess;
}

static void add(const struct call *c, void *sum, const void *part) {
  size_t n = c->bytes / (c->type == ncclDouble ? sizeof(double) : sizeof(float));
  for (size_t i = 0; i < n; i++) {
    if (c->type == ncclDouble)
      ((double *)sum)[i] += ((const double *)part)[i];
    else
      ((float *)sum)[i] += ((const float *)part)[i];
  }
}

/* The calls of all ranks that belong to calls[first]: the next of the same kind and root from each. */
static ncclResult_t carry_out(size_t first, int ranks, int done[]) {
  struct call *member[MOST_RANKS] = {NULL};
  for (size_t i = first; i < count; i++) {
    struct call *c = &calls[i];
    if (done[i] || c->kind != calls[first].kind || c->root != calls[first].root || member[c->rank]) continue;
    member[c->rank] = c;
    done[i] = 1;
  }
  char *sum = calloc(2, calls[first].bytes), *part = sum ? sum + calls[first].bytes : NULL;
  ncclResult_t result = sum ? ncclSuccess : ncclSystemError;
  for (int r = 0; r < ranks && result == ncclSuccess; r++) {
    struct call *c = member[r];
    if (!c || c->bytes != calls[first].bytes || c->type != calls[first].type) result = ncclInvalidUsage;
    if (result != ncclSuccess || (c->kind == BROADCAST && r != c->root)) continue;
    if (cudaMemcpy(part, c->from, c->bytes, cudaMemcpyDeviceToHost) != cudaSuccess)
      result = ncclUnhandledCudaError;
    add(c, sum, part);
  }
  for (int r = 0; r < ranks && result == ncclSuccess; r++) {
    struct call *c = member[r];
    if (c->kind == REDUCE && r != c->root) continue;
    const void *bytes = sum;
    if (cudaMemcpy(c->to, bytes, c->bytes, cudaMemcpyHostToDevice) != cudaSuccess)
      result = ncclUnhandledCudaError;
  }
  free(sum);
  return result;
}

ncclResult_t ncclGroupEnd(void) {
  static int done[MOST_CALLS];
  int ranks = 0;
  ncclResult_t result = ncclSuccess;
  if (--depth || !count) return ncclSuccess;
  memset(done, 0, sizeof done);
  for (size_t i = 0; i < count; i++) {
    if (calls[i].rank >= ranks) ranks = calls[i].rank + 1;
    if (cudaStreamSynchronize(calls[i].stream) != cudaSuccess) result = ncclUnhandledCudaError;
  }
  for (size_t i = 0; i < count && result == ncclSuccess; i++)
    if (!done[i]) result = carry_out(i, ranks, done);
  count = 0;
  return result;
}
