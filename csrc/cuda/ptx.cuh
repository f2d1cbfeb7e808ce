// Every PTX instruction of the project behind one named function, so that kernels run on GPUs and, in tests, on CPUs.
//
// With SPARSEKIT_EMULATE defined, the same names come from csrc/emulate/ and g++ compiles the unmodified .cu files.
//
// Rules for kernel authors (what breaks one of them compiles for the GPU but cannot be tested)
//  1. Inline PTX lives in this file only. Use the functions below; a missing instruction is added here and in
//     emulate/ptx_emulate.h, with a test against its documented layout in tests/emulator_driver.cu.
//  2. Shared memory comes from SharedArena only, taken in the same order and sizes by every thread. Each take starts
//     at a multiple of 128 bytes; arena_bytes<T>(n) is its size, for the launch. A ring of pipeline stages is
//     take_ring<T>(stages, n): its stages are bounds-checked one by one. No __shared__, no __constant__.
//  3. Launch with launch(kernel, grid, block, shared_bytes, stream, arguments...), block.x a multiple of 32, y = z = 1.
//  4. All 32 lanes take part in every warp operation (there are no mask arguments): load with clamped or zero-filled
//     addresses instead of leaving early. No thread returns before the last barrier.
//  5. At most one barrier or warp operation per source line, so that errors name the right one.
//  6. cp_async_*: read the data after cp_async_wait<N>() by the same thread, or after that and a barrier by others;
//     cp_async_wait<0>() before the kernel ends. A copy of 0 bytes reads nothing and writes zeros.
//  7. Half types are bf16 and f16: storage only. Compute in float; convert with to_float, from_float<T>, pack2<T>.
//  8. Vector types and threadIdx, blockIdx, blockDim, gridDim, __syncthreads(), __syncwarp(), #pragma unroll,
//     min, max, fmaf, __popc, __popcll, __ffs, __clz, __ffsll, __clzll work as in CUDA. Nothing waits for another
//     block (blocks run one after another, in any order), no dynamic parallelism, no cooperative groups.
//  9. 64-bit offsets (int64_t) wherever row * stride can pass 2^31 elements.
#pragma once

#include <cstdint>
#include <tuple>
#include <utility>

#if defined(SPARSEKIT_EMULATE)
#define SPARSEKIT_DEVICE inline
#define SPARSEKIT_BOTH
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SPARSEKIT_DEVICE __device__ __forceinline__  // functions of kernels
#define SPARSEKIT_BOTH __host__ __device__           // of kernels and of launchers
#endif

namespace sparsekit::cuda {

constexpr int kWarp = 32;
constexpr int kMaxSharedBytes = 232448;  // what one block can have on sm_90; sm_80 has 166912

SPARSEKIT_BOTH constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
SPARSEKIT_BOTH constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Bytes of shared memory that SharedArena::take<T>(count) uses.
template <class T>
SPARSEKIT_BOTH constexpr size_t arena_bytes(int64_t count) {
  return static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 128));
}

}  // namespace sparsekit::cuda

#if defined(SPARSEKIT_EMULATE)
#include "../emulate/ptx_emulate.h"
#else

namespace sparsekit::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

// ---- shared memory ----

// `count` stages of shared memory, one after the other.
template <class T>
class SharedRing {
 public:
  SPARSEKIT_DEVICE SharedRing(T* first, int stride) : first_(first), stride_(stride) {}
  SPARSEKIT_DEVICE T* operator[](int stage) const { return first_ + stage * stride_; }

 private:
  T* first_;
  int stride_;
};

// Hands out the dynamic shared memory of a block piece by piece.
class SharedArena {
 public:
  template <class T>
  SPARSEKIT_DEVICE T* take(int count) {
    extern __shared__ __align__(1024) unsigned char sparsekit_shared[];
    T* piece = reinterpret_cast<T*>(sparsekit_shared + used_);
    used_ += static_cast<unsigned>(arena_bytes<T>(count));
    return piece;
  }
  // Uses stages * arena_bytes<T>(count) bytes.
  template <class T>
  SPARSEKIT_DEVICE SharedRing<T> take_ring(int stages, int count) {
    const int stride = static_cast<int>(arena_bytes<T>(count) / sizeof(T));
    static_assert(128 % sizeof(T) == 0, "the elements of a ring divide 128 bytes");
    return SharedRing<T>(take<T>(stages * stride), stride);
  }

 private:
  unsigned used_ = 0;
};

SPARSEKIT_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// ---- half types ----

