// Threads of a decoder: awake within a step, asleep between two.
//
// A job is cut into items, which whoever is there takes one by one from a counter. The caller works too, and waits for
// items that others have taken, never for a thread to arrive: one that has lost its core holds nothing up. So a process
// that was forked, in which the other threads are none, goes on by the caller alone.
//
// Who finds nothing to do looks again for some microseconds, which is as long as a job's successor takes to come, and
// then sleeps. A bounded wait costs neighbours on the same cores little, where OpenMP's threads may spin for good.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "step.h"

namespace {
inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Team final : public Workers {
  public:
    explicit Team(int seats) : Workers(seats), process_(getpid()) {
        try {
            for (int seat = 1; seat < seats; ++seat) threads_.emplace_back([this, seat] { serve(seat); });
        } catch (...) {  // as many as the system gives would be another promise
            close();
            throw;
        }
    }
    // A forked process has none of the threads: there a team must not be destroyed, but left.
    ~Team() { close(); }
    bool is_forked() const { return getpid() != process_; }

    // Between these two, whoever has nothing to do looks for it some time before it sleeps.
    void begin() { awake_.store(true, std::memory_order_relaxed); }
    void end() { awake_.store(false, std::memory_order_relaxed); }

    void run(int items, Task task, const void* data) override {
        if (items == 1 || seats == 1) {
            for (int i = 0; i < items; ++i) task(data, i, 0);
            return;
        }
        for (int first = 0; first < items; first += kMost) job(first, std::min(items - first, kMost), task, data);
    }

  private:
    static constexpr int kBits = 24, kMost = (1 << kBits) - (1 << 16);  // counters overshoot by a thread each
    static constexpr int kLooks = 1000, kWaits = 100;

    static bool has_items(uint64_t ticket) { return (ticket & ((1 << kBits) - 1)) < ticket >> kBits; }

    void job(int first, int items, Task task, const void* data) {
        task_ = task, data_ = data, first_ = first;
        left_.store(items, std::memory_order_relaxed);
        ticket_.store(uint64_t(items) << kBits);  // in one order with what follows and with what who falls asleep does
        if (asleep_.load() && !is_forked()) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
        while (work(0)) {}
        // Who has taken an item and not done it soon has lost its core, maybe to this thread.
        for (int looks = 0; left_.load(std::memory_order_acquire); ++looks)
            looks < kWaits ? pause() : std::this_thread::yield();
    }

    // One item, if there is one. It is there as long as the job is, whose fields hold still as long as it is not done.
    bool work(int seat) {
        if (!has_items(ticket_.load(std::memory_order_relaxed))) return false;
        const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
        if (!has_items(ticket)) return false;
        task_(data_, first_ + int(ticket & ((1 << kBits) - 1)), seat);
        left_.fetch_sub(1, std::memory_order_acq_rel);
        return true;
    }

    void serve(int seat) {
        for (int looks = 0; !closed_.load(std::memory_order_relaxed);) {
            if (work(seat)) looks = 0;
            else if (awake_.load(std::memory_order_relaxed) && looks++ < kLooks) pause();
            else sleep(), looks = 0;
        }
    }

    void sleep() {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [this] { return closed_.load() || has_items(ticket_.load()); });
        asleep_.fetch_sub(1);
    }

    void close() {
        closed_.store(true);
        { std::lock_guard<std::mutex> lock(mutex_); }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    const pid_t process_;
    Task task_ = nullptr;
    const void* data_ = nullptr;
    int first_ = 0;
    alignas(64) std::atomic<uint64_t> ticket_{0};  // items of the job, and how many of them are taken
    alignas(64) std::atomic<int> left_{0};         // items that are not done
    alignas(64) std::atomic<int> asleep_{0};
    std::atomic<bool> awake_{false}, closed_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
};
}  // namespace
