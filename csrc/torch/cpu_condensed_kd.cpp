#include "torch/cpu_condensed_kd.h"

#include <memory>

#include "cpu/reduce_rows.h"

namespace kcd::cpu {

// ---- row_stats

namespace {

constexpr int64_t kReadClasses = 28672, kWriteClasses = 8 * kReadClasses;   // classes that take about 10 us

template <class Score, class Real>
void rank_rows_as(const Problem& p, const void* value, const Rows& rows) {
  const Real* stats = static_cast<const Real*>(rows.stats);
  rank_rows(static_cast<const Score*>(value), stats + kEntropy * p.rows, stats + kKl * p.rows, rows.candidate, p.rows,
            static_cast<Score*>(rows.value));
}

template <class Real>
void rank_rows_as(const Problem& p, const void* value, bool by_double, const Rows& rows) {
  by_double ? rank_rows_as<double, Real>(p, value, rows) : rank_rows_as<float, Real>(p, value, rows);
}

// Whether threads would be idle if each took complete rows.
bool should_split_rows(const Problem& p) { return p.rows > 0 && p.classes >= 2 * kReadClasses && p.rows < number_of_threads(); }

void sum_split_rows(const CpuCall& call, const RowOutputs& outputs) {
  const Problem& p = call.problem;
  const SplitRowKernels& split = *kernels().split_row;
  const int64_t row_bytes = (p.classes + split.piece_classes - 1) / split.piece_classes * split.piece_bytes;
  const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(p.rows * row_bytes) / sizeof(double)]);
  const auto row_sums = [&](int64_t i) { return reinterpret_cast<char*>(sums.get()) + i * row_bytes; };
  call.over_pieces(kReadClasses, split.piece_classes,
                   [&](int64_t i, int64_t begin, int64_t end) { split.sum_pieces(p, outputs, i, begin, end, row_sums(i)); });
  for (int64_t i = 0; i < p.rows; ++i) split.merge_pieces(p, outputs, i, row_sums(i));
}

// Returns the array that contains the ranking values once the rows have been read.
const void* ranking_source(const CpuCall& call, const View& score, Value value, const Rows& rows) {
  const char* stats = static_cast<const char*>(rows.stats);
  const int64_t stats_row = call.problem.rows * call.accumulator_bytes();
  return value == Value::score             ? score.data<void>()
         : value == Value::kl              ? stats + kKl * stats_row
         : value == Value::cross_entropy   ? rows.cross_entropy
         : value == Value::teacher_entropy ? rows.value
                                           : stats + kEntropy * stats_row;
}

}   // namespace

void row_stats(const CpuCall& call, const View& score, Value value, const Rows& rows, const Gradient* gradient) {
  const Problem& p = call.problem;
  // Only the ranking uses the teacher's entropy, so it is written to the ranking values directly.
  const RowOutputs outputs{rows.stats, rows.cross_entropy, value == Value::teacher_entropy ? rows.value : nullptr};
  should_split_rows(p)
      ? sum_split_rows(call, outputs)
      : call.over_rows(kReadClasses, [&](int64_t begin, int64_t end) { kernels().row_stats(p, outputs, gradient, begin, end); });

  const void* source = ranking_source(call, score, value, rows);
  const bool by_double = ranks_by_double(call, score);
  call.is_double() ? rank_rows_as<double>(p, source, by_double, rows) : rank_rows_as<float>(p, source, by_double, rows);
}

// ---- select_topk

void select_topk(const void* value, bool is_double, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected) {
  is_double ? select_topk(static_cast<const double*>(value), candidate, rows, k, selected)
            : select_topk(static_cast<const float*>(value), candidate, rows, k, selected);
}

// ---- reduce_rows

namespace {

template <class Real>
void reduce_rows_as(const Call& call, const LossOptions& options, const View& row_weight, const State& state,
                    const void* cross_entropy, void* loss) {
  const LossFactors factors{options.kd_weight * options.temperature * options.temperature, options.ce_weight,
                            options.divisor(state.counts()[0]), options.divisor(state.counts()[1])};
  reduce_rows(call.problem, reinterpret_cast<const Real*>(state.stats()) + kKl * state.rows,
              static_cast<const Real*>(cross_entropy), static_cast<const Real*>(check_row_weight(call, row_weight)),
              state.selected(), factors, options.reduction, static_cast<Real*>(loss));
}

}   // namespace

