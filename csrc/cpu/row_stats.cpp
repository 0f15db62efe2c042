// One read of every row: KL, entropies, cross entropy, and the statistics that the backward pass needs.
// Compiled once for each instruction set, in namespace KCD_INSTRUCTION_SET.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <new>

#include "cpu/convert.h"
#include "cpu/gradient.h"
#include "cpu/instruction_sets.h"
#include "cpu/selection_predictor.h"
#include "cpu/targets.h"
#include "cpu/temperature.h"
#include "cpu/vector.h"
#include "math/row_outputs.h"

namespace kcd::cpu::KCD_INSTRUCTION_SET {
namespace {

// The sums that a pass over a row computes, and whether it stores the exponentials.  Loops check this at every vector.
//
// - A StaticPass is known at compile time.  Its loop has no branches, but costs build time.
// - A Pass is known at run time.  One loop covers the rare cases: float64, the teacher's entropy, temperatures other than 1 and 4.
template <bool store_exponentials>
struct Pass {
  Power power;
  bool teacher, teacher_entropy;
  static constexpr bool store = store_exponentials;
};
template <Power fixed_power, bool with_teacher, bool store_exponentials>
struct StaticPass {
  static constexpr Power power = fixed_power;
  static constexpr bool teacher = with_teacher, teacher_entropy = false, store = store_exponentials;
};
constexpr Pass<false> kStudentOnly{Power::one, false, false};

// Calls run with the pass, as a StaticPass in the common cases.
template <class Real, bool store, class Run>
KCD_INLINE auto dispatch_pass(const Pass<store>& pass, const Run& run) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (!store && !pass.teacher) return run(StaticPass<Power::one, false, false>{});
    if (pass.power == Power::four && !pass.teacher_entropy) return run(StaticPass<Power::four, true, store>{});
    if (pass.power == Power::one && !pass.teacher_entropy) return run(StaticPass<Power::one, true, store>{});
  }
  return run(pass);
}

// ClassSums for each lane.
template <class Real>
struct ClassLanes {
  Vector<Real> others{}, tail{}, tail_1{}, dot_1{};   // others: number of classes below the maximum

  // dx <= 0, e = e^(dx/T).  Counts a class at the maximum and adds any other to the tails.
  KCD_MEMBER void add(Power power, bool with_temperature_1, Vector<Real> dx, Vector<Real> e, const Scale<Real>& scale) {
    const Mask<Real> below_max = not_equal(dx, Vector<Real>{});
    others = add_where(below_max, others, broadcast(Real(1)));
    tail = add_where(below_max, tail, e);
    if (!with_temperature_1) return;
    const Mask<Real> nonzero = is_nonzero_at_temperature_1<Real>(power, e, dx);
    const Vector<Real> e_1 = exp_at_temperature_1<Real>(power, nonzero, e, dx, scale);
    tail_1 = add_where(below_max, tail_1, e_1);
    dot_1 = add_product_where(nonzero, dot_1, e_1, dx);   // dx = -inf adds 0
  }
  // n: total number of lanes added
  KCD_MEMBER ClassSums<Real> total(Real max, int64_t n) const {
    return {max, static_cast<Real>(n) - sum(others), sum(tail), sum(tail_1), sum(dot_1)};
  }
};

template <class Real>
struct LaneSums {
  ClassLanes<Real> student, teacher;
  Vector<Real> cross{};
};

// The stored exponentials of a row, from which its gradient is computed: e^((z - m)/T) and e^((y - m)/T) for every class, where m
// is the maximum of the piece, and the maxima of all pieces.
template <class Real>
struct Exponentials {
  Real *student, *teacher, *student_max, *teacher_max;
};

// A row of student and teacher; null: not read.
struct RowPair {
  const char *student, *teacher;
};

// Writes the gradient of a row that has been summed, from its stored exponentials, one piece at a time.
template <class Real>
class GradientWriter {
 public:
  GradientWriter(const Problem& problem, const Gradient& gradient, const Scale<Real>& scale)
      : problem_(problem),
        gradient_(gradient),
        scale_(scale),
        with_ce_(problem.with_labels && gradient.ce_factor != 0),
        next_(problem.classes) {}

