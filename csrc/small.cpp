#include "small.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/buffer.h"
#include "dlpack.h"
#include "torch/cpu_call.h"

namespace kcd::small {
namespace {

using dlpack::Array;
using dlpack::ManagedTensor;

const dlpack::ExchangeApi* api;
PyTypeObject *tensor_type, *parameter_type;
PyObject *to_save, *saved_tensors, *materialize_grads, *state_name, *is_inference;   // interned names
PyObject* is_neg;                                                                    // torch.Tensor.is_neg

constexpr const char* kState = "kcd_ext.small";
constexpr int kMostDimensions = 8;
constexpr size_t kAlignment = 64;

// An owned reference.
struct Drop {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Reference = std::unique_ptr<PyObject, Drop>;

// What is not for this door: the ordinary one takes it, and says what is wrong with it if something is.
struct NotServed {};

void serve_only(bool condition) {
  if (!condition) throw NotServed{};
}

// ---- tensors

int32_t dtype_of(const dlpack::DataType& type) {
  const Dtypes& all = dtypes();
  if (type.code == dlpack::kFloat && type.lanes == 1)
    return type.bits == 32 ? all.float32 : type.bits == 64 ? all.float64 : type.bits == 16 ? all.float16 : -1;
  if (type.code == dlpack::kBfloat && type.bits == 16 && type.lanes == 1) return all.bfloat16;
  if (type.code == dlpack::kInt && type.bits == 64 && type.lanes == 1) return all.int64;
  return -1;
}

dlpack::DataType type_of(int32_t dtype) {
  const Dtypes& all = dtypes();
  if (dtype == all.float32) return {dlpack::kFloat, 32, 1};
  if (dtype == all.float64) return {dlpack::kFloat, 64, 1};
  if (dtype == all.float16) return {dlpack::kFloat, 16, 1};
  if (dtype == all.bfloat16) return {dlpack::kBfloat, 16, 1};
  return dtype == all.int64 ? dlpack::DataType{dlpack::kInt, 64, 1} : dlpack::DataType{dlpack::kBool, 8, 1};
}

constexpr int32_t kCpu = 0, kIndex = 0;   // every tensor here is on the CPU

// Whether torch.Tensor's method says True of a tensor.
bool holds(PyObject* tensor, PyObject* method) {
  const Reference answer(PyObject_CallMethodNoArgs(tensor, method));
  if (!answer) PyErr_Clear();
  return !answer || answer.get() == Py_True;
}

// A tensor that is alive as long as its object is; other threads of Python may run meanwhile.  DLPack's view of one that torch has
// yet to negate (its lazy negative bit) shows the numbers as they are stored, and a subclass may hold its numbers elsewhere.
View view(PyObject* object) {
  serve_only(Py_TYPE(object) == tensor_type || Py_TYPE(object) == parameter_type);
  const Reference negative(PyObject_CallOneArg(is_neg, object));
  if (!negative) PyErr_Clear();
  serve_only(negative.get() == Py_False);
  Array array;
  if (api->view(object, &array) != 0) {
    PyErr_Clear();
    throw NotServed{};
  }
  const int32_t dtype = dtype_of(array.dtype);
  serve_only(array.device.device_type == dlpack::kCpu && dtype >= 0 && array.ndim <= kMostDimensions &&
             (array.ndim == 0 || array.strides) && array.data);
  return {static_cast<const char*>(array.data) + array.byte_offset, array.shape, array.strides, array.ndim, dtype, kCpu, kIndex};
}

const View& absent_view() {
  static const int64_t empty = 0, step = 1;
  static const View view(nullptr, &empty, &step, 1, dtypes().boolean, kCpu, kIndex);
  return view;
}

View view_or_absent(PyObject* object) { return object == Py_None ? absent_view() : view(object); }

// Whether a tensor has the first `dim` dimensions of another, and no more.
bool same_sizes(const View& x, const View& other, int64_t dim) {
  return x.dim() == dim && std::equal(x.sizes(), x.sizes() + dim, other.sizes());
}

// A contiguous tensor in memory of its own, not written yet.
struct Made {
  Reference object;
  void* data = nullptr;
};

Made make(const int64_t* sizes, int64_t dim, int32_t dtype, int64_t bytes) {
  struct Owned {
    ManagedTensor managed;
    int64_t sizes[kMostDimensions], strides[kMostDimensions];
  };
  constexpr size_t kHead = (sizeof(Owned) + kAlignment - 1) / kAlignment * kAlignment;
  const size_t rounded = (kHead + static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
  void* block = std::aligned_alloc(kAlignment, rounded);
  if (!block) throw std::bad_alloc();
  Owned* owned = new (block) Owned;
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    owned->sizes[i] = sizes[i];
    owned->strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  void* data = static_cast<char*>(block) + kHead;
  owned->managed = {{dlpack::kMajorVersion, 0},
                    block,
                    [](ManagedTensor* tensor) { std::free(tensor->manager_ctx); },
                    0,
                    {data, {dlpack::kCpu, 0}, static_cast<int32_t>(dim), type_of(dtype), owned->sizes, owned->strides, 0}};
  void* object;
  if (api->to_python(&owned->managed, &object) != 0) {
    PyErr_Clear();   // the block is no longer ours: the call took it
    throw NotServed{};
  }
  return {Reference(static_cast<PyObject*>(object)), data};
}

// ---- a call

// What the forward pass leaves for the backward one.
struct State {
  LossOptions options;
  Reference options_tuple;
  int32_t accumulator;
  int64_t rows;
  std::unique_ptr<char[]> memory = nullptr;       // stats, counts, selected and what rows are ranked by, in this order
  Reference loss = nullptr, gradient = nullptr;   // until they are handed over
  bool scales = false;                            // a gradient that is handed over may be multiplied in place
  Reference constants[2] = {};   // teacher and labels, where they were made in inference mode: autograd cannot save those

  int64_t width() const { return accumulator == dtypes().float64 ? 8 : 4; }
  char* stats() const { return memory.get(); }
  char* counts() const { return stats() + (kStatsRows * rows * width() + 7) / 8 * 8; }
  char* value() const { return counts() + 2 * sizeof(int64_t); }
  char* selected() const { return value() + rows * width(); }
  int64_t bytes() const { return selected() - stats() + rows; }
};

State& state_of(PyObject* capsule) {
  void* state = PyCapsule_GetPointer(capsule, kState);
  if (!state) {
    PyErr_Clear();
    throw NotServed{};
  }
  return *static_cast<State*>(state);
}

// Python's own threads go on meanwhile.
template <class Work>
void without_python(const Work& work) {
  struct Released {
    PyThreadState* thread = PyEval_SaveThread();
    ~Released() { PyEval_RestoreThread(thread); }
  } released;
  work();
}

double real(PyObject* tuple, Py_ssize_t i) { return PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, i)); }
int64_t integer(PyObject* tuple, Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)); }

