// What the dense format needs beside torch's own products.
#pragma once
#include "tensors.h"

namespace sparsekit {

void zero_pruned_(Tensor grad, Tensor mask);
Tensor dense_sddmm(Tensor dy, Tensor x, Tensor mask);

}  // namespace sparsekit
