// The product of blocks with packed activations: one kernel for y = W x and for dx = W' dy.
//
// Samples lie in the lanes, a tile of sums stays in registers, and a weight is broadcast from wherever it lies
// in its block: the transposed product only swaps two strides.
#pragma once
#include "bsr_arithmetic.h"

namespace sparsekit {
namespace {

// Outputs and vectors of samples that are summed at once, within the registers of the instruction set.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4;
template <int Rows>
constexpr int kTileVectors = Rows == 1 ? 4 : kVectorBytes < 64 ? 2 : Rows == 8 ? 3 : 4;

// Sums per output, so that enough of them are independent to hide the latency of an FMA.
template <int Sums>
constexpr int kSums = Sums >= 6 ? 1 : Sums >= 3 ? 2 : Sums == 2 ? 4 : 8;

// One input feature: sum[r][n] += w[r] * x[n].
template <class A, int Rows, int NV>
SK_INLINE void add_feature(typename A::V (*sum)[NV], const typename A::T* w, int64_t step, const typename A::T* x) {
  using S = Simd<typename A::T>;
  typename S::V v[NV];
  SK_UNROLL for (int n = 0; n < NV; ++n) v[n] = S::load(x + n * S::width);
  SK_UNROLL for (int r = 0; r < Rows; ++r) {
    const auto s = A::splat(w + r * step);
    SK_UNROLL for (int n = 0; n < NV; ++n) sum[r][n] = A::add(sum[r][n], s, v[n]);
  }
}

// Rows outputs from `row` of one list, NV vectors of samples. Single: a block spans one input feature.
template <class A, int Rows, int NV, bool Single, class T = typename A::T>
void block_tile(const BsrProduct<T>& a, int64_t list, int64_t row, const T* panel, T* y) {
  using S = Simd<T>;
  using V = typename S::V;
  constexpr int C = kSums<Rows * NV>;
  const int64_t row_step = a.row_step, k_step = a.k_step, x_stride = a.x_stride;
  V sum[C][Rows][NV];
  SK_UNROLL for (int r = 0; r < Rows; ++r) {
    const V start = S::splat(a.bias ? a.bias[list * a.rows + row + r] : T(0));
    SK_UNROLL for (int n = 0; n < NV; ++n) sum[0][r][n] = start;
  }
  SK_UNROLL for (int c = 1; c < C; ++c)
    SK_UNROLL for (int r = 0; r < Rows; ++r)
      SK_UNROLL for (int n = 0; n < NV; ++n) sum[c][r][n] = V{};
  const T* values = a.values + row * row_step;
  const int32_t end = a.end[list];
  // What a block needs is asked for some blocks earlier: scattered places are nothing a prefetcher foresees.
  constexpr int kAhead = Single ? 6 : Rows == 1 ? 4 : 1;
  for (int32_t b = a.begin[list]; b < end; ++b) {
    const int32_t ahead = b + kAhead < end ? b + kAhead : end - 1;
    const T* w = values + int64_t(a.which ? a.which[b] : b) * a.block;
    if constexpr (Single) {
      const T* next = panel + a.index[ahead] * a.index_step;
      SK_UNROLL for (int n = 0; n < NV; n += S::per_line) __builtin_prefetch(next + n * S::width);
      add_feature<A, Rows, NV>(sum[0], w, row_step, panel + a.index[b] * a.index_step);
    } else {
      const int64_t rest = a.depths ? a.depths[b] : a.features - int64_t(a.index[b]) * a.depth;
      const int64_t depth = rest < a.depth ? rest : a.depth;
      const T* x = panel + a.index[b] * a.index_step;
      const T* next = values + int64_t(a.which ? a.which[ahead] : ahead) * a.block;
      if (k_step == 1)
        SK_UNROLL for (int r = 0; r < Rows; ++r) __builtin_prefetch(next + r * row_step);
      else
        for (int64_t k = 0; k < depth; ++k) __builtin_prefetch(next + k * k_step);
      int64_t k = 0;
      for (; k + C <= depth; k += C) {
        SK_UNROLL for (int c = 0; c < C; ++c)
          add_feature<A, Rows, NV>(sum[c], w + (k + c) * k_step, row_step, x + (k + c) * x_stride);
      }
      if constexpr (C > 1)
        for (; k < depth; ++k) add_feature<A, Rows, NV>(sum[0], w + k * k_step, row_step, x + k * x_stride);
    }
  }
  SK_UNROLL for (int r = 0; r < Rows; ++r) {
    SK_UNROLL for (int n = 0; n < NV; ++n) {
      SK_UNROLL for (int half = C / 2; half > 0; half /= 2)
        SK_UNROLL for (int c = 0; c < half; ++c) sum[c][r][n] += sum[c + half][r][n];
      S::store(y + r * a.y_stride + n * S::width, sum[0][r][n]);
    }
  }
}

template <class A, int Rows, int NV, bool Single>
void block_lists(const BsrProduct<typename A::T>& a, int64_t vector) {
  for (int64_t list = 0; list < a.lists; ++list) {
    for (int64_t row = 0; row < a.rows; row += Rows)
      block_tile<A, Rows, NV, Single>(a, list, row, a.panel + vector, a.y + (list * a.rows + row) * a.y_stride + vector);
  }
}

template <class A, int Rows, int NV>
void block_columns(const BsrProduct<typename A::T>& a, int64_t vector) {
  return a.depth == 1 ? block_lists<A, Rows, NV, true>(a, vector) : block_lists<A, Rows, NV, false>(a, vector);
}

// Samples cut into the widest tiles, of even width: 4 vectors become 2 + 2 rather than 3 + 1.
template <class A, int Rows>
void block_product(const BsrProduct<typename A::T>& a) {
  constexpr int W = Simd<typename A::T>::width, widest = kTileVectors<Rows>;
  int left = int(a.width / W);
  for (int tiles = (left + widest - 1) / widest; tiles > 0; --tiles) {
    const int64_t vector = a.width - int64_t(left) * W;
    const int each = (left + tiles - 1) / tiles;
    left -= each;
    switch (each) {
      case 1: block_columns<A, Rows, 1>(a, vector); break;
      case 2: block_columns<A, Rows, 2>(a, vector); break;
      case 3: if constexpr (widest >= 3) block_columns<A, Rows, 3>(a, vector); break;
      case 4: if constexpr (widest >= 4) block_columns<A, Rows, 4>(a, vector); break;
      default: __builtin_trap();
    }
  }
}

// ---- blocks of one input each, transposed ------------------------------------------------------------
// Summed input by input, every weight would meet a line of dy that the L1 cache lacks. So the blocks are walked
// by their outputs instead: dy of one block row stays in L1 while the sums of the inputs it touches come and go.

// M inputs from block b: sum[m][n] += values[b + m][k] * x[k][n].
template <class A, int M, int NV, class T = typename A::T>
SK_INLINE void spread(const BsrProduct<T>& a, int32_t b, const T* x, int64_t depth, int64_t vector) {
  using S = Simd<T>;
  typename S::V sum[M][NV];
  T* y[M];
  SK_UNROLL for (int m = 0; m < M; ++m) y[m] = a.y + a.index[b + m] * a.width + vector;
  SK_UNROLL for (int m = 0; m < M; ++m)
    SK_UNROLL for (int n = 0; n < NV; ++n) sum[m][n] = S::load(y[m] + n * S::width);
  const T* w = a.values + b * a.depth;
  for (int64_t k = 0; k < depth; ++k) add_feature<A, M, NV>(sum, w + k, a.depth, x + k * a.width);
  SK_UNROLL for (int m = 0; m < M; ++m)
    SK_UNROLL for (int n = 0; n < NV; ++n) S::store(y[m] + n * S::width, sum[m][n]);
}

template <class A, int NV, class T = typename A::T>
void block_spread(const BsrProduct<T>& a, int64_t vector) {
  for (int64_t list = 0; list < a.lists; ++list) {
    const int64_t first = list * a.depth, rest = a.features - first, depth = rest < a.depth ? rest : a.depth;
    const T* x = a.panel + first * a.width + vector;
    int32_t b = a.begin[list];
    const int32_t end = a.end[list];
    for (; b + 4 <= end; b += 4) {
      for (int m = 0; m < 4; ++m) {
        const T* next = a.y + a.index[b + 4 + m < end ? b + 4 + m : end - 1] * a.width + vector;
        SK_UNROLL for (int n = 0; n < NV; n += Simd<T>::per_line) __builtin_prefetch(next + n * Simd<T>::width, 1);
      }
      spread<A, 4, NV>(a, b, x, depth, vector);
    }
    for (; b < end; ++b) spread<A, 1, NV>(a, b, x, depth, vector);
  }
}

template <class A>
void block_spread_any(const BsrProduct<typename A::T>& a) {
  constexpr int W = Simd<typename A::T>::width, widest = kTileVectors<4>;
  for (int64_t left = a.width / W; left > 0;) {
    const int64_t vector = a.width - left * W;
    if (widest >= 4 && left >= 4) block_spread<A, widest>(a, vector), left -= 4;
    else if (left >= 2) block_spread<A, 2>(a, vector), left -= 2;
    else block_spread<A, 1>(a, vector), left -= 1;
  }
}

template <class A>
void block_product_any(const BsrProduct<typename A::T>& a) {
  if (a.rows % kTileRows == 0) return block_product<A, kTileRows>(a);
  if (a.rows % 4 == 0) return block_product<A, 4>(a);
  return block_product<A, 1>(a);
}

}  // namespace
}  // namespace sparsekit
