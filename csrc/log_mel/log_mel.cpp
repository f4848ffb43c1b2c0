#include "log_mel/log_mel.h"

#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "log_mel/kernel.h"

namespace bestrq2 {
namespace {

constexpr int64_t kFramesPerTask = 64;  // about a hundred microseconds

const LogMelKernel& kernel() {
#ifdef BESTRQ2_X86
  if (best_isa() == Isa::avx512) return avx512::log_mel_kernel;
  if (best_isa() == Isa::avx2) return avx2::log_mel_kernel;
#endif
  return portable::log_mel_kernel;
}

}  // namespace

void log_mel(const LogMel& job) {
  const LogMelKernel& chosen = kernel();
  std::vector<int64_t> before(static_cast<size_t>(job.clips) + 1, 0);  // frames of the clips before each
  for (int64_t clip = 0; clip < job.clips; ++clip) {
    const int64_t count = std::min(job.counts[clip], job.frames);
    before[static_cast<size_t>(clip) + 1] = before[static_cast<size_t>(clip)] + count;
    std::fill(job.out + (clip * job.frames + count) * job.bands, job.out + (clip + 1) * job.frames * job.bands, 0.0f);
  }
  const int64_t frames = before.back(), tasks = (frames + kFramesPerTask - 1) / kFramesPerTask;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(job.threads, 1), std::max<int64_t>(tasks, 1)));
  std::vector<Buffer<char>> scratch;
  for (int thread = 0; thread < threads; ++thread) scratch.push_back(allocate<char>(chosen.scratch_size(job)));
  parallel_for(tasks, threads, [&](int64_t task, int thread) {
    const int64_t last = std::min((task + 1) * kFramesPerTask, frames);
    for (int64_t first = task * kFramesPerTask; first < last; first += chosen.lanes) {
      int64_t clips[kMostLanes], times[kMostLanes];
      for (int64_t lane = 0; lane < chosen.lanes; ++lane) {
        const int64_t frame = std::min(first + lane, last - 1);  // spare lanes repeat the last frame
        const auto next = std::upper_bound(before.begin(), before.end(), frame);
        clips[lane] = next - before.begin() - 1;
        times[lane] = frame - *(next - 1);
      }
      chosen.run(job, clips, times, scratch[static_cast<size_t>(thread)].get());
    }
  });
}

}  // namespace bestrq2
