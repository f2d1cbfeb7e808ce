// The product of a convolution by machine code.
#pragma once
#include "conv_code.h"
#include "conv_product.h"

namespace sparsekit {

// The same product as BlockProduct's by machine code.
struct CodeProduct {
  const ConvCode& code;
  const Grid<float>& grid;
  const Strips<float>& strips;
  const float* values;
  const float* bias;
  const Target<float>& target;
  Ending<float> ending;
  double cost;  // of a line

  static double line_cost(int64_t nnz, int64_t rows) { return 0.25 * double(nnz) + 1.6 * double(rows); }
  static int64_t stride(const Strips<float>& strips) { return (strips.strip_lines() | 1) * kLanes<float>; }

  void run(const Batch& batch, int64_t first, int64_t groups) const {
    const double all = cost * double(groups * strips.count() * strips.strip_lines());
    each_strip(strips, batch, first, groups, all, [&](int64_t group, int64_t strip, int64_t splits, int64_t split,
                                                      const Target<float>::Piece& piece) {
      run_strip(group, strip, code.share(splits, split), piece);
    });
  }

 private:
  void run_strip(int64_t group, int64_t strip, Span all, const Target<float>::Piece& piece) const {
    constexpr int64_t kResultBytes = 256 << 10;  // results of a strip waiting in L2 to be stored
    const int64_t pitch = stride(strips), lines = strips.strip_lines();
    const int64_t step = std::max<int64_t>(1, kResultBytes / (ConvCode::kBlockRows * pitch * int64_t(sizeof(float))));
    const int64_t together = std::min(step, code.blocks());
    float* tile = Workspace::mine().get<float>(Workspace::kTile, together * ConvCode::kBlockRows * pitch);
    std::vector<int32_t> starts(static_cast<size_t>(lines));
    strips.each_row(strip, [&](int64_t a, int64_t line, int64_t count) {
      for (int64_t i = 0; i < count; ++i)
        starts[size_t(line + i)] = int32_t(a * grid.pitch * grid.lanes + i * kLanes<float>);
    });
    for (int64_t b = all.begin; b < all.end; b += step) {
      const Span blocks{b, std::min(all.end, b + step)}, rows{code.row(blocks.begin), code.row(blocks.end)};
      code.run(blocks, grid.at(group, 0, 0, 0), starts.data(), lines, values, bias, tile);
      ending.store(target, tile, pitch, lines, rows, piece);
    }
  }
};

// A 1x1 convolution of images whose planes are whole lines: code reads the tensor itself and writes where results stay.
struct PointwiseProduct {
  const ConvCode& code;
  const Sheet& x;
  const Sheet& y;
  const float* values;
  const float* bias;
  Ending<float> ending;
  double cost;  // of a line

  static bool fits(const Conv& c, const Sheet& x, const Sheet* skip) {
    const bool dense = x.stride_w == 1 && x.stride_h == x.w && x.stride_c == x.h * x.w && x.storage == kNative;
    if (skip != nullptr && (skip->stride_w != 1 || skip->stride_h != x.w)) return false;
    // Channels 4 KB apart would fall into one set of the cache.
    return c.taps() == 1 && c.phases() == 1 && c.ph == 0 && c.pw == 0 && c.groups == 1 && dense &&
           x.h * x.w % kLanes<float> == 0 && x.h * x.w % 1024 != 0;
  }
  // The planes of a sample of x.
  static Grid<float> planes(const Sheet& x) {
    Grid<float> grid({1, 1, 0, 0}, x.c, 1, x.h * x.w, 1);
    grid.plane = x.h * x.w;
    grid.data = static_cast<float*>(x.at(0, 0, 0, 0));
    return grid;
  }
  static int64_t lines(const Sheet& x) { return x.h * x.w / kLanes<float>; }

  void run() const {
    constexpr int64_t kLines = 28;  // of every channel, which then stay in L2 for all blocks of outputs
    const int64_t total = lines(x), ranges = (total + kLines - 1) / kLines, items = x.n * ranges;
    const int64_t parts = parts_for(cost * double(x.n * total)), splits = parts == 1 || items >= 8 * parts ? 1 : parts;
    for_parts(parts, [&](int64_t part) {
      const Span own = cut(items * splits, parts, part);
      for (int64_t i = own.begin; i < own.end; ++i)
        run_range(i / splits / ranges, cut(total, ranges, i / splits % ranges), code.share(splits, i % splits));
    });
  }

 private:
  void run_range(int64_t n, Span range, Span blocks) const {
    if (blocks.begin == blocks.end) return;
    const int64_t first = range.begin * kLanes<float>, count = range.end - range.begin, row = code.row(blocks.begin);
    int32_t starts[64];
    for (int64_t i = 0; i < count; ++i) starts[i] = int32_t(i * kLanes<float>);
    float* to = static_cast<float*>(y.at(n, row, 0, 0)) + first;
    code.run(blocks, static_cast<const float*>(x.at(n, 0, 0, 0)) + first, starts, count, values, bias, to);
    for (int64_t r = row; r < code.row(blocks.end); ++r) {
      float* plane = to + (r - row) * y.stride_c;
      if (ending.skip != nullptr)
        kernels<float>().add[kNative](plane, static_cast<float*>(ending.skip->at(n, r, 0, 0)) + first, 1,
                                      count * kLanes<float>);
      if (ending.activation != kNone) kernels<float>().activate(plane, count * kLanes<float>, ending.activation);
    }
  }
};

}  // namespace sparsekit
