// CUDA's threads, barriers, shuffles and asynchronous copies on a CPU, so far as the kernels in plugins/cuda use them.
//
// One std::thread per CUDA thread of a block; the blocks of a grid run one after the other. Data races within a block
// are therefore real data races, which -fsanitize=thread reports, and reads outside of a buffer are real ones, for
// -fsanitize=address. Three things are made worse than on a GPU, so that an error shows in the numbers:
//
// - shared memory is filled with NaN before each block;
// - an asynchronous copy fills its target with NaN when it starts, and copies when it is waited for: who reads too
//   early gets NaN, and who starts a copy over what another thread still reads has a race;
// - blocks can run in reverse order, since a grid promises none.
//
// What it cannot show: races between blocks, the speed, and the instructions that functions of this file stand for. It
// is for a few hundred blocks at most: a shuffle costs a barrier of 32 threads.

#pragma once

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

using std::max;
using std::min;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

// Variables in one named section, whose bounds the linker gives, can be filled together. The address sanitizer guards
// the borders of variables instead, which only works outside of such a section.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static __attribute__((section("emulated_shared")))
extern "C" __attribute__((visibility("hidden"))) char __start_emulated_shared[], __stop_emulated_shared[];
#endif

struct uint3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

inline thread_local uint3 threadIdx;
inline uint3 blockIdx, gridDim;  // written between blocks, while no thread runs a kernel

namespace emulation {

constexpr int kWarp = 32;

// What the threads of one block share. Built anew for every block, as a thread that returns leaves its barriers.
struct Block {
    std::barrier<> threads;
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    std::vector<uint64_t> slots[2];  // what each thread offers in a shuffle; the next shuffle takes the other set

    explicit Block(int count) : threads(count), slots{std::vector<uint64_t>(count), std::vector<uint64_t>(count)} {
        for (int first = 0; first < count; first += kWarp) warps.push_back(std::make_unique<std::barrier<>>(kWarp));
    }
    std::barrier<>& warp() { return *warps[threadIdx.x / kWarp]; }
};

inline std::unique_ptr<Block> block;

struct Copy { void* to; const void* from; size_t bytes; bool there; };
using Group = std::vector<Copy>;
inline thread_local std::vector<Group> copies;  // groups on their way, oldest first; the last one is still open
inline thread_local unsigned shuffles;

inline void start_block(unsigned index, unsigned threads) {
    blockIdx = {index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y};
    block = std::make_unique<Block>(int(threads));
#if !defined(__SANITIZE_ADDRESS__)
    std::memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
#endif
}

// Runs `kernel()` as every thread of every block of a grid.
template <class Kernel> void launch(uint3 grid, unsigned threads, bool backwards, Kernel kernel) {
    gridDim = grid;
    const unsigned blocks = grid.x * grid.y * grid.z;
    unsigned done = 0;
    const auto next = [&]() noexcept {
        if (done < blocks) start_block(backwards ? blocks - 1 - done : done, threads);
        ++done;
    };
    std::barrier between(threads, next);
    std::vector<std::thread> team;
    for (unsigned thread = 0; thread < threads; ++thread)
        team.emplace_back([&, thread] {
            threadIdx = {thread, 0, 0};
            for (between.arrive_and_wait(); done <= blocks; between.arrive_and_wait()) {
                copies.assign(1, {});
                shuffles = 0;
                kernel();
                block->warp().arrive_and_drop();
                block->threads.arrive_and_drop();
            }
        });
    for (std::thread& thread : team) thread.join();
}

// Calls a kernel with arguments given by their addresses, as cuLaunchKernel does.
template <class... Types, size_t... Index>
void call(void (*kernel)(Types...), void** arguments, std::index_sequence<Index...>) {
    kernel(*static_cast<std::remove_cv_t<Types>*>(arguments[Index])...);
}

template <class... Types>
void launch(uint3 grid, unsigned threads, bool backwards, void (*kernel)(Types...), void** arguments) {
    launch(grid, threads, backwards, [=] { call(kernel, arguments, std::index_sequence_for<Types...>()); });
}

}  // namespace emulation

inline void __syncthreads() { emulation::block->threads.arrive_and_wait(); }
inline void __syncwarp() { emulation::block->warp().arrive_and_wait(); }

// One barrier is enough: who writes into a set of slots again has passed the barrier of the shuffle in between, at
// which all had arrived that read from it before.
template <class Value> Value __shfl_xor_sync(unsigned, Value value, int mask) {
    std::vector<uint64_t>& slots = emulation::block->slots[emulation::shuffles++ % 2];
    std::memcpy(&slots[threadIdx.x], &value, sizeof(Value));
    __syncwarp();
    std::memcpy(&value, &slots[threadIdx.x ^ mask], sizeof(Value));
    return value;
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

// Four bytes of those of `low` and `high`, numbered 0 to 7; each hexadecimal digit of `selector` chooses one.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }

struct Half;
struct Bfloat;

namespace emulation {

inline float widen_half(uint32_t bits) {
    const uint32_t sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
    if (magnitude >= 0x7c00u << 13) return std::bit_cast<float>(sign | magnitude | 0x7f800000u);
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;  // subnormals included
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

inline uint32_t narrow_half(float value) {
    const uint32_t sign = std::signbit(value) ? 0x8000u : 0;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7e00u;
    if (magnitude >= 65520.0f) return sign | 0x7c00u;  // half way past the largest rounds to infinity
    if (magnitude < 0x1p-14f) return sign | uint32_t(std::nearbyint(magnitude * 0x1p24f));
    const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
    return sign | ((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}

inline uint32_t narrow_bfloat(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return std::isnan(value) ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace emulation

// Templates, so that the types need not be complete before the kernels define them.
template <class Row> float2 unpack(Row, unsigned word) {
    if constexpr (std::is_same_v<Row, Half>)
        return {emulation::widen_half(word & 0xffff), emulation::widen_half(word >> 16)};
    else
        return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xffff0000u)};
}

template <class Row> unsigned pack(Row, float low, float high) {
    const auto narrow = std::is_same_v<Row, Half> ? emulation::narrow_half : emulation::narrow_bfloat;
    return narrow(low) | narrow(high) << 16;
}

template <class Word> void copy_async(Word* to, const void* from, bool there) {
    std::memset(to, 0xff, sizeof(Word));
    emulation::copies.back().push_back({to, from, sizeof(Word), there});
}

inline void commit_copies() { emulation::copies.emplace_back(); }

template <int Pending> void wait_copies() {
    auto& groups = emulation::copies;
    while (groups.size() > Pending + 1) {
        for (const emulation::Copy& copy : groups.front()) {
            if (copy.there) std::memcpy(copy.to, copy.from, copy.bytes);
            else std::memset(copy.to, 0, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}
