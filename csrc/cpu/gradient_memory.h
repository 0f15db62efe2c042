// Memory for large gradients.
//
// A fresh gradient of 131 MB costs 32 768 page faults, several times what computing it costs.  So the last buffer that torch
// released is cached for the next gradient, on huge pages.  The system may reclaim the pages of a large one whenever it needs them.
#pragma once
#include <cstddef>

namespace kcd::cpu {

// The smallest gradient that is handled here; malloc reuses smaller blocks by itself.
constexpr size_t kLargeBytes = size_t{1} << 20;

struct Buffer {
  void* data;
  size_t bytes;   // may exceed the requested size
};

// The environment variable KCD_GRADIENT_MEMORY, "kept" if unset.
// kept: as above.  fresh: a new buffer on huge pages each time.  torch: torch's allocator.
enum class Memory { kept, fresh, torch };
Memory gradient_memory();
const char* name_of(Memory memory);

Buffer take_buffer(size_t bytes);
void release_buffer(Buffer buffer);

}   // namespace kcd::cpu
