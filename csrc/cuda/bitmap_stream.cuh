// How a bitmap weight reaches the threads that multiply with it: a pipeline of cp.async stages through shared memory.
//
// A block owns kBlockRows outputs and walks over a range of runs (128 columns); each of its warps owns kWarpRows
// outputs, four tile rows. A stage holds, for one run, the packed values and the bitmaps of those tile rows and the
// piece of x that they multiply; there are two stages or three. Packed values have no fixed size: a stage has room for
// `capacity` of them in each run, and when a run of a warp has more, the warp fetches its values again, four tiles at a
// time, when it needs them.
#pragma once

#include "ptx.cuh"

namespace sparsekit::cuda::bitmap {

constexpr int kSide = 8, kRunTiles = 16, kRunColumns = kSide * kRunTiles;
constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kWarpRuns = 4, kWarpRows = kWarpRuns * kSide, kBlockRows = kWarps * kWarpRows;
constexpr int kScratch = 8 * kWarpRows;  // floats of a warp
constexpr int kWarpTiles = kWarpRuns * kRunTiles;
constexpr int kStepTiles = 4;                             // neighbouring tiles that are multiplied at a time
constexpr int kSmallestRun = kStepTiles * kSide * kSide;  // capacity for them
static_assert(kWarpTiles == 2 * kWarp, "a lane counts the survivors of two tiles");
static_assert(kWarpRuns * 2 * kStepTiles == kWarp, "a lane moves one half tile");

template <class T>
constexpr int kVector = 16 / int(sizeof(T));  // elements of one copy

// Elements from one token of x to the next in shared memory: two tokens lie in different halves of the banks.
template <class T>
constexpr int kTokenStride = kRunColumns + 64 / int(sizeof(T));

// A run always fits in this many values: all its weights, and what its first copy brings along from the run before.
template <class T>
constexpr int kLargestRun = kSide * kRunColumns + kVector<T>;

template <class T>
struct Arguments {
  const T* x;  // 16-byte aligned, so is its stride
  int64_t x_stride;
  const T* values;
  const uint64_t* bitmap;
  const int32_t* offsets;
  const T* bias;
  T* y;
  float* parts;  // [splits, tokens, rows], used where splits > 1
  int64_t tokens, features, rows, nnz;
  int tile_rows, tile_columns, runs, runs_per_split, splits, row_blocks, stages, capacity, activation;
};

// Which part of the product a block computes.
struct Place {
  int row_block, split;
  int64_t first_token;

  template <class T>
  SPARSEKIT_DEVICE Place(const Arguments<T>& a, int tokens) {
    const unsigned rest = blockIdx.x / unsigned(a.row_blocks);
    row_block = int(blockIdx.x % unsigned(a.row_blocks));
    split = int(rest % unsigned(a.splits));
    first_token = int64_t{rest / unsigned(a.splits)} * tokens;
  }
};

// Elements of all runs of a stage: every run has a vector in front of it, and the last one has one behind it, for reads
// next to a survivor.
template <class T>
SPARSEKIT_BOTH constexpr int values_elements(int capacity) {
  return kWarps * kWarpRuns * (capacity + kVector<T>) + kVector<T>;
}

// Shared memory of a Stream.
template <class T>
size_t stream_bytes(int tokens, int stages, int capacity) {
  const size_t stage = arena_bytes<T>(values_elements<T>(capacity)) + arena_bytes<uint64_t>(kWarps * kWarpTiles) +
                       arena_bytes<int>(kWarps * kWarpRuns * 2) + arena_bytes<T>(tokens * kTokenStride<T>);
  return stages * stage + arena_bytes<uint2>(kWarps * kWarpTiles * 2) + arena_bytes<float>(kWarps * kScratch);
}

template <class T, int Tokens>
class Stream {
 public:
  SPARSEKIT_DEVICE Stream(const Arguments<T>& arguments, const Place& place)
      : a_(arguments),
        first_token_(place.first_token),
        lane_(int(threadIdx.x) % kWarp),
        warp_(int(threadIdx.x) / kWarp),
        first_tile_row_(place.row_block * (kWarps * kWarpRuns) + warp_ * kWarpRuns),
        run_(place.split * a_.runs_per_split),
        end_(min(a_.runs, run_ + a_.runs_per_split)),
        values_(arena_.take_ring<T>(a_.stages, values_elements<T>(a_.capacity))),
        bitmaps_(arena_.take_ring<uint64_t>(a_.stages, kWarps * kWarpTiles)),
        bounds_(arena_.take_ring<int>(a_.stages, kWarps * kWarpRuns * 2)),
        x_(arena_.take_ring<T>(a_.stages, Tokens * kTokenStride<T>)),
        halves_(arena_.take<uint2>(kWarps * kWarpTiles * 2) + warp_ * (kWarpTiles * 2)),
        scratch_(arena_.take<float>(kWarps * kScratch) + warp_ * kScratch) {}

