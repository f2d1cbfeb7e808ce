// The sampled product dW [nnz] = dyᵀ x at the survivors.
#pragma once

#include "csr_tile.cuh"

namespace sparsekit::cuda {
namespace {

// A block owns the survivors in kRows rows and kColumns columns of W and walks over the tokens.
template <class T, int kRows_, int kColumns_, int kAtOnce_>
struct SampledTile {
  using Value = T;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarps = 16, kThreads = kWarps * kWarp;
  static constexpr int kTokens = kVector<T> * kWarp, kStages = 2;
  static constexpr int kAtOnce = kAtOnce_;  // survivors that one walk over the tokens serves
  static constexpr size_t kShared = kStages * (arena_bytes<T>(kRows * kTokens) + arena_bytes<T>(kColumns * kTokens)) +
                                    arena_bytes<unsigned>(kAtOnce) + arena_bytes<T>(kAtOnce) +
                                    3 * arena_bytes<int>(kRows);

  static_assert(kShared <= kMaxSharedBytes, "both stages, the survivors and their sums fit into shared memory");
  static_assert(kAtOnce % kWarp == 0, "survivors are multiplied 32 at a time");
  static_assert(kRows * kTokens < 65536 && kColumns * kTokens < 65536, "both offsets of a survivor fit into one word");
  static_assert(kRows <= kThreads, "one thread per row looks for its survivors");
};

template <class T>
using LargeSample = SampledTile<T, 96, 96, 2560>;
template <class T>
using SmallSample = SampledTile<T, 32, 32, 1024>;

// The survivors of a block, row after row, and the sums of those that are served at once.
template <class Tile>
struct BlockSurvivors {
  using T = typename Tile::Value;
  unsigned* place;              // [kAtOnce] offsets in the stages: of the row of dy (high half) and of x (low half)
  T* sum;                       // [kAtOnce]
  int *begin, *count, *before;  // [kRows] in W's list; survivors of this row and of the rows before it

  SPARSEKIT_DEVICE explicit BlockSurvivors(SharedArena& arena) {
    place = arena.take<unsigned>(Tile::kAtOnce);
    sum = arena.take<T>(Tile::kAtOnce);
    begin = arena.take<int>(Tile::kRows);
    count = arena.take<int>(Tile::kRows);
    before = arena.take<int>(Tile::kRows);
  }

  // Returns how many there are.
  SPARSEKIT_DEVICE int find(const int* crow, const int* columns, int64_t row0, int64_t rows, int64_t column0) {
    const int self = threadIdx.x;
    if (self < Tile::kRows) {
      const int64_t row = row0 + self;
      const int first = row < rows ? crow[row] : 0, last = row < rows ? crow[row + 1] : 0;
      begin[self] = lower_bound(columns, first, last, column0);
      count[self] = lower_bound(columns, begin[self], last, column0 + Tile::kColumns) - begin[self];
    }
    __syncthreads();
    if (self < Tile::kRows) {
      int sum_before = 0;
      for (int other = 0; other < self; ++other) sum_before += count[other];
      before[self] = sum_before;
    }
    __syncthreads();
    return before[Tile::kRows - 1] + count[Tile::kRows - 1];
  }

  // Lists survivors first .. first + kAtOnce and clears their sums; the last 32 are filled up with harmless ones.
  SPARSEKIT_DEVICE void list(const int* columns, int column0, int first, int size) {
    for (int i = threadIdx.x; i < round_up(size, kWarp); i += Tile::kThreads) {
      sum[i] = T(0);
      if (i >= size) place[i] = 0;
    }
    for (int row = threadIdx.x / kWarp; row < Tile::kRows; row += Tile::kWarps)
      for (int k = threadIdx.x % kWarp; k < count[row]; k += kWarp) {
        const int slot = before[row] + k - first;
        if (slot < 0 || slot >= size) continue;
        const int column = columns[begin[row] + k] - column0;
        place[slot] = unsigned(row * Tile::kTokens) << 16 | unsigned(column * Tile::kTokens);
      }
  }

