// The weight gradient of a block convolution.
#pragma once
#include "bsr_conv_product.h"

namespace sparsekit {

// The weight gradient: sums over the positions of all samples, [pass][input of a block][output], kept in T.
template <class T>
class BlockGradient {
 public:
  BlockGradient(const Reading<T>& in, const Layout<T>& layout, const Lists& lists)
      : kernels_(in.kernels), c_(in.conv), w_(in.weight), layout_(layout), lists_(lists),
        lanes_(std::min<int64_t>(w_.block.rows, kernels<T>().vector_lanes)),
        start_(size_t(lists.rows + 1)) {
    const Conv& c = c_;
    const Blocks& w = w_;
    const auto in_list = [&](int64_t l) { return (lists.crow[l + 1] - lists.crow[l]) * w.block.cols; };
    for (int64_t l = 0; l < lists.rows; ++l) start_[l + 1] = start_[l] + (in_list(l) + kUnit - 1) / kUnit * kUnit;
    index_.resize(size_t(start_.back()));
    sums_.resize(size_t(start_.back() * w.block.rows));
    const Grid<T>& x = layout.x;
    for (int64_t l = 0; l < lists.rows; ++l) {
      const int64_t group = l / w.rows * c.in_per_group();
      int32_t* to = index_.data() + start_[l];
      for (int32_t p = lists.crow[l]; p < lists.crow[l + 1]; ++p) {
        const Tap tap(c, lists.index[p] / w.cols);
        const int64_t channel = lists.index[p] % w.cols * w.block.cols;
        for (int64_t k = 0; k < w.block.cols; ++k)  // what sticks out reads the last channel there is
          *to++ = int32_t(x.at(0, group + std::min(channel + k, c.in_per_group() - 1), tap.phase,
                               tap.a * x.pitch + tap.b) - x.data);
      }
      while (to < index_.data() + start_[l + 1]) *to = to[-1], ++to;
    }
  }

  double cost(const Strips<T>& strips, int64_t groups) const {
    return 0.04 * double(sums_.size()) * double(groups * strips.count() * strips.strip_lines() * kLanes<T>);
  }
  Span share(int64_t parts, int64_t part) const { return cut_rows(lists_.crow, lists_.rows, parts, part, 1); }

  // Adds one block of samples to the sums of some lists.
  void add(const Strips<T>& strips, int64_t groups, Span lists, bool accumulate) {
    const int64_t corner = layout_.top * layout_.dy.pitch + layout_.left;
    for (int64_t g = 0; g < groups; ++g)
      strips.each(0, [&](int64_t a, int64_t b, int64_t, int lines) {
        const T* x = layout_.x.at(g, 0, 0, a * layout_.x.pitch + b);
        const int64_t width = lines * kLanes<T>;
        for (int64_t l = lists.begin; l < lists.end; ++l)
          for (int64_t r = 0; r < w_.block.rows && start_[l] < start_[l + 1]; r += lanes_) {
            const int64_t there = std::min(lanes_, outputs(l).end - outputs(l).begin - r);
            if (there <= 0) continue;
            const T* dy = layout_.dy.at(g, outputs(l).begin + r, 0, corner + a * layout_.dy.pitch + b);
            kernels_.sddmm({x, 1, width, width, dy, 1, layout_.dy.channel_size(), there, index_.data() + start_[l],
                            start_[l + 1] - start_[l], accumulate, sums(l, r)},
                           int(lanes_));
          }
        accumulate = true;
      });
  }

  // The sums as blocks [R, C]; entries outside of the weight are 0.
  void store(Span lists, T* dvalues) {
    const Block b = w_.block;
    for (int64_t l = lists.begin; l < lists.end; ++l) {
      const int64_t rows = outputs(l).end - outputs(l).begin;
      for (int32_t p = lists_.crow[l]; p < lists_.crow[l + 1]; ++p) {
        const int64_t cols = std::min(b.cols, c_.in_per_group() - lists_.index[p] % w_.cols * b.cols);
        T* to = dvalues + p * b.size();
        for (int64_t r = 0; r < b.rows; ++r) {
          const T* from = sums(l, r / lanes_ * lanes_) + (p - lists_.crow[l]) * b.cols * lanes_ + r % lanes_;
          for (int64_t k = 0; k < b.cols; ++k) to[r * b.cols + k] = r < rows && k < cols ? from[k * lanes_] : T(0);
        }
      }
    }
  }

  // See exact_gradient; `whole` and the sheets are those of the call.
  void repair(const Conv& whole, const Sheet& dy, const Sheet& x, T* dvalues) const {
    const Block b = w_.block;
    for (int64_t l = 0; l < lists_.rows; ++l)
      for (int32_t p = lists_.crow[l]; p < lists_.crow[l + 1]; ++p)
        for (int64_t i = 0; i < b.size(); ++i)
          if (T& d = dvalues[p * b.size() + i]; d != d)
            d = exact_gradient<T>(whole, dy, x, outputs(l).begin + i / b.cols,
                                  lists_.index[p] % w_.cols * b.cols + i % b.cols, lists_.index[p] / w_.cols);
  }

 private:
  static constexpr int64_t kUnit = 16;  // inputs of a kernel come by this many

  Span outputs(int64_t list) const {
    const int64_t first = list % w_.rows * w_.block.rows, group = list / w_.rows * c_.out_per_group();
    return {group + first, group + std::min(c_.out_per_group(), first + w_.block.rows)};
  }
  T* sums(int64_t list, int64_t row) { return sums_.data() + row * start_.back() + start_[list] * lanes_; }

  const BlockKernels<T>& kernels_;
  const Conv& c_;
  const Blocks& w_;
  const Layout<T>& layout_;
  const Lists& lists_;
  int64_t lanes_;
  std::vector<int64_t> start_;
  std::vector<int32_t> index_;
  std::vector<T> sums_;
};

}  // namespace sparsekit
