// The sampled product dW = dy' x of blocks: a few rows of dW by any list of inputs.
//
// A vector of dy holds `rows` outputs of kGroup samples, sample fastest. It stays in a register while the
// inputs pass by; of each, the same kGroup samples are broadcast to all rows. For rows = width that is one
// plain broadcast, for rows = 1 a plain vector load, and the sums over a group are one transposing reduction.
#pragma once
#include "bsr_arithmetic.h"

namespace sparsekit {
namespace {

// x[0 .. G) in every G lanes.
template <class A, int G, class T = typename A::T>
SK_INLINE typename A::V broadcast(const T* x) {
  using S = Simd<T>;
  if constexpr (G == 1) {
    return A::splat(x);
  } else if constexpr (G == S::width) {
    return S::load(x);
  } else if constexpr (G * sizeof(T) == 8) {
    double pair;
    __builtin_memcpy(&pair, x, 8);
    return (typename S::V)Simd<double>::splat(pair);
  } else {
    typedef T Part __attribute__((vector_size(G * sizeof(T))));
    Part part;
    __builtin_memcpy(&part, x, sizeof part);
#if defined(__AVX512F__)
    if constexpr (sizeof part == 16) return (typename S::V)_mm512_broadcast_f32x4((__m128)part);
#endif
    typename S::V v;
    SK_UNROLL for (int i = 0; i < S::width; ++i) v[i] = part[i % G];
    return v;
  }
}

// row[0]: lane r * G + j becomes the sum over row[j]'s lanes r * G .. r * G + G; destroys row.
template <class T, int G>
SK_INLINE void sum_groups(typename Simd<T>::V* row) {
  using Lanes = typename MakeSeq<Simd<T>::width>::type;
  if constexpr (G > 1) {
    constexpr int W = Simd<T>::width, H = G / 2;
    SK_UNROLL for (int i = 0; i < H; ++i)
      row[i] = shuffle<Halves<W, H, 0>>(row[i], row[i + H], Lanes{}) +
               shuffle<Halves<W, H, 1>>(row[i], row[i + H], Lanes{});
    sum_groups<T, H>(row);
  }
}

// Lane j * rows + r from lane r * G + j.
template <int W, int G>
struct ByColumn {
  static constexpr int at(int lane) { return lane % (W / G) * G + lane / (W / G); }
};
// Lane r * G + i from lane i * rows + r.
template <int W, int G>
struct BySample {
  static constexpr int at(int lane) { return lane % G * (W / G) + lane / G; }
};

// What stays in registers: NV vectors of dy; with them a multiple of G inputs at a time.
template <int G>
constexpr int kInputs = G < 8 ? 8 : G;

template <class A, int G, int NV, class T = typename A::T>
void sddmm_vectors(const BsrSddmm<T>& a, const T* dy, const T* panel, bool accumulate) {
  using S = Simd<T>;
  using V = typename S::V;
  using Lanes = typename MakeSeq<S::width>::type;
  constexpr int M = kInputs<G>;
  V v[NV];
  SK_UNROLL for (int n = 0; n < NV; ++n) v[n] = S::load(dy + n * S::width);
  for (int64_t j = 0; j < a.inputs; j += M) {
    const T* x[M];
    SK_UNROLL for (int m = 0; m < M; ++m) x[m] = panel + a.index[j + m] * a.index_step;
    V sum[M] = {};
    SK_UNROLL for (int n = 0; n < NV; ++n)
      SK_UNROLL for (int m = 0; m < M; ++m) sum[m] = A::add(sum[m], v[n], broadcast<A, G>(x[m] + n * G));
    SK_UNROLL for (int m = 0; m < M; m += G) {
      sum_groups<T, G>(sum + m);
      V total = G > 1 ? shuffle<ByColumn<S::width, G>>(sum[m], sum[m], Lanes{}) : sum[m];
      T* to = a.sums + (j + m) * (S::width / G);
      if (accumulate) total += S::load(to);
      S::store(to, total);
    }
  }
}

// The same for dy whose samples lie side by side.
template <class T, int G>
void arrange_planes(const BsrSddmm<T>& a, T* to) {
  using S = Simd<T>;
  constexpr int rows = S::width / G;
  for (int64_t t = 0; t < a.width; t += S::width, to += S::width * rows) {
    if constexpr (G == 1) {
      typename S::V v[S::width];
      SK_UNROLL for (int r = 0; r < S::width; ++r)
        v[r] = r < a.rows ? S::load(a.dy + r * a.row_stride + t) : typename S::V{};
      transpose<T>(v);
      SK_UNROLL for (int r = 0; r < S::width; ++r) S::store(to + r * S::width, v[r]);
    } else {
      SK_UNROLL for (int r = 0; r < rows; ++r) {
        const T* from = a.dy + r * a.row_stride + t;
        for (int i = 0; i < rows; ++i) {
          if (r < a.rows) __builtin_memcpy(to + i * S::width + r * G, from + i * G, G * sizeof(T));
          else __builtin_memset(to + i * S::width + r * G, 0, G * sizeof(T));
        }
      }
    }
  }
}

// dy of all samples of the panel, a vector for every G of them; absent rows and samples are 0.
template <class T, int G>
void arrange(const BsrSddmm<T>& a, T* to) {
  using S = Simd<T>;
  using Lanes = typename MakeSeq<S::width>::type;
  constexpr int rows = S::width / G;
  if (a.row_stride != 1) return arrange_planes<T, G>(a, to);
  for (int64_t t = 0; t < a.width; t += G, to += S::width) {
    alignas(64) T part[S::width] = {};
    for (int64_t i = 0; i < G && t + i < a.samples; ++i) {
      const T* from = a.dy + (t + i) * a.sample_stride;
      if (a.rows == rows) __builtin_memcpy(part + i * rows, from, rows * sizeof(T));
      else for (int64_t r = 0; r < a.rows; ++r) part[i * rows + r] = from[r];
    }
    const auto v = S::load(part);
    S::store(to, shuffle<BySample<S::width, G>>(v, v, Lanes{}));
  }
}

template <class A, int G, class T = typename A::T>
void block_sddmm(const BsrSddmm<T>& a) {
  constexpr int W = Simd<T>::width, most = kVectorBytes == 64 ? (G < W ? 16 : 8) : 8;
  alignas(64) T dy[kMaxSamples<T> / G * W];
  arrange<T, G>(a, dy);
  bool accumulate = a.accumulate;
  for (int64_t done = 0, count = a.width / G; done < count; accumulate = true) {
    const int64_t left = count - done;
    const T *v = dy + done * W, *x = a.panel + done * G;
    if (most >= 16 && left >= 16) sddmm_vectors<A, G, most < 16 ? most : 16>(a, v, x, accumulate), done += 16;
    else if (left >= 8) sddmm_vectors<A, G, 8>(a, v, x, accumulate), done += 8;
    else if (left >= 4) sddmm_vectors<A, G, 4>(a, v, x, accumulate), done += 4;
    else if (left >= 2) sddmm_vectors<A, G, 2>(a, v, x, accumulate), done += 2;
    else sddmm_vectors<A, G, 1>(a, v, x, accumulate), done += 1;
  }
}

template <class A>
void block_sddmm_any(const BsrSddmm<typename A::T>& a, int lanes) {
  constexpr int W = Simd<typename A::T>::width;
  if (lanes >= W) return block_sddmm<A, 1>(a);
  if constexpr (W > 8)
    if (lanes == 8) return block_sddmm<A, W / 8>(a);
  if constexpr (W > 4)
    if (lanes == 4) return block_sddmm<A, W / 4>(a);
  if (lanes == 1) return block_sddmm<A, W>(a);
  __builtin_trap();
}

}  // namespace
}  // namespace sparsekit
