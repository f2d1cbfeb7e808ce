// Where the padded planes of a convolution lie, and what its three products share.
#pragma once
#include "conv_product.h"

namespace sparsekit {

// An uninitialized [n, c, h, w] in the memory format of `like`: channels_last where that is what it is, else contiguous.
inline Tensor new_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const auto dense = [&](std::initializer_list<int> inner_first) {
    int64_t expected = 1;
    for (const int d : inner_first) {
      if (like.size(d) != 1 && like.stride(d) != expected) return false;
      expected *= like.size(d);
    }
    return true;
  };
  if (like.numel() == 0 || dense({3, 2, 1, 0}) || !dense({1, 3, 2, 0})) return new_empty<int64_t>(like, {n, c, h, w});
  return torch::stable::transpose(torch::stable::transpose(new_empty<int64_t>(like, {n, h, w, c}), 1, 3), 2, 3);
}

// Copies samples from one on, of what from(sample) gives: a sheet that holds it, and as which of its samples.
template <class T, class F>
void fill_grid_from(const F& from, const Grid<T>& grid, const Batch& batch, int64_t first, int64_t groups) {
  const int64_t parts = parts_for(0.15 * double(groups * grid.size()));
  for_parts(parts, [&](int64_t part) {
    for (int64_t g = 0; g < groups; ++g) {
      const auto [sheet, sample] = from(first + g * grid.lanes);
      grid.fill(sheet, g, sample, batch.count(first, g),
                cut(grid.channels, parts, part, sheet.channels_last() ? kLanes<T> : 1));
    }
  });
}

template <class T>
void fill_grid(const Grid<T>& grid, const Sheet& from, const Batch& batch, int64_t first, int64_t groups) {
  fill_grid_from([&](int64_t sample) { return std::pair{from, sample}; }, grid, batch, first, groups);
}

// How x is laid out for forward and sddmm, dy for the transpose and sddmm.
template <class T>
struct Layout {
  Batch batch;
  Grid<T> x, dy;
  int64_t top, left;              // zero rows and columns before dy
  int64_t first_a, first_b;       // the first position of the padded input that is a real input
  int64_t height_t, width_t;      // positions the transpose computes

  explicit Layout(const Conv& c) : Layout(c, Batch::of<T>(c)) {}
  Layout(const Conv& c, int64_t lanes) : Layout(c, Batch{c.n, lanes, 1}) {}
  static Layout rows(const Conv& c) { return Layout(c, Batch::of_rows<T>(c)); }

  int64_t corner() const { return (first_a + top) * dy.pitch + first_b + left; }

 private:
  static int64_t before(int64_t reach, int64_t first) { return std::max<int64_t>(0, reach - first); }
  static int64_t after(int64_t last, int64_t size) { return std::max<int64_t>(0, last - (size - 1)); }

  Layout(const Conv& c, Batch b)
      : batch(b),
        x({c.sh, c.sw, c.ph, c.pw}, c.in, c.oh + c.reach_h(), pitch(c, b.lanes, c.ow + c.reach_w()), b.lanes),
        dy({1, 1, before(c.reach_h(), c.ph / c.sh), before(c.reach_w(), c.pw / c.sw)}, c.out,
           before(c.reach_h(), c.ph / c.sh) + c.oh + after((c.ph + c.h - 1) / c.sh, c.oh),
           pitch(c, b.lanes, dy_width(c)), b.lanes),
        top(dy.map.oy), left(dy.map.ox),
        first_a(c.ph / c.sh), first_b(c.pw / c.sw),
        height_t((c.ph + c.h - 1) / c.sh - first_a + 1),
        width_t((c.pw + c.w - 1) / c.sw - first_b + 1) {
    STD_TORCH_CHECK(std::max(x.size(), dy.size()) < (int64_t(1) << 31),
                    "sparsekit: an activation this large needs offsets beyond 32 bits; split the batch or the image");
  }

  static int64_t dy_width(const Conv& c) {
    return before(c.reach_w(), c.pw / c.sw) + c.ow + after((c.pw + c.w - 1) / c.sw, c.ow);
  }
  // Flat runs walk x and dy together, so both need the same pitch.
  static int64_t pitch(const Conv& c, int64_t lanes, int64_t wanted) {
    return lanes > 1 ? wanted : std::max(dy_width(c), c.ow + c.reach_w());
  }
};

// The weight gradient of one tap between an output and an input of its group, straight from the definition.
template <class T>
T exact_gradient(const Conv& c, const Sheet& dy, const Sheet& x, int64_t out, int64_t in, int64_t tap) {
  const int64_t channel = out / c.out_per_group() * c.in_per_group() + in;
  const int64_t r = tap / c.kw, s = tap % c.kw;
  T total = 0;
  for (int64_t n = 0; n < c.n; ++n)
    for (int64_t a = 0; a < c.oh; ++a)
      for (int64_t b = 0; b < c.ow; ++b) {
        const int64_t i = a * c.sh + r * c.dh - c.ph, j = b * c.sw + s * c.dw - c.pw;
        if (i < 0 || i >= c.h || j < 0 || j >= c.w) continue;
        T left, right;
        kernels<T>().load[dy.storage]({&left, 0, dy.at(n, out, a, b), 0, 1, 1, 1});
        kernels<T>().load[x.storage]({&right, 0, x.at(n, channel, i, j), 0, 1, 1, 1});
        total += left * right;
      }
  return total;
}

// The key, if a table that one call needs is worth keeping.
template <class T>
const Tensor* worth(const std::optional<Tensor>& key, const Layout<T>& layout, const Strips<T>& strips) {
  const int64_t lines = (layout.batch.samples + layout.batch.lanes - 1) / layout.batch.lanes * strips.count() *
                        strips.strip_lines();
  return key.has_value() && key->defined() && lines <= kKeepLines ? &*key : nullptr;
}

}  // namespace sparsekit
