// What the unstructured products share: 16-byte vectors, the feature-major copy of an input, and its way into shared
// memory.
#pragma once

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

}  // namespace
}  // namespace sparsekit::cuda