LossOptions loss_options(PyObject* tuple) {
  return {real(tuple, 0), real(tuple, 1), real(tuple, 2), integer(tuple, 3), integer(tuple, 4), real(tuple, 5)};
}

constexpr const char* kForwardDoc =
    "small_forward(student, teacher, labels, keep, value, options, ahead, few_dimensions) -> state, or NotImplemented\n\n"
    "condensed_kd_forward, or condensed_kd_with_gradient where `ahead`, without the dispatcher.  labels: a tensor or None. keep,\n"
    "value, options: as the operators take them, keep and options as tuples. NotImplemented: nothing has been computed, and the\n"
    "operator is to be called, which says what is wrong if something is.";

PyObject* forward(PyObject* student_object, PyObject* teacher_object, PyObject* labels_object, PyObject* keep, PyObject* value,
                  PyObject* options, bool ahead, bool few_dimensions) {
  const View& none = absent_view();
  const ForwardCall a{view(student_object),
                      view(teacher_object),
                      view_or_absent(labels_object),
                      none,
                      none,
                      none,
                      {real(keep, 0), integer(keep, 1)},
                      static_cast<Value>(PyLong_AsLongLong(value)),
                      loss_options(options)};
  if (PyErr_Occurred()) return nullptr;   // an option was no number
  serve_only(same_sizes(a.teacher, a.student, a.student.dim()));
  serve_only(labels_object == Py_None || same_sizes(a.labels, a.student, a.student.dim() - 1));
  const Call checked = a.call();
  const Problem& p = checked.problem;
  serve_only(p.classes > 1 && (!few_dimensions || a.student.dim() < 4));   // else the caller is warned
  const int64_t bytes = p.rows * p.classes * size_of(p.student.type);
  serve_only(bytes > 0 && static_cast<size_t>(bytes) < cpu::kLargeBytes);
  const CpuCall call(checked);

  auto state = std::make_unique<State>(State{a.options, Reference(Py_NewRef(options)), checked.accumulator(), p.rows});
  state->memory.reset(new char[static_cast<size_t>(state->bytes())]);
  const bool a_row = a.options.reduction == Reduction::none;
  Made loss = make(a.student.sizes(), a_row ? a.student.dim() - 1 : 0, state->accumulator, (a_row ? p.rows : 1) * state->width());
  Made gradient;
  if (ahead) gradient = make(a.student.sizes(), a.student.dim(), a.student.dtype(), bytes);
  without_python([&] {
    const Results results{loss.data, state->value(), state->stats(), reinterpret_cast<uint8_t*>(state->selected()),
                          reinterpret_cast<int64_t*>(state->counts())};
    if (!ahead) return kcd::forward(a, call, results, nullptr);
    const Logits out{gradient.data, p.student.type, p.rows, 0, p.classes};
    kcd::forward(a, call, results, &out);
  });
  state->loss = std::move(loss.object);
  state->gradient = std::move(gradient.object);
  state->scales = p.student.type == Type::float32 || p.student.type == Type::float64;
  PyObject* capsule =
      PyCapsule_New(state.get(), kState, [](PyObject* it) { delete static_cast<State*>(PyCapsule_GetPointer(it, kState)); });
  if (capsule) state.release();
  return capsule;
}

