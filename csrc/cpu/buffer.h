// Memory for large gradients.  A fresh one of 131 MB costs 32 768 page faults, several times what computing it costs; so the last
// one that torch gave up is kept for the next, on huge pages, and the system may take its pages back whenever it needs them.
#pragma once
#include <cstddef>

namespace kcd::cpu {

// From this size on: what is smaller malloc finds again by itself.
constexpr size_t kLargeBytes = size_t{1} << 20;

struct Buffer {
  void* data;
  size_t bytes;   // may be more than was asked for
};

// What the environment variable KCD_GRADIENT_MEMORY names, "kept" without it.  kept: as above; fresh: on huge pages, and none is
// kept; torch: torch's own allocator.
enum class Memory { kept, fresh, torch };
Memory gradient_memory();
const char* name_of(Memory memory);

Buffer take_buffer(size_t bytes);
void release_buffer(Buffer buffer);

}   // namespace kcd::cpu
