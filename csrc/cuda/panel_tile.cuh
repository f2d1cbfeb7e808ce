// The shared-memory side of a panel product: tiles of source rows, how lanes find fragments in them, how they multiply.
#pragma once

#include "panel_shape.cuh"

namespace sparsekit::cuda::panel {
namespace {

// A tile [rows][kTokens] whose 16-byte pieces are permuted within each row, so that the pieces that one instruction
// reads from eight rows of different remainder by 8 (4-byte elements, 64 tokens: from four rows by 4) lie in different
// banks.
template <class T, int kTokens>
struct TileLayout {
  static constexpr int kVector = 16 / int(sizeof(T));
  static constexpr int kPieces = kTokens / kVector;
  static constexpr int kRowBytes = kTokens * int(sizeof(T));
  static_assert(kRowBytes == 64 || kRowBytes == 128 || kRowBytes == 256, "the permutations below are for these rows");

  // A row's slot: piece p of the row is piece slot ^ p of the tile.
  SPARSEKIT_DEVICE static int slot(int row) {
    const int key = kRowBytes == 64 ? row >> 1 & 3 : kRowBytes == 128 ? row & 7 : (row & 3) * 2;
    return row * kPieces + key;
  }
  SPARSEKIT_DEVICE static int offset(int row, int piece) { return (slot(row) ^ piece) * kVector; }
};

// Copies rows of the source into a tile. A thread keeps its place in the row.
template <class T, int kTokens>
class TileLoader {
 public:
  using Layout = TileLayout<T, kTokens>;

  SPARSEKIT_DEVICE TileLoader(const T* source, int64_t plane) : source_(source), plane_(plane) {}

  // Turns to the tokens whose first octet is `octet`.
  SPARSEKIT_DEVICE void turn(const Tokens& tokens, int64_t octet) {
    const int piece = int(threadIdx.x) % Layout::kPieces;
    const int64_t own = octet + piece * Layout::kVector / 8;
    bytes_ = own < tokens.all() ? 16 : 0;
    column_ = source_ + (bytes_ ? tokens.at(own) * 8 + piece * Layout::kVector % 8 : 0);
  }
  // Rows 0 .. count - 1 of the tile; every 1 << shift of them start at an octet of starts[].
  SPARSEKIT_DEVICE void load(T* tile, const int32_t* starts, int count, int shift) const {
    const int piece = int(threadIdx.x) % Layout::kPieces, step = int(blockDim.x) / Layout::kPieces;
#pragma unroll 4
    for (int row = int(threadIdx.x) / Layout::kPieces; row < count; row += step) {
      const int64_t octet = ldg(starts + (row >> shift)) + (row & ((1 << shift) - 1)) * plane_;
      cp_async_16(tile + Layout::offset(row, piece), column_ + (bytes_ ? octet * 8 : 0), bytes_);
    }
  }
  // Rows 0 .. count - 1 of the tile are neighbours in the source, the first at octet `start`.
  SPARSEKIT_DEVICE void load_block(T* tile, int64_t start, int count) const {
    const int piece = int(threadIdx.x) % Layout::kPieces, step = int(blockDim.x) / Layout::kPieces;
#pragma unroll 4
    for (int row = int(threadIdx.x) / Layout::kPieces; row < count; row += step)
      cp_async_16(tile + Layout::offset(row, piece), column_ + (bytes_ ? (start + row * plane_) * 8 : 0), bytes_);
  }

 private:
  const T* source_;
  const T* column_ = nullptr;
  int64_t plane_;
  int bytes_ = 0;
};

template <class T, int kTokens>
SPARSEKIT_DEVICE void clear_rows(T* tile, int first) {
  for (int i = int(threadIdx.x); i < kTokens * kZeroRows; i += int(blockDim.x))
    tile[first * kTokens + i] = from_float<T>(0.0f);
}

// Waits for all but the last stages - 2 groups of copies.
SPARSEKIT_DEVICE void wait_for_stage(int stages) {
  if (stages == 2) cp_async_wait<0>();
  else if (stages == 3) cp_async_wait<1>();
  else cp_async_wait<2>();
}

// d [16, 8] += a b; depth 16 for 2-byte elements, 8 for tf32.
template <class T>
SPARSEKIT_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
SPARSEKIT_DEVICE void multiply<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16_bf16(d, a, b);
}
template <>
SPARSEKIT_DEVICE void multiply<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16_f16(d, a, b);
}
template <>
SPARSEKIT_DEVICE void multiply<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k8_tf32(d, a, b);
}

}  // namespace
}  // namespace sparsekit::cuda::panel