constexpr const char* kLossDoc = "small_loss(state) -> loss\n\nThe loss that small_forward computed; once.";

PyObject* loss_of(PyObject* capsule) {
  State& state = state_of(capsule);
  serve_only(state.loss != nullptr);
  return state.loss.release();
}

constexpr const char* kAttachDoc =
    "small_attach(ctx, student, inputs, state) -> loss\n\n"
    "The forward method of an autograd.Function: saves what small_backward needs. inputs: (teacher, labels or None).";

bool set(PyObject* object, PyObject* name, PyObject* value) { return PyObject_SetAttr(object, name, value) == 0; }

// What autograd saves of a tensor, or None; the rest is put into `constant`.
PyObject* to_be_saved(PyObject* tensor, Reference& constant) {
  if (tensor == Py_None) return tensor;
  if (!holds(tensor, is_inference)) return tensor;
  constant.reset(Py_NewRef(tensor));
  return Py_None;
}

PyObject* attach(PyObject* ctx, PyObject* student, PyObject* inputs, PyObject* capsule) {
  State& state = state_of(capsule);
  const Reference saved(PyTuple_Pack(3, student, to_be_saved(PyTuple_GET_ITEM(inputs, 0), state.constants[0]),
                                     to_be_saved(PyTuple_GET_ITEM(inputs, 1), state.constants[1])));
  if (!saved || !set(ctx, to_save, saved.get()) || !set(ctx, state_name, capsule) || !set(ctx, materialize_grads, Py_False))
    return nullptr;
  return loss_of(capsule);
}

// The student's logits, the teacher's and the labels or None, borrowed. Python's error is set where `tensors` is null: the graph
// was freed, or the logits were changed. Constructing it runs the unpack hooks of saved tensors, which a backward pass must do
// once: activation checkpointing raises at a second time.
struct Saved {
  const State& state;
  Reference tensors;
  Saved(PyObject* ctx, const State& state) : state(state), tensors(PyObject_GetAttr(ctx, saved_tensors)) {}
  PyObject* operator[](Py_ssize_t i) const {
    const Reference* constant = i > 0 ? &state.constants[i - 1] : nullptr;
    return constant && *constant ? constant->get() : PyTuple_GET_ITEM(tensors.get(), i);
  }
};

