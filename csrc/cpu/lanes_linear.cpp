#include "lanes_linear.h"

#include "panels.h"

namespace sparsekit {
namespace {

constexpr int64_t kRows = 64, kWindow = 64;  // rows of a group, inputs of a window
constexpr double kStepNanoseconds = 4;

struct Weight {
  const uint8_t* codes;
  const int32_t *bases, *starts, *order;  // order: null where the rows stand as they are
  const void* values;
  int storage;
  int64_t rows, groups, steps;
};

Weight check_weight(const char* op, const Tensor& x, const Tensor& values, const Tensor& codes, const Tensor& bases,
                    const Tensor& starts, const Tensor& order, bool scaled, int64_t rows) {
  Weight w;
  w.bases = check_index(op, "bases", bases);
  w.starts = check_index(op, "starts", starts);
  w.order = check_index(op, "order", order);
  w.rows = rows;
  w.groups = (rows + kRows - 1) / kRows;
  w.steps = bases.size(0);
  STD_TORCH_CHECK(rows >= 0 && starts.size(0) == w.groups + 1, op, ": Expected starts of shape [", w.groups + 1,
                  "], got ", shape_of(starts));
  bool ascends = w.starts[0] == 0 && w.starts[w.groups] == w.steps;
  for (int64_t g = 0; g < w.groups; ++g) ascends = ascends && w.starts[g] <= w.starts[g + 1];
  STD_TORCH_CHECK(ascends, op, ": Expected starts that ascend from 0 to ", w.steps, " (the size of bases)");
  STD_TORCH_CHECK(order.size(0) == 0 || order.size(0) == rows, op, ": Expected order of shape [0] or [", rows,
                  "], got ", shape_of(order));
  if (order.size(0) == 0) w.order = nullptr;
  for (int64_t i = 0; w.order && i < rows; ++i)
    STD_TORCH_CHECK(uint32_t(w.order[i]) < uint32_t(rows), op, ": Expected rows below ", rows, " in order");
  const auto fits = [&](const Tensor& t) {
    return t.is_cpu() && t.is_contiguous() && t.dim() == 2 && t.size(0) == w.steps && t.size(1) == kRows;
  };
  STD_TORCH_CHECK(fits(codes) && codes.scalar_type() == ScalarType::Byte, op, ": Expected contiguous uint8 codes of ",
                  "shape [", w.steps, ", ", kRows, "], got ", torch::headeronly::toString(codes.scalar_type()), " ",
                  shape_of(codes));
  const ScalarType type = values.scalar_type();
  const bool quantized = scaled && (type == ScalarType::Char || type == ScalarType::BFloat16);
  STD_TORCH_CHECK(fits(values) && (quantized || (!scaled && type == x.scalar_type())), op,
                  ": Expected contiguous values of shape [", w.steps, ", ", kRows, "] and of the dtype of x, or int8 or ",
                  "bfloat16 beside a scale, got ", torch::headeronly::toString(type), " ", shape_of(values));
  w.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  w.values = values.const_data_ptr();
  w.storage = type == ScalarType::Char ? kLanesInt8 : storage_of(type);
  int32_t furthest = 0;
  for (int64_t g = 0; g < w.groups; ++g)
    if (w.starts[g + 1] > w.starts[g]) furthest = std::max(furthest, w.bases[w.starts[g + 1] - 1]);
  STD_TORCH_CHECK(furthest + kWindow <= std::max(x.size(1), kWindow), op, ": Expected x of shape [N, ",
                  furthest + kWindow, "] or more features, got ", shape_of(x));
  return w;
}

// Rows of float32, contiguous and a window long at least: x itself where it is that, else a copy.
const float* rows_of(const Matrix& x, int64_t* stride) {
  if (x.storage == kNative && x.feature_stride == 1 && x.features >= kWindow) {
    *stride = x.sample_stride;
    return reinterpret_cast<const float*>(x.data);
  }
  *stride = std::max(x.features, kWindow);
  float* copy = Workspace::mine().get<float>(Workspace::kX, x.samples * *stride);
  if (x.features < kWindow) std::fill_n(copy, x.samples * *stride, 0.0f);
  kernels<float>().load[x.storage]({copy, *stride, x.data, x.sample_stride, x.feature_stride, x.samples, x.features});
  return copy;
}

}  // namespace

Tensor lanes_linear(Tensor x_tensor, Tensor values, Tensor codes, Tensor bases, Tensor starts, Tensor order,
                    std::optional<Tensor> scale, std::optional<Tensor> bias, int64_t out_features,
                    std::string activation) {
  constexpr const char* op = "lanes_linear";
  check_float(op, "x", x_tensor);
  STD_TORCH_CHECK(x_tensor.dim() == 2 && x_tensor.scalar_type() != ScalarType::Double, op,
                  ": Expected x of shape [N, features], not float64, got ", shape_of(x_tensor), " ",
                  torch::headeronly::toString(x_tensor.scalar_type()));
  const bool scaled = scale.has_value() && scale->defined();
  const Weight w = check_weight(op, x_tensor, values, codes, bases, starts, order, scaled, out_features);
  const float* scales = nullptr;
  if (scaled) {
    check_vector(op, "scale", *scale, w.rows);
    STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float && scale->is_cpu(), op, ": Expected scale of dtype ",
                    "float32 on the CPU, got ", torch::headeronly::toString(scale->scalar_type()));
    scales = static_cast<const float*>(scale->const_data_ptr());
  }
  std::vector<float> copy;
  const float* shift = bias_as<float>(op, bias, x_tensor, w.rows, copy);
  const Activation kind = activation_of(op, activation);
  const Matrix x(x_tensor);
  Tensor out = new_empty<int64_t>(x_tensor, {x.samples, w.rows});
  if (x.samples == 0 || w.rows == 0) return out;
  Result<float> y(out, Workspace::kStage);
  int64_t x_stride;
  const float* rows = rows_of(x, &x_stride);
  float* to = y.data();
  const int64_t parts = std::min(w.groups, parts_for(kStepNanoseconds * double(w.steps * x.samples)));
  for_parts(parts, [&](int64_t part) {
    const Span groups = cut_rows(w.starts, w.groups, parts, part, 1);
    const int64_t begin = groups.begin * kRows, count = std::min(groups.end * kRows, w.rows) - begin;
    if (count <= 0) return;
    const int64_t stride = (groups.end - groups.begin) * kRows;
    float* sums = Workspace::mine().get<float>(Workspace::kTile, 2 * stride);
    for (int64_t first = 0; first < x.samples; first += 2) {
      const int64_t samples = std::min<int64_t>(2, x.samples - first);
      active_isa().lanes[w.storage]({rows + first * x_stride, x_stride, samples, std::max(x.features, kWindow) - kWindow,
                                     w.codes, w.values, w.bases, w.starts, groups.begin, groups.end, sums, stride});
      for (int64_t s = 0; s < samples; ++s) {
        float* sum = sums + s * stride;
        float* result = to + (first + s) * w.rows;
        const auto row = [&](int64_t i) { return w.order ? w.order[begin + i] : begin + i; };
        if (scales) for (int64_t i = 0; i < count; ++i) sum[i] *= scales[row(i)];
        if (shift) for (int64_t i = 0; i < count; ++i) sum[i] += shift[row(i)];
        if (kind != kNone) kernels<float>().activate(sum, count, kind);
        if (w.order) for (int64_t i = 0; i < count; ++i) result[w.order[begin + i]] = sum[i];
        else std::copy_n(sum, count, result + begin);
      }
    }
  });
  Tensor done = y.finish();
  Workspace::mine().trim();
  return done;
}

}  // namespace sparsekit
