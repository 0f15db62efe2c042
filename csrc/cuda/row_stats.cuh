// Reads every row once and computes KL, entropies, cross entropy and the statistics for the backward pass.  The last block to
// finish selects the rows and writes the loss.  csrc/math/row_stats.h has the formulas.
#pragma once
#include <type_traits>

#include "cuda/exponentials.cuh"
#include "cuda/group.cuh"
#include "cuda/map_rows.cuh"
#include "cuda/reduce_rows.cuh"
#include "cuda/select_topk.cuh"
#include "cuda/shape.h"
#include "cuda/targets.cuh"
#include "cuda/walk.cuh"
#include "math/row_outputs.h"

namespace kcd::cuda {

// ---- sums

// Whether x is at or above the current maximum, or NaN; false for -inf.
template <class Real>
KCD_DEVICE bool reaches_max(Real x, Real max) {
  return !(x < max) && x != -Limits<Real>::infinity();
}

// The sums of products over a few classes.
template <class Real>
struct Products {
  Real dot, cross;   // student's sum e^dz dz; cross sum, in units of difference_scale
};

// sum e_1 dx, where classes masked with -inf add 0.
template <class Real>
KCD_DEVICE Real masked_dot(const Real (&e_1)[kQuad], const Real (&dx)[kQuad]) {
  Real dot = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) dot += e_1[j] * max_number(dx[j], -Limits<Real>::largest());
  return dot;
}

// sum e^(dy/T) (dy - dz) with masks.  A class without mass for the teacher adds 0 for any student.  A class that only the student
// masks makes the KL infinite, even if the teacher's exponential e underflows.  Finite masks stay within the float range.
template <class Real>
KCD_DEVICE Real masked_cross(const Real (&dz)[kQuad], const Real (&dy)[kQuad], const Real (&e)[kQuad], const Scale<Real>& scale) {
  Real cross = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const Real difference = (dy[j] - dz[j]) * scale.units.difference_scale;
    const Real product = difference == Limits<Real>::infinity() ? difference : e[j] * difference;
    cross += dy[j] * scale.per_logit < static_cast<Real>(kVanishing) ? Real(0) : product;
  }
  return cross;
}

// Adds one network's classes to its tails: e = e^(dx/T), e_1 = e^dx, dx <= 0.  Classes at the maximum are counted instead of added.
// With at_maximum = false no class is at the maximum, and the comparison is skipped.
template <bool at_maximum, class Real>
KCD_DEVICE void add_tail(const Real (&dx)[kQuad], const Real (&e)[kQuad], Real& tail) {
  Real below_max[kQuad];
#pragma unroll
  for (int j = 0; j < kQuad; ++j) below_max[j] = at_maximum && dx[j] == 0 ? Real(0) : e[j];
  tail += sum(below_max);
}
template <bool at_maximum, class Real>
KCD_DEVICE void count_maxima(const Real (&dx)[kQuad], Real& ones) {
#pragma unroll
  for (int j = 0; j < kQuad; ++j)
    if (at_maximum && dx[j] == 0) ones += 1;
}

// Accumulates one thread's sums, relative to maxima that its group shares.  New maxima become rare after the first classes; between
// them the sums need no rescaling.
template <class Real, class Sums>
struct RowAccumulator {
  const Problem& problem;   // row `index` of it
  int index;
  const Scale<Real>& scale;
  const Row &student, &teacher;
  const Group& group;
  bool with_teacher;                     // if false, `teacher` is the student's row
  const int32_t& with_teacher_entropy;   // bool; refers to the kernel's arguments, because a copy would take a register
  Sums& sums;

  // Returns whether any of the group's current logits reaches a maximum; if so, rebases the sums to the new maxima.
  KCD_DEVICE_MEMBER bool update_maxima(Real z_max, Real y_max) const {
    if (!group.any(reaches_max(z_max, sums.student.max) || reaches_max(y_max, sums.teacher.max))) return false;
    const Real student_max = max_number(sums.student.max, group.max(z_max));
    const Real teacher_max = max_number(sums.teacher.max, group.max(y_max));
    sums = rebase(sums, student_max, teacher_max, scale.units);
    return true;
  }

