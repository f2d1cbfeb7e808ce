// A weight stored in lanes times a few samples; see sparsekit/schemas.py for the meaning of every argument.
#pragma once
#include "tensors.h"

namespace sparsekit {

Tensor lanes_linear(Tensor x, Tensor values, Tensor codes, Tensor bases, Tensor starts, Tensor order,
                    std::optional<Tensor> scale, std::optional<Tensor> bias, int64_t out_features,
                    std::string activation);

}  // namespace sparsekit
