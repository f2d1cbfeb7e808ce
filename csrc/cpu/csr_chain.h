// Linear layers in one call; see sparsekit/schemas.py for the meaning of every argument.
#pragma once
#include <vector>

#include "tensors.h"

namespace sparsekit {

Tensor csr_chain(Tensor x, std::vector<Tensor> values, std::vector<Tensor> crow, std::vector<Tensor> col,
                 std::vector<std::optional<Tensor>> biases, std::vector<std::optional<Tensor>> code_keys,
                 std::vector<std::string> activations);

}  // namespace sparsekit
