// Checked views of the tensors an operator receives.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace sparsekit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline int element_bytes(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

inline Storage storage_of(ScalarType type) {
  return type == ScalarType::BFloat16 ? kBFloat16 : type == ScalarType::Half ? kHalf : kNative;
}

inline void check_float(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  op, ": Expected ", name, " of dtype float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(type));
  STD_TORCH_CHECK(t.is_cpu(), op, ": Expected ", name, " on the CPU");
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type() && t.is_cpu(), op, ": Expected ", name,
                  " to have the dtype of ", other_name, " (", torch::headeronly::toString(other.scalar_type()),
                  ") on the CPU, got ", torch::headeronly::toString(t.scalar_type()));
}

inline const int32_t* check_index(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_cpu(), op, ": Expected ", name,
                  " of dtype int32 on the CPU, got ", torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous(), op, ": Expected contiguous 1-D ", name, ", got shape ",
                  shape_of(t));
  return static_cast<const int32_t*>(t.const_data_ptr());
}

inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.is_contiguous(), op, ": Expected contiguous ", name,
                  " of shape [", size, "], got ", shape_of(t));
}

// The structure of a compressed matrix: `rows` lists of ascending indices below `limit`.
struct Lists {
  const int32_t* crow;
  const int32_t* index;
  int64_t rows, nnz;
};

// Sizes always; the first and last pointers; and the last (so the largest) index of every row, which costs
// next to nothing and keeps a layer fed with the wrong input from reading foreign memory.
inline Lists check_lists(const char* op, const char* crow_name, const Tensor& crow, const char* index_name,
                         const Tensor& index) {
  Lists s;
  s.crow = check_index(op, crow_name, crow);
  s.index = check_index(op, index_name, index);
  s.rows = crow.size(0) - 1;
  s.nnz = index.size(0);
  STD_TORCH_CHECK(s.rows >= 0 && s.crow[0] == 0 && s.crow[s.rows] == s.nnz, op, ": Expected ", crow_name,
                  " to run from 0 to ", s.nnz, " (the size of ", index_name, "), got shape ", shape_of(crow));
  return s;
}

inline int64_t largest_index(const Lists& s) {
  int32_t largest = -1;
  for (int64_t r = 0; r < s.rows; ++r)
    if (s.crow[r + 1] > s.crow[r]) largest = std::max(largest, s.index[s.crow[r + 1] - 1]);
  return largest;
}

// values as T, converted into scratch memory when they are stored in 16 bits.
template <class T>
const T* values_as(const Tensor& values) {
  const Storage storage = storage_of(values.scalar_type());
  if (storage == kNative) return static_cast<const T*>(values.const_data_ptr());
  T* copy = Workspace::mine().get<T>(Workspace::kValues, values.numel());
  kernels<T>().load[storage]({copy, 0, const_cast<void*>(values.const_data_ptr()), 0, 1, 1, values.numel()});
  return copy;
}

// bias as T; small, so a plain vector holds a converted copy.
template <class T>
const T* bias_as(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t size,
                 std::vector<T>& copy) {
  if (!bias.has_value() || !bias->defined()) return nullptr;
  check_same_dtype(op, "bias", *bias, "x", x);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == size, op, ": Expected bias of shape [", size, "], got ",
                  shape_of(*bias));
  const Storage storage = storage_of(bias->scalar_type());
  if (storage == kNative && (size <= 1 || bias->stride(0) == 1)) return static_cast<const T*>(bias->const_data_ptr());
  copy.resize(size_t(size));
  kernels<T>().load[storage](
      {copy.data(), 0, const_cast<void*>(bias->const_data_ptr()), 0, size ? bias->stride(0) : 1, 1, size});
  return copy.data();
}

inline Activation activation_of(const char* op, const std::string& name) {
  const char* names[] = {"none", "relu", "gelu", "silu"};
  for (int i = 0; i < 4; ++i)
    if (name == names[i]) return Activation(i);
  STD_TORCH_CHECK(false, op, ": Expected activation none, relu, gelu or silu, got ", name);
}

template <class N>
Tensor new_empty(const Tensor& like, std::initializer_list<N> size) {
  std::vector<int64_t> sizes(size.begin(), size.end());
  return torch::stable::new_empty(like, sizes);
}

// A result that is computed as T and stored in the dtype of its tensor: T itself is written in place.
template <class T>
class Result {
 public:
  Result(Tensor tensor, Workspace::Slot slot) : tensor_(std::move(tensor)) {
    const Storage storage = storage_of(tensor_.scalar_type());
    data_ = storage == kNative ? static_cast<T*>(tensor_.mutable_data_ptr())
                               : Workspace::mine().get<T>(slot, tensor_.numel());
  }
  T* data() { return data_; }
  Tensor finish() {
    const Storage storage = storage_of(tensor_.scalar_type());
    if (storage != kNative)
      kernels<T>().store[storage]({data_, 0, tensor_.mutable_data_ptr(), 0, 1, 1, tensor_.numel()});
    return tensor_;
  }

 private:
  Tensor tensor_;
  T* data_;
};

// f(T{}) with T = double for float64 tensors and float for all others.
template <class F>
auto with_compute_type(const Tensor& t, const F& f) {
  return t.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace sparsekit
