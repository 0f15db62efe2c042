// Threads that work together: the lanes of a warp that share a row, and the whole block.
#pragma once
#include "cuda/port.h"
#include "math/row_stats.h"

namespace kcd::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

// 2^n neighbouring lanes of a warp.
struct Group {
  unsigned mask;

  KCD_DEVICE_MEMBER int lanes() const { return __popc(mask); }

  // A whole warp's vote takes fewer instructions where the compiler knows the mask.
  KCD_DEVICE_MEMBER bool any(bool x) const {
    return mask == kWholeWarp ? __any_sync(kWholeWarp, x) != 0 : __any_sync(mask, x) != 0;
  }

  // Every lane gets the same result: both partners of each exchange combine the same two numbers.
  template <class Real>
  KCD_DEVICE_MEMBER Real greatest(Real x) const {
    for (int distance = lanes() / 2; distance > 0; distance /= 2) x = greater_of(x, __shfl_xor_sync(mask, x, distance));
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

  // The sums of a whole, of which each lane holds a piece.
  template <class Real>
  KCD_DEVICE_MEMBER RowSums<Real> merge(const RowSums<Real>& piece, const Units<Real>& units) const {
    const RowSums<Real> x = rebase(piece, greatest(piece.student.max), greatest(piece.teacher.max), units);
    return {sum(x.student), sum(x.teacher), sum(x.cross)};
  }
};

KCD_DEVICE Group group_of(int thread, int lanes) {
  const unsigned first = lanes == kWarp ? kWholeWarp : (1u << lanes) - 1;
  return {first << (thread % kWarp / lanes * lanes)};
}

// What a lane without any classes holds.
template <class Real>
KCD_DEVICE RowSums<Real> no_sums() {
  const ClassSums<Real> none{-Limits<Real>::infinity(), 0, 0, 0, 0};
  return {none, none, 0};
}

// The sum over the block, for its first warp; threads of a block: whole warps.
template <class Number>
KCD_DEVICE Number sum_over_block(Number x) {
  SHARED(Number, of_warp, kWarp);
  const Group warp{kWholeWarp};
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp.sum(x);
  __syncthreads();   // a sum before this one may still be read
  if (thread % kWarp == 0) of_warp[thread / kWarp] = x;
  __syncthreads();
  return thread < kWarp ? warp.sum(thread < warps ? of_warp[thread] : Number(0)) : Number(0);
}

// The rows of one block of many.
struct Slice {
  int64_t begin, end;
};
KCD_DEVICE Slice slice_of(int64_t rows) {
  const int64_t share = (rows + gridDim.x - 1) / gridDim.x, begin = share * blockIdx.x;
  return {begin < rows ? begin : rows, begin + share < rows ? begin + share : rows};
}

// Whether this block is the last of `blocks` to come here, for all its threads; then it sees what all the others wrote before.
KCD_DEVICE bool is_last_block(unsigned* arrived, unsigned blocks) {
  SHARED(bool, last, 1);
  __syncthreads();   // the whole block has written
  if (threadIdx.x == 0) {
    __threadfence();   // what was written is visible before the arrival is
    last[0] = atomicAdd(arrived, 1u) == blocks - 1;
    __threadfence();   // what others wrote is read after their arrivals were
  }
  __syncthreads();
  return last[0];
}

}   // namespace kcd::cuda
