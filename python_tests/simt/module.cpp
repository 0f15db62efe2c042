// The CUDA operators, executed on the CPU: torch.ops.kcd_ext_simt.*, the same code as torch.ops.kcd_ext.* on a GPU but for the
// machine it runs on.
#include <pybind11/pybind11.h>

#include "simt.h"
#include "torch/call.h"
#include "torch/device.h"
#include "torch/schema.h"

namespace kcd {
namespace {
cuda::Machine set_machine{4, nullptr, 256};
}

OnDevice::OnDevice(const View&) : machine_(set_machine) {}
void OnDevice::Leave::operator()(CUDAGuardOpaque*) const {}

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
      "set_machine", [](int processors, int threads) { kcd::set_machine = {processors, nullptr, threads}; },
      "Multiprocessors, and threads of a block, that launches are laid out for.");
  m.def("version_problem", kcd::cuda::version_problem, "Why a driver cannot run kernels; empty where it can.");
  m.def(
      "set_schedule",
      [](const std::string& order, unsigned seed, int resident_blocks) {
        simt::configure(order == "forward"   ? simt::Order::forward
                        : order == "reverse" ? simt::Order::reverse
                                             : simt::Order::random,
                        seed, resident_blocks);
      },
      "In which order CUDA threads run: forward, reverse or random.");
}
