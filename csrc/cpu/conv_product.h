// The gather product of a convolution: which samples, which positions, in which order.
#pragma once
#include "conv_table.h"

namespace sparsekit {

constexpr int64_t kBlockBytes = 6 << 20;  // padded activations held at a time: they should stay in L3

// All samples of a call, cut into blocks of `groups` groups of `lanes` samples.
struct Batch {
  int64_t samples, lanes, groups;  // groups per block

  template <class T>
  static Batch of(const Conv& c) {
    const int64_t full = (c.n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    return {c.n, 10 * full <= 16 * c.n ? kLanes<T> : 1, 1};
  }
  // For kernels that hardly mind lines which are not aligned: wide rows lose little between them, and a sample at a
  // time spares the transposition of all.
  template <class T>
  static Batch of_rows(const Conv& c) {
    const bool wide = 100 * c.ow >= 95 * (c.ow + c.reach_w()) && c.sw == 1 && c.oh * c.ow >= 512;
    return wide ? Batch{c.n, 1, 1} : of<T>(c);
  }
  void limit(int64_t bytes_per_group) {
    groups = std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(bytes_per_group, 1), 1, (samples + lanes - 1) / lanes);
  }
  // f(first sample, groups in this block)
  template <class F>
  void each_block(const F& f) const {
    for (int64_t first = 0; first < samples; first += groups * lanes)
      f(first, std::min(groups, (samples - first + lanes - 1) / lanes));
  }
  int64_t count(int64_t first, int64_t group) const { return std::min(lanes, samples - first - group * lanes); }
};

// The positions (a < height, b < width) of a product, cut into strips of whole rows.
//
// With kLanes samples per line a position is a line. With one sample a strip is a flat run of `pitch` positions
// per row; what lies between rows is computed and dropped, and so is what a last partial line adds.
template <class T>
struct Strips {
  int64_t lanes, height, width, pitch, rows;  // rows per strip

  static Strips for_product(int64_t lanes, int64_t height, int64_t width, int64_t pitch) {
    Strips s{lanes, height, width, pitch, 1};
    if (lanes > 1) {
      s.rows = std::clamp<int64_t>(32 / width, 1, height);
      return s;
    }
    // The fewest lines in total, for strips short enough to leave work for every thread.
    const int64_t longest = 3 * kernels<T>().max_lines;
    int64_t least = -1;
    for (int64_t rows = 1; rows <= height && (rows == 1 || s.run_lines(rows) <= longest); ++rows) {
      const int64_t total = height / rows * s.run_lines(rows) + (height % rows ? s.run_lines(height % rows) : 0);
      if (least < 0 || total < least) least = total, s.rows = rows;
    }
    return s;
  }
  static Strips whole(int64_t lanes, int64_t height, int64_t width, int64_t pitch) {
    return {lanes, height, width, pitch, height};
  }

  int64_t count() const { return (height + rows - 1) / rows; }
  Span rows_of(int64_t strip) const { return {strip * rows, std::min(height, (strip + 1) * rows)}; }
  int64_t run_lines(int64_t r) const { return ((r - 1) * pitch + width + kLanes<T> - 1) / kLanes<T>; }
  int64_t strip_lines() const { return lanes > 1 ? rows * width : run_lines(rows); }
  // Positions from one row to the next in a strip's result.
  int64_t result_pitch() const { return lanes > 1 ? width : pitch; }
  int64_t widest() const {
    return std::min<int64_t>(kernels<T>().max_lines, lanes > 1 ? width : strip_lines());
  }

