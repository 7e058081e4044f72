// Calls the pool from several threads at once, with changing numbers of jobs and threads, and from forked processes; every
// job must run once, and what it wrote must be seen. For ThreadSanitizer, which cannot look into a Python process:
//
//     c++ -std=c++17 -g -O1 -fsanitize=thread -pthread csrc/check/pool.cpp csrc/pool.cpp -o pool
//     TSAN_OPTIONS=die_after_fork=0 ./pool

#include "../pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <new>
#include <thread>
#include <vector>

namespace {

// How many of many calls went wrong.
int calls(int rounds) {
    int wrong = 0;
    for (int round = 0; round < rounds; ++round) {
        const int jobs = 1 + round * 7 % 40, threads = 1 + round % 5;
        std::vector<int> done(size_t(jobs), 0);  // not atomic: a sanitizer sees where two threads touch one
        auto body = [&](int64_t job) { done[size_t(job)] += int(job) + round + 1; };
        slimlm::share(threads, jobs, body);
        for (int job = 0; job < jobs; ++job) wrong += done[size_t(job)] != job + round + 1;
    }
    return wrong;
}

int failures(int rounds) {
    int wrong = 0;
    for (int round = 0; round < rounds; ++round) {
        auto body = [&](int64_t job) { if (job % 16 == round % 16) throw std::bad_alloc(); };
        try {
            slimlm::share(3, 32, body);
            ++wrong;
        } catch (const std::bad_alloc&) {
        }
    }
    return wrong;
}

}  // namespace

int main() {
    int wrong = calls(2000) + failures(200) + calls(200);
    std::vector<int> of_thread(4, 0);
    std::vector<std::thread> threads;
    for (int& count : of_thread) threads.emplace_back([&count] { count = calls(1000); });
    for (std::thread& thread : threads) thread.join();
    for (int count : of_thread) wrong += count;
    for (int i = 0; i < 5; ++i) {
        const pid_t child = fork();
        if (child == 0) _exit(calls(100) != 0);
        int status = 1;
        waitpid(child, &status, 0);
        wrong += status != 0;
    }
    std::printf("%d wrong\n", wrong);
    return wrong != 0;
}
