// The block product of a convolution, forward and transposed: blocks as offsets into padded planes.
#pragma once
#include "bsr_blocks.h"
#include "bsr_pairs.h"
#include "conv_layout.h"

namespace sparsekit {

// How a weight falls into blocks: `rows` block rows in a group, `cols` block columns in a tap.
struct Blocks {
  Block block;
  int64_t rows, cols;

  Blocks(const Conv& c, Block b)
      : block(b), rows(ceil_div(c.out_per_group(), b.rows)), cols(ceil_div(c.in_per_group(), b.cols)) {}
};

// Two neighbouring channels as one of pairs.
inline Sheet pairs_of_channels(Sheet s) {
  const bool even = s.stride_n % 2 == 0 && s.stride_h % 2 == 0 && s.stride_w % 2 == 0;
  if (s.stride_c == 1 && even && is_aligned(s.data)) {  // channels_last: as they lie
    s.storage = kNative, s.bytes = sizeof(float);
    s.stride_n /= 2, s.stride_h /= 2, s.stride_w /= 2;
  } else {
    s.storage = kPairs, s.second = s.stride_c;
    s.stride_c *= 2;
  }
  s.c /= 2;
  return s;
}

// Two neighbouring samples as one of pairs.
inline Sheet pairs_of_samples(Sheet s) {
  s.storage = kPairs, s.second = s.stride_n;
  s.stride_n *= 2, s.n /= 2;
  return s;
}

// Samples `first`, `first` + 2, ...
inline Sheet every_second(Sheet s, int64_t first) {
  s.data += first * s.stride_n * s.bytes;
  s.stride_n *= 2, s.n /= 2;
  return s;
}

// How a product reads its operands: as numbers, or two channels or two samples of bfloat16 as one float. What follows
// is then a convolution with half as many of them, whose blocks are half as deep or lie as they were.
template <class T>
struct Reading {
  const BlockKernels<T>& kernels;
  Conv conv;
  Blocks weight;
  Sheet sheet;      // x, for the input gradient dy
  const T* values;  // null where they are not read
  int64_t fold = 1;  // samples in a lane

  static Reading numbers(const Conv& c, const Blocks& w, const Sheet& sheet, const T* values = nullptr) {
    return {sparsekit::kernels<T>().numbers, c, w, sheet, values};
  }

  // x two input channels at a time, blocks of one channel two samples at a time, or as it is.
  static Reading forward(const Conv& c, const Blocks& w, const Sheet& x, const Tensor& values) {
    if constexpr (sizeof(T) == 4) {
      const T* pairs = static_cast<const T*>(values.const_data_ptr());
      Conv half = c;
      if (w.block.cols % 2 == 0 && c.in_per_group() % 2 == 0 && have_pairs(x.storage) && is_aligned(pairs)) {
        half.in /= 2;
        const Blocks blocks(half, {w.block.rows, w.block.cols / 2});
        return {sparsekit::kernels<T>().pairs, half, blocks, pairs_of_channels(x), pairs};
      }
      if (pairs_in_columns(x.storage, c.n, w.block.rows, w.block.cols)) {
        half.n /= 2;
        return {sparsekit::kernels<T>().pairs, half, w, pairs_of_samples(x), pairs, 2};
      }
    }
    return numbers(c, w, x, values_as<T>(values));
  }
  // dy two output channels at a time.
  static Reading transposed(const Conv& c, const Blocks& w, const Sheet& dy, const Tensor& values) {
    if constexpr (sizeof(T) == 4)
      if (w.block.rows % 2 == 0 && c.out_per_group() % 2 == 0 && have_pairs(dy.storage) &&
          is_aligned(values.const_data_ptr())) {
        Conv half = c;
        half.out /= 2;
        const T* v = w.block.cols == 1 ? static_cast<const T*>(values.const_data_ptr()) : pairs_of_outputs(values);
        const Blocks blocks(half, {w.block.rows / 2, w.block.cols});
        return {sparsekit::kernels<T>().pairs, half, blocks, pairs_of_channels(dy), v};
      }
    return numbers(c, w, dy, values_as<T>(values));
  }
  // dy two samples at a time; x is to be read in the same way. An odd sample would have no partner.
  static Reading sampled(const Conv& c, const Blocks& w, const Sheet& dy, const Sheet& x) {
    if constexpr (sizeof(T) == 4)
      if (c.n % 2 == 0 && have_pairs(dy.storage) && have_pairs(x.storage)) {
        Conv half = c;
        half.n /= 2;
        return {sparsekit::kernels<T>().pairs, half, w, pairs_of_samples(dy), nullptr};
      }
    return numbers(c, w, dy);
  }
  bool paired() const { return &kernels == &sparsekit::kernels<T>().pairs; }
};

// Where a tap of the kernel reads: a phase plane and a position in it.
struct Tap {
  int64_t phase, a, b;

