// What the dense format needs beside torch's own products.
#pragma once
#include "tensors.h"

namespace sparsekit {

void zero_pruned_(Tensor grad, Tensor mask);
Tensor dense_sddmm(Tensor dy, Tensor x, Tensor mask);

}  // namespace sparsekit

// zero_pruned_ without torch's dispatcher, of a gradient that lies in memory as its mask does: count floating-point
// numbers of 2, 4 or 8 bytes.
extern "C" __attribute__((visibility("default"))) void sparsekit_clear_pruned(void* grad, const uint8_t* mask,
                                                                              int64_t count, int64_t bytes);
