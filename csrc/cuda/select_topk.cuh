// Selects the k candidates with the largest values by radix selection, which finds the k-th largest key eight bits at a time.
//
// One block does this for few rows.  For more, each digit takes a launch whose blocks each count a slice of the rows, and a final
// launch writes the mask.  Counts are integers, so the order of additions does not matter.
#pragma once
#include "cuda/group.cuh"
#include "cuda/shape.h"
#include "math/loss.h"
#include "math/order_key.h"

namespace kcd::cuda {

constexpr int kBuckets = 256;

// The values that rank the rows.
struct Ranking {
  const void* value;   // float32 or float64
  bool is_double;
  const uint8_t* candidate;   // bool, one per row
  int64_t rows;

  // The key of row i; 0 if it is not a candidate.  float32 keys use the upper half: only the number of digits depends on the type.
  KCD_DEVICE_MEMBER uint64_t key(int64_t i) const {
    if (!candidate[i]) return 0;
    return is_double ? order_key(static_cast<const double*>(value)[i])
                     : static_cast<uint64_t>(order_key(static_cast<const float*>(value)[i])) << 32;
  }
  KCD_MEMBER int digits() const { return is_double ? 8 : 4; }
};

// Selects the rows with keys above `key` and, of the rows with exactly this key, the first `remaining`, or all if take_all_ties.
struct Threshold {
  uint64_t key;
  int64_t remaining;
  bool take_all_ties;
};

// The progress of a selection by many blocks; initially zeros.
struct SelectionState {
  unsigned count[8][kBuckets];   // candidates by bucket, for each digit's launch
  unsigned arrived[8];           // blocks, for each digit's launch
  int64_t kept;
  Threshold threshold;
};

struct Selection {
  double keep_fraction;
  int64_t keep_count;
  uint8_t* selected;        // bool, one per row
  SelectionState* state;    // only if many blocks select
  unsigned* block_counts;   // (blocks, kBuckets): candidates in each block's slice, by the last digit
};

KCD_DEVICE int digit_shift(int digit) { return 56 - 8 * digit; }

// Calls visit(row, key) for rows [begin, end); each thread keeps several loads in flight.
template <class Visit>
KCD_DEVICE void for_each_key(const Ranking& ranking, int64_t begin, int64_t end, const Visit& visit) {
  constexpr int kLoadsInFlight = 4;
  const int64_t stride = static_cast<int64_t>(blockDim.x);
  for (int64_t first = begin + threadIdx.x; first < end; first += kLoadsInFlight * stride) {
    uint64_t key[kLoadsInFlight];
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) key[j] = first + j * stride < end ? ranking.key(first + j * stride) : 0;
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j)
      if (first + j * stride < end) visit(first + j * stride, key[j]);
  }
}

// count[d]: candidates in rows [begin, end) whose digit is d and whose earlier digits equal those of `prefix`.
KCD_DEVICE void count_digit(const Ranking& ranking, int64_t begin, int64_t end, int digit, uint64_t prefix, unsigned* count) {
  for (int d = static_cast<int>(threadIdx.x); d < kBuckets; d += static_cast<int>(blockDim.x)) count[d] = 0;
  __syncthreads();
  const uint64_t prefix_mask = digit == 0 ? 0 : ~uint64_t{0} << (digit_shift(digit) + 8);
  for_each_key(ranking, begin, end, [&](int64_t, uint64_t key) {
    if (key != 0 && (key & prefix_mask) == prefix) atomicAdd(&count[key >> digit_shift(digit) & (kBuckets - 1)], 1u);
  });
  __syncthreads();
}

// Picks the next digit of the threshold, for all threads of the block; `remaining` of the counted keys are still to be selected.
// The barriers in count_digit keep this pick separate from the next one.
KCD_DEVICE void pick_digit(const unsigned* count, int digit, Threshold& threshold) {
  SHARED(unsigned, picked, 3);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < kWarp) {   // each lane scans eight buckets; lane 0 has the largest
    constexpr int kShare = kBuckets / kWarp;
    const int largest = kBuckets - 1 - lane * kShare;
    unsigned own = 0;
    for (int j = 0; j < kShare; ++j) own += count[largest - j];
    unsigned above = own;   // keys in this lane's buckets and all larger ones
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const unsigned other = __shfl_up_sync(kFullMask, above, distance);
      if (lane >= distance) above += other;
    }
    above -= own;
    const unsigned remaining = static_cast<unsigned>(threshold.remaining);
    if (above < remaining && above + own >= remaining) {
      int d = largest;
      while (above + count[d] < remaining) above += count[d--];
      picked[0] = static_cast<unsigned>(d);
      picked[1] = remaining - above;
      picked[2] = count[d];
    }
  }
  __syncthreads();
  threshold.key |= uint64_t{picked[0]} << digit_shift(digit);
  threshold.remaining = picked[1];
  threshold.take_all_ties = picked[1] == picked[2];
}

// Returns the number of candidates to all threads, from the counts of the first digit.
KCD_DEVICE int64_t count_candidates(const unsigned* count) {
  SHARED(unsigned, candidates, 1);
  const int thread = static_cast<int>(threadIdx.x);
  unsigned own = 0;
  for (int d = thread; d < kBuckets; d += static_cast<int>(blockDim.x)) own += count[d];
  const unsigned all = sum_over_block(own);
  if (thread == 0) candidates[0] = all;
  __syncthreads();
  return candidates[0];
}

