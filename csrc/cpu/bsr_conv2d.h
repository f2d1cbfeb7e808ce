// The verbs of a 2-D convolution kept in blocks; see sparsekit/schemas.py for the meaning of every argument.
#pragma once
#include <tuple>

#include "tensors.h"

namespace sparsekit {

Tensor bsr_conv2d(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor row_order, std::optional<Tensor> bias,
                  int64_t out_channels, Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups,
                  std::string activation);
Tensor bsr_conv2d_t(Tensor dy, Tensor values, Tensor t_crow, Tensor t_row, Tensor t_perm, Tensor t_order,
                    int64_t in_channels, Ints input_size, Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                    int64_t groups);
Tensor bsr_conv2d_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, Tensor runs, Ints block, Ints kernel_size,
                        Ints stride, Ints padding, Ints dilation, int64_t groups);
std::tuple<Tensor, Tensor, Tensor> bsr_conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor crow, Tensor col,
                                                       Tensor runs, Tensor t_crow, Tensor t_row, Tensor t_perm,
                                                       Tensor t_order, Ints kernel_size, Ints stride, Ints padding,
                                                       Ints dilation, int64_t groups, bool need_dx, bool need_dvalues,
                                                       bool need_dbias);

}  // namespace sparsekit
