// One native vector type per instruction set, written with compiler vector extensions.
//
// Everything lives in an anonymous namespace: each instruction-set object has its own private copy.
#pragma once
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define SK_INLINE inline __attribute__((always_inline))
#define SK_UNROLL _Pragma("GCC unroll 16")

namespace sparsekit {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd {
  static constexpr int width = kVectorBytes / sizeof(T);
  static constexpr int per_line = kLanes<T> / width;
  typedef T V __attribute__((vector_size(kVectorBytes)));
  typedef T U __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));

  static SK_INLINE V load(const T* p) { return *reinterpret_cast<const U*>(p); }
  static SK_INLINE void store(T* p, V v) { *reinterpret_cast<U*>(p) = v; }
  static SK_INLINE V splat(T x) { return x - V{}; }
};

template <int... I>
struct Seq {};
template <int N, int... I>
struct MakeSeq : MakeSeq<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSeq<0, I...> {
  using type = Seq<I...>;
};

// Of two vectors seen as blocks of 2H lanes: the first halves (Half = 0) or the second halves (1) of a's
// blocks, interleaved with those of b's. Both transpose and reduction are built from this one step.
template <int W, int H, int Half>
struct Halves {
  static constexpr int at(int lane) {
    const int block = lane / (2 * H) * (2 * H), t = lane % (2 * H);
    return t < H ? block + Half * H + t : W + block + Half * H + (t - H);
  }
};

// Of a and b seen as runs of 2H lanes: the first halves (Half = 0) or the second halves (1) of all runs, side by side.
template <int H, int Half>
struct Runs {
  static constexpr int at(int lane) { return lane / H * 2 * H + Half * H + lane % H; }
};

template <class Pick, class V, int... I>
SK_INLINE V shuffle(V a, V b, Seq<I...>) {
  return __builtin_shufflevector(a, b, Pick::at(I)...);
}

template <class T, int H>
SK_INLINE void transpose_step(typename Simd<T>::V* row) {
  constexpr int W = Simd<T>::width;
  using Lanes = typename MakeSeq<W>::type;
  SK_UNROLL for (int i = 0; i < W; ++i) {
    if (i & H) continue;
    const auto a = row[i], b = row[i + H];
    row[i] = shuffle<Halves<W, H, 0>>(a, b, Lanes{});
    row[i + H] = shuffle<Halves<W, H, 1>>(a, b, Lanes{});
  }
  if constexpr (H > 1) transpose_step<T, H / 2>(row);
}

// In-register transpose of a width x width block.
template <class T>
SK_INLINE void transpose(typename Simd<T>::V* row) {
  transpose_step<T, Simd<T>::width / 2>(row);
}

// Lane j of the result is the sum of row[j]'s lanes; destroys row.
template <class T, int H = Simd<T>::width / 2>
SK_INLINE typename Simd<T>::V sum_each(typename Simd<T>::V* row) {
  constexpr int W = Simd<T>::width;
  using Lanes = typename MakeSeq<W>::type;
  SK_UNROLL for (int i = 0; i < H; ++i) {
    row[i] = shuffle<Halves<W, H, 0>>(row[i], row[i + H], Lanes{}) +
             shuffle<Halves<W, H, 1>>(row[i], row[i + H], Lanes{});
  }
  if constexpr (H > 1)
    return sum_each<T, H / 2>(row);
  else
    return row[0];
}

// The same of the first K rows alone, in the first K lanes; K is a power of two below the width.
template <class T, int K, int H = Simd<T>::width / 2>
SK_INLINE typename Simd<T>::V sum_few(typename Simd<T>::V* row) {
  using Lanes = typename MakeSeq<Simd<T>::width>::type;
  if constexpr (H < K) {
    return sum_each<T, H>(row);
  } else {
    SK_UNROLL for (int i = 0; i < K; ++i) row[i] += shuffle<Halves<Simd<T>::width, H, 1>>(row[i], row[i], Lanes{});
    if constexpr (H > 1) return sum_few<T, K, H / 2>(row);
    else return row[0];
  }
}

