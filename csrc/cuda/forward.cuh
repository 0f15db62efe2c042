// One read of every row: KL, entropies, cross entropy, and what the backward pass needs; the last block to finish selects the rows
// and writes the loss.
#pragma once
#include <type_traits>

#include "cuda/formula.cuh"
#include "cuda/group.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/select.cuh"
#include "cuda/shape.h"
#include "cuda/walk.cuh"
#include "math/row_outputs.h"

namespace kcd::cuda {

// ---- sums

// Whether some logit of x reaches the maximum so far; -inf reaches nothing.
template <class Real>
KCD_DEVICE bool reaches(Real x, Real max) {
  return !(x < max) && x != -Limits<Real>::infinity();
}

// Adds classes of one network: e = e^(dx/T) with dx <= 0.  Classes at the maximum are counted, the others go into the tails; where
// none can be at it, at_maximum is false and nothing needs to tell them apart.
template <bool at_maximum, class Real>
KCD_DEVICE void add(const Real (&dx)[kQuad], const Real (&e)[kQuad], bool at_1, const Scale<Real>& scale, ClassSums<Real>& sums) {
  Real beside[kQuad];
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const bool is_maximum = at_maximum && dx[j] == 0;
    if (is_maximum) sums.ones += 1;
    beside[j] = is_maximum ? Real(0) : e[j];
  }
  sums.tail += sum(beside);
  if (!at_1) return;
  Real e_1[kQuad], dot = 0;
  exponentials_1(dx, e, scale, e_1);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) dot += e_1[j] * dx[j];
  if (dot != dot) {   // 0 * -inf, which adds 0; or what is not a number in the tail too
    dot = 0;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) dot += e_1[j] * greater_of(dx[j], -Limits<Real>::largest());
  }
  sums.dot_1 += dot;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) beside[j] = at_maximum && dx[j] == 0 ? Real(0) : e_1[j];
  sums.tail_1 += sum(beside);
}

// sum e^(dy/T) (dy - dz) in units of the difference scale.  e = e^(dy/T).
template <class Real>
KCD_DEVICE Real cross_of(const Real (&dz)[kQuad], const Real (&dy)[kQuad], const Real (&e)[kQuad], const Scale<Real>& scale) {
  Real cross = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) cross += e[j] * (dy[j] - dz[j]);
  const Real ordinary = sizeof(Real) == 8 ? Real(1e290) : Real(1e30);
  if (cross < ordinary && cross > -ordinary) return cross * scale.units.difference_scale;
  // Masks: a class without mass for the teacher adds 0, whatever the student says; one that the student alone rules out makes the
  // divergence infinite, also where the teacher's exponential underflows; finite masks may leave the range without the scale.
  cross = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const Real difference = (dy[j] - dz[j]) * scale.units.difference_scale;
    const Real product = difference == Limits<Real>::infinity() ? difference : e[j] * difference;
    cross += dy[j] * scale.per_logit < static_cast<Real>(kVanishing) ? Real(0) : product;
  }
  return cross;
}

// One thread's sums, relative to maxima that its group shares: after the first classes a new maximum is rare, and between two of
// them the sums are plain.
template <class Real>
struct Summation {
  const Scale<Real>& scale;
  const Row &student, &teacher;
  const Group& group;
  bool with_teacher_entropy;
  RowSums<Real>& sums;

