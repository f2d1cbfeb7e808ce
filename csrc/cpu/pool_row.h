// The largest element of every window of a few rows.
#pragma once
#include "simd.h"

namespace sparsekit {
namespace {

// The larger of two, NaN if one is.
template <class V>
SK_INLINE V larger(V a, V b) {
  return (a > b) | (a != a) ? a : b;
}

// Every second lane of a and b side by side.
template <int W>
struct Even {
  static constexpr int at(int lane) { return 2 * lane; }
};

template <class T>
void pool(const Pool<T>& p) {
  using S = Simd<T>;
  using V = typename S::V;
  constexpr int W = S::width;
  using Lanes = typename MakeSeq<W>::type;
  const T nothing = -__builtin_inf();
  const int64_t end = p.pad + p.width, length = end + p.window + 2 * W;
  for (int64_t i = 0; i < p.pad; ++i) p.line[i] = nothing;
  int64_t i = 0;
  for (; i + W <= p.width; i += W) {
    V most = S::load(p.from + i);
    for (int64_t r = 1; r < p.rows; ++r) most = larger(S::load(p.from + r * p.row_stride + i), most);
    S::store(p.line + p.pad + i, most);
  }
  for (; i < p.width; ++i) {
    T most = p.from[i];
    for (int64_t r = 1; r < p.rows; ++r) most = larger(p.from[r * p.row_stride + i], most);
    p.line[p.pad + i] = most;
  }
  for (i = end; i < length; ++i) p.line[i] = nothing;

  int64_t j = 0;
  if (p.step <= 2) {
    for (; j + W <= p.count; j += W) {
      const T* at = p.line + j * p.step;
      V most = S::splat(nothing);
      for (int64_t s = 0; s < p.window; ++s) {
        const V a = S::load(at + s);
        most = larger(p.step == 1 ? a : shuffle<Even<W>>(a, S::load(at + s + W), Lanes{}), most);
      }
      S::store(p.to + j, most);
    }
  }
  for (; j < p.count; ++j) {
    T most = nothing;
    for (int64_t s = 0; s < p.window; ++s) most = larger(p.line[j * p.step + s], most);
    p.to[j] = most;
  }
}

}  // namespace
}  // namespace sparsekit
