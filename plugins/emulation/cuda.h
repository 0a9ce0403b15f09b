// CUDA's threads, barriers, shuffles and asynchronous copies on a CPU, so far as the kernels in plugins/cuda use them.
//
// Each CUDA thread of a block is a context (a fiber), and all take turns on the thread that launches: one runs until it
// waits at a barrier. The blocks of a grid run one after the other. To -fsanitize=thread each context is a thread and
// only barriers order them, so that it reports the data races of a block in whichever order it ran; reads outside of a
// buffer are real ones, for -fsanitize=address. Four things are made worse than on a GPU, so that an error shows in the
// numbers:
//
// - shared memory is filled with NaN before each block;
// - an asynchronous copy fills its target with NaN when it starts, and copies when it is waited for: who reads too
//   early gets NaN, and who starts a copy over what another thread still reads has a race;
// - a warp goes on for as long as it can, and who came last to a barrier is the first to leave it;
// - blocks can run in reverse order, since a grid promises none.
//
// Threads that wait for each other end the process. What it cannot show: races between blocks, the speed, and the
// instructions that functions of this file stand for.

#pragma once

#undef _FORTIFY_SOURCE  // its longjmp takes another stack for an error

#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

// The thread sanitizer is told which context runs; what switches between them it must not see, as no barrier orders it.
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define UNSEEN __attribute__((no_sanitize("thread")))
#else
#define UNSEEN
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
constexpr unsigned __tsan_switch_to_fiber_no_sync = 1;
#endif

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

inline uint3 threadIdx;  // written whenever another thread goes on
inline uint3 blockIdx, gridDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 18;

struct Copy { void* to; const void* from; size_t bytes; bool there; };
using Group = std::vector<Copy>;

struct Thread {
    uint3 index;
    std::unique_ptr<char[]> stack;
    void* fiber;  // the thread sanitizer's name for it
    ucontext_t start;
    jmp_buf stop;  // where it waits
    bool started;
    Thread* next;  // that waits for the same
    std::vector<Group> copies;  // groups on their way, oldest first; the last one is still open
    unsigned shuffles;
};

inline Thread host;  // starts a block's threads, and goes on when none of them can
inline Thread *current = &host, *ready = nullptr;

inline UNSEEN void push(Thread*& list, Thread* thread) {
    thread->next = list;
    list = thread;
}

[[noreturn]] inline UNSEEN void go_on(Thread* thread) {
    current = thread;
    threadIdx = thread->index;
    __tsan_switch_to_fiber(thread->fiber, __tsan_switch_to_fiber_no_sync);
    if (thread->started) _longjmp(thread->stop, 1);
    thread->started = true;
    setcontext(&thread->start);
    std::abort();
}

inline UNSEEN void let_another_go_on() {
    Thread* next = ready ? ready : &host;
    if (ready) ready = ready->next;
    if (!_setjmp(current->stop)) go_on(next);
}

class Barrier {
 public:
    explicit Barrier(unsigned count) : expected_(count), missing_(count) {}

    UNSEEN void wait() {
        char* round = &rounds_[round_ % 2];
        __tsan_release(round);
        if (--missing_) {
            push(waiting_, current);
            let_another_go_on();
        } else {
            open();
        }
        __tsan_acquire(round);
    }
    // A thread that returns is not waited for.
    UNSEEN void leave() {
        __tsan_release(&rounds_[round_ % 2]);
        --expected_;
        if (!--missing_) open();
    }
    // Whether all have left.
    bool join() {
        for (char& round : rounds_) __tsan_acquire(&round);
        return !expected_;
    }

 private:
    UNSEEN void open() {
        missing_ = expected_;
        ++round_;
        while (waiting_) {
            Thread* first = waiting_;
            waiting_ = first->next;
            push(ready, first);
        }
    }

    unsigned expected_, missing_, round_ = 0;
    Thread* waiting_ = nullptr;
    char rounds_[2];  // what the thread sanitizer orders threads by; they alternate, as some are late to leave the last
};

// What the threads of one block share. Built anew for every block, as a thread that returns leaves its barriers.
struct Block {
    Barrier threads;
    std::vector<Barrier> warps;
    std::vector<uint64_t> slots[2];  // what each thread offers in a shuffle; the next shuffle takes the other set

    explicit Block(unsigned count)
        : threads(count), warps(count / kWarp, Barrier(kWarp)),
          slots{std::vector<uint64_t>(count), std::vector<uint64_t>(count)} {}
    Barrier& warp() { return warps[threadIdx.x / kWarp]; }
};

