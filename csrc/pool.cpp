#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace slimlm {
namespace {

constexpr int kMostThreads = 256;
// Some hundreds of microseconds: longer than the gap between two calls of one step of decoding, shorter than anyone notices.
constexpr int kSpins = 20000;

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
public:
    // False where a job ran out of memory.
    bool run(int threads, int64_t jobs, Job job, void* context) {
        grow(threads - 1);
        job_ = job;
        context_ = context;
        jobs_ = jobs;
        helpers_ = threads - 1;
        next_.store(0);
        open_.store(true);
        epoch_.fetch_add(1);
        if (sleeping_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
        claim();
        open_.store(false);
        // A thread that is inside may still be at a job; one that comes later finds the call closed.
        int spins = 0;
        while (inside_.load() > 0 && ++spins < kSpins) relax();
        if (inside_.load() > 0) {
            // The system holds that thread back: to spin on would keep a processor from it.
            std::unique_lock<std::mutex> lock(mutex_);
            waiting_.store(true);
            left_.wait(lock, [&] { return inside_.load() == 0; });
            waiting_.store(false);
        }
        return !failed_.exchange(false);
    }

    std::atomic_flag busy = ATOMIC_FLAG_INIT;

private:
    void claim() {
        // No exception may leave a thread of ours, nor the caller's part while others are still at theirs.
        try {
            for (int64_t i = next_.fetch_add(1); i < jobs_; i = next_.fetch_add(1)) job_(context_, i);
        } catch (const std::bad_alloc&) {
            failed_.store(true);
        }
    }

    void grow(int wanted) {
        while (count_ < wanted && count_ < kMostThreads) {
            try {
                std::thread(&Pool::serve, this, count_).detach();
            } catch (const std::exception&) {
                return;  // the system gives no more threads or memory; those there are, and the caller, do the work
            }
            ++count_;
        }
    }

    void serve(int index) {
        uint64_t seen = 0;
        for (;;) {
            int spins = 0;
            while (epoch_.load() == seen && ++spins < kSpins) relax();
            if (epoch_.load() == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, [&] { return epoch_.load() != seen; });
                sleeping_.fetch_sub(1);
            }
            seen = epoch_.load();
            inside_.fetch_add(1);
            if (open_.load() && index < helpers_) claim();
            if (inside_.fetch_sub(1) == 1 && waiting_.load()) {
                { std::lock_guard<std::mutex> lock(mutex_); }
                left_.notify_one();
            }
        }
    }

    Job job_ = nullptr;
    void* context_ = nullptr;
    int64_t jobs_ = 0;
    int helpers_ = 0;
    int count_ = 0;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<uint64_t> epoch_{0};
    alignas(64) std::atomic<int> inside_{0};
    std::atomic<bool> open_{false}, failed_{false}, waiting_{false};
    std::atomic<int> sleeping_{0};
    std::mutex mutex_;
    std::condition_variable wake_, left_;
};

std::atomic<Pool*> pool{nullptr};

// Never destroyed: its threads may outlive static destructors.
Pool* the_pool() {
    Pool* found = pool.load();
    if (found) return found;
    auto* made = new Pool;
    if (!pool.compare_exchange_strong(found, made)) {
        delete made;
        return found;
    }
#if !defined(_WIN32)
    // A forked child has none of the threads; it starts with a new pool.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    (void)registered;
#endif
    return made;
}

}  // namespace

void share(int threads, int64_t jobs, Job job, void* context) {
    if (threads > 1 && jobs > 1) {
        Pool* shared = the_pool();
        if (!shared->busy.test_and_set()) {
            const bool done = shared->run(threads < kMostThreads ? threads : kMostThreads, jobs, job, context);
            shared->busy.clear();
            if (!done) throw std::bad_alloc();
            return;
        }
    }
    for (int64_t i = 0; i < jobs; ++i) job(context, i);
}

}  // namespace slimlm
