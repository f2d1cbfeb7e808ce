#include "bsr_conv2d.h"

#include "bsr_conv_gradient.h"
#include "bsr_conv_product.h"
#include "conv_checks.h"

namespace sparsekit {
namespace {

template <class T>
Tensor forward(const Conv& whole, const Blocks& w, const Tensor& x_tensor, const Tensor& values, const Lists& lists,
               const T* bias, Activation activation) {
  Tensor out = new_image(x_tensor, whole.n, whole.out, whole.oh, whole.ow);
  if (out.numel() == 0) return out;
  const auto in = Reading<T>::forward(whole, w, Sheet(x_tensor), values);
  const Conv& c = in.conv;
  Layout<T> layout = Layout<T>::rows(c);
  layout.batch.limit(layout.x.size() * int64_t(sizeof(T)));
  layout.x.allocate(Workspace::kX, layout.batch.groups);
  const auto strips = Strips<T>::for_product(layout.batch.lanes, c.oh, c.ow, layout.x.pitch);
  const auto table = BlockTable<T>::forward(in, layout.x, lists);
  Target<T> target{Sheet(out), {1, 1, 0, 0}, layout.batch.lanes}, odd = target;
  if (in.fold == 2) target.sheet = every_second(Sheet(out), 0), odd.sheet = every_second(Sheet(out), 1);
  std::vector<T> padded;  // bias of every output of every list
  if (bias != nullptr) {
    padded.resize(size_t(lists.rows * table.rows));
    for (int64_t l = 0; l < lists.rows; ++l)
      std::copy(bias + table.outputs(l).begin, bias + table.outputs(l).end, padded.begin() + l * table.rows);
    bias = padded.data();
  }
  layout.batch.each_block([&](int64_t first, int64_t groups) {
    fill_grid(layout.x, in.sheet, layout.batch, first, groups);
    const Target<T>* second = in.fold == 2 ? &odd : nullptr;
    BlockedConv<T>{in, table, layout.x, strips, target, second, bias, activation}.run(layout.batch, first, groups);
  });
  Workspace::mine().trim();
  return out;
}

struct Needs {
  bool dx, dvalues, dbias;
};

// The tensors and lists of a backward call, and where its results go.
template <class T>
struct Backward {
  const Conv& conv;
  const Blocks& weight;
  const Sheet& dy;
  const Sheet* x;
  const Lists &lists, &t_lists;
  const int32_t* perm;
  Tensor& dx;
  T *dvalues, *dbias;

  // The gradients that are needed, from dy read in one way; dy and x are padded once for all of them.
  void run(const Reading<T>& in, Needs need) const {
    const Conv& c = in.conv;
    Layout<T> layout(c);
    const int64_t lanes = layout.batch.lanes;
    layout.batch.limit((layout.dy.size() + (need.dvalues ? layout.x.size() : 0)) * int64_t(sizeof(T)));
    layout.dy.allocate(Workspace::kDy, layout.batch.groups);
    const auto strips = Strips<T>::whole(lanes, c.oh, c.ow, layout.x.pitch);
    std::optional<BlockGradient<T>> gradient;
    std::optional<Sheet> x_sheet;
    if (need.dvalues) {
      layout.x.allocate(Workspace::kX, layout.batch.groups);
      x_sheet = in.paired() ? pairs_of_samples(*x) : *x;
      gradient.emplace(in, layout, lists);
    }
    std::optional<Strips<T>> t_strips;
    std::optional<Target<T>> target;
    std::optional<BlockTable<T>> table;
    if (need.dx) {
      t_strips = Strips<T>::for_product(lanes, layout.height_t, layout.width_t, layout.dy.pitch);
      const Mapping map{c.sh, c.sw, c.ph - layout.first_a * c.sh, c.pw - layout.first_b * c.sw};
      target = Target<T>{Sheet(dx), map, lanes};
      table = BlockTable<T>::transposed(in, layout.dy, t_lists, perm, layout.corner());
    }
    layout.batch.each_block([&](int64_t first, int64_t groups) {
      fill_grid(layout.dy, in.sheet, layout.batch, first, groups);
      if (gradient) fill_grid(layout.x, *x_sheet, layout.batch, first, groups);
      if (target) BlockedConv<T>{in, *table, layout.dy, *t_strips, *target}.run(layout.batch, first, groups);
      const double cost = gradient ? gradient->cost(strips, groups) : 0;
      const int64_t parts = parts_for(cost + (need.dbias ? 0.03 * double(groups * layout.dy.size()) : 0));
      for_parts(parts, [&](int64_t part) {
        if (gradient) gradient->add(strips, groups, gradient->share(parts, part), first > 0);
        if (!need.dbias) return;
        const Span rows = cut(c.out, parts, part);
        for (int64_t r = rows.begin; r < rows.end; ++r)
          for (int64_t g = 0; g < groups; ++g)
            dbias[r] += kernels<T>().sum(layout.dy.at(g, r, 0, 0), layout.dy.channel_size());
      });
    });
    if (!gradient) return;
    gradient->store({0, lists.rows}, dvalues);
    if (lanes == 1) gradient->repair(conv, dy, *x, dvalues);
  }

