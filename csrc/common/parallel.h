// Threads for the CPU kernels: torch's own OpenMP pool when one is loaded, plain threads otherwise.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace bestrq2 {

// Call task(index, thread) once for every index in [0, tasks), handing indices out in order to `threads` threads
// (thread < threads). Returns when all are done. The first exception of a task is rethrown here.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t index, int thread)>& task);

// Name of the pool in use: "openmp" (shared with torch) or "threads".
const char* thread_pool();

struct Phase {
  int64_t tasks;  // of each row
  std::function<void(int64_t row, int64_t index, int thread)> task;
};

// All tasks of all phases in one parallel loop. A task waits for the earlier phases of its own row, and for the first
// phase of row % leaders, not for a barrier: a thread that the system has taken off its core holds up one row, while
// the others go on. Tasks must not throw.
void parallel_phases(int64_t rows, int64_t leaders, const std::vector<Phase>& phases, int threads);

}  // namespace bestrq2
