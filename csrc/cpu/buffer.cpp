#include "cpu/buffer.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace kcd::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// No more than what malloc itself would hold back; handing it to the system and taking it again costs 0.5 ms, which is much for
// gradients of this size.
constexpr size_t kStays = size_t{32} << 20;

Memory wanted() {
  const char* named = std::getenv("KCD_GRADIENT_MEMORY");
  if (!named || !*named) return Memory::kept;
  for (const Memory memory : {Memory::kept, Memory::fresh, Memory::torch})
    if (!std::strcmp(named, name_of(memory))) return memory;
  throw std::invalid_argument(std::string("KCD_GRADIENT_MEMORY must be kept, fresh or torch (or unset), got '") + named + "'");
}

// One buffer for the process.  Never destroyed: tensors are given up while the process ends, too.
struct GradientCache {
  std::mutex mutex;
  Buffer kept{nullptr, 0};
};
GradientCache& cache() {
  static GradientCache& only = *new GradientCache;
  return only;
}

}   // namespace

Memory gradient_memory() {
  static const Memory chosen = wanted();
  return chosen;
}

const char* name_of(Memory memory) { return memory == Memory::kept ? "kept" : memory == Memory::fresh ? "fresh" : "torch"; }

Buffer take_buffer(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(cache().mutex);
    Buffer& kept = cache().kept;
    if (kept.bytes >= bytes && kept.bytes / 2 <= bytes) return std::exchange(kept, {nullptr, 0});
  }
  const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* data = std::aligned_alloc(kHugePage, rounded);
  if (!data) throw std::bad_alloc();
  madvise(data, rounded, MADV_HUGEPAGE);
  return {data, rounded};
}

void release_buffer(Buffer buffer) {
  if (gradient_memory() == Memory::kept) {
    if (buffer.bytes > kStays) madvise(buffer.data, buffer.bytes, MADV_FREE);   // its pages stay until the system wants them
    const std::lock_guard<std::mutex> lock(cache().mutex);
    std::swap(buffer, cache().kept);
  }
  std::free(buffer.data);
}

}   // namespace kcd::cpu
