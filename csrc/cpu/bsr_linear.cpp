#include "bsr_linear.h"

#include "bsr_blocks.h"
#include "panels.h"

namespace sparsekit {
namespace {

constexpr int64_t kPackedBytes = 16 << 20;  // activations packed at a time
constexpr int64_t kOutputs = 64;            // outputs that are finished before they move to their tensor
constexpr int64_t kFewSamples = 3;          // up to here one after the other is faster than packed

double pack_cost(int64_t samples, int64_t features) { return 0.1 * double(samples) * double(features); }
double product_cost(int64_t weights, int64_t samples) { return 0.02 * double(weights) * double(samples); }

// Samples packed together; a whole number of panels.
template <class T>
int64_t samples_at_once(int64_t features, int64_t lines) {
  const int64_t panel = lines * kLanes<T>;
  return std::max<int64_t>(1, kPackedBytes / (int64_t(sizeof(T)) * panel * std::max<int64_t>(features, 1))) * panel;
}

// ---- pairs of bfloat16 ------------------------------------------------------------------------------
// An instruction multiplies two pairs and adds both products to a float. In a tensor of floats half as long
// along one dimension a pair is one element: everything below then works on pairs as it does on numbers.

bool have_pairs(const Matrix& m) {
  return m.storage == kBFloat16 && kernels<float>().pairs.product != nullptr && m.feature_stride == 1;
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(float) == 0; }

// Whether neighbouring features, and weights, can be read as pairs where they lie.
bool pairs_of_features(const Matrix& m, const Tensor& values) {
  const bool even = m.features % 2 == 0 && (m.samples <= 1 || m.sample_stride % 2 == 0);
  return have_pairs(m) && even && is_aligned(m.data) && is_aligned(values.const_data_ptr());
}

Matrix as_pairs(Matrix m) {
  m.storage = kNative;
  m.bytes = sizeof(float);
  m.features /= 2;
  m.sample_stride /= 2;
  return m;
}

// values [blocks, R, C] as pairs of outputs, [blocks, R / 2, C].
const float* pairs_of_outputs(const Tensor& values) {
  const int64_t rows = values.size(0) * values.size(1) / 2, cols = values.size(2);
  const auto* from = static_cast<const uint16_t*>(values.const_data_ptr());
  float* to = Workspace::mine().get<float>(Workspace::kValues, rows * cols);
  const int64_t parts = parts_for(0.2 * double(rows * cols));
  for_parts(parts, [&](int64_t part) {
    const Span span = cut(rows, parts, part);
    kernels<float>().interleave(from + 2 * span.begin * cols, cols, 2 * cols, to + span.begin * cols,
                                span.end - span.begin, cols);
  });
  return to;
}

// ---- products ---------------------------------------------------------------------------------------

// The blocks in one direction: forward by outputs, or transposed by inputs.
template <class T>
struct Direction {
  const BlockKernels<T>* kernels;
  bool paired;
  Lists lists;
  const int32_t* which;
  const T* values;
  int64_t block, rows, row_step, depth, k_step;
  int64_t outputs, features;

