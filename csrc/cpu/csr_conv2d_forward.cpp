// Forward, between tensors or planes.
#include "conv_checks.h"
#include "conv_code_product.h"
#include "conv_layout.h"
#include "csr_conv2d.h"

namespace sparsekit {
namespace {

// A kernel of one tap reads every sh-th row and sw-th column alone: those are its image, without a stride.
Sheet read_by_one_tap(const Conv& c, Sheet x) {
  x.h = c.oh, x.w = c.ow;
  x.stride_h *= c.sh, x.stride_w *= c.sw;
  return x;
}

// Where a product reads: planes that lie there already, or a grid to be filled.
template <class T>
struct Padded {
  Batch batch;
  Grid<T> grid;
  Strips<T> strips;
  bool filled;

  Padded(const Conv& c, Layout<T> layout, const Source<T>& x)
      : batch(layout.batch), grid(layout.x), strips{}, filled(in_place(c, batch.lanes, x)) {
    if (filled) {
      grid = x.planes->padded_by(c.ph, c.pw);
      batch.groups = std::max<int64_t>(1, x.planes->groups());
    } else {
      batch.limit(grid.size() * int64_t(sizeof(T)));
      grid.allocate(Workspace::kX, batch.groups);
    }
    strips = Strips<T>::for_product(batch.lanes, c.oh, c.ow, grid.pitch);
  }

  int64_t lines() const {
    return (batch.samples + batch.lanes - 1) / batch.lanes * strips.count() * strips.strip_lines();
  }

 private:
  static bool in_place(const Conv& c, int64_t lanes, const Source<T>& x) {
    return x.planes && x.planes->grid.lanes == lanes && c.phases() == 1 && std::max(c.ph, c.pw) <= x.planes->border;
  }
};

// Images of a tensor or planes; lanes 0 leaves it to the kernel how many samples lie side by side.
template <class T>
void forward(Conv c, const Source<T>& x, const Tensor& values, const Lists& lists, const T* bias,
             const std::optional<Tensor>& key, const Ending<T>& ending, const Sheet* y, int64_t lanes) {
  const bool apart = c.taps() == 1 && c.phases() > 1 && c.ph == 0 && c.pw == 0;
  const auto from = [x, apart, seen = c](int64_t sample) {
    auto [sheet, i] = x.from(sample);
    return std::pair{apart ? read_by_one_tap(seen, sheet) : sheet, i};
  };
  Source<T> source = x;
  if (apart) {
    c.h = c.oh, c.w = c.ow, c.sh = c.sw = 1;
    source.planes.reset();
  }
  const auto run = [&](const Padded<T>& padded, const auto& product) {
    const Target<T> target{y ? *y : Sheet::native(nullptr, sizeof(T)), {1, 1, 0, 0}, padded.batch.lanes};
    padded.batch.each_block([&](int64_t first, int64_t groups) {
      if (!padded.filled) fill_grid_from(from, padded.grid, padded.batch, first, groups);
      product(target, padded.batch, first, groups);
    });
    Workspace::mine().trim();
  };
  const auto layout = [&](bool rows) {
    return lanes != 0 ? Layout<T>(c, lanes) : rows ? Layout<T>::rows(c) : Layout<T>(c);
  };
  if constexpr (std::is_same_v<T, float>) {
    if (key.has_value() && key->defined() && c.groups == 1 && from(0).first.storage == kNative) {
      const double cost = CodeProduct::line_cost(lists.nnz, lists.rows);
      const Sheet images = from(0).first;
      if (lanes == 0 && PointwiseProduct::fits(c, images, ending.skip)) {
        const Grid<float> planes = PointwiseProduct::planes(images);
        const int64_t all = c.n * PointwiseProduct::lines(images);
        if (const auto code = ConvCode::find_forward(*key, c, planes, lists, planes.plane, all))
          return PointwiseProduct{*code, images, *y, values_as<T>(values), bias, ending, cost}.run();
      }
      const Padded<T> padded(c, layout(true), source);
      const int64_t stride = CodeProduct::stride(padded.strips);
      if (const auto code = ConvCode::find_forward(*key, c, padded.grid, lists, stride, padded.lines()))
        return run(padded, [&](const Target<T>& target, const Batch& batch, int64_t first, int64_t groups) {
          CodeProduct{*code, padded.grid, padded.strips, values_as<T>(values), bias, target, ending, cost}.run(
              batch, first, groups);
        });
    }
  }
  const Padded<T> padded(c, layout(false), source);
  const Tensor* kept = key.has_value() && key->defined() && padded.lines() <= kKeepLines ? &*key : nullptr;
  const auto table =
      forward_table<T>(c, padded.grid, lists, values_as<T>(values), padded.strips.widest(), kept);
  run(padded, [&](const Target<T>& target, const Batch& batch, int64_t first, int64_t groups) {
    BlockProduct<T>{table, padded.grid, padded.strips, bias, target, ending}.run(batch, first, groups);
  });
}

void check_skip(const char* op, const Conv& c, int64_t n, int64_t channels, int64_t h, int64_t w) {
  STD_TORCH_CHECK(n == c.n && channels == c.out && h == c.oh && w == c.ow, op, ": Expected skip of shape [", c.n, ", ",
                  c.out, ", ", c.oh, ", ", c.ow, "], got [", n, ", ", channels, ", ", h, ", ", w, "]");
}

void check_skip(const char* op, const Conv& c, const Tensor& skip) {
  STD_TORCH_CHECK(skip.dim() == 4, op, ": Expected skip of shape [", c.n, ", ", c.out, ", ", c.oh, ", ", c.ow,
                  "], got ", shape_of(skip));
  check_skip(op, c, skip.size(0), skip.size(1), skip.size(2), skip.size(3));
}

}  // namespace

Tensor csr_conv2d(Tensor x, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias, Ints kernel_size,
                  Ints stride, Ints padding, Ints dilation, int64_t groups, std::optional<Tensor> code_key,
                  std::string activation, std::optional<Tensor> skip) {
  constexpr const char* op = "csr_conv2d";
  Conv c = geometry(op, kernel_size, stride, padding, dilation, groups);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  check_input(op, c, x, lists);
  check_same_dtype(op, "values", values, "x", x);
  check_vector(op, "values", values, lists.nnz);
  const Activation kind = activation_of(op, activation);
  std::optional<Sheet> added;
  if (skip.has_value() && skip->defined()) {
    check_same_dtype(op, "skip", *skip, "x", x);
    check_skip(op, c, *skip);
    added.emplace(*skip);
  }
  Tensor out = new_image(x, c.n, c.out, c.oh, c.ow);
  if (out.numel() == 0) return out;
  return with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> copy;
    const Sheet y(out);
    forward<T>(c, {Sheet(x), {}}, values, lists, bias_as<T>(op, bias, x, lists.rows, copy), code_key,
               Ending<T>{kind, added ? &*added : nullptr}, &y, 0);
    return out;
  });
}