  void run(Needs need, const Tensor* values) const {
    // Pairs of channels, pairs of samples and numbers are three ways to read dy; all that takes numbers shares them.
    const auto numbers = Reading<T>::numbers(conv, weight, dy);
    const auto product = need.dx ? Reading<T>::transposed(conv, weight, dy, *values) : numbers;
    const auto sampled = need.dvalues ? Reading<T>::sampled(conv, weight, dy, *x) : numbers;
    if (product.paired()) run(product, {true, false, false}), need.dx = false;
    if (sampled.paired()) run(sampled, {false, true, false}), need.dvalues = false;
    if (need.dx || need.dvalues || need.dbias) run(need.dx ? product : numbers, need);
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> gradients(const Conv& c, const Blocks& w, const Tensor& dy_tensor,
                                             const Tensor* x_tensor, const Tensor* values, const Lists& lists,
                                             const Lists& t_lists, const int32_t* perm, Needs need) {
  Tensor dx = need.dx ? new_image(dy_tensor, c.n, c.in, c.h, c.w) : new_empty<int64_t>(dy_tensor, {0});
  const int64_t blocks = need.dvalues ? lists.nnz : 0;
  Result<T> dvalues(need.dvalues ? new_empty<int64_t>(dy_tensor, {blocks, w.block.rows, w.block.cols})
                                 : new_empty<int64_t>(dy_tensor, {0}),
                    Workspace::kGrad);
  Result<T> dbias(new_empty<int64_t>(dy_tensor, {need.dbias ? c.out : 0}), Workspace::kStage);
  std::fill_n(dvalues.data(), blocks * w.block.size(), T(0));
  std::fill_n(dbias.data(), need.dbias ? c.out : 0, T(0));
  need.dx = need.dx && dx.numel() > 0;
  if (c.n == 0 || c.oh == 0 || c.ow == 0) {
    if (need.dx) torch::stable::zero_(dx);
    return {dx, dvalues.finish(), dbias.finish()};
  }
  const Sheet dy(dy_tensor);
  std::optional<Sheet> x;
  if (need.dvalues) x.emplace(*x_tensor);
  Backward<T>{c, w, dy, x ? &*x : nullptr, lists, t_lists, perm, dx, dvalues.data(), dbias.data()}.run(need, values);
  std::tuple<Tensor, Tensor, Tensor> result{dx, dvalues.finish(), dbias.finish()};
  Workspace::mine().trim();
  return result;
}

// ---- argument checks --------------------------------------------------------------------------------

void check_input(const char* op, Conv& c, const Tensor& x, int64_t out) {
  check_float(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 4, op, ": Expected x of shape [N, C, H, W], got ", shape_of(x));
  set_channels(op, c, x.size(1), out);
  set_input(op, c, x.size(0), x.size(2), x.size(3));
}

void check_places(const char* op, const Lists& lists, const char* name, int64_t count, int64_t places) {
  STD_TORCH_CHECK(lists.rows == count, op, ": Expected ", name, " of shape [", count + 1, "], got [", lists.rows + 1,
                  "]");
  const int64_t largest = largest_index(lists);
  STD_TORCH_CHECK(largest < places, op, ": Expected blocks below place ", places, ", got ", largest);
}

void check_forward(const char* op, const Conv& c, const Blocks& w, const Lists& lists) {
  check_places(op, lists, "crow_indices", c.groups * w.rows, c.taps() * w.cols);
}

const int32_t* check_transposed(const char* op, const Conv& c, const Blocks& w, const Lists& t, const Tensor& t_perm) {
  check_places(op, t, "t_crow", c.groups * w.cols * c.taps(), c.taps() * w.rows);
  const int32_t* perm = check_index(op, "t_perm", t_perm);
  check_vector(op, "t_perm", t_perm, t.nnz);
  return perm;
}

}  // namespace

Tensor bsr_conv2d(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor, std::optional<Tensor> bias,
                  int64_t out_channels, Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups,
                  std::string activation) {
  constexpr const char* op = "bsr_conv2d";
  Conv c = geometry(op, kernel_size, stride, padding, dilation, groups);
  check_input(op, c, x, out_channels);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  const Blocks w(c, check_blocks(op, values, x, "x", lists.nnz));
  check_forward(op, c, w, lists);
  const Activation kind = activation_of(op, activation);
  return with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> copy;
    return forward<T>(c, w, x, values, lists, bias_as<T>(op, bias, x, c.out, copy), kind);
  });
}

Tensor bsr_conv2d_t(Tensor dy, Tensor values, Tensor t_crow, Tensor t_row, Tensor t_perm, Tensor, int64_t in_channels,
                    Ints input_size, Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups) {
  constexpr const char* op = "bsr_conv2d_t";
  Conv c = geometry(op, kernel_size, stride, padding, dilation, groups);
  check_float(op, "dy", dy);
  STD_TORCH_CHECK(dy.dim() == 4, op, ": Expected dy of shape [N, C, H, W], got ", shape_of(dy));
  STD_TORCH_CHECK(input_size.size() == 2, op, ": Expected input_size to be two integers");
  set_channels(op, c, in_channels, dy.size(1));
  set_input(op, c, dy.size(0), input_size[0], input_size[1]);
  check_output(op, c, dy);
  const Lists t_lists = check_lists(op, "t_crow", t_crow, "t_row", t_row);
  const Blocks w(c, check_blocks(op, values, dy, "dy", t_lists.nnz));
  const int32_t* perm = check_transposed(op, c, w, t_lists, t_perm);
  return with_compute_type(dy, [&](auto zero) {
    const Needs need{true, false, false};
    return std::get<0>(gradients<decltype(zero)>(c, w, dy, nullptr, &values, Lists{}, t_lists, perm, need));
  });
}

Tensor bsr_conv2d_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, Tensor, Ints block, Ints kernel_size, Ints stride,
                        Ints padding, Ints dilation, int64_t groups) {
  constexpr const char* op = "bsr_conv2d_sddmm";
  Conv c = geometry(op, kernel_size, stride, padding, dilation, groups);
  STD_TORCH_CHECK(dy.dim() == 4, op, ": Expected dy of shape [N, C, H, W], got ", shape_of(dy));
  STD_TORCH_CHECK(block.size() == 2, op, ": Expected block to be two integers");
  check_input(op, c, x, dy.size(1));
  check_output(op, c, dy);
  check_same_dtype(op, "dy", dy, "x", x);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  const Blocks w(c, check_block(op, block[0], block[1]));
  check_forward(op, c, w, lists);
  return with_compute_type(x, [&](auto zero) {
    const Needs need{false, true, false};
    return std::get<1>(gradients<decltype(zero)>(c, w, dy, &x, nullptr, lists, Lists{}, nullptr, need));
  });
}

