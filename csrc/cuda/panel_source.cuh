// What surrounds a panel product: the feature-major copy of its source before it, the sum of its shares after it.
#pragma once


#include "activation.cuh"
#include "panel_shape.cuh"

namespace sparsekit::cuda::panel {
namespace {

// ---- copy ----

template <class T>
constexpr int kVector = 16 / int(sizeof(T));  // elements of a 16-byte piece

SPARSEKIT_DEVICE uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Feature `i` of 8 tokens, of which v[t] holds kVector<T> features: in two or four registers for 2-byte elements, the
// lower token in the lower half, or in eight rounded to tf32.
SPARSEKIT_DEVICE void store_feature(const uint4 (&v)[8], int i, uint16_t* row) {
  uint32_t pair[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int shift = 16 * (i % 2);
    pair[p] = (word(v[2 * p], i / 2) >> shift & 0xffffu) | (word(v[2 * p + 1], i / 2) >> shift) << 16;
  }
  *reinterpret_cast<uint4*>(row) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}
SPARSEKIT_DEVICE void store_feature(const uint4 (&v)[8], int i, float* row) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t r[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) r[t] = to_tf32(__uint_as_float(word(v[4 * h + t], i)));
    reinterpret_cast<uint4*>(row)[h] = make_uint4(r[0], r[1], r[2], r[3]);
  }
}

SPARSEKIT_DEVICE uint32_t bits_of(uint16_t v) { return v; }
SPARSEKIT_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }

// The kVector<T> features of slots slot, slot + 1, ... at one pixel, one by one; 0 where there is none.
template <class T>
SPARSEKIT_DEVICE uint4 load_singly(const T* pixel, int slot, const Source& s) {
  uint32_t r[4] = {};
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    const int group = (slot + i) / s.padded, within = (slot + i) % s.padded;
    const bool real = group < s.groups && within < s.channels;
    const uint32_t bits = real ? bits_of(ldg(pixel + int64_t{group} * s.channels + within)) : 0u;
    r[i * int(sizeof(T)) / 4] |= bits << (i * int(sizeof(T)) % 4 * 8);
  }
  return make_uint4(r[0], r[1], r[2], r[3]);
}

constexpr int kCopyThreads = 256;
constexpr int kCopyPieces = 8;                            // neighbouring pieces of features: a warp reads whole lines
constexpr int kCopyOctets = kCopyThreads / kCopyPieces;   // and writes runs of four octets

// Each thread turns a square of 8 tokens by kVector<T> features around in registers. T: float, or the bits of a half.
template <class T>
__global__ void __launch_bounds__(kCopyThreads) copy_kernel(const T* image, T* rows, Source s, bool in_pieces) {
  const int64_t octet = int64_t{blockIdx.x} * kCopyOctets + threadIdx.x / kCopyPieces, plane = s.plane();
  const int slots = s.groups * s.padded;
  const int slot = int(blockIdx.y * kCopyPieces + threadIdx.x % kCopyPieces) * kVector<T>;
  if (octet >= plane || slot >= slots) return;
  const int copy = int(blockIdx.z);
  const int64_t line = octet / s.octets;
  const int first = int(octet % s.octets) * 8, source_line = s.vertical.at(int(line % s.lines), 0);
  const int64_t features = int64_t{s.groups} * s.channels;
  const int64_t image_row = line / s.lines * s.vertical.extent + max(source_line, 0);
  const T* image_line = image + image_row * s.horizontal.extent * features;

  uint4 v[8];
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const int column = source_line < 0 ? -1 : s.horizontal.at(first + t, copy);
    v[t] = make_uint4(0, 0, 0, 0);
    if (column >= 0) {
      const T* pixel = image_line + column * features;
      v[t] = in_pieces ? ldg(reinterpret_cast<const uint4*>(pixel + slot)) : load_singly(pixel, slot, s);
    }
  }
  T* row = rows + ((int64_t{copy} * slots + slot) * plane + octet) * 8;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    if (slot + i < slots) store_feature(v, i, row + i * plane * 8);
}

template <class T>
cudaError_t queue_copy(const void* image, void* rows, const Source& s, void* stream) {
  const int64_t blocks = ceil_div(s.plane(), kCopyOctets);
  const int64_t across = ceil_div(int64_t{s.groups} * s.padded, kCopyPieces * kVector<T>);
  if (blocks > INT32_MAX || across > 65535 || s.copies > 65535) return cudaErrorInvalidConfiguration;
  const bool aligned = reinterpret_cast<uintptr_t>(image) % 16 == 0;
  const bool in_pieces = aligned && s.padded == s.channels && s.groups * s.channels % kVector<T> == 0;
  return launch(copy_kernel<T>, dim3(unsigned(blocks), unsigned(across), unsigned(s.copies)), kCopyThreads, 0, stream,
                static_cast<const T*>(image), static_cast<T*>(rows), s, in_pieces);
}

// ---- bias, activation, sum of shares ----

// result[i] = activation(shares[0][i] + shares[1][i] + ... + bias[i % columns]).
template <class T>
__global__ void __launch_bounds__(256) sum_kernel(const float* shares, int count, int64_t elements, const T* bias,
                                                  int columns, int activation, T* result) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= elements) return;
  float sum = 0.0f;
  for (int s = 0; s < count; ++s) sum += ldg_stream(shares + s * elements + i);
  if (bias) sum += to_float(bias[i % columns]);
  result[i] = from_float<T>(activate(sum, activation));
}

template <class T>
cudaError_t queue_sum(const float* shares, int count, int64_t elements, const T* bias, int columns, int activation,
                      T* result, void* stream) {
  const int64_t blocks = ceil_div(elements, 256);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(sum_kernel<T>, unsigned(blocks), 256, 0, stream, shares, count, elements, bias, columns, activation,
                result);
}

}  // namespace
}  // namespace sparsekit::cuda::panel
