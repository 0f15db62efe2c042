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

// What an octet's classes add to the products of a row's sums.
template <class Real>
struct Products {
  Real dot, cross;   // the student's sum e^dz dz, and the cross sum in units of the difference scale
};

// sum e_1 dx, in which a class that is ruled out, -inf, adds 0.
template <class Real>
KCD_DEVICE Real careful_dot(const Real (&e_1)[kQuad], const Real (&dx)[kQuad]) {
  Real dot = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) dot += e_1[j] * greater_of(dx[j], -Limits<Real>::largest());
  return dot;
}

// sum e^(dy/T) (dy - dz): a class without mass for the teacher adds 0, whatever the student says; one that the student alone rules
// out makes the divergence infinite, also where the teacher's exponential e underflows; finite masks do not leave the range.
template <class Real>
KCD_DEVICE Real careful_cross(const Real (&dz)[kQuad], const Real (&dy)[kQuad], const Real (&e)[kQuad], const Scale<Real>& scale) {
  Real cross = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const Real difference = (dy[j] - dz[j]) * scale.units.difference_scale;
    const Real product = difference == Limits<Real>::infinity() ? difference : e[j] * difference;
    cross += dy[j] * scale.per_logit < static_cast<Real>(kVanishing) ? Real(0) : product;
  }
  return cross;
}

// Adds one network's classes to its tails: e = e^(dx/T), e_1 = e^dx, dx <= 0.  Classes at the maximum are counted instead; where
// none can be at it, at_maximum is false and nothing needs to tell them apart.
template <bool at_maximum, class Real>
KCD_DEVICE void add_tail(const Real (&dx)[kQuad], const Real (&e)[kQuad], Real& tail) {
  Real beside[kQuad];
#pragma unroll
  for (int j = 0; j < kQuad; ++j) beside[j] = at_maximum && dx[j] == 0 ? Real(0) : e[j];
  tail += sum(beside);
}
template <bool at_maximum, class Real>
KCD_DEVICE void count_maxima(const Real (&dx)[kQuad], Real& ones) {
#pragma unroll
  for (int j = 0; j < kQuad; ++j)
    if (at_maximum && dx[j] == 0) ones += 1;
}

// One thread's sums, relative to maxima that its group shares: after the first classes a new maximum is rare, and between two of
// them the sums are plain.
template <class Real>
struct Summation {
  const Scale<Real>& scale;
  const Row &student, &teacher;
  const Group& group;
  bool with_teacher;                     // if not, the teacher's row is the student's
  const int32_t& with_teacher_entropy;   // bool, where the kernel's arguments lie: a copy would take a register
  RowSums<Real>& sums;

  // Whether some logit of the group's classes at hand is at a maximum, to which the sums are moved then.
  KCD_DEVICE_MEMBER bool reach(Real z_max, Real y_max) const {
    if (!group.any(reaches(z_max, sums.student.max) || reaches(y_max, sums.teacher.max))) return false;
    const Real student_max = greater_of(sums.student.max, group.greatest(z_max));
    const Real teacher_max = greater_of(sums.teacher.max, group.greatest(y_max));
    sums = rebase(sums, student_max, teacher_max, scale.units);
    return true;
  }

  // Makes of four logits each what is left of them above the maxima.  Logits that do not exist are -inf and add nothing.
  KCD_DEVICE_MEMBER void subtract_maxima(Real (&z)[kQuad], Real (&y)[kQuad]) const {
    const Real m_z = reference(sums.student.max), m_y = reference(sums.teacher.max);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      z[j] -= m_z;
      y[j] -= m_y;
    }
  }

  // Adds four classes to the tails, and what they add to the products to `products`.
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
    sums.teacher.dot_1 += dot == dot ? dot : careful_dot(e_1, dy);
  }

  // The products once more, with care for masks.
  KCD_DEVICE_MEMBER void add_carefully(const Real (&dz)[kQuad], const Real (&dy)[kQuad], Products<Real>& products) const {
    Real e[kQuad], e_1[kQuad];
    exponentials(dz, scale, e);
    exponentials_1(dz, e, scale, e_1);
    products.dot += careful_dot(e_1, dz);
    if (!with_teacher) return;
    exponentials(dy, scale, e);
    products.cross += careful_cross(dz, dy, e, scale);
  }

  // Adds what load(quad, z, y) gives for each of kCount quads.
  template <int kCount, class Load>
  KCD_DEVICE_MEMBER void add_all(Real z_max, Real y_max, const Load& load) const {
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
        reach(z_max, with_teacher ? y_max : -Limits<Real>::infinity())
            ? each([&](const Real(&dz)[kQuad], const Real(&dy)[kQuad], Products<Real>& sum) { add<true>(dz, dy, sum); })
            : each([&](const Real(&dz)[kQuad], const Real(&dy)[kQuad], Products<Real>& sum) { add<false>(dz, dy, sum); });
    // Masks are looked for after the fact: 0 * -inf is not a number, and finite masks may leave the range without the scale.
    const Real ordinary = sizeof(Real) == 8 ? Real(1e290) : Real(1e30);
    const Real all = products.dot + products.cross;
    if (all < ordinary && all > -ordinary)
      products.cross *= scale.units.difference_scale;
    else
      products = each([&](const Real(&dz)[kQuad], const Real(&dy)[kQuad], Products<Real>& sum) { add_carefully(dz, dy, sum); });
    sums.student.dot_1 += products.dot;
    sums.cross += products.cross;
  }

  template <Type kType>
  KCD_DEVICE_MEMBER void octets(const Octet& z, const Octet& y, int, int, int) const {
    add_all<kQuads<kType>>(greatest<kType>(z), greatest<kType>(y), [&](int quad, Real(&z_quad)[kQuad], Real(&y_quad)[kQuad]) {
      unpack<kType>(z, quad, z_quad);
      unpack<kType>(y, quad, y_quad);
    });
  }

  KCD_DEVICE_MEMBER void quad(int c, int n) const {
    Real z[kQuad], y[kQuad];
    load_quad(student, c, n, z);
    load_quad(teacher, c, n, y);
    add_all<1>(greatest(z), greatest(y), [&](int, Real(&z_quad)[kQuad], Real(&y_quad)[kQuad]) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) z_quad[j] = z[j], y_quad[j] = y[j];
    });
  }
};

