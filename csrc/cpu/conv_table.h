// Survivors of a convolution as offsets into padded planes, cut into tiles of input planes.
#pragma once
#include "code_pages.h"
#include "conv_planes.h"

namespace sparsekit {

// What the places of operands depend on, beside the mask; `detail` is for whoever uses them.
struct Geometry {
  int64_t in, out, kh, kw, sh, sw, dh, dw, groups, channel_size, plane, pitch, lanes, corner, detail;

  bool operator==(const Geometry&) const = default;
};

// corner -1: of W as it is.
template <class T>
Geometry geometry_of(const Conv& c, const Grid<T>& grid, int64_t corner, int64_t detail) {
  return {c.in, c.out, c.kh, c.kw, c.sh, c.sw, c.dh, c.dw, c.groups, grid.channel_size(), grid.plane, grid.pitch,
          grid.lanes, corner, detail};
}

// The numbers of a table, kept between calls.
struct KeptTable {
  Outline outline;  // of the mask, to notice a key that belongs to another
  Geometry geometry;
  std::vector<int32_t> numbers;  // bounds and offsets
  std::vector<int32_t> order;    // of the values, if not theirs

  bool usable() const { return true; }
  size_t bytes() const { return (numbers.size() + order.size()) * sizeof(int32_t); }
};

// Row r, tile t: survivors [bound(t)[r], bound(t + 1)[r]) of offset/values. Rows are contiguous, so
// bound(0) with its closing entry is an ordinary row pointer array.
template <class T>
struct OffsetTable {
  int64_t rows, tiles, nnz;
  int32_t* bounds;
  int32_t* offset;
  const T* values;
  std::shared_ptr<const KeptTable> kept;

  int32_t* bound(int64_t tile) const { return bounds + tile * (rows + 1); }
  int64_t size() const { return (tiles + 1) * (rows + 1) + nnz; }

  OffsetTable(int64_t rows, int64_t tiles, int64_t nnz, Workspace::Slot slot, const T* values)
      : rows(rows), tiles(tiles), nnz(nnz), values(values) {
    place(Workspace::mine().get<int32_t>(slot, size()));
  }
  // Moves to numbers that nobody writes any more.
  void place_on(std::shared_ptr<const KeptTable> numbers) {
    kept = std::move(numbers);
    place(const_cast<int32_t*>(kept->numbers.data()));
  }

 private:
  void place(int32_t* numbers) { bounds = numbers, offset = numbers + (tiles + 1) * (rows + 1); }
};

// Lines of a product for which looking up a table costs less than the product: it is then worth keeping.
constexpr int64_t kKeepLines = 64;

// Lets `table` have its numbers from an earlier call with the same key (null: always make them) and geometry, or makes
// them: make() fills them in, and returns the order of its values or null.
template <class T, class Make>
void keep(OffsetTable<T>& table, const Tensor* key, const Lists& mask, const Geometry& geometry, const Make& make) {
  if (key == nullptr) return void(make());
  check_code_key(*key);
  table.place_on(CodeCache<KeptTable>::all().find(
      *key, [&](const KeptTable& k) { return k.geometry == geometry && k.outline.describes(mask); },
      [&] {
        const int32_t* order = make();
        std::vector<int32_t> numbers(table.bounds, table.bounds + table.size()), orders;
        if (order != nullptr) orders.assign(order, order + table.nnz);
        return std::make_shared<const KeptTable>(Outline(mask), geometry, std::move(numbers), std::move(orders));
      }));
}

// Planes per tile such that the part of them one chunk of output touches stays in the L1 cache.
template <class T>
int64_t planes_per_tile(const Conv& c, const Grid<T>& grid, int64_t lines) {
  const int64_t positions = lines * kLanes<T> / grid.lanes;
  int64_t touched;  // lines per channel
  if (grid.lanes == 1)
    touched = grid.phases() * (lines + 2 + (c.reach_h() * grid.pitch + c.reach_w()) / kLanes<T>);
  else
    touched = std::min<int64_t>(grid.phases(), c.taps()) * (c.reach_h() + 1) * (positions + c.reach_w());
  return std::max<int64_t>(1, (32 << 10) / (64 * touched));
}

// One tile when tiles would hold too few survivors of a row to be worth a reload of partial sums.
inline int64_t tile_count(int64_t planes, int64_t per_tile, int64_t groups, int64_t rows, int64_t nnz) {
  const int64_t tiles = (planes + per_tile - 1) / per_tile;
  return groups == 1 && nnz >= 6 * tiles * rows ? tiles : 1;
}

// Where in the planes of x a column of the weight reads, for the first group.
template <class T>
std::vector<int32_t> column_offsets(const Conv& c, const Grid<T>& x) {
  std::vector<int32_t> offsets;
  offsets.reserve(size_t(c.in_per_group() * c.taps()));
  for (int64_t i = 0; i < c.in_per_group(); ++i)
    for (int64_t r = 0; r < c.kh; ++r)
      for (int64_t s = 0; s < c.kw; ++s) {
        const int64_t y = r * c.dh, z = s * c.dw, phase = (y % c.sh) * c.sw + z % c.sw;
        offsets.push_back(int32_t(x.at(0, i, phase, y / c.sh * x.pitch + z / c.sw) - x.data));
      }
  return offsets;
}

// W as it is: rows are output channels, operands are planes of x.
template <class T>
OffsetTable<T> forward_table(const Conv& c, const Grid<T>& x, const Lists& lists, const T* values, int64_t lines,
                             const Tensor* key) {
  const int64_t per_tile = planes_per_tile(c, x, lines), taps = c.taps();
  const int64_t tiles = tile_count(c.in_per_group(), per_tile, c.groups, lists.rows, lists.nnz);
  OffsetTable<T> table(lists.rows, tiles, lists.nnz, Workspace::kTable, values);
  const auto make = [&]() -> const int32_t* {
    const std::vector<int32_t> of_column = column_offsets(c, x);
    const int64_t parts = parts_for(double(lists.nnz));
    for_parts(parts, [&](int64_t part) {
      const Span rows = cut_rows(lists.crow, lists.rows, parts, part, 1);
      const int64_t count = rows.end - rows.begin;
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const int32_t group = int32_t(r / c.out_per_group() * c.in_per_group() * x.channel_size());
        for (int32_t p = lists.crow[r]; p < lists.crow[r + 1]; ++p) table.offset[p] = of_column[lists.index[p]] + group;
      }
      std::copy_n(lists.crow + rows.begin, count, table.bound(0) + rows.begin);
      for (int64_t t = 1; t < tiles; ++t)
        kernels<T>().advance(lists.index, table.bound(t - 1) + rows.begin, lists.crow + rows.begin + 1,
                             table.bound(t) + rows.begin, count, int32_t((t - 1) * per_tile * taps),
                             int32_t(t * per_tile * taps), int32_t(c.in_per_group() * taps));
      std::copy_n(lists.crow + rows.begin + 1, count, table.bound(tiles) + rows.begin);
    });
    table.bound(0)[lists.rows] = int32_t(lists.nnz);
    return nullptr;
  };
  keep(table, key, lists, geometry_of(c, x, -1, tiles > 1 ? per_tile : 0), make);
  return table;
}

