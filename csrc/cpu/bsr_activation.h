// Activations, in place on finished sums.
#pragma once
#include "simd.h"

namespace sparsekit {
namespace {

typedef int32_t SignedLanes __attribute__((vector_size(kVectorBytes)));
using FloatLanes = Simd<float>::V;

// Highest power first.
template <int N>
SK_INLINE FloatLanes polynomial(const float (&c)[N], FloatLanes x) {
  FloatLanes p = Simd<float>::splat(c[0]);
  SK_UNROLL for (int i = 1; i < N; ++i) p = p * x + c[i];
  return p;
}

// e^v to about 1 ulp: v = n ln 2 + r with |r| <= ln 2 / 2, Taylor's series in r, 2^n through the exponent bits.
// 0 below -87.3, infinity above 88.3, NaN stays NaN.
SK_INLINE FloatLanes exp(FloatLanes v) {
  using S = Simd<float>;
  const FloatLanes low = S::splat(-87.3f), high = S::splat(88.3f);
  const FloatLanes x = v < low ? low : v > high ? high : v;
  const FloatLanes magic = S::splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const FloatLanes shifted = x * 1.44269504f + magic;
  const FloatLanes n = shifted - magic;
  const FloatLanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  const float series[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f};
  const FloatLanes p = polynomial(series, r);
  const FloatLanes y = (FloatLanes)((SignedLanes)p + (((SignedLanes)shifted - (SignedLanes)magic) << 23));
  return v < low ? FloatLanes{} : v > high ? S::splat(__builtin_inff()) : y;
}

// x times the normal distribution function, x / 2 erfc(-x / sqrt 2). For z >= 0, erfc(z) = e^(-z z) p(t) with
// t = 1 / (1 + 0.42 z) (the form of Abramowitz and Stegun 7.1.26); p is a minimax fit of relative error 4e-8.
SK_INLINE FloatLanes gelu(FloatLanes x) {
  const FloatLanes z = (x < 0 ? -x : x) * 0.707106781f;
  const FloatLanes t = 1 / (1 + 0.42f * z);
  const float fit[] = {0.0783882886f, -0.356945336f, 0.510316908f, -0.203191712f, 0.314199209f,
                       0.177309275f,  0.243570581f,  0.236326918f, 2.59299067e-5f};
  const FloatLanes tail = 0.5f * polynomial(fit, t) * exp(-z * z);
  return x * (x < 0 ? tail : 1 - tail);
}
SK_INLINE FloatLanes silu(FloatLanes x) { return x / (1 + exp(-x)); }
SK_INLINE double gelu(double x) { return 0.5 * x * __builtin_erfc(-x * 0.70710678118654752440); }
SK_INLINE double silu(double x) { return x / (1 + __builtin_exp(-x)); }

template <class T, class F>
SK_INLINE void each(T* p, int64_t count, const F& f) {
  using S = Simd<T>;
  using V = typename S::V;
  const auto vector = [&](V v) __attribute__((always_inline)) {
    if constexpr (sizeof(T) == 4) return f(v);
    SK_UNROLL for (int i = 0; i < S::width; ++i) v[i] = f(v[i]);
    return v;
  };
  int64_t i = 0;
  for (; i + S::width <= count; i += S::width) S::store(p + i, vector(S::load(p + i)));
  if (i < count)
    store_part<T, Native<T>>(p + i, vector(load_part<T, Native<T>>(p + i, int(count - i))), int(count - i));
}

template <class T>
void activate(T* p, int64_t count, Activation kind) {
  if (kind == kRelu) return each<T>(p, count, [](auto v) { return v < 0 ? decltype(v){} : v; });
  if (kind == kGelu) return each<T>(p, count, [](auto v) { return gelu(v); });
  if (kind == kSilu) return each<T>(p, count, [](auto v) { return silu(v); });
}

}  // namespace
}  // namespace sparsekit
