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

// What one pass over a row sums, and whether it keeps the exponentials.  A loop asks for it at every vector.  UsualPass answers
// while compiling: such a loop has no branch, and costs build time.  Pass answers at run time: one loop serves all rare cases,
// which are float64, the teacher's entropy, and temperatures that are not 1 or 4.
template <bool with_keep>
struct Pass {
  Power power;
  bool teacher, teacher_entropy;
  static constexpr bool keep = with_keep;
};
template <Power fixed_power, bool with_teacher, bool with_keep>
struct UsualPass {
  static constexpr Power power = fixed_power;
  static constexpr bool teacher = with_teacher, teacher_entropy = false, keep = with_keep;
};
constexpr Pass<false> kStudentAlone{Power::one, false, false};

// run(the pass, as a UsualPass where it is one)
template <class Real, bool keep, class Run>
KCD_INLINE auto with_pass(const Pass<keep>& pass, const Run& run) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (!keep && !pass.teacher) return run(UsualPass<Power::one, false, false>{});
    if (pass.power == Power::four && !pass.teacher_entropy) return run(UsualPass<Power::four, true, keep>{});
    if (pass.power == Power::one && !pass.teacher_entropy) return run(UsualPass<Power::one, true, keep>{});
  }
  return run(pass);
}

// ClassSums lane by lane.
template <class Real>
struct ClassLanes {
  Vector<Real> others{}, tail{}, tail_1{}, dot_1{};   // others: how many classes are not at the maximum

