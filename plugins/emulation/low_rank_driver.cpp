// The kernel of plugins/cuda/low_rank.cu as a shared library for the CPU, launched by its name.

#include "cuda.h"

#include "../cuda/low_rank.cu"

#define KERNEL(name) \
    if (!std::strcmp(kernel, #name)) return emulation::launch({x, y, z}, kThreads, backwards, name, arguments), 0

// As avl_launch in driver.cpp.
extern "C" int avl_launch(const char* kernel, unsigned x, unsigned y, unsigned z, int backwards, void** arguments) {
    KERNEL(avl_attend_low_rank);
    return 1;
}
