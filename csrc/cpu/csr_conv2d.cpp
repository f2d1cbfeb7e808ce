#include "csr_conv2d.h"

#include "conv_product.h"

namespace sparsekit {
namespace {

template <class T>
void fill_grid(const Grid<T>& grid, const Sheet& from, const Batch& batch, int64_t first, int64_t groups) {
  const int64_t parts = parts_for(0.15 * double(groups * grid.size()));
  for_parts(parts, [&](int64_t part) {
    const Span channels = cut(grid.channels, parts, part, from.channels_last() ? kLanes<T> : 1);
    for (int64_t g = 0; g < groups; ++g)
      grid.fill(from, g, first + g * grid.lanes, batch.count(first, g), channels);
  });
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

template <class T>
Tensor forward(const Conv& c, const Tensor& x_tensor, const Tensor& values, const Lists& lists, const T* bias) {
  Tensor out = new_empty<int64_t>(x_tensor, {c.n, c.out, c.oh, c.ow});
  if (out.numel() == 0) return out;
  Layout<T> layout(c);
  layout.batch.limit(layout.x.size() * int64_t(sizeof(T)));
  layout.x.allocate(Workspace::kX, layout.batch.groups);
  const auto strips = Strips<T>::for_product(layout.batch.lanes, c.oh, c.ow, layout.x.pitch);
  const auto table = forward_table<T>(c, layout.x, lists, values_as<T>(values), strips.widest());
  const Target<T> target{Sheet(out), {1, 1, 0, 0}, layout.batch.lanes};
  const Sheet x(x_tensor);
  layout.batch.each_block([&](int64_t first, int64_t groups) {
    fill_grid(layout.x, x, layout.batch, first, groups);
    BlockProduct<T>{table, layout.x, strips, bias, target}.run(layout.batch, first, groups);
  });
  Workspace::mine().trim();
  return out;
}

// dvalues (+)= the survivors [span) of the weight gradient of one block.
template <class T>
void sddmm_span(const Layout<T>& layout, const OffsetTable<T>& table, const Strips<T>& strips, int64_t groups,
                Span span, bool accumulate, T* dvalues) {
  if (span.begin >= span.end) return;
  const int32_t* crow = table.bound(0);
  const int64_t row = std::upper_bound(crow, crow + table.rows + 1, int32_t(span.begin)) - crow - 1;
  const int64_t row_end = std::lower_bound(crow, crow + table.rows + 1, int32_t(span.end)) - crow;
  const int64_t corner = layout.top * layout.dy.pitch + layout.left;
  for (int64_t g = 0; g < groups; ++g)
    strips.each(0, [&](int64_t a, int64_t b, int64_t, int lines) {
      const T* x = layout.x.at(g, 0, 0, a * layout.x.pitch + b);
      const T* dy = layout.dy.at(g, row, 0, corner + a * layout.dy.pitch + b);
      for (int64_t t = 0; t < table.tiles; ++t)
        kernels<T>().sddmm({x, table.offset, true, dy, layout.dy.channel_size(), table.bound(t) + row,
                            table.bound(t + 1) + row, row_end - row, int32_t(span.begin), int32_t(span.end),
                            accumulate, dvalues},
                           lines);
      accumulate = true;
    });
}

// One element of the weight gradient, straight from the definition.
template <class T>
T exact_gradient(const Conv& c, const Sheet& dy, const Sheet& x, int64_t out, int64_t k) {
  const int64_t channel = out / c.out_per_group() * c.in_per_group() + k / c.taps();
  const int64_t r = k % c.taps() / c.kw, s = k % c.kw;
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

// Flat runs multiply the zeros between rows of dy by whatever x holds there. That is harmless unless x holds
// an infinity or a NaN, which would then spoil survivors that never see it: recompute what came out NaN.
template <class T>
void repair(const Conv& c, const Sheet& dy, const Sheet& x, const Lists& lists, T* dvalues) {
  for (int64_t r = 0; r < lists.rows; ++r)
    for (int32_t p = lists.crow[r]; p < lists.crow[r + 1]; ++p)
      if (dvalues[p] != dvalues[p]) dvalues[p] = exact_gradient<T>(c, dy, x, r, lists.index[p]);
}

struct Needs {
  bool dx, dvalues, dbias;
};

// Everything a training step needs from dy, padding dy and x once.
template <class T>
std::tuple<Tensor, Tensor, Tensor> gradients(const Conv& c, const Tensor& dy_tensor, const Tensor* x_tensor,
                                             const Tensor* values, const Lists& lists, const Lists& t_lists,
                                             const int32_t* perm, Needs need) {
  Tensor dx = need.dx ? new_empty<int64_t>(dy_tensor, {c.n, c.in, c.h, c.w}) : new_empty<int64_t>(dy_tensor, {0});
  Tensor dvalues = new_empty<int64_t>(dy_tensor, {need.dvalues ? lists.nnz : 0});
  Tensor dbias = new_empty<int64_t>(dy_tensor, {need.dbias ? c.out : 0});
  // Sums over the batch are kept in T until the end.
  std::vector<T> sums(size_t(dvalues.numel() + dbias.numel()), T(0));
  T* dv = sums.data();
  T* db = dv + dvalues.numel();
  const bool work = c.n > 0 && c.oh > 0 && c.ow > 0;
  if (work) {
    Layout<T> layout(c);
    const int64_t lanes = layout.batch.lanes;
    layout.batch.limit((layout.dy.size() + (need.dvalues ? layout.x.size() : 0)) * int64_t(sizeof(T)));
    layout.dy.allocate(Workspace::kDy, layout.batch.groups);
    const Sheet dy(dy_tensor);

    const auto strips = Strips<T>::whole(lanes, c.oh, c.ow, layout.x.pitch);
    std::optional<OffsetTable<T>> table, t_table;
    std::optional<Sheet> x;
    if (need.dvalues) {
      layout.x.allocate(Workspace::kX, layout.batch.groups);
      x.emplace(*x_tensor);
      table = forward_table<T>(c, layout.x, lists, nullptr, strips.widest());
    }
    std::optional<Strips<T>> t_strips;
    std::optional<Target<T>> target;
    if (need.dx && dx.numel() > 0) {
      t_strips = Strips<T>::for_product(lanes, layout.height_t, layout.width_t, layout.dy.pitch);
      const Mapping map{c.sh, c.sw, c.ph - layout.first_a * c.sh, c.pw - layout.first_b * c.sw};
      target = Target<T>{Sheet(dx), map, lanes};
      t_table = transposed_table<T>(c, layout.dy, t_lists, perm, *values, layout.corner(), t_strips->widest());
    }
    layout.batch.each_block([&](int64_t first, int64_t groups) {
      fill_grid(layout.dy, dy, layout.batch, first, groups);
      if (need.dvalues) fill_grid(layout.x, *x, layout.batch, first, groups);
      if (target) BlockProduct<T>{*t_table, layout.dy, *t_strips, nullptr, *target}.run(layout.batch, first, groups);
      const double dv_cost = need.dvalues ? product_cost(*table, strips, groups) : 0;
      const int64_t parts = parts_for(dv_cost + (need.dbias ? 0.03 * double(groups * layout.dy.size()) : 0));
      for_parts(parts, [&](int64_t part) {
        if (need.dvalues)
          sddmm_span(layout, *table, strips, groups, cut(lists.nnz, parts, part, kLanes<T>), first > 0, dv);
        if (!need.dbias) return;
        const Span rows = cut(c.out, parts, part);
        for (int64_t r = rows.begin; r < rows.end; ++r)
          for (int64_t g = 0; g < groups; ++g)
            db[r] += kernels<T>().sum(layout.dy.at(g, r, 0, 0), layout.dy.channel_size());
      });
    });
    if (need.dvalues && lanes == 1) repair(c, dy, *x, lists, dv);
  } else if (need.dx && dx.numel() > 0) {
    torch::stable::zero_(dx);
  }
  const Storage storage = storage_of(dy_tensor.scalar_type());
  kernels<T>().store[storage]({dv, 0, dvalues.mutable_data_ptr(), 0, 1, 1, dvalues.numel()});
  kernels<T>().store[storage]({db, 0, dbias.mutable_data_ptr(), 0, 1, 1, dbias.numel()});
  Workspace::mine().trim();
  return {dx, dvalues, dbias};
}

// ---- argument checks --------------------------------------------------------------------------------

Conv geometry(const char* op, const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation,
              int64_t groups) {
  const auto pair = [&](const char* name, const Ints& v, int64_t least) {
    STD_TORCH_CHECK(v.size() == 2 && v[0] >= least && v[1] >= least, op, ": Expected ", name,
                    " to be two integers of at least ", least);
  };
  pair("kernel_size", kernel, 1);
  pair("stride", stride, 1);
  pair("padding", padding, 0);
  pair("dilation", dilation, 1);
  STD_TORCH_CHECK(groups >= 1, op, ": Expected groups of at least 1, got ", groups);
  Conv c{};
  c.kh = kernel[0], c.kw = kernel[1], c.sh = stride[0], c.sw = stride[1], c.ph = padding[0], c.pw = padding[1];
  c.dh = dilation[0], c.dw = dilation[1], c.groups = groups;
  return c;
}

void set_channels(const char* op, Conv& c, int64_t in, int64_t out) {
  STD_TORCH_CHECK(in % c.groups == 0 && out % c.groups == 0, op, ": Expected ", in, " input and ", out,
                  " output channels to be divisible by groups = ", c.groups);
  c.in = in, c.out = out;
}

void set_input(const char* op, Conv& c, int64_t n, int64_t h, int64_t w) {
  c.n = n, c.h = h, c.w = w;
  const int64_t span_h = h + 2 * c.ph - c.dh * (c.kh - 1) - 1, span_w = w + 2 * c.pw - c.dw * (c.kw - 1) - 1;
  STD_TORCH_CHECK(h > 0 && w > 0 && span_h >= 0 && span_w >= 0, op,
                  ": Expected an input at least as large as the kernel, got ", h, "x", w, " padded by ", c.ph,
                  "x", c.pw, " for a kernel of ", c.kh, "x", c.kw, " dilated by ", c.dh, "x", c.dw);
  c.oh = span_h / c.sh + 1, c.ow = span_w / c.sw + 1;
}

void check_reach(const char* op, const Conv& c, const Lists& lists) {
  const int64_t largest = largest_index(lists), columns = c.in_per_group() * c.taps();
  STD_TORCH_CHECK(largest < columns, op, ": Expected x of more channels: the weight uses column ", largest,
                  " but ", c.in, " channels in ", c.groups, " groups with ", c.taps(), " taps give ", columns);
}

void check_input(const char* op, Conv& c, const Tensor& x, const Lists& lists) {
  check_float(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 4, op, ": Expected x of shape [N, C, H, W], got ", shape_of(x));
  set_channels(op, c, x.size(1), lists.rows);
  set_input(op, c, x.size(0), x.size(2), x.size(3));
  check_reach(op, c, lists);
}

void check_output(const char* op, const Conv& c, const Tensor& dy) {
  check_float(op, "dy", dy);
  STD_TORCH_CHECK(dy.dim() == 4 && dy.size(0) == c.n && dy.size(1) == c.out && dy.size(2) == c.oh && dy.size(3) == c.ow,
                  op, ": Expected dy of shape [", c.n, ", ", c.out, ", ", c.oh, ", ", c.ow, "], got ", shape_of(dy));
}

const int32_t* check_transpose(const char* op, const Conv& c, const Lists& t_lists, const Tensor& t_perm,
                               const Tensor& values) {
  STD_TORCH_CHECK(t_lists.rows == c.in_per_group() * c.taps(), op, ": Expected t_crow of shape [",
                  c.in_per_group() * c.taps() + 1, "], got [", t_lists.rows + 1, "]");
  STD_TORCH_CHECK(largest_index(t_lists) < c.out, op, ": Expected t_row below ", c.out, " output channels, got ",
                  largest_index(t_lists));
  check_vector(op, "values", values, t_lists.nnz);
  const int32_t* perm = check_index(op, "t_perm", t_perm);
  check_vector(op, "t_perm", t_perm, t_lists.nnz);
  return perm;
}

}  // namespace

Tensor csr_conv2d(Tensor x, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias, Ints kernel_size,
                  Ints stride, Ints padding, Ints dilation, int64_t groups) {
  constexpr const char* op = "csr_conv2d";
  Conv c = geometry(op, kernel_size, stride, padding, dilation, groups);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  check_input(op, c, x, lists);
  check_same_dtype(op, "values", values, "x", x);
  check_vector(op, "values", values, lists.nnz);
  return with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> copy;
    return forward<T>(c, x, values, lists, bias_as<T>(op, bias, x, lists.rows, copy));
  });
}

Tensor csr_conv2d_t(Tensor dy, Tensor values, Tensor t_crow, Tensor t_row, Tensor t_perm, Ints input_size,
                    Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups) {
  constexpr const char* op = "csr_conv2d_t";
  Conv c = geometry(op, kernel_size, stride, padding, dilation, groups);
  check_float(op, "dy", dy);
  STD_TORCH_CHECK(dy.dim() == 4, op, ": Expected dy of shape [N, C, H, W], got ", shape_of(dy));
  STD_TORCH_CHECK(input_size.size() == 2, op, ": Expected input_size to be two integers");
  const Lists t_lists = check_lists(op, "t_crow", t_crow, "t_row", t_row);
  STD_TORCH_CHECK(t_lists.rows % c.taps() == 0, op, ": Expected t_crow to describe whole kernels of ", c.taps(),
                  " taps, got ", t_lists.rows, " columns");
  set_channels(op, c, t_lists.rows / c.taps() * groups, dy.size(1));
  set_input(op, c, dy.size(0), input_size[0], input_size[1]);
  check_output(op, c, dy);
  check_same_dtype(op, "values", values, "dy", dy);
  const int32_t* perm = check_transpose(op, c, t_lists, t_perm, values);
  return with_compute_type(dy, [&](auto zero) {
    const Needs need{true, false, false};
    return std::get<0>(gradients<decltype(zero)>(c, dy, nullptr, &values, Lists{}, t_lists, perm, need));
  });
}

Tensor csr_conv2d_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, Ints kernel_size, Ints stride, Ints padding,
                        Ints dilation, int64_t groups) {
  constexpr const char* op = "csr_conv2d_sddmm";
  Conv c = geometry(op, kernel_size, stride, padding, dilation, groups);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  check_input(op, c, x, lists);
  check_output(op, c, dy);
  check_same_dtype(op, "dy", dy, "x", x);
  return with_compute_type(x, [&](auto zero) {
    const Needs need{false, true, false};
    return std::get<1>(gradients<decltype(zero)>(c, dy, &x, nullptr, lists, Lists{}, nullptr, need));
  });
}

std::tuple<Tensor, Tensor, Tensor> csr_conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor crow, Tensor col,
                                                       Tensor t_crow, Tensor t_row, Tensor t_perm, Ints kernel_size,
                                                       Ints stride, Ints padding, Ints dilation, int64_t groups,
                                                       bool need_dx, bool need_dvalues, bool need_dbias) {
  constexpr const char* op = "csr_conv2d_backward";
  Conv c = geometry(op, kernel_size, stride, padding, dilation, groups);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  check_input(op, c, x, lists);
  check_output(op, c, dy);
  check_same_dtype(op, "dy", dy, "x", x);
  check_same_dtype(op, "values", values, "x", x);
  check_vector(op, "values", values, lists.nnz);
  Lists t_lists{};
  const int32_t* perm = nullptr;
  if (need_dx) {
    t_lists = check_lists(op, "t_crow", t_crow, "t_row", t_row);
    perm = check_transpose(op, c, t_lists, t_perm, values);
  }
  return with_compute_type(x, [&](auto zero) {
    return gradients<decltype(zero)>(c, dy, &x, &values, lists, t_lists, perm, {need_dx, need_dvalues, need_dbias});
  });
}

}  // namespace sparsekit
