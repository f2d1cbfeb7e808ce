// Linear layers in one call; see sparsekit/schemas.py for the meaning of every argument.
#pragma once
#include <vector>

#include "tensors.h"

namespace sparsekit {

Tensor csr_chain(Tensor x, std::vector<Tensor> values, std::vector<Tensor> crow, std::vector<Tensor> col,
                 std::vector<std::optional<Tensor>> biases, std::vector<std::optional<Tensor>> code_keys,
                 std::vector<std::string> activations);

}  // namespace sparsekit

// The same without torch's dispatcher, which takes longer over lists of tensors than a small chain does: layers holds
// five borrowed handles each (values, crow, col, bias or null, key or null). Gives a new handle, null on any error:
// the operator has the words for it.
extern "C" __attribute__((visibility("default"))) AtenTensorHandle sparsekit_csr_chain(
    AtenTensorHandle x, int64_t count, const AtenTensorHandle* layers, const char* const* activations);
