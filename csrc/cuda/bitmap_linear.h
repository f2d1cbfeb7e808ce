// Launchers of bitmap_linear.cu; see launch.h for what every launcher keeps to.
#pragma once

#include <cstdint>

// W [rows, features] is cut into tiles of 8 x 8. bitmap [tile rows, tile columns]: bit 8 r + c is set where row r,
// column c of the tile survives, never outside W. values [nnz]: the survivors tile row by tile row, tile by tile, row
// by row of a tile; 16-byte aligned. offsets [tile rows * runs + 1]: where each run of 16 tiles starts in values, with
// runs = ceil(tile columns / 16) in a tile row. x, values, bias and y are float16, bfloat16 or float32 (enum Dtype).
extern "C" {

// y [tokens, rows] = activation(x [tokens, features] Wᵀ + bias), y contiguous, x with rows x_stride elements apart,
// bias [rows] or null; activation 0 none, 1 relu, 2 gelu (erf), 3 silu. Sums in float32. The result is deterministic on
// one kind of device. Pruned weights may be multiplied as zeros: an Inf or NaN in x can make any output of its token
// NaN, as in a dense product. Work space may be uninitialised and is free again when the queued work is done.
int sparsekit_cuda_bitmap_linear(const void* x, int64_t x_stride, const void* values, const int64_t* bitmap,
                                 const int32_t* offsets, const void* bias, void* y, int64_t tokens, int64_t features,
                                 int64_t rows, int64_t nnz, int activation, int dtype, void* workspace, void* stream);

// Bytes of work space for it, 16-byte aligned. The address and the stride of x decide whether its rows are copied.
int64_t sparsekit_cuda_bitmap_linear_workspace(const void* x, int64_t x_stride, int64_t tokens, int64_t features,
                                               int64_t rows, int64_t nnz, int dtype);

}  // extern "C"
