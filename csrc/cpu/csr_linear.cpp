#include "csr_linear.h"

#include "machine_code.h"
#include "panels.h"

namespace sparsekit {
namespace {

constexpr int64_t kTileBytes = 32 << 10;   // the piece of a panel that should stay in L1
// Survivors per row and tile that pay for what a tile costs: partial sums read again, and in a sampled
// product a last group of dot products that is not full.
constexpr int64_t kProductPerTile = 12, kSddmmPerTile = 12;
constexpr int64_t kPackedBytes = 16 << 20;  // activations packed at a time
constexpr int64_t kCodeSamples = 16;        // a smaller batch leaves lanes of machine code idle

double pack_cost(int64_t samples, int64_t features) { return 0.1 * double(samples) * double(features); }
double product_cost(int64_t nnz, int64_t samples) { return double(nnz) * (0.4 + 0.012 * double(samples)); }

// Samples packed together; a whole number of panels.
template <class T>
int64_t samples_at_once(int64_t features, int64_t lines) {
  const int64_t panel = lines * kLanes<T>;
  return std::max<int64_t>(1, kPackedBytes / (int64_t(sizeof(T)) * panel * std::max<int64_t>(features, 1))) * panel;
}

// Features of a panel cut into pieces that stay in L1 while a block of rows walks over them.
struct Tiles {
  int64_t features, each, count;

  // One tile when a row has too few survivors in each to pay for loading its partial sums again.
  Tiles(int64_t features, int64_t bytes_per_feature, int64_t rows, int64_t survivors, int64_t per_tile)
      : features(features),
        each(std::max<int64_t>(1, kTileBytes / bytes_per_feature)),
        count((features + each - 1) / each) {
    if (survivors < per_tile * count * rows) each = std::max<int64_t>(features, 1), count = 1;
  }

  // f(begin, end) per tile, the bounds of its survivors for `rows` rows; crow points at the first row.
  template <class T, class F>
  void walk(const int32_t* crow, const int32_t* index, int64_t rows, const F& f) const {
    if (count == 1) return f(crow, crow + 1);
    int32_t* cursors = Workspace::mine().get<int32_t>(Workspace::kCursor, 2 * rows);
    const int32_t* begin = crow;
    for (int64_t t = 0; t + 1 < count; ++t) {
      int32_t* end = cursors + (t % 2) * rows;
      kernels<T>().advance(index, begin, crow + 1, end, rows, int32_t(t * each), int32_t((t + 1) * each),
                           int32_t(features));
      f(begin, end);
      begin = end;
    }
    f(begin, crow + 1);
  }
};

// What becomes of a finished sum: bias (per row, may be null) is added and an activation applied.
template <class T>
struct Epilogue {
  const T* bias = nullptr;
  Activation activation = kNone;
  void apply(T* sums, int64_t count) const {
    if (activation != kNone) kernels<T>().activate(sums, count, activation);
  }
};

// y[samples, rows] = panels x survivors, for one panel and the rows of a span.
template <class T>
struct PanelProduct {
  const Panels<T>& panels;
  Lists lists;
  const T* values;
  Epilogue<T> epilogue;
  Matrix y;

  void run(int64_t i, Span rows) const {
    if (rows.begin >= rows.end) return;
    const int64_t width = panels.width_of(i);
    // Of all rows, not of these: how sums are cut must not depend on who computes them.
    const Tiles tiles(panels.features, panels.tile_width(i) * int64_t(sizeof(T)), lists.rows, lists.nnz,
                      kProductPerTile);
    const int64_t block = tiles.count > 1 ? 256 : 64;
    const T* bias = epilogue.bias;
    T* result = Workspace::mine().get<T>(Workspace::kTile, block * width);
    for (int64_t r = rows.begin; r < rows.end; r += block) {
      const int64_t count = std::min(block, rows.end - r);
      Product<T> p{panels.panel(i), lists.index, false, values, nullptr, nullptr,
                   count, bias ? bias + r : nullptr, false, result, width};
      tiles.walk<T>(lists.crow + r, lists.index, count, [&](const int32_t* begin, const int32_t* end) {
        p.begin = begin;
        p.end = end;
        kernels<T>().product(p, int(panels.lines_of(i)));
        p.accumulate = true;
      });
      epilogue.apply(result, count * width);
      panels.each_line(i, [&](int64_t sample, int64_t line, int64_t lanes) {
        kernels<T>().unpack[y.storage](
            {result + line * kLanes<T>, width, y.at(sample, r), y.sample_stride, y.feature_stride, lanes, count});
      });
    }
  }

