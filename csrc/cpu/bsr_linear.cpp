#include "bsr_linear.h"

#include "bsr_linear_gradient.h"
#include "bsr_linear_product.h"

namespace sparsekit {
namespace {

constexpr int64_t kPackedBytes = 16 << 20;  // activations packed at a time
constexpr int64_t kFewSamples = 3;          // up to here one after the other is faster than packed

double pack_cost(int64_t samples, int64_t features) { return 0.1 * double(samples) * double(features); }
double product_cost(int64_t weights, int64_t samples) { return 0.02 * double(weights) * double(samples); }

// Samples packed together; a whole number of panels.
template <class T>
int64_t samples_at_once(int64_t features, int64_t lines) {
  const int64_t panel = lines * kLanes<T>;
  return std::max<int64_t>(1, kPackedBytes / (int64_t(sizeof(T)) * panel * std::max<int64_t>(features, 1))) * panel;
}

template <class T>
Tensor multiply(const Tensor& x_tensor, const Direction<T>& blocks, const Epilogue<T>& epilogue) {
  const Matrix x = blocks.operand(Matrix(x_tensor));
  Tensor out = new_empty<int64_t>(x_tensor, {x_tensor.size(0), blocks.outputs});
  if (x.samples == 0 || blocks.outputs == 0) return out;
  const Matrix y(out);
  if (x.samples <= kFewSamples && blocks.reads == kNumbers) {
    few_samples(x, blocks, epilogue, y);
    Workspace::mine().trim();
    return out;
  }
  const int64_t lines = Panels<T>::lines_for(x.samples), step = samples_at_once<T>(x.features, lines);
  for (int64_t first = 0; first < x.samples; first += step) {
    const int64_t count = std::min(step, x.samples - first);
    const Panels<T> panels(Workspace::kX, x.features, first, count, lines);
    const int64_t packers = parts_for(pack_cost(count, x.features));
    for_parts(packers, [&](int64_t part) { panels.fill_part(x, packers, part); });
    const int64_t parts = parts_for(product_cost(blocks.weights(), count) + pack_cost(count, blocks.outputs));
    const BlockedProduct<T> product{panels, blocks, epilogue, y};
    for_parts(parts, [&](int64_t part) { product.run_part(parts, part); });
  }
  Workspace::mine().trim();
  return out;
}

struct Needs {
  bool dx, dvalues, dbias;
};

// Everything a training step needs from dy, packing dy and x once. `transposed` is read for dx only.
template <class T>
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& dy_tensor, const Tensor& x_tensor, const Lists& lists,
                                             Block block, const Direction<T>& transposed, Needs need) {
  const Matrix dy(dy_tensor), x(x_tensor);
  const int64_t samples = dy.samples, weights = lists.nnz * block.size();
  Tensor dx = need.dx ? new_empty<int64_t>(x_tensor, {samples, x.features}) : new_empty<int64_t>(x_tensor, {0});
  Result<T> dvalues(need.dvalues ? new_empty<int64_t>(x_tensor, {lists.nnz, block.rows, block.cols})
                                 : new_empty<int64_t>(x_tensor, {0}),
                    Workspace::kGrad);
  Result<T> dbias(new_empty<int64_t>(dy_tensor, {need.dbias ? dy.features : 0}), Workspace::kStage);
  if (samples == 0) {
    if (need.dvalues) std::fill_n(dvalues.data(), weights, T(0));
    if (need.dbias) std::fill_n(dbias.data(), dy.features, T(0));
    return {dx, dvalues.finish(), dbias.finish()};
  }
  std::optional<Matrix> dx_matrix;
  if (need.dx && x.features > 0) dx_matrix.emplace(dx);

  // dx reads dy in one form, dvalues dy and x in another, dbias dy as numbers.
  const Matrix dx_dy = transposed.operand(dy);
  const bool paired = need.dvalues && have_pairs(dy) && have_pairs(x);
  const int64_t sizes[] = {need.dvalues && paired ? SampleRows<T>::copy_size(x, true) : 0,
                           need.dvalues ? SampleRows<T>::copy_size(dy, paired) : 0,
                           need.dbias ? SampleRows<T>::copy_size(dy, false) : 0};
  T* copies = Workspace::mine().get<T>(Workspace::kTable, sizes[0] + sizes[1] + sizes[2]);
  const bool shared = !paired && need.dvalues;  // both want dy as numbers
  const SampleRows<T> x_rows(x, paired, copies), dy_rows(dy, paired, copies + sizes[0]);
  const SampleRows<T> dy_numbers(dy, false, copies + sizes[0] + (shared ? 0 : sizes[1]));
  const int64_t copied = sizes[0] + sizes[1] + (shared ? 0 : sizes[2]), copiers = parts_for(0.2 * double(copied));
  if (copied)
    for_parts(copiers, [&](int64_t part) {
      if (sizes[0]) x_rows.fill_part(copiers, part);
      if (sizes[1]) dy_rows.fill_part(copiers, part);
      if (sizes[2] && !shared) dy_numbers.fill_part(copiers, part);
    });
  const Matrix& x_matrix = paired ? x_rows.rows : x;

  const int64_t fold = paired ? 2 : 1, lines = Panels<T>::lines_for(samples);
  const int64_t w_lines = Panels<T>::lines_for((samples + fold - 1) / fold);
  const int64_t step = fold * samples_at_once<T>(std::max(x.features, dy.features), std::max(lines, w_lines));
  for (int64_t first = 0; first < samples; first += step) {
    const int64_t count = std::min(step, samples - first);
    const Panels<T> dy_panels(Workspace::kDy, need.dx ? dx_dy.features : 0, first, count, lines);
    const Panels<T> x_panels(Workspace::kX, need.dvalues ? x.features : 0, first / fold, (count + fold - 1) / fold,
                             w_lines);
    const int64_t packers = parts_for(pack_cost(count, dy_panels.features + x_panels.features));
    for_parts(packers, [&](int64_t part) {
      if (need.dx) dy_panels.fill_part(dx_dy, packers, part);
      if (need.dvalues) x_panels.fill_part(x_matrix, packers, part);
    });
    const double products = double(need.dx) + double(need.dvalues);
    const int64_t parts = parts_for(products * product_cost(weights, count) + 0.05 * double(dy.features * count));
    for_parts(parts, [&](int64_t part) {
      if (dx_matrix && block.cols == 1)
        SpreadProduct<T>{dy_panels, lists, transposed, *dx_matrix}.run_part(parts, part);
      else if (dx_matrix)
        BlockedProduct<T>{dy_panels, transposed, {}, *dx_matrix}.run_part(parts, part);
      if (need.dvalues)
        BlockedSddmm<T>{dy_rows, x_panels, lists, block, first > 0, dvalues.data()}.run(
            cut_rows(lists.crow, lists.rows, parts, part, 1));
      if (need.dbias) bias_gradient(dy_numbers, first, count, cut(dy.features, parts, part, kLanes<T>), dbias.data());
    });
  }
  std::tuple<Tensor, Tensor, Tensor> result{dx, dvalues.finish(), dbias.finish()};
  Workspace::mine().trim();
  return result;
}

void check_activation(const char* op, const char* name, const Tensor& x, int64_t features) {
  check_float(op, name, x);
  STD_TORCH_CHECK(x.dim() == 2 && (features < 0 || x.size(1) == features), op, ": Expected ", name, " of shape [N, ",
                  features < 0 ? std::string("features") : std::to_string(features), "], got ", shape_of(x));
}

void check_pair(const char* op, const Tensor& dy, const Tensor& x) {
  check_activation(op, "dy", dy, -1);
  check_activation(op, "x", x, -1);
  check_same_dtype(op, "dy", dy, "x", x);
  STD_TORCH_CHECK(dy.size(0) == x.size(0), op, ": Expected dy and x of the same batch size, got ", shape_of(dy),
                  " and ", shape_of(x));
}

const int32_t* check_transposed(const char* op, const Lists& lists, const Tensor& t_perm, Block block, int64_t inputs,
                                int64_t outputs) {
  check_extents(op, lists, "inputs", inputs, block.cols, "dy", outputs, block.rows);
  const int32_t* perm = check_index(op, "t_perm", t_perm);
  check_vector(op, "t_perm", t_perm, lists.nnz);
  return perm;
}

// bias as T, long enough for the outputs that a last block lacks.
template <class T>
const T* padded_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t outputs,
                     int64_t padded, std::vector<T>& storage) {
  std::vector<T> copy;
  const T* from = bias_as<T>(op, bias, x, outputs, copy);
  if (from == nullptr || (padded == outputs && copy.empty())) return from;
  storage.assign(size_t(padded), T(0));
  std::copy_n(from, outputs, storage.begin());
  return storage.data();
}

}  // namespace

