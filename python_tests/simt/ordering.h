// Declares to ThreadSanitizer what orders memory between CUDA threads.  Included only by simt.cpp; empty without SIMT_TSAN.
//
// A CUDA thread is a TSan fiber, and switching fibers orders nothing.  Happens-before comes only from release() and acquire() of a
// common Tag: at barriers, at __syncwarp, at the start and end of a launch, and at fences as in PTX and C++: a fence before an
// atomic, another thread's atomic on the same address after it, and a fence after that one.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

#ifdef SIMT_TSAN
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace simt {

#ifdef SIMT_TSAN
constexpr bool kFindRaces = true;

struct Tag {
  uint64_t word;   // only its address matters
};

inline void release(Tag* tag) { __tsan_release(tag); }
inline void acquire(Tag* tag) { __tsan_acquire(tag); }

// Static, because TSan would see an allocation as an access by the running CUDA thread.  Reuse may hide a race, not invent one.
inline Tag* new_tag() {
  static Tag tags[1 << 16];
  static unsigned next = 0;
  return &tags[next++ % (1 << 16)];
}

// Which fences a reader of an address may synchronise with.  A hash table that never allocates while threads run.
class Publications {
 public:
  void clear() {
    entries_.clear();
    entries_.reserve(kCapacity);   // allocate now, on the host; see new_tag
    std::fill(std::begin(newest_), std::end(newest_), kNone);
  }
  size_t count() const { return entries_.size(); }
  // Adding once is enough, because a later reader finds the first entry too.  A full table loses orderings: TSan reports too much.
  void add(const void* address, Tag* fence) {
    uint32_t& newest = newest_[bucket(address)];
    for (uint32_t i = newest; i != kNone; i = entries_[i].older)
      if (entries_[i].address == address && entries_[i].fence == fence) return;
    if (count() == kCapacity) return;
    entries_.push_back({address, fence, newest});
    newest = static_cast<uint32_t>(count() - 1);
  }
  void acquire_first(size_t count, const void* address) const {
    for (uint32_t i = newest_[bucket(address)]; i != kNone; i = entries_[i].older)
      if (i < count && entries_[i].address == address) acquire(entries_[i].fence);
  }

 private:
  struct Entry {
    const void* address;
    Tag* fence;
    uint32_t older;   // in the same bucket
  };
  static constexpr size_t kCapacity = 1 << 18, kBuckets = 1 << 14;
  static constexpr uint32_t kNone = 0xffffffff;
  static size_t bucket(const void* address) { return reinterpret_cast<uintptr_t>(address) / 4 % kBuckets; }

  std::vector<Entry> entries_;
  uint32_t newest_[kBuckets];
};

// The fences and atomics of one CUDA thread.
class FenceState {
 public:
  void fence(const Publications& publications) {
    for (unsigned i = 0; i < reads_; ++i) publications.acquire_first(read_[i].publications, read_[i].address);
    reads_ = 0;
    latest_fence_ = new_tag();
    release(latest_fence_);
  }

  void after_atomic(const void* address, Publications& publications) {
    remember_read(address, publications.count());
    if (latest_fence_) publications.add(address, latest_fence_);
  }

 private:
  static constexpr unsigned kRemembered = 16;   // addresses since the latest fence; the last one is replaced
  struct Read {
    const void* address;
    size_t publications;   // their count at the time: the atomic may have read from any of them
  };

  void remember_read(const void* address, size_t publications) {
    unsigned i = 0;
    while (i < reads_ && read_[i].address != address) ++i;
    if (i == kRemembered) --i;
    if (i == reads_) ++reads_;
    read_[i] = {address, publications};
  }

  Read read_[kRemembered];
  unsigned reads_ = 0;
  Tag* latest_fence_ = nullptr;
};

#else
constexpr bool kFindRaces = false;

struct Tag {};
inline void release(Tag*) {}
inline void acquire(Tag*) {}
inline Tag* new_tag() { return nullptr; }

struct Publications {
  void clear() {}
};
struct FenceState {
  void fence(const Publications&) {}
  void after_atomic(const void*, Publications&) {}
};
#endif

}   // namespace simt
