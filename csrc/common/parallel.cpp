// Loops on the threads of torch's OpenMP pool.
#include "common/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace bestrq2 {
namespace {

// The entry point that libgomp, and LLVM's and Intel's runtimes for compatibility, export for `#pragma omp parallel`.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Looked up at run time, never linked: torch brings its own copy of the OpenMP runtime, and a second copy would start a
// second pool of threads that competes with the first for the same cores.
ParallelRegion openmp() {
  static const auto entry = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
}

struct Work {
  int64_t tasks;
  const std::function<void(int64_t, int)>& task;
  std::atomic<int64_t> next{0};
  std::atomic<int> started{0};
  std::mutex mutex;
  std::exception_ptr error;

  Work(int64_t tasks, const std::function<void(int64_t, int)>& task) : tasks(tasks), task(task) {}

  void run() {
    const int thread = started.fetch_add(1);
    try {
      for (int64_t index; (index = next.fetch_add(1)) < tasks;) task(index, thread);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
      next = tasks;
    }
  }
};

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t, int)>& task) {
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), tasks));
  Work work(tasks, task);
  if (threads <= 1) {
    work.run();
  } else if (openmp() != nullptr) {
    openmp()([](void* data) { static_cast<Work*>(data)->run(); }, &work, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> pool;
    pool.reserve(static_cast<size_t>(threads) - 1);
    try {
      for (int i = 1; i < threads; ++i) pool.emplace_back([&work] { work.run(); });
    } catch (const std::system_error&) {  // no further thread: those that run do all of the work
    }
    work.run();
    for (auto& thread : pool) thread.join();
  }
  if (work.error) std::rethrow_exception(work.error);
}

void parallel_phases(int64_t rows, int64_t leaders, const std::vector<Phase>& phases, int threads) {
  if (rows == 0) return;
  std::vector<std::atomic<int64_t>> done(phases.size() * static_cast<size_t>(rows));  // tasks of each phase and row
  const auto counter = [&](size_t phase, int64_t row) -> auto& { return done[phase * rows + row]; };
  const auto wait = [&](size_t phase, int64_t row) {
    while (counter(phase, row).load(std::memory_order_acquire) < phases[phase].tasks) std::this_thread::yield();
  };
  int64_t count = 0;
  for (const Phase& phase : phases) count += phase.tasks * rows;
  // Tasks begin in order and need only tasks before them, so that some thread can always go on.
  parallel_for(count, threads, [&](int64_t number, int thread) {
    size_t phase = 0;
    for (; number >= phases[phase].tasks * rows; ++phase) number -= phases[phase].tasks * rows;
    const int64_t row = number / phases[phase].tasks;
    for (size_t earlier = 0; earlier < phase; ++earlier) wait(earlier, row);
    if (phase > 0) wait(0, row % leaders);
    phases[phase].task(row, number % phases[phase].tasks, thread);
    counter(phase, row).fetch_add(1, std::memory_order_acq_rel);
  });
}

const char* thread_pool() { return openmp() != nullptr ? "openmp" : "threads"; }

}  // namespace bestrq2
