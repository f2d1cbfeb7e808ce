// Finished sums on their way to planes: something added, activated, a border of zeros beside them.
#pragma once
#include "bsr_activation.h"

namespace sparsekit {
namespace {

template <class T, bool Add, bool Relu>
SK_INLINE void finish_rows(const Finish<T>& f) {
  using S = Simd<T>;
  using V = typename S::V;
  const auto ended = [](V v) __attribute__((always_inline)) {
    if constexpr (Relu) return v < 0 ? V{} : v;
    else return v;
  };
  for (int64_t r = 0; r < f.rows; ++r) {
    const T *from = f.from + r * f.from_step, *add = Add ? f.add + r * f.add_step : nullptr;
    T* to = f.to + r * f.to_step;
    int64_t i = 0;
    for (; i + S::width <= f.count; i += S::width) {
      V v = S::load(from + i);
      if constexpr (Add) v += S::load(add + i);
      S::store(to + i, ended(v));
    }
    if (const int rest = int(f.count - i); rest > 0) {
      V v = load_part<T, Native<T>>(from + i, rest);
      if constexpr (Add) v += load_part<T, Native<T>>(add + i, rest);
      store_part<T, Native<T>>(to + i, ended(v), rest);
    }
    if constexpr (!Relu) activate<T>(to, f.count, f.activation);
    for (i = 0; i < f.gap; ++i) to[f.count + i] = T(0);
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
