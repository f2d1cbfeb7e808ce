// The verbs of a linear layer kept in blocks; see sparsekit/schemas.py for the meaning of every argument.
#pragma once
#include <tuple>

#include "tensors.h"

namespace sparsekit {

Tensor bsr_linear(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor row_order, std::optional<Tensor> bias,
                  int64_t out_features, std::string activation);
Tensor bsr_linear_t(Tensor dy, Tensor values, Tensor t_crow, Tensor t_row, Tensor t_perm, Tensor t_order,
                    int64_t in_features);
Tensor bsr_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, Tensor runs, std::vector<int64_t> block);
std::tuple<Tensor, Tensor, Tensor> bsr_linear_backward(Tensor dy, Tensor x, Tensor values, Tensor crow, Tensor col,
                                                       Tensor runs, Tensor t_crow, Tensor t_row, Tensor t_perm,
                                                       Tensor t_order, bool need_dx, bool need_dvalues,
                                                       bool need_dbias);

}  // namespace sparsekit
