// Unstructured fp32 and fp64 products on CUDA cores: y = x Wᵀ + b, dx = dy W and dW = dyᵀ x at the survivors only.
//
// Each survivor multiplies one input feature of many tokens, so inputs are first copied feature-major (xt [features,
// tokens]): a survivor is then one conflict-free 16-byte shared load per lane. Every product reads its x from shared
// memory, whose bandwidth is the limit; what the tiles choose is how many survivors share one load of xt from L2.
// Sums run in a fixed order: results are deterministic and do not depend on the device.
#include "csr_linear.h"

#include "launch.h"
#include "ptx.cuh"

namespace sparsekit::cuda {
namespace {

constexpr int kVectorBytes = 16;
template <class T>
constexpr int kVector = kVectorBytes / int(sizeof(T));  // elements of one shared load

template <class T>
struct alignas(kVectorBytes) Vector {
  T at[kVector<T>];
};

template <class T>
SPARSEKIT_DEVICE Vector<T> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

// The first of the ascending list[begin .. end) that is not below `limit`, or end.
SPARSEKIT_DEVICE int lower_bound(const int* list, int begin, int end, int64_t limit) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (ldg(list + middle) < limit) begin = middle + 1;
    else end = middle;
  }
  return begin;
}

// ---- feature-major copy ----

constexpr int kSquare = 32;

// out [features, ld_out] = inᵀ, in [tokens, ld_in]; one square of 32 x 32 per block of 256 threads.
template <class T>
__global__ void __launch_bounds__(256) transpose_kernel(const T* in, int64_t ld_in, T* out, int64_t ld_out,
                                                        int64_t tokens, int64_t features, int squares_across) {
  SharedArena arena;
  T* square = arena.take<T>(kSquare * (kSquare + 1));
  const int64_t feature0 = int64_t(blockIdx.x % squares_across) * kSquare;
  const int64_t token0 = int64_t(blockIdx.x / squares_across) * kSquare;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int i = warp; i < kSquare; i += 8)
    if (token0 + i < tokens && feature0 + lane < features)
      square[i * (kSquare + 1) + lane] = ldg_stream(in + (token0 + i) * ld_in + feature0 + lane);
  __syncthreads();
  for (int i = warp; i < kSquare; i += 8)
    if (feature0 + i < features && token0 + lane < tokens)
      out[(feature0 + i) * ld_out + token0 + lane] = square[lane * (kSquare + 1) + i];
}

// Tokens from one feature of a feature-major copy to the next: rows start at multiples of 16 bytes.
template <class T>
int64_t feature_major_stride(int64_t tokens) {
  return round_up(tokens, kVector<T>);
}

template <class T>
cudaError_t feature_major(const T* in, int64_t ld_in, T* out, int64_t tokens, int64_t features, void* stream) {
  const int64_t across = ceil_div(features, kSquare), blocks = across * ceil_div(tokens, kSquare);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(transpose_kernel<T>, unsigned(blocks), 256, arena_bytes<T>(kSquare * (kSquare + 1)), stream, in, ld_in,
                out, feature_major_stride<T>(tokens), tokens, features, int(across));
}

// Asynchronously loads `count` rows of kTokens tokens from a feature-major copy into rows of shared memory, zeros
// beyond the last token.
template <class T, int kTokens, int kThreads>
struct TileLoader {
  static constexpr int kPerRow = kTokens / kVector<T>;
  static_assert(kThreads % kPerRow == 0, "a thread keeps its place in the row, so that it computes its tail once");

  const T* source;  // the thread's own place in the first row
  int64_t stride;
  int bytes, row, offset;

  SPARSEKIT_DEVICE TileLoader(const T* copy, int64_t stride, int64_t token0, int64_t tokens) : stride(stride) {
    row = threadIdx.x / kPerRow;
    offset = threadIdx.x % kPerRow * kVector<T>;
    const int64_t left = (tokens - token0 - offset) * int64_t(sizeof(T));
    bytes = left <= 0 ? 0 : left < kVectorBytes ? int(left) : kVectorBytes;
    source = copy + (bytes ? token0 + offset : 0);
  }

  SPARSEKIT_DEVICE void load(T* tile, int64_t first, int count) const {
    for (int i = row; i < count; i += kThreads / kPerRow)
      cp_async_16(tile + i * kTokens + offset, source + (first + i) * stride, bytes);
  }
};

// ---- products: y [tokens, rows] = x Wᵀ ----

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

// ---- sampled product: dW [nnz] = dyᵀ x at the survivors ----

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

// ---- launchers ----

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
