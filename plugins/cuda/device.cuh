// What all kernels share: types of numbers, the instructions that C++ has no words for, and the shape of a block.
//
// Everything here includes only files beside it, so that NVRTC needs no include path but their names. The lines of PTX
// are what plugins/emulation replaces by functions of the same names.

#pragma once

#if !defined(HEAD_DIM) || !defined(GROUP) || !defined(ROW)
#error "HEAD_DIM, GROUP and ROW select the kernels' shape"
#endif
#ifndef WARPS
#define WARPS 4  // of a block
#endif

struct Half { unsigned short bits; };
struct Bfloat { unsigned short bits; };

#ifdef __CUDACC__

__device__ __forceinline__ float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float log2_approx(float x) {
    float result;
    asm("lg2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// The two values in a word, the first in its low half, and back, rounded to nearest even.
__device__ __forceinline__ float2 unpack(Half, unsigned word) {
    float2 pair;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(pair.x), "=f"(pair.y) : "r"(word));
    return pair;
}

__device__ __forceinline__ float2 unpack(Bfloat, unsigned word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

__device__ __forceinline__ unsigned pack(Half, float low, float high) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ unsigned pack(Bfloat, float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// Starts copying 16 bytes to shared memory, past the first-level cache, as no row is read twice; zeros if not `there`.
// The memory clobber keeps the reads of what the copy overwrites in front of it.
__device__ __forceinline__ void copy_async(uint4* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(unsigned(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from)),
                    "r"(there ? 16 : 0) : "memory");
}

// The same for 4 bytes, which only go through the first-level cache.
__device__ __forceinline__ void copy_async(unsigned* to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(unsigned(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from)),
                    "r"(there ? 4 : 0) : "memory");
}

// Closes the group of copies that this thread has started since the last one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` groups are on their way; what the others copied is visible to this thread.
template <int Pending> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(Pending) : "memory");
}

#endif

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 32 * WARPS;
constexpr int kPiece = 8;                   // neighbouring elements in 16 bytes
constexpr int kPieces = HEAD_DIM / kPiece;  // of one head of a row
constexpr float kLowest = -3.0e38f;         // under every logit, and finite: a difference of two is never NaN

static_assert(HEAD_DIM % kPiece == 0 && HEAD_DIM <= 256, "a head is read in pieces by at most one warp");

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

// A query times this, times a key, is a logit in units of log 2.
__device__ __forceinline__ float query_scale() { return 1.44269504f / sqrtf(float(HEAD_DIM)); }

// The elements of a piece in float32.
template <class Row> __device__ __forceinline__ void widen(const uint4& piece, float (&to)[kPiece]) {
    const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack(Row{}, words[i]);
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
    }
}

}  // namespace
