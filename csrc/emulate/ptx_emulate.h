// The names of cuda/ptx.cuh on the CPU, with the meanings the PTX ISA documents. Included by ptx.cuh only.
//
// What touches a kernel's memory is done here, in code that the sanitizers instrument; what lanes exchange is done in
// emu.cpp, which they do not see.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "emu.h"

inline void __syncthreads(emu::At at = emu::At::current()) { emu::barrier(0, 0, at); }
inline void __syncwarp(emu::At at = emu::At::current()) { emu::sync_warp(at); }

namespace sparsekit::cuda {

using ::bf16;
using ::f16;
using emu::At;

// ---- shared memory ----

constexpr int kMaxStages = 8;

template <class T>
class SharedRing {
 public:
  T* operator[](int stage) const {
    if (stage < 0 || stage >= count_) emu::fail(at_, "stage %d of a ring of %d stages", stage, count_);
    return stages_[stage];
  }

 private:
  friend class SharedArena;
  T* stages_[kMaxStages];
  int count_ = 0;
  At at_;
};

class SharedArena {
 public:
  template <class T>
  T* take(int count, At at = At::current()) {
    return static_cast<T*>(emu::take(size_t(count) * sizeof(T), arena_bytes<T>(count), at));
  }
  template <class T>
  SharedRing<T> take_ring(int stages, int count, At at = At::current()) {
    if (stages > kMaxStages) emu::fail(at, "a ring of %d stages, at most %d are emulated", stages, kMaxStages);
    SharedRing<T> ring;
    ring.at_ = at;
    while (ring.count_ < stages) ring.stages_[ring.count_++] = take<T>(count, at);
    return ring;
  }
};

// ---- half types ----

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return emu::from_bf16(v.bits); }
inline float to_float(f16 v) { return emu::from_f16(v.bits); }

template <class T>
T from_float(float v) {
  if constexpr (std::is_same_v<T, bf16>) return bf16{emu::to_bf16(v)};
  else if constexpr (std::is_same_v<T, f16>) return f16{emu::to_f16(v)};
  else return T(v);
}

inline uint32_t pack2(bf16 low, bf16 high) { return uint32_t{low.bits} | uint32_t{high.bits} << 16; }
inline uint32_t pack2(f16 low, f16 high) { return uint32_t{low.bits} | uint32_t{high.bits} << 16; }
template <class T>
uint32_t pack2_floats(float low, float high) { return pack2(from_float<T>(low), from_float<T>(high)); }

inline uint32_t to_tf32(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

// ---- fragments from shared memory ----

template <int Count>
void emulate_ldmatrix(bool transposed, uint32_t (&r)[Count], const void* row, At at) {
  uint32_t words[4] = {};
  if (int(threadIdx.x) % kWarp < 8 * Count) {
    emu::check_shared(row, 16, "ldmatrix", at);
    for (int i = 0; i < 4; ++i) words[i] = static_cast<const uint32_t*>(row)[i];
  }
  emu::ldmatrix(Count, transposed, words, r, at);
}
inline void ldmatrix_x1(uint32_t (&r)[1], const void* p, At at = At::current()) { emulate_ldmatrix(false, r, p, at); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* p, At at = At::current()) { emulate_ldmatrix(false, r, p, at); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* p, At at = At::current()) { emulate_ldmatrix(false, r, p, at); }
inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* p, At at = At::current()) {
  emulate_ldmatrix(true, r, p, at);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* p, At at = At::current()) {
  emulate_ldmatrix(true, r, p, at);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p, At at = At::current()) {
  emulate_ldmatrix(true, r, p, at);
}

// ---- tensor cores ----

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], At at = At::current()) {
  emu::mma(emu::Mma::kBf16, d, a, b, 0, 0, at);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], At at = At::current()) {
  emu::mma(emu::Mma::kF16, d, a, b, 0, 0, at);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], At at = At::current()) {
  emu::mma(emu::Mma::kTf32, d, a, b, 0, 0, at);
}
template <int Selector>
void mma_sp_m16n8k32_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta,
                          At at = At::current()) {
  static_assert(Selector == 0 || Selector == 1, "the metadata come from lanes 0, 1 or 2, 3 of each quad");
  emu::mma(emu::Mma::kSparseBf16, d, a, b, meta, Selector, at);
}
template <int Selector>
void mma_sp_m16n8k32_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta,
                         At at = At::current()) {
  static_assert(Selector == 0 || Selector == 1, "the metadata come from lanes 0, 1 or 2, 3 of each quad");
  emu::mma(emu::Mma::kSparseF16, d, a, b, meta, Selector, at);
}

// ---- asynchronous copies ----
// Volatile word stores: ThreadSanitizer sees the destination written at the issue and again at the wait.