  // f(a, line of the strip's result, lines) for runs that start at position (a, 0), of any length.
  template <class F>
  void each_row(int64_t strip, const F& f) const {
    const Span a = rows_of(strip);
    if (lanes == 1) return f(a.begin, int64_t(0), run_lines(a.end - a.begin));
    for (int64_t row = a.begin; row < a.end; ++row) f(row, (row - a.begin) * width, width);
  }
  // f(a, b, line of the strip's result, lines) for runs that start at position (a, b) and fit the registers.
  template <class F>
  void each(int64_t strip, const F& f) const {
    const Span a = rows_of(strip);
    const auto run = [&](int64_t row, int64_t first, int64_t total) {
      const int64_t pieces = (total + kernels<T>().max_lines - 1) / kernels<T>().max_lines;
      for (int64_t i = 0; i < pieces; ++i) {
        const Span s = cut(total, pieces, i);
        f(row, s.begin * kLanes<T> / lanes, first + s.begin, int(s.end - s.begin));
      }
    };
    if (lanes == 1) return run(a.begin, 0, run_lines(a.end - a.begin));
    for (int64_t row = a.begin; row < a.end; ++row) run(row, (row - a.begin) * width, width);
  }
};

template <class T>
double product_cost(const OffsetTable<T>& table, const Strips<T>& strips, int64_t groups) {
  return 0.25 * double(table.nnz) * double(groups * strips.count() * strips.strip_lines());
}

// f(group, strip, share of the rows, where the strip is stored) for the work of one block of samples, cut among threads:
// f gets share i of n. Strips may be unequal; few of them balance better when each is shared by rows.
template <class T, class F>
void each_strip(const Strips<T>& strips, const Batch& batch, int64_t first, int64_t groups, double cost, const F& f) {
  const int64_t count = groups * strips.count(), parts = parts_for(cost);
  const int64_t splits = parts == 1 || count >= 8 * parts ? 1 : parts;
  for_parts(parts, [&](int64_t part) {
    const Span items = cut(count * splits, parts, part);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t strip = item / splits % strips.count(), group = item / splits / strips.count();
      f(group, strip, splits, item % splits,
        typename Target<T>::Piece{strips.rows_of(strip), strips.width, strips.result_pitch(),
                                  first + group * batch.lanes, batch.count(first, group)});
    }
  });
}

// Moving a strip's results to their tensor, in nanoseconds.
template <class T>
double store_cost(const Strips<T>& strips, int64_t groups, int64_t rows) {
  return 0.1 * double(rows) * double(groups * strips.count() * strips.strip_lines() * kLanes<T>);
}

// Activations of `rows` rows of a strip's results.
template <class T>
void activate_rows(T* tile, int64_t rows, int64_t stride, int64_t lines, Activation activation) {
  if (activation == kNone) return;
  for (int64_t r = 0; r < rows; ++r) kernels<T>().activate(tile + r * stride, lines * kLanes<T>, activation);
}

// y = activation(y + skip), of some channels, rows and samples, after they were stored: they are still in a cache.
template <class T>
void add_skip(const Sheet& y, const Sheet& skip, Span channels, Span rows, Span samples, Activation activation) {
  const auto add = [&](int64_t n, int64_t c, int64_t a, int64_t b, int64_t step, int64_t count) {
    void* to = y.at(n, c, a, b);
    kernels<T>().add[y.storage](to, skip.at(n, c, a, b), step, count);
    if (activation == kNone) return;
    if (y.storage == kNative) return kernels<T>().activate(static_cast<T*>(to), count, activation);
    T* stage = Workspace::mine().get<T>(Workspace::kStage, count);
    kernels<T>().load[y.storage]({stage, 0, to, 0, 1, 1, count});
    kernels<T>().activate(stage, count, activation);
    kernels<T>().store[y.storage]({stage, 0, to, 0, 1, 1, count});
  };
  const int64_t height = rows.end - rows.begin, count = channels.end - channels.begin;
  const bool whole = skip.stride_w == 1 && skip.stride_h == y.w && y.stride_h == y.w;
  for (int64_t n = samples.begin; n < samples.end; ++n)
    if (y.channels_last()) {
      for (int64_t a = rows.begin; a < rows.end; ++a)
        for (int64_t b = 0; b < y.w; ++b) add(n, channels.begin, a, b, skip.stride_c, count);
    } else {
      for (int64_t c = channels.begin; c < channels.end; ++c)
        if (whole) add(n, c, rows.begin, 0, 1, height * y.w);
        else
          for (int64_t a = rows.begin; a < rows.end; ++a) add(n, c, a, 0, skip.stride_w, y.w);
    }
}

