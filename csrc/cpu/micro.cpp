// The micro-kernels. Compiled once per instruction set; SPARSEKIT_ISA_TABLE names the table it exports.
#include "bsr_activation.h"
#include "bsr_columns.h"
#include "bsr_product.h"
#include "bsr_sddmm.h"
#include "bsr_vector.h"
#include "dense_product.h"
#include "finish.h"
#include "lanes_product.h"
#include "pool_row.h"
#include "simd.h"

namespace sparsekit {
namespace {

// Chains of dependent FMAs must be long enough in number to hide their latency: a narrow product keeps
// several partial sums per output, survivor p going to chain p % kChains.
template <int NV>
constexpr int kChains = NV >= 6 ? 1 : NV >= 2 ? 2 : 4;

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

template <int N>
struct Constant {
  static constexpr int value = N;
};

// A dy row stays in registers; `width` survivors at a time are finished by one transposing reduction, what is left of
// a row by smaller ones: always the same additions in the same order, so that a result never depends on its neighbours.
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
    const auto few = [&](auto count) __attribute__((always_inline)) {
      constexpr int K = decltype(count)::value;
      if constexpr (K < W) {
        if (p + K > end) return;
        V sum[K];
        SK_UNROLL for (int j = 0; j < K; ++j) sum[j] = dot(p + j);
        V total = sum_few<T, K>(sum);
        if (a.accumulate) total += load_part<T, Native<T>>(a.dvalues + p, K);
        store_part<T, Native<T>>(a.dvalues + p, total, K);
        p += K;
      }
    };
    few(Constant<8>{});
    few(Constant<4>{});
    for (; p < end; ++p) {
      const T total = sum_one<T>(dot(p));
      a.dvalues[p] = a.accumulate ? total + a.dvalues[p] : total;
    }
  }
}

// Four activations at a time are loaded one by one into a vector: that takes fewer loads than scalar products, and a
// gather instruction is no faster than its loads. gcc must not try to vectorise the rest, it shuffles itself to a halt.
template <class T>
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-vectorize", "no-tree-slp-vectorize")))
#endif
void dot(const Product<T>& a) {
  typedef T V __attribute__((vector_size(4 * sizeof(T))));
  typedef T U __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  const T* x = a.base;
  const T* values = a.values;
  const int32_t* index = a.index;
  for (int64_t r = 0; r < a.rows; ++r) {
    int32_t p = a.begin[r];
    const int32_t end = a.end[r];
    V s0 = {}, s1 = {}, s2 = {}, s3 = {};
    const auto add = [&](V& sum, int32_t q) __attribute__((always_inline)) {
      const V four = {x[index[q]], x[index[q + 1]], x[index[q + 2]], x[index[q + 3]]};
      sum += *reinterpret_cast<const U*>(values + q) * four;
    };
    for (; p + 16 <= end; p += 16) {
      add(s0, p);
      add(s1, p + 4);
      add(s2, p + 8);
      add(s3, p + 12);
    }
    if (p + 8 <= end) {
      add(s0, p);
      add(s1, p + 4);
      p += 8;
    }
    if (p + 4 <= end) {
      add(s2, p);
      p += 4;
    }
    T total = a.bias ? a.bias[r] : T(0);
    for (; p < end; ++p) total += values[p] * x[index[p]];
    const V sum = (s0 + s1) + (s2 + s3);
    a.y[r] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + total;
  }
}

// How many of the 16 ascending integers at p are below limit.
SK_INLINE int32_t count_below(const int32_t* p, int32_t limit) {
#if defined(__AVX512F__)
  return __builtin_popcount(_mm512_cmplt_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(limit)));
#else
  int32_t below = 0;
  for (int i = 0; i < 16; ++i) below += p[i] < limit;
  return below;
#endif
}

