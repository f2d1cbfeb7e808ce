// y = activation(x Wᵀ + b) for few tokens and an unstructured W: load sparse, compute dense.
//
// With up to some 64 tokens the product is bound by reading W, so W travels packed (bitmap_stream.cuh) and is unpacked
// in registers. Columns of a product can be permuted freely as long as weights and x agree: lane 4g + t of a warp takes
// row g of tile t of every four tiles, eight neighbouring columns, so one byte of a bitmap says all it must know.
// Unpacking costs instructions, shared loads and popc (16 lanes a clock) for every weight, pruned or not.
//
// Not yet run on a GPU: where the launcher chooses (`Plan`), it goes by the count of instructions.
#include "bitmap_linear.h"

#include <type_traits>

#include "activation.cuh"
#include "bitmap_stream.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace sparsekit::cuda {
namespace {

using namespace bitmap;

// Writes what a warp has summed, its rows side by side: up to 8 tokens are gathered in `scratch` (kScratch) first.
template <class T>
class Writer {
 public:
  SPARSEKIT_DEVICE Writer(const Arguments<T>& a, const Place& place, float* scratch)
      : a_(a),
        place_(place),
        scratch_(scratch),
        lane_(int(threadIdx.x) % kWarp),
        row_(int64_t{place.row_block} * kBlockRows + int(threadIdx.x) / kWarp * kWarpRows + lane_) {
    static_assert(kWarpRows == kWarp, "a lane writes one row");
  }

  SPARSEKIT_DEVICE void put(int token, int row, float sum) { scratch_[at(token, row)] = sum; }

  // Writes tokens first .. first + count - 1 of the block, put as tokens 0 .. count - 1.
  SPARSEKIT_DEVICE void flush(int first, int count) {
    __syncwarp();
#pragma unroll 1
    for (int token = 0; token < count; ++token) write(place_.first_token + first + token, scratch_[at(token, lane_)]);
    __syncwarp();  // before the next tokens are put
  }

 private:
  // Rows are swapped so that the lanes of a fragment, four pairs of tokens by eight rows, meet 32 banks.
  SPARSEKIT_DEVICE static int at(int token, int row) { return token * kWarpRows + (row ^ token / 2 * 8); }

  SPARSEKIT_DEVICE void write(int64_t token, float sum) {
    if (token >= a_.tokens || row_ >= a_.rows) return;
    if (a_.splits > 1) {
      a_.parts[(place_.split * a_.tokens + token) * a_.rows + row_] = sum;
    } else {
      if (a_.bias) sum += to_float(a_.bias[row_]);
      a_.y[token * a_.rows + row_] = from_float<T>(activate(sum, a_.activation));
    }
  }

  const Arguments<T>& a_;
  const Place& place_;
  float* const scratch_;
  const int lane_;
  const int64_t row_;
};

template <class T>
SPARSEKIT_DEVICE const T* after_bytes(const T* p, unsigned bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}

// ---- tensor cores ----

template <class T>
SPARSEKIT_DEVICE void multiply_add(float (&d)[4], const uint32_t (&weights)[4], uint32_t x_low, uint32_t x_high) {
  static_assert(std::is_same_v<T, f16> || std::is_same_v<T, bf16>, "tensor cores take 16-bit types here");
  const uint32_t x[2] = {x_low, x_high};
  if constexpr (std::is_same_v<T, f16>) mma_m16n8k16_f16(d, weights, x);
  else mma_m16n8k16_bf16(d, weights, x);
}

// The eight weights of row `row` (of four) of a half tile, two to a register, zero where pruned.
//
// The first weight of a pair is the last survivor up to and with its own bit, the second the one after that; one popc
// finds both. What was read for a pruned weight is dropped by the permutation that joins the two: the upper halves of
// both registers are zero, and a byte of the selector is 0x22 or 0x66 for those, 0x10 or 0x54 (0x12 less) for a weight.
template <class T>
SPARSEKIT_DEVICE void unpack(const T* values, uint2 half, int row, uint32_t (&weights)[4]) {
  const T* before = after_bytes(values, half.y);
  const unsigned bits = half.x << (24 - kSide * row);  // of this row: 24 .. 31, of the rows before it: below
#pragma unroll
  for (int two = 0; two < 2; ++two) {
    const unsigned four = bits >> (24 + 4 * two) & 0xfu;
    const unsigned spread = four * 0x00204081u & 0x01010101u;  // a byte for each bit
    const unsigned selectors = 0x66226622u - 0x12u * spread;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pair = 2 * two + i;
      const T* first = before + __popc(bits & ((2u << (24 + 2 * pair)) - 1u));
      weights[pair] = permute_bytes(pack2(first[0], {}), pack2(first[1], {}), selectors >> 16 * i);
    }
  }
}

