// Planes that outlive a call: what one layer leaves for the next, as that one would have padded it.
//
// A tensor [groups of samples, channels, positions, lanes] holds images [n, channels, h, w] and `border` zeros on every
// side of each plane, laid out as a Grid of a convolution of that padding and no stride: such a convolution reads it in
// place. Lanes past the last sample hold anything.
#pragma once
#include "conv_grid.h"

namespace sparsekit {

template <class T>
struct Planes {
  int64_t n, h, w, border;
  Grid<T> grid;

  // For images as `size` = [n, h, w, border] tells.
  Planes(const Ints& size, int64_t channels, int64_t lanes)
      : n(size[0]), h(size[1]), w(size[2]), border(size[3]),
        grid({1, 1, border, border}, channels, h + 2 * border, w + 2 * border, lanes) {}

  // The planes that a tensor holds.
  static Planes of(const char* op, const char* name, const Tensor& t, const Ints& size) {
    STD_TORCH_CHECK(size.size() == 4 && *std::min_element(size.begin(), size.end()) >= 0 && size[1] > 0 && size[2] > 0,
                    op, ": Expected the size of ", name, " as samples, height, width and border");
    STD_TORCH_CHECK(t.dim() == 4 && t.is_cpu() && t.is_contiguous() && (t.size(3) == 1 || t.size(3) == kLanes<T>), op,
                    ": Expected ", name, " as planes [groups, channels, positions, 1 or ", kLanes<T>, "], got ",
                    shape_of(t));
    Planes p(size, t.size(1), t.size(3));
    STD_TORCH_CHECK(t.size(0) == p.groups() && t.size(2) == p.grid.plane, op, ": Expected ", name, " of ", p.groups(),
                    " groups and ", p.grid.plane, " positions, got ", shape_of(t));
    p.grid.data = static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
    return p;
  }

  Tensor allocate(const Tensor& like) {
    Tensor t = new_empty<int64_t>(like, {groups(), grid.channels, grid.plane, grid.lanes});
    grid.data = static_cast<T*>(t.mutable_data_ptr());
    return t;
  }

  int64_t groups() const { return (n + grid.lanes - 1) / grid.lanes; }
  // Row a of a channel's images.
  T* row(int64_t group, int64_t channel, int64_t a) const {
    return grid.at(group, channel, 0, (border + a) * grid.pitch + border);
  }
  int64_t row_step() const { return grid.pitch * grid.lanes; }
  int64_t gap() const { return 2 * border * grid.lanes; }  // zeros between rows

  // The planes as a convolution that pads less sees them.
  Grid<T> padded_by(int64_t rows, int64_t columns) const {
    Grid<T> seen = grid;
    seen.data += ((border - rows) * grid.pitch + border - columns) * grid.lanes;
    return seen;
  }
  // The samples of a group, or all of them where a group is one.
  Sheet sheet(int64_t group) const {
    Sheet s = Sheet::native(row(group, 0, 0), sizeof(T));
    s.n = grid.lanes == 1 ? n : std::min(grid.lanes, n - group * grid.lanes), s.c = grid.channels, s.h = h, s.w = w;
    s.stride_n = grid.lanes == 1 ? grid.size() : 1, s.stride_c = grid.channel_size();
    s.stride_h = row_step(), s.stride_w = grid.lanes;
    return s;
  }
  // Zeros before the first and after the last of some rows of a channel, beside those between rows.
  int64_t before(Span rows) const { return rows.begin == 0 ? border * (grid.pitch + 1) * grid.lanes : 0; }
  int64_t after(Span rows) const {
    return rows.end == h ? (grid.plane - (border + h) * grid.pitch - border) * grid.lanes : 0;
  }
};

// Something of a result's shape, in rows as they are computed: planes, or a tensor where a line is one sample.
template <class T>
struct Beside {
  const T* data;
  int64_t group_step, channel_step, row_step;

  explicit Beside(const Planes<T>& p)
      : data(p.row(0, 0, 0)), group_step(p.grid.size()), channel_step(p.grid.channel_size()), row_step(p.row_step()) {}
  explicit Beside(const Sheet& s)
      : data(reinterpret_cast<const T*>(s.data)), group_step(s.stride_n), channel_step(s.stride_c),
        row_step(s.stride_h) {}
  const T* row(int64_t group, int64_t channel, int64_t a) const {
    return data + group * group_step + channel * channel_step + a * row_step;
  }
};

// What a convolution reads: images of a tensor, or planes.
template <class T>
struct Source {
  std::optional<Sheet> images;
  std::optional<Planes<T>> planes;

  // The images that hold samples from one on, and which of theirs it is.
  std::pair<Sheet, int64_t> from(int64_t sample) const {
    if (images) return {*images, sample};
    const int64_t lanes = planes->grid.lanes;
    return lanes == 1 ? std::pair{planes->sheet(0), sample} : std::pair{planes->sheet(sample / lanes), sample % lanes};
  }
};

}  // namespace sparsekit
