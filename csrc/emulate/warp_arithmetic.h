// What a warp's collective instructions compute, with the fragment layouts that the PTX ISA documents.
//
// Lane 4g + t; element i of a fragment; two 16-bit elements share a register, the lower index in the lower half.
// Products are summed in double and rounded once: a tensor core's own order of summation is not modelled.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emu.h"

namespace emu {

struct Fragments {
  const uint32_t *a[32], *b[32];
  float* d[32];
  uint32_t metadata[32];
};

// rows[8i + r]: the eight 16-bit elements of row r of matrix i.
inline void warp_ldmatrix(int count, bool transposed, const uint16_t* const* rows, uint32_t* const* out) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < count; ++i) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t* const* matrix = rows + 8 * i;
      const uint16_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint16_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      out[lane][i] = uint32_t{low} | uint32_t{high} << 16;
    }
}

inline double element(Mma kind, const uint32_t* fragment, int i) {
  if (kind == Mma::kTf32) return std::bit_cast<float>(fragment[i] & ~0x1fffu);
  const auto bits = uint16_t(fragment[i / 2] >> (16 * (i % 2)));
  return kind == Mma::kBf16 || kind == Mma::kSparseBf16 ? from_bf16(bits) : from_f16(bits);
}

// d [16, 8] += a [16, K] b [K, 8].
inline void warp_mma(Mma kind, const Fragments& f, int selector) {
  const bool sparse = kind == Mma::kSparseBf16 || kind == Mma::kSparseF16;
  const int depth = kind == Mma::kTf32 ? 8 : sparse ? 32 : 16;
  double a[16][32] = {}, b[32][8];
  bool multiplied[16][32] = {};  // a pruned position meets no element of b, not even an infinite one
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    if (kind == Mma::kTf32) {
      for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i % 2), k = t + 4 * (i / 2);
        a[row][k] = element(kind, f.a[lane], i);
        multiplied[row][k] = true;
      }
      for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = element(kind, f.b[lane], i);
      continue;
    }
    for (int i = 0; i < 8; ++i) {
      const int row = g + 8 * (i / 2 % 2);
      int k = 2 * t + i % 2 + 8 * (i / 4);  // among the kept elements when a is sparse
      if (sparse) {
        const int kept = k;
        const uint32_t word = f.metadata[4 * (row % 8) + 2 * selector + kept / 8];
        k = 4 * (kept / 2) + int(word >> (16 * (row / 8) + 2 * (kept % 8)) & 3u);
      }
      a[row][k] += element(kind, f.a[lane], i);
      multiplied[row][k] = true;
    }
    for (int i = 0; i < depth / 4; ++i) b[2 * t + i % 2 + 8 * (i / 2)][g] = element(kind, f.b[lane], i);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = f.d[lane][i];
      for (int k = 0; k < depth; ++k)
        if (multiplied[row][k]) sum += a[row][k] * b[k][column];
      f.d[lane][i] = float(sum);
    }
}

}  // namespace emu