// Sum of one vector's lanes, adding in exactly the order that sum_each uses.
template <class T, int H = Simd<T>::width / 2>
SK_INLINE T sum_one(typename Simd<T>::V v) {
  using Lanes = typename MakeSeq<Simd<T>::width>::type;
  v = shuffle<Halves<Simd<T>::width, H, 0>>(v, v, Lanes{}) +
      shuffle<Halves<Simd<T>::width, H, 1>>(v, v, Lanes{});
  if constexpr (H > 1)
    return sum_one<T, H / 2>(v);
  else
    return v[0];
}

// ---- storage: how elements of a user's tensor become T and back -------------------------------------

SK_INLINE float from_bits(uint32_t u) { return __builtin_bit_cast(float, u); }
SK_INLINE uint32_t to_bits(float f) { return __builtin_bit_cast(uint32_t, f); }

template <class T>
struct Native {
  using Element = T;
  static SK_INLINE T get(T e) { return e; }
  static SK_INLINE T put(T x) { return x; }
  static SK_INLINE typename Simd<T>::V load(const T* p) { return Simd<T>::load(p); }
  static SK_INLINE void store(T* p, typename Simd<T>::V v) { Simd<T>::store(p, v); }
};

// Conversions a vector at a time where no instruction is assumed: a loop the compiler can vectorise.
template <class Self>
struct Converted {
  using Element = uint16_t;
  using S = Simd<float>;
  static SK_INLINE S::V load(const uint16_t* p) {
    S::V v;
    SK_UNROLL for (int i = 0; i < S::width; ++i) v[i] = Self::get(p[i]);
    return v;
  }
  static SK_INLINE void store(uint16_t* p, S::V v) {
    SK_UNROLL for (int i = 0; i < S::width; ++i) p[i] = Self::put(v[i]);
  }
};

struct BFloat16 : Converted<BFloat16> {
  static SK_INLINE float get(uint16_t e) { return from_bits(uint32_t(e) << 16); }
  static SK_INLINE uint16_t put(float x) {
    const uint32_t u = to_bits(x);
    if (x != x) return 0x7fc0;
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
#if defined(__AVX512F__)
  static SK_INLINE S::V load(const uint16_t* p) {
    const __m256i e = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (S::V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(e), 16);
  }
  static SK_INLINE void store(uint16_t* p, S::V v) {
    const __m512i u = (__m512i)v;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    r = _mm512_srli_epi32(r, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
  }
#elif defined(__AVX2__)
  static SK_INLINE S::V load(const uint16_t* p) {
    const __m128i e = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (S::V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(e), 16);
  }
#endif
};

struct Half : Converted<Half> {
  static SK_INLINE float get(uint16_t e) {
    // Shift exponent and mantissa into place, then rescale by 2^112: exact, subnormals included.
    const float magnitude = from_bits(uint32_t(e & 0x7fff) << 13) * from_bits(0x77800000);
    const uint32_t special = (e & 0x7c00) == 0x7c00 ? 0x7f800000u | uint32_t(e & 0x3ff) << 13 : 0;
    return from_bits((special ? special : to_bits(magnitude)) | uint32_t(e & 0x8000) << 16);
  }
  static SK_INLINE uint16_t put(float x) {
    const uint32_t u = to_bits(x), sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
    if (m > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (m >= 0x47800000) return uint16_t(sign | 0x7c00);
    if (m < 0x38800000) {  // subnormal: let a float addition do the rounding
      return uint16_t(sign | (to_bits(from_bits(m) + 0.5f) - to_bits(0.5f)));
    }
    return uint16_t(sign | ((m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13));
  }
#if defined(__AVX512F__)
  static SK_INLINE S::V load(const uint16_t* p) {
    return (S::V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static SK_INLINE void store(uint16_t* p, S::V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__F16C__)
  static SK_INLINE S::V load(const uint16_t* p) {
    return (S::V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static SK_INLINE void store(uint16_t* p, S::V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
};

// The first `count` (< width) elements of a vector.
template <class T, class St>
SK_INLINE typename Simd<T>::V load_part(const typename St::Element* p, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename St::Element) == 4)
    return (typename Simd<T>::V)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#endif
  typename St::Element buffer[Simd<T>::width] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return St::load(buffer);
}

template <class T, class St>
SK_INLINE void store_part(typename St::Element* p, typename Simd<T>::V v, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename St::Element) == 4)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
#endif
  typename St::Element buffer[Simd<T>::width];
  St::store(buffer, v);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

}  // namespace
}  // namespace sparsekit
