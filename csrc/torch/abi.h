// The part of libtorch's stable C ABI (torch/csrc/stable/c/shim.h, PyTorch >= 2.10) that kcd_ext uses, with thin wrappers.
//
// Declaring it here lets kcd_ext build without torch.  python_tests/test_extension.py compiles this file after torch's headers, so
// that any mismatch is a compile error.  docs/internals/abi.md lists the functions and PyTorch's promises about them.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef KCD_TORCH_HEADERS   // -DKCD_TORCH_HEADERS=ON: torch's declarations
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#endif

extern "C" {
struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct CUDAGuardOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using CUDAGuardHandle = CUDAGuardOpaque*;
using StableIValue = uint64_t;

// One list, expanded twice: to declarations here, to the definitions of the link-time stand-in in stub.cpp.
#define KCD_TORCH_ABI(X)                                                                                                           \
  X(aoti_torch_library_init_def, (const char* ns, const char* file, uint32_t line, TorchLibraryHandle* library))                   \
  X(aoti_torch_library_init_impl, (const char* ns, const char* key, const char* file, uint32_t line, TorchLibraryHandle* library)) \
  X(aoti_torch_library_def, (TorchLibraryHandle library, const char* schema))                                                      \
  X(torch_library_impl,                                                                                                            \
    (TorchLibraryHandle library, const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t), uint64_t version))           \
  X(aoti_torch_delete_tensor_object, (AtenTensorHandle tensor))                                                                    \
  X(aoti_torch_empty_strided, (int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,      \
                               int32_t device_index, AtenTensorHandle* tensor))                                                    \
  X(torch_get_const_data_ptr, (AtenTensorHandle tensor, const void** data))                                                        \
  X(torch_get_mutable_data_ptr, (AtenTensorHandle tensor, void** data))                                                            \
  X(aoti_torch_get_dim, (AtenTensorHandle tensor, int64_t* dim))                                                                   \
  X(aoti_torch_get_sizes, (AtenTensorHandle tensor, int64_t** sizes))                                                              \
  X(aoti_torch_get_strides, (AtenTensorHandle tensor, int64_t** strides))                                                          \
  X(aoti_torch_get_dtype, (AtenTensorHandle tensor, int32_t* dtype))                                                               \
  X(aoti_torch_get_device_type, (AtenTensorHandle tensor, int32_t* device_type))                                                   \
  X(aoti_torch_get_device_index, (AtenTensorHandle tensor, int32_t* device_index))                                                 \
  X(aoti_torch_dtype_float32, ())                                                                                                  \
  X(aoti_torch_dtype_float64, ())                                                                                                  \
  X(aoti_torch_dtype_float16, ())                                                                                                  \
  X(aoti_torch_dtype_bfloat16, ())                                                                                                 \
  X(aoti_torch_dtype_int64, ())                                                                                                    \
  X(aoti_torch_dtype_uint8, ())                                                                                                    \
  X(aoti_torch_dtype_bool, ())                                                                                                     \
  X(torch_get_num_threads, (uint32_t* threads))                                                                                    \
  X(torch_parallel_for, (int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context))

// Functions for CUDA; null in a torch without CUDA.
#define KCD_TORCH_CUDA_ABI(X)                                                     \
  X(aoti_torch_get_current_cuda_stream, (int32_t device_index, void** stream))    \
  X(aoti_torch_create_cuda_guard, (int32_t device_index, CUDAGuardHandle* guard)) \
  X(aoti_torch_delete_cuda_guard, (CUDAGuardHandle guard))

// Functions that PyTorch 2.11 added; null in older versions.
#define KCD_TORCH_2_11_ABI(X)                                                                                               \
  X(torch_from_blob, (void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype, \
                      int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout,                  \
                      const uint8_t* metadata, int64_t metadata_size, void (*deleter)(void* data, void* context), void* context))

#define X(name, args) int32_t name args;
KCD_TORCH_ABI(X)
#undef X
#define X(name, args) __attribute__((weak)) int32_t name args;
KCD_TORCH_CUDA_ABI(X)
KCD_TORCH_2_11_ABI(X)
#undef X
}

namespace kcd {

constexpr uint64_t kTorchVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);   // the ABI of PyTorch 2.10

inline void check_torch(int32_t error, const char* call) {
  if (error != 0) throw std::runtime_error(std::string("kcd_ext: ") + call + " failed; libtorch printed the reason");
}
#define KCD_CALL(name, ...) ::kcd::check_torch(name(__VA_ARGS__), #name)

// The C ABI does not report why an allocation failed.  kcd_ext/ops.py recognises this message and repeats the allocation in Python,
// which raises torch's exception, torch.OutOfMemoryError on CUDA.
inline void check_allocation(int32_t error, const int64_t* sizes, int64_t dim, int32_t dtype, int32_t device_type,
                             int32_t device_index) {
  if (error == 0) return;
  const bool wide = dtype == aoti_torch_dtype_float64() || dtype == aoti_torch_dtype_int64();
  const bool half = dtype == aoti_torch_dtype_float16() || dtype == aoti_torch_dtype_bfloat16();
  const bool byte = dtype == aoti_torch_dtype_bool() || dtype == aoti_torch_dtype_uint8();
  int64_t bytes = wide ? 8 : half ? 2 : byte ? 1 : 4;
  for (int64_t i = 0; i < dim; ++i) bytes *= sizes[i];
  constexpr int32_t kCpu = 0;
  throw std::runtime_error("kcd_ext: allocating " + std::to_string(bytes) + " bytes on " +
                           (device_type == kCpu ? "the CPU" : "device " + std::to_string(device_index)) + " failed");
}

