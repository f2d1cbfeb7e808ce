// What a lane of a block kernel does: multiply and add one number, or two bfloat16 at once.
#pragma once
#include "simd.h"

namespace sparsekit {
namespace {

template <class E>
struct Numbers {
  using T = E;
  using V = typename Simd<T>::V;
  static SK_INLINE V splat(const T* p) { return Simd<T>::splat(*p); }
  static SK_INLINE V add(V sum, V a, V b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Weights and activations are pairs of bfloat16 that only look like floats; sums are floats.
struct Pairs {
  using T = float;
  using V = Simd<float>::V;
  static SK_INLINE V splat(const float* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return (V)_mm512_set1_epi32(pair);
  }
  static SK_INLINE V add(V sum, V a, V b) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

}  // namespace
}  // namespace sparsekit
