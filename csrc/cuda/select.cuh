// The k candidates of greatest value by radix selection: the k-th greatest key is found eight bits at a time, from the top.
//
// One block does it where the rows are few; above, each digit takes one launch of many blocks, each of which counts a slice of the
// rows, and another launch marks what is selected.  Counts are integers, so that the order of their additions does not matter.
#pragma once
#include "cuda/group.cuh"
#include "cuda/shape.h"
#include "math/loss.h"
#include "math/order_key.h"

namespace kcd::cuda {

constexpr int kDigits = 256;

// What rows are ranked by.
struct Ranking {
  const void* value;   // float32 or float64
  bool is_double;
  const uint8_t* candidate;   // bool, one a row
  int64_t rows;

  // Keys of float32 lie in the upper half, so that both types are told apart by the number of digits alone; 0: no candidate.
  KCD_DEVICE_MEMBER uint64_t key(int64_t i) const {
    if (!candidate[i]) return 0;
    return is_double ? order_key(static_cast<const double*>(value)[i])
                     : static_cast<uint64_t>(order_key(static_cast<const float*>(value)[i])) << 32;
  }
  KCD_MEMBER int digits() const { return is_double ? 8 : 4; }
};

// The rows whose key is above `key` are selected, and of those with exactly this key the `left` lowest; all of them if all_fit.
struct Threshold {
  uint64_t key;
  int64_t left;
  bool all_fit;
};

// How far a selection by many blocks has come.  Starts as zeros.
struct SelectionState {
  unsigned count[8][kDigits];   // candidates by digit, for each digit's launch
  unsigned arrived[8];          // blocks
  int64_t kept;
  Threshold threshold;
};

struct Selection {
  double keep_fraction;
  int64_t keep_count;
  uint8_t* selected;       // bool, one a row
  SelectionState* state;   // for many blocks
  unsigned* block_count;   // (blocks, kDigits): candidates of each block's slice by the last digit
};

KCD_DEVICE int shift_of(int digit) { return 56 - 8 * digit; }

// Calls visit(row, key) for rows [begin, end); a thread's loads are under way together.
template <class Visit>
KCD_DEVICE void for_each_key(const Ranking& ranking, int64_t begin, int64_t end, const Visit& visit) {
  constexpr int kAtOnce = 4;
  const int64_t stride = static_cast<int64_t>(blockDim.x);
  for (int64_t first = begin + threadIdx.x; first < end; first += kAtOnce * stride) {
    uint64_t key[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) key[j] = first + j * stride < end ? ranking.key(first + j * stride) : 0;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (first + j * stride < end) visit(first + j * stride, key[j]);
  }
}

// count[d]: candidates of rows [begin, end) whose digit is d, among those that share the digits of `prefix` before it.
KCD_DEVICE void count_digit(const Ranking& ranking, int64_t begin, int64_t end, int digit, uint64_t prefix, unsigned* count) {
  for (int d = static_cast<int>(threadIdx.x); d < kDigits; d += static_cast<int>(blockDim.x)) count[d] = 0;
  __syncthreads();
  const uint64_t known = digit == 0 ? 0 : ~uint64_t{0} << (shift_of(digit) + 8);
  for_each_key(ranking, begin, end, [&](int64_t, uint64_t key) {
    if (key != 0 && (key & known) == prefix) atomicAdd(&count[key >> shift_of(digit) & (kDigits - 1)], 1u);
  });
  __syncthreads();
}

// Goes on by one digit, for all threads of the block: `left` keys are wanted among those counted.  Counting the next digit parts
// this pick from the next one.
KCD_DEVICE void pick_digit(const unsigned* count, int digit, Threshold& threshold) {
  SHARED(unsigned, picked, 3);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < kWarp) {   // a lane has eight digits, lane 0 the greatest
    constexpr int kShare = kDigits / kWarp;
    const int greatest = kDigits - 1 - lane * kShare;
    unsigned own = 0;
    for (int j = 0; j < kShare; ++j) own += count[greatest - j];
    unsigned above = own;   // keys of this lane's digits and of greater ones
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const unsigned other = __shfl_up_sync(kWholeWarp, above, distance);
      if (lane >= distance) above += other;
    }
    above -= own;
    const unsigned left = static_cast<unsigned>(threshold.left);
    if (above < left && above + own >= left) {
      int d = greatest;
      while (above + count[d] < left) above += count[d--];
      picked[0] = static_cast<unsigned>(d);
      picked[1] = left - above;
      picked[2] = count[d];
    }
  }
  __syncthreads();
  threshold.key |= uint64_t{picked[0]} << shift_of(digit);
  threshold.left = picked[1];
  threshold.all_fit = picked[1] == picked[2];
}

// The number of candidates, for all threads, from their counts by the first digit.
KCD_DEVICE int64_t count_candidates(const unsigned* count) {
  SHARED(unsigned, candidates, 1);
  const int thread = static_cast<int>(threadIdx.x);
  unsigned own = 0;
  for (int d = thread; d < kDigits; d += static_cast<int>(blockDim.x)) own += count[d];
  const unsigned all = sum_over_block(own);
  if (thread == 0) candidates[0] = all;
  __syncthreads();
  return candidates[0];
}

