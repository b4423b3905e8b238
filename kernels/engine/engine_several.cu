/* engine_several.cu: the engine's kernel for lists with operations of several row tiles (gather.cuh, wide.cuh, reduce_wide.cuh).
 *
 * Bound: as engine.cu, whose kernel has nothing of them: registers of its loops are scarce.
 */
#define US_ENGINE_SEVERAL 1
#include "kernels/engine/engine.cu"