// The transpose: rows are (input channel, stride phase), operands are planes of dy. `corner` is the position
// that the first tap of the first computed position reads.
template <class T>
OffsetTable<T> transposed_table(const Conv& c, const Grid<T>& dy, const Lists& t, const int32_t* perm,
                                const Tensor& values, int64_t corner, int64_t lines, const Tensor* key) {
  const int64_t taps = c.taps(), phases = c.phases(), rows = c.in * phases;
  const int64_t per_tile = planes_per_tile(c, dy, lines);
  const int64_t tiles = tile_count(c.out, per_tile, c.groups, rows, t.nnz);
  T* sorted = Workspace::mine().get<T>(Workspace::kGrad, t.nnz);
  OffsetTable<T> table(rows, tiles, t.nnz, Workspace::kOffsets, sorted);
  int32_t* order = Workspace::mine().get<int32_t>(Workspace::kCursor, t.nnz);

  // Calls f(row, tile, survivor, offset) for the survivors of channels [span) of every group, taps in order.
  const auto each = [&](Span span, const auto& f) {
    for (int64_t i = span.begin; i < span.end; ++i)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t y = tap / c.kw * c.dh, z = tap % c.kw * c.dw;
        const int64_t phase = (y % c.sh) * c.sw + z % c.sw;
        const int64_t from = (corner - y / c.sh * dy.pitch - z / c.sw) * dy.lanes;
        const int64_t k = i * taps + tap;
        for (int32_t p = t.crow[k]; p < t.crow[k + 1]; ++p) {
          const int32_t o = t.index[p];
          const int64_t group = c.groups == 1 ? 0 : o / c.out_per_group();
          const int64_t tile = tiles == 1 ? 0 : o / uint32_t(per_tile);
          f((group * c.in_per_group() + i) * phases + phase, tile, p, o * dy.channel_size() + from);
        }
      }
  };
  const int64_t parts = parts_for(3 * double(t.nnz));
  const auto make = [&]() -> const int32_t* {
    std::fill_n(table.bounds, (tiles + 1) * (rows + 1), 0);
    for_parts(parts, [&](int64_t part) {
      each(cut(c.in_per_group(), parts, part),
           [&](int64_t row, int64_t tile, int32_t, int64_t) { ++table.bound(tile)[row]; });
    });
    int32_t total = 0;  // counts become starts
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t tile = 0; tile <= tiles; ++tile) {
        int32_t& b = table.bound(tile)[row];
        const int32_t count = tile < tiles ? b : 0;
        b = total;
        total += count;
      }
    for_parts(parts, [&](int64_t part) {
      each(cut(c.in_per_group(), parts, part), [&](int64_t row, int64_t tile, int32_t p, int64_t from) {
        const int32_t to = table.bound(tile)[row]++;
        table.offset[to] = int32_t(from);
        order[to] = perm[p];
      });
    });
    // Each start has moved to its end, which is the start of the next tile: shift them back.
    for (int64_t tile = tiles; tile > 0; --tile) std::copy_n(table.bound(tile - 1), rows, table.bound(tile));
    table.bound(0)[0] = 0;
    for (int64_t row = 1; row < rows; ++row) table.bound(0)[row] = table.bound(tiles)[row - 1];
    table.bound(0)[rows] = int32_t(t.nnz);
    return order;
  };
  keep(table, key, t, geometry_of(c, dy, corner, tiles > 1 ? per_tile : 0), make);
  const int32_t* which = table.kept ? table.kept->order.data() : order;
  for_parts(parts, [&](int64_t part) {
    const Span own = cut(t.nnz, parts, part, kLanes<T>);
    kernels<T>().gather[storage_of(values.scalar_type())](sorted + own.begin, values.const_data_ptr(),
                                                          which + own.begin, own.end - own.begin);
  });
  return table;
}

}  // namespace sparsekit