SPARSEKIT_DEVICE float to_float(float v) { return v; }
SPARSEKIT_DEVICE float to_float(bf16 v) { return __bfloat162float(v); }
SPARSEKIT_DEVICE float to_float(f16 v) { return __half2float(v); }

// Rounds to nearest, ties to even.
template <class T>
SPARSEKIT_DEVICE T from_float(float v);
template <>
SPARSEKIT_DEVICE float from_float<float>(float v) { return v; }
template <>
SPARSEKIT_DEVICE bf16 from_float<bf16>(float v) { return __float2bfloat16_rn(v); }
template <>
SPARSEKIT_DEVICE f16 from_float<f16>(float v) { return __float2half_rn(v); }

// Two values in one register, `low` in bits 0..15 (the element with the lower k index in mma fragments).
SPARSEKIT_DEVICE uint32_t pack2(bf16 low, bf16 high) {
  return uint32_t{__bfloat16_as_ushort(low)} | uint32_t{__bfloat16_as_ushort(high)} << 16;
}
SPARSEKIT_DEVICE uint32_t pack2(f16 low, f16 high) {
  return uint32_t{__half_as_ushort(low)} | uint32_t{__half_as_ushort(high)} << 16;
}
template <class T>
SPARSEKIT_DEVICE uint32_t pack2_floats(float low, float high) { return pack2(from_float<T>(low), from_float<T>(high)); }

// The nearest tf32 (ties away from zero) as the register that mma_m16n8k8_tf32 takes.
SPARSEKIT_DEVICE uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// ---- fragments from shared memory ----
// Lanes 8i .. 8i+7 give the addresses of the eight rows of matrix i: 16 bytes each, 16-byte aligned, in shared memory.
// Lane 4g+t receives row g, columns 2t and 2t+1 of matrix i in r[i]; transposed: rows 2t and 2t+1 of column g.

#define SPARSEKIT_LDMATRIX_1(NAME, MODE)                                                       \
  SPARSEKIT_DEVICE void NAME(uint32_t (&r)[1], const void* row) {                              \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" MODE ".shared.b16 {%0}, [%1];"               \
                 : "=r"(r[0]) : "r"(shared_address(row)) : "memory");                          \
  }
#define SPARSEKIT_LDMATRIX_2(NAME, MODE)                                                       \
  SPARSEKIT_DEVICE void NAME(uint32_t (&r)[2], const void* row) {                              \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" MODE ".shared.b16 {%0, %1}, [%2];"           \
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");              \
  }
#define SPARSEKIT_LDMATRIX_4(NAME, MODE)                                                       \
  SPARSEKIT_DEVICE void NAME(uint32_t (&r)[4], const void* row) {                              \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" MODE ".shared.b16 {%0, %1, %2, %3}, [%4];"   \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                              \
                 : "r"(shared_address(row)) : "memory");                                       \
  }
SPARSEKIT_LDMATRIX_1(ldmatrix_x1, "")
SPARSEKIT_LDMATRIX_2(ldmatrix_x2, "")
SPARSEKIT_LDMATRIX_4(ldmatrix_x4, "")
SPARSEKIT_LDMATRIX_1(ldmatrix_x1_trans, ".trans")
SPARSEKIT_LDMATRIX_2(ldmatrix_x2_trans, ".trans")
SPARSEKIT_LDMATRIX_4(ldmatrix_x4_trans, ".trans")
#undef SPARSEKIT_LDMATRIX_1
#undef SPARSEKIT_LDMATRIX_2
#undef SPARSEKIT_LDMATRIX_4

// ---- tensor cores: d += a b, float accumulators ----
// With g = lane / 4, t = lane % 4 and i the element index (two 16-bit elements a register, the lower one first):
//   m16n8k16 a[8]: row g + 8 (i/2 % 2), k 2t + i%2 + 8 (i/4)      b[4]: k 2t + i%2 + 8 (i/2), column g
//   m16n8k8  a[4]: row g + 8 (i % 2),   k t + 4 (i/2)             b[2]: k t + 4 i, column g       (tf32)
//   d[4]: row g + 8 (i/2), column 2t + i%2

#define SPARSEKIT_MMA_K16(NAME, TYPE)                                                                       \
  SPARSEKIT_DEVICE void NAME(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {               \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                                      \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                   \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                \
  }
SPARSEKIT_MMA_K16(mma_m16n8k16_bf16, "bf16")
SPARSEKIT_MMA_K16(mma_m16n8k16_f16, "f16")
#undef SPARSEKIT_MMA_K16

// Ignores the low 13 bits of every operand: round with to_tf32.
SPARSEKIT_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2:4 sparse a: the 16 kept elements of each row laid out like a of m16n8k16; b[8]: k 2t + i%2 + 8 (i/2), column g.
// Lane 4 (row%8) + 2 Selector + p gives the positions (2 bits each, ascending in a group of four) of the kept elements
// 8p .. 8p+7 of row row%8 in its low half and of row row%8 + 8 in its high half.
#define SPARSEKIT_MMA_SP(NAME, TYPE)                                                                           \
  template <int Selector>                                                                                      \
  SPARSEKIT_DEVICE void NAME(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta) {   \
    static_assert(Selector == 0 || Selector == 1, "the metadata come from lanes 0, 1 or 2, 3 of each quad");   \
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32 "                    \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"                  \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta),   \
          "n"(Selector));                                                                                      \
  }
