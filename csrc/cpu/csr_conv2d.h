// The unstructured verbs of a 2-D convolution; see sparsekit/schemas.py for the meaning of every argument.
#pragma once
#include <tuple>

#include "tensors.h"

namespace sparsekit {

Tensor csr_conv2d(Tensor x, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias, Ints kernel_size,
                  Ints stride, Ints padding, Ints dilation, int64_t groups, std::optional<Tensor> code_key,
                  std::string activation, std::optional<Tensor> skip);
Tensor csr_conv2d_planes(Tensor x, Ints x_size, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias,
                         Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups,
                         std::optional<Tensor> code_key, std::string activation, std::optional<Tensor> skip,
                         Ints skip_size, int64_t lanes, int64_t border);
Tensor csr_conv2d_t(Tensor dy, Tensor values, Tensor t_crow, Tensor t_row, Tensor t_perm, Ints input_size,
                    Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups);
Tensor csr_conv2d_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, Ints kernel_size, Ints stride, Ints padding,
                        Ints dilation, int64_t groups);
std::tuple<Tensor, Tensor, Tensor> csr_conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor crow, Tensor col,
                                                       Tensor t_crow, Tensor t_row, Tensor t_perm, Ints kernel_size,
                                                       Ints stride, Ints padding, Ints dilation, int64_t groups,
                                                       bool need_dx, bool need_dvalues, bool need_dbias,
                                                       std::optional<Tensor> code_key);

}  // namespace sparsekit
