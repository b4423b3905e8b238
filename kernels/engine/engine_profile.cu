/* engine_profile.cu: the engine's kernel once more, recording what each role of each block does and waits for.
 *
 * Bound: as engine.cu; what the recording costs, tile-profile measures and says. Lists of several row tiles have a kernel of their own
 * (engine_profile_several.cu), as they have without recording, or this one would be slower by what it cannot need.
 */
#define US_ENGINE_PROFILED 1
#include "kernels/engine/engine.cu"
