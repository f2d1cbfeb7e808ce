// Argument checks of every convolution.
#pragma once
#include "conv_grid.h"

namespace sparsekit {

inline Conv geometry(const char* op, const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation,
                     int64_t groups) {
  const auto pair = [&](const char* name, const Ints& v, int64_t least) {
    STD_TORCH_CHECK(v.size() == 2 && v[0] >= least && v[1] >= least, op, ": Expected ", name,
                    " to be two integers of at least ", least);
  };
  pair("kernel_size", kernel, 1);
  pair("stride", stride, 1);
  pair("padding", padding, 0);
  pair("dilation", dilation, 1);
  STD_TORCH_CHECK(groups >= 1, op, ": Expected groups of at least 1, got ", groups);
  Conv c{};
  c.kh = kernel[0], c.kw = kernel[1], c.sh = stride[0], c.sw = stride[1], c.ph = padding[0], c.pw = padding[1];
  c.dh = dilation[0], c.dw = dilation[1], c.groups = groups;
  return c;
}

inline void set_channels(const char* op, Conv& c, int64_t in, int64_t out) {
  STD_TORCH_CHECK(in % c.groups == 0 && out % c.groups == 0, op, ": Expected ", in, " input and ", out,
                  " output channels to be divisible by groups = ", c.groups);
  c.in = in, c.out = out;
}

inline void set_input(const char* op, Conv& c, int64_t n, int64_t h, int64_t w) {
  c.n = n, c.h = h, c.w = w;
  const int64_t span_h = h + 2 * c.ph - c.dh * (c.kh - 1) - 1, span_w = w + 2 * c.pw - c.dw * (c.kw - 1) - 1;
  STD_TORCH_CHECK(h > 0 && w > 0 && span_h >= 0 && span_w >= 0, op,
                  ": Expected an input at least as large as the kernel, got ", h, "x", w, " padded by ", c.ph,
                  "x", c.pw, " for a kernel of ", c.kh, "x", c.kw, " dilated by ", c.dh, "x", c.dw);
  c.oh = span_h / c.sh + 1, c.ow = span_w / c.sw + 1;
}

inline void check_output(const char* op, const Conv& c, const Tensor& dy) {
  check_float(op, "dy", dy);
  STD_TORCH_CHECK(dy.dim() == 4 && dy.size(0) == c.n && dy.size(1) == c.out && dy.size(2) == c.oh && dy.size(3) == c.ow,
                  op, ": Expected dy of shape [", c.n, ", ", c.out, ", ", c.oh, ", ", c.ow, "], got ", shape_of(dy));
}

inline void check_reach(const char* op, const Conv& c, const Lists& lists) {
  const int64_t largest = largest_index(lists), columns = c.in_per_group() * c.taps();
  STD_TORCH_CHECK(largest < columns, op, ": Expected x of more channels: the weight uses column ", largest,
                  " but ", c.in, " channels in ", c.groups, " groups with ", c.taps(), " taps give ", columns);
}

inline void check_input(const char* op, Conv& c, const Tensor& x, const Lists& lists) {
  check_float(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 4, op, ": Expected x of shape [N, C, H, W], got ", shape_of(x));
  set_channels(op, c, x.size(1), lists.rows);
  set_input(op, c, x.size(0), x.size(2), x.size(3));
  check_reach(op, c, lists);
}

}  // namespace sparsekit
