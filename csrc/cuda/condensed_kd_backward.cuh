// The gradient.  Rows with a gradient are read again; every element is written once.
#pragma once
#include "cuda/exponentials.cuh"
#include "cuda/shape.h"
#include "cuda/targets.cuh"
#include "cuda/walk.cuh"
#include "math/row_stats.h"

namespace kcd::cuda {

template <class Real>
struct BackwardArguments {
  Problem problem;
  Scale<Real> scale;
  int row_threads, parts;
  const Real* stats;         // as written by forward_rows
  const uint8_t* selected;   // bool, one per row
  const Real* row_weight;    // null: 1
  const Real* grad_output;   // one per row if grad_output_stride is 1, a single one if it is 0
  int64_t grad_output_stride;
  const int64_t* counts;       // selected rows, valid rows
  Real kd_factor, ce_weight;   // kd_factor = kd_weight T
  bool mean;
  Real ranks;
  Logits out;   // the student's type; may be the student's own memory
};

// d = ce e^dz + student e^(dz/T) - teacher e^(dy/T) - ce_target t, minus ce_label at a class index.  A factor includes the inverse
// of its sum.
template <class Real>
struct RowFactors {
  Real student_max, teacher_max;
  Real student, teacher;   // kd / sum e^(dz/T), kd / sum e^(dy/T)
  Real ce, ce_target;      // ce mass / sum e^dz, ce
  Real ce_label;           // ce times the target of a class index
  int label;               // -1: no class index
};

// Writes the gradient of one row.
template <class Real, bool kTargets>
struct RowGradient {
  const Problem& problem;   // row `index` of it
  int64_t index;
  const Scale<Real>& scale;
  const Row &student, &teacher, &out;
  bool with_kd, with_ce;
  const RowFactors<Real>& factors;

  // Computes the gradient d of classes c to c + 3.
  KCD_DEVICE_MEMBER void compute(const Real (&z)[kQuad], const Real (&y)[kQuad], int c, Real (&d)[kQuad]) const {
    Real dz[kQuad], e[kQuad] = {};
#pragma unroll
    for (int j = 0; j < kQuad; ++j) dz[j] = z[j] - factors.student_max;
    if (with_kd || scale.power != Power::other) exponentials(dz, scale, e);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) d[j] = 0;
    if (with_kd) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j)
        d[j] = factors.student * e[j] - factors.teacher * exp2((y[j] - factors.teacher_max) * scale.per_logit);
    }
    if (with_ce) {
      Real e_1[kQuad];
      exponentials_1(dz, e, scale, e_1);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        d[j] += factors.ce * e_1[j];
        if (c + j == factors.label) d[j] -= factors.ce_label;
      }
      if constexpr (kTargets) {
        Real t[kQuad];
        load_targets(problem, index, c, static_cast<int>(problem.classes) - c, t);
#pragma unroll
        for (int j = 0; j < kQuad; ++j) d[j] -= factors.ce_target * t[j];
      }
    }
  }

  template <Type kType>
  KCD_DEVICE_MEMBER void vectors(const VectorPair& z, const VectorPair& y, int first_class, int second_class, int end) const {
    VectorPair gradient;
#pragma unroll
    for (int quad = 0; quad < kQuadsPerPair<kType>; ++quad) {
      float z_quad[kQuad], y_quad[kQuad], d[kQuad];
      unpack<kType>(z, quad, z_quad);
      unpack<kType>(y, quad, y_quad);
      compute(z_quad, y_quad, first_class_of<kType>(quad, first_class, second_class), d);
      pack<kType>(d, quad, gradient);
    }
    char* first = const_cast<char*>(out.at(first_class));
    if (kType == Type::float32 && out.size == 2) {   // student and teacher have different types
      if (first_class < end) store_as_16_bit(gradient, out.type, first);
      return;
    }
    if (first_class < end) store_aligned(first, gradient.vector[0]);
    if (second_class < end) store_aligned(const_cast<char*>(out.at(second_class)), gradient.vector[1]);
  }

  KCD_DEVICE_MEMBER void quad(int c, int n) const {
    Real z[kQuad], y[kQuad], d[kQuad];
    load_quad(student, c, n, z);
    load_quad(teacher, c, n, y);
    compute(z, y, c, d);
    store_quad(d, out, c, n);
  }
};

