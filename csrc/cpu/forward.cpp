// One read of every row: KL, entropies, cross entropy, and what the backward pass needs.
// Compiled once for each instruction set; KCD_SET names the one at hand.
#include "cpu/convert.h"
#include "cpu/sets.h"
#include "cpu/temperature.h"
#include "cpu/vector.h"
#include "math/row_stats.h"

namespace kcd::cpu::KCD_SET {
namespace {

// The sums of one vector of classes, lane by lane.
template <class Real>
struct LaneSums {
  Vector<Real> student_sum{}, student_sum_1{}, student_dot_1{}, teacher_sum{}, cross{}, teacher_sum_1{}, teacher_dot_1{};
};

// sum e^x x, to which x = -inf adds 0.
template <class Real>
KCD_INLINE Vector<Real> weighted(Vector<Real> e, Vector<Real> x) {
  return e * greater_of(broadcast(-Limits<Real>::largest()), x);
}

template <Power power, bool with_teacher, bool with_teacher_entropy, class Real>
KCD_INLINE void accumulate(Vector<Real> dz, Vector<Real> dy, const Scale<Real>& scale, LaneSums<Real>& sums) {
  const Vector<Real> student = exp2(dz * scale.per_logit);
  const Vector<Real> student_1 = at_temperature_1<power>(student, dz, scale);
  sums.student_sum_1 += student_1;
  sums.student_dot_1 += weighted<Real>(student_1, dz);
  if (!with_teacher) return;
  const Vector<Real> teacher = exp2(dy * scale.per_logit);
  sums.student_sum += student;
  sums.teacher_sum += teacher;
  // A class that the teacher rules out (-inf) adds 0, also where the student does too.  Any other has p > 0: the floor under
  // e^(dy/T) keeps the divergence infinite where the student rules it out and p underflows.
  const Vector<Real> zero = {}, infinity = broadcast(Limits<Real>::infinity()), smallest = broadcast(Limits<Real>::smallest());
  const Vector<Real> difference = dy == -infinity ? zero : dy - dz;
  sums.cross += greater_of(smallest, teacher) * difference;
  if (!with_teacher_entropy) return;
  const Vector<Real> teacher_1 = at_temperature_1<power>(teacher, dy, scale);
  sums.teacher_sum_1 += teacher_1;
  sums.teacher_dot_1 += weighted<Real>(teacher_1, dy);
}

// Two chains, since each step waits for the one before.
template <class Real>
KCD_INLINE Real maximum(const Real* x, int64_t n) {
  const Real least = -Limits<Real>::infinity();
  Vector<Real> even = broadcast(least), odd = even;
  int64_t j = 0;
  for (; j + 2 * kLanes<Real> <= n; j += 2 * kLanes<Real>) {
    even = greater_of(load(x + j), even);
    odd = greater_of(load(x + j + kLanes<Real>), odd);
  }
  for (; j < n; j += kLanes<Real>) even = greater_of(j + kLanes<Real> <= n ? load(x + j) : load(x + j, n - j, least), even);
  return kcd::maximum(greater_of(odd, even));
}

// Where the logits lie that are wanted next.  The hardware's own prefetcher stops at every page; asking for the row after this one
// (or the piece) while this one is summed hides most of the way to memory.
struct Ahead {
  const char* address;
  int64_t bytes_a_lane;
  KCD_MEMBER void fetch(int64_t j) const { __builtin_prefetch(address + j * bytes_a_lane); }
};

KCD_INLINE Ahead ahead(const Logits& logits, const char* row, int64_t first) {
  constexpr int64_t kDistance = 4096;   // bytes; measured: 2048 to 8192 are alike
  return {row + first * size_of(logits.type) + kDistance, size_of(logits.type)};
}

// The sums of n classes that lie side by side, relative to their own maxima.  `y` is not read without a teacher.
template <Power power, bool with_teacher, bool with_teacher_entropy, class Real>
KCD_INLINE RowSums<Real> sum_piece(const Real* z, const Real* y, int64_t n, const Scale<Real>& scale, Ahead next_z, Ahead next_y) {
  const Real least = -Limits<Real>::infinity();
  const Real student_max = maximum(z, n), teacher_max = with_teacher ? maximum(y, n) : Real(0);
  const Vector<Real> m_z = broadcast(reference(student_max)), m_y = broadcast(reference(teacher_max));
  LaneSums<Real> sums;
  int64_t j = 0;
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) {
    next_z.fetch(j);
    if (with_teacher) next_y.fetch(j);
    accumulate<power, with_teacher, with_teacher_entropy, Real>(load(z + j) - m_z, with_teacher ? load(y + j) - m_y : m_y, scale,
                                                                sums);
  }
  if (j < n)   // lanes past the end hold -inf in both and add nothing
    accumulate<power, with_teacher, with_teacher_entropy, Real>(load(z + j, n - j, least) - m_z,
                                                                with_teacher ? load(y + j, n - j, least) - m_y : m_y, scale, sums);
  return {student_max,           teacher_max,     sum(sums.student_sum),   sum(sums.student_sum_1), sum(sums.student_dot_1),
          sum(sums.teacher_sum), sum(sums.cross), sum(sums.teacher_sum_1), sum(sums.teacher_dot_1)};
}

template <Power power, bool with_teacher, bool with_teacher_entropy, class Real>
RowSums<Real> sum_row(const Problem& problem, const char* student, const char* teacher, const Scale<Real>& scale) {
  alignas(64) Real z[kPiece], y[kPiece];
  RowSums<Real> row;
  for (int64_t first = 0; first < problem.classes; first += kPiece) {
    const int64_t n = problem.classes - first < kPiece ? problem.classes - first : kPiece;
    const RowSums<Real> next = sum_piece<power, with_teacher, with_teacher_entropy>(
        piece(problem.student.type, student, first, n, z),
        with_teacher ? piece(problem.teacher.type, teacher, first, n, y) : nullptr, n, scale,
        ahead(problem.student, student, first), ahead(problem.teacher, teacher, first));
    row = first ? merge(row, next, scale.inverse_temperature) : next;
  }
  return row;
}

template <class Real>
KCD_INLINE Real logit(Type type, const char* row, int64_t c) {
  Real scratch[1];
  return *piece(type, row, c, 1, scratch);
}

template <class Real, Power power>
void forward(const Problem& problem, const RowOutputs& outputs, int64_t begin, int64_t end) {
  Real* cross_entropies = static_cast<Real*>(outputs.cross_entropy);
  Real* teacher_entropies = static_cast<Real*>(outputs.teacher_entropy);
  const Scale<Real> scale(problem.temperature), scale_1(1.0);
  const Real nan = Limits<Real>::nan();
  for (int64_t i = begin; i < end; ++i) {
    const char* student = problem.student.row(i);
    const int64_t teacher_row = problem.teacher_row_of(i);
    const bool valid = problem.valid(i), with_teacher = valid && teacher_row >= 0;
    const char* teacher = with_teacher ? problem.teacher.row(teacher_row) : nullptr;
    RowSums<Real> sums{};
    if (with_teacher)
      sums = teacher_entropies ? sum_row<power, true, true>(problem, student, teacher, scale)
                               : sum_row<power, true, false>(problem, student, teacher, scale);
    else if (valid)
      sums = sum_row<Power::one, false, false>(problem, student, teacher, scale_1);
    if (teacher_entropies) teacher_entropies[i] = with_teacher ? entropy(sums.teacher_sum_1, sums.teacher_dot_1) : nan;
    if (cross_entropies)
      cross_entropies[i] = valid ? cross_entropy(sums, logit<Real>(problem.student.type, student, problem.labels[i])) : Real(0);
    Real* stats = static_cast<Real*>(outputs.stats) + i;
    stats[kEntropy * problem.rows] = valid ? entropy(sums.student_sum_1, sums.student_dot_1) : nan;
    stats[kKl * problem.rows] = with_teacher ? kl(sums, scale.inverse_temperature) : nan;
    stats[kStudentMax * problem.rows] = reference(sums.student_max);
    stats[kStudentInverseSum * problem.rows] = 1 / sums.student_sum;
    stats[kTeacherMax * problem.rows] = reference(sums.teacher_max);
    stats[kTeacherInverseSum * problem.rows] = 1 / sums.teacher_sum;
    stats[kStudentInverseSum1 * problem.rows] = 1 / sums.student_sum_1;
  }
}

template <class Real>
void forward(const Problem& problem, const RowOutputs& outputs, int64_t begin, int64_t end) {
  with_power(problem.temperature, [&](auto power) { forward<Real, power.value>(problem, outputs, begin, end); });
}

}   // namespace

void forward(const Problem& problem, const RowOutputs& outputs, int64_t begin, int64_t end) {
  problem.student.type == Type::float64 ? forward<double>(problem, outputs, begin, end)
                                        : forward<float>(problem, outputs, begin, end);
}

}   // namespace kcd::cpu::KCD_SET