// kWarpRows outputs of 8 * Columns tokens in mma fragments: 16 outputs by 8 tokens in each. Of every 32 columns of W,
// lane 4g + t holds columns 8t .. 8t+7: the first four go into one m16n8k16, the others into a second.
template <class T, int Columns>
class TensorProduct {
 public:
  static constexpr int kTokens = 8 * Columns;

  SPARSEKIT_DEVICE void operator()(const T* values, const uint2* halves, const T* x) {
    const int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
    uint32_t weights[kGroups][2][4];  // row group, first or second m16n8k16
#pragma unroll
    for (int r = 0; r < kWarpRuns; ++r) {
      uint32_t row[4];
      unpack(values, halves[2 * (kRunTiles * r + t) + g / 4], g % 4, row);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) weights[r / 2][pair / 2][r % 2 + pair % 2 * 2] = row[pair];
    }
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
      const uint4 b = *reinterpret_cast<const uint4*>(x + (8 * n + g) * kTokenStride<T> + kSide * t);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        multiply_add<T>(sums_[group][n], weights[group][0], b.x, b.y);
        multiply_add<T>(sums_[group][n], weights[group][1], b.z, b.w);
      }
    }
  }

  SPARSEKIT_DEVICE void write(Writer<T>& to) const {
    const int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int i = 0; i < 4; ++i) to.put(2 * t + i % 2, 16 * group + g + i / 2 * 8, sums_[group][n][i]);
      to.flush(8 * n, 8);
    }
  }

 private:
  static constexpr int kGroups = kWarpRows / 16;
  float sums_[kGroups][Columns][4] = {};
};

// ---- CUDA cores: one token, or float32 ----

// Lane 4g + t sums row g of its tiles, survivor by survivor: no work for pruned weights.
template <class T, int Tokens>
class VectorProduct {
 public:
  static constexpr int kTokens = Tokens;
  static_assert(Tokens <= 8, "they are written in one go");

  SPARSEKIT_DEVICE void operator()(const T* values, const uint2* halves, const T* x) {
    const int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4, shift = kSide * (g % 4);
#pragma unroll
    for (int r = 0; r < kWarpRuns; ++r) {
      const uint2 half = halves[2 * (kRunTiles * r + t) + g / 4];
      const T* value = after_bytes(values, half.y) + __popc(half.x & ((1u << shift) - 1u));
      for (unsigned bits = half.x >> shift & 0xffu; bits; bits &= bits - 1u) {
        const float weight = to_float(*++value);
        const T* column = x + kSide * t + __ffs(int(bits)) - 1;
#pragma unroll
        for (int token = 0; token < Tokens; ++token)
          sums_[r][token] = fmaf(weight, to_float(column[token * kTokenStride<T>]), sums_[r][token]);
      }
    }
  }

  SPARSEKIT_DEVICE void write(Writer<T>& to) const {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int r = 0; r < kWarpRuns; ++r)
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
        float sum = sums_[r][token];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (lane % 4 == 0) to.put(token, kSide * r + lane / 4, sum);
      }
    to.flush(0, Tokens);
  }

 private:
  float sums_[kWarpRuns][Tokens] = {};
};

// ---- kernels ----

template <class T, class Product>
__global__ void __launch_bounds__(kThreads, Product::kTokens > 32 ? 2 : 3) product_kernel(Arguments<T> a) {
  const Place place(a, Product::kTokens);
  Stream<T, Product::kTokens> stream(a, place);
  Product product;
  stream.feed(product);
  Writer<T> to(a, place, stream.scratch());
  product.write(to);
}

// Adds the parts of the sum in order, one output per thread.
template <class T>
__global__ void __launch_bounds__(256) finish_kernel(Arguments<T> a) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, size = a.tokens * a.rows;
  if (at >= size) return;
  float sum = 0.0f;
  for (int split = 0; split < a.splits; ++split) sum += a.parts[split * size + at];
  if (a.bias) sum += to_float(a.bias[at % a.rows]);
  a.y[at] = from_float<T>(activate(sum, a.activation));
}

