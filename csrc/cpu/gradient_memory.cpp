#include "cpu/gradient_memory.h"

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
// Cached buffers up to this size are not offered to the system.  malloc would keep as much, and giving the pages up and getting
// them back takes 0.5 ms, which is long for a gradient of this size.
constexpr size_t kMaxResidentBytes = size_t{32} << 20;

Memory requested_memory() {
  const char* requested = std::getenv("KCD_GRADIENT_MEMORY");
  if (!requested || !*requested) return Memory::kept;
  for (const Memory memory : {Memory::kept, Memory::fresh, Memory::torch})
    if (!std::strcmp(requested, name_of(memory))) return memory;
  throw std::invalid_argument(std::string("KCD_GRADIENT_MEMORY must be kept, fresh or torch (or unset), got '") + requested + "'");
}

// One buffer per process.  Never destroyed: tensors may be released while the process exits.
struct GradientCache {
  std::mutex mutex;
  Buffer cached{nullptr, 0};
};
GradientCache& cache() {
  static GradientCache& instance = *new GradientCache;
  return instance;
}

}   // namespace

Memory gradient_memory() {
  static const Memory memory = requested_memory();
  return memory;
}

const char* name_of(Memory memory) { return memory == Memory::kept ? "kept" : memory == Memory::fresh ? "fresh" : "torch"; }

Buffer take_buffer(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(cache().mutex);
    Buffer& cached = cache().cached;
    if (cached.bytes >= bytes && cached.bytes / 2 <= bytes) return std::exchange(cached, {nullptr, 0});
  }
  const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* data = std::aligned_alloc(kHugePage, rounded);
  if (!data) throw std::bad_alloc();
  madvise(data, rounded, MADV_HUGEPAGE);
  return {data, rounded};
}

void release_buffer(Buffer buffer) {
  if (gradient_memory() == Memory::kept) {
    // The pages stay until the system needs them.
    if (buffer.bytes > kMaxResidentBytes) madvise(buffer.data, buffer.bytes, MADV_FREE);
    const std::lock_guard<std::mutex> lock(cache().mutex);
    std::swap(buffer, cache().cached);
  }
  std::free(buffer.data);
}

}   // namespace kcd::cpu
