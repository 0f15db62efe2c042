// One read of every row: KL, entropies, cross entropy, and what the backward pass needs.
// Compiled once for each instruction set; KCD_SET names the one at hand.
#include <cstdlib>
#include <new>

#include "cpu/convert.h"
#include "cpu/gradient.h"
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

// What a row's gradient is made of: e^((z - m)/T) and e^((y - m)/T) of every class, m the maximum of its piece of the row, and
// those maxima.
template <class Real>
struct Exponentials {
  Real *student, *teacher, *student_max, *teacher_max;
};

// e, f: where this vector's exponentials are kept; null: nowhere.
template <Power power, bool with_teacher, bool with_teacher_entropy, bool keep, class Real>
KCD_INLINE void accumulate(Vector<Real> dz, Vector<Real> dy, const Scale<Real>& scale, LaneSums<Real>& sums, Real* e, Real* f) {
  const Vector<Real> student = exp2(dz * scale.per_logit);
  if (keep) store<Real>(e, student);
  sums.student.template add<power, true>(dz, student, scale);
  if (!with_teacher) return;
  const Vector<Real> log_teacher = dy * scale.per_logit, teacher = exp2(log_teacher);
  if (keep) store<Real>(f, teacher);
  sums.teacher.template add<power, with_teacher_entropy>(dy, teacher, scale);
  // A class without mass for the teacher adds 0, also where the student rules it out.
  const Vector<Real> difference = (dy - dz) * scale.units.difference_scale;
  sums.cross += teacher * (log_teacher < static_cast<Real>(kVanishing) ? Vector<Real>{} : difference);
}

// The sums of n classes that lie side by side, relative to their own maxima.  `y` is not read without a teacher.
template <Power power, bool with_teacher, bool with_teacher_entropy, bool keep, class Real>
KCD_INLINE RowSums<Real> sum_piece(const Real* z, const Real* y, int64_t n, const Scale<Real>& scale, Ahead next_z, Ahead next_y,
                                   Real* e, Real* f) {
  const Real least = -Limits<Real>::infinity();
  const Real student_max = maximum(z, n), teacher_max = with_teacher ? maximum(y, n) : Real(0);
  const Vector<Real> m_z = broadcast(reference(student_max)), m_y = broadcast(reference(teacher_max));
  LaneSums<Real> sums;
  int64_t j = 0;
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) {
    next_z.fetch(j);
    if (with_teacher) next_y.fetch(j);
    accumulate<power, with_teacher, with_teacher_entropy, keep, Real>(load(z + j) - m_z, with_teacher ? load(y + j) - m_y : m_y,
                                                                      scale, sums, e + j, f + j);
  }
  if (j < n)   // lanes past the end hold -inf in both and add nothing
    accumulate<power, with_teacher, with_teacher_entropy, keep, Real>(
        load(z + j, n - j, least) - m_z, with_teacher ? load(y + j, n - j, least) - m_y : m_y, scale, sums, e + j, f + j);
  const ClassSums<Real> student = sums.student.total(student_max), teacher = sums.teacher.total(teacher_max);
  const Real cross = sum(sums.cross);
  // 0 * inf: the student rules out a class whose p underflows; the divergence is infinite.  What is not a number is so in a tail
  // too.
  const bool infinite = cross != cross && student.tail == student.tail && teacher.tail == teacher.tail;
  return {student, teacher, infinite ? Limits<Real>::infinity() : cross};
}