// Rows [begin, end) of the mask.
KCD_DEVICE void mark(const Ranking& ranking, int64_t begin, int64_t end, const Threshold& threshold, uint8_t* selected) {
  if (threshold.all_fit) {
    for_each_key(ranking, begin, end, [&](int64_t i, uint64_t key) { selected[i] = key >= threshold.key && key != 0; });
    return;
  }
  // The lowest rows of equal keys: each thread has a run of neighbouring rows, and first learns how many lie before it.
  SHARED(unsigned, of_warp, kWarp);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t share = (end - begin + blockDim.x - 1) / blockDim.x;
  const int64_t first = begin + thread * share < end ? begin + thread * share : end,
                last = first + share < end ? first + share : end;
  unsigned own = 0;
  for (int64_t i = first; i < last; ++i) own += ranking.key(i) == threshold.key;
  unsigned before = own;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const unsigned other = __shfl_up_sync(kWholeWarp, before, distance);
    if (lane >= distance) before += other;
  }
  if (lane == kWarp - 1) of_warp[warp] = before;
  __syncthreads();
  before -= own;
  for (int w = 0; w < warp; ++w) before += of_warp[w];
  int64_t left = threshold.left - static_cast<int64_t>(before);
  for (int64_t i = first; i < last; ++i) {
    const uint64_t key = ranking.key(i);
    selected[i] = key > threshold.key || (key == threshold.key && left-- > 0);
  }
}

KCD_DEVICE void mark_none(int64_t begin, int64_t end, uint8_t* selected) {
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) selected[i] = 0;
}

// The whole selection by one block.
KCD_DEVICE void select_in_block(const Ranking& ranking, const Selection& selection) {
  SHARED(unsigned, count, kDigits);
  Threshold threshold{0, 0, true};
  int64_t kept = 0;
  for (int digit = 0; digit < ranking.digits(); ++digit) {
    count_digit(ranking, 0, ranking.rows, digit, threshold.key, count);
    if (digit == 0) {
      kept = number_to_keep(selection.keep_fraction, selection.keep_count, count_candidates(count));
      threshold.left = kept;
      if (kept == 0) break;
    }
    pick_digit(count, digit, threshold);
  }
  kept == 0 ? mark_none(0, ranking.rows, selection.selected) : mark(ranking, 0, ranking.rows, threshold, selection.selected);
  __syncthreads();   // the mask is complete
}

// ---- kernels

__global__ void __launch_bounds__(kManyThreads) select_by_one_block(const Ranking ranking, const Selection selection) {
  select_in_block(ranking, selection);
}

__global__ void __launch_bounds__(kManyThreads) select_digit(const Ranking ranking, const Selection selection, int digit) {
  SHARED(unsigned, count, kDigits);
  SelectionState& state = *selection.state;
  if (digit > 0 && state.kept == 0) return;
  Threshold threshold = state.threshold;
  const Slice slice = slice_of(ranking.rows);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  count_digit(ranking, slice.begin, slice.end, digit, threshold.key, count);
  for (int d = thread; d < kDigits; d += threads) {
    if (count[d] > 0) atomicAdd(&state.count[digit][d], count[d]);
    if (digit == ranking.digits() - 1) selection.block_count[static_cast<int64_t>(blockIdx.x) * kDigits + d] = count[d];
  }
  if (!is_last_block(&state.arrived[digit], gridDim.x)) return;
  for (int d = thread; d < kDigits; d += threads) count[d] = state.count[digit][d];
  __syncthreads();
  if (digit == 0) {
    const int64_t kept = number_to_keep(selection.keep_fraction, selection.keep_count, count_candidates(count));
    threshold.left = kept;
    if (thread == 0) state.kept = kept;
  }
  if (threshold.left > 0) pick_digit(count, digit, threshold);
  if (thread == 0) state.threshold = threshold;
}

__global__ void __launch_bounds__(kManyThreads) select_mark(const Ranking ranking, const Selection selection) {
  const SelectionState& state = *selection.state;
  const Slice slice = slice_of(ranking.rows);
  if (state.kept == 0) return mark_none(slice.begin, slice.end, selection.selected);
  Threshold threshold = state.threshold;
  if (!threshold.all_fit) {   // what the slices before this one leave of it
    SHARED(unsigned, before, 1);
    unsigned own = 0;
    const int digit = static_cast<int>(threshold.key >> shift_of(ranking.digits() - 1) & (kDigits - 1));
    for (unsigned b = threadIdx.x; b < blockIdx.x; b += blockDim.x)
      own += selection.block_count[static_cast<int64_t>(b) * kDigits + digit];
    const unsigned all = sum_over_block(own);
    if (threadIdx.x == 0) before[0] = all;
    __syncthreads();
    threshold.left -= before[0];
  }
  mark(ranking, slice.begin, slice.end, threshold, selection.selected);
}

}   // namespace kcd::cuda
