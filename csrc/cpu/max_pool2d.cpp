#include "max_pool2d.h"

#include "conv_checks.h"
#include "conv_planes.h"

namespace sparsekit {
namespace {

void check_padding(const char* op, const Conv& c) {
  STD_TORCH_CHECK(2 * c.ph <= c.kh && 2 * c.pw <= c.kw, op, ": Expected padding of at most half of the window, got ",
                  c.ph, "x", c.pw, " for ", c.kh, "x", c.kw);
}

}  // namespace

Tensor max_pool2d(Tensor x, Ints kernel_size, Ints stride, Ints padding) {
  constexpr const char* op = "max_pool2d";
  Conv c = geometry(op, kernel_size, stride, padding, {1, 1}, 1);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.is_contiguous() &&
                      (type == ScalarType::Float || type == ScalarType::Double),
                  op, ": Expected a contiguous x [N, C, H, W] of dtype float32 or float64 on the CPU, got shape ",
                  shape_of(x), " of ", torch::headeronly::toString(type));
  check_padding(op, c);
  set_input(op, c, x.size(0), x.size(2), x.size(3));
  Tensor out = new_empty<int64_t>(x, {c.n, x.size(1), c.oh, c.ow});
  const int64_t planes = c.n * x.size(1);
  if (planes == 0) return out;
  with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t parts = parts_for(0.1 * double(x.numel()));
    // Whole windows of two by two: no row is a plane's last to a window that goes on in the next.
    const bool pairs = c.taps() == 4 && c.kh == 2 && c.phases() == 4 && c.sh == 2 && c.ph == 0 && c.pw == 0 &&
                       c.h % 2 == 0 && c.w % 2 == 0;
    for_parts(parts, [&](int64_t part) {
      if (pairs) {
        const Span rows = cut(planes * c.oh, parts, part, kLanes<T>);
        return kernels<T>().pool_pairs(from + rows.begin * 4 * c.ow, to + rows.begin * c.ow, rows.end - rows.begin,
                                       c.ow);
      }
      T* line = Workspace::mine().get<T>(Workspace::kStage, c.pw + c.w + c.kw + 32);
      const Span own = cut(planes, parts, part);
      for (int64_t plane = own.begin; plane < own.end; ++plane)
        for (int64_t a = 0; a < c.oh; ++a) {
          const int64_t top = std::max<int64_t>(0, a * c.sh - c.ph), bottom = std::min(c.h, a * c.sh - c.ph + c.kh);
          kernels<T>().pool({from + (plane * c.h + top) * c.w, c.w, bottom - top, c.w, c.kw, c.sw, c.pw, line,
                             to + (plane * c.oh + a) * c.ow, c.ow});
        }
    });
  });
  return out;
}

Tensor max_pool2d_planes(Tensor x, Ints x_size, Ints kernel_size, Ints stride, Ints padding, int64_t border) {
  constexpr const char* op = "max_pool2d_planes";
  Conv c = geometry(op, kernel_size, stride, padding, {1, 1}, 1);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) && border >= 0, op,
                  ": Expected x of dtype float32 or float64 and a border of at least 0, got ",
                  torch::headeronly::toString(type), " and ", border);
  check_padding(op, c);
  return with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    const auto in = Planes<T>::of(op, "x", x, x_size);
    const int64_t channels = x.size(1), lanes = in.grid.lanes;
    set_input(op, c, in.n, in.h, in.w);
    Planes<T> y({c.n, c.oh, c.ow, border}, channels, lanes);
    Tensor out = y.allocate(x);
    const int64_t planes = in.groups() * channels;
    if (planes == 0) return out;
    const int64_t parts = parts_for(0.1 * double(x.numel()));
    for_parts(parts, [&](int64_t part) {
      T* line = lanes == 1 ? Workspace::mine().get<T>(Workspace::kStage, c.pw + c.w + c.kw + 32) : nullptr;
      const auto& pool = lanes == 1 ? kernels<T>().pool : kernels<T>().pool_lines;
      const Span own = cut(planes, parts, part);
      for (int64_t plane = own.begin; plane < own.end; ++plane) {
        const int64_t group = plane / channels, channel = plane % channels;
        const Span all{0, c.oh};
        std::fill_n(y.row(group, channel, 0) - y.before(all), y.before(all), T(0));
        for (int64_t a = 0; a < c.oh; ++a) {
          const int64_t top = std::max<int64_t>(0, a * c.sh - c.ph), bottom = std::min(c.h, a * c.sh - c.ph + c.kh);
          T* to = y.row(group, channel, a);
          pool({in.row(group, channel, top), in.row_step(), bottom - top, c.w, c.kw, c.sw, c.pw, line, to, c.ow});
          std::fill_n(to + c.ow * lanes, y.gap() + (a + 1 < c.oh ? 0 : y.after(all)), T(0));
        }
      }
    });
    return out;
  });
}

}  // namespace sparsekit
