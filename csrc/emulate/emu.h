// Runs the threads of a CUDA block as fibers of one OS thread: see emu.cpp. Kernels see it through ptx_emulate.h only.
//
// Every call that can wait or fail takes the source location of the kernel line, so that errors name it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

#include "cuda_language.h"

namespace emu {

using At = std::source_location;

struct Device {
  int multiprocessors = 3, shared_bytes = 232448;
};
extern Device device;

// Runs body once per thread of every block. Failures are reported as cudaErrorLaunchFailure; cudaGetErrorString has
// the sentence.
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(At at, const char* sentence, ...);

// ---- barriers: these order memory ----
void barrier(int id, int threads, At at);  // threads 0: all of the block
void sync_warp(At at);

// ---- warp operations: all lanes meet, none of them orders memory ----
enum class Shuffle { kIndex, kXor, kUp, kDown };
uint64_t shuffle(Shuffle kind, uint64_t value, int lane_or_distance, At at);
unsigned ballot(bool predicate, At at);
void ldmatrix(int count, bool transposed, const uint32_t* row, uint32_t* r, At at);
enum class Mma { kBf16, kF16, kTf32, kSparseBf16, kSparseF16 };
void mma(Mma kind, float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector, At at);

// ---- shared memory ----
// The next piece of the block's shared memory: a heap block of exactly `bytes` bytes, 0xFF when the block starts.
// It counts `charge` bytes against the launch.
void* take(size_t bytes, size_t charge, At at);
// Fails unless [p, p + bytes) lies in one piece and p is a multiple of bytes.
void check_shared(const void* p, size_t bytes, const char* what, At at);

// ---- asynchronous copies: the landing itself is done by instrumented code in ptx_emulate.h ----
struct Copy {
  void* destination;
  uint32_t data[4];
  int bytes;
};
void copy_issue(const Copy& copy, At at);
void copy_commit();
// Takes the next copy that must have landed once only `pending` groups are in flight; false when there is none.
bool copy_land(int pending, Copy* copy);

}  // namespace emu

// Chooses the order in which blocks, warps and lanes run: 0 ascending, 1 descending, others random warp priorities.
extern "C" void sparsekit_emulate_seed(uint64_t seed);
// What multiprocessors() and max_shared_bytes() answer; launches above the latter fail.
extern "C" void sparsekit_emulate_device(int multiprocessors, int shared_bytes);
