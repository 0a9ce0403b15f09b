// The kernels of plugins/cuda as a shared library for the CPU: one function that launches any of them by its name.

#include "cuda.h"

#include "../cuda/core_attention.cu"

#define KERNEL(name) \
    if (!std::strcmp(kernel, #name)) return emulation::launch({x, y, z}, kThreads, backwards, name, arguments), 0

// Launches a kernel over a grid of (x, y, z) blocks and waits for it. `arguments` are the addresses of its arguments.
// Returns 0, or 1 for a name that is none of the kernels.
extern "C" int avl_launch(const char* kernel, unsigned x, unsigned y, unsigned z, int backwards, void** arguments) {
    KERNEL(avl_smooth);
    KERNEL(avl_append);
    KERNEL(avl_attend);
    KERNEL(avl_scan);
    KERNEL(avl_log_sums);
    KERNEL(avl_nucleus);
    KERNEL(avl_merge);
    KERNEL(avl_scores);
    KERNEL(avl_prompt_logits);
    KERNEL(avl_prompt_log_sums);
    KERNEL(avl_prompt_scores);
    return 1;
}
