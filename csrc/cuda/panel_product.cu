// Panels on tensor cores: y = act(W x + b) and, over the transposed list, dx, of linear layers and convolutions.
//
// A block of up to 16 warps makes 64 tokens by up to 512 outputs, sums in registers. It walks the source rows that its
// panels use, chunk by chunk: a chunk lies in shared memory as [row][token], loaded by asynchronous copies some chunks
// ahead and shared by all panels. A panel's columns are gathered there: the lanes of ldmatrix.trans each name a row of
// their own. Weights come from global memory in the order of the mma operand (panel_plan.cuh), one fragment ahead.
#include "panel_plan.cuh"
#include "panel_source.cuh"
#include "panel_tile.cuh"

namespace sparsekit::cuda::panel {
namespace {

constexpr int kTokens = 64;
constexpr int kOctets = kTokens / 8;
constexpr int kStrips = kTokens / 16;  // of 16 tokens: the rows of one mma

template <class T>
constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;    // source rows of one mma
template <class T>
constexpr int kClasses = sizeof(T) == 2 ? 8 : 4;   // see TileLayout

struct Product {
  Lists lists;
  Plan plan;
  Source source;
  Tokens tokens;
  int stages, split;
  int64_t shared_bytes;
  const void* rows;    // the feature-major source
  const void* bias;    // [groups * outputs] or null
  int activation;
  bool whole_pieces;   // outputs can be stored 16 bytes at a time
  void* y;             // [tokens][groups * outputs]
  float* shares;       // [split][tokens][groups * outputs], or null
  int64_t real_tokens;
};

// What a lane holds of one fragment: which rows it gathers, and its part of the weights.
template <class T, int kWidth>
struct Fragment {
  static constexpr int kSlots = sizeof(T) == 2 ? 1 : 2;
  int slot[kSlots];
  uint32_t weights[kWidth / 4];
};

// A warp's fragments one after the other.
template <class T, int kWidth>
struct Stream {
  const uint16_t* slots;
  const uint32_t* weights;

  SPARSEKIT_DEVICE Stream(const Plan& plan, int64_t fragment) {
    const int lane = int(threadIdx.x % kWarp);
    slots = plan.slots + fragment * kDepth<T> + (sizeof(T) == 2 ? lane % 8 + lane / 16 * 8 : lane % 4);
    weights = plan.weights + (fragment * kWarp + lane) * (kWidth / 4);
  }
  SPARSEKIT_DEVICE Fragment<T, kWidth> next() {
    Fragment<T, kWidth> f;
#pragma unroll
    for (int i = 0; i < Fragment<T, kWidth>::kSlots; ++i) f.slot[i] = ldg(slots + 4 * i);
    if constexpr (kWidth == 8) {
      const uint2 w = ldg(reinterpret_cast<const uint2*>(weights));
      f.weights[0] = w.x, f.weights[1] = w.y;
    } else {
      const uint4 w = ldg(reinterpret_cast<const uint4*>(weights));
      f.weights[0] = w.x, f.weights[1] = w.y, f.weights[2] = w.z, f.weights[3] = w.w;
    }
    slots += kDepth<T>;
    weights += kWarp * (kWidth / 4);
    return f;
  }
};

// Operand a of a strip: 16 tokens of the gathered rows. Strips are a multiple of 16 tokens apart within a row.
template <class T, int kWidth>
SPARSEKIT_DEVICE void gather(uint32_t (&a)[4], const T* tile, const Fragment<T, kWidth>& f, int strip) {
  using Layout = TileLayout<T, kTokens>;
  const int lane = int(threadIdx.x % kWarp);
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4_trans(a, tile + (f.slot[0] ^ (lane / 8 % 2 + 2 * strip)) * Layout::kVector);
  } else {  // ldmatrix cannot transpose 4-byte elements
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int piece = 4 * strip + 2 * (i % 2);
      a[i] = __float_as_uint(tile[(f.slot[i / 2] ^ piece) * Layout::kVector + lane / 4]);
    }
  }
}