PyObject* copy(const void* data, std::initializer_list<int64_t> sizes, int32_t dtype, int64_t bytes) {
  Made made = make(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, bytes);
  std::memcpy(made.data, data, static_cast<size_t>(bytes));
  return made.object.release();
}

// (student, teacher, labels or None, selected, stats, counts, options), which the operators' backward pass takes.
PyObject* for_operator(const State& state, const Saved& saved) {
  const int64_t rows = state.rows, wide = sizeof(int64_t);
  const Reference selected(copy(state.selected(), {rows}, dtypes().boolean, rows));
  const Reference stats(copy(state.stats(), {kStatsRows, rows}, state.accumulator, kStatsRows * rows * state.width()));
  const Reference counts(copy(state.counts(), {2}, dtypes().int64, 2 * wide));
  return PyTuple_Pack(7, saved[0], saved[1], saved[2], selected.get(), stats.get(), counts.get(), state.options_tuple.get());
}

constexpr const char* kBackwardDoc =
    "small_backward(ctx, grad_output, by_operator) -> gradient, or a tuple\n\n"
    "The gradient with respect to the student's logits, for a ctx that small_attach has filled. Where by_operator is True, or a\n"
    "tensor is not one that is served, a tuple of what the operators' backward pass takes instead: (student, teacher, labels or\n"
    "None, selected, stats, counts, options), in whatever layout the unpack hooks of saved tensors gave them.";

template <class Real>
double number(const View& x) {
  return static_cast<double>(*x.data<Real>());
}

template <class Real>
void multiply(Real* x, int64_t n, Real factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// The gradient that the forward pass wrote, times grad_output; once. Null where there is none or the product would not be exact.
PyObject* hand_over(State& state, PyObject* grad_object) {
  if (!state.gradient) return nullptr;
  const View grad_output = view(grad_object);   // lets other threads of Python run, which may take the gradient
  if (!state.gradient || grad_output.dtype() != state.accumulator || grad_output.dim() != 0) return nullptr;
  const double factor = state.width() == 8 ? number<double>(grad_output) : number<float>(grad_output);
  if (factor == 1) return state.gradient.release();
  // Scaling would round bfloat16 once more; what is not finite would make rows NaN that are not selected.
  if (!state.scales || !std::isfinite(factor)) return nullptr;
  Reference object = std::move(state.gradient);   // nobody else's from here on
  const View gradient = view(object.get());
  void* data = const_cast<void*>(gradient.data<void>());
  const int64_t n = gradient.numel();
  without_python([&] {
    state.width() == 8 ? multiply(static_cast<double*>(data), n, factor)
                       : multiply(static_cast<float*>(data), n, static_cast<float>(factor));
  });
  return object.release();
}

PyObject* compute_gradient(const State& state, const Saved& saved, PyObject* grad_object) {
  const View grad_output = view(grad_object), student = view(saved[0]), teacher = view(saved[1]);
  serve_only(grad_output.dtype() == state.accumulator);
  const int64_t rows = state.rows, stats_sizes[2] = {kStatsRows, rows}, stats_strides[2] = {rows, 1}, two = 2, one = 1;
  const int32_t boolean = dtypes().boolean, int64 = dtypes().int64;
  const BackwardCall a{grad_output,
                       student,
                       teacher,
                       view_or_absent(saved[2]),
                       absent_view(),
                       absent_view(),
                       View(state.selected(), &rows, &one, 1, boolean, kCpu, kIndex),
                       View(state.stats(), stats_sizes, stats_strides, 2, state.accumulator, kCpu, kIndex),
                       View(state.counts(), &two, &one, 1, int64, kCpu, kIndex),
                       state.options};
  const Call checked = a.call();
  const Problem& p = checked.problem;
  const CpuCall call(checked);
  Made gradient = make(student.sizes(), student.dim(), student.dtype(), p.rows * p.classes * size_of(p.student.type));
  without_python([&] { write_gradient(a, call, {gradient.data, p.student.type, p.rows, 0, p.classes}); });
  return gradient.object.release();
}

// What a function gives, or null where it does not serve. An exception of C++ is of a call that the operator refuses too.
template <class Function>
PyObject* served(const Function& function) {
  try {
    return function();
  } catch (const NotServed&) {
  } catch (const std::exception&) {
  }
  return nullptr;
}

PyObject* backward(PyObject* ctx, PyObject* grad_object, bool by_operator) {
  const Reference capsule(PyObject_GetAttr(ctx, state_name));
  if (!capsule) return nullptr;
  State& state = state_of(capsule.get());
  if (!by_operator)
    if (PyObject* gradient = served([&] { return hand_over(state, grad_object); })) return gradient;
  const Saved saved(ctx, state);
  if (!saved.tensors) return nullptr;
  if (!by_operator)
    if (PyObject* gradient = served([&] { return compute_gradient(state, saved, grad_object); })) return gradient;
  return for_operator(state, saved);
}

// ---- Python's side of them

// As `served`, with NotImplemented in the place of null.
template <class Function>
PyObject* served_or_not_implemented(const Function& function) {
  PyObject* result = served(function);
  if (result || PyErr_Occurred()) return result;
  Py_RETURN_NOTIMPLEMENTED;
}

bool takes(Py_ssize_t given, Py_ssize_t wanted) {
  if (given == wanted) return true;
  PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", wanted, given);
  return false;
}

PyObject* small_forward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!takes(n, 8)) return nullptr;
  return served_or_not_implemented(
      [&] { return forward(args[0], args[1], args[2], args[3], args[4], args[5], args[6] == Py_True, args[7] == Py_True); });
}
PyObject* small_loss(PyObject*, PyObject* state) {
  return served_or_not_implemented([&] { return loss_of(state); });
}
PyObject* small_attach(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!takes(n, 4)) return nullptr;
  return served_or_not_implemented([&] { return attach(args[0], args[1], args[2], args[3]); });
}
PyObject* small_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!takes(n, 3)) return nullptr;
  PyObject* result = served([&] { return backward(args[0], args[1], args[2] == Py_True); });
  if (!result && !PyErr_Occurred()) PyErr_SetString(PyExc_MemoryError, "kcd_ext: no memory for what a backward pass takes");
  return result;
}

