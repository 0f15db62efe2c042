// One read of every row: KL, entropies, cross entropy, and what the backward pass needs.
// Compiled once for each instruction set; KCD_SET names the one at hand.
#include "cpu/convert.h"
#include "cpu/sets.h"
#include "cpu/temperature.h"
#include "cpu/vector.h"
#include "math/row_outputs.h"

namespace kcd::cpu::KCD_SET {
namespace {

// ClassSums lane by lane.
template <class Real>
struct ClassLanes {
  Vector<Real> ones{}, tail{}, tail_1{}, dot_1{};

  // dx <= 0, e = e^(dx/T): a class at the maximum is counted, any other goes into the tails.
  template <Power power, bool at_1>
  KCD_MEMBER void add(Vector<Real> dx, Vector<Real> e, const Scale<Real>& scale) {
    const Vector<Real> zero = {};
    ones += dx == zero ? broadcast(Real(1)) : zero;
    tail += dx == zero ? zero : e;
    if (!at_1) return;
    const Vector<Real> e_1 = at_temperature_1<power>(e, dx, scale);
    tail_1 += dx == zero ? zero : e_1;
    dot_1 += e_1 * greater_of(broadcast(-Limits<Real>::largest()), dx);   // -inf adds 0
  }
  KCD_MEMBER ClassSums<Real> total(Real max) const { return {max, sum(ones), sum(tail), sum(tail_1), sum(dot_1)}; }
};

template <class Real>
struct LaneSums {
  ClassLanes<Real> student, teacher;
  Vector<Real> cross{};
};

template <Power power, bool with_teacher, bool with_teacher_entropy, class Real>
KCD_INLINE void accumulate(Vector<Real> dz, Vector<Real> dy, const Scale<Real>& scale, LaneSums<Real>& sums) {
  sums.student.template add<power, true>(dz, exp2(dz * scale.per_logit), scale);
  if (!with_teacher) return;
  const Vector<Real> log_teacher = dy * scale.per_logit, teacher = exp2(log_teacher);
  sums.teacher.template add<power, with_teacher_entropy>(dy, teacher, scale);
  // A class without mass for the teacher adds 0, also where the student rules it out.
  const Vector<Real> difference = (dy - dz) * scale.units.difference_scale;
  sums.cross += teacher * (log_teacher < static_cast<Real>(kVanishing) ? Vector<Real>{} : difference);
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
  const ClassSums<Real> student = sums.student.total(student_max), teacher = sums.teacher.total(teacher_max);
  const Real cross = sum(sums.cross);
  // 0 * inf: the student rules out a class whose p underflows; the divergence is infinite.  What is not a number is so in a tail
  // too.
  const bool infinite = cross != cross && student.tail == student.tail && teacher.tail == teacher.tail;
  return {student, teacher, infinite ? Limits<Real>::infinity() : cross};
}

// in_range: whether float32 held all sums (Units::difference_scale); if not, they count for nothing.
template <Power power, bool with_teacher, bool with_teacher_entropy, class Real>
RowSums<Real> sum_row(const Problem& problem, const char* student, const char* teacher, const Scale<Real>& scale, bool& in_range) {
  alignas(64) Real z[kPiece], y[kPiece];
  RowSums<Real> row;
  in_range = true;
  for (int64_t first = 0; first < problem.classes; first += kPiece) {
    const int64_t n = problem.classes - first < kPiece ? problem.classes - first : kPiece;
    const RowSums<Real> next = sum_piece<power, with_teacher, with_teacher_entropy>(
        piece(problem.student.type, student, first, n, z),
        with_teacher ? piece(problem.teacher.type, teacher, first, n, y) : nullptr, n, scale,
        ahead(problem.student, student, first), ahead(problem.teacher, teacher, first));
    in_range &= next.cross < Real(1e30) && next.cross > Real(-1e30);
    row = first ? merge(row, next, scale.units) : next;
  }
  return row;
}

template <class To>
KCD_INLINE ClassSums<To> convert(const ClassSums<double>& s) {
  return {static_cast<To>(s.max), static_cast<To>(s.ones), static_cast<To>(s.tail), static_cast<To>(s.tail_1),
          static_cast<To>(s.dot_1)};
}

// The cross sum once more, against the row's maxima: what was infinite against those of a piece may vanish against the greatest.
double cross_of_row(const Problem& problem, const char* student, const char* teacher, double student_max, double teacher_max) {
  double z_scratch[kPiece], y_scratch[kPiece], cross = 0;
  for (int64_t first = 0; first < problem.classes; first += kPiece) {
    const int64_t n = problem.classes - first < kPiece ? problem.classes - first : kPiece;
    const double* z = piece(problem.student.type, student, first, n, z_scratch);
    const double* y = piece(problem.teacher.type, teacher, first, n, y_scratch);
    for (int64_t j = 0; j < n; ++j) {
      const double log_teacher = (y[j] - reference(teacher_max)) / problem.temperature;
      if (log_teacher < kVanishing * kLn2) continue;
      const double difference = (y[j] - reference(teacher_max)) - (z[j] - reference(student_max));
      if (difference == Limits<double>::infinity()) return difference;
      cross += exponential(log_teacher) * difference;
    }
  }
  return cross;
}

template <Power power, bool with_teacher, bool with_teacher_entropy, class Real>
RowSums<Real> sum_row(const Problem& problem, const char* student, const char* teacher, const Scale<Real>& scale) {
  bool in_range;
  RowSums<Real> row = sum_row<power, with_teacher, with_teacher_entropy>(problem, student, teacher, scale, in_range);
  if (!in_range && sizeof(Real) < sizeof(double)) {
    const Scale<double> wide_scale(problem.temperature);
    const RowSums<double> wide =
        sum_row<power, with_teacher, with_teacher_entropy>(problem, student, teacher, wide_scale, in_range);
    row = {convert<Real>(wide.student), convert<Real>(wide.teacher),
           static_cast<Real>(wide.cross / wide_scale.units.difference_scale * scale.units.difference_scale)};
  }
  if (with_teacher && row.cross == Limits<Real>::infinity())
    row.cross = static_cast<Real>(cross_of_row(problem, student, teacher, static_cast<double>(row.student.max),
                                               static_cast<double>(row.teacher.max))) *
                scale.units.difference_scale;
  return row;
}

template <class Real>
KCD_INLINE Real logit(Type type, const char* row, int64_t c) {
  Real scratch[1];
  return *piece(type, row, c, 1, scratch);
}

template <class Real, Power power>
void forward(const Problem& problem, const RowOutputs& outputs, int64_t begin, int64_t end) {
  const Scale<Real> scale(problem.temperature), scale_1(1.0);
  for (int64_t i = begin; i < end; ++i) {
    const char* student = problem.student.row(i);
    const int64_t teacher_row = problem.teacher_row_of(i);
    const bool valid = problem.valid(i), with_teacher = valid && teacher_row >= 0;
    const char* teacher = with_teacher ? problem.teacher.row(teacher_row) : nullptr;
    RowSums<Real> sums{};
    if (with_teacher)
      sums = outputs.teacher_entropy ? sum_row<power, true, true>(problem, student, teacher, scale)
                                     : sum_row<power, true, false>(problem, student, teacher, scale);
    else if (valid)
      sums = sum_row<Power::one, false, false>(problem, student, teacher, scale_1);
    const Real label_logit =
        valid && problem.with_labels ? logit<Real>(problem.student.type, student, problem.labels[i]) : Limits<Real>::nan();
    write_row(problem, outputs, i, with_teacher, sums, label_logit, scale.units);
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
