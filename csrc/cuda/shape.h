// How a launch maps rows and classes to blocks and threads.  All thresholds are here; docs/internals/cuda-kernels.md explains them.
#pragma once
#include <cstdint>

namespace kcd::cuda {

constexpr int kBlockThreads = 256;                      // at 80 registers a thread, three such blocks fill a multiprocessor
constexpr int kLargeBlockThreads = 3 * kBlockThreads;   // for many rows, which the last block ranks
constexpr int kMinRowThreads = 4;
constexpr int kChunksPerThread = 4;   // fewer are not worth a thread when the device is already full
constexpr int kMaxParts = 32;         // one warp merges the parts of a row
constexpr int64_t kLargeBlockRows = 8192;
constexpr int64_t kMaxRowsOneBlock = 65536;   // the most rows that one block ranks

struct LaunchShape {
  int block_threads;
  int row_threads;      // threads per row in a block: 4 to 32 lanes of a warp, or warps up to the block; a power of two
  int parts;            // blocks per row; more than 1 only if row_threads == block_threads
  int64_t row_blocks;   // grid size along the rows

  int rows_per_block() const { return block_threads / row_threads; }
};

// Returns how many blocks should share a row that fills a block.  Blocks run in waves of `block_slots`; a part costs its chunks
// plus a fixed overhead.  Of all numbers within 5 % of the shortest time, returns the smallest.
inline int choose_parts(int64_t rows, int64_t chunks, int64_t block_slots, int block_threads) {
  constexpr double kFixedCost = 2;   // start and end of a block, in chunks per thread
  const int64_t useful_parts = chunks / block_threads, max_parts = useful_parts < kMaxParts ? useful_parts : kMaxParts;
  const auto time = [&](int64_t parts) {
    const int64_t waves = (rows * parts + block_slots - 1) / block_slots;
    return static_cast<double>(waves) * (static_cast<double>(chunks) / static_cast<double>(parts * block_threads) + kFixedCost);
  };
  double least_time = time(1);
  for (int64_t parts = 2; parts <= max_parts; ++parts) least_time = time(parts) < least_time ? time(parts) : least_time;
  int parts = 1;
  while (time(parts) > 1.05 * least_time) ++parts;
  return parts;
}

// base_threads: kBlockThreads, except in tests.  many_registers: the kernel has no registers for a large block.
inline LaunchShape choose_shape(int64_t rows, int64_t classes, int num_sms, int base_threads, bool many_registers) {
  const int64_t chunks = classes / 8 + 1, block_slots = int64_t{num_sms} * 3;   // blocks that run at the same time
  int row_threads = kMinRowThreads;
  // Double the threads of a row while each has enough work, or while threads would otherwise be idle.
  while (row_threads < base_threads && row_threads < chunks &&
         (row_threads * kChunksPerThread < chunks || rows * row_threads < block_slots * base_threads))
    row_threads *= 2;
  // The last block ranks all rows, so many rows call for a large block.  It costs nothing if blocks process several rows anyway.
  const bool large_block = rows > kLargeBlockRows && row_threads < base_threads && !many_registers;
  const int block_threads = large_block ? 3 * base_threads : base_threads;
  const int parts = row_threads == block_threads ? choose_parts(rows, chunks, block_slots, base_threads) : 1;
  const int block_rows = block_threads / row_threads;
  return {block_threads, row_threads, parts, (rows + block_rows - 1) / block_rows};
}

}   // namespace kcd::cuda