void advance(const int32_t* index, const int32_t* cursor, const int32_t* end, int32_t* cursor_out, int64_t rows,
             int32_t first, int32_t limit, int32_t last) {
  // Survivors are spread nearly evenly, so the boundary is near cursor + share * rest: look there first.
  const float share = float(limit - first) / float(last - first > 0 ? last - first : 1);
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t begin = cursor[r], e = end[r];
    int32_t p = begin + int32_t(float(e - begin) * share) - 8;
    p = p < begin ? begin : p;
    if (p + 16 <= e) {
      const int32_t below = count_below(index + p, limit);
      if (below > 0 && below < 16) {
        cursor_out[r] = p + below;
        continue;
      }
      if (below == 16) p += 16;
    }
    while (p > begin && index[p - 1] >= limit) --p;
    while (p < e && index[p] < limit) ++p;
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

// How elements of a tensor are read as T.
template <class T, class St>
struct Reader {
  using E = typename St::Element;
  explicit Reader(int64_t) {}
  SK_INLINE T get(const E* p) const { return St::get(*p); }
  SK_INLINE typename Simd<T>::V load(const E* p) const { return St::load(p); }
  SK_INLINE typename Simd<T>::V load_part(const E* p, int count) const {
    return sparsekit::load_part<T, St>(p, count);
  }
};

// Storage kPairs.
struct Apart {
  using Element = uint16_t;
};

template <>
struct Reader<float, Apart> {
  using S = Simd<float>;
  int64_t second;

  explicit Reader(int64_t second) : second(second) {}
  SK_INLINE float get(const uint16_t* p) const { return from_bits(uint32_t(p[0]) | uint32_t(p[second]) << 16); }
  SK_INLINE S::V load(const uint16_t* p) const { return load_part(p, S::width); }
  SK_INLINE S::V load_part(const uint16_t* p, int count) const {
#if defined(__AVX512F__)
    const __mmask16 there = __mmask16((1u << count) - 1);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, p));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, p + second));
    return (S::V)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
    float buffer[S::width] = {};
    for (int i = 0; i < count; ++i) buffer[i] = get(p + i);
    return S::load(buffer);
#endif
  }
};

