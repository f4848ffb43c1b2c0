// Threads for the CPU kernels: torch's own OpenMP pool when one is loaded, plain threads otherwise.
#pragma once

#include <cstdint>
#include <functional>

namespace bestrq2 {

// Call task(index, thread) once for every index in [0, tasks), handing indices out in order to `threads` threads
// (thread < threads). Returns when all are done. The first exception of a task is rethrown here.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t index, int thread)>& task);

// Name of the pool in use: "openmp" (shared with torch) or "threads".
const char* thread_pool();

}  // namespace bestrq2