  // One quad; logits that do not exist are -inf and add nothing.
  template <bool at_maximum>
  KCD_DEVICE_MEMBER void add_quad(const Real (&z)[kQuad], const Real (&y)[kQuad]) const {
    Real dz[kQuad], dy[kQuad], e[kQuad];
    const Real m_z = reference(sums.student.max), m_y = reference(sums.teacher.max);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) dz[j] = z[j] - m_z;
    exponentials(dz, scale, e);
    add<at_maximum>(dz, e, true, scale, sums.student);
    if (!teacher.begin) return;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) dy[j] = y[j] - m_y;
    exponentials(dy, scale, e);
    add<at_maximum>(dy, e, with_teacher_entropy, scale, sums.teacher);
    sums.cross += cross_of(dz, dy, e, scale);
  }

  // Whether some logit of the group's classes at hand is at a maximum, to which the sums are moved then.
  KCD_DEVICE_MEMBER bool reach(Real z_max, Real y_max) const {
    if (!group.any(reaches(z_max, sums.student.max) || reaches(y_max, sums.teacher.max))) return false;
    const Real student_max = greater_of(sums.student.max, group.greatest(z_max));
    const Real teacher_max = greater_of(sums.teacher.max, group.greatest(y_max));
    sums = rebase(sums, student_max, teacher_max, scale.units);
    return true;
  }

  template <bool at_maximum, int kStudentSize, int kTeacherSize>
  KCD_DEVICE_MEMBER void add_octet(const Octet& z, const Octet& y) const {
#pragma unroll
    for (int quad = 0; quad < kOctet / kQuad; ++quad) {
      float z_quad[kQuad], y_quad[kQuad];
      unpack<kStudentSize>(z, student.type, quad, z_quad);
      unpack<kTeacherSize>(y, teacher.type, quad, y_quad);
      add_quad<at_maximum>(z_quad, y_quad);
    }
  }

  template <int kStudentSize, int kTeacherSize>
  KCD_DEVICE_MEMBER void octet(const Octet& z, const Octet& y, int, int, int) const {
    const float none = -Limits<float>::infinity();
    const float z_max = greatest<kStudentSize>(z, student.type),
                y_max = teacher.begin ? greatest<kTeacherSize>(y, teacher.type) : none;
    reach(z_max, y_max) ? add_octet<true, kStudentSize, kTeacherSize>(z, y) : add_octet<false, kStudentSize, kTeacherSize>(z, y);
  }

  KCD_DEVICE_MEMBER void quad(int c, int n) const {
    Real z[kQuad], y[kQuad];
    load_quad(student, c, n, z);
    load_quad(teacher, c, teacher.begin ? n : 0, y);
    reach(greatest(z), greatest(y)) ? add_quad<true>(z, y) : add_quad<false>(z, y);
  }
};

// ---- the kernel

template <class Real>
struct ForwardArguments {
  Problem problem;
  RowOutputs outputs;
  Scale<Real> scale;
  int row_threads, parts;

  Value value;          // what rows are ranked by
  void* ranked;         // where that is written
  uint8_t* candidate;   // null: not asked for
  const void* score;    // for Value::score

  RowSums<Real>* pieces;     // (rows, parts), where parts > 1
  unsigned* parts_arrived;   // a counter a row, 0
  bool with_loss;            // whether the last block selects and reduces
  Ranking ranking;
  Selection selection;
  LossArguments loss;
  unsigned* blocks_arrived;   // a counter, 0
};

// Where a row's threads meet: the row's sums in the first thread of the row.
template <class Real>
KCD_DEVICE RowSums<Real> merge_threads(RowSums<Real> sums, const Group& group, int row_threads, bool has_row,
                                       const Units<Real>& units) {
  if (has_row) sums = group.merge(sums, units);
  if (row_threads <= kWarp) return sums;
  SHARED(RowSums<Real>, of_warp, kManyThreads / kWarp);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, warps = row_threads / kWarp;
  if (lane == 0) of_warp[warp] = sums;
  __syncthreads();
  if (warp % warps == 0 && has_row) sums = group.merge(lane < warps ? of_warp[warp + lane] : no_sums<Real>(), units);
  return sums;
}