  Tap(const Conv& c, int64_t tap) {
    const int64_t y = tap / c.kw * c.dh, x = tap % c.kw * c.dw;
    phase = y % c.sh * c.sw + x % c.sw, a = y / c.sh, b = x / c.sw;
  }
};

// Lists of blocks. List (i * phases + phase) makes `rows` channels of one phase: block i of the output channels.
template <class T>
struct BlockTable {
  Lists lists;  // index: where the first input of a block lies in the grid
  const int32_t* depths;
  const int32_t* which;
  const T* values;
  int64_t block, rows, row_step, depth, k_step;
  int64_t per_group, channels;  // blocks of outputs, and outputs, in a group
  int64_t phases;

  double cost(int64_t lines) const { return 0.4 * double(lists.nnz * block) * double(lines); }
  // The output channels of a list.
  Span outputs(int64_t list) const {
    const int64_t i = list / phases, group = i / per_group, first = (i % per_group) * rows;
    return {group * channels + first, group * channels + std::min(channels, first + rows)};
  }

  static BlockTable forward(const Reading<T>& in, const Grid<T>& x, const Lists& lists) {
    const Conv& c = in.conv;
    const Blocks& w = in.weight;
    const Block b = w.block;
    int32_t* offset = Workspace::mine().get<int32_t>(Workspace::kTable, 2 * lists.nnz);
    int32_t* depths = offset + lists.nnz;
    std::vector<int32_t> of_place(size_t(2 * c.taps() * w.cols));
    for (int64_t place = 0; place < c.taps() * w.cols; ++place) {
      const Tap tap(c, place / w.cols);
      const int64_t channel = place % w.cols * b.cols;
      of_place[2 * place] = int32_t(x.at(0, channel, tap.phase, tap.a * x.pitch + tap.b) - x.data);
      of_place[2 * place + 1] = int32_t(std::min(b.cols, c.in_per_group() - channel));
    }
    for (int64_t list = 0; list < lists.rows; ++list) {
      const int32_t group = int32_t(list / w.rows * c.in_per_group() * x.channel_size());
      for (int32_t p = lists.crow[list]; p < lists.crow[list + 1]; ++p) {
        offset[p] = of_place[2 * lists.index[p]] + group;
        depths[p] = of_place[2 * lists.index[p] + 1];
      }
    }
    return {{lists.crow, offset, lists.rows, lists.nnz}, depths, nullptr, in.values, b.size(), b.rows, b.cols, b.cols,
            1, w.rows, c.out_per_group(), 1};
  }