// What becomes of sums: activated, or with something added to them before that.
template <class T>
struct Ending {
  Activation activation = kNone;
  const Sheet* skip = nullptr;        // to add, where sums go to a tensor
  const Beside<T>* beside = nullptr;  // to add, in rows as sums are
  const Planes<T>* planes = nullptr;  // where sums go, if not to a tensor

  // Stores rows [rows) of a product, of a strip's `lines` lines each.
  void store(const Target<T>& target, T* tile, int64_t stride, int64_t lines, Span rows,
             const typename Target<T>::Piece& piece) const {
    if (planes != nullptr || beside != nullptr) finish(target, tile, stride, rows, piece);
    else if (skip == nullptr) activate_rows(tile, rows.end - rows.begin, stride, lines, activation);
    if (planes != nullptr) return;
    target.store(tile, stride, rows, piece);
    if (skip != nullptr)
      add_skip<T>(target.sheet, *skip, rows, piece.a, {piece.first, piece.first + piece.count}, activation);
  }

 private:
  // Ends sums in planes, or where they are.
  void finish(const Target<T>& target, T* tile, int64_t stride, Span channels,
              const typename Target<T>::Piece& piece) const {
    using Steps = typename Finish<T>::Steps;
    const int64_t group = piece.first / target.lanes, c = channels.begin, a = piece.a.begin;
    const Steps own{stride, piece.pitch * target.lanes};
    Finish<T> f{tile, own, nullptr, {}, tile, own, channels.end - c, piece.a.end - a, piece.width * target.lanes, 0, 0,
                0, activation};
    if (beside != nullptr) f.add = beside->row(group, c, a), f.add_step = {beside->channel_step, beside->row_step};
    if (planes != nullptr) {
      f.to = planes->row(group, c, a), f.to_step = {planes->grid.channel_size(), planes->row_step()};
      f.gap = planes->gap(), f.before = planes->before(piece.a), f.after = planes->after(piece.a);
    }
    kernels<T>().finish(f);
  }
};

// target = table x grid for one block.
template <class T>
struct BlockProduct {
  const OffsetTable<T>& table;
  const Grid<T>& grid;
  const Strips<T>& strips;
  const T* bias;
  const Target<T>& target;
  Ending<T> ending{};

  void run(const Batch& batch, int64_t first, int64_t groups) const {
    const double cost = product_cost(table, strips, groups) + store_cost(strips, groups, table.rows);
    each_strip(strips, batch, first, groups, cost, [&](int64_t group, int64_t strip, int64_t splits, int64_t split,
                                                       const Piece& piece) {
      run_strip(group, strip, cut_rows(table.bound(0), table.rows, splits, split, 1), piece);
    });
  }

 private:
  using Piece = typename Target<T>::Piece;

  void run_strip(int64_t group, int64_t strip, Span all_rows, const Piece& piece) const {
    constexpr int64_t kResultBytes = 256 << 10;  // results of a strip waiting in L2 to be stored
    const int64_t stride = (strips.strip_lines() | 1) * kLanes<T>;
    const int64_t block = std::max<int64_t>(16, kResultBytes / (stride * int64_t(sizeof(T))));
    T* tile = Workspace::mine().get<T>(Workspace::kTile, std::min(block, table.rows) * stride);
    for (int64_t r = all_rows.begin; r < all_rows.end; r += block) {
      const Span rows{r, std::min(all_rows.end, r + block)};
      strips.each(strip, [&](int64_t a, int64_t b, int64_t line, int lines) {
        Product<T> p{grid.at(group, 0, 0, a * grid.pitch + b), table.offset, true, table.values, nullptr, nullptr,
                     rows.end - rows.begin, bias ? bias + rows.begin : nullptr, false, tile + line * kLanes<T>, stride};
        for (int64_t t = 0; t < table.tiles; ++t) {
          p.begin = table.bound(t) + rows.begin;
          p.end = table.bound(t + 1) + rows.begin;
          kernels<T>().product(p, lines);
          p.accumulate = true;
        }
      });
      ending.store(target, tile, stride, strips.strip_lines(), rows, piece);
    }
  }
};

}  // namespace sparsekit