// Where a row's blocks meet: true in the one that came last, whose first warp then holds the sums of all.
template <class Real>
KCD_DEVICE bool merge_parts(const ForwardArguments<Real>& a, int64_t row, int part, RowSums<Real>& sums) {
  SHARED(bool, last, 1);
  RowSums<Real>* pieces = a.pieces + row * a.parts;
  if (threadIdx.x == 0) {
    pieces[part] = sums;
    __threadfence();   // the piece is visible before its arrival is
    last[0] = atomicAdd(a.parts_arrived + row, 1u) == static_cast<unsigned>(a.parts) - 1;
    __threadfence();   // the others' pieces are read after their arrivals were
  }
  __syncthreads();
  if (!last[0]) return false;
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < kWarp) sums = Group{0xffffffffu, kWarp}.merge(lane < a.parts ? pieces[lane] : no_sums<Real>(), a.scale.units);
  return true;
}

// What one row says in the end, by one thread.
template <class Real>
KCD_DEVICE void finish_row(const ForwardArguments<Real>& a, int64_t i, const RowSums<Real>& sums) {
  const Problem& p = a.problem;
  const int64_t teacher_row = p.teacher_row_of(i);
  const bool valid = p.valid(i), with_teacher = valid && teacher_row >= 0;
  const bool candidate = valid && (!p.with_teacher || teacher_row != kNoRow);
  Real label_logit = Limits<Real>::nan();
  if (valid && p.with_labels && p.labels[i] >= 0 && p.labels[i] < p.classes)
    label_logit = load_logit<Real>(row_of(p.student, i).at(static_cast<int>(p.labels[i])), p.student.type);
  const RowResults<Real> row = write_row(p, a.outputs, i, with_teacher, sums, label_logit, a.scale.units);
  if (a.candidate) a.candidate[i] = candidate;
  if (a.value == Value::score) {
    const auto copy = [&](auto* out) {
      using Score = std::remove_reference_t<decltype(*out)>;
      out[i] = ranked(candidate, static_cast<const Score*>(a.score)[i], row.entropy, row.kl, p.with_teacher);
    };
    a.ranking.is_double ? copy(static_cast<double*>(a.ranked)) : copy(static_cast<float*>(a.ranked));
    return;
  }
  const Real value = a.value == Value::kl                ? row.kl
                     : a.value == Value::cross_entropy   ? row.cross_entropy
                     : a.value == Value::teacher_entropy ? row.teacher_entropy
                                                         : row.entropy;
  static_cast<Real*>(a.ranked)[i] = ranked(candidate, value, row.entropy, row.kl, p.with_teacher);
}

template <class Real>
__global__ void __launch_bounds__(sizeof(Real) == 8 ? kThreads : kManyThreads, 1) forward_rows(const ForwardArguments<Real> a) {
  const Problem& p = a.problem;
  const int thread = static_cast<int>(threadIdx.x), block_rows = static_cast<int>(blockDim.x) / a.row_threads;
  const int i = static_cast<int>(blockIdx.x) * block_rows + thread / a.row_threads, part = static_cast<int>(blockIdx.y);
  const bool has_row = i < p.rows;
  const Group group = group_of(thread, a.row_threads < kWarp ? a.row_threads : kWarp);

  RowSums<Real> sums = no_sums<Real>();
  if (has_row && p.valid(i)) {
    const int64_t teacher_row = p.teacher_row_of(i);
    const Row student = row_of(p.student, i), teacher = teacher_row >= 0 ? row_of(p.teacher, teacher_row) : Row{};
    const Summation<Real> summation{a.scale, student, teacher, group, a.outputs.teacher_entropy != nullptr, sums};
    walk<Real>(student, student, teacher, part_of(student, static_cast<int>(p.classes), part, a.parts), thread % a.row_threads,
               a.row_threads, summation);
  }
  sums = merge_threads(sums, group, a.row_threads, has_row, a.scale.units);
  if (a.parts > 1 && !merge_parts(a, i, part, sums)) return;
  if (has_row && thread % a.row_threads == 0) finish_row(a, i, sums);

  if (!a.with_loss || !is_last_block(a.blocks_arrived, gridDim.x)) return;
  select_in_block(a.ranking, a.selection);
  reduce_in_block<Real>(p, a.loss);
}

}   // namespace kcd::cuda