  // `corner` is the position of dy that the first tap of the first computed position reads.
  static BlockTable transposed(const Reading<T>& in, const Grid<T>& dy, const Lists& t, const int32_t* perm,
                               int64_t corner) {
    const Conv& c = in.conv;
    const Blocks& w = in.weight;
    const Block b = w.block;
    const int64_t count = c.groups * w.cols * c.phases();
    int32_t* crow = Workspace::mine().get<int32_t>(Workspace::kOffsets, 3 * t.nnz + count + 1);
    int32_t *offset = crow + count + 1, *depths = offset + t.nnz, *which = depths + t.nnz, p = 0;
    for (int64_t list = 0; list < count; ++list) {
      crow[list] = p;
      const int64_t i = list / c.phases(), group = i / w.cols * c.out_per_group();
      for (int64_t k = 0; k < c.taps(); ++k) {
        const Tap tap(c, k);
        if (tap.phase != list % c.phases()) continue;
        const int64_t position = (corner - tap.a * dy.pitch - tap.b) * dy.lanes;
        for (int32_t q = t.crow[i * c.taps() + k]; q < t.crow[i * c.taps() + k + 1]; ++q, ++p) {
          const int64_t channel = (t.index[q] - k * w.rows) * b.rows;
          offset[p] = int32_t((group + channel) * dy.channel_size() + position);
          depths[p] = int32_t(std::min(b.rows, c.out_per_group() - channel));
          which[p] = perm[q];
        }
      }
    }
    crow[count] = p;
    return {{crow, offset, count, t.nnz}, depths, which, in.values, b.size(), b.cols, 1, b.rows, b.cols, w.cols,
            c.in_per_group(), c.phases()};
  }
};

// target = table x grid, plus bias, activated, for one block of samples. bias has an entry for every output of every
// list, also of absent ones. Pairs of samples are stored apart: the second of each to `odd`.
template <class T>
struct BlockedConv {
  const Reading<T>& in;
  const BlockTable<T>& table;
  const Grid<T>& grid;
  const Strips<T>& strips;
  const Target<T>& target;
  const Target<T>* odd = nullptr;
  const T* bias = nullptr;
  Activation activation = kNone;

  void run(const Batch& batch, int64_t first, int64_t groups) const {
    const int64_t lines = groups * strips.count() * strips.strip_lines();
    const double cost = table.cost(lines) + store_cost(strips, groups, table.lists.rows * table.rows);
    each_strip(strips, batch, first, groups, cost, [&](int64_t group, int64_t strip, int64_t splits, int64_t split,
                                                       const Piece& piece) {
      run_strip(group, strip, cut_rows(table.lists.crow, table.lists.rows, splits, split, 1), piece);
    });
  }

 private:
  using Piece = typename Target<T>::Piece;

  void run_strip(int64_t group, int64_t strip, Span lists, const Piece& piece) const {
    constexpr int64_t kResultBytes = 128 << 10;  // results of a strip waiting in L2 to be stored
    const int64_t stride = (strips.strip_lines() | 1) * kLanes<T>, list_size = in.fold * stride * table.rows;
    const auto kernel = in.fold == 2 ? in.kernels.columns : in.kernels.product;
    const int64_t step = std::max<int64_t>(1, kResultBytes / (list_size * int64_t(sizeof(T))));
    T* tile = Workspace::mine().get<T>(Workspace::kTile, std::min(step, table.lists.rows) * list_size);
    BsrProduct<T> p{};
    p.index_step = 1, p.x_stride = grid.channel_size(), p.y_stride = in.fold * stride, p.odd = stride;
    p.index = table.lists.index, p.depths = table.depths, p.which = table.which, p.values = table.values;
    p.block = table.block, p.rows = table.rows, p.row_step = table.row_step;
    p.depth = table.depth, p.k_step = table.k_step;
    for (int64_t l = lists.begin; l < lists.end; l += step) {
      p.lists = std::min(step, lists.end - l);
      p.begin = table.lists.crow + l;
      p.end = p.begin + 1;
      p.bias = bias ? bias + l * table.rows : nullptr;
      strips.each_row(strip, [&](int64_t a, int64_t line, int64_t lines) {
        p.panel = grid.at(group, 0, 0, a * grid.pitch);
        p.width = lines * kLanes<T>;
        p.y = tile + line * kLanes<T>;
        kernel(p);
      });
      activate_rows(tile, p.lists * table.rows * in.fold, stride, strips.strip_lines(), activation);
      store(tile, in.fold * stride, {l, l + p.lists}, target, piece);
      if (odd) store(tile + stride, in.fold * stride, {l, l + p.lists}, *odd, piece);
    }
  }

  // Neighbouring lists whose outputs are neighbours are stored together.
  void store(const T* tile, int64_t stride, Span lists, const Target<T>& to, const Piece& piece) const {
    for (int64_t l = lists.begin; l < lists.end;) {
      Span outputs = table.outputs(l);
      int64_t next = l + 1;
      if (table.phases == 1)
        while (next < lists.end && outputs.end == outputs.begin + (next - l) * table.rows)
          outputs.end = table.outputs(next++).end;
      to.store_phase(tile + (l - lists.begin) * table.rows * stride, stride, outputs, l % table.phases, piece);
      l = next;
    }
  }
};

}  // namespace sparsekit