  // Subtracts the maxima in place.  Logits that do not exist are -inf and add nothing.
  KCD_DEVICE_MEMBER void subtract_maxima(Real (&z)[kQuad], Real (&y)[kQuad]) const {
    const Real m_z = piece_reference(sums.student.max), m_y = piece_reference(sums.teacher.max);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      z[j] -= m_z;
      y[j] -= m_y;
    }
  }

  // Adds four classes to the tails, and their products to `products`.
  template <bool at_maximum>
  KCD_DEVICE_MEMBER void add(const Real (&dz)[kQuad], const Real (&dy)[kQuad], Products<Real>& products) const {
    Real e[kQuad], e_1[kQuad];
    exponentials(dz, scale, e);
    exponentials_1(dz, e, scale, e_1);
    count_maxima<at_maximum>(dz, sums.student.ones);
    add_tail<at_maximum>(dz, e, sums.student.tail);
    add_tail<at_maximum>(dz, e_1, sums.student.tail_1);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) products.dot += e_1[j] * dz[j];
    if (!with_teacher) return;
    exponentials(dy, scale, e);
    count_maxima<at_maximum>(dy, sums.teacher.ones);
    add_tail<at_maximum>(dy, e, sums.teacher.tail);
    Real cross = 0;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) cross += e[j] * (dy[j] - dz[j]);
    products.cross += cross;
    if (!with_teacher_entropy) return;
    exponentials_1(dy, e, scale, e_1);
    add_tail<at_maximum>(dy, e_1, sums.teacher.tail_1);
    Real dot = 0;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) dot += e_1[j] * dy[j];
    sums.teacher.dot_1 += dot == dot ? dot : masked_dot(e_1, dy);
  }

  // Computes the products again, with masks.
  KCD_DEVICE_MEMBER void add_masked(const Real (&dz)[kQuad], const Real (&dy)[kQuad], Products<Real>& products) const {
    Real e[kQuad], e_1[kQuad];
    exponentials(dz, scale, e);
    exponentials_1(dz, e, scale, e_1);
    products.dot += masked_dot(e_1, dz);
    if (!with_teacher) return;
    exponentials(dy, scale, e);
    products.cross += masked_cross(dz, dy, e, scale);
  }

  // Accumulates kCount quads, each loaded by load(quad, z, y).
  template <int kCount, class Load>
  KCD_DEVICE_MEMBER void accumulate(Real z_max, Real y_max, const Load& load) const {
    const auto each = [&](const auto& add) {
      Products<Real> products{};
#pragma unroll
      for (int quad = 0; quad < kCount; ++quad) {
        Real z[kQuad], y[kQuad];
        load(quad, z, y);
        subtract_maxima(z, y);
        add(z, y, products);
      }
      return products;
    };
    Products<Real> products =
        update_maxima(z_max, with_teacher ? y_max : -Limits<Real>::infinity())
            ? each([&](const Real(&dz)[kQuad], const Real(&dy)[kQuad], Products<Real>& sum) { add<true>(dz, dy, sum); })
            : each([&](const Real(&dz)[kQuad], const Real(&dy)[kQuad], Products<Real>& sum) { add<false>(dz, dy, sum); });
    // Masks are detected afterwards: 0 * -inf is NaN, and finite masks may overflow without the scale.
    const Real ordinary = sizeof(Real) == 8 ? Real(1e290) : Real(1e30);
    const Real all = products.dot + products.cross;
    if (all < ordinary && all > -ordinary)
      products.cross *= scale.units.difference_scale;
    else
      products = each([&](const Real(&dz)[kQuad], const Real(&dy)[kQuad], Products<Real>& sum) { add_masked(dz, dy, sum); });
    sums.student.dot_1 += products.dot;
    sums.cross += products.cross;
  }

  // Adds the targets of classes c to c + 3, of which the first n exist.
  KCD_DEVICE_MEMBER void add_targets(const Real (&z)[kQuad], int c, int n) const {
    Real t[kQuad], products[kQuad];
    load_targets(problem, index, c, n, t);
    const Real m_z = piece_reference(sums.student.max);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) products[j] = target_times(t[j], z[j] - m_z);
    sums.targets = kcd::add(sums.targets, TargetSums<Real>{sum(t), sum(products)});
  }

  template <Type kType>
  KCD_DEVICE_MEMBER void vectors(const VectorPair& z, const VectorPair& y, [[maybe_unused]] int first_class,
                                 [[maybe_unused]] int second_class, [[maybe_unused]] int end) const {
    accumulate<kQuadsPerPair<kType>>(max_of<kType>(z), max_of<kType>(y), [&](int quad, Real(&z_quad)[kQuad], Real(&y_quad)[kQuad]) {
      unpack<kType>(z, quad, z_quad);
      unpack<kType>(y, quad, y_quad);
    });
    if constexpr (kHasTargets<Sums>) {
#pragma unroll
      for (int quad = 0; quad < kQuadsPerPair<kType>; ++quad) {
        Real z_quad[kQuad];
        unpack<kType>(z, quad, z_quad);
        const int c = first_class_of<kType>(quad, first_class, second_class);
        add_targets(z_quad, c, c < end ? kQuad : 0);
      }
    }
  }

  KCD_DEVICE_MEMBER void quad(int c, int n) const {
    Real z[kQuad], y[kQuad];
    load_quad(student, c, n, z);
    load_quad(teacher, c, n, y);
    accumulate<1>(max_of(z), max_of(y), [&](int, Real(&z_quad)[kQuad], Real(&y_quad)[kQuad]) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) z_quad[j] = z[j], y_quad[j] = y[j];
    });
    if constexpr (kHasTargets<Sums>) add_targets(z, c, n);
  }
};

