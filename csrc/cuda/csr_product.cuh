// The product y [tokens, rows] = x Wᵀ: survivors dealt to warps by the length of their rows, packed, and multiplied.
#pragma once

#include "csr_tile.cuh"

namespace sparsekit::cuda {
namespace {

// kVectors loads a lane and survivor; kWarpRows rows of W a warp; kColumns input features resident in each stage.
template <class T, int kVectors_, int kWarpRows_, int kWarps_, int kColumns_>
struct ProductTile {
  using Value = T;
  static constexpr int kVectors = kVectors_, kWarpRows = kWarpRows_, kWarps = kWarps_, kColumns = kColumns_;
  static constexpr int kTokens = kVectors * kVector<T> * kWarp, kRows = kWarps * kWarpRows, kThreads = kWarps * kWarp;
  static constexpr int kStages = 2;
  static constexpr size_t kShared = kStages * arena_bytes<T>(kColumns * kTokens);
  // The finished tile leaves through the stages, the tokens of half a warp at a time; rows are padded against bank
  // conflicts.
  static constexpr int kStoreTokens = kVector<T> * kWarp / 2, kStoreStride = kRows + 1;

  static_assert(kShared <= kMaxSharedBytes, "both stages fit into the shared memory of a block");
  static_assert(kStoreTokens * kStoreStride <= kColumns * kTokens, "a stage holds the finished tokens of half a warp");
  static_assert(kRows <= kThreads, "one thread per row deals the rows out");
};

// Many survivors: the widest tile of tokens makes the most of each survivor. Few: reading xt less often matters more.
// Small: layers that would not fill the machine.
template <class T>
using WideTile = ProductTile<T, 2, 8, 16, 96>;
template <class T>
using TallTile = ProductTile<T, 1, 16, 16, 192>;
template <class T>
using SmallTile = ProductTile<T, 1, 2, 8, 64>;

constexpr double kTallBelow = 0.03;  // density at which both limits of the wide tile meet in a model, not measured

// A survivor as the inner loop wants it.
template <class T>
struct Survivor {
  T value;
  int offset;  // of its input feature in a stage, in elements
};
template <class T>
struct PackedSurvivor;
template <>
struct PackedSurvivor<float> {
  using Word = int2;
};
template <>
struct PackedSurvivor<double> {
  using Word = int4;
};

template <class T>
SPARSEKIT_DEVICE Survivor<T> load_survivor(const typename PackedSurvivor<T>::Word* p) {
  const typename PackedSurvivor<T>::Word word = ldg(p);
  Survivor<T> survivor;
  memcpy(&survivor, &word, sizeof(Survivor<T>));
  return survivor;
}

// values [nnz] and their columns as the survivors of a tile; perm (optional) names the value of each.
template <class Tile, class T = typename Tile::Value>
__global__ void __launch_bounds__(256) pack_kernel(const T* values, const int* perm, const int* column,
                                                   typename PackedSurvivor<T>::Word* out, int count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  Survivor<T> survivor{};
  survivor.value = values[perm ? perm[i] : i];
  survivor.offset = column[i] % Tile::kColumns * Tile::kTokens;
  typename PackedSurvivor<T>::Word word{};
  memcpy(&word, &survivor, sizeof(Survivor<T>));
  out[i] = word;
}

// One block per tile of rows. slots [kRows]: which row each place of the tile holds (-1: none), dealt out by length so
// that every warp has long and short rows. starts [chunks + 1, kRows]: where the row's survivors of each chunk begin.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) deal_kernel(const int* crow, const int* column, int rows, int chunks,
                                                              int* slots, int* starts) {
  SharedArena arena;
  int* lengths = arena.take<int>(Tile::kRows);
  int* dealt = arena.take<int>(Tile::kRows);
  const int self = threadIdx.x;
  const int64_t tile = blockIdx.x;
  const int64_t row = tile * Tile::kRows + self;
  if (self < Tile::kRows) lengths[self] = row < rows ? crow[row + 1] - crow[row] : -1;
  __syncthreads();
  if (self < Tile::kRows) {
    int rank = 0;
    for (int other = 0; other < Tile::kRows; ++other)
      rank += lengths[other] > lengths[self] || (lengths[other] == lengths[self] && other < self);
    // Round k gives one row to every warp, forwards and backwards in turn.
    const int round = rank / Tile::kWarps, place = rank % Tile::kWarps;
    const int warp = round % 2 ? Tile::kWarps - 1 - place : place;
    dealt[warp * Tile::kWarpRows + round] = row < rows ? int(row) : -1;
  }
  __syncthreads();
  if (self < Tile::kRows) slots[tile * Tile::kRows + self] = dealt[self];
  int* tile_starts = starts + tile * (chunks + 1) * Tile::kRows;
  for (int i = self; i < (chunks + 1) * Tile::kRows; i += Tile::kThreads) {
    const int mine = dealt[i % Tile::kRows];
    const int64_t limit = int64_t(i / Tile::kRows) * Tile::kColumns;
    tile_starts[i] = mine < 0 ? 0 : lower_bound(column, crow[mine], crow[mine + 1], limit);
  }
}

// The sums of a warp: kWarpRows rows of W by kVectors vectors of tokens in each lane.
template <class Tile>
struct WarpProduct {
  using T = typename Tile::Value;
  T sum[Tile::kWarpRows][Tile::kVectors][kVector<T>] = {};

