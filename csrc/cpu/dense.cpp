#include "dense.h"

namespace sparsekit {
namespace {

constexpr double kNanosecondsEach = 0.06;  // per gradient, while it is in a cache

// Copied or not, never multiplied: 0 times Inf would be NaN.
void clear(uint16_t* grad, const uint8_t* mask, int64_t count) {
  for (int64_t i = 0; i < count; ++i) grad[i] = mask[i] ? grad[i] : uint16_t(0);
}
template <class T>
void clear(T* grad, const uint8_t* mask, int64_t count) {
  kernels<T>().clear_pruned(grad, mask, count);
}

struct Axis {
  int64_t size, grad, mask;  // extent and the two strides
};

template <class T>
void clear(T* grad, const uint8_t* mask, const Axis* axis, const Axis* end) {
  if (axis == end) return clear(grad, mask, 1);
  if (axis + 1 == end && axis->grad == 1 && axis->mask == 1) return clear(grad, mask, axis->size);
  for (int64_t i = 0; i < axis->size; ++i) clear(grad + i * axis->grad, mask + i * axis->mask, axis + 1, end);
}

template <class T>
void clear_flat(T* grad, const uint8_t* mask, int64_t count) {
  const int64_t parts = parts_for(kNanosecondsEach * double(count));
  for_parts(parts, [&](int64_t part) {
    const Span span = cut(count, parts, part, 64);
    clear(grad + span.begin, mask + span.begin, span.end - span.begin);
  });
}

template <class T>
void clear(const Tensor& grad, const Tensor& mask, const std::vector<Axis>& axes, bool flat) {
  T* to = static_cast<T*>(grad.mutable_data_ptr());
  const uint8_t* from = static_cast<const uint8_t*>(mask.const_data_ptr());
  if (flat) clear_flat(to, from, grad.numel());
  else clear(to, from, axes.data(), axes.data() + axes.size());
}

void check_mask(const char* op, const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_cpu(), op,
                  ": Expected a mask of dtype bool on the CPU, got ", torch::headeronly::toString(mask.scalar_type()));
}

// A matrix whose rows are contiguous, as it is or copied.
template <class T>
const T* rows_of(const Tensor& t, int64_t* stride, std::vector<T>& copy) {
  const T* data = static_cast<const T*>(t.const_data_ptr());
  if (t.size(1) <= 1 || t.stride(1) == 1) {
    *stride = t.stride(0);
    return data;
  }
  *stride = t.size(1);
  copy.resize(size_t(t.numel()));
  for (int64_t i = 0; i < t.size(0); ++i)
    for (int64_t j = 0; j < t.size(1); ++j) copy[size_t(i * t.size(1) + j)] = data[i * t.stride(0) + j * t.stride(1)];
  return copy.data();
}

template <class T>
void masked_product(const Tensor& dy, const Tensor& x, const Tensor& mask, const Tensor& dw) {
  std::vector<T> dy_copy, x_copy;
  MaskedProduct<T> all{};
  all.dy = rows_of<T>(dy, &all.dy_stride, dy_copy);
  all.x = rows_of<T>(x, &all.x_stride, x_copy);
  all.samples = x.size(0);
  all.inputs = x.size(1);
  all.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  all.dw = static_cast<T*>(dw.mutable_data_ptr());
  const int64_t parts = parts_for(double(dw.numel()) * (0.1 + 0.04 * double(all.samples)));
  for_parts(parts, [&](int64_t part) {
    const Span rows = cut(dw.size(0), parts, part, 4);
    MaskedProduct<T> share = all;
    share.first = rows.begin;
    share.last = rows.end;
    kernels<T>().masked_product(share);
  });
}

}  // namespace

Tensor dense_sddmm(Tensor dy, Tensor x, Tensor mask) {
  check_float("dense_sddmm", "x", x);
  check_same_dtype("dense_sddmm", "dy", dy, "x", x);
  check_mask("dense_sddmm", mask);
  STD_TORCH_CHECK(element_bytes(x.scalar_type()) > 2, "dense_sddmm: Expected float32 or float64, got ",
                  torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(dy.dim() == 2 && x.dim() == 2 && dy.size(0) == x.size(0),
                  "dense_sddmm: Expected dy and x of as many rows, got ", shape_of(dy), " and ", shape_of(x));
  STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == dy.size(1) && mask.size(1) == x.size(1) && mask.is_contiguous(),
                  "dense_sddmm: Expected a contiguous mask of shape [", dy.size(1), ", ", x.size(1), "], got ",
                  shape_of(mask));
  const Tensor dw = new_empty(x, {dy.size(1), x.size(1)});
  with_compute_type(x, [&](auto zero) { masked_product<decltype(zero)>(dy, x, mask, dw); });
  return dw;
}

void zero_pruned_(Tensor grad, Tensor mask) {
  check_float("zero_pruned_", "grad", grad);
  check_mask("zero_pruned_", mask);
  bool same = grad.dim() == mask.dim();
  for (int64_t i = 0; same && i < grad.dim(); ++i) same = grad.size(i) == mask.size(i);
  STD_TORCH_CHECK(same, "zero_pruned_: Expected a mask of the gradient's shape ", shape_of(grad), ", got ",
                  shape_of(mask));
  std::vector<Axis> axes;
  int64_t reach = 1;  // elements between the first and the last in memory
  bool alike = true;
  for (int64_t i = 0; i < grad.dim(); ++i) {
    if (grad.size(i) == 1) continue;
    axes.push_back({grad.size(i), grad.stride(i), mask.stride(i)});
    reach += (grad.size(i) - 1) * grad.stride(i);
    alike = alike && grad.stride(i) == mask.stride(i);
  }
  if (grad.numel() == 0) return;
  const bool flat = alike && reach == grad.numel();
  switch (element_bytes(grad.scalar_type())) {
    case 2: return clear<uint16_t>(grad, mask, axes, flat);
    case 4: return clear<float>(grad, mask, axes, flat);
    default: return clear<double>(grad, mask, axes, flat);
  }
}

}  // namespace sparsekit

extern "C" void sparsekit_clear_pruned(void* grad, const uint8_t* mask, int64_t count, int64_t bytes) {
  using namespace sparsekit;
  if (bytes == 2) clear_flat(static_cast<uint16_t*>(grad), mask, count);
  if (bytes == 4) clear_flat(static_cast<float*>(grad), mask, count);
  if (bytes == 8) clear_flat(static_cast<double*>(grad), mask, count);
}
