// The weight gradient of panels on tensor cores: for every stored block the sum over tokens of dy by x.
//
// A block of up to 16 warps has a tile of outputs and one chunk of the source rows they use, both in shared memory as
// [row][token] for some tokens at a time. A fragment is 16 gathered rows of x by the outputs of one panel; a warp keeps
// the sums of kFragments of them in registers over all tokens of its share, so nothing is multiplied that does not
// survive. Blocks with more fragments than fit walk the tokens again. Shares are added by a second pass.
#include "panel_plan.cuh"
#include "panel_source.cuh"
#include "panel_tile.cuh"

namespace sparsekit::cuda::panel {
namespace {

constexpr int kTokens = 32;
constexpr int kOctets = kTokens / 8;
constexpr int kDepth = 16;   // gathered rows of one mma
constexpr int kClasses = 8;  // see TileLayout

struct Gradient {
  Lists lists;
  Plan plan;
  Source source, outputs;  // of x, of dy
  Tokens tokens, plain;    // the same tokens in the copy of x, in the copy of dy
  int stages, split;
  int64_t shared_bytes;
  const void* x_rows;
  const void* dy_rows;
  int inputs;              // of one group
  void* dvalues;           // [entries][width][depth of a unit]
  float* shares;           // [split] of the same, or null
};

// The fragments whose sums a warp keeps, and where its lanes find their operands.
template <class T, int kWidth>
struct Sums {
  using Layout = TileLayout<T, kTokens>;
  static constexpr int kEights = kWidth / 8;
  static constexpr int kFragments = (sizeof(T) == 2 ? 16 : 12) / kEights;  // what registers hold; even
  static constexpr int kSteps = kTokens / (2 * Layout::kVector);  // an mma takes two pieces of tokens
  float d[kFragments][kEights][4];
  uint32_t slots[kFragments / 2];  // of the lane's piece in the tile of x, 16 bits each
  int output;                      // of the tile: the first one of the panel of fragment `lane`
  uint32_t turns;                  // bit i: fragment i has another panel than i - 1
  int count;

  // Of the panels owner[], whose fragments start at segments[], takes `fragments` from `fragment` on.
  SPARSEKIT_DEVICE void start(const Gradient& job, int64_t fragment, int fragments, const int32_t* segments,
                              const int32_t* owner, int first_panel) {
    const int lane = int(threadIdx.x % kWarp);
    count = fragments;
    output = 0;
    turns = 1;
    for (int p = 0; p < job.lists.per_warp; ++p) {
      if (fragment + lane >= segments[p] && fragment + lane < segments[p + 1])
        output = (owner[p] - first_panel) * kWidth;
      const int64_t start = segments[p] - fragment;
      if (start > 0 && start < fragments) turns |= 1u << start;
    }
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const uint32_t slot = i < fragments ? ldg(job.plan.slots + (fragment + i) * kDepth + lane % 16) : 0;
      slots[i / 2] = i % 2 ? slots[i / 2] | (slot ^ lane / 16) << 16 : slot ^ lane / 16;
#pragma unroll
      for (int h = 0; h < kEights; ++h)
#pragma unroll
        for (int j = 0; j < 4; ++j) d[i][h][j] = 0.0f;
    }
  }
  SPARSEKIT_DEVICE void add(const T* x, const T* dy) {
    const int lane = int(threadIdx.x % kWarp), row = lane % 8 + (kEights == 2 ? lane / 16 * 8 : 0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[2 * kEights];
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        if (i < count) {
          if (turns >> i & 1u) {
            const int first = shuffle(output, i);
            const T* from = dy + Layout::offset(first + row, lane / 8 % 2 + 2 * step);
            if constexpr (kEights == 2) ldmatrix_x4(b, from);
            else ldmatrix_x2(b, from);
          }
          uint32_t a[4];
          ldmatrix_x4(a, x + ((slots[i / 2] >> (i % 2 * 16) & 0xffffu) ^ 2 * step) * Layout::kVector);
#pragma unroll
          for (int h = 0; h < kEights; ++h) {
            const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
            multiply<T>(d[i][h], a, half);
          }
        }
      }
    }
  }
};