  // Shared memory of this warp alone, for whatever comes after feed().
  SPARSEKIT_DEVICE float* scratch() const { return scratch_; }

  // product(values, halves, x) for every kStepTiles tiles of each tile row of the warp. halves[2 (kRunTiles r + tile) +
  // h]: the bits of rows 4h .. 4h+3 of a tile in tile row r, and how many bytes after `values` the element in front of
  // the first of them is; elements next to a survivor can be read, whatever they hold. x: the columns of the tiles for
  // each of Tokens, kTokenStride apart, zero beyond the last token and the last feature.
  template <class Product>
  SPARSEKIT_DEVICE void feed(Product& product) {
    int ahead = run_;  // the next run to copy; its bounds are in my_bound_
    look(ahead);
#pragma unroll 1
    for (int stage = 0; stage < a_.stages - 1; ++stage) copy(stage, ahead++);
    int stage = 0;
#pragma unroll 1
    for (int run = run_; run < end_; ++run) {
      if (a_.stages == 3) cp_async_wait<1>();
      else cp_async_wait<0>();
      __syncthreads();  // this stage is there for all threads, and all are done with the stage before
      copy(stage == 0 ? a_.stages - 1 : stage - 1, ahead++);
      multiply(stage, product);
      stage = stage == a_.stages - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
  }

 private:
  // Where the copy of run r of this warp begins in values_[stage].
  SPARSEKIT_DEVICE int first_value(int r) const {
    return (warp_ * kWarpRuns + r) * (a_.capacity + kVector<T>) + kVector<T>;
  }
  // The place in front of the run itself, which starts at `start` of all values.
  SPARSEKIT_DEVICE int bytes_before(int r, int start) const {
    return (first_value(r) + start % kVector<T> - 1) * int(sizeof(T));
  }

  // Reads ahead where a run starts and ends: lanes 2r and 2r + 1 for tile row r.
  SPARSEKIT_DEVICE void look(int run) {
    const int tile_row = first_tile_row_ + lane_ / 2;
    const bool exists = lane_ < 2 * kWarpRuns && tile_row < a_.tile_rows && run < end_;
    my_bound_ = exists ? ldg(a_.offsets + int64_t{tile_row} * a_.runs + run + lane_ % 2) : 0;
  }

  SPARSEKIT_DEVICE void copy(int stage, int run) {
    if (run < end_) {
      copy_values(stage);
      copy_bitmaps(stage, run);
      copy_x(stage, run);
      look(run + 1);
    }
    cp_async_commit();
  }

  SPARSEKIT_DEVICE void copy_values(int stage) {
    if (lane_ < 2 * kWarpRuns) bounds_[stage][warp_ * (2 * kWarpRuns) + lane_] = my_bound_;
#pragma unroll
    for (int r = 0; r < kWarpRuns; ++r) {
      const int start = shuffle(my_bound_, 2 * r);
      const int end = shuffle(my_bound_, 2 * r + 1);
      const int first = start - start % kVector<T>, count = start < end ? end - first : 0;
      if (count > a_.capacity) continue;
      T* to = values_[stage] + first_value(r);
      const T* from = a_.values + first;
      const int64_t left = a_.nnz - first;
#pragma unroll 1
      for (int i = lane_ * kVector<T>; i < count; i += kWarp * kVector<T>) {
        const int there = left - i < kVector<T> ? int(left - i) : kVector<T>;
        cp_async_16(to + i, from + i, there * int(sizeof(T)));
      }
    }
  }

  SPARSEKIT_DEVICE void copy_bitmaps(int stage, int run) {
#pragma unroll
    for (int i = 0; i < kWarpTiles; i += kWarp) {
      const int tile_row = first_tile_row_ + (i + lane_) / kRunTiles;
      const int column = run * kRunTiles + lane_ % kRunTiles;
      const bool exists = tile_row < a_.tile_rows && column < a_.tile_columns;
      const uint64_t* from = exists ? a_.bitmap + int64_t{tile_row} * a_.tile_columns + column : a_.bitmap;
      cp_async_8(bitmaps_[stage] + warp_ * kWarpTiles + i + lane_, from, exists ? 8 : 0);
    }
  }

  SPARSEKIT_DEVICE void copy_x(int stage, int run) {
    constexpr int kCopies = kRunColumns / kVector<T>;  // of one token
    for (int i = int(threadIdx.x); i < Tokens * kCopies; i += kThreads) {
      const int token = i / kCopies, column = i % kCopies * kVector<T>;
      const int64_t feature = int64_t{run} * kRunColumns + column, left = a_.features - feature;
      const bool exists = first_token_ + token < a_.tokens && left > 0;
      const int there = !exists ? 0 : left < kVector<T> ? int(left) : kVector<T>;
      const T* from = exists ? a_.x + (first_token_ + token) * a_.x_stride + feature : a_.x;
      cp_async_16(x_[stage] + token * kTokenStride<T> + column, from, there * int(sizeof(T)));
    }
  }

  template <class Product>
  SPARSEKIT_DEVICE void multiply(int stage, Product& product) {
    const int* bounds = bounds_[stage] + warp_ * (2 * kWarpRuns);
    bool fits = true;
#pragma unroll
    for (int r = 0; r < kWarpRuns; ++r)
      fits = fits && bounds[2 * r + 1] - bounds[2 * r] / kVector<T> * kVector<T> <= a_.capacity;
    index_tiles(bitmaps_[stage] + warp_ * kWarpTiles, bounds);
    __syncwarp();
#pragma unroll 1
    for (int tile = 0; tile < kRunTiles; tile += kStepTiles) {
      if (!fits) fetch(stage, tile, bounds);
      product(values_[stage], halves_ + 2 * tile, x_[stage] + kSide * tile);
    }
  }

  // Brings the values of the next kStepTiles tiles of each run to the start of its place.
  SPARSEKIT_DEVICE void fetch(int stage, int tile, const int* bounds) {
    __syncwarp();  // the values of the step before have been read
    int skipped = 0;  // bytes of the run that lane_ / 8 is about
#pragma unroll
    for (int r = 0; r < kWarpRuns; ++r) {
      const int start = bounds[2 * r], before_run = bytes_before(r, start), next = tile + kStepTiles;
      const int begin = int(halves_[2 * (kRunTiles * r + tile)].y) - before_run;
      const int end = next < kRunTiles ? int(halves_[2 * (kRunTiles * r + next)].y) - before_run
                                       : (bounds[2 * r + 1] - start) * int(sizeof(T));
      const T* from = a_.values + start + begin / int(sizeof(T));
      T* to = values_[stage] + first_value(r);
#pragma unroll 1
      for (int i = lane_; i < (end - begin) / int(sizeof(T)); i += kWarp) to[i] = ldg(from + i);
      if (lane_ / 8 == r) skipped = begin + start % kVector<T> * int(sizeof(T));
    }
    __syncwarp();  // all have read where the tiles are
    halves_[2 * (kRunTiles * (lane_ / 8) + tile) + lane_ % 8].y -= unsigned(skipped);
    __syncwarp();
  }

  // Fills `halves`: lane l counts tiles 2l and 2l + 1, eight lanes share a run.
  SPARSEKIT_DEVICE void index_tiles(const uint64_t* bitmaps, const int* bounds) {
    const uint64_t one = bitmaps[2 * lane_], two = bitmaps[2 * lane_ + 1];
    const unsigned bits[4] = {unsigned(one), unsigned(one >> 32), unsigned(two), unsigned(two >> 32)};
    int count[4], total = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) total += count[i] = __popc(bits[i]);
    int upto = total;
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) {
      const int before = shuffle_up(upto, distance);
      if (lane_ % 8 >= distance) upto += before;
    }
    int at = bytes_before(lane_ / 8, bounds[lane_ / 8 * 2]) + (upto - total) * int(sizeof(T));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      halves_[4 * lane_ + i] = make_uint2(bits[i], unsigned(at));
      at += count[i] * int(sizeof(T));
    }
  }

  const Arguments<T>& a_;
  const int64_t first_token_;
  const int lane_, warp_, first_tile_row_, run_, end_;
  SharedArena arena_;
  const SharedRing<T> values_;
  const SharedRing<uint64_t> bitmaps_;
  const SharedRing<int> bounds_;
  const SharedRing<T> x_;
  uint2* const halves_;
  float* const scratch_;
  int my_bound_ = 0;
};

}  // namespace sparsekit::cuda::bitmap
