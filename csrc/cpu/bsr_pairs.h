// Pairs of bfloat16 in place of floats.
//
// An instruction multiplies two pairs and adds both products to a float. In a tensor of floats half as long along one
// dimension a pair is one element: everything else then works on pairs as it does on numbers.
#pragma once
#include "panels.h"

namespace sparsekit {

inline bool have_pairs(Storage storage) {
  return storage == kBFloat16 && kernels<float>().pairs.product != nullptr;
}
inline bool have_pairs(const Matrix& m) { return have_pairs(m.storage) && m.feature_stride == 1; }

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(float) == 0; }

// Whether neighbouring features, and weights, can be read as pairs where they lie.
inline bool features_pair(const Matrix& m, const Tensor& values) {
  const bool even = m.features % 2 == 0 && (m.samples <= 1 || m.sample_stride % 2 == 0);
  return have_pairs(m) && even && is_aligned(m.data) && is_aligned(values.const_data_ptr());
}

inline Matrix pairs_of_features(Matrix m) {
  m.storage = kNative;
  m.bytes = sizeof(float);
  m.features /= 2;
  m.sample_stride /= 2;
  return m;
}

// Two neighbouring samples as one of pairs.
inline Matrix pairs_of_samples(Matrix m) {
  m.storage = kPairs, m.second = m.sample_stride;
  m.sample_stride *= 2, m.samples /= 2;
  return m;
}

// Whether blocks of one input can go by pairs of samples: an odd sample has no partner.
inline bool pairs_in_columns(Storage storage, int64_t samples, int64_t rows, int64_t cols) {
  return have_pairs(storage) && cols == 1 && rows % 8 == 0 && samples > 0 && samples % 2 == 0;
}

// values [blocks, R, C] as pairs of outputs, [blocks, R / 2, C].
inline const float* pairs_of_outputs(const Tensor& values) {
  const int64_t rows = values.size(0) * values.size(1) / 2, cols = values.size(2);
  const auto* from = static_cast<const uint16_t*>(values.const_data_ptr());
  float* to = Workspace::mine().get<float>(Workspace::kValues, rows * cols);
  const int64_t parts = parts_for(0.2 * double(rows * cols));
  for_parts(parts, [&](int64_t part) {
    const Span span = cut(rows, parts, part);
    kernels<float>().interleave(from + 2 * span.begin * cols, cols, 2 * cols, to + span.begin * cols,
                                span.end - span.begin, cols);
  });
  return to;
}

}  // namespace sparsekit