  SPARSEKIT_DEVICE void store(T* out, int first, int size) const {
    for (int i = threadIdx.x; i < size; i += Tile::kThreads) {
      const int row = int(place[i] >> 16) / Tile::kTokens;
      out[begin[row] + (first + i - before[row])] = sum[i];
    }
  }
};

// Lane i gets the sum over all lanes of part[i]: 31 shuffles for 32 sums.
template <int kHalf, class T>
SPARSEKIT_DEVICE T transposed_sum(T (&part)[kWarp], int lane) {
  if constexpr (kHalf == 0) {
    return part[0];
  } else {
    const bool upper = lane & kHalf;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const T given = upper ? part[i] : part[i + kHalf];
      part[i] = (upper ? part[i + kHalf] : part[i]) + shuffle_xor(given, kHalf);
    }
    return transposed_sum<kHalf / 2>(part, lane);
  }
}

// The products of 32 survivors over the tokens of a stage; survivors of one row follow each other and share its dy.
template <class T>
SPARSEKIT_DEVICE T sample(const T* dy_tile, const T* x_tile, const unsigned* place, int lane) {
  T part[kWarp];
  Vector<T> dy{};
  unsigned loaded = ~0u;
#pragma unroll
  for (int i = 0; i < kWarp; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(place + i);
    const unsigned places[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const unsigned row = places[k] >> 16;
      if (row != loaded) dy = load_vector(dy_tile + row + lane * kVector<T>);
      loaded = row;
      const Vector<T> x = load_vector(x_tile + (places[k] & 0xffffu) + lane * kVector<T>);
      T dot = T(0);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) dot += dy.at[j] * x.at[j];
      part[i + k] = dot;
    }
  }
  return transposed_sum<kWarp / 2>(part, lane);
}

template <class T>
struct SampledArguments {
  const T *dyt, *xt;  // [rows, stride], [features, stride]
  int64_t stride;
  const int *crow, *columns;
  T* out;  // [splits, nnz]
  int64_t tokens, rows, features, nnz;
  int row_blocks, column_blocks, tiles_per_split;
};

template <class Tile, class T = typename Tile::Value>
__global__ void __launch_bounds__(Tile::kThreads, 1) sampled_kernel(SampledArguments<T> p) {
  SharedArena arena;
  SharedRing<T> dy_stages = arena.take_ring<T>(Tile::kStages, Tile::kRows * Tile::kTokens);
  SharedRing<T> x_stages = arena.take_ring<T>(Tile::kStages, Tile::kColumns * Tile::kTokens);
  BlockSurvivors<Tile> survivors(arena);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int block = blockIdx.x % (p.row_blocks * p.column_blocks);
  const int split = blockIdx.x / (p.row_blocks * p.column_blocks);
  const int row0 = block % p.row_blocks * Tile::kRows, column0 = block / p.row_blocks * Tile::kColumns;
  const int rows = int(min(int64_t(Tile::kRows), p.rows - row0));
  const int columns = int(min(int64_t(Tile::kColumns), p.features - column0));
  const int64_t first_tile = int64_t(split) * p.tiles_per_split;
  const int64_t last_tile = min(first_tile + p.tiles_per_split, ceil_div(p.tokens, Tile::kTokens));

  auto load = [&](int64_t tile) {
    const int stage = int(tile % Tile::kStages);
    if (tile < last_tile) {
      using Loader = TileLoader<T, Tile::kTokens, Tile::kThreads>;
      Loader(p.dyt, p.stride, tile * Tile::kTokens, p.tokens).load(dy_stages[stage], row0, rows);
      Loader(p.xt, p.stride, tile * Tile::kTokens, p.tokens).load(x_stages[stage], column0, columns);
    }
    cp_async_commit();
  };

  const int total = survivors.find(p.crow, p.columns, row0, p.rows, column0);
  for (int first = 0; first < total; first += Tile::kAtOnce) {
    const int size = min(Tile::kAtOnce, total - first);
    survivors.list(p.columns, column0, first, size);
    load(first_tile);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int stage = int(tile % Tile::kStages);
      cp_async_wait<0>();
      __syncthreads();  // this tile is here, and nobody reads the stage of the previous one any more
      load(tile + 1);
      for (int i = warp * kWarp; i < size; i += Tile::kThreads)
        survivors.sum[i + lane] += sample(dy_stages[stage], x_stages[stage], survivors.place + i, lane);
    }
    __syncthreads();  // without tokens, nothing has ordered the list yet
    survivors.store(p.out + split * p.nnz, first, size);
    __syncthreads();  // the next ones overwrite the list
  }
}

// out [nnz] = the sum of parts [splits, nnz] in their order.
template <class T>
__global__ void __launch_bounds__(256) sum_kernel(const T* parts, T* out, int64_t nnz, int splits) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= nnz) return;
  T sum = parts[i];
  for (int split = 1; split < splits; ++split) sum += parts[split * nnz + i];
  out[i] = sum;
}

}  // namespace
}  // namespace sparsekit::cuda
