// Where CUDA operators run.
#pragma once
#include <memory>

#include "cuda/launch.h"
#include "torch/abi.h"

namespace kcd {

// For its lifetime the device of a tensor is the current one.
class OnDevice {
 public:
  explicit OnDevice(const View& tensor);
  const cuda::Machine& machine() const { return machine_; }

 private:
  struct Leave {
    void operator()(CUDAGuardOpaque* guard) const;
  };
  std::unique_ptr<CUDAGuardOpaque, Leave> guard_;
  cuda::Machine machine_{};
};

}   // namespace kcd
