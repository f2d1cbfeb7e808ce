// The unstructured verbs of a linear layer; see sparsekit/schemas.py for the meaning of every argument.
#pragma once
#include <tuple>

#include "tensors.h"

namespace sparsekit {

Tensor csr_linear(Tensor x, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias,
                  std::optional<Tensor> code_key, std::string activation);
Tensor csr_linear_t(Tensor dy, Tensor values, Tensor t_crow, Tensor t_row, Tensor t_perm);
Tensor csr_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col);
std::tuple<Tensor, Tensor, Tensor> csr_linear_backward(Tensor dy, Tensor x, Tensor values, Tensor crow, Tensor col,
                                                       Tensor t_crow, Tensor t_row, Tensor t_perm, bool need_dx,
                                                       bool need_dvalues, bool need_dbias,
                                                       std::optional<Tensor> code_key);

}  // namespace sparsekit
