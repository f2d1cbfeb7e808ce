// What host code may know of the CUDA kernels: a C ABI of raw pointers and sizes. No CUDA and no torch header.
//
// Every launcher is `extern "C" int sparsekit_cuda_<verb>(pointers, sizes, dtype, void* stream)`. It returns 0 when
// the kernels were queued on the stream, else CUDA's error code; sparsekit_cuda_error() then names kernel, shape and
// reason. Launchers never allocate, never synchronise and never look at the contents of a tensor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsekit::cuda {

enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

inline const char* dtype_name(int dtype) {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16"};
  return dtype >= 0 && dtype < 4 ? names[dtype] : "unknown";
}

// For launchers (launch.cu): turns a CUDA error into "kernel on shape: CUDA's text" and hands the code through.
__attribute__((format(printf, 3, 4))) int report(int error, const char* kernel, const char* shape, ...);

// For launchers: refuses arguments with "kernel: Expected ..., got ..."; nothing was queued.
__attribute__((format(printf, 2, 3))) int reject(const char* kernel, const char* sentence, ...);

}  // namespace sparsekit::cuda

// The sentence about the calling thread's last launcher that did not return 0.
extern "C" const char* sparsekit_cuda_error();