  // dx <= 0, e = e^(dx/T): a class at the maximum is counted, any other goes into the tails.
  KCD_MEMBER void add(Power power, bool at_1, Vector<Real> dx, Vector<Real> e, const Scale<Real>& scale) {
    const Mask<Real> other = differ(dx, Vector<Real>{});
    others = add_where(other, others, broadcast(Real(1)));
    tail = add_where(other, tail, e);
    if (!at_1) return;
    const Mask<Real> counts = counts_at_temperature_1<Real>(power, e, dx);
    const Vector<Real> e_1 = at_temperature_1<Real>(power, counts, e, dx, scale);
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

// A row of each network; null: none.
struct RowPair {
  const char *student, *teacher;
};

// The gradient of a row that has been summed, out of its exponentials, a piece at a time.
template <class Real>
class RowGradient {
 public:
  RowGradient(const Problem& problem, const Gradient& gradient, const Scale<Real>& scale)
      : problem_(problem),
        gradient_(gradient),
        scale_(scale),
        with_ce_(problem.with_labels && gradient.ce_factor != 0),
        next_(problem.classes) {}

  void begin(int64_t i, const RowPair& row, const RowSums<Real>& sums, const Exponentials<Real>& kept, bool selected) {
    terms_ = {selected, with_ce_, power_of(problem_.temperature)};
    const Real* row_weight = static_cast<const Real*>(gradient_.row_weight);
    const Real kd = static_cast<Real>(gradient_.kd_factor * (row_weight ? static_cast<double>(row_weight[i]) : 1.0));
    const Real ce = static_cast<Real>(gradient_.ce_factor);
    factors_ = {reference(sums.student.max), reference(sums.teacher.max), kd * (1 / sums.student.sum()),
                kd * (1 / sums.teacher.sum()), ce * (1 / sums.student.sum_1())};
    target_ = {problem_.student.type, gradient_.streaming, const_cast<char*>(gradient_.out.row(i)),
               with_ce_ ? problem_.labels[i] : -1, ce};
    student_ = row.student;
    kept_ = kept;
    next_ = 0;
  }

  // The next piece, if there is one.
  void write_piece() {
    const int64_t first = next_, n = problem_.classes - first < kPiece ? problem_.classes - first : kPiece;
    if (n == 0) return;
    next_ = first + n;
    if (!terms_.kd && !terms_.ce) return write_zeros(target_, first, n);
    with_terms<Real>(terms_, [&](auto terms) { write_piece(terms, first, n); });
  }

  void finish() {
    while (next_ != problem_.classes) write_piece();
  }

 private:
  template <class SomeTerms>
  void write_piece(SomeTerms terms, int64_t first, int64_t n) {
    alignas(64) Real z_scratch[kPiece];
    const bool with_z = terms.ce && terms.power == Power::other;
    const FactorLanes<Real> here(
        factors_.of_piece(kept_.student_max[first / kPiece], kept_.teacher_max[first / kPiece], scale_.units.inverse_temperature));
    const Real* z = with_z ? piece(problem_.student.type, student_, first, n, z_scratch) : nullptr;
    const Real *e = kept_.student + first, *f = kept_.teacher + first;
    // Exponentials may be read past the end, logits not.
    kcd::write_piece(terms, target_, first, n, [&](int64_t j, int64_t m) KCD_LAMBDA {
      const Vector<Real> dz = with_z ? load_some(z + j, m) - here.student_max : Vector<Real>{};
      return gradient_of(terms, load(e + j), load(f + j), dz, here, scale_);
    });
  }

  const Problem& problem_;
  const Gradient& gradient_;
  const Scale<Real>& scale_;
  const bool with_ce_;
  Terms terms_{};
  Factors<Real> factors_{};
  Target<Real> target_{};
  Exponentials<Real> kept_{};
  const char* student_ = nullptr;
  int64_t next_;
};

// e, f: where this vector's exponentials are kept; null: nowhere.
template <class SomePass, class Real>
KCD_INLINE void accumulate(const SomePass& pass, Vector<Real> dz, Vector<Real> dy, const Scale<Real>& scale, LaneSums<Real>& sums,
                           Real* e, Real* f) {
  const Vector<Real> student = exp2(dz * scale.per_logit);
  if (pass.keep) store<Real>(e, student);
  sums.student.add(pass.power, true, dz, student, scale);
  if (!pass.teacher) return;
  const Vector<Real> log_teacher = dy * scale.per_logit, teacher = exp2(log_teacher);
  if (pass.keep) store<Real>(f, teacher);
  sums.teacher.add(pass.power, pass.teacher_entropy, dy, teacher, scale);
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
template <bool with_next, class SomePass, class Real>
KCD_INLINE RowSums<Real> sum_piece(SomePass pass, const Piece<Real>& here, int64_t n, const Scale<Real>& scale, Ahead later_z,
                                   Ahead later_y, Real* e, Real* f, Piece<Real>& next) {
  const Real least = -Limits<Real>::infinity();
  const Vector<Real> m_z = broadcast(reference(here.student_max)), m_y = broadcast(reference(here.teacher_max));
  Vector<Real> next_m_z = broadcast(least), next_m_y = next_m_z;
  LaneSums<Real> sums;
  int64_t j = 0;
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) {
    later_z.fetch(j);
    if (pass.teacher) later_y.fetch(j);
    if (with_next) {
      next_m_z = greater_of(load(next.z + j), next_m_z);
      if (pass.teacher) next_m_y = greater_of(load(next.y + j), next_m_y);
    }
    accumulate<SomePass, Real>(pass, load(here.z + j) - m_z, pass.teacher ? load(here.y + j) - m_y : m_y, scale, sums, e + j,
                               f + j);
  }
  if (j < n) {   // lanes past the end hold -inf in both and add nothing
    accumulate<SomePass, Real>(pass, load(here.z + j, n - j, least) - m_z,
                               pass.teacher ? load(here.y + j, n - j, least) - m_y : m_y, scale, sums, e + j, f + j);
    if (with_next) {
      next_m_z = greater_of(load(next.z + j, n - j, least), next_m_z);
      if (pass.teacher) next_m_y = greater_of(load(next.y + j, n - j, least), next_m_y);
    }
  }
  if (with_next) next.student_max = maximum(next_m_z), next.teacher_max = pass.teacher ? maximum(next_m_y) : Real(0);
  const int64_t lanes = (n + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
  const ClassSums<Real> student = sums.student.total(here.student_max, lanes),
                        teacher = sums.teacher.total(here.teacher_max, lanes);
  const Real cross = sum(sums.cross);
  // 0 * inf: the student rules out a class whose p underflows; the divergence is infinite.  What is not a number is so in a tail
  // too.
  const bool infinite = cross != cross && student.tail == student.tail && teacher.tail == teacher.tail;
  return {student, teacher, infinite ? Limits<Real>::infinity() : cross};
}

// Whether float32 can hold the sums of a piece (Units::difference_scale).
template <class Real>
KCD_INLINE bool within_float_range(const RowSums<Real>& sums) {
  return sums.cross < Real(1e30) && sums.cross > Real(-1e30);
}

// What summing a row takes.
template <class Real>
struct RowTask {
  const Problem& problem;
  const Scale<Real>& scale;
  RowPair row;
  RowPair next_row;                        // read after this one; none: it is not known, or there is none
  Exponentials<Real> kept;                 // where the row's exponentials go, if the pass keeps them
  RowGradient<Real>* previous = nullptr;   // of the row before; written while this one is summed, if the pass keeps exponentials

  void on_piece_done() const { previous->write_piece(); }
};

// The sums of a row.  If some piece was not within float range they are invalid; what is infinite is not within range either.
template <class Real>
struct SummedRow {
  RowSums<Real> sums;
  bool within_float_range;
};

// prefetched: a piece whose maxima are known.  On entry of this row, on return of the next one; if it is another one it is not
// used.  Without a teacher its y is null.
template <class Real, class SomePass>
KCD_INLINE SummedRow<Real> sum_row(SomePass pass, const RowTask<Real>& task, Piece<Real>& prefetched) {
  alignas(64) Real z[kPiece], y[kPiece];
  const Problem& problem = task.problem;
  const RowPair& row = task.row;
  const Type student_type = problem.student.type, teacher_type = problem.teacher.type;
  const bool in_place = is_type<Real>(student_type) && (!pass.teacher || is_type<Real>(teacher_type));
  const int64_t classes = problem.classes;
  SummedRow<Real> summed{{}, true};
  for (int64_t first = 0; first < classes; first += kPiece) {
    const int64_t n = classes - first < kPiece ? classes - first : kPiece;
    Piece<Real> here = prefetched;
    if (!in_place || here.z != in_memory<Real>(row.student, first) || here.y != in_memory<Real>(row.teacher, first)) {
      here.z = piece_and_maximum(student_type, row.student, first, n, z, here.student_max);
      if (pass.teacher) here.y = piece_and_maximum(teacher_type, row.teacher, first, n, y, here.teacher_max);
    }
    const bool last = first + n == classes;
    const RowPair next_row = last ? task.next_row : row;
    const int64_t next_first = last ? 0 : first + kPiece;
    // The next piece, where it is as long as this one and lies in place.
    const bool with_next = in_place && next_row.student && (!pass.teacher || next_row.teacher) &&
                           (last ? classes <= kPiece : next_first + kPiece <= classes);
    if (with_next)
      prefetched = {in_memory<Real>(next_row.student, next_first),
                    in_memory<Real>(pass.teacher ? next_row.teacher : nullptr, next_first), 0, 0};
    const RowPair& read = with_next ? next_row : row;
    const int64_t read_first = with_next ? next_first : first;
    const Ahead later_z = ahead(problem.student, read.student, read_first),
                later_y = ahead(problem.teacher, read.teacher, read_first);
    Real *e = task.kept.student + first, *f = task.kept.teacher + first;
    const RowSums<Real> sums = with_next ? sum_piece<true>(pass, here, n, task.scale, later_z, later_y, e, f, prefetched)
                                         : sum_piece<false>(pass, here, n, task.scale, later_z, later_y, e, f, prefetched);
    if (pass.keep) {
      task.kept.student_max[first / kPiece] = sums.student.max;
      task.kept.teacher_max[first / kPiece] = sums.teacher.max;
    }
    summed.within_float_range &= within_float_range(sums);
    summed.sums = first ? merge(summed.sums, sums, task.scale.units) : sums;
    if (pass.keep) task.on_piece_done();
  }
  return summed;
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

// The sums of a row whose pieces were not all within float range.
template <class Real>
__attribute__((noinline)) RowSums<Real> recompute_in_double(const Pass<false>& pass, const Problem& problem, const RowPair& row,
                                                            const Scale<Real>& scale, RowSums<Real> sums) {
  if (sizeof(Real) < sizeof(double)) {
    const Scale<double> wide_scale(problem.temperature);
    Piece<double> nothing{};
    const RowSums<double> wide = sum_row<double>(pass, {problem, wide_scale, row, {}, {}}, nothing).sums;
    sums = {convert<Real>(wide.student), convert<Real>(wide.teacher),
            static_cast<Real>(wide.cross / wide_scale.units.difference_scale * scale.units.difference_scale)};
  }
  if (pass.teacher && sums.cross == Limits<Real>::infinity())
    sums.cross = static_cast<Real>(cross_of_row(problem, row.student, row.teacher, static_cast<double>(sums.student.max),
                                                static_cast<double>(sums.teacher.max))) *
                 scale.units.difference_scale;
  return sums;
}

// As sum_row; the sums are valid in any case.
template <class Real, class SomePass>
KCD_INLINE SummedRow<Real> sum_whole_row(const SomePass& pass, const RowTask<Real>& task, Piece<Real>& prefetched) {
  SummedRow<Real> summed = sum_row<Real>(pass, task, prefetched);
  if (!summed.within_float_range) {
    const Pass<false> again{pass.power, pass.teacher, pass.teacher_entropy};
    summed.sums = recompute_in_double(again, task.problem, task.row, task.scale, summed.sums);
  }
  return summed;
}

template <class Real>
KCD_INLINE Real logit(Type type, const char* row, int64_t c) {
  Real scratch[1];
  return *piece(type, row, c, 1, scratch);
}

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

// The sums of a row whose teacher is not read, if its student is.
template <class Real>
RowSums<Real> sum_student_row(const Problem& problem, const RowPair& row, const RowPair& next_row, Piece<Real>& prefetched) {
  if (!row.student) return {};
  const Scale<Real> scale(1.0);
  return with_pass<Real>(
      kStudentAlone, [&](auto pass) { return sum_whole_row<Real>(pass, {problem, scale, row, next_row, {}}, prefetched).sums; });
}

template <class Real, class SomePass>
void forward(const SomePass& pass, const Problem& problem, const RowOutputs& outputs, int64_t begin, int64_t end) {
  const Scale<Real> scale(problem.temperature);
  Piece<Real> prefetched{};
  for (int64_t i = begin; i < end; ++i) {
    const RowPair row = row_pair(problem, i), next_row = row.student ? next_row_pair(problem, i + 1, end) : RowPair{};
    const RowSums<Real> sums = row.teacher ? sum_whole_row<Real>(pass, {problem, scale, row, next_row, {}}, prefetched).sums
                                           : sum_student_row(problem, row, next_row, prefetched);
    write_row(problem, outputs, i, row.teacher != nullptr, sums, label_logit<Real>(problem, row.student, i), scale.units);
  }
}

// A row's gradient is written while the next row is summed: its way to memory is so hidden behind arithmetic.
template <class Real, class SomePass>
void forward_with_gradient(const SomePass& pass, const Problem& problem, const RowOutputs& outputs, const Gradient& gradient,
                           int64_t begin, int64_t end) {
  const Scale<Real> scale(problem.temperature);
  const auto kept = scratch_of_thread.exponentials<Real>(problem.classes);
  RowGradient<Real> previous(problem, gradient, scale);
  int turn = 0;   // which of the two is free
  const Real* value = static_cast<const Real*>(gradient.value);
  Guess<Real> guess(gradient.share);
  Piece<Real> prefetched{};
  for (int64_t i = begin; i < end; ++i) {
    const RowPair row = row_pair(problem, i), next_row = row.teacher ? next_row_pair(problem, i + 1, end) : RowPair{};
    gradient.written[i] = kNotWritten;
    if (!row.teacher) {
      const RowSums<Real> sums = sum_student_row(problem, row, next_row, prefetched);
      write_row(problem, outputs, i, false, sums, label_logit<Real>(problem, row.student, i), scale.units);
      continue;
    }
    const Exponentials<Real>& here = kept[turn];
    const auto [sums, in_range] = sum_whole_row<Real>(pass, {problem, scale, row, next_row, here, &previous}, prefetched);
    previous.finish();
    write_row(problem, outputs, i, true, sums, label_logit<Real>(problem, row.student, i), scale.units);
    // What is infinite or not a number is left to the backward pass.
    if (!in_range || !finite(sums.cross + sums.student.sum() + sums.teacher.sum() + sums.student.max + sums.teacher.max)) continue;
    const bool selected = !value || guess.selected(value[i]);
    previous.begin(i, row, sums, here, selected);
    turn = 1 - turn;
    gradient.written[i] = selected ? kAsSelected : kAsNotSelected;
  }
  previous.finish();
  if (gradient.streaming) stream_fence();
}

template <class Real>
void forward(const Problem& problem, const RowOutputs& outputs, const Gradient* gradient, int64_t begin, int64_t end) {
  const Power power = power_of(problem.temperature);
  const bool teacher_entropy = outputs.teacher_entropy;
  if (gradient)
    return with_pass<Real>(Pass<true>{power, true, teacher_entropy},
                           [&](auto pass) { forward_with_gradient<Real>(pass, problem, outputs, *gradient, begin, end); });
  with_pass<Real>(Pass<false>{power, true, teacher_entropy}, [&](auto pass) { forward<Real>(pass, problem, outputs, begin, end); });
}

// ---- a row on several threads: the same sums of the same pieces, merged in the same order

// What forward() sums of such a row, and in which units.
template <class Real>
struct WholeRow {
  Pass<false> pass;
  Scale<Real> scale;
  WholeRow(const Problem& problem, const RowOutputs& outputs, bool with_teacher)
      : pass(with_teacher ? Pass<false>{power_of(problem.temperature), true, outputs.teacher_entropy != nullptr} : kStudentAlone),
        scale(with_teacher ? problem.temperature : 1.0) {}
};

template <class Real>
void sum_pieces(const Problem& problem, const RowOutputs& outputs, int64_t i, int64_t begin, int64_t end, RowSums<Real>* sums) {
  const RowPair row = row_pair(problem, i);
  const WholeRow<Real> whole(problem, outputs, row.teacher);
  Piece<Real> nothing{};
  for (int64_t k = begin; k < end; ++k) {
    Problem alone = problem;   // a row of this piece alone
    alone.classes = std::min(kPiece, problem.classes - k * kPiece);
    const auto from_here = [&](const char* logits, Type type) { return logits ? logits + k * kPiece * size_of(type) : nullptr; };
    const RowPair here{from_here(row.student, problem.student.type), from_here(row.teacher, problem.teacher.type)};
    sums[k] = with_pass<Real>(whole.pass,
                              [&](auto pass) { return sum_row<Real>(pass, {alone, whole.scale, here, {}, {}}, nothing).sums; });
  }
}

template <class Real>
void finish_row(const Problem& problem, const RowOutputs& outputs, int64_t i, const RowSums<Real>* sums) {
  const RowPair row = row_pair(problem, i);
  const WholeRow<Real> whole(problem, outputs, row.teacher);
  RowSums<Real> merged{};
  if (row.student) {
    merged = sums[0];
    bool in_range = within_float_range(merged);
    for (int64_t k = 1; k * kPiece < problem.classes; ++k) {
      merged = merge(merged, sums[k], whole.scale.units);
      in_range &= within_float_range(sums[k]);
    }
    if (!in_range) merged = recompute_in_double(whole.pass, problem, row, whole.scale, merged);
  }
  const Units<Real> units = Scale<Real>(problem.temperature).units;
  write_row(problem, outputs, i, row.teacher != nullptr, merged, label_logit<Real>(problem, row.student, i), units);
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

const SplitRow split_row{kPiece, sizeof(RowSums<double>), sum_pieces, finish_row};

}   // namespace kcd::cpu::KCD_SET
