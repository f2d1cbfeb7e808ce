// Unstructured fp32 and fp64 products on CUDA cores: y = x Wᵀ + b, dx = dy W and dW = dyᵀ x at the survivors only.
//
// Each survivor multiplies one input feature of many tokens, so inputs are first copied feature-major (xt [features,
// tokens]): a survivor is then one conflict-free 16-byte shared load per lane. Every product reads its x from shared
// memory, whose bandwidth is the limit; what the tiles choose is how many survivors share one load of xt from L2.
// Sums run in a fixed order: results are deterministic and do not depend on the device.
#include "csr_linear.h"

#include "csr_product.cuh"
#include "csr_sampled.cuh"

namespace sparsekit::cuda {
namespace {

// Cuts the caller's work space into pieces; with a null pointer it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    char* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 256);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

struct Shape {
  int64_t tokens, features, rows, nnz;
  double density() const { return double(nnz) / (double(rows) * double(features)); }
};

// f(Tile{}) with the tile for a shape on the current device.
template <class T, class F>
auto with_product_tile(const Shape& s, const F& f) {
  const auto blocks = [&](auto tile) {
    using Tile = decltype(tile);
    return ceil_div(s.rows, Tile::kRows) * ceil_div(s.tokens, Tile::kTokens);
  };
  const bool large = max_shared_bytes() >= int(WideTile<T>::kShared) && blocks(WideTile<T>{}) >= multiprocessors();
  if (!large) return f(SmallTile<T>{});
  if (s.density() < kTallBelow && blocks(TallTile<T>{}) >= multiprocessors()) return f(TallTile<T>{});
  return f(WideTile<T>{});
}

template <class T, class F>
auto with_sampled_tile(const Shape& s, const F& f) {
  using Large = LargeSample<T>;
  const int64_t blocks = ceil_div(s.rows, Large::kRows) * ceil_div(s.features, Large::kColumns);
  if (max_shared_bytes() >= int(Large::kShared) && blocks >= multiprocessors()) return f(Large{});
  return f(SmallSample<T>{});
}

template <class Tile, class T = typename Tile::Value>
struct ProductWorkspace {
  using Word = typename PackedSurvivor<T>::Word;
  int64_t row_tiles, chunks, bytes;
  T* xt;
  Word* survivors;
  int *slots, *starts;

  ProductWorkspace(const Shape& s, void* memory)
      : row_tiles(ceil_div(s.rows, Tile::kRows)), chunks(s.nnz ? ceil_div(s.features, Tile::kColumns) : 0) {
    Workspace space(memory);
    xt = space.take<T>(s.nnz ? s.features * feature_major_stride<T>(s.tokens) : 0);
    survivors = space.take<Word>(s.nnz);
    slots = space.take<int>(row_tiles * Tile::kRows);
    starts = space.take<int>(row_tiles * Tile::kRows * (chunks + 1));
    bytes = space.used();
  }
};

template <class Tile>
struct SampledWorkspace {
  using T = typename Tile::Value;
  int64_t row_blocks, column_blocks, tiles_per_split, splits, bytes;
  T *dyt, *xt, *parts;