std::tuple<Tensor, Tensor, Tensor> bsr_conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor crow, Tensor col,
                                                       Tensor, Tensor t_crow, Tensor t_row, Tensor t_perm, Tensor,
                                                       Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                                                       int64_t groups, bool need_dx, bool need_dvalues,
                                                       bool need_dbias) {
  constexpr const char* op = "bsr_conv2d_backward";
  Conv c = geometry(op, kernel_size, stride, padding, dilation, groups);
  STD_TORCH_CHECK(dy.dim() == 4, op, ": Expected dy of shape [N, C, H, W], got ", shape_of(dy));
  check_input(op, c, x, dy.size(1));
  check_output(op, c, dy);
  check_same_dtype(op, "dy", dy, "x", x);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  const Blocks w(c, check_blocks(op, values, x, "x", lists.nnz));
  check_forward(op, c, w, lists);
  Lists t_lists{};
  const int32_t* perm = nullptr;
  if (need_dx) {
    t_lists = check_lists(op, "t_crow", t_crow, "t_row", t_row);
    perm = check_transposed(op, c, w, t_lists, t_perm);
  }
  return with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    return gradients<T>(c, w, dy, &x, &values, lists, t_lists, perm, {need_dx, need_dvalues, need_dbias});
  });
}

}  // namespace sparsekit
