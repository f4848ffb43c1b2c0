// Arrays aligned to cache lines and whole vectors.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace bestrq2 {

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

constexpr size_t kHugePage = size_t{1} << 21;

// Not initialised. Large arrays ask for huge pages: a fault for every 4 KB of memory that lives for one call is
// several milliseconds a call.
template <class T>
Buffer<T> allocate(int64_t count) {
  const size_t wanted = std::max<size_t>(static_cast<size_t>(count) * sizeof(T), 1);
  const size_t alignment = wanted >= kHugePage ? kHugePage : 64;
  const size_t bytes = (wanted + alignment - 1) / alignment * alignment;
  auto* pointer = static_cast<T*>(std::aligned_alloc(alignment, bytes));
  if (pointer == nullptr) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == kHugePage) madvise(pointer, bytes, MADV_HUGEPAGE);  // only advice: failure changes nothing
#endif
  return Buffer<T>(pointer);
}

}  // namespace bestrq2
