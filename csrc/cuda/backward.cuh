// The gradient: rows that count are read again, every element is written once.
#pragma once
#include "cuda/formula.cuh"
#include "cuda/shape.h"
#include "cuda/walk.cuh"
#include "math/row_stats.h"

namespace kcd::cuda {

template <class Real>
struct BackwardArguments {
  Problem problem;
  Scale<Real> scale;
  int row_threads, parts;
  const Real* stats;         // as written by the forward pass
  const uint8_t* selected;   // bool, one a row
  const Real* row_weight;    // null: 1
  const Real* grad_output;   // one a row where grad_output_stride is 1, one in all where it is 0
  int64_t grad_output_stride;
  const int64_t* counts;       // rows selected and rows valid
  Real kd_factor, ce_weight;   // kd_weight T
  bool mean;
  Real ranks;
  Logits out;   // the student's type; may be the student's own memory
};

// d = ce pi + student q - teacher p with every factor folded into the inverse sum beside it; 0 at the label's place less ce_label.
template <class Real>
struct RowFactors {
  Real student_max, teacher_max;
  Real student, teacher;   // kd / sum e^(dz/T), kd / sum e^(dy/T)
  Real ce, ce_label;       // ce / sum e^dz, ce
  int label;               // -1: none
};

// Writes one row.
template <class Real>
struct GradientOfRow {
  const Scale<Real>& scale;
  const Row &student, &teacher, &out;
  bool with_kd, with_ce;
  const RowFactors<Real>& f;

  // Of the classes c to c + 3.
  KCD_DEVICE_MEMBER void compute(const Real (&z)[kQuad], const Real (&y)[kQuad], int c, Real (&d)[kQuad]) const {
    Real dz[kQuad], e[kQuad] = {};
#pragma unroll
    for (int j = 0; j < kQuad; ++j) dz[j] = z[j] - f.student_max;
    if (with_kd || scale.power != Power::other) exponentials(dz, scale, e);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) d[j] = 0;
    if (with_kd) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) d[j] = f.student * e[j] - f.teacher * exp2((y[j] - f.teacher_max) * scale.per_logit);
    }
    if (with_ce) {
      Real e_1[kQuad];
      exponentials_1(dz, e, scale, e_1);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        d[j] += f.ce * e_1[j];
        if (c + j == f.label) d[j] -= f.ce_label;
      }
    }
  }

  template <Type kType>
  KCD_DEVICE_MEMBER void octets(const Octet& z, const Octet& y, int one, int other, int end) const {
    Octet gradient;
#pragma unroll
    for (int quad = 0; quad < kQuads<kType>; ++quad) {
      float z_quad[kQuad], y_quad[kQuad], d[kQuad];
      unpack<kType>(z, quad, z_quad);
      unpack<kType>(y, quad, y_quad);
      compute(z_quad, y_quad, class_of<kType>(quad, one, other), d);
      pack<kType>(d, quad, gradient);
    }
    char* first = const_cast<char*>(out.at(one));
    if (kType == Type::float32 && out.size == 2) {   // student and teacher of different types
      if (one < end) store_narrow(gradient, out.type, first);
      return;
    }
    if (one < end) store_aligned(first, gradient.word[0]);
    if (other < end) store_aligned(const_cast<char*>(out.at(other)), gradient.word[1]);
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
KCD_DEVICE void zero(const Row& out, const Part& part, int threads) {
  const int thread = thread_of_row(threads);
  const int words = (part.end - part.first) / kOctet * (kOctet * out.size / kWordBytes);
  char* first = const_cast<char*>(out.at(part.first));
  for (int word = thread; word < words; word += threads) store_aligned(first + int64_t{word} * kWordBytes, {});
  const int last = part.first + (part.end - part.first) / kOctet * kOctet;
  const auto one_by_one = [&](int begin, int end) {
    for (int64_t byte = thread; byte < int64_t{end - begin} * out.size; byte += threads) const_cast<char*>(out.at(begin))[byte] = 0;
  };
  one_by_one(part.begin, part.first);
  one_by_one(last, part.end);
}

template <class Real>
KCD_DEVICE RowFactors<Real> factors_of(const BackwardArguments<Real>& a, int64_t i, bool with_kd, bool with_ce,
                                       int64_t teacher_row) {
  const Problem& p = a.problem;
  const auto share = [&](Real factor, int64_t count) {
    const Real divisor = a.mean ? static_cast<Real>(count) / a.ranks : Real(1);
    return divisor > 0 ? factor / divisor : Real(0);
  };
  const Real g = a.grad_output[i * a.grad_output_stride];
  RowFactors<Real> f{};
  f.student_max = a.stats[kStudentMax * p.rows + i];
  f.label = -1;
  if (with_kd) {
    // No row is selected that the teacher does not hold, but one that was named twice (rows.cuh): its gradient is not a number.
    const Real kd = g * share(a.kd_factor, a.counts[0]) * (a.row_weight ? a.row_weight[i] : Real(1));
    const Real factor = teacher_row < 0 ? Limits<Real>::nan() : kd;
    f.teacher_max = a.stats[kTeacherMax * p.rows + i];
    f.student = factor * a.stats[kStudentInverseSum * p.rows + i];
    f.teacher = factor * a.stats[kTeacherInverseSum * p.rows + i];
  }
  if (with_ce) {
    const bool exists = p.labels[i] >= 0 && p.labels[i] < p.classes;
    if (exists) f.label = static_cast<int>(p.labels[i]);
    f.ce_label = exists ? g * share(a.ce_weight, a.counts[1]) : Limits<Real>::nan();
    f.ce = f.ce_label * a.stats[kStudentInverseSum1 * p.rows + i];
  }
  return f;
}

template <class Real>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 8 ? 1 : 4) backward_rows(const BackwardArguments<Real> a) {
  const Problem& p = a.problem;
  const int thread = static_cast<int>(threadIdx.x), block_rows = static_cast<int>(blockDim.x) / a.row_threads;
  // From the last row to the first: what the forward pass read last is still in the cache.
  const int64_t i = p.rows - 1 - (static_cast<int64_t>(blockIdx.x) * block_rows + thread / a.row_threads);
  if (i < 0) return;
  const bool with_ce = p.with_labels && a.ce_weight != 0 && p.valid(i), with_kd = a.selected[i] != 0;
  const Row out = row_of(a.out, i);
  const Part part = part_of(out, static_cast<int>(p.classes), a.parts - 1 - static_cast<int>(blockIdx.y), a.parts);
  if (!with_ce && !with_kd) return zero(out, part, a.row_threads);

  const int64_t teacher_row = with_kd ? p.teacher_row_of(i) : -1;
  const Row student = row_of(p.student, i), teacher = teacher_row >= 0 ? row_of(p.teacher, teacher_row) : student;
  const RowFactors<Real> factors = factors_of(a, i, with_kd, with_ce, teacher_row);
  const GradientOfRow<Real> gradient{a.scale, student, teacher, out, with_kd, with_ce, factors};
  walk<Real>(student, teacher, part, a.row_threads, gradient);
}

}   // namespace kcd::cuda
