// The panel operators on CUDA: a linear layer is the 1 x 1 convolution of an image of one line.
#include <vector>

#include "bind.h"
#include "panel.h"

namespace sparsekit::cuda {
namespace {

using Sizes = std::vector<int64_t>;

constexpr auto kChannelsLast = torch::headeronly::MemoryFormat::ChannelsLast;

// A contiguous image [N, H, W, C] as the [N, C, H, W] that torch calls channels_last.
Tensor channels_first_view(const Tensor& image) { return torch::stable::transpose(torch::stable::transpose(image, 1, 3), 2, 3); }

int64_t out_extent(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

void set_geometry(PanelShape& s, const Sizes& kernel, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                  int64_t groups) {
  s.kernel_h = kernel[0], s.kernel_w = kernel[1];
  s.stride_h = stride[0], s.stride_w = stride[1];
  s.padding_h = padding[0], s.padding_w = padding[1];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  s.groups = groups;
}

// The index must be of the length that the shape asks for: kernels read through it.
void check_lists(const Context& here, const PanelShape& s, const Tensor& crow, const Tensor& col, bool transposed) {
  const int64_t cols = (s.in / s.groups + s.cols - 1) / s.cols, rows = (s.out / s.groups + s.rows - 1) / s.rows;
  const int64_t lists = s.groups * (transposed ? cols * s.kernel_h * s.kernel_w : rows);
  here.check(crow.dim() == 1 && crow.size(0) == lists + 1 && col.dim() == 1 && col.size(0) == s.blocks,
             "Expected offsets [" + std::to_string(lists + 1) + "] over [" + std::to_string(s.blocks) + "] blocks, got " +
                 shape_of(crow) + " and " + shape_of(col));
}

void set_blocks(const Context& here, PanelShape& s, const Tensor& values) {
  here.check(values.dim() == 3, "Expected values [blocks, R, C], got " + shape_of(values));
  s.blocks = values.size(0), s.rows = values.size(1), s.cols = values.size(2);
}

Tensor product(const Context& here, PanelShape& s, const Tensor& x, const Tensor& values, const Tensor& crow,
               const Tensor& col, const std::optional<Tensor>& bias, const std::string& activation, Tensor y) {
  check_lists(here, s, crow, col, false);
  const Tensor held = here.aligned("values", values, x.scalar_type());
  std::optional<Tensor> added;
  if (bias) {
    here.check(bias->dim() == 1 && bias->size(0) == s.out, "Expected bias [" + std::to_string(s.out) + "], got " + shape_of(*bias));
    added = here.aligned("bias", *bias, x.scalar_type());
  }
  const Tensor work = here.workspace(y, sparsekit_cuda_panel_conv2d_workspace(&s));
  here.run(sparsekit_cuda_panel_conv2d(&s, x.const_data_ptr(), held.const_data_ptr(), here.index("crow_indices", crow),
                                       here.index("col_indices", col), added ? added->const_data_ptr() : nullptr,
                                       activation_code(here, activation), y.mutable_data_ptr(), work.mutable_data_ptr(),
                                       here.stream()));
  return y;
}

Tensor input_gradient(const Context& here, PanelShape& s, const Tensor& dy, const Tensor& values, const Tensor& t_crow,
                      const Tensor& t_row, const Tensor& t_perm, Tensor dx) {
  check_lists(here, s, t_crow, t_row, true);
  here.check(t_perm.dim() == 1 && t_perm.size(0) == s.blocks, "Expected t_perm over all blocks, got " + shape_of(t_perm));
  const Tensor held = here.aligned("values", values, dy.scalar_type());
  const Tensor work = here.workspace(dx, sparsekit_cuda_panel_conv2d_t_workspace(&s));
  here.run(sparsekit_cuda_panel_conv2d_t(&s, dy.const_data_ptr(), held.const_data_ptr(), here.index("t_crow", t_crow),
                                         here.index("t_row", t_row), here.index("t_perm", t_perm), dx.mutable_data_ptr(),
                                         work.mutable_data_ptr(), here.stream()));
  return dx;
}

Tensor weight_gradient(const Context& here, PanelShape& s, const Tensor& dy, const Tensor& x, const Tensor& crow,
                       const Tensor& col) {
  check_lists(here, s, crow, col, false);
  Tensor dvalues = torch::stable::new_empty(dy, {s.blocks, s.rows, s.cols});
  const Tensor work = here.workspace(dvalues, sparsekit_cuda_panel_conv2d_sddmm_workspace(&s));
  here.run(sparsekit_cuda_panel_conv2d_sddmm(&s, dy.const_data_ptr(), x.const_data_ptr(), here.index("crow_indices", crow),
                                             here.index("col_indices", col), dvalues.mutable_data_ptr(),
                                             work.mutable_data_ptr(), here.stream()));
  return dvalues;
}

// ---- linear ----

Tensor panel_linear(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor row_order, std::optional<Tensor> bias,
                    int64_t out_features, std::string activation) {
  const Context here("panel_linear", x);
  here.check(x.dim() == 2, "Expected x [N, in], got " + shape_of(x));
  PanelShape s = ::panel_linear(x.size(0), x.size(1), out_features, 0, 0, 0, dtype_of("panel_linear", x));
  set_blocks(here, s, values);
  return product(here, s, here.aligned("x", x, x.scalar_type()), values, crow, col, bias, activation,
                 torch::stable::new_empty(x, {x.size(0), out_features}));
}

Tensor panel_linear_t(Tensor dy, Tensor values, Tensor t_crow, Tensor t_row, Tensor t_perm, Tensor t_order,
                      int64_t in_features) {
  const Context here("panel_linear_t", dy);
  here.check(dy.dim() == 2, "Expected dy [N, out], got " + shape_of(dy));
  PanelShape s = ::panel_linear(dy.size(0), in_features, dy.size(1), 0, 0, 0, dtype_of("panel_linear_t", dy));
  set_blocks(here, s, values);
  return input_gradient(here, s, here.aligned("dy", dy, dy.scalar_type()), values, t_crow, t_row, t_perm,
                        torch::stable::new_empty(dy, {dy.size(0), in_features}));
}

Tensor panel_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, Tensor runs, Sizes block) {
  const Context here("panel_sddmm", dy);
  here.check(dy.dim() == 2 && x.dim() == 2 && dy.size(0) == x.size(0), "Expected dy [N, out] and x [N, in], got " +
                                                                          shape_of(dy) + " and " + shape_of(x));
  PanelShape s = ::panel_linear(x.size(0), x.size(1), dy.size(1), block[0], block[1], col.size(0), dtype_of("panel_sddmm", x));
  return weight_gradient(here, s, here.aligned("dy", dy, x.scalar_type()), here.aligned("x", x, x.scalar_type()), crow, col);
}

// ---- convolution ----

PanelShape image_shape(const Context& here, const Tensor& like, int64_t batch, int64_t in, int64_t height, int64_t width,
                       int64_t out, const Sizes& kernel, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                       int64_t groups) {
  here.check(groups > 0 && in % groups == 0 && out % groups == 0, "Expected groups that divide the channels, got " + std::to_string(groups));
  PanelShape s{};
  s.batch = batch, s.in = in, s.height = height, s.width = width, s.out = out;
  s.dtype = dtype_of("panel_conv2d", like);
  set_geometry(s, kernel, stride, padding, dilation, groups);
  return s;
}

Tensor image(const Context& here, const char* name, const Tensor& t, ScalarType type) {
  here.check(t.dim() == 4, std::string("Expected ") + name + " [N, C, H, W], got " + shape_of(t));
  return here.aligned(name, torch::stable::contiguous(t, kChannelsLast), type, kChannelsLast);
}

Tensor panel_conv2d(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor row_order, std::optional<Tensor> bias,
                    int64_t out_channels, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                    std::string activation) {
  const Context here("panel_conv2d", x);
  const Tensor in = image(here, "x", x, x.scalar_type());
  PanelShape s = image_shape(here, x, x.size(0), x.size(1), x.size(2), x.size(3), out_channels, kernel, stride, padding,
                             dilation, groups);
  set_blocks(here, s, values);
  Tensor y = torch::stable::new_empty(x, {x.size(0), out_extent(x.size(2), kernel[0], stride[0], padding[0], dilation[0]),
                                          out_extent(x.size(3), kernel[1], stride[1], padding[1], dilation[1]), out_channels});
  return channels_first_view(product(here, s, in, values, crow, col, bias, activation, y));
}

Tensor panel_conv2d_t(Tensor dy, Tensor values, Tensor t_crow, Tensor t_row, Tensor t_perm, Tensor t_order,
                      int64_t in_channels, Sizes input_size, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation,
                      int64_t groups) {
  const Context here("panel_conv2d_t", dy);
  const Tensor out = image(here, "dy", dy, dy.scalar_type());
  PanelShape s = image_shape(here, dy, dy.size(0), in_channels, input_size[0], input_size[1], dy.size(1), kernel, stride,
                             padding, dilation, groups);
  set_blocks(here, s, values);
  Tensor dx = torch::stable::new_empty(dy, {dy.size(0), input_size[0], input_size[1], in_channels});
  return channels_first_view(input_gradient(here, s, out, values, t_crow, t_row, t_perm, dx));
}

Tensor panel_conv2d_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, Tensor runs, Sizes block, Sizes kernel,
                          Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  const Context here("panel_conv2d_sddmm", dy);
  const Tensor out = image(here, "dy", dy, x.scalar_type()), in = image(here, "x", x, x.scalar_type());
  PanelShape s = image_shape(here, x, x.size(0), x.size(1), x.size(2), x.size(3), dy.size(1), kernel, stride, padding,
                             dilation, groups);
  s.blocks = col.size(0), s.rows = block[0], s.cols = block[1];
  return weight_gradient(here, s, out, in, crow, col);
}

}  // namespace
}  // namespace sparsekit::cuda

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CUDA, m) {
  m.impl("panel_linear", TORCH_BOX(&sparsekit::cuda::panel_linear));
  m.impl("panel_linear_t", TORCH_BOX(&sparsekit::cuda::panel_linear_t));
  m.impl("panel_sddmm", TORCH_BOX(&sparsekit::cuda::panel_sddmm));
  m.impl("panel_conv2d", TORCH_BOX(&sparsekit::cuda::panel_conv2d));
  m.impl("panel_conv2d_t", TORCH_BOX(&sparsekit::cuda::panel_conv2d_t));
  m.impl("panel_conv2d_sddmm", TORCH_BOX(&sparsekit::cuda::panel_conv2d_sddmm));
}