inline void emulate_store(void* destination, const uint32_t* words, int bytes) {
  for (int i = 0; i < bytes / 4; ++i) static_cast<volatile uint32_t*>(destination)[i] = words[i];
}

inline void emulate_copy(void* shared, const void* global, int size, int bytes, At at) {
  if (bytes < 0 || bytes > size) emu::fail(at, "cp_async_%d of %d bytes", size, bytes);
  if (reinterpret_cast<uintptr_t>(global) % size)
    emu::fail(at, "cp_async_%d from an address that is no multiple of %d", size, size);
  emu::check_shared(shared, size, "cp_async", at);
  emu::Copy copy{shared, {}, size};
  for (int i = 0; i < bytes; ++i) reinterpret_cast<char*>(copy.data)[i] = static_cast<const char*>(global)[i];
  const uint32_t in_flight[4] = {~0u, ~0u, ~0u, ~0u};
  emulate_store(shared, in_flight, size);
  emu::copy_issue(copy, at);
}
inline void cp_async_16(void* s, const void* g, int bytes = 16, At at = At::current()) {
  emulate_copy(s, g, 16, bytes, at);
}
inline void cp_async_8(void* s, const void* g, int bytes = 8, At at = At::current()) {
  emulate_copy(s, g, 8, bytes, at);
}
inline void cp_async_4(void* s, const void* g, int bytes = 4, At at = At::current()) {
  emulate_copy(s, g, 4, bytes, at);
}
inline void cp_async_commit() { emu::copy_commit(); }
template <int N>
void cp_async_wait() {
  emu::Copy copy;
  while (emu::copy_land(N, &copy)) emulate_store(copy.destination, copy.data, copy.bytes);
}

// ---- warp operations ----

template <class T>
T emulate_shuffle(emu::Shuffle kind, T value, int argument, At at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emu::shuffle(kind, bits, argument, at);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T shuffle(T value, int source_lane, At at = At::current()) {
  return emulate_shuffle(emu::Shuffle::kIndex, value, source_lane, at);
}
template <class T>
T shuffle_xor(T value, int lane_mask, At at = At::current()) {
  return emulate_shuffle(emu::Shuffle::kXor, value, lane_mask, at);
}
template <class T>
T shuffle_up(T value, int distance, At at = At::current()) {
  return emulate_shuffle(emu::Shuffle::kUp, value, distance, at);
}
template <class T>
T shuffle_down(T value, int distance, At at = At::current()) {
  return emulate_shuffle(emu::Shuffle::kDown, value, distance, at);
}
inline unsigned ballot(bool predicate, At at = At::current()) { return emu::ballot(predicate, at); }
inline bool any(bool predicate, At at = At::current()) { return emu::ballot(predicate, at) != 0; }
inline bool all(bool predicate, At at = At::current()) { return emu::ballot(predicate, at) == ~0u; }

inline void barrier_sync(int id, int threads, At at = At::current()) { emu::barrier(id, threads, at); }

// ---- memory ----

template <class T>
T atomic_add(T* p, T value) {
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
  } else {
    T before, after;
    __atomic_load(p, &before, __ATOMIC_RELAXED);
    do after = before + value;
    while (!__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
  }
}
template <class T>
T atomic_max(T* p, T value) {
  T before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (before < value && !__atomic_compare_exchange_n(p, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}
inline unsigned atomic_or(unsigned* p, unsigned value) { return __atomic_fetch_or(p, value, __ATOMIC_RELAXED); }
inline void threadfence() {}  // integer atomic_add orders memory here, which stands in for fence + atomic

template <class T>
void check_aligned(const T* p, At at) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T))
    emu::fail(at, "an access of %zu bytes at an address that is no multiple of it", sizeof(T));
}
template <class T>
T ldg(const T* p, At at = At::current()) {
  check_aligned(p, at);
  return *p;
}
template <class T>
T ldg_stream(const T* p, At at = At::current()) {
  check_aligned(p, at);
  return *p;
}
template <class T>
void stg_stream(T* p, T value, At at = At::current()) {
  check_aligned(p, at);
  *p = value;
}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector, At at = At::current()) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> 4 * i & 0xf;
    if (from > 7) emu::fail(at, "permute_bytes: a selector above 7 copies a sign, which no kernel here means");
    result |= uint32_t(bytes >> 8 * from & 0xff) << 8 * i;
  }
  return result;
}

// ---- host ----

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                   Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  return emu::launch(grid, block, shared_bytes, [&] { std::apply(kernel, copies); });
}

inline int multiprocessors() { return emu::device.multiprocessors; }
inline int max_shared_bytes() { return emu::device.shared_bytes; }

}  // namespace sparsekit::cuda
