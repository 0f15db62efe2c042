// A stand-in for libtorch.so at link time, never installed or loaded.  With it the linker checks every libtorch symbol that kcd_ext
// uses and records the dependency, on a machine without torch.
#include "torch/abi.h"

#define X(name, args) \
  __attribute__((visibility("default"))) int32_t name args { return 1; }
extern "C" {
KCD_TORCH_ABI(X)
}
