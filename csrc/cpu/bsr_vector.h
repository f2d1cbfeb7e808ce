// Blocks times one sample, where reading the weights is all that costs.
#pragma once
#include "simd.h"

namespace sparsekit {
namespace {

template <class T, int N>
struct Short {
  typedef T V __attribute__((vector_size(N * sizeof(T))));
  typedef T U __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
  static SK_INLINE V load(const T* p) { return *reinterpret_cast<const U*>(p); }
};

// Lane j of the result is the sum of row[j]'s lanes; destroys row.
template <class T, int N, int H = N / 2>
SK_INLINE typename Short<T, N>::V fold(typename Short<T, N>::V* row) {
  using Lanes = typename MakeSeq<N>::type;
  SK_UNROLL for (int i = 0; i < H; ++i)
    row[i] = shuffle<Halves<N, H, 0>>(row[i], row[i + H], Lanes{}) +
             shuffle<Halves<N, H, 1>>(row[i], row[i + H], Lanes{});
  if constexpr (H > 1) return fold<T, N, H / 2>(row);
  else return row[0];
}

template <class T, int N, int H = N / 2>
SK_INLINE T fold_one(typename Short<T, N>::V v) {
  using Lanes = typename MakeSeq<N>::type;
  v = shuffle<Halves<N, H, 0>>(v, v, Lanes{}) + shuffle<Halves<N, H, 1>>(v, v, Lanes{});
  if constexpr (H > 1) return fold_one<T, N, H / 2>(v);
  else return v[0];
}

// Outputs lie side by side: y[0 .. N) += w[0 .. N) * x.
template <class T, int N>
void vector_outputs(const BsrProduct<T>& a) {
  using V = typename Short<T, N>::V;
  for (int64_t list = 0; list < a.lists; ++list) {
    for (int64_t row = 0; row < a.rows; row += N) {
      const T* values = a.values + row;
      V sum[4] = {};
      const auto add = [&](int chain, int32_t b, int64_t k) __attribute__((always_inline)) {
        const T* w = values + int64_t(a.which ? a.which[b] : b) * a.block + k * a.k_step;
        sum[chain] += Short<T, N>::load(w) * a.panel[int64_t(a.index[b]) * a.depth + k];
      };
      int32_t b = a.begin[list];
      const int32_t end = a.end[list];
      if (a.depth == 1)
        for (; b + 4 <= end; b += 4) SK_UNROLL for (int c = 0; c < 4; ++c) add(c, b + c, 0);
      for (; b < end; ++b) {
        int64_t k = 0;
        for (; k + 4 <= a.depth; k += 4) SK_UNROLL for (int c = 0; c < 4; ++c) add(c, b, k + c);
        for (; k < a.depth; ++k) add(0, b, k);
      }
      const V total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      T* y = a.y + list * a.rows + row;
      SK_UNROLL for (int i = 0; i < N; ++i) y[i] = total[i];
    }
  }
}

// Inputs lie side by side: y[r] += w[r][0 .. N) * x[0 .. N), for Rows outputs, summed over lanes at the end.
template <class T, int N, int Rows>
void vector_inputs(const BsrProduct<T>& a) {
  using V = typename Short<T, N>::V;
  constexpr int C = Rows == 1 ? 4 : 1;
  for (int64_t list = 0; list < a.lists; ++list) {
    for (int64_t row = 0; row < a.rows; row += Rows) {
      const T* values = a.values + row * a.row_step;
      V sum[C > Rows ? C : N] = {};
      const auto add = [&](V* to, int32_t b) __attribute__((always_inline)) {
        const T* w = values + int64_t(a.which ? a.which[b] : b) * a.block;
        const T* x = a.panel + int64_t(a.index[b]) * a.depth;
        for (int64_t k = 0; k < a.depth; k += N) {
          const V v = Short<T, N>::load(x + k);
          SK_UNROLL for (int r = 0; r < Rows; ++r) to[r] += Short<T, N>::load(w + r * a.row_step + k) * v;
        }
      };
      int32_t b = a.begin[list];
      const int32_t end = a.end[list];
      for (; b + C <= end; b += C) SK_UNROLL for (int c = 0; c < C; ++c) add(sum + c, b + c);
      for (; b < end; ++b) add(sum, b);
      T* y = a.y + list * a.rows + row;
      if constexpr (Rows == 1) {
        *y = fold_one<T, N>((sum[0] + sum[1]) + (sum[2] + sum[3]));
      } else {
        const V total = fold<T, N>(sum);
        SK_UNROLL for (int r = 0; r < Rows; ++r) y[r] = total[r];
      }
    }
  }
}

template <class T, int N>
void vector_inputs_any(const BsrProduct<T>& a) {
  if constexpr (N >= 16) if (a.rows % 16 == 0) return vector_inputs<T, N, 16>(a);
  if constexpr (N >= 8) if (a.rows % 8 == 0) return vector_inputs<T, N, 8>(a);
  if (a.rows % 4 == 0) return vector_inputs<T, N, 4>(a);
  return vector_inputs<T, N, 1>(a);
}

// Bias and activation are the caller's. All sides of a block are 1 or a multiple of 4.
template <class T>
void block_vector(const BsrProduct<T>& a) {
  constexpr int W = Simd<T>::width;
  if (a.k_step == 1 && a.depth > 1) {
    if constexpr (W >= 16) if (a.depth % 16 == 0) return vector_inputs_any<T, 16>(a);
    if constexpr (W >= 8) if (a.depth % 8 == 0) return vector_inputs_any<T, 8>(a);
    return vector_inputs_any<T, 4>(a);
  }
  if (a.rows % 16 == 0) return vector_outputs<T, 16>(a);
  if (a.rows % 8 == 0) return vector_outputs<T, 8>(a);
  if (a.rows % 4 == 0) return vector_outputs<T, 4>(a);
  for (int64_t list = 0; list < a.lists; ++list) {  // blocks of one weight
    T sum = 0;
    for (int32_t b = a.begin[list]; b < a.end[list]; ++b)
      sum += a.values[a.which ? a.which[b] : b] * a.panel[a.index[b]];
    a.y[list] = sum;
  }
}

}  // namespace
}  // namespace sparsekit
