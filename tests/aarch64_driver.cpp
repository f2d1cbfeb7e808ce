// The portable micro-kernels against plain loops in double; run by tests/aarch64.py on an emulated aarch64.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "../csrc/cpu/kernels.h"

namespace sparsekit {
extern const Isa isa_portable;
}
using namespace sparsekit;

static int failures = 0;
static uint64_t state = 1;

static double uniform() {  // in [-1, 1)
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return double(int64_t(state >> 11)) / double(1ll << 52) - 1;
}

template <class T>
static std::vector<T> numbers(int64_t count) {
  std::vector<T> found(count);
  for (T& x : found) x = T(uniform());
  return found;
}

static void expect(const char* what, double got, double want, double bound) {
  if (fabs(got - want) <= bound) return;  // NaN fails
  if (failures++ < 20) printf("%s: Expected %.9g, got %.9g\n", what, want, got);
}

// A product and its sampled gradient on rows of 0, 1, ... survivors, for every width of a panel.
template <class T>
static void products(const Kernels<T>& k, double bound) {
  const int rows = 23, features = 37;
  for (int lines = 1; lines <= k.max_lines; ++lines) {
    const int64_t width = int64_t(lines) * kLanes<T>;
    const auto x = numbers<T>(features * width), bias = numbers<T>(rows), dy = numbers<T>(rows * width);
    std::vector<int32_t> begin, end, index;
    for (int r = 0; r < rows; ++r) {
      begin.push_back(int32_t(index.size()));
      for (int f = 0; f < features; ++f)
        if (r == 5 || (f * 7 + r) % (r + 1) == 1) index.push_back(f);
      end.push_back(int32_t(index.size()));
    }
    const auto values = numbers<T>(int64_t(index.size()));
    std::vector<T> y(rows * width, T(NAN)), dv(values.size(), T(NAN)), dot(rows, T(NAN));
    const Product<T> product = {.base = x.data(), .index = index.data(), .index_is_offset = false,
                                .values = values.data(), .begin = begin.data(), .end = end.data(), .rows = rows,
                                .bias = bias.data(), .accumulate = false, .y = y.data(), .y_stride = width};
    k.product(product, lines);
    Product<T> vector = product;
    vector.y = dot.data(), vector.y_stride = 1;
    k.dot(vector);
    const Sddmm<T> sampled = {.base = x.data(), .index = index.data(), .index_is_offset = false, .dy = dy.data(),
                              .dy_stride = width, .begin = begin.data(), .end = end.data(), .rows = rows, .first = 0,
                              .last = int32_t(index.size()), .accumulate = false, .dvalues = dv.data()};
    k.sddmm(sampled, lines);
    for (int r = 0; r < rows; ++r) {
      double sum = bias[r];
      for (int p = begin[r]; p < end[r]; ++p) sum += double(values[p]) * x[index[p]];
      expect("dot", dot[r], sum, bound);
      for (int64_t t = 0; t < width; ++t) {
        double want = bias[r];
        for (int p = begin[r]; p < end[r]; ++p) want += double(values[p]) * x[index[p] * width + t];
        expect("product", y[r * width + t], want, bound);
      }
      for (int p = begin[r]; p < end[r]; ++p) {
        double want = 0;
        for (int64_t t = 0; t < width; ++t) want += double(dy[r * width + t]) * x[index[p] * width + t];
        expect("sddmm", dv[p], want, bound * lines * 4);
      }
    }
  }
}

// Lists of 8 x 4 blocks times a panel.
template <class T>
static void blocks(const Kernels<T>& k, double bound) {
  const int lists = 5, rows = 8, depth = 4, features = 24;
  for (int64_t width = kLanes<T>; width <= kMaxSamples<T>; width += kLanes<T>) {
    const auto panel = numbers<T>(features * width), bias = numbers<T>(lists * rows);
    std::vector<int32_t> begin, end, index;
    for (int r = 0; r < lists; ++r) {
      begin.push_back(int32_t(index.size()));
      for (int c = 0; c < features / depth; ++c)
        if ((r + c) % (r + 1) == 0) index.push_back(c);
      end.push_back(int32_t(index.size()));
    }
    const auto values = numbers<T>(int64_t(index.size()) * rows * depth);
    std::vector<T> y(lists * rows * width, T(NAN));
    const BsrProduct<T> product = {.panel = panel.data(), .features = features, .width = width,
                                   .index_step = depth * width, .x_stride = width, .y_stride = width,
                                   .index = index.data(), .depths = nullptr, .which = nullptr, .values = values.data(), .block = rows * depth, .rows = rows,
                                   .row_step = depth, .depth = depth, .k_step = 1, .begin = begin.data(),
                                   .end = end.data(), .lists = lists, .bias = bias.data(), .y = y.data()};
    k.numbers.product(product);
    for (int l = 0; l < lists; ++l)
      for (int r = 0; r < rows; ++r)
        for (int64_t t = 0; t < width; ++t) {
          double want = bias[l * rows + r];
          for (int b = begin[l]; b < end[l]; ++b)
            for (int c = 0; c < depth; ++c)
              want += double(values[b * rows * depth + r * depth + c]) * panel[(index[b] * depth + c) * width + t];
          expect("block product", y[(l * rows + r) * width + t], want, bound);
        }
  }
}

// Every 16-bit number survives the way to float and back; activations are what they are called.
static void conversions(const Kernels<float>& k) {
  for (int kind : {kBFloat16, kHalf}) {
    std::vector<uint16_t> bits(65536), back(65536);
    std::vector<float> wide(65536);
    for (int i = 0; i < 65536; ++i) bits[i] = uint16_t(i);
    k.load[kind]({wide.data(), 65536, bits.data(), 65536, 1, 1, 65536});
    k.store[kind]({wide.data(), 65536, back.data(), 65536, 1, 1, 65536});
    for (int i = 0; i < 65536; ++i) {
      if (isnan(wide[i])) continue;
      expect(kind == kHalf ? "half" : "bfloat16", back[i], bits[i], 0);
    }
    expect("one", wide[kind == kHalf ? 0x3c00 : 0x3f80], 1, 0);
  }
}

template <class T>
static void activations(const Kernels<T>& k, double bound) {
  for (int which : {kRelu, kGelu, kSilu}) {
    std::vector<T> x(1001), y;
    for (int i = 0; i < 1001; ++i) x[i] = T((i - 500) * 0.02);
    y = x;
    k.activate(y.data(), 1001, Activation(which));
    for (int i = 0; i < 1001; ++i) {
      const double v = x[i];
      const double want = which == kRelu ? fmax(v, 0) : which == kGelu ? v * 0.5 * erfc(-v / sqrt(2.0)) : v / (1 + exp(-v));
      expect("activation", y[i], want, bound);
    }
  }
}

int main() {
  products<float>(isa_portable.f32, 2e-5), products<double>(isa_portable.f64, 4e-14);
  blocks<float>(isa_portable.f32, 2e-5), blocks<double>(isa_portable.f64, 4e-14);
  conversions(isa_portable.f32);
  activations<float>(isa_portable.f32, 2e-6), activations<double>(isa_portable.f64, 1e-14);
  if (failures == 0) printf("ok\n");
  return failures != 0;
}