// Sums of a warp: for each of its panels, 64 tokens by kWidth outputs. Lane 4g + t of d[4] has tokens g and g + 8 of a
// strip, outputs 2t and 2t + 1 of eight.
template <class T, int kWidth, int kPerWarp>
struct Sums {
  static constexpr int kEights = kWidth / 8;
  float d[kPerWarp][kEights][kStrips][4];

  SPARSEKIT_DEVICE void clear() {
#pragma unroll
    for (int p = 0; p < kPerWarp; ++p)
#pragma unroll
      for (int h = 0; h < kEights; ++h)
#pragma unroll
        for (int m = 0; m < kStrips; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) d[p][h][m][i] = 0.0f;
  }
  SPARSEKIT_DEVICE void add(int p, const T* stage, const Fragment<T, kWidth>& f) {
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      uint32_t a[4];
      gather(a, stage, f, m);
#pragma unroll
      for (int h = 0; h < kEights; ++h) {
        const uint32_t b[2] = {f.weights[2 * h], f.weights[2 * h + 1]};
        multiply<T>(d[p][h][m], a, b);
      }
    }
  }
  // Adds value(panel of the warp, output of the panel) for all tokens.
  template <class Value>
  SPARSEKIT_DEVICE void add_to_outputs(const Value& value) {
    const int lane = int(threadIdx.x % kWarp);
#pragma unroll
    for (int p = 0; p < kPerWarp; ++p)
#pragma unroll
      for (int h = 0; h < kEights; ++h)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float v = value(p, h * 8 + lane % 4 * 2 + i);
#pragma unroll
          for (int m = 0; m < kStrips; ++m) d[p][h][m][i] += v, d[p][h][m][i + 2] += v;
        }
  }
  // Calls put(panel of the warp, token, output of the panel, two sums) for every pair of neighbouring outputs.
  template <class Put>
  SPARSEKIT_DEVICE void each(const Put& put) const {
    const int lane = int(threadIdx.x % kWarp);
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int i = 0; i < 4; i += 2)
#pragma unroll
        for (int p = 0; p < kPerWarp; ++p)
#pragma unroll
          for (int h = 0; h < kEights; ++h)
            put(p, m * 16 + lane / 4 + i * 4, h * 8 + lane % 4 * 2, d[p][h][m][i], d[p][h][m][i + 1]);
  }
};

// The finished tile in shared memory, [token][output], pieces permuted so that lanes of eight tokens do not collide.
template <class T>
struct Finished {
  static constexpr int kVector = 16 / int(sizeof(T));
  T* tile;
  int outputs;  // a multiple of 64

  SPARSEKIT_DEVICE T* at(int token, int output) const {
    const int key = sizeof(T) == 2 ? token % 8 : token % 4 * 2;
    return tile + token * outputs + ((output / kVector) ^ key) * kVector + output % kVector;
  }
  SPARSEKIT_DEVICE void put(int token, int output, float first, float second) const {
    if constexpr (sizeof(T) == 2) *reinterpret_cast<uint32_t*>(at(token, output)) = pack2_floats<T>(first, second);
    else *reinterpret_cast<float2*>(at(token, output)) = make_float2(first, second);
  }
  // Stores all real tokens and the first `real` outputs to y + output, rows of `stride`.
  SPARSEKIT_DEVICE void store(const Product& job, int64_t octet, T* y, int64_t stride, int real) const {
    const int pieces = outputs / kVector;
    for (int i = int(threadIdx.x); i < kTokens * pieces; i += int(blockDim.x)) {
      const int token = i / pieces, output = i % pieces * kVector;
      const int64_t row = job.tokens.real(octet + token / 8, token % 8);
      if (row < 0 || output >= real) continue;
      const T* from = at(token, output);
      T* to = y + row * stride + output;
      if (job.whole_pieces) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int j = 0; j < min(kVector, real - output); ++j) to[j] = from[j];
      }
    }
  }
};