inline std::unique_ptr<Block> block;
inline std::vector<Thread> team;
inline const void* launched;

template <class Kernel> UNSEEN void run_thread() {
    __tsan_acquire(&launched);
    (*static_cast<const Kernel*>(launched))();
    block->warp().leave();
    block->threads.leave();
    go_on(&host);
}

inline void start_block(unsigned index, unsigned threads, void (*run)()) {
    blockIdx = {index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y};
    block = std::make_unique<Block>(threads);
#if !defined(__SANITIZE_ADDRESS__)
    std::memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
#endif
    for (unsigned i = threads; i--;) {
        Thread& thread = team[i];
        thread.index = {i, 0, 0};
        thread.copies.assign(1, {});
        thread.shuffles = 0;
        thread.started = false;
        getcontext(&thread.start);
        thread.start.uc_stack = {thread.stack.get(), 0, kStack};
        makecontext(&thread.start, run, 0);
        push(ready, &thread);
    }
    __tsan_release(&launched);
}

inline void finish_block() {
    while (ready) let_another_go_on();
    if (!block->threads.join()) {
        std::fputs("threads of a block wait for each other\n", stderr);
        std::abort();
    }
}

// Runs `kernel()` as every thread of every block of a grid.
template <class Kernel> void launch(uint3 grid, unsigned threads, bool backwards, Kernel kernel) {
    gridDim = grid;
    launched = &kernel;
    host.fiber = __tsan_get_current_fiber();
    host.started = true;
    while (team.size() < threads) {
        Thread& thread = team.emplace_back();
        thread.stack.reset(new char[kStack]);
        thread.fiber = __tsan_create_fiber(0);
    }
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned done = 0; done < blocks; ++done) {
        start_block(backwards ? blocks - 1 - done : done, threads, run_thread<Kernel>);
        finish_block();
    }
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

inline void __syncthreads() { emulation::block->threads.wait(); }
inline void __syncwarp() { emulation::block->warp().wait(); }

// One barrier is enough: who writes into a set of slots again has passed the barrier of the shuffle in between, at
// which all had arrived that read from it before.
template <class Value> Value __shfl_xor_sync(unsigned, Value value, int mask) {
    std::vector<uint64_t>& slots = emulation::block->slots[emulation::current->shuffles++ % 2];
    std::memcpy(&slots[threadIdx.x], &value, sizeof(Value));
    __syncwarp();
    std::memcpy(&value, &slots[threadIdx.x ^ mask], sizeof(Value));
    return value;
}

template <class To, class From> To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }

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
    if (magnitude >= 0x7c00u << 13) return bits_as<float>(sign | magnitude | 0x7f800000u);
    const float scaled = bits_as<float>(magnitude) * 0x1p112f;  // subnormals included
    return bits_as<float>(sign | bits_as<uint32_t>(scaled));
}

inline uint32_t narrow_half(float value) {
    const uint32_t sign = std::signbit(value) ? 0x8000u : 0;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7e00u;
    if (magnitude >= 65520.0f) return sign | 0x7c00u;  // half way past the largest rounds to infinity
    if (magnitude < 0x1p-14f) return sign | uint32_t(std::nearbyint(magnitude * 0x1p24f));
    const uint32_t bits = bits_as<uint32_t>(magnitude);
    return sign | ((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}

inline uint32_t narrow_bfloat(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    return std::isnan(value) ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace emulation

// Templates, so that the types need not be complete before the kernels define them.
template <class Row> float2 unpack(Row, unsigned word) {
    if constexpr (std::is_same_v<Row, Half>)
        return {emulation::widen_half(word & 0xffff), emulation::widen_half(word >> 16)};
    else
        return {bits_as<float>(word << 16), bits_as<float>(word & 0xffff0000u)};
}

template <class Row> unsigned pack(Row, float low, float high) {
    const auto narrow = std::is_same_v<Row, Half> ? emulation::narrow_half : emulation::narrow_bfloat;
    return narrow(low) | narrow(high) << 16;
}

template <class Word> void copy_async(Word* to, const void* from, bool there) {
    std::memset(to, 0xff, sizeof(Word));
    emulation::current->copies.back().push_back({to, from, sizeof(Word), there});
}

inline void commit_copies() { emulation::current->copies.emplace_back(); }

template <int Pending> void wait_copies() {
    auto& groups = emulation::current->copies;
    while (groups.size() > Pending + 1) {
        for (const emulation::Copy& copy : groups.front()) {
            if (copy.there) std::memcpy(copy.to, copy.from, copy.bytes);
            else std::memset(copy.to, 0, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}