  // Whether a part needs no panels but those that it has packed itself.
  bool alone(int64_t parts) const { return panels.even(parts); }

  // This part's share: whole panels when they divide evenly, else a share of the rows of every panel.
  void run_part(int64_t parts, int64_t part) const {
    const int64_t splits = alone(parts) ? 1 : parts;
    const Span items = cut(panels.count * splits, parts, part);
    for (int64_t item = items.begin; item < items.end; ++item)
      run(item / splits, cut_rows(lists.crow, lists.rows, splits, item % splits, kLanes<T>));
  }
};

// Survivors up to which threads take samples of their own and all weights: a thread's second cache holds about as many.
// More are shared out among the threads, or each would fetch them all.
constexpr int64_t kOwnSurvivors = 300'000;

// The same by machine code, whose panels are one line wide.
struct CodeProduct {
  static constexpr int64_t kBlocks = 4;            // blocks of rows whose results are unpacked together
  static constexpr int64_t kTileBytes = 256 << 10;  // panels that one pass over the code reads

  const Panels<float>& panels;
  const MachineCode& code;
  const float* values;
  Epilogue<float> epilogue;
  Matrix y;

  bool alone(int64_t parts) const { return panels.even(parts) && code.survivors() <= kOwnSurvivors; }

  void run_part(int64_t parts, int64_t part) const {
    constexpr int64_t L = Panels<float>::L;
    const Span blocks = alone(parts) ? Span{0, code.blocks()} : code.share(parts, part);
    const Span own = alone(parts) ? cut(panels.count, parts, part) : Span{0, panels.count};
    const int64_t panel = L * panels.features;
    const int64_t pass = std::clamp<int64_t>(kTileBytes / (panel * int64_t(sizeof(float))), 4, 16);
    for (int64_t first = own.begin; first < own.end; first += pass) {
      const int64_t count = std::min(pass, own.end - first);
      for (int64_t b = blocks.begin; b < blocks.end; b += kBlocks) {
        const Span some{b, std::min(blocks.end, b + kBlocks)};
        const int64_t row = code.row(some.begin), rows = code.row(some.end) - row;
        float* result = Workspace::mine().get<float>(Workspace::kTile, count * rows * L);
        code.run(some, count, panels.panel(first), panel, values, epilogue.bias, result, rows * L);
        epilogue.apply(result, count * rows * L);
        for (int64_t t = 0; t < count; ++t)
          panels.each_line(first + t, [&](int64_t sample, int64_t, int64_t lanes) {
            kernels<float>().unpack[y.storage](
                {result + t * rows * L, L, y.at(sample, row), y.sample_stride, y.feature_stride, lanes, rows});
          });
      }
    }
  }
};

// pack(part), then the product's share; parts wait for each other only where one reads what another has packed.
template <class P, class F>
void pack_and_run(int64_t parts, const P& product, bool alone, const F& pack) {
  if (alone) {
    for_parts(parts, [&](int64_t part) {
      pack(part);
      product.run_part(parts, part);
    });
  } else {
    for_parts(parts, pack);
    for_parts(parts, [&](int64_t part) { product.run_part(parts, part); });
  }
}

// Machine code for lists where a key is given and a batch of this size is faster by it, else null.
template <class T>
std::shared_ptr<const MachineCode> code_for(const std::optional<Tensor>& key, bool transposed, const Lists& lists,
                                            const int32_t* perm, int64_t features, int64_t samples) {
  if (!std::is_same_v<T, float> || samples < kCodeSamples || !key.has_value() || !key->defined()) return nullptr;
  return MachineCode::find(*key, transposed, lists, perm, features, samples);
}

// dvalues (+)= dyT x at the survivors [first, last).
template <class T>
void sddmm_span(const Panels<T>& dy, const Panels<T>& x, const Lists& lists, Span span, bool accumulate, T* dvalues) {
  if (span.begin >= span.end) return;
  const int32_t* crow = lists.crow;
  const int64_t row = std::upper_bound(crow, crow + lists.rows + 1, int32_t(span.begin)) - crow - 1;
  const int64_t row_end = std::lower_bound(crow, crow + lists.rows + 1, int32_t(span.end)) - crow;
  for (int64_t i = 0; i < x.count; ++i) {
    const int64_t width = x.width_of(i);
    const Tiles tiles(x.features, width * int64_t(sizeof(T)), row_end - row, span.end - span.begin,
                      kSddmmPerTile);
    constexpr int64_t kBlock = 256;
    for (int64_t r = row; r < row_end; r += kBlock) {
      const int64_t count = std::min(kBlock, row_end - r);
      tiles.walk<T>(crow + r, lists.index, count, [&](const int32_t* begin, const int32_t* end) {
        kernels<T>().sddmm({x.panel(i), lists.index, false, dy.panel(i) + r * width, width, begin, end, count,
                            int32_t(span.begin), int32_t(span.end), accumulate || i > 0, dvalues},
                           int(x.lines_of(i)));
      });
    }
  }
}

template <class T>
void bias_gradient(const Panels<T>& dy, Span rows, bool accumulate, T* dbias) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    T total = accumulate ? dbias[r] : T(0);
    for (int64_t i = 0; i < dy.count; ++i) {
      const int64_t width = dy.width_of(i);
      total += kernels<T>().sum(dy.panel(i) + r * width, width);
    }
    dbias[r] = total;
  }
}

