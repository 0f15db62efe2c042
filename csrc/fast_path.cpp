#include "fast_path.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/buffer.h"
#include "dlpack.h"
#include "torch/cpu_call.h"

namespace kcd::fast_path {
namespace {

const dlpack::ExchangeApi* api;
PyTypeObject *tensor_type, *parameter_type;
PyObject* is_neg;   // torch.Tensor.is_neg

constexpr int32_t kCpu = 0, kIndex = 0;   // every tensor here is on the CPU
constexpr int kMaxDim = 8;

struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Reference = std::unique_ptr<PyObject, Release>;   // owned

// Thrown when the fast path does not support a call.  The caller falls back to the dispatcher, which reports any real error.
struct Unsupported {};

void require_supported(bool condition) {
  if (!condition) throw Unsupported{};
}

// ---- tensors

// The dtypes of a call, for DLPack and for torch.
struct Dtype {
  dlpack::DataType dlpack;
  int32_t torch;
};
const Dtype* begin_dtypes() {
  static const Dtype all[] = {{{dlpack::kFloat, 32, 1}, dtypes().float32},   {{dlpack::kFloat, 64, 1}, dtypes().float64},
                              {{dlpack::kFloat, 16, 1}, dtypes().float16},   {{dlpack::kBfloat, 16, 1}, dtypes().bfloat16},
                              {{dlpack::kInt, 64, 1}, dtypes().int64},       {{dlpack::kUInt, 8, 1}, dtypes().uint8}};
  return all;
}
template <class Matches>
const Dtype& find_dtype(const Matches& matches) {
  const Dtype *begin = begin_dtypes(), *end = begin + 6, *found = std::find_if(begin, end, matches);
  require_supported(found != end);
  return *found;
}

// A view that is valid as long as the tensor's object is.  DLPack ignores torch's lazy negative bit, and a subclass may keep its
// numbers elsewhere.
View view(PyObject* object) {
  require_supported(Py_TYPE(object) == tensor_type || Py_TYPE(object) == parameter_type);
  const Reference negative(PyObject_CallOneArg(is_neg, object));
  dlpack::Array x;
  require_supported(negative.get() == Py_False && api->view(object, &x) == 0);
  require_supported(x.device.device_type == dlpack::kCpu && x.ndim <= kMaxDim && (x.ndim == 0 || x.strides) && x.data);
  const Dtype& dtype = find_dtype([&](const Dtype& each) {
    return each.dlpack.code == x.dtype.code && each.dlpack.bits == x.dtype.bits && x.dtype.lanes == 1;
  });
  return {static_cast<const char*>(x.data) + x.byte_offset, x.shape, x.strides, x.ndim, dtype.torch, kCpu, kIndex};
}

const View& absent_view() {
  static const int64_t size = 0, stride = 1;
  static const View view(nullptr, &size, &stride, 1, dtypes().boolean, kCpu, kIndex);
  return view;
}

View view_or_absent(PyObject* object) { return object == Py_None ? absent_view() : view(object); }

// Whether x has the first `dim` dimensions of another tensor, and no more.
bool same_sizes(const View& x, const View& other, int64_t dim) {
  return x.dim() == dim && std::equal(x.sizes(), x.sizes() + dim, other.sizes());
}

// A contiguous tensor, not written yet.
struct NewTensor {
  Reference object;
  void* data;
};

NewTensor make(const int64_t* sizes, int64_t dim, int32_t dtype, int64_t bytes) {
  struct Block {
    dlpack::ManagedTensor managed;
    int64_t sizes[kMaxDim], strides[kMaxDim];
  };
  constexpr size_t kAlignment = 64, kHead = (sizeof(Block) + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, kHead + (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment);
  if (!memory) throw std::bad_alloc();
  Block* block = new (memory) Block;
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    block->sizes[i] = sizes[i];
    block->strides[i] = step;
    step *= sizes[i];
  }
  void* data = static_cast<char*>(memory) + kHead;
  const auto deleter = [](dlpack::ManagedTensor* tensor) { std::free(tensor->manager_ctx); };
  const Dtype& type = find_dtype([&](const Dtype& each) { return each.torch == dtype; });
  block->managed = {{dlpack::kMajorVersion, 0}, memory, deleter, 0,
                    {data, {dlpack::kCpu, 0}, static_cast<int32_t>(dim), type.dlpack, block->sizes, block->strides, 0}};
  void* object;
  require_supported(api->to_python(&block->managed, &object) == 0);   // it takes over the block
  return {Reference(static_cast<PyObject*>(object)), data};
}

// ---- calls

template <class Work>
void without_gil(const Work& work) {
  struct Unlocked {
    PyThreadState* thread = PyEval_SaveThread();
    ~Unlocked() { PyEval_RestoreThread(thread); }
  } unlocked;
  work();
}

double real(PyObject* tuple, Py_ssize_t i) { return PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, i)); }
int64_t integer(PyObject* tuple, Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)); }
LossOptions loss_options(PyObject* t) { return {real(t, 0), real(t, 1), real(t, 2), integer(t, 3), integer(t, 4), real(t, 5)}; }

