// The products of a linear layer in blocks: y of packed activations, dx of packed gradients.
#pragma once
#include "bsr_blocks.h"
#include "bsr_pairs.h"

namespace sparsekit {

constexpr int64_t kOutputs = 64;  // outputs that are finished before they move to their tensor

// How activations are read: as numbers, or two features or two samples of bfloat16 as one float.
enum Reads { kNumbers, kPairsOfFeatures, kPairsOfSamples };

// The blocks in one direction: forward by outputs, or transposed by inputs.
template <class T>
struct Direction {
  const BlockKernels<T>* kernels;
  Reads reads;
  Lists lists;
  const int32_t* which;
  const T* values;
  int64_t block, rows, row_step, depth, k_step;
  int64_t outputs, features;

  static Direction forward(const Lists& lists, const Tensor& values, Block b, int64_t outputs, const Matrix& x) {
    if constexpr (sizeof(T) == 4) {
      const T* pairs = static_cast<const T*>(values.const_data_ptr());
      if (b.cols % 2 == 0 && features_pair(x, values))
        return {&sparsekit::kernels<T>().pairs, kPairsOfFeatures, lists, nullptr, pairs, b.size() / 2, b.rows,
                b.cols / 2, b.cols / 2, 1, outputs, x.features / 2};
      // Few samples would leave lanes idle.
      if (x.samples > kLanes<T> && pairs_in_columns(x.storage, x.samples, b.rows, b.cols))
        return {&sparsekit::kernels<T>().pairs, kPairsOfSamples, lists, nullptr, pairs, b.size(), b.rows, 1, 1, 1,
                outputs, x.features};
    }
    return {&sparsekit::kernels<T>().numbers, kNumbers, lists, nullptr, values_as<T>(values), b.size(), b.rows, b.cols,
            b.cols, 1, outputs, x.features};
  }
  static Direction transposed(const Lists& lists, const int32_t* which, const Tensor& values, Block b, int64_t outputs,
                              const Matrix& dy) {
    if constexpr (sizeof(T) == 4)
      if (b.rows % 2 == 0 && features_pair(dy, values)) {
        const bool in_pairs = b.cols == 1;  // as they lie
        const T* v = in_pairs ? static_cast<const T*>(values.const_data_ptr()) : pairs_of_outputs(values);
        return {&sparsekit::kernels<T>().pairs, kPairsOfFeatures, lists, which, v, b.size() / 2, b.cols, 1, b.rows / 2,
                b.cols, outputs, dy.features / 2};
      }
    return {&sparsekit::kernels<T>().numbers, kNumbers, lists, which, values_as<T>(values), b.size(), b.cols, 1, b.rows,
            b.cols, outputs, dy.features};
  }
  Matrix operand(const Matrix& x) const {
    return reads == kPairsOfFeatures ? pairs_of_features(x) : reads == kPairsOfSamples ? pairs_of_samples(x) : x;
  }
  // Samples in a lane.
  int64_t fold() const { return reads == kPairsOfSamples ? 2 : 1; }
  BsrProduct<T> product(const T* panel, int64_t width) const {
    BsrProduct<T> p{};
    p.panel = panel, p.features = features, p.width = p.x_stride = width, p.index_step = depth * width;
    p.y_stride = fold() * width, p.odd = width;
    p.index = lists.index, p.which = which, p.values = values, p.block = block;
    p.rows = rows, p.row_step = row_step, p.depth = depth, p.k_step = k_step;
    return p;
  }
  int64_t weights() const { return lists.nnz * block; }
  // Lists whose outputs fill whole cache lines.
  int64_t unit() const { return std::max<int64_t>(1, kLanes<T> / rows); }
};

// What happens to a finished sum. `bias` holds an entry for every output of every list, also of absent ones.
template <class T>
struct Epilogue {
  const T* bias = nullptr;
  Activation activation = kNone;
};

// y[samples, outputs] for one panel and the lists of a span.
template <class T>
struct BlockedProduct {
  const Panels<T>& panels;
  const Direction<T>& blocks;
  Epilogue<T> epilogue;
  Matrix y;

  void run(int64_t i, Span lists) const {
    if (lists.begin >= lists.end) return;
    const int32_t* crow = blocks.lists.crow;
    const int64_t width = panels.width_of(i), step = std::max<int64_t>(1, kOutputs / blocks.rows);
    const int64_t fold = blocks.fold(), stride = fold * width;
    T* result = Workspace::mine().get<T>(Workspace::kTile, step * blocks.rows * stride);
    BsrProduct<T> p = blocks.product(panels.panel(i), width);
    const auto kernel = fold == 2 ? blocks.kernels->columns : blocks.kernels->product;
    p.y = result;
    for (int64_t l = lists.begin; l < lists.end; l += step) {
      const int64_t first = l * blocks.rows;
      p.lists = std::min(step, lists.end - l);
      p.bias = epilogue.bias ? epilogue.bias + first : nullptr;
      p.begin = crow + l;
      p.end = crow + l + 1;
      kernel(p);
      const int64_t count = std::min(p.lists * blocks.rows, blocks.outputs - first);
      if (epilogue.activation != kNone) kernels<T>().activate(result, count * stride, epilogue.activation);
      panels.each_line(i, [&](int64_t sample, int64_t line, int64_t lanes) {
        for (int64_t half = 0; half < fold; ++half)
          kernels<T>().unpack[y.storage]({result + half * width + line * kLanes<T>, stride,
                                          y.at(fold * sample + half, first), fold * y.sample_stride, y.feature_stride,
                                          lanes, count});
      });
    }
  }