  void start_row(int64_t i, const RowPair& row, const RowSums<Real>& sums, const TargetSums<Real>& targets,
                 const Exponentials<Real>& exponentials, bool selected) {
    terms_ = {selected, with_ce_, power_for(problem_.temperature)};
    const Real* row_weight = static_cast<const Real*>(gradient_.row_weight);
    const Real kd = static_cast<Real>(gradient_.kd_factor * (row_weight ? static_cast<double>(row_weight[i]) : 1.0));
    const Real ce = static_cast<Real>(gradient_.ce_factor);
    factors_ = {piece_reference(sums.student.max), piece_reference(sums.teacher.max), kd * (1 / sums.student.sum()),
                kd * (1 / sums.teacher.sum()), ce * mass_per_sum_1(sums.student, targets)};
    out_ = gradient_row(problem_, gradient_, i, with_ce_, ce);
    student_ = row.student;
    exponentials_ = exponentials;
    next_ = 0;
  }

  // Writes the next piece, if there is one.
  void write_piece() {
    const int64_t first = next_, n = problem_.classes - first < kPiece ? problem_.classes - first : kPiece;
    if (n == 0) return;
    next_ = first + n;
    if (!terms_.kd && !terms_.ce) return write_zeros(out_, first, n);
    dispatch_terms<Real>(terms_, out_.targets.exists, [&](auto terms) { write_piece(terms, first, n); });
  }

  void finish() {
    while (next_ != problem_.classes) write_piece();
  }

 private:
  template <class TermsType>
  void write_piece(TermsType terms, int64_t first, int64_t n) {
    alignas(64) Real z_scratch[kPiece];
    const bool with_z = terms.ce && terms.power == Power::other;
    const FactorLanes<Real> piece_factors(factors_.relative_to_piece(
        exponentials_.student_max[first / kPiece], exponentials_.teacher_max[first / kPiece], scale_.units.inverse_temperature));
    const Real* z = with_z ? load_piece(problem_.student.type, student_, first, n, z_scratch) : nullptr;
    const Real *e = exponentials_.student + first, *f = exponentials_.teacher + first;
    // The exponentials are padded to full vectors; the logits are not.
    kcd::write_piece(terms, out_, first, n, [&](int64_t j, int64_t m) KCD_LAMBDA {
      const Vector<Real> dz = with_z ? load_lanes(z + j, m) - piece_factors.student_max : Vector<Real>{};
      return gradient_vector(terms, load(e + j), load(f + j), dz, piece_factors, scale_);
    });
  }

  const Problem& problem_;
  const Gradient& gradient_;
  const Scale<Real>& scale_;
  const bool with_ce_;
  Terms terms_{};
  Factors<Real> factors_{};
  GradientRow<Real> out_{};
  Exponentials<Real> exponentials_{};
  const char* student_ = nullptr;
  int64_t next_;
};

// Adds one vector of classes to the sums.  e, f: where to store its exponentials, if the pass stores them.
template <class PassType, class Real>
KCD_INLINE void accumulate(const PassType& pass, Vector<Real> dz, Vector<Real> dy, const Scale<Real>& scale, LaneSums<Real>& sums,
                           Real* e, Real* f) {
  const Vector<Real> student = exp2(dz * scale.per_logit);
  if (pass.store) store<Real>(e, student);
  sums.student.add(pass.power, true, dz, student, scale);
  if (!pass.teacher) return;
  const Vector<Real> log_teacher = dy * scale.per_logit, teacher = exp2(log_teacher);
  if (pass.store) store<Real>(f, teacher);
  sums.teacher.add(pass.power, pass.teacher_entropy, dy, teacher, scale);
  // A class without teacher probability adds 0, even if the student rules it out.
  const Mask<Real> has_mass = not_less(log_teacher, broadcast(static_cast<Real>(kVanishing)));
  const Vector<Real> difference = sizeof(Real) == sizeof(double) ? (dy - dz) * scale.units.difference_scale : dy - dz;
  sums.cross += teacher * where(has_mass, difference);
}

