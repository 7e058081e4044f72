// A small pool of threads that share the jobs of one call. Jobs are claimed one by one, so that a thread that the system
// holds back holds up no more than the job it has.

#ifndef SLIMLM_POOL_H
#define SLIMLM_POOL_H

#include <cstdint>

namespace slimlm {

using Job = void (*)(void* context, int64_t job);

// Calls job(context, 0 .. jobs - 1), each once, on at most `threads` threads, the caller's among them; returns when all are
// done. Where another call is using the pool, the caller does all of them itself. std::bad_alloc, the only exception that a
// job may throw, is thrown on to the caller.
void share(int threads, int64_t jobs, Job job, void* context);

template <class F>
void share(int threads, int64_t jobs, F& body) {
    share(threads, jobs, [](void* f, int64_t job) { (*static_cast<F*>(f))(job); }, &body);
}

}  // namespace slimlm

#endif
