// Sums rows to the loss, in double and in a fixed order.
#pragma once
#include "cuda/group.cuh"
#include "cuda/shape.h"
#include "kernels.h"
#include "math/loss.h"

namespace kcd::cuda {

struct LossArguments {
  const void *kl, *cross_entropy, *row_weight;   // accumulator's type, one per row; row_weight null: 1
  const uint8_t* selected;
  double kd_factor, ce_weight;   // kd_factor = kd_weight T^2
  Reduction reduction;
  double ranks;            // processes whose rows the counts include
  void* loss;              // accumulator's type; one number, or one per row for Reduction::none
  const int64_t* counts;   // selected rows and valid rows of all ranks; null: count them here
  int64_t* counts_out;     // out: the counts, if counted here
};

struct LossSums {
  double kd, ce;
  unsigned selected, valid;
};

KCD_DEVICE LossSums sum_over_block(const LossSums& x) {
  return {sum_over_block(x.kd), sum_over_block(x.ce), sum_over_block(x.selected), sum_over_block(x.valid)};
}

// Returns the sums over rows [begin, end) to the block's first thread.
template <class Real>
KCD_DEVICE LossSums loss_sums(const Problem& problem, const LossArguments& a, int64_t begin, int64_t end) {
  const Real* row_weight = static_cast<const Real*>(a.row_weight);
  const LossFactors factors{a.kd_factor, a.ce_weight, 1, 1};
  LossSums sums{};
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const bool selected = a.selected[i] != 0, valid = problem.valid(i);
    const double weight = row_weight ? static_cast<double>(row_weight[i]) : 1.0;
    const double kd = selected ? weighted(static_cast<double>(static_cast<const Real*>(a.kl)[i]), weight) : 0.0;
    const double ce = valid && a.ce_weight != 0 ? static_cast<double>(static_cast<const Real*>(a.cross_entropy)[i]) : 0.0;
    if (a.reduction == Reduction::none) static_cast<Real*>(a.loss)[i] = static_cast<Real>(row_loss(kd, ce, factors));
    sums.kd += kd;
    sums.ce += ce;
    sums.selected += selected;
    sums.valid += valid;
  }
  return sum_over_block(sums);
}

template <class Real>
KCD_DEVICE void write_loss(const LossArguments& a, const LossSums& sums) {
  int64_t selected = sums.selected, valid = sums.valid;
  if (a.counts) {
    selected = a.counts[0];
    valid = a.counts[1];
  } else {
    a.counts_out[0] = selected;
    a.counts_out[1] = valid;
  }
  if (a.reduction == Reduction::none) return;
  const bool mean = a.reduction == Reduction::mean;
  const LossFactors factors{a.kd_factor, a.ce_weight, mean ? static_cast<double>(selected) / a.ranks : 1.0,
                            mean ? static_cast<double>(valid) / a.ranks : 1.0};
  *static_cast<Real*>(a.loss) = static_cast<Real>(total_loss(sums.kd, sums.ce, factors));
}

template <class Real>
KCD_DEVICE void reduce_in_block(const Problem& problem, const LossArguments& a) {
  const LossSums sums = loss_sums<Real>(problem, a, 0, problem.rows);
  if (threadIdx.x == 0) write_loss<Real>(a, sums);
}

// Each block sums a slice of the rows; the last block adds the slices.
template <class Real>
__global__ void __launch_bounds__(kLargeBlockThreads)
    reduce_rows(const Problem problem, const LossArguments a, LossSums* block_sums, unsigned* arrived) {
  const Slice slice = block_slice(problem.rows);
  const LossSums own = loss_sums<Real>(problem, a, slice.begin, slice.end);
  if (threadIdx.x == 0) block_sums[blockIdx.x] = own;
  if (!is_last_block(arrived, gridDim.x)) return;
  LossSums sums{};
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
    sums.kd += block_sums[b].kd;
    sums.ce += block_sums[b].ce;
    sums.selected += block_sums[b].selected;
    sums.valid += block_sums[b].valid;
  }
  sums = sum_over_block(sums);
  if (threadIdx.x == 0) write_loss<Real>(a, sums);
}

}   // namespace kcd::cuda