// Contiguous classes and their maxima.  `y` is not read without a teacher.
template <class Real>
struct Piece {
  const Real *z, *y;
  Real student_max, teacher_max;
};

// Returns the sums of n contiguous classes, relative to their own maxima.  with_next: also finds the maxima of the next piece,
// which has n classes too.  That reads it into the cache early, and no sum waits for these maxima.
template <bool with_next, class PassType, class Real>
KCD_INLINE RowSums<Real> sum_piece(PassType pass, const Piece<Real>& piece, int64_t n, const Scale<Real>& scale,
                                   Prefetcher prefetch_z, Prefetcher prefetch_y, Real* e, Real* f, Piece<Real>& next) {
  const Real lowest = -Limits<Real>::infinity();
  const Vector<Real> m_z = broadcast(piece_reference(piece.student_max)), m_y = broadcast(piece_reference(piece.teacher_max));
  Vector<Real> next_m_z = broadcast(lowest), next_m_y = next_m_z;
  LaneSums<Real> sums;
  int64_t j = 0;
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) {
    prefetch_z.fetch(j);
    if (pass.teacher) prefetch_y.fetch(j);
    if (with_next) {
      next_m_z = greater_of(load(next.z + j), next_m_z);
      if (pass.teacher) next_m_y = greater_of(load(next.y + j), next_m_y);
    }
    accumulate<PassType, Real>(pass, load(piece.z + j) - m_z, pass.teacher ? load(piece.y + j) - m_y : m_y, scale, sums, e + j,
                               f + j);
  }
  if (j < n) {   // lanes past the end are -inf for both networks and add nothing
    accumulate<PassType, Real>(pass, load(piece.z + j, n - j, lowest) - m_z,
                               pass.teacher ? load(piece.y + j, n - j, lowest) - m_y : m_y, scale, sums, e + j, f + j);
    if (with_next) {
      next_m_z = greater_of(load(next.z + j, n - j, lowest), next_m_z);
      if (pass.teacher) next_m_y = greater_of(load(next.y + j, n - j, lowest), next_m_y);
    }
  }
  if (with_next) next.student_max = maximum(next_m_z), next.teacher_max = pass.teacher ? maximum(next_m_y) : Real(0);
  const int64_t lanes = (n + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
  const ClassSums<Real> student = sums.student.total(piece.student_max, lanes),
                        teacher = sums.teacher.total(piece.teacher_max, lanes);
  const Real cross = sum(sums.cross);
  // A NaN that comes only from 0 * inf means that the student rules out a class whose p underflows: the divergence is infinite.
  // Any other NaN shows up in a tail too.
  const bool infinite = cross != cross && student.tail == student.tail && teacher.tail == teacher.tail;
  return {student, teacher, infinite ? Limits<Real>::infinity() : cross};
}

// Whether a piece's sums fit into float32 (see Units::difference_scale).
template <class Real>
KCD_INLINE bool within_float_range(const RowSums<Real>& sums) {
  return sums.cross < Real(1e30) && sums.cross > Real(-1e30);
}

// The inputs for summing a row.
template <class Real>
struct RowTask {
  const Problem& problem;
  const Scale<Real>& scale;
  RowPair row;
  RowPair next_row;                  // the row to read after this one; null: unknown or none
  Exponentials<Real> exponentials;   // where to store the row's exponentials, if the pass stores them
  TargetRow<Real> targets{};
  GradientWriter<Real>* previous_gradient = nullptr;   // the previous row's; written meanwhile, if the pass stores exponentials

  void on_piece_done() const { previous_gradient->write_piece(); }
};

// The sums of a row.  They are invalid if any piece overflowed float32; infinite sums count as overflow too.
template <class Real>
struct SummedRow {
  RowSums<Real> sums;
  TargetSums<Real> targets;   // without that of a class index
  bool within_float_range;
};

