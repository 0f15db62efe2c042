#include "torch/device.h"

namespace kcd {
namespace {

CUDAGuardHandle enter(int32_t device) {
  // A torch without CUDA lacks these functions.  It has no CUDA tensors either, so no call should get here.
  if (!aoti_torch_create_cuda_guard) throw std::runtime_error("kcd_ext: this torch was built without CUDA");
  CUDAGuardHandle guard;
  KCD_CALL(aoti_torch_create_cuda_guard, device, &guard);
  return guard;
}

void* stream_of(int32_t device) {
  void* stream;
  KCD_CALL(aoti_torch_get_current_cuda_stream, device, &stream);
  return stream;
}

}   // namespace

DeviceScope::DeviceScope(const View& tensor) : guard_(enter(tensor.device_index())) {
  context_ = cuda::device_context(tensor.device_index(), stream_of(tensor.device_index()));
}

void DeviceScope::Exit::operator()(CUDAGuardOpaque* guard) const { aoti_torch_delete_cuda_guard(guard); }

}   // namespace kcd
