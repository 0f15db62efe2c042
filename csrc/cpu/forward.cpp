// One read of every row: KL, entropies, cross entropy, and what the backward pass needs.
// Compiled once for each instruction set; KCD_SET names the one at hand.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <new>

#include "cpu/convert.h"
#include "cpu/gradient.h"
#include "cpu/guess.h"
#include "cpu/sets.h"
#include "cpu/temperature.h"
#include "cpu/vector.h"
#include "math/row_outputs.h"

namespace kcd::cpu::KCD_SET {
namespace {

// ClassSums lane by lane.
template <class Real>
struct ClassLanes {
  Vector<Real> others{}, tail{}, tail_1{}, dot_1{};   // others: how many classes are not at the maximum

  // dx <= 0, e = e^(dx/T): a class at the maximum is counted, any other goes into the tails.
  template <Power power, bool at_1>
  KCD_MEMBER void add(Vector<Real> dx, Vector<Real> e, const Scale<Real>& scale) {
    const Mask<Real> other = differ(dx, Vector<Real>{});
    others = add_where(other, others, broadcast(Real(1)));
    tail = add_where(other, tail, e);
    if (!at_1) return;
    const Mask<Real> counts = counts_at_temperature_1<power, Real>(e, dx);
    const Vector<Real> e_1 = at_temperature_1<power, Real>(counts, e, dx, scale);
    tail_1 = add_where(other, tail_1, e_1);
    dot_1 = add_product_where(counts, dot_1, e_1, dx);   // -inf adds 0
  }
  // n: how many lanes were added in all
  KCD_MEMBER ClassSums<Real> total(Real max, int64_t n) const {
    return {max, static_cast<Real>(n) - sum(others), sum(tail), sum(tail_1), sum(dot_1)};
  }
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
  const Mask<Real> has_mass = not_less(log_teacher, broadcast(static_cast<Real>(kVanishing)));
  const Vector<Real> difference = sizeof(Real) == sizeof(double) ? (dy - dz) * scale.units.difference_scale : dy - dz;
  sums.cross += teacher * where(has_mass, difference);
}

// n classes that lie side by side; `y` is not read without a teacher.
template <class Real>
struct Piece {
  const Real *z, *y;
  Real student_max, teacher_max;
};

// The sums of n classes that lie side by side, relative to their own maxima.  with_next: finds the maxima of the next piece on the
// way, which is of n classes too: what it reads for them is in the cache afterwards, and nothing waits for it.
template <Power power, bool with_teacher, bool with_teacher_entropy, bool keep, bool with_next, class Real>
KCD_INLINE RowSums<Real> sum_piece(const Piece<Real>& here, int64_t n, const Scale<Real>& scale, Ahead later_z, Ahead later_y,
                                   Real* e, Real* f, Piece<Real>& next) {
  const Real least = -Limits<Real>::infinity();
  const Vector<Real> m_z = broadcast(reference(here.student_max)), m_y = broadcast(reference(here.teacher_max));
  Vector<Real> next_m_z = broadcast(least), next_m_y = next_m_z;
  LaneSums<Real> sums;
  int64_t j = 0;
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) {
    later_z.fetch(j);
    if (with_teacher) later_y.fetch(j);
    if (with_next) {
      next_m_z = greater_of(load(next.z + j), next_m_z);
      if (with_teacher) next_m_y = greater_of(load(next.y + j), next_m_y);
    }
    accumulate<power, with_teacher, with_teacher_entropy, keep, Real>(
        load(here.z + j) - m_z, with_teacher ? load(here.y + j) - m_y : m_y, scale, sums, e + j, f + j);
  }
  if (j < n) {   // lanes past the end hold -inf in both and add nothing
    accumulate<power, with_teacher, with_teacher_entropy, keep, Real>(
        load(here.z + j, n - j, least) - m_z, with_teacher ? load(here.y + j, n - j, least) - m_y : m_y, scale, sums, e + j, f + j);
    if (with_next) {
      next_m_z = greater_of(load(next.z + j, n - j, least), next_m_z);
      if (with_teacher) next_m_y = greater_of(load(next.y + j, n - j, least), next_m_y);
    }
  }
  if (with_next) next.student_max = maximum(next_m_z), next.teacher_max = with_teacher ? maximum(next_m_y) : Real(0);
  const int64_t lanes = (n + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
  const ClassSums<Real> student = sums.student.total(here.student_max, lanes),
                        teacher = sums.teacher.total(here.teacher_max, lanes);
  const Real cross = sum(sums.cross);
  // 0 * inf: the student rules out a class whose p underflows; the divergence is infinite.  What is not a number is so in a tail
  // too.
  const bool infinite = cross != cross && student.tail == student.tail && teacher.tail == teacher.tail;
  return {student, teacher, infinite ? Limits<Real>::infinity() : cross};
}

// A row of each network; null: none.
struct RowPair {
  const char *student, *teacher;
};

// Whether float32 held the sums of a piece (Units::difference_scale).
template <class Real>
KCD_INLINE bool held(const RowSums<Real>& sums) {
  return sums.cross < Real(1e30) && sums.cross > Real(-1e30);
}

// in_range: whether it held those of all pieces; if not, they count for nothing.  between(): is called after each piece.  after:
// the row that is read next.  known: a piece whose maxima are known, of this row or, in the end, of the next; without a teacher its
// y is null.
template <Power power, bool with_teacher, bool with_teacher_entropy, bool keep, class Real, class Between>
RowSums<Real> sum_row(const Problem& problem, const RowPair& at, const RowPair& after, const Scale<Real>& scale, bool& in_range,
                      const Exponentials<Real>& kept, Piece<Real>& known, const Between& between) {
  alignas(64) Real z[kPiece], y[kPiece];
  const Type student_type = problem.student.type, teacher_type = problem.teacher.type;
  const bool in_place = is_type<Real>(student_type) && (!with_teacher || is_type<Real>(teacher_type));
  const int64_t classes = problem.classes;
  RowSums<Real> row;
  in_range = true;
  for (int64_t first = 0; first < classes; first += kPiece) {
    const int64_t n = classes - first < kPiece ? classes - first : kPiece;
    Piece<Real> here = known;
    if (!in_place || known.z != in_memory<Real>(at.student, first) || known.y != in_memory<Real>(at.teacher, first)) {
      here.z = piece_and_maximum(student_type, at.student, first, n, z, here.student_max);
      if (with_teacher) here.y = piece_and_maximum(teacher_type, at.teacher, first, n, y, here.teacher_max);
    }
    const bool last = first + n == classes;
    const RowPair next_row = last ? after : at;
    const int64_t next_first = last ? 0 : first + kPiece;
    // The next piece, where it is as long as this one and lies in place.
    const bool with_next = in_place && next_row.student && (!with_teacher || next_row.teacher) &&
                           (last ? classes <= kPiece : next_first + kPiece <= classes);
    if (with_next)
      known = {in_memory<Real>(next_row.student, next_first),
               in_memory<Real>(with_teacher ? next_row.teacher : nullptr, next_first), 0, 0};
    const RowPair& read = with_next ? next_row : at;
    const int64_t read_first = with_next ? next_first : first;
    const Ahead later_z = ahead(problem.student, read.student, read_first),
                later_y = ahead(problem.teacher, read.teacher, read_first);
    Real *e = kept.student + first, *f = kept.teacher + first;
    const RowSums<Real> sums =
        with_next
            ? sum_piece<power, with_teacher, with_teacher_entropy, keep, true>(here, n, scale, later_z, later_y, e, f, known)
            : sum_piece<power, with_teacher, with_teacher_entropy, keep, false>(here, n, scale, later_z, later_y, e, f, known);
    if (keep) {
      kept.student_max[first / kPiece] = sums.student.max;
      kept.teacher_max[first / kPiece] = sums.teacher.max;
    }
    in_range &= held(sums);
    row = first ? merge(row, sums, scale.units) : sums;
    between();
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

constexpr auto kNothing = [] {};

// The sums of a row that float32 did not hold, or that are infinite.
template <Power power, bool with_teacher, bool with_teacher_entropy, class Real>
__attribute__((noinline)) RowSums<Real> settle(const Problem& problem, const RowPair& at, const Scale<Real>& scale,
                                               RowSums<Real> row, bool in_range) {
  if (!in_range && sizeof(Real) < sizeof(double)) {
    const Scale<double> wide_scale(problem.temperature);
    bool wide_in_range;
    Piece<double> unknown{};
    const RowSums<double> wide = sum_row<power, with_teacher, with_teacher_entropy, false>(
        problem, at, RowPair{}, wide_scale, wide_in_range, Exponentials<double>{}, unknown, kNothing);
    row = {convert<Real>(wide.student), convert<Real>(wide.teacher),
           static_cast<Real>(wide.cross / wide_scale.units.difference_scale * scale.units.difference_scale)};
  }
  if (with_teacher && row.cross == Limits<Real>::infinity())
    row.cross = static_cast<Real>(cross_of_row(problem, at.student, at.teacher, static_cast<double>(row.student.max),
                                               static_cast<double>(row.teacher.max))) *
                scale.units.difference_scale;
  return row;
}

template <Power power, bool with_teacher, bool with_teacher_entropy, bool keep, class Real, class Between>
RowSums<Real> sum_whole_row(const Problem& problem, const RowPair& at, const RowPair& after, const Scale<Real>& scale,
                            const Exponentials<Real>& kept, Piece<Real>& known, bool& in_range, const Between& between) {
  const RowSums<Real> row =
      sum_row<power, with_teacher, with_teacher_entropy, keep>(problem, at, after, scale, in_range, kept, known, between);
  if (in_range) return row;   // what is infinite is not
  return settle<power, with_teacher, with_teacher_entropy>(problem, at, scale, row, in_range);
}

template <class Real>
KCD_INLINE Real logit(Type type, const char* row, int64_t c) {
  Real scratch[1];
  return *piece(type, row, c, 1, scratch);
}

// The gradient of a row that has been summed, out of its exponentials, a piece at a time.
template <Power power, bool with_ce, class Real>
class RowGradient {
 public:
  RowGradient(const Problem& problem, const Gradient& gradient, const Scale<Real>& scale)
      : problem_(problem), gradient_(gradient), scale_(scale), next_(problem.classes) {}

  void begin(int64_t i, const RowPair& at, const RowSums<Real>& sums, const Exponentials<Real>& kept, bool selected) {
    selected_ = selected;
    const Real* row_weight = static_cast<const Real*>(gradient_.row_weight);
    const Real kd = static_cast<Real>(gradient_.kd_factor * (row_weight ? static_cast<double>(row_weight[i]) : 1.0));
    const Real ce = static_cast<Real>(gradient_.ce_factor);
    factors_ = {reference(sums.student.max), reference(sums.teacher.max), kd * (1 / sums.student.sum()),
                kd * (1 / sums.teacher.sum()), ce * (1 / sums.student.sum_1())};
    target_ = {problem_.student.type, gradient_.streaming, const_cast<char*>(gradient_.out.row(i)),
               with_ce ? problem_.labels[i] : -1, ce};
    student_ = at.student;
    kept_ = kept;
    next_ = 0;
  }

  // The next piece, if there is one.
  void write_piece() {
    const int64_t first = next_, n = problem_.classes - first < kPiece ? problem_.classes - first : kPiece;
    if (n == 0) return;
    next_ = first + n;
    alignas(64) Real z_scratch[kPiece];
    constexpr bool with_z = with_ce && power == Power::other;
    const FactorLanes<Real> here(
        factors_.of_piece(kept_.student_max[first / kPiece], kept_.teacher_max[first / kPiece], scale_.units.inverse_temperature));
    const Real* z = with_z ? piece(problem_.student.type, student_, first, n, z_scratch) : nullptr;
    selected_ ? write_piece<true>(first, n, here, z) : write_piece<false>(first, n, here, z);
  }

  void finish() {
    while (next_ != problem_.classes) write_piece();
  }

 private:
  // z: null where it is not needed.
  template <bool with_kd>
  KCD_MEMBER void write_piece(int64_t first, int64_t n, const FactorLanes<Real>& here, const Real* z) {
    const Real *e = kept_.student + first, *f = kept_.teacher + first;
    kcd::write_piece(target_, first, n, [&](int64_t j, int64_t m) {   // exponentials may be read past the end, logits not
      const Vector<Real> dz = with_ce && power == Power::other ? load_some(z + j, m) - here.student_max : Vector<Real>{};
      return gradient_of<power, with_kd, with_ce>(load(e + j), load(f + j), dz, here, scale_);
    });
  }

  const Problem& problem_;
  const Gradient& gradient_;
  const Scale<Real>& scale_;
  bool selected_ = false;
  Factors<Real> factors_{};
  Target<Real> target_{};
  Exponentials<Real> kept_{};
  const char* student_ = nullptr;
  int64_t next_;
};

// Memory of a thread for the exponentials of two rows, as large as its largest ones.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  template <class Real>
  std::array<Exponentials<Real>, 2> exponentials(int64_t classes) {
    const int64_t pieces = (classes + kPiece - 1) / kPiece, padded = (classes + 2 * kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
    const size_t bytes = static_cast<size_t>(4 * (padded + pieces)) * sizeof(Real);
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = 0;
      memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      if (!memory_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    Real *p = static_cast<Real*>(memory_), *maxima = p + 4 * padded;
    return {{{p, p + padded, maxima, maxima + pieces}, {p + 2 * padded, p + 3 * padded, maxima + 2 * pieces, maxima + 3 * pieces}}};
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

// Row i of both, as far as it is read.
RowPair row_pair(const Problem& problem, int64_t i) {
  if (!problem.valid(i)) return {};
  const int64_t teacher_row = problem.teacher_row_of(i);
  return {problem.student.row(i), teacher_row < 0 ? nullptr : problem.teacher.row(teacher_row)};
}

// The first row from i on that is read; none at the end.
RowPair next_row_pair(const Problem& problem, int64_t i, int64_t end) {
  while (i < end && !problem.valid(i)) ++i;
  return i < end ? row_pair(problem, i) : RowPair{};
}

template <class Real>
KCD_INLINE Real label_logit(const Problem& problem, const char* student, int64_t i) {
  return student && problem.with_labels ? logit<Real>(problem.student.type, student, problem.labels[i]) : Limits<Real>::nan();
}

template <class Real, Power power>
void forward(const Problem& problem, const RowOutputs& outputs, int64_t begin, int64_t end) {
  const Scale<Real> scale(problem.temperature), scale_1(1.0);
  const Exponentials<Real> nowhere{};
  Piece<Real> known{};
  for (int64_t i = begin; i < end; ++i) {
    const RowPair at = row_pair(problem, i), after = at.student ? next_row_pair(problem, i + 1, end) : RowPair{};
    RowSums<Real> sums{};
    bool in_range;
    if (at.teacher)
      sums = outputs.teacher_entropy
                 ? sum_whole_row<power, true, true, false>(problem, at, after, scale, nowhere, known, in_range, kNothing)
                 : sum_whole_row<power, true, false, false>(problem, at, after, scale, nowhere, known, in_range, kNothing);
    else if (at.student)
      sums = sum_whole_row<Power::one, false, false, false>(problem, at, after, scale_1, nowhere, known, in_range, kNothing);
    write_row(problem, outputs, i, at.teacher != nullptr, sums, label_logit<Real>(problem, at.student, i), scale.units);
  }
}

// A row's gradient is written while the next row is summed: its way to memory is so hidden behind arithmetic.
template <class Real, Power power, bool with_ce>
void forward_with_gradient(const Problem& problem, const RowOutputs& outputs, const Gradient& gradient, int64_t begin,
                           int64_t end) {
  const Scale<Real> scale(problem.temperature);
  const auto kept = scratch_of_thread.exponentials<Real>(problem.classes);
  RowGradient<power, with_ce, Real> pending(problem, gradient, scale);
  const auto write_some = [&] { pending.write_piece(); };
  int turn = 0;   // which of the two is free
  const Real* value = static_cast<const Real*>(gradient.value);
  Guess<Real> guess(gradient.share);
  Piece<Real> known{};
  for (int64_t i = begin; i < end; ++i) {
    const RowPair at = row_pair(problem, i), after = at.teacher ? next_row_pair(problem, i + 1, end) : RowPair{};
    gradient.written[i] = kNotWritten;
    if (!at.teacher) {
      forward<Real, power>(problem, outputs, i, i + 1);
      continue;
    }
    const Exponentials<Real>& here = kept[turn];
    bool in_range;
    const RowSums<Real> sums =
        outputs.teacher_entropy
            ? sum_whole_row<power, true, true, true>(problem, at, after, scale, here, known, in_range, write_some)
            : sum_whole_row<power, true, false, true>(problem, at, after, scale, here, known, in_range, write_some);
    pending.finish();
    write_row(problem, outputs, i, true, sums, label_logit<Real>(problem, at.student, i), scale.units);
    // What is infinite or not a number is left to the backward pass.
    if (!in_range || !finite(sums.cross + sums.student.sum() + sums.teacher.sum() + sums.student.max + sums.teacher.max)) continue;
    const bool selected = !value || guess.selected(value[i]);
    pending.begin(i, at, sums, here, selected);
    turn = 1 - turn;
    gradient.written[i] = selected ? kAsSelected : kAsNotSelected;
  }
  pending.finish();
  if (gradient.streaming) stream_fence();
}

template <class Real>
void forward(const Problem& problem, const RowOutputs& outputs, const Gradient* gradient, int64_t begin, int64_t end) {
  with_power(problem.temperature, [&](auto power) {
    constexpr Power p = power.value;
    if (!gradient) return forward<Real, p>(problem, outputs, begin, end);
    problem.with_labels && gradient->ce_factor != 0
        ? forward_with_gradient<Real, p, true>(problem, outputs, *gradient, begin, end)
        : forward_with_gradient<Real, p, false>(problem, outputs, *gradient, begin, end);
  });
}

// ---- a row on several threads: the same sums of the same pieces, merged in the same order

// run(instance): with the row's own power and which sums it needs, as forward() has them.
template <class Real, class Run>
void with_sums_of(const Problem& problem, const RowOutputs& outputs, bool with_teacher, const Run& run) {
  if (!with_teacher)
    return run(std::integral_constant<Power, Power::one>{}, std::false_type{}, std::false_type{}, Scale<Real>(1.0));
  with_power(problem.temperature, [&](auto power) {
    const Scale<Real> scale(problem.temperature);
    outputs.teacher_entropy ? run(power, std::true_type{}, std::true_type{}, scale)
                            : run(power, std::true_type{}, std::false_type{}, scale);
  });
}

template <class Real>
void sum_pieces(const Problem& problem, const RowOutputs& outputs, int64_t i, int64_t begin, int64_t end, RowSums<Real>* sums) {
  const RowPair at = row_pair(problem, i);
  with_sums_of<Real>(problem, outputs, at.teacher, [&](auto power, auto with_teacher, auto with_entropy, const Scale<Real>& scale) {
    Piece<Real> known{};
    bool in_range;
    for (int64_t k = begin; k < end; ++k) {
      Problem alone = problem;   // a row of this piece alone
      alone.classes = std::min(kPiece, problem.classes - k * kPiece);
      const auto from_here = [&](const char* row, Type type) { return row ? row + k * kPiece * size_of(type) : nullptr; };
      const RowPair here{from_here(at.student, problem.student.type), from_here(at.teacher, problem.teacher.type)};
      sums[k] = sum_row<power.value, with_teacher.value, with_entropy.value, false>(alone, here, RowPair{}, scale, in_range,
                                                                                    Exponentials<Real>{}, known, kNothing);
    }
  });
}

template <class Real>
void finish_row(const Problem& problem, const RowOutputs& outputs, int64_t i, const RowSums<Real>* sums) {
  const RowPair at = row_pair(problem, i);
  const Units<Real> units = Scale<Real>(problem.temperature).units;
  RowSums<Real> row{};
  if (at.student)
    with_sums_of<Real>(problem, outputs, at.teacher,
                       [&](auto power, auto with_teacher, auto with_entropy, const Scale<Real>& scale) {
                         row = sums[0];
                         bool in_range = held(row);
                         for (int64_t k = 1; k * kPiece < problem.classes; ++k) {
                           row = merge(row, sums[k], scale.units);
                           in_range &= held(sums[k]);
                         }
                         if (!in_range)
                           row = settle<power.value, with_teacher.value, with_entropy.value>(problem, at, scale, row, in_range);
                       });
  write_row(problem, outputs, i, at.teacher != nullptr, row, label_logit<Real>(problem, at.student, i), units);
}

void sum_pieces(const Problem& problem, const RowOutputs& outputs, int64_t i, int64_t begin, int64_t end, void* sums) {
  if (!problem.valid(i)) return;   // not read
  problem.student.type == Type::float64 ? sum_pieces(problem, outputs, i, begin, end, static_cast<RowSums<double>*>(sums))
                                        : sum_pieces(problem, outputs, i, begin, end, static_cast<RowSums<float>*>(sums));
}

void finish_row(const Problem& problem, const RowOutputs& outputs, int64_t i, const void* sums) {
  problem.student.type == Type::float64 ? finish_row(problem, outputs, i, static_cast<const RowSums<double>*>(sums))
                                        : finish_row(problem, outputs, i, static_cast<const RowSums<float>*>(sums));
}

}   // namespace

void forward(const Problem& problem, const RowOutputs& outputs, const Gradient* gradient, int64_t begin, int64_t end) {
  problem.student.type == Type::float64 ? forward<double>(problem, outputs, gradient, begin, end)
                                        : forward<float>(problem, outputs, gradient, begin, end);
}

const Columns columns{kPiece, sizeof(RowSums<double>), sum_pieces, finish_row};

}   // namespace kcd::cpu::KCD_SET
