/* engine_profile_several.cu: engine_several.cu's kernel once more, recording as engine_profile.cu's does.
 *
 * Bound: as engine_several.cu.
 */
#define US_ENGINE_PROFILED 1
#define US_ENGINE_SEVERAL  1
#include "kernels/engine/engine.cu"