// Writes zeros, which are zero bytes in every type.
KCD_DEVICE void write_zeros(const Row& out, const RowPart& part, int threads) {
  const int thread = thread_in_row(threads);
  const int vectors = (part.end - part.chunk_begin) / kChunk * (kChunk * out.size / kVectorBytes);
  char* first = const_cast<char*>(out.at(part.chunk_begin));
  for (int vector = thread; vector < vectors; vector += threads) store_aligned(first + int64_t{vector} * kVectorBytes, {});
  const int last = part.chunk_begin + (part.end - part.chunk_begin) / kChunk * kChunk;
  const auto write_bytes = [&](int begin, int end) {
    for (int64_t byte = thread; byte < int64_t{end - begin} * out.size; byte += threads) const_cast<char*>(out.at(begin))[byte] = 0;
  };
  write_bytes(part.begin, part.chunk_begin);
  write_bytes(last, part.end);
}

template <bool kTargets, class Real>
KCD_DEVICE RowFactors<Real> row_factors(const BackwardArguments<Real>& a, int64_t i, bool with_kd, bool with_ce,
                                        int64_t teacher_row) {
  const Problem& p = a.problem;
  const auto per_row = [&](Real factor, int64_t count) {
    const Real divisor = a.mean ? static_cast<Real>(count) / a.ranks : Real(1);
    return divisor > 0 ? factor / divisor : Real(0);
  };
  const Real g = a.grad_output[i * a.grad_output_stride];
  RowFactors<Real> factors{};
  factors.student_max = a.stats[kStudentMax * p.rows + i];
  factors.label = -1;
  if (with_kd) {
    // A selected row has a teacher's row, unless `rows` named it twice (map_rows.cuh): then its gradient is NaN.
    const Real kd = g * per_row(a.kd_factor, a.counts[0]) * (a.row_weight ? a.row_weight[i] : Real(1));
    const Real factor = teacher_row < 0 ? Limits<Real>::nan() : kd;
    factors.teacher_max = a.stats[kTeacherMax * p.rows + i];
    factors.student = factor * a.stats[kStudentInverseSum * p.rows + i];
    factors.teacher = factor * a.stats[kTeacherInverseSum * p.rows + i];
  }
  if (with_ce) {
    const bool is_index = !kTargets || !p.soft_labels;
    const bool exists = !is_index || (p.labels[i] >= 0 && p.labels[i] < p.classes);
    if (exists && is_index) factors.label = static_cast<int>(p.labels[i]);
    factors.ce_target = exists ? g * per_row(a.ce_weight, a.counts[1]) : Limits<Real>::nan();
    factors.ce_label = kTargets ? factors.ce_target * smoothing_of<Real>(p.label_smoothing, p.classes).of_label : factors.ce_target;
    factors.ce = factors.ce_target * a.stats[kMassPerSum1 * p.rows + i];
  }
  return factors;
}

template <bool kTargets, class Real>
KCD_DEVICE void write_rows(const BackwardArguments<Real>& a) {
  const Problem& p = a.problem;
  const int thread = static_cast<int>(threadIdx.x), block_rows = static_cast<int>(blockDim.x) / a.row_threads;
  // From the last row to the first: the rows that the forward pass read last are still cached.
  const int64_t i = p.rows - 1 - (static_cast<int64_t>(blockIdx.x) * block_rows + thread / a.row_threads);
  if (i < 0) return;
  const bool with_ce = p.with_labels && a.ce_weight != 0 && p.valid(i), with_kd = a.selected[i] != 0;
  const Row out = row_of(a.out, i);
  const RowPart part = row_part(out, static_cast<int>(p.classes), a.parts - 1 - static_cast<int>(blockIdx.y), a.parts);
  if (!with_ce && !with_kd) return write_zeros(out, part, a.row_threads);

  const int64_t teacher_row = with_kd ? p.teacher_row_of(i) : -1;
  const Row student = row_of(p.student, i), teacher = teacher_row >= 0 ? row_of(p.teacher, teacher_row) : student;
  const RowFactors<Real> factors = row_factors<kTargets>(a, i, with_kd, with_ce, teacher_row);
  const RowGradient<Real, kTargets> gradient{p, i, a.scale, student, teacher, out, with_kd, with_ce, factors};
  walk<Real>(student, teacher, part, a.row_threads, gradient);
}

template <class Real>
__global__ void __launch_bounds__(kBlockThreads, sizeof(Real) == 8 ? 1 : 4) backward_rows(const BackwardArguments<Real> a) {
  write_rows<false>(a);
}

template <class Real>
__global__ void __launch_bounds__(kBlockThreads, sizeof(Real) == 8 ? 1 : 2)
    backward_rows_with_targets(const BackwardArguments<Real> a) {
  write_rows<true>(a);
}

}   // namespace kcd::cuda