// Writes rows [begin, end) of the mask.
KCD_DEVICE void mark_selected(const Ranking& ranking, int64_t begin, int64_t end, const Threshold& threshold, uint8_t* selected) {
  if (threshold.take_all_ties) {
    for_each_key(ranking, begin, end, [&](int64_t i, uint64_t key) { selected[i] = key >= threshold.key && key != 0; });
    return;
  }
  // Ties go to the first rows.  Each thread has a run of adjacent rows and counts the ties before it.
  SHARED(unsigned, warp_sums, kWarp);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t share = (end - begin + blockDim.x - 1) / blockDim.x;
  const int64_t first = begin + thread * share < end ? begin + thread * share : end,
                last = first + share < end ? first + share : end;
  unsigned own = 0;
  for (int64_t i = first; i < last; ++i) own += ranking.key(i) == threshold.key;
  unsigned before = own;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const unsigned other = __shfl_up_sync(kFullMask, before, distance);
    if (lane >= distance) before += other;
  }
  if (lane == kWarp - 1) warp_sums[warp] = before;
  __syncthreads();
  before -= own;
  for (int w = 0; w < warp; ++w) before += warp_sums[w];
  int64_t remaining = threshold.remaining - static_cast<int64_t>(before);
  for (int64_t i = first; i < last; ++i) {
    const uint64_t key = ranking.key(i);
    selected[i] = key > threshold.key || (key == threshold.key && remaining-- > 0);
  }
}

KCD_DEVICE void clear_mask(int64_t begin, int64_t end, uint8_t* selected) {
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) selected[i] = 0;
}

// The complete selection in one block.
KCD_DEVICE void select_in_block(const Ranking& ranking, const Selection& selection) {
  SHARED(unsigned, count, kBuckets);
  Threshold threshold{0, 0, true};
  int64_t kept = 0;
  for (int digit = 0; digit < ranking.digits(); ++digit) {
    count_digit(ranking, 0, ranking.rows, digit, threshold.key, count);
    if (digit == 0) {
      kept = number_to_keep(selection.keep_fraction, selection.keep_count, count_candidates(count));
      threshold.remaining = kept;
      if (kept == 0) break;
    }
    pick_digit(count, digit, threshold);
  }
  kept == 0 ? clear_mask(0, ranking.rows, selection.selected)
            : mark_selected(ranking, 0, ranking.rows, threshold, selection.selected);
  __syncthreads();   // the mask is complete
}

// ---- kernels

__global__ void __launch_bounds__(kLargeBlockThreads) select_by_one_block(const Ranking ranking, const Selection selection) {
  select_in_block(ranking, selection);
}

__global__ void __launch_bounds__(kLargeBlockThreads) select_digit(const Ranking ranking, const Selection selection, int digit) {
  SHARED(unsigned, count, kBuckets);
  SelectionState& state = *selection.state;
  if (digit > 0 && state.kept == 0) return;
  Threshold threshold = state.threshold;
  const Slice slice = block_slice(ranking.rows);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  count_digit(ranking, slice.begin, slice.end, digit, threshold.key, count);
  for (int d = thread; d < kBuckets; d += threads) {
    if (count[d] > 0) atomicAdd(&state.count[digit][d], count[d]);
    if (digit == ranking.digits() - 1) selection.block_counts[static_cast<int64_t>(blockIdx.x) * kBuckets + d] = count[d];
  }
  if (!is_last_block(&state.arrived[digit], gridDim.x)) return;
  for (int d = thread; d < kBuckets; d += threads) count[d] = state.count[digit][d];
  __syncthreads();
  if (digit == 0) {
    const int64_t kept = number_to_keep(selection.keep_fraction, selection.keep_count, count_candidates(count));
    threshold.remaining = kept;
    if (thread == 0) state.kept = kept;
  }
  if (threshold.remaining > 0) pick_digit(count, digit, threshold);
  if (thread == 0) state.threshold = threshold;
}

__global__ void __launch_bounds__(kLargeBlockThreads) select_mark(const Ranking ranking, const Selection selection) {
  const SelectionState& state = *selection.state;
  const Slice slice = block_slice(ranking.rows);
  if (state.kept == 0) return clear_mask(slice.begin, slice.end, selection.selected);
  Threshold threshold = state.threshold;
  if (!threshold.take_all_ties) {   // subtract the ties in earlier slices
    SHARED(unsigned, before, 1);
    unsigned own = 0;
    const int digit = static_cast<int>(threshold.key >> digit_shift(ranking.digits() - 1) & (kBuckets - 1));
    for (unsigned b = threadIdx.x; b < blockIdx.x; b += blockDim.x)
      own += selection.block_counts[static_cast<int64_t>(b) * kBuckets + digit];
    const unsigned all = sum_over_block(own);
    if (threadIdx.x == 0) before[0] = all;
    __syncthreads();
    threshold.remaining -= before[0];
  }
  mark_selected(ranking, slice.begin, slice.end, threshold, selection.selected);
}

}   // namespace kcd::cuda
