// Launchers of csr_linear.cu; see launch.h for what every launcher keeps to.
#pragma once

#include <cstdint>

// W [rows, features] is compressed by rows: crow [rows + 1] and ascending columns [nnz], int32; values [nnz]. With the
// transposed index (t_crow, t_row) and its permutation the same functions multiply by Wᵀ. Matrices are row-major, their
// strides count elements; dtype is float32 or float64 (enum Dtype) for all of them. Work space may be uninitialised and
// is free again when the queued work is done. Results are deterministic on one kind of device.
extern "C" {

// y [tokens, rows] = x [tokens, features] Wᵀ + bias. perm (or null): value i of the list is values[perm[i]]. bias
// [rows] or null.
int sparsekit_cuda_csr_linear(const void* x, int64_t x_stride, const void* values, const int32_t* perm,
                              const int32_t* crow, const int32_t* columns, const void* bias, void* y, int64_t y_stride,
                              int64_t tokens, int64_t features, int64_t rows, int64_t nnz, int dtype, void* workspace,
                              void* stream);

// Bytes of work space for it, 16-byte aligned.
int64_t sparsekit_cuda_csr_linear_workspace(int64_t tokens, int64_t features, int64_t rows, int64_t nnz, int dtype);

// dvalues [nnz] = (dyᵀ x) at the survivors, dy [tokens, rows], x [tokens, features].
int sparsekit_cuda_csr_sddmm(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const int32_t* crow,
                             const int32_t* columns, void* dvalues, int64_t tokens, int64_t features, int64_t rows,
                             int64_t nnz, int dtype, void* workspace, void* stream);

int64_t sparsekit_cuda_csr_sddmm_workspace(int64_t tokens, int64_t features, int64_t rows, int64_t nnz, int dtype);

}  // extern "C"