  // This part's share: whole panels when they divide evenly, else a share of the lists of every panel.
  void run_part(int64_t parts, int64_t part) const {
    const int64_t splits = panels.count % parts == 0 ? 1 : parts;
    const Span items = cut(panels.count * splits, parts, part);
    for (int64_t item = items.begin; item < items.end; ++item)
      run(item / splits, cut_rows(blocks.lists.crow, blocks.lists.rows, splits, item % splits, blocks.unit()));
  }
};

// dx[samples, inputs] for blocks of one input each, by way of the forward lists; see block_spread.
template <class T>
struct SpreadProduct {
  const Panels<T>& panels;  // dy
  const Lists& lists;
  const Direction<T>& transposed;
  Matrix y;

  void run(int64_t i, Span inputs) const {
    if (inputs.begin >= inputs.end) return;
    const int64_t width = panels.width_of(i);
    T* sums = Workspace::mine().get<T>(Workspace::kTile, (inputs.end - inputs.begin) * width);
    std::fill_n(sums, (inputs.end - inputs.begin) * width, T(0));
    int32_t* bounds = Workspace::mine().get<int32_t>(Workspace::kCursor, 2 * lists.rows);
    for (int64_t l = 0; l < lists.rows; ++l) {
      const int32_t *first = lists.index + lists.crow[l], *last = lists.index + lists.crow[l + 1];
      bounds[l] = int32_t(std::lower_bound(first, last, int32_t(inputs.begin)) - lists.index);
      bounds[lists.rows + l] = int32_t(std::lower_bound(first, last, int32_t(inputs.end)) - lists.index);
    }
    BsrProduct<T> p{};
    p.panel = panels.panel(i), p.features = panels.features, p.width = width;
    p.index = lists.index, p.values = transposed.values, p.depth = transposed.depth;
    p.begin = bounds, p.end = bounds + lists.rows, p.lists = lists.rows;
    p.y = sums - inputs.begin * width;
    transposed.kernels->spread(p);
    panels.each_line(i, [&](int64_t sample, int64_t line, int64_t lanes) {
      kernels<T>().unpack[y.storage]({sums + line * kLanes<T>, width, y.at(sample, inputs.begin), y.sample_stride,
                                      y.feature_stride, lanes, inputs.end - inputs.begin});
    });
  }

  void run_part(int64_t parts, int64_t part) const {
    const int64_t splits = panels.count % parts == 0 ? 1 : parts;
    const Span items = cut(panels.count * splits, parts, part);
    for (int64_t item = items.begin; item < items.end; ++item)
      run(item / splits, cut(y.features, splits, item % splits, kLanes<T>));
  }
};

// Samples one after the other, straight from and to their tensors.
template <class T>
void few_samples(const Matrix& x, const Direction<T>& blocks, const Epilogue<T>& epilogue, const Matrix& y) {
  const int64_t padded = (blocks.features + blocks.depth - 1) / blocks.depth * blocks.depth;
  const bool copy = x.storage != kNative || x.feature_stride != 1 || padded != blocks.features;
  T* in = Workspace::mine().get<T>(Workspace::kX, copy ? padded : 0);
  T* out = Workspace::mine().get<T>(Workspace::kStage, blocks.lists.rows * blocks.rows);
  const int64_t parts = parts_for(0.06 * double(blocks.weights()));
  for (int64_t sample = 0; sample < x.samples; ++sample) {
    if (copy) {
      kernels<T>().load[x.storage]({in, 0, x.at(sample, 0), 0, x.feature_stride, 1, x.features});
      std::fill(in + x.features, in + padded, T(0));
    }
    const T* row = copy ? in : static_cast<const T*>(x.at(sample, 0));
    for_parts(parts, [&](int64_t part) {
      const Span lists = cut_rows(blocks.lists.crow, blocks.lists.rows, parts, part, blocks.unit());
      const int64_t first = lists.begin * blocks.rows, end = std::min(lists.end * blocks.rows, blocks.outputs);
      if (first >= end) return;
      BsrProduct<T> p = blocks.product(row, 1);
      p.begin = blocks.lists.crow + lists.begin;
      p.end = p.begin + 1;
      p.lists = lists.end - lists.begin;
      p.y = out + first;
      kernels<T>().block_vector(p);
      if (epilogue.bias)
        for (int64_t r = first; r < end; ++r) out[r] += epilogue.bias[r];
      kernels<T>().activate(out + first, end - first, epilogue.activation);
      kernels<T>().store[y.storage]({out + first, 0, y.at(sample, first), 0, y.feature_stride, 1, end - first});
    });
  }
}

}  // namespace sparsekit