template <class Real>
KCD_INLINE SummedRow<Real> merge(const SummedRow<Real>& a, const SummedRow<Real>& b, const Units<Real>& units) {
  const RowSums<Real> sums = merge(a.sums, b.sums, units);
  const Real max = sums.student.max;
  return {sums, add(rebase(a.targets, shift(a.sums.student.max, max)), rebase(b.targets, shift(b.sums.student.max, max))),
          a.within_float_range && b.within_float_range};
}

// Returns the sums of a row.  prefetched: a piece whose maxima are known, on entry the row's first piece, on return the next row's.
// Any other piece is ignored.  Its y is null without a teacher.
template <class Real, class PassType>
KCD_INLINE SummedRow<Real> sum_row(PassType pass, const RowTask<Real>& task, Piece<Real>& prefetched) {
  alignas(64) Real z[kPiece], y[kPiece];
  const Problem& problem = task.problem;
  const RowPair& row = task.row;
  const Type student_type = problem.student.type, teacher_type = problem.teacher.type;
  const bool in_place = is_accumulator_type<Real>(student_type) && (!pass.teacher || is_accumulator_type<Real>(teacher_type));
  const int64_t classes = problem.classes;
  SummedRow<Real> summed{};
  for (int64_t first = 0; first < classes; first += kPiece) {
    const int64_t n = classes - first < kPiece ? classes - first : kPiece;
    Piece<Real> piece = prefetched;
    if (!in_place || piece.z != logits_at<Real>(row.student, first) || piece.y != logits_at<Real>(row.teacher, first)) {
      piece.z = load_piece_and_maximum(student_type, row.student, first, n, z, piece.student_max);
      if (pass.teacher) piece.y = load_piece_and_maximum(teacher_type, row.teacher, first, n, y, piece.teacher_max);
    }
    const bool last = first + n == classes;
    const RowPair next_row = last ? task.next_row : row;
    const int64_t next_first = last ? 0 : first + kPiece;
    // Whether to find the next piece's maxima meanwhile: it must be read in place and be as long as this one.
    const bool with_next = in_place && next_row.student && (!pass.teacher || next_row.teacher) &&
                           (last ? classes <= kPiece : next_first + kPiece <= classes);
    if (with_next)
      prefetched = {logits_at<Real>(next_row.student, next_first),
                    logits_at<Real>(pass.teacher ? next_row.teacher : nullptr, next_first), 0, 0};
    const RowPair& read = with_next ? next_row : row;
    const int64_t read_first = with_next ? next_first : first;
    const Prefetcher prefetch_z(problem.student, read.student, read_first), prefetch_y(problem.teacher, read.teacher, read_first);
    Real *e = task.exponentials.student + first, *f = task.exponentials.teacher + first;
    const RowSums<Real> sums = with_next ? sum_piece<true>(pass, piece, n, task.scale, prefetch_z, prefetch_y, e, f, prefetched)
                                         : sum_piece<false>(pass, piece, n, task.scale, prefetch_z, prefetch_y, e, f, prefetched);
    if (pass.store) {
      task.exponentials.student_max[first / kPiece] = sums.student.max;
      task.exponentials.teacher_max[first / kPiece] = sums.teacher.max;
    }
    const TargetSums<Real> targets =
        task.targets.exists ? sum_targets(task.targets, first, n, piece.z, piece.student_max) : TargetSums<Real>{};
    const SummedRow<Real> summed_piece{sums, targets, within_float_range(sums)};
    summed = first ? merge(summed, summed_piece, task.scale.units) : summed_piece;
    if (pass.store) task.on_piece_done();
  }
  return summed;
}

template <class To>
KCD_INLINE ClassSums<To> convert(const ClassSums<double>& s) {
  return {static_cast<To>(s.max), static_cast<To>(s.ones), static_cast<To>(s.tail), static_cast<To>(s.tail_1),
          static_cast<To>(s.dot_1)};
}