template <class T, class St>
void pack(const Transfer<T>& t) {
  using S = Simd<T>;
  using E = typename St::Element;
  constexpr int W = S::width;
  const E* tensor = static_cast<const E*>(t.tensor);
  const Reader<T, St> in(t.second);
  for (int64_t g = 0; g < kLanes<T>; g += W) {
    const int lanes = int(t.lanes - g < 0 ? 0 : t.lanes - g < W ? t.lanes - g : W);
    const E* from = tensor + g * t.lane_stride;
    T* to = t.packed + g;
    if (t.step == 1) {
      typename S::V row[W];
      int64_t j = 0;
      for (; j + W <= t.count; j += W) {
        if (lanes == W) {
          SK_UNROLL for (int i = 0; i < W; ++i) row[i] = in.load(from + i * t.lane_stride + j);
        } else {
          SK_UNROLL for (int i = 0; i < W; ++i)
            row[i] = i < lanes ? in.load(from + i * t.lane_stride + j) : typename S::V{};
        }
        transpose<T>(row);
        SK_UNROLL for (int i = 0; i < W; ++i) S::store(to + (j + i) * t.packed_stride, row[i]);
      }
      if (j < t.count) {
        const int rest = int(t.count - j);
        SK_UNROLL for (int i = 0; i < W; ++i)
          row[i] = i < lanes ? in.load_part(from + i * t.lane_stride + j, rest) : typename S::V{};
        transpose<T>(row);
        SK_UNROLL for (int i = 0; i < W; ++i)
          if (i < rest) S::store(to + (j + i) * t.packed_stride, row[i]);
      }
    } else if (t.lane_stride == 1) {
      for (int64_t j = 0; j < t.count; ++j) {
        const E* x = from + j * t.step;
        S::store(to + j * t.packed_stride, lanes == W ? in.load(x) : in.load_part(x, lanes));
      }
    } else {
      for (int64_t j = 0; j < t.count; ++j)
        for (int i = 0; i < W; ++i)
          to[j * t.packed_stride + i] =
              i < lanes ? in.get(from + i * t.lane_stride + j * t.step) : T(0);
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

// to[i] = from[2 * i] for as many as whole vectors hold; the number of them.
template <class T>
int64_t load_halves(T* to, const T* from, int64_t count) {
  using S = Simd<T>;
  constexpr int W = S::width;
  using Lanes = typename MakeSeq<W>::type;
  int64_t i = 0;
  for (; i + W < count; i += W)  // not the last ones: the second vector ends past them
    S::store(to + i, shuffle<Runs<1, 0>>(S::load(from + 2 * i), S::load(from + 2 * i + W), Lanes{}));
  if (const int rest = int(2 * (count - i) - 1); rest > 0) {
    const int first = rest < W ? rest : W;
    const auto a = load_part<T, Native<T>>(from + 2 * i, first);
    const auto b = load_part<T, Native<T>>(from + 2 * i + first, rest - first);
    store_part<T, Native<T>>(to + i, shuffle<Runs<1, 0>>(a, b, Lanes{}), int(count - i));
  }
  return count;
}

template <class T, class St>
void add(void* y, const void* x, int64_t step, int64_t count) {
  using S = Simd<T>;
  using E = typename St::Element;
  E* to = static_cast<E*>(y);
  const E* from = static_cast<const E*>(x);
  int64_t i = 0;
  if (step == 1)
    for (; i + S::width <= count; i += S::width) St::store(to + i, St::load(to + i) + St::load(from + i));
  for (; i < count; ++i) to[i] = St::put(St::get(to[i]) + St::get(from[i * step]));
}

template <class T, class St>
void load(const Rows<T>& t) {
  using S = Simd<T>;
  const Reader<T, St> in(t.second);
  for (int64_t r = 0; r < t.rows; ++r) {
    const auto* from = static_cast<const typename St::Element*>(t.tensor) + r * t.row_stride;
    T* to = t.packed + r * t.packed_stride;
    int64_t i = 0;
    if (t.step == 1) {
      for (; i + S::width <= t.count; i += S::width) S::store(to + i, in.load(from + i));
      if (i < t.count) store_part<T, Native<T>>(to + i, in.load_part(from + i, int(t.count - i)), int(t.count - i));
    } else {
      if constexpr (sizeof(*from) == sizeof(T))
        if (t.step == 2) i = load_halves<T>(to, from, t.count);
      for (; i < t.count; ++i) to[i] = in.get(from + i * t.step);
    }
  }
}

template <class T, class St>
void store(const Rows<T>& t) {
  using S = Simd<T>;
  for (int64_t r = 0; r < t.rows; ++r) {
    auto* to = static_cast<typename St::Element*>(t.tensor) + r * t.row_stride;
    const T* from = t.packed + r * t.packed_stride;
    int64_t i = 0;
    if (t.step == 1) {
      for (; i + S::width <= t.count; i += S::width) St::store(to + i, S::load(from + i));
      if (i < t.count) store_part<T, St>(to + i, load_part<T, Native<T>>(from + i, int(t.count - i)), int(t.count - i));
    } else {
      for (; i < t.count; ++i) to[i * t.step] = St::put(from[i]);
    }
  }
}

template <class T, class St>
void gather(T* to, const void* tensor, const int32_t* which, int64_t count) {
  const auto* from = static_cast<const typename St::Element*>(tensor);
  for (int64_t i = 0; i < count; ++i) to[i] = St::get(from[which[i]]);
}

void interleave(const uint16_t* from, int64_t second, int64_t step, void* to, int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* p = from + r * step;
    uint32_t* pairs = static_cast<uint32_t*>(to) + r * count;
    for (int64_t i = 0; i < count; ++i) pairs[i] = uint32_t(p[i]) | uint32_t(p[i + second]) << 16;
  }
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

template <class T>
constexpr BlockKernels<T> pair_kernels() {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 4)
    return {block_product_any<Pairs>, block_spread_any<Pairs>, block_sddmm_any<Pairs>, block_columns_of_pairs};
#endif
  return {};
}

template <class T, class A, class B, class C, class D>
constexpr Kernels<T> table() {
  constexpr int widest = kMaxVectors<T> / Simd<T>::per_line;
  return {widest,
          widest < 4 ? widest : 4,
          widest == 8 ? 2 : widest,
          product_any<T>,
          sddmm_any<T>,
          dot<T>,
          advance,
          sum<T>,
          {block_product_any<Numbers<T>>, block_spread_any<Numbers<T>>, block_sddmm_any<Numbers<T>>, nullptr},
          pair_kernels<T>(),
          block_vector<T>,
          Simd<T>::width,
          interleave,
          activate<T>,
          finish<T>,
          pool<T>,
          pool_lines<T>,
          pool_pairs<T>,
          {pack<T, A>, pack<T, B>, pack<T, C>, pack<T, D>},
          {unpack<T, A>, unpack<T, B>, unpack<T, C>},
          {load<T, A>, load<T, B>, load<T, C>, load<T, D>},
          {store<T, A>, store<T, B>, store<T, C>},
          {add<T, A>, add<T, B>, add<T, C>},
          {gather<T, A>, gather<T, B>, gather<T, C>},
          masked_product<T>,
          clear_pruned<T>};
}

}  // namespace

#define SK_STRING2(x) #x
#define SK_STRING(x) SK_STRING2(x)
#define SK_CONCAT2(a, b) a##b
#define SK_CONCAT(a, b) SK_CONCAT2(a, b)

extern const Isa SK_CONCAT(isa_, SPARSEKIT_ISA_TABLE);
const Isa SK_CONCAT(isa_, SPARSEKIT_ISA_TABLE) = {
    SK_STRING(SPARSEKIT_ISA_TABLE),
    table<float, Native<float>, BFloat16, Half, Apart>(),
    table<double, Native<double>, Native<double>, Native<double>, Native<double>>(),
    {lanes_product<Native<float>>, lanes_product<BFloat16>, lanes_product<Half>, lanes_product<Int8>},
};

}  // namespace sparsekit
