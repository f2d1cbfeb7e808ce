// The activations that products apply to what they write; codes as in the C ABI of every launcher.
#pragma once

#include <cmath>

#include "ptx.cuh"

namespace sparsekit::cuda {

enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

SPARSEKIT_DEVICE float activate(float v, int activation) {
  if (activation == kRelu) return v < 0.0f ? 0.0f : v;  // keeps NaN
  if (activation == kGelu) return 0.5f * v * (1.0f + erff(v * 0.70710678f));
  if (activation == kSilu) return v / (1.0f + expf(-v));
  return v;
}

}  // namespace sparsekit::cuda
