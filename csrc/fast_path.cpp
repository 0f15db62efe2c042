#include "fast_path.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <tuple>

#include "cpu/gradient_memory.h"
#include "dlpack.h"
#include "torch/cpu_condensed_kd.h"

namespace kcd::fast_path {
namespace {

namespace py = pybind11;
const dlpack::ExchangeApi* api;
PyObject *tensor_type, *parameter_type, *is_neg;   // torch.Tensor, torch.nn.Parameter, torch.Tensor.is_neg
constexpr int kMaxDim = 8;

// Thrown when the fast path does not support a call.  The caller falls back to the dispatcher, which reports any real error.
struct Unsupported {};

void require_supported(bool condition) {
  if (!condition) throw Unsupported{};
}

int32_t dtype_of(const dlpack::DataType& type) {
  const bool is_float = type.code == dlpack::kFloat;
  require_supported(type.lanes == 1);
  if (is_float && type.bits == 32) return dtypes().float32;
  if (is_float && type.bits == 64) return dtypes().float64;
  if (is_float && type.bits == 16) return dtypes().float16;
  if (type.code == dlpack::kBfloat && type.bits == 16) return dtypes().bfloat16;
  if (type.code == dlpack::kInt && type.bits == 64) return dtypes().int64;
  require_supported(type.code == dlpack::kUInt && type.bits == 8);
  return dtypes().uint8;
}

// Returns a view that is valid while the tensor's object lives.  Rejects lazily negated tensors, whose negative bit DLPack ignores,
// and subclasses, which may store their data elsewhere.
View view(py::handle tensor) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  require_supported(type == tensor_type || type == parameter_type);
  const auto negative = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg, tensor.ptr()));
  dlpack::Array x;
  require_supported(negative.ptr() == Py_False && api->view(tensor.ptr(), &x) == 0);
  require_supported(x.device.device_type == dlpack::kCpu && x.ndim <= kMaxDim && (x.ndim == 0 || x.strides) && x.data);
  return {static_cast<const char*>(x.data) + x.byte_offset, x.shape, x.strides, x.ndim, dtype_of(x.dtype), 0, 0};
}

View view_or_absent(py::handle tensor) { return tensor.is_none() ? absent_view() : view(tensor); }

// Whether the shape of x is the first `dim` sizes of the other tensor.
bool same_sizes(const View& x, const View& other, int64_t dim) {
  return x.dim() == dim && std::equal(x.sizes(), x.sizes() + dim, other.sizes());
}

struct NewTensor {   // contiguous, uninitialised
  py::object object;
  void* data;
};

NewTensor make_tensor(const int64_t* sizes, int64_t dim, uint8_t code, int64_t element_bytes) {
  struct Block {
    dlpack::ManagedTensor managed;
    int64_t sizes[kMaxDim];
  };
  constexpr size_t kAlignment = 64, kHeaderBytes = (sizeof(Block) + kAlignment - 1) / kAlignment * kAlignment;
  auto bytes = static_cast<size_t>(element_bytes);
  for (int64_t i = 0; i < dim; ++i) bytes *= static_cast<size_t>(sizes[i]);
  void* memory = std::aligned_alloc(kAlignment, kHeaderBytes + (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (!memory) throw std::bad_alloc();
  Block* block = new (memory) Block;
  std::copy(sizes, sizes + dim, block->sizes);
  void* data = static_cast<char*>(memory) + kHeaderBytes;
  const dlpack::DataType type{code, static_cast<uint8_t>(8 * element_bytes), 1};
  const auto deleter = [](dlpack::ManagedTensor* tensor) { std::free(tensor->manager_ctx); };
  const dlpack::Array array{data, {dlpack::kCpu, 0}, static_cast<int32_t>(dim), type, block->sizes, nullptr, 0};
  block->managed = {{dlpack::kMajorVersion, 0}, memory, deleter, 0, array};
  void* object;
  require_supported(api->to_python(&block->managed, &object) == 0);   // takes ownership of the block
  return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)), data};
}

// Calls with one class need a warning, which the other path gives.  Large gradients need the memory of cpu/gradient_memory.h, and
// the dispatcher's cost hardly matters in large calls.
void require_small(const Problem& p) {
  const int64_t bytes = p.rows * p.classes * size_of(p.student.type);
  require_supported(p.classes > 1 && bytes > 0 && static_cast<size_t>(bytes) < cpu::kLargeBytes);
}

NewTensor make_gradient(const View& student, const Problem& p) {
  const uint8_t code = p.student.type == Type::bfloat16 ? dlpack::kBfloat : dlpack::kFloat;
  return make_tensor(student.sizes(), student.dim(), code, size_of(p.student.type));
}

using Keep = std::tuple<double, int64_t>;
using Options = std::tuple<double, double, double, double, int64_t, int64_t, double>;   // as in the schemas

