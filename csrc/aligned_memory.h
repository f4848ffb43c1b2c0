// Arrays aligned to cache lines and whole vectors.
#pragma once

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

// Not initialised.
template <class T>
Buffer<T> allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  auto* pointer = static_cast<T*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
  if (pointer == nullptr) throw std::bad_alloc();
  return Buffer<T>(pointer);
}

}  // namespace bestrq2
