// How a launch lays rows and classes over blocks and threads.  All thresholds are here; docs/kernels.md has the reasoning.
#pragma once
#include <cstdint>

namespace kcd::cuda {

constexpr int kThreads = 256;                // of a block; three such blocks fill a multiprocessor at 80 registers a thread
constexpr int kManyThreads = 3 * kThreads;   // of a block where the last one has many rows to select from
constexpr int kFewestLanes = 4;              // of a row
constexpr int kOctetsAThread = 4;            // worth a thread where there are rows enough to fill the machine
constexpr int kMostParts = 32;               // of a row: one warp merges them
constexpr int64_t kManyRows = 8192;
constexpr int64_t kRowsOfOneBlock = 65536;   // the most that the last block selects from

struct Shape {
  int threads;          // of a block
  int row_threads;      // that share a row: 4 to 32 lanes of a warp, or whole warps up to the block; a power of two
  int parts;            // blocks that share a row; more than 1 only where row_threads == threads
  int64_t row_blocks;   // blocks side by side over the rows

  int block_rows() const { return threads / row_threads; }
};

// block_threads: kThreads but in tests.
inline Shape shape_of(int64_t rows, int64_t classes, int processors, int block_threads, bool wide_accumulator) {
  const int64_t octets = classes / 8 + 1;
  const int64_t enough = int64_t{processors} * 3 * block_threads;   // threads that keep a machine busy
  int row_threads = kFewestLanes;
  // A row gets more threads while it has work for them, or while threads would be idle otherwise.
  while (row_threads < block_threads && row_threads < octets &&
         (row_threads * kOctetsAThread < octets || rows * row_threads < enough))
    row_threads *= 2;
  // The last block's share, the selection, grows with the rows; where blocks hold several rows they may as well hold more.
  const bool many = rows > kManyRows && row_threads < block_threads && !wide_accumulator;
  const int threads = many ? 3 * block_threads : block_threads;
  int64_t parts = 1;
  if (row_threads == threads && rows > 0) {
    const int64_t wanted = (int64_t{processors} * 3 + rows - 1) / rows, useful = octets / (block_threads * kOctetsAThread);
    parts = wanted < useful ? wanted : useful;
    parts = parts < 1 ? 1 : parts > kMostParts ? kMostParts : parts;
  }
  const int block_rows = threads / row_threads;
  return {threads, row_threads, static_cast<int>(parts), (rows + block_rows - 1) / block_rows};
}

}   // namespace kcd::cuda