// values[perm[p]] as T, gathered by whoever needs them.
template <class T>
struct Permuted {
  const Tensor& values;
  const int32_t* perm;
  T* data;
  Permuted(const Tensor& values, const int32_t* perm, int64_t nnz)
      : values(values), perm(perm), data(Workspace::mine().get<T>(Workspace::kTable, nnz)) {}
  void fill(Span span) const {
    kernels<T>().gather[storage_of(values.scalar_type())](data + span.begin, values.const_data_ptr(),
                                                          perm + span.begin, span.end - span.begin);
  }
};

// One sample needs no packing: rows are plain dot products.
template <class T>
void single(const Matrix& x, const Lists& lists, const T* values, const Permuted<T>* permuted,
            const Epilogue<T>& epilogue, const Matrix& y) {
  const T* row = reinterpret_cast<const T*>(x.data);
  if (x.storage != kNative || x.feature_stride != 1) {
    T* copy = Workspace::mine().get<T>(Workspace::kX, x.features);
    kernels<T>().load[x.storage]({copy, 0, x.data, 0, x.feature_stride, 1, x.features});
    row = copy;
  }
  T* out = reinterpret_cast<T*>(y.data);
  if (y.storage != kNative) out = Workspace::mine().get<T>(Workspace::kStage, lists.rows);
  const int64_t parts = parts_for((permuted ? 1.0 : 0.3) * double(lists.nnz));
  for_parts(parts, [&](int64_t part) {
    const Span rows = cut_rows(lists.crow, lists.rows, parts, part, kLanes<T>);
    if (rows.begin >= rows.end) return;
    if (permuted) permuted->fill({lists.crow[rows.begin], lists.crow[rows.end]});
    const T* bias = epilogue.bias ? epilogue.bias + rows.begin : nullptr;
    kernels<T>().dot({row, lists.index, false, values, lists.crow + rows.begin, lists.crow + rows.begin + 1,
                      rows.end - rows.begin, bias, false, out + rows.begin, 1});
    epilogue.apply(out + rows.begin, rows.end - rows.begin);
  });
  if (y.storage != kNative) kernels<T>().store[y.storage]({out, 0, y.data, 0, 1, 1, lists.rows});
}