// Recomputes the cross sum relative to the row's maxima: a class that is infinite relative to its piece's maximum may vanish
// relative to the row's.
double cross_of_row(const Problem& problem, const char* student, const char* teacher, double student_max, double teacher_max) {
  double z_scratch[kPiece], y_scratch[kPiece], cross = 0;
  for (int64_t first = 0; first < problem.classes; first += kPiece) {
    const int64_t n = problem.classes - first < kPiece ? problem.classes - first : kPiece;
    const double* z = load_piece(problem.student.type, student, first, n, z_scratch);
    const double* y = load_piece(problem.teacher.type, teacher, first, n, y_scratch);
    for (int64_t j = 0; j < n; ++j) {
      const double log_teacher = (y[j] - piece_reference(teacher_max)) / problem.temperature;
      if (log_teacher < kVanishing * kLn2) continue;
      const double difference = (y[j] - piece_reference(teacher_max)) - (z[j] - piece_reference(student_max));
      if (difference == Limits<double>::infinity()) return difference;
      cross += exponential(log_teacher) * difference;
    }
  }
  return cross;
}

// Returns the sums of a row of which a piece overflowed float32.
template <class Real>
__attribute__((noinline)) RowSums<Real> recompute_in_double(const Pass<false>& pass, const Problem& problem, const RowPair& row,
                                                            const Scale<Real>& scale, RowSums<Real> sums) {
  if (sizeof(Real) < sizeof(double)) {
    const Scale<double> wide_scale(problem.temperature);
    Piece<double> no_piece{};
    const RowSums<double> wide = sum_row<double>(pass, {problem, wide_scale, row, {}, {}}, no_piece).sums;
    sums = {convert<Real>(wide.student), convert<Real>(wide.teacher),
            static_cast<Real>(wide.cross / wide_scale.units.difference_scale * scale.units.difference_scale)};
  }
  if (pass.teacher && sums.cross == Limits<Real>::infinity())
    sums.cross = static_cast<Real>(cross_of_row(problem, row.student, row.teacher, static_cast<double>(sums.student.max),
                                                static_cast<double>(sums.teacher.max))) *
                 scale.units.difference_scale;
  return sums;
}

// As sum_row, but recomputes sums that overflowed float32.
template <class Real, class PassType>
KCD_INLINE SummedRow<Real> sum_row_with_fallback(const PassType& pass, const RowTask<Real>& task, Piece<Real>& prefetched) {
  SummedRow<Real> summed = sum_row<Real>(pass, task, prefetched);
  if (!summed.within_float_range) {
    const Pass<false> without_store{pass.power, pass.teacher, pass.teacher_entropy};
    summed.sums = recompute_in_double(without_store, task.problem, task.row, task.scale, summed.sums);
  }
  return summed;
}

template <class Real>
KCD_INLINE Real logit(Type type, const char* row, int64_t c) {
  Real scratch[1];
  return *load_piece(type, row, c, 1, scratch);
}

// A thread's memory for the exponentials of two rows.  It grows to fit its largest rows.
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
thread_local Scratch thread_scratch;

template <class Real>
KCD_INLINE bool finite(Real x) {
  return x - x == 0;
}

// Row i of student and teacher; null for a row that is not read.
RowPair row_pair(const Problem& problem, int64_t i) {
  if (!problem.valid(i)) return {};
  const int64_t teacher_row = problem.teacher_row_of(i);
  return {problem.student.row(i), teacher_row < 0 ? nullptr : problem.teacher.row(teacher_row)};
}

// The first row >= i that is read; null at the end.
RowPair next_row_pair(const Problem& problem, int64_t i, int64_t end) {
  while (i < end && !problem.valid(i)) ++i;
  return i < end ? row_pair(problem, i) : RowPair{};
}

template <class Real>
KCD_INLINE Real label_logit(const Problem& problem, const char* student, int64_t i) {
  return student && problem.labels ? logit<Real>(problem.student.type, student, problem.labels[i]) : Limits<Real>::nan();
}

template <class Real>
TargetSums<Real> write_row_outputs(const Problem& problem, const RowOutputs& outputs, int64_t i, const RowPair& row,
                                   const SummedRow<Real>& summed, const Units<Real>& units) {
  const TargetSums<Real> targets =
      row_targets(problem, summed.sums.student, summed.targets, label_logit<Real>(problem, row.student, i));
  write_row_outputs(problem, outputs, i, row.teacher != nullptr, summed.sums, targets, units);
  return targets;
}

