// Runs the CUDA kernels through csrc/cuda/launch.h on generated inputs, and prints a digest of every array that they write.
//
//   driver <schedules> <case>...
//
// - schedules: "forward", "reverse" or "random:<seed>:<resident blocks>", separated by spaces
// - case: "name=value" options, see Case
//
// Prints one line per case, schedule and array: the case's index, the schedule, the array's name and its digest.  All NaNs have the
// same digest.
//
// Arrays are allocated at exactly their size; outputs and workspace start as garbage.  Exit status: 0; kFailedLaunch if a launch
// failed (message on stderr); kUsageError for wrong arguments; otherwise a sanitizer's.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "math/half.h"
#include "simt.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KCD_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define KCD_ASAN 1
#endif
#ifdef KCD_ASAN
extern "C" void __asan_poison_memory_region(const volatile void* address, size_t size);
#endif

namespace kcd {
namespace {

constexpr int kFailedLaunch = 86, kUsageError = 2;

// ---- options

using Names = std::initializer_list<const char*>;

// The options "name=value name=value".  Reading one removes it; expect_none() then rejects unknown names.
class Options {
 public:
  explicit Options(const std::string& text) {
    std::istringstream stream(text);
    for (std::string word; stream >> word;) {
      const size_t equals = word.find('=');
      if (equals == std::string::npos) throw std::invalid_argument("expected name=value, got " + word);
      values_[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }

  std::string text(const std::string& name, const std::string& default_value) {
    const auto found = values_.find(name);
    if (found == values_.end()) return default_value;
    const std::string value = found->second;
    values_.erase(found);
    return value;
  }
  double number(const std::string& name, double default_value) { return std::stod(text(name, std::to_string(default_value))); }
  int64_t integer(const std::string& name, int64_t default_value) { return std::stoll(text(name, std::to_string(default_value))); }

  // Returns the index in `names` of the option's value; by default the first.
  int choice(const std::string& name, Names names) {
    const std::string value = text(name, *names.begin());
    int index = 0;
    for (const char* candidate : names) {
      if (value == candidate) return index;
      ++index;
    }
    throw std::invalid_argument("unknown value of " + name + ": " + value);
  }

  void expect_none() const {
    if (!values_.empty()) throw std::invalid_argument("unknown option: " + values_.begin()->first);
  }

 private:
  std::map<std::string, std::string> values_;
};

enum class Run { step, separate, select, reduce };
enum class Entries { none, valid, invalid };
enum class Content { random, masked, equal };

struct Case {
  Run run;   // step: forward, loss and backward; separate: the same with one launch for each; select, reduce: only that
  cuda::DeviceContext context;
  int64_t rows, classes;
  Type student, teacher;
  bool with_teacher;
  Content content;                          // of the logits. masked: -inf, NaN and the like; equal: all rows are the same
  int64_t inner, gap;                       // rows of the inner leading dimension; elements between two rows
  int64_t student_offset, teacher_offset;   // bytes from a multiple of 16
  bool in_place;
  double temperature;
  Entries labels;          // valid: some rows are ignored; invalid: some labels are out of range
  bool with_soft_labels;   // instead of `labels`
  Type soft_labels;
  double label_smoothing;
  Entries mapping;   // valid: the teacher has some of the rows, in another order; invalid: some twice, some out of range
  Value value;
  bool score_is_double;   // for Value::score
  cuda::Keep keep;
  Reduction reduction;
  bool weights;       // row_weight
  bool all_outputs;   // all optional outputs

  explicit Case(Options options) {
    const Names types{"float32", "float64", "float16", "bfloat16"}, entries{"none", "valid", "invalid"}, flag{"no", "yes"};
    run = static_cast<Run>(options.choice("run", {"step", "separate", "select", "reduce"}));
    context.num_sms = static_cast<int>(options.integer("num_sms", 4));
    context.stream = nullptr;
    context.block_threads = static_cast<int>(options.integer("threads", 256));
    rows = options.integer("rows", 1);
    classes = options.integer("classes", 1);
    student = static_cast<Type>(options.choice("student", types));
    with_teacher = options.choice("with_teacher", {"yes", "no"}) == 0;
    teacher = static_cast<Type>(options.choice("teacher", types));
    content = static_cast<Content>(options.choice("content", {"random", "masked", "equal"}));
    inner = options.integer("inner", rows);
    gap = options.integer("gap", 0);
    student_offset = options.integer("student_offset", 0);
    teacher_offset = options.integer("teacher_offset", 0);
    in_place = options.choice("in_place", flag);
    temperature = options.number("temperature", 3);
    labels = static_cast<Entries>(options.choice("labels", entries));
    const int soft = options.choice("soft_labels", {"none", "float32", "float64", "float16", "bfloat16"});
    with_soft_labels = soft > 0;
    soft_labels = static_cast<Type>(with_soft_labels ? soft - 1 : 0);
    label_smoothing = options.number("label_smoothing", 0);
    mapping = static_cast<Entries>(options.choice("mapping", entries));
    value = static_cast<Value>(options.choice("value", {"entropy", "teacher_entropy", "kl", "cross_entropy", "score"}));
    score_is_double = options.choice("score", {"float32", "float64"});
    keep = {options.number("fraction", 0.5), options.integer("count", 0)};
    reduction = static_cast<Reduction>(options.choice("reduction", {"mean", "sum", "none"}));
    weights = options.choice("weights", flag);
    all_outputs = options.choice("all_outputs", flag);
    options.expect_none();
  }

  Type accumulator() const { return student == Type::float64 ? Type::float64 : Type::float32; }
  Type ranked() const { return value == Value::score ? (score_is_double ? Type::float64 : Type::float32) : accumulator(); }
  bool with_labels() const { return with_soft_labels || labels != Entries::none; }
  double ce_weight() const { return with_labels() ? 0.75 : 0; }
  int64_t loss_size() const { return reduction == Reduction::none ? rows : 1; }
};

// ---- memory

void poison([[maybe_unused]] const void* begin, [[maybe_unused]] int64_t bytes) {
#ifdef KCD_ASAN
  __asan_poison_memory_region(begin, static_cast<size_t>(bytes));
#endif
}

// An array that starts `offset` bytes after a multiple of 16 and ends where its allocation does; filled with `garbage`.
// AddressSanitizer guards units of eight bytes, so the gap before it is poisoned by hand.
class Memory {
 public:
  explicit Memory(int64_t bytes, int64_t offset = 0, int garbage = 0xff)
      : bytes_(static_cast<size_t>(offset + bytes)), offset_(offset) {
    allocation_ = static_cast<char*>(
        is_sparse() ? mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                    : std::malloc(bytes_));
    if (!allocation_ || allocation_ == MAP_FAILED) throw std::bad_alloc();
    if (is_sparse()) return;
    std::memset(allocation_, garbage, bytes_);
    poison(allocation_, offset);
  }
  Memory(Memory&& other) noexcept : allocation_(other.allocation_), bytes_(other.bytes_), offset_(other.offset_) {
    other.allocation_ = nullptr;
    other.bytes_ = 0;
  }
  Memory(const Memory&) = delete;
  ~Memory() { is_sparse() ? static_cast<void>(munmap(allocation_, bytes_)) : std::free(allocation_); }

  template <class T = char>
  T* data() const {
    return reinterpret_cast<T*>(allocation_ + offset_);
  }

 private:
  bool is_sparse() const { return bytes_ > size_t{1} << 30; }   // too large to touch: pages of zeros

  char* allocation_;
  size_t bytes_;
  int64_t offset_;
};

Memory array(Type type, int64_t n) { return Memory(n * size_of(type)); }   // filled with NaN
template <class T>
Memory array(int64_t n) {
  return Memory(n * static_cast<int64_t>(sizeof(T)), 0, 0xa5);   // filled with invalid integers
}

void put(void* data, Type type, int64_t i, double x) {
  switch (type) {
    case Type::float32:
      static_cast<float*>(data)[i] = static_cast<float>(x);
      break;
    case Type::float64:
      static_cast<double*>(data)[i] = x;
      break;
    case Type::float16:
      static_cast<float16*>(data)[i] = to_float16(static_cast<float>(x));
      break;
    case Type::bfloat16:
      static_cast<bfloat16*>(data)[i] = to_bfloat16(static_cast<float>(x));
      break;
  }
}

double get(const void* data, Type type, int64_t i) {
  switch (type) {
    case Type::float32:
      return static_cast<double>(static_cast<const float*>(data)[i]);
    case Type::float64:
      return static_cast<const double*>(data)[i];
    case Type::float16:
      return static_cast<double>(to_float(static_cast<const float16*>(data)[i]));
    default:
      return static_cast<double>(to_float(static_cast<const bfloat16*>(data)[i]));
  }
}

double lowest(Type type) {
  return type == Type::float16    ? -65504
         : type == Type::bfloat16 ? -0x1.fep127
         : type == Type::float32  ? -static_cast<double>(std::numeric_limits<float>::max())
                                  : -std::numeric_limits<double>::max();
}

// ---- inputs

class Random {   // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }   // in [0, 1)

 private:
  uint64_t state_;
};

// Logits and their memory.
struct Tensor {
  Memory memory;
  Logits logits;

  char* row(int64_t i) const {   // computed independently of the kernels
    const int64_t element = i / logits.inner * logits.outer_stride + i % logits.inner * logits.inner_stride;
    return memory.data() + element * size_of(logits.type);
  }
};

Tensor tensor(Type type, int64_t rows, int64_t classes, int64_t inner, int64_t gap, int64_t offset) {
  const int64_t stride = classes + gap, outer_stride = inner * stride + gap, last = rows - 1;
  const int64_t elements = rows > 0 ? last / inner * outer_stride + last % inner * stride + classes : 0;
  Memory memory(elements * size_of(type), offset);
  const Logits logits{memory.data(), type, inner, outer_stride, stride};
  return {std::move(memory), logits};
}

double masked(int64_t row, int64_t c, int64_t classes, Type type, double logit) {
  const double infinity = std::numeric_limits<double>::infinity();
  switch (row % 8) {
    case 1:
      return c % 2 == 0 ? -infinity : logit;
    case 2:
      return -infinity;
    case 3:
      return c == classes / 2 ? std::numeric_limits<double>::quiet_NaN() : logit;
    case 4:
      return c > classes / 3 ? lowest(type) : logit;
    case 5:
      return 1;
    case 6:
      return logit + 1e4;
    default:
      return logit;
  }
}

Tensor make_logits(const Case& c, Type type, int64_t rows, int64_t offset, uint64_t seed) {
  Tensor x = tensor(type, rows, c.classes, c.inner, c.gap, offset);
  for (int64_t i = 0; i < rows; ++i) {
    char* const row = x.row(i);
    Random random(seed + (c.content == Content::equal ? 0 : static_cast<uint64_t>(i) * 0x100000000u));
    for (int64_t j = 0; j < c.classes; ++j) {
      const double logit = 12 * random.uniform() - 6;
      put(row, type, j, c.content == Content::masked ? masked(i, j, c.classes, type, logit) : logit);
    }
    const char* const end = row + c.classes * size_of(type);
    if (i + 1 < rows) poison(end, x.row(i + 1) - end);
  }
  return x;
}

constexpr int64_t kIgnored = -100;

Memory make_labels(const Case& c, Random random) {
  Memory labels = array<int64_t>(c.rows);
  for (int64_t i = 0; i < c.rows; ++i) {
    int64_t& label = labels.data<int64_t>()[i] = i % 5 == 3 ? kIgnored : random.below(c.classes);
    if (c.labels == Entries::invalid && i == 0) label = -1;
    if (c.labels == Entries::invalid && i == c.rows - 1) label = c.classes;
  }
  return labels;
}

// Returns the label probabilities: rows of any sum, with zeros.
Tensor make_soft_labels(const Case& c) {
  Tensor x = tensor(c.soft_labels, c.with_soft_labels ? c.rows : 0, c.classes, c.inner, c.gap, 0);
  Random random(40);
  for (int64_t i = 0; c.with_soft_labels && i < c.rows; ++i) {
    char* const row = x.row(i);
    for (int64_t j = 0; j < c.classes; ++j) put(row, c.soft_labels, j, random.below(3) ? random.uniform() : 0);
    const char* const end = row + c.classes * size_of(c.soft_labels);
    if (i + 1 < c.rows) poison(end, x.row(i + 1) - end);
  }
  return x;
}

int64_t teacher_rows_of(const Case& c) { return c.mapping == Entries::none ? c.rows : c.rows + 2; }

// Returns the student's row for each of the teacher's rows.
Memory make_mapping(const Case& c) {
  const int64_t n = teacher_rows_of(c);
  Memory mapping = array<int64_t>(n);
  int64_t* const row = mapping.data<int64_t>();
  for (int64_t j = 0; j < n; ++j) row[j] = j % 4 == 1 ? -1 : c.rows - 1 - j;
  if (c.mapping == Entries::invalid) {
    row[1] = c.rows;
    row[n - 1] = row[0];
    row[n - 2] = std::numeric_limits<int64_t>::min();
  }
  return mapping;
}

template <class Make>
Memory make_array(Type type, int64_t n, const Make& make) {
  Memory x = array(type, n);
  for (int64_t i = 0; i < n; ++i) put(x.data(), type, i, make(i));
  return x;
}

// Ranking values with many ties, NaN, infinities and zeros of either sign.
Memory make_scores(Type type, int64_t n, Random random) {
  return make_array(type, n, [&](int64_t) {
    const double level = static_cast<double>(random.below(40)) - 20;
    return level == 19    ? std::numeric_limits<double>::quiet_NaN()
           : level == 18  ? -std::numeric_limits<double>::infinity()
           : level == -18 ? -0.0
                          : level * 1.1;
  });
}

Memory make_flags(int64_t n, double share, Random random) {
  Memory flags = array<uint8_t>(n);
  for (int64_t i = 0; i < n; ++i) flags.data<uint8_t>()[i] = random.uniform() < share;
  return flags;
}

// ---- outputs

class Report {
 public:
  Report(int number, std::string schedule) : number_(number), schedule_(std::move(schedule)) {}

  void add(const char* name, const Memory& x, Type type, int64_t n) const {
    uint64_t digest = kBasis;
    add(x.data(), type, n, digest);
    print(name, digest);
  }
  void add(const char* name, const Tensor& x, int64_t rows, int64_t classes) const {
    uint64_t digest = kBasis;
    for (int64_t i = 0; i < rows; ++i) add(x.row(i), x.logits.type, classes, digest);
    print(name, digest);
  }
  template <class T>
  void add(const char* name, const Memory& x, int64_t n) const {
    uint64_t digest = kBasis;
    for (int64_t i = 0; i < n; ++i) add(static_cast<uint64_t>(x.data<T>()[i]), digest);
    print(name, digest);
  }

 private:
  static constexpr uint64_t kBasis = 0xcbf29ce484222325u;   // FNV-1a on 64-bit words

  static void add(uint64_t word, uint64_t& digest) {
    digest = (digest ^ word) * 0x100000001b3u;
    digest ^= digest >> 32;
  }
  static void add(const void* data, Type type, int64_t n, uint64_t& digest) {
    for (int64_t i = 0; i < n; ++i) {
      const double x = get(data, type, i);
      add(x == x ? bit_cast<uint64_t>(x) : ~uint64_t{0}, digest);
    }
  }
  void print(const char* name, uint64_t digest) const {
    std::printf("%d %s %s %016llx\n", number_, schedule_.c_str(), name, static_cast<unsigned long long>(digest));
  }

  int number_;
  std::string schedule_;
};

// ---- runs

template <class Call, class Function>
void run_with_workspace(const Call& call, const cuda::DeviceContext& context, const Function& function) {
  const Memory workspace(static_cast<int64_t>(cuda::workspace_bytes(call, context)));
  function(call, context, workspace.data<void>());
}

cuda::LossSumParams sum_of(const Case& c, const Memory& row_weight) {
  return {c.weights ? row_weight.data() : nullptr, 0.25 * c.temperature * c.temperature, c.ce_weight(), c.reduction, 1};
}

Memory make_row_weight(const Case& c, Random random) {
  return make_array(c.accumulator(), c.rows, [&](int64_t i) { return i % 6 == 5 ? 0 : random.uniform(); });
}

void count(const Case& c, const Problem& problem, const uint8_t* selected, int64_t* counts) {
  counts[0] = counts[1] = 0;
  for (int64_t i = 0; i < c.rows; ++i) {
    counts[0] += selected[i];
    counts[1] += problem.valid(i);
  }
}

void run_select(const Case& c, const Report& report) {
  const Type type = c.score_is_double ? Type::float64 : Type::float32;
  const Memory value = make_scores(type, c.rows, Random(1)), candidate = make_flags(c.rows, 0.9, Random(2));
  const Memory selected = array<uint8_t>(c.rows);
  const cuda::SelectTopkParams call{value.data(), c.score_is_double,       candidate.data<uint8_t>(), c.rows,
                                    c.keep,       selected.data<uint8_t>()};
  run_with_workspace(call, c.context, cuda::launch_select_topk);
  report.add<uint8_t>("selected", selected, c.rows);
}

void run_reduce(const Case& c, const Report& report) {
  Random random(3);
  const auto positive = [&](int64_t) { return 5 * random.uniform(); };
  const Memory kl = make_array(c.accumulator(), c.rows, positive), cross_entropy = make_array(c.accumulator(), c.rows, positive);
  const Memory row_weight = make_row_weight(c, random), selected = make_flags(c.rows, 0.5, random);
  const Memory labels = make_labels(c, random), counts = array<int64_t>(2), loss = array(c.accumulator(), c.loss_size());
  Problem problem{};
  problem.student.type = c.student;
  problem.rows = c.rows;
  problem.with_labels = c.labels != Entries::none;
  problem.labels = labels.data<int64_t>();
  problem.ignore_index = kIgnored;
  count(c, problem, selected.data<uint8_t>(), counts.data<int64_t>());
  const cuda::ReduceRowsParams call{
      problem,          kl.data(), cross_entropy.data(), selected.data<uint8_t>(), counts.data<int64_t>(), sum_of(c, row_weight),
      loss.data<void>()};
  run_with_workspace(call, c.context, cuda::launch_reduce_rows);
  report.add("loss", loss, c.accumulator(), c.loss_size());
}

// Forward and backward.  Reports every array that a kernel writes.
void run_step(const Case& c, const Report& report) {
  const Type real = c.accumulator();
  const Tensor student = make_logits(c, c.student, c.rows, c.student_offset, 10);
  const Tensor teacher = make_logits(c, c.teacher, teacher_rows_of(c), c.teacher_offset, 20);
  const Memory labels = make_labels(c, Random(4)), row_weight = make_row_weight(c, Random(5));
  const Memory score = make_scores(c.ranked(), c.rows, Random(6));
  const Tensor soft_labels = make_soft_labels(c);
  const bool with_indices = c.with_labels() && !c.with_soft_labels;
  Problem problem{student.logits,   teacher.logits, c.with_teacher,     c.with_labels(),
                  c.rows,           c.classes,      c.temperature,      with_indices ? labels.data<int64_t>() : nullptr,
                  kIgnored,         nullptr,        c.with_soft_labels, soft_labels.logits,
                  c.label_smoothing};
  const Memory mapping = make_mapping(c), teacher_row = array<int64_t>(c.rows);
  if (c.mapping != Entries::none) {
    cuda::launch_map_rows(mapping.data<int64_t>(), teacher_rows_of(c), teacher_row.data<int64_t>(), c.rows, c.context);
    problem.teacher_row = teacher_row.data<int64_t>();
    report.add<int64_t>("teacher_row", teacher_row, c.rows);
  }

  const Memory stats = array(real, kStatsRows * c.rows), cross_entropy = array(real, c.rows);
  const Memory teacher_entropy = array(real, c.rows), ranked = array(c.ranked(), c.rows);
  const Memory candidate = array<uint8_t>(c.rows), selected = array<uint8_t>(c.rows), counts = array<int64_t>(2);
  const Memory loss = array(real, c.loss_size());
  const bool separate = c.run == Run::separate, with_candidate = separate || c.all_outputs;
  const bool with_cross_entropy = problem.with_labels && with_candidate, ranked_by_teacher = c.value == Value::teacher_entropy;
  const cuda::LossSumParams sum = sum_of(c, row_weight);
  const cuda::FusedLoss fused_loss{c.keep, sum, selected.data<uint8_t>(), loss.data<void>(), counts.data<int64_t>()};
  cuda::RowStatsParams row_stats{};
  row_stats.problem = problem;
  row_stats.outputs.stats = stats.data<void>();
  row_stats.outputs.cross_entropy = with_cross_entropy ? cross_entropy.data<void>() : nullptr;
  // The teacher's entropy only ranks: write it directly to the ranking values.
  row_stats.outputs.teacher_entropy = c.all_outputs       ? teacher_entropy.data<void>()
                                      : ranked_by_teacher ? ranked.data<void>()
                                                          : nullptr;
  row_stats.value = c.value;
  row_stats.score = c.value == Value::score ? score.data() : nullptr;
  row_stats.value_is_double = c.ranked() == Type::float64;
  row_stats.ranked = ranked.data<void>();
  row_stats.candidate = with_candidate ? candidate.data<uint8_t>() : nullptr;
  row_stats.loss = separate ? nullptr : &fused_loss;
  run_with_workspace(row_stats, c.context, cuda::launch_row_stats);
  if (separate) {
    const cuda::SelectTopkParams select{ranked.data(), row_stats.value_is_double, candidate.data<uint8_t>(), c.rows,
                                        c.keep,        selected.data<uint8_t>()};
    run_with_workspace(select, c.context, cuda::launch_select_topk);
    count(c, problem, selected.data<uint8_t>(), counts.data<int64_t>());
    const cuda::ReduceRowsParams reduce{problem,
                                        stats.data() + kKl * c.rows * size_of(real),
                                        cross_entropy.data(),
                                        selected.data<uint8_t>(),
                                        counts.data<int64_t>(),
                                        sum,
                                        loss.data<void>()};
    run_with_workspace(reduce, c.context, cuda::launch_reduce_rows);
  }
  report.add("stats", stats, real, kStatsRows * c.rows);
  if (with_cross_entropy) report.add("cross_entropy", cross_entropy, real, c.rows);
  if (c.all_outputs) report.add("teacher_entropy", teacher_entropy, real, c.rows);
  if (with_candidate) report.add<uint8_t>("candidate", candidate, c.rows);
  report.add("ranked", ranked, c.ranked(), c.rows);
  report.add<uint8_t>("selected", selected, c.rows);
  report.add<int64_t>("counts", counts, 2);
  report.add("loss", loss, real, c.loss_size());

  const Memory grad_output = make_array(real, c.loss_size(), [](int64_t i) { return 1 + 0.5 * static_cast<double>(i % 3); });
  const Tensor gradient = tensor(c.student, c.rows, c.classes, c.rows, 0, 0);
  const Tensor& out = c.in_place ? student : gradient;
  cuda::launch_condensed_kd_backward(
      {problem, stats.data(), selected.data<uint8_t>(), c.weights ? row_weight.data() : nullptr, grad_output.data(),
       c.reduction == Reduction::none, counts.data<int64_t>(), 0.25 * c.temperature, c.ce_weight(), c.reduction, 1, out.logits},
      c.context);
  report.add("gradient", out, c.rows, c.classes);
}

void run(const Case& c, const Report& report) {
  switch (c.run) {
    case Run::select:
      return run_select(c, report);
    case Run::reduce:
      return run_reduce(c, report);
    default:
      return run_step(c, report);
  }
}

void configure(const std::string& schedule) {
  unsigned seed = 1;
  int resident_blocks = 1;
  if (schedule == "forward") return simt::configure(simt::Order::forward);
  if (schedule == "reverse") return simt::configure(simt::Order::reverse);
  if (std::sscanf(schedule.c_str(), "random:%u:%d", &seed, &resident_blocks) != 2)
    throw std::invalid_argument("no schedule: " + schedule);
  simt::configure(simt::Order::random, seed, resident_blocks);
}

int run_all(const std::string& schedules, const std::vector<std::string>& cases) {
  try {
    for (size_t i = 0; i < cases.size(); ++i) {
      const Case c{Options(cases[i])};
      std::istringstream stream(schedules);
      for (std::string schedule; stream >> schedule;) {
        configure(schedule);
        run(c, Report(static_cast<int>(i), schedule));
      }
    }
    return 0;
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return kUsageError;
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return kFailedLaunch;
  }
}

}   // namespace
}   // namespace kcd

int main(int count, char** argument) {
  return kcd::run_all(count > 1 ? argument[1] : "", std::vector<std::string>(argument + (count > 1 ? 2 : 1), argument + count));
}