SPARSEKIT_MMA_SP(mma_sp_m16n8k32_bf16, "bf16")
SPARSEKIT_MMA_SP(mma_sp_m16n8k32_f16, "f16")
#undef SPARSEKIT_MMA_SP

// ---- asynchronous copies, global to shared ----
// Both addresses are multiples of the size; the first `bytes` bytes are read, the rest of the destination is zero.

SPARSEKIT_DEVICE void cp_async_16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes) : "memory");
}
SPARSEKIT_DEVICE void cp_async_8(void* shared, const void* global, int bytes = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :: "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes) : "memory");
}
SPARSEKIT_DEVICE void cp_async_4(void* shared, const void* global, int bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :: "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes) : "memory");
}
// Ends this thread's current group of copies; an empty group is allowed.
SPARSEKIT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the N most recent groups of this thread are in flight.
template <int N>
SPARSEKIT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- warp operations, all 32 lanes ----

template <class T>
SPARSEKIT_DEVICE T shuffle(T value, int source_lane) { return __shfl_sync(0xffffffffu, value, source_lane); }
template <class T>
SPARSEKIT_DEVICE T shuffle_xor(T value, int lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }
template <class T>
SPARSEKIT_DEVICE T shuffle_up(T value, int distance) { return __shfl_up_sync(0xffffffffu, value, distance); }
template <class T>
SPARSEKIT_DEVICE T shuffle_down(T value, int distance) { return __shfl_down_sync(0xffffffffu, value, distance); }
SPARSEKIT_DEVICE unsigned ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
SPARSEKIT_DEVICE bool any(bool predicate) { return __any_sync(0xffffffffu, predicate); }
SPARSEKIT_DEVICE bool all(bool predicate) { return __all_sync(0xffffffffu, predicate); }

// Barrier `id` (1 .. 15) of `threads` threads (whole warps); __syncthreads() is barrier 0 of all.
SPARSEKIT_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// ---- memory ----

// Adds and returns what was there before. Float sums depend on the order of arrival.
template <class T>
SPARSEKIT_DEVICE T atomic_add(T* p, T value) { return atomicAdd(p, value); }
template <class T>
SPARSEKIT_DEVICE T atomic_max(T* p, T value) { return atomicMax(p, value); }
SPARSEKIT_DEVICE unsigned atomic_or(unsigned* p, unsigned value) { return atomicOr(p, value); }
SPARSEKIT_DEVICE void threadfence() { __threadfence(); }

// Loads through the read-only path; stream: without keeping the line. T up to 16 bytes (float4, uint4, double2, ...).
template <class T>
SPARSEKIT_DEVICE T ldg(const T* p) { return __ldg(p); }
template <class T>
SPARSEKIT_DEVICE T ldg_stream(const T* p) { return __ldcs(p); }
template <class T>
SPARSEKIT_DEVICE void stg_stream(T* p, T value) { __stcs(p, value); }

// Byte i of the result is byte `selector >> 4 i & 7` of the eight bytes high:low; the other bits of a selector are 0.
SPARSEKIT_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

// ---- host ----

// Queues a kernel; returns CUDA's error. An empty grid is nothing to do.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      (void)cudaGetLastError();  // ours to report: must not surface in the caller's next check
      return error;
    }
  }
  std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  return std::apply(
      [&](auto&... copy) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&copy))...};
        const cudaError_t error =
            cudaLaunchKernel(function, grid, block, pointers, shared_bytes, static_cast<cudaStream_t>(stream));
        if (error != cudaSuccess) (void)cudaGetLastError();
        return error;
      },
      copies);
}

// Streaming multiprocessors of the current device, 1 where it cannot be asked.
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

// Shared memory that one block can have on the current device.
inline int max_shared_bytes() {
  int device = 0, bytes = 48 * 1024;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

}  // namespace sparsekit::cuda

#endif