  static Direction forward(const Lists& lists, const Tensor& values, Block b, int64_t outputs, const Matrix& x) {
    if constexpr (sizeof(T) == 4)
      if (b.cols % 2 == 0 && pairs_of_features(x, values))
        return {&sparsekit::kernels<T>().pairs, true, lists, nullptr, static_cast<const T*>(values.const_data_ptr()),
                b.size() / 2, b.rows, b.cols / 2, b.cols / 2, 1, outputs, x.features / 2};
    return {&sparsekit::kernels<T>().numbers, false, lists, nullptr, values_as<T>(values), b.size(), b.rows, b.cols,
            b.cols, 1, outputs, x.features};
  }
  static Direction transposed(const Lists& lists, const int32_t* which, const Tensor& values, Block b, int64_t outputs,
                              const Matrix& dy) {
    if constexpr (sizeof(T) == 4)
      if (b.rows % 2 == 0 && pairs_of_features(dy, values)) {
        const bool in_pairs = b.cols == 1;  // as they lie
        const T* v = in_pairs ? static_cast<const T*>(values.const_data_ptr()) : pairs_of_outputs(values);
        return {&sparsekit::kernels<T>().pairs, true, lists, which, v, b.size() / 2, b.cols, 1, b.rows / 2, b.cols,
                outputs, dy.features / 2};
      }
    return {&sparsekit::kernels<T>().numbers, false, lists, which, values_as<T>(values), b.size(), b.cols, 1, b.rows,
            b.cols, outputs, dy.features};
  }
  Matrix operand(const Matrix& x) const { return paired ? as_pairs(x) : x; }
  BsrProduct<T> product(const T* panel, int64_t width) const {
    BsrProduct<T> p{};
    p.panel = panel, p.features = features, p.width = p.x_stride = p.y_stride = width, p.index_step = depth * width;
    p.index = lists.index, p.which = which, p.values = values, p.block = block;
    p.rows = rows, p.row_step = row_step, p.depth = depth, p.k_step = k_step;
    return p;
  }
  int64_t weights() const { return lists.nnz * block; }
  // Lists whose outputs fill whole cache lines.
  int64_t unit() const { return std::max<int64_t>(1, kLanes<T> / rows); }
};

// What happens to a finished sum. `bias` holds an entry for every output of every list, also of absent ones.
template <class T>
struct Epilogue {
  const T* bias = nullptr;
  Activation activation = kNone;
};

// y[samples, outputs] for one panel and the lists of a span.
template <class T>
struct BlockedProduct {
  const Panels<T>& panels;
  const Direction<T>& blocks;
  Epilogue<T> epilogue;
  Matrix y;

  void run(int64_t i, Span lists) const {
    if (lists.begin >= lists.end) return;
    const int32_t* crow = blocks.lists.crow;
    const int64_t width = panels.width_of(i), step = std::max<int64_t>(1, kOutputs / blocks.rows);
    T* result = Workspace::mine().get<T>(Workspace::kTile, step * blocks.rows * width);
    BsrProduct<T> p = blocks.product(panels.panel(i), width);
    p.y = result;
    for (int64_t l = lists.begin; l < lists.end; l += step) {
      const int64_t first = l * blocks.rows;
      p.lists = std::min(step, lists.end - l);
      p.bias = epilogue.bias ? epilogue.bias + first : nullptr;
      p.begin = crow + l;
      p.end = crow + l + 1;
      blocks.kernels->product(p);
      const int64_t count = std::min(p.lists * blocks.rows, blocks.outputs - first);
      if (epilogue.activation != kNone) kernels<T>().activate(result, count * width, epilogue.activation);
      panels.each_line(i, [&](int64_t sample, int64_t line, int64_t lanes) {
        kernels<T>().unpack[y.storage](
            {result + line * kLanes<T>, width, y.at(sample, first), y.sample_stride, y.feature_stride, lanes, count});
      });
    }
  }

  // This part's share: whole panels when they divide evenly, else a share of the lists of every panel.
  void run_part(int64_t parts, int64_t part) const {
    const int64_t splits = panels.count % parts == 0 ? 1 : parts;
    const Span items = cut(panels.count * splits, parts, part);
    for (int64_t item = items.begin; item < items.end; ++item)
      run(item / splits, cut_rows(blocks.lists.crow, blocks.lists.rows, splits, item % splits, blocks.unit()));
  }
};

// dx[samples, inputs] for blocks of one input each, by way of the forward lists; see block_spread.
template <class T>
struct SpreadProduct {
  const Panels<T>& panels;  // dy
  const Lists& lists;
  const Direction<T>& transposed;
  Matrix y;