// y = activation(x W^T + bias) by machine code.
void multiply_by_code(const Matrix& x, const MachineCode& code, const float* values, const Epilogue<float>& epilogue,
                      int64_t nnz, const Matrix& y) {
  const int64_t step = samples_at_once<float>(x.features, 1);
  for (int64_t first = 0; first < x.samples; first += step) {
    const int64_t count = std::min(step, x.samples - first);
    const Panels<float> panels(Workspace::kX, x.features, first, count, 1);
    const int64_t parts = parts_for(pack_cost(count, x.features) + product_cost(nnz, count));
    const CodeProduct product{panels, code, values, epilogue, y};
    pack_and_run(parts, product, product.alone(parts), [&](int64_t part) { panels.fill_part(x, parts, part); });
  }
}

// y = activation(x W^T + bias) over the survivors listed by output; perm, if any, says where their values are.
template <class T>
Tensor multiply(const Tensor& x_tensor, const Tensor& values, const Lists& lists, const int32_t* perm,
                const Epilogue<T>& epilogue, const std::optional<Tensor>& key) {
  const Matrix x(x_tensor);
  Tensor out = new_empty<int64_t>(x_tensor, {x.samples, lists.rows});
  if (x.samples == 0 || lists.rows == 0) return out;
  const Matrix y(out);
  if constexpr (std::is_same_v<T, float>) {
    if (const auto code = perm ? nullptr : code_for<T>(key, false, lists, nullptr, x.features, x.samples)) {
      multiply_by_code(x, *code, values_as<T>(values), epilogue, lists.nnz, y);
      Workspace::mine().trim();
      return out;
    }
  }
  std::optional<Permuted<T>> permuted;
  if (perm) permuted.emplace(values, perm, lists.nnz);
  const T* v = perm ? permuted->data : values_as<T>(values);
  if (x.samples == 1) {
    single<T>(x, lists, v, perm ? &*permuted : nullptr, epilogue, y);
    Workspace::mine().trim();
    return out;
  }
  const int64_t threads = parts_for(pack_cost(x.samples, x.features) + product_cost(lists.nnz, x.samples));
  const int64_t owners = lists.nnz <= kOwnSurvivors ? threads : 1;
  const int64_t lines = Panels<T>::lines_for(x.samples, owners), step = samples_at_once<T>(x.features, lines);
  for (int64_t first = 0; first < x.samples; first += step) {
    const int64_t count = std::min(step, x.samples - first);
    const Panels<T> panels(Workspace::kX, x.features, first, count, lines);
    const bool gather = perm && first == 0;
    const int64_t parts = parts_for(pack_cost(count, x.features) + product_cost(lists.nnz, count));
    const PanelProduct<T> product{panels, lists, v, epilogue, y};
    pack_and_run(parts, product, product.alone(parts) && !gather, [&](int64_t part) {
      panels.fill_part(x, parts, part);
      if (gather) permuted->fill(cut(lists.nnz, parts, part, kLanes<T>));
    });
  }
  Workspace::mine().trim();
  return out;
}

void check_activation(const char* op, const char* name, const Tensor& x, int64_t features) {
  check_float(op, name, x);
  STD_TORCH_CHECK(x.dim() == 2 && (features < 0 || x.size(1) == features), op, ": Expected ", name, " of shape [N, ",
                  features < 0 ? std::string("features") : std::to_string(features), "], got ", shape_of(x));
}

void check_reach(const char* op, const char* name, const Tensor& x, const Lists& lists) {
  const int64_t needed = largest_index(lists) + 1;
  STD_TORCH_CHECK(needed <= x.size(1), op, ": Expected ", name, " of shape [N, ", needed,
                  "] or more features (the weight uses feature ", needed - 1, "), got ", shape_of(x));
}

