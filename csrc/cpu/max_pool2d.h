// Pooling between convolutions that serve; see sparsekit/schemas.py.
#pragma once
#include "tensors.h"

namespace sparsekit {

Tensor max_pool2d(Tensor x, Ints kernel_size, Ints stride, Ints padding);
Tensor max_pool2d_planes(Tensor x, Ints x_size, Ints kernel_size, Ints stride, Ints padding, int64_t border);

}  // namespace sparsekit
