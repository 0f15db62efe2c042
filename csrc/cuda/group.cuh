// Cooperation between threads: the lanes of a warp that share a row, and the whole block.
#pragma once
#include "cuda/port.h"
#include "cuda/targets.cuh"
#include "math/row_stats.h"

namespace kcd::cuda {

constexpr unsigned kFullMask = 0xffffffffu;

// 2^n neighbouring lanes of a warp.
struct Group {
  unsigned mask;

  KCD_DEVICE_MEMBER int lanes() const { return __popc(mask); }

  // With a compile-time mask the vote takes fewer instructions.
  KCD_DEVICE_MEMBER bool any(bool x) const { return mask == kFullMask ? __any_sync(kFullMask, x) != 0 : __any_sync(mask, x) != 0; }

  // Every lane gets the same bits, because both partners of each exchange combine the same two numbers.
  template <class Real>
  KCD_DEVICE_MEMBER Real max(Real x) const {
    for (int distance = lanes() / 2; distance > 0; distance /= 2) x = max_number(x, __shfl_xor_sync(mask, x, distance));
    return x;
  }
  template <class Number>
  KCD_DEVICE_MEMBER Number sum(Number x) const {
    for (int distance = lanes() / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(mask, x, distance);
    return x;
  }
  template <class Real>
  KCD_DEVICE_MEMBER ClassSums<Real> sum(const ClassSums<Real>& x) const {
    return {x.max, sum(x.ones), sum(x.tail), sum(x.tail_1), sum(x.dot_1)};
  }

  // Merges the lanes' pieces into the sums of the row.
  template <class Real>
  KCD_DEVICE_MEMBER RowSums<Real> merge(const RowSums<Real>& piece, const Units<Real>& units) const {
    const RowSums<Real> x = rebase(piece, max(piece.student.max), max(piece.teacher.max), units);
    return {sum(x.student), sum(x.teacher), sum(x.cross)};
  }
  template <class Real>
  KCD_DEVICE_MEMBER RowSumsWithTargets<Real> merge(const RowSumsWithTargets<Real>& piece, const Units<Real>& units) const {
    const RowSumsWithTargets<Real> x = rebase(piece, max(piece.student.max), max(piece.teacher.max), units);
    return {{sum(x.student), sum(x.teacher), sum(x.cross)}, {sum(x.targets.mass), sum(x.targets.dot)}};
  }
};

KCD_DEVICE Group group_of(int thread, int lanes) {
  const unsigned first = lanes == kWarp ? kFullMask : (1u << lanes) - 1;
  return {first << (thread % kWarp / lanes * lanes)};
}

// The sums over no classes.
template <class Real>
KCD_DEVICE RowSums<Real> empty_sums() {
  const ClassSums<Real> none{-Limits<Real>::infinity(), 0, 0, 0, 0};
  return {none, none, 0};
}

// Returns the sum over the block to the threads of its first warp.  The block must consist of full warps.
template <class Number>
KCD_DEVICE Number sum_over_block(Number x) {
  SHARED(Number, warp_sums, kWarp);
  const Group warp{kFullMask};
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp.sum(x);
  __syncthreads();   // an earlier sum may still be read
  if (thread % kWarp == 0) warp_sums[thread / kWarp] = x;
  __syncthreads();
  return thread < kWarp ? warp.sum(thread < warps ? warp_sums[thread] : Number(0)) : Number(0);
}

// The rows that one block of a grid processes.
struct Slice {
  int64_t begin, end;
};
KCD_DEVICE Slice block_slice(int64_t rows) {
  const int64_t share = (rows + gridDim.x - 1) / gridDim.x, begin = share * blockIdx.x;
  return {begin < rows ? begin : rows, begin + share < rows ? begin + share : rows};
}

// Counts this block as arrived.  Returns true, to all its threads, in the last of `blocks` blocks.  That block sees all writes of
// the others.
KCD_DEVICE bool is_last_block(unsigned* arrived, unsigned blocks) {
  SHARED(bool, last, 1);
  __syncthreads();   // all threads of the block have written
  if (threadIdx.x == 0) {
    __threadfence();   // our writes become visible before our arrival
    last[0] = atomicAdd(arrived, 1u) == blocks - 1;
    __threadfence();   // the others' writes are read after their arrivals
  }
  __syncthreads();
  return last[0];
}

}   // namespace kcd::cuda