void check_values(const char* op, const Tensor& values, const Tensor& x, const char* x_name, const Lists& lists) {
  check_same_dtype(op, "values", values, x_name, x);
  check_vector(op, "values", values, lists.nnz);
}

}  // namespace

Tensor csr_linear(Tensor x, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias,
                  std::optional<Tensor> code_key, std::string activation) {
  constexpr const char* op = "csr_linear";
  check_activation(op, "x", x, -1);
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  check_values(op, values, x, "x", lists);
  check_reach(op, "x", x, lists);
  const Activation kind = activation_of(op, activation);
  return with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> copy;
    return multiply<T>(x, values, lists, nullptr, {bias_as<T>(op, bias, x, lists.rows, copy), kind}, code_key);
  });
}

Tensor csr_linear_t(Tensor dy, Tensor values, Tensor t_crow, Tensor t_row, Tensor t_perm) {
  constexpr const char* op = "csr_linear_t";
  check_activation(op, "dy", dy, -1);
  const Lists lists = check_lists(op, "t_crow", t_crow, "t_row", t_row);
  check_values(op, values, dy, "dy", lists);
  check_reach(op, "dy", dy, lists);
  const int32_t* perm = check_index(op, "t_perm", t_perm);
  check_vector(op, "t_perm", t_perm, lists.nnz);
  return with_compute_type(dy, [&](auto zero) {
    using T = decltype(zero);
    return multiply<T>(dy, values, lists, perm, {}, std::nullopt);
  });
}

namespace {

struct Needs {
  bool dx, dvalues, dbias;
};

// Everything a training step needs from dy, packing dy and x once.
template <class T>
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& dy_tensor, const Tensor& x_tensor, const Tensor* values,
                                             const Lists& lists, const Lists& t_lists, const int32_t* perm,
                                             Needs need, const std::optional<Tensor>& key) {
  const Matrix dy(dy_tensor), x(x_tensor);
  const int64_t samples = dy.samples;
  Tensor dx = new_empty<int64_t>(x_tensor, {need.dx ? samples : 0, need.dx ? x.features : 0});
  if (!need.dx) dx = new_empty<int64_t>(x_tensor, {0});
  Result<T> dvalues(new_empty<int64_t>(x_tensor, {need.dvalues ? lists.nnz : 0}), Workspace::kGrad);
  Result<T> dbias(new_empty<int64_t>(dy_tensor, {need.dbias ? dy.features : 0}), Workspace::kStage);
  if (samples == 0) {
    if (need.dvalues) std::fill_n(dvalues.data(), lists.nnz, T(0));
    if (need.dbias) std::fill_n(dbias.data(), dy.features, T(0));
    return {dx, dvalues.finish(), dbias.finish()};
  }
  const bool in_place = MachineCode::reads_in_place(t_lists, dy.features);
  const int32_t* known = in_place ? perm : nullptr;  // by machine code
  const auto code = need.dx ? code_for<T>(key, true, t_lists, known, dy.features, samples) : nullptr;
  std::optional<Permuted<T>> permuted;
  if (need.dx && !(code && in_place)) permuted.emplace(*values, perm, t_lists.nnz);
  const T* dx_values = permuted ? permuted->data : need.dx ? values_as<T>(*values) : nullptr;
  std::optional<Matrix> dx_matrix;
  if (need.dx && x.features > 0) dx_matrix.emplace(dx);

  const int64_t lines = Panels<T>::lines_for(samples);
  const auto parts_of = [&](int64_t count) {
    const double products = double(need.dx) + double(need.dvalues);
    return parts_for(products * product_cost(lists.nnz, count) + 0.05 * double(dy.features * count) +
                     pack_cost(count, dy.features + (need.dvalues ? x.features : 0)));
  };
  const int64_t owners = lists.nnz <= kOwnSurvivors ? parts_of(samples) : 1;
  const int64_t dx_lines = code ? 1 : Panels<T>::lines_for(samples, owners);
  const bool apart = need.dx && dx_lines != lines, wide = !apart || need.dvalues || need.dbias;
  const int64_t step = samples_at_once<T>(std::max(x.features, dy.features), lines);
  for (int64_t first = 0; first < samples; first += step) {
    const int64_t count = std::min(step, samples - first);
    const Panels<T> dy_panels(Workspace::kDy, wide ? dy.features : 0, first, count, lines);
    const Panels<T> x_panels(Workspace::kX, need.dvalues ? x.features : 0, first, count, lines);
    const Panels<T> dx_panels(Workspace::kOffsets, apart ? dy.features : 0, first, count, dx_lines);
    const bool gather = permuted && first == 0;
    const int64_t parts = parts_of(count);
    for_parts(parts, [&](int64_t part) {
      if (wide) dy_panels.fill_part(dy, parts, part);
      if (apart) dx_panels.fill_part(dy, parts, part);
      if (need.dvalues) x_panels.fill_part(x, parts, part);
      if (gather) permuted->fill(cut(t_lists.nnz, parts, part, kLanes<T>));
    });
    for_parts(parts, [&](int64_t part) {
      if (dx_matrix) {
        const Panels<T>& panels = apart ? dx_panels : dy_panels;
        if (!code) PanelProduct<T>{panels, t_lists, dx_values, {}, *dx_matrix}.run_part(parts, part);
        else if constexpr (std::is_same_v<T, float>)
          CodeProduct{panels, *code, dx_values, {}, *dx_matrix}.run_part(parts, part);
      }
      if (need.dvalues)
        sddmm_span(dy_panels, x_panels, lists, cut(lists.nnz, parts, part, kLanes<T>), first > 0, dvalues.data());
      if (need.dbias) bias_gradient(dy_panels, cut(dy.features, parts, part), first > 0, dbias.data());
    });
  }
  std::tuple<Tensor, Tensor, Tensor> result{dx, dvalues.finish(), dbias.finish()};
  Workspace::mine().trim();
  return result;
}

