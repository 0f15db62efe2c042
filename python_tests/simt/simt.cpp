// The scheduler.  Compile this file with the flags of the kernels, but never with -fsanitize=thread; for ThreadSanitizer define
// SIMT_TSAN instead.  TSan must see the kernels' accesses, but not the scheduler's, which one fiber makes on behalf of all.
//
// For the same reason nothing here may allocate or free memory while a CUDA thread runs: TSan would attribute it to that thread.
#include "simt.h"

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "fiber.h"
#include "ordering.h"

namespace simt {
namespace {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024, kMaxBlockDepth = 64;
constexpr unsigned kMaxGridWidth = 0x7fffffff, kMaxGridHeight = 65535;
constexpr int kMaxResidentBlocks = 16;   // two mappings per thread; Linux allows a process about 65000
constexpr size_t kMaxStaticShared = 48 << 10, kMaxDynamicShared = 227 << 10;   // on every device; opt-in on the largest
constexpr size_t kSharedAlignment = 16;
constexpr int kPoison = 0xff;   // fills new shared memory: NaN as a float, -1 as an int

constexpr const char* kNames[] = {
    "__shfl_xor_sync",   "__shfl_down_sync",  "__shfl_up_sync",    "__shfl_sync",         "__any_sync",        "__all_sync",
    "__ballot_sync",     "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",   "__reduce_and_sync", "__reduce_or_sync",
    "__reduce_xor_sync", "__syncwarp",        "__syncthreads",     "__syncthreads_count", "__syncthreads_and", "__syncthreads_or"};

const char* name(Operation operation) { return kNames[static_cast<size_t>(operation)]; }
bool is_barrier(Operation operation) { return operation >= Operation::syncthreads; }

bool same(const Location& a, const Location& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// ---- the parts of a launch

struct Block;

struct Thread : Coordinates {
  Fiber fiber;
  Block* block;
  unsigned rank;   // index in the block
  char* stack;
  bool done;
  FenceState fences;
  Operation operation;   // where it waits, to report deadlocks; also the next two
  unsigned mask;
  Location location;
};

// The lanes of a warp in one collective.  Several groups are active at once if their masks are disjoint.
struct Group {
  Operation operation;
  Location location;
  unsigned mask, arrived, inside;   // inside: lanes that have not left yet
  bool complete;
  uint64_t value[kLanes];
  uint64_t result;
  Tag* tag;
};

struct Warp {
  unsigned lanes;                    // existing lanes
  unsigned open;                     // bit i: group[i] is active
  std::array<Group, kLanes> group;   // enough, because a lane is in one group at most
};

struct SharedArray {
  const void* key;
  void* data;
};

struct Block {
  unsigned threads, exited;
  std::vector<Thread> thread;
  std::vector<Warp> warp;

  unsigned waiting;   // at the barrier
  unsigned votes;
  Operation operation;
  Location location;
  int result;
  Tag *barrier, *start;

  std::array<SharedArray, 64> array;
  size_t arrays, static_bytes, dynamic_bytes;
  void* dynamic;
  char* arena;   // memory of the static arrays, under TSan
};

struct LaunchSize {
  dim3 grid, block;
  size_t shared_bytes;
  uint64_t blocks;
  unsigned threads;
};

// ---- which thread runs next

class Schedule {
 public:
  void configure(Order order, unsigned seed, int resident_blocks) {
    order_ = order;
    random_ = seed * 2654435761u | 1u;   // must not be 0
    // In the other orders a block runs to its end before the next one starts.
    resident_blocks_ = order == Order::random ? std::clamp(resident_blocks, 1, kMaxResidentBlocks) : 1;
  }

  size_t resident_blocks() const { return resident_blocks_; }
  bool wants_preemption() { return order_ == Order::random && random(4) == 0; }

  void begin(uint64_t blocks, unsigned threads) {
    ready_.clear();
    ready_.reserve(resident_blocks_ * threads);
    blocks_ = blocks;
    started_ = 0;
    permutation_.clear();
    if (order_ == Order::random) permute();
  }

  bool has_block() const { return started_ < blocks_; }
  uint64_t next_block() {
    const uint64_t i = started_++;
    return order_ == Order::forward ? i : order_ == Order::reverse ? blocks_ - 1 - i : permutation_[i];
  }

  void push(Thread* thread) { ready_.push_back(thread); }
  void push_all(Thread* first, unsigned count, unsigned mask = ~0u) {   // mask: selects lanes, if the threads are a warp
    for (unsigned i = 0; i < count; ++i) {
      const unsigned at = order_ == Order::reverse ? i : count - 1 - i;   // the last one pushed runs first
      if (count > kLanes || (mask >> at) & 1) ready_.push_back(first + at);
    }
  }
  Thread* pop() {
    if (ready_.empty()) return nullptr;
    if (order_ == Order::random) std::swap(ready_[random(ready_.size())], ready_.back());
    Thread* const thread = ready_.back();
    ready_.pop_back();
    return thread;
  }

 private:
  unsigned random(size_t below) {   // xorshift
    random_ ^= random_ << 13;
    random_ ^= random_ >> 17;
    random_ ^= random_ << 5;
    return random_ % static_cast<unsigned>(below);
  }

  void permute() {
    permutation_.resize(blocks_);
    for (uint64_t i = 0; i < blocks_; ++i) permutation_[i] = static_cast<unsigned>(i);
    for (uint64_t i = blocks_; i > 1; --i) std::swap(permutation_[i - 1], permutation_[random(i)]);
  }

  Order order_ = Order::forward;
  unsigned random_ = 1;
  size_t resident_blocks_ = 1;
  std::vector<Thread*> ready_;
  uint64_t blocks_ = 0, started_ = 0;
  std::vector<unsigned> permutation_;
};

// ---- the state: one launch at a time

struct Simulator {
  std::mutex mutex;
  Schedule schedule;
  StackPool stacks;
  std::vector<std::unique_ptr<Block>> idle;   // reused, with the memory of their vectors

  Fiber host;
  void (*run_thread)(void*) = nullptr;
  void* argument = nullptr;
  std::vector<std::unique_ptr<Block>> resident, finished;
  Publications publications;
  Tag end;
  bool failed = false;
  char failure[1024] = "";   // written by a CUDA thread, which must not allocate
  std::string error;
};

Simulator& simulator = *new Simulator;   // never destroyed, because threads may outlive main()

Thread& self() {
  if (!current) outside_kernel();
  return static_cast<Thread&>(*current);
}

// ---- switching fibers, on a CUDA thread

void switch_to(Thread* next, Fiber::Exit exit_kind) {   // null: the host
  Thread& thread = self();
  if (next == &thread) return;
  current = next;
  thread.fiber.switch_to(next ? next->fiber : simulator.host, exit_kind);
}

void run_next() { switch_to(simulator.schedule.pop(), Fiber::Exit::suspend); }

void wait(Operation operation, unsigned mask, Location location) {
  Thread& thread = self();
  thread.operation = operation;
  thread.mask = mask;
  thread.location = location;
  run_next();
}

void preempt() {
  if (!simulator.schedule.wants_preemption()) return;
  simulator.schedule.push(&self());
  run_next();
}

void thread_entry() {
  Fiber::entered(simulator.host);
  Thread& thread = self();
  acquire(thread.block->start);
  simulator.run_thread(simulator.argument);
  release(&simulator.end);
  thread.done = true;
  const bool last = ++thread.block->exited == thread.block->threads;
  switch_to(last ? nullptr : simulator.schedule.pop(), Fiber::Exit::finish);
}

// ---- blocks, on the host

void* fresh_shared(size_t bytes) {
  void* const data = std::malloc(bytes);   // a separate allocation, so that AddressSanitizer detects overruns
  if (!data) throw std::bad_alloc();
  return std::memset(data, kPoison, bytes);
}

void start_thread(Block& block, unsigned rank, const LaunchSize& launch, uint64_t index) {
  Thread& thread = block.thread[rank];
  const dim3 &size = launch.block, &grid = launch.grid;
  thread.thread_index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
  thread.block_index = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                        static_cast<unsigned>(index / grid.x / grid.y)};
  thread.block_size = size;
  thread.grid_size = grid;
  thread.block = &block;
  thread.rank = rank;
  thread.done = false;
  thread.fences = {};
  thread.stack = simulator.stacks.take();
  char name[64] = "";
  if (kFindRaces) std::snprintf(name, sizeof name, "block %llu thread %u", static_cast<unsigned long long>(index), rank);
  thread.fiber.prepare(thread.stack, thread_entry, name);
}

void start_block(const LaunchSize& size, uint64_t index) {
  if (simulator.idle.empty()) simulator.idle.push_back(std::make_unique<Block>());
  Block& block = *simulator.resident.emplace_back(std::move(simulator.idle.back()));
  simulator.idle.pop_back();
  block.threads = size.threads;
  block.thread.resize(std::max<size_t>(block.thread.size(), size.threads));
  block.warp.resize(std::max<size_t>(block.warp.size(), (size.threads + kLanes - 1) / kLanes));
  for (Warp& warp : block.warp) warp.lanes = warp.open = 0;
  block.exited = block.waiting = 0;
  block.barrier = new_tag();
  block.start = new_tag();
  block.arrays = block.static_bytes = 0;
  block.dynamic_bytes = size.shared_bytes;
  block.dynamic = fresh_shared(size.shared_bytes);
  block.arena = kFindRaces ? static_cast<char*>(fresh_shared(kMaxStaticShared)) : nullptr;
  for (unsigned rank = 0; rank < size.threads; ++rank) {
    block.warp[rank / kLanes].lanes |= 1u << (rank % kLanes);
    start_thread(block, rank, size, index);
  }
  release(block.start);
  simulator.schedule.push_all(block.thread.data(), size.threads);
}

void drop_block(std::unique_ptr<Block> block) {
  for (unsigned rank = 0; rank < block->threads; ++rank) {
    Thread& thread = block->thread[rank];
    thread.fiber.forget();
    if (thread.stack) simulator.stacks.release_stack(thread.stack);
  }
  if (!kFindRaces)
    for (size_t i = 0; i < block->arrays; ++i) std::free(block->array[i].data);
  std::free(block->arena);
  std::free(block->dynamic);
  simulator.idle.push_back(std::move(block));
}

void drop_all(std::vector<std::unique_ptr<Block>>& blocks) {
  for (auto& block : blocks) drop_block(std::move(block));
  blocks.clear();
}

void retire_blocks() {
  for (size_t i = simulator.resident.size(); i-- > 0;) {
    std::unique_ptr<Block>& block = simulator.resident[i];
    if (block->exited < block->threads) continue;
    if (kFindRaces) {
      // Keep it until the launch ends: reused memory would look like a race, and a reused fiber would hide one.
      simulator.finished.push_back(std::move(block));
    } else {
      drop_block(std::move(block));
    }
    simulator.resident.erase(simulator.resident.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

// TSan's runtime supports some thousand fibers, and the kernel some ten thousand mappings.
void limit_finished_fibers() {
  if (!kFindRaces || simulator.finished.empty()) return;
  Block& latest = *simulator.finished.back();
  if (simulator.finished.size() * latest.threads <= 2048) return;
  for (unsigned rank = 0; rank < latest.threads; ++rank) {
    Thread& thread = latest.thread[rank];
    thread.fiber.forget();
    if (thread.stack) StackPool::unmap(thread.stack);
    thread.stack = nullptr;
  }
}

// ---- launches, on the host

std::string describe(const Thread& thread) {
  if (thread.done) return "exited";
  char text[512];
  if (is_barrier(thread.operation))
    std::snprintf(text, sizeof text, "wait at %s (%s:%d)", name(thread.operation), thread.location.file, thread.location.line);
  else
    std::snprintf(text, sizeof text, "wait at %s mask %08x (%s:%d)", name(thread.operation), thread.mask, thread.location.file,
                  thread.location.line);
  return text;
}

std::string describe_deadlock() {
  std::string report = "deadlock: threads wait for threads that never come";
  for (const auto& block : simulator.resident) {
    for (unsigned first = 0, end; first < block->threads; first = end) {
      const std::string place = describe(block->thread[first]);
      for (end = first + 1; end < block->threads && describe(block->thread[end]) == place;) ++end;
      const uint3 index = block->thread[first].block_index;
      char threads[128];
      std::snprintf(threads, sizeof threads, "\n  block (%u,%u,%u) threads %u..%u ", index.x, index.y, index.z, first, end - 1);
      report += threads + place;
    }
  }
  return report;
}

bool is_valid(const LaunchSize& size) {
  const dim3 &grid = size.grid, &block = size.block;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y;   // times z could overflow
  return block.x && block.y && block.z && block.z <= kMaxBlockDepth && threads <= kMaxThreads && threads * block.z <= kMaxThreads &&
         grid.x && grid.y && grid.z && grid.x <= kMaxGridWidth && grid.y <= kMaxGridHeight && grid.z <= kMaxGridHeight &&
         size.shared_bytes <= kMaxDynamicShared;
}

void run_blocks(const LaunchSize& size) {
  while (true) {
    while (simulator.schedule.has_block() && simulator.resident.size() < simulator.schedule.resident_blocks())
      start_block(size, simulator.schedule.next_block());
    if (simulator.resident.empty()) return;
    Thread* const next = simulator.schedule.pop();
    if (!next) {
      simulator.error = describe_deadlock();
      return;
    }
    current = next;
    simulator.host.switch_to(next->fiber, Fiber::Exit::suspend);
    if (simulator.failed) return;
    retire_blocks();
    limit_finished_fibers();
  }
}

// After a failed launch.
void abandon_unfinished_threads() {
  for (auto& block : simulator.resident) {
    for (unsigned rank = 0; rank < block->threads; ++rank) {
      Thread& thread = block->thread[rank];
      if (!thread.done) thread.fiber.abandon(simulator.host, [&] { release(&simulator.end); });
    }
  }
}

void note_limit_of_tsan(uint64_t threads) {
  static bool noted = false;
  if (!kFindRaces || noted || threads <= 250) return;
  noted = true;
  std::fprintf(stderr, "simt: %llu CUDA threads: above 250 ThreadSanitizer may miss races between blocks\n",
               static_cast<unsigned long long>(threads));
}

// ---- collectives, on a CUDA thread

uint64_t combine(const Group& group) {
  if (group.operation == Operation::ballot || group.operation == Operation::any || group.operation == Operation::all) {
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane)
      if ((group.mask >> lane) & 1) votes |= group.value[lane] << lane;
    return group.operation == Operation::ballot ? votes : group.operation == Operation::any ? votes != 0 : votes == group.mask;
  }
  const unsigned first = static_cast<unsigned>(__builtin_ctz(group.mask));
  unsigned result = static_cast<unsigned>(group.value[first]);
  for (unsigned lane = first + 1; lane < kLanes; ++lane) {
    if (!((group.mask >> lane) & 1)) continue;
    const unsigned value = static_cast<unsigned>(group.value[lane]);
    switch (group.operation) {
      case Operation::reduce_add:
        result += value;
        break;
      case Operation::reduce_min:
        result = std::min(result, value);
        break;
      case Operation::reduce_max:
        result = std::max(result, value);
        break;
      case Operation::reduce_and:
        result &= value;
        break;
      case Operation::reduce_or:
        result |= value;
        break;
      case Operation::reduce_xor:
        result ^= value;
        break;
      default:
        return 0;   // shuffles and __syncwarp have no result
    }
  }
  return result;
}

Group& find_or_open(Warp& warp, Operation operation, unsigned mask, Location location) {
  for (unsigned open = warp.open; open; open &= open - 1) {
    Group& group = warp.group[static_cast<unsigned>(__builtin_ctz(open))];
    if (!group.complete && group.operation == operation && group.mask == mask && same(group.location, location)) return group;
  }
  const unsigned free = static_cast<unsigned>(__builtin_ctz(~warp.open));
  warp.open |= 1u << free;
  Group& group = warp.group[free];
  group.operation = operation;
  group.location = location;
  group.mask = mask;
  group.arrived = 0;
  group.complete = false;
  group.tag = new_tag();
  return group;
}

void check_mask(const Warp& warp, Operation operation, unsigned mask, unsigned lane, int source, Location location) {
  const char* const what = name(operation);
  if (!((mask >> lane) & 1))
    fail("%s at %s:%d: mask %08x lacks the calling lane %u", what, location.file, location.line, mask, lane);
  if (mask & ~warp.lanes)
    fail("%s at %s:%d: mask %08x names lanes that do not exist (warp has %08x)", what, location.file, location.line, mask,
         warp.lanes);
  if (source >= 0 && !((mask >> source) & 1))
    fail("%s at %s:%d: lane %u reads lane %d, not in mask %08x", what, location.file, location.line, lane, source, mask);
}

}   // namespace

// ---- functions of simt.h

__thread Coordinates* current = nullptr;

void configure(Order order, unsigned seed, int resident_blocks) {
  const std::lock_guard lock(simulator.mutex);
  simulator.schedule.configure(order, seed, resident_blocks);
}

const char* last_error() { return simulator.error.c_str(); }

void outside_kernel() { throw std::logic_error("a function of CUDA threads was called outside a kernel"); }

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char* const text = simulator.failure;
  const size_t room = sizeof simulator.failure;
  std::vsnprintf(text, room, format, arguments);
  va_end(arguments);
  if (!current) throw std::logic_error(text);

  Thread& thread = self();
  const uint3 index = thread.block_index;
  const size_t length = std::strlen(text);
  std::snprintf(text + length, room - length, " [block (%u,%u,%u) thread %u]", index.x, index.y, index.z, thread.rank);
  simulator.failed = true;
  thread.done = true;
  release(&simulator.end);
  switch_to(nullptr, Fiber::Exit::finish);
  std::abort();   // not reached: no fiber switches back
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, void (*run_thread)(void*), void* argument) {
  if (current) fail("launch inside a kernel");
  const std::lock_guard lock(simulator.mutex);
  simulator.error.clear();
  LaunchSize size{grid, block, shared_bytes, static_cast<uint64_t>(grid.x) * grid.y * grid.z, block.x * block.y * block.z};
  if (!is_valid(size)) {
    char text[256];
    std::snprintf(text, sizeof text,
                  "launch of grid (%u,%u,%u) block (%u,%u,%u) with %zu bytes of shared memory: beyond a device's limits", grid.x,
                  grid.y, grid.z, block.x, block.y, block.z, shared_bytes);
    simulator.error = text;
    return cudaErrorInvalidConfiguration;
  }
  note_limit_of_tsan(size.blocks * size.threads);
  simulator.run_thread = run_thread;
  simulator.argument = argument;
  simulator.failed = false;
  simulator.host.adopt_host();
  simulator.publications.clear();
  simulator.schedule.begin(size.blocks, size.threads);
  run_blocks(size);
  abandon_unfinished_threads();
  acquire(&simulator.end);   // before reading their error and freeing their memory
  if (simulator.failed) simulator.error = simulator.failure;
  drop_all(simulator.resident);
  drop_all(simulator.finished);
  return simulator.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

int barrier(Operation operation, bool predicate, Location location) {
  Block& block = *self().block;
  if (block.waiting == 0) {
    block.operation = operation;
    block.location = location;
    block.votes = 0;
  } else if (operation != block.operation || !same(location, block.location)) {
    fail("divergent barrier: this thread is at %s (%s:%d), others at %s (%s:%d)", name(operation), location.file, location.line,
         name(block.operation), block.location.file, block.location.line);
  }
  Tag* const tag = block.barrier;
  release(tag);
  block.votes += predicate;
  if (++block.waiting == block.threads) {
    block.result = static_cast<int>(operation == Operation::syncthreads_count ? block.votes
                                    : operation == Operation::syncthreads_and ? block.votes == block.threads
                                                                              : block.votes != 0);
    block.waiting = 0;
    block.barrier = new_tag();
    simulator.schedule.push_all(block.thread.data(), block.threads);
    run_next();
  } else {
    wait(operation, 0, location);
  }
  acquire(tag);
  return block.result;   // still valid: no thread can pass the next barrier before this one returns
}

int source_lane(Operation operation, unsigned argument, int width, Location location) {
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0)
    fail("%s at %s:%d: width %d is not a power of two up to 32", name(operation), location.file, location.line, width);
  const int lane = static_cast<int>(self().rank % kLanes), first = lane & ~(width - 1), last = first + width - 1;
  const int distance = static_cast<int>(argument % kLanes);   // the device uses five bits
  switch (operation) {
    case Operation::shuffle_xor:
      return (lane ^ distance) > last ? lane : lane ^ distance;
    case Operation::shuffle_down:
      return lane + distance > last ? lane : lane + distance;
    case Operation::shuffle_up:
      return lane - distance < first ? lane : lane - distance;
    default:
      return first + (distance & (width - 1));
  }
}

uint64_t collective(Operation operation, unsigned mask, uint64_t value, int source, Location location) {
  Thread& thread = self();
  Warp& warp = thread.block->warp[thread.rank / kLanes];
  const unsigned lane = thread.rank % kLanes;
  check_mask(warp, operation, mask, lane, source, location);
  Group& group = find_or_open(warp, operation, mask, location);
  const bool orders_memory = operation == Operation::syncwarp;   // shuffles and votes do not
  if (orders_memory) release(group.tag);
  group.arrived |= 1u << lane;
  group.value[lane] = value;
  if (group.arrived == mask) {
    group.complete = true;
    group.inside = mask;
    group.result = combine(group);
    simulator.schedule.push_all(&thread - lane, kLanes, mask);
    run_next();
  } else {
    wait(operation, mask, location);
  }
  if (orders_memory) acquire(group.tag);
  const uint64_t result = source >= 0 ? group.value[source] : group.result;
  group.inside &= ~(1u << lane);
  if (group.inside == 0) warp.open &= ~(1u << static_cast<unsigned>(&group - warp.group.data()));
  return result;
}

void* dynamic_shared() { return self().block->dynamic; }

void* static_shared(const void* key, size_t bytes) {
  Block& block = *self().block;
  for (size_t i = 0; i < block.arrays; ++i)
    if (block.array[i].key == key) return block.array[i].data;
  const size_t begin = (block.static_bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment, end = begin + bytes;
  if (end > kMaxStaticShared || block.arrays == block.array.size())
    fail("more than 48 KiB, or %zu arrays, of static shared memory", block.array.size());
  if (end + block.dynamic_bytes > kMaxDynamicShared) fail("more than 227 KiB of shared memory, static and dynamic");
  block.static_bytes = end;
  void* const data = kFindRaces ? block.arena + begin : fresh_shared(bytes);
  block.array[block.arrays++] = {key, data};
  return data;
}

void fence() {
  preempt();
  self().fences.fence(simulator.publications);
}

void before_atomic() { preempt(); }
void after_atomic(const void* address) { self().fences.after_atomic(address, simulator.publications); }

}   // namespace simt

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return simt::last_error();
    default:
      return "unknown error";
  }
}
