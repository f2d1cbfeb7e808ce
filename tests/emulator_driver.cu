// Kernels that test the emulator: every collective on fragments that Python lays out, and planted bugs.
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace sparsekit::cuda {
namespace {

// ---- collectives: operands come from memory lane by lane, results go back lane by lane ----

enum Operation { kBf16, kF16, kTf32, kSparseBf16, kSparseF16 };

template <int N>
SPARSEKIT_DEVICE void load(uint32_t (&r)[N], const uint32_t* from) {
  for (int i = 0; i < N; ++i) r[i] = from[threadIdx.x * N + i];
}

__global__ void mma_kernel(int operation, int selector, const uint32_t* a, const uint32_t* b, const uint32_t* metadata,
                           float* d) {
  float sum[4];
  uint32_t fa[4], fb[2], fb4[4];
  load(fa, a);
  if (operation < kSparseBf16) load(fb, b);
  else load(fb4, b);
  for (int i = 0; i < 4; ++i) sum[i] = d[threadIdx.x * 4 + i];
  const uint32_t meta = metadata ? metadata[threadIdx.x] : 0;
  if (operation == kBf16) mma_m16n8k16_bf16(sum, fa, fb);
  if (operation == kF16) mma_m16n8k16_f16(sum, fa, fb);
  if (operation == kTf32) mma_m16n8k8_tf32(sum, fa, fb);
  if (operation == kSparseBf16 && selector == 0) mma_sp_m16n8k32_bf16<0>(sum, fa, fb4, meta);
  if (operation == kSparseBf16 && selector == 1) mma_sp_m16n8k32_bf16<1>(sum, fa, fb4, meta);
  if (operation == kSparseF16 && selector == 0) mma_sp_m16n8k32_f16<0>(sum, fa, fb4, meta);
  if (operation == kSparseF16 && selector == 1) mma_sp_m16n8k32_f16<1>(sum, fa, fb4, meta);
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = sum[i];
}

// rows [32, 8] of 16-bit elements are staged in shared memory in reverse order; lane l gives the address of row l.
__global__ void ldmatrix_kernel(int count, bool transposed, const uint16_t* rows, uint32_t* out) {
  SharedArena arena;
  uint16_t* staged = arena.take<uint16_t>(256);
  for (int i = 0; i < 8; ++i) staged[(31 - threadIdx.x) * 8 + i] = rows[threadIdx.x * 8 + i];
  __syncwarp();
  const uint16_t* row = staged + (31 - threadIdx.x) * 8;
  uint32_t one[1], two[2], four[4];
  if (count == 1 && !transposed) ldmatrix_x1(one, row);
  if (count == 2 && !transposed) ldmatrix_x2(two, row);
  if (count == 4 && !transposed) ldmatrix_x4(four, row);
  if (count == 1 && transposed) ldmatrix_x1_trans(one, row);
  if (count == 2 && transposed) ldmatrix_x2_trans(two, row);
  if (count == 4 && transposed) ldmatrix_x4_trans(four, row);
  for (int i = 0; i < count; ++i) out[threadIdx.x * count + i] = count == 1 ? one[0] : count == 2 ? two[i] : four[i];
}

// out [6, 32]: shuffle from (3 lane) % 32, xor 5, up 3, down 7, ballot of odd values, any and all as bits.
__global__ void shuffle_kernel(const int* values, int* out) {
  const int lane = threadIdx.x, value = values[lane];
  out[lane] = shuffle(value, 3 * lane % 32);
  out[32 + lane] = shuffle_xor(value, 5);
  out[64 + lane] = shuffle_up(value, 3);
  out[96 + lane] = int(shuffle_down(double(value), 7));
  out[128 + lane] = int(ballot(value % 2 != 0));
  const bool some = any(value > 1000);
  const bool every = all(value >= 0);
  out[160 + lane] = some + 2 * every;
}

template <class T>
__global__ void convert_kernel(const float* in, uint32_t* packed, float* back, uint32_t* tf32, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const T value = from_float<T>(in[i]);
  back[i] = to_float(value);
  packed[i] = pack2(from_float<T>(0.0f), value);
  tf32[i] = to_tf32(in[i]);
}

// out [threads, 4 + 4 + 4 words]: copies of 16, 8 and 4 bytes of which `bytes` come from the source.
__global__ void copy_kernel(const char* in, int bytes, uint32_t* out) {
  SharedArena arena;
  uint32_t* staged = arena.take<uint32_t>(int(blockDim.x) * 12);
  uint32_t* own = staged + threadIdx.x * 12;
  const char* source = in + threadIdx.x * 16;
  for (int i = 0; i < 12; ++i) own[i] = 7;
  cp_async_16(own, source, bytes);
  cp_async_8(own + 4, source, min(bytes, 8));
  cp_async_4(own + 8, source, min(bytes, 4));
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 12; ++i) out[threadIdx.x * 12 + i] = own[i];
}

__global__ void atomic_kernel(float* sum, int* count, unsigned* bits) {
  atomic_add(sum, 0.5f);
  const int before = atomic_add(count, 1);
  atomic_or(bits, 1u << (before % 32));
  atomic_max(count + 1, before);
}

// ---- a correct pipeline, and the same with one bug each ----

enum Bug {
  kNone,
  kShortPiece,         // the last thread's slot is missing
  kLongRead,           // global memory past the end
  kNoBarrierAfterWait,
  kNoBarrierBeforeReuse,
  kNoWait,
  kLaxWait,
  kDivergentBarrier,
  kShuffleAsFence,
  kBlockRace,          // two blocks write the same element
  kEarlyReturn,
  kDivergentShuffle,
  kMismatchedBarrier,
  kInFlightAtEnd,
  kTooMuchShared,
  kMisaligned,
  kUninitialized,
  kGlobalLdmatrix,
  kShortStage,         // a copy overruns into the next stage of a ring
  kOverrun,            // a plain store past the end of a piece
  kReadInFlight,       // 16 bytes read between issue and wait
  kMisalignedVector,   // a 16-byte load at a multiple of 4
};

constexpr int kStages = 2;

// y[i] = sum over steps of x[step, (i + 1) % threads of the block], through a ring of shared stages.
template <Bug kBug>
__global__ void pipeline_kernel(const float* x, float* y, int steps, int columns) {
  const int threads = blockDim.x, self = threadIdx.x, first = blockIdx.x * threads;
  SharedArena arena;
  const int slots = kBug == kShortPiece ? threads - 1 : threads;
  float* extra = kBug == kTooMuchShared ? arena.take<float>(100000) : nullptr;
  SharedRing<float> ring = arena.take_ring<float>(kStages, slots);
  auto issue = [&](int step) {
    const int column = first + self + (kBug == kLongRead ? 1 : 0);
    const int offset = kBug == kShortStage ? 1 : 0;
    const int bytes = step < steps && column < columns + (kBug == kLongRead ? 1 : 0) ? 4 : 0;
    const float* source = x + (bytes ? step * columns + column : 0);
    if (step < steps) cp_async_4(ring[step % kStages] + self + offset, source, bytes);
    cp_async_commit();
  };
  if (kBug == kOverrun && self == 0) ring[0][slots] = 1.0f;
  if (kBug == kReadInFlight && self == 0) {
    float* piece = arena.take<float>(32);
    cp_async_16(piece, x);
    cp_async_commit();
    y[first] = piece[0];
    cp_async_wait<0>();
  } else if (kBug == kReadInFlight) {
    arena.take<float>(32);
  }
  if (kBug == kMisalignedVector) y[first + self] = reinterpret_cast<const float4*>(x + 1)->x;
  if (kBug == kMisaligned) cp_async_16(ring[0] + 1, x);
  if (kBug == kEarlyReturn && self == 33) return;
  issue(0);
  float sum = extra ? extra[0] : 0.0f;
  for (int step = 0; step < steps; ++step) {
    if (kBug != kNoBarrierBeforeReuse) __syncthreads();
    issue(step + 1);
    if (kBug == kLaxWait) cp_async_wait<2>();
    if (kBug != kNoWait && kBug != kLaxWait) cp_async_wait<1>();
    if (kBug == kShuffleAsFence) sum += 0.0f * shuffle(sum, 0);
    else if (kBug == kDivergentBarrier) {
      if (self != 5) __syncthreads();
      else sum += 1.0f;
    } else if (kBug == kMismatchedBarrier) {
      if (self < 32) __syncthreads();
      else
        __syncthreads();
    } else if (kBug != kNoBarrierAfterWait) __syncthreads();
    if (kBug == kDivergentShuffle) {
      if (self % 2) sum += 0.0f * shuffle(sum, 1);
      else
        sum += 0.0f * shuffle(sum, 0);
    }
    sum += ring[step % kStages][(self + 1) % threads];
  }
  if (kBug == kGlobalLdmatrix) {
    uint32_t r[1];
    ldmatrix_x1(r, x);
  }
  if (kBug != kInFlightAtEnd && kBug != kNoWait) cp_async_wait<0>();
  if (kBug == kUninitialized) sum += arena.take<float>(32)[0];
  if (kBug == kInFlightAtEnd) {
    cp_async_4(ring[0] + self, x);
    cp_async_commit();
  }
  if (kBug == kBlockRace) y[self] = float(blockIdx.x);
  else if (first + self < columns) y[first + self] = sum;
}

template <Bug kBug>
int run_pipeline(const float* x, float* y, int steps, int columns) {
  const int threads = 64;
  const dim3 grid(unsigned(ceil_div(columns, threads)));
  const size_t shared = kStages * arena_bytes<float>(threads) + arena_bytes<float>(32);
  return report(launch(pipeline_kernel<kBug>, grid, threads, shared, nullptr, x, y, steps, columns), "pipeline",
                "x [%d, %d]", steps, columns);
}

}  // namespace
}  // namespace sparsekit::cuda

