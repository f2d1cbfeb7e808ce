// Blocks of one input each in bfloat16. An instruction wants two inputs side by side: two blocks of a list have them.
#pragma once
#include "bsr_arithmetic.h"

namespace sparsekit {
namespace {

#if defined(__AVX512BF16__)
// Eight outputs from `row` of one list, for sixteen pairs of samples.
inline void column_tile(const BsrProduct<float>& a, int64_t list, int64_t row, const float* panel, float* y) {
  using V = Simd<float>::V;
  constexpr int R = 8;
  constexpr __mmask32 kUpper = 0xaaaaaaaa;
  V even[R], odd[R];
  SK_UNROLL for (int r = 0; r < R; ++r) even[r] = odd[r] = V{} + (a.bias ? a.bias[list * a.rows + row + r] : 0.f);
  const auto* values = reinterpret_cast<const uint16_t*>(a.values) + row;
  const auto weights = [&](int32_t b) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + int64_t(b) * a.block));
  };
  const auto inputs = [&](int32_t b) __attribute__((always_inline)) {
    return _mm512_loadu_si512(panel + a.index[b] * a.index_step);
  };
  const auto add = [&](__m128i w0, __m128i w1, __m512i x0, __m512i x1) __attribute__((always_inline)) {
    alignas(32) float w[R];
    _mm_store_si128(reinterpret_cast<__m128i*>(w), _mm_unpacklo_epi16(w0, w1));
    _mm_store_si128(reinterpret_cast<__m128i*>(w + 4), _mm_unpackhi_epi16(w0, w1));
    const V x_even = (V)_mm512_mask_blend_epi16(kUpper, x0, _mm512_slli_epi32(x1, 16));
    const V x_odd = (V)_mm512_mask_blend_epi16(kUpper, _mm512_srli_epi32(x0, 16), x1);
    SK_UNROLL for (int r = 0; r < R; ++r) {
      const V s = Pairs::splat(w + r);
      even[r] = Pairs::add(even[r], s, x_even);
      odd[r] = Pairs::add(odd[r], s, x_odd);
    }
  };
  int32_t b = a.begin[list];
  const int32_t end = a.end[list];
  for (; b + 2 <= end; b += 2) {
    for (int32_t next = b + 12; next < b + 14; ++next)
      __builtin_prefetch(panel + a.index[next < end ? next : end - 1] * a.index_step);
    add(weights(b), weights(b + 1), inputs(b), inputs(b + 1));
  }
  if (b < end) add(weights(b), _mm_setzero_si128(), inputs(b), _mm512_setzero_si512());
  SK_UNROLL for (int r = 0; r < R; ++r) {
    Simd<float>::store(y + r * a.y_stride, even[r]);
    Simd<float>::store(y + r * a.y_stride + a.odd, odd[r]);
  }
}

inline void block_columns_of_pairs(const BsrProduct<float>& a) {
  for (int64_t vector = 0; vector < a.width; vector += 16)
    for (int64_t list = 0; list < a.lists; ++list)
      for (int64_t row = 0; row < a.rows; row += 8)
        column_tile(a, list, row, a.panel + vector, a.y + (list * a.rows + row) * a.y_stride + vector);
}
#endif

}  // namespace
}  // namespace sparsekit