  void run(int64_t i, Span inputs) const {
    if (inputs.begin >= inputs.end) return;
    const int64_t width = panels.width_of(i);
    T* sums = Workspace::mine().get<T>(Workspace::kTile, (inputs.end - inputs.begin) * width);
    std::fill_n(sums, (inputs.end - inputs.begin) * width, T(0));
    int32_t* bounds = Workspace::mine().get<int32_t>(Workspace::kCursor, 2 * lists.rows);
    for (int64_t l = 0; l < lists.rows; ++l) {
      const int32_t *first = lists.index + lists.crow[l], *last = lists.index + lists.crow[l + 1];
      bounds[l] = int32_t(std::lower_bound(first, last, int32_t(inputs.begin)) - lists.index);
      bounds[lists.rows + l] = int32_t(std::lower_bound(first, last, int32_t(inputs.end)) - lists.index);
    }
    BsrProduct<T> p{};
    p.panel = panels.panel(i), p.features = panels.features, p.width = width;
    p.index = lists.index, p.values = transposed.values, p.depth = transposed.depth;
    p.begin = bounds, p.end = bounds + lists.rows, p.lists = lists.rows;
    p.y = sums - inputs.begin * width;
    transposed.kernels->spread(p);
    panels.each_line(i, [&](int64_t sample, int64_t line, int64_t lanes) {
      kernels<T>().unpack[y.storage]({sums + line * kLanes<T>, width, y.at(sample, inputs.begin), y.sample_stride,
                                      y.feature_stride, lanes, inputs.end - inputs.begin});
    });
  }

