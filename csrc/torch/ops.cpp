// Registers the operators torch.ops.kcd_ext.* with torch's dispatcher.
#include "torch/ops.h"

#include <sstream>
#include <stdexcept>

#include "cpu/gradient_memory.h"
#include "cuda/launch.h"
#include "kernels.h"
#include "torch/call.h"
#include "torch/schema.h"

namespace kcd {
namespace {

void register_kernels(const char* device, const OperatorKernels& kernels) {
  TorchLibraryHandle library;
  KCD_CALL(aoti_torch_library_init_impl, "kcd_ext", device, __FILE__, __LINE__, &library);
#define X(name, schema) KCD_CALL(torch_library_impl, library, #name, kernels.name, kTorchVersion);
  KCD_OPERATORS(X)
#undef X
  // The handle is never released: the registrations live as long as the process.
}

std::string quoted(const std::string& text) { return '"' + text + '"'; }

std::string json_list(const std::string& words) {
  std::istringstream in(words);
  std::string list, word;
  while (in >> word) list += (list.empty() ? "" : ", ") + quoted(word);
  return '[' + list + ']';
}

}   // namespace

void register_operators() {
  cpu::kernels(), cpu::gradient_memory();   // reports a wrong KCD_ISA or KCD_GRADIENT_MEMORY at import
  TorchLibraryHandle library;
  if (aoti_torch_library_init_def("kcd_ext", __FILE__, __LINE__, &library) != 0)
    throw std::runtime_error("another copy of kcd_ext's extension is already loaded in this process: import only one of them");
#define X(name, schema) KCD_CALL(aoti_torch_library_def, library, #name schema);
  KCD_OPERATORS(X)
#undef X
  register_kernels("CPU", cpu_operators());
#ifdef KCD_CUDA
  register_kernels("CUDA", cuda_operators());
#endif
}

const std::string& build_info_json() {
  static const std::string info = [] {
    std::string sets, cuda_compiler, cuda_architectures;
    for (const char* const* name = cpu::built_instruction_sets(); *name; ++name) sets += std::string(*name) + " ";
#ifdef KCD_CUDA
    cuda_compiler = cuda::compiler();
    cuda_architectures = cuda::architectures();
#endif
    return "{\"version\": " + quoted(KCD_VERSION) + ", \"sources\": " + quoted(KCD_SOURCES) +
           ", \"compiler\": " + quoted(KCD_COMPILER) +
           ", \"gradient_memory\": " + quoted(cpu::name_of(Tensor::has_from_blob() ? cpu::gradient_memory() : cpu::Memory::torch)) +
           ", \"instruction_sets\": " + json_list(sets) + ", \"instruction_set_in_use\": " + quoted(cpu::kernels().name) +
           ", \"cuda_compiler\": " + quoted(cuda_compiler) + ", \"cuda_architectures\": " + json_list(cuda_architectures) + "}";
  }();
  return info;
}

}   // namespace kcd