void check_pair(const char* op, const Tensor& dy, const Tensor& x, const Lists& lists) {
  check_activation(op, "dy", dy, lists.rows);
  check_activation(op, "x", x, -1);
  check_same_dtype(op, "dy", dy, "x", x);
  STD_TORCH_CHECK(dy.size(0) == x.size(0), op, ": Expected dy and x of the same batch size, got ", shape_of(dy),
                  " and ", shape_of(x));
  check_reach(op, "x", x, lists);
}

}  // namespace

Tensor csr_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col) {
  constexpr const char* op = "csr_sddmm";
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  check_pair(op, dy, x, lists);
  return with_compute_type(x, [&](auto zero) {
    return std::get<1>(gradients<decltype(zero)>(dy, x, nullptr, lists, Lists{}, nullptr, {false, true, false},
                                              std::nullopt));
  });
}

std::tuple<Tensor, Tensor, Tensor> csr_linear_backward(Tensor dy, Tensor x, Tensor values, Tensor crow, Tensor col,
                                                       Tensor t_crow, Tensor t_row, Tensor t_perm, bool need_dx,
                                                       bool need_dvalues, bool need_dbias,
                                                       std::optional<Tensor> code_key) {
  constexpr const char* op = "csr_linear_backward";
  const Lists lists = check_lists(op, "crow_indices", crow, "col_indices", col);
  check_pair(op, dy, x, lists);
  check_values(op, values, x, "x", lists);
  Lists t_lists{};
  const int32_t* perm = nullptr;
  if (need_dx) {
    t_lists = check_lists(op, "t_crow", t_crow, "t_row", t_row);
    check_activation(op, "x", x, t_lists.rows);
    check_reach(op, "dy", dy, t_lists);
    perm = check_index(op, "t_perm", t_perm);
    check_vector(op, "t_perm", t_perm, lists.nnz);
  }
  return with_compute_type(x, [&](auto zero) {
    return gradients<decltype(zero)>(dy, x, &values, lists, t_lists, perm, {need_dx, need_dvalues, need_dbias},
                                     code_key);
  });
}

}  // namespace sparsekit