template <class T, int kWidth, int kPerWarp>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1) product_kernel(Product job) {
  const Lists& l = job.lists;
  const int tiles = l.all_tiles(), tile = int(blockIdx.x % unsigned(tiles)), warp = int(threadIdx.x / kWarp);
  const int64_t octet = int64_t{blockIdx.x / unsigned(tiles)} * kOctets;
  const int chunk_rows = l.chunk_rows(), tile_outputs = l.warps * kPerWarp * kWidth;
  SharedArena arena;
  const SharedRing<T> ring = arena.take_ring<T>(job.stages, kTokens * max(chunk_rows + kZeroRows, tile_outputs));

  const int used = job.plan.used[tile], chunks = l.chunks(used), share = int(blockIdx.y);
  const int begin = int(int64_t{chunks} * share / job.split), end = int(int64_t{chunks} * (share + 1) / job.split);
  const int32_t* rows = job.plan.rows + int64_t{tile} * l.all_units();
  TileLoader<T, kTokens> loader(static_cast<const T*>(job.rows), job.source.plane());
  loader.turn(job.tokens, octet);
  const auto load = [&](int chunk) {
    if (chunk < end) {
      const int first = chunk * l.chunk_units, units = min(l.chunk_units, used - first);
      loader.load(ring[(chunk - begin) % job.stages], rows + first, units << l.unit_shift, l.unit_shift);
    }
    cp_async_commit();
  };
  for (int s = 0; s < job.stages; ++s) clear_rows<T, kTokens>(ring[s], chunk_rows);
  for (int s = 0; s < job.stages - 1; ++s) load(begin + s);

  Sums<T, kWidth, kPerWarp> sums;
  sums.clear();
  const int32_t* segments =
      job.plan.segments + (int64_t{tile} * l.warps + warp) * l.stream_length() + begin * kPerWarp;
  int fragment = *segments, current = 0;
  Stream<T, kWidth> stream(job.plan, fragment);
  Fragment<T, kWidth> next = stream.next();
  for (int chunk = begin; chunk < end; ++chunk) {
    int last[kPerWarp];
#pragma unroll
    for (int p = 0; p < kPerWarp; ++p) last[p] = ldg(++segments);
    wait_for_stage(job.stages);
    __syncthreads();  // the chunk has landed for all, and nobody reads the stage that is filled now
    load(chunk + job.stages - 1);
    const T* stage = ring[current];
    current = current + 1 < job.stages ? current + 1 : 0;
#pragma unroll
    for (int p = 0; p < kPerWarp; ++p) {
      for (; fragment < last[p]; ++fragment) {
        const Fragment<T, kWidth> now = next;
        next = stream.next();  // of the last fragment: one that is there but never used
        sums.add(p, stage, now);
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the first stage takes the finished tile

  const int group = tile / l.tiles, first_panel = tile % l.tiles * l.warps * kPerWarp;
  const int first = first_panel * kWidth, real = min(tile_outputs, l.outputs - first);  // outputs within the group
  const int64_t stride = int64_t{l.groups} * l.outputs, origin = int64_t{group} * l.outputs + first;
  const int32_t* owner = job.plan.owner + (int64_t{tile} * l.warps + warp) * kPerWarp;
  int local[kPerWarp];
#pragma unroll
  for (int p = 0; p < kPerWarp; ++p) local[p] = owner[p] < 0 ? -kWidth : (owner[p] - first_panel) * kWidth;
  if (job.shares) {
    float* shares = job.shares + (share * job.real_tokens) * stride + origin;
    sums.each([&](int p, int token, int output, float a, float b) {
      const int64_t row = job.tokens.real(octet + token / 8, token % 8);
      const int at = local[p] + output;
      if (local[p] < 0 || row < 0) return;
      if (at < real) shares[row * stride + at] = a;
      if (at + 1 < real) shares[row * stride + at + 1] = b;
    });
    return;
  }
  if (job.bias) {
    sums.add_to_outputs([&](int p, int output) {
      const int at = local[p] + output;
      return at >= 0 && at < real ? to_float(static_cast<const T*>(job.bias)[origin + at]) : 0.0f;
    });
  }
  const Finished<T> finished{ring[0], tile_outputs};
  const auto finish = [&](const auto& act) {
    sums.each([&](int p, int token, int output, float a, float b) {
      if (local[p] >= 0) finished.put(token, local[p] + output, act(a), act(b));
    });
  };
  // Chosen once: code of the other activations between that of one would fill the instruction cache.
  if (job.activation == kNone) finish([](float v) { return v; });
  else if (job.activation == kRelu) finish([](float v) { return activate(v, kRelu); });
  else if (job.activation == kGelu) finish([](float v) { return activate(v, kGelu); });
  else finish([](float v) { return activate(v, kSilu); });
  __syncthreads();
  finished.store(job, octet, static_cast<T*>(job.y) + origin, stride, real);
}

// ---- host ----

// A product with its work space, which is only counted while `workspace` is null.
struct Arranged {
  Product job;
  int64_t token_tiles;
  int64_t bytes;
};

int64_t stage_bytes(const PanelShape& s, const Lists& l) {
  return (is_half(s) ? 2 : 4) * int64_t{kTokens} * max(l.chunk_rows() + kZeroRows, l.tile_panels() * l.width);
}

Arranged arrange(const PanelShape& s, bool transposed, void* workspace) {
  Arranged a{};
  Product& job = a.job;
  job.lists = is_half(s) ? lists_of(s, transposed, kDepth<bf16>, kClasses<bf16>)
                         : lists_of(s, transposed, kDepth<float>, kClasses<float>);
  const Lists& l = job.lists;
  const int padded = l.units << l.unit_shift;
  job.source = transposed ? source_of_gradient(s, padded) : source_of_input(s, padded);
  job.tokens = transposed ? tokens_of_input(s, job.source) : tokens_of_output(s, job.source);
  job.real_tokens = int64_t{job.tokens.batch} * job.tokens.lines * job.tokens.width;
  a.token_tiles = ceil_div(job.tokens.all(), kOctets);
  job.stages = stages_for(s, l, stage_bytes(s, l));
  job.shared_bytes = job.stages * stage_bytes(s, l);
  const int64_t blocks = l.all_tiles() * a.token_tiles, most = min(int64_t{16}, int64_t{l.max_chunks});
  job.split = s.split ? int(s.split) : int(max(int64_t{1}, min(most, multiprocessors() / max(int64_t{1}, blocks))));
  Carver space(workspace);
  job.rows = space.take<char>(job.source.elements() * (is_half(s) ? 2 : 4));
  job.plan = take_plan(space, l, true);
  if (job.split > 1) job.shares = space.take<float>(job.split * job.real_tokens * l.groups * l.outputs);
  a.bytes = space.used();
  return a;
}

template <class T, int kWidth, int kPerWarp>
cudaError_t queue_product(const Product& job, dim3 grid, void* stream) {
  return launch(product_kernel<T, kWidth, kPerWarp>, grid, unsigned(job.lists.warps * kWarp), size_t(job.shared_bytes),
                stream, job);
}

template <class T, class Bits>
cudaError_t queue(const Arranged& a, const void* source, const void* values, void* stream) {
  const Product& job = a.job;
  const Lists& l = job.lists;
  cudaError_t error = queue_copy<Bits>(source, const_cast<void*>(job.rows), job.source, stream);
  if (error == cudaSuccess) error = queue_plan<T, kTokens>(l, job.source, job.plan, values, stream);
  if (error != cudaSuccess) return error;
  const int64_t blocks = l.all_tiles() * a.token_tiles;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(unsigned(blocks), unsigned(job.split));
  if (l.width == 8 && l.per_warp == 2) error = queue_product<T, 8, 2>(job, grid, stream);
  else if (l.width == 16 && l.per_warp == 1) error = queue_product<T, 16, 1>(job, grid, stream);
  else if constexpr (sizeof(T) == 2) {
    error = l.width == 8 ? queue_product<T, 8, 4>(job, grid, stream) : queue_product<T, 16, 2>(job, grid, stream);
  }
  if (error != cudaSuccess || !job.shares) return error;
  const int columns = l.groups * l.outputs;
  return queue_sum(job.shares, job.split, job.real_tokens * columns, static_cast<const T*>(job.bias), columns,
                   job.activation, static_cast<T*>(job.y), stream);
}

const char* name_of(bool transposed) { return transposed ? "panel_conv2d_t" : "panel_conv2d"; }

int run(const PanelShape& s, bool transposed, Arranged& a, const void* source, const void* values, void* stream) {
  const char* name = name_of(transposed);
  Product& job = a.job;
  const int vector = is_half(s) ? 8 : 4;
  job.whole_pieces = reinterpret_cast<uintptr_t>(job.y) % 16 == 0 && job.lists.outputs % vector == 0;
  if (job.shared_bytes > max_shared_bytes())
    return reject(name, "Expected a chunk and stages of at most %d bytes of shared memory, got %lld",
                  max_shared_bytes(), static_cast<long long>(job.shared_bytes));
  if (job.tokens.all() > INT32_MAX || job.source.elements() / 8 > INT32_MAX)
    return reject(name, "Expected fewer than 2^34 elements in the feature-major copy, got %lld",
                  static_cast<long long>(job.source.elements()));
  const cudaError_t error = s.dtype == kBFloat16  ? queue<bf16, uint16_t>(a, source, values, stream)
                            : s.dtype == kFloat16 ? queue<f16, uint16_t>(a, source, values, stream)
                                                  : queue<float, float>(a, source, values, stream);
  return report(error, name, "%lld tokens, %lld inputs, %lld outputs, %lld blocks of %lld x %lld, %s",
                static_cast<long long>(job.real_tokens), static_cast<long long>(s.in), static_cast<long long>(s.out),
                static_cast<long long>(s.blocks), static_cast<long long>(s.rows), static_cast<long long>(s.cols),
                dtype_name(int(s.dtype)));
}

}  // namespace
}  // namespace sparsekit::cuda::panel

using namespace sparsekit::cuda;
using namespace sparsekit::cuda::panel;

extern "C" {

int64_t sparsekit_cuda_panel_conv2d_workspace(const PanelShape* shape) {
  if (refusal(*shape, false)) return -1;
  return has_tokens(*shape) ? arrange(*shape, false, nullptr).bytes : 0;
}

int sparsekit_cuda_panel_conv2d(const PanelShape* shape, const void* x, const void* values, const int32_t* crow,
                                const int32_t* col, const void* bias, int activation, void* y, void* workspace,
                                void* stream) {
  if (const char* sentence = refusal(*shape, false)) return reject(name_of(false), "%s", sentence);
  if (activation < kNone || activation > kSilu)
    return reject(name_of(false), "Expected an activation from 0 to 3, got %d", activation);
  if (!has_tokens(*shape)) return 0;
  Arranged a = arrange(*shape, false, workspace);
  a.job.lists.starts = crow;
  a.job.lists.columns = col;
  a.job.bias = bias;
  a.job.activation = activation;
  a.job.y = y;
  return run(*shape, false, a, x, values, stream);
}

int64_t sparsekit_cuda_panel_conv2d_t_workspace(const PanelShape* shape) {
  if (refusal(*shape, true)) return -1;
  return has_tokens(*shape) ? arrange(*shape, true, nullptr).bytes : 0;
}

int sparsekit_cuda_panel_conv2d_t(const PanelShape* shape, const void* dy, const void* values, const int32_t* t_crow,
                                  const int32_t* t_row, const int32_t* t_perm, void* dx, void* workspace,
                                  void* stream) {
  if (const char* sentence = refusal(*shape, true)) return reject(name_of(true), "%s", sentence);
  if (!has_tokens(*shape)) return 0;
  Arranged a = arrange(*shape, true, workspace);
  a.job.lists.starts = t_crow;
  a.job.lists.columns = t_row;
  a.job.lists.perm = t_perm;
  a.job.y = dx;
  return run(*shape, true, a, dy, values, stream);
}

}  // extern "C"