// Where the gradients of a fragment belong: lane 4g + t of d[4] has gathered rows g and g + 8, outputs 2t and 2t + 1.
template <class T, int kWidth>
SPARSEKIT_DEVICE void store(const Gradient& job, const Sums<T, kWidth>& sums, int64_t fragment, int first_output,
                            int share) {
  const Lists& l = job.lists;
  const int lane = int(threadIdx.x % kWarp);
  const int64_t elements = (int64_t{l.entries} * kWidth) << l.unit_shift;
#pragma unroll
  for (int i = 0; i < Sums<T, kWidth>::kFragments; ++i) {
    const int panel_output = shuffle(sums.output, i);
    if (i >= sums.count) continue;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int from = ldg(job.plan.origin + (fragment + i) * kDepth + lane / 4 + side * 8);
      if (from < 0) continue;
      const int entry = from >> l.unit_shift, row = from & (l.unit_rows() - 1);
      const bool inside = (ldg(l.columns + entry) % l.units << l.unit_shift) + row < job.inputs;
#pragma unroll
      for (int j = 0; j < 2 * Sums<T, kWidth>::kEights; ++j) {
        const int output = j / 2 * 8 + lane % 4 * 2 + j % 2;
        const bool real = inside && first_output + panel_output + output < l.outputs;
        const float value = real ? sums.d[i][j / 2][side * 2 + j % 2] : 0.0f;
        const int64_t at = ((int64_t{entry} * kWidth + output) << l.unit_shift) + row;
        if (job.shares) job.shares[share * elements + at] = value;
        else static_cast<T*>(job.dvalues)[at] = from_float<T>(value);
      }
    }
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1) gradient_kernel(Gradient job) {
  const Lists& l = job.lists;
  const int tile = int(blockIdx.x) / l.max_chunks, chunk = int(blockIdx.x) % l.max_chunks;
  const int share = int(blockIdx.y), warp = int(threadIdx.x / kWarp), chunk_rows = l.chunk_rows();
  const int used = job.plan.used[tile];
  if (chunk >= l.chunks(used)) return;
  const int tile_panels = l.tile_panels();
  SharedArena arena;
  const SharedRing<T> x_ring = arena.take_ring<T>(job.stages, kTokens * (chunk_rows + kZeroRows));
  const SharedRing<T> dy_ring = arena.take_ring<T>(job.stages, kTokens * tile_panels * kWidth);

  const int group = tile / l.tiles, first_panel = tile % l.tiles * tile_panels;
  const int dy_count = min(tile_panels, l.panels - first_panel) * kWidth;
  const int64_t dy_start = (int64_t{group} * job.outputs.padded + first_panel * kWidth) * job.outputs.plane();
  const int x_units = min(l.chunk_units, used - chunk * l.chunk_units);
  const int32_t* x_starts = job.plan.rows + int64_t{tile} * l.all_units() + chunk * l.chunk_units;
  const int64_t steps = ceil_div(job.tokens.all(), kOctets);
  const int64_t begin = steps * share / job.split, end = steps * (share + 1) / job.split;
  TileLoader<T, kTokens> x_loader(static_cast<const T*>(job.x_rows), job.source.plane());
  TileLoader<T, kTokens> dy_loader(static_cast<const T*>(job.dy_rows), job.outputs.plane());
  const auto load = [&](int64_t step) {
    if (step < end) {
      const int stage = int((step - begin) % job.stages);
      x_loader.turn(job.tokens, step * kOctets);
      x_loader.load(x_ring[stage], x_starts, x_units << l.unit_shift, l.unit_shift);
      dy_loader.turn(job.plain, step * kOctets);
      dy_loader.load_block(dy_ring[stage], dy_start, dy_count);
    }
    cp_async_commit();
  };
  for (int s = 0; s < job.stages; ++s) clear_rows<T, kTokens>(x_ring[s], chunk_rows);

  // Each warp has the fragments of its panels in this chunk; all walk the tokens as often as the fullest one must.
  const int32_t* streams = job.plan.segments + int64_t{tile} * l.warps * l.stream_length() + chunk * l.per_warp;
  int most = 0;
  for (int w = 0; w < l.warps; ++w) {
    const int32_t* stream = streams + int64_t{w} * l.stream_length();
    most = max(most, stream[l.per_warp] - stream[0]);
  }
  const int32_t* segments = streams + int64_t{warp} * l.stream_length();
  const int32_t* owner = job.plan.owner + (int64_t{tile} * l.warps + warp) * l.per_warp;

  for (int pass = 0; pass < most; pass += Sums<T, kWidth>::kFragments) {
    const int fragment = segments[0] + pass;
    const int fragments = max(0, min(Sums<T, kWidth>::kFragments, segments[l.per_warp] - fragment));
    Sums<T, kWidth> sums;
    sums.start(job, fragment, fragments, segments, owner, first_panel);
    for (int s = 0; s < job.stages - 1; ++s) load(begin + s);
    for (int64_t step = begin; step < end; ++step) {
      wait_for_stage(job.stages);
      __syncthreads();  // the tokens have landed for all, and nobody reads the stage that is filled now
      load(step + job.stages - 1);
      const int stage = int((step - begin) % job.stages);
      sums.add(x_ring[stage], dy_ring[stage]);
    }
    cp_async_wait<0>();
    __syncthreads();  // the next pass fills the first stages again
    store<T, kWidth>(job, sums, fragment, first_panel * kWidth, share);
  }
}

