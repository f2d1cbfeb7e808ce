// The gradients of a linear layer's blocks and bias.
#pragma once
#include "bsr_blocks.h"
#include "bsr_pairs.h"

namespace sparsekit {

// A matrix of T with features side by side: the tensor itself, a converted copy, or a copy in which a row holds
// pairs of samples.
template <class T>
struct SampleRows {
  Matrix from, rows;
  bool paired, copied;

  static int64_t copy_size(const Matrix& m, bool paired) {
    return paired ? (m.samples + 1) / 2 * m.features : is_plain(m) ? 0 : m.samples * m.features;
  }
  SampleRows(const Matrix& m, bool paired, T* copy) : from(m), rows(m), paired(paired), copied(paired || !is_plain(m)) {
    if (!copied) return;
    rows.data = reinterpret_cast<char*>(copy);
    rows.storage = kNative;
    rows.bytes = sizeof(T);
    rows.samples = paired ? (m.samples + 1) / 2 : m.samples;
    rows.sample_stride = m.features;
    rows.feature_stride = 1;
  }
  void fill_part(int64_t parts, int64_t part) const {
    const Span span = cut(rows.samples, parts, part);
    if (!copied || span.begin >= span.end) return;
    if (!paired)
      return kernels<T>().load[from.storage]({at(span.begin, 0), rows.sample_stride, from.at(span.begin, 0),
                                              from.sample_stride, from.feature_stride, span.end - span.begin,
                                              from.features});
    const int64_t whole = std::min(span.end, from.samples / 2) - span.begin;
    kernels<T>().interleave(static_cast<const uint16_t*>(from.at(2 * span.begin, 0)), from.sample_stride,
                            2 * from.sample_stride, at(span.begin, 0), whole, from.features);
    if (whole == span.end - span.begin) return;
    const auto* last = static_cast<const uint16_t*>(from.at(from.samples - 1, 0));
    uint32_t* to = reinterpret_cast<uint32_t*>(at(span.end - 1, 0));
    for (int64_t i = 0; i < from.features; ++i) to[i] = last[i];  // a pair with 0
  }
  T* at(int64_t sample, int64_t feature) const { return static_cast<T*>(rows.at(sample, feature)); }

 private:
  static bool is_plain(const Matrix& m) { return m.storage == kNative && m.feature_stride == 1; }
};

// dvalues (+)= dy' x at the blocks of some lists.
template <class T>
struct BlockedSddmm {
  const SampleRows<T>& dy;
  const Panels<T>& x;
  Lists lists;
  Block block;
  bool accumulate;  // dvalues holds the sum over earlier samples
  T* dvalues;

  static constexpr int64_t kChunk = 256, kPad = 16;  // input features at a time; a kernel takes them by kPad

  void run(Span span) const {
    const int64_t outputs = dy.rows.features, lanes = std::min<int64_t>(block.rows, kernels<T>().vector_lanes);
    const int64_t step = std::max<int64_t>(1, kChunk / block.cols);
    int32_t* index = Workspace::mine().get<int32_t>(Workspace::kOffsets, kChunk + kPad);
    T* sums = Workspace::mine().get<T>(Workspace::kTile, (kChunk + 2 * kPad) * lanes + step * block.size());
    T* sum_of_samples = sums + (kChunk + 2 * kPad) * lanes;
    for (int64_t list = span.begin; list < span.end; ++list) {
      for (int64_t b = lists.crow[list]; b < lists.crow[list + 1]; b += step) {
        const int64_t count = std::min<int64_t>(step, lists.crow[list + 1] - b);
        const int64_t inputs = features_of(b, count, index);
        T* to = accumulate ? sum_of_samples : dvalues + b * block.size();
        for (int64_t r = 0; r < block.rows; r += lanes) {
          const int64_t row = list * block.rows + r, there = std::clamp<int64_t>(outputs - row, 0, lanes);
          for (int64_t i = 0; i < x.count && there > 0; ++i) {
            const int64_t sample = i * x.lines * kLanes<T>;
            const int64_t samples = std::min(x.width_of(i), x.samples - sample);
            const auto& k = dy.paired ? kernels<T>().pairs : kernels<T>().numbers;
            k.sddmm({x.panel(i), x.width_of(i), x.width_of(i), samples, dy.at(x.first + sample, row),
                     dy.rows.sample_stride, 1, there, index, inputs, i > 0, sums}, int(lanes));
          }
          clear_absent(b, count, lanes, there, sums);
          store(sums, lanes, count, to + r * block.cols);
        }
        if (accumulate)
          for (int64_t i = 0; i < count * block.size(); ++i) dvalues[b * block.size() + i] += to[i];
      }
    }
  }

 private:
  // The input features of some blocks, as a kernel wants them: what sticks out reads the last feature there is.
  int64_t features_of(int64_t b, int64_t count, int32_t* index) const {
    int64_t n = 0;
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < block.cols; ++c)
        index[n++] = int32_t(std::min(lists.index[b + j] * block.cols + c, x.features - 1));
    while (n % kPad) index[n] = index[n - 1], ++n;
    return n;
  }

  // Only the last block of a list can stick out of the inputs.
  void clear_absent(int64_t b, int64_t count, int64_t lanes, int64_t there, T* sums) const {
    const int64_t inputs = count * block.cols;
    const int64_t beyond = (lists.index[b + count - 1] + 1) * block.cols - x.features;
    if (beyond > 0) std::fill(sums + (inputs - beyond) * lanes, sums + inputs * lanes, T(0));
    if (there < lanes)
      for (int64_t j = 0; j < inputs; ++j) std::fill(sums + j * lanes + there, sums + (j + 1) * lanes, T(0));
  }

  // From [inputs][lanes] to rows of blocks.
  void store(T* sums, int64_t lanes, int64_t count, T* to) const {
    if (block.rows == 1 || (block.cols == 1 && block.rows == lanes))  // as they lie
      return void(std::copy_n(sums, count * block.size(), to));
    if (block.cols == 1) return kernels<T>().store[kNative]({sums, lanes, to, block.rows, 1, count, lanes});
    if (block.size() <= 32) {  // less than a vector transpose costs
      for (int64_t j = 0; j < count; ++j)
        for (int64_t c = 0; c < block.cols; ++c)
          for (int64_t r = 0; r < lanes; ++r)
            to[j * block.size() + r * block.cols + c] = sums[(j * block.cols + c) * lanes + r];
      return;
    }
    for (int64_t j = 0; j < count; ++j)
      kernels<T>().unpack[kNative]({sums + j * block.cols * lanes, lanes, to + j * block.size(), block.cols, 1, lanes,
                                    block.cols});
  }
};

// dbias[f] (+)= sum over samples of dy, in short sums that lose no digits.
template <class T>
void bias_gradient(const SampleRows<T>& dy, int64_t first, int64_t count, Span features, T* dbias) {
  constexpr int64_t kSamples = 64, kFeatures = 256;
  for (int64_t f = features.begin; f < features.end; f += kFeatures) {
    const int64_t width = std::min(kFeatures, features.end - f);
    if (first == 0) std::fill_n(dbias + f, width, T(0));
    for (int64_t s = 0; s < count; s += kSamples) {
      T sum[kFeatures] = {};
      for (int64_t t = s; t < std::min(s + kSamples, count); ++t) {
        const T* row = dy.at(first + t, f);
        for (int64_t i = 0; i < width; ++i) sum[i] += row[i];
      }
      for (int64_t i = 0; i < width; ++i) dbias[f + i] += sum[i];
    }
  }
}

}  // namespace sparsekit