Tensor csr_conv2d_planes(Tensor x, Ints x_size, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias,
                         Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups,
                         std::optional<Tensor> code_key, std::string activation, std::optional<Tensor> skip,
                         Ints skip_size, int64_t lanes, int64_t border) {
  constexpr const char* op = "csr_conv2d_planes";
  Conv c = geometry(op, kernel_size, stride, padding, dilation, groups);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  check_float(op, "x", x);
  STD_TORCH_CHECK(storage_of(x.scalar_type()) == kNative && x.dim() == 4, op,
                  ": Expected x of four axes, float32 or float64, got ", shape_of(x), " ",
                  torch::headeronly::toString(x.scalar_type()));
  check_same_dtype(op, "values", values, "x", x);
  check_vector(op, "values", values, lists.nnz);
  const Activation kind = activation_of(op, activation);
  return with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK(lanes == 1 || lanes == kLanes<T>, op, ": Expected 1 or ", kLanes<T>, " lanes, got ", lanes);
    const auto fits = [&](const Planes<T>& planes) {
      STD_TORCH_CHECK(planes.grid.lanes <= lanes, op, ": Expected planes of 1 lane, got ", planes.grid.lanes);
      STD_TORCH_CHECK(planes.grid.size() < (int64_t(1) << 31), op, ": Expected planes within reach of 32 bits");
    };
    Source<T> source;
    if (x_size.empty()) source.images.emplace(Sheet(x));
    else fits(source.planes.emplace(Planes<T>::of(op, "x", x, x_size)));
    set_channels(op, c, x.size(1), lists.rows);
    if (source.planes) set_input(op, c, source.planes->n, source.planes->h, source.planes->w);
    else set_input(op, c, x.size(0), x.size(2), x.size(3));
    check_reach(op, c, lists);

    Ending<T> ending{kind};
    std::optional<Beside<T>> beside;
    std::optional<Planes<T>> aside;  // a skip as the kernel would have it
    Tensor copied = x;
    if (skip.has_value() && skip->defined()) {
      check_same_dtype(op, "skip", *skip, "x", x);
      Source<T> added;
      if (skip_size.empty()) {
        check_skip(op, c, *skip);
        added.images.emplace(Sheet(*skip));
      } else {
        fits(added.planes.emplace(Planes<T>::of(op, "skip", *skip, skip_size)));
        check_skip(op, c, added.planes->n, skip->size(1), added.planes->h, added.planes->w);
      }
      if (added.planes && added.planes->grid.lanes == lanes) {
        beside.emplace(*added.planes);
      } else if (added.from(0).first.stride_w == 1 && lanes == 1) {
        beside.emplace(added.from(0).first);
      } else if (c.n > 0) {
        aside.emplace(Ints{c.n, c.oh, c.ow, 0}, c.out, lanes);
        copied = aside->allocate(x);
        fill_grid_from([&](int64_t sample) { return added.from(sample); }, aside->grid, Batch{c.n, lanes, 1}, 0,
                       aside->groups());
        beside.emplace(*aside);
      }
      ending.beside = beside ? &*beside : nullptr;
    }
    std::optional<Planes<T>> result;
    std::optional<Sheet> y;
    Tensor out = x;
    if (border >= 0) {
      result.emplace(Ints{c.n, c.oh, c.ow, border}, c.out, lanes);
      out = result->allocate(x);
      ending.planes = &*result;
    } else {
      out = new_empty<int64_t>(x, {c.n, c.out, c.oh, c.ow});
      y.emplace(out);
    }
    if (out.numel() == 0) return out;
    std::vector<T> copy;
    forward<T>(c, source, values, lists, bias_as<T>(op, bias, x, lists.rows, copy), code_key, ending,
               y ? &*y : nullptr, lanes);
    return out;
  });
}

}  // namespace sparsekit