// Returns the sums of row i, whose teacher is not read; zeros if its student is not read either.
template <class Real>
SummedRow<Real> sum_student_row(const Problem& problem, int64_t i, const RowPair& row, const RowPair& next_row,
                                Piece<Real>& prefetched) {
  if (!row.student) return {};
  const Scale<Real> scale(1.0);
  return dispatch_pass<Real>(kStudentOnly, [&](auto pass) {
    return sum_row_with_fallback<Real>(pass, {problem, scale, row, next_row, {}, target_row<Real>(problem, i)}, prefetched);
  });
}

template <class Real, class PassType>
void sum_rows(const PassType& pass, const Problem& problem, const RowOutputs& outputs, int64_t begin, int64_t end) {
  const Scale<Real> scale(problem.temperature);
  Piece<Real> prefetched{};
  for (int64_t i = begin; i < end; ++i) {
    const RowPair row = row_pair(problem, i), next_row = row.student ? next_row_pair(problem, i + 1, end) : RowPair{};
    const SummedRow<Real> summed =
        row.teacher
            ? sum_row_with_fallback<Real>(pass, {problem, scale, row, next_row, {}, target_row<Real>(problem, i)}, prefetched)
            : sum_student_row(problem, i, row, next_row, prefetched);
    write_row_outputs(problem, outputs, i, row, summed, scale.units);
  }
}

// As sum_rows, but also writes gradients.  A row's gradient is written while the next row is summed, so that arithmetic hides the
// memory latency.
template <class Real, class PassType>
void sum_rows_and_write_gradients(const PassType& pass, const Problem& problem, const RowOutputs& outputs, const Gradient& gradient,
                                  int64_t begin, int64_t end) {
  const Scale<Real> scale(problem.temperature);
  const auto exponentials = thread_scratch.exponentials<Real>(problem.classes);
  GradientWriter<Real> previous_gradient(problem, gradient, scale);
  int free_slot = 0;   // index of the exponentials that no pending gradient uses
  const Real* value = static_cast<const Real*>(gradient.value);
  SelectionPredictor<Real> predictor(gradient.selected_fraction);
  Piece<Real> prefetched{};
  for (int64_t i = begin; i < end; ++i) {
    const RowPair row = row_pair(problem, i), next_row = row.teacher ? next_row_pair(problem, i + 1, end) : RowPair{};
    gradient.written_as[i] = kNotWritten;
    if (!row.teacher) {
      write_row_outputs(problem, outputs, i, row, sum_student_row(problem, i, row, next_row, prefetched), scale.units);
      continue;
    }
    const Exponentials<Real>& row_exponentials = exponentials[free_slot];
    const SummedRow<Real> summed = sum_row_with_fallback<Real>(
        pass, {problem, scale, row, next_row, row_exponentials, target_row<Real>(problem, i), &previous_gradient}, prefetched);
    const RowSums<Real>& sums = summed.sums;
    previous_gradient.finish();
    const TargetSums<Real> targets = write_row_outputs(problem, outputs, i, row, summed, scale.units);
    // Rows with infinities or NaN are left to the backward pass.
    if (!summed.within_float_range ||
        !finite(sums.cross + sums.student.sum() + sums.teacher.sum() + sums.student.max + sums.teacher.max))
      continue;
    const bool selected = !value || predictor.predict(value[i]);
    previous_gradient.start_row(i, row, sums, targets, row_exponentials, selected);
    free_slot = 1 - free_slot;
    gradient.written_as[i] = selected ? kWrittenAsSelected : kWrittenAsUnselected;
  }
  previous_gradient.finish();
  if (gradient.streaming) stream_fence();
}

template <class Real>
void row_stats_as(const Problem& problem, const RowOutputs& outputs, const Gradient* gradient, int64_t begin, int64_t end) {
  const Power power = power_for(problem.temperature);
  const bool teacher_entropy = outputs.teacher_entropy;
  if (gradient)
    return dispatch_pass<Real>(Pass<true>{power, true, teacher_entropy}, [&](auto pass) {
      sum_rows_and_write_gradients<Real>(pass, problem, outputs, *gradient, begin, end);
    });
  dispatch_pass<Real>(Pass<false>{power, true, teacher_entropy},
                      [&](auto pass) { sum_rows<Real>(pass, problem, outputs, begin, end); });
}