PyObject* condensed_kd(PyObject* const* args) {
  const View &none = absent_view(), student = view(args[0]), teacher = view(args[1]), labels = view_or_absent(args[2]);
  const ForwardCall a{student, teacher, labels, none, none, none, {real(args[3], 0), integer(args[3], 1)},
                      static_cast<Value>(PyLong_AsLongLong(args[4])), loss_options(args[5]), args[6] == Py_True};
  require_supported(!PyErr_Occurred() && same_sizes(teacher, student, student.dim()));
  require_supported(args[2] == Py_None || same_sizes(labels, student, student.dim() - 1));
  const Call checked = a.call();
  const Problem& p = checked.problem;
  const int64_t bytes = p.rows * p.classes * size_of(p.student.type);
  // The caller is warned of one class.  What is large does not notice the dispatcher, and lies in memory that is kept.
  require_supported(p.classes > 1 && bytes > 0 && static_cast<size_t>(bytes) < cpu::kLargeBytes);
  const CpuCall call(checked);

  const bool per_row = a.options.reduction == Reduction::none;
  const int64_t width = call.accumulator_bytes(), state_bytes = state_of(call, call.is_double(), nullptr).bytes();
  const NewTensor loss = make(student.sizes(), per_row ? student.dim() - 1 : 0, call.accumulator(), width * (per_row ? p.rows : 1));
  const NewTensor state = make(&state_bytes, 1, dtypes().uint8, state_bytes);
  NewTensor gradient{Reference(Py_NewRef(Py_None)), nullptr};
  if (a.with_gradient) gradient = make(student.sizes(), student.dim(), student.dtype(), bytes);
  without_gil([&] {
    forward(a, call, loss.data, state_of(call, call.is_double(), state.data), {gradient.data, p.student.type, p.rows, 0, p.classes});
  });
  return PyTuple_Pack(3, loss.object.get(), state.object.get(), gradient.object.get());
}

PyObject* condensed_kd_backward(PyObject* const* args) {
  const View &none = absent_view(), student = view(args[1]);
  const BackwardCall a{view(args[0]), student, view(args[2]), view_or_absent(args[3]), none, none, view(args[4]),
                       loss_options(args[5])};
  const CpuCall call(a.call());
  const Problem& p = call.problem;
  NewTensor gradient = make(student.sizes(), student.dim(), student.dtype(), p.rows * p.classes * size_of(p.student.type));
  without_gil([&] { write_gradient(a, call, {gradient.data, p.student.type, p.rows, 0, p.classes}); });
  return gradient.object.release();
}

template <PyObject* function(PyObject* const*), Py_ssize_t arguments>
PyObject* or_not_implemented(PyObject*, PyObject* const* args, Py_ssize_t n) {
  try {
    if (n == arguments) return function(args);
  } catch (const Unsupported&) {
  } catch (const std::exception&) {   // the operator refuses the call too
  }
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
}

template <PyObject* function(PyObject* const*), Py_ssize_t arguments>
PyMethodDef method(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(or_not_implemented<function, arguments>)), METH_FASTCALL, doc};
}

}   // namespace

int add_to(PyObject* module) {
  const Reference torch(PyImport_ImportModule("torch")), nn(PyImport_ImportModule("torch.nn"));
  if (!torch || !nn) return -1;
  const Reference tensor(PyObject_GetAttrString(torch.get(), "Tensor")), parameter(PyObject_GetAttrString(nn.get(), "Parameter"));
  if (!tensor || !parameter || !(is_neg = PyObject_GetAttrString(tensor.get(), "is_neg"))) return -1;
  const Reference capsule(PyObject_GetAttrString(tensor.get(), "__dlpack_c_exchange_api__"));
  if (capsule) api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  PyErr_Clear();
  if (!api || api->version.major != dlpack::kMajorVersion || !api->view || !api->to_python) return 0;
  tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(tensor.get()));
  parameter_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(parameter.get()));
  static PyMethodDef functions[] = {
      method<condensed_kd, 7>("condensed_kd",
                              "(student, teacher, labels or None, keep, value, options, with_gradient) -> (loss, state, gradient or\n"
                              "None), or NotImplemented.  As the operator; keep and options are tuples of its arguments."),
      method<condensed_kd_backward, 6>("condensed_kd_backward",
                                       "(grad_output, student, teacher, labels or None, state, options) -> gradient, or\n"
                                       "NotImplemented.  As the operator."),
      {nullptr, nullptr, 0, nullptr}};
  return PyModule_AddFunctions(module, functions);
}

}   // namespace kcd::fast_path
