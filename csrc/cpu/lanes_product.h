// The product of a weight stored in lanes (see kernels/lanes/layout.py) with one vector or two.
//
// Sixty-four rows stand in the lanes of four vectors, and in each step every row takes at most one of its survivors,
// all from one window of 64 inputs. The window is in registers: two permutations look sixteen of its inputs up, where
// a gather, or scalar code, would need sixteen loads.
#pragma once
#include "simd.h"

namespace sparsekit {
namespace {

constexpr int kFirst = 0x80, kSecond = 0x40;  // in a code: a survivor in this half of the window, else none

struct Int8 {
  using Element = int8_t;
  static SK_INLINE float get(int8_t e) { return float(e); }
#if defined(__AVX512F__)
  static SK_INLINE Simd<float>::V load(const int8_t* p) {
    return (Simd<float>::V)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
#endif
};

SK_INLINE int64_t window_of(const LanesProduct& a, int64_t step) {
  const uint32_t at = uint32_t(a.bases[step]), limit = uint32_t(a.limit);
  return at < limit ? at : limit;  // whatever the bases hold, no other memory is read
}

#if defined(__AVX512F__)

template <class St, int B>
void lanes_group(const LanesProduct& a, int64_t begin, int64_t end, const float* x, float* sums) {
  const auto* values = static_cast<const typename St::Element*>(a.values);
  __m512 sum[B][4];
  SK_UNROLL for (int b = 0; b < B; ++b) SK_UNROLL for (int j = 0; j < 4; ++j) sum[b][j] = _mm512_setzero_ps();
  for (int64_t s = begin; s < end; ++s) {
    const float* window = x + window_of(a, s);
    const __m512i code = _mm512_loadu_si512(a.codes + 64 * s);
    SK_UNROLL for (int j = 0; j < 4; ++j) {
      const __mmask16 any = _mm512_test_epi32_mask(code, _mm512_set1_epi32((kFirst | kSecond) << 8 * j));
      const __mmask16 second = _mm512_test_epi32_mask(code, _mm512_set1_epi32(kSecond << 8 * j));
      const __m512i at = _mm512_srli_epi32(code, 8 * j);  // a permutation reads the lowest five bits
      const __m512 v = (__m512)St::load(values + 64 * s + 16 * j);
      SK_UNROLL for (int b = 0; b < B; ++b) {
        const float* w = window + b * a.x_stride;
        // Absent lanes multiply 0 by 0, not by an input that may be infinite.
        const __m512 low = _mm512_maskz_permutex2var_ps(any, _mm512_loadu_ps(w), at, _mm512_loadu_ps(w + 16));
        const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(w + 32), at, _mm512_loadu_ps(w + 48));
        sum[b][j] = _mm512_fmadd_ps(v, _mm512_mask_mov_ps(low, second, high), sum[b][j]);
      }
    }
  }
  SK_UNROLL for (int b = 0; b < B; ++b)
    SK_UNROLL for (int j = 0; j < 4; ++j) _mm512_storeu_ps(sums + b * a.sum_stride + 16 * j, sum[b][j]);
}

#else

template <class St, int B>
void lanes_group(const LanesProduct& a, int64_t begin, int64_t end, const float* x, float* sums) {
  const auto* values = static_cast<const typename St::Element*>(a.values);
  for (int b = 0; b < B; ++b, x += a.x_stride, sums += a.sum_stride) {
    for (int lane = 0; lane < 64; ++lane) sums[lane] = 0;
    for (int64_t s = begin; s < end; ++s) {
      const float* window = x + window_of(a, s);
      for (int lane = 0; lane < 64; ++lane) {
        const int code = a.codes[64 * s + lane % 16 * 4 + lane / 16];
        if (code & (kFirst | kSecond))
          sums[lane] += St::get(values[64 * s + lane]) * window[(code & 31) + (code & kSecond ? 32 : 0)];
      }
    }
  }
}

#endif

template <class St>
void lanes_product(const LanesProduct& a) {
  for (int64_t g = a.first; g < a.last; ++g) {
    float* sums = a.sums + 64 * (g - a.first);
    if (a.samples == 2) lanes_group<St, 2>(a, a.starts[g], a.starts[g + 1], a.x, sums);
    else lanes_group<St, 1>(a, a.starts[g], a.starts[g + 1], a.x, sums);
  }
}

}  // namespace
}  // namespace sparsekit