py::object condensed_kd(py::handle student, py::handle teacher, py::handle labels, const Keep& keep, int64_t value,
                        const Options& options, bool with_gradient) {
  const View none = absent_view(), z = view(student), y = view(teacher), targets = view_or_absent(labels);
  const auto keep_options = std::make_from_tuple<KeepOptions>(keep);
  const auto loss_options = std::make_from_tuple<LossOptions>(options);
  const CondensedKDArguments a{
      z, y, targets, none, none, none, keep_options, static_cast<Value>(value), loss_options, with_gradient};
  require_supported(same_sizes(y, z, z.dim()) &&
                    (labels.is_none() || same_sizes(targets, z, is_floating(targets) ? z.dim() : z.dim() - 1)));
  const Call checked = a.check();
  const Problem& p = checked.problem;
  require_small(p);
  const CpuCall call(checked);

  const int64_t loss_dim = a.options.reduction == Reduction::none ? z.dim() - 1 : 0;
  const NewTensor loss = make_tensor(z.sizes(), loss_dim, dlpack::kFloat, call.accumulator_bytes());
  const int64_t state_bytes = make_state(call, call.is_double(), nullptr).bytes();
  const NewTensor state = make_tensor(&state_bytes, 1, dlpack::kUInt, 1);
  const NewTensor gradient = with_gradient ? make_gradient(z, p) : NewTensor{py::none(), nullptr};
  {
    py::gil_scoped_release unlocked;
    cpu::condensed_kd(a, call, loss.data, make_state(call, call.is_double(), state.data),
                      {gradient.data, p.student.type, p.rows, 0, p.classes});
  }
  return py::make_tuple(loss.object, state.object, gradient.object);
}

py::object condensed_kd_backward(py::handle grad_output, py::handle student, py::handle teacher, py::handle labels,
                                 py::handle state, const Options& options) {
  const View none = absent_view(), g = view(grad_output), z = view(student), y = view(teacher);
  const auto loss_options = std::make_from_tuple<LossOptions>(options);
  const CondensedKDBackwardArguments a{g, z, y, view_or_absent(labels), none, none, view(state), loss_options};
  const CpuCall call(a.check());
  const Problem& p = call.problem;
  require_small(p);
  const NewTensor gradient = make_gradient(z, p);
  {
    py::gil_scoped_release unlocked;
    cpu::condensed_kd_backward(a, call, {gradient.data, p.student.type, p.rows, 0, p.classes});
  }
  return gradient.object;
}

py::object knowledge(py::handle state, py::handle student) {
  const View z = view(student), bytes = view(state);
  const Call call(z, nullptr, absent_view(), nullptr, 1, 0, 0);
  const State s = check_state(call, bytes);
  const int64_t width = call.accumulator_bytes(), dim = z.dim() - 1;
  const auto copy = [&](const void* array, uint8_t code, int64_t element) {
    const NewTensor x = make_tensor(z.sizes(), dim, code, element);
    std::memcpy(x.data, array, static_cast<size_t>(s.rows * element));
    return x.object;
  };
  const auto stats = [&](Stats row) { return copy(s.stats() + row * s.rows * width, dlpack::kFloat, width); };
  const NewTensor selected = make_tensor(nullptr, 0, dlpack::kInt, sizeof(int64_t));
  *static_cast<int64_t*>(selected.data) = std::count(s.selected(), s.selected() + s.rows, uint8_t{1});
  return py::make_tuple(copy(s.value(), dlpack::kFloat, s.value_bytes), stats(kEntropy), stats(kKl),
                        copy(s.selected(), dlpack::kBool, 1), selected.object);
}

// Wraps a function so that it returns NotImplemented for calls that it does not support.
template <class... Arguments>
auto or_not_implemented(py::object (*function)(Arguments...)) {
  return [function](Arguments... arguments) -> py::object {
    try {
      return function(arguments...);
    } catch (const Unsupported&) {
    } catch (const std::exception&) {   // the operator raises the error again
    }
    PyErr_Clear();
    return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  };
}

}   // namespace

void add_to(py::module_& module) {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
  api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->version.major != dlpack::kMajorVersion || !api->view || !api->to_python) return;
  tensor_type = py::object(tensor).release().ptr();
  parameter_type = py::module_::import("torch.nn").attr("Parameter").cast<py::object>().release().ptr();
  is_neg = tensor.attr("is_neg").cast<py::object>().release().ptr();
  module.def("condensed_kd", or_not_implemented(condensed_kd),
             "(student, teacher, labels or None, keep, value, options, with_gradient) -> (loss, state, gradient or None)");
  module.def("condensed_kd_backward", or_not_implemented(condensed_kd_backward),
             "(grad_output, student, teacher, labels or None, state, options) -> gradient");
  module.def("knowledge", or_not_implemented(knowledge), "(state, student) -> value, entropy, kl, selected, n_selected");
}

}   // namespace kcd::fast_path
