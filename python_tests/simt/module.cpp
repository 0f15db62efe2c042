// The CUDA operators executed on the CPU, as torch.ops.kcd_ext_simt.*: the same code as on a GPU, with another device context.
#include <pybind11/pybind11.h>

#include "simt.h"
#include "torch/call.h"
#include "torch/device.h"
#include "torch/schema.h"

namespace kcd {
namespace {
cuda::DeviceContext set_device{4, nullptr, 256};
}

DeviceScope::DeviceScope(const View&) : context_(set_device) {}
void DeviceScope::Exit::operator()(CUDAGuardOpaque*) const {}

namespace {

void register_operators() {
  TorchLibraryHandle definitions, library;
  KCD_CALL(aoti_torch_library_init_def, "kcd_ext_simt", __FILE__, __LINE__, &definitions);
#define X(name, schema) KCD_CALL(aoti_torch_library_def, definitions, #name schema);
  KCD_OPERATORS(X)
#undef X
  KCD_CALL(aoti_torch_library_init_impl, "kcd_ext_simt", "CPU", __FILE__, __LINE__, &library);
#define X(name, schema) KCD_CALL(torch_library_impl, library, #name, cuda_operators().name, kTorchVersion);
  KCD_OPERATORS(X)
#undef X
}

}   // namespace
}   // namespace kcd

PYBIND11_MODULE(module, m) {
  kcd::register_operators();
  m.def(
      "set_device", [](int num_sms, int threads) { kcd::set_device = {num_sms, nullptr, threads}; },
      "Set the multiprocessors and threads per block of the simulated device.");
  m.def("version_problem", kcd::cuda::version_problem, "Return why a driver cannot run the kernels, or an empty string.");
  m.def(
      "set_schedule",
      [](const std::string& order, unsigned seed, int resident_blocks) {
        simt::configure(order == "forward"   ? simt::Order::forward
                        : order == "reverse" ? simt::Order::reverse
                                             : simt::Order::random,
                        seed, resident_blocks);
      },
      "Set the order of CUDA threads: forward, reverse or random.");
}