// ---- the kernel

template <class Real>
struct ForwardArguments {
  Problem problem;
  RowOutputs outputs;
  Scale<Real> scale;
  int row_threads, parts;
  int32_t with_teacher_entropy;   // bool

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
  if (lane < kWarp) sums = Group{kWholeWarp}.merge(lane < a.parts ? pieces[lane] : no_sums<Real>(), a.scale.units);
  return true;
}

// The cross sum once more, against the row's maxima, by a group of the row's threads: what was infinite against a maximum of the
// way there may vanish against the greatest.
template <class Real>
KCD_DEVICE Real cross_of_row(const ForwardArguments<Real>& a, int64_t i, const Group& group, const RowSums<Real>& sums) {
  const Problem& p = a.problem;
  const Row student = row_of(p.student, i), teacher = row_of(p.teacher, p.teacher_row_of(i));
  const int classes = static_cast<int>(p.classes), lanes = group.lanes();
  Real cross = 0;
  for (int c = thread_of_row(lanes) * kQuad; c < classes; c += lanes * kQuad) {
    Real z[kQuad], y[kQuad], e[kQuad];
    load_quad(student, c, classes - c, z);
    load_quad(teacher, c, classes - c, y);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      z[j] -= reference(sums.student.max);
      y[j] -= reference(sums.teacher.max);
    }
    exponentials(y, a.scale, e);
    cross += careful_cross(z, y, e, a.scale);
  }
  return group.sum(cross);
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
      out[i] = ranked(candidate, static_cast<const Score*>(a.score)[i], row.entropy, row.kl);
    };
    a.ranking.is_double ? copy(static_cast<double*>(a.ranked)) : copy(static_cast<float*>(a.ranked));
    return;
  }
  const Real value = a.value == Value::kl                ? row.kl
                     : a.value == Value::cross_entropy   ? row.cross_entropy
                     : a.value == Value::teacher_entropy ? row.teacher_entropy
                                                         : row.entropy;
  static_cast<Real*>(a.ranked)[i] = ranked(candidate, value, row.entropy, row.kl);
}

// Where a thread stands.
struct Place {
  int row;       // may be past the last one
  Group group;   // of the row's threads those in this warp
};

KCD_DEVICE Place place_of(int row_threads) {
  const int thread = thread_index(), block_rows = static_cast<int>(blockDim.x) / row_threads;
  return {static_cast<int>(blockIdx.x) * block_rows + thread / row_threads,
          group_of(thread, row_threads < kWarp ? row_threads : kWarp)};
}

// The sums of the calling thread's share of a row, relative to maxima that the group shares.
template <class Real>
KCD_DEVICE RowSums<Real> sum_share(const ForwardArguments<Real>& a) {
  const Problem& p = a.problem;
  const Place place = place_of(a.row_threads);
  RowSums<Real> sums = no_sums<Real>();
  if (place.row >= p.rows || !p.valid(place.row)) return sums;
  const int64_t teacher_row = p.teacher_row_of(place.row);
  const Row student = row_of(p.student, place.row), teacher = teacher_row >= 0 ? row_of(p.teacher, teacher_row) : student;
  const Summation<Real> summation{a.scale, student, teacher, place.group, teacher_row >= 0, a.with_teacher_entropy, sums};
  const Part part = part_of(student, static_cast<int>(p.classes), static_cast<int>(blockIdx.y), a.parts);
  walk<Real>(student, teacher, part, a.row_threads, summation);
  return sums;
}

template <class Real>
__global__ void __launch_bounds__(sizeof(Real) == 8 ? kThreads : kManyThreads, 1) forward_rows(const ForwardArguments<Real> a) {
  RowSums<Real> sums = sum_share(a);
  const Place place = place_of(a.row_threads);
  const bool has_row = place.row < a.problem.rows;
  sums = merge_threads(sums, place.group, a.row_threads, has_row, a.scale.units);
  if (a.parts > 1 && !merge_parts(a, place.row, static_cast<int>(blockIdx.y), sums)) return;
  // The row's first group, all of whose threads hold the sums.
  if (has_row && thread_of_row(a.row_threads) < kWarp && sums.cross == Limits<Real>::infinity())
    sums.cross = cross_of_row(a, place.row, place.group, sums);
  if (has_row && thread_of_row(a.row_threads) == 0) finish_row(a, place.row, sums);

  if (!a.with_loss || !is_last_block(a.blocks_arrived, gridDim.x)) return;
  select_in_block(a.ranking, a.selection);
  reduce_in_block<Real>(a.problem, a.loss);
}

}   // namespace kcd::cuda