// A non-owning view of a tensor.
class View {
 public:
  View(const void* data, const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype, int32_t device_type,
       int32_t device_index)
      : data_(data),
        sizes_(sizes),
        strides_(strides),
        dim_(dim),
        dtype_(dtype),
        device_type_(device_type),
        device_index_(device_index) {}

  template <class T>
  const T* data() const {
    return static_cast<const T*>(data_);
  }
  int64_t dim() const { return dim_; }
  const int64_t* sizes() const { return sizes_; }
  const int64_t* strides() const { return strides_; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim_; ++i) n *= sizes_[i];
    return n;
  }
  int32_t dtype() const { return dtype_; }
  int32_t device_type() const { return device_type_; }
  int32_t device_index() const { return device_index_; }

 protected:
  View() = default;
  const void* data_;
  const int64_t *sizes_, *strides_;
  int64_t dim_;
  int32_t dtype_, device_type_, device_index_;
};

// An owning handle of a tensor.
class Tensor : public View {
 public:
  explicit Tensor(StableIValue value) : Tensor(reinterpret_cast<AtenTensorHandle>(value)) {}
  Tensor(Tensor&& other) noexcept : View(other), handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  // Returns an uninitialised contiguous tensor on the device of `like`.
  static Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, const View& like) {
    const Strides strides(sizes, dim);
    AtenTensorHandle handle;
    check_allocation(aoti_torch_empty_strided(dim, sizes, strides.data, dtype, like.device_type(), like.device_index(), &handle),
                     sizes, dim, dtype, like.device_type(), like.device_index());
    return Tensor(handle);
  }
  // As empty, but over existing memory.  Torch calls deleter(data, context) when it releases the tensor.
  static Tensor from_blob(void* data, const int64_t* sizes, int64_t dim, int32_t dtype, const View& like,
                          void (*deleter)(void*, void*), void* context) {
    const Strides strides(sizes, dim);
    AtenTensorHandle handle;
    KCD_CALL(torch_from_blob, data, dim, sizes, strides.data, 0, dtype, like.device_type(), like.device_index(), &handle, 0,
             nullptr, 0, deleter, context);
    return Tensor(handle);
  }
  static bool has_from_blob() { return torch_from_blob != nullptr; }
  static Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype, const View& like) {
    return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, like);
  }

  StableIValue release() { return reinterpret_cast<StableIValue>(std::exchange(handle_, nullptr)); }

  template <class T>
  T* mutable_data() const {
    void* p;
    KCD_CALL(torch_get_mutable_data_ptr, handle_, &p);
    return static_cast<T*>(p);
  }

 private:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    KCD_CALL(torch_get_const_data_ptr, handle_, &data_);
    dim_ = get(aoti_torch_get_dim);
    sizes_ = get(aoti_torch_get_sizes);
    strides_ = get(aoti_torch_get_strides);
    dtype_ = get(aoti_torch_get_dtype);
    device_type_ = get(aoti_torch_get_device_type);
    device_index_ = get(aoti_torch_get_device_index);
  }

  struct Strides {                           // of a contiguous tensor
    static constexpr int64_t kMaxDim = 64;   // torch's limit
    int64_t data[kMaxDim] = {};
    Strides(const int64_t* sizes, int64_t dim) {
      if (dim > kMaxDim) throw std::runtime_error("kcd_ext: tensors must have at most 64 dimensions, got " + std::to_string(dim));
      int64_t step = 1;
      for (int64_t i = dim - 1; i >= 0; --i) {
        data[i] = step;
        step *= sizes[i] > 0 ? sizes[i] : 1;
      }
    }
  };

  template <class T>
  T get(int32_t (*getter)(AtenTensorHandle, T*)) const {
    T value;
    check_torch(getter(handle_, &value), "querying a tensor");
    return value;
  }
  AtenTensorHandle handle_;
};

// Reads the arguments of a boxed call, in the order of the schema, and owns its tensors.
class BoxedArguments {
 public:
  explicit BoxedArguments(StableIValue* stack) : next_(stack) {}
  const Tensor& tensor() { return tensors_[count_++].emplace(*next_++); }
  const Tensor& operator[](size_t i) const { return *tensors_[i]; }   // a tensor that has been read already
  double real() { return scalar<double>(); }
  bool boolean() { return scalar<bool>(); }
  int64_t integer() { return scalar<int64_t>(); }

 private:
  template <class T>
  T scalar() {
    T value;
    std::memcpy(&value, next_++, sizeof value);
    return value;
  }
  StableIValue* next_;
  std::array<std::optional<Tensor>, 7> tensors_;   // the most in any schema
  size_t count_ = 0;
};

// Replaces a boxed call's arguments with its results.
template <class... Tensors>
void return_results(StableIValue* stack, Tensors&... results) {
  ((*stack++ = results.release()), ...);
}

inline int64_t number_of_threads() {
  uint32_t threads;
  KCD_CALL(torch_get_num_threads, &threads);
  return threads;
}

// Runs body(begin, end) over [0, n) on torch's threads.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  KCD_CALL(
      torch_parallel_for, 0, n, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

}   // namespace kcd