Tensor bsr_linear(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor, std::optional<Tensor> bias,
                  int64_t out_features, std::string activation) {
  constexpr const char* op = "bsr_linear";
  check_activation(op, "x", x, -1);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  const Block block = check_blocks(op, values, x, "x", lists.nnz);
  check_extents(op, lists, "outputs", out_features, block.rows, "x", x.size(1), block.cols);
  const Activation kind = activation_of(op, activation);
  return with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> storage;
    const T* b = padded_bias<T>(op, bias, x, out_features, lists.rows * block.rows, storage);
    return multiply<T>(x, Direction<T>::forward(lists, values, block, out_features, Matrix(x)), {b, kind});
  });
}

Tensor bsr_linear_t(Tensor dy, Tensor values, Tensor t_crow, Tensor t_row, Tensor t_perm, Tensor,
                    int64_t in_features) {
  constexpr const char* op = "bsr_linear_t";
  check_activation(op, "dy", dy, -1);
  const Lists lists = check_lists(op, "t_crow", t_crow, "t_row", t_row);
  const Block block = check_blocks(op, values, dy, "dy", lists.nnz);
  const int32_t* perm = check_transposed(op, lists, t_perm, block, in_features, dy.size(1));
  return with_compute_type(dy, [&](auto zero) {
    using T = decltype(zero);
    return multiply<T>(dy, Direction<T>::transposed(lists, perm, values, block, in_features, Matrix(dy)), {});
  });
}

