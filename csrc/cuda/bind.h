// From torch tensors to the launchers of launch.h: device, stream, checks, workspaces. Compiled by the host
// compiler; needs neither CUDA headers nor a CUDA build of torch, so one library serves machines without a driver.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "launch.h"

namespace sparsekit::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline int dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": Expected a floating-point tensor, got ", torch::headeronly::toString(t.scalar_type()));
  }
}

// The stream that torch queues work on. libtorch_cuda is there whenever a CUDA tensor is.
inline void* current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get, "sparsekit: Expected a torch with CUDA, got one without aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "sparsekit: no current CUDA stream on device ", device);
  return stream;
}

// What every operator does first: makes the device of its first tensor current and finds its stream.
class __attribute__((visibility("hidden"))) Context {
 public:
  Context(const char* op, const Tensor& first)
      : op_(op), device_(first.get_device_index()), guard_(device_), stream_(current_stream(device_)) {}

  void* stream() const { return stream_; }

  // Raises what a launcher had to say.
  void run(int status) const { STD_TORCH_CHECK(status == 0, op_, ": ", sparsekit_cuda_error()); }

  const Tensor& on_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device_, op_, ": Expected ", name, " on CUDA device ", device_);
    return t;
  }

  // `t` contiguous; raises unless it is on the device and of the dtype.
  Tensor operand(const char* name, const Tensor& t, ScalarType dtype) const {
    on_device(name, t);
    STD_TORCH_CHECK(t.scalar_type() == dtype, op_, ": Expected ", name, " of dtype ", torch::headeronly::toString(dtype),
                    ", got ", torch::headeronly::toString(t.scalar_type()));
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }

  // The same at an address that 16-byte loads can start from: a view into the middle of a tensor is copied.
  Tensor aligned(const char* name, const Tensor& t, ScalarType dtype,
                 torch::headeronly::MemoryFormat format = torch::headeronly::MemoryFormat::Contiguous) const {
    const bool image = format == torch::headeronly::MemoryFormat::ChannelsLast;
    if (image) on_device(name, t);
    STD_TORCH_CHECK(t.scalar_type() == dtype, op_, ": Expected ", name, " of dtype ", torch::headeronly::toString(dtype),
                    ", got ", torch::headeronly::toString(t.scalar_type()));
    Tensor whole = image ? t : operand(name, t, dtype);
    return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 ? torch::stable::clone(whole) : whole;
  }

  // An int32 index tensor.
  const int32_t* index(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device_ && t.scalar_type() == ScalarType::Int && t.is_contiguous(),
                    op_, ": Expected contiguous int32 ", name, " on CUDA device ", device_, ", got ",
                    torch::headeronly::toString(t.scalar_type()), " ", shape_of(t));
    return static_cast<const int32_t*>(t.const_data_ptr());
  }

  // Device memory that lives as long as the tensor; torch hands it out again in stream order. A launcher that refuses
  // a shape asks for a negative size.
  Tensor workspace(const Tensor& like, int64_t bytes) const {
    STD_TORCH_CHECK(bytes >= 0, op_, ": ", sparsekit_cuda_error());
    return torch::stable::new_empty(like, {(bytes + 3) / 4}, ScalarType::Float);
  }

  void check(bool condition, const std::string& sentence) const { STD_TORCH_CHECK(condition, op_, ": ", sentence); }

 private:
  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

// The launchers' number for an activation.
inline int activation_code(const Context& here, const std::string& name) {
  constexpr const char* names[] = {"none", "relu", "gelu", "silu"};
  for (int code = 0; code < 4; ++code)
    if (name == names[code]) return code;
  here.check(false, "Expected an activation of none, relu, gelu, silu, got '" + name + "'");
  return -1;
}

}  // namespace sparsekit::cuda
