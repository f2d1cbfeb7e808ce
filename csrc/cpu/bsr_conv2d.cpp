#include "bsr_conv2d.h"

#include "bsr_conv_product.h"
#include "conv_checks.h"

namespace sparsekit {
namespace {

template <class T>
Tensor forward(const Conv& c, const Blocks& w, const Tensor& x_tensor, const Tensor& values, const Lists& lists,
               const T* bias, Activation activation) {
  Tensor out = new_image(x_tensor, c.n, c.out, c.oh, c.ow);
  if (out.numel() == 0) return out;
  Layout<T> layout = Layout<T>::rows(c);
  layout.batch.limit(layout.x.size() * int64_t(sizeof(T)));
  layout.x.allocate(Workspace::kX, layout.batch.groups);
  const auto strips = Strips<T>::for_product(layout.batch.lanes, c.oh, c.ow, layout.x.pitch);
  const auto table = BlockTable<T>::forward(c, w, layout.x, lists, values);
  const Target<T> target{Sheet(out), {1, 1, 0, 0}, layout.batch.lanes};
  std::vector<T> padded;  // bias of every output of every list
  if (bias != nullptr) {
    padded.resize(size_t(lists.rows * table.rows));
    for (int64_t l = 0; l < lists.rows; ++l)
      std::copy(bias + table.outputs(l).begin, bias + table.outputs(l).end, padded.begin() + l * table.rows);
    bias = padded.data();
  }
  const Sheet x(x_tensor);
  layout.batch.each_block([&](int64_t first, int64_t groups) {
    fill_grid(layout.x, x, layout.batch, first, groups);
    BlockedConv<T>{table, layout.x, strips, target, bias, activation}.run(layout.batch, first, groups);
  });
  Workspace::mine().trim();
  return out;
}

// The weight gradient: sums over the positions of all samples, [pass][input of a block][output], kept in T.
template <class T>
class BlockGradient {
 public:
  BlockGradient(const Conv& c, const Blocks& w, const Layout<T>& layout, const Lists& lists)
      : c_(c), w_(w), layout_(layout), lists_(lists),
        lanes_(std::min<int64_t>(w.block.rows, kernels<T>().vector_lanes)),
        start_(size_t(lists.rows + 1)) {
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
            kernels<T>().numbers.sddmm({x, 1, width, width, dy, 1, layout_.dy.channel_size(), there,
                                        index_.data() + start_[l], start_[l + 1] - start_[l], accumulate, sums(l, r)},
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

  // See exact_gradient.
  void repair(const Sheet& dy, const Sheet& x, T* dvalues) const {
    const Block b = w_.block;
    for (int64_t l = 0; l < lists_.rows; ++l)
      for (int32_t p = lists_.crow[l]; p < lists_.crow[l + 1]; ++p)
        for (int64_t i = 0; i < b.size(); ++i)
          if (T& d = dvalues[p * b.size() + i]; d != d)
            d = exact_gradient<T>(c_, dy, x, outputs(l).begin + i / b.cols,
                                  lists_.index[p] % w_.cols * b.cols + i % b.cols, lists_.index[p] / w_.cols);
  }

 private:
  static constexpr int64_t kUnit = 16;  // inputs of a kernel come by this many

  Span outputs(int64_t list) const {
    const int64_t first = list % w_.rows * w_.block.rows, group = list / w_.rows * c_.out_per_group();
    return {group + first, group + std::min(c_.out_per_group(), first + w_.block.rows)};
  }
  T* sums(int64_t list, int64_t row) { return sums_.data() + row * start_.back() + start_[list] * lanes_; }

  const Conv& c_;
  const Blocks& w_;
  const Layout<T>& layout_;
  const Lists& lists_;
  int64_t lanes_;
  std::vector<int64_t> start_;
  std::vector<int32_t> index_;
  std::vector<T> sums_;
};

struct Needs {
  bool dx, dvalues, dbias;
};

// Everything a training step needs from dy, padding dy and x once.
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
  const bool dx_there = need.dx && dx.numel() > 0;
  if (c.n == 0 || c.oh == 0 || c.ow == 0) {
    if (dx_there) torch::stable::zero_(dx);
    return {dx, dvalues.finish(), dbias.finish()};
  }
  Layout<T> layout(c);
  const int64_t lanes = layout.batch.lanes;
  layout.batch.limit((layout.dy.size() + (need.dvalues ? layout.x.size() : 0)) * int64_t(sizeof(T)));
  layout.dy.allocate(Workspace::kDy, layout.batch.groups);
  const Sheet dy(dy_tensor);
  const auto strips = Strips<T>::whole(lanes, c.oh, c.ow, layout.x.pitch);
  std::optional<BlockGradient<T>> gradient;
  std::optional<Sheet> x;
  if (need.dvalues) {
    layout.x.allocate(Workspace::kX, layout.batch.groups);
    x.emplace(*x_tensor);
    gradient.emplace(c, w, layout, lists);
  }
  std::optional<Strips<T>> t_strips;
  std::optional<Target<T>> target;
  std::optional<BlockTable<T>> table;
  if (dx_there) {
    t_strips = Strips<T>::for_product(lanes, layout.height_t, layout.width_t, layout.dy.pitch);
    const Mapping map{c.sh, c.sw, c.ph - layout.first_a * c.sh, c.pw - layout.first_b * c.sw};
    target = Target<T>{Sheet(dx), map, lanes};
    table = BlockTable<T>::transposed(c, w, layout.dy, t_lists, perm, *values, layout.corner());
  }
  T* db = dbias.data();
  layout.batch.each_block([&](int64_t first, int64_t groups) {
    fill_grid(layout.dy, dy, layout.batch, first, groups);
    if (gradient) fill_grid(layout.x, *x, layout.batch, first, groups);
    if (target) BlockedConv<T>{*table, layout.dy, *t_strips, *target}.run(layout.batch, first, groups);
    const double cost = gradient ? gradient->cost(strips, groups) : 0;
    const int64_t parts = parts_for(cost + (need.dbias ? 0.03 * double(groups * layout.dy.size()) : 0));
    for_parts(parts, [&](int64_t part) {
      if (gradient) gradient->add(strips, groups, gradient->share(parts, part), first > 0);
      if (!need.dbias) return;
      const Span rows = cut(c.out, parts, part);
      for (int64_t r = rows.begin; r < rows.end; ++r)
        for (int64_t g = 0; g < groups; ++g)
          db[r] += kernels<T>().sum(layout.dy.at(g, r, 0, 0), layout.dy.channel_size());
    });
  });
  if (gradient) {
    gradient->store({0, lists.rows}, dvalues.data());
    if (lanes == 1) gradient->repair(dy, *x, dvalues.data());
  }
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