using namespace sparsekit::cuda;

extern "C" {

int driver_mma(int operation, int selector, const uint32_t* a, const uint32_t* b, const uint32_t* metadata, float* d) {
  return report(launch(mma_kernel, 1, 32, 0, nullptr, operation, selector, a, b, metadata, d), "mma", "%d", operation);
}
int driver_ldmatrix(int count, int transposed, const uint16_t* rows, uint32_t* out) {
  return report(launch(ldmatrix_kernel, 1, 32, arena_bytes<uint16_t>(256), nullptr, count, transposed != 0, rows, out),
                "ldmatrix", "x%d", count);
}
int driver_shuffle(const int* values, int* out) {
  return report(launch(shuffle_kernel, 1, 32, 0, nullptr, values, out), "shuffle", "[32]");
}
int driver_convert(int half, const float* in, uint32_t* packed, float* back, uint32_t* tf32, int count) {
  const auto kernel = half ? convert_kernel<f16> : convert_kernel<bf16>;
  return report(launch(kernel, unsigned(ceil_div(count, 64)), 64, 0, nullptr, in, packed, back, tf32, count), "convert",
                "[%d]", count);
}
int driver_copy(const char* in, int bytes, uint32_t* out) {
  return report(launch(copy_kernel, 1, 64, arena_bytes<uint32_t>(64 * 12), nullptr, in, bytes, out), "copy", "[64]");
}
int driver_atomic(int blocks, float* sum, int* count, unsigned* bits) {
  return report(launch(atomic_kernel, blocks, 64, 0, nullptr, sum, count, bits), "atomic", "[%d]", blocks);
}
int driver_blocks(int x, int y, int threads, int64_t shared) {
  return report(launch(atomic_kernel, dim3(x, y), threads, shared, nullptr, nullptr, nullptr, nullptr), "blocks",
                "%d x %d", x, y);
}

int driver_pipeline(int bug, const float* x, float* y, int steps, int columns) {
  switch (bug) {
#define CASE(B) \
  case B: return run_pipeline<B>(x, y, steps, columns);
    CASE(kNone) CASE(kShortPiece) CASE(kLongRead) CASE(kNoBarrierAfterWait) CASE(kNoBarrierBeforeReuse) CASE(kNoWait)
    CASE(kLaxWait) CASE(kDivergentBarrier) CASE(kShuffleAsFence) CASE(kBlockRace) CASE(kEarlyReturn)
    CASE(kDivergentShuffle) CASE(kMismatchedBarrier) CASE(kInFlightAtEnd) CASE(kTooMuchShared) CASE(kMisaligned)
    CASE(kUninitialized) CASE(kGlobalLdmatrix) CASE(kShortStage) CASE(kOverrun) CASE(kReadInFlight)
    CASE(kMisalignedVector)
#undef CASE
  }
  return reject("pipeline", "Expected a bug from 0 to %d, got %d", int(kMisalignedVector), bug);
}

}  // extern "C"