  SampledWorkspace(const Shape& s, void* memory)
      : row_blocks(ceil_div(s.rows, Tile::kRows)), column_blocks(ceil_div(s.features, Tile::kColumns)) {
    // Few blocks: cut the tokens until the machine has two waves of work, but never into pieces of under eight tiles.
    const int64_t tiles = ceil_div(s.tokens, Tile::kTokens), blocks = row_blocks * column_blocks;
    const int64_t wanted = ceil_div(2 * multiprocessors(), blocks > 0 ? blocks : 1);
    const int64_t possible = tiles / 8 > 1 ? tiles / 8 : 1;
    tiles_per_split = ceil_div(tiles > 0 ? tiles : 1, wanted < possible ? wanted : possible);
    splits = tiles > 0 ? ceil_div(tiles, tiles_per_split) : 1;
    Workspace space(memory);
    dyt = space.take<T>(s.rows * feature_major_stride<T>(s.tokens));
    xt = space.take<T>(s.features * feature_major_stride<T>(s.tokens));
    parts = space.take<T>(splits > 1 ? splits * s.nnz : 0);
    bytes = space.used();
  }
};

template <class Tile, class T = typename Tile::Value>
cudaError_t product(const Shape& s, const void* x, int64_t x_stride, const void* values, const int* perm,
                    const int* crow, const int* columns, const void* bias, void* y, int64_t y_stride, void* memory,
                    void* stream) {
  const ProductWorkspace<Tile> space(s, memory);
  const int64_t blocks = space.row_tiles * ceil_div(s.tokens, Tile::kTokens);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaError_t error = cudaSuccess;
  if (s.nnz) {
    error = feature_major(static_cast<const T*>(x), x_stride, space.xt, s.tokens, s.features, stream);
    if (error != cudaSuccess) return error;
    error = launch(pack_kernel<Tile>, unsigned(ceil_div(s.nnz, 256)), 256, 0, stream, static_cast<const T*>(values),
                   perm, columns, space.survivors, int(s.nnz));
    if (error != cudaSuccess) return error;
  }
  error = launch(deal_kernel<Tile>, unsigned(space.row_tiles), Tile::kThreads, 2 * arena_bytes<int>(Tile::kRows),
                 stream, crow, columns, int(s.rows), int(space.chunks), space.slots, space.starts);
  if (error != cudaSuccess) return error;
  const ProductArguments<T> arguments{space.xt,
                                      feature_major_stride<T>(s.tokens),
                                      space.survivors,
                                      space.slots,
                                      space.starts,
                                      static_cast<const T*>(bias),
                                      static_cast<T*>(y),
                                      y_stride,
                                      s.tokens,
                                      int(s.features),
                                      int(s.rows),
                                      int(space.row_tiles),
                                      int(space.chunks)};
  return launch(product_kernel<Tile>, unsigned(blocks), Tile::kThreads, Tile::kShared, stream, arguments);
}

template <class Tile, class T = typename Tile::Value>
cudaError_t sampled(const Shape& s, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const int* crow,
                    const int* columns, void* dvalues, void* memory, void* stream) {
  const SampledWorkspace<Tile> space(s, memory);
  const int64_t blocks = space.row_blocks * space.column_blocks * space.splits;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaError_t error = feature_major(static_cast<const T*>(dy), dy_stride, space.dyt, s.tokens, s.rows, stream);
  if (error != cudaSuccess) return error;
  error = feature_major(static_cast<const T*>(x), x_stride, space.xt, s.tokens, s.features, stream);
  if (error != cudaSuccess) return error;
  T* out = static_cast<T*>(dvalues);
  const SampledArguments<T> arguments{space.dyt,
                                      space.xt,
                                      feature_major_stride<T>(s.tokens),
                                      crow,
                                      columns,
                                      space.splits > 1 ? space.parts : out,
                                      s.tokens,
                                      s.rows,
                                      s.features,
                                      s.nnz,
                                      int(space.row_blocks),
                                      int(space.column_blocks),
                                      int(space.tiles_per_split)};
  error = launch(sampled_kernel<Tile>, unsigned(blocks), Tile::kThreads, Tile::kShared, stream, arguments);
  if (error != cudaSuccess || space.splits == 1) return error;
  return launch(sum_kernel<T>, unsigned(ceil_div(s.nnz, 256)), 256, 0, stream, static_cast<const T*>(space.parts), out,
                s.nnz, int(space.splits));
}

// Why the arguments cannot run, as a launcher's error code; 0 when they can.
int refuse(const char* kernel, const Shape& s, int dtype) {
  if (dtype != kFloat32 && dtype != kFloat64)
    return reject(kernel, "Expected float32 or float64, got %s", dtype_name(dtype));
  for (const int64_t size : {s.features, s.rows, s.nnz})
    if (size < 0 || size > INT32_MAX)
      return reject(kernel, "Expected features, rows and survivors below 2^31, got %lld", static_cast<long long>(size));
  if (s.tokens < 0) return reject(kernel, "Expected a number of tokens, got %lld", static_cast<long long>(s.tokens));
  return 0;
}

int report_shape(cudaError_t error, const char* kernel, const Shape& s, int dtype) {
  return report(error, kernel, "%s x [%lld, %lld], W [%lld, %lld] with %lld survivors", dtype_name(dtype),
                static_cast<long long>(s.tokens), static_cast<long long>(s.features), static_cast<long long>(s.rows),
                static_cast<long long>(s.features), static_cast<long long>(s.nnz));
}

}  // namespace
}  // namespace sparsekit::cuda

using namespace sparsekit::cuda;

extern "C" int64_t sparsekit_cuda_csr_linear_workspace(int64_t tokens, int64_t features, int64_t rows, int64_t nnz,
                                                       int dtype) {
  const Shape shape{tokens, features, rows, nnz};
  const auto bytes = [&](auto tile) { return ProductWorkspace<decltype(tile)>(shape, nullptr).bytes; };
  return dtype == kFloat64 ? with_product_tile<double>(shape, bytes) : with_product_tile<float>(shape, bytes);
}

extern "C" int64_t sparsekit_cuda_csr_sddmm_workspace(int64_t tokens, int64_t features, int64_t rows, int64_t nnz,
                                                      int dtype) {
  const Shape shape{tokens, features, rows, nnz};
  const auto bytes = [&](auto tile) { return SampledWorkspace<decltype(tile)>(shape, nullptr).bytes; };
  return dtype == kFloat64 ? with_sampled_tile<double>(shape, bytes) : with_sampled_tile<float>(shape, bytes);
}

extern "C" int sparsekit_cuda_csr_linear(const void* x, int64_t x_stride, const void* values, const int32_t* perm,
                                         const int32_t* crow, const int32_t* columns, const void* bias, void* y,
                                         int64_t y_stride, int64_t tokens, int64_t features, int64_t rows, int64_t nnz,
                                         int dtype, void* workspace, void* stream) {
  constexpr const char* kernel = "csr linear";
  const Shape shape{tokens, features, rows, nnz};
  if (const int refused = refuse(kernel, shape, dtype)) return refused;
  if (tokens == 0 || rows == 0) return 0;
  const auto run = [&](auto tile) {
    return product<decltype(tile)>(shape, x, x_stride, values, perm, crow, columns, bias, y, y_stride, workspace,
                                   stream);
  };
  const cudaError_t error =
      dtype == kFloat64 ? with_product_tile<double>(shape, run) : with_product_tile<float>(shape, run);
  return report_shape(error, kernel, shape, dtype);
}

extern "C" int sparsekit_cuda_csr_sddmm(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                                        const int32_t* crow, const int32_t* columns, void* dvalues, int64_t tokens,
                                        int64_t features, int64_t rows, int64_t nnz, int dtype, void* workspace,
                                        void* stream) {
  constexpr const char* kernel = "csr sampled product";
  const Shape shape{tokens, features, rows, nnz};
  if (const int refused = refuse(kernel, shape, dtype)) return refused;
  if (nnz == 0) return 0;
  const auto run = [&](auto tile) {
    return sampled<decltype(tile)>(shape, dy, dy_stride, x, x_stride, crow, columns, dvalues, workspace, stream);
  };
  const cudaError_t error =
      dtype == kFloat64 ? with_sampled_tile<double>(shape, run) : with_sampled_tile<float>(shape, run);
  return report_shape(error, kernel, shape, dtype);
}
