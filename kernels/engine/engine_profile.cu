/* engine_profile.cu: the engine's kernel once more, recording what each role of each block does and waits for.
 *
 * Bound: as engine.cu; what the recording costs, tile-profile measures and says.
 */
#define US_ENGINE_PROFILED 1
#include "kernels/engine/engine.cu"