  SPARSEKIT_DEVICE void add(int row, T value, const Vector<T> (&x)[Tile::kVectors]) {
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v)
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) sum[row][v][j] += value * x[v].at[j];
  }

  // stage: the lane's own place in the resident features; bound: in lane i where the survivors of row i begin, in lane
  // kWarpRows + i where they end.
  SPARSEKIT_DEVICE void add_chunk(const T* stage, int bound, const typename PackedSurvivor<T>::Word* survivors) {
#pragma unroll
    for (int row = 0; row < Tile::kWarpRows; ++row) {
      int i = shuffle(bound, row);
      const int end = shuffle(bound, Tile::kWarpRows + row);
      // Four at a time: loads in flight hide the latency of shared memory.
#pragma unroll 1
      for (; i + 4 <= end; i += 4) add_survivors<4>(row, stage, survivors + i);
      if (i + 2 <= end) {
        add_survivors<2>(row, stage, survivors + i);
        i += 2;
      }
      if (i < end) add_survivors<1>(row, stage, survivors + i);
    }
  }

  template <int kCount>
  SPARSEKIT_DEVICE void add_survivors(int row, const T* stage, const typename PackedSurvivor<T>::Word* survivors) {
    Survivor<T> survivor[kCount];
    Vector<T> x[kCount][Tile::kVectors];
#pragma unroll
    for (int k = 0; k < kCount; ++k) survivor[k] = load_survivor<T>(survivors + k);
#pragma unroll
    for (int k = 0; k < kCount; ++k)
#pragma unroll
      for (int v = 0; v < Tile::kVectors; ++v)
        x[k][v] = load_vector(stage + survivor[k].offset + v * kWarp * kVector<T>);
#pragma unroll
    for (int k = 0; k < kCount; ++k) add(row, survivor[k].value, x[k]);
  }
};

template <class T>
struct ProductArguments {
  const T* xt;  // [features, xt_stride]
  int64_t xt_stride;
  const typename PackedSurvivor<T>::Word* survivors;
  const int *slots, *starts;
  const T* bias;  // [rows] or null
  T* y;           // [tokens, y_stride]
  int64_t y_stride, tokens;
  int features, rows, row_tiles, chunks;
};

template <class Tile, class T = typename Tile::Value>
__global__ void __launch_bounds__(Tile::kThreads, 1) product_kernel(ProductArguments<T> p) {
  static_assert(2 * Tile::kWarpRows <= kWarp, "one lane holds each bound of the warp's rows");
  SharedArena arena;
  SharedRing<T> stages = arena.take_ring<T>(Tile::kStages, Tile::kColumns * Tile::kTokens);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = blockIdx.x % p.row_tiles;  // neighbours read the same tokens: they stay in L2
  const int64_t token0 = int64_t(blockIdx.x / p.row_tiles) * Tile::kTokens;

  const TileLoader<T, Tile::kTokens, Tile::kThreads> loader(p.xt, p.xt_stride, token0, p.tokens);
  auto load = [&](int chunk) {
    const int first = chunk * Tile::kColumns;
    if (chunk < p.chunks) loader.load(stages[chunk % Tile::kStages], first, min(Tile::kColumns, p.features - first));
    cp_async_commit();
  };
  const int* starts = p.starts + tile * (p.chunks + 1) * Tile::kRows + warp * Tile::kWarpRows;
  auto load_bound = [&](int chunk) {
    const int row = lane % Tile::kWarpRows, side = lane / Tile::kWarpRows;
    return chunk < p.chunks && side < 2 ? ldg(starts + (chunk + side) * Tile::kRows + row) : 0;
  };

  WarpProduct<Tile> product;
  load(0);
  int bound = load_bound(0);
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    cp_async_wait<0>();
    __syncthreads();  // this chunk is here, and nobody reads the stage of the previous one any more
    load(chunk + 1);
    const int next_bound = load_bound(chunk + 1);
    product.add_chunk(stages[chunk % Tile::kStages] + lane * kVector<T>, bound, p.survivors);
    bound = next_bound;
  }

  const int row0 = int(tile) * Tile::kRows;
  const int* slots = p.slots + int64_t(row0) + warp * Tile::kWarpRows;
#pragma unroll
  for (int half = 0; half < 2 * Tile::kVectors; ++half) {
    T* finished = stages[half % Tile::kStages];  // [kStoreTokens, kStoreStride]
    __syncthreads();
    if (lane / (kWarp / 2) == half % 2) {
      const int place = lane % (kWarp / 2) * kVector<T>;
#pragma unroll
      for (int row = 0; row < Tile::kWarpRows; ++row) {
        const int where = ldg(slots + row) - row0;
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j)
          if (where >= 0)
            finished[(place + j) * Tile::kStoreStride + where] = product.sum[row][half / 2][j];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::kStoreTokens * Tile::kRows; i += Tile::kThreads) {
      const int row = i % Tile::kRows, place = i / Tile::kRows;
      const int64_t token = token0 + half * Tile::kStoreTokens + place;
      if (token < p.tokens && row0 + row < p.rows)
        p.y[token * p.y_stride + row0 + row] =
            finished[place * Tile::kStoreStride + row] + (p.bias ? p.bias[row0 + row] : T(0));
    }
  }
}

}  // namespace
}  // namespace sparsekit::cuda
