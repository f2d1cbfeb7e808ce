// Gradients of a dense weight under a mask: masked where they lie, or for few samples written masked already.
#pragma once
#include "simd.h"

namespace sparsekit {
namespace {

template <class T>
SK_INLINE void store_masked(T* to, typename Simd<T>::V v, const uint8_t* mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m128i m = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
    _mm512_storeu_ps(to, _mm512_maskz_mov_ps(_mm_test_epi8_mask(m, m), __m512(v)));
  } else {
    const __m128i m = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask));
    _mm512_storeu_pd(to, _mm512_maskz_mov_pd(__mmask8(_mm_test_epi8_mask(m, m)), __m512d(v)));
  }
#else
  Simd<T>::store(to, v);
  for (int i = 0; i < Simd<T>::width; ++i) to[i] = mask[i] ? to[i] : T(0);
#endif
}

template <class T, int R, int NV>
SK_INLINE void masked_tile(const MaskedProduct<T>& a, int64_t row, int64_t j) {
  using S = Simd<T>;
  typename S::V sum[R][NV];
  SK_UNROLL for (int r = 0; r < R; ++r) SK_UNROLL for (int n = 0; n < NV; ++n) sum[r][n] = typename S::V{};
  for (int64_t s = 0; s < a.samples; ++s) {
    const T* x = a.x + s * a.x_stride + j;
    const T* dy = a.dy + s * a.dy_stride + row;
    typename S::V v[NV];
    SK_UNROLL for (int n = 0; n < NV; ++n) v[n] = S::load(x + n * S::width);
    SK_UNROLL for (int r = 0; r < R; ++r) {
      const typename S::V d = S::splat(dy[r]);
      SK_UNROLL for (int n = 0; n < NV; ++n) sum[r][n] += d * v[n];
    }
  }
  SK_UNROLL for (int r = 0; r < R; ++r) SK_UNROLL for (int n = 0; n < NV; ++n) {
    const int64_t at = (row + r) * a.inputs + j + n * S::width;
    store_masked(a.dw + at, sum[r][n], a.mask + at);
  }
}

template <class T, int R>
void masked_rows(const MaskedProduct<T>& a, int64_t row) {
  constexpr int W = Simd<T>::width, NV = 4;
  int64_t j = 0;
  for (; j + NV * W <= a.inputs; j += NV * W) masked_tile<T, R, NV>(a, row, j);
  for (; j + W <= a.inputs; j += W) masked_tile<T, R, 1>(a, row, j);
  for (; j < a.inputs; ++j) {
    for (int r = 0; r < R; ++r) {
      T sum = 0;
      for (int64_t s = 0; s < a.samples; ++s) sum += a.dy[s * a.dy_stride + row + r] * a.x[s * a.x_stride + j];
      const int64_t at = (row + r) * a.inputs + j;
      a.dw[at] = a.mask[at] ? sum : T(0);
    }
  }
}

template <class T>
void clear_pruned(T* grad, const uint8_t* mask, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  constexpr int W = Simd<T>::width;
  for (; i + W <= count; i += W) store_masked<T>(grad + i, Simd<T>::load(grad + i), mask + i);
#endif
  for (; i < count; ++i) grad[i] = mask[i] ? grad[i] : T(0);
}

template <class T>
void masked_product(const MaskedProduct<T>& a) {
  constexpr int R = kVectorBytes == 64 ? 4 : 2;
  int64_t row = a.first;
  for (; row + R <= a.last; row += R) masked_rows<T, R>(a, row);
  for (; row < a.last; ++row) masked_rows<T, 1>(a, row);
}

}  // namespace
}  // namespace sparsekit