// ---- the kernel

template <class Real>
struct RowStatsArguments {
  Problem problem;
  RowOutputs outputs;
  Scale<Real> scale;
  int row_threads, parts;
  int32_t with_teacher_entropy;   // bool

  Value value;          // the value that ranks the rows
  void* ranked;         // out: those values
  uint8_t* candidate;   // null: not requested
  const void* score;    // for Value::score

  void* pieces;              // sums (rows, parts), if parts > 1
  unsigned* parts_arrived;   // one counter per row, initially 0
  bool fused_loss;           // whether the last block selects and reduces
  Ranking ranking;
  Selection selection;
  LossArguments loss;
  unsigned* blocks_arrived;   // a counter, initially 0
};

// Merges the sums of a row's threads; the first thread of the row gets the result.
template <class Real, class Sums>
KCD_DEVICE Sums merge_threads(Sums sums, const Group& group, int row_threads, bool has_row, const Units<Real>& units) {
  if (has_row) sums = group.merge(sums, units);
  if (row_threads <= kWarp) return sums;
  SHARED(Sums, warp_sums, kLargeBlockThreads / kWarp);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, warps = row_threads / kWarp;
  if (lane == 0) warp_sums[warp] = sums;
  __syncthreads();
  if (warp % warps == 0 && has_row) sums = group.merge(lane < warps ? warp_sums[warp + lane] : Sums{empty_sums<Real>()}, units);
  return sums;
}

// Merges the parts of a row.  Returns true in the block that arrives last; its first warp then has the sums of all.
template <class Real, class Sums>
KCD_DEVICE bool merge_parts(const RowStatsArguments<Real>& a, int64_t row, int part, Sums& sums) {
  SHARED(bool, last, 1);
  Sums* pieces = static_cast<Sums*>(a.pieces) + row * a.parts;
  if (threadIdx.x == 0) {
    pieces[part] = sums;
    __threadfence();   // the piece becomes visible before its arrival
    last[0] = atomicAdd(a.parts_arrived + row, 1u) == static_cast<unsigned>(a.parts) - 1;
    __threadfence();   // the others' pieces are read after their arrivals
  }
  __syncthreads();
  if (!last[0]) return false;
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < kWarp) sums = Group{kFullMask}.merge(lane < a.parts ? pieces[lane] : Sums{empty_sums<Real>()}, a.scale.units);
  return true;
}

// Recomputes the cross sum against the final maxima, with one group of the row's threads: a term that was infinite against an
// intermediate maximum may vanish against the final one.
template <class Real>
KCD_DEVICE Real recompute_cross(const RowStatsArguments<Real>& a, int64_t i, const Group& group, const RowSums<Real>& sums) {
  const Problem& p = a.problem;
  const Row student = row_of(p.student, i), teacher = row_of(p.teacher, p.teacher_row_of(i));
  const int classes = static_cast<int>(p.classes), lanes = group.lanes();
  Real cross = 0;
  for (int c = thread_in_row(lanes) * kQuad; c < classes; c += lanes * kQuad) {
    Real z[kQuad], y[kQuad], e[kQuad];
    load_quad(student, c, classes - c, z);
    load_quad(teacher, c, classes - c, y);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      z[j] -= piece_reference(sums.student.max);
      y[j] -= piece_reference(sums.teacher.max);
    }
    exponentials(y, a.scale, e);
    cross += masked_cross(z, y, e, a.scale);
  }
  return group.sum(cross);
}