Tensor bsr_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, Tensor, std::vector<int64_t> sides) {
  constexpr const char* op = "bsr_sddmm";
  check_pair(op, dy, x);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  const Block block = check_block(op, sides.at(0), sides.at(1));
  check_extents(op, lists, "outputs", dy.size(1), block.rows, "x", x.size(1), block.cols);
  return with_compute_type(x, [&](auto zero) {
    return std::get<1>(gradients<decltype(zero)>(dy, x, lists, block, {}, {false, true, false}));
  });
}

std::tuple<Tensor, Tensor, Tensor> bsr_linear_backward(Tensor dy, Tensor x, Tensor values, Tensor crow, Tensor col,
                                                       Tensor, Tensor t_crow, Tensor t_row, Tensor t_perm, Tensor,
                                                       bool need_dx, bool need_dvalues, bool need_dbias) {
  constexpr const char* op = "bsr_linear_backward";
  check_pair(op, dy, x);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  const Block block = check_blocks(op, values, x, "x", lists.nnz);
  check_extents(op, lists, "outputs", dy.size(1), block.rows, "x", x.size(1), block.cols);
  Lists t_lists{};
  const int32_t* perm = nullptr;
  if (need_dx) {
    t_lists = check_lists(op, "t_crow", t_crow, "t_row", t_row);
    perm = check_transposed(op, t_lists, t_perm, block, x.size(1), dy.size(1));
  }
  return with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> transposed{};
    if (need_dx) transposed = Direction<T>::transposed(t_lists, perm, values, block, x.size(1), Matrix(dy));
    return gradients<T>(dy, x, lists, block, transposed, {need_dx, need_dvalues, need_dbias});
  });
}

}  // namespace sparsekit
