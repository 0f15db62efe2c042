#include "torch/device.h"

namespace kcd {
namespace {

CUDAGuardHandle enter(int32_t device) {
  // A torch without CUDA lacks these functions; it has no tensor that could bring a call here either.
  if (!aoti_torch_create_cuda_guard) throw std::runtime_error("kcd_ext: this torch is a build without CUDA");
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

OnDevice::OnDevice(const View& tensor) : guard_(enter(tensor.device_index())) {
  machine_ = cuda::machine_of(tensor.device_index(), stream_of(tensor.device_index()));
}

void OnDevice::Leave::operator()(CUDAGuardOpaque* guard) const { aoti_torch_delete_cuda_guard(guard); }

}   // namespace kcd