template <class Function>
PyCFunction plain(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

}   // namespace

int add_to(PyObject* module) {
  const Reference torch(PyImport_ImportModule("torch"));
  const Reference tensor(torch ? PyObject_GetAttrString(torch.get(), "Tensor") : nullptr);
  if (!tensor) return -1;
  const Reference nn(PyImport_ImportModule("torch.nn"));
  const Reference parameter(nn ? PyObject_GetAttrString(nn.get(), "Parameter") : nullptr);
  if (!parameter) return -1;
  const Reference capsule(PyObject_GetAttrString(tensor.get(), "__dlpack_c_exchange_api__"));
  if (!capsule) {
    PyErr_Clear();
    return 0;
  }
  api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  if (!api || api->version.major != dlpack::kMajorVersion || !api->view || !api->to_python) {
    PyErr_Clear();
    return 0;
  }
  to_save = PyUnicode_InternFromString("to_save");
  saved_tensors = PyUnicode_InternFromString("saved_tensors");
  materialize_grads = PyUnicode_InternFromString("materialize_grads");
  state_name = PyUnicode_InternFromString("state");
  is_inference = PyUnicode_InternFromString("is_inference");
  is_neg = PyObject_GetAttrString(tensor.get(), "is_neg");
  if (!is_neg) return -1;
  tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(tensor.get()));
  parameter_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(parameter.get()));
  static PyMethodDef functions[] = {{"small_forward", plain(small_forward), METH_FASTCALL, kForwardDoc},
                                    {"small_loss", small_loss, METH_O, kLossDoc},
                                    {"small_attach", plain(small_attach), METH_FASTCALL, kAttachDoc},
                                    {"small_backward", plain(small_backward), METH_FASTCALL, kBackwardDoc},
                                    {nullptr, nullptr, 0, nullptr}};
  return PyModule_AddFunctions(module, functions);
}

}   // namespace kcd::small
