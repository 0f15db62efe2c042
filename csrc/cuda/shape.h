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

// How many blocks should share a row whose threads are a whole block: all blocks take turns on the machine's places, and a part
// costs what its octets and its beginning and end do.  Of the layouts that take next to the least time the one of fewest parts.
inline int parts_of(int64_t rows, int64_t octets, int64_t places, int block_threads) {
  constexpr double kEnds = 2;   // a block's beginning and end, in octets a thread
  const int64_t useful = octets / block_threads, most = useful < kMostParts ? useful : kMostParts;
  const auto time = [&](int64_t parts) {
    const int64_t turns = (rows * parts + places - 1) / places;
    return static_cast<double>(turns) * (static_cast<double>(octets) / static_cast<double>(parts * block_threads) + kEnds);
  };
  double least = time(1);
  for (int64_t parts = 2; parts <= most; ++parts) least = time(parts) < least ? time(parts) : least;
  int parts = 1;
  while (time(parts) > 1.05 * least) ++parts;
  return parts;
}

// block_threads: kThreads but in tests.
inline Shape shape_of(int64_t rows, int64_t classes, int processors, int block_threads, bool wide_accumulator) {
  const int64_t octets = classes / 8 + 1, places = int64_t{processors} * 3;   // blocks that run at a time
  int row_threads = kFewestLanes;
  // A row gets more threads while it has work for them, or while threads would be idle otherwise.
  while (row_threads < block_threads && row_threads < octets &&
         (row_threads * kOctetsAThread < octets || rows * row_threads < places * block_threads))
    row_threads *= 2;
  // The last block's share, the selection, grows with the rows; where blocks hold several rows they may as well hold more.
  const bool many = rows > kManyRows && row_threads < block_threads && !wide_accumulator;
  const int threads = many ? 3 * block_threads : block_threads;
  const int parts = row_threads == threads ? parts_of(rows, octets, places, block_threads) : 1;
  const int block_rows = threads / row_threads;
  return {threads, row_threads, parts, (rows + block_rows - 1) / block_rows};
}

}   // namespace kcd::cuda