// x with rows `stride` apart, copied to 16-byte aligned rows.
template <class T>
__global__ void __launch_bounds__(256) align_kernel(const T* x, int64_t stride, T* aligned, int64_t aligned_stride,
                                                    int64_t tokens, int64_t features) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= tokens * features) return;
  aligned[at / features * aligned_stride + at % features] = x[at / features * stride + at % features];
}

// ---- host ----

// Below this density a warp meets too few survivors to pay for unpacking every weight (one token, 16-bit values).
constexpr double kVectorDensity = 0.1;

// How a product is run. Made of sizes alone: the work space is known without looking at tensors.
struct Plan {
  bool tensor_cores, align;
  int columns;  // of 8 tokens in a block, tensor cores
  int tokens;   // in a block
  int runs, runs_per_split, splits, stages, capacity;
  int64_t row_blocks, token_blocks, x_stride, shared, aligned_bytes, bytes;

  Plan(const void* x, int64_t stride, int64_t all_tokens, int64_t features, int64_t rows, int64_t nnz, int dtype) {
    const int size = dtype == kFloat32 ? 4 : 2, vector = 16 / size;
    const double density = double(nnz) / (double(rows) * double(features) + 1e-30);
    tensor_cores = dtype != kFloat32 && (all_tokens > 1 || density >= kVectorDensity);
    columns = all_tokens <= 8 ? 1 : all_tokens <= 16 ? 2 : all_tokens <= 32 ? 4 : 8;
    tokens = tensor_cores ? 8 * columns : all_tokens == 1 ? 1 : 8;
    align = reinterpret_cast<uintptr_t>(x) % 16 || stride % vector;
    x_stride = align ? round_up(features, vector) : stride;
    aligned_bytes = align ? round_up(all_tokens * x_stride * size, 256) : 0;
    runs = int(ceil_div(features, kRunColumns));
    row_blocks = ceil_div(rows, kBlockRows);
    token_blocks = ceil_div(all_tokens, tokens);
    dtype == kFloat32 ? shape_stages<float>(density) : shape_stages<f16>(density);
    spread();
    bytes = aligned_bytes + (splits > 1 ? splits * all_tokens * rows * int64_t(sizeof(float)) : 0);
  }

  int64_t blocks() const { return row_blocks * splits * token_blocks; }

 private:
  // Room for a quarter more values than a run has on average; three stages where two blocks still fit side by side.
  template <class T>
  void shape_stages(double density) {
    const int64_t limit = max_shared_bytes();
    const auto bytes = [&](int count, int64_t room) { return int64_t(stream_bytes<T>(tokens, count, int(room))); };
    const int64_t usual = round_up(int64_t(1.25 * density * kSide * kRunColumns) + 64, kVector<T>);
    const int64_t wanted = usual < kLargestRun<T> ? usual : kLargestRun<T>;
    const int64_t excess = bytes(2, wanted) - limit, a_vector = 2 * kWarps * kWarpRuns * 16;
    const int64_t given = excess > 0 ? wanted - ceil_div(excess, a_vector) * kVector<T> : wanted;
    capacity = int(given > kSmallestRun ? given : kSmallestRun);
    stages = bytes(3, capacity) <= limit / 2 ? 3 : 2;
    shared = bytes(stages, capacity);
  }

  // Cuts the columns until the machine is full of blocks.
  void spread() {
    const int64_t beside = max_shared_bytes() / shared;
    const int64_t places = multiprocessors() * (beside < 1 ? 1 : beside < 4 ? beside : 4);
    const int64_t own = row_blocks * token_blocks;
    const int64_t wanted = own > 0 ? places / own : 1;
    const int64_t cut = wanted < 1 ? 1 : wanted < runs ? wanted : runs;
    runs_per_split = cut > 0 ? int(ceil_div(runs, cut)) : 1;
    splits = runs > 0 ? int(ceil_div(runs, runs_per_split)) : 1;
  }
};

template <class T, class Product>
cudaError_t multiply(const Plan& plan, const Arguments<T>& a, void* stream) {
  return launch(product_kernel<T, Product>, unsigned(plan.blocks()), kThreads, size_t(plan.shared), stream, a);
}

