// The kernels of plugins/cuda/token_attention.cu as a shared library for the CPU, launched by their names.

#include "cuda.h"

#include "../cuda/token_attention.cu"

#define KERNEL(name) \
    if (!std::strcmp(kernel, #name)) return emulation::launch({x, y, z}, kThreads, backwards, name, arguments), 0

// As avl_launch in driver.cpp.
extern "C" int avl_launch(const char* kernel, unsigned x, unsigned y, unsigned z, int backwards, void** arguments) {
    KERNEL(avl_token_attend);
    KERNEL(avl_token_scores);
    KERNEL(avl_token_join);
    KERNEL(avl_token_sums);
    return 1;
}