// ---- host ----

struct Arranged {
  Gradient job;
  int64_t bytes;
};

int64_t stage_bytes(const PanelShape& s, const Lists& l) {
  const int64_t size = is_half(s) ? 2 : 4;
  const int64_t x = l.chunk_rows() + kZeroRows, dy = l.tile_panels() * l.width;
  return round_up(size * kTokens * x, 128) + round_up(size * kTokens * dy, 128);
}

Arranged arrange(const PanelShape& s, void* workspace) {
  Arranged a{};
  Gradient& job = a.job;
  job.lists = lists_of(s, false, kDepth, kClasses);
  const Lists& l = job.lists;
  if (has_tokens(s)) {
    job.source = source_of_input(s, l.units * l.unit_rows());
    job.tokens = tokens_of_output(s, job.source);
    job.outputs = source_of_output(s, l.panels * l.width);
  } else {  // no tokens: the gradient is 0, and every division below has something to divide by
    job.source.octets = job.outputs.octets = job.source.lines = job.outputs.lines = 1;
    job.source.padded = l.units * l.unit_rows();
    job.outputs.padded = l.panels * l.width;
    job.tokens.octets = job.tokens.lines = 1;
  }
  job.plain = job.tokens;
  job.plain.step = 1;
  job.plain.source_lines = job.tokens.lines;
  job.inputs = int(s.in / s.groups);
  job.stages = stages_for(s, l, stage_bytes(s, l));
  job.shared_bytes = job.stages * stage_bytes(s, l);
  const int64_t steps = ceil_div(job.tokens.all(), kOctets), blocks = int64_t{l.all_tiles()} * l.max_chunks;
  // A share walks 16 token tiles or more; some four blocks for each multiprocessor even out unequal ones.
  const int64_t most = max(int64_t{1}, min(int64_t{16}, steps / 16));
  job.split = s.split ? int(s.split) : int(max(int64_t{1}, min(most, ceil_div(4 * multiprocessors(), blocks))));
  Carver space(workspace);
  const int64_t size = is_half(s) ? 2 : 4, elements = int64_t{l.entries} * l.width * l.unit_rows();
  job.x_rows = space.take<char>(job.source.elements() * size);
  job.dy_rows = space.take<char>(job.outputs.elements() * size);
  job.plan = take_plan(space, l, false);
  if (job.split > 1) job.shares = space.take<float>(job.split * elements);
  a.bytes = space.used();
  return a;
}