template <class T>
cudaError_t multiply(const Plan& plan, const Arguments<T>& a, void* stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (plan.tokens > 1) return multiply<T, VectorProduct<T, 8>>(plan, a, stream);
  } else if (plan.tensor_cores) {
    switch (plan.columns) {
      case 1: return multiply<T, TensorProduct<T, 1>>(plan, a, stream);
      case 2: return multiply<T, TensorProduct<T, 2>>(plan, a, stream);
      case 4: return multiply<T, TensorProduct<T, 4>>(plan, a, stream);
      default: return multiply<T, TensorProduct<T, 8>>(plan, a, stream);
    }
  }
  return multiply<T, VectorProduct<T, 1>>(plan, a, stream);
}

template <class T>
cudaError_t run(const Plan& plan, Arguments<T> a, void* workspace, void* stream) {
  const int64_t outputs = a.tokens * a.rows, inputs = plan.align ? a.tokens * a.features : 0;
  if (plan.blocks() > INT32_MAX || ceil_div(outputs, 256) > INT32_MAX || ceil_div(inputs, 256) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  if (plan.align) {
    T* aligned = static_cast<T*>(workspace);
    const cudaError_t error = launch(align_kernel<T>, unsigned(ceil_div(inputs, 256)), 256, 0, stream, a.x, a.x_stride,
                                     aligned, plan.x_stride, a.tokens, a.features);
    if (error != cudaSuccess) return error;
    a.x = aligned;
    a.x_stride = plan.x_stride;
  }
  a.parts = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.aligned_bytes);
  const cudaError_t error = multiply<T>(plan, a, stream);
  if (error != cudaSuccess || plan.splits == 1) return error;
  return launch(finish_kernel<T>, unsigned(ceil_div(outputs, 256)), 256, 0, stream, a);
}

}  // namespace
}  // namespace sparsekit::cuda

using namespace sparsekit::cuda;

extern "C" int64_t sparsekit_cuda_bitmap_linear_workspace(const void* x, int64_t x_stride, int64_t tokens,
                                                          int64_t features, int64_t rows, int64_t nnz, int dtype) {
  return Plan(x, x_stride, tokens, features, rows, nnz, dtype).bytes;
}

extern "C" int sparsekit_cuda_bitmap_linear(const void* x, int64_t x_stride, const void* values, const int64_t* bitmap,
                                            const int32_t* offsets, const void* bias, void* y, int64_t tokens,
                                            int64_t features, int64_t rows, int64_t nnz, int activation, int dtype,
                                            void* workspace, void* stream) {
  constexpr const char* kernel = "bitmap linear";
  if (dtype != kFloat16 && dtype != kBFloat16 && dtype != kFloat32)
    return reject(kernel, "Expected float16, bfloat16 or float32, got %s", dtype_name(dtype));
  if (activation < kNone || activation > kSilu)
    return reject(kernel, "Expected an activation from 0 (none) to 3 (silu), got %d", activation);
  for (const int64_t size : {features, rows, nnz})
    if (size < 0 || size > INT32_MAX)
      return reject(kernel, "Expected features, rows and survivors below 2^31, got %lld", static_cast<long long>(size));
  if (tokens < 0) return reject(kernel, "Expected a number of tokens, got %lld", static_cast<long long>(tokens));
  if (reinterpret_cast<uintptr_t>(values) % 16)
    return reject(kernel, "Expected values at an address that is a multiple of 16, got %p", values);
  if (tokens == 0 || rows == 0) return 0;

  const Plan plan(x, x_stride, tokens, features, rows, nnz, dtype);
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    const Arguments<T> a{static_cast<const T*>(x), x_stride, static_cast<const T*>(values),
                         reinterpret_cast<const uint64_t*>(bitmap), offsets, static_cast<const T*>(bias),
                         static_cast<T*>(y), nullptr, tokens, features, rows, nnz,
                         int(ceil_div(rows, kSide)), int(ceil_div(features, kSide)), plan.runs, plan.runs_per_split,
                         plan.splits, int(plan.row_blocks), plan.stages, plan.capacity, activation};
    return run<T>(plan, a, workspace, stream);
  };
  const cudaError_t error = dtype == kFloat16    ? with(f16{})
                            : dtype == kBFloat16 ? with(bf16{})
                                                 : with(0.0f);
  return report(error, kernel, "%s x [%lld, %lld], W [%lld, %lld] with %lld survivors", dtype_name(dtype),
                static_cast<long long>(tokens), static_cast<long long>(features), static_cast<long long>(rows),
                static_cast<long long>(features), static_cast<long long>(nnz));
}