void reduce_rows(const Call& call, const LossOptions& options, const View& row_weight, const State& state,
                 const void* cross_entropy, void* loss) {
  call.is_double() ? reduce_rows_as<double>(call, options, row_weight, state, cross_entropy, loss)
                   : reduce_rows_as<float>(call, options, row_weight, state, cross_entropy, loss);
}

// ---- condensed_kd_backward

namespace {

double divide_or_zero(double factor, double divisor) { return divisor > 0 ? factor / divisor : 0.0; }

// Whether a gradient is too large for the caches.  Streaming it saves fetching the lines that it overwrites, and evicts no others.
bool should_stream(const Problem& p) {
  constexpr int64_t kStreamingBytes = int64_t{8} << 20;
  return p.rows * p.classes * size_of(p.student.type) >= kStreamingBytes;
}

Gradient make_gradient(const Call& call, const LossOptions& options, const View& row_weight, const int64_t* counts,
                       const Logits& out) {
  Gradient gradient{};
  gradient.row_weight = check_row_weight(call, row_weight);
  gradient.kd_factor = divide_or_zero(options.kd_weight * options.temperature, options.divisor(counts[0]));
  gradient.ce_factor = divide_or_zero(options.ce_weight, options.divisor(counts[1]));
  gradient.out = out;
  gradient.streaming = out.data != call.problem.student.data && should_stream(call.problem);
  return gradient;
}

void write_gradient(const CpuCall& call, const Gradient& gradient) {
  const Problem& p = call.problem;
  if (should_split_rows(p))
    return call.over_pieces(kReadClasses, kernels().split_row->piece_classes, [&](int64_t i, int64_t begin, int64_t end) {
      kernels().write_gradient_pieces(p, gradient, i, begin, end);
    });
  const bool mostly_written = gradient.written_as != nullptr;
  call.over_rows(mostly_written ? kWriteClasses : kReadClasses,
                 [&](int64_t begin, int64_t end) { kernels().condensed_kd_backward(p, gradient, begin, end); });
}

}   // namespace

void condensed_kd_backward(const CondensedKDBackwardArguments& a, const CpuCall& call, const Logits& out) {
  const Problem& p = call.problem;
  const State state = check_state(call, a.state);
  for (int64_t i = 0; i < p.rows; ++i)
    require(!state.selected()[i] || p.teacher_row_of(i) >= 0, "every selected row must have a teacher row");
  Gradient gradient = make_gradient(call, a.options, a.row_weight, state.counts(), out);
  gradient.stats = state.stats();
  gradient.selected = state.selected();
  gradient.grad_output = a.grad_output.data<void>();
  gradient.grad_output_stride = a.has_scalar_grad_output() ? 0 : 1;
  write_gradient(call, gradient);
}

// ---- condensed_kd

void condensed_kd(const CondensedKDArguments& a, const CpuCall& call, void* loss, const State& state, const Logits& out) {
  const Problem& p = call.problem;
  const auto n = static_cast<size_t>(p.rows);
  std::vector<uint8_t> candidate(n), written_as(a.with_gradient ? n : 0);
  std::vector<double> cross_entropy(p.with_cross_entropy() ? n : 0);   // large enough for float or double
  const Rows rows{state.value(), state.stats(), p.with_cross_entropy() ? cross_entropy.data() : nullptr, candidate.data()};
  int64_t* counts = state.counts();
  const int64_t candidates = mark_candidates(p, candidate.data());
  counts[0] = number_to_keep(a.keep.fraction, a.keep.count, candidates);
  counts[1] = count_valid(p);

  Gradient gradient{};
  if (a.with_gradient) {
    gradient = make_gradient(call, a.options, a.row_weight, counts, out);
    gradient.written_as = written_as.data();
    gradient.value = ranks_by_double(call, a.score) == call.is_double() ? ranking_source(call, a.score, a.value, rows) : nullptr;
    gradient.selected_fraction = static_cast<double>(counts[0]) / static_cast<double>(std::max<int64_t>(1, candidates));
  }
  row_stats(call, a.score, a.value, rows, a.with_gradient ? &gradient : nullptr);
  select_topk(state.value(), ranks_by_double(call, a.score), candidate.data(), p.rows, counts[0], state.selected());
  if (a.with_gradient) {
    gradient.stats = state.stats();
    gradient.selected = state.selected();
    write_gradient(call, gradient);
  }
  reduce_rows(call, a.options, a.row_weight, state, rows.cross_entropy, loss);
}

}   // namespace kcd::cpu