template <class T, int kWidth>
cudaError_t queue_gradient(const Gradient& job, void* stream) {
  const Lists& l = job.lists;
  const int64_t blocks = int64_t{l.all_tiles()} * l.max_chunks;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(gradient_kernel<T, kWidth>, dim3(unsigned(blocks), unsigned(job.split)), unsigned(l.warps * kWarp),
                size_t(job.shared_bytes), stream, job);
}

template <class T, class Bits>
cudaError_t queue(const Gradient& job, const void* x, const void* dy, void* stream) {
  const Lists& l = job.lists;
  cudaError_t error = queue_copy<Bits>(x, const_cast<void*>(job.x_rows), job.source, stream);
  if (error == cudaSuccess) error = queue_copy<Bits>(dy, const_cast<void*>(job.dy_rows), job.outputs, stream);
  if (error == cudaSuccess) error = queue_plan<T, kTokens>(l, job.source, job.plan, nullptr, stream);
  if (error == cudaSuccess)
    error = l.width == 8 ? queue_gradient<T, 8>(job, stream) : queue_gradient<T, 16>(job, stream);
  if (error != cudaSuccess || !job.shares) return error;
  return queue_sum<T>(job.shares, job.split, int64_t{l.entries} * l.width * l.unit_rows(), nullptr, 1, kNone,
                      static_cast<T*>(job.dvalues), stream);
}

}  // namespace
}  // namespace sparsekit::cuda::panel

using namespace sparsekit::cuda;
using namespace sparsekit::cuda::panel;

extern "C" {

int64_t sparsekit_cuda_panel_conv2d_sddmm_workspace(const PanelShape* shape) {
  if (refusal(*shape, false)) return -1;
  return shape->blocks > 0 ? arrange(*shape, nullptr).bytes : 0;
}

int sparsekit_cuda_panel_conv2d_sddmm(const PanelShape* shape, const void* dy, const void* x, const int32_t* crow,
                                      const int32_t* col, void* dvalues, void* workspace, void* stream) {
  constexpr const char* kName = "panel_conv2d_sddmm";
  const PanelShape& s = *shape;
  if (const char* sentence = refusal(s, false)) return reject(kName, "%s", sentence);
  if (s.blocks == 0) return 0;
  Arranged a = arrange(s, workspace);
  Gradient& job = a.job;
  job.lists.starts = crow;
  job.lists.columns = col;
  job.dvalues = dvalues;
  if (job.shared_bytes > max_shared_bytes())
    return reject(kName, "Expected a chunk and stages of at most %d bytes of shared memory, got %lld",
                  max_shared_bytes(), static_cast<long long>(job.shared_bytes));
  if (job.tokens.all() > INT32_MAX || job.source.elements() / 8 > INT32_MAX)
    return reject(kName, "Expected fewer than 2^34 elements in the feature-major copy, got %lld",
                  static_cast<long long>(job.source.elements()));
  const cudaError_t error = s.dtype == kBFloat16  ? queue<bf16, uint16_t>(job, x, dy, stream)
                            : s.dtype == kFloat16 ? queue<f16, uint16_t>(job, x, dy, stream)
                                                  : queue<float, float>(job, x, dy, stream);
  return report(error, kName, "%lld x %lld x %lld images, %lld inputs, %lld outputs, %lld blocks of %lld x %lld, %s",
                static_cast<long long>(s.batch), static_cast<long long>(s.height), static_cast<long long>(s.width),
                static_cast<long long>(s.in), static_cast<long long>(s.out), static_cast<long long>(s.blocks),
                static_cast<long long>(s.rows), static_cast<long long>(s.cols), dtype_name(int(s.dtype)));
}

}  // extern "C"
