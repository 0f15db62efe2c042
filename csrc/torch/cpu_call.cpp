#include "torch/cpu_call.h"

#include <memory>

#include "cpu/reduce.h"

namespace kcd {

void CpuCall::check_labels() const {
  for (int64_t i = 0; i < problem.rows; ++i) {
    const int64_t label = problem.labels[i];
    if ((label < 0 || label >= problem.classes) && label != problem.ignore_index)
      throw std::out_of_range("labels[" + std::to_string(i) + "] is " + std::to_string(label) + ": it must lie in [0, " +
                              std::to_string(problem.classes) + ") or be ignore_index " + std::to_string(problem.ignore_index));
  }
}

// named_rows[j] = i: the teacher's row j is the student's row i.
void CpuCall::map_teacher_rows() {
  teacher_row_.assign(static_cast<size_t>(problem.rows), -1);
  for (int64_t j = 0; j < teacher_rows; ++j) {
    const int64_t i = named_rows[j];
    if (i == -1) continue;
    if (i < -1 || i >= problem.rows)
      throw std::out_of_range("rows[" + std::to_string(j) + "] is " + std::to_string(i) + ": it must lie in [0, " +
                              std::to_string(problem.rows) + "), or be -1 to be skipped");
    if (teacher_row_[i] >= 0) throw std::invalid_argument("rows names row " + std::to_string(i) + " more than once");
    teacher_row_[i] = j;
  }
  problem.teacher_row = teacher_row_.data();
}

// ---- rows: what one read of the logits gives

namespace {

constexpr int64_t kRead = 28672, kWrite = 8 * kRead;   // classes that take about 10 us

template <class Score, class Real>
void rank(const Problem& p, const void* value, const Rows& rows) {
  const Real* stats = static_cast<const Real*>(rows.stats);
  cpu::rank(static_cast<const Score*>(value), stats + kEntropy * p.rows, stats + kKl * p.rows, rows.candidate, p.rows,
            static_cast<Score*>(rows.value));
}

template <class Real>
void rank(const Problem& p, const void* value, bool by_double, const Rows& rows) {
  by_double ? rank<double, Real>(p, value, rows) : rank<float, Real>(p, value, rows);
}

// Whether threads would be idle if each took whole rows.
bool split_rows(const Problem& p) { return p.rows > 0 && p.classes >= 2 * kRead && p.rows < number_of_threads(); }

void sum_split_rows(const CpuCall& call, const RowOutputs& outputs) {
  const Problem& p = call.problem;
  const cpu::SplitRow& split = *cpu::kernels().split_row;
  const int64_t row_bytes = (p.classes + split.piece - 1) / split.piece * split.bytes_of_piece;
  const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(p.rows * row_bytes) / sizeof(double)]);
  const auto of_row = [&](int64_t i) { return reinterpret_cast<char*>(sums.get()) + i * row_bytes; };
  call.over_pieces(kRead, split.piece,
                   [&](int64_t i, int64_t begin, int64_t end) { split.sum_pieces(p, outputs, i, begin, end, of_row(i)); });
  for (int64_t i = 0; i < p.rows; ++i) split.finish_row(p, outputs, i, of_row(i));
}

// What rows are ranked by: it stands there once they are read.
const void* value_of(const CpuCall& call, const View& score, Value value, const Rows& rows) {
  const char* stats = static_cast<const char*>(rows.stats);
  const int64_t stats_row = call.problem.rows * call.accumulator_bytes();
  return value == Value::score             ? score.data<void>()
         : value == Value::kl              ? stats + kKl * stats_row
         : value == Value::cross_entropy   ? rows.cross_entropy
         : value == Value::teacher_entropy ? rows.value
                                           : stats + kEntropy * stats_row;
}

}   // namespace

void read_rows(const CpuCall& call, const View& score, Value value, const Rows& rows, const Gradient* gradient) {
  const Problem& p = call.problem;
  // The teacher's entropy only ranks: it is written where the ranking is read from.
  const RowOutputs outputs{rows.stats, rows.cross_entropy, value == Value::teacher_entropy ? rows.value : nullptr};
  split_rows(p)
      ? sum_split_rows(call, outputs)
      : call.over_rows(kRead, [&](int64_t begin, int64_t end) { cpu::kernels().forward(p, outputs, gradient, begin, end); });

  const void* source = value_of(call, score, value, rows);
  const bool by_double = ranks_by_double(call, score);
  call.is_double() ? rank<double>(p, source, by_double, rows) : rank<float>(p, source, by_double, rows);
}

void select(const void* value, bool is_double, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected) {
  is_double ? cpu::select(static_cast<const double*>(value), candidate, rows, k, selected)
            : cpu::select(static_cast<const float*>(value), candidate, rows, k, selected);
}

// ---- loss