// ---- a row split over several threads: the same sums of the same pieces, merged in the same order

// The pass and units that row_stats() uses for such a row.
template <class Real>
struct SplitRowPass {
  Pass<false> pass;
  Scale<Real> scale;
  SplitRowPass(const Problem& problem, const RowOutputs& outputs, bool with_teacher)
      : pass(with_teacher ? Pass<false>{power_for(problem.temperature), true, outputs.teacher_entropy != nullptr} : kStudentOnly),
        scale(with_teacher ? problem.temperature : 1.0) {}
};

template <class Real>
void sum_pieces(const Problem& problem, const RowOutputs& outputs, int64_t i, int64_t begin, int64_t end, SummedRow<Real>* sums) {
  const RowPair row = row_pair(problem, i);
  const SplitRowPass<Real> split(problem, outputs, row.teacher);
  Piece<Real> no_piece{};
  for (int64_t k = begin; k < end; ++k) {
    Problem piece_problem = problem;   // as if the row had only this piece
    piece_problem.classes = std::min(kPiece, problem.classes - k * kPiece);
    const auto piece_start = [&](const char* logits, Type type) { return logits ? logits + k * kPiece * size_of(type) : nullptr; };
    const RowPair piece{piece_start(row.student, problem.student.type), piece_start(row.teacher, problem.teacher.type)};
    TargetRow<Real> targets = target_row<Real>(problem, i);
    targets.labels = piece_start(targets.labels, targets.type);
    sums[k] = dispatch_pass<Real>(
        split.pass, [&](auto pass) { return sum_row<Real>(pass, {piece_problem, split.scale, piece, {}, {}, targets}, no_piece); });
  }
}

template <class Real>
void merge_pieces(const Problem& problem, const RowOutputs& outputs, int64_t i, const SummedRow<Real>* sums) {
  const RowPair row = row_pair(problem, i);
  const SplitRowPass<Real> split(problem, outputs, row.teacher);
  SummedRow<Real> merged{};
  if (row.student) {
    merged = sums[0];
    for (int64_t k = 1; k * kPiece < problem.classes; ++k) merged = merge(merged, sums[k], split.scale.units);
    if (!merged.within_float_range) merged.sums = recompute_in_double(split.pass, problem, row, split.scale, merged.sums);
  }
  const Units<Real> units = Scale<Real>(problem.temperature).units;
  write_row_outputs(problem, outputs, i, row, merged, units);
}

void sum_pieces(const Problem& problem, const RowOutputs& outputs, int64_t i, int64_t begin, int64_t end, void* sums) {
  if (!problem.valid(i)) return;
  problem.student.type == Type::float64 ? sum_pieces(problem, outputs, i, begin, end, static_cast<SummedRow<double>*>(sums))
                                        : sum_pieces(problem, outputs, i, begin, end, static_cast<SummedRow<float>*>(sums));
}

void merge_pieces(const Problem& problem, const RowOutputs& outputs, int64_t i, const void* sums) {
  problem.student.type == Type::float64 ? merge_pieces(problem, outputs, i, static_cast<const SummedRow<double>*>(sums))
                                        : merge_pieces(problem, outputs, i, static_cast<const SummedRow<float>*>(sums));
}

}   // namespace

void row_stats(const Problem& problem, const RowOutputs& outputs, const Gradient* gradient, int64_t begin, int64_t end) {
  problem.student.type == Type::float64 ? row_stats_as<double>(problem, outputs, gradient, begin, end)
                                        : row_stats_as<float>(problem, outputs, gradient, begin, end);
}

const SplitRowKernels split_row{kPiece, sizeof(SummedRow<double>), sum_pieces, merge_pieces};

}   // namespace kcd::cpu::KCD_INSTRUCTION_SET
