// The part of DLPack 1 (github.com/dmlc/dlpack) that the eager fast path (fast_path.cpp) uses.  PyTorch >= 2.10 publishes it as
// torch.Tensor.__dlpack_c_exchange_api__.  python_tests/test_extension.py compares it with torch's header.
#pragma once
#include <cstdint>

namespace kcd::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;                                                  // device_type
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6;   // DataType.code

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t device_type, device_id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Array {   // DLTensor
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ManagedTensor {   // DLManagedTensorVersioned
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Array array;
};
// Functions return 0 on success; otherwise Python's error is set.
struct ExchangeApi {
  Version version;
  ExchangeApi* older;
  void* allocate;
  void* to_managed;
  int (*to_python)(ManagedTensor* tensor, void** object);   // takes ownership of the tensor
  int (*view)(void* object, Array* array);                  // null: not available
  void* current_stream;
};

}   // namespace kcd::dlpack