// in_range: whether float32 held all sums (Units::difference_scale); if not, they count for nothing.
template <Power power, bool with_teacher, bool with_teacher_entropy, bool keep, class Real>
RowSums<Real> sum_row(const Problem& problem, const char* student, const char* teacher, const Scale<Real>& scale, bool& in_range,
                      const Exponentials<Real>& kept) {
  alignas(64) Real z[kPiece], y[kPiece];
  RowSums<Real> row;
  in_range = true;
  for (int64_t first = 0; first < problem.classes; first += kPiece) {
    const int64_t n = problem.classes - first < kPiece ? problem.classes - first : kPiece;
    const RowSums<Real> next = sum_piece<power, with_teacher, with_teacher_entropy, keep>(
        piece(problem.student.type, student, first, n, z),
        with_teacher ? piece(problem.teacher.type, teacher, first, n, y) : nullptr, n, scale,
        ahead(problem.student, student, first), ahead(problem.teacher, teacher, first), kept.student + first, kept.teacher + first);
    if (keep) {
      kept.student_max[first / kPiece] = next.student.max;
      kept.teacher_max[first / kPiece] = next.teacher.max;
    }
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

template <Power power, bool with_teacher, bool with_teacher_entropy, bool keep, class Real>
RowSums<Real> sum_row(const Problem& problem, const char* student, const char* teacher, const Scale<Real>& scale,
                      const Exponentials<Real>& kept, bool& in_range) {
  RowSums<Real> row = sum_row<power, with_teacher, with_teacher_entropy, keep>(problem, student, teacher, scale, in_range, kept);
  if (!in_range && sizeof(Real) < sizeof(double)) {
    const Scale<double> wide_scale(problem.temperature);
    bool wide_in_range;
    const RowSums<double> wide =
        sum_row<power, with_teacher, with_teacher_entropy, false>(problem, student, teacher, wide_scale, wide_in_range, {});
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

// The gradient of a row from its exponentials.
template <Power power, bool with_ce, class Real>
void gradient_of_row(const Problem& problem, const Gradient& gradient, int64_t i, const char* student, const RowSums<Real>& sums,
                     const Exponentials<Real>& kept, const Scale<Real>& scale) {
  alignas(64) Real z_scratch[kPiece], scratch[kPiece];
  const Real* row_weight = static_cast<const Real*>(gradient.row_weight);
  const Real kd = static_cast<Real>(gradient.kd_factor * (row_weight ? static_cast<double>(row_weight[i]) : 1.0));
  const Real ce = static_cast<Real>(gradient.ce_factor);
  const Factors<Real> factors{reference(sums.student.max), reference(sums.teacher.max), kd * (1 / sums.student.sum()),
                              kd * (1 / sums.teacher.sum()), ce * (1 / sums.student.sum_1())};
  char* row = const_cast<char*>(gradient.out.row(i));
  const Type type = problem.student.type;
  constexpr bool with_z = with_ce && power == Power::other;
  for (int64_t first = 0; first < problem.classes; first += kPiece) {
    const int64_t n = problem.classes - first < kPiece ? problem.classes - first : kPiece;
    const Factors<Real> here =
        factors.of_piece(kept.student_max[first / kPiece], kept.teacher_max[first / kPiece], scale.units.inverse_temperature);
    const Real *e = kept.student + first, *f = kept.teacher + first;
    const Real* z = with_z ? piece(type, student, first, n, z_scratch) : nullptr;
    const Vector<Real> m_z = broadcast(here.student_max);
    const auto element = [&](int64_t j, int64_t m) {   // exponentials may be read past the end, logits not
      const Vector<Real> dz = with_z ? load_some(z + j, m) - m_z : Vector<Real>{};
      return gradient_of<power, true, with_ce>(load(e + j), load(f + j), dz, here, scale);
    };
    Real* out = gradient_piece(type, row, first, scratch);
    (gradient.streaming && out != scratch) ? write_piece<true>(out, n, element) : write_piece<false>(out, n, element);
    if (with_ce && problem.labels[i] >= first && problem.labels[i] < first + n) out[problem.labels[i] - first] -= ce;
    finish_gradient_piece(type, row, first, n, out);
  }
}

// Memory of a thread for the exponentials of a row, as large as its largest row.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  template <class Real>
  Exponentials<Real> exponentials(int64_t classes) {
    const int64_t pieces = (classes + kPiece - 1) / kPiece, padded = pieces * kPiece + kLanes<Real>;
    const size_t bytes = static_cast<size_t>(2 * (padded + pieces)) * sizeof(Real);
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = 0;
      memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      if (!memory_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    Real* p = static_cast<Real*>(memory_);
    return {p, p + padded, p + 2 * padded, p + 2 * padded + pieces};
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};
thread_local Scratch scratch_of_thread;

template <class Real>
KCD_INLINE bool finite(Real x) {
  return x - x == 0;
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
    bool in_range;
    if (with_teacher)
      sums = outputs.teacher_entropy ? sum_row<power, true, true, false>(problem, student, teacher, scale, {}, in_range)
                                     : sum_row<power, true, false, false>(problem, student, teacher, scale, {}, in_range);
    else if (valid)
      sums = sum_row<Power::one, false, false, false>(problem, student, teacher, scale_1, {}, in_range);
    const Real label_logit =
        valid && problem.with_labels ? logit<Real>(problem.student.type, student, problem.labels[i]) : Limits<Real>::nan();
    write_row(problem, outputs, i, with_teacher, sums, label_logit, scale.units);
  }
}

template <class Real, Power power>
void forward_with_gradient(const Problem& problem, const RowOutputs& outputs, const Gradient& gradient, int64_t begin,
                           int64_t end) {
  const Scale<Real> scale(problem.temperature);
  const Exponentials<Real> kept = scratch_of_thread.exponentials<Real>(problem.classes);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t teacher_row = problem.teacher_row_of(i);
    const bool with_ce = problem.with_labels && gradient.ce_factor != 0;
    gradient.written[i] = 0;
    if (!problem.valid(i) || teacher_row < 0) {
      forward<Real, power>(problem, outputs, i, i + 1);
      continue;
    }
    const char *student = problem.student.row(i), *teacher = problem.teacher.row(teacher_row);
    bool in_range;
    const RowSums<Real> sums = outputs.teacher_entropy
                                   ? sum_row<power, true, true, true>(problem, student, teacher, scale, kept, in_range)
                                   : sum_row<power, true, false, true>(problem, student, teacher, scale, kept, in_range);
    const Real label_logit =
        problem.with_labels ? logit<Real>(problem.student.type, student, problem.labels[i]) : Limits<Real>::nan();
    write_row(problem, outputs, i, true, sums, label_logit, scale.units);
    // What is infinite or not a number is left to the backward pass.
    if (!in_range || !finite(sums.cross + sums.student.sum() + sums.teacher.sum() + sums.student.max + sums.teacher.max)) continue;
    with_ce ? gradient_of_row<power, true>(problem, gradient, i, student, sums, kept, scale)
            : gradient_of_row<power, false>(problem, gradient, i, student, sums, kept, scale);
    gradient.written[i] = 1;
  }
  if (gradient.streaming) stream_fence();
}

template <class Real>
void forward(const Problem& problem, const RowOutputs& outputs, const Gradient* gradient, int64_t begin, int64_t end) {
  with_power(problem.temperature, [&](auto power) {
    gradient ? forward_with_gradient<Real, power.value>(problem, outputs, *gradient, begin, end)
             : forward<Real, power.value>(problem, outputs, begin, end);
  });
}

}   // namespace

void forward(const Problem& problem, const RowOutputs& outputs, const Gradient* gradient, int64_t begin, int64_t end) {
  problem.student.type == Type::float64 ? forward<double>(problem, outputs, gradient, begin, end)
                                        : forward<float>(problem, outputs, gradient, begin, end);
}

}   // namespace kcd::cpu::KCD_SET
