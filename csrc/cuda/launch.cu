// Error texts of the launchers.
#include "launch.h"

#include <cstdarg>
#include <cstdio>

#include "ptx.cuh"

namespace sparsekit::cuda {
namespace {
constexpr int kTextBytes = 1024;
thread_local char text[kTextBytes] = "";
}  // namespace

int report(int error, const char* kernel, const char* shape, ...) {
  if (error == cudaSuccess) return 0;
  int used = std::snprintf(text, kTextBytes, "%s on ", kernel);
  va_list arguments;
  va_start(arguments, shape);
  used += std::vsnprintf(text + used, kTextBytes - used, shape, arguments);
  va_end(arguments);
  if (used < kTextBytes)
    std::snprintf(text + used, kTextBytes - used, ": %s (CUDA error %d)",
                  cudaGetErrorString(static_cast<cudaError_t>(error)), error);
  return error;
}

int reject(const char* kernel, const char* sentence, ...) {
  int used = std::snprintf(text, kTextBytes, "%s: ", kernel);
  va_list arguments;
  va_start(arguments, sentence);
  std::vsnprintf(text + used, kTextBytes - used, sentence, arguments);
  va_end(arguments);
  return cudaErrorInvalidValue;
}

}  // namespace sparsekit::cuda

extern "C" const char* sparsekit_cuda_error() { return sparsekit::cuda::text; }