  void run_part(int64_t parts, int64_t part) const {
    const int64_t splits = panels.count % parts == 0 ? 1 : parts;
    const Span items = cut(panels.count * splits, parts, part);
    for (int64_t item = items.begin; item < items.end; ++item)
      run(item / splits, cut(y.features, splits, item % splits, kLanes<T>));
  }
};

// Samples one after the other, straight from and to their tensors.
template <class T>
void few_samples(const Matrix& x, const Direction<T>& blocks, const Epilogue<T>& epilogue, const Matrix& y) {
  const int64_t padded = (blocks.features + blocks.depth - 1) / blocks.depth * blocks.depth;
  const bool copy = x.storage != kNative || x.feature_stride != 1 || padded != blocks.features;
  T* in = Workspace::mine().get<T>(Workspace::kX, copy ? padded : 0);
  T* out = Workspace::mine().get<T>(Workspace::kStage, blocks.lists.rows * blocks.rows);
  const int64_t parts = parts_for(0.06 * double(blocks.weights()));
  for (int64_t sample = 0; sample < x.samples; ++sample) {
    if (copy) {
      kernels<T>().load[x.storage]({in, 0, x.at(sample, 0), 0, x.feature_stride, 1, x.features});
      std::fill(in + x.features, in + padded, T(0));
    }
    const T* row = copy ? in : static_cast<const T*>(x.at(sample, 0));
    for_parts(parts, [&](int64_t part) {
      const Span lists = cut_rows(blocks.lists.crow, blocks.lists.rows, parts, part, blocks.unit());
      const int64_t first = lists.begin * blocks.rows, end = std::min(lists.end * blocks.rows, blocks.outputs);
      if (first >= end) return;
      BsrProduct<T> p = blocks.product(row, 1);
      p.begin = blocks.lists.crow + lists.begin;
      p.end = p.begin + 1;
      p.lists = lists.end - lists.begin;
      p.y = out + first;
      kernels<T>().block_vector(p);
      if (epilogue.bias)
        for (int64_t r = first; r < end; ++r) out[r] += epilogue.bias[r];
      kernels<T>().activate(out + first, end - first, epilogue.activation);
      kernels<T>().store[y.storage]({out + first, 0, y.at(sample, first), 0, y.feature_stride, 1, end - first});
    });
  }
}

template <class T>
Tensor multiply(const Tensor& x_tensor, const Direction<T>& blocks, const Epilogue<T>& epilogue) {
  const Matrix x = blocks.operand(Matrix(x_tensor));
  Tensor out = new_empty<int64_t>(x_tensor, {x.samples, blocks.outputs});
  if (x.samples == 0 || blocks.outputs == 0) return out;
  const Matrix y(out);
  if (x.samples <= kFewSamples && !blocks.paired) {
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

// A matrix of T with features side by side: the tensor itself, a converted copy, or a copy in which a row holds
// pairs of samples.
template <class T>
struct SampleRows {
  Matrix from, rows;
  bool paired, copied;

  static int64_t copy_size(const Matrix& m, bool paired) {
    return paired ? (m.samples + 1) / 2 * m.features : is_plain(m) ? 0 : m.samples * m.features;
  }
  SampleRows(const Matrix& m, bool paired, T* copy) : from(m), rows(m), paired(paired), copied(paired || !is_plain(m)) {
    if (!copied) return;
    rows.data = reinterpret_cast<char*>(copy);
    rows.storage = kNative;
    rows.bytes = sizeof(T);
    rows.samples = paired ? (m.samples + 1) / 2 : m.samples;
    rows.sample_stride = m.features;
    rows.feature_stride = 1;
  }
  void fill_part(int64_t parts, int64_t part) const {
    const Span span = cut(rows.samples, parts, part);
    if (!copied || span.begin >= span.end) return;
    if (!paired)
      return kernels<T>().load[from.storage]({at(span.begin, 0), rows.sample_stride, from.at(span.begin, 0),
                                              from.sample_stride, from.feature_stride, span.end - span.begin,
                                              from.features});
    const int64_t whole = std::min(span.end, from.samples / 2) - span.begin;
    kernels<T>().interleave(static_cast<const uint16_t*>(from.at(2 * span.begin, 0)), from.sample_stride,
                            2 * from.sample_stride, at(span.begin, 0), whole, from.features);
    if (whole == span.end - span.begin) return;
    const auto* last = static_cast<const uint16_t*>(from.at(from.samples - 1, 0));
    uint32_t* to = reinterpret_cast<uint32_t*>(at(span.end - 1, 0));
    for (int64_t i = 0; i < from.features; ++i) to[i] = last[i];  // a pair with 0
  }
  T* at(int64_t sample, int64_t feature) const { return static_cast<T*>(rows.at(sample, feature)); }

 private:
  static bool is_plain(const Matrix& m) { return m.storage == kNative && m.feature_stride == 1; }
};

// ---- gradients of the weight and the bias -----------------------------------------------------------

// dvalues (+)= dy' x at the blocks of some lists.
template <class T>
struct BlockedSddmm {
  const SampleRows<T>& dy;
  const Panels<T>& x;
  Lists lists;
  Block block;
  bool accumulate;  // dvalues holds the sum over earlier samples
  T* dvalues;

  static constexpr int64_t kChunk = 256, kPad = 16;  // input features at a time; a kernel takes them by kPad

  void run(Span span) const {
    const int64_t outputs = dy.rows.features, lanes = std::min<int64_t>(block.rows, kernels<T>().vector_lanes);
    const int64_t step = std::max<int64_t>(1, kChunk / block.cols);
    int32_t* index = Workspace::mine().get<int32_t>(Workspace::kOffsets, kChunk + kPad);
    T* sums = Workspace::mine().get<T>(Workspace::kTile, (kChunk + 2 * kPad) * lanes + step * block.size());
    T* sum_of_samples = sums + (kChunk + 2 * kPad) * lanes;
    for (int64_t list = span.begin; list < span.end; ++list) {
      for (int64_t b = lists.crow[list]; b < lists.crow[list + 1]; b += step) {
        const int64_t count = std::min<int64_t>(step, lists.crow[list + 1] - b);
        const int64_t inputs = features_of(b, count, index);
        T* to = accumulate ? sum_of_samples : dvalues + b * block.size();
        for (int64_t r = 0; r < block.rows; r += lanes) {
          const int64_t row = list * block.rows + r, there = std::clamp<int64_t>(outputs - row, 0, lanes);
          for (int64_t i = 0; i < x.count && there > 0; ++i) {
            const int64_t sample = i * x.lines * kLanes<T>;
            const int64_t samples = std::min(x.width_of(i), x.samples - sample);
            const auto& k = dy.paired ? kernels<T>().pairs : kernels<T>().numbers;
            k.sddmm({x.panel(i), x.width_of(i), x.width_of(i), samples, dy.at(x.first + sample, row),
                     dy.rows.sample_stride, 1, there, index, inputs, i > 0, sums}, int(lanes));
          }
          clear_absent(b, count, lanes, there, sums);
          store(sums, lanes, count, to + r * block.cols);
        }
        if (accumulate)
          for (int64_t i = 0; i < count * block.size(); ++i) dvalues[b * block.size() + i] += to[i];
      }
    }
  }

 private:
  // The input features of some blocks, as a kernel wants them: what sticks out reads the last feature there is.
  int64_t features_of(int64_t b, int64_t count, int32_t* index) const {
    int64_t n = 0;
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < block.cols; ++c)
        index[n++] = int32_t(std::min(lists.index[b + j] * block.cols + c, x.features - 1));
    while (n % kPad) index[n] = index[n - 1], ++n;
    return n;
  }

  // Only the last block of a list can stick out of the inputs.
  void clear_absent(int64_t b, int64_t count, int64_t lanes, int64_t there, T* sums) const {
    const int64_t inputs = count * block.cols;
    const int64_t beyond = (lists.index[b + count - 1] + 1) * block.cols - x.features;
    if (beyond > 0) std::fill(sums + (inputs - beyond) * lanes, sums + inputs * lanes, T(0));
    if (there < lanes)
      for (int64_t j = 0; j < inputs; ++j) std::fill(sums + j * lanes + there, sums + (j + 1) * lanes, T(0));
  }

  // From [inputs][lanes] to rows of blocks.
  void store(T* sums, int64_t lanes, int64_t count, T* to) const {
    if (block.rows == 1 || (block.cols == 1 && block.rows == lanes))  // as they lie
      return void(std::copy_n(sums, count * block.size(), to));
    if (block.cols == 1) return kernels<T>().store[kNative]({sums, lanes, to, block.rows, 1, count, lanes});
    if (block.size() <= 32) {  // less than a vector transpose costs
      for (int64_t j = 0; j < count; ++j)
        for (int64_t c = 0; c < block.cols; ++c)
          for (int64_t r = 0; r < lanes; ++r)
            to[j * block.size() + r * block.cols + c] = sums[(j * block.cols + c) * lanes + r];
      return;
    }
    for (int64_t j = 0; j < count; ++j)
      kernels<T>().unpack[kNative]({sums + j * block.cols * lanes, lanes, to + j * block.size(), block.cols, 1, lanes,
                                    block.cols});
  }
};

// dbias[f] (+)= sum over samples of dy, in short sums that lose no digits.
template <class T>
void bias_gradient(const SampleRows<T>& dy, int64_t first, int64_t count, Span features, T* dbias) {
  constexpr int64_t kSamples = 64, kFeatures = 256;
  for (int64_t f = features.begin; f < features.end; f += kFeatures) {
    const int64_t width = std::min(kFeatures, features.end - f);
    if (first == 0) std::fill_n(dbias + f, width, T(0));
    for (int64_t s = 0; s < count; s += kSamples) {
      T sum[kFeatures] = {};
      for (int64_t t = s; t < std::min(s + kSamples, count); ++t) {
        const T* row = dy.at(first + t, f);
        for (int64_t i = 0; i < width; ++i) sum[i] += row[i];
      }
      for (int64_t i = 0; i < width; ++i) dbias[f + i] += sum[i];
    }
  }
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
