// Finished sums on their way to planes: something added, activated, a border of zeros beside them.
#pragma once
#include "bsr_activation.h"

namespace sparsekit {
namespace {

template <class T>
SK_INLINE void zeros(T* to, int64_t count) {
  using S = Simd<T>;
  int64_t i = 0;
  for (; i + S::width <= count; i += S::width) S::store(to + i, typename S::V{});
  if (i < count) store_part<T, Native<T>>(to + i, typename S::V{}, int(count - i));
}

template <class T, bool Add, bool Relu>
SK_INLINE void finish_row(const T* from, const T* add, T* to, const Finish<T>& f) {
  using S = Simd<T>;
  using V = typename S::V;
  const auto ended = [](V v) __attribute__((always_inline)) {
    if constexpr (Relu) return v < 0 ? V{} : v;
    else return v;
  };
  int64_t i = 0;
  for (; i + S::width <= f.count; i += S::width) {
    V v = S::load(from + i);
    if constexpr (Add) v += S::load(add + i);
    S::store(to + i, ended(v));
  }
  int64_t gap = f.gap;
  if (const int rest = int(f.count - i); rest > 0) {
    V v = load_part<T, Native<T>>(from + i, rest);  // and zeros, which may be part of the gap
    if constexpr (Add) v += load_part<T, Native<T>>(add + i, rest);
    const int64_t more = gap < S::width - rest ? gap : S::width - rest;
    store_part<T, Native<T>>(to + i, ended(v), int(rest + more));
    gap -= more;
  }
  if constexpr (!Relu) activate<T>(to, f.count, f.activation);
  if (gap > 0) zeros<T>(to + f.count + f.gap - gap, gap);
}

template <class T, bool Add, bool Relu>
SK_INLINE void finish_rows(const Finish<T>& f) {
  for (int64_t c = 0; c < f.channels; ++c) {
    const T *from = f.from + c * f.from_step.channel, *add = Add ? f.add + c * f.add_step.channel : nullptr;
    T* to = f.to + c * f.to_step.channel;
    zeros<T>(to - f.before, f.before);
    for (int64_t r = 0; r < f.rows; ++r)
      finish_row<T, Add, Relu>(from + r * f.from_step.row, Add ? add + r * f.add_step.row : nullptr,
                               to + r * f.to_step.row, f);
    zeros<T>(to + (f.rows - 1) * f.to_step.row + f.count + f.gap, f.after);
  }
}

template <class T>
void finish(const Finish<T>& f) {
  const bool relu = f.activation == kRelu;
  if (f.add != nullptr) return relu ? finish_rows<T, true, true>(f) : finish_rows<T, true, false>(f);
  return relu ? finish_rows<T, false, true>(f) : finish_rows<T, false, false>(f);
}

}  // namespace
}  // namespace sparsekit
