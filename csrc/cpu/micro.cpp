// The micro-kernels. Compiled once per instruction set; SPARSEKIT_ISA_TABLE names the table it exports.
#include "simd.h"

namespace sparsekit {
namespace {

// Chains of dependent FMAs must be long enough in number to hide their latency: a narrow product keeps
// several partial sums per output, survivor p going to chain p % kChains.
template <int NV>
constexpr int kChains = NV >= 6 ? 1 : NV >= 3 ? 2 : 4;

template <class T, int NV, bool Offset>
SK_INLINE const T* operand(const T* base, int32_t index) {
  if constexpr (Offset) return base + index;
  return base + int64_t(index) * (NV * Simd<T>::width);
}

template <class T, int NV, bool Offset>
void product(const Product<T>& a) {
  using S = Simd<T>;
  using V = typename S::V;
  constexpr int C = kChains<NV>;
  const T* base = a.base;
  const T* values = a.values;
  const int32_t* index = a.index;
  for (int64_t r = 0; r < a.rows; ++r) {
    int32_t p = a.begin[r];
    const int32_t end = a.end[r];
    if (a.accumulate && p == end) continue;
    T* y = a.y + r * a.y_stride;
    V sum[C][NV];
    if (a.accumulate) {
      SK_UNROLL for (int n = 0; n < NV; ++n) sum[0][n] = S::load(y + n * S::width);
    } else {
      const V start = S::splat(a.bias ? a.bias[r] : T(0));
      SK_UNROLL for (int n = 0; n < NV; ++n) sum[0][n] = start;
    }
    SK_UNROLL for (int c = 1; c < C; ++c) SK_UNROLL for (int n = 0; n < NV; ++n) sum[c][n] = V{};
    for (; p + C <= end; p += C) {
      SK_UNROLL for (int c = 0; c < C; ++c) {
        const V v = S::splat(values[p + c]);
        const T* x = operand<T, NV, Offset>(base, index[p + c]);
        SK_UNROLL for (int n = 0; n < NV; ++n) sum[c][n] += v * S::load(x + n * S::width);
      }
    }
    for (; p < end; ++p) {
      const V v = S::splat(values[p]);
      const T* x = operand<T, NV, Offset>(base, index[p]);
      SK_UNROLL for (int n = 0; n < NV; ++n) sum[0][n] += v * S::load(x + n * S::width);
    }
    SK_UNROLL for (int n = 0; n < NV; ++n) {
      if constexpr (C == 2) sum[0][n] += sum[1][n];
      if constexpr (C == 4) sum[0][n] = (sum[0][n] + sum[1][n]) + (sum[2][n] + sum[3][n]);
      S::store(y + n * S::width, sum[0][n]);
    }
  }
}

// A dy row stays in registers; `width` survivors at a time are finished by one transposing reduction.
template <class T, int NV, bool Offset>
void sddmm(const Sddmm<T>& a) {
  using S = Simd<T>;
  using V = typename S::V;
  constexpr int W = S::width;
  const T* base = a.base;
  const int32_t* index = a.index;
  for (int64_t r = 0; r < a.rows; ++r) {
    int32_t p = a.begin[r] > a.first ? a.begin[r] : a.first;
    const int32_t end = a.end[r] < a.last ? a.end[r] : a.last;
    if (p >= end) continue;
    V dy[NV];
    SK_UNROLL for (int n = 0; n < NV; ++n) dy[n] = S::load(a.dy + r * a.dy_stride + n * W);
    const auto dot = [&](int32_t q) __attribute__((always_inline)) {
      const T* x = operand<T, NV, Offset>(base, index[q]);
      V sum = dy[0] * S::load(x);
      SK_UNROLL for (int n = 1; n < NV; ++n) sum += dy[n] * S::load(x + n * W);
      return sum;
    };
    for (; p + W <= end; p += W) {
      V sum[W];
      SK_UNROLL for (int j = 0; j < W; ++j) sum[j] = dot(p + j);
      V total = sum_each<T>(sum);
      if (a.accumulate) total += S::load(a.dvalues + p);
      S::store(a.dvalues + p, total);
    }
    for (; p < end; ++p) {  // same additions in the same order: a result never depends on its neighbours
      const T total = sum_one<T>(dot(p));
      a.dvalues[p] = a.accumulate ? total + a.dvalues[p] : total;
    }
  }
}

template <class T>
void dot(const Product<T>& a) {
  const T* x = a.base;
  for (int64_t r = 0; r < a.rows; ++r) {
    int32_t p = a.begin[r];
    const int32_t end = a.end[r];
    T sum[4] = {a.bias ? a.bias[r] : T(0), 0, 0, 0};
    for (; p + 4 <= end; p += 4) {
      sum[0] += a.values[p] * x[a.index[p]];
      sum[1] += a.values[p + 1] * x[a.index[p + 1]];
      sum[2] += a.values[p + 2] * x[a.index[p + 2]];
      sum[3] += a.values[p + 3] * x[a.index[p + 3]];
    }
    for (; p < end; ++p) sum[0] += a.values[p] * x[a.index[p]];
    a.y[r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
}

void advance(const int32_t* index, int32_t total, const int32_t* cursor, const int32_t* end,
             int32_t* cursor_out, int64_t rows, int32_t limit) {
  for (int64_t r = 0; r < rows; ++r) {
    int32_t p = cursor[r];
    const int32_t e = end[r];
    // Indices ascend within a row, so counting the small ones in a window finds the boundary.
    while (p < e) {
      if (p + 16 > total) {
        while (p < e && index[p] < limit) ++p;
        break;
      }
      int32_t below = 0;
      for (int i = 0; i < 16; ++i) below += (p + i < e) & (index[p + i] < limit);
      p += below;
      if (below < 16) break;
    }
    cursor_out[r] = p;
  }
}

template <class T>
T sum(const T* from, int64_t count) {
  using S = Simd<T>;
  typename S::V part[4] = {};
  int64_t i = 0;
  for (; i + 4 * S::width <= count; i += 4 * S::width)
    SK_UNROLL for (int n = 0; n < 4; ++n) part[n] += S::load(from + i + n * S::width);
  T total = sum_one<T>((part[0] + part[1]) + (part[2] + part[3]));
  for (; i < count; ++i) total += from[i];
  return total;
}

// ---- moving data between tensors and packed lines ---------------------------------------------------

template <class T, class St>
void pack(const Transfer<T>& t) {
  using S = Simd<T>;
  using E = typename St::Element;
  constexpr int W = S::width;
  const E* tensor = static_cast<const E*>(t.tensor);
  for (int64_t g = 0; g < kLanes<T>; g += W) {
    const int lanes = int(t.lanes - g < 0 ? 0 : t.lanes - g < W ? t.lanes - g : W);
    const E* from = tensor + g * t.lane_stride;
    T* to = t.packed + g;
    if (t.step == 1) {
      typename S::V row[W];
      int64_t j = 0;
      for (; j + W <= t.count; j += W) {
        if (lanes == W) {
          SK_UNROLL for (int i = 0; i < W; ++i) row[i] = St::load(from + i * t.lane_stride + j);
        } else {
          SK_UNROLL for (int i = 0; i < W; ++i)
            row[i] = i < lanes ? St::load(from + i * t.lane_stride + j) : typename S::V{};
        }
        transpose<T>(row);
        SK_UNROLL for (int i = 0; i < W; ++i) S::store(to + (j + i) * t.packed_stride, row[i]);
      }
      if (j < t.count) {
        const int rest = int(t.count - j);
        SK_UNROLL for (int i = 0; i < W; ++i)
          row[i] = i < lanes ? load_part<T, St>(from + i * t.lane_stride + j, rest) : typename S::V{};
        transpose<T>(row);
        SK_UNROLL for (int i = 0; i < W; ++i)
          if (i < rest) S::store(to + (j + i) * t.packed_stride, row[i]);
      }
    } else if (t.lane_stride == 1) {
      for (int64_t j = 0; j < t.count; ++j) {
        const E* x = from + j * t.step;
        S::store(to + j * t.packed_stride, lanes == W ? St::load(x) : load_part<T, St>(x, lanes));
      }
    } else {
      for (int64_t j = 0; j < t.count; ++j)
        for (int i = 0; i < W; ++i)
          to[j * t.packed_stride + i] =
              i < lanes ? St::get(from[i * t.lane_stride + j * t.step]) : T(0);
    }
  }
}

template <class T, class St>
void unpack(const Transfer<T>& t) {
  using S = Simd<T>;
  using E = typename St::Element;
  constexpr int W = S::width;
  E* tensor = static_cast<E*>(t.tensor);
  for (int64_t g = 0; g < t.lanes; g += W) {
    const int lanes = int(t.lanes - g < W ? t.lanes - g : W);
    const T* from = t.packed + g;
    E* to = tensor + g * t.lane_stride;
    if (t.step == 1) {
      typename S::V row[W];
      for (int64_t j = 0; j < t.count; j += W) {
        const int rest = int(t.count - j);
        if (rest >= W) {
          SK_UNROLL for (int i = 0; i < W; ++i) row[i] = S::load(from + (j + i) * t.packed_stride);
          transpose<T>(row);
          SK_UNROLL for (int i = 0; i < W; ++i)
            if (i < lanes) St::store(to + i * t.lane_stride + j, row[i]);
        } else {
          SK_UNROLL for (int i = 0; i < W; ++i)
            row[i] = i < rest ? S::load(from + (j + i) * t.packed_stride) : typename S::V{};
          transpose<T>(row);
          SK_UNROLL for (int i = 0; i < W; ++i)
            if (i < lanes) store_part<T, St>(to + i * t.lane_stride + j, row[i], rest);
        }
      }
    } else {
      for (int64_t j = 0; j < t.count; ++j)
        for (int i = 0; i < lanes; ++i)
          to[i * t.lane_stride + j * t.step] = St::put(from[j * t.packed_stride + i]);
    }
  }
}

template <class T, class St>
void load(T* to, const void* tensor, int64_t step, int64_t count) {
  const auto* from = static_cast<const typename St::Element*>(tensor);
  int64_t i = 0;
  if (step == 1)
    for (; i + Simd<T>::width <= count; i += Simd<T>::width) Simd<T>::store(to + i, St::load(from + i));
  for (; i < count; ++i) to[i] = St::get(from[i * step]);
}

template <class T, class St>
void store(void* tensor, int64_t step, const T* from, int64_t count) {
  auto* to = static_cast<typename St::Element*>(tensor);
  int64_t i = 0;
  if (step == 1)
    for (; i + Simd<T>::width <= count; i += Simd<T>::width) St::store(to + i, Simd<T>::load(from + i));
  for (; i < count; ++i) to[i * step] = St::put(from[i]);
}

template <class T, class St>
void gather(T* to, const void* tensor, const int32_t* which, int64_t count) {
  const auto* from = static_cast<const typename St::Element*>(tensor);
  for (int64_t i = 0; i < count; ++i) to[i] = St::get(from[which[i]]);
}

// ---- the table --------------------------------------------------------------------------------------

template <class T>
constexpr int kMaxVectors = 8;

// Calls f<NV> with NV = the vectors in `lines` lines.
#define SK_BY_WIDTH(kernel, args)                                                \
  switch (lines * Simd<T>::per_line) {                                           \
    case 1: return args.index_is_offset ? kernel<T, 1, true>(args) : kernel<T, 1, false>(args); \
    case 2: return args.index_is_offset ? kernel<T, 2, true>(args) : kernel<T, 2, false>(args); \
    case 3: return args.index_is_offset ? kernel<T, 3, true>(args) : kernel<T, 3, false>(args); \
    case 4: return args.index_is_offset ? kernel<T, 4, true>(args) : kernel<T, 4, false>(args); \
    case 5: return args.index_is_offset ? kernel<T, 5, true>(args) : kernel<T, 5, false>(args); \
    case 6: return args.index_is_offset ? kernel<T, 6, true>(args) : kernel<T, 6, false>(args); \
    case 7: return args.index_is_offset ? kernel<T, 7, true>(args) : kernel<T, 7, false>(args); \
    case 8: return args.index_is_offset ? kernel<T, 8, true>(args) : kernel<T, 8, false>(args); \
    default: __builtin_trap();                                                   \
  }

template <class T>
void product_any(const Product<T>& args, int lines) {
  SK_BY_WIDTH(product, args)
}

template <class T>
void sddmm_any(const Sddmm<T>& args, int lines) {
  SK_BY_WIDTH(sddmm, args)
}

template <class T, class A, class B, class C>
constexpr Kernels<T> table() {
  constexpr int widest = kMaxVectors<T> / Simd<T>::per_line;
  return {widest,
          widest < 4 ? widest : 4,
          product_any<T>,
          sddmm_any<T>,
          dot<T>,
          advance,
          sum<T>,
          {pack<T, A>, pack<T, B>, pack<T, C>},
          {unpack<T, A>, unpack<T, B>, unpack<T, C>},
          {load<T, A>, load<T, B>, load<T, C>},
          {store<T, A>, store<T, B>, store<T, C>},
          {gather<T, A>, gather<T, B>, gather<T, C>}};
}

}  // namespace

#define SK_STRING2(x) #x
#define SK_STRING(x) SK_STRING2(x)
#define SK_CONCAT2(a, b) a##b
#define SK_CONCAT(a, b) SK_CONCAT2(a, b)

extern const Isa SK_CONCAT(isa_, SPARSEKIT_ISA_TABLE);
const Isa SK_CONCAT(isa_, SPARSEKIT_ISA_TABLE) = {
    SK_STRING(SPARSEKIT_ISA_TABLE),
    table<float, Native<float>, BFloat16, Half>(),
    table<double, Native<double>, Native<double>, Native<double>>(),
};

}  // namespace sparsekit
