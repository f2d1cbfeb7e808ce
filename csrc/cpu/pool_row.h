// The largest element of every window of a few rows.
#pragma once
#include "simd.h"

namespace sparsekit {
namespace {

// The larger of two, NaN if one is.
template <class V>
SK_INLINE V larger(V a, V b) {
#if defined(__AVX512F__)  // the instruction returns b where either is NaN
  if constexpr (sizeof(a[0]) == 4) {
    const __m512 x = (__m512)a;
    return (V)_mm512_mask_mov_ps(_mm512_max_ps(x, (__m512)b), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
  }
#endif
  return (a > b) | (a != a) ? a : b;
}
SK_INLINE float larger(float a, float b) { return (a > b) | (a != a) ? a : b; }
SK_INLINE double larger(double a, double b) { return (a > b) | (a != a) ? a : b; }

// The larger halves of each run of 2H lanes of a and b.
template <class T, int H, class V>
SK_INLINE V larger_halves(V a, V b) {
  using Lanes = typename MakeSeq<Simd<T>::width>::type;
  return larger(shuffle<Runs<H, 0>>(a, b, Lanes{}), shuffle<Runs<H, 1>>(a, b, Lanes{}));
}

// Windows of two by two in rows of 2H elements, H less than a vector: rows lie side by side in one.
template <class T, int H>
int64_t pool_narrow(const T* from, T* to, int64_t count) {
  using S = Simd<T>;
  constexpr int W = S::width;
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const T* x = from + 4 * i;
    const auto a = larger_halves<T, 1>(S::load(x), S::load(x + W));
    const auto b = larger_halves<T, 1>(S::load(x + 2 * W), S::load(x + 3 * W));
    S::store(to + i, larger_halves<T, H>(a, b));
  }
  return i;
}

template <class T, int H = Simd<T>::width / 2>
int64_t pool_narrow(const T* from, T* to, int64_t half, int64_t count) {
  if (half == H) return pool_narrow<T, H>(from, to, count);
  if constexpr (H > 1) return pool_narrow<T, H / 2>(from, to, half, count);
  return 0;
}

// to[r][j] = the largest of from[2 r .. 2 r + 1][2 j .. 2 j + 1]; rows of `half` and twice as many elements.
template <class T>
void pool_pairs(const T* from, T* to, int64_t rows, int64_t half) {
  using S = Simd<T>;
  constexpr int W = S::width;
  const int64_t done = half < W ? pool_narrow<T>(from, to, half, rows * half) / half : 0;
  for (int64_t r = done; r < rows; ++r) {
    const T *top = from + 4 * r * half, *bottom = top + 2 * half;
    T* row = to + r * half;
    int64_t j = 0;
    for (; j + W <= half; j += W) {
      const auto a = larger(S::load(bottom + 2 * j), S::load(top + 2 * j));
      const auto b = larger(S::load(bottom + 2 * j + W), S::load(top + 2 * j + W));
      S::store(row + j, larger_halves<T, 1>(a, b));
    }
    if (j == half) continue;
    const int rest = int(2 * (half - j)), first = rest < W ? rest : W;
    const auto part = [&](int64_t at, int n) __attribute__((always_inline)) {
      return larger(load_part<T, Native<T>>(bottom + 2 * j + at, n), load_part<T, Native<T>>(top + 2 * j + at, n));
    };
    store_part<T, Native<T>>(row + j, larger_halves<T, 1>(part(0, first), part(W, rest - first)), rest / 2);
  }
}

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
    for (; j < p.count; j += W) {
      const T* at = p.line + j * p.step;
      V most = S::splat(nothing);
      for (int64_t s = 0; s < p.window; ++s) {
        const V a = S::load(at + s);
        most = larger(p.step == 1 ? a : shuffle<Runs<1, 0>>(a, S::load(at + s + W), Lanes{}), most);
      }
      if (j + W <= p.count) S::store(p.to + j, most);
      else store_part<T, Native<T>>(p.to + j, most, int(p.count - j));
    }
    return;
  }
  for (; j < p.count; ++j) {
    T most = nothing;
    for (int64_t s = 0; s < p.window; ++s) most = larger(p.line[j * p.step + s], most);
    p.to[j] = most;
  }
}

template <class T>
void pool_lines(const Pool<T>& p) {
  using S = Simd<T>;
  constexpr int64_t L = kLanes<T>;
  if (p.window == 2 && p.rows == 2 && p.pad == 0) {
    for (int64_t j = 0; j < p.count; ++j) {
      const T *top = p.from + j * p.step * L, *bottom = top + p.row_stride;
      SK_UNROLL for (int i = 0; i < L; i += S::width)
        S::store(p.to + j * L + i, larger(larger(S::load(top + i), S::load(top + L + i)),
                                          larger(S::load(bottom + i), S::load(bottom + L + i))));
    }
    return;
  }
  for (int64_t j = 0; j < p.count; ++j) {
    const int64_t first = j * p.step - p.pad, begin = first < 0 ? 0 : first;
    const int64_t end = first + p.window < p.width ? first + p.window : p.width;
    SK_UNROLL for (int v = 0; v < S::per_line; ++v) {
      typename S::V most = S::splat(-__builtin_inf());
      for (int64_t r = 0; r < p.rows; ++r)
        for (int64_t s = begin; s < end; ++s)
          most = larger(S::load(p.from + r * p.row_stride + s * L + v * S::width), most);
      S::store(p.to + j * L + v * S::width, most);
    }
  }
}

}  // namespace
}  // namespace sparsekit
