// Which rows to attend, by the weights of a scan of their keys: a nucleus, in order of weight until it holds a share of
// their sum, of a limited number of rows. The choice is made on the device, so that a step waits for no host.
//
// Nothing is sorted: weights are not negative, so their bits are in their order, and the least weight of a nucleus is
// found bit by bit. Weights are summed as whole numbers, whose sum does not depend on the order. Whatever the weights
// are, no more rows are picked than may be.

#pragma once

#include "device.cuh"

namespace {

// The mass of some rows in 2^-32, and in the lowest bits how many they are: one number to add.
using Tally = unsigned long long;
constexpr int kCountBits = 24;
__device__ __forceinline__ unsigned long long mass_in(Tally tally) { return tally >> kCountBits; }
__device__ __forceinline__ int count_in(Tally tally) { return int(tally & ((1 << kCountBits) - 1)); }

// A weight's place among others; none for what is no weight.
__device__ __forceinline__ unsigned order_of(float weight) { return weight > 0 ? __float_as_uint(weight) : 0; }
__device__ __forceinline__ unsigned long long mass_of(unsigned order) {
    return (unsigned long long)(__uint_as_float(order) * 4294967296.0f);
}

// Of all weights of at least an order, by a whole block; in all threads.
__device__ __forceinline__ Tally tally(const float* weights, int count, unsigned least, Tally (&parts)[WARPS]) {
    Tally sum = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
        const unsigned order = order_of(weights[i]);
        sum += order >= least ? mass_of(order) << kCountBits | 1 : 0;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAll, sum, mask);
    __syncthreads();  // the parts of an earlier call have been read
    if (lane_index() == 0) parts[warp_index()] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += parts[warp];
    return sum;
}

// How many rows of one weight are needed for a mass that is missing.
__device__ __forceinline__ int needed(unsigned long long missing, unsigned long long each, int most) {
    if (missing == 0) return 0;
    const unsigned long long rows = each ? missing / each + (missing % each != 0) : most;
    return rows < (unsigned long long)most ? int(rows) : most;
}

}  // namespace

// One block: the rows of one sequence and part that were scanned. Their ids go to the end of those that the sequence
// attends of that part anyway. A sequence that scanned none attends the latter alone.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_nucleus(const float* __restrict__ weights,   // [scanned], as avl_scores left them; at most about one
            const int* __restrict__ candidates,  // [scanned], ids
            const int* __restrict__ begins,      // [P, B], of both
            const int* __restrict__ ends,        // [P, B]
            const int* __restrict__ limits,      // [B, 2]: the share to hold, in 2^-30 (all of it: as many as may be),
                                                 // and the most rows
            const int* __restrict__ listed,      // [P, B]: where in `rows` the list ends that holds no picked row
            int* __restrict__ rows,              // [capacity]
            int* __restrict__ attended,          // [P, B]: where it ends with them
            signed char* __restrict__ picked) {  // [scanned]: 1 or 0
    __shared__ Tally parts[WARPS];
    __shared__ int above[kThreads], equal[kThreads];
    const int segment = blockIdx.y * gridDim.x + blockIdx.x, begin = begins[segment], count = ends[segment] - begin;
    const int share = limits[2 * blockIdx.x], most = limits[2 * blockIdx.x + 1];
    weights += begin;

    const unsigned long long all = mass_in(tally(weights, count, 0, parts));
    const unsigned long long target = share < 1 << 30 ? all * share >> 30 : ~0ull;
    unsigned least = 0;
    for (int bit = 30; bit >= 0; --bit) {
        const Tally found = tally(weights, count, least | 1u << bit, parts);
        if (mass_in(found) >= target || count_in(found) >= most) least |= 1u << bit;
    }
    const Tally higher = tally(weights, count, least + 1, parts);
    const unsigned long long missing = target > mass_in(higher) ? target - mass_in(higher) : 0;
    const int of_least = needed(missing, mass_of(least), max(most - count_in(higher), 0));

    // Each thread writes the picks of a stretch of its own, after all those before it: equal weights go by their places.
    const int stretch = ceil_div(count, kThreads), first = min(int(threadIdx.x) * stretch, count);
    const int last = min(first + stretch, count);
    int own_above = 0, own_equal = 0;
    for (int i = first; i < last; ++i) {
        own_above += order_of(weights[i]) > least;
        own_equal += order_of(weights[i]) == least;
    }
    above[threadIdx.x] = own_above;
    equal[threadIdx.x] = own_equal;
    __syncthreads();
    int higher_before = 0, equal_before = 0;
    for (int thread = 0; thread < int(threadIdx.x); ++thread) {
        higher_before += above[thread];
        equal_before += equal[thread];
    }
    for (int i = first; i < last; ++i) {
        const unsigned order = order_of(weights[i]);
        const bool pick = order > least || (order == least && equal_before < of_least);
        if (pick) rows[listed[segment] + higher_before + min(equal_before, of_least)] = candidates[begin + i];
        picked[begin + i] = pick;
        higher_before += order > least;
        equal_before += order == least;
    }
    if (threadIdx.x == kThreads - 1)
        attended[segment] = listed[segment] + higher_before + min(equal_before, of_least);
}