// Writes a row's results; called by one thread.
template <class Real, class Sums>
KCD_DEVICE void finish_row(const RowStatsArguments<Real>& a, int64_t i, const Sums& sums) {
  const Problem& p = a.problem;
  const int64_t teacher_row = p.teacher_row_of(i);
  const bool valid = p.valid(i), with_teacher = valid && teacher_row >= 0;
  const bool candidate = valid && (!p.with_teacher || teacher_row != kNoRow);
  Real label_logit = Limits<Real>::nan();
  if (valid && p.labels && p.labels[i] >= 0 && p.labels[i] < p.classes)
    label_logit = load_logit<Real>(row_of(p.student, i).at(static_cast<int>(p.labels[i])), p.student.type);
  TargetSums<Real> targets;
  if constexpr (kHasTargets<Sums>)
    targets = row_targets(p, sums.student, sums.targets, label_logit);
  else
    targets = index_targets(sums.student, label_logit);
  const RowResults<Real> row = write_row_outputs<Real>(p, a.outputs, i, with_teacher, sums, targets, a.scale.units);
  if (a.candidate) a.candidate[i] = candidate;
  if (a.value == Value::score) {
    const auto copy = [&](auto* out) {
      using Score = std::remove_reference_t<decltype(*out)>;
      out[i] = ranking_value(candidate, static_cast<const Score*>(a.score)[i], row.entropy, row.kl);
    };
    a.ranking.is_double ? copy(static_cast<double*>(a.ranked)) : copy(static_cast<float*>(a.ranked));
    return;
  }
  const Real value = a.value == Value::kl                ? row.kl
                     : a.value == Value::cross_entropy   ? row.cross_entropy
                     : a.value == Value::teacher_entropy ? row.teacher_entropy
                                                         : row.entropy;
  static_cast<Real*>(a.ranked)[i] = ranking_value(candidate, value, row.entropy, row.kl);
}

// The row of a thread, and the threads of its warp that share the row.
struct RowGroup {
  int row;   // may be past the last row
  Group group;
};

KCD_DEVICE RowGroup row_group(int row_threads) {
  const int thread = thread_index(), block_rows = static_cast<int>(blockDim.x) / row_threads;
  return {static_cast<int>(blockIdx.x) * block_rows + thread / row_threads,
          group_of(thread, row_threads < kWarp ? row_threads : kWarp)};
}

// Returns the sums over the calling thread's classes, relative to maxima that its group shares.
template <class Real, class Sums>
KCD_DEVICE Sums accumulate_row(const RowStatsArguments<Real>& a) {
  const Problem& p = a.problem;
  const RowGroup position = row_group(a.row_threads);
  Sums sums{empty_sums<Real>()};
  if (position.row >= p.rows || !p.valid(position.row)) return sums;
  const int64_t teacher_row = p.teacher_row_of(position.row);
  const Row student = row_of(p.student, position.row), teacher = teacher_row >= 0 ? row_of(p.teacher, teacher_row) : student;
  const RowAccumulator<Real, Sums> accumulator{
      p, position.row, a.scale, student, teacher, position.group, teacher_row >= 0, a.with_teacher_entropy, sums};
  const RowPart part = row_part(student, static_cast<int>(p.classes), static_cast<int>(blockIdx.y), a.parts);
  walk<Real>(student, teacher, part, a.row_threads, accumulator);
  return sums;
}

template <class Real, class Sums>
KCD_DEVICE void read_rows(const RowStatsArguments<Real>& a) {
  Sums sums = accumulate_row<Real, Sums>(a);
  const RowGroup position = row_group(a.row_threads);
  const bool has_row = position.row < a.problem.rows;
  sums = merge_threads(sums, position.group, a.row_threads, has_row, a.scale.units);
  if (a.parts > 1 && !merge_parts(a, position.row, static_cast<int>(blockIdx.y), sums)) return;
  // All threads of the row's first group have the sums.
  if (has_row && thread_in_row(a.row_threads) < kWarp && sums.cross == Limits<Real>::infinity())
    sums.cross = recompute_cross<Real>(a, position.row, position.group, sums);
  if (has_row && thread_in_row(a.row_threads) == 0) finish_row(a, position.row, sums);

  if (!a.fused_loss || !is_last_block(a.blocks_arrived, gridDim.x)) return;
  select_in_block(a.ranking, a.selection);
  reduce_in_block<Real>(a.problem, a.loss);
}

template <class Real>
__global__ void __launch_bounds__(sizeof(Real) == 8 ? kBlockThreads : kLargeBlockThreads, 1)
    forward_rows(const RowStatsArguments<Real> a) {
  read_rows<Real, RowSums<Real>>(a);
}

template <class Real>
__global__ void __launch_bounds__(kBlockThreads, sizeof(Real) == 8 ? 1 : 2)
    forward_rows_with_targets(const RowStatsArguments<Real> a) {
  read_rows<Real, RowSumsWithTargets<Real>>(a);
}

}   // namespace kcd::cuda
