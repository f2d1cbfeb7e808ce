#include "csr_chain.h"

#include "machine_code.h"
#include "panels.h"

namespace sparsekit {
namespace {

constexpr int64_t kCodeSamples = 16;  // a smaller batch leaves lanes of machine code idle
constexpr int64_t kCodeTiles = 4;     // of samples that one pass over machine code takes

template <class T>
struct Layer {
  Lists lists;
  const T* values;
  const T* bias;
  std::vector<T> bias_copy;
  Activation activation;
  int64_t features;
  std::shared_ptr<const MachineCode> code;

  void activate(T* sums, int64_t count) const {
    if (activation != kNone) kernels<T>().activate(sums, count, activation);
  }

  // y = what the layer gives for x, both vectors.
  void run_one(const T* x, T* y) const {
    kernels<T>().dot({x, lists.index, false, values, lists.crow, lists.crow + 1, lists.rows, bias, false, y, 1});
    activate(y, lists.rows);
  }

  // The same for panels side by side, each [features][width].
  void run(const T* x, T* y, int64_t panels, int64_t lines) const {
    const int64_t width = lines * kLanes<T>;
    if constexpr (std::is_same_v<T, float>) {
      if (code) {
        code->run({0, code->blocks()}, panels, x, width * features, values, bias, y, width * lists.rows);
        return activate(y, panels * width * lists.rows);
      }
    }
    for (int64_t i = 0; i < panels; ++i)
      kernels<T>().product({x + i * width * features, lists.index, false, values, lists.crow, lists.crow + 1,
                            lists.rows, bias, false, y + i * width * lists.rows, width}, int(lines));
    activate(y, panels * width * lists.rows);
  }
};

// The widest layer decides how much scratch memory one sample takes.
template <class T>
int64_t widest(const std::vector<Layer<T>>& layers) {
  int64_t most = 0;
  for (const Layer<T>& layer : layers) most = std::max(most, layer.lists.rows);
  return most;
}

template <class T>
void run_one(const Matrix& x, const std::vector<Layer<T>>& layers, const Matrix& y) {
  Workspace& mine = Workspace::mine();
  const T* in = reinterpret_cast<const T*>(x.data);
  if (x.feature_stride != 1) {
    T* copy = mine.get<T>(Workspace::kX, x.features);
    kernels<T>().load[kNative]({copy, 0, x.data, 0, x.feature_stride, 1, x.features});
    in = copy;
  }
  T* between[] = {mine.get<T>(Workspace::kTile, widest(layers)), mine.get<T>(Workspace::kStage, widest(layers))};
  for (size_t l = 0; l < layers.size(); ++l) {
    T* out = l + 1 == layers.size() ? reinterpret_cast<T*>(y.data) : between[l % 2];
    layers[l].run_one(in, out);
    in = out;
  }
}

// Every thread takes samples of its own through all layers: nobody waits between them.
template <class T>
void run_many(const Matrix& x, const std::vector<Layer<T>>& layers, const Matrix& y) {
  constexpr int64_t L = kLanes<T>;
  double cost = 0.1 * double(x.samples * x.features);
  bool code = false;
  for (const Layer<T>& layer : layers) {
    cost += 0.015 * double(layer.lists.nnz * x.samples);
    code = code || layer.code;
  }
  const int64_t threads = parts_for(cost);
  const int64_t lines = code ? 1 : Panels<T>::lines_for(x.samples, threads);
  const int64_t panels = (x.samples + lines * L - 1) / (lines * L);
  const int64_t each = code ? std::clamp<int64_t>((panels + threads - 1) / threads, 1, kCodeTiles) : 1;
  const int64_t groups = (panels + each - 1) / each, parts = std::min(threads, groups);
  for_parts(parts, [&](int64_t part) {
    Workspace& mine = Workspace::mine();
    const int64_t room = widest(layers) * each * lines * L;
    T* between[] = {mine.get<T>(Workspace::kTile, room), mine.get<T>(Workspace::kStage, room)};
    const Span own = cut(groups, parts, part);
    for (int64_t group = own.begin; group < own.end; ++group) {
      const int64_t first = group * each * lines * L, count = std::min(each * lines * L, x.samples - first);
      const Panels<T> from(Workspace::kX, x.features, first, count, lines);
      for (int64_t i = 0; i < from.count; ++i) from.fill(x, i, {0, x.features});
      const T* in = from.data;
      const int64_t inside = from.count == 1 ? from.lines_of(0) : lines;  // the last panel of all may be narrower
      for (size_t l = 0; l < layers.size(); ++l) {
        layers[l].run(in, between[l % 2], from.count, inside);
        in = between[l % 2];
      }
      for (int64_t i = 0; i < from.count; ++i)
        from.each_line(i, [&](int64_t sample, int64_t line, int64_t lanes) {
          const int64_t width = inside * L;
          kernels<T>().unpack[kNative]({const_cast<T*>(in) + i * width * y.features + line * L, width, y.at(sample, 0),
                                        y.sample_stride, y.feature_stride, lanes, y.features});
        });
    }
    mine.trim();
  });
}

}  // namespace

Tensor csr_chain(Tensor x_tensor, std::vector<Tensor> values, std::vector<Tensor> crow, std::vector<Tensor> col,
                 std::vector<std::optional<Tensor>> biases, std::vector<std::optional<Tensor>> code_keys,
                 std::vector<std::string> activations) {
  constexpr const char* op = "csr_chain";
  check_float(op, "x", x_tensor);
  STD_TORCH_CHECK(x_tensor.dim() == 2 && storage_of(x_tensor.scalar_type()) == kNative, op,
                  ": Expected x of shape [N, features], float32 or float64, got ", shape_of(x_tensor), " ",
                  torch::headeronly::toString(x_tensor.scalar_type()));
  const size_t count = values.size();
  STD_TORCH_CHECK(count > 0 && crow.size() == count && col.size() == count && biases.size() == count &&
                      code_keys.size() == count && activations.size() == count,
                  op, ": Expected as many values, indices, biases, keys and activations as layers, got ", count, ", ",
                  crow.size(), ", ", col.size(), ", ", biases.size(), ", ", code_keys.size(), ", ", activations.size());
  return with_compute_type(x_tensor, [&](auto zero) {
    using T = decltype(zero);
    const Matrix x(x_tensor);
    std::vector<Layer<T>> layers(count);
    int64_t features = x.features;
    for (size_t l = 0; l < count; ++l) {
      Layer<T>& layer = layers[l];
      layer.lists = check_lists(op, "crow_indices", crow[l], "col_indices", col[l]);
      const int64_t needed = largest_index(layer.lists) + 1;
      STD_TORCH_CHECK(needed <= features, op, ": Expected ", needed, " or more features into layer ", l, ", got ",
                      features);
      check_same_dtype(op, "values", values[l], "x", x_tensor);
      check_vector(op, "values", values[l], layer.lists.nnz);
      layer.values = static_cast<const T*>(values[l].const_data_ptr());
      layer.bias = bias_as<T>(op, biases[l], x_tensor, layer.lists.rows, layer.bias_copy);
      layer.activation = activation_of(op, activations[l]);
      layer.features = features;
      if (std::is_same_v<T, float> && x.samples >= kCodeSamples && code_keys[l].has_value() && code_keys[l]->defined())
        layer.code = MachineCode::find(*code_keys[l], false, layer.lists, nullptr, features, x.samples);
      features = layer.lists.rows;
    }
    Tensor out = new_empty<int64_t>(x_tensor, {x.samples, features});
    if (x.samples == 0 || features == 0) return out;
    const Matrix y(out);
    if (x.samples == 1) run_one<T>(x, layers, y);
    else run_many<T>(x, layers, y);
    return out;
  });
}

}  // namespace sparsekit

extern "C" AtenTensorHandle sparsekit_csr_chain(AtenTensorHandle x, int64_t count, const AtenTensorHandle* layers,
                                                const char* const* activations) {
  using torch::stable::Tensor;
  const auto share = [](AtenTensorHandle of) {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(of, &handle));
    return Tensor(handle);
  };
  const auto maybe = [&](AtenTensorHandle of) { return of ? std::optional<Tensor>(share(of)) : std::nullopt; };
  try {
    std::vector<Tensor> values, crow, col;
    std::vector<std::optional<Tensor>> biases, keys;
    for (const AtenTensorHandle* layer = layers; layer < layers + 5 * count; layer += 5) {
      values.push_back(share(layer[0]));
      crow.push_back(share(layer[1]));
      col.push_back(share(layer[2]));
      biases.push_back(maybe(layer[3]));
      keys.push_back(maybe(layer[4]));
    }
    const Tensor y = sparsekit::csr_chain(share(x), std::move(values), std::move(crow), std::move(col),
                                          std::move(biases), std::move(keys), {activations, activations + count});
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(y.get(), &handle));
    return handle;
  } catch (const std::exception&) {
    return nullptr;
  }
}