namespace {

template <class Real>
void reduce_as(const Call& call, const LossOptions& options, const View& row_weight, const State& state, const void* cross_entropy,
               void* loss) {
  const LossFactors factors{options.kd_weight * options.temperature * options.temperature, options.ce_weight,
                            options.divisor(state.counts()[0]), options.divisor(state.counts()[1])};
  cpu::loss(call.problem, reinterpret_cast<const Real*>(state.stats()) + kKl * state.rows, static_cast<const Real*>(cross_entropy),
            static_cast<const Real*>(row_weight_of(call, row_weight)), state.selected(), factors, options.reduction,
            static_cast<Real*>(loss));
}

}   // namespace

void reduce(const Call& call, const LossOptions& options, const View& row_weight, const State& state, const void* cross_entropy,
            void* loss) {
  call.is_double() ? reduce_as<double>(call, options, row_weight, state, cross_entropy, loss)
                   : reduce_as<float>(call, options, row_weight, state, cross_entropy, loss);
}

// ---- gradient

namespace {

double share(double factor, double divisor) { return divisor > 0 ? factor / divisor : 0.0; }

// A gradient that no cache holds is written past them: the lines it would push out are not fetched first, and stay.
bool streams(const Problem& p) {
  constexpr int64_t kStreamingBytes = int64_t{8} << 20;
  return p.rows * p.classes * size_of(p.student.type) >= kStreamingBytes;
}

Gradient gradient_of(const Call& call, const LossOptions& options, const View& row_weight, const int64_t* counts,
                     const Logits& out) {
  Gradient gradient{};
  gradient.row_weight = row_weight_of(call, row_weight);
  gradient.kd_factor = share(options.kd_weight * options.temperature, options.divisor(counts[0]));
  gradient.ce_factor = share(options.ce_weight, options.divisor(counts[1]));
  gradient.out = out;
  gradient.streaming = out.data != call.problem.student.data && streams(call.problem);
  return gradient;
}

void write_rows(const CpuCall& call, const Gradient& gradient) {
  const Problem& p = call.problem;
  if (split_rows(p))
    return call.over_pieces(kRead, cpu::kernels().split_row->piece, [&](int64_t i, int64_t begin, int64_t end) {
      cpu::kernels().write_pieces(p, gradient, i, begin, end);
    });
  const bool mostly_written = gradient.written != nullptr;
  call.over_rows(mostly_written ? kWrite : kRead,
                 [&](int64_t begin, int64_t end) { cpu::kernels().backward(p, gradient, begin, end); });
}

}   // namespace

void write_gradient(const BackwardCall& a, const CpuCall& call, const Logits& out) {
  const Problem& p = call.problem;
  const State state = given_state(call, a.state);
  for (int64_t i = 0; i < p.rows; ++i)
    require(!state.selected()[i] || p.teacher_row_of(i) >= 0, "selected names a row that the teacher does not hold");
  Gradient gradient = gradient_of(call, a.options, a.row_weight, state.counts(), out);
  gradient.stats = state.stats();
  gradient.selected = state.selected();
  gradient.grad_output = a.grad_output.data<void>();
  gradient.grad_output_stride = a.one_for_all() ? 0 : 1;
  write_rows(call, gradient);
}

// ---- both

void forward(const ForwardCall& a, const CpuCall& call, void* loss, const State& state, const Logits& out) {
  const Problem& p = call.problem;
  const auto rows = static_cast<size_t>(p.rows);
  std::vector<uint8_t> candidate(rows), written(a.with_gradient ? rows : 0);
  std::vector<double> cross_entropy(p.with_labels ? rows : 0);   // room for either type
  const Rows read{state.value(), state.stats(), p.with_labels ? cross_entropy.data() : nullptr, candidate.data()};
  int64_t* counts = state.counts();
  const int64_t candidates = cpu::mark_candidates(p, candidate.data());
  counts[0] = number_to_keep(a.keep.fraction, a.keep.count, candidates);
  counts[1] = cpu::count_valid(p);

  Gradient gradient{};
  if (a.with_gradient) {
    gradient = gradient_of(call, a.options, a.row_weight, counts, out);
    gradient.written = written.data();
    gradient.value = ranks_by_double(call, a.score) == call.is_double() ? value_of(call, a.score, a.value, read) : nullptr;
    gradient.share = static_cast<double>(counts[0]) / static_cast<double>(std::max<int64_t>(1, candidates));
  }
  read_rows(call, a.score, a.value, read, a.with_gradient ? &gradient : nullptr);
  select(state.value(), ranks_by_double(call, a.score), candidate.data(), p.rows, counts[0], state.selected());
  if (a.with_gradient) {
    gradient.stats = state.stats();
    gradient.selected = state.selected();
    write_rows(call, gradient);
  }
  reduce(call, a.options, a.row_weight, state, read.cross_entropy, loss);
}

}   // namespace kcd
