#include "csr_conv2d.h"

#include "conv_checks.h"
#include "conv_code_product.h"
#include "conv_layout.h"

namespace sparsekit {
namespace {

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

// Flat runs multiply the zeros between rows of dy by whatever x holds there. That is harmless unless x holds
// an infinity or a NaN, which would then spoil survivors that never see it: recompute what came out NaN.
template <class T>
void repair(const Conv& c, const Sheet& dy, const Sheet& x, const Lists& lists, T* dvalues) {
  for (int64_t r = 0; r < lists.rows; ++r)
    for (int32_t p = lists.crow[r]; p < lists.crow[r + 1]; ++p)
      if (dvalues[p] != dvalues[p])
        dvalues[p] = exact_gradient<T>(c, dy, x, r, lists.index[p] / c.taps(), lists.index[p] % c.taps());
}

struct Needs {
  bool dx, dvalues, dbias;
};

// Everything a training step needs from dy, padding dy and x once.
template <class T>
std::tuple<Tensor, Tensor, Tensor> gradients(const Conv& c, const Tensor& dy_tensor, const Tensor* x_tensor,
                                             const Tensor* values, const Lists& lists, const Lists& t_lists,
                                             const int32_t* perm, Needs need,
                                             const std::optional<Tensor>& key = std::nullopt) {
  Tensor dx = need.dx ? new_image(dy_tensor, c.n, c.in, c.h, c.w) : new_empty<int64_t>(dy_tensor, {0});
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
      table = forward_table<T>(c, layout.x, lists, nullptr, strips.widest(), worth(key, layout, strips));
    }
    std::optional<Strips<T>> t_strips;
    std::optional<Target<T>> target;
    std::shared_ptr<const ConvCode> code;
    if (need.dx && dx.numel() > 0) {
      t_strips = Strips<T>::for_product(lanes, layout.height_t, layout.width_t, layout.dy.pitch);
      const Mapping map{c.sh, c.sw, c.ph - layout.first_a * c.sh, c.pw - layout.first_b * c.sw};
      target = Target<T>{Sheet(dx), map, lanes};
      if constexpr (std::is_same_v<T, float>)
        if (key.has_value() && key->defined() && c.groups == 1 && dy.storage == kNative) {
          const int64_t lines = (c.n + lanes - 1) / lanes * t_strips->count() * t_strips->strip_lines();
          code = ConvCode::find_transposed(*key, c, layout.dy, t_lists, perm, layout.corner(),
                                           CodeProduct::stride(*t_strips), lines);
        }
      if (code == nullptr)
        t_table = transposed_table<T>(c, layout.dy, t_lists, perm, *values, layout.corner(), t_strips->widest(),
                                      worth(key, layout, *t_strips));
    }
    layout.batch.each_block([&](int64_t first, int64_t groups) {
      fill_grid(layout.dy, dy, layout.batch, first, groups);
      if (need.dvalues) fill_grid(layout.x, *x, layout.batch, first, groups);
      if (t_table) BlockProduct<T>{*t_table, layout.dy, *t_strips, nullptr, *target}.run(layout.batch, first, groups);
      if constexpr (std::is_same_v<T, float>)
        if (code != nullptr) {
          const double cost = CodeProduct::line_cost(t_lists.nnz, c.in * c.phases());
          CodeProduct{*code, layout.dy, *t_strips, values_as<T>(*values), nullptr, *target, {}, cost}.run(
              layout.batch, first, groups);
        }
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
                                                       bool need_dx, bool need_dvalues, bool need_dbias,
                                                       std::optional<Tensor> code_key) {
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
    const Needs need{need_dx, need_dvalues, need_dbias};
    return gradients<decltype(zero)>(c, dy, &x, &values, lists, t_lists, perm, need, code_key);
  });
}

}  // namespace sparsekit
