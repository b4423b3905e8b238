/* engine_attention_segments.cu: the attention test's kernel with other cuts: a leaf together, everything else in segments. */
#define US_ENGINE_ATTENTION_TOGETHER 1
#define US_ENGINE_ATTENTION_GROUPED  0
#define ATTENTION_LAUNCH             attention_launch_segments
#include "engine_attention_kernel.cuh"
