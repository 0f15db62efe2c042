// The device and stream that CUDA operators use.
#pragma once
#include <memory>

#include "cuda/launch.h"
#include "torch/abi.h"

namespace kcd {

// Makes a tensor's device the current one for its lifetime.
class DeviceScope {
 public:
  explicit DeviceScope(const View& tensor);
  const cuda::DeviceContext& context() const { return context_; }

 private:
  struct Exit {
    void operator()(CUDAGuardOpaque* guard) const;
  };
  std::unique_ptr<CUDAGuardOpaque, Exit> guard_;
  cuda::DeviceContext context_{};
};

}   // namespace kcd
